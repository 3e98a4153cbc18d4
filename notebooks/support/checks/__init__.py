"""Checks of every statement of the paper, shared by the tests, the notebooks and the book.

A check is a function of the least number of cases to try; it returns a ``Check``. The tests assert
that it holds, the notebook ``statements.ipynb`` runs it, and the book quotes what came out.
"""

from __future__ import annotations

from collections.abc import Callable

from support.checks import beyond, blocks, bounds, damping, exact, findings
from support.checks.check import Check

CheckFunction = Callable[[int], Check]

INEQUALITIES: tuple[CheckFunction, ...] = (
    bounds.eq_10_lower,
    bounds.eq_10_upper,
    bounds.eq_11_lower,
    bounds.eq_11_upper,
    bounds.eq_12_lower,
    bounds.eq_12_upper,
    bounds.centred_lower,
    bounds.centred_upper,
    bounds.eq_13,
    bounds.eq_14,
    bounds.eq_15,
    bounds.eq_16,
    bounds.fourth_moment_below_certified,
    bounds.eq_17,
    bounds.eq_18,
    bounds.eq_19,
    exact.chebyshev,
    exact.lemma_4_8_printed,
    exact.lemma_4_8_tight,
    bounds.theorem_5_2_covariance,
    bounds.theorem_5_2_outer,
    bounds.eq_36,
    exact.kl_bound,
    bounds.eq_26,
    bounds.eq_27,
    bounds.off_diagonal_v2,
    bounds.lemma_b_2,
    bounds.eq_28,
    bounds.eq_29,
    bounds.eq_30,
    bounds.eq_31,
    bounds.full_spectrum_is_tighter,
    bounds.theorem_c_2,
)
EQUALITIES: tuple[CheckFunction, ...] = (
    exact.eq_1,
    exact.eq_2,
    exact.eq_3,
    exact.eq_4,
    exact.eq_5,
    exact.eq_6,
    exact.eq_7,
    exact.eq_8,
    exact.eq_9,
    exact.eq_23,
    exact.eq_24,
    exact.eq_25,
    findings.variance_by_kurtosis,
    exact.eq_20,
    bounds.proposition_5_1,
    exact.eq_21,
    exact.data_fisher_of_the_model,
    exact.eq_22,
    exact.kl_gradient,
    exact.reparameterisation,
    exact.corollary_f_1,
    exact.eq_32,
)
SAMPLING: tuple[CheckFunction, ...] = (exact.eq_20_sampled,)
FINDINGS: tuple[CheckFunction, ...] = (
    findings.softmax_lower_bounds_are_zero,
    findings.centring_helps,
    findings.corollary_4_2_lower_is_negative,
    findings.eq_11_lower_is_not_negative,
    findings.eq_30_lower_is_zero,
    findings.eq_30_is_not_always_tighter,
    findings.mean_and_covariance_are_cumulants,
    findings.moments_are_not_cumulants,
    findings.relu_second_estimator_is_exact,
    findings.relu_keeps_the_equality,
    findings.relu_at_a_kink,
    findings.saturation_favours_the_first_estimator,
    findings.log_sigma_head_has_variance_in_its_last_layer,
    findings.trace_bounds_scale_alike,
    findings.off_diagonal_lower_bound_of_i,
    findings.off_diagonal_lower_bound,
    findings.one_search_is_not_enough,
    findings.single_precision_loses_the_spread,
    findings.separated_expectation_is_false,
    findings.observed_labels_bias,
)
BEYOND: tuple[CheckFunction, ...] = (  # what goes beyond the paper, of all kinds
    beyond.one_projection_of_a_batch,
    beyond.one_projection_of_every_input,
    beyond.signs_scatter_less_than_twice,
    beyond.important_labels,
    beyond.important_labels_bound_the_noise,
    beyond.best_mixture,
    beyond.mixture_is_never_worse,
    beyond.sequence_of_labels,
    beyond.position_by_position,
    beyond.bernstein_is_enough,
    beyond.metric_between_its_bounds,
    beyond.metric_eigenvalues_interlace,
    beyond.upper_bound_is_never_tight,
    blocks.block_by_its_gram_matrix,
    blocks.block_of_second_derivatives,
    blocks.block_below_its_bound,
    blocks.unit_as_hard_as_its_diagonal,
    blocks.gaussian_block,
    damping.damped_steps,
    damping.damped_steps_of_labels,
    damping.damped_step_exactly,
)
CHECKS = {
    check.__name__: check for check in INEQUALITIES + EQUALITIES + SAMPLING + FINDINGS + BEYOND
}
