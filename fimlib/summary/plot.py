"""A ``Summary`` drawn: the errors of both estimators against the number of labels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fimlib.summary.findings import Findings, LayerSummary
from fimlib.summary.text import title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from numpy.typing import NDArray

# Okabe and Ito's colours: Fisher information, Î₁, Î₂.
GREEN, BLUE, VERMILION, GREY = "#009E73", "#0072B2", "#D55E00", "#666666"
INK = {1: BLUE, 2: "#B75100"}  # of letters, which need more contrast to white than lines
COLUMNS = 4  # panels in a row, at most
FISHER, WANTED = "Fisher information I", "error asked for"
ABOVE, BOUND, NEEDED = "one standard error above", "upper bound", "labels needed"
# What the legend explains, for both estimators at once. Their own lines have names beside them.
LEGEND: dict[str, dict[str, Any]] = {
    FISHER: {"color": GREEN, "linewidth": 4, "alpha": 0.75},
    WANTED: {"color": GREY, "linestyle": ":"},
    BOUND: {"color": GREY, "linestyle": "--", "linewidth": 1},
    NEEDED: {"color": GREY, "marker": "o", "linestyle": ""},
    ABOVE: {"color": VERMILION, "linestyle": ":"},
}
# The size of words in a panel, in units of its own.
HAT, NOTE, GAP = np.array([0.06, 0.09]), np.array([0.3, 0.1]), 0.015


def draw(s: Findings) -> Figure:
    """``Summary.plot``."""
    try:
        from matplotlib import pyplot as plt
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ImportError(
            "plot() draws with matplotlib, which is not installed: pip install matplotlib."
        ) from error
    rows = -(-len(s.layers) // COLUMNS)
    columns = -(-len(s.layers) // rows)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.6 * columns + 0.8, 2.9 * rows + 0.9), sharex=True,
        sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for ax, layer in itertools.zip_longest(axes.flat, s.layers):
        if layer is None:
            ax.set_axis_off()
        else:
            panel(ax, layer, s)
    low, high = axes.flat[0].get_ylim()
    axes.flat[0].set_ylim(low * (low / high) ** 0.08, high)  # names may stand below the lowest line
    for ax, layer in zip(axes.flat, s.layers, strict=False):
        write_names(ax, layer)  # once all have their limits
    for ax in axes.flat[max(0, len(s.layers) - columns) : len(s.layers)]:
        ax.set_xlabel("labels" if s.num_inputs == 1 else "labels per input")
        ax.tick_params(labelbottom=True)
    figure.supylabel("error in units of I", fontsize="medium")
    drawn = {str(line.get_label()).partition(" of $")[0] for ax in axes.flat for line in ax.lines}
    entries = [Line2D([], [], label=k, **style) for k, style in LEGEND.items() if k in drawn]
    figure.legend(
        handles=entries, loc="outside lower center", ncols=min(3, columns), frameon=False,
        fontsize="small",
    )  # fmt: skip
    return figure


def panel(ax: Axes, layer: LayerSummary, s: Findings) -> None:
    """The lines of one layer."""
    counts = [n for x in s.layers for n in (x.labels_needed_i1, x.labels_needed_i2)]
    last = max([10.0, *(n for n in counts if n is not None and math.isfinite(n))])
    span = (1.0, 10.0 ** math.ceil(math.log10(last)))

    def falling(at_n: float) -> list[float]:
        return [at_n * (s.num_samples / n) ** 0.5 for n in span]

    ax.axhline(1, label=FISHER, **LEGEND[FISHER])
    ax.axhline(s.relative_error, label=WANTED, **LEGEND[WANTED])
    if layer.relative_sd_i2 is not None and layer.relative_sd_i2_error:
        above = falling(layer.relative_sd_i2 + layer.relative_sd_i2_error)
        ax.plot(span, above, label=ABOVE, **LEGEND[ABOVE])
    for j, sd, needed, color, bound in (
        (1, layer.relative_sd_i1, layer.labels_needed_i1, BLUE, layer.bound_i1),
        (2, layer.relative_sd_i2, layer.labels_needed_i2, VERMILION, layer.bound_i2),
    ):
        if sd is None or needed is None or sd == 0 or math.isinf(sd):
            continue
        ax.plot(span, falling(sd), color=color, label=hat(j))
        if bound is not None and math.isfinite(bound):
            style = LEGEND[BOUND] | {"color": color}
            ax.plot(span, falling(bound), label=f"{BOUND} of {hat(j)}", **style)
        if math.isfinite(needed):
            error = sd * (s.num_samples / needed) ** 0.5
            ax.plot(needed, error, "o", color=color, label=f"{NEEDED} of {hat(j)}")
    around = span[1] ** -0.05, span[1] ** 1.15  # on the right there is room for names
    ax.set(xscale="log", yscale="log", title=title(layer.layer), xlim=around)


def hat(j: int) -> str:
    """An estimator's name, as it stands beside its line."""
    return rf"$\hat I_{j}$"


