"""The quantities that decide the paper's claims: one number per case, from the runs' values.

A row of `QUANTITIES` names the columns that a quantity reads, says in words what its number is, and
computes it. ``{}`` in a name stands for each argument that the claim gives. A quantity of layers
gets a table with the index (run, epoch, layer), one of the network with the index (run, epoch).
Parameters of the record may be read like columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

Numbers = pd.Series  # one per case, by what tells the cases apart
Rows = Any  # a table, or a column of it


class Quantity(NamedTuple):
    """What decides claims: a function of a table, and which columns that table has."""

    function: Callable[..., Numbers]
    names: tuple[str, ...]
    says: str  # what its number is
    of_layers: bool

    def reads(self, arguments: Iterable[str]) -> tuple[str, ...]:
        """The columns that it reads, given its arguments."""
        filled = [n.format(a) for n in self.names for a in (arguments if "{}" in n else [""])]
        return tuple(dict.fromkeys(filled))


def layers(reads: str, says: str, function: Callable[..., Numbers]) -> Quantity:
    """A row for a quantity of layers."""
    return Quantity(function, tuple(reads.split()), says, of_layers=True)


def network(reads: str, says: str, function: Callable[..., Numbers]) -> Quantity:
    """A row for a quantity of the network."""
    return Quantity(function, tuple(reads.split()), says, of_layers=False)


# Parts of tables.


def output(t: Rows) -> Rows:
    """The rows of the last layer of every network."""
    return t[is_output(t)]


def hidden(t: Rows) -> Rows:
    """The rows of all other layers."""
    return t[~is_output(t)]


def is_output(t: Rows) -> Rows:
    """Which rows are of the last layer."""
    layer = t.index.get_level_values("layer").to_series(t.index)
    return layer == layer.groupby("run").transform("max")


def at(x: Rows, epoch: str) -> Rows:
    """The rows of an epoch, or of the last one."""
    epochs = x.index.get_level_values("epoch")
    return x[epochs == (epochs.max() if epoch == "last" else int(epoch))].droplevel("epoch")


def positive(x: pd.Series[float]) -> pd.Series[float]:
    """A gap in place of what is not positive."""
    return x.where(x > 0)


def log(x: pd.Series[float]) -> pd.Series[float]:
    """log₁₀, a gap where there is none."""
    return positive(x).map(math.log10, na_action="ignore")


def median(x: pd.Series[float]) -> pd.Series[float]:
    """The median over the epochs, by layer."""
    return x.groupby(["run", "layer"]).median()


def largest(x: pd.Series[float], *by: str) -> pd.Series[float]:
    """The largest number of a run, or also by what else is named."""
    return x.groupby(["run", *by]).max()


def at_start(t: pd.DataFrame, name: str) -> pd.Series[float]:
    """A column at random weights, with gaps where it is not positive."""
    return positive(at(t, "0")[name])


def of_activation(t: pd.DataFrame, activation: str) -> pd.DataFrame:
    """The rows of an activation, which names the run, with the pre-activation as index."""
    own = t[t.index.get_level_values("run").str.endswith(f", {activation}")]
    return own.set_index(own.s.rename("pre-activation"))


def of_peak(t: pd.DataFrame, activation: str) -> pd.Series[float]:
    """V₂ of an activation over its largest value at any pre-activation."""
    own = of_activation(t, activation)
    return own.V2 / float(own.V2.max())


def v2_over_v1(t: pd.DataFrame, activation: str) -> pd.Series[float]:
    """V₂/V₁ of an activation."""
    own = of_activation(t, activation)
    return own.V2 / positive(own.V1)


def at_zero(x: Rows) -> Rows:
    """The numbers at the pre-activation 0."""
    return x[x.index == 0]


def saturated(x: Rows) -> Rows:
    """The numbers at the largest pre-activations of either sign."""
    return x[np.abs(x.index) == np.abs(x.index).max()]


def of_case(t: pd.DataFrame, pattern: str) -> pd.DataFrame:
    """The rows of the cases whose name has the pattern."""
    return t[t.index.get_level_values("run").str.contains(pattern)]


def shapes(x: pd.Series[float]) -> pd.Series[float]:
    """Curves over the epochs in decades, less their mean."""
    curves = log(x)
    return curves - curves.groupby(["run", "layer"]).transform("mean")


def differences(curves: pd.DataFrame, by: str) -> pd.Series[float]:
    """Root mean square over the epochs of the difference of two columns; median over the pairs."""
    levels = [level for level in curves.index.names if level != "epoch"]
    pairs = [
        ((curves[a] - curves[b]) ** 2).groupby(levels).mean() ** 0.5
        for a, b in itertools.combinations(curves.columns, 2)
    ]
    return pd.concat(pairs).dropna().groupby(by).median() if pairs else pd.Series(dtype=float)


def apart(t: Rows, of: list[str]) -> Rows:
    """Observed over predicted size of Î₁ − Î₂, over the hidden layers' parameters."""
    h = hidden(t)
    observed = (h.parameters * h.I1_minus_I2_squared).groupby(of).sum()
    predicted = (h.parameters * (h.V1 + h.V2 - 2 * h.C12)).groupby(of).sum()
    return (observed / positive(predicted)) ** 0.5


