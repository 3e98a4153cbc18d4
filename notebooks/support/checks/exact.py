"""Every equality of the paper, against enumerated labels and plain autograd in float64.

The other side of each comparison is slow and obvious: log p(y|x;θ) of a small network,
differentiated twice by autograd for every label; sums over all labels, label sequences, inputs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fimlib
from fimlib import Categorical, Derivatives, Diagonal, Labels
from support.checks import cases as make
from support.checks.check import Check, at_most, equal, together, within

FAMILY = Categorical()


class Oracle(NamedTuple):
    """A network, m inputs, and log p(y|x) differentiated in all P parameters for all C labels."""

    net: nn.Sequential
    x: Tensor  # [m, …]
    p: Tensor  # [m, C]
    gradients: Tensor  # [m, C, P]
    hessians: Tensor  # [m, C, P, P]
    q: Tensor  # [m, C], another label distribution: the data's

    @property
    def names(self) -> list[str]:
        """Parameter names, in the order of the vector."""
        return [name for name, _ in self.net.named_parameters()]

    @property
    def derivs(self) -> Derivatives:
        """What fimlib reads."""
        return fimlib.differentiate(self.net, self.x)

    @property
    def i1(self) -> Tensor:
        """Î₁ on a single label, for every label: [m, C, P]."""
        return self.gradients.square()

    @property
    def i2(self) -> Tensor:
        """Î₂ on a single label, for every label: [m, C, P]."""
        return -self.hessians.diagonal(dim1=2, dim2=3)


def function_of_parameters(net: nn.Module, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The outputs at x as a function of all parameters in a vector, and the network's vector."""
    sizes = [parameter.numel() for parameter in net.parameters()]

    def outputs(theta: Tensor) -> Tensor:
        parts = zip(net.named_parameters(), torch.split(theta, sizes), strict=True)
        parameters = {name: part.view_as(own) for (name, own), part in parts}
        found: Tensor = torch.func.functional_call(net, parameters, (x,))
        return found

    return outputs, nn.utils.parameters_to_vector(net.parameters()).detach()


@functools.cache
def oracle(activation: make.Activation = nn.Sigmoid) -> Oracle:
    """A 2-3-3-3 network with weights large enough to bend, at three inputs."""
    torch.manual_seed(0)
    layers = [nn.Linear(2, 3), activation(), nn.Linear(3, 3), activation(), nn.Linear(3, 3)]
    net = nn.Sequential(*layers).double().eval()
    for parameter in net.parameters():
        parameter.data.mul_(3)
    x = make.normal(3, 2, seed=1)
    outputs, theta = function_of_parameters(net, x)

    def log_p(theta: Tensor) -> Tensor:
        return torch.log_softmax(outputs(theta), 1)

    gradients = torch.func.jacrev(log_p)(theta)
    hessians = torch.func.jacrev(torch.func.jacrev(log_p))(theta)
    q = torch.softmax(make.normal(3, 3, seed=2), 1)
    return Oracle(net, x, log_p(theta).exp(), gradients, hessians, q)


def flat(diagonal: Diagonal | dict[str, Tensor], names: Iterable[str]) -> Tensor:
    """A diagonal quantity as vectors [B, P], or a joint one as [P]."""
    entries = [diagonal[name] for name in names]
    batched = isinstance(diagonal, Diagonal)
    return torch.cat([e.flatten(1) if batched else e.flatten() for e in entries], -1)


def expectation(p: Tensor, values: Tensor) -> Tensor:
    """Σ_y p(y|x) values[x, y, …]."""
    return torch.einsum("xy,xy...->x...", p, values)


# Section 1.


