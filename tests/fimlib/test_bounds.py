import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import ADVERSARIAL, inputs, logits, logits_of, mlp
from torch import nn

import fimlib
from fimlib import Categorical, Gaussian, differentiate
from fimlib.bounds import (
    corollary_4_2,
    corollary_b_3,
    corollary_q_1,
    lemma_b_2,
    off_diagonal,
    proposition_4_3,
    table_1,
    theorem_5_2,
    theorem_b_1,
)
from fimlib.derivatives import Block, Derivatives
from fimlib.families import Bernoulli, GaussianHead, Poisson
from fimlib.spectra import fourth_moment_spectrum
from fimlib.spectra.extreme import lambda_min_centred

ROUNDING = 1e-12  # relative to the upper bound: the two sides are summed in another order


def quantities(derivs, family, num_samples):
    return (
        fimlib.fisher_information(derivs, family),
        fimlib.variance_i1(derivs, family, num_samples=num_samples),
        fimlib.variance_i2(derivs, family, num_samples=num_samples),
    )


@pytest.mark.parametrize("method", ["multistart", "certified"])
@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.LogSigmoid, nn.ReLU])
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_theorem_4_1_at_every_parameter(method, activation, scale):
    net = mlp([3, 6, 5, 4], activation, scale=scale)
    derivs, family = differentiate(net, inputs(5, 3)), Categorical()
    lam = fimlib.spectrum(family, derivs.outputs, method=method)
    bounds = fimlib.theorem_4_1(derivs, family, num_samples=3, eigenvalues=lam)
    for value, (lower, upper) in zip(quantities(derivs, family, 3), bounds, strict=True):
        for name in value:
            slack = ROUNDING * upper[name] + 1e-300
            assert (lower[name] <= value[name] + slack).all()
            assert (value[name] <= upper[name] + slack).all()
        layers = value.layer_means(), upper.layer_means()
        assert all((layers[0][k] <= layers[1][k] * (1 + ROUNDING)).all() for k in layers[0])


@settings(deadline=None, max_examples=60)
@given(logits(max_classes=10))
def test_theorem_4_1_for_adversarial_derivatives(h):
    """Derivatives along the worst directions: eigenvectors, single classes, pairs, random."""
    family, num_classes = Categorical(), h.shape[1]
    eye = torch.eye(num_classes, dtype=torch.float64)
    vectors = torch.linalg.eigh(family.covariance(h)[0]).eigenvectors
    random = inputs(num_classes, 50)
    D = torch.cat([eye, vectors, family.directions(h)[0].T, random], dim=1)[None]
    derivs = Derivatives(h, (Block("layer", D, D, {"p": None}),))
    bounds = fimlib.theorem_4_1(derivs, family)
    for value, (lower, upper) in zip(quantities(derivs, family, 1), bounds, strict=True):
        assert (lower["p"] - 1e-15 <= value["p"]).all()
        assert (value["p"] <= upper["p"] * (1 + 1e-10) + 1e-15).all()


def test_gaussian_bounds_are_equalities():
    """Proposition 5.1: I = ‖J‖², V₁ = 2‖J‖⁴/N = 2I²/N, V₂ = ‖S‖²/N, each equal to both bounds."""
    derivs = differentiate(mlp([3, 5, 4], nn.Tanh), inputs(2, 3))
    bounds = fimlib.theorem_4_1(derivs, Gaussian(), num_samples=5)
    I, V1, V2 = quantities(derivs, Gaussian(), 5)
    for name in I:
        J, S = derivs.jacobian(name), derivs.second(name)
        assert torch.allclose(I[name], J.square().sum(1), rtol=1e-12)
        assert torch.allclose(V1[name], 2 * I[name].square() / 5, rtol=1e-12)
        assert torch.allclose(V2[name], S.square().sum(1) / 5, rtol=1e-12)
    for value, interval in zip((I, V1, V2), bounds, strict=True):
        for name in value:
            assert torch.allclose(interval.lower[name], value[name], rtol=1e-10)
            assert torch.allclose(interval.upper[name], value[name], rtol=1e-10)


