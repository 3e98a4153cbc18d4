"""The paper's checkable claims, and what decides them: one number per case, from the runs' values.

``data/claims.csv`` has a row per claim: where it stands, the experiments that decide it, the
quantity (a function below), and between which numbers a case must be. A quantity sees nothing but
what it says that it reads, so that a changed value touches the claims that depend on it and no
others.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from support import results
from support.results import NETWORK, Run

CLAIMS = results.ROOT / "data" / "claims.csv"
YES, PARTLY, NO = "reproduced", "in part", "not reproduced"
UNDECIDABLE, UNJUDGED = "not decidable", "not judged"
VERDICTS = (YES, PARTLY, NO, UNDECIDABLE, UNJUDGED)

Cells = pd.Series  # one number per case, by what tells the cases apart
Groups = Mapping[str, Mapping[str, Run]]  # the runs of each experiment, by name


class Claim(NamedTuple):
    """A row of ``claims.csv``."""

    id: str
    where: str  # in the paper
    claim: str
    whose: str  # "paper", or "ours": a question that the paper does not answer
    experiments: tuple[str, ...]
    quantity: str  # a key of QUANTITIES; empty: not decidable
    arguments: tuple[str, ...]
    low: float
    high: float
    set: str  # "before" or "after": whether such runs had been looked at
    note: str


class Quantity(NamedTuple):
    """What decides claims: a function of a table, and which columns that table has."""

    function: Callable[..., pd.Series]
    names: tuple[str, ...]
    of_layers: bool

    def reads(self, arguments: Iterable[str]) -> tuple[str, ...]:
        """The quantities that it reads, given its arguments."""
        filled = [n.format(a) for n in self.names for a in (arguments if "{}" in n else [""])]
        return tuple(dict.fromkeys(filled))

    @property
    def says(self) -> str:
        """What its number is, in words."""
        return " ".join((self.function.__doc__ or "").split())


class Decision(NamedTuple):
    """A claim with its numbers and the verdict."""

    claim: Claim
    cells: pd.Series
    verdict: str
    reason: str = ""  # why there is none, or why it cannot be judged

    @property
    def within(self) -> int:
        """How many cases are within the tolerance."""
        return int(self.cells.between(self.claim.low, self.claim.high).sum())


QUANTITIES: dict[str, Quantity] = {}


def reads(
    *names: str, of_layers: bool = True
) -> Callable[[Callable[..., Cells]], Callable[..., Cells]]:
    """Say which quantities a function reads; ``{}`` in a name stands for each of its arguments.

    A function of layers gets a table with the index (run, epoch, layer), one of the network with
    the index (run, epoch). Parameters of the record may be read like quantities.
    """

    def register(function: Callable[..., Cells]) -> Callable[..., Cells]:
        QUANTITIES[function.__name__] = Quantity(function, names, of_layers)
        return function

    return register


def load(path: Path = CLAIMS) -> list[Claim]:
    """The claims, in the paper's order.

    Raises:
        ValueError: a row names a quantity that there is not, or a tolerance that is none.
    """
    with path.open(newline="", encoding="utf-8") as file:
        return [read(row, path) for row in csv.DictReader(file)]


def read(row: Mapping[str, str], path: Path) -> Claim:
    """A row of ``claims.csv``."""
    quantity, _, arguments = row["quantity"].partition(":")
    try:
        low, high = float(row["low"] or "-inf"), float(row["high"] or "inf")
        known = not quantity or quantity in QUANTITIES
        told = row["whose"] in ("paper", "ours") and bool(quantity) == bool(row["experiment"])
        if not (known and told and low <= high):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{path.name}, claim {row['id']!r}: whose is paper or ours; low, high are numbers or "
            "empty, low ≤ high; the quantity is empty, and then so is the experiment, or one of "
            f"{', '.join(QUANTITIES)}."
        ) from None
    experiments = tuple(filter(None, row["experiment"].split(", ")))
    return Claim(
        row["id"], row["where"], row["claim"], row["whose"], experiments, quantity,
        tuple(arguments.split()), low, high, row["set"], row["note"],
    )  # fmt: skip


def decide(
    groups: Groups, wanted: Mapping[str, Iterable[str]], path: Path = CLAIMS
) -> list[Decision]:
    """Decide every claim by the runs that are there.

    Args:
        groups: The runs of each experiment that were found.
        wanted: The names of the runs that each experiment consists of.
        path: The table of claims.

    Raises:
        ValueError: the table of claims or that of a run is damaged.
    """
    values = {name: run.values for group in groups.values() for name, run in group.items()}
    return [decide_one(claim, groups, wanted, values) for claim in load(path)]


def decide_one(
    claim: Claim,
    groups: Groups,
    wanted: Mapping[str, Iterable[str]],
    values: Mapping[str, pd.DataFrame],
) -> Decision:
    """Decide a claim; see ``decide``."""
    if not claim.quantity:
        return Decision(claim, pd.Series(dtype=float), UNDECIDABLE)
    found = {e: groups[e] for e in claim.experiments if groups.get(e)}
    parts = {e: cells(claim, group, values) for e, group in found.items()}
    numbers = pd.concat(parts.values()) if parts else pd.Series(dtype=float)
    there = {name for group in found.values() for name in group}
    missing = [n for e in claim.experiments for n in wanted.get(e, [e]) if n not in there]
    if missing:
        return Decision(claim, numbers, UNJUDGED, f"runs missing: {len(missing)}")
    if not all(run.counts for group in found.values() for run in group.values()):
        return Decision(claim, numbers, UNJUDGED, "its runs do not count")
    if numbers.empty:
        return Decision(claim, numbers, UNDECIDABLE, "no such number exists in these runs")
    return Decision(claim, numbers, verdict(claim, numbers))


def verdict(claim: Claim, numbers: pd.Series) -> str:
    """Reproduced if every number is within the tolerance, in part if at least half of them are."""
    share = numbers.between(claim.low, claim.high).mean()
    return YES if share == 1 else PARTLY if share >= 0.5 else NO


def cells(
    claim: Claim, group: Mapping[str, Run], values: Mapping[str, pd.DataFrame]
) -> pd.Series[float]:
    """A claim's numbers in the runs of one experiment; those that do not exist are left out."""
    quantity = QUANTITIES[claim.quantity]
    names = quantity.reads(claim.arguments)
    tables = [table(run, values[name], names, quantity.of_layers) for name, run in group.items()]
    numbers = quantity.function(pd.concat(tables).sort_index(), *claim.arguments)
    return numbers.dropna().astype(float)


