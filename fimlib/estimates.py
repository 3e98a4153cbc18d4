"""An estimate of I with its standard error, from independent passes over the data.

It can be saved, loaded, and merged with those of other processes.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from scipy import special
from torch import Tensor, nn

from fimlib import _files
from fimlib._signals import later
from fimlib._tables import aligned
from fimlib.engines.checks import check_module
from fimlib.families.probabilities import warn

__all__ = ["Estimate", "LayerEstimate", "load"]

PerParameter = dict[str, Tensor]
SMALLEST = 1e-150  # whose square is still a number
WIDEST = 100.0  # interval, on a logarithmic scale


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
        origin: What it was made from: "family" and its settings; "seed"; checksums of the "model",
            its parameters and buffers, and of the "data", in any order; versions of "fimlib" and
            "torch".
    """

    value: PerParameter
    standard_error: PerParameter
    layers: Mapping[str, LayerEstimate]
    relative_error: float
    passes: int
    num_inputs: int
    estimator: str
    squares: str
    origin: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """A table of the layers."""
        title = ("layer", "params", "ΣI", "± error", "relative")
        rows = [title]
        for layer, (total, spread, error) in self.layers.items():
            size = sum(v.numel() for n, v in self.value.items() if layer_of(n) == layer)
            rows.append(
                (layer or "(all)", f"{size}", f"{total:.4g}", f"{spread:.2g}", f"{error:.2g}")
            )
        head = [
            f"E_x I of {self.num_inputs} inputs in nat/θ², from {self.passes} passes with random "
            f"{self.estimator};",
            f"its relative error √(ΣSE²/ΣI²) over all parameters is {self.relative_error:.2g}.",
        ]
        return "\n".join([*head, "", *aligned(rows)])

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return next(t.device for t in self.value.values())

    def to(self, device: torch.device | str) -> Estimate:
        """A copy on another device."""
        value, errors = (
            {n: t.to(device) for n, t in D.items()} for D in (self.value, self.standard_error)
        )
        return replace(self, value=value, standard_error=errors)

    def interval(self, layer: str, confidence: float = 0.95) -> tuple[float, float]:
        """An approximate confidence interval for ΣI of a layer.

        By Student's t on a logarithmic scale, since squares are skewed. How often intervals of 95 %
        held the sum, in 40 random networks of five families:

        * "signs": 93 to 97 % from 32 passes on, for the sum over any layer.
        * "importance": the same in most layers; in all, 75 % or more with 32 passes, 90 % with 64.
        * "labels": the same in most layers; but a label that no pass has drawn is missing from the
          sum and from its error. Where the network is sure, most intervals miss the sum; Section
          9.1 of the book has measured shares.

        Raises:
            KeyError: there is no such layer.
            ValueError: the confidence does not lie between 0 and 1.
        """
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1, got {confidence!r}.")
        total, error, _ = self.layers[layer]
        if error == 0:
            return total, total
        width = float(special.stdtrit(self.passes - 1, (1 + confidence) / 2)) * error / total
        if width > WIDEST:
            return 0.0, math.inf
        return total / math.exp(width), total * math.exp(width)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: "value/…" and "standard_error/…" of every parameter, float64.

        Its metadata hold the rest. The file is written whole, or not at all. Needs ``safetensors``.

        Raises:
            ImportError: safetensors is not installed.
            ValueError: the path cannot be written.
        """
        tensors = {f"value/{n}": t for n, t in self.value.items()}
        tensors |= {f"standard_error/{n}": t for n, t in self.standard_error.items()}
        plain = ("relative_error", "passes", "num_inputs", "estimator", "squares")
        told = {name: getattr(self, name) for name in plain}
        told |= {"layers": dict(self.layers), "origin": dict(self.origin)}
        told["parameters"] = list(self.value)
        _files.write(path, tensors, {"kind": "estimate", "estimate": json.dumps(told)})


def load(path: str | Path, model: nn.Module | None = None) -> Estimate:
    """An estimate that ``Estimate.save`` has written, on the model's device.

    Args:
        path: The file.
        model: The network that it belongs to; None checks nothing, and leaves it on the CPU.

    Returns:
        The estimate. ``fimlib.estimate`` with the same arguments gives the same numbers.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: there is no such file; it holds no estimate, or one of another version; or it
            does not fit the model: a parameter is missing, or has another shape.

    Warns:
        UserWarning: the model fits, but has other weights than those of the estimate.
    """
    tensors, metadata = _files.read(path)
    if metadata.get("kind") != "estimate":
        raise ValueError(
            f"{path} is a checkpoint: pass it to estimate(..., checkpoint={str(path)!r})."
        )
    told = json.loads(metadata["estimate"])
    names = told.pop("parameters")
    told["layers"] = {layer: LayerEstimate(*numbers) for layer, numbers in told["layers"].items()}
    value, errors = (
        {n: tensors[f"{kind}/{n}"] for n in names} for kind in ("value", "standard_error")
    )
    if model is not None:
        model = check_module(model)
        check_fits(path, value, model)
        if told["origin"].get("model", "") not in ("", _files.model_digest(model)):
            warn(
                f"{path}: the estimate was made at other weights or buffers of this model. That is "
                "right for a penalty around the old weights; else estimate it anew."
            )
        places = {n: p.device for n, p in model.named_parameters()}
        value, errors = ({n: t.to(places[n]) for n, t in D.items()} for D in (value, errors))
    return Estimate(value, errors, **told)


def check_fits(path: str | Path, value: PerParameter, model: nn.Module) -> None:
    """A ValueError unless the model has all these parameters."""
    shapes = {n: p.shape for n, p in model.named_parameters()}
    for name, t in value.items():
        if shapes.get(name) != t.shape:
            found = f"{list(shapes[name])} there" if name in shapes else "missing there"
            raise ValueError(
                f"{path} belongs to another model: parameter {name!r} is {list(t.shape)} in the "
                f"file, and {found}."
            )


def merged(one: Estimate, other: Estimate) -> Estimate:
    """The estimate for the inputs of both, whose random vectors are independent."""
    shapes = ({n: t.shape for n, t in e.value.items()} for e in (one, other))
    if next(shapes) != next(shapes):
        raise ValueError("estimates of different parameters cannot be merged.")
    for name in ("estimator", "squares"):
        if getattr(one, name) != getattr(other, name):
            raise ValueError(f"estimates with different {name}= cannot be merged.")
    for key in ("family", "model"):
        if one.origin.get(key) != other.origin.get(key):
            raise ValueError(f"estimates of a different {key} cannot be merged.")
    if "seed" in one.origin and one.origin["seed"] == other.origin.get("seed"):
        raise ValueError(
            "the estimates were made with the same random vectors, so their errors are not "
            "independent: give each process a seed= of its own, or call init_process_group first."
        )
    m = one.num_inputs + other.num_inputs
    a, b = one.num_inputs / m, other.num_inputs / m
    value = {n: a * t + b * other.value[n].to(t) for n, t in one.value.items()}
    errors = {
        n: torch.hypot(a * t, b * other.standard_error[n].to(t))
        for n, t in one.standard_error.items()
    }
    squared = squared_errors(value, errors)
    layers = {
        layer: LayerEstimate(
            a * mine.total + b * other.layers[layer].total,
            math.hypot(a * mine.standard_error, b * other.layers[layer].standard_error),
            relative(*squared[layer]),
        )
        for layer, mine in one.layers.items()
    }
    data = (int(e.origin.get("data", "0"), 16) for e in (one, other))
    origin = {**one.origin, "data": str(_files.DataDigest(sum(data)))}
    reached = relative(*map(sum, zip(*squared.values(), strict=True)))
    passes = min(one.passes, other.passes)
    return Estimate(value, errors, layers, reached, passes, m, one.estimator, one.squares, origin)


def squared_errors(value: PerParameter, errors: PerParameter) -> dict[str, tuple[float, float]]:
    """Layer → Σ SE² and Σ Î² over its parameters."""
    found: dict[str, tuple[float, float]] = {}
    for name, t in value.items():
        error, size = found.get(layer_of(name), (0.0, 0.0))
        variance = float(errors[name].square().sum())
        found[layer_of(name)] = error + variance, size + float(t.square().sum())
    return found


@dataclass
class Record:
    """Means and spreads over the passes, by Welford's formula.

    Attributes:
        mean: Of the passes' estimates, by parameter.
        scatter: Σ (estimate − mean)², by parameter.
        sums: For every pass, the sum of its estimate over every layer.
        num_inputs: m.
        is_whole: Whether every pass is in all numbers.
    """

    mean: PerParameter
    scatter: PerParameter
    sums: list[dict[str, Tensor]] = field(default_factory=list)
    num_inputs: int = 0
    is_whole: bool = True

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
        """Take in Σ_x of one pass; the total is used up. Ctrl-C waits until that is done."""
        self.is_whole = False
        with later(signal.SIGINT):
            self._add(total, num_inputs)
            self.is_whole = True

    def _add(self, total: PerParameter, num_inputs: int) -> None:
        sums: dict[str, Tensor] = {}
        for name, here in total.items():
            here /= num_inputs
            layer = layer_of(name)
            sums[layer] = sums.get(layer, 0) + here.sum().cpu()
            off = here - self.mean[name]
            self.mean[name] += off / (self.passes + 1)
            self.scatter[name] += off.mul_(here.sub_(self.mean[name]))
        self.sums.append(sums)
        self.num_inputs = num_inputs

    def errors(self) -> PerParameter:
        """The standard errors; infinite where the numbers are too small to be squared."""
        pairs = self.passes * (self.passes - 1)
        found = {}
        for n, t in self.scatter.items():
            is_lost = (self.mean[n] > 0) & (self.mean[n] < SMALLEST)
            found[n] = torch.where(is_lost, math.inf, (t / pairs).sqrt())
        return found

    def relative_error(self) -> float:
        """√(Σ SE² / Σ I²) over all parameters."""
        squared = squared_errors(self.mean, self.errors()).values()
        return relative(*map(sum, zip(*squared, strict=True)))

    def estimate(self, estimator: str, squares: str, origin: Mapping[str, str]) -> Estimate:
        """The result."""
        k, errors = self.passes, self.errors()
        layers = {}
        for layer, squared in squared_errors(self.mean, errors).items():
            sums = torch.stack([s[layer] for s in self.sums])
            is_lost = 0 < sums.mean() < SMALLEST
            spread = math.inf if is_lost else float(sums.std() / k**0.5)
            layers[layer] = LayerEstimate(float(sums.mean()), spread, relative(*squared))
        return Estimate(
            self.mean, errors, layers, self.relative_error(), k, self.num_inputs,
            estimator, squares, origin,
        )  # fmt: skip

    def save(self, path: Path, origin: Mapping[str, str], outputs: Tensor) -> None:
        """Write a checkpoint, with sums over the outputs of the network."""
        tensors = {f"mean/{n}": t for n, t in self.mean.items()}
        tensors |= {f"scatter/{n}": t for n, t in self.scatter.items()}
        tensors |= {
            f"sums/{layer}": torch.stack([s[layer] for s in self.sums]) for layer in self.sums[0]
        }
        tensors["outputs"] = outputs
        told = {"kind": "checkpoint", "num_inputs": str(self.num_inputs), **origin}
        _files.write(path, tensors, told)

    def resume(self, path: Path, origin: Mapping[str, str], outputs: Tensor) -> None:
        """Go on from a checkpoint."""
        tensors, metadata = _files.read(path)
        if metadata.get("kind") != "checkpoint":
            raise ValueError(f"{path} is an estimate, no checkpoint: give another path.")
        other = [key for key, value in origin.items() if metadata.get(key) != value]
        if not other and not torch.allclose(tensors["outputs"], outputs, rtol=1e-4, atol=0.0):
            other = ["forward pass"]
        if other:
            raise ValueError(
                f"{path} is the checkpoint of another estimate, with another {', '.join(other)}: "
                "give another path, or delete the file to start anew. Processes of a group need "
                "a file each, and inputs that are drawn anew in every pass can have none."
            )
        for kind, mine in (("mean", self.mean), ("scatter", self.scatter)):
            for name, t in mine.items():
                t.copy_(tensors[f"{kind}/{name}"])
        sums = {n.removeprefix("sums/"): t for n, t in tensors.items() if n.startswith("sums/")}
        rows = zip(*sums.values(), strict=True)
        self.sums = [dict(zip(sums, row, strict=True)) for row in rows]
        self.num_inputs = int(metadata["num_inputs"])


def layer_of(name: str) -> str:
    """The module that holds a parameter."""
    return name.rpartition(".")[0]


def relative(error: float, size: float) -> float:
    """√(error / I²), where ``size`` = Î² is too large by the error on average; 0/0 is 0."""
    if error == 0:
        return 0.0
    return math.sqrt(error / (size - error)) if size > error else math.inf
