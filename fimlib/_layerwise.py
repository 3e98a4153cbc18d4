r"""Exact J and S of a chain of linear layers and elementwise nonlinearities, layer by layer.

With z = σ(s) for every elementwise nonlinearity, along one parameter θᵢ everything between the
nonlinearities is linear, so

    ∂²h^a/∂θᵢ² = Σ_u σ''(s_u) (∂h^a/∂z_u) (∂s_u/∂θᵢ)²,

u over all hidden units. The squared Jacobian of the pre-activations is the same for all outputs a,
so one backward sweep that carries the rows ∂h^a and ∂s_u gives both J and S of every layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fimlib.derivatives import Block, Derivatives

TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


@dataclass(frozen=True)
class LinearStep:
    """A linear layer as it was met on the way forward; ``z`` is its input, [B, n]."""

    name: str
    module: nn.Linear
    z: Tensor


@dataclass(frozen=True)
class ElementwiseStep:
    """σ'(s) and σ''(s) of an elementwise nonlinearity, [B, n]."""

    first: Tensor
    second: Tensor


def differentiate(model: nn.Module, x: Tensor) -> Derivatives:
    """J and S by one forward pass and one backward sweep; see ``fimlib.differentiate``."""
    modules = chain(model)
    with torch.no_grad():
        outputs, steps = forward(modules, x)
        expected = model(x)
        if outputs.shape != expected.shape or not torch.allclose(outputs, expected):
            raise NotImplementedError(
                "the model's forward pass does more than its modules in a row (a hook?): remove "
                "what was added, or write the network as a plain nn.Sequential."
            )
        return Derivatives(outputs, backward(outputs, steps))


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
    """The full name of what is called ``name`` inside the module ``prefix``."""
    return f"{prefix}.{name}" if prefix else name


def forward(
    modules: list[tuple[str, nn.Module]], x: Tensor
) -> tuple[Tensor, list[LinearStep | ElementwiseStep]]:
    """The outputs, and what the backward sweep needs of every step."""
    steps: list[LinearStep | ElementwiseStep] = []
    seen: dict[int, str] = {}
    for name, module in modules:
        for parameter_name, parameter in module.named_parameters():
            full_name = join(name, parameter_name)
            if id(parameter) in seen:
                raise ValueError(
                    f"parameter {full_name!r} is the same tensor as {seen[id(parameter)]!r}: tied "
                    "parameters are not supported. Untie them, e.g. by copy.deepcopy of the module."
                )
            seen[id(parameter)] = full_name
        if type(module) is nn.Linear:
            check_linear(name, module, x)
            steps.append(LinearStep(name, module, x))
            x = module(x)
        elif type(module) is nn.Flatten and module.start_dim == 1:
            x = module(x)
        elif type(module) not in TRANSPARENT:
            x, step = elementwise(name, module, x)
            steps.append(step)
    return x, steps


def backward(outputs: Tensor, steps: list[LinearStep | ElementwiseStep]) -> tuple[Block, ...]:
    """Carry derivatives back to the first layer, at every place with respect to its n values.

    R, [B, T + U, n], holds the Jacobian of the T outputs and of the U pre-activations behind the
    next linear layer; curvature, [B, T, U], holds σ''(s_u) ∂h^a/∂z_u of those. Units before that
    layer still act on h one by one: bend, [B, T, n], is what they add to the second derivatives.
    """
    size, num_outputs = outputs.shape
    R = torch.eye(num_outputs, dtype=outputs.dtype, device=outputs.device).expand(size, -1, -1)
    bend = torch.zeros_like(R)
    curvature = R[:, :, :0]
    blocks: list[Block] = []
    first_linear = next((i for i, s in enumerate(steps) if isinstance(s, LinearStep)), len(steps))
    for i, step in reversed(list(enumerate(steps[first_linear:]))):
        J = R[:, :num_outputs]
        if isinstance(step, ElementwiseStep):
            bend = bend * step.first.square()[:, None] + J * step.second[:, None]
            R = R * step.first[:, None]
            continue
        S = curvature @ R[:, num_outputs:].square() + bend
        factors = {"weight": step.z, "bias": None}
        inputs = {join(step.name, n): factors[n] for n, _ in step.module.named_parameters()}
        blocks.append(Block(step.name, J, S, inputs))
        if i > 0:  # before the first linear layer there is nothing left to differentiate
            weight = step.module.weight
            R = R @ weight
            if bend.any():  # piecewise linear units have no curvature to carry
                curvature = torch.cat([curvature, bend], dim=2)
                R = torch.cat([R, weight.expand(size, -1, -1)], dim=1)
            bend = torch.zeros_like(R[:, :num_outputs])
    return tuple(reversed(blocks))


def check_linear(name: str, module: nn.Linear, z: Tensor) -> None:
    """Refuse what the factorisation J ⊗ z does not hold for."""
    if "weight" not in module._parameters:
        raise NotImplementedError(
            f"layer {name!r} (Linear) computes its weight by a parametrisation: remove it first "
            "(torch.nn.utils.remove_weight_norm and the like)."
        )
    if z.ndim != 2 or z.shape[1] != module.in_features:
        raise ValueError(
            f"layer {name!r} (Linear) expects inputs of shape [B, {module.in_features}], got "
            f"{list(z.shape)}. Check the shape of the input, or put nn.Flatten() before the layer."
        )


def elementwise(name: str, module: nn.Module, s: Tensor) -> tuple[Tensor, ElementwiseStep]:
    """Values z = σ(s), σ' and σ'' by autograd, for any module that acts unit by unit.

    Whether it does is checked at s: with random weights r, ∂(r·z)/∂s must be r∘σ' and the
    derivative of r·σ' must be r∘σ''.
    """
    if s.ndim != 2:
        raise NotImplementedError(
            f"module {name!r} ({type(module).__name__}) gets values of shape {list(s.shape)}; the "
            "layerwise engine needs [B, n]: put nn.Flatten() first, or use engine='backpack'."
        )
    refusal = NotImplementedError(
        f"module {name!r} ({type(module).__name__}) is not supported by the layerwise engine, "
        "which knows nn.Sequential of Linear, elementwise activations without parameters, Dropout, "
        "Flatten and Identity. Try engine='backpack'; if it is a Softmax at the end, remove it: "
        "the outputs are natural parameters (logits)."
    )
    if next(module.parameters(), None) is not None:
        raise refusal
    r = torch.rand(s.shape, generator=torch.Generator().manual_seed(0), dtype=s.dtype).to(s.device)
    with torch.enable_grad():
        s = s.clone().requires_grad_()
        z = module(s.clone())  # a clone: the module may work in place
        if z.shape != s.shape or not z.requires_grad:
            raise refusal
        first, first_r = grad(z.sum(), s), grad((r * z).sum(), s)
        second, second_r = grad(first.sum(), s), grad((r * first).sum(), s)
    for value, weighted in ((first, first_r), (second, second_r)):
        if not torch.isfinite(value).all():
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) has no finite derivative at this input."
            )
        if not torch.allclose(weighted, r * value, rtol=1e-4, atol=1e-6 * float(value.abs().max())):
            raise refusal
    return z.detach(), ElementwiseStep(first.detach(), second.detach())


def grad(y: Tensor, s: Tensor) -> Tensor:
    """∂y/∂s with its own graph; zero where y does not depend on s."""
    if not y.requires_grad:
        return torch.zeros_like(s)
    (result,) = torch.autograd.grad(y, s, create_graph=True, materialize_grads=True)
    return result
