import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from strategies import ADVERSARIAL, inputs, logits, logits_of

from fimlib import Categorical, Gaussian, lambda_max, spectrum
from fimlib.families import Bernoulli, GaussianHead, Poisson
from fimlib.spectra import fourth_moment_spectrum, shifted_power_method
from fimlib.spectra.extreme import METHODS, lambda_min_centred
from fimlib.spectra.search import minimize
from fimlib.spectra.sos import symmetric_pairs

FAMILY = Categorical()


def directions_value(h, u):
    """M(u,u,u,u) = Var_σ((u·δ)²) along rows of u, straight from its definition."""
    sigma = torch.softmax(h[0], 0)
    squares = (u - (u @ sigma)[:, None]).square()
    return (squares.square() @ sigma) - (squares @ sigma).square()


@settings(deadline=None, max_examples=100)
@given(logits())
def test_multistart_lies_between_certified_bounds_and_above_any_direction(h):
    sigma, num_classes = torch.softmax(h[0], 0), h.shape[1]
    found, upper = lambda_max(FAMILY, h).item(), lambda_max(FAMILY, h, method="certified").item()
    spread = (1 - sigma.square().sum()).item()
    rounding = 1e-15 + 1e-10 * upper
    lower = (num_classes / (num_classes - 1)) ** 2 * sigma * (1 - sigma) * (1 - 2 * sigma) ** 2
    assert lower.max().item() - rounding <= found <= upper + rounding
    assert upper <= 2 * min(sigma.max().item(), spread) + rounding  # Theorem 5.2
    u = torch.nn.functional.normalize(inputs(2000, num_classes), dim=1)
    assert directions_value(h, u).max().item() <= found + rounding


@pytest.mark.parametrize("num_classes", [3, 4, 5, 10, 20])
def test_uniform_softmax_has_a_closed_form(num_classes):
    found = lambda_max(FAMILY, torch.zeros(1, num_classes)).item()
    assert found == pytest.approx((1 - 2 / num_classes) ** 2 / (num_classes - 1), rel=1e-10)


@pytest.mark.parametrize("noise", [0.0, 1e-5, 1e-4, 1e-2, 1.0])
def test_three_classes_against_every_direction(noise):
    """Nearly uniform probabilities have a flat maximum, where plain ascents stop short of it."""
    h = noise * inputs(1, 3, seed=5)
    angle = torch.linspace(0, torch.pi, 100_001, dtype=torch.float64)[:, None]
    basis = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0]], dtype=torch.float64)
    basis = torch.nn.functional.normalize(basis, dim=1)
    on_grid = directions_value(h, angle.cos() * basis[0] + angle.sin() * basis[1]).max().item()
    assert lambda_max(FAMILY, h).item() == pytest.approx(on_grid, rel=1e-9)
    assert lambda_max(FAMILY, h).item() >= on_grid * (1 - 1e-13)


@pytest.mark.long
def test_pairs_of_classes_are_needed_among_the_starts():
    """From single classes alone the ascent misses the maximum here, by 7e-4."""

    class Singles(Categorical):
        def directions(self, h):
            return super().directions(h)[:, : h.shape[1]]

    h = logits_of([0.5098156487818316, 0.4599938260263043, *[0.005031754198684074] * 6])
    found = lambda_max(FAMILY, h).item()
    assert lambda_max(Singles(), h).item() < found * (1 - 5e-4)
    assert minimize(FAMILY, h, num_starts=40).item() == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_no_random_start_climbs_higher(seed, scale):
    """The deterministic starts against 300 random ones, by the same ascent."""
    generator = torch.Generator().manual_seed(seed)
    h = scale * torch.randn(1, 10, generator=generator, dtype=torch.float64)

    class RandomStarts(Categorical):
        def directions(self, h):
            return torch.randn(1, 300, h.shape[1], generator=generator, dtype=torch.float64)

    rival = lambda_max(RandomStarts(), h).item()
    assert rival <= lambda_max(FAMILY, h).item() * (1 + 1e-9)


