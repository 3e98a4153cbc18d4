"""Which module of a network is to blame, once its derivatives or its values turned out wrong.

A private copy of the network runs once, and every call of a module is recorded. Then each module is
tried by itself on the inputs that it had: the innermost one that fails is the culprit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from fimlib.engines.rewrite import exact_lookups
from fimlib.engines.truth import Widened
from fimlib.memory import raise_if_out_of_memory

STEPS = (1e-6, 1e-5, 1e-4, 1e-8)  # steep functions need short ones, large numbers long ones
TOLERANCE = 1e-7
LONGER, LOOSER = 1e3, 1e5  # in float32, for networks that compute in nothing else


@dataclass(frozen=True)
class Call:
    """One call of a module: its name, its inputs and its result."""

    name: str
    module: nn.Module
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    result: Any

    def __str__(self) -> str:
        if not self.name:
            return f"forward() of {type(self.module).__name__}"
        return f"module {self.name!r} ({type(self.module).__name__})"


def wrong_module(own: nn.Module, x: Tensor, order: int) -> Call | None:
    """The innermost call whose derivative by autograd is not that of its values; None if none is.

    Args:
        own: A private copy of the network.
        x: Inputs, [k, ...].
        order: 1, or 2 for the derivative of the first derivative.
    """
    for call in recorded(own, x):  # inner modules end first
        try:
            if not is_derivative(call, order):
                return call
        except Exception as error:  # a module may resist being called by itself
            raise_if_out_of_memory(error)
    return None


def mixing_module(own: nn.Module, x: Tensor) -> str | None:
    """The innermost module at which an input alone first differs from that input in a batch."""
    if len(x) < 2:
        return None
    together, alone = recorded(own, x), recorded(own, x[:1])
    if len(together) != len(alone):
        return None
    for whole, one in zip(together, alone, strict=True):
        if agrees(whole.inputs, one.inputs) and not agrees(whole.result, one.result):
            return str(whole)
    return None


def agrees(whole: Any, one: Any) -> bool:
    """Whether the first rows of all tensors equal the rows of the first input alone."""
    return all(
        is_first_row(a, b)
        for a, b in zip(tree_leaves(whole), tree_leaves(one), strict=False)
        if is_real(a) and is_real(b) and a.ndim and b.ndim and a.shape[1:] == b.shape[1:]
    )


def is_first_row(a: Tensor, b: Tensor) -> bool:
    """Whether b is the first row of a, up to rounding."""
    scale = float(a[:1].abs().max()) if a[:1].numel() else 0.0
    return torch.allclose(a[:1], b[:1], rtol=1e-5, atol=1e-7 * scale, equal_nan=True)


def recorded(own: nn.Module, x: Tensor) -> list[Call]:
    """The calls of all modules during one forward pass, in the order in which they end."""
    calls: list[Call] = []
    with recording(own, calls), torch.enable_grad(), suppress(Exception):  # of any kind
        own(x.clone())
    return calls


@contextmanager
def recording(own: nn.Module, calls: list[Call]) -> Iterator[None]:
    """Record the inputs of every module, before it can change them, and its result."""
    stack: list[Any] = []

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
        stack.append(copied((args, kwargs)))

    def leave(name: str) -> Any:
        def note(module: nn.Module, _args: Any, _kwargs: Any, result: Any) -> None:
            calls.append(Call(name, module, stack.pop(), copied(result)))

        return note

    handles = []
    for name, module in own.named_modules():
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave(name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def copied(values: Any) -> Any:
    """The same with copies of all tensors, without a graph."""
    return tree_map_only(Tensor, lambda t: t.detach().clone(), values)


def is_derivative(call: Call, order: int) -> bool:
    """Whether autograd differentiates the module's values, or its first derivative, correctly.

    Along one random direction in its floating-point inputs and its parameters together.
    """
    leaves, form = tree_flatten(call.inputs)
    moving = [i for i, t in enumerate(leaves) if is_real(t)]
    parameters = dict(call.module.named_parameters())
    generator = torch.Generator("cpu").manual_seed(0)
    at = [leaves[i].double() for i in moving] + [p.detach().double() for p in parameters.values()]
    if not at:
        return True
    v = [noise(t, generator) for t in at]
    weights: list[Tensor] = []
    types = {leaves[i].dtype for i in moving} | {p.dtype for p in parameters.values()}
    is_exact = types == {torch.float64}
    casts = Widened(torch.float32) if is_exact else nullcontext()

    def value(points: list[Tensor]) -> Tensor:
        own = list(leaves)
        for i, t in zip(moving, points, strict=False):
            own[i] = t.to(leaves[i]).clone()
        values = {
            n: t.to(p) for (n, p), t in zip(parameters.items(), points[len(moving) :], strict=True)
        }
        args, kwargs = tree_unflatten(own, form)
        with exact_lookups(), casts:
            result = torch.func.functional_call(call.module, values, args, kwargs)
        found = [t for t in tree_leaves(result) if is_real(t)]
        while len(weights) < len(found):
            weights.append(noise(found[len(weights)].detach(), generator))
        parts = [(t.double() * w).sum() for t, w in zip(found, weights, strict=True)]
        return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)

    def slope(y: Tensor, points: list[Tensor], *, graph: bool = False) -> Tensor:
        if not y.requires_grad:
            return y.new_zeros(())
        found = torch.autograd.grad(y, points, create_graph=graph, materialize_grads=True)
        return torch.stack([(g * d).sum() for g, d in zip(found, v, strict=True)]).sum()

    def moved(step: float) -> list[Tensor]:
        return [(t + step * d).requires_grad_() for t, d in zip(at, v, strict=True)]

    with torch.enable_grad():
        below = (lambda p: slope(value(p), p)) if order == 2 else value
        steps = [e if is_exact else LONGER * e for e in STEPS]
        quotients = [(below(moved(e)) - below(moved(-e))).detach() / (2 * e) for e in steps]
        here = moved(0.0)
        found = slope(value(here), here, graph=order == 2)
        found = slope(found, here) if order == 2 else found
    size = torch.stack([(t.abs() * w.abs()).sum() for t, w in zip(at, v, strict=True)]).sum()
    small = found.abs() + 1e-6 * (1 + size)
    slack = TOLERANCE * (1.0 if is_exact else LOOSER)
    return any(bool((found - q).abs() <= slack * (small + q.abs())) for q in quotients)


def is_real(t: Any) -> bool:
    """Whether this is a floating-point tensor."""
    return isinstance(t, Tensor) and t.is_floating_point()


def noise(t: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers like t, in float64."""
    return torch.randn(t.shape, generator=generator, device="cpu", dtype=torch.float64).to(t.device)
