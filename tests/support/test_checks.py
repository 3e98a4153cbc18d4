"""Every check of a statement of the paper holds on enough cases, and goes red when it should."""

import pkgutil

import pytest
import torch
from support import checks
from support.checks import beyond, blocks, bounds, damping, exact
from support.checks.check import Check, at_most, equal, finding, together, within

import fimlib
from fimlib.spectra.extreme import METHODS

CASES = 2_000
# At 500 softmax vectors: the bounds themselves are tried on 10,000 by eq_16 and eq_36.
FEWER = {"fourth_moment_below_certified"}


@pytest.mark.parametrize("name", checks.CHECKS)
def test_statement_holds(name):
    check = checks.CHECKS[name](CASES)
    assert check.holds
    if check.kind == "inequality":
        assert check.worst < 1 + 1e-7
        assert check.cases >= CASES or name in FEWER


@pytest.mark.full
@pytest.mark.parametrize("name", checks.CHECKS)
def test_statement_holds_at_length(name):
    assert checks.CHECKS[name](200_000).holds


def test_every_check_is_listed_once():
    groups = (checks.INEQUALITIES, checks.EQUALITIES, checks.SAMPLING, checks.FINDINGS)
    assert len(checks.CHECKS) == sum(map(len, (*groups, checks.BEYOND)))
    for group, kind in (
        (checks.INEQUALITIES, "inequality"),
        (checks.EQUALITIES, "equality"),
        (checks.SAMPLING, "sampling"),
        (checks.FINDINGS, "finding"),
    ):
        assert all(check.__doc__ for check in group)
        assert group[0](CASES).kind == kind


def scaled(factor):
    """Wrap a function of fimlib so that its result is off by a factor."""

    def multiply(value):
        if isinstance(value, tuple):
            return type(value)(*(multiply(v) for v in value))
        if isinstance(value, dict):
            return {k: multiply(v) for k, v in value.items()}
        if isinstance(value, fimlib.Diagonal):
            terms = (fimlib.diagonal.Term(t.layer, factor * t.left, t.rights) for t in value._terms)
            return fimlib.Diagonal(tuple(terms))
        return factor * value

    return lambda function: lambda *args, **kwargs: multiply(function(*args, **kwargs))


# What is broken in fimlib, how, and a check that must notice.
SABOTAGE = [
    ("fisher_information", 1.05, bounds.eq_10_upper),
    ("fisher_information", 1.05, exact.eq_23),
    ("variance_i1", 1.05, bounds.eq_11_upper),
    ("variance_i1", 1.05, exact.eq_24),
    ("variance_i2", 1.05, bounds.eq_12_upper),
    ("variance_i2", -1.0, exact.eq_25),
    ("fisher_information", 0.95, bounds.eq_10_lower),
    ("variance_i1", 0.95, bounds.eq_11_lower),
    ("variance_i2", 0.95, bounds.eq_12_lower),
    ("fisher_information", 0.95, bounds.centred_lower),
    ("fisher_information", 1.05, bounds.centred_upper),
    ("corollary_4_2", 1.05, bounds.eq_14),
    ("corollary_4_6", 0.95, bounds.eq_17),
    ("corollary_4_6", 0.95, bounds.eq_18),
    ("corollary_4_6", 0.95, bounds.eq_19),
    ("corollary_4_2", 0.9, bounds.eq_15),
    ("corollary_4_2", -1.0, bounds.eq_14),
    ("proposition_4_3", 0.95, bounds.eq_16),
    ("bounds.corollary_q_1", 0.95, bounds.eq_36),
    ("theorem_5_2", 0.95, bounds.theorem_5_2_covariance),
    ("theorem_5_2", 0.95, bounds.theorem_5_2_outer),
    ("trace_bounds.theorem_c_1", 0.95, bounds.eq_29),
    ("trace_bounds.theorem_c_1", 0.95, bounds.eq_30),
    ("trace_bounds.theorem_c_1", 0.95, bounds.eq_31),
    ("trace_bounds.theorem_c_1", 1.05, bounds.full_spectrum_is_tighter),
    ("trace_bounds.theorem_c_2", 0.95, bounds.theorem_c_2),
    ("bounds.theorem_b_1", 0.95, bounds.eq_26),
    ("bounds.theorem_b_1", 0.95, bounds.eq_27),
    ("bounds.theorem_b_1", 0.95, bounds.off_diagonal_v2),
    ("bounds.corollary_b_3", 0.95, bounds.eq_28),
    ("bounds.lemma_b_2", 0.95, bounds.lemma_b_2),
    ("estimate_i1", 1.05, exact.eq_5),
    ("estimate_i2", 1.05, exact.eq_6),
    ("estimate_i1_matrix", 1.05, exact.eq_3),
    ("estimate_i2_matrix", 1.05, exact.eq_4),
    ("fisher_matrix", 1.05, exact.eq_2),
    ("data_fisher", 0.95, exact.kl_bound),
    ("data_fisher", 1.05, exact.data_fisher_of_the_model),
    ("empirical.data_fisher_matrix", 1.05, exact.eq_21),
    ("empirical.data_fisher_matrix", 1.05, exact.reparameterisation),
    ("empirical.data_fisher_covariance", 1.05, exact.eq_22),
    ("data_fisher_variance", 1.05, exact.corollary_f_1),
    ("kl_gradient", -1.0, exact.kl_gradient),
    ("projections.variance_signs", 1.05, beyond.one_projection_of_a_batch),
    ("variance_i1", 1.05, beyond.one_projection_of_a_batch),
    ("fisher_information", 0.9, beyond.signs_scatter_less_than_twice),
    ("projections.variance_importance", 1.05, beyond.important_labels),
    ("projections.variance_importance", 10, beyond.important_labels_bound_the_noise),
    ("covariance_i1_i2", 1.05, beyond.sequence_of_labels),
    ("variance_i1", 1.05, beyond.sequence_of_labels),
    ("variance_i1", 1.05, beyond.position_by_position),
    ("num_samples_needed", 0.2, beyond.bernstein_is_enough),
    ("lambda_max", 0.7, blocks.block_below_its_bound),
    ("variance_i1", 1.05, blocks.unit_as_hard_as_its_diagonal),
    ("variance_i2", 1.05, blocks.unit_as_hard_as_its_diagonal),
    ("bounds.off_diagonal", 1.05, blocks.gaussian_block),
    ("fisher_information", 1.05, damping.damped_steps_of_labels),
    ("variance_i1", 0.2, damping.damped_steps_of_labels),
    ("fisher_information", 1.05, beyond.metric_between_its_bounds),
    ("fisher_information", 0.95, beyond.metric_between_its_bounds),
]


