"""Do the bounds hold? Counts over every parameter and input, and what counts as saying nothing."""

from __future__ import annotations

from fimlib import Diagonal, Interval
from support import layers

VACUOUS = 1000  # an upper bound above so many times the value says next to nothing


def counts(value: Diagonal, interval: Interval[Diagonal]) -> dict[str, dict[str, float]]:
    """At how many parameters and inputs of each layer something is the case.

    Returns:
        Kind → layer number → count. The kinds:

        * ``violations``: the value is beyond a bound by more than `layers.ROUNDING` of it;
        * ``vacuous``: the upper bound exceeds `VACUOUS` times the value, which may be 0;
        * ``zero``: value and upper bound are both exactly 0, so that there is nothing to bound;
        * ``lower_positive``: the lower bound is above 0, and so says more than every variance does.
    """
    upper, lower = interval.upper, interval.lower
    vacuous = {p: (upper[p] > VACUOUS * v).sum() for p, v in value.items()}
    zero = {p: ((upper[p] == 0) & (v == 0)).sum() for p, v in value.items()}
    positive = {p: (lower[p] > 0).sum() for p in value}
    return {
        "violations": layers.violations(value, interval),
        "vacuous": layers.sums(vacuous),
        "zero": layers.sums(zero),
        "lower_positive": layers.sums(positive),
    }
