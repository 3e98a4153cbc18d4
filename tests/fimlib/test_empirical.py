from itertools import product

import pytest
import torch
from strategies import ADVERSARIAL, inputs, mlp
from torch import nn

import fimlib
from fimlib import Categorical, Gaussian, differentiate
from fimlib.empirical import (
    data_fisher,
    data_fisher_covariance,
    data_fisher_matrix,
    data_fisher_variance,
    kl_gradient,
    reparameterise,
)
from fimlib.families import GaussianHead
from fimlib.joint import Joint

NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


def network(num_inputs=1):
    return mlp([2, 2, 3], nn.Tanh, scale=1.5), inputs(num_inputs, 2)


def label_distribution(num_inputs, num_classes=3, seed=3):
    generator = torch.Generator().manual_seed(seed)
    q = torch.rand(num_inputs, num_classes, generator=generator, dtype=torch.float64)
    return q / q.sum(1, keepdim=True)


def scores(model, x):
    """∂ log p(k|x) of all parameters for every class k at one input, by autograd: [C, P]."""
    log_p = torch.log_softmax(model(x[None])[0], 0)
    rows = [torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in log_p]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def flat(quantity):
    """All parameters joined: [B, P], or [P] where there is no batch."""
    tensors = list(quantity.values())
    return torch.cat([t.flatten(1) for t in tensors], dim=1)


def joined(quantity):
    return torch.cat([tensor.flatten() for tensor in quantity.values()])


def close(a, b, tolerance=1e-10):
    assert a.dtype == torch.float64
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max()


# Equation 21. ------------------------------------------------------------------------------------


def test_data_fisher_by_enumeration_over_q():
    net, x = network(num_inputs=3)
    q, derivs = label_distribution(3), differentiate(net, x)
    labels = Categorical().expected(derivs.outputs, q)
    diagonal = flat(data_fisher(derivs, labels))
    matrices = []
    for b in range(3):
        rows = scores(net, x[b])
        matrices.append(sum(q[b, k] * torch.outer(rows[k], rows[k]) for k in range(3)))
        close(diagonal[b], matrices[b].diagonal())
    close(data_fisher_matrix(net, x, labels, parameters=NAMES), sum(matrices) / 3)
    one = Categorical().expected(derivs.outputs[1:2], q[1:2])
    some = data_fisher_matrix(net, x[1:2], one, parameters=["2.bias", "0.weight"])
    order = [12, 13, 14, 0, 1, 2, 3]
    close(some, matrices[1][order][:, order])


def test_the_residual_is_taken_about_the_models_mean():
    """One bias per class and q certain of class 0: Ĩ = (1 − σ₀)², not 0 as about E_q t."""
    net = nn.Linear(1, 2).double()
    net.weight.data.zero_()
    net.bias.data = torch.tensor([0.0, 3.0]).double().log1p()  # σ = (1/5, 4/5)
    derivs = differentiate(net, torch.ones(1, 1).double())
    labels = Categorical().expected(derivs.outputs, torch.tensor([[1.0, 0.0]]).double())
    expected = torch.tensor([[0.64, 0.64]], dtype=torch.float64)
    close(data_fisher(derivs, labels)["bias"], expected, 1e-14)
    close(
        kl_gradient(derivs, labels)["bias"], torch.tensor([[-0.8, 0.8]], dtype=torch.float64), 1e-14
    )


def test_where_the_model_is_right_the_data_fisher_is_the_fisher_information():
    """q = p: Ĩ = I, its variance is V₁, and ∂KL = 0."""
    net, x = network(num_inputs=2)
    derivs, family = differentiate(net, x), Categorical()
    labels = family.expected(derivs.outputs, torch.softmax(derivs.outputs, 1))
    I = fimlib.fisher_information(derivs, family)
    close(flat(data_fisher(derivs, labels)), flat(I))
    V1 = flat(fimlib.variance_i1(derivs, family, num_samples=4))
    close(flat(data_fisher_variance(derivs, labels, num_samples=4)), V1)
    close(
        data_fisher_matrix(net, x, labels, parameters=NAMES),
        fimlib.fisher_matrix(net, x, family, parameters=NAMES),
    )
    assert flat(kl_gradient(derivs, labels)).abs().max() <= 1e-14


