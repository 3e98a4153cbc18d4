r"""Bounds on the Fisher information and on the variances of its estimators (Sections 4 and 5).

Here: bounds for one parameter at a time (Theorem 4.1), what goes into them (Corollary 4.2 to
Theorem 5.2), and pairs of parameters (Appendix B). Sums over all parameters are bounded in
``fimlib.trace_bounds``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fimlib._checks import check_num_samples
from fimlib.derivatives import Block, Derivatives
from fimlib.diagonal import Diagonal
from fimlib.families.base import Family
from fimlib.families.categorical import Categorical, softmax_covariance
from fimlib.families.gaussian import Gaussian
from fimlib.intervals import Bounds, Interval
from fimlib.spectra.extreme import Spectrum, lambda_min_centred, spectrum
from fimlib.spectra.z_eigenvalues import fourth_moment_spectrum

__all__ = [
    "SoftmaxBounds",
    "corollary_4_2",
    "corollary_b_3",
    "corollary_q_1",
    "lemma_b_2",
    "off_diagonal",
    "proposition_4_3",
    "table_1",
    "theorem_4_1",
    "theorem_5_2",
    "theorem_b_1",
]


def theorem_4_1(
    derivs: Derivatives,
    family: Family,
    *,
    num_samples: int = 1,
    eigenvalues: Spectrum | None = None,
    centred: bool = False,
) -> Bounds[Interval[Diagonal]]:
    r"""Bounds of I, V₁ and V₂ by the norms of J and S, at every parameter (Theorem 4.1).

    ``λ_min(𝓘)‖J‖² ≤ I ≤ λ_max(𝓘)‖J‖²`` (10), ``λ_min(M)‖J‖⁴/N ≤ V₁ ≤ λ_max(M)‖J‖⁴/N`` (11) and
    ``λ_min(𝓘)‖S‖²/N ≤ V₂ ≤ λ_max(𝓘)‖S‖²/N`` (12). For a classifier every λ_min is 0, unless the
    common shift of the logits is taken out (``centred``).

    Args:
        derivs: J, S and the outputs at B inputs.
        family: The output family.
        num_samples: N ≥ 1, labels that the estimators average.
        eigenvalues: From ``spectrum(family, derivs.outputs, ...)``, where another way to λ_max(M)
            than the default is wanted, or where it is at hand already.
        centred: Replace J and S by PJ and PS, P = I − 11ᵀ/T, and λ_min(𝓘) by the minimum over unit
            vectors ⊥ 1: no bound becomes worse, and the lower ones of I and V₂ become positive.
            For families that do not see a common shift; λ_min(M) stays as it is.

    Returns:
        Mappings parameter → [B, *shape], in nat/θ² (fisher) and nat²/θ⁴; ``.layer_means()`` of
        them are the means of the bounds, which bound the layer's means. Those of V₂ hold no
        parameter where the derivatives are of first order only.

    Raises:
        ValueError: N < 1, the outputs do not fit the family, the eigenvalues belong to another
            number of inputs, or the family sees a common shift and ``centred`` is asked for.
    """
    n = check_num_samples(num_samples)
    lam = eigenvalues_for(derivs, family, eigenvalues)
    if centred:
        lam = lam._replace(min_cov=lambda_min_centred(family, derivs.outputs))
    derivs = family.natural_derivatives(derivs)

    def bound(eigenvalue: Tensor, which: str, power: int, degree: int) -> Diagonal:
        if which == "S" and any(block.S is None for block in derivs.blocks):
            return Diagonal(())

        def form(block: Block) -> Tensor:
            D = (block.J if which == "J" else block.second).double()
            D = D - D.mean(1, keepdim=True) if centred else D
            squared_norm = D.square().sum(1)
            scale = eigenvalue.reshape(-1, *[1] * (squared_norm.ndim - 1))
            return scale * squared_norm**power

        return derivs.contract(form, degree)

    return Bounds(
        fisher=Interval(bound(lam.min_cov, "J", 1, 2), bound(lam.max_cov, "J", 1, 2)),
        variance_i1=Interval(
            bound(lam.min_outer / n, "J", 2, 4), bound(lam.max_outer / n, "J", 2, 4)
        ),
        variance_i2=Interval(bound(lam.min_cov / n, "S", 1, 4), bound(lam.max_cov / n, "S", 1, 4)),
    )


def eigenvalues_for(derivs: Derivatives, family: Family, given: Spectrum | None) -> Spectrum:
    """The given eigenvalues, if they belong to these derivatives; without any, computed here."""
    lam = given or spectrum(family, derivs.outputs)
    if len(lam.max_cov) != len(derivs.outputs):
        raise ValueError(
            f"the eigenvalues belong to {len(lam.max_cov)} inputs, the derivatives to "
            f"{len(derivs.outputs)}: use spectrum(family, derivs.outputs)."
        )
    return lam


# Bounds on the eigenvalues themselves.


def corollary_4_2(family: Family, h: Tensor) -> Interval[Tensor]:
    r"""Bounds on the eigenvalues of M by the Z-eigenvalues of 𝓚 (Corollary 4.2).

    ``λ_min(M) ≥ λ_min(𝓚) − λ_max(𝓘)²`` (14), negative for a classifier, whose λ_min(M) is 0, and
    ``λ_max(M) ≤ λ_max(𝓚) − λ_min(𝓘)²`` (15).

    Args:
        family: The output family.
        h: [B, T], the outputs.

    Returns:
        Both, [B] each.

    Raises:
        ValueError: h does not fit the family.
    """
    smallest, largest = fourth_moment_spectrum(family, h)
    min_cov, max_cov = extreme_covariances(family, h)
    return Interval(smallest - max_cov.square(), largest - min_cov.square())


def proposition_4_3(family: Family, h: Tensor) -> Tensor:
    r"""``λ_max(𝓚) ≤ B λ_max(𝓘)`` with B = max ‖t(y) − η‖² over y (Proposition 4.3, Eq. 16): [B].

    Args:
        family: The output family.
        h: [B, T], the outputs.

    Raises:
        ValueError: h does not fit the family, or t(y) is unbounded.
    """
    return family.residual_bound(family.natural(h)) * extreme_covariances(family, h)[1]


def extreme_covariances(family: Family, h: Tensor) -> tuple[Tensor, Tensor]:
    """λ_min(𝓘) and λ_max(𝓘), without those of M: [B] each."""
    eigenvalues = torch.linalg.eigvalsh(family.covariance(family.natural(h))).clamp_min(0)
    return eigenvalues[:, 0], eigenvalues[:, -1]


class SoftmaxBounds(NamedTuple):
    """Upper bounds of λ_max(𝓘) and of λ_max(M), each [B]: a row of Table 1."""

    max_cov: Tensor
    max_outer: Tensor


def theorem_5_2(sigma: Tensor) -> SoftmaxBounds:
    r"""Upper bounds of the softmax's eigenvalues without any eigenvalue (Theorem 5.2).

    ``λ_max(𝓘) ≤ min{σ_max, 1 − ‖σ‖²}`` and ``λ_max(M) ≤ 2 min{σ_max, 1 − ‖σ‖²}``; 1 − ‖σ‖² is
    summed up as Σσ_k(1 − σ_k), which loses no digits however close σ_max is to 1.

    Args:
        sigma: [B, C], probabilities of C ≥ 2 classes.

    Raises:
        ValueError: another shape, negative or NaN entries, or a row that is off 1 by more than
            1e-9.
    """
    sigma, others = probabilities(sigma)
    smaller = torch.minimum(sigma.amax(1), (sigma * others).sum(1))
    return SoftmaxBounds(smaller, 2 * smaller)


def corollary_q_1(sigma: Tensor) -> Tensor:
    """``λ_max(𝓚) ≤ 2 λ_max(𝓘)`` for a softmax (Corollary Q.1, Eq. 36): [B].

    Args:
        sigma: [B, C], probabilities of C ≥ 2 classes.

    Raises:
        ValueError: as ``theorem_5_2``.
    """
    sigma, _ = probabilities(sigma)
    eigenvalues: Tensor = torch.linalg.eigvalsh(softmax_covariance(sigma))
    return 2 * eigenvalues[:, -1]


def probabilities(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Checked probabilities σ_k in float64 and 1 − σ_k, the sum of the others: [B, C] each."""
    if sigma.ndim != 2 or sigma.shape[1] < 2:
        raise ValueError(
            f"sigma must be [B, C] with C ≥ 2 classes, got {list(sigma.shape)}: for one input "
            "pass sigma[None]."
        )
    sigma = sigma.detach().double()
    if not (sigma >= 0).all():
        raise ValueError("sigma holds negative or NaN values: pass probabilities, not logits.")
    if ((sigma.sum(1) - 1).abs() > 1e-9).any():
        raise ValueError(
            f"the rows of sigma must sum to 1 within 1e-9, got {sigma.sum(1).tolist()}: take "
            "torch.softmax(h.double(), dim=1)."
        )
    eye = torch.eye(sigma.shape[1], dtype=sigma.dtype, device=sigma.device)
    return sigma, sigma @ (1 - eye)


