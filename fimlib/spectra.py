r"""Extreme eigenvalues of 𝓘, of M = 𝓚 − 𝓘⊗𝓘 and of 𝓚 (Eq. 13, Appendix E.I).

For the 4-tensor, ``λ_max(M) = max over ‖u‖ = 1 of M(u,u,u,u)``, the largest variance of (u·δ)². It
has many local maxima, and the value at one of them makes the "upper bound" of Theorem 4.1 false.
Four ways:

* ``multistart`` (the default): a deterministic monotone ascent from starts that cover the maxima;
* ``certified``: the top eigenvalue of M unfolded to a matrix, an upper bound by linear algebra;
* ``minimize``: pytorch-minimize from random starts, as the paper did;
* ``sos``: a semidefinite program, an upper bound that is exact in nearly every case; small T.

𝓚, unlike M, is symmetric in all its indices: its λ's are Z-eigenvalues, found by the shifted power
method (Corollary 4.2).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fimlib.families.base import Family


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
        method: How λ_max(M) is found: "multistart" (a search from many directions), "certified"
            (an upper bound, without a search), "minimize" (the paper's way, from random starts) or
            "sos" (an upper bound that is mostly exact, for few outputs). The four
            functions of these names say more.

    Raises:
        ValueError: h does not fit the family, or the method is unknown.
    """
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
    """λ_max(M) of Eq. 13 by one of four methods, [B]; see ``spectrum``."""
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

    Raises:
        ValueError: R T³ > 10⁹ for R directions, as for 158 classes: a step would be that many
            operations, for up to 200 steps (128 classes: a minute). Or h does not fit the family.

    Memory: B × R × T × T; for many classes use the certified bound.
    """
    h = family.natural(h)
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


def lambda_max_certified(family: Family, h: Tensor) -> Tensor:
    """An upper bound on λ_max(M), certain up to rounding (1e-16 of λ_max(𝓚)): [B].

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
        ValueError: num_starts < 1, or T > 64 (the tensor has T⁴ numbers).
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


def lambda_max_sos(family: Family, h: Tensor) -> Tensor:
    r"""The level-2 sum-of-squares bound on λ_max(M), by semidefinite programming: [B].

    ``max ⟨M, X⟩`` over positive semidefinite X on symmetric T×T arrays with trace 1 whose entries
    X_abcd do not depend on the order of the indices, as those of u⊗u⊗u⊗u do not. Families that do
    not see a common shift are restricted to u ⊥ 1. An upper bound, certain up to rounding, and
    tight to the solver's precision (about 1e-8 of the certified bound): exact for up to four
    classes, since nonnegative quartic forms in three variables are sums of squares (Hilbert), and
    in practice beyond.

    Raises:
        ValueError: T > 16 (the program has about T⁴/24 unknowns), or h does not fit the family.
        ImportError: cvxpy or its solver Clarabel is not installed.
    """
    h = family.natural(h)
    if h.shape[1] > SOS_MAX_OUTPUTS:
        raise ValueError(
            f"method='sos' takes at most {SOS_MAX_OUTPUTS} outputs, got {h.shape[1]}: use "
            "method='certified' for an upper bound."
        )
    basis = torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
    if family.shift_invariant:
        basis[:, 0] = 1
        basis = torch.linalg.qr(basis).Q[:, 1:]  # orthonormal, and orthogonal to 1
    M = torch.einsum("bijkl,ip,jq,kr,ls->bpqrs", family.outer_covariance(h), *[basis] * 4)
    a, b, weight = symmetric_pairs(M.shape[1])
    matrices = M[:, a, b][:, :, a, b].cpu() * torch.outer(weight, weight)
    bounds = [_solve_relaxation(matrix.numpy(), M.shape[1]) for matrix in matrices]
    return h.new_tensor(bounds).clamp_min(0)


