"""Three ways to one answer: the oracle, our engines, and BackPACK; quantities and bounds alike."""

import functools

import pytest
import reference
import torch
from strategies import inputs, mlp
from torch import nn

import fimlib
from fimlib import differentiate

FAMILY = fimlib.Categorical()
QUANTITIES = {
    "I": fimlib.fisher_information,
    "v1": fimlib.variance_i1,
    "v2": fimlib.variance_i2,
    "c12": fimlib.covariance_i1_i2,
}


def images(batch):
    return inputs(batch, 36).view(batch, 1, 6, 6)


def network(*layers):
    """In float64 and eval mode, with new weights: layers are made before a seed can be set."""
    net = nn.Sequential(*layers).double().eval()
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.7)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net


def lenet(activation, pooling):
    return network(
        nn.Conv2d(1, 2, 3),
        activation(),
        pooling(2),
        nn.Conv2d(2, 3, 2),
        activation(),
        nn.Flatten(),
        nn.Linear(3, 4),
        activation(),
        nn.Linear(4, 3),
    )


def vgg(activation, pooling):
    def block(n_in, n_out):
        conv = nn.Conv2d(n_in, n_out, 3, padding=1)
        return conv, nn.BatchNorm2d(n_out), activation()

    return network(
        *block(1, 2),
        *block(2, 2),
        pooling(2),
        *block(2, 2),
        pooling(3),
        nn.Flatten(),
        nn.Linear(2, 3),
    )


class Residual(nn.Module):
    """conv - bn - σ - conv - bn, added to what came in; a shortcut where the shape changes."""

    def __init__(self, n_in, n_out, stride, activation):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
            activation(),
            nn.Conv2d(n_out, n_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
        )
        self.short = nn.Conv2d(n_in, n_out, 1, stride) if stride > 1 else nn.Identity()
        self.activation = activation()

    def forward(self, z):
        return self.activation(self.body(z) + self.short(z))


def resnet(activation):
    return network(
        nn.Conv2d(1, 2, 3, padding=1),
        Residual(2, 2, 1, activation),
        Residual(2, 3, 2, activation),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 3),
    )


def case(build, make_inputs, engines):
    return build, make_inputs, engines.split()


vectors = functools.partial(inputs, width=4)
SMALL = [4, 5, 4, 3]
# The network, its inputs, the engines that take it; "ggn" is BackPACK's own DiagGGNExact, of I.
CASES = {
    "mlp sigmoid": case(
        lambda: mlp(SMALL, nn.Sigmoid, scale=2.0), vectors, "layerwise traced backpack ggn"
    ),
    "mlp tanh": case(
        lambda: mlp(SMALL, nn.Tanh, scale=2.0), vectors, "layerwise traced backpack ggn"
    ),
    "mlp log-sigmoid": case(
        lambda: mlp(SMALL, nn.LogSigmoid, scale=2.0), vectors, "layerwise traced backpack ggn"
    ),
    "mlp relu": case(
        lambda: mlp(SMALL, nn.ReLU, scale=2.0), vectors, "layerwise traced backpack ggn"
    ),
    # BackPACK's rule for AvgPool2d knows float32 only.
    "lenet sigmoid": case(lambda: lenet(nn.Sigmoid, nn.AvgPool2d), images, "traced"),
    "lenet sigmoid max": case(
        lambda: lenet(nn.Sigmoid, nn.MaxPool2d), images, "traced backpack ggn"
    ),
    "lenet tanh max": case(lambda: lenet(nn.Tanh, nn.MaxPool2d), images, "traced backpack ggn"),
    "lenet relu max": case(lambda: lenet(nn.ReLU, nn.MaxPool2d), images, "traced backpack ggn"),
    "vgg silu": case(lambda: vgg(nn.SiLU, nn.AvgPool2d), images, "traced"),
    "vgg softplus": case(lambda: vgg(nn.Softplus, nn.MaxPool2d), images, "traced"),
    "vgg relu": case(lambda: vgg(nn.ReLU, nn.MaxPool2d), images, "traced"),
    "resnet softplus": case(lambda: resnet(nn.Softplus), images, "traced"),
    "resnet relu": case(lambda: resnet(nn.ReLU), images, "traced"),
}
WITH_ENGINES = [
    (name, engine)
    for name, (_, _, engines) in CASES.items()
    for engine in engines
    if engine != "ggn"
]


@functools.cache
def oracle(name):
    """The network, its inputs, and what autograd says of each: J and S, and the moments."""
    build, make_inputs, _ = CASES[name]
    net, x = build(), make_inputs(2)
    alone = x.split(1)
    derivatives = [reference.derivatives(net, one) for one in alone]
    return net, x, derivatives, [reference.categorical(net, one) for one in alone]


def largest(values):
    return max(float(value.abs().max()) for value in values.values())


def assert_close(ours, exact, floor=1e-4):
    """Up to rounding, which grows with the largest number of all parameters."""
    scale = max(floor, largest(exact))
    for name, value in exact.items():
        assert ours[name].shape == value.shape
        assert float((ours[name] - value).abs().max()) <= 1e-10 * scale


def stacked(each):
    """Of one dict by parameter for each input, one for all of them."""
    return {name: torch.stack([values[name] for values in each]) for name in each[0]}


@pytest.mark.parametrize(("name", "engine"), WITH_ENGINES)
def test_derivatives(name, engine):
    net, x, exact, _ = oracle(name)
    derivs = differentiate(net, x, engine=engine)
    assert derivs.engine == engine
    J, S = (stacked(each) for each in zip(*exact, strict=True))
    assert_close({name: derivs.jacobian(name) for name in J}, J)
    # BackPACK's S is what 2‖J‖² + S and 2‖J‖² differ by, and is rounded as those are
    squares = {name: 2 * left.square().sum(1) for name, left in J.items()}
    floor = 1e-4 * max(1, largest(squares)) if engine == "backpack" else 1e-4
    assert_close({name: derivs.second(name) for name in S}, S, floor)


