"""Optimisers with a diagonal: loss against backward passes, and a table of all results."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from support import figures
from support.markdown import markdown_table
from support.results import Run

SGD = "none (SGD)"
NONE = "–"
WITH_ERROR, HALF = " + SE", ", half the steps"
DASHES = {WITH_ERROR: "--", HALF: ":"}
COLOURS = {
    SGD: figures.GREY,
    "Adam's": figures.SKY,
    "data's labels": figures.PURPLE,
    "Î₁": figures.BLUE,
    "importance": figures.ORANGE,
    "signs": figures.BLACK,
    "Î₂, probes": figures.VERMILION,
    "exact": figures.GREEN,
}
HEAD = ["diagonal", "ρ", "λ", "window", "error of D", "loss", "accuracy", "better than SGD"]


def losses(values: pd.DataFrame) -> Figure:
    """One panel per run of ``optimisers.ipynb``: mean test loss against backward passes.

    Args:
        values: The tables of the runs, with the run's name in ``made``.
    """
    made = values.made.unique()
    with figures.panels(1, len(made), (3.6 * len(made) + 1, 4.8)) as (figure, axes):
        for ax, name in zip(axes[0], made, strict=True):
            own = values[(values.made == name) & (values.quantity == "nll")]
            lines = own.pivot_table(index="epoch", columns="run", values="value")
            for method in lines:
                kind = str(method).removesuffix(WITH_ERROR).removesuffix(HALF)
                dashes = DASHES.get(str(method).removeprefix(kind), "-")
                ax.plot(lines[method], dashes, color=COLOURS[kind], label=method, linewidth=1.5)
            ax.set(xlabel="backward passes", title=title(str(name)), yscale="log")
        axes[0, 0].set_ylabel("loss on the test set")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def title(made: str) -> str:
    """What differs between the runs of one experiment: the last part of a name."""
    return made.rpartition("-")[2]


def losses_table(group: Mapping[str, Run]) -> str:
    """The settings chosen for every diagonal, and its results, for every run."""
    if not group:
        return "*These networks have not been trained yet.*\n"
    parts = []
    for name, run in group.items():
        values = run.values
        ends = values[values.epoch == values.epoch.max()]
        by_seed = ends.pivot(index=["run", "layer"], columns="quantity", values="value")
        chosen = values[values.epoch == 0].pivot(index="run", columns="quantity", values="value")
        rows = []
        for method in values.run.unique():
            found, at = by_seed.loc[method], chosen.loc[method]
            diagonal = not str(method).startswith(SGD)
            wins = int((found.nll < by_seed.loc[SGD].nll).sum())
            rows.append([
                method,
                f"{at.rate:.3g}",
                *([f"{at.damping:g}", f"{at.window:g}"] if diagonal else [NONE, NONE]),
                f"{found.error.mean():.0%}" if found.error.notna().any() else NONE,
                f"{found.nll.mean():.3f} ± {found.nll.std():.3f}",
                f"{found.accuracy.mean():.1%}",
                NONE if method == SGD else f"{wins} of {len(found)}",
            ])  # fmt: skip
        parts += [f"**{title(name)}**\n", markdown_table(HEAD, rows)]
    return "\n".join(parts)
