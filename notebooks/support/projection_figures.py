"""Errors of random projections against the backward passes that they take."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from support import figures
from support.markdown import markdown_table
from support.results import NETWORK, Run

KINDS = {
    "signs": ("random signs", figures.BLACK),
    "labels": ("labels", figures.BLUE),
    "importance": ("important labels", figures.ORANGE),
}
DASHES = {"batch": "-", "input": "--"}
ACROSS = 3  # panels in a line
ERRORS = ("signs_batch", "signs_input", "labels_input")
CALLS = ("exact", "signs by batch", "signs by input")
MEASURED = re.compile(r"measured_(\w+)_(batch|input)_(\d+)")
NAME = re.compile(r"projections-network-(.+)")


def errors(values: pd.DataFrame) -> Figure:
    """One panel per run: predicted lines, measured dots, and where the exact value stands.

    Args:
        values: The tables of runs of ``projections.ipynb``.
    """
    of = {str(name): last_epoch(part) for name, part in values.groupby("run")}
    of = dict(sorted(of.items(), key=lambda item: item[1]["outputs"]))
    columns = min(len(of), ACROSS)
    lines = -(-len(of) // ACROSS)
    size = (3 * columns + 1, 2.9 * lines + 1.2)
    with figures.panels(lines, columns, size, sharey=True) as (figure, axes):
        for ax in axes.flat[len(of) :]:
            ax.remove()
        for ax, (name, at) in zip(axes.flat, of.items(), strict=False):
            draw(ax, at)
            found = NAME.fullmatch(name)
            ax.set_title(found[1] if found else name)
            ax.set_xlabel("backward passes")
        for ax in axes[:, 0]:
            ax.set_ylabel("relative error of I")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, 3))
    return figure


def last_epoch(values: pd.DataFrame) -> pd.Series[float]:
    """Quantities of the whole network after the last epoch."""
    of_network = values[(values.layer == NETWORK) & (values.epoch == values.epoch.max())]
    found: pd.Series[float] = of_network.set_index("quantity").value
    return found


def draw(ax: Axes, at: pd.Series[float]) -> None:
    """The errors of all estimators in one network."""
    ax.set(xscale="log", yscale="log")
    outputs = at["outputs"]
    measured = {q: found for q in at.index if (found := MEASURED.fullmatch(str(q)))}
    passes = np.array([1.0, max([outputs, *(int(found[3]) for found in measured.values())])])
    for kind, (label, color) in KINDS.items():
        for squares, dashes in DASHES.items():
            one = at[f"predicted_{kind}_{squares}"]
            ax.plot(
                passes, one / passes**0.5, color=color, linestyle=dashes,
                label=f"{label}, squared by {squares}",
            )  # fmt: skip
    for quantity, found in measured.items():
        color = KINDS[found[1]][1]
        ax.plot(
            int(found[3]), at[quantity], "o", color=color, markersize=5,
            markerfacecolor=color if found[2] == "batch" else "white",
        )  # fmt: skip
    ax.axvline(outputs, color=figures.GREEN, linewidth=4, alpha=0.75, label="exact I")


def table_of_passes(values: pd.DataFrame) -> str:
    """Predicted and measured errors of one run, as a Markdown table."""
    at = last_epoch(values)
    counts = sorted({int(found[3]) for q in at.index if (found := MEASURED.fullmatch(str(q)))})
    rows = []
    for kind, (label, _) in KINDS.items():
        for squares in DASHES:
            one = at[f"predicted_{kind}_{squares}"]
            cells = [
                f"{at[f'measured_{kind}_{squares}_{k}']:.3g} (predicted {one / k**0.5:.3g})"
                for k in counts
            ]
            rows.append([label, f"by {squares}", f"{one:.3g}", *cells])
    head = ["w", "squared", "one pass, predicted", *(f"{k} passes" for k in counts)]
    return markdown_table(head, rows)


def farthest(at: pd.Series[float]) -> float:
    """The largest factor between a measured error and the predicted one."""
    ratios: list[float] = []
    for quantity, error in at.items():
        if found := MEASURED.fullmatch(str(quantity)):
            ratios.append(error * int(found[3]) ** 0.5 / at[f"predicted_{found[1]}_{found[2]}"])
    return max(max(ratio, 1 / ratio) for ratio in ratios)


def in_order(group: Mapping[str, Run]) -> list[tuple[str, pd.Series[float], Run]]:
    """Name of the network, quantities, and run, with the fewest outputs first."""
    found = [
        (str(run.record["parameters"]["network"]), last_epoch(run.values), run)
        for run in group.values()
    ]
    return sorted(found, key=lambda one: (one[1]["outputs"], one[0]))


def table(group: Mapping[str, Run]) -> str:
    """Networks and their errors, as a Markdown table."""
    head = ["network", "parameters", "outputs", "signs by batch", "signs by input"]
    head += ["labels by input", "farthest"]
    rows = []
    for name, at, _ in in_order(group):
        cells = [f"{at[quantity]:,.0f}" for quantity in ("parameters", "outputs")]
        errors = [f"{at[f'predicted_{kind}']:.2f}" for kind in ERRORS]
        rows.append([name, *cells, *errors, f"{farthest(at):.2f}"])
    return markdown_table(head, rows)


def costs(group: Mapping[str, Run]) -> str:
    """Time and memory of the calls in every network, as a Markdown table."""
    rows = []
    for name, at, run in in_order(group):
        seconds, megabytes = run.record["timings"], run.record["megabytes"]
        cells = [f"{seconds[call]:.2g} s, {megabytes[call]:,.0f} MB" for call in CALLS]
        rows.append([name, f"{at['outputs']:,.0f}", *cells, f"{seconds['summarise']:.2g} s"])
    return markdown_table(["network", "outputs", "exact", *CALLS[1:], "summarise"], rows)