@pytest.mark.parametrize(("name", "engine"), WITH_ENGINES)
def test_quantities_at_single_inputs(name, engine):
    net, x, _, exact = oracle(name)
    derivs = differentiate(net, x, engine=engine)
    for quantity, function in QUANTITIES.items():
        assert_close(function(derivs, FAMILY), stacked([e[quantity] for e in exact]))


@pytest.mark.parametrize(("name", "engine"), WITH_ENGINES)
def test_bounds_at_single_inputs(name, engine):
    """Theorem 4.1, from the eigenvalues of the dense covariance and the oracle's J and S."""
    net, x, exact, _ = oracle(name)
    derivs = differentiate(net, x, engine=engine)
    fisher, variance1, variance2 = fimlib.theorem_4_1(derivs, FAMILY)
    eigenvalues = [dense_eigenvalues(h) for h in derivs.outputs]
    max_outer = fimlib.spectrum(FAMILY, derivs.outputs).max_outer

    def bound(which, power, factors):
        squares = [{n: D.square().sum(0) ** power for n, D in e[which].items()} for e in exact]
        pairs = zip(squares, factors, strict=True)
        return stacked([{n: f * D for n, D in by_name.items()} for by_name, f in pairs])

    least, most = zip(*eigenvalues, strict=True)
    # the least eigenvalue is 0 up to the rounding of the largest
    assert_close(fisher.lower, bound(0, 1, least), floor=largest(bound(0, 1, most)))
    assert_close(fisher.upper, bound(0, 1, most))
    assert_close(variance1.upper, bound(0, 2, max_outer))
    assert_close(variance2.lower, bound(1, 1, least), floor=largest(bound(1, 1, most)))
    assert_close(variance2.upper, bound(1, 1, most))


def dense_eigenvalues(h):
    """The least and the largest of the covariance of a one-hot label, at logits h."""
    cov, _ = reference.moments(torch.softmax(h, dim=0))
    values = torch.linalg.eigvalsh(cov)
    return values[0].clamp(min=0), values[-1]


@pytest.mark.parametrize(("name", "engine"), WITH_ENGINES)
def test_quantities_over_a_data_set(name, engine):
    """Theorem 4.7: the mean of the moments of one input, and the variance of I over the inputs."""
    net, x, _, exact = oracle(name)
    joint = fimlib.Joint(FAMILY)
    for one in x.split(1):
        joint.update(differentiate(net, one, engine=engine))
    moments = {q: stacked([e[q] for e in exact]) for q in QUANTITIES}
    over_inputs = {n: I.var(0, correction=0) for n, I in moments["I"].items()}
    assert_close(joint.fisher_information(), {n: I.mean(0) for n, I in moments["I"].items()})
    assert_close(joint.input_variance(), over_inputs)
    for j, ours in ((1, joint.variance_i1), (2, joint.variance_i2)):
        total = {n: (over_inputs[n] + v.mean(0) / 3) / 2 for n, v in moments[f"v{j}"].items()}
        assert_close(ours(num_inputs=2, num_labels=3), total)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of BackPACK's own
@pytest.mark.parametrize("name", [n for n, (_, _, engines) in CASES.items() if "ggn" in engines])
def test_fisher_information_equals_the_diagonal_of_backpacks_ggn(name):
    """For the cross-entropy of logits, the generalised Gauss-Newton matrix is the Fisher."""
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")
    net, x, _, _ = oracle(name)
    engine = CASES[name][2][0]
    ours = fimlib.fisher_information(differentiate(net, x, engine=engine), FAMILY)
    theirs, loss = backpack.extend(CASES[name][0]()), backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(extensions.DiagGGNExact()):
        loss(theirs(x), torch.zeros(len(x), dtype=torch.long)).backward()
    diagonal = {name: parameter.diag_ggn_exact for name, parameter in theirs.named_parameters()}
    assert_close(ours.mean_over_inputs(), diagonal)


def test_a_wide_network_at_some_of_its_parameters():
    """784-1024-1024-1024-10: J and S by autograd, twice, at single weights of every layer."""
    net = mlp([784, 1024, 1024, 1024, 10], nn.Sigmoid, scale=2.0)
    x = inputs(1, 784).sigmoid()
    derivs = differentiate(net, x)
    assert derivs.engine == "layerwise"
    blocks = {name: block for block in derivs.blocks for name in block.inputs}
    for name, parameter in net.named_parameters():
        block, z = blocks[name], blocks[name].inputs[name]
        for i in (0, parameter.numel() // 2 + 7, parameter.numel() - 1):
            i %= parameter.numel()
            place = torch.unravel_index(torch.tensor(i), parameter.shape)
            right = 1.0 if z is None else z[0, place[1]]
            ours = block.J[0, :, place[0]] * right, block.S[0, :, place[0]] * right**2
            for a in (0, 9):
                h = net(x)[0, a]
                (first,) = torch.autograd.grad(h, parameter, create_graph=True)
                second = torch.zeros(())
                if first.requires_grad:
                    (second,) = torch.autograd.grad(
                        first[place], parameter, allow_unused=True, materialize_grads=True
                    )
                    second = second[place]
                for derivative, exact in zip(ours, (first[place], second), strict=True):
                    error = float((derivative[a] - exact).detach().abs())
                    assert error <= 1e-10 * max(float(exact.detach().abs()), 1e-6)