@pytest.mark.long
def test_one_local_optimisation_can_make_the_upper_bound_false():
    """Finding: a single random start ends in a local maximum, even below the V₁ of real weights.

    The weight is one of a last layer: J = z e_k, so V₁ = z⁴ Var((e_k·δ)²) and ‖J‖ = |z|.
    """
    h = 0.5 * inputs(1, 10, seed=3)
    real = FAMILY.variance1(h, torch.eye(10, dtype=torch.float64)[None])[0]  # all ‖J‖ = 1
    single = [minimize(FAMILY, h, num_starts=1, seed=s).item() for s in range(12)]
    ours = lambda_max(FAMILY, h).item()
    assert min(single) < 0.999 * real.max().item()  # a false upper bound
    assert real.max().item() <= ours * (1 + 1e-12)
    many = minimize(FAMILY, h, num_starts=60).item()
    assert many == pytest.approx(ours, rel=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("probabilities", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_spectrum_of_adversarial_softmax(probabilities):
    h = logits_of(probabilities)
    lam = spectrum(FAMILY, h)
    dense = np.linalg.eigvalsh(FAMILY.covariance(h)[0].numpy())
    assert lam.max_cov.item() == pytest.approx(dense[-1], rel=1e-12)
    assert lam.min_cov.item() == 0
    assert lam.min_outer.item() == 0
    assert lam.max_outer.item() <= spectrum(FAMILY, h, method="certified").max_outer.item() + 1e-16


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_gaussian_eigenvalues_are_one_and_two(num_outputs):
    """Proposition 5.1, by every method."""
    h = inputs(2, num_outputs)
    for method in ("multistart", "certified", "minimize", "sos"):
        lam = spectrum(Gaussian(), h, method=method)
        values = [v.tolist() for v in lam]
        assert values == [pytest.approx([e] * 2, rel=1e-9) for e in (1, 1, 2, 2)]


def test_minimize_reaches_confident_softmax():
    """The objective is rescaled: otherwise the solver stops at once for σ_max near 1."""
    h = logits_of(ADVERSARIAL["certain 1 - 1e-12"])
    ours = lambda_max(FAMILY, h).item()
    assert lambda_max(FAMILY, h, method="minimize").item() == pytest.approx(ours, rel=1e-4, abs=0)


@pytest.mark.long
def test_spectrum_uses_the_method_that_it_is_given():
    h = inputs(2, 6)
    for method in ("multistart", "certified", "minimize"):
        expected = lambda_max(FAMILY, h, method=method)
        assert torch.equal(spectrum(FAMILY, h, method=method).max_outer, expected)
    gap = lambda_max(FAMILY, h, method="certified") - lambda_max(FAMILY, h)
    assert (gap > 1e-3 * lambda_max(FAMILY, h)).all()


def test_bad_arguments(monkeypatch):
    h = inputs(1, 3)
    for method in METHODS:
        with pytest.raises(ValueError, match=r"T ≥ 2"):
            lambda_max(FAMILY, h[:, :1], method=method)
        assert lambda_max(FAMILY, h.float(), method=method).dtype == torch.float64
    with pytest.raises(ValueError, match="multistart, certified, minimize, sos, lower"):
        lambda_max(FAMILY, h, method="guess")
    with pytest.raises(ValueError, match="num_starts must be ≥ 1"):
        minimize(FAMILY, h, num_starts=0)
    monkeypatch.setitem(sys.modules, "torchmin", None)
    with pytest.raises(ValueError, match="'lower' is below λ_max.*use 'multistart' or 'certified'"):
        spectrum(FAMILY, h, method="lower")
    with pytest.raises(ImportError, match="pip install pytorch-minimize"):
        lambda_max(FAMILY, h, method="minimize")


def normals(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# The sum-of-squares bound.


@pytest.mark.parametrize("num_classes", [3, 4, 5, 6])
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 3.0, 10.0])
def test_sos_is_an_upper_bound_and_tight(num_classes, scale):
    h = scale * normals(1, num_classes, seed=num_classes)
    found, bound = lambda_max(FAMILY, h).item(), lambda_max(FAMILY, h, method="sos").item()
    assert found * (1 - 1e-11) <= bound <= found * (1 + 4e-7 if num_classes <= 4 else 1 + 1e-6)


def test_sos_has_closed_forms():
    ours = lambda_max(FAMILY, torch.stack([torch.zeros(2), torch.tensor([0.0, 1.0])]), method="sos")
    s = torch.sigmoid(torch.tensor(1.0, dtype=torch.float64)).item()
    assert ours.dtype == torch.float64
    assert ours.tolist() == [
        pytest.approx(0, abs=1e-15),
        pytest.approx(4 * s * (1 - s) * (1 - 2 * s) ** 2, rel=1e-9),
    ]
    uniform = lambda_max(FAMILY, torch.zeros(1, 5), method="sos").item()
    assert uniform == pytest.approx((1 - 2 / 5) ** 2 / 4, rel=1e-7)
    assert lambda_max(GaussianHead(), torch.zeros(1, 4), method="sos").item() == pytest.approx(
        56, rel=1e-7
    )


def test_sos_sees_directions_along_ones_where_the_family_does():
    """Two equal Poisson counts: Var of (δ₁ + δ₂)²/2 is 2μ² + μ/2, less than 2μ² + μ of one."""
    found = lambda_max(Poisson(), torch.zeros(1, 2), method="sos").item()
    assert found == pytest.approx(3, rel=1e-7)
    biased = torch.tensor([[0.2, 0.3]])  # near p = ½ products dominate: the maximum is near 1
    along_ones = Bernoulli().variance1(biased, torch.full((1, 2), 0.5**0.5)).item()
    best = lambda_max(Bernoulli(), biased).item()
    assert (
        along_ones * (1 - 1e-12)
        <= best
        == pytest.approx(lambda_max(Bernoulli(), biased, method="sos").item(), rel=1e-7)
    )
    assert along_ones > 0.9 * best


def test_sos_refuses_many_outputs_and_a_missing_solver(monkeypatch):
    with pytest.raises(ValueError, match=r"at most 16 outputs, got 17.*certified"):
        lambda_max(FAMILY, torch.zeros(1, 17), method="sos")
    for package in ("cvxpy", "clarabel"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ImportError, match=r"pip install cvxpy clarabel.*multistart"):
                lambda_max(FAMILY, torch.zeros(1, 3), method="sos")


def test_symmetric_pairs_keep_inner_products():
    a, b, weight = symmetric_pairs(4)
    A, B = (X + X.T for X in normals(2, 4, 4))
    assert a.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 3]
    assert (weight * A[a, b] * weight * B[a, b]).sum().item() == pytest.approx((A * B).sum().item())