def test_observed_labels_have_no_variance_but_a_bias():
    """Averaged over labels of the true q, Ĩ on one observed label is right; each one is far off."""
    net, x = network()
    derivs, family = differentiate(net, x), Categorical()
    I = flat(fimlib.fisher_information(derivs, family))
    for y in range(3):
        labels = family.observed(derivs.outputs, torch.tensor([y]))
        assert not flat(data_fisher_variance(derivs, labels)).any()
        assert not data_fisher_covariance(net, x, labels, parameters=["2.bias"]).any()
        observed = flat(data_fisher(derivs, labels))
        close(observed[0], scores(net, x[0])[y] ** 2)
        assert (observed - I).norm() > 0.25 * I.norm()


def test_several_observed_labels_are_counted():
    """N observed labels: (1/N) Σ (J·δ_k)², and the same as their frequencies as q."""
    net, x = network(num_inputs=2)
    derivs, family = differentiate(net, x), Categorical()
    y = torch.tensor([[0, 2, 2, 1], [1, 1, 1, 2]])
    observed = family.observed(derivs.outputs, y)
    q = torch.tensor([[1, 1, 2], [0, 3, 1]]).double() / 4
    expected = family.expected(derivs.outputs, q)
    for quantity in (data_fisher, data_fisher_variance, kl_gradient):
        close(flat(quantity(derivs, observed)), flat(quantity(derivs, expected)), 1e-14)
    for b in range(2):
        rows = scores(net, x[b])
        close(flat(data_fisher(derivs, observed))[b], sum(rows[k] ** 2 for k in y[b].tolist()) / 4)


def test_gaussian_data_fisher_by_loops():
    """δ = y − h for every observed label; a hand-made Jacobian, h = Wx."""
    net = nn.Linear(2, 2, bias=False).double()
    x = inputs(2, 2)
    y = inputs(6, 2, seed=5).view(2, 3, 2)
    derivs = differentiate(net, x)
    labels = Gaussian().observed(derivs.outputs, y)
    fisher, variance = data_fisher(derivs, labels), data_fisher_variance(derivs, labels)
    gradient = kl_gradient(derivs, labels)
    for b, o, j in product(range(2), repeat=3):
        row = torch.stack([(y[b, k, o] - net(x[b])[o].detach()) * x[b, j] for k in range(3)])
        got = fisher["weight"][b, o, j], variance["weight"][b, o, j], gradient["weight"][b, o, j]
        expected = (row**2).mean(), (row**2).var(correction=0), -row.mean()
        close(torch.stack(got), torch.stack(expected))


def test_derivatives_are_those_of_the_natural_parameters():
    """A predicted spread, whose outputs are not natural parameters: scores by autograd."""
    net, x, family = mlp([2, 2, 2], nn.Tanh, scale=1.5), inputs(1, 2), GaussianHead()
    derivs, y = differentiate(net, x), inputs(3, 1, seed=5)
    labels = family.observed(derivs.outputs, y[None])
    rows = []
    for one in y[:, 0]:
        mu, rho = net(x)[0]
        log_p = -rho - ((one - mu) / rho.exp()) ** 2 / 2
        gradient = torch.autograd.grad(log_p, list(net.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradient]))
    rows = torch.stack(rows)
    squares = torch.einsum("ki,kj->kij", rows, rows)
    centred = squares - squares.mean(0)
    covariance = torch.einsum("kij,klm->ijlm", centred, centred) / 3
    close(flat(data_fisher(derivs, labels))[0], (rows**2).mean(0))
    close(flat(data_fisher_variance(derivs, labels))[0], (rows**2).var(0, correction=0))
    close(flat(kl_gradient(derivs, labels))[0], -rows.mean(0))
    close(data_fisher_matrix(net, x, labels, parameters=NAMES), squares.mean(0))
    close(data_fisher_covariance(net, x, labels, parameters=NAMES), covariance)


# Lemma 6.1 and Corollaries F.1 and F.2. -----------------------------------------------------------