def test_upper_bounds_are_reached():
    """J along the top eigenvectors: the bounds cannot be made smaller."""
    h, family = inputs(1, 4), Categorical()
    top = torch.linalg.eigh(family.covariance(h)[0]).eigenvectors[:, -1:]
    derivs = Derivatives(h, (Block("layer", top[None], top[None], {"p": None}),))
    bounds = fimlib.theorem_4_1(derivs, family)
    I, _, V2 = quantities(derivs, family, 1)
    assert I["p"].item() == pytest.approx(bounds.fisher.upper["p"].item(), rel=1e-12)
    assert V2["p"].item() == pytest.approx(bounds.variance_i2.upper["p"].item(), rel=1e-12)


def test_the_given_eigenvalues_are_used():
    derivs, family = differentiate(mlp([3, 5, 4], nn.Tanh), inputs(2, 3)), Categorical()
    lam = fimlib.spectrum(family, derivs.outputs)
    doubled = fimlib.Spectrum(*(2 * eigenvalue for eigenvalue in lam))
    once = fimlib.theorem_4_1(derivs, family, eigenvalues=lam)
    twice = fimlib.theorem_4_1(derivs, family, eigenvalues=doubled)
    for a, b in zip(once, twice, strict=True):
        for name in a.upper:
            assert torch.allclose(2 * a.upper[name], b.upper[name], rtol=1e-14)
            assert torch.allclose(2 * a.lower[name], b.lower[name], rtol=1e-14)
    one_input = fimlib.spectrum(family, derivs.outputs[:1])
    with pytest.raises(ValueError, match="belong to 1 inputs, the derivatives to 2"):
        fimlib.theorem_4_1(derivs, family, eigenvalues=one_input)


def test_bounds_of_a_float32_network_are_those_of_its_float64_twin():
    net, x = mlp([3, 5, 4], nn.Tanh), inputs(2, 3).float().double()
    for parameter in net.parameters():
        parameter.data = parameter.data.float().double()
    exact = fimlib.theorem_4_1(differentiate(net, x), Categorical())
    rough = fimlib.theorem_4_1(differentiate(net.float(), x.float()), Categorical())
    for a, b in zip(exact, rough, strict=True):
        for name in a.upper:
            assert b.upper[name].dtype == torch.float64
            assert torch.allclose(a.upper[name], b.upper[name], rtol=1e-4)


def test_bad_number_of_samples():
    derivs = differentiate(mlp([3, 2], nn.Tanh), inputs(1, 3))
    with pytest.raises(ValueError, match="num_samples"):
        fimlib.theorem_4_1(derivs, Categorical(), num_samples=0)


def by_hand(h, J, S):
    """Derivatives of n parameters, [B, T, n] each, that no network needs to have."""
    return Derivatives(h, (Block("layer", J, S, {"p": None}),))


def test_theorem_4_1_counts_in_natural_parameters():
    """A Gaussian head, whose outputs are not its natural parameters; one value by hand.

    One pair with μ' = 3, ρ' = 2 at s = e: J = (3/e, 2), λ(𝓘) = 1, 2 and λ(M) = 2, 56.
    """
    h = torch.tensor([[0.5, 1.0]], dtype=torch.float64)
    first = torch.tensor([[[3.0], [2.0]]], dtype=torch.float64)
    derivs, family = by_hand(h, first, 0 * first), GaussianHead()
    bounds = fimlib.theorem_4_1(derivs, family, num_samples=4)
    e = torch.e
    norm = 9 / e**2 + 4
    S = (24 / e) ** 2 + 64  # S' = (−4ab, −2b²) with a = 3/e, b = 2
    expected = [(norm, 2 * norm), (norm**2 / 2, 14 * norm**2), (S / 4, S / 2)]
    for (lower, upper), (low, high) in zip(bounds, expected, strict=True):
        assert lower["p"].item() == pytest.approx(low, rel=1e-9)
        assert upper["p"].item() == pytest.approx(high, rel=1e-9)
    for value, (lower, upper) in zip(quantities(derivs, family, 4), bounds, strict=True):
        assert lower["p"] <= value["p"] <= upper["p"]


# Finding 1: what the softmax does not see.