# Cheap bounds, pairs of directions, the centred minimum.


@settings(deadline=None, max_examples=60)
@given(logits())
def test_the_lower_bound_is_the_best_proposed_direction(h):
    u = torch.nn.functional.normalize(FAMILY.directions(h)[0], dim=1)
    sigma, c = torch.softmax(h[0], 0), h.shape[1]
    lower, found = lambda_max(FAMILY, h, method="lower").item(), lambda_max(FAMILY, h).item()
    assert lower == pytest.approx(directions_value(h, u).max().item(), rel=1e-9, abs=1e-15)
    formula = (c / (c - 1)) ** 2 * (sigma * (1 - sigma) * (1 - 2 * sigma) ** 2).max().item()
    assert formula - 1e-15 <= lower <= found * (1 + 1e-10) + 1e-15


def test_the_lower_bound_is_exact_for_gaussians_and_uniform_softmax():
    assert lambda_max(Gaussian(), inputs(2, 3), method="lower").tolist() == [pytest.approx(2)] * 2
    assert lambda_max(GaussianHead(), torch.zeros(1, 2), method="lower").item() == pytest.approx(56)
    assert lambda_max(FAMILY, torch.zeros(1, 5), method="lower").item() == pytest.approx(0.36 / 4)


def alternating_ascent(h, num_starts=60, num_steps=100):
    """Sup of Var((u·δ)(v·δ)) by turns: the best v for u, then the best u for that v; dense."""
    M = FAMILY.outer_covariance(h)[0]
    u = torch.nn.functional.normalize(normals(num_starts, len(M), seed=7), dim=1)
    for _ in range(num_steps):
        matrix = torch.einsum("abcd,ra,rc->rbd", M, u, u)
        value, vectors = torch.linalg.eigh(matrix)
        u = vectors[..., -1]
    return value[:, -1].max().item()


