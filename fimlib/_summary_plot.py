"""A ``Summary`` drawn: the errors of both estimators against the number of labels."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from fimlib._summary_text import title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fimlib.summary import LayerSummary, Summary

# Okabe and Ito's colours: Fisher information, Î₁, Î₂.
GREEN, BLUE, VERMILION, GREY = "#009E73", "#0072B2", "#D55E00", "#666666"
COLUMNS = 4  # panels in a row, at most


def draw(s: Summary) -> Figure:
    """``Summary.plot``."""
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError(
            "plot() draws with matplotlib, which is not installed: pip install "
            "'fimlib[plot]', or pip install matplotlib."
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
    for ax in axes.flat[max(0, len(s.layers) - columns) : len(s.layers)]:
        ax.set_xlabel("labels" if s.num_inputs == 1 else "labels per input")
        ax.tick_params(labelbottom=True)
    figure.supylabel("error in units of I", fontsize="medium")
    entries = {  # not every panel has every line
        text: line
        for ax in axes.flat
        for line, text in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=3, frameon=False)
    return figure


def panel(ax: Axes, layer: LayerSummary, s: Summary) -> None:
    """One panel of ``Summary.plot``."""
    counts = [n for x in s.layers for n in (x.labels_needed_i1, x.labels_needed_i2)]
    last = max([10.0, *filter(math.isfinite, counts)])
    span = (1.0, 10.0 ** math.ceil(math.log10(last)))

    def falling(at_n: float) -> list[float]:
        return [at_n * (s.num_samples / n) ** 0.5 for n in span]

    ax.axhline(1, color=GREEN, linewidth=4, alpha=0.75, label="Fisher information I")
    ax.axhline(s.relative_error, color=GREY, linestyle=":", label="error asked for")
    doubt = layer.relative_sd_i2_error
    if doubt:
        above = falling(layer.relative_sd_i2 + doubt)
        ax.plot(span, above, color=VERMILION, linestyle=":", label="one standard error above")
    for j, sd, needed, color, bound in (
        (1, layer.relative_sd_i1, layer.labels_needed_i1, BLUE, layer.bound_i1),
        (2, layer.relative_sd_i2, layer.labels_needed_i2, VERMILION, layer.bound_i2),
    ):
        if sd == 0:
            sign = r"\approx" if j == 2 and doubt else "="
            text = rf"$V_{j} {sign} 0$"
            ax.text(0.04, 0.04, text, color=color, transform=ax.transAxes)
            continue
        ax.plot(span, falling(sd), color=color, label=rf"$\sqrt{{V_{j}}}$, error of $\hat I_{j}$")
        if bound is not None:
            text = rf"bound of $\sqrt{{V_{j}}}$"
            ax.plot(span, falling(bound), color=color, linestyle="--", linewidth=1, label=text)
        if math.isfinite(needed):
            error = sd * (s.num_samples / needed) ** 0.5
            ax.plot(needed, error, "o", color=color, label=rf"safe number for $\hat I_{j}$")
    ax.set(xscale="log", yscale="log", title=title(layer.layer))
