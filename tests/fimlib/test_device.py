"""Everything is computed where the outputs are, and in float64, shown without a GPU.

Inside ``torch.device("meta")`` a tensor that is made without naming a device has no numbers, and
mixing it with those of a network on the CPU is an error: as a CPU tensor beside a GPU's would be.
What is computed there must equal what is computed outside.
"""

import copy

import pytest
import torch
from strategies import inputs, mlp
from torch import nn

import fimlib

ONES = torch.ones(2, 4, dtype=torch.float64)
FAMILIES = {
    "categorical": (fimlib.Categorical(), torch.tensor([0, 2])),
    "bernoulli": (fimlib.Bernoulli(), torch.tensor([[0, 1, 1, 0]] * 2)),
    "poisson": (fimlib.Poisson(), torch.tensor([[0, 3, 1, 0]] * 2)),
    "gaussian": (fimlib.Gaussian(), ONES),
    "known covariance": (fimlib.Gaussian(torch.eye(4, dtype=torch.float64) + 1), ONES),
    "head": (fimlib.GaussianHead(), ONES[:, :2]),
}
NETWORK, X = mlp([3, 4, 4], nn.Sigmoid), inputs(2, 3)
NAMES = ["2.bias"]


def moments(derivs, family, _observed):
    h = family.natural(derivs.outputs)
    u = family.directions(h)
    lists = family.log_partition(h), family.mean(h), family.covariance(h), u
    fourth = family.fourth_moment(h), family.outer_covariance(h), family.outer_covariance_min(h)
    return *lists, *fourth, family.outer_covariance_at(h, u), family.unfolding(h)


def exact(derivs, family, _observed):
    return (
        fimlib.fisher_information(derivs, family),
        fimlib.variance_i1(derivs, family),
        fimlib.variance_i2(derivs, family),
        fimlib.covariance_i1_i2(derivs, family),
    )


def estimates(derivs, family, observed):
    drawn = family.sample(derivs.outputs, 3, torch.Generator("cpu").manual_seed(0))
    given = family.observed(derivs.outputs, observed)
    return (
        fimlib.estimate_i1(derivs, drawn),
        fimlib.estimate_i2(derivs, drawn),
        fimlib.sample_variance_i1(derivs, drawn),
        fimlib.sample_variance_i2(derivs, drawn),
        drawn.mean_residual(),
        fimlib.data_fisher(derivs, given),
        fimlib.data_fisher_variance(derivs, given),
        fimlib.kl_gradient(derivs, given),
    )


def bounds(derivs, family, _observed):
    h = derivs.outputs
    pairs = torch.stack([h, h.flip(1), h + 1], 2)
    return (
        fimlib.theorem_4_1(derivs, family),
        fimlib.corollary_4_6(derivs, family),
        fimlib.trace_bounds.theorem_c_1(derivs, family),
        fimlib.corollary_4_2(family, h),
        fimlib.lambda_max(family, h, method="lower"),
        fimlib.bounds.theorem_b_1(pairs, pairs, pairs, family, h),
        fimlib.bounds.off_diagonal(pairs, pairs, pairs, family, h),
    )


def softmax(derivs, family, _observed):
    if not family.shift_invariant:
        return ()
    h = derivs.outputs
    sigma = family.mean(h)
    return (
        fimlib.theorem_4_1(derivs, family, centred=True),
        fimlib.theorem_5_2(sigma),
        fimlib.bounds.corollary_q_1(sigma),
        fimlib.estimate_i1(derivs, family.expected(h, sigma)),
        family.residual_bound(h),
    )


def joint(derivs, family, _observed):
    total = fimlib.Joint(family, bounds="certified")
    total.update(derivs)
    total.update(derivs)
    return (
        total.variance_i1(2),
        total.variance_bounds(2),
        total.variance_bounds(2, estimator=2),
        total.lemma_4_8(tight=True),
        fimlib.joint_covariance(derivs, family, parameters=NAMES, num_inputs=2),
        fimlib.num_samples_needed(derivs, family, relative_error=0.1, confidence=0.9),
        list(fimlib.compare_estimators(derivs, family).values()),
    )


def matrices(derivs, family, observed):
    labels = family.observed(derivs.outputs, observed)
    return (
        fimlib.fisher_matrix(NETWORK, X, family, parameters=NAMES),
        fimlib.estimate_i1_matrix(NETWORK, X, labels, parameters=NAMES),
        fimlib.estimate_i2_matrix(NETWORK, X, labels, parameters=NAMES),
        fimlib.empirical.data_fisher_matrix(NETWORK, X, labels, parameters=NAMES),
        fimlib.empirical.data_fisher_covariance(NETWORK, X, labels, parameters=NAMES),
    )


