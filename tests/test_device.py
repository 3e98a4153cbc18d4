"""Everything is computed where the outputs are, shown without a GPU.

Inside ``torch.device("meta")`` a tensor that is made without naming a device has no numbers, and
mixing it with those of a network on the CPU is an error: as a CPU tensor beside a GPU's would be.
"""

import pytest
import torch
from strategies import inputs, mlp
from torch import nn

import fimlib

FAMILIES = {
    "categorical": (fimlib.Categorical(), lambda: torch.tensor([0, 2])),
    "bernoulli": (fimlib.Bernoulli(), lambda: torch.tensor([[0, 1, 1, 0]] * 2)),
    "poisson": (fimlib.Poisson(), lambda: torch.tensor([[0, 3, 1, 0]] * 2)),
    "gaussian": (fimlib.Gaussian(), lambda: torch.ones(2, 4, dtype=torch.float64)),
    "known covariance": (
        fimlib.Gaussian(torch.eye(4, dtype=torch.float64) + 1),
        lambda: torch.ones(2, 4, dtype=torch.float64),
    ),
    "head": (fimlib.GaussianHead(), lambda: torch.ones(2, 2, dtype=torch.float64)),
}


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def case(request):
    """Network, inputs, derivatives, family and observed labels, all on the CPU."""
    family, observed = request.param
    net, x = mlp([3, 4, 4], nn.Sigmoid), inputs(2, 3)
    return net, x, fimlib.differentiate(net, x), family, observed()


@pytest.fixture(autouse=True)
def no_default_device(case):  # noqa: ARG001 - made before, on the CPU
    with torch.device("meta"):
        yield


def on_the_cpu(value):
    """The tensors in a result, checked."""
    if isinstance(value, fimlib.Diagonal | dict):
        value = list(value.values())
    if isinstance(value, fimlib.Labels):
        value = [value.weights, value.mean_residual()]
    if isinstance(value, torch.Tensor):
        assert value.device.type == "cpu"
        assert torch.isfinite(value).all()
        return 1
    return sum(on_the_cpu(v) for v in value)


def test_the_trap_works(case):
    _, x, *_ = case
    assert torch.ones(2).device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        (x + torch.ones(2, 3)).sum().item()


def test_derivatives(case):
    net, x, expected, *_ = case
    derivs = fimlib.differentiate(net, x)
    assert torch.equal(derivs.outputs, expected.outputs)
    assert all(on_the_cpu([block.J, block.S]) for block in derivs.blocks)


def test_moments(case):
    _, _, derivs, family, _ = case
    h = family.natural(derivs.outputs)
    u = family.directions(h)
    assert on_the_cpu(
        [
            family.log_partition(h),
            family.mean(h),
            family.covariance(h),
            family.fourth_moment(h),
            family.outer_covariance(h),
            family.outer_covariance_min(h),
            family.outer_covariance_at(h, u),
            family.unfolding(h),
            u,
        ]
    )


def test_quantities(case):
    _, _, derivs, family, observed = case
    for quantity in (
        fimlib.fisher_information,
        fimlib.variance_i1,
        fimlib.variance_i2,
        fimlib.covariance_i1_i2,
    ):
        assert on_the_cpu(quantity(derivs, family))
    labels = family.sample(derivs.outputs, 3, torch.Generator("cpu").manual_seed(0))
    for estimate in (
        fimlib.estimate_i1,
        fimlib.estimate_i2,
        fimlib.sample_variance_i1,
        fimlib.sample_variance_i2,
    ):
        assert on_the_cpu(estimate(derivs, labels))
    labels = family.observed(derivs.outputs, observed)
    assert on_the_cpu(labels)
    for quantity in (fimlib.data_fisher, fimlib.data_fisher_variance, fimlib.kl_gradient):
        assert on_the_cpu(quantity(derivs, labels))


def test_bounds(case):
    _, _, derivs, family, _ = case
    assert on_the_cpu(fimlib.theorem_4_1(derivs, family))
    assert on_the_cpu(fimlib.corollary_4_6(derivs, family))
    assert on_the_cpu(fimlib.theorem_c_1(derivs, family))
    h = derivs.outputs
    assert on_the_cpu(fimlib.corollary_4_2(family, h))
    assert on_the_cpu(fimlib.lambda_max_lower(family, h))
    pairs = h[:, :, None].expand(-1, -1, 3)
    assert on_the_cpu(fimlib.theorem_b_1(pairs, pairs, pairs, family, h))
    assert on_the_cpu(fimlib.off_diagonal(pairs, pairs, pairs, family, h))
    if family.shift_invariant:
        assert on_the_cpu(fimlib.theorem_4_1(derivs, family, centred=True))
        assert on_the_cpu(fimlib.theorem_5_2(family.mean(h)))
        assert on_the_cpu(fimlib.corollary_q_1(family.mean(h)))
        assert on_the_cpu(family.expected(h, family.mean(h)))


def test_joint(case):
    _, _, derivs, family, _ = case
    joint = fimlib.Joint(family)
    joint.update(derivs)
    joint.update(derivs)
    assert on_the_cpu(joint.variance_i1(2))
    assert on_the_cpu(joint.variance_bounds(2))
    assert on_the_cpu(joint.lemma_4_8(tight=True))
    names = ["2.bias"]
    assert on_the_cpu(fimlib.joint_covariance(derivs, family, parameters=names, num_inputs=2))
    assert on_the_cpu(fimlib.num_samples_needed(derivs, family, relative_error=0.1, confidence=0.9))
    assert on_the_cpu(list(fimlib.compare_estimators(derivs, family).values()))


def test_matrices(case):
    net, x, derivs, family, observed = case
    names = ["2.bias"]
    labels = family.observed(derivs.outputs, observed)
    assert on_the_cpu(fimlib.fisher_matrix(net, x, family, parameters=names))
    for estimate in (
        fimlib.estimate_i1_matrix,
        fimlib.estimate_i2_matrix,
        fimlib.data_fisher_matrix,
        fimlib.data_fisher_covariance,
    ):
        assert on_the_cpu(estimate(net, x, labels, parameters=names))
