import copy
import math
from functools import partial

import pytest
import reference
import torch
from lying import CutSquare, HiddenWeight
from strategies import Cube, inputs, mlp
from torch import nn
from torch.nn.utils import prune

import fimlib
from fimlib import differentiate
from fimlib.engines.choose import ENGINES

ACTIVATIONS = [nn.Sigmoid, nn.Tanh, nn.LogSigmoid, nn.Softplus, nn.ReLU, nn.GELU, nn.SiLU, Cube]
WIDTHS = [[3, 2], [3, 4, 2], [3, 1, 4, 2], [4, 3, 5, 3, 4, 3], [1, 2, 1]]


def networks():
    """Every kind of network that the layerwise engine takes."""
    for activation in ACTIVATIONS:
        yield activation.__name__, mlp([3, 5, 4, 3], activation, scale=1.5), 3
    for widths in WIDTHS:
        yield f"widths {widths}", mlp(widths, nn.Tanh, scale=1.5), widths[0]
    yield "no bias", mlp([3, 4, 2], nn.Sigmoid, bias=False), 3
    torch.manual_seed(0)
    nested = nn.Sequential(
        nn.Flatten(),
        nn.Tanh(),
        nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Dropout(0.5), nn.Softplus()),
        nn.Identity(),
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)),
        nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2), nn.Tanh()),
    )
    yield "nested, stacked, activated outputs", nested.double().eval(), 3
    yield "single layer", nn.Linear(3, 2).double(), 3


CASES = {name: (net, width) for name, net, width in networks()}


def relative(a, b):
    return (
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-300)) if b.any() else a.abs().max()
    )


@pytest.mark.parametrize("case", CASES)
def test_layerwise_equals_autograd(case):
    net, width = CASES[case]
    x = inputs(3, width)
    derivs = differentiate(net, x)
    assert torch.equal(derivs.outputs, net(x))
    for b in range(3):
        J, S = reference.derivatives(net, x[b : b + 1])
        assert set(J) == {n for block in derivs.blocks for n in block.inputs}
        for name in J:
            assert relative(derivs.jacobian(name)[b], J[name]) < 1e-10
            assert relative(derivs.second(name)[b], S[name]) < 1e-10


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh, nn.LogSigmoid, nn.ReLU, nn.Dropout])
@pytest.mark.parametrize("batch", [1, 3])
def test_backpack_equals_layerwise(activation, batch):
    net, x = mlp([3, 5, 4, 3], activation, scale=1.5), inputs(batch, 3)
    ours, theirs = differentiate(net, x), differentiate(net, x, engine="backpack")
    assert torch.allclose(ours.outputs, theirs.outputs, rtol=1e-14)
    for name, _ in net.named_parameters():
        assert relative(theirs.jacobian(name), ours.jacobian(name)) < 1e-10
        assert relative(theirs.second(name), ours.second(name)) < 1e-10


@pytest.mark.parametrize("engine", ["layerwise", "backpack"])
def test_the_model_is_left_as_it_was(engine):
    net, x = mlp([3, 4, 2], nn.Sigmoid), inputs(2, 3)
    net.train()
    net[0].weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    differentiate(net, x, engine=engine)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert net.training
    assert not net[0].weight.requires_grad
    assert net[2].weight.requires_grad
    assert net[2].weight.grad is None
    assert not any(m._forward_hooks or m._backward_hooks for m in net.modules())


def test_a_float32_network_is_differentiated_in_float32():
    net, x = mlp([3, 5, 4, 3], nn.Sigmoid), inputs(2, 3)
    exact = differentiate(net, x)
    rough = differentiate(copy.deepcopy(net).float(), x.float())
    for name, _ in net.named_parameters():
        assert rough.second(name).dtype == torch.float32
        assert relative(rough.second(name).double(), exact.second(name)) < 1e-5


class Gate(nn.Module):
    def forward(self, s):
        return s * s.mean(1, keepdim=True)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, s):
        return self.scale * s.tanh()


