"""Torch's activations with σ' and σ'' in closed forms in which nothing cancels.

Far from 0 these derivatives are small, and torch's own rules find them as differences of numbers
near 1: beyond |s| of about 36 (17 in float32) no digit is left of σ(s)(1 − σ(s)), which is
σ(s)σ(−s). Of some, torch rounds a constant to float32. Shapes: those of s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

Two = tuple[Tensor, Tensor | None]  # σ' and σ''; None is 0 everywhere


class Curve(NamedTuple):
    """An elementwise function σ.

    Attributes:
        value: σ.
        slopes: σ' and σ'', both from s.
    """

    value: Callable[[Tensor], Tensor]
    slopes: Callable[[Tensor], Two]


def opposite(s: Tensor) -> Tensor:
    """The logistic function at −s, which is 1 less that at s."""
    return (-s).sigmoid()


def sech2(s: Tensor) -> Tensor:
    """1 − tanh², which is 1/cosh²."""
    return s.cosh().reciprocal().square()


def of_sigmoid(s: Tensor) -> Two:
    """Of the logistic function."""
    p, q = s.sigmoid(), opposite(s)
    first = p * q
    return first, (q - p) * first


def of_tanh(s: Tensor) -> Two:
    """Of the hyperbolic tangent."""
    first = sech2(s)
    return first, -2 * s.tanh() * first


def of_tanhshrink(s: Tensor) -> Two:
    """Of s − tanh(s)."""
    t = s.tanh()
    return t.square(), 2 * t * sech2(s)


def of_softsign(s: Tensor) -> Two:
    """Of s / (1 + |s|)."""
    root = (1 + s.abs()).reciprocal()
    return root.square(), -2 * s.sign() * root**3


def of_logsigmoid(s: Tensor) -> Two:
    """Of log σ(s)."""
    first = opposite(s)
    return first, -first * s.sigmoid()


def of_silu(s: Tensor) -> Two:
    """Of s σ(s)."""
    p, q = s.sigmoid(), opposite(s)
    return p * (1 + s * q), p * q * (2 + s * (q - p))


def of_mish(s: Tensor) -> Two:
    """Of s tanh(log(1 + e^s))."""
    p, q, w = s.sigmoid(), opposite(s), -F.logsigmoid(-s)
    t, slope = w.tanh(), sech2(w) * p
    return t + s * slope, slope * (2 + s * (q - 2 * t * p))


def of_gelu(s: Tensor) -> Two:
    """Of s Φ(s)."""
    s = s.clamp(-1e3, 1e3)  # a line beyond, and powers of s might overflow
    density = (-s.square() / 2).exp() / math.sqrt(2 * math.pi)
    below = torch.special.erfc(-s / math.sqrt(2)) / 2
    return below + s * density, density * (2 - s.square())


def of_gelu_tanh(s: Tensor) -> Two:
    """Of s (1 + tanh(k(s + c s³))) / 2, which is about s Φ(s)."""
    s = s.clamp(-1e3, 1e3)
    k, c = math.sqrt(2 / math.pi), 0.044715
    u, du = k * (s + c * s**3), k * (1 + 3 * c * s.square())
    bend = du + 3 * k * c * s.square() - s * u.tanh() * du.square()
    return (2 * u).sigmoid() + s * sech2(u) * du / 2, sech2(u) * bend


def of_hardsigmoid(s: Tensor) -> Two:
    """Of s/6 + 1/2 between 0 and 1."""
    return ((s > -3) & (s < 3)).to(s) / 6, None


def of_hardswish(s: Tensor) -> Two:
    """Of s times that."""
    inside = (s > -3) & (s < 3)
    first = torch.where(inside, (2 * s + 3) / 6, (s >= 3).to(s))
    return first, inside.to(s) / 3


SIGMOID = Curve(torch.sigmoid, of_sigmoid)
TANH = Curve(torch.tanh, of_tanh)
TANHSHRINK = Curve(F.tanhshrink, of_tanhshrink)
SOFTSIGN = Curve(F.softsign, of_softsign)
LOGSIGMOID = Curve(F.logsigmoid, of_logsigmoid)
SILU = Curve(F.silu, of_silu)
MISH = Curve(F.mish, of_mish)
HARDSIGMOID = Curve(F.hardsigmoid, of_hardsigmoid)
HARDSWISH = Curve(F.hardswish, of_hardswish)


def gelu(approximate: str) -> Curve:
    """S Φ(s), or its approximation by tanh."""
    slopes = of_gelu if approximate == "none" else of_gelu_tanh
    return Curve(lambda s: F.gelu(s, approximate=approximate), slopes)


def softplus(beta: float, threshold: float) -> Curve:
    """log(1 + e^βs)/β, which torch replaces by s where βs exceeds the threshold."""

    def slopes(s: Tensor) -> Two:
        x = beta * s
        p, is_linear = x.sigmoid(), x > threshold
        second = (beta * p * opposite(x)).masked_fill(is_linear, 0.0)
        return p.masked_fill(is_linear, 1.0), second

    return Curve(lambda s: F.softplus(s, beta, threshold), slopes)


def elu(alpha: float, scale: float = 1.0, rate: float = 1.0) -> Curve:
    """``scale`` times s where that is positive, else times α (e^(rate · s) − 1)."""

    def value(s: Tensor) -> Tensor:
        below = alpha * torch.expm1((rate * s).clamp_max(0))
        return scale * torch.where(s > 0, s, below)

    def slopes(s: Tensor) -> Two:
        below = scale * alpha * rate * (rate * s).clamp_max(0).exp()
        return torch.where(s > 0, scale, below), torch.where(s > 0, 0.0, rate * below)

    return Curve(value, slopes)


SELU = elu(1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


def celu(alpha: float) -> Curve:
    """ELU with a slope that is continuous; torch rounds 1/α to float32."""
    return elu(alpha, rate=1 / alpha)


def piecewise(value: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Curve:
    """A function that is linear between kinks."""
    return Curve(value, lambda s: (slope(s).to(s), None))


RELU = piecewise(F.relu, lambda s: s > 0)


def leaky_relu(slope: float) -> Curve:
    """S where that is positive, else ``slope`` times s."""
    return piecewise(
        lambda s: F.leaky_relu(s, slope),
        lambda s: torch.full_like(s, slope).masked_fill(s > 0, 1.0),
    )


def hardtanh(low: float, high: float) -> Curve:
    """S between two bounds."""
    return piecewise(lambda s: s.clamp(low, high), lambda s: (s > low) & (s < high))


def threshold(least: float, value: float) -> Curve:
    """S where that is larger than some number, else a constant."""
    return piecewise(lambda s: F.threshold(s, least, value), lambda s: s > least)


def softshrink(width: float) -> Curve:
    """S, closer to 0 by ``width``, or 0."""
    return piecewise(lambda s: F.softshrink(s, width), lambda s: s.abs() > width)


def hardshrink(width: float) -> Curve:
    """S where it is farther from 0 than ``width``, else 0."""
    return piecewise(lambda s: F.hardshrink(s, width), lambda s: s.abs() > width)