def table_1(family: Family, h: Tensor) -> SoftmaxBounds:
    r"""Table 1: upper bounds of λ_max(𝓘) and λ_max(M) in the two learning settings.

    Regression with a known covariance Σ: exact, λ = λ_max(Σ⁻¹) and 2λ²: 1 and 2 in the paper's
    isotropic case. Classification: Theorem 5.2.

    Args:
        family: The output family.
        h: [B, T], the outputs.

    Raises:
        ValueError: h does not fit the family, or the family is not in the table.
    """
    if isinstance(family, Gaussian):
        largest = extreme_covariances(family, h)[1]
        return SoftmaxBounds(largest, 2 * largest.square())
    if isinstance(family, Categorical):
        return theorem_5_2(family.mean(family.natural(h)))
    raise ValueError(
        f"Table 1 covers Gaussian and Categorical, not {type(family).__name__}: use spectrum()."
    )


# Appendix B: pairs of parameters.


def off_diagonal(
    J_i: Tensor, J_j: Tensor, S_ij: Tensor, family: Family, h: Tensor, *, num_samples: int = 1
) -> Bounds[Tensor]:
    r"""Exact off-diagonal entries of the Fisher information and their estimators' variances.

    ``I = 𝓘[J_i, J_j]``, ``V₁ = (1/N) Var((J_i·δ)(J_j·δ)) = (1/N) M_abcd J_i^a J_j^b J_i^c J_j^d``
    and ``V₂ = (1/N) 𝓘[S_ij, S_ij]``: Lemma A.1 where i = j.

    Args:
        J_i: [B, T, n], derivatives ∂_i h of the natural parameters, for n pairs of parameters.
        J_j: [B, T, n], likewise ∂_j h.
        S_ij: [B, T, n], second derivatives ∂²_ij h.
        family: The output family.
        h: [B, T], the outputs.
        num_samples: N ≥ 1, labels that the estimators average.

    Returns:
        The values of I(θ_ij|x), V₁(θ_ij|x) and V₂(θ_ij|x): [B, n] each.

    Raises:
        ValueError: N < 1, shapes do not match, or h does not fit the family.

    Memory: B × n × T × T.
    """
    n, h = check_num_samples(num_samples), family.natural(h)
    J_i, J_j, S_ij = check_pairs(J_i, J_j, S_ij, h=h)
    information = torch.einsum("bin,bij,bjn->bn", J_i, family.covariance(h), J_j)
    outer = torch.einsum("bin,bnij,bjn->bn", J_j, family.outer_covariance_at(h, J_i.mT), J_j)
    # M(u,u,v,v) pairs the indices as (ab),(cd); V₁ needs them as (ac),(bd), and 𝓚 has no pairs.
    separate = family.information(h, J_i) * family.information(h, J_j)
    variance_i1 = (outer + separate - information.square()).clamp_min(0)
    return Bounds(information, variance_i1 / n, family.variance2(h, S_ij) / n)