@settings(deadline=None, max_examples=30)
@given(logits(max_classes=10))
def test_centred_bounds_hold_and_are_no_worse(h):
    J, S = inputs(h.shape[1], 40, seed=2)[None], inputs(h.shape[1], 40, seed=3)[None]
    derivs, family = by_hand(h, J + 3, S - 2), Categorical()
    plain = fimlib.theorem_4_1(derivs, family, num_samples=2)
    centred = fimlib.theorem_4_1(derivs, family, num_samples=2, centred=True)
    values = quantities(derivs, family, 2)
    for value, before, after in zip(values, plain, centred, strict=True):
        size = ROUNDING * before.upper["p"] + 1e-13  # V₁ and its bound are 0 for σ = (½, ½)
        assert (after.lower["p"] <= value["p"] + size).all()
        assert (value["p"] <= after.upper["p"] * (1 + 1e-10) + size).all()
        assert (after.upper["p"] <= before.upper["p"] + size).all()
        assert (after.lower["p"] >= before.lower["p"] - size).all()


def test_centred_bounds_by_hand():
    """C = 2: PJ = ±(J₁ − J₂)/2, both λ(𝓘) on 1^⊥ are 2σ₁σ₂, so I and V₂ are bounded exactly."""
    h = torch.tensor([[0.3, -0.4]], dtype=torch.float64)
    J = torch.tensor([[[5.0], [2.0]]], dtype=torch.float64)
    S = torch.tensor([[[1.0], [3.0]]], dtype=torch.float64)
    v = torch.sigmoid(torch.tensor(0.7, dtype=torch.float64)).item()
    v *= 1 - v
    fisher, variance_i1, variance_i2 = fimlib.theorem_4_1(
        by_hand(h, J, S), Categorical(), num_samples=2, centred=True
    )
    assert fisher.lower["p"].item() == pytest.approx(9 * v, rel=1e-12)
    assert fisher.upper["p"].item() == pytest.approx(9 * v, rel=1e-12)
    assert variance_i1.lower["p"].item() == 0
    assert variance_i1.upper["p"].item() == pytest.approx(81 / 2 * v * (1 - 4 * v), rel=1e-12)
    assert variance_i2.lower["p"].item() == pytest.approx(2 * v, rel=1e-12)
    assert variance_i2.upper["p"].item() == pytest.approx(2 * v, rel=1e-12)


def test_centring_needs_a_family_that_does_not_see_shifts():
    derivs = differentiate(mlp([3, 5, 4], nn.Tanh), inputs(2, 3))
    for family in (Gaussian(), Bernoulli(), GaussianHead()):
        with pytest.raises(ValueError, match="sees a common shift"):
            fimlib.theorem_4_1(derivs, family, centred=True)
    lam = fimlib.spectrum(Categorical(), derivs.outputs)
    given_ = fimlib.theorem_4_1(derivs, Categorical(), eigenvalues=lam, centred=True)
    found = fimlib.theorem_4_1(derivs, Categorical(), centred=True)
    for a, b in zip(given_, found, strict=True):
        assert all(torch.equal(a.lower[name], b.lower[name]) for name in a.lower)
    assert all((found.fisher.lower[name] > 0).any() for name in found.fisher.lower)


def test_v1_of_a_half_and_half_split_is_zero():
    """A set of classes of mass ½: no positive lower bound of V₁ exists, centred or not."""
    h, J = torch.zeros(1, 4), torch.tensor([1.0, 1.0, -1.0, -1.0]).double()[None, :, None]
    assert Categorical().variance1(h, J).item() == 0
    assert Categorical().information(h, J).item() == pytest.approx(1)


# Corollary 4.2, Proposition 4.3, Theorem 5.2, Corollary Q.1, Table 1.


@settings(deadline=None, max_examples=25)
@given(logits(max_classes=6))
def test_chain_of_eigenvalue_bounds(h):
    """λ_max(M) ≤ (15) ≤ λ_max(𝓚) ≤ (16), (36), and Theorem 5.2; finding 2: (14) is negative."""
    family = Categorical()
    lam, sigma = fimlib.spectrum(family, h), torch.softmax(h, 1)
    slack = 1e-14 + 1e-9 * lam.max_cov
    lower, upper = corollary_4_2(family, h)
    assert (lower < 0).all()
    assert torch.allclose(lower, -lam.max_cov.square(), rtol=1e-9)
    assert (lam.max_outer <= upper + slack).all()
    largest = upper + lam.min_cov.square()
    assert (upper <= largest + slack).all()
    assert (largest <= proposition_4_3(family, h) + slack).all()
    assert (largest <= corollary_q_1(sigma) + slack).all()
    max_cov, max_outer = theorem_5_2(sigma)
    assert (lam.max_cov <= max_cov + slack).all()
    assert (lam.max_outer <= max_outer + slack).all()
    assert (corollary_q_1(sigma) <= 2 * max_cov + slack).all()


