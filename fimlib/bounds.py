r"""Bounds on the Fisher information and on the variances of its estimators (Section 4)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fimlib.derivatives import Block, Derivatives
from fimlib.diagonal import Diagonal
from fimlib.families import Family, check_num_samples
from fimlib.spectra import Spectrum, spectrum


class Interval(NamedTuple):
    """A lower and an upper bound of one quantity."""

    lower: Diagonal
    upper: Diagonal


class Bounds(NamedTuple):
    """Theorem 4.1: bounds of I (Eq. 10), V₁ (Eq. 11) and V₂ (Eq. 12)."""

    fisher: Interval
    variance_i1: Interval
    variance_i2: Interval


def theorem_4_1(
    derivs: Derivatives,
    family: Family,
    *,
    num_samples: int = 1,
    eigenvalues: Spectrum | None = None,
) -> Bounds:
    r"""Bounds of I, V₁ and V₂ by the norms of J and S, at every parameter (Theorem 4.1).

    ``λ_min(𝓘)‖J‖² ≤ I ≤ λ_max(𝓘)‖J‖²`` (10), ``λ_min(M)‖J‖⁴/N ≤ V₁ ≤ λ_max(M)‖J‖⁴/N`` (11) and
    ``λ_min(𝓘)‖S‖²/N ≤ V₂ ≤ λ_max(𝓘)‖S‖²/N`` (12). For a classifier every λ_min is 0.

    Args:
        derivs: J, S and the outputs at B inputs.
        family: The output family.
        num_samples: N ≥ 1, labels that the estimators average.
        eigenvalues: From ``spectrum(family, derivs.outputs, ...)``, where another way to λ_max(M)
            than the default is wanted, or where it is at hand already.

    Returns:
        Mappings parameter → [B, *shape], in nat/θ² (fisher) and nat²/θ⁴; ``.layer_means()`` of
        them are the means of the bounds, which bound the layer's means.

    Raises:
        ValueError: N < 1, the outputs do not fit the family, or the eigenvalues belong to
            another number of inputs.
    """
    n = check_num_samples(num_samples)
    lam = eigenvalues or spectrum(family, derivs.outputs)
    if len(lam.max_cov) != len(derivs.outputs):
        raise ValueError(
            f"the eigenvalues belong to {len(lam.max_cov)} inputs, the derivatives to "
            f"{len(derivs.outputs)}: use spectrum(family, derivs.outputs)."
        )

    def bound(eigenvalue: Tensor, which: str, power: int, degree: int) -> Diagonal:
        def form(block: Block) -> Tensor:
            squared_norm: Tensor = getattr(block, which).double().square().sum(1)
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
