"""Exact S of any network, along one parameter after the other, and J at one input after the other.

S comes from forward mode along each parameter (``forward_mode``). J comes from plain autograd,
where the backward passes of ``first_order`` fail. Nothing of the operations has to be known; what
autograd believes of them is confirmed like any engine's results.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fimlib.derivatives import Block, Derivatives, Sweep, all_finite
from fimlib.engines import forward_mode
from fimlib.engines.checks import check_outputs, short
from fimlib.engines.forward_mode import Curves
from fimlib.engines.model import call_with, exact_kernels, private_copy, tensors
from fimlib.engines.rewrite import exact_activations, exact_lookups, rewritten
from fimlib.engines.traced.graph import Uncaptured, walk, without_randomness
from fimlib.memory import raise_if_out_of_memory

NUMBERS_AT_A_TIME = 2**22  # of J that are computed together: 32 MB

PerParameter = dict[str, Tensor]
Way = Callable[[nn.Module, Tensor, list[str], Tensor], Derivatives]


def differentiate(model: nn.Module, x: Tensor, *, wanted: frozenset[str] | None, way: Way) -> Sweep:
    """J of any network, and S; see ``fimlib.differentiate``.

    A tied parameter has the total derivative with respect to the shared tensor, under the first
    of its names. Everything is dense: [B, T, *shape] per parameter.

    Args:
        model: The network; it is copied.
        x: [B, ...].
        wanted: Names of parameters; None: all.
        way: How J is found (order 1), or the curves along each parameter (order 2).

    Raises:
        NotImplementedError: the outputs are random, or autograd cannot differentiate the network.
        ValueError: the outputs are not [B, T], or a derivative is not finite.
    """
    own, outputs = private(model, x)
    names = [n for n, _ in own.named_parameters() if wanted is None or n in wanted]

    def sweep(at: slice | Tensor) -> Derivatives:
        try:
            with torch.inference_mode(False), exact_kernels(own):
                derivs = way(own, x[at], names, outputs[at])
        except Exception as error:  # torch.func and autograd fail in many ways
            raise_if_out_of_memory(error)
            raise NotImplementedError(
                f"torch cannot differentiate {type(own).__name__}: {short(error)}."
            ) from error
        for block in derivs.blocks:
            check_finite(block)
        return derivs

    inputs = tuple((n.rpartition(".")[0], {n: None}) for n in names)
    numbers = outputs.shape[1] * sum(own.get_parameter(n).numel() for n in names)
    size = max(1, NUMBERS_AT_A_TIME // max(1, numbers))
    return Sweep(outputs, inputs, sweep, size)


def first_order(own: nn.Module, x: Tensor, names: list[str], outputs: Tensor) -> Derivatives:
    """J, input by input."""
    J = one_by_one(own, x, names)
    blocks = (Block(n.rpartition(".")[0], J[n], None, {n: None}) for n in names)
    return Derivatives(outputs, tuple(blocks))


def second_order(curves: Curves) -> Way:
    """J and S, by one of the ways to curves along the parameters."""
    return lambda own, x, names, outputs: forward_mode.differentiate(own, x, names, outputs, curves)


def private(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """A copy that is safe to differentiate in its own parameters, and its outputs.

    Raises:
        ValueError: the input does not fit, or the outputs are not [B, T] and finite.
        NotImplementedError: the pass is random, or uses what the copy does not own.
    """
    own, outputs = recorded(model, x, None)
    return own, outputs.detach()


def recorded(
    model: nn.Module, x: Tensor, wanted: frozenset[str] | None
) -> tuple[nn.Module, Tensor]:
    """The same, and the graph of the outputs, in which the wanted parameters alone count."""
    own = private_copy(model)
    for name, parameter in own.named_parameters():
        parameter.requires_grad_(wanted is None or name in wanted)
    foreign = {id(p): n for n, p in model.named_parameters()}

    def run() -> Tensor:
        with torch.enable_grad(), Uncaptured(foreign), exact_activations():
            h: Tensor = own(x.clone())
        return h

    outputs = without_randomness(run, x)
    check_outputs(outputs, len(x))
    known = {id(None), *map(id, own.parameters())}
    for node in walk(outputs.grad_fn)[0]:
        if id(getattr(node, "variable", None)) not in known:
            raise NotImplementedError(
                f"{holder(own)} uses a tensor that requires grad and is no parameter of the model: "
                "make it a parameter, or compute it in forward(), or detach() it."
            )
    return own, outputs


def holder(own: nn.Module) -> str:
    """The module with an attribute that requires grad and is no parameter, or the whole network."""
    for name, module in own.named_modules():
        for attribute, value in vars(module).items():
            kept = not attribute.startswith("_") and tensors(value)
            if any(t.requires_grad for t in kept or ()):
                return f"module {name!r} ({type(module).__name__}), in its {attribute!r},"
    return type(own).__name__


def check_finite(block: Block) -> None:
    """A ValueError that names a parameter whose derivatives are not finite."""
    for D in (block.J, block.S):
        if D is not None and not all_finite(D):
            raise ValueError(
                f"the derivative of the outputs in parameter {', '.join(map(repr, block.inputs))} "
                "is NaN or infinite at one of the inputs, e.g. of a root at 0: check the weights "
                "and the inputs."
            )


# J, input by input.


def split(own: nn.Module, x: Tensor, names: list[str], num_outputs: int) -> tuple[Tensor, ...]:
    """The inputs in parts whose J are small."""
    size = num_outputs * sum(own.get_parameter(n).numel() for n in names)
    parts: tuple[Tensor, ...] = x.split(max(1, NUMBERS_AT_A_TIME // max(1, size)))
    return parts


def outputs_from(own: nn.Module, names: list[str]) -> Callable[[PerParameter, Tensor], Tensor]:
    """The outputs [T] at one input, as a function of the named parameters."""
    fixed = {n: p.detach() for n, p in own.named_parameters() if n not in names}

    def outputs(values: PerParameter, one: Tensor) -> Tensor:
        with rewritten():
            h: Tensor = call_with(own, {**fixed, **values}, one[None])
        return h[0]

    return outputs


def values_of(own: nn.Module, names: list[str]) -> PerParameter:
    """The named parameters without a graph."""
    return {n: own.get_parameter(n).detach() for n in names}


def one_by_one(own: nn.Module, x: Tensor, names: list[str]) -> PerParameter:
    """J at one input after the other, by plain autograd."""
    parameters = [own.get_parameter(n) for n in names]
    rows = [rows_at(own, one, parameters) for one in x.split(1)]
    return {n: torch.stack(d) for n, d in zip(names, zip(*rows, strict=True), strict=True)}


def rows_at(own: nn.Module, one: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """J at one input, [T, *shape] for each of the parameters."""
    with torch.enable_grad(), exact_lookups():
        h = own(one.clone())[0]
        found = rows_of(h, parameters) if h.requires_grad else [None] * len(parameters)
    return [
        p.new_zeros(len(h), *p.shape) if g is None else g.detach()
        for p, g in zip(parameters, found, strict=True)
    ]


def rows_of(h: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    """Derivatives of some numbers [T], [T, *shape] for each of the parameters; None: 0."""

    def pull(seeds: Tensor, *, batched: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            h, parameters, seeds, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )

    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    try:
        with quiet():
            return list(pull(eye, batched=True))
    except RuntimeError as error:  # an operation without a batched derivative
        raise_if_out_of_memory(error)
    rows = zip(*(pull(seed, batched=False) for seed in eye), strict=True)
    return [
        torch.stack([p.new_zeros(p.shape) if g is None else g for g in row])
        for p, row in zip(parameters, rows, strict=True)
    ]


@contextmanager
def quiet() -> Iterator[None]:
    """Where torch has no batched derivative it says so, at length."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