def theorem_b_1(
    J_i: Tensor,
    J_j: Tensor,
    S_ij: Tensor,
    family: Family,
    h: Tensor,
    *,
    num_samples: int = 1,
    method: str = "multistart",
) -> Bounds[Tensor]:
    r"""Upper bounds of |I|, V₁ and V₂ off the diagonal (Theorem B.1).

    ``|I| ≤ ‖J_i‖‖J_j‖ sup uᵀ𝓘v`` (26), ``V₁ ≤ (1/N)‖J_i‖²‖J_j‖² sup Var((u·δ)(v·δ))`` (27) over
    unit u and v, and ``V₂ ≤ (1/N)‖S_ij‖² λ_max(𝓘)``.

    Both suprema are reached at u = v, and are λ_max(𝓘) and λ_max(M). For unit vectors at an angle θ
    put p, q for the unit vectors along u + v, u − v and c = cos θ. Then
    ``(u·δ)(v·δ) = (1+c)/2 (p·δ)² − (1−c)/2 (q·δ)²``, and by the triangle inequality its standard
    deviation is at most the average, with these weights, of those of (p·δ)² and (q·δ)².

    Args:
        J_i: [B, T, n], derivatives ∂_i h of the natural parameters, for n pairs of parameters.
        J_j: [B, T, n], likewise ∂_j h.
        S_ij: [B, T, n], second derivatives ∂²_ij h.
        family: The output family.
        h: [B, T], the outputs.
        num_samples: N ≥ 1, labels that the estimators average.
        method: How λ_max(M) is found, as in ``lambda_max``; not "lower".

    Returns:
        The bounds of |I(θ_ij|x)|, V₁(θ_ij|x) and V₂(θ_ij|x): [B, n] each.

    Raises:
        ValueError: N < 1, shapes do not match, or h does not fit the family.
    """
    n, h = check_num_samples(num_samples), family.natural(h)
    J_i, J_j, S_ij = check_pairs(J_i, J_j, S_ij, h=h)
    lam = spectrum(family, h, method=method)
    max_outer, max_cov = lam.max_outer[:, None], lam.max_cov[:, None]
    norms = J_i.norm(dim=1) * J_j.norm(dim=1)
    return Bounds(
        corollary_b_3(J_i, J_j, family, h),
        max_outer * norms.square() / n,
        max_cov * S_ij.square().sum(1) / n,
    )


