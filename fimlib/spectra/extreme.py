r"""Extreme eigenvalues of 𝓘 and of M = 𝓚 − 𝓘⊗𝓘 (Eq. 13, Appendix E.I)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fimlib.families.base import Family
from fimlib.spectra.search import minimize, multistart
from fimlib.spectra.sos import sum_of_squares


class Spectrum(NamedTuple):
    """Extreme eigenvalues at B inputs, each [B], float64.

    Attributes:
        min_cov: λ_min(𝓘), 𝓘 the covariance of t(y).
        max_cov: λ_max(𝓘).
        min_outer: λ_min(M) of Eq. 13, M = 𝓚 − 𝓘⊗𝓘 the covariance of δ⊗δ.
        max_outer: λ_max(M) of Eq. 13.
    """

    min_cov: Tensor
    max_cov: Tensor
    min_outer: Tensor
    max_outer: Tensor


def spectrum(family: Family, h: Tensor, *, method: str = "multistart") -> Spectrum:
    """λ_min and λ_max of 𝓘 and of M at natural parameters h (Eqs 10–13).

    Args:
        family: The output family.
        h: [B, T], natural parameters.
        method: How λ_max(M) is found, as in ``lambda_max``.

    Raises:
        ValueError: as ``lambda_max``; and method="lower", with which upper bounds of the paper
            would be false.
    """
    if method == "lower":
        raise ValueError(
            "method='lower' is below λ_max(M), and upper bounds made of it are false: use "
            "'multistart' or 'certified'."
        )
    h = family.natural(h)
    eigenvalues = torch.linalg.eigvalsh(family.covariance(h)).clamp_min(0)  # PSD up to rounding
    smallest = eigenvalues[:, 0]
    return Spectrum(
        torch.zeros_like(smallest) if family.shift_invariant else smallest,  # 𝓘1 = 0 exactly
        eigenvalues[:, -1],
        family.outer_covariance_min(h),
        lambda_max(family, h, method=method),
    )


def lambda_max(family: Family, h: Tensor, *, method: str = "multistart") -> Tensor:
    r"""λ_max(M) of Eq. 13 or a bound of it, [B].

    ``λ_max(M) = max over ‖u‖ = 1 of M(u,u,u,u)``, the largest variance of (u·δ)². It has many local
    maxima, and the value at one of them makes the "upper bound" of Theorem 4.1 false.

    Args:
        family: The output family.
        h: [B, T], natural parameters.
        method: One of

            * "multistart": a monotone ascent from starts that cover the maxima. Deterministic; not
              a proof of optimality: the gap to "certified" bounds what could have been missed.
            * "certified": an upper bound, the top eigenvalue of M as a matrix on T×T arrays. For a
              classifier it costs O(C³), and it is never above Theorem 5.2's bound.
            * "sos": an upper bound by semidefinite programming, exact in nearly every case. For up
              to 16 outputs; needs cvxpy and Clarabel.
            * "minimize": the paper's way, a general optimiser from random starts. The value may be
              too small for an upper bound. For up to 64 outputs; needs pytorch-minimize.
            * "lower": a lower bound, the best of the directions that the family proposes. O(T) for
              each.

    Raises:
        ValueError: h does not fit the family; the method is unknown, or has too many outputs to
            work on. "multistart" takes R T³ ≤ 10⁹ for R starts: about 150 classes.
        ImportError: a package is missing that the method needs.

    Example: equal probabilities of C classes: λ_max(M) = (1 − 2/C)²/(C − 1).
        >>> from fimlib import Categorical
        >>> round(float(lambda_max(Categorical(), torch.zeros(1, 4))) * 12, 9)
        1.0
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of: {', '.join(METHODS)}.")
    return METHODS[method](family, family.natural(h))


def certified(family: Family, h: Tensor) -> Tensor:
    """An upper bound on λ_max(M), certain up to rounding (1e-16 of λ_max(𝓚)): [B].

    The top eigenvalue of M as a matrix on T×T arrays; u⊗u is one of the unit arrays.
    """
    eigenvalues: Tensor = torch.linalg.eigvalsh(family.unfolding(h))
    return eigenvalues[:, -1].clamp_min(0)


def lower(family: Family, h: Tensor) -> Tensor:
    """A lower bound on λ_max(M), certain up to rounding: [B].

    The largest M(u,u,u,u) among the unit directions that the family proposes; for a classifier at
    least ``(C/(C−1))² max_k σ_k(1−σ_k)(1−2σ_k)²``, which the centred e_k give.
    """
    u = torch.nn.functional.normalize(family.directions(h), dim=-1)
    return family.variance1(h, u.mT).amax(1)


METHODS = {
    "multistart": multistart,
    "certified": certified,
    "minimize": minimize,
    "sos": sum_of_squares,
    "lower": lower,
}


def lambda_min_centred(family: Family, h: Tensor) -> Tensor:
    """λ_min(𝓘) over unit u ⊥ 1, for families that do not see a common shift: [B].

    On 1^⊥ the inverse of 𝓘 = diag σ − σσᵀ is P diag(1/σ) P. Its top eigenvalue keeps the digits
    that the second smallest eigenvalue of 𝓘 loses to rounding.
    """
    h = family.natural(h)
    if not family.shift_invariant:
        raise ValueError(
            f"{type(family).__name__} sees a common shift of its parameters: leave centred=False."
        )
    sigma = family.mean(h)
    smallest = sigma.amin(1, keepdim=True).clamp_min(torch.finfo(sigma.dtype).tiny)
    centre = torch.eye(h.shape[1], dtype=h.dtype, device=h.device) - 1 / h.shape[1]
    inverse = centre @ torch.diag_embed(smallest / sigma.clamp_min(smallest)) @ centre
    largest: Tensor = torch.linalg.eigvalsh(inverse)[:, -1]
    return sigma.amin(1) / largest
