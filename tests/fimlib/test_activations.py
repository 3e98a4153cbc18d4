"""σ' and σ'' against the activations' definitions, differentiated in 330 digits."""

import mpmath
import pytest
import torch
from mpmath import mp
from torch import nn

from fimlib import differentiate

NEAR = (-50, -42.5, -36, -30, -18, -9, -5, -2.9, -1.9, -0.3, -1e-3, 0, 0.2, 1, 2, 2.9, 4, 7, 9, 13)
POINTS = (-700, -300, -80, *NEAR, 18, 25, 33, 37.5, 44, 50, 80, 300)


def sigmoid(s):
    return 1 / (1 + mp.exp(-s))


def softplus(s):
    return mp.log1p(mp.exp(s))


def gelu_tanh(s):
    return s * (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (s + mpmath.mpf("0.044715") * s**3))) / 2


def elu(s, alpha=1, scale=1, rate=1):
    return scale * (s if s > 0 else alpha * mp.expm1(rate * s))


SELU = ("1.6732632423543772848170429916717", "1.0507009873554804934193349852946")


def between(s, low, high):
    return min(max(s, low), high)


# The module, its definition, and the kinks, where no derivative is asked for.
DEFINITIONS = {
    "sigmoid": (nn.Sigmoid(), sigmoid),
    "tanh": (nn.Tanh(), mp.tanh),
    "tanhshrink": (nn.Tanhshrink(), lambda s: s - mp.tanh(s)),
    "softsign": (nn.Softsign(), lambda s: s / (1 + abs(s)), 0),
    "logsigmoid": (nn.LogSigmoid(), lambda s: -softplus(-s)),
    "softplus": (nn.Softplus(beta=0.5, threshold=1e3), lambda s: softplus(s / 2) * 2),
    "silu": (nn.SiLU(), lambda s: s * sigmoid(s)),
    "mish": (nn.Mish(), lambda s: s * mp.tanh(softplus(s))),
    "gelu": (nn.GELU(), lambda s: s * mp.erfc(-s / mp.sqrt(2)) / 2),
    "gelu-tanh": (nn.GELU("tanh"), gelu_tanh),
    "elu": (nn.ELU(0.7), lambda s: elu(s, 0.7), 0),
    "celu": (nn.CELU(1.7), lambda s: elu(s, 1.7, 1, 1 / mpmath.mpf(1.7)), 0),
    "selu": (nn.SELU(), lambda s: elu(s, *map(mpmath.mpf, SELU)), 0),
    "hardsigmoid": (nn.Hardsigmoid(), lambda s: between(s + 3, 0, 6) / 6),
    "hardswish": (nn.Hardswish(), lambda s: s * between(s + 3, 0, 6) / 6),
    "relu": (nn.ReLU(), lambda s: max(s, 0), 0),
    "relu6": (nn.ReLU6(), lambda s: between(s, 0, 6), 0),
    "leaky relu": (nn.LeakyReLU(0.3), lambda s: s if s > 0 else 0.3 * s, 0),
    "rrelu": (nn.RReLU(0.25, 0.5), lambda s: s if s > 0 else 0.375 * s, 0),
    "hardtanh": (nn.Hardtanh(-2, 3), lambda s: between(s, -2, 3)),
    "threshold": (nn.Threshold(0.5, 2.0), lambda s: s if s > 0.5 else mpmath.mpf(2)),
    "softshrink": (nn.Softshrink(), lambda s: s - between(s, -0.5, 0.5)),
    "hardshrink": (nn.Hardshrink(), lambda s: s if abs(s) > 0.5 else 0 * s),
}  # fmt: skip


def exact(definition, s):
    """σ'(s) and σ''(s), rounded once; values below 1e-300 are compared with 0."""
    with mp.workdps(330):
        return tuple(float(mp.diff(definition, mpmath.mpf(s), n)) for n in (1, 2))


def derivatives(module, s, engine, dtype=torch.float64):
    """The same by an engine: of h = σ(w x) in w at x = 1."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), module, nn.Linear(1, 1, bias=False)).to(dtype)
    nn.init.constant_(net[0].weight, s)
    nn.init.ones_(net[2].weight)
    order = 1 if engine == "functional" else 2
    derivs = differentiate(net, torch.ones(1, 1, dtype=dtype), engine=engine, order=order)
    second = derivs.second("0.weight").item() if order == 2 else None
    return derivs.jacobian("0.weight").item(), second


@pytest.fixture
def unconfirmed(monkeypatch):
    """Without the comparison with torch's own values, which have no digits there."""
    monkeypatch.setattr("fimlib.engines.choose.confirm", lambda *_: None)


LONG = pytest.param("gelu", marks=pytest.mark.long)  # whose erfc takes long in so many digits


@pytest.mark.long
@pytest.mark.usefixtures("unconfirmed")
@pytest.mark.parametrize("name", [LONG if name == "gelu" else name for name in DEFINITIONS])
def test_far_from_0_all_digits_are_there(name):
    module, definition, *kinks = DEFINITIONS[name]
    for s in POINTS:
        if s in kinks:
            continue
        first, second = exact(definition, s)
        for engine in ("layerwise", "traced", "functional"):
            if engine == "functional" and 0 < abs(first) < 1e-8:
                continue  # torch's values have no digits there that could confirm it
            found = derivatives(module.eval(), s, engine)
            where = (s, engine)
            assert found[0] == pytest.approx(first, rel=3e-12, abs=1e-300), where
            if engine != "functional":
                assert found[1] == pytest.approx(second, rel=3e-12, abs=1e-300), where


def test_all_of_torch_s_activations_are_there():
    """Those that act unit by unit and have no parameters."""
    others = {"GLU", "MultiheadAttention", "PReLU", "Softmax", "Softmax2d", "Softmin", "LogSoftmax"}
    known = {type(module).__name__ for module, *_ in DEFINITIONS.values()}
    assert known == set(nn.modules.activation.__all__) - others


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "logsigmoid", "silu"])
def test_in_float32_as_well(name):
    module, definition = DEFINITIONS[name]
    for s in (-30.0, -20.0, 20.0, 30.0):
        expected = exact(definition, s)
        found = derivatives(module, s, "layerwise", torch.float32)
        assert found == pytest.approx(expected, rel=2e-5, abs=1e-37), s


def test_of_a_saturated_log_sigmoid_by_hand():
    """σ'' = −σ(s)σ(−s), which is −e^−|s| to 17 digits there."""
    for engine in ("layerwise", "traced"):
        for s in (-80.0, -40.0, 40.0):
            second = derivatives(nn.LogSigmoid(), s, engine)[1]
            assert second == pytest.approx(-(2.718281828459045 ** -abs(s)), rel=1e-13)


def test_softplus_is_linear_where_torch_takes_it_for_that():
    for engine in ("layerwise", "traced"):
        assert derivatives(nn.Softplus(), 20.5, engine) == (1.0, 0.0)
        first, second = derivatives(nn.Softplus(), 19.5, engine)
        assert (first < 1, second > 0) == (True, True)


@pytest.mark.usefixtures("unconfirmed")
@pytest.mark.parametrize("kind", [nn.GELU(), nn.GELU("tanh"), nn.Mish(), nn.SiLU(), nn.Tanh()])
def test_where_powers_of_s_overflow_the_slope_is_that_of_the_line(kind):
    for s in (-1e30, 1e30):
        first, second = derivatives(kind, s, "layerwise", torch.float32)
        assert first == (s > 0 and not isinstance(kind, nn.Tanh))
        assert second == 0
