import copy
import math

import pytest
import reference
import torch
from hypothesis import given, settings
from strategies import ADVERSARIAL, inputs, logits, logits_of, mlp
from torch import nn

import fimlib
from fimlib import joint
from fimlib.families import Bernoulli, Categorical, Gaussian, GaussianHead, Labels, Poisson
from fimlib.families.base import Family
from fimlib.families.independent import Independent
from fimlib.spectra import lambda_max

H = inputs(3, 4)
SIGMA = torch.eye(4).double() + 0.3
FAMILIES = [Categorical(), Gaussian()]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: type(f).__name__)
def test_moments_are_derivatives_of_the_log_partition(family):
    """η = ∇F, 𝓘 = ∇²F, and 𝓚 = ∇⁴F + the three pairings of 𝓘 (not ∇⁴F alone)."""
    for h in H:
        F = lambda v: family.log_partition(v[None])[0]  # noqa: E731
        cov = family.covariance(h[None])[0]
        assert torch.allclose(family.mean(h[None])[0], torch.func.grad(F)(h), atol=1e-12)
        assert torch.allclose(cov, torch.func.hessian(F)(h), atol=1e-12)
        fourth_cumulant = torch.func.hessian(torch.func.hessian(F))(h)
        pairings = sum(
            torch.einsum(p, cov, cov) for p in ("ab,cd->abcd", "ac,bd->abcd", "ad,bc->abcd")
        )
        fourth = family.fourth_moment(h[None])[0]
        assert torch.allclose(fourth, fourth_cumulant + pairings, atol=1e-12)


CLOSED_FORMS = [Categorical(), Bernoulli(), Poisson(), Gaussian(SIGMA), Gaussian()]


@pytest.mark.long
@pytest.mark.parametrize("base", [Family, Independent], ids=lambda c: c.__name__)
@pytest.mark.parametrize(
    "closed",
    [pytest.param(f, marks=[pytest.mark.full] * (i > 1)) for i, f in enumerate(CLOSED_FORMS)],
    ids=lambda f: type(f).__name__,
)
def test_a_family_of_two_methods_agrees_with_the_closed_forms(closed, base):
    if base is Independent and not isinstance(closed, Independent):
        pytest.skip("its labels are not independent")

    class Minimal(base):
        def log_partition(self, h):
            return closed.log_partition(h)

        def draw(self, h, num_samples, generator):
            return closed.draw(h, num_samples, generator)

    J, S = inputs(3, 4 * 5, seed=2).view(3, 4, 5), inputs(3, 4 * 5, seed=3).view(3, 4, 5)
    u = inputs(3, 4 * 6, seed=4).view(3, 6, 4)
    calls = {
        "mean": (), "covariance": (), "fourth_moment": (), "information": (J,), "variance1": (J,),
        "variance2": (S,), "covariance12": (J, S), "outer_covariance_at": (u,),
    }  # fmt: skip
    for name, arguments in calls.items():
        expected = getattr(closed, name)(H, *arguments)
        assert torch.allclose(getattr(Minimal(), name)(H, *arguments), expected, atol=1e-12), name
    factor = Minimal().factor(H)
    assert torch.allclose(factor @ factor.mT, closed.covariance(H), atol=1e-12)
    assert (Minimal().outer_covariance_min(H) <= closed.outer_covariance_min(H) + 1e-15).all()
    for method in ("certified", "multistart"):
        ours, theirs = (lambda_max(family, H, method=method) for family in (Minimal(), closed))
        assert torch.allclose(ours, theirs, rtol=1e-6)


def test_categorical_moments_by_enumeration():
    for h in H:
        cov, fourth = reference.moments(torch.softmax(h, 0))
        assert torch.allclose(Categorical().covariance(h[None])[0], cov, atol=1e-14)
        assert torch.allclose(Categorical().fourth_moment(h[None])[0], fourth, atol=1e-14)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: type(f).__name__)
