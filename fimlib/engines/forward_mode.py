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
from contextlib import contextmanager
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

Entries = dict[str, range]  # parameter → positions of some of its entries
Curves = Callable[[nn.Module, Tensor, Entries], tuple[Tensor, Tensor]]


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Kernels for attention and recurrence that have second derivatives, in forward mode too."""
    cudnn = torch.backends.cudnn.flags(enabled=False)
    with sdpa_kernel(SDPBackend.MATH), cudnn, without_fast_path():
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
        curves: One of ``WAYS``.
    """
    sizes = {n: own.get_parameter(n).numel() for n in names}
    J = {n: outputs.new_empty(*outputs.shape, size) for n, size in sizes.items()}
    S = {n: torch.empty_like(rows) for n, rows in J.items()}
    bar = progress(sum(sizes.values()), "second derivatives", "parameters")
    with bar, twice_differentiable():
        for entries in portions(sizes, directions_at_a_time(own, x)):
            first, second = curves(own, x, entries)
            counts = [len(at) for at in entries.values()]
            for rows, found in ((J, first), (S, second)):
                parts = found.movedim(0, -1).split(counts, dim=-1)
                for (n, at), part in zip(entries.items(), parts, strict=True):
                    rows[n][..., at.start : at.stop] = part
            bar.update(sum(counts))
    shapes = {n: (*outputs.shape, *own.get_parameter(n).shape) for n in names}
    blocks = (
        Block(n.rpartition(".")[0], J[n].view(shapes[n]), S[n].view(shapes[n]), {n: None})
        for n in names
    )
    return Derivatives(outputs, tuple(blocks))


def portions(sizes: dict[str, int], most: int) -> Iterator[Entries]:
    """All entries of the parameters in their order, so many at a time."""
    entries: Entries = {}
    room = most
    for name, size in sizes.items():
        start = 0
        while start < size:
            stop = min(start + room, size)
            entries[name] = range(start, stop)
            room, start = room - (stop - start), stop
            if room == 0:
                yield entries
                entries, room = {}, most
    if entries:
        yield entries


def basis(parameter: Tensor, at: range, row: int = 0, count: int | None = None) -> Tensor:
    """The directions of some entries of a parameter, from a row on; else 0: [count, *shape]."""
    e = parameter.detach().new_zeros(count or len(at), parameter.numel())
    e[row : row + len(at), at.start : at.stop].fill_diagonal_(1)
    return e.view(len(e), *parameter.shape)


def together(own: nn.Module, x: Tensor, entries: Entries) -> tuple[Tensor, Tensor]:
    """Derivatives along several directions at once, by ``torch.vmap``: [c, B, T] each."""
    curves = torch.vmap(along(own, x))
    found: tuple[Tensor, Tensor]
    try:
        found = curves(directions(own, entries))
    except RuntimeError as error:
        raise_if_out_of_memory(error)
        # where it works in place, as in a GRU, all parameters must have as many directions
        others = {n: range(0) for n, _ in own.named_parameters() if n not in entries}
        found = curves(directions(own, entries | others))
    return found


def directions(own: nn.Module, entries: Entries) -> dict[str, Tensor]:
    """One direction for each of the entries, in all parameters named: name → [c, *shape]."""
    count, row, found = sum(map(len, entries.values())), 0, {}
    for name, at in entries.items():
        found[name] = basis(own.get_parameter(name), at, row, count)
        row += len(at)
    return found


def one_by_one(own: nn.Module, x: Tensor, entries: Entries) -> tuple[Tensor, Tensor]:
    """The same, one direction after the other, where ``torch.vmap`` fails."""
    pairs = [
        along(own, x)({name: e})
        for name, at in entries.items()
        for e in basis(own.get_parameter(name), at)
    ]
    first, second = zip(*pairs, strict=True)
    return torch.stack(first), torch.stack(second)


def along(own: nn.Module, x: Tensor) -> Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]:
    """First and second derivative of the outputs along a direction: [B, T] each."""
    fixed = {n: p.detach() for n, p in own.named_parameters()}
    like = next(iter(fixed.values()))
    zero, one = like.new_zeros(()), like.new_ones(())

    def derivatives(direction: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        def curve(tau: Tensor) -> Tensor:
            moved = {n: fixed[n] + tau * e for n, e in direction.items()}
            with rewritten():
                h: Tensor = call_with(own, fixed | moved, x)
            return h

        def velocity(tau: Tensor) -> Tensor:
            tangent: Tensor = torch.func.jvp(curve, (tau,), (one,))[1]
            return tangent

        found = torch.func.jvp(velocity, (zero,), (one,))
        return found[0], found[1]

    return derivatives


def backward_twice(own: nn.Module, x: Tensor, entries: Entries) -> tuple[Tensor, Tensor]:
    """The same by reverse mode, output by output, for operations without a forward-mode rule."""
    found = []
    for name, at in entries.items():
        parameter = own.get_parameter(name)
        pairs = (rows_at(own, one, parameter, basis(parameter, at)) for one in x.split(1))
        found.append([torch.stack(rows, 1) for rows in zip(*pairs, strict=True)])
    first, second = map(torch.cat, zip(*found, strict=True))
    return first, second


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
    """About how long one entry takes, from a few of them; infinite if no way works."""
    sizes = {n: own.get_parameter(n).numel() for n in names}
    most = min(directions_at_a_time(own, x), DIRECTIONS_TO_TIME)
    entries, first = next(portions(sizes, most)), next(portions(sizes, 1))
    count = sum(map(len, entries.values()))
    with twice_differentiable():
        for curves in WAYS:
            try:
                curves(own, x, first)  # not timed: torch does some work only once
                start = perf_counter()
                curves(own, x, entries)
            except Exception as error:  # torch.func fails in many ways
                raise_if_out_of_memory(error)
                continue
            return (perf_counter() - start) / count
    return float("inf")