def table(run: Run, values: pd.DataFrame, names: Iterable[str], of_layers: bool) -> pd.DataFrame:
    """Some quantities of a run, a column each; what else there is stays out of sight.

    Raises:
        ValueError: the run has no such quantity.
    """
    rows = values[values.quantity.isin(list(names)) & ((values.layer != NETWORK) == of_layers)]
    same = rows.run.eq(run.name)
    rows = rows.assign(run=rows.run.where(same, f"{run.name}, " + rows.run))
    index = ["run", "epoch", "layer"] if of_layers else ["run", "epoch"]
    wide = rows.astype({"layer": int} if of_layers else {}).pivot(
        index=index, columns="quantity", values="value"
    )
    for name in names:
        if name not in wide:
            if name not in run.record["parameters"]:
                raise ValueError(
                    f"{run.folder / 'values.csv'} is not whole, it has no {name}: make that run "
                    "again."
                )
            wide[name] = run.record["parameters"][name]
    return wide


# Parts of tables.


def output(t: pd.DataFrame) -> pd.DataFrame:
    """The rows of the last layer of every network."""
    return t[is_output(t)]


def hidden(t: pd.DataFrame) -> pd.DataFrame:
    """The rows of all other layers."""
    return t[~is_output(t)]


def is_output(t: pd.DataFrame) -> pd.Series[bool]:
    """Which rows are of the last layer."""
    layer = t.index.get_level_values("layer").to_series(t.index)
    return layer == layer.groupby("run").transform("max")


def at(x: pd.DataFrame, epoch: str) -> pd.DataFrame:
    """The rows of an epoch, or of the last one."""
    epochs = x.index.get_level_values("epoch")
    return x[epochs == (epochs.max() if epoch == "last" else int(epoch))].droplevel("epoch")


def positive(x: pd.Series[float]) -> pd.Series[float]:
    """A gap in place of what is not positive."""
    return x.where(x > 0)


