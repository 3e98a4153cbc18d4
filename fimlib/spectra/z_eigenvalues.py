r"""Z-eigenvalues of tensors that are symmetric in all four indices, as 𝓚 is (Corollary 4.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fimlib.families.base import Family


def shifted_power_method(
    A: Tensor, starts: Tensor, *, largest: bool = True, max_steps: int = 1000
) -> tuple[Tensor, Tensor]:
    r"""Z-eigenpairs of a supersymmetric tensor by the adaptive shifted power method.

    From x, the next iterate is ``±(A x³ + αx)`` scaled to length one (+ to climb, − to descend).
    The shift ``α = ±max(0, (τ − λ_min(±12 A x²))/4)`` makes ``±A x⁴`` with the shift convex at x
    (Kolda & Mayo 2014, with m = 4). That alone is a local argument, and a step may overshoot:
    then the shift is raised until the value no longer falls, so that the method is monotone.

    Args:
        A: [T, T, T, T], the same under every permutation of its indices.
        starts: [..., T], where the iterations begin; any length but zero.
        largest: Climb to a local maximum of A x⁴ on the unit sphere, or descend to a minimum.
        max_steps: Iterations at most; fewer where no start gains any more.

    Returns:
        The eigenvalue λ = A x⁴, [...], and the vector x, [..., T], that every start led to, with
        A x³ = λx in the limit. Which local extremum that is depends on the start.

    Raises:
        ValueError: A is not of shape [T, T, T, T] or not supersymmetric, or a start is zero or
            has another length.

    Example: ``A = 5 e₁⁴ + 2 e₂⁴`` has the eigenvectors e₁ and e₂.
        >>> A = torch.zeros(2, 2, 2, 2)
        >>> A[0, 0, 0, 0], A[1, 1, 1, 1] = 5, 2
        >>> [round(float(value), 9) for value in shifted_power_method(A, torch.eye(2))[0]]
        [5.0, 2.0]
    """
    A = A.detach().double()
    if A.ndim != 4 or len(set(A.shape)) != 1:
        raise ValueError(f"the tensor must have shape [T, T, T, T], got {list(A.shape)}.")
    tolerance = 1e-9 * A.abs().max()
    for order in ((1, 0, 2, 3), (1, 2, 3, 0)):  # these two generate all permutations
        if not (A - A.permute(order)).abs().max() <= tolerance:
            raise ValueError(
                "the tensor must be finite and supersymmetric (the same under every permutation "
                "of its indices), as 𝓚 is; M is not: use lambda_max for it."
            )
    u = starts.detach().to(A)
    if u.ndim < 1 or u.shape[-1] != len(A) or not (u.norm(dim=-1) > 0).all():
        raise ValueError(
            f"starts must have shape [..., {len(A)}] and no zero or NaN rows, got shape "
            f"{list(starts.shape)}."
        )

    def at(u: Tensor) -> Tensor:
        return torch.einsum("ijkl,...k,...l->...ij", A, u, u)

    return shifted_power(at, u, largest=largest, max_steps=max_steps)


def shifted_power(
    at: Callable[[Tensor], Tensor],
    u: Tensor,
    *,
    largest: bool,
    max_steps: int,
    convex: bool = False,
) -> tuple[Tensor, Tensor]:
    """``shifted_power_method`` for a tensor that is known by u ↦ A(u,u,·,·) alone.

    Where ±A u⁴ is convex as it stands, no shift is needed, nor the eigenvalues that it is made of.
    """
    sign = 1 if largest else -1
    u = unit(u)
    matrix = sign * at(u)
    image, value = apply(matrix, u)
    boost = torch.zeros_like(value)
    for _ in range(max_steps):
        if convex:
            size, shift = value.abs(), boost
        else:
            curvature = 12 * torch.linalg.eigvalsh(matrix)
            size = curvature.abs().amax(-1)
            shift = ((1e-6 * size - curvature[..., 0]) / 4).clamp_min(0) + boost
        w = unit(image + shift[..., None] * u)
        new_matrix = sign * at(w)
        new_image, new_value = apply(new_matrix, w)
        gain = new_value - value
        rises = (gain > 0) & w.any(-1)
        u = torch.where(rises[..., None], w, u)
        image = torch.where(rises[..., None], new_image, image)
        matrix = torch.where(rises[..., None, None], new_matrix, matrix)
        value = torch.where(rises, new_value, value)
        if (gain.abs() <= 1e-14 * size).all():
            break
        boost = torch.where(gain < -1e-14 * size, 2 * shift + size, 0.0)
    return sign * value, u


def unit(v: Tensor) -> Tensor:
    """V scaled to length one along its last axis, however small or large it is; zero stays zero."""
    tiny = torch.finfo(v.dtype).tiny
    v = v / v.abs().amax(-1, keepdim=True).clamp_min(tiny)
    norm: Tensor = v.norm(dim=-1, keepdim=True)
    return v / norm.clamp_min(tiny)


def apply(matrix: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """A u³ and A u⁴ from the matrix A(u,u,·,·)."""
    image = torch.einsum("...ij,...j->...i", matrix, u)
    return image, torch.einsum("...i,...i->...", image, u)


def fourth_moment_spectrum(family: Family, h: Tensor) -> tuple[Tensor, Tensor]:
    """λ_min(𝓚) and λ_max(𝓚), the extreme Z-eigenvalues of 𝓚 (Corollary 4.2): [B] each.

    By the shifted power method from the family's directions, the top and bottom eigenvectors of 𝓘
    and the all-ones vector; the best few after 50 steps go on. The best that these starts lead to,
    not a proof, and to about 1e-9 where 𝓚 is nearly flat. λ_min is exactly 0 for families that do
    not see a common shift.

    Memory: B × (number of starts) × T × T; no T⁴ tensor is built.
    """
    h = family.natural(h)
    cov = family.covariance(h)

    def at(u: Tensor) -> Tensor:  # 𝓚(u,u,·,·) = M(u,u,·,·) + (uᵀ𝓘u) 𝓘
        spread = torch.einsum("bri,bij,brj->br", u, cov, u)
        return family.outer_covariance_at(h, u) + spread[..., None, None] * cov[:, None]

    ends = torch.linalg.eigh(cov).eigenvectors[..., [0, -1]].mT
    starts = torch.cat([family.directions(h), ends, torch.ones_like(h)[:, None]], dim=1)

    def extreme(largest: bool) -> Tensor:  # 𝓚(u,u,u,u) = E(u·δ)⁴ is convex
        value, u = shifted_power(at, starts, largest=largest, max_steps=50, convex=largest)
        best = value.topk(min(5, value.shape[1]), largest=largest).indices
        u = torch.take_along_dim(u, best[..., None], dim=1)
        value = shifted_power(at, u, largest=largest, max_steps=1000, convex=largest)[0]
        return value.amax(1) if largest else value.amin(1)

    smallest = torch.zeros_like(h[:, 0]) if family.shift_invariant else extreme(largest=False)
    return smallest.clamp_min(0), extreme(largest=True)
