import math
from itertools import product

import pytest
import torch
from scipy import stats
from strategies import inputs, mlp
from torch import nn

import fimlib
from fimlib import Categorical, Gaussian, differentiate, precision, projections
from fimlib._checks import check_estimator
from fimlib.precision import (
    compare_estimators,
    largest_quantile,
    mixture,
    num_samples_needed,
    number_needed,
)

ESTIMATORS = {1: fimlib.estimate_i1, 2: fimlib.estimate_i2}
VARIANCES = {1: fimlib.variance_i1, 2: fimlib.variance_i2}


def layer(quantity, name):
    """All parameters of a layer joined: [B, P]."""
    parts = [tensor.flatten(1) for key, tensor in quantity.items() if key.startswith(f"{name}.")]
    return torch.cat(parts, dim=1)


def sums(derivs, family, name):
    """ΣI², ΣV₁ and ΣV₂ over a layer, [B] each."""
    fisher = layer(fimlib.fisher_information(derivs, family), name)
    variances = [layer(VARIANCES[j](derivs, family), name).sum(1) for j in (1, 2)]
    return fisher.square().sum(1), *variances


@pytest.mark.parametrize("estimator", [1, 2])
@pytest.mark.parametrize("family", [Categorical(), Gaussian()], ids=["categorical", "gaussian"])
def test_the_smallest_number_that_chebyshev_grants(family, estimator):
    derivs = differentiate(mlp([3, 5, 4, 3], nn.Sigmoid, scale=2.0), inputs(4, 3))
    needed = num_samples_needed(
        derivs, family, relative_error=0.2, confidence=0.75, estimator=estimator
    )
    assert list(needed) == ["0", "2", "4"]
    for name, n in needed.items():
        squared_norm, *variances = sums(derivs, family, name)
        variance = variances[estimator - 1]
        assert n.shape == (4,)
        assert torch.equal(n, n.round())
        assert (variance / n <= 0.04 * 0.25 * squared_norm * (1 + 1e-9)).all()
        fewer = variance / (n - 1) > 0.04 * 0.25 * squared_norm
        assert (fewer | (n == 1)).all()
        assert (n > 1).all() or (estimator == 2 and name == "4")


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("estimator", [1, 2])
def test_sharper_rules_keep_their_promise(estimator, confidence):
    """With so many labels, how often is ‖Î − I‖ ≥ ε‖I‖? Labels are drawn as counts of classes."""
    family, draws, error = Categorical(), 5000, 0.15
    derivs = differentiate(mlp([3, 5, 4, 4], nn.Sigmoid, scale=2.0), inputs(2, 3))
    ask = {"relative_error": error, "confidence": confidence, "estimator": estimator}
    needed = {
        rule: num_samples_needed(derivs, family, **ask, rule=rule)
        for rule in ("chebyshev", "bernstein", "approximate")
    }
    h = family.natural(derivs.outputs)
    fisher = fimlib.fisher_information(derivs, family)
    generator = torch.Generator().manual_seed(0)
    for name in ("0", "2"):
        I = layer(fisher, name)
        keys = [key for key in fisher if key.startswith(f"{name}.")]
        D = torch.cat([getattr(derivs, WHICH[estimator])(k).flatten(2) for k in keys], 2)
        of_labels = family.project(h, D.double())
        errors = of_labels.square() - I[:, None] if estimator == 1 else of_labels
        for b in range(2):
            assert needed["bernstein"][name][b] <= needed["chebyshev"][name][b]
            assert needed["approximate"][name][b] < needed["bernstein"][name][b]
            for rule, counts in needed.items():
                N = int(counts[name][b])
                shares = family.sample(h[b : b + 1].expand(draws, -1), N, generator).weights
                off = torch.linalg.vector_norm(shares @ errors[b], dim=1)
                kept = float((off < error * I[b].norm()).double().mean())
                assert kept >= confidence - (0.02 if rule == "approximate" else 0.0)
                assert rule != "approximate" or kept <= confidence + 0.02


