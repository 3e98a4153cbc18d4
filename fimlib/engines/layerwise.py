r"""Exact J and S of a chain of linear layers and elementwise nonlinearities, layer by layer.

With z = σ(s) for every elementwise nonlinearity, along one parameter θᵢ everything between the
nonlinearities is linear, so

    ∂²h^a/∂θᵢ² = Σ_u σ''(s_u) (∂h^a/∂z_u) (∂s_u/∂θᵢ)²,

u over all hidden units. The squared Jacobian of the pre-activations is the same for all outputs a,
so one backward sweep that carries the rows ∂h^a and ∂s_u gives both J and S of every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fimlib.derivatives import Block, Derivatives, Sweep, all_finite
from fimlib.engines import activations as curves
from fimlib.engines.activations import Curve
from fimlib.engines.checks import check_no_hooks
from fimlib.engines.model import is_same, private_copy
from fimlib.engines.traced.graph import CapturedError, Uncaptured
from fimlib.memory import raise_if_out_of_memory

TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
# The curves of torch's own activations, computed out of place.
ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Curve]] = {
    nn.Sigmoid: lambda _: curves.SIGMOID,
    nn.Tanh: lambda _: curves.TANH,
    nn.Tanhshrink: lambda _: curves.TANHSHRINK,
    nn.Softsign: lambda _: curves.SOFTSIGN,
    nn.LogSigmoid: lambda _: curves.LOGSIGMOID,
    nn.SiLU: lambda _: curves.SILU,
    nn.Mish: lambda _: curves.MISH,
    nn.Hardsigmoid: lambda _: curves.HARDSIGMOID,
    nn.Hardswish: lambda _: curves.HARDSWISH,
    nn.SELU: lambda _: curves.SELU,
    nn.ReLU: lambda _: curves.RELU,
    nn.ReLU6: lambda m: curves.hardtanh(m.min_val, m.max_val),
    nn.Hardtanh: lambda m: curves.hardtanh(m.min_val, m.max_val),
    nn.GELU: lambda m: curves.gelu(m.approximate),
    nn.Softplus: lambda m: curves.softplus(m.beta, m.threshold),
    nn.ELU: lambda m: curves.elu(m.alpha),
    nn.CELU: lambda m: curves.celu(m.alpha),
    nn.LeakyReLU: lambda m: curves.leaky_relu(m.negative_slope),
    nn.RReLU: lambda m: curves.leaky_relu((m.lower + m.upper) / 2),
    nn.Threshold: lambda m: curves.threshold(m.threshold, m.value),
    nn.Softshrink: lambda m: curves.softshrink(m.lambd),
    nn.Hardshrink: lambda m: curves.hardshrink(m.lambd),
}
# Modules whose code is torch's own: they may be run without a copy, and be believed.
KNOWN = (nn.Sequential, nn.Linear, nn.Flatten, *TRANSPARENT, *ACTIVATIONS)


@dataclass(frozen=True)
class LinearStep:
    """A linear layer as it was met on the way forward.

    Attributes:
        name: Its name in the model.
        weight: W, [m, n].
        inputs: The right factor of each of its parameters: z, [B, n], or None
            where that is 1 (the bias).
    """

    name: str
    weight: Tensor
    inputs: Mapping[str, Tensor | None]

    @cached_property
    def squared_weight(self) -> Tensor:
        """W∘W."""
        return self.weight.square()


@dataclass(frozen=True)
class ElementwiseStep:
    """σ'(s) and σ''(s) of an elementwise nonlinearity, [B, n]; None for σ'' = 0 everywhere."""

    first: Tensor
    second: Tensor | None

    def part(self, at: slice | Tensor) -> ElementwiseStep:
        """The same at some of the inputs."""
        return ElementwiseStep(self.first[at], None if self.second is None else self.second[at])


Steps = list[LinearStep | ElementwiseStep]


