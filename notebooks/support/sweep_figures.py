"""Figures over many networks at once, from the tables of several runs of the sweep."""

from __future__ import annotations

import re
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from support import figures
from support.direct_labels import label_lines

NAME = re.compile(r"(?P<activation>[^-]+)-(?P<hidden>\d+(x\d+)*)-[^-]+-.+-seed-\d+")


class Network(NamedTuple):
    """What the figures need of the name of a network in the sweep."""

    activation: str
    depth: int  # number of linear layers


def network(name: str) -> Network:
    """Read the name of a network in the sweep.

    Raises:
        ValueError: it is no such name.

    >>> network("Tanh-32x32-Adam-0.001-seed-1").depth
    3
    """
    found = NAME.fullmatch(name)
    if not found:
        raise ValueError(f"{name!r} is no name like Tanh-32x32-Adam-0.001-seed-1.")
    return Network(found["activation"], len(found["hidden"].split("x")) + 1)


def validity(values: pd.DataFrame) -> Figure:
    """How loose the upper bounds are by activation and depth, and how often one did not hold.

    Per activation and number of layers: the median of UB/V over widths, seeds and the layers where
    V is not 0, at the last epoch, and the range from the tightest to the loosest of them. Layers
    are averaged before they are divided.

    Args:
        values: The tables of the runs of the sweep, one after another.
    """
    last = values[values.epoch == values.groupby("run").epoch.transform("max")]
    activation_of = last.run.map(lambda run: network(run).activation)
    activations = list(dict.fromkeys(activation_of))
    size = (1.45 * len(activations) + 0.9, 3.9)
    with figures.panels(1, len(activations), size, sharex=True, sharey=True) as (figure, axes):
        for ax, activation in zip(axes[0], activations, strict=True):
            draw_looseness(ax, last[activation_of == activation], activation)
            ax.set_xlabel("layers")
        axes[0, 0].set_ylabel("upper bound / variance")
        axes[0, 0].yaxis.set_major_locator(LogLocator(subs=(1, 3)))  # the panels share it
        axes[0, 0].yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes[0, 0].yaxis.set_minor_locator(NullLocator())
        label_lines(figure)
    return figure


def draw_looseness(ax: Axes, data: pd.DataFrame, activation: str) -> None:
    """One activation: UB/V over depth; in the title, checks of I, V₁ and V₂, and violations."""
    totals = data.groupby("quantity").value.sum()
    violations = totals[["I_violations", "V1_violations", "V2_violations"]].sum()
    checks = f"{3 * totals['checks']:,.0f} checks"
    ax.set_title(f"{activation}\n{checks}\n{violations:,.0f} violations", fontsize=10)
    wide = figures.by_layer(data, ["run", "layer"])
    depth = wide.index.get_level_values("run").map(lambda run: network(run).depth)
    ax.set_yscale("log")
    for shift, which, color, marker in (
        (-0.12, "V1", figures.BLUE, "o"),
        (0.12, "V2", figures.VERMILION, "s"),
    ):
        ratio = (wide[f"{which}_upper"] / wide[which].where(wide[which] > 0)).dropna()
        groups = ratio.groupby(depth[wide.index.isin(ratio.index)])
        if ratio.empty:
            ax.text(0.97, 0.03, "$V_2 = 0$", transform=ax.transAxes, color=color, ha="right")
            continue
        low, middle, high = groups.min(), groups.median(), groups.max()
        ax.vlines(middle.index + shift, low, high, color=color, alpha=0.5, linewidth=2)
        ax.plot(
            middle.index + shift, middle, color=color, marker=marker, markersize=4,
            label=f"UB/$V_{which[1]}$",
        )  # fmt: skip
    ax.set_xticks(sorted(set(depth)))
