"""An estimate of I with its standard error, from independent passes over the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Estimate", "LayerEstimate"]

PerParameter = dict[str, Tensor]


class LayerEstimate(NamedTuple):
    """The sum of I over a layer's parameters, in nat/θ².

    Attributes:
        total: ΣÎ.
        standard_error: Of that sum. It is not the sum of the parameters' errors, which depend on
            the same random vectors.
        relative_error: √(Σ SE² / Σ I²) over the layer's parameters, as in ``num_samples_needed``.
    """

    total: float
    standard_error: float
    relative_error: float


@dataclass(frozen=True)
class Estimate:
    """An unbiased estimate of E_x I(θᵢ|x), with its standard error.

    Attributes:
        value: Parameter name → its shape, float64, in nat/θ²; never negative.
        standard_error: The same, of the passes' spread.
        layers: Layer → ``LayerEstimate``.
        relative_error: √(Σ SE² / Σ I²) over all parameters: the typical ‖Î − I‖ in units of ‖I‖.
        passes: Backward passes through the data.
        num_inputs: m, the inputs.
        estimator: "signs", "labels" or "importance".
        squares: "batch" or "input".
    """

    value: PerParameter
    standard_error: PerParameter
    layers: Mapping[str, LayerEstimate]
    relative_error: float
    passes: int
    num_inputs: int
    estimator: str
    squares: str


@dataclass
class Record:
    """Means and spreads over the passes, by Welford's formula.

    Attributes:
        mean: Of the passes' estimates, by parameter.
        scatter: Σ (estimate − mean)², by parameter.
        sums: For every pass, the sum of its estimate over every layer.
        num_inputs: m.
    """

    mean: PerParameter
    scatter: PerParameter
    sums: list[dict[str, Tensor]] = field(default_factory=list)
    num_inputs: int = 0

    @classmethod
    def of(cls, shapes: list[tuple[str, torch.Size, torch.device]]) -> Record:
        """No pass yet."""
        mean, scatter = (
            {n: torch.zeros(s, dtype=torch.float64, device=d) for n, s, d in shapes}
            for _ in range(2)
        )
        return cls(mean, scatter)

    @property
    def passes(self) -> int:
        """K, the passes so far."""
        return len(self.sums)

    def add(self, total: PerParameter, num_inputs: int) -> None:
        """Take in Σ_x of one pass; the total is used up."""
        sums: dict[str, Tensor] = {}
        for name, here in total.items():
            here /= num_inputs
            layer = layer_of(name)
            sums[layer] = sums.get(layer, 0) + here.sum()
            off = here - self.mean[name]
            self.mean[name] += off / (self.passes + 1)
            self.scatter[name] += off.mul_(here.sub_(self.mean[name]))
        self.sums.append(sums)
        self.num_inputs = num_inputs

    def squared_errors(self) -> dict[str, tuple[float, float]]:
        """Layer → Σ SE² and Σ Î² over its parameters."""
        found: dict[str, tuple[float, float]] = {}
        for name, mean in self.mean.items():
            error, size = found.get(layer_of(name), (0.0, 0.0))
            variance = float(self.scatter[name].sum()) / (self.passes * (self.passes - 1))
            found[layer_of(name)] = error + variance, size + float(mean.square().sum())
        return found

    def relative_error(self) -> float:
        """√(Σ SE² / Σ I²) over all parameters."""
        errors, sizes = zip(*self.squared_errors().values(), strict=True)
        return relative(sum(errors), sum(sizes))

    def estimate(self, estimator: str, squares: str) -> Estimate:
        """The result."""
        k = self.passes
        layers = {}
        for layer, (error, size) in self.squared_errors().items():
            sums = torch.stack([s[layer] for s in self.sums])
            spread = float(sums.std() / k**0.5)
            layers[layer] = LayerEstimate(float(sums.mean()), spread, relative(error, size))
        errors = {n: (t / (k * (k - 1))).sqrt() for n, t in self.scatter.items()}
        reached = self.relative_error()
        return Estimate(self.mean, errors, layers, reached, k, self.num_inputs, estimator, squares)


def layer_of(name: str) -> str:
    """The module that holds a parameter."""
    return name.rpartition(".")[0]


def relative(error: float, size: float) -> float:
    """√(error / I²), where ``size`` = Î² is too large by the error on average; 0/0 is 0."""
    if error == 0:
        return 0.0
    return math.sqrt(error / (size - error)) if size > error else math.inf
