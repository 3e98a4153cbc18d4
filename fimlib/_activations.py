"""σ' and σ'' of torch's smooth activations in closed forms in which nothing cancels.

Far from 0 these derivatives are small, and torch's own rules find them as differences of numbers
near 1: beyond |s| of about 36 (17 in float32) no digit is left of σ(s)(1 − σ(s)), which is
σ(s)σ(−s). Shapes: those of s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Two = tuple[Tensor, Tensor]


def opposite(s: Tensor) -> Tensor:
    """The logistic function at −s, which is 1 less that at s."""
    return s.neg().sigmoid_()


def sech2(s: Tensor) -> Tensor:
    """1 − tanh², which is 1/cosh²."""
    return s.cosh().reciprocal_().square_()


def of_sigmoid(s: Tensor, z: Tensor) -> Two:
    """Of the logistic function, whose value at s is z."""
    q = opposite(s)
    first = q * z
    return first, q.sub_(z).mul_(first)


def of_tanh(s: Tensor, z: Tensor) -> Two:
    """Of the hyperbolic tangent, whose value at s is z."""
    first = sech2(s)
    return first, (-2 * z).mul_(first)


def of_logsigmoid(s: Tensor) -> Two:
    """Of log σ(s)."""
    first = opposite(s)
    return first, -first * s.sigmoid()


def of_softplus(s: Tensor, beta: float, threshold: float) -> Two:
    """Of log(1 + e^βs)/β, which torch replaces by s where βs exceeds the threshold."""
    x = beta * s
    p, is_linear = x.sigmoid(), x > threshold
    second = (beta * p * opposite(x)).masked_fill_(is_linear, 0.0)
    return p.masked_fill_(is_linear, 1.0), second


def of_silu(s: Tensor) -> Two:
    """Of s σ(s)."""
    p, q = s.sigmoid(), opposite(s)
    return p * (1 + s * q), p * q * (2 + s * (q - p))


def of_mish(s: Tensor) -> Two:
    """Of s tanh(log(1 + e^s))."""
    p, q, w = s.sigmoid(), opposite(s), -torch.nn.functional.logsigmoid(-s)
    t, slope = w.tanh(), sech2(w) * p
    return t + s * slope, slope * (2 + s * (q - 2 * t * p))


def of_gelu(s: Tensor, approximate: str) -> Two:
    """Of s Φ(s), or of its approximation by tanh."""
    s = s.clamp(-1e3, 1e3)  # both are lines beyond, and powers of s might overflow
    if approximate == "tanh":
        k, c = math.sqrt(2 / math.pi), 0.044715
        u, du = k * (s + c * s**3), k * (1 + 3 * c * s.square())
        bend = du + 3 * k * c * s.square() - s * u.tanh() * du.square()
        return (2 * u).sigmoid() + s * sech2(u) * du / 2, sech2(u) * bend
    density = (-s.square() / 2).exp() / math.sqrt(2 * math.pi)
    below = torch.special.erfc(-s / math.sqrt(2)) / 2
    return below + s * density, density * (2 - s.square())


# By the names of autograd's nodes, from what these keep of the forward pass.
OF_NODES: dict[str, Callable[[Any, Tensor], Two]] = {
    "LogSigmoid": lambda _, s: of_logsigmoid(s),
    "Softplus": lambda node, s: of_softplus(s, node._saved_beta, node._saved_threshold),
    "Silu": lambda _, s: of_silu(s),
    "Mish": lambda _, s: of_mish(s),
    "Gelu": lambda node, s: of_gelu(s, node._saved_approximate),
}