def log(x: pd.Series[float]) -> pd.Series[float]:
    """log₁₀, a gap where there is none."""
    return positive(x).map(math.log10, na_action="ignore")


def by_layer(x: pd.Series[float]) -> pd.Series[float]:
    """The median over the epochs."""
    return x.groupby(["run", "layer"]).median()


# Statements, each tried on many cases.


@reads("{}_violations", of_layers=False)
def contradicted(t: pd.DataFrame, *_names: str) -> pd.Series[float]:
    """Cases that contradict the statement beyond rounding, by check."""
    return t.iloc[0]


@reads("{}_worst", of_layers=False)
def shown(t: pd.DataFrame, _name: str) -> pd.Series[float]:
    """The number that decides it, see the list of all checks."""
    return t.iloc[0]


# The MNIST experiment and the sweep.


@reads("{}_negative")
def negative(t: pd.DataFrame, estimate: str) -> pd.Series[float]:
    """Negative estimates in a run, over all parameters and epochs."""
    return t[f"{estimate}_negative"].groupby("run").sum()


@reads("I_violations", "V1_violations", "V2_violations")
def violations(t: pd.DataFrame) -> pd.Series[float]:
    """Bounds of I, V₁ or V₂ that do not hold, over all parameters, epochs and inputs of a run."""
    return t.sum(axis=1).groupby("run").sum()


@reads("{}")
def last_layer(t: pd.DataFrame, name: str) -> pd.Series[float]:
    """Its largest value in the last layer of a run."""
    return output(t)[name].groupby("run").max()


@reads("{}", "{}_upper")
def upper_over(t: pd.DataFrame, name: str) -> pd.Series[float]:
    """Upper bound over variance of a hidden layer's means, median over the epochs."""
    h = hidden(t)
    return by_layer(h[f"{name}_upper"] / positive(h[name]))


@reads("{}", "{}_lower")
def lower_over(t: pd.DataFrame, name: str) -> pd.Series[float]:
    """The largest lower bound over variance of a layer's means in a run."""
    return (t[f"{name}_lower"] / positive(t[name])).groupby("run").max()


@reads("V1", "V1_upper", "V2", "V2_upper")
def tightness_ratio(t: pd.DataFrame) -> pd.Series[float]:
    """UB/V₂ over UB/V₁ of a hidden layer's means, median over the epochs."""
    h = hidden(t)
    return by_layer((h.V2_upper / positive(h.V2)) / (h.V1_upper / positive(h.V1)))


@reads("V1", "V1_lower", "V1_upper", "V2", "V2_lower", "V2_upper")
def upper_against_lower(t: pd.DataFrame) -> pd.Series[float]:
    """log(UB/V) over log(V/LB) of a layer's means, largest in a run; 0 where LB is 0."""
    ratios = {}
    for name in ("V1", "V2"):
        value, lower = positive(t[name]), t[f"{name}_lower"]
        ratio = log(t[f"{name}_upper"] / value) / log(value / lower.where(lower > 0))
        ratios[name] = ratio.mask(value.notna() & (lower <= 0), 0.0)
    return pd.Series(pd.DataFrame(ratios).groupby("run").max().stack())


@reads("{}", "{}_upper")
def orders_of_magnitude(t: pd.DataFrame, name: str) -> pd.Series[float]:
    """|log₁₀(UB/V)| of a layer's means, largest in a run."""
    return log(t[f"{name}_upper"] / positive(t[name])).abs().groupby("run").max()


@reads("V1", "V2")
def v1_over_v2(t: pd.DataFrame) -> pd.Series[float]:
    """V₁/V₂ of a hidden layer's means at an epoch."""
    h = hidden(t)
    return h.V1 / positive(h.V2)


@reads("{}")
def last_over_hidden(t: pd.DataFrame, name: str) -> pd.Series[float]:
    """Its mean in the last layer over the largest mean of another layer, at an epoch."""
    largest = hidden(t)[name].groupby(["run", "epoch"]).max()
    return output(t)[name].droplevel("layer") / positive(largest)


@reads("I", "V1")
def root_v1_over_i(t: pd.DataFrame) -> pd.Series[float]:
    """√V₁/I of the last layer's means at the N of the run, median over the epochs."""
    o = output(t)
    return (o.V1**0.5 / positive(o.I)).groupby("run").median()


