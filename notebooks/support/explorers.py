"""The data of the book's two explorers, as JSON that stands in their pages.

The pages' script (``book/_static/explorers/explorers.js``) computes nothing: it looks up what is
written here, so that every value shown is `fimlib`'s or a run's. `write_explorers` puts into the
folder of the book's generated files, for each explorer, a fragment of HTML with its data and a
picture that stands in for it on paper and where there is no script.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import fimlib
from fimlib.bounds import probabilities
from support import figures, report, results
from support.direct_labels import label_lines
from support.results import Run

STEPS = 30  # the triangle's points are (i, j, k)/30 with i + j + k = 30
TEMPERATURES = 10 ** torch.linspace(-1, 2, 61, dtype=torch.float64)
CLASSES = 10
ZERO = 1e-12  # bounds that differ by less than this share of the largest count as equal
FORBIDDEN = -1e3  # a logit whose class has probability 0: exp(-1000) is 0
# Upper bounds of λ_max(M), the tightest first where several are equal.
UPPER = ("certified-m", "corollary-4-2", "proposition-4-3", "corollary-q-1", "theorem-5-2-m")
OF_THE_PAPER = UPPER[1:]

Columns = dict[str, list[Any]]


def write_explorers(main: Mapping[str, Run], folder: Path) -> dict[str, list[Run]]:
    """Write the data and the pictures of both explorers into the folder of generated files.

    Returns:
        The runs behind the picture that stands for all of them, by its file name.
    """
    groups = report.experiments(main)
    shown = [run for name in report.LIKE_FIGURE_1 for run in groups.get(name, {}).values()]
    data = softmax()
    text = embedded("softmax", data) + f'<p class="passport">{origin(data)}</p>\n'
    results.write_text(folder / "explore-softmax.html", text)
    (folder / "explorers").mkdir(exist_ok=True)
    figures.save(softmax_figure(data), folder / "explorers" / "softmax.svg")
    results.write_text(folder / "explore-softmax.md", try_softmax(data))
    lines = {"runs": [figure_1(run) for run in shown]}
    results.write_text(folder / "explore-figure-1.md", try_figure_1(shown, lines["runs"]))
    results.write_text(folder / "explore-figure-1.html", embedded("figure-1", lines))
    if not shown:
        return {}
    first = shown[0]
    figures.save(figures.figure_1(first.values, first.record), folder / "explore-figure-1.svg")
    return {"explore-figure-1.svg": shown}


def origin(data: Mapping[str, Columns]) -> str:
    """Where the softmax explorer's numbers come from, in a line."""
    return (
        f"Computed by fimlib {fimlib.__version__}, commit {results.commit()}, when this "
        f"book was built: {len(data['three']['sigma'])} + {len(data['ten']['sigma'])} softmax "
        "vectors. No data set, no run."
    )


