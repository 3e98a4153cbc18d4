"""Section 4, Sections 5.1 and 5.2, Appendices B and C: every bound, on cases that try to break it.

Each function takes the least number of cases and returns a ``Check``. A case is a softmax (or other
output) vector together with a derivative vector, or a whole derivative matrix.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fimlib
from fimlib import Bernoulli, Categorical, Derivatives, Diagonal, Family, Gaussian, Spectrum
from support.checks import cases as make
from support.checks.check import ABSOLUTE, Check, at_most, equal, together

CATEGORICAL = Categorical()
NUM_SAMPLES = 3  # so that a forgotten 1/N shows
ACTIVATIONS = (nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus)


# Theorem 4.1. Random and adversarial pairs, and every parameter of trained networks.


def theorem_4_1(which: int, cases: int, *, centred: bool = False) -> tuple[Check, Check]:
    """Lower and upper bound of Theorem 4.1: which = 0 for I, 1 for V₁, 2 for V₂.

    The lower bounds of a softmax are 0 unless they are centred. So theirs are tried on other
    families then; the upper ones on the softmax, also in trained networks, and on the others.
    """
    softmax = [(CATEGORICAL, group.derivs, group.eigenvalues) for group in make.grid(cases)]
    softmax += [(CATEGORICAL, *trained(activation, inputs(cases))) for activation in ACTIVATIONS]
    others = [(f, group.derivs, group.eigenvalues) for f, group in make.other_groups(cases)]
    groups: list[tuple[Family, Derivatives, Spectrum]] = [*softmax, *([] if centred else others)]
    sides = [one_theorem_4_1(which, f, d, lam, centred) for f, d, lam in groups]
    lowers = sides if centred else sides[len(softmax) :]
    return together(*(low for low, _ in lowers)), together(*(high for _, high in sides))


def inputs(cases: int) -> int:
    """At how many inputs a trained network is looked at."""
    return 20 if cases >= make.MANY else 5


@functools.cache
def trained(activation: make.Activation, count: int) -> tuple[Derivatives, Spectrum]:
    """Derivatives of a trained network at some inputs, and the eigenvalues at its outputs."""
    derivs = make.trained_derivatives(activation, count)
    return derivs, fimlib.spectrum(CATEGORICAL, derivs.outputs)


def quantity(which: int, derivs: Derivatives, family: Family) -> Diagonal:
    """I, V₁ or V₂."""
    if which == 0:
        return fimlib.fisher_information(derivs, family)
    variance = (fimlib.variance_i1, fimlib.variance_i2)[which - 1]
    return variance(derivs, family, num_samples=NUM_SAMPLES)


def one_theorem_4_1(
    which: int, family: Family, derivs: Derivatives, eigenvalues: Spectrum, centred: bool
) -> tuple[Check, Check]:
    """Both bounds at all parameters of one set of derivatives."""
    value = quantity(which, derivs, family)
    bounds = fimlib.theorem_4_1(
        derivs, family, num_samples=NUM_SAMPLES, eigenvalues=eigenvalues, centred=centred
    )
    lower, upper = bounds[which]
    scales = {}
    for name in value:
        D = derivs.second(name) if which == 2 else derivs.jacobian(name)
        # The digits of J itself, against a common shift; and for V₁ the squares that cancel.
        digits = ABSOLUTE * D.double().square().sum(1)
        scales[name] = bounds.fisher.upper[name].square() if which == 1 else digits
    return (
        together(*(at_most(lower[name], value[name], scale) for name, scale in scales.items())),
        together(*(at_most(value[name], upper[name], scale) for name, scale in scales.items())),
    )


def eq_10_lower(cases: int) -> Check:
    """λ_min(𝓘)‖J‖² ≤ I, for families where λ_min is not 0."""
    return theorem_4_1(0, cases)[0]


def eq_10_upper(cases: int) -> Check:
    """I ≤ λ_max(𝓘)‖J‖²."""
    return theorem_4_1(0, cases)[1]


def eq_11_lower(cases: int) -> Check:
    """λ_min(M)‖J‖⁴/N ≤ V₁, for families where λ_min is not 0."""
    return theorem_4_1(1, cases)[0]


def eq_11_upper(cases: int) -> Check:
    """V₁ ≤ λ_max(M)‖J‖⁴/N."""
    return theorem_4_1(1, cases)[1]


def eq_12_lower(cases: int) -> Check:
    """λ_min(𝓘)‖S‖²/N ≤ V₂, for families where λ_min is not 0."""
    return theorem_4_1(2, cases)[0]


def eq_12_upper(cases: int) -> Check:
    """V₂ ≤ λ_max(𝓘)‖S‖²/N."""
    return theorem_4_1(2, cases)[1]


def centred_lower(cases: int) -> Check:
    """The lower bounds of I and V₂ after centring, with λ_min over directions ⊥ 1."""
    return together(*(theorem_4_1(which, cases, centred=True)[0] for which in (0, 2)))


def centred_upper(cases: int) -> Check:
    """The three upper bounds with PJ and PS for J and S."""
    return together(*(theorem_4_1(which, cases, centred=True)[1] for which in (0, 1, 2)))


def eq_13(cases: int) -> Check:
    """λ_max(M) between the certified bounds, and above M(u,u,u,u) for every direction u."""
    parts = []
    for group in make.grid(cases):
        _, M, I = directions(CATEGORICAL, group)
        largest, size = group.eigenvalues.max_outer, group.eigenvalues.max_cov.square()
        parts += [
            at_most(M, largest[:, None].expand_as(M), M + I.square() + size[:, None]),
            at_most(fimlib.lambda_max(CATEGORICAL, group.h, method="lower"), largest, size),
            at_most(largest, fimlib.lambda_max(CATEGORICAL, group.h, method="certified"), size),
        ]
    return together(*parts)


# Corollary 4.2 and Proposition 4.3, over pairs of outputs and a direction.


def directions(family: Family, group: make.Group) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs h, and M(u,u,u,u) and 𝓘(u,u) at many unit directions u, [B, n]."""
    u = make.unit(group.derivs.blocks[0].J)
    return group.h, family.variance1(group.h, u), family.information(group.h, u)


