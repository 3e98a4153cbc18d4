"""A ``Summary`` in words: what was looked at, a table, and what follows."""

from __future__ import annotations

import math
import textwrap
from typing import NamedTuple

from fimlib._tables import aligned
from fimlib.precision import largest_quantile
from fimlib.summary.findings import Findings, LayerSummary

MOST_NAMED = 4  # layers in a sentence
WIDTH = 76  # of a line, which is what a page of the book shows
ESTIMATORS = {1: "Î₁", 2: "Î₂"}


def text(s: Findings) -> str:
    """All of it."""
    sentences = (line for one in advice(s) for line in textwrap.wrap(one, WIDTH))
    return "\n".join([*head(s), "", *table(s), "", *sentences])


def head(s: Findings) -> list[str]:
    """What was looked at, and what the columns mean."""
    one = s.num_inputs == 1
    inputs = (
        f"the first {some_inputs(s.num_inputs)} (budget=)"
        if s.is_cut
        else some_inputs(s.num_inputs)
    )
    columns = ["Î₁", *(["Î₂"] if s.has_i2 else [])]
    columns += ["imp. (classes drawn by importance)"] if has_classes(s) else []
    return [
        f"{inputs}, {type(s.joint.family).__name__} outputs; {origin(s)}",
        f"error   typical ‖Î − I‖ / ‖I‖ in a layer, from {some_labels(s)} for "
        f"{'it' if one else 'each input'}",
        f"labels  {'needed' if one else 'per input'} to keep that below "
        f"{percent(s.relative_error)} at {percent(s.confidence)} confidence",
        f"of      {', '.join([*columns, 'sign (random signs)'])}",
    ]


def has_classes(s: Findings) -> bool:
    """Whether there is a column for classes drawn by importance."""
    return s.layers[0].relative_sd_importance is not None


def origin(s: Findings) -> str:
    """Where the derivatives come from, and what of them is exact."""
    if s.num_estimated:
        return (
            f"I, V₁ exact (engine {s.engine!r}),\nV₂ estimated from {s.num_probes} probes at "
            f"{some_inputs(s.num_estimated)}, ± one standard error."
        )
    return f"all exact (engine {s.engine!r})."


def table(s: Findings) -> list[str]:
    """The rows, aligned, under two lines of titles."""
    names = ["Î₁", *["Î₂"] * s.has_i2, *["imp."] * has_classes(s), "sign"]
    kinds = [word for kind in ("error", "labels") for word in (kind, *[""] * (len(names) - 1))]
    rows = [
        ["", "", "", *kinds, *[""] * s.has_i2],
        ["layer", "params", "mean I", *names * 2, *["better"] * s.has_i2],
        *(row(layer, s) for layer in s.layers),
    ]
    return aligned(rows, titles=2)


def row(x: LayerSummary, s: Findings) -> list[str]:
    """The cells of one layer."""
    errors = [x.relative_sd_i1, x.relative_sd_i2, x.relative_sd_importance, x.relative_sd_signs]
    counts = [x.labels_needed_i1, x.labels_needed_i2, x.labels_needed_importance]
    cells = [percent(e) for e in errors if e is not None]
    if x.relative_sd_i2_error:
        cells[1] += f" ± {percent(x.relative_sd_i2_error)}"
    better = "?" if x.better is None else ESTIMATORS[x.better]
    return [
        title(x.layer),
        f"{x.num_parameters:,}",
        f"{x.mean_fisher:.1e}",
        *cells,
        *(number(n) for n in [*counts, x.labels_needed_signs] if n is not None),
        *[better] * s.has_i2,
    ]


class Choice(NamedTuple):
    """What the better estimator of a layer comes to; Î₁ where that is not known."""

    error: float
    labels: float
    inputs: float | None


def choice(x: LayerSummary) -> Choice:
    """The choice that the sentences below the table make."""
    if x.better == 2 and x.relative_sd_i2 is not None and x.labels_needed_i2 is not None:
        error = x.relative_sd_i2 + x.relative_sd_i2_error
        return Choice(error, x.labels_needed_i2, x.inputs_needed_i2)
    return Choice(x.relative_sd_i1, x.labels_needed_i1, x.inputs_needed_i1)


