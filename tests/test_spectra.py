import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from strategies import ADVERSARIAL, inputs, logits, logits_of

from fimlib import (
    Categorical,
    Gaussian,
    lambda_max,
    lambda_max_certified,
    lambda_max_minimize,
    lambda_max_multistart,
    spectrum,
)

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
    found, upper = lambda_max_multistart(FAMILY, h).item(), lambda_max_certified(FAMILY, h).item()
    spread = (1 - sigma.square().sum()).item()
    rounding = 1e-15 + 1e-10 * upper
    lower = (num_classes / (num_classes - 1)) ** 2 * sigma * (1 - sigma) * (1 - 2 * sigma) ** 2
    assert lower.max().item() - rounding <= found <= upper + rounding
    assert upper <= 2 * min(sigma.max().item(), spread) + rounding  # Theorem 5.2
    u = torch.nn.functional.normalize(inputs(2000, num_classes), dim=1)
    assert directions_value(h, u).max().item() <= found + rounding


@pytest.mark.parametrize("num_classes", [3, 4, 5, 10, 20])
def test_uniform_softmax_has_a_closed_form(num_classes):
    found = lambda_max_multistart(FAMILY, torch.zeros(1, num_classes)).item()
    assert found == pytest.approx((1 - 2 / num_classes) ** 2 / (num_classes - 1), rel=1e-10)


@pytest.mark.parametrize("noise", [0.0, 1e-5, 1e-4, 1e-2, 1.0])
def test_three_classes_against_every_direction(noise):
    """Nearly uniform probabilities have a flat maximum, where plain ascents stop short of it."""
    h = noise * inputs(1, 3, seed=5)
    angle = torch.linspace(0, torch.pi, 100_001, dtype=torch.float64)[:, None]
    basis = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0]], dtype=torch.float64)
    basis = torch.nn.functional.normalize(basis, dim=1)
    on_grid = directions_value(h, angle.cos() * basis[0] + angle.sin() * basis[1]).max().item()
    assert lambda_max_multistart(FAMILY, h).item() == pytest.approx(on_grid, rel=1e-9)
    assert lambda_max_multistart(FAMILY, h).item() >= on_grid * (1 - 1e-13)


def test_pairs_of_classes_are_needed_among_the_starts():
    """From single classes alone the ascent misses the maximum here, by 7e-4."""

    class Singles(Categorical):
        def directions(self, h):
            return super().directions(h)[:, : h.shape[1]]

    h = logits_of([0.5098156487818316, 0.4599938260263043, *[0.005031754198684074] * 6])
    found = lambda_max_multistart(FAMILY, h).item()
    assert lambda_max_multistart(Singles(), h).item() < found * (1 - 5e-4)
    assert lambda_max_minimize(FAMILY, h, num_starts=40).item() == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_no_random_start_climbs_higher(seed, scale):
    """The deterministic starts against 300 random ones, by the same ascent."""
    generator = torch.Generator().manual_seed(seed)
    h = scale * torch.randn(1, 10, generator=generator, dtype=torch.float64)

    class RandomStarts(Categorical):
        def directions(self, h):
            return torch.randn(1, 300, h.shape[1], generator=generator, dtype=torch.float64)

    rival = lambda_max_multistart(RandomStarts(), h).item()
    assert rival <= lambda_max_multistart(FAMILY, h).item() * (1 + 1e-9)


def test_one_local_optimisation_can_make_the_upper_bound_false():
    """Finding: a single random start ends in a local maximum, even below the V₁ of real weights.

    The weight is one of a last layer: J = z e_k, so V₁ = z⁴ Var((e_k·δ)²) and ‖J‖ = |z|.
    """
    h = 0.5 * inputs(1, 10, seed=3)
    real = FAMILY.variance1(h, torch.eye(10, dtype=torch.float64)[None])[0]  # all ‖J‖ = 1
    single = [lambda_max_minimize(FAMILY, h, num_starts=1, seed=s).item() for s in range(12)]
    ours = lambda_max_multistart(FAMILY, h).item()
    assert min(single) < 0.999 * real.max().item()  # a false upper bound
    assert real.max().item() <= ours * (1 + 1e-12)
    many = lambda_max_minimize(FAMILY, h, num_starts=60).item()
    assert many == pytest.approx(ours, rel=1e-6)


@pytest.mark.parametrize("probabilities", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_spectrum_of_adversarial_softmax(probabilities):
    h = logits_of(probabilities)
    lam = spectrum(FAMILY, h)
    dense = np.linalg.eigvalsh(FAMILY.covariance(h)[0].numpy())
    assert lam.max_cov.item() == pytest.approx(dense[-1], rel=1e-12)
    assert 0 <= lam.min_cov.item() < 1e-15
    assert lam.min_outer.item() == 0
    assert lam.max_outer.item() <= spectrum(FAMILY, h, method="certified").max_outer.item() + 1e-16


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_gaussian_eigenvalues_are_one_and_two(num_outputs):
    """Proposition 5.1, by every method."""
    h = inputs(2, num_outputs)
    for method in ("multistart", "certified", "minimize"):
        lam = spectrum(Gaussian(), h, method=method)
        values = [v.tolist() for v in lam]
        assert values == [pytest.approx([e] * 2, rel=1e-9) for e in (1, 1, 2, 2)]


def test_minimize_reaches_confident_softmax():
    """The objective is rescaled: otherwise the solver stops at once for σ_max near 1."""
    h = logits_of(ADVERSARIAL["certain 1 - 1e-12"])
    ours = lambda_max_multistart(FAMILY, h).item()
    assert lambda_max_minimize(FAMILY, h).item() == pytest.approx(ours, rel=1e-4)


def test_spectrum_uses_the_method_that_it_is_given():
    h = inputs(2, 6)
    for method in ("multistart", "certified", "minimize"):
        expected = lambda_max(FAMILY, h, method=method)
        assert torch.equal(spectrum(FAMILY, h, method=method).max_outer, expected)
    gap = lambda_max(FAMILY, h, method="certified") - lambda_max(FAMILY, h)
    assert (gap > 1e-3 * lambda_max(FAMILY, h)).all()


def test_bad_arguments(monkeypatch):
    h = inputs(1, 3)
    for search in (lambda_max_multistart, lambda_max_certified, lambda_max_minimize):
        with pytest.raises(ValueError, match=r"T ≥ 2"):
            search(FAMILY, h[:, :1])
        assert search(FAMILY, h.float()).dtype == torch.float64
    with pytest.raises(ValueError, match="multistart, certified, minimize"):
        lambda_max(FAMILY, h, method="guess")
    with pytest.raises(ValueError, match="num_starts must be ≥ 1"):
        lambda_max_minimize(FAMILY, h, num_starts=0)
    monkeypatch.setitem(sys.modules, "torchmin", None)
    with pytest.raises(ImportError, match="pip install pytorch-minimize"):
        lambda_max(FAMILY, h, method="minimize")