@pytest.mark.parametrize("num_classes", [2, 3, 5, 8])
@pytest.mark.parametrize("scale", [0.3, 2.0, 6.0])
def test_two_directions_reach_no_further_than_one(num_classes, scale):
    h = scale * normals(1, num_classes, seed=num_classes)
    assert alternating_ascent(h) == pytest.approx(lambda_max(FAMILY, h).item(), rel=1e-7)


@settings(deadline=None, max_examples=60)
@given(logits())
def test_centred_minimum_of_the_covariance(h):
    num_classes = h.shape[1]
    found = lambda_min_centred(FAMILY, h).item()
    u = normals(200, num_classes)
    u = torch.nn.functional.normalize(u - u.mean(1, keepdim=True), dim=1)
    assert found <= (FAMILY.information(h, u.T[None]).min().item()) * (1 + 1e-9)
    dense = torch.linalg.eigvalsh(FAMILY.covariance(h)[0])[1].item()
    assert found == pytest.approx(dense, rel=1e-8, abs=1e-14)


def test_centred_minimum_keeps_its_digits():
    probabilities = [[1.0, 1e-20, 1e-20], [0.5, 0.5 - 1e-200, 1e-200]]
    h = torch.tensor(probabilities, dtype=torch.float64).log()
    # u = (0, 1, −1)/√2 gives the mean of the last two probabilities; at 1e-200 the best u ⊥ 1 is
    # (−1, −1, 2)/√6, and uᵀ𝓘u = (9/6) σ₃(1 − σ₃).
    expected = [pytest.approx(v, rel=1e-12, abs=0) for v in (1e-20, 1.5e-200)]
    assert lambda_min_centred(FAMILY, h).tolist() == expected
    assert lambda_min_centred(FAMILY, torch.tensor([[0.0, -1000.0]])).item() == 0
    uniform = lambda_min_centred(FAMILY, torch.zeros(2, 5)).tolist()
    assert uniform == [pytest.approx(1 / 5, rel=1e-13)] * 2
    with pytest.raises(ValueError, match="Gaussian sees a common shift.*centred=False"):
        lambda_min_centred(Gaussian(), torch.zeros(1, 3))


# Z-eigenvalues.


def tensor_of(weights, vectors):
    """Σ_i w_i v_i⊗v_i⊗v_i⊗v_i, from rows v_i."""
    return torch.einsum("r,ra,rb,rc,rd->abcd", torch.as_tensor(weights).double(), *[vectors] * 4)


def test_eigenvalues_of_an_orthogonal_decomposition():
    vectors = torch.linalg.qr(normals(4, 4)).Q
    weights = [3.0, 1.5, -0.5, -2.0]
    A = tensor_of(weights, vectors)
    near = vectors + 0.1 * normals(4, 4, seed=1)
    value, x = shifted_power_method(A, near[:2])
    assert value.tolist() == [pytest.approx(w, rel=1e-12) for w in weights[:2]]
    assert (x * vectors[:2]).sum(1).tolist() == [pytest.approx(1, rel=1e-12)] * 2
    value, x = shifted_power_method(A, near[2:], largest=False)
    assert value.tolist() == [pytest.approx(w, rel=1e-12) for w in weights[2:]]
    starts = normals(2, 30, 4, seed=2)
    assert shifted_power_method(A, starts)[0].max().item() == pytest.approx(3, rel=1e-12)
    lowest = shifted_power_method(A, starts, largest=False)[0]
    assert lowest.shape == (2, 30)
    assert lowest.min().item() == pytest.approx(-2, rel=1e-12)