@pytest.mark.parametrize("estimator", [1, 2])
def test_sharper_rules_are_their_formulas(estimator):
    family, error, alpha = Categorical(), 0.15, 0.01
    derivs = differentiate(mlp([3, 5, 4, 4], nn.Sigmoid, scale=2.0), inputs(2, 3))
    ask = {"relative_error": error, "confidence": 1 - alpha, "estimator": estimator}
    found = {
        r: num_samples_needed(derivs, family, **ask, rule=r) for r in ("bernstein", "approximate")
    }
    h, fisher = family.natural(derivs.outputs), fimlib.fisher_information(derivs, family)
    for name, b in product(("0", "2"), range(2)):
        keys = [key for key in fisher if key.startswith(f"{name}.")]
        D = torch.cat([getattr(derivs, WHICH[estimator])(k).flatten(2) for k in keys], 2)
        labels, I = family.project(h, D.double())[b], layer(fisher, name)[b]
        a = labels.square() - I if estimator == 1 else labels
        p, t = family.mean(h)[b], error * I.norm()
        eigenvalues = torch.linalg.eigvalsh(torch.einsum("k,ki,kj->ij", p, a, a))
        total, squares = eigenvalues.sum(), eigenvalues.square().sum()
        most = torch.linalg.vector_norm(a, dim=1).max()
        bernstein = math.log(2 / alpha) * (2 * total / t**2 + 2 * most / (3 * t))
        assert found["bernstein"][name][b] == torch.ceil(bernstein)
        g, f = squares / total, total**2 / squares
        quantile = stats.chi2.ppf(1 - alpha, float(f))
        assert found["approximate"][name][b] == torch.ceil(g * quantile / t**2)


WHICH = {1: "jacobian", 2: "second"}


@pytest.mark.parametrize("confidence", [0.05, 0.5, 0.6, 0.7, 0.785, 0.9, 0.95, 0.999])
def test_no_normal_errors_need_more_than_the_rule_says(confidence):
    """Quantiles of Σλχ²₁ with Σλ = 1 for random λ, and those of χ²_f/f, which reach it."""
    q = largest_quantile(confidence)
    assert q <= 1 / (1 - confidence)
    squares = torch.randn(40_000, 12, generator=torch.Generator().manual_seed(0)).double().square()
    for seed in range(30):
        decay = 0.2 + 0.1 * seed
        lam = torch.rand(12, generator=torch.Generator().manual_seed(seed)).double() ** decay
        kept = float((squares @ (lam / lam.sum()) <= q).double().mean())
        assert kept >= confidence - 4 * (confidence * (1 - confidence) / 40_000) ** 0.5
    exact = [stats.chi2.ppf(confidence, f) / f for f in range(1, 100)]
    assert q >= max(exact)
    assert confidence < 0.785 or q == pytest.approx(stats.norm.ppf((1 + confidence) / 2) ** 2)


@pytest.mark.parametrize("estimator", [1, 2, "signs"])
def test_the_approximate_rule_of_other_labels_knows_the_variance_alone(estimator):
    derivs, family = differentiate(mlp([3, 5, 4, 3], nn.Tanh), inputs(4, 3)), fimlib.Bernoulli()
    ask = {"relative_error": 1e-3, "confidence": 0.95, "estimator": estimator}
    sure, near = (
        num_samples_needed(derivs, family, **ask, rule=r) for r in ("chebyshev", "approximate")
    )
    for name, n in sure.items():
        expected = (n * 0.05 * stats.norm.ppf(0.975) ** 2).clamp_min(1)
        torch.testing.assert_close(near[name], expected, atol=1.2, rtol=0)


def test_the_rule_for_classes_is_no_larger_than_the_one_for_any_label():
    derivs, family = differentiate(mlp([3, 5, 4, 3], nn.Tanh), inputs(4, 3)), Categorical()
    ask = {"relative_error": 0.1, "confidence": 0.95}
    known = num_samples_needed(derivs, family, **ask, rule="approximate")
    for name, n in known.items():
        squared_norm, v1, _ = sums(derivs, family, name)
        assert (n <= number_needed(v1, squared_norm, 0.1, 0.95, "approximate")).all()