def differentiate(
    model: nn.Module, x: Tensor, order: int = 2, wanted: frozenset[str] | None = None
) -> Sweep:
    """J and S by one forward pass and one backward sweep; see ``fimlib.differentiate``.

    It writes to nothing that it is given.
    """
    outputs, steps = record(model, x)
    rows = identity(outputs)
    factors = [(s.name, right_factors(s, wanted)) for s in steps if isinstance(s, LinearStep)]

    def carried(at: slice | Tensor, seeds: Tensor, order: int) -> Derivatives:
        with torch.inference_mode(False), torch.no_grad():
            parts = [s.part(at) if isinstance(s, ElementwiseStep) else s for s in steps]
            found = backward(seeds, parts, order, wanted)
        blocks = tuple(
            Block(name, *found[name], {n: None if z is None else z[at] for n, z in own.items()})
            for name, own in factors
            if own
        )
        return Derivatives(outputs[at], blocks)

    def combined(factor: Callable[[Tensor], Tensor]) -> Sweep:
        def sweep(at: slice | Tensor) -> Derivatives:
            return carried(at, factor(outputs[at]).mT.to(outputs), 1)

        return Sweep(outputs, inputs, sweep, size)

    inputs = tuple((name, own) for name, own in factors if own)
    on_cpu = outputs.device.type == "cpu"
    size = piece_size(steps, rows, order) if on_cpu else max(1, len(outputs))
    return Sweep(outputs, inputs, lambda at: carried(at, rows[at], order), size, combined=combined)


PIECE_BYTES = 4 * 2**20  # of the largest array that a piece carries
BLOCK_BYTES = 2**19  # about half of a core's own cache