class SkipSequential(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + x[:, :2]


class Once(nn.Module):
    """Its backward pass is right, and hides from autograd how it depends on s."""

    def forward(self, s):
        return CutSquare.apply(s)


class Hard(nn.Module):
    def forward(self, s):
        return nn.functional.hardsigmoid(s)


class Cumulative(nn.Module):
    def forward(self, s):
        return s.cumprod(1)


class Leak(nn.Module):
    def forward(self, s):
        return s.tanh() + 1e-9 * s.mean(1, keepdim=True)


class BatchLeak(nn.Module):
    def forward(self, s):
        return s.tanh() + 1e-9 * s.mean(0, keepdim=True)


class BatchCentre(nn.Module):
    def forward(self, s):
        return s - s.mean(0)


class Captures(nn.Module):
    """Uses a weight that belongs to another module."""

    def __init__(self, weight):
        super().__init__()
        self.weights = [weight]

    def forward(self, s):
        return s * self.weights[0].sum()


class CapturesApart(Captures):
    def forward(self, s):
        return HiddenWeight.apply(s, self.weights[0])


def captures(index, kind=Captures):
    net = in_the_middle(nn.Tanh())
    net.insert(index, kind(net[0].weight))
    return net


class Flip(nn.Module):
    def forward(self, s):
        return s.flip(1)


class Pair(nn.Module):
    def forward(self, s):
        return s, s


class Noise(nn.Module):
    def forward(self, s):
        return s + torch.rand_like(s)


def at_zero(module):
    net = in_the_middle(module)
    nn.init.zeros_(net[0].weight), nn.init.zeros_(net[0].bias)
    return net


def with_extra_parameter():
    layer = nn.Linear(4, 4)
    layer.extra = nn.Parameter(torch.ones(1))
    return layer


def with_temperature():
    net = in_the_middle(nn.Tanh())
    net.temperature = nn.Parameter(torch.ones(1))
    return net


def in_the_middle(module):
    return nn.Sequential(nn.Linear(3, 4), module, nn.Linear(4, 2)).double().eval()


UNSUPPORTED = {
    "softmax": (lambda: in_the_middle(nn.Softmax(1)), r"'1' \(Softmax\)"),
    "softmax at the end": (lambda: nn.Sequential(nn.Linear(3, 2), nn.Softmax(1)), "Softmax"),
    "layer norm": (lambda: in_the_middle(nn.LayerNorm(4)), r"'1' \(LayerNorm\)"),
    "layer norm, no parameters": (
        lambda: in_the_middle(nn.LayerNorm(4, elementwise_affine=False)),
        r"'1' \(LayerNorm\)",
    ),
    "gate": (lambda: in_the_middle(Gate()), r"'1' \(Gate\).*engine='auto' supports it"),
    "own parameters": (lambda: in_the_middle(Scaled()), r"'1' \(Scaled\)"),
    "prelu": (lambda: in_the_middle(nn.PReLU()), r"'1' \(PReLU\)"),
    "batch norm": (lambda: in_the_middle(nn.BatchNorm1d(4)), r"'1' \(BatchNorm1d\)"),
    "halving": (lambda: in_the_middle(nn.AvgPool1d(2)), r"'2' \(Linear\)"),
    "own forward": (
        lambda: SkipSequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)),
        "SkipSequential",
    ),
    "weight norm": (
        lambda: in_the_middle(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
        r"'1' \(ParametrizedLinear\)",
    ),
    "pruned": (
        lambda: in_the_middle(prune.l1_unstructured(nn.Linear(4, 4), "bias", 2)),
        r"'1' \(Linear\) computes",
    ),
    "own parameter on a Linear": (
        lambda: in_the_middle(with_extra_parameter()),
        "other parameters",
    ),
    "own parameter on the chain": (lambda: with_temperature(), "'temperature' belongs to no"),
    "autograd does not know": (lambda: in_the_middle(Hard()), r"'1' \(Hard\)"),
    "not twice differentiable": (lambda: in_the_middle(Once()), r"'1' \(Once\)"),
    "mixes by its curvature only": (lambda: at_zero(Gate()), r"'1' \(Gate\)"),
    "mixes a little": (lambda: in_the_middle(Leak()), r"'1' \(Leak\)"),
    "mixes the batch": (lambda: in_the_middle(BatchLeak()), r"'1' \(BatchLeak\)"),
    "mixes the batch before the first layer": (
        lambda: nn.Sequential(BatchCentre(), *in_the_middle(nn.Tanh())),
        r"'0' \(BatchCentre\).*batch",
    ),
    "captures a weight": (lambda: captures(2), r"'2' \(Captures\).*'0.weight'"),
    "captures a weight in its own function": (
        lambda: captures(2, CapturesApart),
        r"'2' \(CapturesApart\).*'0.weight'",
    ),
    "captures a weight, before the first layer": (
        lambda: captures(0),
        r"'0' \(Captures\).*'1.weight'",
    ),
    "swaps": (lambda: in_the_middle(Flip()), r"'1' \(Flip\)"),
    "a tuple": (lambda: in_the_middle(Pair()), r"'2' \(Linear\)"),
    "random": (lambda: in_the_middle(Noise()), r"'1' \(Noise\)"),
    "flattens the batch": (lambda: in_the_middle(nn.Flatten(0)), r"'2' \(Linear\)"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_modules_are_named(case):
    build, message = UNSUPPORTED[case]
    with pytest.raises((NotImplementedError, ValueError), match=message):
        differentiate(build().double().eval(), inputs(2, 3), engine="layerwise")


def test_a_module_that_one_engine_refuses_goes_to_the_next():
    net, x = in_the_middle(Cumulative()), inputs(2, 3)
    found = differentiate(net, x)
    assert found.engine == "functional"
    J, S = reference.derivatives(net, x[:1])
    assert relative(found.jacobian("0.weight")[0], J["0.weight"]) < 1e-10
    assert (found.second("0.weight")[0] - S["0.weight"]).abs().max() < 1e-12 * J["0.weight"].max()


def hooked(kind, where):
    """A network in which a module is changed from outside."""
    net = mlp([3, 4, 2], nn.Tanh)
    module = net.get_submodule(where)
    if kind == "hook":
        module.register_forward_hook(lambda _module, _args, out: 2 * out)
    elif kind == "pre-hook":
        module.register_forward_pre_hook(lambda _module, args: (2 * args[0],))
    elif kind == "backward pre-hook":
        module.register_full_backward_pre_hook(lambda _module, grads: (2 * grads[0],))
    elif kind == "backward hook":
        module.register_full_backward_hook(lambda _module, grads, _: (grads[0].clamp(-1, 1),))
    else:
        module.own_forward = module.forward
        module.forward = partial(lambda m, x: 2 * m.own_forward(x).sin(), module)
    return net


@pytest.mark.parametrize("where", ["", "0", "1"])
@pytest.mark.parametrize("kind", ["hook", "pre-hook", "replaced"])
def test_hooks_and_replaced_forwards_are_followed_or_refused(kind, where):
    """An engine that knows a module by its type would miss them."""
    net, x = hooked(kind, where), inputs(1, 3)
    J, S = reference.derivatives(net, x)
    for choice in ({"engine": "auto"}, {"engine": "functional"}, {"order": 1}):
        found = differentiate(net, x, **choice)
        assert found.engine == ("traced" if choice == {"engine": "auto"} else "functional")
        for name in J:
            assert relative(found.jacobian(name)[0], J[name]) < 1e-10
            assert "order" in choice or (found.second(name)[0] - S[name]).abs().max() < 1e-10
    for engine in ("layerwise", "backpack"):
        with pytest.raises(NotImplementedError, match=r"would miss\. engine='auto' supports it"):
            differentiate(net, x, engine=engine)


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("kind", ["backward hook", "backward pre-hook"])
def test_backward_hooks_are_refused(kind, engine):
    """At the inputs of the check it may change nothing, and at others clip."""
    with pytest.raises(NotImplementedError, match=r"has a backward hook.*handle\.remove\(\)"):
        differentiate(hooked(kind, "1"), inputs(1, 3), engine=engine)
    handle = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    try:
        with pytest.raises(NotImplementedError, match=r"global backward hook.*handle\.remove\(\)"):
            differentiate(mlp([3, 4, 2], nn.Tanh), inputs(1, 3), engine=engine)
    finally:
        handle.remove()


@pytest.mark.parametrize("engine", ["auto", "layerwise", "traced"])
def test_mixing_before_the_first_layer_is_refused_by_all(engine):
    net = nn.Sequential(BatchCentre(), nn.Linear(3, 2)).double()
    nn.init.zeros_(net[1].weight)
    with pytest.raises(NotImplementedError, match="batch"):
        differentiate(net, inputs(2, 3), engine=engine)


def test_mixing_before_the_first_layer_is_refused_by_backpack():
    net = nn.Sequential(nn.Softmax(0), nn.Linear(3, 2)).double()
    with pytest.raises(NotImplementedError, match="batch"):
        differentiate(net, inputs(2, 3), engine="backpack")


@pytest.mark.parametrize("engine", ["layerwise", "traced", "backpack"])
def test_tied_parameters_are_refused(engine):
    net = mlp([3, 3, 3, 2], nn.Tanh)
    net[2].weight = net[0].weight
    with pytest.raises(NotImplementedError, match=r"'2.weight' is the same tensor as '0.weight'"):
        differentiate(net, inputs(1, 3), engine=engine)
    twice = nn.Linear(3, 3).double()
    with pytest.raises(NotImplementedError, match="tied"):
        differentiate(nn.Sequential(twice, nn.Tanh(), twice), inputs(1, 3), engine=engine)


@pytest.mark.parametrize("engine", ["layerwise", "traced", "backpack"])
def test_hooks_on_all_modules_are_refused_or_followed(engine):
    def double(module, _args, out):
        return 2 * out if isinstance(module, nn.Linear) else None

    net = mlp([3, 4, 2], nn.Tanh)
    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        if engine == "traced":
            J, _ = reference.derivatives(net, inputs(1, 3))
            ours = differentiate(net, inputs(1, 3), engine=engine).jacobian("0.weight")[0]
            assert relative(ours, J["0.weight"]) < 1e-10
            return
        with pytest.raises(NotImplementedError, match="global forward hook"):
            differentiate(net, inputs(1, 3), engine=engine)
    finally:
        handle.remove()


def test_parameters_without_values_are_refused():
    with pytest.raises(ValueError, match=r"'0.weight' has no values yet: call the model once"):
        differentiate(nn.Sequential(nn.LazyLinear(3)), inputs(1, 3).float())


def test_a_shared_activation_is_no_tie():
    act = nn.Tanh()
    net = nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 2)).double()
    _, S = reference.derivatives(net, inputs(1, 3))
    assert relative(differentiate(net, inputs(1, 3)).second("0.weight")[0], S["0.weight"]) < 1e-10
    with pytest.raises(NotImplementedError, match="used twice"):
        differentiate(net, inputs(1, 3), engine="backpack")