@pytest.mark.parametrize("probabilities", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_theorem_5_2_of_adversarial_softmax(probabilities):
    sigma = torch.tensor(probabilities, dtype=torch.float64)[None]
    sigma = sigma / sigma.sum()
    max_cov, max_outer = theorem_5_2(sigma)
    exact = fimlib.spectrum(Categorical(), sigma.log(), method="certified")
    # λ_max(𝓘) of the dense matrix has an absolute error of 1e-16, its entries being differences.
    assert exact.max_cov.item() <= max_cov.item() + 1e-15
    assert exact.max_outer.item() <= max_outer.item() * (1 + 1e-9) + 1e-30
    assert max_outer.item() == 2 * max_cov.item()


def test_theorem_5_2_by_hand():
    """Uniform: min{1/4, 3/4}; confident: 1 − ‖σ‖² = 2ε(1 − ε)(…) to the last digits."""
    sigma = torch.tensor([[0.25] * 4, [0.7, 0.3, 0, 0], [0.9, 0.1, 0, 0]], dtype=torch.float64)
    max_cov, max_outer = theorem_5_2(sigma)
    assert max_cov.tolist() == pytest.approx([0.25, 0.42, 0.18], rel=1e-14)
    assert max_outer.tolist() == pytest.approx([0.5, 0.84, 0.36], rel=1e-14)
    assert theorem_5_2(sigma[:1].float()).max_cov.dtype == torch.float64


@pytest.mark.parametrize("epsilon", [1e-3, 1e-6, 1e-9, 1e-12, 1e-20])
def test_bounds_of_confident_softmax_keep_their_digits(epsilon):
    """C = 2: 1 − ‖σ‖² = λ_max(𝓘) = 2ε(1 − ε)."""
    sigma = torch.tensor([[1 - epsilon, epsilon]], dtype=torch.float64)
    exact = 2 * epsilon * (1 - epsilon)
    assert theorem_5_2(sigma).max_cov.item() == pytest.approx(exact, rel=1e-10, abs=0)
    assert theorem_5_2(sigma).max_outer.item() == pytest.approx(2 * exact, rel=1e-10, abs=0)
    assert corollary_q_1(sigma).item() == pytest.approx(2 * exact, rel=1e-10, abs=0)
    three = torch.tensor([[1 - epsilon, epsilon / 2, epsilon / 2]], dtype=torch.float64)
    expected = 2 * epsilon - 1.5 * epsilon**2
    assert theorem_5_2(three).max_cov.item() == pytest.approx(expected, rel=1e-10, abs=0)
    assert corollary_q_1(three).item() == pytest.approx(
        2 * (1.5 * epsilon * (1 - epsilon)), rel=1e-10, abs=0
    )


def test_closed_forms_of_two_classes():
    """σ = (p, 1 − p), v = p(1 − p): λ(𝓘) = 0, 2v; λ_max(𝓚) = 4v(1 − 3v), λ_max(M) = 4v(1 − 4v)."""
    p = torch.tensor([0.1, 0.3, 0.5], dtype=torch.float64)
    v, sigma = p * (1 - p), torch.stack([p, 1 - p], dim=1)
    h, family = sigma.log(), Categorical()
    lower, upper = corollary_4_2(family, h)
    assert torch.allclose(lower, -4 * v.square(), rtol=1e-12)
    assert torch.allclose(upper, 4 * v * (1 - 3 * v), rtol=1e-12)
    assert torch.allclose(corollary_q_1(sigma), 4 * v, rtol=1e-12)
    residual = 2 * torch.maximum(p, 1 - p).square()  # of the less likely label
    assert torch.allclose(proposition_4_3(family, h), residual * 2 * v, rtol=1e-12)
    assert torch.allclose(theorem_5_2(sigma).max_cov, torch.minimum(1 - p, 2 * v), rtol=1e-12)
    lam = fimlib.spectrum(family, h)
    assert torch.allclose(lam.max_cov, 2 * v, rtol=1e-12)
    assert torch.allclose(lam.max_outer, 4 * v * (1 - 4 * v), rtol=1e-12, atol=1e-16)
    assert torch.allclose(lambda_min_centred(family, h), 2 * v, rtol=1e-12)


@pytest.mark.parametrize("num_classes", [3, 4, 7])
def test_closed_forms_of_uniform_softmax(num_classes):
    """λ_max(𝓘) = 1/C and λ_max(M) = (1 − 2/C)²/(C − 1), at u ∝ e₁ − 1/C, as is λ_max(𝓚)."""
    c, h, family = num_classes, torch.zeros(1, num_classes), Categorical()
    lam = fimlib.spectrum(family, h)
    assert lam.max_cov.item() == pytest.approx(1 / c, rel=1e-12)
    assert lam.max_outer.item() == pytest.approx((1 - 2 / c) ** 2 / (c - 1), rel=1e-10)
    lower, upper = corollary_4_2(family, h)
    assert lower.item() == pytest.approx(-1 / c**2, rel=1e-12)
    assert upper.item() == pytest.approx((1 - 2 / c) ** 2 / (c - 1) + 1 / c**2, rel=1e-9)
    assert proposition_4_3(family, h).item() == pytest.approx((1 - 1 / c) / c, rel=1e-12)


def test_corollary_4_2_of_gaussians():
    """3 − 1 = 2 on both sides: equalities where 𝓘 = identity; for diag(1, ½) 3·1 − ¼, 3·¼ − 1."""
    lower, upper = corollary_4_2(Gaussian(), inputs(2, 3))
    assert lower.tolist() + upper.tolist() == [pytest.approx(2, rel=1e-12)] * 4
    family = Gaussian(torch.diag(torch.tensor([1.0, 2.0])))
    lower, upper = corollary_4_2(family, inputs(1, 2))
    assert (lower.item(), upper.item()) == pytest.approx((0.75 - 1, 3 - 0.25), rel=1e-9)


@pytest.mark.parametrize("family", [Bernoulli(), Poisson(), GaussianHead()])
def test_corollary_4_2_of_other_families(family):
    h = inputs(3, 4)
    lower, upper = corollary_4_2(family, h)
    u = torch.nn.functional.normalize(inputs(4, 5000, seed=4), dim=0).expand(3, -1, -1)
    values = family.variance1(h, u)
    assert (lower <= values.amin(1) * (1 + 1e-9)).all()
    assert (values.amax(1) <= fimlib.lambda_max(family, h) * (1 + 1e-9)).all()
    assert (fimlib.lambda_max(family, h) <= upper * (1 + 1e-9)).all()


def test_proposition_4_3_needs_bounded_statistics():
    h = inputs(2, 3)
    found = proposition_4_3(Bernoulli(), h)
    p = torch.sigmoid(h)
    expected = torch.maximum(p, 1 - p).square().sum(1) * (p * (1 - p)).amax(1)
    assert torch.allclose(found, expected, rtol=1e-12)
    assert (fourth_moment_spectrum(Bernoulli(), h)[1] <= found).all()
    with pytest.raises(ValueError, match="Proposition 4.3 does not apply"):
        proposition_4_3(Gaussian(), h)


def test_table_1():
    h = inputs(2, 3)
    assert [v.tolist() for v in table_1(Gaussian(), h)] == [[1, 1], [2, 2]]
    scaled = table_1(Gaussian(torch.diag(torch.tensor([0.5, 1.0, 4.0]))), h)
    assert [v.tolist() for v in scaled] == [pytest.approx([2, 2]), pytest.approx([8, 8])]
    for ours, theirs in zip(
        table_1(Categorical(), h), theorem_5_2(torch.softmax(h, 1)), strict=True
    ):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="covers Gaussian and Categorical, not Poisson"):
        table_1(Poisson(), h)