def piece_size(steps: Steps, rows: Tensor, order: int) -> int:
    """How many inputs to carry back at a time, so that the largest array stays in the cache."""
    widths = [len(step.weight) for step in steps if isinstance(step, LinearStep)]
    curved = [sum(widths[layer + 2 : -1]) if order == 2 else 0 for layer in range(len(widths))]
    most = max((rows.shape[1] + u) * n for u, n in zip(curved, widths, strict=True))
    return max(16, PIECE_BYTES // (most * rows.element_size()))


def record(model: nn.Module, x: Tensor) -> tuple[Tensor, Steps]:
    """The outputs and the steps of a forward pass, of a copy if the model may do anything."""
    check_no_hooks(model)
    with torch.no_grad():
        if all(type(module) in KNOWN for module in model.modules()):
            outputs, steps = forward(chain(model), x, {})
        else:
            outputs, steps = forward_of_copy(model, x)
    check_parameters(model, steps)
    return outputs, steps


def identity(outputs: Tensor) -> Tensor:
    """The derivatives of the outputs at themselves, [B, T, T]."""
    eye = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
    return eye.expand(len(outputs), -1, -1)


def forward_of_copy(model: nn.Module, x: Tensor) -> tuple[Tensor, Steps]:
    """As ``forward``, of a model with modules that may do anything: they do it to a copy."""
    own = private_copy(model)
    # a parameter in a list of the copy is the copy's, in a closure it is the model's
    parameters = {id(p): n for m in (model, own) for n, p in m.named_parameters()}
    outputs, steps = forward(chain(own), x.clone(), parameters)
    expected = own(x.clone())  # the first module may work in place
    if not all_finite(outputs):
        raise ValueError("the outputs hold NaN or infinite values: the weights are too large.")
    if not is_same(outputs, expected):
        raise NotImplementedError(
            "the model's forward pass is random or does more than its modules in a row: write the "
            "network as a plain, deterministic nn.Sequential."
        )
    return outputs, steps


def check_parameters(model: nn.Module, steps: Steps) -> None:
    """Refuse parameters that belong to no linear layer of the chain."""
    known = {name for step in steps for name in right_factors(step, None)}
    for name, _ in model.named_parameters():
        if name not in known:
            raise NotImplementedError(f"parameter {name!r} belongs to no Linear layer: remove it.")


def chain(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """The modules of nested ``nn.Sequential`` in order, by their full names."""
    if type(model).forward is not nn.Sequential.forward:
        return [(prefix, model)]
    return [
        step
        for name, child in model._modules.items()
        if child is not None
        for step in chain(child, join(prefix, name))
    ]


def join(prefix: str, name: str) -> str:
    """The full name of ``name`` inside the module ``prefix``."""
    return f"{prefix}.{name}" if prefix else name


def forward(
    modules: list[tuple[str, nn.Module]], x: Tensor, parameters: Mapping[int, str]
) -> tuple[Tensor, Steps]:
    """The outputs, and the record of every step for the backward sweep.

    Args:
        modules: By name, in order.
        x: The inputs.
        parameters: Names of the parameters that only ``Linear`` layers may use, by id.
    """
    steps: Steps = []
    for name, module in modules:
        if type(module) is nn.Linear:
            check_linear(name, module, x)
            own = {"weight": x, "bias": None}
            inputs = {join(name, n): own[n] for n, p in module._parameters.items() if p is not None}
            steps.append(LinearStep(name, module.weight.detach(), inputs))
            x = module(x)
        elif type(module) is nn.Flatten and module.start_dim == 1:
            x = module(x)
        elif type(module) in TRANSPARENT:
            continue
        elif not steps and next(module.parameters(), None) is None:
            with Uncaptured(parameters, f"module {name!r} ({type(module).__name__})"):
                x = preprocess(name, module, x)
        else:
            x, step = elementwise(name, module, x, parameters)
            steps.append(step)
    return x, steps


def backward(
    J: Tensor, steps: Steps, order: int, wanted: frozenset[str] | None
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Carry rows J at the outputs, [B, T, T], back to the first wanted layer.

    At every place J and S, [B, T, n], are derivatives by the n values there. ``own``, [B, T, n], is
    the part of S that acts value by value: that of the units before the layer that comes next on
    the way forward. ``units`` are those behind it that are curved: their weights
    V = σ''(s_u) ∂h^a/∂z_u, [B, T, U], and their rows ∂s_u, [B, U, n].

    Returns:
        J and S at every layer's pre-activations, by its name; S is None with order=1.
    """
    S: Tensor | None = None
    own: Tensor | None = None
    units: tuple[Tensor, Tensor] | None = None
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    at = [i for i, step in enumerate(steps) if isinstance(step, LinearStep)]
    first = min(i for i in at if right_factors(steps[i], wanted))
    for i, step in reversed(list(enumerate(steps[first:], first))):
        if isinstance(step, ElementwiseStep):
            slope = step.first[:, None]
            if order == 2:
                bent = None if step.second is None else J * step.second[:, None]
                squared = None if S is None else slope.square()
                S, own = (bend(D, squared, bent) for D in (S, own))
                units = None if units is None else (units[0], units[1] * slope)
            J = J * slope if i == len(steps) - 1 else J.mul_(slope)
            continue
        zero = J.new_zeros(()).expand_as(J) if order == 2 else None  # nothing is curved
        found[step.name] = J, zero if S is None else S
        if i == first:
            break
        deeper = at[at.index(i) - 1] > first  # a layer further down needs the units one by one
        J, S = J @ step.weight, None if own is None else own @ step.squared_weight
        if units is not None and deeper:
            units = (units[0], units[1] @ step.weight)
            more = units[0] @ units[1].square()
            S = more if S is None else S.add_(more)
        elif units is not None:
            S = plus_squares(torch.zeros_like(J) if S is None else S, *units, step.weight)
            units = None
        if deeper and own is not None:
            fresh = (own, step.weight.expand(len(J), -1, -1))
            units = fresh if units is None else joined(units, fresh)
        own = None
    return found


def bend(D: Tensor | None, squared: Tensor | None, bent: Tensor | None) -> Tensor | None:
    """Second derivatives before a nonlinearity: D σ'² + J σ'', either of which may be missing."""
    if D is None or squared is None:
        return bent
    return D * squared if bent is None else torch.addcmul(bent, D, squared)


def plus_squares(S: Tensor, V: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Add V (rows W)∘² to S, for so few inputs at a time that the squares stay in the cache."""
    size = max(1, BLOCK_BYTES // (rows.shape[1] * weight.shape[1] * rows.element_size()))
    size = size if S.device.type == "cpu" else max(1, len(S))
    for total, v, r in zip(S.split(size), V.split(size), rows.split(size), strict=True):
        total.baddbmm_(v, (r @ weight).square_())
    return S


def joined(units: tuple[Tensor, Tensor], fresh: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Weights [B, T, U] and rows [B, U, n] of two sets of units in one."""
    return torch.cat([units[0], fresh[0]], dim=2), torch.cat([units[1], fresh[1]], dim=1)


def right_factors(
    step: LinearStep | ElementwiseStep, wanted: frozenset[str] | None
) -> dict[str, Tensor | None]:
    """The right factors of a layer's wanted parameters: z, or 1 for the bias."""
    if isinstance(step, ElementwiseStep):
        return {}
    return {n: z for n, z in step.inputs.items() if wanted is None or n in wanted}


def check_linear(name: str, module: nn.Linear, z: Tensor) -> None:
    """Refuse layers for which J does not factor into J ⊗ z."""
    own = module._parameters
    made = isinstance(module.bias, Tensor) and module.bias.requires_grad and "bias" not in own
    if not {"weight"} <= set(own) <= {"weight", "bias"} or made:
        raise NotImplementedError(
            f"layer {name!r} (Linear) computes its weight or bias from other parameters: make it "
            "plain first (torch.nn.utils.prune.remove, remove_weight_norm and the like)."
        )
    if z.dtype != module.weight.dtype:
        raise ValueError(
            f"layer {name!r} (Linear) is {module.weight.dtype} and gets {z.dtype}: convert the "
            f"input by .to({module.weight.dtype})."
        )
    if z.ndim > 2 and z.shape[-1] == module.in_features:
        raise NotImplementedError(
            f"layer {name!r} (Linear) is applied to inputs of shape {list(z.shape)}, at several "
            "positions: the layerwise engine takes [B, n]. If that is not meant, put nn.Flatten() "
            "before the layer."
        )
    if z.ndim != 2 or z.shape[1] != module.in_features:
        fits = z.ndim > 2 and z[0].numel() == module.in_features
        advice = "put nn.Flatten() before the layer" if fits else "check the shape of the input"
        raise ValueError(
            f"layer {name!r} (Linear) expects inputs of shape [B, {module.in_features}], got "
            f"{list(z.shape)}: {advice}."
        )


def preprocess(name: str, module: nn.Module, x: Tensor) -> Tensor:
    """The result of a module before the first parameter, a function of each input alone."""
    parts = [part for part in (x[:1], x[1:]) if len(part)]
    fresh = [private_copy(module) for _ in parts]  # which have kept nothing of the batch
    z: Tensor = module(x.clone())
    try:
        alone = torch.cat([own(part.clone()) for own, part in zip(fresh, parts, strict=True)])
    except (RuntimeError, TypeError, ValueError) as error:
        raise_if_out_of_memory(error)
        if isinstance(error, NotImplementedError):
            raise
        raise NotImplementedError(
            f"module {name!r} ({type(module).__name__}) takes the batch, but not its parts, or "
            f"makes no tensor of them: {error}"
        ) from error
    if not all_finite(z):
        raise ValueError(
            f"module {name!r} ({type(module).__name__}) makes NaN or infinite values of "
            f"the inputs: it has no value for {len(x)} of these at a time."
        )
    if not is_same(alone, z):
        raise NotImplementedError(
            f"module {name!r} ({type(module).__name__}): its result for one input depends on the "
            "others of the batch, on how often it was called, or on chance: make it a function of "
            "each input alone."
        )
    return z


def elementwise(
    name: str, module: nn.Module, s: Tensor, parameters: Mapping[int, str]
) -> tuple[Tensor, ElementwiseStep]:
    """Values z = σ(s), σ' and σ'', for any module that acts unit by unit.

    Of torch's own modules that is known; of all others it is found out.

    Raises:
        NotImplementedError: it does not, or autograd cannot differentiate it twice; or it uses
            one of the parameters, which are named by id.
        ValueError: a derivative is NaN or infinite at s.
    """
    if type(module) in ACTIVATIONS:
        curve = ACTIVATIONS[type(module)](module)
        return curve.value(s), ElementwiseStep(*curve.slopes(s))
    kind = f"module {name!r} ({type(module).__name__})"
    refusal = NotImplementedError(
        f"{kind} is not supported by the layerwise engine, which knows nn.Sequential of Linear, "
        "elementwise activations without parameters, Dropout, Flatten and Identity."
    )
    if next(module.parameters(), None) is not None:
        raise refusal
    try:
        with Uncaptured(parameters, kind):
            z, first, second = two_derivatives(module, s)
            check_derivatives(kind, first, second)
            fits = acts_unit_by_unit(module, s, z) and is_twice_differentiable(module, s)
    except CapturedError:
        raise
    except (RuntimeError, AttributeError) as error:  # autograd, or the module, cannot
        raise_if_out_of_memory(error)
        raise refusal from error
    if not fits:
        raise refusal
    return z, ElementwiseStep(first, second if second.any() else None)


def check_derivatives(kind: str, first: Tensor, second: Tensor) -> None:
    """A ValueError where σ' or σ'' is NaN or infinite."""
    if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
        raise ValueError(f"{kind} has no finite derivative at this input.")


def two_derivatives(
    module: nn.Module, s: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The module's values at s, and the gradients of Σ mask·z and of Σ mask·∂(Σz)/∂s."""
    mask = torch.ones_like(s) if mask is None else mask
    with torch.enable_grad():
        s = s.clone().requires_grad_()
        z = module(s.clone())  # a clone: the module may work in place
        if z.shape != s.shape or z.dtype != s.dtype:
            raise RuntimeError("the values change their shape or dtype")
        first = grad((mask * z).sum(), s)
        second = grad((mask * grad(z.sum(), s)).sum(), s)
    return z.detach(), first.detach(), second.detach()


def acts_unit_by_unit(module: nn.Module, s: Tensor, z: Tensor) -> bool:
    """Whether no kept unit depends on a unit that the mask leaves out, at s.

    Every other unit, and two random halves, with their complements: the derivatives with respect
    to the units left out must be exactly 0, and the values z must stay when these units move.
    """
    generator = torch.Generator("cpu").manual_seed(0)  # the same masks on every device
    every_other = torch.arange(s.numel(), device="cpu").reshape(s.shape) % 2
    halves = [torch.randint(2, s.shape, generator=generator, device="cpu") for _ in range(2)]
    noise = torch.randn(s.shape, generator=generator, device="cpu").to(s)
    for half in (every_other, *halves):
        for kept in (half, 1 - half):
            mask = kept.to(s)
            _, first, second = two_derivatives(module, s, mask)
            if first[mask == 0].any() or second[mask == 0].any():
                return False
            moved = module(s + noise * (1 - mask))[mask == 1]
            if not torch.allclose(moved, z[mask == 1], rtol=1e-4, atol=0.0):
                return False
    return True


def is_twice_differentiable(module: nn.Module, s: Tensor) -> bool:
    """Whether σ' and σ'' are the derivatives of σ and σ', at every unit, by difference quotients.

    In float64, here or close by: at a kink no quotient is the derivative.
    """
    doubt = torch.ones_like(s, dtype=torch.bool)
    for shift in (0.0, 1e-3, 3e-3):
        doubt &= differs_from_quotients(module, s.double() + shift)
        if not doubt.any():
            return True
    return False


def differs_from_quotients(module: nn.Module, s: Tensor) -> Tensor:
    """At which units σ' or σ'' is not the difference quotient of σ or σ'."""
    step = 1e-6 * (1 + s.abs())
    here, above, below = (two_derivatives(module, s + k * step) for k in (0, 1, -1))
    wrong = torch.zeros_like(s, dtype=torch.bool)
    for order in (1, 2):
        quotient = (above[order - 1] - below[order - 1]) / (2 * step)
        scale = quotient.abs() + here[order].abs() + 1e-3 * (1 + here[order - 1].abs())
        wrong |= (quotient - here[order]).abs() > 1e-5 * scale
    return wrong


def grad(y: Tensor, s: Tensor) -> Tensor:
    """∂y/∂s with its own graph; zero where y does not depend on s."""
    if not y.requires_grad:
        return torch.zeros_like(s)
    (result,) = torch.autograd.grad(y, s, create_graph=True, materialize_grads=True)
    return result
