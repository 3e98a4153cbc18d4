r"""Extreme eigenvalues of 𝓘 and of M = 𝓚 − 𝓘⊗𝓘 (Eq. 13, Appendix E.I).

For the 4-tensor, ``λ_max(M) = max over ‖u‖ = 1 of M(u,u,u,u)``, the largest variance of (u·δ)². It
has many local maxima, and the value at one of them makes the "upper bound" of Theorem 4.1 false.
Three ways, from trustworthy in practice, over certain but loose, to the paper's own:

* ``multistart`` (the default): a deterministic monotone ascent from starts that cover the maxima;
* ``certified``: the top eigenvalue of M unfolded to a matrix, an upper bound by linear algebra;
* ``minimize``: pytorch-minimize from random starts, as the paper did.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fimlib.families import Family


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
        method: How λ_max(M) is found: "multistart", "certified" (an upper bound) or "minimize".

    Raises:
        ValueError: h does not fit the family, or the method is unknown.
    """
    h = family.natural(h)
    eigenvalues = torch.linalg.eigvalsh(family.covariance(h)).clamp_min(0)  # PSD up to rounding
    return Spectrum(
        eigenvalues[:, 0],
        eigenvalues[:, -1],
        family.outer_covariance_min(h),
        lambda_max(family, h, method=method),
    )


def lambda_max(family: Family, h: Tensor, *, method: str = "multistart") -> Tensor:
    """λ_max(M) of Eq. 13 by one of three methods, [B]; see ``spectrum``."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of: {', '.join(METHODS)}.")
    return METHODS[method](family, h)


def lambda_max_multistart(family: Family, h: Tensor, *, max_steps: int = 200) -> Tensor:
    r"""λ_max(M) by a monotone ascent from every direction that the family proposes, [B].

    One step takes the top eigenvector w of the matrix M(u,u,·,·). M is a covariance, so by
    Cauchy–Schwarz ``M(u,u,w,w)² ≤ M(u,u,u,u) M(w,w,w,w)``, and with
    ``M(u,u,w,w) ≥ M(u,u,u,u)`` the value never falls. The best direction is polished by Newton
    steps. Deterministic; not a proof of optimality: the gap to ``lambda_max_certified`` bounds
    what could have been missed.

    Memory: B × (number of directions) × T × T; for very many classes use the certified bound.
    """
    h = family.natural(h)
    u = torch.nn.functional.normalize(family.directions(h), dim=-1)
    value = torch.zeros_like(u[..., 0])
    for _ in range(max_steps):
        matrix = family.outer_covariance_at(h, u)
        new_value = torch.einsum("bri,brij,brj->br", u, matrix, u)
        converged = (new_value - value) <= 1e-12 * new_value.amax(1, keepdim=True)
        value = new_value
        if converged.all():
            break
        u = torch.linalg.eigh(matrix).eigenvectors[..., -1]
    best = value.argmax(1)
    return polish(family, h, u[torch.arange(len(h)), best][:, None])


def polish(family: Family, h: Tensor, u: Tensor, *, max_steps: int = 100) -> Tensor:
    """M(u,u,u,u) after Newton ascent on the unit sphere from u, [B, 1, T]: [B].

    Where the maximum is flat, as for nearly uniform probabilities, the eigenvector steps creep.
    A step is taken only where it rises.
    """
    covariance = family.covariance(h)[:, None]
    matrix = family.outer_covariance_at(h, u)
    value = torch.einsum("bri,brij,brj->br", u, matrix, u)
    eye = torch.eye(u.shape[2], dtype=u.dtype, device=u.device)
    for _ in range(max_steps):
        # ∇ = 4 M(u,u,·,·)u and ∇² = 4 M(u,u,·,·) + 8 M(u,·,u,·), 𝓚 being symmetric in all indices.
        gradient = 4 * torch.einsum("brij,brj->bri", matrix, u)
        image = torch.einsum("brij,brj->bri", covariance, u)
        scale = torch.einsum("bri,bri->br", u, image)[..., None, None]
        crossed = matrix + scale * covariance - torch.einsum("bri,brj->brij", image, image)
        tangent = eye - torch.einsum("bri,brj->brij", u, u)
        hessian = 4 * matrix + 8 * crossed - 4 * value[..., None, None] * eye
        curvature, axes = torch.linalg.eigh(tangent @ hessian @ tangent)
        slope = torch.einsum("brij,bri->brj", axes, gradient - 4 * value[..., None] * u)
        size = curvature.abs().clamp_min(1e-9 * curvature.abs().amax(-1, keepdim=True) + 1e-300)
        w = torch.nn.functional.normalize(
            u + torch.einsum("brij,brj->bri", axes, slope / size), dim=-1
        )
        new_matrix = family.outer_covariance_at(h, w)
        new_value = torch.einsum("bri,brij,brj->br", w, new_matrix, w)
        rises = new_value > value
        if not rises.any():
            break
        u = torch.where(rises[..., None], w, u)
        matrix = torch.where(rises[..., None, None], new_matrix, matrix)
        value = torch.where(rises, new_value, value)
    return value[:, 0].clamp_min(0)


def lambda_max_certified(family: Family, h: Tensor) -> Tensor:
    """An upper bound on λ_max(M), certain up to rounding: [B].

    The top eigenvalue of M as a matrix on T×T arrays; u⊗u is one of the unit arrays. For a
    classifier it costs O(C³), and it is never above Theorem 5.2's bound.
    """
    eigenvalues: Tensor = torch.linalg.eigvalsh(family.unfolding(family.natural(h)))
    return eigenvalues[:, -1].clamp_min(0)


def lambda_max_minimize(
    family: Family, h: Tensor, *, num_starts: int = 20, seed: int = 0
) -> Tensor:
    """λ_max(M) the paper's way: pytorch-minimize on the dense tensor, best of random starts, [B].

    A single start often ends in a local maximum that is not the largest; the value is then too
    small for an upper bound.

    Raises:
        ValueError: num_starts < 1.
        ImportError: pytorch-minimize is not installed.
    """
    try:
        import torchmin
    except ImportError as error:
        raise ImportError(
            "method='minimize' needs pytorch-minimize: pip install pytorch-minimize, or use "
            "method='multistart'."
        ) from error
    if num_starts < 1:
        raise ValueError(f"num_starts must be ≥ 1, got {num_starts}.")
    h = family.natural(h)
    generator = torch.Generator().manual_seed(seed)
    best = []
    for M in family.outer_covariance(h).cpu():
        starts = torch.randn(num_starts, len(M), generator=generator, dtype=M.dtype)
        scale = M.diagonal(dim1=0, dim2=1).diagonal().clamp_min(0).sum() or M.new_ones(())

        def objective(u: Tensor, M: Tensor = M / scale) -> Tensor:
            w = u / u.norm()
            value: Tensor = torch.einsum("ijkl,i,j,k,l->", M, w, w, w, w)
            return -value

        values = [-torchmin.minimize(objective, start, method="bfgs").fun for start in starts]
        best.append(float(scale * torch.stack(values).max()))
    return h.new_tensor(best).clamp_min(0)


METHODS = {
    "multistart": lambda_max_multistart,
    "certified": lambda_max_certified,
    "minimize": lambda_max_minimize,
}
