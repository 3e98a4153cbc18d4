"""The paper's figures, drawn from a run's table of values; nothing is computed here.

Colours are those of Okabe and Ito, which stay apart for colour-blind readers: Î₁ is blue and Î₂
vermilion throughout, the Fisher information green, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from support.results import NETWORK

GREEN, BLUE, SKY, VERMILION = "#009E73", "#0072B2", "#56B4E9", "#D55E00"
GREY = "#666666"
LINES = [
    {"color": color, "linestyle": line, "linewidth": 1.3}
    for color, line in zip(
        ["#000000", "#E69F00", "#56B4E9", "#CC79A7", "#666666"], ["-", "--", "-.", ":", "-"],
        strict=True,
    )
]  # fmt: skip
STYLE: Any = {
    "svg.hashsalt": "fimlib",  # the same figure gives the same file
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def figure_1(values: pd.DataFrame, record: Mapping[str, Any]) -> Figure:
    """Figure 1: one column per layer; variances and bounds above, log(UB/V) below.

    Args:
        values: The table of one run.
        record: What made it.
    """
    wide = values[values.layer != NETWORK].pivot_table(
        index=["layer", "epoch"], columns="quantity", values="value", sort=True
    )
    layers = list(wide.index.get_level_values("layer").unique())
    num_samples = record["parameters"]["num_samples"]
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, len(layers), figsize=(2.6 * len(layers) + 0.6, 6.4), sharex=True, sharey="row",
            squeeze=False, height_ratios=[3, 2], layout="constrained",
        )  # fmt: skip
        for k, layer in enumerate(layers):
            data, last = wide.loc[layer], layer == layers[-1]
            draw_variances(axes[0, k], data, num_samples, has_v2=not last)
            draw_ratios(axes[1, k], data, has_v2=not last)
            axes[0, k].set_title(f"layer {layer}" + (" (output)" if last else ""))
            axes[1, k].set_xlabel("epoch")
            axes[1, k].xaxis.get_major_locator().set_params(integer=True)
        axes[0, 0].set_ylabel("mean over the layer's\nparameters  [nat/θ²]")
        axes[1, 0].set_ylabel("log(UB / V)")
        # The last column has a line, the middle ones all others: one legend for the whole figure.
        entries = {
            text: line
            for ax in (axes[0, 0], axes[0, -1], axes[1, 0])
            for line, text in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=5)
        if not record["counts"]:
            figure.suptitle(warning(record), color="#B00020", weight="bold")
    return figure


def draw_variances(ax: Axes, data: pd.DataFrame, num_samples: int, *, has_v2: bool) -> None:
    """Fisher information, standard deviations and their upper bounds, on a log scale."""
    ax.set_yscale("log")
    ax.plot(data.I, color=GREEN, linewidth=4, alpha=0.75, label="Fisher information I")
    ax.plot(np.sqrt(data.V1), color=BLUE, label=r"$\sqrt{V_1}$")
    ax.plot(np.sqrt(data.V1_upper), color=BLUE, linestyle="--", label=r"bound of $\sqrt{V_1}$")
    ax.plot(
        np.sqrt(data.V1_certified), color=SKY, linestyle="-", linewidth=0.8,
        label=r"bound of $\sqrt{V_1}$, certified",
    )  # fmt: skip
    if has_v2:
        ax.plot(np.sqrt(data.V2), color=VERMILION, label=r"$\sqrt{V_2}$")
        ax.plot(
            np.sqrt(data.V2_upper), color=VERMILION, linestyle="--", label=r"bound of $\sqrt{V_2}$"
        )
        return
    ax.plot(
        np.sqrt(data.V1 * num_samples), color=BLUE, linestyle="-.", linewidth=1,
        label=r"$\sqrt{V_1}$ at N = 1",
    )  # fmt: skip
    ax.text(
        0.97, 0.03, r"$V_2 = 0$", transform=ax.transAxes, color=VERMILION, ha="right", va="bottom"
    )


def draw_ratios(ax: Axes, data: pd.DataFrame, *, has_v2: bool) -> None:
    """How loose the upper bounds are: log of the ratio of the layer's means."""
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.plot(log_ratio(data.V1_upper, data.V1), color=BLUE, marker=".", label=r"log(UB/$V_1$)")
    if has_v2:
        ratio = log_ratio(data.V2_upper, data.V2)
        ax.plot(ratio, color=VERMILION, marker=".", label=r"log(UB/$V_2$)")


def variance_ratios(runs: Mapping[str, pd.DataFrame], warn: str = "") -> Figure:
    """V₁/V₂ of every hidden layer over the epochs, one line per run: below 1, Î₁ is the better.

    Args:
        runs: Tables of values by the name of their line.
        warn: What to write on top if these runs do not count.
    """
    ratios = {
        name: values[values.quantity == "V1"].set_index(["layer", "epoch"]).value
        / values[values.quantity == "V2"].set_index(["layer", "epoch"]).value
        for name, values in runs.items()
    }
    layers = sorted({layer for ratio in ratios.values() for layer, _ in ratio.index})[:-1]
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(layers), figsize=(3.1 * len(layers) + 0.6, 3.6), sharey=True, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for ax, layer in zip(axes[0], layers, strict=True):
            ax.set_yscale("log")
            ax.axhline(1, color=GREY, linewidth=0.8)
            for style, (name, ratio) in zip(LINES, ratios.items(), strict=False):
                ax.plot(ratio[layer], label=name, **style)
            ax.set_title(f"layer {layer}")
            ax.set_xlabel("epoch")
            ax.xaxis.get_major_locator().set_params(integer=True)
        axes[0, 0].set_ylabel("$V_1 / V_2$ of the layer's means")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
        if warn:
            figure.suptitle(warn, color="#B00020", weight="bold")
    return figure


def log_ratio(upper: pd.Series[float], value: pd.Series[float]) -> pd.Series[float]:
    """log(UB/V) where both are positive, a gap elsewhere."""
    positive = (upper > 0) & (value > 0)
    return (upper.where(positive) / value.where(positive)).map(math.log, na_action="ignore")


def save(figure: Figure, path: Path) -> None:
    """Write an SVG whose bytes depend on the figure only."""
    with mpl.rc_context(STYLE):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def warning(record: Mapping[str, Any]) -> str:
    """What a run that does not count is, for the top of its figures and tables; else nothing."""
    if record["counts"]:
        return ""
    if not record["data"]["is_mnist"]:
        return f"NOT MNIST: {record['data']['title']}"
    return f"SMOKE SIZE: only {record['parameters']['train_limit']} training images"


def caption(record: Mapping[str, Any]) -> str:
    """Data, seed, settings and machine of a run, in words."""
    p, machine = record["parameters"], record["machine"]
    warn = f"**{warning(record)}.** " if warning(record) else ""
    widths = "-".join(str(w) for w in p["hidden"])
    return (
        f"{warn}Data: {record['data']['title']} (SHA-256 {record['data']['digest'][:12]}…), test "
        f"input {record['input_index']}; seed {p['seed']}; N = {p['num_samples']:,} labels; hidden "
        f"widths {widths}, {p['activation']}, dropout {p['dropout']} before the last layer; "
        f"{p['optimizer']}, learning rate {p['learning_rate']}, batches of {p['batch_size']}, "
        f"{p['epochs']} epochs. The solid variances are exact, not sampled. Made at commit "
        f"{record['commit']} on {record['started'][:10]} in {record['seconds']:.0f} s "
        f"({machine['processor']}, {machine['threads']} thread, {machine['device']}, torch "
        f"{record['versions']['torch']})."
    )
