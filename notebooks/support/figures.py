"""The figures, drawn from a run's table of values; nothing is computed here.

Colours are those of Okabe and Ito, which stay apart for colour-blind readers: Î₁ is blue and Î₂
vermilion throughout, the Fisher information green, as in the paper; no other thing has these
three. `compact` makes the white grounds transparent, so that the book's dark theme can turn a
picture inside out (``book/_static/figures.css``).
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from IPython import display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from support import results
from support.direct_labels import label_lines
from support.results import NETWORK

mpl.rcdefaults()  # whatever a matplotlibrc of the user says
GREEN, BLUE, SKY, VERMILION = "#009E73", "#0072B2", "#56B4E9", "#D55E00"
GREY, BLACK, ORANGE, PURPLE = "#666666", "#000000", "#E69F00", "#CC79A7"
SVG = "image/svg+xml"
INDEX = ["layer", "epoch"]
COLORS = [BLACK, ORANGE, SKY, PURPLE, GREY]
DASHES: Any = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2))]
STYLE: Any = {
    "svg.hashsalt": "fimlib",  # the same figure gives the same file
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


@contextmanager
def panels(
    lines: int, columns: int, size: tuple[float, float], **more: Any
) -> Iterator[tuple[Figure, Any]]:
    """A figure with a grid of axes, to be drawn in our `STYLE`; ``size`` is in inches."""
    with mpl.rc_context(STYLE):
        yield plt.subplots(
            lines, columns, figsize=size, squeeze=False, layout="constrained", **more
        )


def figure_1(values: pd.DataFrame, record: Mapping[str, Any], warn: str = "") -> Figure:
    """Figure 1: one column per layer; variances and bounds above, log(UB/V) below.

    ``warn`` is written on top; if it is empty, what the record itself asks for.
    """
    wide = by_layer(values, INDEX)
    layers = list(wide.index.get_level_values("layer").unique())
    size = (1.2 * len(layers) + 4, 6.2)
    shared: Any = {"sharex": True, "sharey": "row", "height_ratios": [3, 2]}
    with panels(2, len(layers), size, **shared) as (figure, axes):
        for k, layer in enumerate(layers):
            data, last = wide.loc[layer], layer == layers[-1]
            at_one = record["parameters"]["num_samples"] if last else 1
            draw_variances(axes[0, k], data, at_one=at_one)
            draw_ratios(axes[1, k], data)
            axes[0, k].margins(y=0.12)  # room for labels
            axes[0, k].set_title(f"layer {layer}" + (" (output)" if last else ""))
            axes[1, k].set_xlabel("epoch")
            axes[1, k].xaxis.get_major_locator().set_params(integer=True)
        axes[0, 0].set_ylabel("mean over the layer's\nparameters  [nat/θ²]")
        axes[1, 0].set_ylabel("log(UB / V)")
        if warn or warning(record):
            figure.suptitle(warn or warning(record), color="#B00020", weight="bold")
        label_lines(figure)
    return figure


def draw_variances(ax: Axes, data: pd.DataFrame, *, at_one: int) -> None:
    """Fisher information, standard deviations and their upper bounds, on a log scale.

    ``at_one`` is N, where √V₁ is to be shown for a single label, too; else 1.
    """
    ax.set_yscale("log")
    ax.plot(data.I, color=GREEN, linewidth=4, alpha=0.75, label="Fisher information I")
    ax.plot(np.sqrt(data.V1), color=BLUE, label=r"$\sqrt{V_1}$")
    ax.plot(np.sqrt(data.V1_upper), color=BLUE, linestyle="--", label=r"bound of $\sqrt{V_1}$")
    ax.plot(
        np.sqrt(data.V1_certified), color=BLACK, linestyle=":", linewidth=1.2, zorder=3,
        label="certified bound",
    )  # fmt: skip
    if at_one > 1:
        ax.plot(
            np.sqrt(data.V1 * at_one), color=BLUE, linestyle="-.", linewidth=1,
            label=r"$\sqrt{V_1}$ at N = 1",
        )  # fmt: skip
    if vanishes(data.V2):
        place: Any = {"transform": ax.transAxes, "ha": "right", "va": "bottom"}
        ax.text(0.97, 0.03, r"$V_2 = 0$", color=VERMILION, **place)
        return
    ax.plot(np.sqrt(data.V2), color=VERMILION, label=r"$\sqrt{V_2}$")
    ax.plot(np.sqrt(data.V2_upper), color=VERMILION, linestyle="--", label=r"bound of $\sqrt{V_2}$")


def draw_ratios(ax: Axes, data: pd.DataFrame) -> None:
    """How loose the upper bounds are: log of the ratio of the layer's means."""
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.plot(log_ratio(data.V1_upper, data.V1), color=BLUE, marker=".", label=r"log(UB/$V_1$)")
    if not vanishes(data.V2):
        ratio = log_ratio(data.V2_upper, data.V2)
        ax.plot(ratio, color=VERMILION, marker=".", label=r"log(UB/$V_2$)")