def test_contractions_equal_the_dense_tensors(family):
    J, S = inputs(3, 4 * 5, seed=2).view(3, 4, 5), inputs(3, 4 * 5, seed=3).view(3, 4, 5)
    cov, M = family.covariance(H), family.outer_covariance(H)
    I = torch.einsum("bij,bip,bjp->bp", cov, J, J)
    v1 = torch.einsum("bijkl,bip,bjp,bkp,blp->bp", M, J, J, J, J)
    v2 = torch.einsum("bij,bip,bjp->bp", cov, S, S)
    assert torch.allclose(family.information(H, J), I, rtol=1e-12)
    assert torch.allclose(family.variance1(H, J), v1, rtol=1e-10)
    assert torch.allclose(family.variance2(H, S), v2, rtol=1e-12)
    u = inputs(3, 4 * 6, seed=4).view(3, 6, 4)
    M_uu = torch.einsum("bijkl,bri,brj->brkl", M, u, u)
    assert torch.allclose(family.outer_covariance_at(H, u), M_uu, atol=1e-12)
    unfolded = torch.linalg.eigvalsh(M.flatten(3, 4).flatten(1, 2))[:, -4:]
    assert torch.allclose(torch.linalg.eigvalsh(family.unfolding(H))[:, -4:], unfolded, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(logits())
def test_categorical_tensors_see_no_common_shift(h):
    """𝓘1 = 0 and M(1,1,·,·) = 0: the smallest eigenvalues are 0."""
    family = Categorical()
    ones = torch.ones(1, 1, h.shape[1], dtype=torch.float64)
    assert (family.covariance(h) @ ones[0].T).abs().max() < 1e-15
    assert family.outer_covariance_at(h, ones).abs().max() < 1e-15
    assert family.outer_covariance_min(h).item() == 0


@pytest.mark.parametrize("probabilities", ADVERSARIAL.values(), ids=ADVERSARIAL)
@pytest.mark.parametrize("num_samples", [1, 7, 5000])
def test_class_counts_are_multinomial(probabilities, num_samples):
    """Mean and variance of the counts within 5 standard errors, counts complete and integral."""
    draws = 4000
    h = logits_of(probabilities).expand(draws, -1)
    labels = Categorical().sample(h, num_samples, torch.Generator().manual_seed(0))
    counts = labels.weights * num_samples
    assert torch.allclose(counts.sum(1), torch.full((draws,), float(num_samples)).double())
    assert torch.allclose(counts, counts.round(), atol=1e-9)
    assert (counts >= 0).all()
    sigma = torch.softmax(h[0], 0)
    variance = num_samples * sigma * (1 - sigma)
    z = (counts.mean(0) - num_samples * sigma) / (variance / draws).sqrt()
    expected_often = draws * num_samples * sigma.minimum(1 - sigma) > 10
    assert z[expected_often].abs().max() < 5 if expected_often.any() else True
    if num_samples > 1 and expected_often.any():
        # Kurtosis of a binomial: 3 + (1 − 6p(1−p))/Np(1−p).
        kurtosis = 3 + (1 - 6 * sigma * (1 - sigma)) / variance
        ratio_error = ((kurtosis - 1) / draws).sqrt()
        ratio = counts.var(0) / variance
        assert ((ratio - 1) / ratio_error)[expected_often].abs().max() < 5


def test_rare_classes_are_drawn_at_their_rate():
    """Probabilities of 1e-12: one minus a running sum would lose them."""
    p = [1 - 3e-12, 1e-12, 1e-12, 1e-12]
    labels = Categorical().sample(logits_of(p), 10**15, torch.Generator().manual_seed(0))
    counts = labels.weights[0] * 10**15
    assert (counts[1:] - 1000).abs().max() < 5 * 1000**0.5


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: type(f).__name__)
def test_equal_seeds_draw_equal_labels(family):
    a, b, c = (family.sample(H, 9, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    first, second, third = (y.mean_residual() for y in (a, b, c))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_variances_near_a_half_do_not_cancel():
    """At σ = ½ ± 1e-6 the uncentred form Σσc⁴ − I² has lost all its digits."""
    e = 1e-6
    h, J = logits_of([0.5 + e, 0.5 - e]), torch.tensor([[[1.0], [0.0]]], dtype=torch.float64)
    p = torch.softmax(h[0], 0)[0].item()
    expected = p * (1 - p) * (1 - 2 * p) ** 2  # of (y − p)², y Bernoulli
    assert Categorical().variance1(h, J).item() == pytest.approx(expected, rel=1e-8)


def test_gaussian_labels_have_unit_covariance():
    labels = Gaussian().sample(H[:1], 40_000, torch.Generator().manual_seed(0))
    residuals = labels.values[0] - H[0]
    assert residuals.mean(0).abs().max() < 5 / 200
    assert (residuals.T.cov() - torch.eye(4)).abs().max() < 5 * 2**0.5 / 200


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("num_samples", [0, -3, 2.5, True, None, float("nan"), float("inf")])
def test_bad_number_of_samples_is_refused(family, num_samples):
    with pytest.raises(ValueError, match="num_samples"):
        family.sample(H, num_samples)


@pytest.mark.parametrize(
    ("family", "h", "message"),
    [
        (Categorical(), torch.zeros(3, 1), r"T ≥ 2"),
        (Categorical(), torch.zeros(3), r"\[B, T\]"),
        (Gaussian(), torch.zeros(2, 3, 4), r"\[B, T\]"),
        (Categorical(), torch.tensor([[0.0, float("nan")]]), "NaN"),
        (Gaussian(), torch.tensor([[float("inf")]]), "infinite"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(family, h, message):
    with pytest.raises(ValueError, match=message):
        family.sample(h, 1)


@pytest.mark.parametrize("weights", [torch.ones(3, 4), torch.full((2, 4), 0.25)])
def test_weights_that_are_no_shares_are_refused(weights):
    with pytest.raises(ValueError, match="sum to 1"):
        Labels(Categorical(), H, weights.double(), 4)


def test_gaussian_needs_values():
    with pytest.raises(ValueError, match="values"):
        Gaussian().project(H, H[:, :, None], None)


# The other families: moments by enumeration, labels, extremes of M.

COVARIANCE = torch.tensor([[2.0, 0.6, 0.1], [0.6, 0.5, -0.2], [0.1, -0.2, 1.5]]).double()
SMALL = 0.6 * inputs(2, 4, seed=8)
OTHERS = {
    "bernoulli": (Bernoulli(), SMALL, reference.bernoulli),
    "poisson": (Poisson(), SMALL[:, :2], reference.poisson),
    "gaussian": (Gaussian(), SMALL[:, :2], reference.gaussian(torch.eye(2).double())),
    "gaussian, known covariance": (
        Gaussian(COVARIANCE),
        SMALL[:, :3],
        reference.gaussian(COVARIANCE),
    ),
    "gaussian head, one pair": (GaussianHead(), SMALL[:, :2], reference.gaussian_head),
    "gaussian head, two pairs": (GaussianHead(), SMALL, reference.gaussian_head),
}
each_family = pytest.mark.parametrize("case", OTHERS)


@each_family
def test_moments_are_those_of_the_labels(case):
    """η, 𝓘 and 𝓚 against sums over all labels, and the same for what is made of them."""
    family, h, labels = OTHERS[case]
    T = h.shape[1]
    for b, one in enumerate(h):
        y, p, t = labels(one)
        assert torch.allclose(family.mean(h)[b], p @ t, atol=1e-12)
        delta = t - p @ t
        cov = torch.einsum("a,ai,aj->ij", p, delta, delta)
        fourth = torch.einsum("a,ai,aj,ak,al->ijkl", p, *[delta] * 4)
        assert torch.allclose(family.covariance(h)[b], cov, atol=1e-11)
        assert torch.allclose(family.fourth_moment(h)[b], fourth, atol=1e-10)
        M = fourth - torch.einsum("ij,kl->ijkl", cov, cov)
        assert torch.allclose(family.outer_covariance(h)[b], M, atol=1e-10)
        u = inputs(6, T, seed=4)
        M_uu = torch.einsum("ijkl,ri,rj->rkl", M, u, u)
        ours = family.outer_covariance_at(h, u.expand(2, -1, -1))[b]
        assert torch.allclose(ours, M_uu, atol=1e-9)
        n = T * (T + 1) // 2
        eigenvalues = torch.linalg.eigvalsh(family.unfolding(h)[b])[-n:]
        dense = torch.linalg.eigvalsh(M.reshape(T * T, T * T))[-n:]
        assert torch.allclose(eigenvalues, dense, atol=1e-9)
        observed = family.observed(h[b : b + 1], y[None])
        assert torch.allclose(observed.values[0], t, atol=1e-12)


@each_family
def test_contractions_of_the_other_families_equal_the_dense_tensors(case):
    family, h, labels = OTHERS[case]
    T = h.shape[1]
    J, S = (inputs(2, T * 5, seed=s).view(2, T, 5) for s in (2, 3))
    cov, M = family.covariance(h), family.outer_covariance(h)
    v1 = torch.einsum("bijkl,bip,bjp,bkp,blp->bp", M, J, J, J, J)
    assert torch.allclose(
        family.information(h, J), torch.einsum("bij,bip,bjp->bp", cov, J, J), rtol=1e-12
    )
    assert torch.allclose(family.variance1(h, J), v1, rtol=1e-10)
    assert torch.allclose(
        family.variance2(h, S), torch.einsum("bij,bip,bjp->bp", cov, S, S), rtol=1e-12
    )
    for b, one in enumerate(h):
        _, p, t = labels(one)
        delta = t - p @ t
        c12 = -(p @ ((delta @ J[b]).square() * (delta @ S[b])))
        assert torch.allclose(family.covariance12(h, J, S)[b], c12, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", ["categorical", *list(OTHERS)[:4]])
def test_variance_of_i1_is_the_fourth_derivative_and_two_squares(case):
    """Finding 3: 𝓚 = ∇⁴F + pairings, so N·V₁ = ∇⁴F[J,J,J,J] + 2I², where h is natural."""
    family, h, _ = OTHERS[case] if case in OTHERS else (Categorical(), SMALL, None)
    one, J = h[0], inputs(1, h.shape[1], seed=5)[0]
    F = lambda v: family.log_partition(v[None])[0]  # noqa: E731
    along = lambda tau: F(one + tau * J)  # noqa: E731
    for _ in range(4):
        along = torch.func.grad(along)
    I = family.information(h, J.expand(2, -1))[0]
    v1 = family.variance1(h, J.expand(2, -1))[0]
    assert torch.allclose(v1, along(torch.zeros(()).double()) + 2 * I**2, rtol=1e-10)
    assert torch.allclose(family.mean(h)[0], torch.func.grad(F)(one), atol=1e-12)
    cov = family.covariance(h)[0]
    assert torch.allclose(cov, torch.func.hessian(F)(one), atol=1e-12)
    pairs = sum(torch.einsum(f"{p}->abcd", cov, cov) for p in ("ab,cd", "ac,bd", "ad,bc"))
    cumulant = torch.func.hessian(torch.func.hessian(F))(one)
    assert torch.allclose(family.fourth_moment(h)[0], cumulant + pairs, atol=1e-11)


def test_log_partition_of_a_head_has_the_moments_of_y_and_its_square():
    """∇F = (E y, E y²) in the natural parameters (μ/s², −1/(2s²))."""
    mu, s = torch.tensor([0.7, -1.2]).double(), torch.tensor([0.5, 3.0]).double()

    def log_partition(natural):
        first, second = natural.chunk(2)
        variance = -1 / (2 * second)
        h = torch.cat([first * variance, variance.log() / 2])
        return GaussianHead().log_partition(h[None])[0]

    gradient = torch.func.grad(log_partition)(torch.cat([mu / s**2, -1 / (2 * s**2)]))
    assert torch.allclose(gradient, torch.cat([mu, mu**2 + s**2]), rtol=1e-12)


def test_the_link_of_a_head_is_its_standardised_natural_parameter():
    at = torch.tensor([[0.5, -1.0, 0.3, -0.4]]).double()
    h = torch.tensor([[0.9, -1.5, 0.1, 0.4]]).double()
    m = (h - at)[:, :2] / at[:, 2:].exp()
    r = (h - at)[:, 2:].exp()
    expected = torch.cat([m / r**2, -1 / (2 * r**2)], dim=1)
    assert torch.allclose(GaussianHead().link(h, at), expected, rtol=1e-14)
    assert Bernoulli().link(h, at) is h


@pytest.mark.parametrize("case", ["categorical", *OTHERS])
def test_samples_have_the_moments_of_the_family(case):
    """Mean and covariance of t(y) over 40,000 draws within 5 standard errors."""
    family, h, _ = OTHERS[case] if case in OTHERS else (Categorical(), SMALL, None)
    n, T = 40_000, h.shape[1]
    labels = family.sample(h, n, torch.Generator().manual_seed(0))
    assert (labels.num_samples, labels.outputs.dtype) == (n, torch.float64)
    delta = labels.project(torch.eye(T).double().expand(2, -1, -1))
    cov, M = family.covariance(h), family.outer_covariance(h)
    error = (cov.diagonal(0, 1, 2) / n).sqrt()
    assert (labels.mean_residual().abs() <= 5 * error).all()
    second = labels.mean(torch.einsum("bai,baj->baij", delta, delta))
    variance = torch.einsum("bijij->bij", M)
    assert ((second - cov).abs() <= 5 * (variance.clamp_min(0) / n).sqrt() + 1e-12).all()


@pytest.mark.parametrize("engine", ["layerwise", "functional"])
@pytest.mark.parametrize("wide", [0, 66])
@pytest.mark.parametrize("case", ["categorical", *OTHERS])
def test_i_alone_of_few_natural_outputs_comes_from_a_factor(case, wide, engine, monkeypatch):
    """It equals E_x I(x) from J."""
    family = Categorical() if case == "categorical" else OTHERS[case][0]
    if wide and case == "gaussian, known covariance":
        family = Gaussian(torch.eye(wide).double() + 0.5)
    T = wide or (OTHERS[case][1] if case in OTHERS else SMALL).shape[1]
    net, x = mlp([4, 3, T], nn.Tanh), inputs(5, 4, seed=2)
    exact = fimlib.fisher_information(fimlib.differentiate(net, x), family).mean_over_inputs()
    calls, columns = [], joint.columns_of_factor
    monkeypatch.setattr(joint, "columns_of_factor", lambda *args: calls.append(1) or columns(*args))
    found = fimlib.accumulate(net, x, family, quantities=["I"], engine=engine)
    assert bool(calls) == (family.is_natural and not wide)
    for name, value in exact.items():
        assert torch.allclose(found.fisher_information()[name], value, rtol=1e-12, atol=0)


@each_family
def test_equal_seeds_draw_equal_labels_of_every_family(case):
    family, h, _ = OTHERS[case]
    a, b, c = (family.sample(h, 50, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a.values, b.values)
    assert not torch.equal(a.values, c.values)
    assert not torch.equal(a.values[:, :1], a.values[:, 1:2])
    assert not torch.equal(a.values[0] - a.values[0, 0], a.values[1] - a.values[1, 0])
    torch.manual_seed(3)
    d = family.sample(h, 5)
    torch.manual_seed(3)
    assert torch.equal(d.values, family.sample(h, 5).values)
    assert torch.equal(d.weights, torch.full((2, 5), 0.2, dtype=torch.float64))


@each_family
def test_observed_labels_are_a_sample(case):
    """One and several labels per input, by a plain loop over them."""
    family, h, labels = OTHERS[case]
    D = inputs(2, h.shape[1] * 3, seed=2).view(2, h.shape[1], 3)
    picked = [[labels(one)[i][[0, 5 % len(labels(one)[0]), -1]] for one in h] for i in (0, 2)]
    y, t = (torch.stack(rows) for rows in picked)
    several = family.observed(h.float().double(), y)
    assert (several.num_samples, list(several.weights.shape)) == (3, [2, 3])
    single = family.observed(h, y[:, 0])
    assert (single.num_samples, list(single.weights.shape)) == (1, [2, 1])
    for b in range(2):
        delta = t[b] - family.mean(h)[b]
        expected = torch.stack([d @ D[b] for d in delta])
        projected = family.observed(h, y).project(D)[b]
        assert torch.allclose(projected, expected, atol=1e-11)
        assert torch.allclose(single.project(D)[b], expected[:1], atol=1e-11)
        mean = family.observed(h, y).mean_residual()[b]
        assert torch.allclose(mean, delta.mean(0), atol=1e-11)


def test_observed_classes_are_counted():
    h, y = inputs(2, 3), torch.tensor([[0, 2, 2, 2], [1, 1, 0, 2]])
    expected = torch.tensor([[0.25, 0, 0.75], [0.25, 0.5, 0.25]]).double()
    labels = Categorical().observed(h.float(), y.to(torch.uint8))
    assert torch.equal(labels.weights, expected)
    assert (labels.num_samples, labels.values) == (4, None)
    assert torch.equal(labels.outputs, h.float().double())
    single = Categorical().observed(h, y[:, 1])
    assert torch.equal(single.weights, torch.tensor([[0, 0, 1], [0, 1, 0]]).double())
    assert single.num_samples == 1


def test_as_many_labels_as_classes_are_no_one_hot_rows():
    """Unless all rows look so; two classes, or rows all alike, tell too little."""
    for y in (
        [[0, 1, 2], [0, 1, 0]], [[0, 1, 0], [0, 0, 0]], [[1, 1, 0], [0, 1, 0]],
        [[2, 0, 0], [0, 1, 0]], [[0, 1, 0]], [[0, 0, 1]] * 3,
    ):  # fmt: skip
        assert Categorical().observed(inputs(len(y), 3), y).num_samples == 3
    assert Categorical().observed(inputs(2, 2), [[0, 1], [1, 0]]).num_samples == 2
    assert Categorical().observed(inputs(2, 4), [[0, 1, 0], [0, 0, 1]]).num_samples == 3
    h = inputs(2, 3)
    with pytest.raises(ValueError, match="one-hot"):
        Categorical().observed(h, [[0, 1, 0], [0, 0, 1]])
    shares = torch.tensor([[2, 1, 0], [2, 1, 0]]).double() / 3  # the way out
    assert torch.equal(Categorical().expected(h, shares).weights, shares)


def test_expected_labels_are_the_distribution_itself():
    h = inputs(2, 3)
    q = torch.tensor([[0.2, 0.3, 0.5], [0, 1, 0]]).double()
    q = q / q.sum(1, keepdim=True)
    labels = Categorical().expected(h, q)
    assert torch.equal(labels.weights, q)
    assert (labels.num_samples, labels.values) == (0, None)
    assert torch.allclose(labels.mean_residual(), q - torch.softmax(h, 1), atol=1e-15)
    exact = Categorical().expected(h, torch.softmax(h, 1))
    J = inputs(2, 3, seed=2)
    assert torch.allclose(
        exact.mean(exact.project(J).square()), Categorical().information(h, J), rtol=1e-14
    )
    assert torch.equal(Categorical().expected(h, q * (1 + 9e-10)).weights, q * (1 + 9e-10))


@pytest.mark.parametrize(
    ("q", "message"),
    [
        ([[0.5, 0.5, 0.0]], r"logits' shape \[2, 3\], got \[1, 3\]"),
        ([[0.5, 0.5], [0.5, 0.5]], r"logits' shape \[2, 3\], got \[2, 2\]"),
        ([[0.5, 0.6, -0.1], [0.0, 1.0, 0.0]], "negative or NaN"),
        ([[0.5, float("nan"), 0.5], [0.0, 1.0, 0.0]], "negative or NaN"),
        ([[0.5, 0.5, 2e-9], [0.0, 1.0, 0.0]], "sum to 1 within 1e-9.*normalise them in float64"),
        ([[0.5, 0.5, 0.0], [0.3, 0.3, 0.3]], "sum to 1 within 1e-9"),
    ],
)
def test_bad_distributions_are_refused(q, message):
    with pytest.raises(ValueError, match=message):
        Categorical().expected(inputs(2, 3), torch.tensor(q, dtype=torch.float64))


@pytest.mark.parametrize(
    ("family", "y", "message"),
    [
        (Categorical(), torch.tensor([0.0, 1.0]), r"must be integers, got torch.float32.*long"),
        (Categorical(), torch.tensor([True, False]), "must be integers"),
        (Categorical(), torch.tensor([1j, 0]), "must be integers"),
        (Categorical(), torch.eye(4)[1:3].long(), r"looks one-hot: use y\.argmax\(1\).*expected"),
        (Categorical(), torch.eye(4)[1:3], r"use y\.argmax\(1\)"),
        (Categorical(), torch.eye(4)[1:3].bool(), r"use y\.int\(\)\.argmax\(1\)"),
        (Categorical(), torch.tensor([0, 4]), "between 0 and 3.*from 0 to 4"),
        (Categorical(), torch.tensor([-1, 3]), "between 0 and 3.*from -1 to 3"),
        (Categorical(), torch.tensor([0]), r"shape \[2\], or \[2, N\].*got \[1\]"),
        (Categorical(), torch.tensor(0), r"shape \[2\]"),
        (Categorical(), torch.zeros(2, 1, 1).long(), r"got \[2, 1, 1\]"),
        (Categorical(), torch.zeros(2, 0).long(), "N ≥ 1"),
        (Bernoulli(), torch.full((2, 4), 0.5), "Bernoulli labels must be 0 or 1.*Categorical"),
        (Bernoulli(), torch.full((2, 4), 2), "must be 0 or 1"),
        (Bernoulli(), torch.zeros(2), r"Bernoulli: .*shape \[2, 4\], or \[2, N, 4\].*got \[2\]"),
        (Bernoulli(), torch.zeros(2, 3), r"got \[2, 3\]"),
        (Bernoulli(), torch.zeros(3, 5, 4), r"got \[3, 5, 4\]"),
        (Bernoulli(), torch.zeros(2, 0, 4), "N ≥ 1"),
        (Poisson(), torch.full((2, 4), -1.0), "counts: integers ≥ 0"),
        (Poisson(), torch.full((2, 4), 1.5), "counts: integers ≥ 0"),
        (Gaussian(), torch.full((2, 4), float("nan")), "Gaussian: .*NaN"),
        (Gaussian(), torch.full((2, 4), float("inf")), "infinite"),
        (GaussianHead(), torch.zeros(2, 4), r"shape \[2, 2\], or \[2, N, 2\].*got \[2, 4\]"),
    ],
)
def test_labels_that_cannot_be_are_refused(family, y, message):
    with pytest.raises(ValueError, match=message):
        family.observed(inputs(2, 4), y)


@pytest.mark.parametrize(
    ("weights", "values", "message"),
    [
        (torch.full((3, 2), 0.5), None, r"shape \[3, 4\], got \[3, 2\]"),
        (torch.full((3, 2), 0.5), torch.zeros(3, 2, 3), r"\[3, 2, 4\].*got \[3, 2, 3\]"),
        (torch.full((3, 2), 0.5), torch.zeros(3, 1, 4), r"\[B, A, T\] = \[3, 2, 4\]"),
        (torch.tensor([[1.5, -0.5]] * 3), torch.zeros(3, 2, 4), "must not be negative"),
        (torch.full((3, 4), float("nan")), None, "sum to 1"),
    ],
)
def test_labels_whose_parts_do_not_fit_are_refused(weights, values, message):
    with pytest.raises(ValueError, match=message):
        Labels(Gaussian(), H, weights.double(), 2, values)


@pytest.mark.parametrize(
    ("covariance", "message"),
    [
        (torch.eye(3)[:2], r"\[T, T\], got \[2, 3\]"),
        (torch.ones(3), r"\[T, T\], got \[3\]; for variances v of the outputs.*torch.diag\(v\)"),
        (0.5, r"got \[\]; for a variance s² of every output pass s² \* torch.eye\(T\)"),
        (torch.tensor([[1.0, 0.1], [0.2, 1.0]]), "symmetric: give"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "positive definite"),
        (torch.zeros(2, 2), "positive definite"),
        (torch.tensor([[1.0, float("nan")], [float("nan"), 1.0]]), "NaN or infinite"),
    ],
)
def test_matrices_that_are_no_covariances_are_refused(covariance, message):
    with pytest.raises(ValueError, match=message):
        Gaussian(covariance)


@pytest.mark.parametrize(
    ("family", "h", "message"),
    [
        (Gaussian(torch.eye(3)), torch.zeros(2, 4), "covariance is 3×3.*has 4 outputs"),
        (GaussianHead(), torch.zeros(2, 3), "even number of outputs.*has 3"),
        (GaussianHead(), torch.zeros(2, 1), r"T ≥ 2"),
        (GaussianHead(), torch.tensor([[0.0, -176.0]]), "log s.*±176.*within ±175"),
        (Poisson(), torch.tensor([[0.0, 36.8]]), "log rate of 36.8 overflows.*larger unit"),
        (Poisson(), torch.tensor([[1000.0]]), "overflows"),
        (Bernoulli(), torch.zeros(2), r"Bernoulli needs .*\[B, T\] with T ≥ 1"),
    ],
)
def test_outputs_that_do_not_fit_the_other_families_are_refused(family, h, message):
    with pytest.raises(ValueError, match=message):
        family.sample(h, 1)


def test_extreme_outputs_that_do_fit():
    assert GaussianHead().natural(torch.tensor([[500.0, 175.0]])).tolist() == [[500, 175]]
    assert Poisson().natural(torch.tensor([[36.7]])).dtype == torch.float64
    assert Gaussian([[4.0]]).information(torch.zeros(1, 1), torch.ones(1, 1)).item() == 0.25
    assert Gaussian().natural(torch.zeros(2, 7)).shape == (2, 7)


def test_unbounded_statistics_have_no_residual_bound():
    for family in (Poisson(), Gaussian(), GaussianHead()):
        name = type(family).__name__
        with pytest.raises(ValueError, match=f"{name}: .*no upper bound.*Proposition 4.3"):
            family.residual_bound(SMALL)


@pytest.mark.parametrize("scale", [0.0, 1.0, 20.0])
def test_residual_bounds_are_the_largest_residuals(scale):
    h = scale * SMALL
    for family, labels in ((Categorical(), None), (Bernoulli(), reference.bernoulli)):
        for b, one in enumerate(h):
            t = torch.eye(4).double() if labels is None else labels(one)[2]
            largest = (t - family.mean(h)[b]).square().sum(1).max()
            assert torch.allclose(family.residual_bound(h)[b], largest, rtol=1e-13)


# λ_min and λ_max of M.


def value_at(family, h, u):
    """M(u,u,u,u) of unit directions u [R, T], by the dense tensor: [B, R]."""
    return torch.einsum("bijkl,ri,rj,rk,rl->br", family.outer_covariance(h), u, u, u, u)


@each_family
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_extremes_of_m_bound_every_direction(case, scale):
    """20,000 random directions; the maximum also against the same ascent from random starts."""
    family, h, _ = OTHERS[case]
    h = scale * h
    u = torch.nn.functional.normalize(inputs(20_000, h.shape[1], seed=6), dim=1)
    values = torch.cat([value_at(family, h, part) for part in u.split(2000)], dim=1)
    found = lambda_max(family, h)
    assert (family.outer_covariance_min(h)[:, None] <= values * (1 + 1e-12) + 1e-15).all()
    assert (values <= found[:, None] * (1 + 1e-12) + 1e-15).all()
    if h.shape[1] == 2:
        assert torch.allclose(values.amax(1), found, rtol=1e-6, atol=1e-15)  # nearly every angle
    starts = inputs(200, h.shape[1], seed=7)
    rival = lambda_max(with_starts(family, starts), h)
    assert (rival <= found * (1 + 1e-9) + 1e-15).all()
    assert (found <= lambda_max(family, h, method="certified") * (1 + 1e-12) + 1e-15).all()


def with_starts(family, starts):
    """The family, with other starts [R, T] of the search."""
    rival = copy.copy(family)
    rival.directions = lambda h: starts.expand(len(h), -1, -1)
    return rival


@pytest.mark.parametrize("seed", range(4))
def test_many_bernoulli_outputs_have_their_maximum_found(seed):
    """Several outputs share it where variances are large, one has it where they are small."""
    h = torch.tensor([[0.5], [1.0], [2.0], [4.0]]) * inputs(4, 5, seed=20 + seed)
    found = lambda_max(Bernoulli(), h)
    rival = lambda_max(with_starts(Bernoulli(), inputs(40, 5, seed=7)), h)
    assert (rival <= found * (1 + 1e-9)).all()


def test_one_output_has_its_extremes_exactly():
    h = torch.linspace(-3, 3, 8).double()[:, None]
    p, rate = torch.sigmoid(h), h.exp()
    for family, expected in (
        (Bernoulli(), p * (1 - p) * (1 - 2 * p) ** 2),
        (Poisson(), rate + 2 * rate**2),
    ):
        assert torch.allclose(family.outer_covariance_min(h), expected[:, 0], rtol=1e-12)
        assert torch.allclose(lambda_max(family, h), expected[:, 0], rtol=1e-12)


def test_extremes_with_closed_forms():
    """Poisson: the largest rate alone. Known Σ: 2λ(Σ⁻¹)². Head: 2 and 56."""
    rates = SMALL.exp().amax(1)
    assert torch.allclose(lambda_max(Poisson(), SMALL), rates + 2 * rates**2, rtol=1e-12)
    precise = torch.linalg.eigvalsh(COVARIANCE.inverse())
    family, h = Gaussian(COVARIANCE), SMALL[:, :3]
    for found, expected in (
        (family.outer_covariance_min(h), 2 * precise[0] ** 2),
        (lambda_max(family, h), 2 * precise[-1] ** 2),
        (GaussianHead().outer_covariance_min(SMALL), torch.tensor(2.0).double()),
        (lambda_max(GaussianHead(), SMALL), torch.tensor(56.0).double()),
    ):
        assert torch.allclose(found, expected.expand(2), rtol=1e-12)
    head = value_at(GaussianHead(), SMALL, torch.eye(4).double())
    assert torch.allclose(head, torch.tensor([[2.0, 2, 56, 56]]).double().expand(2, -1))


def test_the_lower_bound_on_lambda_min_is_zero_where_a_variance_is():
    h = torch.tensor([[0.0, 1.0, 2.0]]).double()
    assert Bernoulli().outer_covariance_min(h).item() == 0
    w = [v * (1 - 4 * v) for v in (p * (1 - p) for p in torch.sigmoid(h[0, 1:]).tolist())]
    expected = 1 / (1 / w[0] + 1 / w[1])
    assert Bernoulli().outer_covariance_min(h[:, 1:]).item() == pytest.approx(expected, rel=1e-12)


def test_bernoulli_variances_near_a_half_do_not_cancel():
    """One output dominates: 2I² + Σκ₄J⁴ has lost all its digits."""
    h = torch.tensor([[1e-6, 0.3]], dtype=torch.float64)
    J = torch.tensor([[1.0, 1e-9]], dtype=torch.float64)
    p = torch.sigmoid(h[0]).tolist()
    v = [q * (1 - q) for q in p]
    expected = v[0] * math.tanh(5e-7) ** 2 + 4 * v[0] * v[1] * 1e-18
    assert Bernoulli().variance1(h, J).item() == pytest.approx(expected, rel=1e-9, abs=0)


def test_saturated_bernoulli_outputs_keep_their_digits():
    v = Bernoulli().cumulants(torch.tensor([[40.0, -40.0]]))[0][0].tolist()
    assert v == pytest.approx([math.exp(-40)] * 2, rel=1e-12, abs=0)


def test_starts_are_single_outputs_and_the_most_variable_ones():
    h = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 4.0]], dtype=torch.float64)
    prefixes = [[[0, 1, 0], [0, 1, 1], [1, 1, 1]], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]]
    expected = torch.cat([torch.eye(3).expand(2, -1, -1), torch.tensor(prefixes)], 1).double()
    assert torch.equal(Bernoulli().directions(h), expected + 0.05)


@pytest.mark.parametrize("rest", [1e-3, 1e-6, 1e-12, 1e-300])
def test_covariance_keeps_its_digits_where_the_softmax_is_sure(rest):
    """Two classes: λ_max(𝓘) = 2σ₁σ₂, whose relative error σ − σ² would make 1e-16/σ₂."""
    h = logits_of([1.0, rest])
    p = torch.softmax(h, 1)[0].prod().item()
    cov = Categorical().covariance(h)[0]
    expected = p * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    assert ((cov - expected).abs() <= 1e-14 * p).all()
    assert torch.linalg.eigvalsh(cov)[1].item() == pytest.approx(2 * p, rel=1e-14, abs=0)


@pytest.mark.parametrize("margin", [20.0, 30.0, 37.0, 100.0])
def test_the_likeliest_label_keeps_its_digits(margin):
    """Its score is minus a small sum over the other classes, not a difference near 0."""
    h = torch.tensor([[0.0, margin, -1.0]], dtype=torch.float64)
    D = torch.tensor([[[0.3], [1.0], [-2.0]]], dtype=torch.float64)
    p = torch.softmax(h, 1)[0]
    expected = -(p[0] * (0.3 - 1.0) + p[2] * (-2.0 - 1.0))
    score = Categorical().project(h, D)[0, 1, 0]
    assert score.item() == pytest.approx(expected.item(), rel=1e-13, abs=0)
    yes = Bernoulli().observed(h[:, 1:2], torch.ones(1, 1))
    score = yes.project(torch.ones(1, 1, 1, dtype=torch.float64))[0, 0, 0]
    assert score.item() == pytest.approx(1 / (1 + math.exp(margin)), rel=1e-13, abs=0)


def test_moments_of_several_pairs_of_a_head():
    """Three pairs: halves, not thirds."""
    h = inputs(2, 6)
    mu, rho = h[:, :3], h[:, 3:]
    F = (mu.square() / (2 * torch.exp(2 * rho)) + rho).sum(1)
    assert torch.allclose(GaussianHead().log_partition(h), F, rtol=1e-13)
    y = inputs(2, 3, seed=5)
    noise = (y - mu) / torch.exp(rho)
    expected = torch.cat([noise, noise.square() - 1], 1)
    values = GaussianHead().observed(h, y).values[:, 0]
    assert torch.allclose(values, expected, rtol=1e-13)


@pytest.mark.parametrize("family", [Gaussian(), GaussianHead(), Gaussian(torch.eye(2).double())])
def test_gaussian_noise_is_drawn_in_double_precision(family):
    h = torch.zeros(1, 2, dtype=torch.float64)
    values = family.sample(h, 50, torch.Generator().manual_seed(0)).values
    assert values.dtype == torch.float64
    assert (values != values.float().double()).all()


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_symmetry_of_a_covariance_is_judged_by_its_size(size):
    nearly = torch.tensor([[2.0, 0.5 + 1e-12], [0.5, 1.0]], dtype=torch.float64)
    Gaussian(size * nearly)
    nearly[0, 1] += 1e-8
    with pytest.raises(ValueError, match="symmetric"):
        Gaussian(size * nearly)


def test_a_head_of_three_pairs_is_three_heads():
    """T = 6: halves are means and logarithms, every form adds up over the pairs but V₁'s."""
    head, h = GaussianHead(), inputs(2, 6) / 3
    J, S = inputs(2, 30, seed=2).view(2, 6, 5), inputs(2, 30, seed=3).view(2, 6, 5)
    pairs = [torch.tensor([k, k + 3]) for k in range(3)]
    for form in (
        lambda h, J, _: head.information(h, J),
        lambda h, _, S: head.variance2(h, S),
        head.covariance12,
    ):
        parts = sum(form(h[:, p], J[:, p], S[:, p]) for p in pairs)
        assert torch.allclose(form(h, J, S), parts, rtol=1e-13)
    a, b = J[:, :3], J[:, 3:]
    own = 48 * (a.square() * b.square() + b**4).sum(1)
    expected = 2 * head.information(h, J).square() + own
    assert torch.allclose(head.variance1(h, J), expected, rtol=1e-13)
    dense = torch.einsum("bijkl,bin,bjn,bkn,bln->bn", head.outer_covariance(h), J, J, J, J)
    assert torch.allclose(dense, expected, rtol=1e-12)
    assert torch.equal(
        head.covariance(h)[0].diagonal(), torch.tensor([1.0, 1, 1, 2, 2, 2]).double()
    )
    u = J.mT
    M_uu = torch.einsum("bijkl,bri,brj->brkl", head.outer_covariance(h), u, u)
    assert torch.allclose(head.outer_covariance_at(h, u), M_uu, atol=1e-12)
    for pair in pairs:
        alone = head.link(h[:, pair] + 0.1, at=h[:, pair])
        assert torch.allclose(head.link(h + 0.1, at=h)[:, pair], alone, rtol=1e-13)
    wide = h.clone()
    wide[0, 5] = 200.0
    with pytest.raises(ValueError, match="200"):
        head.natural(wide)


def test_the_chain_rule_keeps_the_layers():
    derivs = fimlib.differentiate(mlp([3, 4, 2], nn.Tanh), inputs(1, 3))
    natural = GaussianHead().natural_derivatives(derivs)
    assert [block.layer for block in natural.blocks] == [block.layer for block in derivs.blocks]
    assert [list(block.inputs) for block in natural.blocks] == [
        list(b.inputs) for b in derivs.blocks
    ]


def test_every_input_has_its_own_likeliest_label():
    h = torch.tensor([[0.0, 37.0, -1.0], [37.0, 0.0, -1.0]], dtype=torch.float64)
    D = torch.tensor([[[0.3], [1.0], [-2.0]]] * 2, dtype=torch.float64)
    together = Categorical().project(h, D)
    for b in range(2):
        assert torch.equal(together[b], Categorical().project(h[b : b + 1], D[b : b + 1])[0])


def test_residuals_of_counts_are_counts_less_rates():
    h, y = inputs(2, 3), torch.tensor([[0, 2, 5], [1, 1, 0]])
    residual = Poisson().observed(h, y).mean_residual()
    assert torch.allclose(residual, y - h.exp(), rtol=1e-14)


@pytest.mark.parametrize("probabilities", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_moments_at_once_are_the_moments_one_by_one(probabilities):
    h = logits_of(probabilities)
    generator = torch.Generator().manual_seed(0)
    J, S = (torch.randn(*h.shape, 6, generator=generator, dtype=torch.float64) for _ in "JS")
    family = fimlib.Categorical()
    found = family.moments(h)(J, S)
    expected = {
        "I": family.information(h, J),
        "V1": family.variance1(h, J),
        "V2": family.variance2(h, S),
        "C12": family.covariance12(h, J, S),
    }
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        scale = expected["I"].square() if key != "I" else expected["I"]
        assert ((found[key] - value).abs() <= 1e-10 * (value.abs() + 1e-3 * scale)).all(), key
    assert family.moments(h)(J).keys() == {"I", "V1"}
    assert family.moments(h, quantities=["I"])(J, S).keys() == {"I"}
    assert family.moments(h, quantities=["V2"])(J, S).keys() == {"I", "V2"}
    single = family.moments(h, dtype=torch.float32)(J.float(), S.float())
    assert all(value.dtype == torch.float32 for value in single.values())
    assert torch.allclose(single["I"].double(), expected["I"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_the_chain_rule_of_a_gaussian_head_is_that_of_its_link(shape):
    torch.manual_seed(0)
    h = 2 * torch.randn(3, 4, dtype=torch.float64)
    J, S = (torch.randn(3, 4, *shape, dtype=torch.float64) for _ in range(2))
    family = GaussianHead()
    for ours, right in zip(
        family._chain_rule(h, J, S), Family._chain_rule(family, h, J, S), strict=True
    ):
        torch.testing.assert_close(ours, right)