def write_names(ax: Axes, layer: LayerSummary) -> None:
    """Each estimator where its line ends, in its colour; or in a corner that it has no variance."""
    lines = {str(line.get_label()): points(ax, line) for line in ax.lines}
    words: list[NDArray[np.float64]] = []
    for j in (1, 2) if layer.relative_sd_i2 is not None else (1,):
        own = lines.get(hat(j))
        taken = [*(at for name, at in lines.items() if name != hat(j)), *words]
        places: Iterable[NDArray[np.float64]]
        if own is None:
            text, size, places = note(layer, j), NOTE, corners()
        else:
            highest = max(lines[hat(k)][-1, 1] for k in (1, 2) if hat(k) in lines)
            places = beside(own[-1], is_upper=own[-1, 1] >= highest)
            text, size = hat(j), HAT
        at = freest(places, size, taken)
        where: Any = {"transform": ax.transAxes, "ha": "center", "va": "center"}
        ax.text(at[0], at[1], text, color=INK[j], **where)
        words.append(at + size * np.mgrid[-0.5:0.6:0.5, -0.5:0.6:0.5].reshape(2, -1).T)


def note(layer: LayerSummary, j: int) -> str:
    """What is said of an estimator without a line, whose error is none or infinite."""
    if ((layer.relative_sd_i1, layer.relative_sd_i2)[j - 1] or 0.0) > 0:
        return rf"$V_{j} > I = 0$"
    return rf"$V_{j} \approx 0$" if j == 2 and layer.relative_sd_i2_error else rf"$V_{j} = 0$"


def points(ax: Axes, line: Line2D) -> NDArray[np.float64]:
    """A line's course, [n, 2], from 0 to 1 across the panel and up."""
    ends = ax.transAxes.inverted().transform(line.get_transform().transform(line.get_xydata()))
    share = np.linspace(0, 1, 201)[:, None]
    course: NDArray[np.float64] = ends[0] * (1 - share) + ends[-1] * share
    return course


def beside(end: NDArray[np.float64], *, is_upper: bool) -> Iterable[NDArray[np.float64]]:
    """Places for a name to the right of its line's end, the nearest ones first."""
    x = end[0] + HAT[0] / 2 + GAP
    for step in range(60):
        for side in (1, -1) if is_upper else (-1, 1):
            y = end[1] + side * step / 200
            if HAT[1] / 2 < y < 1 - HAT[1] / 2:
                yield np.array([x, y])


def corners() -> Sequence[NDArray[np.float64]]:
    """Places for a note, those near the axes first."""
    return [np.array([x, y]) for y in (0.08, 0.92) for x in (0.18, 0.82)]


def freest(
    places: Iterable[NDArray[np.float64]],
    size: NDArray[np.float64],
    taken: Sequence[NDArray[np.float64]],
) -> NDArray[np.float64]:
    """The first place where a word of this size meets nothing, or where it has most room."""
    others = np.concatenate(taken)
    best, most = np.array([0.5, 0.5]), -1.0
    for place in places:
        room = float((np.abs(others - place) / (size / 2)).max(1).min())
        if room >= 1:
            return place
        if room > most:
            best, most = place, room
    return best