def advice(s: Findings) -> list[str]:
    """What follows, in plain sentences."""
    errors, labels, inputs = zip(*map(choice, s.layers), strict=True)
    low, high = percent(min(errors)), percent(max(errors))
    counts_doubt = any(x.better == 2 and x.relative_sd_i2_error for x in s.layers)
    doubt = " (counting one standard error)" if counts_doubt else ""
    span = low if low == high else f"{low} to {high}"
    lines = which(s) if s.has_i2 else [LEFT_OUT]
    lines.append(f"The error {'is then' if s.has_i2 else 'of Î₁ is'} {span} of I{doubt}.")
    where = "in every layer" if len(s.layers) > 1 else "there"
    if math.isinf(max(labels)):
        lines.append(
            "Where I is 0 and an estimate of it is not, no number of labels is enough. Where I is "
            "too small to be squared, the number is not known."
        )
    elif max(labels) <= s.num_samples:
        lines.append(f"That is good enough {where}: no more labels are needed.")
    else:
        each = "" if s.num_inputs == 1 else " per input"
        enough = f"{max(labels):,.0f} labels{each} are enough {where}"
        lines.append(f"{enough}{caution(max(labels), s)}.")
    known = [n for n in inputs if n is not None]
    if known and math.isfinite(max(known)):
        lines.append(
            f"If inputs are drawn at random, {max(known):,.0f} are enough, "
            f"with {some_labels(s)} each."
        )
    return [*lines, cheapest(s)]


def caution(labels: float, s: Findings) -> str:
    """The assumption behind the number of labels, or the number under a stronger one."""
    if s.rule == "approximate":
        return " if errors are nearly normal; rule='chebyshev' assumes nothing"
    fewer = math.ceil(labels * (1 - s.confidence) * largest_quantile(s.confidence))
    return f"; about {fewer:,} if errors are nearly normal (rule='approximate')"


LEFT_OUT = (
    "Î₂ is left out: its variance needs second derivatives, which this network does not give at a "
    "bearable cost. num_probes=128 estimates it."
)
HOW = {
    "I itself": "joint.fisher_information() of this summary",
    "Î₁": "estimate, estimator='labels', squares='input'",
    "important classes": "estimate, estimator='importance', squares='input'",
    "random signs": "estimate, squares='input'",
}


def cheapest(s: Findings) -> str:
    """The least work that keeps the error in every layer."""
    passes = {"I itself": float(s.num_outputs)}
    passes["Î₁"] = max(x.labels_needed_i1 for x in s.layers)
    if has_classes(s):
        passes["important classes"] = max(x.labels_needed_importance or 1.0 for x in s.layers)
    passes["random signs"] = max(x.labels_needed_signs for x in s.layers)
    first, *others = sorted(passes, key=lambda name: passes[name])
    rest = ", ".join(f"{name} {number(passes[name])}" for name in others)
    return (
        f"The cheapest in backward passes is {first} ({HOW[first]}): {number(passes[first])}; "
        f"{rest}."
    )


def which(s: Findings) -> list[str]:
    """Which estimator for which layer."""
    chosen = {j: [x for x in s.layers if x.better == j] for j in (1, 2, None)}
    takes = [f"{ESTIMATORS[j]} for {these(chosen[j], s)}" for j in (1, 2) if chosen[j]]
    lines = [f"Take {'; '.join(takes)}."] if takes else []
    if chosen[None]:
        lines.append(
            f"V₂ is too uncertain to choose for {these(chosen[None], s)}: Î₁ is counted on there; "
            "more probes (num_probes=) tell more."
        )
    return lines


def these(layers: list[LayerSummary], s: Findings) -> str:
    """Some of the layers by name."""
    if len(layers) == len(s.layers) > 1:
        return "all layers"
    if len(layers) > MOST_NAMED:
        return f"{len(layers)} of {len(s.layers)} layers (see the table)"
    names = ", ".join(title(layer.layer) for layer in layers)
    return f"layer{'s' * (len(layers) > 1)} {names}"


def title(layer: str) -> str:
    """A layer's name; that of the network itself is empty."""
    return layer or "(itself)"


def some_inputs(count: int) -> str:
    """So many inputs."""
    return f"{count:,} input{'s' * (count != 1)}"


def some_labels(s: Findings) -> str:
    """The labels of each input."""
    return f"{s.num_samples:,} label{'s' * (s.num_samples != 1)}"


def percent(share: float) -> str:
    """A share in percent, with two digits.

    >>> [percent(x) for x in (0.0, 0.00123, 0.0456, 0.0999, 0.123, 7.89, 1234.0, math.inf)]
    ['0 %', '0.12 %', '4.6 %', '10 %', '12 %', '790 %', '120,000 %', 'inf']
    """
    if share == 0 or not math.isfinite(share):
        return "0 %" if share == 0 else "inf"
    value = float(f"{100 * share:.2g}")
    if value < 1e-3:
        return f"{value:.0e} %"
    return f"{value:,.{max(0, 1 - math.floor(math.log10(value)))}f} %"


def number(count: float) -> str:
    """A number of labels or inputs."""
    return "inf" if math.isinf(count) else f"{count:,.0f}"
