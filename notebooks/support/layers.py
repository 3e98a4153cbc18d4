"""From one number per parameter to one per layer; layers are numbered from 1, as in the paper."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fimlib import Diagonal, Interval

ROUNDING = 1e-10  # a value beyond its bound by more than this share of it is a violation


def means(diagonal: Diagonal) -> dict[str, float]:
    """Mean over the parameters of each layer, and over the inputs."""
    return {
        str(number): float(mean.mean())
        for number, mean in enumerate(diagonal.layer_means().values(), start=1)
    }


def sums(by_parameter: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Sum a number per parameter over the weights and biases of each layer."""
    layers: dict[str, float] = {}
    for parameter, number in by_parameter.items():
        layer = parameter.rpartition(".")[0]
        layers[layer] = layers.get(layer, 0.0) + float(number)
    return {str(k): number for k, number in enumerate(layers.values(), start=1)}


def violations(value: Diagonal, interval: Interval[Diagonal]) -> dict[str, float]:
    """At how many parameters and inputs of each layer the value is not between its bounds.

    A violation is a value beyond its bound by more than `ROUNDING` of the bound, which is what
    summing in another order may cost.
    """
    beyond = {}
    for parameter, v in value.items():
        low, high = interval.lower[parameter], interval.upper[parameter]
        beyond[parameter] = ((v > high * (1 + ROUNDING)) | (v < low * (1 - ROUNDING))).sum()
    return sums(beyond)


def sizes(diagonal: Diagonal) -> dict[str, float]:
    """How many parameters each layer has."""
    return sums({parameter: v[0].numel() for parameter, v in diagonal.items()})