@pytest.mark.parametrize("bound", [theorem_5_2, corollary_q_1])
def test_bad_probabilities(bound):
    good = [0.5, 0.25, 0.25]
    cases = [
        (torch.tensor(good), r"must be \[B, C\] with C ≥ 2.*got \[3\].*sigma\[None\]"),
        (torch.ones(1, 1), r"got \[1, 1\]"),
        (torch.tensor([good, [1.5, -0.5, 0]]), "negative or NaN"),
        (torch.tensor([good, [torch.nan, 0.5, 0.5]]), "negative or NaN"),
        (torch.tensor([good, [0.5, 0.25, 0.25 + 1e-7]]).double(), r"must sum to 1 within 1e-9"),
        (
            torch.tensor([[0.5, 0.25, 0.25 - 2e-9]], dtype=torch.float64),
            r"torch.softmax\(h.double\(\), dim=1",
        ),
    ]
    for sigma, message in cases:
        with pytest.raises(ValueError, match=message):
            bound(sigma)
    assert torch.isfinite(
        theorem_5_2(torch.tensor([[0.5, 0.5 - 5e-10]], dtype=torch.float64)).max_cov
    )


# Appendix B: pairs of parameters.


def enumerated_off_diagonal(J_i, J_j, S_ij, sigma, num_samples):
    """One pair at one input of a softmax, by its labels: [C] each, and the mean and variances."""
    products, seconds = [], []
    for y in range(len(sigma)):
        delta = -sigma.clone()
        delta[y] += 1
        products.append((J_i @ delta) * (J_j @ delta))
        seconds.append(-(S_ij @ delta))
    mean = sum(p * x for p, x in zip(sigma, products, strict=True))
    v1 = sum(p * (x - mean) ** 2 for p, x in zip(sigma, products, strict=True))
    v2 = sum(p * x**2 for p, x in zip(sigma, seconds, strict=True))
    return mean, v1 / num_samples, v2 / num_samples