def test_smallest_eigenvalue_between_the_vectors():
    """For positive weights the minimum of Σwu⁴ is 1/Σ(1/w), at u² ∝ 1/w."""
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    vectors = torch.linalg.qr(normals(3, 3)).Q
    value, x = shifted_power_method(tensor_of(weights, vectors), normals(3), largest=False)
    assert value.shape == ()
    assert value.item() == pytest.approx(1 / 1.7, rel=1e-12)
    squares = (vectors @ x).square()
    assert squares.tolist() == pytest.approx((1 / 1.7 / weights).tolist(), rel=1e-5)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_power_method_ends_at_eigenpairs_of_random_tensors(largest, seed):
    A = normals(3, 3, 3, 3, seed=seed)
    A = sum(A.permute(order) for order in itertools.permutations(range(4))) / 24
    value, x = shifted_power_method(A, normals(40, 3, seed=seed + 50), largest=largest)
    image = torch.einsum("abcd,rb,rc,rd->ra", A, x, x, x)
    assert torch.allclose(image, value[:, None] * x, atol=1e-6)
    assert torch.allclose(x.norm(dim=1), x.new_ones(40), rtol=1e-14)
    u = torch.nn.functional.normalize(normals(20_000, 3, seed=99), dim=1)
    everywhere = torch.einsum("abcd,ra,rb,rc,rd->r", A, u, u, u, u)
    best, rival = (value.max(), everywhere.max()) if largest else (-value.min(), -everywhere.min())
    assert rival - 1e-12 <= best <= rival + 0.02  # 20,000 directions leave no large gap


def heavy_tailed(seed):
    v = normals(24, 4, seed=seed) * normals(24, 1, seed=seed + 1).exp() ** 2
    return -tensor_of(torch.ones(24), v)


def local_shift_only(A, u):
    """One step of the method with the shift for convexity at u and no safeguard."""
    matrix = torch.einsum("abcd,c,d->ab", A, u, u)
    curvature = torch.linalg.eigvalsh(12 * matrix)
    shift = ((1e-6 * curvature.abs().max() - curvature[0]) / 4).clamp_min(0)
    return torch.nn.functional.normalize(matrix @ u + shift * u, dim=0)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_power_method_is_monotone(largest, seed):
    A = heavy_tailed(seed) if largest else -heavy_tailed(seed)
    starts = normals(30, 4, seed=seed + 10)
    path = torch.stack(
        [
            shifted_power_method(A, starts, largest=largest, max_steps=steps)[0]
            for steps in (*range(12), 300)
        ]
    )
    u = torch.nn.functional.normalize(starts, dim=1)
    at_start = torch.einsum("abcd,ra,rb,rc,rd->r", A, u, u, u, u)
    assert torch.allclose(path[0], at_start, rtol=1e-12)
    steps = path.diff(dim=0) if largest else -path.diff(dim=0)
    assert (steps >= 0).all()
    assert (steps[0] > 0).any()


@pytest.mark.long
def test_convexity_at_the_iterate_alone_is_not_enough():
    """Finding: without the safeguard the value falls by far."""
    falls = 0.0
    for seed in range(4):
        A = heavy_tailed(seed)
        for start in normals(30, 4, seed=seed + 10):
            u = torch.nn.functional.normalize(start, dim=0)
            for _ in range(12):
                w = local_shift_only(A, u)
                before, after = (torch.einsum("abcd,a,b,c,d->", A, x, x, x, x) for x in (u, w))
                falls = max(falls, ((before - after) / before.abs()).item())
                u = w
    assert falls > 0.1