def embedded(name: str, data: Mapping[str, Any]) -> str:
    """Data as a piece of HTML that a script finds by its id."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.replace("</", r"<\/")
    return f'<script type="application/json" id="data-{name}">{text}</script>\n'


# The softmax.


@functools.cache
def softmax() -> dict[str, Columns]:
    """Eigenvalues and bounds at all softmax vectors that the explorer offers; a few seconds.

    Returns:
        ``three``: the points of a grid on the simplex of three classes, with their place ``at``,
        [i, j]. ``ten``: evenly spaced logits at ``temperature`` τ: each class is exp(−1/τ) times as
        probable as the one before.
    """
    places = [[i, j] for i in range(STEPS + 1) for j in range(STEPS + 1 - i)]
    counts = torch.tensor([[i, j, STEPS - i - j] for i, j in places], dtype=torch.float64)
    logits = (counts / STEPS).log().clamp_min(FORBIDDEN)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are tiny: several threads would wait for one another
    try:
        return {
            "three": {"at": places} | eigenvalues_and_bounds(logits),
            "ten": {"temperature": TEMPERATURES.tolist()} | eigenvalues_and_bounds(ten_logits()),
        }
    finally:
        torch.set_num_threads(threads)


def ten_logits() -> Tensor:
    """Evenly spaced logits of ten classes at every temperature, [61, 10]."""
    return -torch.arange(CLASSES, dtype=torch.float64) / TEMPERATURES[:, None]


def eigenvalues_and_bounds(h: Tensor) -> Columns:
    """What the explorer shows of softmax vectors with the logits h, [B, C]: a list per name.

    Returns:
        ``sigma`` and ``eigenvalues`` (of 𝓘, decreasing) have C numbers per input, ``tightest`` and
        ``tightest-of-paper`` the names of the smallest upper bounds of λ_max(M), the others a
        number.
    """
    family = fimlib.Categorical()
    sigma, others = probabilities(family.mean(h))
    exact, theorem = fimlib.spectrum(family, h), fimlib.table_1(family, h)
    eigenvalues = torch.linalg.eigvalsh(family.covariance(h)).clamp_min(0)
    eigenvalues[:, 0] = exact.min_cov
    numbers = {
        "lambda-max-i": exact.max_cov,
        "sigma-max": sigma.amax(1),
        "spread": (sigma * others).sum(1),
        "theorem-5-2-i": theorem.max_cov,
        "lambda-max-m": exact.max_outer,
        "lower-m": fimlib.lambda_max(family, h, method="lower"),
        "certified-m": fimlib.lambda_max(family, h, method="certified"),
        "corollary-4-2": fimlib.corollary_4_2(family, h).upper,
        "proposition-4-3": fimlib.proposition_4_3(family, h),
        "corollary-q-1": fimlib.bounds.corollary_q_1(sigma),
        "theorem-5-2-m": theorem.max_outer,
    }
    columns: Columns = {"sigma": sigma.tolist(), "eigenvalues": eigenvalues.flip(1).tolist()}
    columns |= {name: values.tolist() for name, values in numbers.items()}
    columns["tightest"] = tightest(columns, UPPER)
    columns["tightest-of-paper"] = tightest(columns, OF_THE_PAPER)
    return columns


def tightest(columns: Columns, names: tuple[str, ...]) -> list[list[str]]:
    """The names of the smallest bounds at every input: several if they are equal up to rounding."""
    rows = zip(*(columns[name] for name in names), strict=True)
    return [
        [n for n, value in zip(names, row, strict=True) if value - min(row) <= ZERO * max(row)]
        for row in rows
    ]


def softmax_figure(data: Mapping[str, Columns]) -> Figure:
    """The explorer on paper: λ_max(M) over the triangle, and ten classes over the temperature."""
    with figures.panels(1, 3, (9.6, 3.6)) as (figure, [axes]):
        draw_triangle(axes[0], data["three"])
        draw_temperatures(
            axes[1], data["ten"], "lambda-max-i", figures.GREEN,
            {"sigma-max": (r"$\sigma_{\max}$", "--"), "spread": ("1 − ‖σ‖²", ":")},
        )  # fmt: skip
        axes[1].set_title(r"ten classes: $\lambda_{\max}(\mathcal{I})$")
        draw_temperatures(
            axes[2], data["ten"], "lambda-max-m", figures.BLUE,
            {"theorem-5-2-m": ("Theorem 5.2", "--"), "certified-m": ("certified", ":")},
        )  # fmt: skip
        axes[2].set_title(r"ten classes: $\lambda_{\max}(\mathcal{M})$")
        label_lines(figure)
    return figure


def draw_triangle(ax: Axes, data: Columns) -> None:
    """Dots on the simplex, the darker the larger λ_max(M)."""
    corners = np.array([[0.5, np.sqrt(3) / 2], [0, 0], [1, 0]])
    x, y = (np.array(data["sigma"]) @ corners).T
    value = np.array(data["lambda-max-m"])
    ax.scatter(x, y, s=14, c=figures.BLUE, alpha=0.08 + 0.92 * value / value.max(), linewidths=0)
    for k, (at_x, at_y) in enumerate(corners):
        place: Any = {"ha": "center", "va": "bottom" if at_y else "top"}
        ax.text(at_x, at_y + (0.04 if at_y else -0.04), f"class {k + 1}", **place)
    ax.set(aspect="equal", xlim=(-0.15, 1.15), ylim=(-0.15, 1.0))
    ax.set_title(r"three classes: $\lambda_{\max}(\mathcal{M})$")
    ax.set_axis_off()


def draw_temperatures(
    ax: Axes, data: Columns, exact: str, color: str, bounds: Mapping[str, tuple[str, str]]
) -> None:
    """An eigenvalue over the temperature, with some of its bounds."""
    for name, (label, dashes) in bounds.items():
        ax.loglog(data["temperature"], data[name], color="#000000", linestyle=dashes, label=label)
    ax.loglog(data["temperature"], data[exact], color=color, linewidth=2.5, label="exact")
    ax.set(ylim=(1e-3, 2), xlabel="temperature")


def try_softmax(data: Mapping[str, Columns]) -> str:
    """What to try, and what one sees then; the numbers are read from the data."""
    three, ten = data["three"], data["ten"]

    def at(name: str, place: list[int]) -> float:
        return float(three[name][three["at"].index(place)])

    def loose(name: str, place: list[int]) -> str:
        return f"{at(name, place) / at('lambda-max-m', place):.2f}"

    half, one, two = [15, 15], [28, 2], [28, 1]
    beaten = sum("certified-m" not in names for names in three["tightest"])
    factor = np.divide(ten["theorem-5-2-m"], ten["lambda-max-m"])
    tau, worst = ten["temperature"], int(factor.argmax())
    coldest = [ten[name][0] for name in UPPER]
    turn = min(t for t, a, b in zip(tau, ten["sigma-max"], ten["spread"], strict=True) if a <= b)
    return f"""\
