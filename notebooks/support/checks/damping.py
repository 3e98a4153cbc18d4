"""Section 9.8, a noisy diagonal in a denominator: how long a damped step is on average.

D ≥ 0 is a random diagonal entry with mean I and variance V, and λ > 0 the damping.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fimlib
from fimlib import Categorical
from support.checks import cases as make
from support.checks.check import Check, at_most, equal, together

FAMILY = Categorical()
DAMPINGS = (1e-3, 0.1, 1.0, 100.0)  # λ in units of the mean of I


def damped_steps(cases: int) -> Check:
    """0 ≤ E 1/(D+λ) − 1/(I+λ) ≤ V/(λ(I+λ)²), and E 1/(D+√V+λ) ≤ 1/(I+λ), of any D ≥ 0."""
    parts = []
    for values in (2, 3, 10):
        rows = -(-cases // (3 * len(DAMPINGS)))
        p = torch.softmax(4 * make.normal(rows, values, seed=values), 1).T
        D = torch.exp(3 * make.normal(rows, values, seed=values + 1)).T
        D = D * (make.normal(rows, values, seed=values + 2) > 0).T  # some values are 0
        I = (p * D).sum(0)
        V = (p * (D - I).square()).sum(0)
        parts += [held(p, D, I, V, damping * I.mean()) for damping in DAMPINGS]
    return together(*parts)


def damped_steps_of_labels(_cases: int) -> Check:
    """The same for Î₁ of a trained classifier, with I and V₁ of fimlib and a sum over labels."""
    derivs, parts = make.trained_derivatives(inputs=10), []
    I, V1 = fimlib.fisher_information(derivs, FAMILY), fimlib.variance_i1(derivs, FAMILY)
    p = FAMILY.mean(derivs.outputs)
    of_label = [
        fimlib.estimate_i1(derivs, FAMILY.observed(derivs.outputs, torch.full((len(p),), k)))
        for k in range(p.shape[1])
    ]
    for name in I:
        D = torch.stack([squares[name].flatten(1) for squares in of_label])
        exact, variance = I[name].flatten(1), V1[name].flatten(1)
        for damping in DAMPINGS:
            parts.append(held(p.T[:, :, None], D, exact, variance, damping * exact.mean()))
    return together(*parts)


def damped_step_exactly(_cases: int) -> Check:
    """E 1/(D+λ) = 1/(I+λ) + E[(D−I)²/(D+λ)] / (I+λ)²."""
    p = torch.softmax(make.normal(10, 1000, seed=0), 0)
    D = make.normal(10, 1000, seed=1).square()
    I = (p * D).sum(0)
    parts = []
    for damping in DAMPINGS:
        excess = (p * (D - I).square() / (D + damping)).sum(0) / (I + damping).square()
        parts.append(equal((p / (D + damping)).sum(0), 1 / (I + damping) + excess))
    return together(*parts)


def held(p: Tensor, D: Tensor, I: Tensor, V: Tensor, damping: Tensor) -> Check:
    """Proposition 9.10 for values D with probabilities p, [values, …] each."""
    exact, mean = 1 / (I + damping), (p / (D + damping)).sum(0)
    with_error = (p / (D + V.sqrt() + damping)).sum(0)
    bound = exact + V * exact.square() / damping
    return together(
        at_most(exact, mean, exact), at_most(mean, bound, bound), at_most(with_error, exact, exact)
    )
