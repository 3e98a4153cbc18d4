r"""A bound on λ_max(M) by sums of squares, and coordinates of symmetric arrays."""

from __future__ import annotations

import warnings
from importlib import import_module

import numpy as np
import torch
from torch import Tensor

from fimlib.families.base import Family

MAX_OUTPUTS = 16
PRECISION = {"tol_gap_abs": 1e-9, "tol_gap_rel": 1e-9, "tol_feas": 1e-9}


def sum_of_squares(family: Family, h: Tensor) -> Tensor:
    r"""The level-2 sum-of-squares bound on λ_max(M), by semidefinite programming: [B].

    ``max ⟨M, X⟩`` over positive semidefinite X on symmetric T×T arrays with trace 1 whose entries
    X_abcd do not depend on the order of the indices, as those of u⊗u⊗u⊗u do not. Families that do
    not see a common shift are restricted to u ⊥ 1. An upper bound, certain up to rounding, and
    tight to the solver's precision (about 1e-8 of the certified bound): exact for up to four
    classes, since nonnegative quartic forms in three variables are sums of squares (Hilbert), and
    in practice beyond.
    """
    if h.shape[1] > MAX_OUTPUTS:
        raise ValueError(
            f"method='sos' takes at most {MAX_OUTPUTS} outputs, got {h.shape[1]}: use "
            "method='certified' for an upper bound."
        )
    basis = torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
    if family.shift_invariant:
        basis[:, 0] = 1
        basis = torch.linalg.qr(basis).Q[:, 1:]  # orthonormal, and orthogonal to 1
    M = torch.einsum("bijkl,ip,jq,kr,ls->bpqrs", family.outer_covariance(h), *[basis] * 4)
    a, b, weight = symmetric_pairs(M.shape[1])
    matrices = M[:, a, b][:, :, a, b].cpu() * torch.outer(weight, weight)
    bounds = [solve_relaxation(matrix.numpy(), M.shape[1]) for matrix in matrices]
    return h.new_tensor(bounds).clamp_min(0)


def solve_relaxation(M: np.ndarray, num_outputs: int) -> float:
    """A bound on ⟨M, X⟩ for all X of ``sum_of_squares``, in the packing of symmetric pairs.

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
        cvxpy.Problem(objective, constraints).solve(solver=cvxpy.CLARABEL, **PRECISION)
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