@reads("I", "V1", "num_samples")
def root_v1_over_i_at_1(t: pd.DataFrame) -> pd.Series[float]:
    """√V₁/I of the last layer's means at N = 1, median over the epochs."""
    o = output(t)
    return ((o.V1 * o.num_samples) ** 0.5 / positive(o.I)).groupby("run").median()


@reads("{}", "I", "num_samples")
def root_variance_over_i(t: pd.DataFrame, name: str) -> pd.Series[float]:
    """√V/I of a layer's means at N = 1, median over the epochs."""
    return by_layer((positive(t[name]) * t.num_samples) ** 0.5 / positive(t.I))


@reads("{}", "I")
def root_variance_over_i_at_n(t: pd.DataFrame, name: str) -> pd.Series[float]:
    """√V/I of a layer's means at the N of the run, median over the epochs."""
    return by_layer(positive(t[name]) ** 0.5 / positive(t.I))


@reads("V1", "V2")
def layers_each_wins(t: pd.DataFrame) -> pd.Series[float]:
    """Layers in which the estimator that is less often the better one wins, in a run."""
    first = by_layer((t.V1 < t.V2).astype(float)) > 0.5
    second = by_layer((t.V2 < t.V1).astype(float)) > 0.5
    return pd.DataFrame({"1": first, "2": second}).groupby("run").sum().min(axis=1)


@reads("{}")
def early_over_late(t: pd.DataFrame, name: str) -> pd.Series[float]:
    """Mean |Δ log V| of an epoch from 1 to 5 over that of the later ones, by layer."""
    steps = log(t[name]).groupby(["run", "layer"]).diff().abs()
    early = steps.index.get_level_values("epoch") <= 5
    return steps[early].groupby(["run", "layer"]).mean() / positive(
        steps[~early].groupby(["run", "layer"]).mean()
    )


@reads("{}")
def fades(t: pd.DataFrame, name: str) -> pd.Series[float]:
    """A layer's mean after epoch 5 over that at random weights."""
    return at(t, "5")[name] / positive(at(t, "0")[name])


@reads("{}")
def stays_faded(t: pd.DataFrame, name: str) -> pd.Series[float]:
    """A layer's largest mean from epoch 5 on over that at random weights."""
    later = t[t.index.get_level_values("epoch") >= 5]
    return later[name].groupby(["run", "layer"]).max() / positive(at(t, "0")[name])


@reads("{}")
def falls_from_its_peak(t: pd.DataFrame, name: str) -> pd.Series[float]:
    """A layer's mean after the last epoch over its largest mean at any epoch."""
    return at(t, "last")[name] / positive(t[name].groupby(["run", "layer"]).max())


@reads("I", "V1", "V2")
def share_that_fades(t: pd.DataFrame) -> pd.Series[float]:
    """Share of layers and of I, V₁, V₂ that fall to 0.1 of their start by epoch 5, in a run."""
    ratios = pd.Series((at(t, "5") / at(t, "0").where(at(t, "0") > 0)).stack()).dropna()
    return (ratios <= 0.1).astype(float).groupby("run").mean()


@reads("I", "I1", "I2")
def estimates_apart(t: pd.DataFrame) -> pd.Series[float]:
    """|Î₁ − Î₂|/I of a hidden layer's means, median over the epochs."""
    h = hidden(t)
    return by_layer((h.I1 - h.I2).abs() / positive(h.I))


@reads("parameters", "I1_minus_I2_squared", "V1", "V2", "C12")
def apart_over_predicted(t: pd.DataFrame) -> pd.Series[float]:
    """Root mean square of Î₁ − Î₂ over √(V₁ + V₂ − 2C₁₂), hidden layers, at an epoch."""
    return apart(t, ["run", "epoch"])


@reads("parameters", "I1_minus_I2_squared", "V1", "V2", "C12")
def apart_over_predicted_in_all(t: pd.DataFrame) -> pd.Series[float]:
    """Root mean square of Î₁ − Î₂ over √(V₁ + V₂ − 2C₁₂), hidden layers and all epochs."""
    return apart(t, ["run"])