@pytest.mark.parametrize("num_samples", [1, 2])
def test_lemma_6_1_by_enumeration_over_label_sequences(num_samples):
    net, x = network()
    q, derivs = label_distribution(1), differentiate(net, x)
    labels = Categorical().expected(derivs.outputs, q)
    rows = scores(net, x[0])
    estimates, weights = [], []
    for sequence in product(range(3), repeat=num_samples):
        estimates.append(sum(torch.outer(rows[k], rows[k]) for k in sequence) / num_samples)
        weights.append(q[0, list(sequence)].prod())
    mean = sum(w * e for w, e in zip(weights, estimates, strict=True))
    covariance = sum(
        w * torch.einsum("ij,kl->ijkl", e - mean, e - mean)
        for w, e in zip(weights, estimates, strict=True)
    )
    options = {} if num_samples == 1 else {"num_samples": num_samples}
    ours = data_fisher_covariance(net, x, labels, parameters=NAMES, **options)
    close(data_fisher_matrix(net, x, labels, parameters=NAMES), mean)
    close(ours, covariance)
    diagonal = torch.einsum("iiii->i", covariance)
    close(flat(data_fisher_variance(derivs, labels, **options))[0], diagonal)
    order = ["2.bias", "0.bias"]
    picked = [12, 13, 14, 4, 5]
    some = data_fisher_covariance(net, x, labels, parameters=order, **options)
    close(some, covariance[picked][:, picked][:, :, picked][:, :, :, picked])


def test_lemma_6_1_by_its_tensors():
    """(1/N) ∂h^{⊗4} (𝓚̃ − 𝓘̃⊗𝓘̃), for an average over two inputs half of the mean."""
    net, x = network(num_inputs=2)
    q, derivs = label_distribution(2), differentiate(net, x)
    labels = Categorical().expected(derivs.outputs, q)
    names = ["0.bias", "2.bias"]
    total = 0
    for b in range(2):
        J = torch.cat([derivs.jacobian(name)[b] for name in names], dim=1)
        second = torch.zeros(3, 3, dtype=torch.float64)
        fourth = torch.zeros(3, 3, 3, 3, dtype=torch.float64)
        for k in range(3):
            delta = torch.eye(3, dtype=torch.float64)[k] - torch.softmax(derivs.outputs[b], 0)
            second += q[b, k] * torch.outer(delta, delta)
            fourth += q[b, k] * torch.einsum("a,b,c,d->abcd", *[delta] * 4)
        spread = fourth - torch.einsum("ab,cd->abcd", second, second)
        total = total + torch.einsum("ai,bj,ck,dl,abcd->ijkl", *[J] * 4, spread) / 5
    ours = data_fisher_covariance(net, x, labels, parameters=names, num_samples=5)
    close(ours, total / 4)