def variance_ratios(runs: Mapping[str, pd.DataFrame], warn: str = "") -> Figure:
    """V₁/V₂ of every hidden layer over the epochs, one line per run: below 1, Î₁ is the better.

    ``warn`` is written on top.
    """
    tables = {name: by_layer(values, INDEX) for name, values in runs.items()}
    ratios = {name: wide.V1 / wide.V2 for name, wide in tables.items()}
    layers = sorted({layer for ratio in ratios.values() for layer, _ in ratio.index})[:-1]
    size = (1.7 * len(layers) + 2.2, 3.6)
    with panels(1, len(layers), size, sharey=True) as (figure, axes):
        for ax, layer in zip(axes[0], layers, strict=True):
            ax.set_yscale("log")
            ax.axhline(1, color=GREY, linewidth=0.8)
            for k, (name, ratio) in enumerate(ratios.items()):
                ax.plot(ratio[layer], label=name, **line_style(k))
            ax.set_title(f"layer {layer}")
            ax.set_xlabel("epoch")
            ax.xaxis.get_major_locator().set_params(integer=True)
        axes[0, 0].set_ylabel("$V_1 / V_2$ of the layer's means")
        if warn:
            figure.suptitle(warn, color="#B00020", weight="bold")
        label_lines(figure)
    return figure


def errors_of_one_label(groups: Mapping[str, Mapping[str, tuple[pd.DataFrame, int]]]) -> Figure:
    """Relative error of either estimator with one label, by layer: which to use where.

    The groups have for every panel's title the table of values and the number of labels of its
    runs, by name.
    """
    parts = {title: relative_errors(runs) for title, runs in groups.items()}
    widths = [part.index.get_level_values("layer").nunique() for part in parts.values()]
    size = (0.62 * sum(widths) + 0.8, 4.0)
    with panels(1, len(parts), size, sharey=True, width_ratios=widths) as (figure, axes):
        for ax, (title, errors) in zip(axes[0], parts.items(), strict=True):
            draw_errors(ax, errors)
            ax.set_title(title)
        axes[0, 0].set_ylabel("relative error, one label")
        label_lines(figure, size=12)
    return figure


def relative_errors(runs: Mapping[str, tuple[pd.DataFrame, int]]) -> pd.DataFrame:
    """√(ΣV/ΣI²) over a layer for one label: columns V1, V2, rows (layer, run, epoch)."""
    tables = {}
    for name, (values, num_samples) in runs.items():
        wide = by_layer(values, INDEX)
        tables[name] = (wide[["V1", "V2"]] * num_samples).div(wide.I_squared, axis=0).pow(0.5)
    joined: pd.DataFrame = pd.concat(tables, names=["run"])
    return joined.replace([np.inf], np.nan).reorder_levels(["layer", "run", "epoch"]).sort_index()


