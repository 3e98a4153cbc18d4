"""Full matrices on chosen parameters (Eqs 2–4): the Fisher information and its two estimators.

J comes from ``differentiate``'s engines, so any model that these support will do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fimlib.derivatives import flat
from fimlib.engines.checks import check_model, check_module
from fimlib.engines.choose import differentiate_checked
from fimlib.engines.confirm import confirm_hessian
from fimlib.engines.forward_mode import twice_differentiable
from fimlib.engines.model import call_with, differentiating, private_copy
from fimlib.engines.rewrite import rewritten
from fimlib.families.base import Family, Labels
from fimlib.families.probabilities import warn_of_probabilities
from fimlib.fisher import check_labels, family_of
from fimlib.memory import raise_if_out_of_memory


def fisher_matrix(
    model: nn.Module, x: Tensor, family: Family, *, parameters: Sequence[str]
) -> Tensor:
    r"""Fisher information matrix over the inputs, I(θ) = E_x (∂h)ᵀ 𝓘 (∂h) (Eq. 2).

    Args:
        model: Any module that maps x to the outputs [B, T] of the family; in eval mode.
        x: [B, ...]; B = 1 gives the conditional matrix.
        family: The output family.
        parameters: Names, as in ``model.named_parameters()``; flattened and joined in this order.

    Returns:
        [P, P], float64, symmetric, in nat/θ².

    Raises:
        ValueError: an unknown parameter name, outputs that do not fit the family, or what
            ``fimlib.differentiate`` refuses.
    """
    outputs, J = jacobian(model, x, parameters, family)
    warn_of_probabilities(family, outputs, model)
    cov = family.covariance(family.natural(outputs))
    return torch.einsum("bti,btu,buj->ij", J, cov, J) / len(x)


def estimate_i1_matrix(
    model: nn.Module, x: Tensor, labels: Labels, *, parameters: Sequence[str]
) -> Tensor:
    """The estimator Î₁(θ) = (1/N) Σ_k ∂ℓ_k ∂ℓ_kᵀ, averaged over the inputs (Eq. 3).

    Args:
        model: Any module that maps x to the outputs [B, T] of the family; in eval mode.
        x: [B, ...]; B = 1 gives the conditional matrix.
        labels: N labels for each input, drawn for the model's outputs at x.
        parameters: Names, as in ``model.named_parameters()``; flattened and joined in this order.

    Returns:
        [P, P], float64, symmetric, in nat/θ².

    Raises:
        ValueError: an unknown parameter name, labels for other outputs, or what
            ``fimlib.differentiate`` refuses.
        TypeError: no family made the labels.
    """
    outputs, J = jacobian(model, x, parameters, family_of(labels))
    check_labels(outputs, labels)
    scores = labels.project(J) * labels.weights.sqrt()[:, :, None]
    return torch.einsum("bai,baj->ij", scores, scores) / len(x)


def estimate_i2_matrix(
    model: nn.Module, x: Tensor, labels: Labels, *, parameters: Sequence[str]
) -> Tensor:
    r"""The estimator Î₂(θ) = −(1/N) Σ_k ∂²ℓ_k, averaged over the inputs (Eq. 4).

    ``−∂²ℓ = (∂h)ᵀ𝓘(∂h) − Σ_a δ_a ∂²h^a`` is linear in δ, so one Hessian serves all labels.

    Args:
        model: Any module that maps x to the outputs [B, T] of the family; in eval mode.
        x: [B, ...]; B = 1 gives the conditional matrix.
        labels: N labels for each input, drawn for the model's outputs at x.
        parameters: Names, as in ``model.named_parameters()``; flattened and joined in this order.

    Returns:
        [P, P], float64, symmetric, in nat/θ².

    Raises:
        ValueError: an unknown parameter name, labels for other outputs, or what
            ``fimlib.differentiate`` refuses.
        TypeError: no family made the labels.
        NotImplementedError: autograd cannot differentiate the model twice.
    """
    model, family, names = check_module(model), family_of(labels), list(parameters)
    outputs, J = jacobian(model, x, names, family)
    check_labels(outputs, labels)
    cov = family.covariance(family.natural(outputs))
    information = torch.einsum("bti,btu,buj->ij", J, cov, J) / len(x)
    residual, at = labels.mean_residual(), labels.outputs

    def at_outputs(outputs: Tensor) -> Tensor:
        return (family.link(outputs.double(), at) * residual).sum() / len(x)

    def curvature(model: nn.Module) -> Tensor:
        own = private_copy(model)
        vector = torch.cat([own.get_parameter(name).detach().flatten() for name in names])

        def at_vector(vector: Tensor) -> Tensor:
            return at_outputs(functional(own, names, vector, x))

        with twice_differentiable(), rewritten():
            try:
                found: Tensor = torch.func.hessian(at_vector)(vector)
            except RuntimeError as error:
                raise_if_out_of_memory(error)
                found = by_reverse_mode(model, at_vector, vector)
        return found.detach()

    with differentiating(model, x):
        found = curvature(model)
        confirm_hessian(model, x, names, found, at_outputs, curvature)
    return information - found.double()


def by_reverse_mode(
    model: nn.Module, function: Callable[[Tensor], Tensor], vector: Tensor
) -> Tensor:
    """The Hessian where an operation has no rule for forward mode, as an LSTM on a GPU."""
    try:
        found: Tensor = torch.autograd.functional.hessian(function, vector)
    except RuntimeError as error:
        raise_if_out_of_memory(error)
        raise NotImplementedError(
            f"autograd cannot differentiate {type(model).__name__} twice: {error}"
        ) from error
    return found


def jacobian(
    model: nn.Module, x: Tensor, names: Sequence[str], family: Family
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T], and J [B, T, P] of the natural parameters in float64.

    P counts the entries of the named parameters.
    """
    model = check_module(model)
    check_model(model, x)
    check_names(model, names)
    derivs = differentiate_checked(model, x, "auto", 1, frozenset(names)).batch.derivatives()
    natural = family.natural_derivatives(derivs)
    family.natural(derivs.outputs)
    J = torch.cat([flat(natural.jacobian(name)) for name in names], dim=2)
    return derivs.outputs, J.double()


def check_names(model: nn.Module, names: Sequence[str]) -> None:
    """A ValueError unless these are names of different parameters."""
    known = dict(model.named_parameters())
    if isinstance(names, str) or len(set(names)) != len(names):
        raise ValueError(f"parameters must be a list of different names, got {names!r}.")
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"no parameters named {unknown}; there are: {', '.join(known)}.")


def functional(model: nn.Module, names: Sequence[str], vector: Tensor, x: Tensor) -> Tensor:
    """The outputs with the named parameters taken from the vector ``vector``."""
    known = dict(model.named_parameters())
    pieces = torch.split(vector, [known[name].numel() for name in names])
    values = {n: p.view_as(known[n]) for n, p in zip(names, pieces, strict=True)}
    result: Tensor = call_with(model, values, x)
    return result
