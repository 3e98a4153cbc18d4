r"""Bounds on sums over all parameters of I, V₁ and V₂ (Corollary 4.6, Appendix C).

All parameters' J are the columns of the T × dim(θ) matrix ∂h, all S those of ∂²h, and all vec(JJᵀ)
those of J̃. Only the Gram matrices of their rows are built, from the derivatives' factors: T×T for
∂h and ∂²h; for J̃ one on the symmetric T×T arrays, with about T⁴/4 entries per input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fimlib._checks import check_num_samples
from fimlib.bounds import eigenvalues_for
from fimlib.derivatives import Block, Derivatives, flat
from fimlib.families.base import Family
from fimlib.intervals import Bounds, Interval
from fimlib.memory import TRACE_NUMBERS
from fimlib.spectra.extreme import Spectrum
from fimlib.spectra.sos import symmetric_pairs

__all__ = [
    "TraceBound",
    "corollary_4_6",
    "theorem_c_1",
    "theorem_c_2",
]


class TraceBound(NamedTuple):
    """Corollary 4.6's two bounds of one sum over all parameters, each [B].

    Attributes:
        spectral: By the largest singular value of the derivatives, and the trace of the moments.
        norm: By the norm of the derivatives, and the largest eigenvalue of the moments.
    """

    spectral: Tensor
    norm: Tensor

    @property
    def upper(self) -> Tensor:
        """The smaller of the two, [B]."""
        return torch.minimum(self.spectral, self.norm)


def corollary_4_6(
    derivs: Derivatives,
    family: Family,
    *,
    num_samples: int = 1,
    eigenvalues: Spectrum | None = None,
) -> Bounds[TraceBound]:
    r"""Upper bounds of I, V₁ and V₂ summed over all parameters (Corollary 4.6).

    ``ΣI ≤ min{s_max(∂h)² tr 𝓘, ‖∂h‖_F² λ_max(𝓘)}`` (17),
    ``ΣV₁ ≤ (1/N) min{s_max(J̃)² tr M̃, λ_max(M) Σ‖J‖⁴}`` (18) and
    ``ΣV₂ ≤ (1/N) min{s_max(∂²h)² tr 𝓘, ‖∂²h‖_F² λ_max(𝓘)}`` (19), where M̃ is M as a matrix on
    T×T arrays. In each, both terms are of the same degree in the derivatives, so that their scale
    does not decide which is smaller.

    Args:
        derivs: J, S and the outputs at B inputs.
        family: The output family.
        num_samples: N ≥ 1, labels that the estimators average.
        eigenvalues: Those of 𝓘 and M at these outputs, if ``spectrum`` has computed them before.

    Returns:
        Pairs of [B], in nat/θ² (fisher) and nat²/θ⁴; ``.upper`` is their minimum.

    Raises:
        ValueError: N < 1, ``derivs`` have no S, outputs or eigenvalues do not fit, or B·T⁴ exceeds
            2²⁷.

    Memory: B·T⁴/4 numbers, T⁴ where the family has no unfolding of its own.
    """
    n = check_num_samples(num_samples)
    lam = eigenvalues_for(derivs, family, eigenvalues)
    first, outer, second = squared_singular_values(derivs, family)
    cov, M = moment_eigenvalues(family, derivs.outputs)

    def bound(squares: Tensor, moments: Tensor, largest: Tensor, n: int) -> TraceBound:
        return TraceBound(squares[:, 0] * moments.sum(1) / n, squares.sum(1) * largest / n)

    return Bounds(
        bound(first, cov, lam.max_cov, 1),
        bound(outer, M, lam.max_outer, n),
        bound(second, cov, lam.max_cov, n),
    )


def theorem_c_1(
    derivs: Derivatives, family: Family, *, num_samples: int = 1, symmetric: bool = False
) -> Bounds[Interval[Tensor]]:
    r"""Bounds of I, V₁ and V₂ summed over all parameters, by full spectra (Theorem C.1).

    ``Σ_k s_k(∂h)² s_{T−k+1}(𝓘) ≤ ΣI ≤ Σ_k s_k(∂h)² s_k(𝓘)`` (29), the same for ΣV₁ with J̃ and M̃,
    T² terms and 1/N (30), and for ΣV₂ with ∂²h and 1/N (31). The lower bound of (30) is 0 for a
    classifier.

    Args:
        derivs: J, S and the outputs at B inputs.
        family: The output family.
        num_samples: N ≥ 1, labels that the estimators average.
        symmetric: Count in (30) only the T(T + 1)/2 dimensions of symmetric arrays, which hold
            all of J̃ and M̃. The upper bound stays, the lower one rises: for the isotropic
            Gaussian to the upper.

    Returns:
        Bounds of ΣI, ΣV₁ and ΣV₂, each [B].

    Raises:
        ValueError: N < 1, ``derivs`` have no S, the outputs do not fit, or B·T⁴ exceeds 2²⁷.

    Memory: as ``corollary_4_6``.
    """
    n = check_num_samples(num_samples)
    first, outer, second = squared_singular_values(derivs, family)
    cov, M = moment_eigenvalues(family, derivs.outputs)
    num_outputs = cov.shape[1]
    size = outer.shape[1] if symmetric else num_outputs**2
    return Bounds(
        paired_sums(first, cov, num_outputs),
        Interval(*(bound / n for bound in paired_sums(outer, M, size))),
        Interval(*(bound / n for bound in paired_sums(second, cov, num_outputs))),
    )


def theorem_c_2(A: Tensor, B: Tensor) -> Interval[Tensor]:
    r"""Ruhe's bounds of tr AB for positive semidefinite matrices (Theorem C.2).

    ``Σ_k λ_k(A) λ_{n−k+1}(B) ≤ tr AB ≤ Σ_k λ_k(A) λ_k(B)``, the eigenvalues in decreasing order.

    Args:
        A: [..., n, n], symmetric and positive semidefinite.
        B: Like A, of the same shape.

    Returns:
        Two tensors [...].

    Raises:
        ValueError: the shapes differ, or a matrix is not square, symmetric, finite or positive
            semidefinite (up to 1e-9 of its largest entry or eigenvalue).
    """
    if A.shape != B.shape:
        raise ValueError(f"A and B must have the same shape: {list(A.shape)}, {list(B.shape)}.")
    a, b = semidefinite_eigenvalues(A), semidefinite_eigenvalues(B)
    return paired_sums(a, b, A.shape[-1])


def semidefinite_eigenvalues(A: Tensor) -> Tensor:
    """Eigenvalues of a matrix that is checked, decreasing: [..., n, n] → [..., n]."""
    if A.ndim < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"a matrix [..., n, n] is needed, got shape {list(A.shape)}.")
    A = A.detach().double()
    if not ((A - A.mT).abs().amax((-1, -2)) <= 1e-9 * A.abs().amax((-1, -2))).all():
        raise ValueError("the matrix is not symmetric, or not finite: pass (A + Aᵀ)/2 if it is.")
    eigenvalues = torch.linalg.eigvalsh(A)
    if not (eigenvalues[..., 0] >= -1e-9 * eigenvalues.abs().amax(-1)).all():
        raise ValueError(
            f"the matrix is not positive semidefinite: its smallest eigenvalues are "
            f"{eigenvalues[..., 0].tolist()}."
        )
    decreasing: Tensor = eigenvalues.clamp_min(0).flip(-1)
    return decreasing


def paired_sums(a: Tensor, b: Tensor, size: int) -> Interval[Tensor]:
    """Σ_k a_k b_{size−k+1} and Σ_k a_k b_k for decreasing a and b, cut or filled up with zeros."""
    a, b = (torch.nn.functional.pad(values, (0, size - values.shape[-1])) for values in (a, b))
    return Interval((a * b.flip(-1)).sum(-1), (a * b).sum(-1))


def moment_eigenvalues(family: Family, h: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of 𝓘, [B, T], and of M̃ (all but some zeros), [B, n]; decreasing."""
    h = family.natural(h)
    cov, M = (torch.linalg.eigvalsh(A) for A in (family.covariance(h), family.unfolding(h)))
    return cov.clamp_min(0).flip(-1), M.clamp_min(0).flip(-1)