def draw_errors(ax: Axes, errors: pd.DataFrame) -> None:
    """Median, middle half and middle nine tenths of the errors of every layer."""
    ax.set_yscale("log")
    layers = list(errors.index.get_level_values("layer").unique())
    sides = (("V1", BLUE, -0.17, r"$\hat{I}_1$"), ("V2", VERMILION, 0.17, r"$\hat{I}_2$"))
    for name, color, aside, label in sides:
        for layer in layers:
            x, found = layer + aside, errors[name].loc[layer].dropna()
            if (found == 0).all():
                ax.text(x, 0.02, "exact", color=color, rotation=90, ha="center", va="bottom",
                        transform=ax.get_xaxis_transform())  # fmt: skip
                continue
            low, quarter, half, three, high = found.quantile([0.05, 0.25, 0.5, 0.75, 0.95])
            ax.plot([x, x], [low, high], color=color, linewidth=1.2)
            ax.plot([x, x], [quarter, three], color=color, linewidth=4, solid_capstyle="butt")
            ax.plot(x, half, color=color, marker="o", markersize=7, markeredgecolor="white",
                    linestyle="none", label=label if layer == layers[0] else None)  # fmt: skip
    ax.set_xticks(layers, [*map(str, layers[:-1]), f"{layers[-1]}\noutput"])
    ax.set_xlim(min(layers) - 0.6, max(layers) + 0.6)
    ax.set_xlabel("layer")


def by_layer(values: pd.DataFrame, index: list[str]) -> pd.DataFrame:
    """The layers' values, a column per quantity; layers are numbers, so that 10 follows 9."""
    layers = values[values.layer != NETWORK]
    return layers.assign(layer=layers.layer.astype(int)).pivot_table(
        index=index, columns="quantity", values="value"
    )


def vanishes(variance: pd.Series[float]) -> bool:
    """Whether a layer has none of this variance, at any epoch."""
    return bool((variance == 0).all())


def line_style(k: int) -> dict[str, Any]:
    """Colour, dashes and width of line k; no two are alike."""
    width = 1.3 + 0.7 * (k // (len(COLORS) * len(DASHES)))  # the numbers of both are coprime
    return {
        "color": COLORS[k % len(COLORS)],
        "linestyle": DASHES[k % len(DASHES)],
        "linewidth": width,
    }


def log_ratio(upper: pd.Series[float], value: pd.Series[float]) -> pd.Series[float]:
    """log(UB/V) where both are positive, a gap elsewhere."""
    positive = (upper > 0) & (value > 0)
    return (upper.where(positive) / value.where(positive)).map(math.log, na_action="ignore")


def show(figure: Figure, record: Mapping[str, Any] | None = None) -> None:
    """Label the lines of a figure and display it, as an SVG whose bytes depend on it only.

    Args:
        figure: With labels at its lines, as for a legend; one that has a legend keeps it.
        record: What made it; a warning is written on top if that does not count.
    """
    if record is not None and (text := warning(record)):
        figure.suptitle(text, color="#B00020", weight="bold")
    if not figure.legends:
        label_lines(figure)
    display.display(display.SVG(as_svg(figure)))


def save(figure: Figure, path: Path) -> None:
    """Write an SVG whose bytes depend on the figure only."""
    results.write_text(path, compact(as_svg(figure)))


def as_svg(figure: Figure) -> str:
    """The figure as SVG, which is closed."""
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()


def compact(svg: str) -> str:
    r"""A picture of matplotlib in fewer bytes, on no ground; any other picture as it is.

    Coordinates, in units of 1/72 inch, are rounded to two decimals. The date, the white space, and
    groups that only bear a number are dropped. The white behind figure and axes, which has no
    edge, becomes transparent.

    >>> compact('<svg><g id="figure_1">\n <path d="M 1.23456 2 \nL 0.999 -0.001 "/></g></svg>')
    '<svg><path d="M 1.23 2 L 1 0"/></svg>'
    >>> compact('<svg><g id="figure_1"><g id="empty"/><g clip-path="url(#a)"/></g></svg>')
    '<svg><g clip-path="url(#a)"/></svg>'
    """
    if '<g id="figure_1">' not in svg:
        return svg
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(?<=\s)(?:d|x|y)="[^"]*"|translate\([^)]*\)', rounded, svg)
    svg = svg.replace('style="fill: #ffffff"/>', 'style="fill: none"/>')
    svg = re.sub(r'<g id="[^"]*"/>', "", re.sub(r">\s+<", "><", svg))
    bare = []  # of the groups that are open: whether this one is dropped

    def without_bare(tag: re.Match[str]) -> str:
        if tag[0] != "</g>":
            bare.append(re.fullmatch('<g id="[^"]*">|<g>', tag[0]) is not None)
            return "" if bare[-1] else tag[0]
        return "" if bare.pop() else tag[0]

    return re.sub(r"<g(?: [^>]*)?(?<!/)>|</g>", without_bare, svg)