* **Press *one half each*.** Both labels are equally far from the mean, so $\\hat I_1$ does not
  vary: $\\lambda_{{\\max}}(\\mathcal{{M}})$ is {at("lambda-max-m", half):.3g}. The certified bound
  is also {at("certified-m", half):.3g}. Corollary 4.2 gives {at("corollary-4-2", half):.3g},
  Theorem 5.2 {at("theorem-5-2-m", half):.3g}.
* **Compare the two confident places.** If the rest is on one class, the certified bound is
  {loose("certified-m", one)} times the value, Theorem 5.2 {loose("theorem-5-2-m", one)} times. If
  it is on two classes, Theorem 5.2 is {loose("theorem-5-2-m", two)} times the value, and Corollary
  4.2 is the tightest bound, as at {beaten} of the {len(three["at"])} softmax vectors.
* **Choose ten classes and cool down.** At $\\tau = {tau[-1]:.3g}$ Theorem 5.2 is {factor[-1]:.3g}
  times the value, and at most {factor[worst]:.3g} times, at $\\tau = {tau[worst]:.3g}$. At
  $\\tau = {tau[0]:.3g}$ all bounds agree within {max(coldest) / min(coldest) - 1:.2%}. For $\\tau$
  above {turn:.3g} its first term is the smaller one; below, the second.
