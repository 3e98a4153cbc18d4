r"""The diagonal Fisher information, its two random estimators, and their variances.

Exact quantities (Lemma A.1: Eqs 23–25) read the derivatives and the family; estimates (Eqs 3–6)
read the derivatives and a sample of labels. All of them are *conditional*, one value per input;
``.mean_over_inputs()`` of an estimate is the joint estimator with B inputs and N labels for each.

J and S in the formulas are derivatives of the natural parameters. The derivatives that the
functions take are those of the network's outputs; where the two differ, the family converts them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fimlib._checks import check_num_samples
from fimlib.derivatives import Block, Derivatives
from fimlib.diagonal import Diagonal
from fimlib.families.base import Family, Labels, check_family, weighted_variance
from fimlib.families.probabilities import warn_of_probabilities


def fisher_information(derivs: Derivatives, family: Family) -> Diagonal:
    r"""Diagonal Fisher information I(θᵢ|x), in closed form (Lemma A.1, Eq. 23).

    ``I(θᵢ|x) = J^a J^b 𝓘_ab``; for a classifier ``Σ_k σ_k c_k²``, c_k = ∂ᵢ log p(k|x).

    Args:
        derivs: J and the outputs at B inputs, as ``differentiate`` gives them.
        family: What the outputs mean, e.g. ``Categorical()``.

    Returns:
        [B, *shape] per parameter, in nat/θ².

    Raises:
        ValueError: the outputs do not fit the family.

    Example: zero weights make p uniform over 3 classes, and I = 2/9 by hand.
        >>> from fimlib import Categorical, differentiate
        >>> net = torch.nn.Linear(1, 3, bias=False)
        >>> _ = torch.nn.init.zeros_(net.weight)
        >>> I = fisher_information(differentiate(net, torch.ones(1, 1)), Categorical())
        >>> round(float(I["weight"][0, 0, 0]) * 9, 12)
        2.0
    """
    derivs, h = natural(derivs, family)
    return derivs.contract(lambda block: family.information(h, block.J), degree=2)


def variance_i1(derivs: Derivatives, family: Family, *, num_samples: int = 1) -> Diagonal:
    r"""Variance of Î₁(θᵢ|x) over its N labels, in closed form (Lemma A.1, Eq. 24).

    ``V₁(θᵢ|x) = (1/N) J^a J^b J^c J^d (𝓚_abcd − 𝓘_ab 𝓘_cd)``; for a classifier
    ``(1/N) Σ_k σ_k (c_k² − I)²``. No sampling, no T⁴ tensor.

    Args:
        derivs: J, S and the outputs at B inputs.
        family: The output family.
        num_samples: N ≥ 1, labels that the estimator averages.

    Returns:
        [B, *shape] per parameter, in nat²/θ⁴.

    Raises:
        ValueError: N < 1, or the outputs do not fit the family.

    Example: as above, V₁ = 2/81 by hand.
        >>> from fimlib import Categorical, differentiate
        >>> net = torch.nn.Linear(1, 3, bias=False)
        >>> _ = torch.nn.init.zeros_(net.weight)
        >>> V1 = variance_i1(differentiate(net, torch.ones(1, 1)), Categorical())
        >>> round(float(V1["weight"][0, 0, 0]) * 81, 12)
        2.0
    """
    derivs, h = natural(derivs, family)
    n = check_num_samples(num_samples)
    return derivs.contract(lambda block: family.variance1(h, block.J) / n, degree=4)


def variance_i2(derivs: Derivatives, family: Family, *, num_samples: int = 1) -> Diagonal:
    r"""Variance of Î₂(θᵢ|x) over its N labels, in closed form (Lemma A.1, Eq. 25).

    ``V₂(θᵢ|x) = (1/N) S^a S^b 𝓘_ab``: 0 in a last layer that is linear (Remark 4.4).

    Args:
        derivs: J, S and the outputs at B inputs.
        family: The output family.
        num_samples: N ≥ 1, labels that the estimator averages.

    Returns:
        [B, *shape] per parameter, in nat²/θ⁴.

    Raises:
        ValueError: N < 1, the outputs do not fit the family, or ``derivs`` have no S.
    """
    derivs, h = natural(derivs, family)
    n = check_num_samples(num_samples)
    return derivs.contract(lambda block: family.variance2(h, block.second) / n, degree=4)


def covariance_i1_i2(derivs: Derivatives, family: Family, *, num_samples: int = 1) -> Diagonal:
    r"""Covariance of Î₁(θᵢ|x) and Î₂(θᵢ|x) that use the same N labels.

    ``C₁₂ = (1/N) Cov((J·δ)², −S·δ)``; beyond the paper. ``Var(Î₁ − Î₂) = V₁ + V₂ − 2C₁₂``.

    Args:
        derivs: J, S and the outputs at B inputs.
        family: The output family.
        num_samples: N ≥ 1, labels that both estimators average.

    Returns:
        [B, *shape] per parameter, in nat²/θ⁴.

    Raises:
        ValueError: N < 1, the outputs do not fit the family, or ``derivs`` have no S.
    """
    derivs, h = natural(derivs, family)
    n = check_num_samples(num_samples)
    return derivs.contract(
        lambda block: family.covariance12(h, block.J, block.second) / n, degree=4
    )


def estimate_i1(derivs: Derivatives, labels: Labels) -> Diagonal:
    r"""The estimator Î₁(θᵢ|x) on given labels (Eq. 5).

    ``Î₁(θᵢ|x) = (1/N) Σ_k (J·δ_k)² ≥ 0``. Equal labels are counted, so that the cost does not
    depend on N for a classifier.

    Args:
        derivs: J, S and the outputs at B inputs.
        labels: N labels for each of them, as ``family.sample(derivs.outputs, N)`` draws them, or
            ``family.observed(derivs.outputs, y)`` makes them of labels y.

    Returns:
        [B, *shape] per parameter, in nat/θ².

    Raises:
        ValueError: the labels were drawn for other outputs.
        TypeError: no family made the labels.
    """
    check_labels(derivs.outputs, labels)
    derivs = labels.family.natural_derivatives(derivs)
    return derivs.contract(lambda block: labels.mean(_squared_scores(block, labels)), degree=2)


def estimate_i2(derivs: Derivatives, labels: Labels) -> Diagonal:
    r"""The estimator Î₂(θᵢ|x) on given labels (Eq. 6).

    ``Î₂(θᵢ|x) = (1/N) Σ_k (Jᵀ𝓘J − S·δ_k)``: it may be negative.

    Args:
        derivs: J, S and the outputs at B inputs.
        labels: N labels for each of them, as in ``estimate_i1``.

    Returns:
        [B, *shape] per parameter, in nat/θ².

    Raises:
        ValueError: the labels were drawn for other outputs, or ``derivs`` have no S.
        TypeError: no family made the labels.
    """
    check_labels(derivs.outputs, labels)
    family, h = labels.family, labels.outputs
    derivs = family.natural_derivatives(derivs)

    def form(block: Block) -> Tensor:
        return family.information(h, block.J) - labels.mean(labels.project(block.second))

    return derivs.contract(form, degree=2)


def sample_variance_i1(derivs: Derivatives, labels: Labels) -> Diagonal:
    """Unbiased estimate of V₁ from the N ≥ 2 labels themselves, one value per entry of Î₁.

    It is 0 where all N labels agree, as they mostly do under a confident softmax, however large
    V₁ is: compare ``variance_i1``.

    Args:
        derivs: J, S and the outputs at B inputs.
        labels: N labels for each of them, as in ``estimate_i1``.

    Returns:
        [B, *shape] per parameter, in nat²/θ⁴.

    Raises:
        ValueError: the labels were drawn for other outputs, or N < 2.
        TypeError: no family made the labels.
    """
    return _sample_variance(derivs, labels, _squared_scores)


def sample_variance_i2(derivs: Derivatives, labels: Labels) -> Diagonal:
    """Unbiased estimate of V₂ from the N ≥ 2 labels themselves; see ``sample_variance_i1``."""
    return _sample_variance(derivs, labels, lambda block, labels: labels.project(block.second))


def natural(derivs: Derivatives, family: Family) -> tuple[Derivatives, Tensor]:
    """Derivatives of the natural parameters, and these themselves, [B, T]."""
    check_family(family)
    h = family.natural(derivs.outputs)
    warn_of_probabilities(family, h)
    return family.natural_derivatives(derivs), h


def _squared_scores(block: Block, labels: Labels) -> Tensor:
    return labels.project(block.J).square()


def _sample_variance(
    derivs: Derivatives, labels: Labels, scores: Callable[[Block, Labels], Tensor]
) -> Diagonal:
    check_labels(derivs.outputs, labels)
    n = check_num_samples(labels.num_samples, at_least=2)
    derivs = labels.family.natural_derivatives(derivs)
    return derivs.contract(
        lambda block: weighted_variance(labels.weights, scores(block, labels)) / (n - 1), degree=4
    )


def family_of(labels: Labels) -> Family:
    """The family that made the labels; a TypeError unless one did."""
    if not isinstance(labels, Labels):
        raise TypeError(
            "labels must be made by a family: family.observed(derivs.outputs, y) or "
            f"family.sample(derivs.outputs, num_samples); got {type(labels).__name__}."
        )
    return labels.family


def check_labels(outputs: Tensor, labels: Labels) -> None:
    """Raise an error unless a family made the labels, for these outputs."""
    family_of(labels)
    eps = torch.finfo(outputs.dtype).eps if outputs.is_floating_point() else 0.0
    is_same = outputs.shape == labels.outputs.shape and torch.allclose(
        outputs.double(), labels.outputs, rtol=1e2 * eps, atol=1e2 * eps
    )  # engines may round differently
    if not is_same:
        raise ValueError(
            "these labels were drawn for other outputs: draw them with "
            "family.sample(derivs.outputs, num_samples) for the same model and inputs."
        )
    warn_of_probabilities(labels.family, outputs)
