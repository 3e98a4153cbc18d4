"""A lower and an upper bound, and bounds of the three quantities that the paper bounds."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

X = TypeVar("X")


class Interval(NamedTuple, Generic[X]):
    """A lower and an upper bound of one quantity."""

    lower: X
    upper: X


class Bounds(NamedTuple, Generic[X]):
    """Bounds of I, of V₁ and of V₂, or their values."""

    fisher: X
    variance_i1: X
    variance_i2: X