@settings(deadline=None, max_examples=25)
@given(logits(max_classes=8), st.integers(0, 1000))
def test_off_diagonal_values_and_bounds(h, seed):
    num_classes, family = h.shape[1], Categorical()
    J_i, J_j, S_ij = (inputs(num_classes, 12, seed=seed + k)[None] for k in range(3))
    J_j[..., :3], J_i[..., 3:6] = J_i[..., :3], family.directions(h).mT[..., :1]
    values = off_diagonal(J_i, J_j, S_ij, family, h, num_samples=3)
    bounds = theorem_b_1(J_i, J_j, S_ij, family, h, num_samples=3)
    sigma = torch.softmax(h[0], 0)
    for n in range(12):
        expected = enumerated_off_diagonal(*(D[0, :, n] for D in (J_i, J_j, S_ij)), sigma, 3)
        for value, bound, exact in zip(values, bounds, expected, strict=True):
            size = bound[0, n].item()
            assert value[0, n].item() == pytest.approx(exact.item(), abs=1e-12 * size + 1e-14)
            assert abs(exact.item()) <= size * (1 + 1e-10) + 1e-15
    assert torch.equal(bounds.fisher, corollary_b_3(J_i, J_j, family, h))


def test_equal_parameters_give_the_diagonal():
    h, family = inputs(2, 4), Bernoulli()
    J, S = inputs(4, 5).expand(2, -1, -1), inputs(4, 5, seed=3).expand(2, -1, -1)
    values = off_diagonal(J, J, S, family, h, num_samples=7)
    derivs = by_hand(h, J, S)
    for value, exact in zip(values, quantities(derivs, family, 7), strict=True):
        assert torch.allclose(value, exact["p"], rtol=1e-10)
    upper = fimlib.theorem_4_1(derivs, family, num_samples=7)
    for bound, interval in zip(theorem_b_1(J, J, S, family, h, num_samples=7), upper, strict=True):
        assert torch.allclose(bound, interval.upper["p"], rtol=1e-12)