def _solve_relaxation(M: np.ndarray, num_outputs: int) -> float:
    """A bound on ⟨M, X⟩ for all X of ``lambda_max_sos``, in the packing of symmetric pairs.

    ⟨E, X⟩ = 0 for every E without a supersymmetric part, so that ``⟨M, X⟩ ≤ λ_max(M + E)``. The
    program's dual is to find the best E; any E will do for a bound, so an inexact solver's too.
    """
    try:
        cvxpy = import_module("cvxpy")
        import_module("clarabel")
    except ImportError as error:
        raise ImportError(
            "method='sos' needs cvxpy and Clarabel: pip install cvxpy clarabel, or use "
            "method='multistart'."
        ) from error
    scale = np.linalg.eigvalsh(M)[-1]
    if scale <= 0:
        return 0.0
    a, b, weight = (v.numpy() for v in symmetric_pairs(num_outputs))
    indices = np.sort(
        np.stack(np.broadcast_arrays(a[:, None], b[:, None], a[None], b[None]), -1), axis=-1
    )
    _, entry = np.unique(indices.reshape(-1, 4), axis=0, return_inverse=True)
    weights, shape = np.outer(weight, weight), M.shape
    moments = cvxpy.Variable(int(entry.max()) + 1)
    X = cvxpy.multiply(weights, cvxpy.reshape(moments[entry], shape, order="C"))
    constraints = [X >> 0, cvxpy.trace(X) == 1]
    objective = cvxpy.Maximize(cvxpy.sum(cvxpy.multiply(M / scale, X)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an inexact solution still gives a bound
        cvxpy.Problem(objective, constraints).solve(solver=cvxpy.CLARABEL, **SOS_PRECISION)
    slack = constraints[1].dual_value * np.eye(len(M)) - constraints[0].dual_value
    E = slack - M / scale
    sums = np.bincount(entry, (E * weights).ravel()) / np.bincount(entry, weights.ravel() ** 2)
    symmetric_part = weights * sums[entry].reshape(shape)
    return float(scale * np.linalg.eigvalsh(M / scale + E - symmetric_part)[-1])


def symmetric_pairs(
    num_outputs: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices a ≤ b and weights of an orthonormal basis of the symmetric T×T arrays.

    The array with entries A_ab has the coordinates w_ab A_ab, w = 1 on the diagonal and √2 off it:
    T(T + 1)/2 numbers with the inner products of the T² entries.
    """
    a, b = torch.triu_indices(num_outputs, num_outputs, device=device)
    return a, b, torch.where(a == b, 1, 2).double().sqrt()


METHODS = {
    "multistart": lambda_max_multistart,
    "certified": lambda_max_certified,
    "minimize": lambda_max_minimize,
    "sos": lambda_max_sos,
}
MULTISTART_MAX_OPERATIONS = 1e9
MINIMIZE_MAX_OUTPUTS = 64
SOS_MAX_OUTPUTS = 16
SOS_PRECISION = {"tol_gap_abs": 1e-9, "tol_gap_rel": 1e-9, "tol_feas": 1e-9}


def lambda_max_lower(family: Family, h: Tensor) -> Tensor:
    """A lower bound on λ_max(M), certain up to rounding: [B].

    The largest M(u,u,u,u) among the unit directions that the family proposes; for a classifier at
    least ``(C/(C−1))² max_k σ_k(1−σ_k)(1−2σ_k)²``, which the centred e_k give. O(T) per direction.
    """
    h = family.natural(h)
    u = torch.nn.functional.normalize(family.directions(h), dim=-1)
    return family.variance1(h, u.mT).amax(1)


def lambda_max_pairs(family: Family, h: Tensor, *, method: str = "multistart") -> Tensor:
    r"""Sup of Var((u·δ)(v·δ)) = M_abcd u^a v^b u^c v^d over unit u and v (Eq. 27): [B].

    It is λ_max(M), so nothing is lost by searching at u = v only. For unit vectors at an angle θ
    put p, q for the unit vectors along u + v, u − v and c = cos θ. Then
    ``(u·δ)(v·δ) = (1+c)/2 (p·δ)² − (1−c)/2 (q·δ)²``, and by the triangle inequality its standard
    deviation is at most the average, with these weights, of those of (p·δ)² and (q·δ)².

    Args, Raises: as ``lambda_max``.
    """
    return lambda_max(family, h, method=method)


def lambda_min_centred(family: Family, h: Tensor) -> Tensor:
    """λ_min(𝓘) over unit u ⊥ 1, for families that do not see a common shift: [B].

    On 1^⊥ the inverse of 𝓘 = diag σ − σσᵀ is P diag(1/σ) P. Its top eigenvalue keeps the digits
    that the second smallest eigenvalue of 𝓘 loses to rounding.

    Raises:
        ValueError: the family sees a common shift, or h does not fit it.
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


# Z-eigenvalues of tensors that are symmetric in all four indices.


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

    return _shifted_power(at, u, largest=largest, max_steps=max_steps)


def _shifted_power(
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
    u = _unit(u)
    matrix = sign * at(u)
    image, value = _apply(matrix, u)
    boost = torch.zeros_like(value)
    for _ in range(max_steps):
        if convex:
            size, shift = value.abs(), boost
        else:
            curvature = 12 * torch.linalg.eigvalsh(matrix)
            size = curvature.abs().amax(-1)
            shift = ((1e-6 * size - curvature[..., 0]) / 4).clamp_min(0) + boost
        w = _unit(image + shift[..., None] * u)
        new_matrix = sign * at(w)
        new_image, new_value = _apply(new_matrix, w)
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


def _unit(v: Tensor) -> Tensor:
    """V scaled to length one along its last axis, however small or large it is; zero stays zero."""
    tiny = torch.finfo(v.dtype).tiny
    v = v / v.abs().amax(-1, keepdim=True).clamp_min(tiny)
    norm: Tensor = v.norm(dim=-1, keepdim=True)
    return v / norm.clamp_min(tiny)


def _apply(matrix: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
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
        value, u = _shifted_power(at, starts, largest=largest, max_steps=50, convex=largest)
        best = value.topk(min(5, value.shape[1]), largest=largest).indices
        u = torch.take_along_dim(u, best[..., None], dim=1)
        value = _shifted_power(at, u, largest=largest, max_steps=1000, convex=largest)[0]
        return value.amax(1) if largest else value.amin(1)

    smallest = torch.zeros_like(h[:, 0]) if family.shift_invariant else extreme(largest=False)
    return smallest.clamp_min(0), extreme(largest=True)
