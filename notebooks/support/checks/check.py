"""What a check is: a statement of the paper, tried on many cases."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RELATIVE = 1e-10  # rounding that an inequality is granted, relative to its larger side …
ABSOLUTE = 1e-15  # … and relative to what cancels on the way to it, e.g. ‖J‖⁴ for V₁
TOLERANCE = 1e-10  # for equalities, relative to the largest entry


class Check(NamedTuple):
    """The outcome of a check.

    Attributes:
        kind: "inequality", "equality", "sampling" or "finding".
        cases: How many cases were tried.
        violations: How many of them contradict the statement beyond rounding.
        worst: For an inequality the tightest ratio seen, smaller over larger side (1: attained).
            For an equality the largest relative error. For sampling the largest deviation in
            standard errors. For a finding the number that exhibits it.
    """

    kind: str
    cases: int
    violations: int
    worst: float

    @property
    def holds(self) -> bool:
        """Whether nothing contradicted the statement, and something was tried."""
        return self.violations == 0 and self.cases > 0


def at_most(small: Tensor, large: Tensor, scale: Tensor | float) -> Check:
    """Check small ≤ large, entry by entry.

    Args:
        small: The side that should be smaller.
        large: The other one, of the same shape.
        scale: Size of the terms that cancel on the way to both sides; 0 where nothing does.
    """
    rounding = ABSOLUTE * torch.as_tensor(scale, dtype=torch.float64)
    false = ~(small <= large + RELATIVE * large.abs() + rounding)
    clear = large > 1e7 * rounding + 1e-300  # elsewhere the ratio is one of rounding errors
    ratios = (small / large)[clear.expand_as(large)]
    tightest = float(ratios.max()) if len(ratios) else 0.0
    return Check("inequality", small.numel(), int(false.sum()), tightest)


def equal(ours: Tensor, expected: Tensor, scale: Tensor | float | None = None) -> Check:
    """Check ours = expected up to ``TOLERANCE``, relative to the largest entry (or a scale)."""
    size = expected.abs().max() if scale is None else torch.as_tensor(scale)
    error = (ours - expected).abs() / (size + 1e-300)
    return Check("equality", ours.numel(), int((~(error <= TOLERANCE)).sum()), float(error.max()))


def within(mean: Tensor, expected: Tensor, standard_error: Tensor, repeats: int) -> Check:
    """Check a mean over repeats within 5 standard errors."""
    z = (mean - expected).abs() / (standard_error + 1e-300)
    return Check("sampling", repeats * mean.numel(), int((~(z <= 5)).sum()), float(z.max()))


def finding(shown: bool, number: float, cases: int = 1) -> Check:
    """A case that exhibits what a statement does not say; ``shown`` must be true."""
    return Check("finding", cases, 0 if shown else cases, float(number))


def together(*checks: Check) -> Check:
    """Several checks of one statement as one."""
    kinds = {check.kind for check in checks}
    if len(kinds) != 1:
        raise ValueError(f"checks of different kinds do not add up: {sorted(kinds)}")
    return Check(
        kinds.pop(),
        sum(check.cases for check in checks),
        sum(check.violations for check in checks),
        max(check.worst for check in checks),
    )