def joint_by_enumeration(tables, num_inputs, num_labels):
    """Exact variance [P] over all tuples of inputs and all sequences of labels from q."""
    mean = square = 0
    for chosen in product(tables, repeat=num_inputs):
        for labels in product(range(3), repeat=num_inputs * num_labels):
            slots = [(chosen[i // num_labels], y) for i, y in enumerate(labels)]
            estimate = sum(rows[y] ** 2 for (_, rows), y in slots) / len(slots)
            weight = torch.stack([q[y] for (q, _), y in slots]).prod() / len(tables) ** num_inputs
            mean, square = mean + weight * estimate, square + weight * estimate**2
    return mean, square - mean**2


@pytest.mark.parametrize(("num_inputs", "num_labels"), [(1, 1), (1, 2), (2, 1), (3, 1), (1, 3)])
def test_corollary_f_2_by_enumeration_over_inputs_and_labels(num_inputs, num_labels):
    net, x = network(num_inputs=2)
    q, derivs = label_distribution(2), differentiate(net, x)
    joint = Joint(Categorical())
    joint.update(derivs, Categorical().expected(derivs.outputs, q))
    tables = [(q[b], scores(net, x[b])) for b in range(2)]
    mean, variance = joint_by_enumeration(tables, num_inputs, num_labels)
    close(joined(joint.fisher_information()), mean)
    close(joined(joint.variance_i1(num_inputs, num_labels)), variance)


def test_joint_data_fisher_of_observed_labels_varies_with_the_inputs_alone():
    net, x = network(num_inputs=4)
    derivs, y = differentiate(net, x), torch.tensor([0, 2, 1, 1])
    joint = Joint(Categorical())
    for b in range(4):
        batch = differentiate(net, x[b : b + 1])
        joint.update(batch, Categorical().observed(batch.outputs, y[b : b + 1]))
    squares = torch.stack([scores(net, x[b])[y[b]] ** 2 for b in range(4)])
    close(joined(joint.fisher_information()), squares.mean(0))
    close(joined(joint.input_variance()), squares.var(0, correction=0))
    close(joined(joint.variance_i1(3)), squares.var(0, correction=0) / 3)
    assert not joined(joint.label_variance(1)).any()
    assert not joined(joint.variance_i1(4, replacement=False)).any()
    variance = squares.var(0, correction=0)[:6].sum() / squares.mean(0)[:6].square().sum()
    assert joint.num_inputs_needed(0.5, 0.9)["0"] == int(torch.ceil(variance / 0.025))
    assert joint.count == len(derivs.outputs)


def test_joint_with_data_labels_has_no_second_estimator_and_no_bounds():
    net, x = network(num_inputs=2)
    derivs = differentiate(net, x)
    labels = Categorical().expected(derivs.outputs, label_distribution(2))
    joint = Joint(Categorical())
    joint.update(derivs, labels)
    for missing in (
        lambda: joint.variance_i2(1),
        lambda: joint.label_variance(2),
        joint.label_covariance,
        joint.lemma_4_8,
        lambda: joint.variance_bounds(1),
        lambda: joint.num_inputs_needed(0.1, 0.9, estimator=2),
    ):
        with pytest.raises(ValueError, match="with data labels there is Î₁ only and no bounds"):
            missing()
    with pytest.raises(ValueError, match="on one side only"):
        joint.update(derivs)
    with pytest.raises(ValueError, match="drawn for other outputs"):
        joint.update(differentiate(net, x + 1), labels)
    with pytest.raises(ValueError, match="for Gaussian outputs, the other side for Categorical"):
        Joint(Gaussian()).update(derivs, labels)
    assert joint.count == 2


def test_joint_data_fisher_that_cannot_be_squared_is_refused():
    """On one label Ĩ = 1e200 is finite, and has no label variance, but Ĩ² overflows."""
    net, x = network()
    derivs = differentiate(net, x)
    derivs.blocks[1].J[:] = 1e100 * torch.eye(3)
    joint = Joint(Categorical())
    with pytest.raises(ValueError, match=r"parameter '2.weight' are NaN, infinite or too large"):
        joint.update(derivs, Categorical().observed(derivs.outputs, torch.tensor([1])))
    assert joint.count == 0


# KL. ----------------------------------------------------------------------------------------------


def test_kl_gradient_against_autograd_of_the_kl():
    net, x = network(num_inputs=2)
    q, derivs = label_distribution(2), differentiate(net, x)
    ours = flat(kl_gradient(derivs, Categorical().expected(derivs.outputs, q)))
    for b in range(2):
        log_p = torch.log_softmax(net(x[b : b + 1])[0], 0)
        kl = (q[b] * (q[b].log() - log_p)).sum()
        gradient = torch.autograd.grad(kl, list(net.parameters()))
        close(ours[b], torch.cat([g.flatten() for g in gradient]))


@pytest.mark.parametrize("probabilities", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_data_fisher_is_at_least_the_squared_kl_gradient(probabilities):
    """Ĩ − ∂KL ∂KLᵀ is positive semi-definite, and the covariance of the score under q."""
    num_classes = len(probabilities)
    net, x = mlp([2, 2, num_classes], nn.Tanh, scale=1.5), inputs(1, 2)
    derivs = differentiate(net, x)
    q = torch.tensor([probabilities], dtype=torch.float64)
    labels = Categorical().expected(derivs.outputs, q / q.sum())
    names = ["0.weight", "0.bias", "2.bias"]
    fisher = data_fisher_matrix(net, x, labels, parameters=names)
    kl = kl_gradient(derivs, labels)
    gradient = torch.cat([kl[name][0].flatten() for name in names])
    gap = fisher - torch.outer(gradient, gradient)
    assert torch.linalg.eigvalsh(gap)[0] >= -1e-13 * fisher.abs().max()
    assert gradient.norm() > 0.01
    rows = torch.cat([derivs.jacobian(name)[0].flatten(1) for name in names], dim=1)
    rows = rows - torch.softmax(derivs.outputs[0], 0) @ rows  # scores, one per class
    centred = rows - labels.weights[0] @ rows
    scale = fisher.abs().max()
    expected = centred.T @ (labels.weights[0][:, None] * centred)
    assert (gap - expected).abs().max() <= 1e-13 * scale


# Reparameterisation. ------------------------------------------------------------------------------


class InOtherCoordinates(nn.Module):
    """A network whose parameters θ are a function of ξ."""

    def __init__(self, net, theta_of, xi):
        super().__init__()
        self.net, self.theta_of = [net], theta_of  # in a list: not registered, ξ is all there is
        self.xi = nn.Parameter(xi)

    def forward(self, x):
        theta, values, start = self.theta_of(self.xi), {}, 0
        for name, parameter in self.net[0].named_parameters():
            piece = theta[start : start + parameter.numel()]
            values[name], start = piece.view_as(parameter), start + parameter.numel()
        return torch.func.functional_call(self.net[0], values, (x,))


def linear_map():
    A = inputs(15, 4, seed=7)
    return (lambda xi: A @ xi), inputs(1, 4, seed=8)[0]


def nonlinear_map():
    A = inputs(15, 6, seed=9)
    return (lambda xi: torch.sinh(A @ torch.tanh(xi))), inputs(1, 6, seed=8)[0] / 2


@pytest.mark.parametrize("coordinates", [linear_map, nonlinear_map])
def test_reparameterisation_through_a_reparameterised_network(coordinates):
    """Ĩ(ξ) and I(ξ) of the network in ξ against (∂θ/∂ξ)ᵀ · (∂θ/∂ξ) of the network in θ."""
    theta_of, xi = coordinates()
    net, x = network(num_inputs=3)
    nn.utils.vector_to_parameters(theta_of(xi), net.parameters())
    other = InOtherCoordinates(net, theta_of, xi)
    q, family, outputs = label_distribution(3), Categorical(), net(x).detach()
    jacobian = torch.func.jacrev(theta_of)(xi)
    assert jacobian.shape == (15, len(xi))
    labels = family.expected(outputs, q)
    close(
        reparameterise(data_fisher_matrix(net, x, labels, parameters=NAMES), jacobian),
        data_fisher_matrix(other, x, labels, parameters=["xi"]),
    )
    close(
        reparameterise(fimlib.fisher_matrix(net, x, family, parameters=NAMES), jacobian),
        fimlib.fisher_matrix(other, x, family, parameters=["xi"]),
    )


def test_reparameterisation_is_done_in_float64():
    half = torch.tensor([[1 / 3]], dtype=torch.float32)
    result = reparameterise(half, half)
    assert result.dtype == torch.float64
    assert result.item() == half.double().item() ** 3


# Errors. ------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused_with_a_remedy():
    net, x = network()
    derivs, other = differentiate(net, x), differentiate(net, x + 1)
    labels = Categorical().expected(derivs.outputs, label_distribution(1))
    for quantity in (data_fisher, data_fisher_variance, kl_gradient):
        with pytest.raises(ValueError, match="drawn for other outputs"):
            quantity(other, labels)
    for matrix in (data_fisher_matrix, data_fisher_covariance):
        with pytest.raises(ValueError, match="drawn for other outputs"):
            matrix(net, x + 1, labels, parameters=["2.bias"])
        with pytest.raises(ValueError, match=r"no parameters named \['w'\]"):
            matrix(net, x, labels, parameters=["w"])
    with pytest.raises(ValueError, match=r"num_samples \(N\) must be an integer ≥ 1, got 0"):
        data_fisher_variance(derivs, labels, num_samples=0)
    with pytest.raises(ValueError, match=r"num_samples \(N\) must be an integer ≥ 1, got 0"):
        data_fisher_covariance(net, x, labels, parameters=["2.bias"], num_samples=0)


@pytest.mark.parametrize("shape", [(2,), (2, 3), (2, 2, 2)])
def test_the_fisher_matrix_to_be_reparameterised_must_be_square(shape):
    with pytest.raises(ValueError, match=r"square matrix \[P, P\], got \[2"):
        reparameterise(torch.ones(shape), torch.ones(2, 2))


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 2, 2)])
def test_the_jacobian_must_fit_the_fisher_matrix(shape):
    with pytest.raises(ValueError, match=r"shape \[P, Q\] and P = 2, got \[.*: one row for every"):
        reparameterise(torch.ones(2, 2), torch.ones(shape))