@pytest.mark.parametrize(
    ("name", "factor", "check"), SABOTAGE, ids=lambda v: getattr(v, "__name__", str(v))
)
def test_a_wrong_factor_is_noticed(name, factor, check, monkeypatch):
    module, _, function = f"fimlib.{name}".rpartition(".")
    right = pkgutil.resolve_name(f"{module}:{function}")
    monkeypatch.setattr(f"{module}.{function}", scaled(factor)(right))
    assert not check(CASES).holds


@pytest.mark.parametrize(("method", "factor"), [("certified", 0.95), ("lower", 1.05)])
def test_a_wrong_bound_of_an_eigenvalue_is_noticed(method, factor, monkeypatch):
    monkeypatch.setitem(METHODS, method, scaled(factor)(METHODS[method]))
    assert not bounds.eq_13(CASES).holds


@pytest.mark.parametrize("method", ["variance_i1", "variance_i2"])
def test_swapped_numbers_of_inputs_and_labels_are_noticed(method, monkeypatch):
    right = getattr(fimlib.Joint, method)

    def swapped(self, num_inputs, num_labels=1, *, replacement=True):
        return right(self, num_labels, num_inputs, replacement=replacement)

    monkeypatch.setattr(fimlib.Joint, method, swapped)
    monkeypatch.setattr(exact, "SIZES", ((1, 3, True), (2, 1, True)))
    assert not exact.eq_20(CASES).holds


def test_too_few_labels_are_noticed(monkeypatch):
    def one(derivs, *_args, **_kwargs):
        return {block.layer: torch.ones(len(derivs.outputs)) for block in derivs.blocks}

    monkeypatch.setattr(fimlib, "num_samples_needed", one)
    assert not exact.chebyshev(CASES).holds


def test_a_joint_variance_without_its_input_term_is_noticed(monkeypatch):
    right = fimlib.Joint.input_variance
    monkeypatch.setattr(
        fimlib.Joint, "input_variance", lambda self: {k: 0 * v for k, v in right(self).items()}
    )
    assert not exact.eq_20(CASES).holds
    assert not exact.eq_20_sampled(CASES).holds
    assert not exact.eq_32(CASES).holds


def test_inequalities_grant_rounding_and_no_more():
    large = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    assert at_most(large * (1 + 1e-11), large, 0.0).holds
    assert at_most(large / 2, large, 0.0) == ("inequality", 3, 0, 0.5)
    assert at_most(large * (1 + 1e-9), large, 0.0).violations == 3
    assert at_most(large + 0.1, large, 0.0).worst == pytest.approx(1.1)
    nan = torch.full_like(large, float("nan"))
    assert at_most(nan, large, 0.0).violations == 3
    assert at_most(large, nan, 0.0).violations == 3
    assert at_most(large + 1e-13, large, 1e3).holds


def test_equalities_are_judged_by_the_largest_entry():
    x = torch.tensor([1.0, 100.0], dtype=torch.float64)
    assert equal(x + 1e-9, x).holds
    assert equal(x + 1e-7, x).violations == 2
    assert equal(x * float("nan"), x).violations == 2
    assert equal(x + 1e-9, x, 1.0).violations == 2


def test_the_other_kinds():
    one = torch.ones(2, dtype=torch.float64)
    assert within(one + 0.4, one, 0.1 * one, 7) == ("sampling", 14, 0, pytest.approx(4.0))
    assert within(one + 0.6, one, 0.1 * one, 7).violations == 2
    assert finding(True, 3.0).holds
    assert not finding(False, 3.0, 5).holds
    assert not Check("finding", 0, 0, 1.0).holds
    a, b = Check("equality", 2, 0, 0.1), Check("equality", 3, 1, 0.3)
    assert together(a, b) == ("equality", 5, 1, 0.3)
    with pytest.raises(ValueError, match="different kinds"):
        together(a, finding(True, 1.0))