"""


# Figure 1.


def figure_1(run: Run) -> dict[str, Any]:
    """What the explorer of Figure 1 shows of a run."""
    values = run.values
    wide = figures.by_layer(values, figures.INDEX)
    layers = list(wide.index.get_level_values("layer").unique())
    sure = values[values.quantity == "largest_probability"].sort_values("epoch").value
    given = run.record["parameters"]
    return {
        "name": run.name,
        "experiment": run.record["experiment"],
        "seed": given["seed"],
        "input": run.record["input_index"],
        "network": run.record["network"],
        "labels": given["num_samples"],
        "warning": figures.warning(run.record),
        "page": f"_generated/notebooks/{run.name}.html",
        "largest-probability": sure.tolist(),
        "layers": [
            {"layer": layer, "output": layer == layers[-1]}
            | curves(wide.loc[layer], given["num_samples"] if layer == layers[-1] else 1)
            for layer in layers
        ],
    }


def curves(data: pd.DataFrame, at_one: int) -> Columns:
    """The lines of a layer: as `figures.figure_1` draws them, and the bound of I.

    Args:
        data: The layer's quantities by epoch.
        at_one: N, where √V₁ is to be shown for a single label, too; else 1.

    Returns:
        A value per epoch, None for a gap. Without those of V₂ where it is 0 throughout.
    """
    lines = {
        "fisher": data.I,
        "fisher-bound": data.I_upper,
        "sd-1": np.sqrt(data.V1),
        "sd-1-bound": np.sqrt(data.V1_upper),
        "sd-1-certified": np.sqrt(data.V1_certified),
        "log-ratio-1": figures.log_ratio(data.V1_upper, data.V1),
    }
    if at_one > 1:
        lines["sd-1-one-label"] = np.sqrt(data.V1 * at_one)
    if not figures.vanishes(data.V2):
        lines["sd-2"] = np.sqrt(data.V2)
        lines["sd-2-bound"] = np.sqrt(data.V2_upper)
        lines["log-ratio-2"] = figures.log_ratio(data.V2_upper, data.V2)
    found = {name: [x if np.isfinite(x) else None for x in line] for name, line in lines.items()}
    return {"epochs": data.index.tolist()} | found


def try_figure_1(shown: list[Run], runs: list[dict[str, Any]]) -> str:
    """What to try, and what one sees then; the numbers are counted in the runs shown.

    ``runs`` is what `figure_1` makes of each of them.
    """
    kinds = list(dict.fromkeys(run["experiment"] for run in runs))
    of_kind = {k: [run.values for run in shown if run.record["experiment"] == k] for k in kinds}
    counts = {kind: figures.count_below(tables) for kind, tables in of_kind.items()}
    less = ", ".join(f"{a} of {b} times with {kind}" for kind, (a, b) in counts.items())
    outputs = [run["layers"][-1] for run in runs]
    exact = sum("sd-2" not in layer for layer in outputs)
    pairs = [(layer.get("sd-1-one-label", layer["sd-1"]), layer["fisher"]) for layer in outputs]
    noisy = np.concatenate([np.greater(sd, information) for sd, information in pairs])
    first = [run for run in runs if run["experiment"] == kinds[0]]
    least, most = (choose(first, key=last_information) for choose in (min, max))
    return f"""\
* **Switch the activation** and compare blue and vermilion in the hidden layers. Over all seeds,
  layers and epochs $\\mathcal{{V}}_1$ is the smaller one {less}.
* **Go to the output layer.** In {exact} of {len(runs)} runs there is no vermilion line: the logits
  are linear in its parameters, so $\\hat I_2$ is exact. The dash-dotted line is $\\hat I_1$ with a
  single label; its standard deviation exceeds the estimated value in {noisy.sum()} of {len(noisy)}
  epochs.
* **Change the seed**, and with it the weights and the test image ({kinds[0]}). After the last epoch
  $I$ in the first layer is {power(last_information(least))} with seed {least["seed"]}, where the
  largest probability is {least["largest-probability"][-1]:.4f}, and {power(last_information(most))}
  with seed {most["seed"]}, where it is {most["largest-probability"][-1]:.4f}: information vanishes
  where the network is confident.
"""


def last_information(run: dict[str, Any]) -> float:
    """The Fisher information in the first layer after the last epoch."""
    return float(run["layers"][0]["fisher"][-1])


def power(value: float) -> str:
    r"""A number in scientific notation, for a page.

    >>> print(power(0.00123))
    $1.2 \cdot 10^{-3}$
    """
    digits, exponent = f"{value:.1e}".split("e")
    return rf"${digits} \cdot 10^{{{int(exponent)}}}$"