def tensors(value):
    """All tensors in a result, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if value is None:  # as where the labels are no classes
        return []
    if isinstance(value, fimlib.Diagonal | dict):
        value = value.values()
    return [tensor for part in value for tensor in tensors(part)]


@pytest.mark.long
@pytest.mark.parametrize("compute", [moments, exact, estimates, bounds, softmax, joint, matrices])
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_made_elsewhere(name, compute):
    family, observed = FAMILIES[name]
    expected = tensors(compute(fimlib.differentiate(NETWORK, X), family, observed))
    with torch.device("meta"):
        ours = tensors(compute(fimlib.differentiate(NETWORK, X), family, observed))
    assert len(ours) == len(expected)
    assert ours or compute is softmax
    for a, b in zip(ours, expected, strict=True):
        assert a.device.type == "cpu"
        assert torch.equal(a, b)


CNN = nn.Sequential(
    nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Sigmoid(), nn.AvgPool2d(2), nn.Flatten()
)
NETWORKS = {
    "layerwise": (NETWORK, X),
    "traced": (nn.Sequential(CNN, nn.Linear(2, 3)).double().eval(), inputs(2, 9).view(2, 1, 3, 3)),
    "functional": (nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 4)).double(), X),
}


def first_order(engine, net, x):
    derivs = fimlib.differentiate(net, x, engine=engine, order=1)
    return fimlib.variance_i1(derivs, fimlib.Categorical())


def second_order(engine, net, x):
    if engine == "functional":
        generator = torch.Generator("cpu").manual_seed(0)
        found = fimlib.hutchinson_variance_i2(
            net, x, fimlib.Categorical(), num_probes=4, generator=generator
        )
        return found.value, found.standard_error
    return fimlib.variance_i2(fimlib.differentiate(net, x, engine=engine), fimlib.Categorical())


def streamed(engine, net, x):
    quantities = ["Var_x I", "V1"] if engine == "functional" else None
    options = {"engine": engine, "quantities": quantities}
    single = copy.deepcopy(net).float()
    return [
        joint.variance_i1(2)
        for joint in (
            fimlib.accumulate(net, x, fimlib.Categorical(), **options),
            fimlib.accumulate(
                single, x.float(), fimlib.Categorical(), dtype=torch.float32, **options
            ),
        )
    ]


@pytest.mark.parametrize("compute", [first_order, second_order, streamed])
@pytest.mark.parametrize("engine", NETWORKS)
def test_engines_make_nothing_elsewhere(engine, compute):
    net, x = NETWORKS[engine]
    expected = tensors(compute(engine, net, x))
    with torch.device("meta"):
        ours = tensors(compute(engine, net, x))
    assert len(ours) == len(expected) > 0
    for a, b in zip(ours, expected, strict=True):
        assert a.device.type == "cpu"
        assert torch.equal(a, b)


def test_the_trap_works():
    with torch.device("meta"):
        made = torch.ones(2, 3)
    with pytest.raises((RuntimeError, NotImplementedError)):
        (X + made).sum().item()


@pytest.mark.parametrize("compute", [moments, exact, estimates, bounds, softmax, joint])
@pytest.mark.parametrize("name", FAMILIES)
def test_results_of_a_float32_network_are_float64(name, compute):
    family, observed = FAMILIES[name]
    net = mlp([3, 4, 4], nn.Sigmoid).float()
    derivs = fimlib.differentiate(net, X.float())
    for tensor in tensors(compute(derivs, family, observed)):
        assert tensor.dtype in (torch.float64, torch.int64)


@pytest.mark.parametrize("name", FAMILIES)
def test_moments_at_float32_outputs_are_computed_in_float64(name):
    family, _ = FAMILIES[name]
    rough = inputs(2, 4).float()
    for method in ("log_partition", "mean", "covariance", "fourth_moment", "outer_covariance_min"):
        ours, expected = (getattr(family, method)(h) for h in (rough, rough.double()))
        assert ours.dtype == torch.float64
        assert torch.equal(ours, expected)
    J = inputs(2, 12, seed=2).view(2, 4, 3).float()
    for form in (family.information, family.variance1, lambda h, D: family.covariance12(h, D, D)):
        assert torch.equal(form(rough, J), form(rough.double(), J.double()))
        assert form(rough, J).dtype == torch.float64
