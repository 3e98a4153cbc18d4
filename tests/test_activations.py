"""σ' and σ'' against the activations' definitions, differentiated in 500 digits."""

from decimal import Decimal, getcontext, localcontext
from typing import NamedTuple

import pytest
import torch
from torch import nn

from fimlib import differentiate

POINTS = (
    -700.0,
    -80.0,
    -40.0,
    -18.0,
    -9.0,
    -3.0,
    -0.3,
    0.0,
    0.2,
    2.0,
    9.0,
    18.0,
    40.0,
    80.0,
    300.0,
)


class Jet(NamedTuple):
    """A number and its first two derivatives along s."""

    v: Decimal
    d: Decimal = Decimal(0)
    dd: Decimal = Decimal(0)

    def of(self, f, first, second):
        return Jet(f, first * self.d, second * self.d**2 + first * self.dd)

    def __add__(self, other):
        other = other if isinstance(other, Jet) else Jet(Decimal(other))
        return Jet(self.v + other.v, self.d + other.d, self.dd + other.dd)

    def __mul__(self, other):
        o = other if isinstance(other, Jet) else Jet(Decimal(other))
        dd = self.dd * o.v + 2 * self.d * o.d + self.v * o.dd
        return Jet(self.v * o.v, self.d * o.v + self.v * o.d, dd)

    def inverse(self):
        return self.of(1 / self.v, -1 / self.v**2, 2 / self.v**3)

    def exp(self):
        return self.of(*[self.v.exp()] * 3)

    def ln(self):
        return self.of(self.v.ln(), 1 / self.v, -1 / self.v**2)


def normal(s):
    """The distribution function of a standard normal number, by its series."""
    pi = Decimal(16) * arctan_of_inverse(5) - Decimal(4) * arctan_of_inverse(239)
    density = (-(s.v**2) / 2).exp() / (2 * pi).sqrt()
    term, total, n = s.v, Decimal(0), 0
    while n < 50 or abs(term) > Decimal(10) ** -400:
        total += term / (2 * n + 1)
        n += 1
        term *= -(s.v**2) / (2 * n)
    return s.of(Decimal("0.5") + total / (2 * pi).sqrt(), density, -s.v * density), pi


def arctan_of_inverse(n):
    return sum(Decimal((-1) ** k) / ((2 * k + 1) * Decimal(n) ** (2 * k + 1)) for k in range(400))


def sigmoid(s):
    return ((s * -1).exp() + 1).inverse()


def tanh(s):
    return sigmoid(s * 2) * 2 + -1


def softplus(s):
    return (s.exp() + 1).ln()


def gelu_tanh(s):
    k = (2 / normal(Jet(Decimal(0)))[1]).sqrt()
    return s * Decimal("0.5") * (tanh((s + s * s * s * Decimal("0.044715")) * k) + 1)


DEFINITIONS = {
    "sigmoid": (nn.Sigmoid(), sigmoid, 700),
    "tanh": (nn.Tanh(), tanh, 300),
    "logsigmoid": (nn.LogSigmoid(), lambda s: softplus(s * -1) * -1, 700),
    "softplus": (
        nn.Softplus(beta=0.5, threshold=1e3), lambda s: softplus(s * Decimal("0.5")) * 2, 700,
    ),
    "silu": (nn.SiLU(), lambda s: s * sigmoid(s), 700),
    "mish": (nn.Mish(), lambda s: s * tanh(softplus(s)), 300),
    "gelu": (nn.GELU(), lambda s: s * normal(s)[0], 18),
    "gelu-tanh": (nn.GELU("tanh"), gelu_tanh, 9),
}  # fmt: skip
# Autograd keeps the value of the others alone, and what it was computed from of these.
TRACED = ("logsigmoid", "softplus", "silu", "mish", "gelu", "gelu-tanh")


def exact(definition, s):
    """σ'(s) and σ''(s), rounded once."""
    with localcontext() as context:
        context.prec = 500
        context.Emin = -(10**6)
        found = definition(Jet(Decimal(s), Decimal(1)))
    return float(found.d), float(found.dd)


def derivatives(module, s, engine, dtype=torch.float64):
    """The same by an engine: of h = σ(w x) in w at x = 1."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), module, nn.Linear(1, 1, bias=False)).to(dtype)
    nn.init.constant_(net[0].weight, s)
    nn.init.ones_(net[2].weight)
    derivs = differentiate(net, torch.ones(1, 1, dtype=dtype), engine=engine)
    return derivs.jacobian("0.weight").item(), derivs.second("0.weight").item()


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        *((engine, name) for engine in ("layerwise", "hesscale") for name in DEFINITIONS),
        *(("traced", name) for name in TRACED),
    ],
)
def test_far_from_0_all_digits_are_there(engine, name):
    module, definition, furthest = DEFINITIONS[name]
    for s in (s for s in POINTS if abs(s) <= furthest):
        first, second = exact(definition, s)
        found = derivatives(module, s, engine)
        assert found[0] == pytest.approx(first, rel=2e-13, abs=1e-300), s
        assert found[1] == pytest.approx(second, rel=2e-13, abs=1e-300 if s else 1e-16), s


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "logsigmoid", "silu"])
def test_in_float32_as_well(name):
    module, definition, _ = DEFINITIONS[name]
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


@pytest.mark.parametrize("kind", [nn.GELU(), nn.GELU("tanh"), nn.Mish(), nn.SiLU(), nn.Tanh()])
def test_where_powers_of_s_overflow_the_slope_is_that_of_the_line(kind):
    for s in (-1e30, 1e30):
        first, second = derivatives(kind, s, "layerwise", torch.float32)
        assert first == (s > 0 and not isinstance(kind, nn.Tanh))
        assert second == 0


def test_the_series_of_the_oracle_converges():
    assert getcontext().prec == 28  # of others it is left alone
    assert exact(lambda s: normal(s)[0], 0.0)[0] == pytest.approx(0.3989422804014327, rel=1e-15)
    with localcontext() as context:
        context.prec = 500
        assert float(normal(Jet(Decimal(2)))[0].v) == pytest.approx(0.9772498680518208, rel=1e-15)
        assert 0 < normal(Jet(Decimal(-18)))[0].v < Decimal("1e-70")
