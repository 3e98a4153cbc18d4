"""What depends on our choices: a figure and tables over the networks of ``choices.ipynb``."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from support import claims, figures
from support.direct_labels import label_lines
from support.markdown import markdown_table
from support.quantities import LEARNT, settings
from support.results import NETWORK, Run

LINES = (
    ("I", figures.GREEN, "Fisher information I"),
    ("V1", figures.BLUE, "$V_1$"),
    ("V2", figures.VERMILION, "$V_2$"),
)
NAMES = {"I": "I", "V1": "V₁", "V2": "V₂"}


def decay(values: pd.DataFrame) -> Figure:
    """I, V₁ and V₂ over the epochs in units of their values before training.

    A layer's value is divided by what it was at the start, and a network is the geometric mean of
    that over its layers, of V₂ without the output layer, where it is 0. A panel shows the median
    and the middle half of the networks with one kind of initial weights and one dropout rate;
    those that do not learn are left out.

    Args:
        values: The tables of the runs of one experiment, with the run's name in ``made``.
    """
    groups = values.groupby(["made", "run"], sort=False)
    networks = {(str(made), str(run)): table for (made, run), table in groups}
    start = {key: tuple(key[1].split(", ")[:2]) for key in networks}
    weights, dropouts = (list(dict.fromkeys(s[k] for s in start.values())) for k in (0, 1))
    grid = (len(dropouts), len(weights))
    size = (2.4 * len(weights) + 0.9, 2.5 * len(dropouts))
    with figures.panels(*grid, size, sharex=True, sharey=True) as (figure, axes):
        for i, dropout in enumerate(dropouts):
            for j, kind in enumerate(weights):
                own = [t for key, t in networks.items() if start[key] == (kind, dropout)]
                draw_decay(axes[i, j], [t for t in own if accuracy(t) >= LEARNT])
                axes[i, j].set_title(f"{kind}\n{dropout}")
        for ax in axes[-1]:
            ax.set_xlabel("epoch")
        for ax in axes[:, 0]:
            ax.set_ylabel("relative to epoch 0")
        label_lines(figure)
    return figure


def draw_decay(ax: Axes, networks: list[pd.DataFrame]) -> None:
    """Median and middle half of some networks."""
    ax.set_yscale("log")
    ax.axhline(1, color=figures.GREY, linewidth=0.8)
    ax.axhline(0.1, color=figures.GREY, linewidth=0.8, linestyle=":")
    for which, color, label in LINES if networks else ():
        lines = pd.concat([relative_to_start(t, which) for t in networks], axis=1)
        low, middle, high = (lines.quantile(q, axis=1) for q in (0.25, 0.5, 0.75))
        ax.fill_between(lines.index, low, high, color=color, alpha=0.15, linewidth=0)
        ax.plot(middle.index, middle, color=color, linewidth=1.4, label=label)


def accuracy(network: pd.DataFrame) -> float:
    """A network's accuracy on the test set after its last epoch."""
    found = network[network.quantity == "test_accuracy"].set_index("epoch").value
    return float(found[found.index.max()])


def relative_to_start(data: pd.DataFrame, quantity: str) -> pd.Series[float]:
    """Geometric mean over the layers of a quantity over that at epoch 0, by epoch.

    Layers where it is 0 at the start, or ever becomes 0, are left out.
    """
    chosen = data[(data.quantity == quantity) & (data.layer != NETWORK)]
    wide = chosen.pivot(index="epoch", columns="layer", values="value").sort_index()
    wide = wide.loc[:, (wide > 0).all()]
    line: pd.Series[float] = np.exp(np.log(wide / wide.iloc[0]).mean(axis=1))
    return line


def numbers(group: Mapping[str, Run], quantity: str, *arguments: str) -> pd.Series[float]:
    """A quantity of `support.quantities` in some runs."""
    return claims.ask(quantity, arguments, group, {name: run.values for name, run in group.items()})


def networks(group: Mapping[str, Run]) -> pd.Series[int]:
    """All networks of some runs, by their settings."""
    names = [f"{name}, {run}" for name, made in group.items() for run in made.values.run.unique()]
    found: pd.Series[int] = settings(pd.Series(1, pd.Index(names, name="run")))
    return found


def decay_table(group: Mapping[str, Run]) -> str:
    """How many layers fall to a tenth by epoch 5, by weights and dropout, at all widths."""
    if not group:
        return "*These networks have not been trained yet.*\n"
    by = ["weights", "dropout"]
    columns = {}
    trained = networks(group).groupby(level=by).size()
    learn = numbers(group, "share_that_fades").groupby(level=by, sort=False).size()
    columns["networks that learn"] = learn.map(str) + trained.map(" of {}".format)
    for name, title in NAMES.items():
        fallen = (numbers(group, "fades", name) <= 0.1).groupby(level=by, sort=False)
        columns[title] = fallen.sum().map(str) + " of " + fallen.size().map(str)
    table = pd.DataFrame(columns).fillna("–").sort_index(key=lambda names: names.str.lower())
    rows = [[*key, *row] for key, row in zip(table.index, table.to_numpy(), strict=True)]
    return markdown_table(["initial weights", "dropout", *table.columns], rows)


def tightness_table(group: Mapping[str, Run]) -> str:
    """UB/V₁ and UB/V₂ of every setting: the median over seeds, layers and epochs."""
    if not group:
        return "*These networks have not been trained yet.*\n"
    by = ["layers", "reading", "weights", "optimizer", "widths"]
    columns = {
        f"UB/{NAMES[name]}": numbers(group, "tightness", name)
        .groupby(level=by, sort=False)
        .median()
        for name in ("V1", "V2")
    }
    table = pd.DataFrame(columns).map(lambda x: f"{x:.3g}")
    rows = [[*key, *row] for key, row in zip(table.index, table.to_numpy(), strict=True)]
    head = ["layers", "reading", "initial weights", "optimiser", "widths", *table.columns]
    return markdown_table(head, rows)