@pytest.mark.parametrize(
    ("family", "estimator"),
    [(Gaussian(), 1), (Categorical(), "signs"), (Categorical(), "importance")],
)
def test_bernstein_needs_all_labels(family, estimator):
    derivs = differentiate(mlp([3, 5, 3], nn.Tanh), inputs(2, 3))
    ask = {"relative_error": 0.1, "confidence": 0.9, "estimator": estimator, "rule": "bernstein"}
    with pytest.raises(ValueError, match="'bernstein' is for Î₁ and Î₂ of Categorical"):
        num_samples_needed(derivs, family, **ask)


def test_the_first_estimator_is_the_default():
    derivs = differentiate(mlp([2, 3, 2], nn.Tanh), inputs(2, 2))
    arguments = {"relative_error": 0.1, "confidence": 0.9}
    default = num_samples_needed(derivs, Categorical(), **arguments)
    first, second = (
        num_samples_needed(derivs, Categorical(), **arguments, estimator=j) for j in (1, 2)
    )
    assert all(torch.equal(default[name], first[name]) for name in default)
    assert not torch.equal(default["0"], second["0"])
    assert (second["2"] == 1).all()  # V₂ = 0 in a last layer that is linear: one label will do


def one_weight():
    """h = wx at x = 1, Gaussian: I = 1, V₁ = 2, V₂ = 0; by hand N = 2 / (ε² (1 − confidence))."""
    return differentiate(nn.Linear(1, 1, bias=False).double(), torch.ones(1, 1).double())


@pytest.mark.parametrize(
    ("relative_error", "confidence", "expected"),
    [
        (0.1, 0.9, 2000),
        (0.2, 0.9, 500),
        (0.1, 0.95, 4000),
        (0.1, 0.99, 20000),
        (1, 0.5, 4),
        (1, 0.9, 20),  # 2 / (1 − 0.9) is a little more than 20 in floating point
        (2**0.5, 0.5, 2),
        (2, 0.5, 1),
        (1e6, 0.5, 1),
        (1e-3, 1 - 1e-6, 2e12),
    ],
)
def test_by_hand(relative_error, confidence, expected):
    needed = num_samples_needed(
        one_weight(), Gaussian(), relative_error=relative_error, confidence=confidence
    )
    assert needed[""].tolist() == [pytest.approx(expected, rel=1e-10)]


def test_the_number_scales_with_the_inverse_square_of_the_error():
    derivs = differentiate(mlp([3, 4, 3], nn.Sigmoid), inputs(3, 3))
    coarse, fine = (
        num_samples_needed(derivs, Categorical(), relative_error=e, confidence=0.9)
        for e in (1e-4, 1e-5)
    )
    for name in coarse:
        assert torch.allclose(fine[name] / coarse[name], coarse[name].new_tensor(100.0), rtol=1e-6)


def test_nothing_to_estimate_needs_one_label_and_an_impossible_aim_infinitely_many():
    """At x = 0 the weights have J = S = 0; where J = 0 but S ≠ 0, no N makes Î₂ relatively good."""
    net = mlp([2, 3], nn.Tanh, bias=False)
    still = differentiate(net, torch.zeros(1, 2, dtype=torch.float64))
    for j in (1, 2):
        needed = num_samples_needed(
            still, Categorical(), relative_error=0.1, confidence=0.9, estimator=j
        )
        assert needed["0"].tolist() == [1.0]
    assert all(sd.item() == 0 for sd in compare_estimators(still, Categorical())["0"][:2])

    flat = differentiate(mlp([2, 3, 3], nn.Tanh), inputs(1, 2))
    flat.blocks[0].J.zero_()
    needed = num_samples_needed(
        flat, Categorical(), relative_error=0.1, confidence=0.9, estimator=2
    )
    assert needed["0"].tolist() == [float("inf")]
    assert compare_estimators(flat, Categorical())["0"].relative_sd_i2.item() == float("inf")