SETTINGS = ("run", "weights", "dropout", "optimizer", "widths")  # in the names of networks
READINGS = {  # of "UB is k times V", by the column that has it
    "over_means": "ratio of means",
    "over_geometric": "exponential of the mean log-ratio",
    "over_mean": "mean of ratios",
}
NUMBERS_OF_LABELS = (1, 10, 100, 1_000, 10_000)
LEARNT = 0.5  # test accuracy after the last epoch


def settings(x: Rows) -> Rows:
    """The settings in a network's name, as levels of the index in place of the run."""
    index = x.index.to_frame(index=False)
    parts = index.pop("run").str.split(", ", expand=True).reindex(columns=range(len(SETTINGS)))
    parts.columns = list(SETTINGS)
    return x.set_axis(pd.MultiIndex.from_frame(pd.concat([parts, index], axis=1)))


def learnt(t: Rows) -> Rows:
    """The rows of networks that get at least half of the test set right after the last epoch."""
    accuracy = at(t, "last").test_accuracy.groupby("run").first()
    return t[t.index.get_level_values("run").isin(accuracy.index[accuracy >= LEARNT])]


# What takes more than a row of the table.


def tightness(t: Rows, name: str) -> Rows:
    """See the table."""
    rows = hidden(learnt(t))  # of all layers: V₁ has a number in the output layer, too
    readings = {
        says: settings(median(rows[f"{name}_{column}"]).dropna())
        for column, says in READINGS.items()
    }
    all_layers = pd.concat(readings, names=["reading"])
    first = all_layers[all_layers.index.get_level_values("layer") == 1]
    return pd.concat({"hidden layers": all_layers, "first layer": first}, names=["layers"])


def nearest_setting(t: Rows) -> Rows:
    """See the table."""
    by = ["layers", "reading", "weights", "optimizer", "widths"]
    off = [
        log(tightness(t, name).groupby(level=by).median() / said).abs()
        for name, said in (("V1", 50), ("V2", 20))
    ]
    both = pd.concat(off, axis=1).max(axis=1, skipna=False)
    return (10**both).nsmallest(1)


def relative_error(t: pd.DataFrame, name: str) -> pd.Series[float]:
    """See the table."""
    return median((positive(t[name]) * t.num_samples / positive(t.I_squared)) ** 0.5)


def over_n(t: Rows) -> Rows:
    """See the table."""
    last = output(t)
    at_1 = (last.V1 * last.num_samples) ** 0.5
    yardsticks = {"means": positive(last.I), "norms": positive(last.I_squared) ** 0.5}
    parts = {
        (reading, f"N = {n:,}"): (at_1 / size).dropna().groupby("run").median() / n**0.5
        for reading, size in yardsticks.items()
        for n in NUMBERS_OF_LABELS
    }
    return pd.concat(parts, names=["reading", "N"])


def upper_against_lower(t: pd.DataFrame) -> pd.Series[float]:
    """See the table."""
    ratios = {}
    for name in ("V1", "V2"):
        value, lower = positive(t[name]), t[f"{name}_lower"]
        ratio = log(t[f"{name}_upper"] / value) / log(value / lower.where(lower > 0))
        ratios[name] = ratio.mask(value.notna() & (lower <= 0), 0.0)
    return pd.Series(pd.DataFrame(ratios).groupby("run").max().stack())


def early_over_late(t: pd.DataFrame, name: str) -> pd.Series[float]:
    """See the table."""
    steps = log(t[name]).groupby(["run", "layer"]).diff().abs()
    early = steps.index.get_level_values("epoch") <= 5
    sooner, later = (steps[part].groupby(["run", "layer"]).mean() for part in (early, ~early))
    return sooner / positive(later)


