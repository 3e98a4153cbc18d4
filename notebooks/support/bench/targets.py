"""The targets that were set before anything was measured, and how to read them off."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from support.bench.measure import Row

Found = Mapping[str, Any]


def row_of(rows: Sequence[Row], candidate: str, network: str, batch: int) -> Row | None:
    """A candidate's row on the CPU."""
    wanted = (candidate, network, batch, "cpu")
    keys = ("candidate", "network", "batch", "device")
    return next((row for row in rows if tuple(row[k] for k in keys) == wanted), None)


def ratio(found: Found, candidate: str, network: str, batch: int) -> float | None:
    """Cost in units on one thread; None where it was not measured, or its values are others."""
    row = row_of(found["peers"], candidate, network, batch)
    if row is None or row["status"] != "measured" or not row.get("agrees", True):
        return None
    return float(row["times"]["1"]["ratio"])


def quotient(
    found: Found, above: str, below: str, network: str, batch: int | None = None
) -> tuple[float, int] | None:
    """One candidate's cost over another's, and at which batch; by default the largest of both."""
    batches = sorted({row["batch"] for row in found["peers"]}, reverse=True)
    for b in batches if batch is None else [batch]:
        one, other = ratio(found, above, network, b), ratio(found, below, network, b)
        if one and other:
            return one / other, b
    return None


@dataclass(frozen=True)
class Target:
    """What was to be reached, before anything was measured.

    Attributes:
        text: The cost, in words.
        bound: How much at most, or at least.
        at_most: Which of the two.
        value: Reads it off; None where it was not measured. With the batch, if that varies.
        limit: What stands in the way, told where it is missed.
    """

    text: str
    bound: float
    at_most: bool
    value: Callable[[Found], float | tuple[float, int] | None]
    limit: str


def in_units(candidate: str) -> Callable[[Found], float | None]:
    """A cost in units, for the MLP and a thousand inputs."""
    return lambda found: ratio(found, candidate, "mlp", large(found))


def large(found: Found) -> int:
    """The batch of the targets: the second that was measured, after the single input."""
    batches = {int(row["batch"]) for row in found["peers"] if row["network"] == "mlp"}
    return sorted(batches)[:2][-1]


PRODUCTS = (
    "The column *products* of the table has what its matrix products alone come to; the rest is "
    "elementwise work over classes × hidden units × inputs, which the unit does not have."
)
TARGETS = (
    Target("MLP: exact diagonal I, in units", 2.0, True, in_units("ours-fisher"), PRODUCTS),
    Target("MLP: I, Varₓ I and V₁, in units", 3.5, True, in_units("ours-first"), PRODUCTS),
    Target("MLP: I, Varₓ I, V₁ and V₂, in units", 5.5, True, in_units("ours-all"), PRODUCTS),
    *(
        Target(
            f"MLP: {name} from 5,000 labels, over the cost from one",
            1.2,
            True,
            lambda f, j=j: quotient(f, f"ours-i{j}-5000", f"ours-i{j}-1", "mlp", large(f)),  # type: ignore[misc]
            "Labels enter by their class counts only, but drawing counts takes one binomial per "
            "class, which is slower for many labels than for one.",
        )
        for j, name in ((1, "Î₁"), (2, "Î₂"))
    ),
    Target(
        "MLP, a single input: everything, times faster than BackPACK's way",
        10,
        False,
        lambda found: quotient(found, "backpack-all", "ours-all", "mlp", 1),
        "At one input it is the calls of some hundred small operations that take the time, and "
        "the looks at the model that come before a first batch.",
    ),
    Target(
        "LeNet: exact diagonal I, times faster than BackPACK's DiagGGNExact",
        1.5,
        False,
        lambda found: quotient(found, "backpack-fisher", "ours-fisher", "lenet", large(found)),
        "The gradients of a convolution's weights at single inputs must be formed by either.",
    ),
    Target(
        "LeNet: V₂ with everything else, times faster than BackPACK's passes for V₂",
        10,
        False,
        lambda found: quotient(found, "backpack-all", "ours-all", "lenet"),
        "Either carries a row for every unit with curvature back through the convolutions.",
    ),
    Target(
        "LeNet: the same, times faster than a single pass of BackPACK's BatchDiagHessian",
        10,
        False,
        lambda found: quotient(found, "backpack-hessian", "ours-all", "lenet"),
        "A single pass treats one output, or one loss; V₂ needs all outputs.",
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