def compacted(outputs: list[Any]) -> list[Any]:
    """A cell's outputs with their SVG pictures made compact, in place."""
    for output in outputs:
        if SVG in output.get("data", {}):
            output.data[SVG] = compact(output.data[SVG])
    return outputs


def rounded(attribute: re.Match[str]) -> str:
    """Text with its numbers rounded to two decimals, and single spaces."""
    text = " ".join(attribute[0].split()).replace(' "', '"')
    number = r"-?\d+(?:\.\d+(?:e-?\d+)?|e-?\d+)"
    return re.sub(number, lambda n: f"{round(float(n[0]), 2) + 0:.9g}", text)


def warning(*records: Mapping[str, Any]) -> str:
    """What runs are if one of them does not count, for the top of figures; else nothing."""
    for record in records:
        if not record["counts"]:
            if not record["data"].get("is_mnist", True):
                return f"NOT MNIST: {record['data']['title']}"
            limit = record["parameters"].get("train_limit")
            return "SMOKE SIZE: " + (f"only {limit} training images" if limit else "cut short")
    return ""


def caption(record: Mapping[str, Any], warn: str = "") -> str:
    """What a run's Figure 1 shows, after a warning if it needs one; its passport says the rest."""
    warn = warn or warning(record)
    return (
        f"{f'**{warn}.** ' if warn else ''}"
        f"Test input {record['input_index']}; N = {record['parameters']['num_samples']:,} labels; "
        f"{record['network']}. Widths, dropout rate, optimiser, learning rate, batch size and N "
        "are our choices. The solid variances are exact, not sampled."
    )


def count_below(tables: Iterable[pd.DataFrame]) -> tuple[int, int]:
    """How often V₁ < V₂ in the layers' means of some runs, and of how many: where V₂ is not 0."""
    both = pd.concat([wide[wide.V2 > 0] for wide in (by_layer(t, INDEX) for t in tables)])
    return int((both.V1 < both.V2).sum()), len(both)


def seen(values: pd.DataFrame) -> str:
    """What a run's Figure 1 shows, for those who do not see it."""
    wide = by_layer(values, INDEX)
    both = wide[wide.V2 > 0]
    below, points = count_below([values])
    silent = [str(layer) for layer, data in wide.groupby("layer") if vanishes(data.V2)]
    looser = (both.V1_upper / both.V1 > both.V2_upper / both.V2).sum()
    where = f"V2 is 0 in layer {', '.join(silent)}. " if silent else ""
    return (
        "One column per layer. Above, over the epochs: Fisher information, standard deviations of "
        "both estimators, upper bounds. Below: log-ratios of bounds and variances. Where V2 is not "
        f"0, V1 is the smaller of the two at {below} of {points} points, and "
        f"its bound the looser one at {looser}. {where}".strip()
    )


def not_yet(name: str) -> Figure:
    """In place of a figure whose runs are missing: says so."""
    with mpl.rc_context(STYLE):
        figure = plt.figure(figsize=(6.4, 1.2))
        text = f"{name}: not run yet. make reproduce draws this figure."
        figure.text(0.5, 0.5, text, ha="center", va="center", color=GREY)
    return figure