def test_anything_without_parameters_may_come_before_the_first_layer():
    """Also where it works in place: the caller's input stays as it is."""
    net = nn.Sequential(nn.Softmax(1), nn.SiLU(inplace=True), nn.Linear(3, 4), nn.Tanh())
    net, x = nn.Sequential(*net, nn.Linear(4, 2)).double(), inputs(2, 3)
    before = x.clone()
    J, S = reference.derivatives(net, x[:1])
    derivs = differentiate(net, x)
    assert torch.equal(x, before)
    for name, expected in J.items():
        assert relative(derivs.jacobian(name)[0], expected) < 1e-10
        assert relative(derivs.second(name)[0], S[name]) < 1e-10


def test_zero_pre_activations_are_no_reason_to_refuse():
    """σ'' = 0 at 0 for tanh and sigmoid, and is not 0 nearby."""
    derivs = differentiate(at_zero(nn.Tanh()), inputs(1, 3), engine="layerwise")
    assert not derivs.second("0.weight").any()


@pytest.mark.parametrize("engine", ["layerwise", "backpack"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_contexts_of_autograd_change_nothing(engine, context):
    net = mlp([3, 4, 2], nn.Sigmoid)
    expected = differentiate(net, inputs(1, 3)).second("0.weight")
    with context():
        inside = differentiate(net, inputs(1, 3), engine=engine).second("0.weight")
    assert relative(inside, expected) < 1e-10


def test_autocast_is_refused():
    net = mlp([3, 4, 2], nn.Sigmoid).float()
    with torch.autocast("cpu"), pytest.raises(ValueError, match=r"torch.autocast is on"):
        differentiate(net, inputs(1, 3).float())


def test_backpack_differentiates_convolutions():
    """The paper's way, against the oracle."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(8, 3)).double()
    x = inputs(2, 9).view(2, 1, 3, 3)
    derivs = differentiate(net, x, engine="backpack")
    for b in range(2):
        J, S = reference.derivatives(net, x[b : b + 1])
        for name in J:
            assert relative(derivs.jacobian(name)[b], J[name]) < 1e-10
            assert float((derivs.second(name)[b] - S[name]).abs().max()) < 1e-12


class Root(nn.Module):
    def forward(self, s):
        return s.sqrt()


def spoiled(value):
    net = mlp([3, 4, 2], nn.Tanh)
    net[0].weight.data[1, 1] = value
    return net


BAD_INPUT = {
    "dropout": (lambda: in_the_middle(nn.Dropout(0.5)).train(), inputs(1, 3), r"model.eval\(\)"),
    "rrelu": (lambda: in_the_middle(nn.RReLU()).train(), inputs(1, 3), r"model.eval\(\)"),
    "nan": (lambda: spoiled(float("nan")), inputs(1, 3), "'0.weight' holds NaN"),
    "inf": (lambda: spoiled(float("inf")), inputs(1, 3), "'0.weight' holds NaN or infinite"),
    "width": (lambda: mlp([3, 2], nn.Tanh), inputs(1, 4), r"expects inputs of shape \[B, 3\]"),
    "no batch": (lambda: mlp([3, 2], nn.Tanh), inputs(1, 3)[0], r"x\[None\]"),
    "empty": (lambda: mlp([3, 2], nn.Tanh), inputs(1, 3)[:0], "there are no inputs: .*B ≥ 1"),
    "image": (lambda: mlp([3, 2], nn.Tanh), inputs(2, 6).view(2, 2, 3), "one label"),
    "dtype": (lambda: mlp([3, 2], nn.Tanh), inputs(1, 3).float(), "float32.*float64"),
    "half": (lambda: mlp([3, 2], nn.Tanh).half(), inputs(1, 3).half(), r"model.float\(\)"),
    "nan input": (lambda: mlp([3, 2], nn.Tanh), inputs(1, 3) * float("nan"), "input holds NaN"),
    "no derivative": (lambda: at_zero(Root()), inputs(1, 3), r"'1' \(Root\) has no finite deriv"),
    "not flattened": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Linear(3, 2)).double(),
        inputs(2, 3),
        "take the family fimlib.families.Positions",
    ),
    "overflow": (lambda: mlp([3, 4, 2], nn.Softplus, scale=1e200), inputs(1, 3), "too large"),
    "batch norm": (lambda: in_the_middle(nn.BatchNorm1d(4)).train(), inputs(2, 3), "eval"),
    "no parameters": (lambda: nn.Sequential(nn.Tanh()), inputs(1, 3), "no parameters"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_with_a_remedy(case):
    build, x, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        differentiate(build(), x)


def test_a_module_with_its_own_p_is_no_dropout():
    class Power(nn.Module):
        p = None

        def forward(self, s):
            return s**3

    differentiate(in_the_middle(Power()).train(), inputs(1, 3))


def test_dropout_that_never_drops_is_no_reason_to_refuse():
    differentiate(in_the_middle(nn.Dropout(0.0)).train(), inputs(1, 3))


def test_unknown_engine_and_parameter():
    net, x = mlp([3, 4, 2], nn.Tanh), inputs(1, 3)
    with pytest.raises(ValueError, match="layerwise, traced, backpack"):
        differentiate(net, x, engine="jax")
    with pytest.raises(KeyError, match=r"no parameter 'weight'; there are: 0.weight, 0.bias"):
        differentiate(net, x).jacobian("weight")


def test_backpack_names_what_it_does_not_know():
    with pytest.raises(NotImplementedError, match="Cube"):
        differentiate(in_the_middle(Cube()), inputs(1, 3), engine="backpack")
    with pytest.raises(NotImplementedError, match=r"'1' \(BatchNorm1d\)"):
        differentiate(in_the_middle(nn.BatchNorm1d(4)).eval(), inputs(1, 3), engine="backpack")


def test_missing_backpack_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "backpack", None)
    with pytest.raises(ImportError, match="pip install backpack-for-pytorch"):
        differentiate(mlp([3, 2], nn.Tanh), inputs(1, 3), engine="backpack")


@pytest.mark.parametrize(
    ("activation", "curvature"),
    [
        (nn.Sigmoid, lambda s: s.sigmoid() * (1 - s.sigmoid()) * (1 - 2 * s.sigmoid())),
        (nn.Softplus, lambda s: s.sigmoid() * (1 - s.sigmoid())),
        (nn.LogSigmoid, lambda s: -s.sigmoid() * (1 - s.sigmoid())),
    ],
)
def test_remark_4_5(activation, curvature):
    """One layer before the last, ∂²h/∂w² = w_out σ''(s) z²; of a sigmoid it is 0 at s = 0."""
    net, x = mlp([3, 4, 2], activation), inputs(1, 3)
    s = net[0](x)[0].detach()
    expected = torch.einsum("to,o,j->toj", net[2].weight, curvature(s), x[0].square())
    S = differentiate(net, x).second("0.weight")[0]
    assert torch.allclose(S, expected.detach(), rtol=1e-12, atol=1e-15)
    for parameter in net[0].parameters():
        parameter.data.zero_()
    V2 = fimlib.variance_i2(differentiate(net, x), fimlib.Categorical())["0.weight"]
    assert bool((V2 == 0).all()) == (activation is nn.Sigmoid)


def parametrised(kind):
    net = mlp([3, 4, 2], nn.Tanh, scale=1.5)
    if kind == "pruned":
        prune.l1_unstructured(net[0], "weight", 0.5)
        prune.random_unstructured(net[0], "weight", 1)  # one on top of the other
        prune.l1_unstructured(net[2], "bias", 1)
    elif kind == "weight norm":
        with pytest.warns(FutureWarning, match="weight_norm"):
            nn.utils.weight_norm(net[0])
    else:
        nn.utils.spectral_norm(net[0])
        net(inputs(2, 3))
    return net.eval()


@pytest.mark.parametrize(
    ("kind", "engine", "order"),
    [
        ("pruned", "traced", 2),
        ("pruned", "functional", 1),
        ("spectral norm", "traced", 2),
        ("spectral norm", "functional", 1),
        ("weight norm", "traced", 1),
        ("weight norm", "functional", 1),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_hooks_that_make_a_weight_of_parameters_are_followed(kind, engine, order, frozen):
    net, x = parametrised(kind), inputs(2, 3)
    net.requires_grad_(not frozen)
    found = differentiate(net, x, engine=engine, order=order)
    net.requires_grad_()
    for b in range(2):
        J, S = reference.derivatives(net, x[b : b + 1])
        for name in J:
            assert relative(found.jacobian(name)[b], J[name]) < 1e-10
            assert order == 1 or (found.second(name)[b] - S[name]).abs().max() < 1e-10


@pytest.mark.parametrize("kind", ["pruned", "spectral norm", "weight norm"])
def test_they_are_refused_where_they_cannot_be_followed(kind):
    net, x = parametrised(kind), inputs(2, 3)
    for frozen in (False, True):
        net.requires_grad_(not frozen)
        for engine in ("layerwise", "backpack"):
            with pytest.raises(NotImplementedError, match="'0' .Linear."):
                differentiate(net, x, engine=engine)


# First order only, and chosen layers. -------------------------------------------------------------


@pytest.mark.parametrize("engine", ["layerwise", "traced", "backpack", "functional"])
def test_first_order_has_the_same_j_and_no_s(engine):
    net, x = mlp([3, 5, 4, 3], nn.Sigmoid, scale=1.5), inputs(3, 3)
    both = differentiate(net, x)
    first = differentiate(net, x, engine=engine, order=1)
    assert first.engine == engine
    for name, _ in net.named_parameters():
        assert relative(first.jacobian(name), both.jacobian(name)) < 1e-10
    assert all(block.S is None for block in first.blocks)
    with pytest.raises(ValueError, match=r"first order only.*order=2"):
        first.second("0.weight")


def test_what_needs_second_derivatives_says_so():
    net, x, family = mlp([3, 4, 2], nn.Tanh), inputs(2, 3), fimlib.Categorical()
    first, both = differentiate(net, x, order=1), differentiate(net, x)
    labels = family.sample(both.outputs, 3, torch.Generator().manual_seed(0))
    for quantity in (fimlib.fisher_information, fimlib.variance_i1):
        assert torch.equal(quantity(first, family)["0.weight"], quantity(both, family)["0.weight"])
    assert torch.equal(
        fimlib.estimate_i1(first, labels)["0.bias"], fimlib.estimate_i1(both, labels)["0.bias"]
    )
    for quantity in (fimlib.variance_i2, fimlib.covariance_i1_i2):
        with pytest.raises(ValueError, match="first order only"):
            quantity(first, family)
    with pytest.raises(ValueError, match="first order only"):
        fimlib.estimate_i2(first, labels)
    with pytest.raises(ValueError, match="first order only"):
        fimlib.corollary_4_6(first, family)
    bounds, expected = fimlib.theorem_4_1(first, family), fimlib.theorem_4_1(both, family)
    assert torch.equal(bounds.variance_i1.upper["0.weight"], expected.variance_i1.upper["0.weight"])
    assert len(bounds.variance_i2.upper) == 0


@pytest.mark.parametrize("engine", ["layerwise", "traced", "backpack"])
@pytest.mark.parametrize("layers", [["2"], ["4"], ["0", "4"]])
def test_chosen_layers_are_what_they_are_among_all(engine, layers):
    net, x = mlp([3, 5, 4, 3], nn.Sigmoid, scale=1.5), inputs(3, 3)
    chosen = differentiate(net, x, engine=engine, layers=layers)
    everything = differentiate(net, x, engine=engine)
    assert {b.layer for b in chosen.blocks} == set(layers)
    expected = {f"{layer}.{n}" for layer in layers for n in ("weight", "bias")}
    assert {n for b in chosen.blocks for n in b.inputs} == expected
    for name in expected:
        assert torch.equal(chosen.jacobian(name), everything.jacobian(name))
        assert torch.allclose(chosen.second(name), everything.second(name), rtol=1e-12, atol=0)


def test_layers_may_name_what_holds_them():
    net = nn.Sequential()
    net.add_module("body", mlp([3, 4, 4], nn.Tanh))
    net.add_module("act", nn.Tanh())
    net.add_module("head", nn.Linear(4, 2).double())
    found = differentiate(net, inputs(2, 3), layers=["body"])
    assert [b.layer for b in found.blocks] == ["body.0", "body.2"]
    assert len(differentiate(net, inputs(2, 3), layers=[""]).blocks) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["1"]}, r"no layer '1' with parameters; there are: '0', '2'"),
        ({"layers": "0"}, r"list of names, or 'trainable', got the string '0'"),
        ({"layers": []}, "names no module"),
        ({"order": 3}, "order must be 1 .* or 2"),
        ({"engine": "magic"}, "unknown engine 'magic'.*layerwise.*functional"),
    ],
)
def test_bad_choices_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        differentiate(mlp([3, 4, 2], nn.Sigmoid), inputs(1, 3), **arguments)


def test_work_stops_at_the_first_chosen_layer(monkeypatch):
    """The weights of the layers before it are never multiplied by anything on the way back."""
    net, x = mlp([3, 5, 4, 3], nn.Sigmoid), inputs(2, 3)
    seen = []
    original = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: (seen.append(b.data_ptr()), original(a, b))[1]
    )
    differentiate(net, x, layers=["4"])
    assert net[2].weight.data_ptr() not in seen
    differentiate(net, x)
    assert net[2].weight.data_ptr() in seen


def test_tied_parameters_have_their_total_derivatives():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    net[2].weight = net[0].weight
    x = inputs(2, 3)
    with pytest.raises(NotImplementedError, match=r"tied.*engine='auto' supports it"):
        differentiate(net, x, engine="layerwise", order=1)
    first, both = differentiate(net, x, order=1), differentiate(net, x)
    assert first.engine == both.engine == "functional"
    for b in range(2):
        J, S = reference.derivatives(net, x[b : b + 1])
        assert relative(first.jacobian("0.weight")[b], J["0.weight"]) < 1e-10
        assert relative(both.jacobian("0.weight")[b], J["0.weight"]) < 1e-10
        assert relative(both.second("0.weight")[b], S["0.weight"]) < 1e-10


def test_prepared_derivatives_are_the_same_and_refuse_other_types():
    from fimlib.engines.choose import differentiator

    net, x = mlp([3, 5, 3], nn.Sigmoid), inputs(4, 3)
    again = differentiator(net)
    for _ in range(2):
        for name, _ in net.named_parameters():
            found = again(x).derivatives().second(name)
            assert torch.equal(found, differentiate(net, x).second(name))
    with pytest.raises(ValueError, match=r"float32.*those before were torch.float64"):
        again(x.float())
    by_trace = differentiator(net, engine="traced")
    assert [by_trace(x).engine for _ in range(2)] == ["traced", "traced"]
    with pytest.raises(ValueError, match="NaN"):
        differentiator(net)(x * torch.nan)


def test_known_activations_are_differentiated_like_unknown_ones():
    """Closed forms against what is found out for a module of one's own.

    That is right to 1e-15 of 1, but where torch rounds a constant to float32; ``test_activations``
    looks closer. At the kinks, torch's choice is ours.
    """
    from fimlib.engines import layerwise

    s = torch.linspace(-4, 4, 41).double().reshape(1, -1)
    for kind, curve_of in layerwise.ACTIVATIONS.items():
        for module in (*([] if kind is nn.Threshold else [kind()]), *OTHER_SETTINGS.get(kind, ())):
            curve = curve_of(module)
            z, (one, two) = curve.value(s), curve.slopes(s)
            if kind is nn.Hardsigmoid:  # torch has no second derivative of this
                assert two is None
                rough = torch.func.jvp(module, (s,), (torch.ones_like(s),))[1]
                assert torch.allclose(one, rough, rtol=1e-7, atol=0)
                continue
            expected, first, second = layerwise.two_derivatives(module.eval(), s)
            exact = kind is not nn.CELU or module.alpha == 1
            rtol = 1e-12 if exact else 1e-6
            assert torch.allclose(z, expected, rtol=rtol, atol=1e-15), module
            assert torch.allclose(one, first, rtol=rtol, atol=1e-15), module
            found = torch.zeros_like(s) if two is None else two
            assert torch.allclose(found, second, rtol=max(rtol, 1e-10), atol=1e-15), module


OTHER_SETTINGS = {
    nn.Softplus: [nn.Softplus(beta=2.0), nn.Softplus(threshold=1.0)],
    nn.GELU: [nn.GELU("tanh")],
    nn.ELU: [nn.ELU(0.5)],
    nn.CELU: [nn.CELU(0.3)],
    nn.Threshold: [nn.Threshold(0.5, 2.0)],
    nn.Softshrink: [nn.Softshrink(1.5)],
    nn.Hardshrink: [nn.Hardshrink(1.5)],
    nn.RReLU: [nn.RReLU(0.1, 0.2)],
    nn.LeakyReLU: [nn.LeakyReLU(0.3), nn.LeakyReLU(-0.5)],
    nn.Hardtanh: [nn.Hardtanh(-0.5, 2.0)],
}


def test_celu_has_the_digits_that_torch_rounds_away():
    """Its own derivative divides by α in single precision."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.CELU(0.3), nn.Linear(1, 1, bias=False))
    nn.init.constant_(net[0].weight, -0.7)
    nn.init.ones_(net[2].weight)
    derivs = differentiate(net.double(), torch.ones(1, 1).double())
    s = net[0].weight.item()
    assert derivs.jacobian("0.weight").item() == pytest.approx(math.exp(s / 0.3), rel=1e-14)
    assert derivs.second("0.weight").item() == pytest.approx(math.exp(s / 0.3) / 0.3, rel=1e-14)


@pytest.mark.parametrize("kind", [nn.LeakyReLU(-0.5, inplace=True), nn.ELU(-2.0, inplace=True)])
def test_activations_that_torch_cannot_differentiate_in_place(kind):
    net = nn.Sequential(nn.Linear(3, 4), kind, nn.Linear(4, 2)).double()
    plain = copy.deepcopy(net)
    plain[1].inplace = False
    x = inputs(2, 3)
    for b in range(2):
        J, S = reference.derivatives(plain, x[b : b + 1])
        found = differentiate(net, x)
        assert relative(found.jacobian("0.weight")[b], J["0.weight"]) < 1e-10
        assert relative(found.second("0.weight")[b], S["0.weight"]) < 1e-10


def test_an_infinite_second_derivative_is_refused():
    net = nn.Sequential(nn.Linear(1, 1, bias=False), Root(), nn.Linear(1, 1))
    nn.init.zeros_(net[0].weight)
    with pytest.raises(ValueError, match=r"'1' \(Root\) has no finite derivative"):
        differentiate(net, torch.ones(1, 1), engine="layerwise")


@pytest.mark.parametrize("engine", ["auto", "layerwise"])
def test_a_bias_made_of_another_layers_parameters_is_refused(engine):
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    del net[2].bias
    net[2].bias = net[0].bias * 2
    with pytest.raises(NotImplementedError, match="'2' .Linear. computes|is no parameter of"):
        differentiate(net, inputs(2, 4), engine=engine)


def test_integers_and_missing_values_are_refused_with_a_remedy():
    net = mlp([3, 4, 2], nn.Sigmoid)
    with pytest.raises(ValueError, match=r"is torch.float64 and gets torch.int64.*\.to\("):
        differentiate(net, torch.ones(2, 3).long())
    with pytest.raises(ValueError, match=r"input is on the meta device and has no values"):
        differentiate(net, torch.ones(2, 3, device="meta").double())
    with pytest.raises(ValueError, match="'0.weight' is on the meta device.*without offloading"):
        differentiate(net.to("meta"), torch.ones(2, 3).double())


@pytest.mark.parametrize("x", [[[1.0, 2.0]], {"x": torch.ones(1, 3)}, torch.ones(1, 3).numpy()])
def test_what_is_no_tensor_is_refused_with_a_remedy(x):
    with pytest.raises(TypeError, match=r"must be a tensor, got \w+: convert it"):
        differentiate(mlp([3, 2], nn.Sigmoid), x)
    with pytest.raises(TypeError, match="must be an nn.Module, got function"):
        differentiate(lambda x: x, torch.ones(1, 3))
    with pytest.raises(TypeError, match="^Linear is a class: make an instance of it"):
        differentiate(nn.Linear, torch.ones(1, 3))


class Returns(nn.Module):
    """What a function makes of the outputs of a layer."""

    def __init__(self, what):
        super().__init__()
        self.layer, self.what = nn.Linear(3, 3).double(), what

    def forward(self, x):
        return self.what(self.layer(x))


OUTPUTS = {
    "dict": (lambda h: {"logits": h}, "got a dict: return its tensor, by a wrapper"),
    "tuple": (lambda h: (h, h), "got a tuple: return its tensor, by a wrapper"),
    "one number per input": (lambda h: h.sum(1), r"got \[\d\]: add an axis, h\[:, None\]"),
    "positions": (lambda h: h[:, None], r"got \[\d, 1, 3\]: a family .*one label.*h\[:, -1\]"),
    "a loss": (lambda h: h.sum(), r"got \[\]: .*no loss"),
    "other rows": (
        lambda h: h[:1],
        r"got \[1, 3\]: the first axis must count the inputs, and no squeeze",
    ),
}


@pytest.mark.parametrize(("what", "remedy"), OUTPUTS.values(), ids=OUTPUTS)
def test_outputs_that_are_no_rows_are_refused_with_what_makes_them_rows(what, remedy):
    net, x = Returns(what), inputs(2, 3)
    message = rf"must return one \[B, T\] tensor, here \[\d, T\], {remedy}"
    for choice in ({}, {"engine": "functional", "order": 1}):
        with pytest.raises(ValueError, match=message):
            differentiate(net, x, **choice)
    with pytest.raises(ValueError, match=message):
        fimlib.fisher_matrix(net, x, fimlib.Gaussian(), parameters=["layer.bias"])
    with pytest.raises((ValueError, NotImplementedError), match=f"{message}|others of the batch"):
        fimlib.summarise(net, x, fimlib.Gaussian())  # looks at one input first


def test_backpack_says_the_same_of_the_outputs():
    pytest.importorskip("backpack")
    net = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Sigmoid()).double()
    message = r"got \[2, 2, 2\]: a family .*one label.*h\[:, -1\]"
    with pytest.raises(ValueError, match=message):
        differentiate(net, inputs(2, 3)[:, None], engine="backpack")
    with pytest.raises(ValueError, match=r"fails in module '0' \(Conv1d\) on"):
        differentiate(net, inputs(2, 3)[:, None, :1], engine="backpack")


def test_a_single_input_without_the_axis_of_inputs_is_told_so():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(72, 3)).double()
    one = torch.ones(1, 8, 8, dtype=torch.float64)
    for call in (differentiate, fimlib.plan):
        with pytest.raises(ValueError, match=r"\[1, 8, 8\].*For a single input pass x\[None\]\.$"):
            call(net, one)
    assert differentiate(net, one[None]).outputs.shape == (1, 3)