def apart(t: pd.DataFrame, of: list[str]) -> pd.Series[float]:
    """Observed over predicted size of Î₁ − Î₂, over the hidden layers' parameters."""
    h = hidden(t)
    observed = (h.parameters * h.I1_minus_I2_squared).groupby(of).sum()
    predicted = (h.parameters * (h.V1 + h.V2 - 2 * h.C12)).groupby(of).sum()
    return (observed / positive(predicted)) ** 0.5


@reads("{}")
def shape_over_seeds(t: pd.DataFrame, *names: str) -> pd.Series[float]:
    """How far log₁₀ V, less its mean over the epochs, differs between two seeds, by layer."""
    parts = {n: differences(shapes(t[n]).unstack("run"), "layer") for n in names}
    return pd.concat(parts, names=["quantity"])


@reads("{}")
def shape_over_activations(t: pd.DataFrame, name: str) -> pd.Series[float]:
    """How far log₁₀ V, less its mean over the epochs, differs between two activations."""
    runs = t.index.get_level_values("run").str.rpartition(", ").get_level_values(2)
    split = runs.str.partition("-")
    keys = {"activation": split.get_level_values(0), "network": split.get_level_values(2)}
    curves = shapes(t[name]).to_frame("value").assign(**keys).droplevel("run")
    wide = pd.DataFrame(curves.set_index(list(keys), append=True).value.unstack("activation"))
    return differences(wide, "network")


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


@reads("largest_probability", "sum_of_squares", of_layers=False)
def first_minus_second(t: pd.DataFrame, epoch: str) -> pd.Series[float]:
    """σ_max − (1 − ‖σ‖²) in a run, at random weights (0) or after the last epoch."""
    now = at(t, epoch)
    return now.largest_probability - (1 - now.sum_of_squares)


@reads("largest_probability", of_layers=False)
def largest_probability_at_start(t: pd.DataFrame) -> pd.Series[float]:
    """σ_max at random weights; one over the number of classes is 0.1."""
    return at(t, "0").largest_probability


@reads("sum_{}_upper_4_1", "sum_{}_upper_c1", of_layers=False)
def full_spectrum_over_4_1(t: pd.DataFrame, name: str) -> pd.Series[float]:
    """Theorem C.1's bound over the sum of Theorem 4.1's, in a network."""
    ratio = t[f"sum_{name}_upper_c1"] / positive(t[f"sum_{name}_upper_4_1"])
    return ratio.groupby("run").max()


# Regression, and a neuron before the last layer.


@reads("{}")
def worst(t: pd.DataFrame, name: str) -> pd.Series[float]:
    """Its largest value in a data set, over layers and epochs."""
    return t[name].groupby("run").max()


@reads("joint_{}", "joint_{}_upper")
def joint_over_its_bound(t: pd.DataFrame, name: str) -> pd.Series[float]:
    """Joint variance over its bound by derivatives, of a layer's means, largest of all epochs."""
    ratio = t[f"joint_{name}"] / positive(t[f"joint_{name}_upper"])
    return ratio.groupby(["run", "layer"]).max()


@reads("s", "V2", of_layers=False)
def v2_at_zero(t: pd.DataFrame, activation: str) -> pd.Series[float]:
    """V₂ at the pre-activation 0 over its largest value at any."""
    own = of_activation(t, activation)
    return own.V2[own.s == 0] / float(own.V2.max())


@reads("s", "V2", of_layers=False)
def v2_saturated(t: pd.DataFrame, activation: str) -> pd.Series[float]:
    """V₂ at the largest pre-activations of either sign over its largest value at any."""
    own = of_activation(t, activation)
    return ends(own).V2 / float(own.V2.max())


@reads("s", "V1", "V2", of_layers=False)
def v2_over_v1_at_zero(t: pd.DataFrame, activation: str) -> pd.Series[float]:
    """V₂/V₁ at the pre-activation 0."""
    own = of_activation(t, activation)
    return (own.V2 / positive(own.V1))[own.s == 0]


@reads("s", "V1", "V2", of_layers=False)
def v2_over_v1_saturated(t: pd.DataFrame, activation: str) -> pd.Series[float]:
    """V₂/V₁ at the largest pre-activations of either sign."""
    own = ends(of_activation(t, activation))
    return own.V2 / positive(own.V1)