def test_one_step_of_the_power_method_by_hand():
    """A = diag(4, −1) at u = (0.6, 0.8): H = 12 diag(4·0.36, −0.64), shift (τ + 7.68)/4."""
    A = tensor_of([4.0, -1.0], torch.eye(2, dtype=torch.float64))
    curvature = (12 * 4 * 0.36, -12 * 0.64)
    shift = (1e-6 * curvature[0] - curvature[1]) / 4
    w = np.array([4 * 0.6**3 + shift * 0.6, -(0.8**3) + shift * 0.8])
    w /= np.linalg.norm(w)
    value, x = shifted_power_method(A, torch.tensor([3.0, 4.0]), max_steps=1)
    assert x.tolist() == pytest.approx(w.tolist(), rel=1e-12)
    assert value.item() == pytest.approx(4 * w[0] ** 4 - w[1] ** 4, rel=1e-12)


def test_power_method_refuses_other_tensors():
    good, start = tensor_of([1.0], torch.eye(3)[:1].double()), torch.ones(3)
    for shape in [(3, 3), (3, 3, 3, 2), (3, 3, 3, 3, 3)]:
        with pytest.raises(ValueError, match=r"must have shape \[T, T, T, T\], got"):
            shifted_power_method(torch.zeros(shape), start)
    M = FAMILY.outer_covariance(inputs(1, 3))[0]
    lopsided = good.clone()
    lopsided[0, 1, 2, 2] = 1e-6  # unchanged where the last two indices are swapped
    cyclic = sum(lopsided.permute([(i + k) % 4 for i in range(4)]) for k in range(4))
    for bad in (M, lopsided, cyclic, good * torch.nan, good + normals(3, 3, 3, 3)):
        with pytest.raises(ValueError, match="supersymmetric.*use lambda_max"):
            shifted_power_method(bad, start)
    for bad in (torch.ones(2), torch.zeros(3), torch.tensor(1.0), torch.full((2, 3), torch.nan)):
        with pytest.raises(ValueError, match=r"starts must have shape \[..., 3\] and no zero"):
            shifted_power_method(good, bad)
    value, x = shifted_power_method(torch.zeros(3, 3, 3, 3), start)
    assert value.item() == 0
    assert x.norm().item() == pytest.approx(1)


FAMILIES = {
    "categorical": (FAMILY, 4),
    "bernoulli": (Bernoulli(), 4),
    "poisson": (Poisson(), 3),
    "head": (GaussianHead(), 4),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_extreme_fourth_moments_against_many_random_starts(name):
    """The dense tensor and 200 random starts find nothing beyond the family's own starts."""
    family, num_outputs = FAMILIES[name]
    h = normals(2, num_outputs, seed=3)
    smallest, largest = fourth_moment_spectrum(family, h)
    for b, K in enumerate(family.fourth_moment(h)):
        starts = normals(200, num_outputs, seed=4)
        up = shifted_power_method(K, starts, max_steps=300)[0].max().item()
        down = shifted_power_method(K, starts, largest=False, max_steps=300)[0].min().item()
        assert largest[b].item() == pytest.approx(up, rel=1e-9)
        assert smallest[b].item() == pytest.approx(down, rel=1e-9, abs=1e-4)


def test_extreme_fourth_moments_in_closed_form():
    h = inputs(2, 3)
    assert [e.tolist() for e in fourth_moment_spectrum(Gaussian(), h)] == [
        [pytest.approx(3)] * 2
    ] * 2
    smallest, largest = fourth_moment_spectrum(GaussianHead(), torch.zeros(1, 2))
    assert (smallest.item(), largest.item()) == pytest.approx((3, 60), rel=1e-9)
    p = torch.sigmoid(torch.tensor(0.7, dtype=torch.float64)).item()
    v = p * (1 - p)
    smallest, largest = fourth_moment_spectrum(Bernoulli(), torch.tensor([[0.7]]))
    assert (smallest.item(), largest.item()) == pytest.approx((v * (1 - 3 * v),) * 2, rel=1e-7)
    smallest, largest = fourth_moment_spectrum(FAMILY, torch.tensor([[0.7, 0.0]]))
    assert smallest.item() == 0
    assert largest.item() == pytest.approx(4 * v * (1 - 3 * v), rel=1e-7)
    # Two counts with rate 1: 3(x₁ + x₂)² + x₁² + x₂² for x = u² with x₁ + x₂ = 1.
    smallest, largest = fourth_moment_spectrum(Poisson(), torch.zeros(1, 2))
    assert (smallest.item(), largest.item()) == pytest.approx((3.5, 4), rel=1e-9)
    with pytest.raises(ValueError, match=r"T ≥ 2"):
        fourth_moment_spectrum(FAMILY, torch.zeros(1, 1))


def test_flat_maxima_of_fourth_moments_are_reached():
    """Nearly uniform probabilities: 𝓚 = E(u·δ)⁴ is nearly constant on the circle u ⊥ 1."""
    h = 0.01 * normals(1, 3, seed=1)
    angle = torch.linspace(0, torch.pi, 100_001, dtype=torch.float64)[:, None]
    basis = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0]], dtype=torch.float64)
    basis = torch.nn.functional.normalize(basis, dim=1)
    u = angle.cos() * basis[0] + angle.sin() * basis[1]
    sigma = torch.softmax(h[0], 0)
    on_grid = ((u - (u @ sigma)[:, None]) ** 4 @ sigma).max().item()
    found = fourth_moment_spectrum(FAMILY, h)[1].item()
    assert found == pytest.approx(on_grid, rel=1e-9)