def eq_1(cases: int) -> Check:
    """t(y)ᵀh − F(h) is the logarithm of a probability that sums to one."""
    parts = []
    for num_classes in (2, 10, 100):
        h = make.logits(num_classes, -(-cases // 300))
        log_p = h - FAMILY.log_partition(h)[:, None]
        parts.append(equal(log_p.exp().sum(1), torch.ones(len(h), dtype=torch.float64)))
        parts.append(equal(log_p.exp(), FAMILY.mean(h)))
    return together(*parts)


def eq_2(_cases: int) -> Check:
    """E[∂ℓ ∂ℓᵀ] = −E[∂²ℓ], the whole matrix, and fimlib's matrix is both."""
    o = oracle()
    outer = torch.einsum("xy,xyi,xyj->ij", o.p, o.gradients, o.gradients) / len(o.x)
    curvature = -torch.einsum("xy,xyij->ij", o.p, o.hessians) / len(o.x)
    ours = fimlib.fisher_matrix(o.net, o.x, FAMILY, parameters=o.names)
    return together(equal(curvature, outer), equal(ours, outer))


def sequences(length: int) -> Iterable[tuple[int, ...]]:
    """All label sequences of a length."""
    return itertools.product(range(3), repeat=length)


def drawn(o: Oracle, labels: tuple[int, ...]) -> Labels:
    """The same labels at every input."""
    y = torch.tensor(labels).expand(len(o.x), -1)
    return FAMILY.observed(o.derivs.outputs, y)


def matrix_estimator(
    estimate: Callable[..., Tensor], slow: Callable[[Oracle, int], Tensor]
) -> Check:
    """A matrix estimator on every pair of labels: its definition, and no bias."""
    o, parts, mean = oracle(), [], torch.zeros(())
    o = o._replace(x=o.x[:1], p=o.p[:1])
    for labels in sequences(2):
        ours = estimate(o.net, o.x, drawn(o, labels), parameters=o.names)
        expected = (slow(o, labels[0]) + slow(o, labels[1])) / 2
        parts.append(equal(ours, expected))
        mean = mean + o.p[0, list(labels)].prod() * ours
    fisher = fimlib.fisher_matrix(o.net, o.x, FAMILY, parameters=o.names)
    return together(*parts, equal(mean, fisher))


def eq_3(_cases: int) -> Check:
    """Î₁(θ) = (1/N) Σ ∂ℓ ∂ℓᵀ, unbiased."""
    return matrix_estimator(
        fimlib.estimate_i1_matrix, lambda o, y: torch.outer(o.gradients[0, y], o.gradients[0, y])
    )


def eq_4(_cases: int) -> Check:
    """Î₂(θ) = −(1/N) Σ ∂²ℓ, unbiased."""
    return matrix_estimator(fimlib.estimate_i2_matrix, lambda o, y: -o.hessians[0, y])


# Section 3 and Appendix A.


def diagonal_estimator(estimate: Callable[..., Diagonal], single: Tensor) -> Check:
    """A diagonal estimator on every sequence of three labels."""
    o, parts = oracle(), []
    for labels in sequences(3):
        ours = flat(estimate(o.derivs, drawn(o, labels)), o.names)
        parts.append(equal(ours, single[:, list(labels)].mean(1)))
    return together(*parts)


def eq_5(_cases: int) -> Check:
    """Î₁(θᵢ) = (1/N) Σ (J·δ)²."""
    return diagonal_estimator(fimlib.estimate_i1, oracle().i1)


def eq_6(_cases: int) -> Check:
    """Î₂(θᵢ) = (1/N) Σ (Jᵀ𝓘J − S·δ)."""
    return diagonal_estimator(fimlib.estimate_i2, oracle().i2)


def moments(order: int, cases: int) -> Check:
    """The moments of t(y), order 1 about 0 (η), 2 (𝓘) and 4 (𝓚) about η.

    By enumerating the labels, and as derivatives of F by autograd (𝓚 less its pairings).
    """
    parts, ours = [], {1: FAMILY.mean, 2: FAMILY.covariance, 4: FAMILY.fourth_moment}[order]
    for num_classes in (2, 3, 5):
        h = make.logits(num_classes, -(-cases // 100))
        p, delta = torch.softmax(h, 1), -torch.softmax(h, 1)[:, None] + torch.eye(num_classes)
        if order == 1:
            slow = torch.func.grad(lambda v: FAMILY.log_partition(v).sum())(h)
        elif order == 2:
            slow = (p[:, :, None] * delta).mT @ delta
        else:
            pairs = torch.einsum("byi,byj->byij", delta, delta).flatten(2)
            slow = ((p[:, :, None] * pairs).mT @ pairs).view(len(h), *[num_classes] * 4)
        parts.append(equal(ours(h), slow))
    return together(*parts)


def eq_7(cases: int) -> Check:
    """η = E[t(y)|x]."""
    return moments(1, cases)


def eq_8(cases: int) -> Check:
    """𝓘 = E[δδᵀ]."""
    return moments(2, cases)


def eq_9(cases: int) -> Check:
    """𝓚 = E[δ⊗δ⊗δ⊗δ]."""
    return moments(4, cases)


def closed_form(quantity: Callable[..., Diagonal], slow: Callable[[Oracle], Tensor]) -> Check:
    """A quantity of Lemma A.1 in networks with several activations."""
    parts = []
    for activation in (nn.Sigmoid, nn.Tanh, nn.LogSigmoid, nn.Softplus):
        o = oracle(activation)
        parts.append(equal(flat(quantity(o.derivs, FAMILY), o.names), slow(o)))
    return together(*parts)


def variance_over_labels(p: Tensor, values: Tensor) -> Tensor:
    """Variance of values[x, y, …] under p(y|x)."""
    return expectation(p, (values - expectation(p, values)[:, None]).square())


def eq_23(_cases: int) -> Check:
    """I = JᵀJ under 𝓘: the mean of (∂ log p)²."""
    return closed_form(fimlib.fisher_information, lambda o: expectation(o.p, o.i1))


def eq_24(_cases: int) -> Check:
    """V₁, the variance of (∂ log p)²."""
    return closed_form(fimlib.variance_i1, lambda o: variance_over_labels(o.p, o.i1))


def eq_25(_cases: int) -> Check:
    """V₂, the variance of −∂² log p."""
    return closed_form(fimlib.variance_i2, lambda o: variance_over_labels(o.p, o.i2))


# Section 4.1. Inputs drawn from the three, labels from p (Eq. 20) or from q (Eq. 32).


def joint_by_enumeration(
    p: Tensor, single: Tensor, num_inputs: int, num_labels: int, *, replacement: bool
) -> Tensor:
    """Variance of the joint estimator over all input tuples and label sequences: [P].

    Args:
        p: [m, C], the probability of each label at each input.
        single: [m, C, P], the estimator on a single label.
        num_inputs: n_x, with or without replacement.
        num_labels: n_y.
        replacement: Whether one input may be drawn twice.
    """
    inputs = range(len(p))
    tuples = (
        itertools.product(inputs, repeat=num_inputs)
        if replacement
        else itertools.permutations(inputs, num_inputs)
    )
    weights, estimates = [], []
    for chosen in tuples:
        for labels in sequences(num_inputs * num_labels):
            at = [x for x in chosen for _ in range(num_labels)]
            weights.append(p[at, list(labels)].prod())
            estimates.append(single[at, list(labels)].mean(0))
    weight, estimate = torch.stack(weights), torch.stack(estimates)
    weight = weight / weight.sum()
    mean = weight @ estimate
    return weight @ (estimate - mean).square()


SIZES = ((1, 1, True), (1, 3, True), (2, 1, True), (2, 2, True), (3, 1, False), (2, 2, False))


def eq_20(_cases: int) -> Check:
    """Var Î_j = (1/n_x)[Var_x I + (1/n_y) E_x V_j], with and without replacement."""
    o, parts = oracle(), []
    joint = fimlib.Joint(FAMILY)
    joint.update(o.derivs)
    for n_x, n_y, replacement in SIZES:
        for variance, single in ((joint.variance_i1, o.i1), (joint.variance_i2, o.i2)):
            slow = joint_by_enumeration(o.p, single, n_x, n_y, replacement=replacement)
            parts.append(equal(flat(variance(n_x, n_y, replacement=replacement), o.names), slow))
    return together(*parts)


def of_biases(derivs: Derivatives, chosen: Tensor) -> Derivatives:
    """The derivatives in the biases alone, at chosen inputs."""
    blocks = tuple(
        fimlib.Block(b.layer, b.J[chosen], b.second[chosen], {f"{b.layer}.bias": None})
        for b in derivs.blocks
    )
    return Derivatives(derivs.outputs[chosen], blocks)


def eq_20_sampled(_cases: int, repeats: int = 4000) -> Check:
    """The same by simulation on a trained network: 8 inputs of 200, 4 labels each; its biases."""
    n_x, n_y, population = 8, 4, 200
    derivs = make.trained_derivatives(inputs=population)
    joint = fimlib.Joint(FAMILY)
    joint.update(derivs)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(population, (repeats * n_x,), generator=generator)
    drawn_inputs = of_biases(derivs, chosen)
    labels = FAMILY.sample(drawn_inputs.outputs, n_y, generator)
    parts = []
    for estimate, variance in (
        (fimlib.estimate_i1(drawn_inputs, labels), joint.variance_i1(n_x, n_y)),
        (fimlib.estimate_i2(drawn_inputs, labels), joint.variance_i2(n_x, n_y)),
    ):
        for name, values in estimate.items():
            draws = values.view(repeats, n_x, -1).mean(1)
            squares = (draws - joint.fisher_information()[name]).square()
            parts.append(
                within(squares.mean(0), variance[name], squares.std(0) / repeats**0.5, repeats)
            )
    return together(*parts)


def chebyshev(cases: int) -> Check:
    """With the labels that num_samples_needed asks for, ‖Î − I‖ ≥ ε‖I‖ is rare enough.

    The biases of each layer of a trained network, at ten inputs; the share of failures against
    1 − confidence.
    """
    relative_error, confidence, inputs = 0.5, 0.9, 10
    repeats = -(-cases // inputs)
    generator, parts = torch.Generator().manual_seed(0), []
    derivs = of_biases(make.trained_derivatives(inputs=inputs), torch.arange(inputs))
    for block in derivs.blocks:
        one, name = Derivatives(derivs.outputs, (block,)), f"{block.layer}.bias"
        for estimator, estimate in ((1, fimlib.estimate_i1), (2, fimlib.estimate_i2)):
            needed = fimlib.num_samples_needed(
                one,
                FAMILY,
                relative_error=relative_error,
                confidence=confidence,
                estimator=estimator,
            )[block.layer]
            fisher = fimlib.fisher_information(one, FAMILY)[name]
            failures = torch.zeros(inputs, dtype=torch.float64)
            for at in range(inputs):
                copies = of_biases(one, torch.full((repeats,), at))
                labels = FAMILY.sample(copies.outputs, int(needed[at]), generator)
                error = (estimate(copies, labels)[name] - fisher[at]).norm(dim=1)
                failures[at] = (error >= relative_error * fisher[at].norm()).double().mean()
            allowed = torch.full_like(failures, 1 - confidence)
            parts.append(at_most(failures, allowed, 0.0)._replace(cases=repeats * inputs))
    return together(*parts)


def lemma_4_8(cases: int, *, tight: bool) -> Check:
    """0 ≤ Var_x I ≤ E[λ_max² ‖J‖⁴], or the tighter form, for many made-up parameters."""
    parts = []
    for family, num_outputs in itertools.product((FAMILY, fimlib.Gaussian()), (2, 3, 10)):
        for inputs in (1, 2, 9):
            h = make.logits(num_outputs, inputs, seed=inputs)
            J = make.vectors(h, -(-cases // 18), seed=inputs)
            joint = fimlib.Joint(family, bounds="certified")
            joint.update(make.as_derivatives(h, J, J))
            value, bound = joint.input_variance(), joint.lemma_4_8(tight=tight)
            size = J.square().sum(1).square().mean(0)
            parts.append(at_most(bound.lower["theta"], value["theta"], size))
            parts.append(at_most(value["theta"], bound.upper["theta"], size))
    return together(*parts)


def lemma_4_8_printed(cases: int) -> Check:
    """Lemma 4.8 as it stands."""
    return lemma_4_8(cases, tight=False)


def lemma_4_8_tight(cases: int) -> Check:
    """Lemma 4.8 minus the square of the lower bound's mean."""
    return lemma_4_8(cases, tight=True)


# Section 6 and Appendix F.


def expected_labels(o: Oracle) -> Labels:
    """The data's label distribution q, for fimlib."""
    return FAMILY.expected(o.derivs.outputs, o.q)


def eq_21(_cases: int) -> Check:
    """Ĩ = (∂h)ᵀ E_q[δδᵀ] (∂h): the second moment of the score under q, matrix and diagonal."""
    o = oracle()
    labels = expected_labels(o)
    slow = torch.einsum("xy,xyi,xyj->ij", o.q, o.gradients, o.gradients) / len(o.x)
    ours = fimlib.empirical.data_fisher_matrix(o.net, o.x, labels, parameters=o.names)
    diagonal = flat(fimlib.data_fisher(o.derivs, labels), o.names)
    return together(equal(ours, slow), equal(diagonal, expectation(o.q, o.i1)))


def data_fisher_of_the_model(_cases: int) -> Check:
    """Ĩ = I where q is the model's own distribution."""
    o = oracle()
    labels = FAMILY.expected(o.derivs.outputs, o.p)
    ours = flat(fimlib.data_fisher(o.derivs, labels), o.names)
    return equal(ours, flat(fimlib.fisher_information(o.derivs, FAMILY), o.names))


def eq_22(_cases: int) -> Check:
    """Lemma 6.1: the covariance of all pairs of entries, over all sequences of two labels."""
    o = oracle()
    net, x = o.net, o.x[:1]
    labels = FAMILY.expected(fimlib.differentiate(net, x).outputs, o.q[:1])
    names = o.names[-2:]
    size = sum(net.get_parameter(name).numel() for name in names)
    score = o.gradients[0, :, -size:]
    outer = torch.einsum("yi,yj->yij", score, score)
    mean = torch.einsum("y,yij->ij", o.q[0], outer)
    slow = torch.zeros(size, size, size, size, dtype=torch.float64)
    for a, b in sequences(2):
        gap = (outer[a] + outer[b]) / 2 - mean
        slow += o.q[0, a] * o.q[0, b] * torch.einsum("ij,kl->ijkl", gap, gap)
    ours = fimlib.empirical.data_fisher_covariance(net, x, labels, parameters=names, num_samples=2)
    return equal(ours, slow)


def corollary_f_1(_cases: int) -> Check:
    """The variance of the diagonal of Ĩ over one label, and over two."""
    o = oracle()
    labels = expected_labels(o)
    parts = []
    for n in (1, 2):
        slow = torch.zeros_like(o.i1[:, 0])
        for y in sequences(n):
            weight = o.q[:, list(y)].prod(1, keepdim=True)
            slow += weight * (o.i1[:, list(y)].mean(1) - expectation(o.q, o.i1)).square()
        ours = fimlib.data_fisher_variance(o.derivs, labels, num_samples=n)
        parts.append(equal(flat(ours, o.names), slow))
    return together(*parts)


def eq_32(_cases: int) -> Check:
    """Corollary F.2: the joint variance of Ĩ's estimator, by enumeration."""
    o, parts = oracle(), []
    joint = fimlib.Joint(FAMILY)
    joint.update(o.derivs, expected_labels(o))
    for n_x, n_y, replacement in SIZES:
        slow = joint_by_enumeration(o.q, o.i1, n_x, n_y, replacement=replacement)
        ours = joint.variance_i1(n_x, n_y, replacement=replacement)
        parts.append(equal(flat(ours, o.names), slow))
    return together(*parts)


def kl_bound(cases: int) -> Check:
    """(∂KL)² ≤ Ĩ at every parameter; with made-up J, that is ∂KL ∂KLᵀ ⪯ Ĩ in every direction."""
    parts = []
    for num_classes in (2, 3, 10):
        h = make.logits(num_classes, 20)
        q = torch.softmax(make.logits(num_classes, 20, seed=1).roll(1, 0), 1)
        J = make.vectors(h, -(-cases // 60))
        derivs, labels = make.as_derivatives(h, J, J), FAMILY.expected(h, q)
        gradient = fimlib.kl_gradient(derivs, labels)["theta"]
        ours = fimlib.data_fisher(derivs, labels)["theta"]
        parts.append(at_most(gradient.square(), ours, J.square().sum(1)))
    return together(*parts)


def kl_gradient(_cases: int) -> Check:
    """∂KL(q ‖ p) = −J·E_q[δ], against autograd: minus the mean of ∂ log p under q."""
    o = oracle()
    ours = flat(fimlib.kl_gradient(o.derivs, expected_labels(o)), o.names)
    return equal(ours, -expectation(o.q, o.gradients))


def reparameterisation(_cases: int) -> Check:
    """Ĩ in ξ with θ = ξ + ξ³: (∂θ/∂ξ)ᵀ Ĩ(θ) (∂θ/∂ξ), against the scores in ξ."""
    o = oracle()
    xi = make.normal(o.gradients.shape[2], seed=4)
    jacobian = torch.diag(1 + 3 * xi.square())
    scores = torch.einsum("xyi,ij->xyj", o.gradients, jacobian)
    slow = torch.einsum("xy,xyi,xyj->ij", o.q, scores, scores) / len(o.x)
    fisher = fimlib.empirical.data_fisher_matrix(o.net, o.x, expected_labels(o), parameters=o.names)
    return equal(fimlib.empirical.reparameterise(fisher, jacobian), slow)