def lemma_b_2(A: Tensor) -> Tensor:
    """Sup of uᵀAv over unit u and v, the largest singular value (Lemma B.2): [..., m, n] → [...].

    Raises:
        ValueError: A is not a finite matrix.
    """
    if A.ndim < 2 or not torch.isfinite(A).all():
        raise ValueError(f"A must be a finite matrix [..., m, n], got shape {list(A.shape)}.")
    singular_values: Tensor = torch.linalg.svdvals(A.detach().double())
    return singular_values[..., 0]


def corollary_b_3(J_i: Tensor, J_j: Tensor, family: Family, h: Tensor) -> Tensor:
    """``|I(θ_ij|x)| ≤ s_max(𝓘) ‖J_i‖ ‖J_j‖`` (Corollary B.3, Eq. 28): [B, n].

    Args:
        J_i: [B, T, n], derivatives ∂_i h of the natural parameters, for n pairs of parameters.
        J_j: [B, T, n], likewise ∂_j h.
        family: The output family.
        h: [B, T], the outputs.

    Raises:
        ValueError: shapes do not match, or h does not fit the family.
    """
    h = family.natural(h)
    J_i, J_j = check_pairs(J_i, J_j, h=h)
    norms: Tensor = J_i.norm(dim=1) * J_j.norm(dim=1)
    return lemma_b_2(family.covariance(h))[:, None] * norms


def check_pairs(*arrays: Tensor, h: Tensor) -> list[Tensor]:
    """Derivatives for n pairs of parameters in float64, if all have the shape [B, T, n]."""
    shapes = [list(array.shape) for array in arrays]
    if any(len(s) != 3 or s != shapes[0] or s[:2] != list(h.shape) for s in shapes):
        raise ValueError(
            f"derivatives of n pairs of parameters must have the shape {list(h.shape)} + [n], all "
            f"the same, got {shapes}."
        )
    return [array.detach().double() for array in arrays]