def layers_each_wins(t: pd.DataFrame) -> pd.Series[float]:
    """See the table."""
    first = median((t.V1 < t.V2).astype(float)) > 0.5
    second = median((t.V2 < t.V1).astype(float)) > 0.5
    return pd.DataFrame({"1": first, "2": second}).groupby("run").sum().min(axis=1)


def shape_over_seeds(t: pd.DataFrame, *names: str) -> pd.Series[float]:
    """See the table."""
    parts = {n: differences(shapes(t[n]).unstack("run"), "layer") for n in names}
    return pd.concat(parts, names=["quantity"])


def shape_over_activations(t: pd.DataFrame, name: str) -> pd.Series[float]:
    """See the table."""
    runs = t.index.get_level_values("run").str.rpartition(", ").get_level_values(2)
    split = runs.str.partition("-")
    keys = {"activation": split.get_level_values(0), "network": split.get_level_values(2)}
    curves = shapes(t[name]).to_frame("value").assign(**keys).droplevel("run")
    wide = pd.DataFrame(curves.set_index(list(keys), append=True).value.unstack("activation"))
    return differences(wide, "network")


def share_that_fades(t: Rows) -> Rows:
    """See the table."""
    values = learnt(t)[["I", "V1", "V2"]]
    ratios = pd.Series((at(values, "5") / positive(at(values, "0"))).stack()).dropna()
    return settings((ratios <= 0.1).astype(float).groupby("run").mean())


def cost_exponent(t: pd.DataFrame, work: str) -> pd.Series[float]:
    """See the table."""
    logs = t[(t > 0).all(axis=1)].map(math.log)
    deep = logs.index.get_level_values("run").str.contains("^", regex=False)
    slopes = {}
    for kind, own in (("wider", logs[~deep]), ("deeper", logs[deep])):
        large = own[own.parameters >= own.parameters.median()]
        if large.parameters.nunique() > 1:
            slopes[kind] = np.polyfit(large.parameters, large[f"{work}_numbers"], 1)[0]
    return pd.Series(slopes).rename_axis("networks")


def of_learnt(t: pd.DataFrame, q: str) -> pd.DataFrame:
    """The rows of the cases in which the network learnt from such labels, by what is known of q."""
    return of_case(t, {"known": "noisy labels, known q", "observed": ", (?:train|test)$"}[q])


def angles(t: Rows) -> Rows:
    """Angles in place of cosines."""
    return np.arccos(t.cosine.clip(-1, 1)).to_frame("angle")


def end_over_start(t: Rows, name: str) -> Rows:
    """A column after the last epoch over that at random weights."""
    return at(t, "last")[name] / at_start(t, name)


def fades_at_the_end(t: Rows, name: str) -> Rows:
    """See the table."""
    readings = {"the term": name, "its moments alone": f"{name}_moments"}
    parts: dict[str, pd.Series[float]] = {k: end_over_start(t, v) for k, v in readings.items()}
    return pd.concat(parts, names=["reading"])