def test_off_diagonal_of_a_gaussian_by_hand():
    """Var((u·δ)(v·δ)) = ‖u‖²‖v‖² + (u·v)²; finding 7: never below 1."""
    u = torch.tensor([1.0, 0.0], dtype=torch.float64)[None, :, None]
    v = torch.tensor([0.6, 0.8], dtype=torch.float64)[None, :, None]
    h = torch.zeros(1, 2)
    I, v1, v2 = off_diagonal(u, v, 2 * u, Gaussian(), h)
    assert (I.item(), v1.item(), v2.item()) == pytest.approx((0.6, 1.36, 4), rel=1e-14)
    I, v1, v2 = theorem_b_1(u, 3 * v, 2 * u, Gaussian(), h, num_samples=2)
    assert (I.item(), v1.item(), v2.item()) == pytest.approx((3, 9, 2), rel=1e-12)
    angles = torch.linspace(0, torch.pi, 181, dtype=torch.float64)
    around = torch.stack([angles.cos(), angles.sin()])[None]
    v1 = off_diagonal(u.expand(-1, -1, 181), around, 0 * around, Gaussian(), h).variance_i1
    assert v1.min().item() == pytest.approx(1, rel=1e-12)
    assert v1.argmin().item() == 90


def test_v1_off_the_diagonal_can_exceed_that_of_squares():
    """Two fair coins: (u·δ)² is constant for u = e₁ or e₂, their product is not.

    So M(u,u,v,v), a covariance of squares, is 0 there and no bound for that pair; only its
    supremum over all u and v is one, being λ_max(M) as well.
    """
    e = torch.eye(2, dtype=torch.float64)[None]
    u, v = e[..., :1], e[..., 1:]
    h, family = torch.zeros(1, 2), Bernoulli()
    assert family.variance1(h, e).tolist() == [[0, 0]]
    M = family.outer_covariance(h)[0]
    assert torch.einsum("abcd,a,b,c,d->", M, *[u[0, :, 0]] * 2, *[v[0, :, 0]] * 2).item() == 0
    value = off_diagonal(u, v, 0 * u, family, h).variance_i1.item()
    assert value == pytest.approx(1 / 16, rel=1e-12)
    bound = theorem_b_1(u, v, 0 * u, family, h).variance_i1.item()
    assert bound == pytest.approx(1 / 16, rel=1e-9)


def test_theorem_b_1_takes_a_method():
    h = logits_of(ADVERSARIAL["two near half, C=10"])
    J = torch.nn.functional.normalize(inputs(10, 3), dim=0)[None]
    loose = theorem_b_1(J, J, J, Categorical(), h, method="certified").variance_i1
    expected = fimlib.lambda_max(Categorical(), h, method="certified")
    assert torch.allclose(loose, expected.expand(1, 3), rtol=1e-12)
    tight = theorem_b_1(J, J, J, Categorical(), h).variance_i1
    assert (tight < 0.51 * loose).all()


def test_bad_pairs():
    J, h = inputs(4, 2)[None], inputs(1, 4)
    for bad in (J[0], J[:, :3], J[..., :1], J.expand(2, -1, -1)):
        for bound in (theorem_b_1, off_diagonal):
            with pytest.raises(ValueError, match=r"must have the shape \[1, 4\] \+ \[n\], all"):
                bound(J, J, bad, Categorical(), h)
        with pytest.raises(ValueError, match="derivatives of n pairs"):
            corollary_b_3(J, bad, Categorical(), h)
    with pytest.raises(ValueError, match="derivatives of n pairs"):
        corollary_b_3(J[:, :3], J[:, :3], Categorical(), h)
    for bound in (theorem_b_1, off_diagonal):
        with pytest.raises(ValueError, match="num_samples"):
            bound(J, J, J, Categorical(), h, num_samples=0)
    single = off_diagonal(J.float(), J.float(), J.float(), Categorical(), h)
    assert single.fisher.dtype == torch.float64


def test_lemma_b_2():
    """Sup uᵀAv: the singular vectors reach it, 5,000 random pairs stay below; any shape."""
    A = inputs(3, 5)
    top = lemma_b_2(A).item()
    left, _, right = torch.linalg.svd(A)
    assert top == pytest.approx((left[:, 0] @ A @ right[0]).item(), rel=1e-12)
    u = torch.nn.functional.normalize(inputs(5000, 3, seed=5), dim=1)
    v = torch.nn.functional.normalize(inputs(5000, 5, seed=6), dim=1)
    reached = ((u @ A) * v).sum(1).abs().max().item()
    assert 0.9 * top < reached <= top
    assert lemma_b_2(torch.stack([A, 2 * A]).float()).tolist() == pytest.approx([top, 2 * top])
    for bad in (torch.ones(3), A * torch.nan):
        with pytest.raises(ValueError, match="finite matrix"):
            lemma_b_2(bad)