def of_activation(t: pd.DataFrame, activation: str) -> pd.DataFrame:
    """The rows of an activation, which names the run, with the pre-activation as index."""
    own = t[t.index.get_level_values("run").str.endswith(f", {activation}")]
    return own.set_index(own.s.rename("pre-activation"))


def ends(own: pd.DataFrame) -> pd.DataFrame:
    """The rows of the largest pre-activations of either sign."""
    return own.iloc[np.flatnonzero(own.s.abs() == own.s.abs().max())]


@reads("parameters", "{}_numbers", of_layers=False)
def cost_exponent(t: pd.DataFrame, work: str) -> pd.Series[float]:
    """Slope of log cost against log dim θ, over the larger half of the networks of a kind."""
    logs = t[(t > 0).all(axis=1)].map(math.log)
    deep = logs.index.get_level_values("run").str.contains("^", regex=False)
    slopes = {}
    for kind, own in (("wider", logs[~deep]), ("deeper", logs[deep])):
        large = own[own.parameters >= own.parameters.median()]
        if large.parameters.nunique() > 1:
            slopes[kind] = np.polyfit(large.parameters, large[f"{work}_numbers"], 1)[0]
    return pd.Series(slopes).rename_axis("networks")


@reads("sum_theorem_c_1_numbers", "sum_theorem_4_1_numbers", of_layers=False)
def full_spectrum_cost(t: pd.DataFrame) -> pd.Series[float]:
    """Cost of Theorem C.1's bounds over that of the sum of Theorem 4.1's."""
    return t.sum_theorem_c_1_numbers / t.sum_theorem_4_1_numbers


# Random inputs, and the labels of the data.


@reads("draws_z_{}")
def draws(t: pd.DataFrame, *_names: str) -> pd.Series[float]:
    """Observed minus predicted variance of the joint estimators, in standard errors."""
    return pd.Series(t.stack())


@reads("{}")
def fades_at_the_end(t: pd.DataFrame, name: str) -> pd.Series[float]:
    """A layer's mean after the last epoch over that at random weights."""
    return at(t, "last")[name] / positive(at(t, "0")[name])


@reads("{}", "var_I")
def output_over_input(t: pd.DataFrame, name: str) -> pd.Series[float]:
    """Output over input term of Eq. 20 after the last epoch, one label per input, by layer."""
    now = at(t, "last")
    return now[name] / positive(now.var_I)


@reads("var_I", "lemma_4_8")
def input_variance_over_its_bound(t: pd.DataFrame) -> pd.Series[float]:
    """Var_x I over Lemma 4.8's bound, by layer and epoch."""
    return t.var_I / positive(t.lemma_4_8)


@reads("distance")
def distance_at_the_end(t: pd.DataFrame) -> pd.Series[float]:
    """‖Ĩ − I‖/‖I‖ of a layer after the last epoch."""
    return at(of_case(t, "true labels|unknown noise"), "last").distance


@reads("distance")
def distance_end_over_start(t: pd.DataFrame, q: str) -> pd.Series[float]:
    """‖Ĩ − I‖/‖I‖ of a layer after the last epoch over that at random weights."""
    own = of_case(t, LEARNT[q])
    return at(own, "last").distance / positive(at(own, "0").distance)


@reads("cosine")
def angle_end_over_start(t: pd.DataFrame, q: str) -> pd.Series[float]:
    """Angle between a layer's Ĩ and I after the last epoch over that at random weights."""
    own = of_case(t, LEARNT[q])
    angle = np.arccos(own.cosine.clip(-1, 1)).to_frame("angle")
    return at(angle, "last").angle / positive(at(angle, "0").angle)


# The cases of the notebook in which the network learnt from such labels, by what is known of q.
LEARNT = {"known": "noisy labels, known q", "observed": ", (?:train|test)$"}


def of_case(t: pd.DataFrame, pattern: str) -> pd.DataFrame:
    """The rows of the cases whose name has the pattern."""
    return t[t.index.get_level_values("run").str.contains(pattern)]


@reads("crossing_labels_{}")
def crossing_labels(t: pd.DataFrame, estimator: str) -> pd.Series[float]:
    """Labels per image from which on the estimator of the FIM beats Ĩ, after the last epoch."""
    return at(t, "last")[f"crossing_labels_{estimator}"]