@pytest.mark.parametrize("estimator", [1, 2])
@pytest.mark.parametrize(("relative_error", "confidence"), [(0.5, 0.5), (0.8, 0.75), (1.0, 0.9)])
def test_the_exceedance_probability_is_bounded(estimator, relative_error, confidence):
    """Through the class counts of all sequences of N labels, exactly, where N is small enough."""
    derivs = differentiate(mlp([2, 2, 2], nn.Tanh, scale=1.5), inputs(1, 2))
    family, outputs = Categorical(), derivs.outputs
    sigma = torch.softmax(outputs[0], 0)
    fisher = fimlib.fisher_information(derivs, family)
    needed = num_samples_needed(
        derivs,
        family,
        relative_error=relative_error,
        confidence=confidence,
        estimator=estimator,
    )
    for name, n in ((name, int(n)) for name, n in needed.items()):
        assert n <= 200
        counts = torch.arange(n + 1).double()
        shares = torch.stack([counts, n - counts], dim=1) / n
        log_binomial = torch.lgamma(counts.new_tensor(n + 1.0))
        log_binomial = log_binomial - torch.lgamma(counts + 1) - torch.lgamma(n - counts + 1)
        probability = (log_binomial + n * shares @ sigma.log()).exp()
        exceeding = 0.0
        for share, p in zip(shares, probability, strict=True):
            labels = fimlib.Labels(family, outputs, share[None], n)
            error = layer(ESTIMATORS[estimator](derivs, labels), name) - layer(fisher, name)
            if error.norm() > 1e-12 and error.norm() >= relative_error * layer(fisher, name).norm():
                exceeding += p.item()
        assert probability.sum().item() == pytest.approx(1)
        assert exceeding <= 1 - confidence


def test_chebyshev_by_hand_for_one_coin():
    """Two classes, σ₀ = 1/6: on label 0 the error of Î₁ is (σ₁ − σ₀)/σ₀ = 4 times I, else less.

    That happens with probability 1/6; Chebyshev's bound of it is σ₀/σ₁ = 1/5.
    """
    net = nn.Linear(1, 2, bias=False).double()
    net.weight.data = torch.tensor([[1.0], [5.0]], dtype=torch.float64).log()
    derivs = differentiate(net, torch.ones(1, 1).double())
    for confidence, expected in ((0.8 - 1e-9, 1), (0.8, 1), (0.8 + 1e-9, 2), (0.9, 2), (0.95, 4)):
        needed = num_samples_needed(derivs, Categorical(), relative_error=4, confidence=confidence)
        assert needed[""].tolist() == [expected]


# Comparison. --------------------------------------------------------------------------------------


def test_relative_standard_deviations():
    derivs = differentiate(mlp([3, 5, 4, 3], nn.Sigmoid, scale=2.0), inputs(4, 3))
    comparison = compare_estimators(derivs, Categorical())
    assert list(comparison) == ["0", "2", "4"]
    for name, ours in comparison.items():
        squared_norm, v1, v2 = sums(derivs, Categorical(), name)
        for got, variance in ((ours.relative_sd_i1, v1), (ours.relative_sd_i2, v2)):
            assert got.dtype == torch.float64
            assert torch.allclose(got, (variance / squared_norm).sqrt(), rtol=1e-12, atol=0)
        assert ours.less_variance.tolist() == [1 + int(b < a) for a, b in zip(v1, v2, strict=True)]
        assert torch.equal(ours.less_variance, ours.less_variance_at_cost)


def test_relative_standard_deviation_is_the_typical_error():
    """√E‖Î − I‖² / ‖I‖ by enumeration of one label."""
    derivs, family = differentiate(mlp([2, 3, 3], nn.Tanh), inputs(1, 2)), Categorical()
    sigma = torch.softmax(derivs.outputs[0], 0)
    comparison, fisher = (
        compare_estimators(derivs, family),
        fimlib.fisher_information(derivs, family),
    )
    for name, j in product(comparison, (1, 2)):
        total = 0.0
        for k in range(3):
            label = fimlib.Labels(family, derivs.outputs, torch.eye(3).double()[[k]], 1)
            error = layer(ESTIMATORS[j](derivs, label), name) - layer(fisher, name)
            total += sigma[k] * error.square().sum()
        expected = total.sqrt() / layer(fisher, name).norm()
        assert comparison[name][j - 1].item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)


