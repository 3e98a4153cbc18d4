r"""Exact S of any smooth network, along one parameter after the other.

With e the direction of one entry θᵢ, the outputs along it are a curve τ ↦ h(θ + τe). Its first and
second derivatives at 0 are ∂ᵢh and ∂²ᵢᵢh of all T outputs at once, by forward mode over forward
mode. That takes one pass for every entry of every parameter, and nothing of the network has to be
known: softmax, attention, norms, recurrence and tied parameters are included.

In torch 2.13 forward mode over forward mode is wrong in places, and nothing says so: through norms
(which ``rewrite`` writes out), ``torch.linalg.solve`` (terms count twice), and an
``autograd.Function`` with a ``jvp()`` of its own (whose second derivatives are lost). There the
check of all engines refuses it, and reverse mode over reverse mode follows, output by output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fimlib._progress import progress
from fimlib.derivatives import Block, Derivatives
from fimlib.engines.model import call_with
from fimlib.engines.rewrite import rewritten
from fimlib.memory import raise_if_out_of_memory

NUMBERS_AT_A_TIME = 2**22  # that all operations of a forward pass make together
DIRECTIONS_AT_A_TIME = 512
DIRECTIONS_TO_TIME = 64
MANY_PARAMETERS = 10_000  # passes that are no longer done unasked

Curves = Callable[[nn.Module, Tensor, str, Tensor], tuple[Tensor, Tensor]]


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Kernels for attention and recurrence that have second derivatives, in forward mode too."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(without_fast_path())
        yield


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Attention as it is written, not by a kernel of its own."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def differentiate(
    own: nn.Module, x: Tensor, names: list[str], outputs: Tensor, curves: Curves
) -> Derivatives:
    """J and S of the named parameters, dense, by one way to the curves.

    Args:
        own: A private copy of the network.
        x: [B, ...].
        names: Of parameters.
        outputs: h, [B, T].
        curves: ``together`` or ``one_by_one``.
    """
    size = directions_at_a_time(own, x)
    total = sum(own.get_parameter(n).numel() for n in names)
    blocks = []
    with progress(total, "second derivatives", "parameters") as bar, twice_differentiable():
        for name in names:
            parameter = own.get_parameter(name)
            J = outputs.new_empty(*outputs.shape, parameter.numel())
            S = torch.empty_like(J)
            for chunk in torch.arange(parameter.numel(), device=x.device).split(size):
                first, second = curves(own, x, name, basis(parameter, chunk))
                J[..., chunk], S[..., chunk] = first.movedim(0, -1), second.movedim(0, -1)
                bar.update(len(chunk))
            shape = (*outputs.shape, *parameter.shape)
            layer = name.rpartition(".")[0]
            blocks.append(Block(layer, J.view(shape), S.view(shape), {name: None}))
    return Derivatives(outputs, tuple(blocks))


def basis(parameter: Tensor, chunk: Tensor) -> Tensor:
    """The directions of some entries of a parameter, [c, *shape]."""
    e = parameter.detach().new_zeros(len(chunk), parameter.numel())
    e[torch.arange(len(chunk), device=e.device), chunk] = 1
    return e.view(len(chunk), *parameter.shape)


def together(own: nn.Module, x: Tensor, name: str, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives along several directions at once, by ``torch.vmap``: [c, B, T] each."""
    found: tuple[Tensor, Tensor] = torch.vmap(along(own, x, name))(directions)
    return found


def one_by_one(own: nn.Module, x: Tensor, name: str, directions: Tensor) -> tuple[Tensor, Tensor]:
    """The same, one direction after the other, where ``torch.vmap`` fails."""
    pairs = [along(own, x, name)(e) for e in directions]
    first, second = zip(*pairs, strict=True)
    return torch.stack(first), torch.stack(second)


def along(own: nn.Module, x: Tensor, name: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """First and second derivative of the outputs along a direction in a parameter: [B, T] each."""
    fixed = {n: p.detach() for n, p in own.named_parameters()}
    zero, one = fixed[name].new_zeros(()), fixed[name].new_ones(())

    def derivatives(e: Tensor) -> tuple[Tensor, Tensor]:
        def curve(tau: Tensor) -> Tensor:
            with rewritten():
                h: Tensor = call_with(own, {**fixed, name: fixed[name] + tau * e}, x)
            return h

        def velocity(tau: Tensor) -> Tensor:
            tangent: Tensor = torch.func.jvp(curve, (tau,), (one,))[1]
            return tangent

        found = torch.func.jvp(velocity, (zero,), (one,))
        return found[0], found[1]

    return derivatives


def backward_twice(
    own: nn.Module, x: Tensor, name: str, directions: Tensor
) -> tuple[Tensor, Tensor]:
    """The same by reverse mode, output by output, for operations without a forward-mode rule."""
    parameter = own.get_parameter(name)
    found = [rows_at(own, one, parameter, directions) for one in x.split(1)]
    first, second = zip(*found, strict=True)
    return torch.stack(first, 1), torch.stack(second, 1)


def rows_at(
    own: nn.Module, one: Tensor, parameter: nn.Parameter, directions: Tensor
) -> tuple[Tensor, Tensor]:
    """First and second derivatives along the directions at one input: [c, T] each."""
    with torch.enable_grad():
        with rewritten():
            h = own(one.clone())[0]
        first = h.new_zeros(len(directions), len(h))
        second = torch.zeros_like(first)
        for a, output in enumerate(h if h.requires_grad else ()):
            (g,) = torch.autograd.grad(output, parameter, create_graph=True, materialize_grads=True)
            slopes = (directions * g).flatten(1).sum(1)
            first[:, a] = slopes.detach()
            if not g.requires_grad:
                continue
            for i, slope in enumerate(slopes):
                (row,) = torch.autograd.grad(
                    slope, parameter, retain_graph=True, materialize_grads=True
                )
                second[i, a] = (row * directions[i]).sum()
    return first, second


WAYS: tuple[Curves, ...] = (together, one_by_one, backward_twice)


class Counted(TorchFunctionMode):
    """Counts the numbers that all functions make."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function and count."""
        result = func(*args, **(kwargs or {}))
        self.numbers += sum(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))
        return result


def directions_at_a_time(own: nn.Module, x: Tensor) -> int:
    """How many directions a pass carries, so that memory does not grow with their number."""
    counted = Counted()
    with torch.enable_grad(), without_fast_path(), counted:
        own(x.clone())
    return max(1, min(DIRECTIONS_AT_A_TIME, NUMBERS_AT_A_TIME // max(1, counted.numbers)))


def seconds_each(own: nn.Module, x: Tensor, names: list[str]) -> float:
    """About how long one pass takes, from a few along a large parameter; infinite if none works."""
    name = max(names, key=lambda n: own.get_parameter(n).numel())
    parameter = own.get_parameter(name)
    count = min(parameter.numel(), directions_at_a_time(own, x), DIRECTIONS_TO_TIME)
    directions = basis(parameter, torch.arange(count, device=x.device))
    with twice_differentiable():
        for curves in WAYS:
            try:
                curves(own, x, name, directions[:1])  # not timed: torch does some work only once
                start = perf_counter()
                curves(own, x, name, directions)
            except Exception as error:  # torch.func fails in many ways
                raise_if_out_of_memory(error)
                continue
            return (perf_counter() - start) / count
    return float("inf")
