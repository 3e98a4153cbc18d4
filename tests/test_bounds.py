import pytest
import torch
from hypothesis import given, settings
from strategies import inputs, logits, mlp
from torch import nn

import fimlib
from fimlib import Categorical, Gaussian, differentiate
from fimlib.derivatives import Block, Derivatives

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