# fmt: off
QUANTITIES = {
    # Statements, each tried on many cases.
    "contradicted": network("{}_violations",
        "Cases that contradict the statement beyond rounding, by check.",
        lambda t, *_: t.iloc[0]),
    "shown": network("{}_worst",
        "The number that decides it, see the list of all checks.",
        lambda t, *_: t.iloc[0]),
    # The MNIST experiment and the sweep.
    "negative": layers("{}_negative",
        "Negative estimates in a run, over all parameters and epochs.",
        lambda t, n: t[f"{n}_negative"].groupby("run").sum()),
    "violations": layers("I_violations V1_violations V2_violations",
        "Bounds of I, V₁ or V₂ that do not hold, over all parameters, epochs and inputs of a run.",
        lambda t: t.sum(axis=1).groupby("run").sum()),
    "last_layer": layers("{}",
        "Its largest value in the last layer of a run.",
        lambda t, n: largest(output(t)[n])),
    "upper_over": layers("{} {}_upper",
        "Upper bound over variance of a hidden layer's means, median over the epochs.",
        lambda t, n: median(hidden(t)[f"{n}_upper"] / positive(t[n]))),
    "tightness": layers("{}_over_means {}_over_geometric {}_over_mean V1_over_means test_accuracy",
        "Upper bound over variance in a hidden layer by three readings, median over the epochs.",
        tightness),
    "nearest_setting": layers(
        "V1_over_means V1_over_geometric V1_over_mean V2_over_means V2_over_geometric V2_over_mean "
        "test_accuracy",
        "The factor by which the nearest setting misses 50 or 20, whichever it misses more.",
        nearest_setting),
    "lower_over": layers("{} {}_lower",
        "The largest lower bound over variance of a layer's means in a run.",
        lambda t, n: largest(t[f"{n}_lower"] / positive(t[n]))),
    "tightness_ratio": layers("V1 V1_upper V2 V2_upper",
        "UB/V₂ over UB/V₁ of a hidden layer's means, median over the epochs.",
        lambda t: median((hidden(t).V2_upper / positive(t.V2)) / (t.V1_upper / positive(t.V1)))),
    "upper_against_lower": layers("V1 V1_lower V1_upper V2 V2_lower V2_upper",
        "log(UB/V) over log(V/LB) of a layer's means, largest in a run; 0 where LB is 0.",
        upper_against_lower),
    "orders_of_magnitude": layers("{} {}_upper",
        "|log₁₀(UB/V)| of a layer's means, largest in a run.",
        lambda t, n: largest(log(t[f"{n}_upper"] / positive(t[n])).abs())),
    "v1_over_v2": layers("V1 V2",
        "V₁/V₂ of a hidden layer's means at an epoch.",
        lambda t: hidden(t).V1 / positive(hidden(t).V2)),
    "v1_over_v2_by_setting": layers("V1 V2 test_accuracy",
        "V₁/V₂ of a hidden layer's means at an epoch, in networks that differ in their settings.",
        lambda t: settings(hidden(learnt(t)).V1 / positive(hidden(learnt(t)).V2))),
    "last_over_hidden": layers("{}",
        "Its mean in the last layer over the largest mean of another layer, at an epoch.",
        lambda t, n: output(t)[n].droplevel("layer") / positive(largest(hidden(t)[n], "epoch"))),
    "relative_error_over_n": layers("I I_squared V1 num_samples",
        "√V₁/I of the last layer's means, and √(ΣV₁/ΣI²), with N labels, median over the epochs.",
        over_n),
    "relative_error": layers("{} I_squared num_samples",
        "√(ΣV/ΣI²) over a layer, with one label, median over the epochs.",
        relative_error),
    "relative_error_hidden": layers("{} I_squared num_samples",
        "√(ΣV/ΣI²) over a hidden layer, with one label, median over the epochs.",
        lambda t, n: relative_error(hidden(t), n)),
    "relative_error_at_n": layers("{} I_squared",
        "√(ΣV/ΣI²) over a layer, with the N labels of the run, median over the epochs.",
        lambda t, n: median((positive(t[n]) / positive(t.I_squared)) ** 0.5)),
    "layers_each_wins": layers("V1 V2",
        "Layers in which the estimator that is less often the better one wins, in a run.",
        layers_each_wins),
    "early_over_late": layers("{}",
        "Mean |Δ log V| of an epoch from 1 to 5 over that of the later ones, by layer.",
        early_over_late),
    "fades": layers("{} test_accuracy",
        "A layer's mean after epoch 5 over that at random weights.",
        lambda t, n: settings(at(learnt(t), "5")[n] / at_start(learnt(t), n))),
    "stays_faded": layers("{} test_accuracy",
        "A layer's largest mean from epoch 5 on over that at random weights.",
        lambda t, n: settings(largest(learnt(t[t.index.get_level_values("epoch") >= 5])[n], "layer")
        / at_start(learnt(t), n))),
    "falls_from_its_peak": layers("{} test_accuracy",
        "A layer's mean after the last epoch over its largest mean at any epoch.",
        lambda t, n: settings(at(learnt(t), "last")[n] / positive(largest(learnt(t)[n], "layer")))),
    "share_that_fades": layers("I V1 V2 test_accuracy",
        "Share of layers and of I, V₁, V₂ that fall to 0.1 of their start by epoch 5, in a run.",
        share_that_fades),
    "estimates_apart": layers("I I1 I2",
        "|Î₁ − Î₂|/I of a hidden layer's means, median over the epochs.",
        lambda t: median((hidden(t).I1 - hidden(t).I2).abs() / positive(hidden(t).I))),
    "apart_over_predicted": layers("parameters I1_minus_I2_squared V1 V2 C12",
        "Root mean square of Î₁ − Î₂ over √(V₁ + V₂ − 2C₁₂), hidden layers, at an epoch.",
        lambda t: apart(t, ["run", "epoch"])),
    "apart_over_predicted_in_all": layers("parameters I1_minus_I2_squared V1 V2 C12",
        "Root mean square of Î₁ − Î₂ over √(V₁ + V₂ − 2C₁₂), hidden layers and all epochs.",
        lambda t: apart(t, ["run"])),
    "shape_over_seeds": layers("{}",
        "How far log₁₀ V, less its mean over the epochs, differs between two seeds, by layer.",
        shape_over_seeds),
    "shape_over_activations": layers("{}",
        "How far log₁₀ V, less its mean over the epochs, differs between two activations.",
        shape_over_activations),
    "first_minus_second": network("largest_probability sum_of_squares",
        "σ_max − (1 − ‖σ‖²) in a run, at random weights (0) or after the last epoch.",
        lambda t, epoch: at(t, epoch).largest_probability - (1 - at(t, epoch).sum_of_squares)),
    "largest_probability_at_start": network("largest_probability",
        "σ_max at random weights; one over the number of classes is 0.1.",
        lambda t: at(t, "0").largest_probability),
    "full_spectrum_over_4_1": network("sum_{}_upper_4_1 sum_{}_upper_c1",
        "Theorem C.1's bound over the sum of Theorem 4.1's, in a network.",
        lambda t, n: largest(t[f"sum_{n}_upper_c1"] / positive(t[f"sum_{n}_upper_4_1"]))),
    # Regression, and a neuron before the last layer.
    "worst": layers("{}",
        "Its largest value in a data set, over layers and epochs.",
        lambda t, n: largest(t[n])),
    "joint_over_its_bound": layers("joint_{} joint_{}_upper",
        "Joint variance over its bound by derivatives, of a layer's means, largest of all epochs.",
        lambda t, n: largest(t[f"joint_{n}"] / positive(t[f"joint_{n}_upper"]), "layer")),
    "v2_at_zero": network("s V2",
        "V₂ at the pre-activation 0 over its largest value at any.",
        lambda t, activation: at_zero(of_peak(t, activation))),
    "v2_saturated": network("s V2",
        "V₂ at the largest pre-activations of either sign over its largest value at any.",
        lambda t, activation: saturated(of_peak(t, activation))),
    "v2_over_v1_at_zero": network("s V1 V2",
        "V₂/V₁ at the pre-activation 0.",
        lambda t, activation: at_zero(v2_over_v1(t, activation))),
    "v2_over_v1_saturated": network("s V1 V2",
        "V₂/V₁ at the largest pre-activations of either sign.",
        lambda t, activation: saturated(v2_over_v1(t, activation))),
    "cost_exponent": network("parameters {}_numbers",
        "Slope of log cost against log dim θ, over the larger half of the networks of a kind.",
        cost_exponent),
    "full_spectrum_cost": network("sum_theorem_c_1_numbers sum_theorem_4_1_numbers",
        "Cost of Theorem C.1's bounds over that of the sum of Theorem 4.1's.",
        lambda t: t.sum_theorem_c_1_numbers / t.sum_theorem_4_1_numbers),
    # Random inputs, and the labels of the data.
    "draws": layers("draws_z_{}",
        "Observed minus predicted variance of the joint estimators, in standard errors.",
        lambda t, *_: t.stack()),
    "fades_at_the_end": layers("{} {}_moments",
        "A mean after the last epoch over that at random weights: V₁, V₁/‖J‖⁴; V₂, V₂/‖S‖².",
        fades_at_the_end),
    "output_over_input": layers("{} var_I",
        "Output over input term of Eq. 20 after the last epoch, one label per input, by layer.",
        lambda t, n: at(t, "last")[n] / positive(at(t, "last").var_I)),
    "input_variance_over_its_bound": layers("var_I lemma_4_8",
        "Var_x I over Lemma 4.8's bound, by layer and epoch.",
        lambda t: t.var_I / positive(t.lemma_4_8)),
    "distance_at_the_end": layers("distance",
        "‖Ĩ − I‖/‖I‖ of a layer after the last epoch.",
        lambda t: at(of_case(t, "true labels|unknown noise"), "last").distance),
    "distance_end_over_start": layers("distance",
        "‖Ĩ − I‖/‖I‖ of a layer after the last epoch over that at random weights.",
        lambda t, q: end_over_start(of_learnt(t, q), "distance")),
    "angle_end_over_start": layers("cosine",
        "Angle between a layer's Ĩ and I after the last epoch over that at random weights.",
        lambda t, q: end_over_start(angles(of_learnt(t, q)), "angle")),
    "crossing_labels": layers("crossing_labels_{}",
        "Labels per image from which on the estimator of the FIM beats Ĩ, after the last epoch.",
        lambda t, estimator: at(t, "last")[f"crossing_labels_{estimator}"]),
}
