import pytest
import reference
import torch
from hypothesis import given, settings
from strategies import ADVERSARIAL, inputs, logits, logits_of

from fimlib import Categorical, Gaussian, Labels

H = inputs(3, 4)
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
