"""The targets, set before the measurements, and how to read them off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Found = Mapping[str, Any]


def ratio(found: Found, candidate: str, network: str, batch: int) -> float | None:
    """Cost in units on one CPU thread; None where it was not measured, or its values are others."""
    wanted = {"candidate": candidate, "network": network, "batch": batch, "device": "cpu"}
    for row in found["peers"]:
        if row.items() >= wanted.items():
            is_good = row["status"] == "measured" and row.get("agrees", True)
            return float(row["times"]["1"]["ratio"]) if is_good else None
    return None


def quotient(
    found: Found, above: str, below: str, network: str, batch: int | None = None
) -> tuple[float, int] | None:
    """One candidate's cost over another's, and at which batch; by default the largest of both."""
    batches = sorted({r["batch"] for r in found["peers"] if r["network"] == network}, reverse=True)
    for b in batches if batch is None else [batch]:
        one, other = ratio(found, above, network, b), ratio(found, below, network, b)
        if one and other:
            return one / other, b
    return None


@dataclass(frozen=True)
class Target:
    """What is to be reached."""

    text: str  # the cost, in words
    bound: float  # how much at most, or at least
    at_most: bool  # which of the two
    # Reads it off; None where it was not measured. With the batch, if that varies.
    value: Callable[[Found], float | tuple[float, int] | None]
    limit: str  # what stands in the way, told where it is missed


def large(found: Found, network: str) -> int:
    """The batch of the targets: the largest at which our I was measured."""
    rows = [r for r in found["peers"] if (r["candidate"], r["network"]) == ("ours-fisher", network)]
    return max((int(r["batch"]) for r in rows if r["status"] == "measured"), default=0)


def in_units(
    candidate: str, network: str, batch: int | None = None
) -> Callable[[Found], tuple[float, int] | None]:
    """A cost in units, at the batch of the targets or another one."""

    def value(found: Found) -> tuple[float, int] | None:
        b = batch or large(found, network)
        cost = ratio(found, candidate, network, b)
        return None if cost is None else (cost, b)

    return value


def over_the_loop(network: str) -> Callable[[Found], tuple[float, int] | None]:
    """Our I in the time of the loop over the outputs."""
    return lambda found: quotient(found, "ours-fisher", "loop", network)


CHECK = "Each call checks the first inputs of the batch against difference quotients in float64."
ELEMENTWISE = (
    "Contractions take work over classes × units × inputs, for variances in float64. " + CHECK
)
GRADIENTS = "The weights' gradients at single inputs must be formed, for every output. " + CHECK
CALLS = "At one input the time is that of some hundred small operations. " + CHECK
TARGETS = (
    Target("MLP: I, in training steps", 2.0, True, in_units("ours-fisher", "mlp"), ELEMENTWISE),
    Target("MLP: I, Varₓ I, V₁", 3.3, True, in_units("ours-first", "mlp"), ELEMENTWISE),
    Target("MLP: I, Varₓ I, V₁, V₂", 5.5, True, in_units("ours-all", "mlp"), ELEMENTWISE),
    Target("LeNet: I", 6.0, True, in_units("ours-fisher", "lenet"), GRADIENTS),
    Target("Vision transformer: I", 10.0, True, in_units("ours-fisher", "vit", 32), GRADIENTS),
    Target("GPT: one of 32 passes", 1.3, True, in_units("ours-estimate", "gpt", 8), CHECK),
    Target("ResNet-18: I, over the loop", 0.8, True, over_the_loop("resnet"), GRADIENTS),
    Target("4,096 outputs: I, over the loop", 1.0, True, over_the_loop("decoder"), GRADIENTS),
    *(
        Target(
            f"{name}, one input: V₂ and all else, times faster than BackPACK's way",
            10,
            False,
            lambda f, network=network: quotient(f, "backpack-all", "ours-all", network, 1),  # type: ignore[misc]
            CALLS,
        )
        for network, name in (("mlp", "MLP"), ("wide", "Wide MLP"), ("lenet", "LeNet"))
    ),
)


def verdict(target: Target, found: Found) -> tuple[str, str, bool]:
    """What was measured, in words; the verdict; and whether the target is missed."""
    value, batch = target.value(found), None
    if isinstance(value, tuple):
        value, batch = value
    if value is None:
        return "not measured", "open", False
    reached = value <= target.bound if target.at_most else value >= target.bound
    text = f"{value:.3g}" + ("" if batch is None else f" (B = {batch:,})")
    return text, "reached" if reached else "**missed**", not reached