def test_a_linear_last_layer_prefers_i2_whatever_it_costs():
    derivs = differentiate(mlp([3, 5, 4], nn.Sigmoid), inputs(3, 3))
    for cost_ratio in (0.01, 1.0, 1e9):
        last = compare_estimators(derivs, Categorical(), cost_ratio=cost_ratio)["2"]
        assert not last.relative_sd_i2.any()
        assert last.relative_sd_i1.all()
        assert last.less_variance.tolist() == last.less_variance_at_cost.tolist() == [2, 2, 2]


def test_cost_decides_where_variances_do_not_differ_by_more():
    """A hidden layer prefers the one or the other by cost_ratio × V₂ against V₁, on both sides."""
    derivs = differentiate(mlp([3, 5, 4], nn.Sigmoid), inputs(1, 3))
    _, v1, v2 = sums(derivs, Categorical(), "0")
    even = (v1 / v2).item()
    choices = {}
    for factor in (0.5, 0.999, 1.001, 2.0):
        hidden = compare_estimators(derivs, Categorical(), cost_ratio=even * factor)["0"]
        choices[factor] = hidden.less_variance_at_cost.item()
        assert hidden.less_variance.item() == (2 if even > 1 else 1)
    assert choices == {0.5: 2, 0.999: 2, 1.001: 1, 2.0: 1}


@pytest.mark.parametrize(("ratio", "better"), [(1.5, 2), (1 / 1.5, 1)])
def test_equal_costs_are_the_default(ratio, better):
    derivs = differentiate(mlp([3, 5, 4], nn.Sigmoid), inputs(1, 3))
    _, v1, v2 = sums(derivs, Categorical(), "0")
    derivs.blocks[0].S.mul_((v1 / v2 / ratio).sqrt())  # now ΣV₁ = ratio × ΣV₂
    hidden = compare_estimators(derivs, Categorical())["0"]
    assert hidden.less_variance.tolist() == hidden.less_variance_at_cost.tolist() == [better]


def test_a_tie_goes_to_i1():
    still = differentiate(mlp([2, 3], nn.Tanh, bias=False), torch.zeros(2, 2).double())
    tie = compare_estimators(still, Categorical())["0"]
    assert tie.less_variance.tolist() == tie.less_variance_at_cost.tolist() == [1, 1]


def test_the_mixture_is_the_best_of_all():
    derivs, family = differentiate(mlp([3, 5, 4, 3], nn.Tanh), inputs(4, 3)), Categorical()
    joint = fimlib.Joint(family)
    joint.update(derivs)
    c12 = fimlib.covariance_i1_i2(derivs, family)
    mixtures = joint.combination()
    for name, ours in compare_estimators(derivs, family).items():
        squared_norm, v1, v2 = sums(derivs, family, name)
        c = layer(c12, name).reshape(4, -1).sum(1)

        def variance(weight, v1=v1, v2=v2, c=c):
            return weight**2 * v1 + (1 - weight) ** 2 * v2 + 2 * weight * (1 - weight) * c

        best = variance(ours.weight_i1)
        torch.testing.assert_close(ours.relative_sd_combined, (best / squared_norm).sqrt())
        for step in (-0.1, -1e-3, 1e-3, 0.1):
            assert (variance(ours.weight_i1 + step) >= best * (1 - 1e-12)).all()
        means = [x.mean() for x in (v1, v2, c)]
        weight, found = mixtures[name]
        assert found == pytest.approx(float(variance(weight, *means)), rel=1e-9)
        assert found <= min(means[:2])


def test_a_mixture_of_equal_estimators_is_the_first():
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    assert [x.item() for x in mixture(one, one, one)] == [1.0, 1.0]
    assert [x.item() for x in mixture(zero, zero, zero)] == [1.0, 0.0]
    assert [x.item() for x in mixture(one, zero, zero)] == [0.0, 0.0]