def every_group(cases: int) -> list[tuple[Family, make.Group]]:
    """The softmax's groups, and those of other families."""
    return [(CATEGORICAL, group) for group in make.grid(cases)] + list(make.other_groups(cases))


def eq_14(cases: int) -> Check:
    """λ_min(𝓚) − λ_max(𝓘)² ≤ M(u,u,u,u) for every u; for a softmax it is negative."""
    parts = []
    for family, group in make.other_groups(cases):
        h, M, I = directions(family, group)
        lower = fimlib.corollary_4_2(family, h).lower[:, None].expand_as(M)
        parts.append(at_most(lower, M, M + I.square()))
    return together(*parts)


def eq_15(cases: int) -> Check:
    """M(u,u,u,u) ≤ λ_max(𝓚) − λ_min(𝓘)² for every u, and so λ_max(M)."""
    parts = []
    for family, group in every_group(cases):
        h, M, I = directions(family, group)
        upper = fimlib.corollary_4_2(family, h).upper
        parts.append(at_most(M, upper[:, None].expand_as(M), M + I.square()))
        size = group.eigenvalues.max_cov.square()
        parts.append(at_most(group.eigenvalues.max_outer, upper, size))
    return together(*parts)


def eq_16(cases: int) -> Check:
    """𝓚(u,u,u,u) ≤ B λ_max(𝓘), B = max ‖t(y) − η‖²; softmax and multi-label outputs."""
    parts = []
    for family, group in every_group(cases):
        if isinstance(family, Categorical | Bernoulli):
            h, M, I = directions(family, group)
            bound = fimlib.proposition_4_3(family, h)[:, None].expand_as(M)
            parts.append(at_most(M + I.square(), bound, 0.0))
    return together(*parts)


# Corollary 4.6 and Appendix C, over whole derivative matrices.


class Matrices(NamedTuple):
    """Derivative matrices ∂h, ∂²h of few parameters, [B, C, n], and the outputs' eigenvalues."""

    derivs: Derivatives
    eigenvalues: Spectrum