@pytest.mark.full
def test_a_hundred_classes_fit():
    for h in (torch.zeros(1, 100), normals(1, 100)):
        largest = fourth_moment_spectrum(FAMILY, h)[1].item()
        assert lambda_max(FAMILY, h).item() <= largest <= 2 * spectrum(FAMILY, h).max_cov.item()


@pytest.mark.long
@pytest.mark.parametrize("scale", [1e-200, 1e-50, 1e-13, 1e30])
def test_the_power_method_does_not_depend_on_the_scale_of_the_tensor(scale):
    A = FAMILY.fourth_moment(inputs(1, 4))[0]
    starts = inputs(6, 4, seed=3)
    for largest in (True, False):
        value, vector = shifted_power_method(A, starts, largest=largest)
        scaled, same = shifted_power_method(scale * A, starts, largest=largest)
        assert torch.allclose(scaled / scale, value, rtol=1e-9, atol=1e-15)
        assert torch.allclose(same.norm(dim=-1), torch.ones(6).double(), rtol=1e-12)
        assert torch.allclose(vector.norm(dim=-1), torch.ones(6).double(), rtol=1e-12)


@pytest.mark.parametrize("rest", [1e-14, 1e-50, 1e-200])
def test_corollary_4_2_holds_however_sure_the_softmax_is(rest):
    h = logits_of([1.0, 0.5 * rest, 0.3 * rest])
    largest = fourth_moment_spectrum(FAMILY, h)[1]
    assert (lambda_max(FAMILY, h) <= largest * (1 + 1e-10)).all()
    wide = Gaussian(1e8 * torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64))
    smallest = torch.linalg.eigvalsh(wide.covariance(h[:, :2]))[:, 0]
    found = fourth_moment_spectrum(wide, h[:, :2])[0]
    assert found.item() == pytest.approx(3 * smallest.item() ** 2, rel=1e-9, abs=0)


def test_one_zero_start_among_others_is_refused():
    starts = torch.eye(3, dtype=torch.float64)
    starts[1] = 0
    with pytest.raises(ValueError, match="no zero or NaN rows"):
        shifted_power_method(FAMILY.fourth_moment(inputs(1, 3))[0], starts)


def test_the_smallest_eigenvalue_of_a_softmax_is_zero_without_rounding():
    assert (spectrum(FAMILY, inputs(200, 6), method="certified").min_cov == 0).all()