def test_a_class_in_the_place_of_a_family_is_refused():
    derivs = differentiate(mlp([3, 4, 2], nn.Sigmoid), inputs(1, 3))
    for call in (fimlib.fisher_information, fimlib.variance_i1, fimlib.variance_i2):
        with pytest.raises(TypeError, match=r"Categorical is no output family: .* Categorical\(\)"):
            call(derivs, fimlib.Categorical)
    with pytest.raises(TypeError, match=r"'categorical' is no output family: pass e.g."):
        fimlib.Joint("categorical")
    with pytest.raises(TypeError, match="^a NoneType is no output family: pass e.g."):
        fimlib.Joint(None)
    with pytest.raises(TypeError, match="^a Derivatives is no .*: the order is derivatives, fam"):
        fimlib.fisher_information(fimlib.Categorical(), derivs)
    family = fimlib.Categorical()
    for y in ([1], torch.tensor([1]).numpy()):
        labels = family.observed(derivs.outputs, y)
        expected = family.observed(derivs.outputs, torch.tensor([1]))
        assert torch.equal(labels.weights, expected.weights)


def test_what_is_read_may_be_written_to():
    """A bias has no right factor, so that its values are those that are kept."""
    net, x = mlp([3, 4, 2], nn.Tanh), inputs(2, 3)
    derivs = differentiate(net, x)
    I = fimlib.fisher_information(derivs, fimlib.Categorical())
    reads = (
        lambda: derivs.jacobian("0.bias"),
        lambda: derivs.second("0.bias"),
        lambda: I["0.bias"],
        lambda: I.mean_over_inputs()["0.bias"],
    )
    for read in reads:
        before = read().clone()
        read().zero_()
        assert before.any()
        assert torch.equal(read(), before)