def squared_singular_values(derivs: Derivatives, family: Family) -> tuple[Tensor, Tensor, Tensor]:
    """Those of ∂h, [B, T], J̃, [B, T(T + 1)/2], and ∂²h, [B, T]; decreasing."""
    size, num_outputs = family.natural(derivs.outputs).shape
    if size * num_outputs**4 > TRACE_NUMBERS:
        raise ValueError(
            f"outer products of {num_outputs} outputs at {size} inputs would take "
            f"{size * num_outputs**4 / 2**27:.1f} GiB; at most 1 GiB is allowed: pass fewer inputs "
            "at a time, or sum the bounds of theorem_4_1."
        )
    derivs = family.natural_derivatives(derivs)
    a, b, weight = symmetric_pairs(num_outputs, derivs.outputs.device)

    def outer(block: Block) -> Tensor:
        J = flat(block.J.double())
        return weight[:, None] * J[:, a] * J[:, b]

    grams = (
        gram(derivs, lambda block: flat(block.J.double()), degree=1),
        gram(derivs, outer, degree=2),
        gram(derivs, lambda block: flat(block.second.double()), degree=2),
    )
    first, middle, last = (torch.linalg.eigvalsh(G).clamp_min(0).flip(-1) for G in grams)
    return first, middle, last


def gram(derivs: Derivatives, columns: Callable[[Block], Tensor], degree: int) -> Tensor:
    """Σ_i c_i c_iᵀ over all parameters i, [B, m, m].

    ``columns`` maps a block to left factors of the columns c_i, [B, m, K], into which a parameter's
    right factor z enters with the power ``degree``.
    """
    total = derivs.outputs.new_zeros((), dtype=torch.float64)
    for block in derivs.blocks:
        left = columns(block)
        weight = left.new_zeros(len(left))
        for z in block.inputs.values():
            weight += 1 if z is None else z.double().pow(2 * degree).sum(1)
        total = total + weight[:, None, None] * (left @ left.mT)
    return total
