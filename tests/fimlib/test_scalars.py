"""A parameter without axes counts like one with a single entry, in every function."""

import pytest
import torch
from strategies import inputs
from torch import nn

import fimlib
from fimlib.empirical import data_fisher_covariance

FAMILY = fimlib.Categorical()
X = inputs(4, 3)


class Scaled(nn.Module):
    def __init__(self, shape):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.scale = nn.Linear(3, 3), nn.Parameter(torch.full(shape, 0.7))

    def forward(self, x):
        return self.scale * torch.tanh(self.inner(x) * self.scale)


NETWORKS = [Scaled(shape).double() for shape in ((), (1,))]
NAMES = ["scale", "inner.bias"]


def streamed(*quantities, bounds=None):
    def call(net):
        joint = fimlib.accumulate(
            net, X, FAMILY, quantities=quantities or None, bounds=bounds, batch_size=2
        )
        return joint.state_dict()

    return call


def derived(function, **options):
    return lambda net: function(fimlib.differentiate(net, X), FAMILY, **options)


def labelled(function):
    labels = FAMILY.observed(NETWORKS[0](X).detach(), torch.tensor([0, 1, 2, 0]))
    return lambda net: function(net, X, labels, parameters=NAMES)


CALLS = {
    "I alone": streamed("I"),
    "first order": streamed("I", "Var_x I", "V1"),
    "everything": streamed(),
    "bounds": streamed(bounds="certified"),
    "signs": streamed("I", "signs", "importance"),
    "V1": derived(fimlib.variance_i1),
    "V2": derived(fimlib.variance_i2),
    "labels needed": derived(fimlib.num_samples_needed, relative_error=0.1, confidence=0.9),
    "labels needed, sharper": derived(
        fimlib.num_samples_needed, relative_error=0.1, confidence=0.9, rule="bernstein"
    ),
    "estimators": derived(fimlib.compare_estimators),
    "theorem 4.1": derived(fimlib.theorem_4_1),
    "corollary 4.6": derived(fimlib.corollary_4_6),
    "joint covariance": derived(fimlib.joint_covariance, parameters=NAMES, num_inputs=3),
    "matrix": lambda net: fimlib.fisher_matrix(net, X, FAMILY, parameters=NAMES),
    "Î₁ matrix": labelled(fimlib.estimate_i1_matrix),
    "Î₂ matrix": labelled(fimlib.estimate_i2_matrix),
    "data covariance": labelled(data_fisher_covariance),
    "estimate": lambda net: fimlib.estimate(net, X, FAMILY, passes=3).value,
    "estimate, inputs": lambda net: (
        fimlib.estimate(net, X, FAMILY, passes=3, squares="input").standard_error
    ),
    "hutchinson": lambda net: (
        fimlib.hutchinson_variance_i2(
            net, X, FAMILY, num_probes=4, generator=torch.Generator().manual_seed(0)
        ).layer_means
    ),
    "summarise": lambda net: fimlib.summarise(net, X, FAMILY).layers,
    "identify": lambda net: (
        fimlib.identify(
            {n: torch.ones_like(p) for n, p in net.named_parameters()}, net, [(X,)], FAMILY
        ).fisher
    ),
}


def numbers(result):
    """All of them in a row."""
    if isinstance(result, torch.Tensor):
        return [result.detach().double().flatten()]
    if isinstance(result, int | float):
        return [torch.tensor([float(result)]).double()]
    if hasattr(result, "_asdict"):
        result = result._asdict()
    elif hasattr(result, "__dict__") and not hasattr(result, "items"):
        result = vars(result)
    if hasattr(result, "items"):
        return [t for _, value in result.items() for t in numbers(value)]
    if isinstance(result, list | tuple):
        return [t for value in result for t in numbers(value)]
    return []


@pytest.mark.parametrize("name", CALLS)
def test_a_scalar_is_one_entry(name):
    scalar, single = (torch.cat(numbers(CALLS[name](net))) for net in NETWORKS)
    assert len(scalar) > 1
    assert torch.allclose(scalar, single, rtol=1e-9, atol=1e-12, equal_nan=True)
