r"""The data Fisher information, or "empirical Fisher" (Section 6, Appendix F).

The labels come from the data, q(y|x), and not from the model: ``Ĩ(θ|x) = (∂h)ᵀ E_q[δδᵀ] (∂h)``,
where δ = t(y) − η is still taken about the *model's* mean η. Give q by its probabilities
(``family.expected``) or by observed labels (``family.observed``), which then are all of q. With the
observed labels Ĩ is not random at all given x, but another number than I: no variance, yet a bias.
Where q is the model itself, Ĩ = I.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fimlib._checks import check_num_samples
from fimlib.derivatives import Derivatives
from fimlib.diagonal import Diagonal
from fimlib.families.base import Labels, weighted_variance
from fimlib.fisher import check_labels, estimate_i1, family_of
from fimlib.matrices import estimate_i1_matrix, jacobian

__all__ = [
    "data_fisher",
    "data_fisher_covariance",
    "data_fisher_matrix",
    "data_fisher_variance",
    "kl_gradient",
    "reparameterise",
]


def data_fisher(derivs: Derivatives, labels: Labels) -> Diagonal:
    r"""Diagonal of the data Fisher information, Ĩ(θᵢ|x) = J^a J^b Ĩ_ab (Eq. 21).

    The same sum over labels as in Î₁ (Eq. 5), with q(y|x) as weights: on N observed labels
    ``(1/N) Σ_k (J·δ_k)²``.

    Args:
        derivs: J and the outputs at B inputs.
        labels: q(y|x) for each of them: ``family.expected(derivs.outputs, q)`` or
            ``family.observed(derivs.outputs, y)``.

    Returns:
        [B, *shape] per parameter, in nat/θ². It is that of log p(y|x). Gradients of a loss with
        class weights have squares c² times as large, c the weight of the label's class. Under label
        smoothing q is the smoothed labels, ``family.expected(h, q)``, and the square of the loss's
        gradient is that of ``kl_gradient``.

    Raises:
        ValueError: the labels belong to other outputs.
    """
    return estimate_i1(derivs, labels)


def data_fisher_matrix(
    model: nn.Module, x: Tensor, labels: Labels, *, parameters: Sequence[str]
) -> Tensor:
    r"""Data Fisher information matrix, ``E_x (∂h)ᵀ E_q[δδᵀ] (∂h)``, over the inputs (Eq. 21).

    It is never below ∂KL ∂KLᵀ at one input, see ``kl_gradient``.

    Args:
        model: Any module that maps x to outputs [B, T]; in eval mode.
        x: [B, ...]; B = 1 gives the conditional matrix.
        labels: q(y|x), as in ``data_fisher``.
        parameters: Names, as in ``model.named_parameters()``; flattened and joined in this order.

    Returns:
        [P, P], float64, symmetric, in nat/θ².

    Raises:
        ValueError: an unknown parameter name, labels for other outputs, or what
            ``fimlib.differentiate`` refuses.
    """
    return estimate_i1_matrix(model, x, labels, parameters=parameters)


def data_fisher_variance(derivs: Derivatives, labels: Labels, *, num_samples: int = 1) -> Diagonal:
    r"""Variance of the estimate of Ĩ(θᵢ|x) from N labels drawn from q(y|x) (Corollary F.1).

    ``(1/N) J⁴·(𝓚̃ − 𝓘̃⊗𝓘̃)``, where 𝓘̃ = E_q[δ⊗δ] and 𝓚̃ = E_q[δ⊗δ⊗δ⊗δ] are moments about the
    model's mean η, not about that of q. It is 0 where q is one observed label per input.

    Args:
        derivs: J and the outputs at B inputs.
        labels: q(y|x), as in ``data_fisher``.
        num_samples: N ≥ 1, labels that are drawn from it.

    Returns:
        [B, *shape] per parameter, in nat²/θ⁴.

    Raises:
        ValueError: N < 1, or the labels belong to other outputs.
    """
    n = check_num_samples(num_samples)
    check_labels(derivs.outputs, labels)
    derivs = labels.family.natural_derivatives(derivs)
    return derivs.contract(
        lambda block: weighted_variance(labels.weights, labels.project(block.J).square()) / n,
        degree=4,
    )


def data_fisher_covariance(
    model: nn.Module, x: Tensor, labels: Labels, *, parameters: Sequence[str], num_samples: int = 1
) -> Tensor:
    r"""Covariance of the estimate of the matrix Ĩ(θ|x) from N labels (Lemma 6.1, Eq. 22).

    ``(1/N) ∂h^{⊗4} (𝓚̃ − 𝓘̃⊗𝓘̃)``: entry i, j, k, l is the covariance of the entries (i, j) and
    (k, l). For B fixed inputs, with N labels each, of the average over them.

    Args:
        model: Any module that maps x to outputs [B, T]; in eval mode.
        x: [B, ...]; B = 1 is the lemma's case.
        labels: q(y|x), as in ``data_fisher``.
        parameters: Names, as in ``data_fisher_matrix``; P scalars in all.
        num_samples: N ≥ 1, labels that are drawn from q(y|x).

    Returns:
        [P, P, P, P], float64, in nat²/θ⁴: for few parameters.

    Raises:
        ValueError: N < 1, or as ``data_fisher_matrix``.
    """
    n = check_num_samples(num_samples)
    outputs, J = jacobian(model, x, parameters, family_of(labels))
    check_labels(outputs, labels)
    scores = labels.project(J)
    squares = torch.einsum("bai,baj->baij", scores, scores)
    deviations = squares - labels.mean(squares)[:, None]
    total = torch.einsum("ba,baij,bakl->ijkl", labels.weights, deviations, deviations)
    return total / (n * len(x) ** 2)


def kl_gradient(derivs: Derivatives, labels: Labels) -> Diagonal:
    r"""Gradient of KL(q(y|x) ‖ p(y|x;θ)): ``∂ᵢKL = −J·E_q[δ]``.

    ``Ĩ(θ|x) − ∂KL ∂KLᵀ`` is the covariance of the score under q, hence positive semi-definite: Ĩ
    is positive wherever the loss has a slope. With observed labels this is the gradient of
    their mean negative log-likelihood.

    Args:
        derivs: J and the outputs at B inputs.
        labels: q(y|x), as in ``data_fisher``.

    Returns:
        [B, *shape] per parameter, in nat/θ.

    Raises:
        ValueError: the labels belong to other outputs.
        TypeError: no family made the labels.
    """
    check_labels(derivs.outputs, labels)
    derivs = labels.family.natural_derivatives(derivs)
    return derivs.contract(lambda block: -labels.mean(labels.project(block.J)), degree=1)


def reparameterise(fisher: Tensor, jacobian: Tensor) -> Tensor:
    r"""Fisher information, or its data form, in other coordinates: ``(∂θ/∂ξ)ᵀ I(θ) (∂θ/∂ξ)``.

    Args:
        fisher: [P, P], with respect to θ.
        jacobian: [P, Q], ∂θ/∂ξ.

    Returns:
        [Q, Q], float64, with respect to ξ.

    Raises:
        ValueError: the shapes do not fit.

    Example: θ = 3ξ.
        >>> reparameterise(torch.tensor([[2.0]]), torch.tensor([[3.0]])).item()
        18.0
    """
    if fisher.ndim != 2 or fisher.shape[0] != fisher.shape[1]:
        raise ValueError(f"fisher must be a square matrix [P, P], got {list(fisher.shape)}.")
    if jacobian.ndim != 2 or len(jacobian) != len(fisher):
        raise ValueError(
            f"jacobian must be ∂θ/∂ξ with shape [P, Q] and P = {len(fisher)}, got "
            f"{list(jacobian.shape)}: one row for every old parameter, one column for every new."
        )
    jacobian = jacobian.double()
    return jacobian.T @ fisher.double() @ jacobian