@functools.cache
def matrices(cases: int) -> tuple[Matrices, ...]:
    """At least so many derivative matrices: of full rank, of rank one, of a single output."""
    groups, sizes = [], ((2, 1), (2, 6), (3, 2), (3, 12), (4, 5), (5, 1), (5, 9))
    for num_classes, num_parameters in sizes:
        repeats = -(-cases // (60 * len(sizes)))
        h = make.logits(num_classes, 60, seed=num_parameters)
        lam = fimlib.spectrum(CATEGORICAL, h)
        J, S = (make.normal(60 * repeats, num_classes, num_parameters, seed=s) for s in (1, 2))
        third = len(J) // 3
        for D in (J, S):
            D[:third] = D[:third, :, :1] * D[:third, :1]
        J[third : 2 * third] *= torch.arange(num_classes)[:, None] == 0
        derivs = make.as_derivatives(h.repeat(repeats, 1), J, S)
        groups.append(Matrices(derivs, Spectrum(*(e.repeat(repeats) for e in lam))))
    return (*groups, Matrices(*trained(nn.Sigmoid, inputs(cases))))


def total(which: int, derivs: Derivatives) -> Tensor:
    """Σ_i I, Σ_i V₁ or Σ_i V₂, [B]."""
    return quantity(which, derivs, CATEGORICAL).total()


def size(which: int, derivs: Derivatives) -> Tensor:
    """What cancels on the way to the totals: in ΣV₁ the squares, of size Σ I² + V₁."""
    if which != 1:
        return torch.zeros(len(derivs.outputs), dtype=torch.float64)
    return quantity(0, derivs, CATEGORICAL).square().total() + total(1, derivs)


def corollary_4_6(which: int, cases: int) -> Check:
    """The trace bounds: which = 0, 1, 2 for Eqs 17, 18, 19."""
    parts = []
    for derivs, lam in matrices(cases):
        bound = fimlib.corollary_4_6(derivs, CATEGORICAL, num_samples=NUM_SAMPLES, eigenvalues=lam)[
            which
        ]
        parts.append(at_most(total(which, derivs), bound.upper, 10 * size(which, derivs)))
    return together(*parts)


def eq_17(cases: int) -> Check:
    """Σ I ≤ min{s_max(∂h)² tr 𝓘, ‖∂h‖² λ_max(𝓘)}."""
    return corollary_4_6(0, cases)


def eq_18(cases: int) -> Check:
    """Σ V₁ ≤ (1/N) min{s_max(J̃)² tr M̃, λ_max(M) Σ‖J‖⁴}."""
    return corollary_4_6(1, cases)


def eq_19(cases: int) -> Check:
    """Σ V₂ ≤ (1/N) min{s_max(∂²h)² tr 𝓘, ‖∂²h‖² λ_max(𝓘)}."""
    return corollary_4_6(2, cases)


def theorem_c_1(which: int, cases: int) -> Check:
    """The full-spectrum bounds, both sides: which = 0, 1, 2 for Eqs 29, 30, 31."""
    parts = []
    for derivs, _ in matrices(cases):
        lower, upper = fimlib.trace_bounds.theorem_c_1(
            derivs, CATEGORICAL, num_samples=NUM_SAMPLES
        )[which]
        exact, rounding = total(which, derivs), 10 * size(which, derivs)
        parts += [at_most(lower, exact, rounding), at_most(exact, upper, rounding)]
    return together(*parts)


def eq_29(cases: int) -> Check:
    """Σ s_k(∂h)² s_{T−k+1}(𝓘) ≤ Σ I ≤ Σ s_k(∂h)² s_k(𝓘)."""
    return theorem_c_1(0, cases)


def eq_30(cases: int) -> Check:
    """The same for V₁ with J̃ and M̃."""
    return theorem_c_1(1, cases)


def eq_31(cases: int) -> Check:
    """The same for V₂ with ∂²h."""
    return theorem_c_1(2, cases)


def full_spectrum_is_tighter(cases: int) -> Check:
    """Appendix C's upper bounds of Σ I and Σ V₂ are never above Corollary 4.6's."""
    parts = []
    for derivs, lam in matrices(cases):
        coarse = fimlib.corollary_4_6(derivs, CATEGORICAL, eigenvalues=lam)
        fine = fimlib.trace_bounds.theorem_c_1(derivs, CATEGORICAL)
        for which in (0, 2):
            parts.append(at_most(fine[which][1], coarse[which].upper, 0.0))
    return together(*parts)


def theorem_c_2(cases: int) -> Check:
    """Ruhe's trace inequality on random positive semi-definite pairs, also of low rank."""
    parts = []
    for size, rank in ((1, 1), (2, 1), (3, 3), (6, 2), (10, 10)):
        factors = (make.normal(-(-cases // 5), size, rank, seed=seed) for seed in (3, 4))
        A, B = (factor @ factor.mT for factor in factors)
        lower, upper = fimlib.trace_bounds.theorem_c_2(A, B)
        trace = torch.einsum("bij,bji->b", A, B)
        parts += [at_most(lower, trace, upper), at_most(trace, upper, upper)]
    return together(*parts)


# Appendix B. Pairs of parameters.


@functools.cache
def off_diagonal(cases: int) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], ...]:
    """Softmax outputs with J_i, J_j and S_ij: random, equal, opposite and single-class pairs."""
    groups = []
    for num_classes in (2, 3, 4, 6):
        h = make.logits(num_classes, 25, seed=num_classes)
        count = -(-cases // 100)
        J_i = make.vectors(h, count, seed=1)
        J_j = torch.where(torch.arange(count) % 3 == 0, -J_i, make.vectors(h, count, seed=2))
        groups.append((h, J_i, J_j, make.vectors(h, count, seed=3)))
    return tuple(groups)


def appendix_b(which: int, cases: int) -> Check:
    """The off-diagonal bounds: which = 0 for |I_ij|, 1 for V₁, 2 for V₂."""
    parts = []
    for h, J_i, J_j, S_ij in off_diagonal(cases):
        arguments = (J_i, J_j, S_ij, CATEGORICAL, h)
        value = fimlib.bounds.off_diagonal(*arguments, num_samples=NUM_SAMPLES)[which].abs()
        bound = fimlib.bounds.theorem_b_1(*arguments, num_samples=NUM_SAMPLES)[which]
        scale = fimlib.bounds.corollary_b_3(J_i, J_j, CATEGORICAL, h).square()
        parts.append(at_most(value, bound, (0.0, scale, 0.0)[which]))
    return together(*parts)


def eq_26(cases: int) -> Check:
    """|I_ij| ≤ ‖J_i‖‖J_j‖ sup uᵀ𝓘v."""
    return appendix_b(0, cases)


def eq_27(cases: int) -> Check:
    """V₁(θ_ij) ≤ (1/N)‖J_i‖²‖J_j‖² sup Var((u·δ)(v·δ))."""
    return appendix_b(1, cases)


def off_diagonal_v2(cases: int) -> Check:
    """V₂(θ_ij) ≤ (1/N)‖∂²_ij h‖² λ_max(𝓘)."""
    return appendix_b(2, cases)


def lemma_b_2(cases: int) -> Check:
    """uᵀAv ≤ s_max(A) for every pair of unit vectors, attained by the singular vectors."""
    parts = []
    for size in (1, 2, 5, 10):
        A = make.normal(20, size, size, seed=size)
        bound = fimlib.bounds.lemma_b_2(A)
        left, _, right = torch.linalg.svd(A)
        u = torch.cat([left, make.unit(make.normal(20, size, cases // 80, seed=1))], 2)
        v = torch.cat([right.mT, make.unit(make.normal(20, size, cases // 80, seed=2))], 2)
        value = torch.einsum("bin,bij,bjn->bn", u, A, v).abs()
        parts.append(at_most(value, bound[:, None].expand_as(value), 0.0))
    return together(*parts)


def eq_28(cases: int) -> Check:
    """|I_ij| ≤ s_max(𝓘)‖J_i‖‖J_j‖."""
    parts = []
    for h, J_i, J_j, S_ij in off_diagonal(cases):
        value = fimlib.bounds.off_diagonal(J_i, J_j, S_ij, CATEGORICAL, h)[0].abs()
        parts.append(at_most(value, fimlib.bounds.corollary_b_3(J_i, J_j, CATEGORICAL, h), 0.0))
    return together(*parts)


# Section 5. The two case studies.


def proposition_5_1(cases: int) -> Check:
    """Gaussian outputs: the bounds of Theorem 4.1 are equalities, and λ(𝓘) = 1, λ(M) = 2."""
    parts, family = [], Gaussian()
    for num_outputs in (1, 2, 5, 10):
        h = make.normal(10, num_outputs, seed=num_outputs)
        J, S = (make.normal(10, num_outputs, cases // 40, seed=s) for s in (5, 6))
        derivs = make.as_derivatives(h, J, S)
        bounds = fimlib.theorem_4_1(derivs, family, num_samples=NUM_SAMPLES)
        for which, interval in enumerate(bounds):
            value = quantity(which, derivs, family)["theta"]
            parts += [equal(side["theta"], value) for side in interval]
        lam = fimlib.spectrum(family, h)
        ones = torch.ones(10, dtype=torch.float64)
        parts += [equal(e, ones * k) for e, k in zip(lam, (1, 1, 2, 2), strict=True)]
    return together(*parts)


def softmax_vectors(cases: int, largest: int = 100) -> list[Tensor]:
    """At least so many logit vectors, up to a number of classes; fewer of the large ones."""
    sizes = [c for c in make.CLASSES if c <= largest]
    weights = [1 / c for c in sizes]
    return [
        make.logits(c, 5 + int(cases * w / sum(weights)), seed=c)
        for c, w in zip(sizes, weights, strict=True)
    ]


def theorem_5_2_covariance(cases: int) -> Check:
    """λ_max(𝓘) ≤ min{σ_max, 1 − ‖σ‖²} (Table 1)."""
    parts = []
    for h in softmax_vectors(cases):
        largest = torch.linalg.eigvalsh(CATEGORICAL.covariance(h))[:, -1]
        parts.append(at_most(largest, fimlib.theorem_5_2(CATEGORICAL.mean(h)).max_cov, 0.0))
    return together(*parts)


def theorem_5_2_outer(cases: int) -> Check:
    """λ_max(M) ≤ 2 min{σ_max, 1 − ‖σ‖²} (Table 1), even for its certified upper bound."""
    parts = []
    for h in softmax_vectors(cases):
        certified = fimlib.lambda_max(CATEGORICAL, h, method="certified")
        parts.append(at_most(certified, fimlib.theorem_5_2(CATEGORICAL.mean(h)).max_outer, 0.0))
    return together(*parts)


def eq_36(cases: int) -> Check:
    """λ_max(𝓚) ≤ 2λ_max(𝓘), even for the top eigenvalue of 𝓚 unfolded to a matrix."""
    parts = []
    for h in softmax_vectors(cases):
        sigma = CATEGORICAL.mean(h)
        eye = torch.eye(h.shape[1], dtype=torch.float64)
        delta = eye - sigma[:, None]
        gram = (delta @ delta.mT).square() * (sigma[:, :, None] * sigma[:, None]).sqrt()
        parts.append(
            at_most(torch.linalg.eigvalsh(gram)[:, -1], fimlib.bounds.corollary_q_1(sigma), 0.0)
        )
    return together(*parts)


def fourth_moment_below_certified(cases: int) -> Check:
    """The Z-eigenvalue λ_max(𝓚) that the shifted power method finds obeys Eqs 16 and 36."""
    parts = []
    for h in softmax_vectors(cases // 20, largest=10):
        largest = fimlib.spectra.fourth_moment_spectrum(CATEGORICAL, h)[1]
        parts.append(at_most(largest, fimlib.proposition_4_3(CATEGORICAL, h), 0.0))
        parts.append(at_most(largest, fimlib.bounds.corollary_q_1(CATEGORICAL.mean(h)), 0.0))
    return together(*parts)
