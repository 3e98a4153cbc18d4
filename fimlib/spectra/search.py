r"""Searches for λ_max(M): from starts that cover the maxima, or from random ones (the paper's)."""

from __future__ import annotations

import torch
from torch import Tensor

from fimlib.families.base import Family

MULTISTART_MAX_OPERATIONS = 1e9
MINIMIZE_MAX_OUTPUTS = 64


def multistart(family: Family, h: Tensor, *, max_steps: int = 200) -> Tensor:
    r"""λ_max(M) by a monotone ascent from every direction that the family proposes, [B].

    One step takes the top eigenvector w of the matrix M(u,u,·,·). M is a covariance, so by
    Cauchy–Schwarz ``M(u,u,w,w)² ≤ M(u,u,u,u) M(w,w,w,w)``, and with
    ``M(u,u,w,w) ≥ M(u,u,u,u)`` the value never falls. The best direction is polished by Newton
    steps. Deterministic, but not a proof of optimality.

    Memory: B × R × T × T; for many classes use the certified bound.
    """
    u = torch.nn.functional.normalize(family.directions(h), dim=-1)
    if u.shape[1] * h.shape[1] ** 3 > MULTISTART_MAX_OPERATIONS:
        raise ValueError(
            f"method='multistart' would take {u.shape[1]} starts for {h.shape[1]} outputs, hours "
            "of work: use method='certified', an upper bound at the cost of one eigenvalue "
            "problem, spectrum(family, derivs.outputs, method='certified')."
        )
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
    return polish(family, h, u[torch.arange(len(h), device=h.device), best][:, None])


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


def minimize(family: Family, h: Tensor, *, num_starts: int = 20, seed: int = 0) -> Tensor:
    """λ_max(M) the paper's way: pytorch-minimize on the dense tensor, best of random starts, [B].

    A single start often ends in a local maximum that is not the largest; the value is then too
    small for an upper bound.
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
    if h.shape[1] > MINIMIZE_MAX_OUTPUTS:
        raise ValueError(
            f"method='minimize' takes at most {MINIMIZE_MAX_OUTPUTS} outputs, got {h.shape[1]}: "
            "use method='certified' for an upper bound."
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    best = []
    for M in family.outer_covariance(h).cpu():
        starts = torch.randn(num_starts, len(M), generator=generator, dtype=M.dtype, device="cpu")
        scale = M.diagonal(dim1=0, dim2=1).diagonal().clamp_min(0).sum() or M.new_ones(())

        def objective(u: Tensor, M: Tensor = M / scale) -> Tensor:
            w = u / u.norm()
            value: Tensor = torch.einsum("ijkl,i,j,k,l->", M, w, w, w, w)
            return -value

        values = [-torchmin.minimize(objective, start, method="bfgs").fun for start in starts]
        best.append(float(scale * torch.stack(values).max()))
    return h.new_tensor(best).clamp_min(0)
