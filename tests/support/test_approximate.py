"""Diagonal recursions for S: exact where the theory says so, and measurably not elsewhere."""

import copy

import pytest
import reference
import torch
from strategies import Cube, inputs, mlp
from support.bench.approximate import (
    METHODS,
    carried_back,
    differentiate,
    hessian_diagonal_approximation,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fimlib
from fimlib import Bernoulli, Categorical, Gaussian, GaussianHead, Poisson
from fimlib.engines.confirm import Unconfirmed

DEEP = [3, 5, 4, 6, 4, 3]


def chain_of(*modules, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(*m) if isinstance(m, tuple) else m() for m in modules]
    net = nn.Sequential(*layers).double().eval()
    for parameter in net.parameters():
        parameter.data.mul_(1.5)
    return net


def error(a, b):
    """Largest difference, relative to the largest entry."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))


def linear_layers(net):
    return [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]


def exact_layers(net, approximate, exact):
    """Which linear layers, counted from the input, agree to 1e-10; the others must be far off."""
    found = []
    for i, layer in enumerate(linear_layers(net)):
        errors = [
            error(approximate(f"{layer}.{p}"), exact(f"{layer}.{p}")) for p in ("weight", "bias")
        ]
        assert max(errors) < 1e-10 or min(errors) > 1e-3
        if max(errors) < 1e-10:
            found.append(i)
    return found


# S.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh, nn.LogSigmoid, nn.Softplus, Cube])
def test_exact_in_the_last_three_layers_of_an_mlp_and_not_below(activation, method):
    net, x = mlp(DEEP, activation, scale=1.5), inputs(3, 3)
    ours, exact = (
        differentiate(net, x, method=method),
        fimlib.differentiate(net, x, engine="layerwise"),
    )
    assert torch.equal(ours.outputs, exact.outputs)
    for name, _ in net.named_parameters():
        assert error(ours.jacobian(name), exact.jacobian(name)) < 1e-12
    assert exact_layers(net, ours.second, exact.second) == [2, 3, 4]


T, R, I = nn.Tanh, nn.ReLU, nn.Identity
CHAINS = {
    "three layers": ([(3, 5), T, (5, 4), T, (4, 2)], [0, 1, 2]),
    "activated outputs": ([(3, 5), T, (5, 4), T, (4, 4), T, (4, 2), T], [2, 3]),
    "stacked at the end": ([(3, 5), T, (5, 4), T, (4, 4), T, (4, 3), (3, 2)], [1, 2, 3, 4]),
    "stacked in the middle": ([(3, 5), T, (5, 4), I, (4, 4), T, (4, 2)], [1, 2, 3]),
    "a ReLU does not count": ([(3, 5), T, (5, 9), R, (9, 4), T, (4, 2)], [1, 2, 3]),
    "curved once, below": ([(3, 5), T, (5, 9), R, (9, 9), R, (9, 2)], [0, 1, 2, 3]),
    "ReLU": ([(3, 9), R, (9, 9), R, (9, 9), R, (9, 9), R, (9, 2)], [0, 1, 2, 3, 4]),
    "width 1": ([(3, 1), T, (1, 1), T, (1, 1), T, (1, 1), T, (1, 2)], [0, 1, 2, 3, 4]),
}


@pytest.mark.parametrize("case", CHAINS)
def test_exact_if_one_layer_at_most_lies_below_the_last_curved_nonlinearity(case):
    modules, expected = CHAINS[case]
    net, x = chain_of(*modules), inputs(4, 3)
    ours, exact = differentiate(net, x), fimlib.differentiate(net, x, engine="layerwise")
    assert exact_layers(net, ours.second, exact.second) == expected


def quadratic_model(module, point, gradient, diagonal):
    """What follows a module, to second order at its values, with no off-diagonal terms."""
    value = module(point[None])[0].detach()

    def model(s):
        step = module(s[None])[0] - value
        return gradient @ step + (diagonal * step**2).sum() / 2

    return model


def diagonal_by_autograd(net, x, gradient, diagonal):
    """The recursion by its meaning: per layer, a quadratic model of what follows, off-diagonal 0.

    One input [1, n]; returns the diagonals at the outputs of the linear layers, last one first.
    """
    points, s = [], x[0]
    for module in net:
        points.append(s)
        s = module(s[None])[0].detach()
    found = []
    for module, point in reversed(list(zip(net, points, strict=True))):
        if isinstance(module, nn.Linear):
            found.append(diagonal)
        model = quadratic_model(module, point, gradient, diagonal)
        hessian = torch.autograd.functional.hessian(model, point)
        gradient, diagonal = torch.autograd.functional.jacobian(model, point), hessian.diagonal()
    return found


def test_below_the_exact_layers_it_is_the_recursion():
    net, x = mlp(DEEP, nn.Sigmoid, scale=1.5), inputs(2, 3)
    derivs = differentiate(net, x)
    for b in range(2):
        for a in range(3):
            e_a = torch.eye(3, dtype=torch.float64)[a]
            expected = diagonal_by_autograd(net, x[b : b + 1], e_a, torch.zeros_like(e_a))
            for layer, d in zip(reversed(linear_layers(net)), expected, strict=True):
                assert torch.allclose(
                    derivs.second(f"{layer}.bias")[b, a], d, rtol=1e-10, atol=1e-15
                )


def test_the_two_methods_coincide_in_s():
    net, x = mlp(DEEP, nn.Tanh, scale=1.5), inputs(3, 3)
    one, other = (differentiate(net, x, method=method) for method in METHODS)
    assert (one.engine, other.engine) == METHODS
    for a, b in zip(one.blocks, other.blocks, strict=True):
        assert torch.equal(a.S, b.S)


def test_v2_is_measurably_wrong_in_the_first_of_four_layers():
    """What a user would see: by percents, and of either sign, at weights as after training."""
    net, x, family = mlp([6, 12, 12, 12, 3], nn.Sigmoid, scale=4.0), inputs(20, 6), Categorical()
    derivs = differentiate(net, x), fimlib.differentiate(net, x, engine="layerwise")
    ours, exact = (fimlib.variance_i2(d, family).layer_means() for d in derivs)
    off = {layer: (ours[layer] - exact[layer]) / exact[layer] for layer in linear_layers(net)[:3]}
    assert off["0"].abs().median() > 0.01
    assert (off["0"] > 0.01).any()
    assert (off["0"] < -0.01).any()
    assert max(off["2"].abs().max(), off["4"].abs().max()) < 1e-10
    # I and V₁ read J alone
    for quantity in (fimlib.fisher_information, fimlib.variance_i1):
        a, b = (quantity(d, family) for d in derivs)
        assert all(error(a[name], b[name]) < 1e-12 for name in a)


# What is asked for.


def test_only_what_is_wanted_is_reported():
    net, x = mlp(DEEP, nn.Tanh), inputs(2, 3)
    full = differentiate(net, x)
    part = differentiate(net, x, wanted=frozenset({"2.weight", "6.bias"}))
    assert {n for block in part.blocks for n in block.inputs} == {"2.weight", "6.bias"}
    assert [block.layer for block in part.blocks] == ["2", "6"]
    for name in ("2.weight", "6.bias"):
        assert torch.equal(part.second(name), full.second(name))
        assert torch.equal(part.jacobian(name), full.jacobian(name))


@pytest.mark.parametrize("order", [1, 2])
def test_without_the_checks_it_is_the_same(order, monkeypatch):
    net, x = mlp(DEEP, nn.Tanh), inputs(2, 3)
    expected = differentiate(net, x, order=order)
    monkeypatch.setattr("support.bench.approximate.differentiate_checked", None)
    ours = carried_back(net, x, order=order)
    assert torch.equal(ours.outputs, expected.outputs)
    for a, b in zip(ours.blocks, expected.blocks, strict=True):
        assert torch.equal(a.J, b.J)
        assert (a.S is None) == (b.S is None) == (order == 1)
        assert order == 1 or torch.equal(a.S, b.S)


def test_first_order_is_exact_and_has_no_s():
    net, x = mlp(DEEP, nn.Tanh), inputs(2, 3)
    full, first = differentiate(net, x), differentiate(net, x, order=1, method="hesscale")
    assert first.engine == "hesscale"
    assert all(block.S is None for block in first.blocks)
    for name, _ in net.named_parameters():
        assert error(first.jacobian(name), full.jacobian(name)) < 1e-12


class Shapes(TorchDispatchMode):
    """The shapes [B, rows, n] of all that was computed."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.ndim == 3:
            self.found.add(tuple(result.shape[1:]))
        return result


def test_no_rows_for_hidden_units_and_none_below_the_first_wanted_layer():
    net, x = mlp([3, 50, 60, 40, 2], nn.Tanh), inputs(4, 3)
    for wanted, widths in ((None, {2, 40, 60, 50}), ({"4.bias", "6.weight"}, {2, 40})):
        with Shapes() as shapes:
            carried_back(net, x, wanted=wanted and frozenset(wanted))
        assert {n for _, n in shapes.found} == widths
        assert {rows for rows, _ in shapes.found if rows != 2} <= {1}  # factors that all rows share


def test_i2_keeps_its_mean():
    net, x = mlp(DEEP, nn.Tanh, scale=1.5), inputs(3, 3)
    derivs = differentiate(net, x)
    expected = fimlib.fisher_information(derivs, Categorical())
    labels = Categorical().expected(derivs.outputs, torch.softmax(derivs.outputs, 1))
    mean = fimlib.estimate_i2(derivs, labels)
    assert all(error(mean[name], expected[name]) < 1e-12 for name in expected)


def test_in_float32_and_with_the_model_left_as_it_was():
    net, x = mlp(DEEP, nn.Sigmoid, scale=1.5), inputs(2, 3)
    exact = differentiate(net, x)
    net = net.float().train()
    net[0].weight.requires_grad_(False)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    rough = differentiate(net, x.float(), method="hesscale")
    for name, _ in net.named_parameters():
        assert rough.second(name).dtype == torch.float32
        assert not rough.second(name).requires_grad
        assert error(rough.second(name).double(), exact.second(name)) < 1e-4
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert net.training
    assert [p.requires_grad for p in net.parameters()] == [False] + [True] * 9
    assert not any(m._forward_hooks or m._backward_hooks for m in net.modules())


def test_nothing_is_made_on_another_device():
    """Inside "meta" a tensor made without naming a device has no numbers."""
    net, x = mlp(DEEP, nn.Sigmoid), inputs(2, 3)
    labels = Categorical().observed(net(x).detach(), torch.tensor([0, 2]))
    derivs, hessian = differentiate(net, x), hessian_diagonal_approximation(net, x, labels)
    with torch.device("meta"):
        ours, ours_of_the_loss = (
            differentiate(net, x),
            hessian_diagonal_approximation(net, x, labels),
        )
    for name, _ in net.named_parameters():
        assert torch.equal(ours.second(name), derivs.second(name))
        assert torch.equal(ours_of_the_loss[name], hessian[name])


@pytest.mark.filterwarnings("ignore")  # torch's, of what it imports
def test_a_compiled_network_is_the_one_that_was_compiled():
    net, x = mlp(DEEP, nn.Sigmoid), inputs(2, 3)
    ours, expected = differentiate(torch.compile(net), x), differentiate(net, x)
    assert all(torch.equal(a.S, b.S) for a, b in zip(ours.blocks, expected.blocks, strict=True))


def test_later_changes_of_the_inputs_change_nothing():
    net, x = mlp(DEEP, nn.Sigmoid), inputs(2, 3)
    derivs = differentiate(net, x)
    before = derivs.jacobian("0.weight")
    x.zero_()
    assert torch.equal(derivs.jacobian("0.weight"), before)


# The Hessian of the loss.


def exact_hessian_diagonal(net, x, labels):
    """Jᵀ𝓘J − S·δ."""
    return fimlib.estimate_i2(fimlib.differentiate(net, x, engine="layerwise"), labels)


def test_hesscale_of_a_classifier_against_autograd():
    """Exact in the last layer, for every label; off by percents and more in all others."""
    net, x = mlp([3, 4, 4, 3], nn.Tanh, scale=1.5), inputs(1, 3)
    for y in range(3):
        labels = Categorical().observed(net(x).detach(), torch.tensor([y]))
        ours = hessian_diagonal_approximation(net, x, labels, method="hesscale")
        exact = {}
        for name, parameter in net.named_parameters():
            loss = -torch.log_softmax(net(x), 1)[0, y]
            (first,) = torch.autograd.grad(loss, parameter, create_graph=True)
            rows = [
                torch.autograd.grad(f, parameter, retain_graph=True)[0] for f in first.flatten()
            ]
            second = [row.flatten()[i] for i, row in enumerate(rows)]
            exact[name] = torch.stack(second).view_as(parameter)
        off = {name: error(ours[name][0], exact[name]) for name in exact}
        assert max(off["4.weight"], off["4.bias"]) < 1e-10
        assert min(off[n] for n in off if not n.startswith("4.")) > 0.01


FAMILIES = {
    # 𝓘 diagonal in the outputs: one layer more
    "Bernoulli": (Bernoulli(), [2, 3]),
    "Poisson": (Poisson(), [2, 3]),
    "Gaussian": (Gaussian(), [2, 3]),
    "Gaussian, correlated": (Gaussian(torch.tensor([[2.0, 0.9], [0.9, 1.0]])), [3]),
    "GaussianHead": (GaussianHead(), [3]),
    "Categorical": (Categorical(), [3]),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_hesscale_is_exact_in_the_last_layer_and_one_more_for_independent_outputs(case):
    family, expected = FAMILIES[case]
    net, x = mlp([3, 4, 5, 4, 2], nn.Tanh, scale=1.5), inputs(3, 3)
    labels = family.sample(net(x).detach(), 2, torch.Generator().manual_seed(0))
    ours = hessian_diagonal_approximation(net, x, labels, method="hesscale")
    exact = exact_hessian_diagonal(net, x, labels)
    assert exact_layers(net, ours.__getitem__, exact.__getitem__) == expected


@pytest.mark.parametrize("case", ["Bernoulli", "GaussianHead"])
def test_the_loss_starts_from_its_exact_diagonal_whatever_the_family(case):
    """One linear layer: the oracle's Hessian of −log p, sign included, for every label."""
    family = FAMILIES[case][0]
    net, x = mlp([3, 2], nn.Tanh), inputs(1, 3)
    labels_of = reference.bernoulli if case == "Bernoulli" else reference.gaussian_head
    truth = reference.by_quadrature(net, x, family, labels_of)
    for y, hessian in zip(truth["y"], truth["minus_hessian"], strict=True):
        labels = family.observed(net(x).detach(), y[None])
        for method in METHODS:
            ours = hessian_diagonal_approximation(net, x, labels, method=method)
            flat = torch.cat([ours[name].flatten() for name, _ in net.named_parameters()])
            assert torch.allclose(flat, hessian.diagonal(), rtol=1e-10, atol=1e-12)


def test_the_recursion_of_the_loss_is_that_of_its_papers():
    """Every layer, both methods; Becker–LeCun by way of an elementwise log-softmax."""
    net, x = mlp(DEEP, nn.Sigmoid, scale=1.5), inputs(1, 3)
    h = net(x)[0].detach()
    sigma = torch.softmax(h, 0)
    for y in range(3):
        labels = Categorical().observed(h[None], torch.tensor([y]))
        onehot = torch.eye(3, dtype=torch.float64)[y]
        # z = log-softmax unit by unit: z' = 1 − σ, z'' = σ² − σ, and the loss −z_y is linear in z
        unit_by_unit = (1 - sigma) ** 2 * 0 + (sigma**2 - sigma) * -onehot
        starts = {"hesscale": sigma - sigma**2, "becker-lecun": unit_by_unit}
        for method, start in starts.items():
            ours = hessian_diagonal_approximation(net, x, labels, method=method)
            expected = diagonal_by_autograd(net, x, sigma - onehot, start)
            for layer, d in zip(reversed(linear_layers(net)), expected, strict=True):
                assert torch.allclose(ours[f"{layer}.bias"][0], d, rtol=1e-10, atol=1e-15)


def test_the_methods_differ_for_a_softmax_and_by_how_much():
    net, x = mlp([3, 4, 3], nn.Tanh), inputs(2, 3)
    h = net(x).detach()
    sigma = torch.softmax(h, 1)
    labels = Categorical().expected(h, sigma)  # the average over y ~ p
    start = {m: hessian_diagonal_approximation(net, x, labels, method=m)["2.bias"] for m in METHODS}
    assert torch.allclose(start["hesscale"], sigma * (1 - sigma), rtol=1e-12)
    assert torch.allclose(start["becker-lecun"], sigma**2 * (1 - sigma), rtol=1e-12)
    # the label sees S alone: for HesScale, not for Becker–LeCun
    truth = hessian_of_labels(net, x, "exact")
    spread = {m: hessian_of_labels(net, x, m) for m in METHODS}
    last = "2.weight"
    assert error(spread["hesscale"][last], truth[last]) < 1e-10
    assert (spread["becker-lecun"][last] - truth[last]).abs().max() > 0.01


def hessian_of_labels(net, x, method):
    """Diagonals of −∂² log p(y|x) for all labels y, [C, B, *shape]."""
    h = net(x).detach()
    found = []
    for y in range(h.shape[1]):
        labels = Categorical().observed(h, torch.full((len(h),), y))
        if method == "exact":
            found.append(exact_hessian_diagonal(net, x, labels))
        else:
            found.append(hessian_diagonal_approximation(net, x, labels, method=method))
    return {name: torch.stack([d[name] for d in found]) for name in found[0]}


def test_labels_are_averaged():
    net, x = mlp(DEEP, nn.Tanh), inputs(2, 3)
    y = torch.tensor([[0, 2, 2, 1], [1, 1, 1, 1]])
    for method in METHODS:
        each = hessian_of_labels(net, x, method)
        labels = Categorical().observed(net(x).detach(), y)
        ours = hessian_diagonal_approximation(net, x, labels, method=method)
        assert list(ours) == [name for name, _ in net.named_parameters()]
        for name in each:
            expected = torch.stack([each[name][y[b], b].mean(0) for b in range(2)])
            assert torch.allclose(ours[name], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("case", ["Bernoulli", "Poisson", "Gaussian", "GaussianHead"])
def test_the_methods_coincide_for_all_families_but_the_softmax(case):
    net, x = mlp([3, 4, 2], nn.Tanh), inputs(2, 3)
    labels = FAMILIES[case][0].sample(net(x).detach(), 3, torch.Generator().manual_seed(0))
    one, other = (hessian_diagonal_approximation(net, x, labels, method=m) for m in METHODS)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_in_inference_mode_and_at_inputs_with_a_graph():
    net, x = mlp([3, 4, 2], Cube), inputs(2, 3)
    labels = Categorical().observed(net(x).detach(), torch.tensor([0, 1]))
    expected = hessian_diagonal_approximation(net, x, labels)
    with torch.inference_mode():
        ours = hessian_diagonal_approximation(net, x.clone(), labels)
    with_graph = hessian_diagonal_approximation(net, x.clone().requires_grad_(), labels)
    for name in expected:
        assert torch.equal(ours[name], expected[name])
        assert torch.equal(with_graph[name], expected[name])
        assert not with_graph[name].requires_grad


# Refusals.


def with_parameter(net):
    net.temperature = nn.Parameter(torch.ones((), dtype=torch.float64))
    return net


class Skip(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + x[:, :2]


REFUSED = {
    "softmax": (
        lambda: chain_of((3, 4), lambda: nn.Softmax(1), (4, 2)),
        r"'1' \(Softmax\)",
    ),
    "layer norm": (lambda: chain_of((3, 4), lambda: nn.LayerNorm(4), (4, 2)), r"'1' \(LayerNorm\)"),
    "own parameter": (
        lambda: with_parameter(chain_of((3, 2))),
        "'temperature' belongs to no Linear",
    ),
    "own forward": (lambda: Skip(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double(), "Skip"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_chain_is_refused_by_name(case, method):
    build, message = REFUSED[case]
    net, x = build(), inputs(2, 3)
    with pytest.raises(NotImplementedError, match=message):
        differentiate(net, x, method=method)
    labels = Gaussian().sample(torch.zeros(2, 2, dtype=torch.float64), 1)
    with pytest.raises(NotImplementedError, match=message):
        hessian_diagonal_approximation(net, x, labels, method=method)


def test_convolutions_are_refused_by_name():
    net = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 2)).double()
    with pytest.raises(NotImplementedError, match=r"'0' \(Conv1d\).*layerwise engine"):
        differentiate(net, torch.ones(2, 1, 3, dtype=torch.float64))


class RandomOnce(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


def test_what_the_recursion_rests_on_is_confirmed(monkeypatch):
    orders = []

    def refuse(_model, _x, found, *_):
        orders.append(1 if found.derivatives().blocks[0].S is None else 2)
        raise Unconfirmed("not the derivative")

    net, x = mlp([3, 4, 3], nn.Tanh), inputs(2, 3)
    labels = Categorical().sample(net(x).detach(), 1)
    monkeypatch.setattr("fimlib.engines.choose.confirm", refuse)
    for order, call in (
        (2, lambda: hessian_diagonal_approximation(net, x, labels)),
        (2, lambda: differentiate(net, x)),
        (1, lambda: differentiate(net, x, order=1)),
    ):
        orders.clear()
        with pytest.raises(NotImplementedError, match="not the derivative"):
            call()
        assert orders[0] == order  # others follow, as remedies are tried


class Straight(nn.Module):
    """A straight-through estimator: rounds, and lets gradients pass."""

    def forward(self, x):
        return x + (x.round() - x).detach()


class Carried(nn.Sequential):
    """A network whose second bias is made of the first one."""

    def __init__(self):
        super().__init__(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        self.double()
        del self[2].bias
        self[2].bias = self[0].bias * 2


def tied():
    net = mlp([3, 3, 3], nn.Tanh)
    net[2].weight = net[0].weight
    return net


def hooked():
    net = mlp([3, 4, 3], nn.Tanh)
    net[0].register_forward_hook(lambda _module, _args, out: 2 * out)
    return net


WRONG = {
    "straight-through": (lambda: chain_of((3, 4), Straight, (4, 2)), r"'1' \(Straight\)"),
    "bias of another layer": (Carried, "'2' .Linear. computes|is no parameter"),
    "tied": (tied, "'2.weight' is the same tensor as '0.weight'"),
    "hooked": (hooked, "has a hook, which this engine would miss"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("method", METHODS)
def test_what_fimlib_refuses_is_refused(case, method):
    build, message = WRONG[case]
    with pytest.raises(NotImplementedError, match=message):
        differentiate(build(), inputs(5, 3), method=method)


def test_other_refusals():
    net, x = mlp([3, 4, 3], nn.Tanh), inputs(2, 3)
    labels = Categorical().sample(net(x).detach(), 1)
    with pytest.raises(ValueError, match="unknown method 'hesscal'; choose one of: becker-lecun"):
        differentiate(net, x, method="hesscal")
    with pytest.raises(ValueError, match="unknown method 'exact'; choose one of: becker-lecun"):
        hessian_diagonal_approximation(net, x, labels, method="exact")
    with pytest.raises(ValueError, match="drawn for other outputs"):
        hessian_diagonal_approximation(net, x + 1, labels)
    with pytest.raises(TypeError, match=r"family.observed\(derivs.outputs, y\).*; got list"):
        hessian_diagonal_approximation(net, x, [0, 1])
    for call in (differentiate, lambda n, x: hessian_diagonal_approximation(n, x, labels)):
        with pytest.raises(TypeError, match="the model must be an nn.Module"):
            call(torch.tanh, x)
        with pytest.raises(ValueError, match="NaN or infinite values"):
            call(net, torch.full_like(x, torch.nan))
    with pytest.raises(ValueError, match=r"'1' \(Dropout\) is in training mode"):
        hessian_diagonal_approximation(nn.Sequential(net, nn.Dropout()).train(), x, labels)
    with pytest.raises(NotImplementedError, match="has a hook, which this engine would miss"):
        hessian_diagonal_approximation(hooked(), x, labels)
    with pytest.raises(NotImplementedError, match=r"random|RandomOnce"):
        differentiate(nn.Sequential(net[0], RandomOnce(), net[2]), x)
    with pytest.raises(NotImplementedError, match=r"'2.weight' is the same tensor as '0.weight'"):
        hessian_diagonal_approximation(tied(), x, labels)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda _module, _args, out: 2 * out)
    try:
        with pytest.raises(NotImplementedError, match="a global forward hook"):
            hessian_diagonal_approximation(net, x, labels)
    finally:
        hook.remove()
    huge = nn.Linear(3, 2).double()
    huge.weight.data.fill_(1e308)
    with pytest.raises(ValueError, match="the outputs hold NaN or infinite"):
        differentiate(huge, torch.full_like(x, 9.0))