@pytest.mark.parametrize("family", [Categorical(), fimlib.Bernoulli()], ids=["classes", "answers"])
def test_random_projections_are_compared_as_well(family):
    derivs = differentiate(mlp([3, 5, 4, 3], nn.Tanh), inputs(4, 3))
    for name, ours in compare_estimators(derivs, family).items():
        squared_norm, *_ = sums(derivs, family, name)
        signs = layer(projections.variance_signs(derivs, family), name).reshape(4, -1).sum(1)
        torch.testing.assert_close(ours.relative_sd_signs, (signs / squared_norm).sqrt())
        needed = num_samples_needed(
            derivs, family, relative_error=0.1, confidence=0.5, estimator="signs"
        )[name]
        assert torch.equal(needed, (signs / squared_norm * 200).ceil().clamp_min(1))
        if isinstance(family, Categorical):
            v = layer(projections.variance_importance(derivs, family), name).reshape(4, -1).sum(1)
            torch.testing.assert_close(ours.relative_sd_importance, (v / squared_norm).sqrt())
        else:
            assert ours.relative_sd_importance is None


# Errors. ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0.0, -0.1, float("nan"), float("inf")])
def test_errors_and_costs_are_positive_numbers(bad):
    with pytest.raises(ValueError, match=r"relative_error \(ε\) must be a positive number, got"):
        num_samples_needed(one_weight(), Gaussian(), relative_error=bad, confidence=0.9)
    with pytest.raises(ValueError, match="cost_ratio must be a positive number, got"):
        compare_estimators(one_weight(), Gaussian(), cost_ratio=bad)


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.1, 1.1, float("nan")])
def test_confidence_lies_strictly_between_0_and_1(bad):
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1, both excluded, got"):
        num_samples_needed(one_weight(), Gaussian(), relative_error=0.1, confidence=bad)


@pytest.mark.parametrize("bad", [0, 3, -1, "1"])
def test_there_are_two_estimators(bad):
    with pytest.raises(ValueError, match=r"estimator must be 1 \(Î₁\) or 2 \(Î₂\), got"):
        num_samples_needed(
            one_weight(), Gaussian(), relative_error=0.1, confidence=0.9, estimator=bad
        )


@pytest.mark.parametrize("estimator", [True, 0, 3, "1", None])
def test_the_estimators_have_numbers(estimator):
    with pytest.raises(ValueError, match="estimator must be 1"):
        check_estimator(estimator)
    assert isinstance(check_estimator(1.0), int)


@pytest.mark.parametrize("rule", ["chebyshev", "bernstein", "approximate"])
def test_squares_too_small_for_float64_give_nan(rule):
    """At p = e⁻³⁷⁵, I² is 1e-326: neither 1 nor infinitely many labels would be right."""
    net = nn.Linear(1, 2).double()
    with torch.no_grad():
        net.weight.zero_()
        net.bias.copy_(torch.tensor([0.0, -375.0]))
    derivs = differentiate(net, torch.ones(1, 1).double())
    ask = {"relative_error": 0.1, "confidence": 0.95}
    assert fimlib.num_samples_needed(derivs, Categorical(), **ask, rule=rule)[""].isnan().all()


def test_squares_too_small_for_float64_in_comparisons_and_summaries():
    net = nn.Linear(1, 1, bias=False).double()
    x = torch.tensor([[1e-82], [2e-82]], dtype=torch.float64)
    found = fimlib.compare_estimators(differentiate(net, x), Gaussian())[""]
    assert found.relative_sd_i1.isnan().all()
    joint = fimlib.accumulate(net, x, Gaussian())
    assert math.isnan(joint.num_inputs_needed(0.1, 0.9)[""])
    assert "too small to be squared" in str(fimlib.summarise(net, x, Gaussian())).replace("\n", " ")


def test_no_variance_counts_as_no_error_though_rounding_makes_it_negative():
    variance = torch.tensor([-1e-20, 0.0, 0.0, 2.0], dtype=torch.float64)
    norm = torch.tensor([1.0, 0.0, math.nan, 4.0], dtype=torch.float64)
    assert precision.ratio(variance, norm).nan_to_num(-1).tolist() == [0, 0, -1, 0.5]
