"""The table of claims, and that a changed value touches the claims that depend on it, no others."""

import csv
import dataclasses
import itertools

import numpy as np
import pandas as pd
import pytest
from by_cell import execute
from support import claims, report, results, runs
from support.quantities import QUANTITIES

import fimlib

CLAIMS = claims.load_claims()
DECIDABLE = [claim for claim in CLAIMS if claim.quantity]
PARAMETERS = {"num_samples": 50}
ACCURACY = "test_accuracy"  # of the network, in a table of layers
EPOCHS, LAYERS = range(8), ("1", "2", "3")
# What tells the cases of an experiment apart, where it is not the run's name.
CASES = {
    "sweep": [f"{a}-{w}-SGD-seed-0" for a in ("Sigmoid", "Tanh", "ReLU") for w in ("8", "8x8")],
    "saturation": ["Sigmoid", "Softplus"],
    "cost": [f"64x{w}x10" for w in ("8", "16", "32", "8^4", "8^8", "8^16")],
    "empirical": ["true labels, train", "noisy labels, known q", "unknown noise, known q"],
}  # fmt: skip
# Networks that differ in their settings; all of them learn.
GRID = [
    f"{weights} weights, dropout {dropout}, SGD 1, {widths}"
    for weights in ("default", "Xavier")
    for dropout in (0, 0.5)
    for widths in ("8x8", "9x9")
]
CASES |= {"decay": GRID, "decay-even": GRID[:2], "tightness": GRID}
SEEDS = {"sigmoid": 2, "log-sigmoid": 2, "decay": 2}


def columns(experiment):
    """The quantities of an experiment that some claim reads, and whether each is of layers."""
    found = {}
    for claim in DECIDABLE:
        if experiment in claim.experiments:
            quantity = QUANTITIES[claim.quantity]
            names = [n for n in quantity.reads(claim.arguments) if n not in PARAMETERS]
            found |= {name: quantity.of_layers and name != ACCURACY for name in names}
    return found


EXPERIMENTS = sorted({e for claim in DECIDABLE for e in claim.experiments})


class Made(results.Run):
    """A run whose values are made up, and may be changed."""

    @property
    def values(self):
        return self.record["values"]


def make_up(experiment, name, seed):
    """Random positive numbers for all that claims read."""
    random = np.random.default_rng(seed)
    rows = [
        (case, epoch, layer, quantity, random.lognormal())
        for case in CASES.get(experiment, [name])
        for quantity, of_layers in columns(experiment).items()
        for epoch in (range(1) if experiment in ("statements", "cost") else EPOCHS)
        for layer in (LAYERS if of_layers else [results.NETWORK])
    ]
    values = pd.DataFrame(rows, columns=results.COLUMNS)
    values.loc[values.quantity == "s", "value"] = values.epoch - 3.0
    values.loc[values.quantity == "cosine", "value"] %= 1
    values.loc[values.quantity.str.endswith("_violations"), "value"] = 0
    values.loc[values.quantity == ACCURACY, "value"] = 0.9
    record = {"values": values, "parameters": PARAMETERS, "counts": True, "experiment": experiment}
    return Made(name, results.ROOT, record)


@pytest.fixture(scope="module")
def world():
    """Runs of every experiment, never changed."""
    return {
        e: {f"{e}-{k}": make_up(e, f"{e}-{k}", 10 * i + k) for k in range(SEEDS.get(e, 1))}
        for i, e in enumerate(EXPERIMENTS)
    }


def decide(world, path=claims.CLAIMS):
    return {d.claim.id: d for d in claims.decide(world, world, path)}


def changed(world, experiment, name, change):
    """The same runs but for one quantity of one experiment."""
    group = {}
    for key, run in world[experiment].items():
        values = run.values.copy()
        at = values.quantity == name
        values.loc[at, "value"] = change(values.loc[at, "value"])
        group[key] = Made(key, run.folder, run.record | {"values": values})
    return world | {experiment: group}


def numbers(world, experiment, only=DECIDABLE):
    """The numbers that an experiment gives to the claims which it decides."""
    group = world[experiment]
    values = {name: run.values for name, run in group.items()}
    return {c.id: claims.cells(c, group, values) for c in only if experiment in c.experiments}


def different(before, after):
    """The claims whose numbers are others."""
    return {k for k in before if not before[k].equals(after[k])}


def readers(experiment, name):
    """The claims that say that they read a quantity of an experiment."""
    return {
        claim.id
        for claim in DECIDABLE
        if experiment in claim.experiments
        and name in QUANTITIES[claim.quantity].reads(claim.arguments)
    }


def test_the_table_is_in_order():
    ids = [claim.id for claim in CLAIMS]
    assert len(set(ids)) == len(ids) >= 60
    for claim in CLAIMS:
        assert claim.where
        assert claim.claim.endswith((".", "?"))
        assert claim.quantity or claim.note, f"{claim.id}: why is it not decidable?"
        assert claim.set in (("before", "after") if claim.quantity else ("",))
    assert {claim.quantity for claim in DECIDABLE} == set(QUANTITIES), "an unused quantity"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_experiments_are_planned(experiment):
    assert experiment in {spec.experiment for spec in runs.specs().values()}


@pytest.mark.parametrize("letter", "abcdefg")
def test_every_claim_of_section_5_3_is_there(letter):
    assert any(f"({letter})" in claim.where for claim in CLAIMS)


@pytest.mark.parametrize(
    "row",
    [
        {"quantity": "nonsense"},
        {"low": "much"},
        {"low": "3", "high": "2"},
        {"quantity": ""},
        {"experiment": ""},
        {"whose": "theirs"},
    ],
)
def test_a_bad_row_is_told(tmp_path, row):
    good = {
        "id": "x", "where": "here", "claim": "it is", "whose": "paper", "experiment": "sigmoid",
        "quantity": "violations", "low": "0", "high": "", "set": "before", "choice": "",
        "rests on": "", "was": "", "note": "",
    }  # fmt: skip
    path = tmp_path / "claims.csv"
    for entry in (good, good | row):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(good))
            writer.writeheader()
            writer.writerow(entry)
        if entry is good:
            [claim] = claims.load_claims(path)
            assert (claim.low, claim.high) == (0, np.inf)
            assert (claim.quantity, claim.arguments) == ("violations", ())
            assert claim.experiments == ("sigmoid",)
    with pytest.raises(ValueError, match="claim 'x'"):
        claims.load_claims(path)


def claim(low, high):
    return CLAIMS[0]._replace(low=low, high=high)


@pytest.mark.parametrize(
    ("numbers", "verdict"),
    [
        ([1, 2], claims.YES),
        ([1, 2, 2.1], claims.PARTLY),
        ([1, 2.1], claims.PARTLY),
        ([1, 2.1, 0.9], claims.NO),
        ([np.inf], claims.NO),
    ],
)
def test_the_rule(numbers, verdict):
    assert claims.verdict(claim(1, 2), pd.Series(numbers)) == verdict


def test_a_choice_turns_the_verdict():
    """Every value of the choice is judged by itself."""
    levels = ["weights", "dropout"]
    index = pd.MultiIndex.from_product([["a", "b"], ["p", "q"], [1, 2]], names=[*levels, "layer"])
    asked = claim(1, 2)._replace(choice=("weights",))
    cells = pd.Series([1, 1, 2, 2, 1, 1, 2, 2], index=index)
    assert claims.verdict(asked, cells) == claims.YES
    cells.iloc[:4] = [1, 2, 3, 3]
    assert claims.verdict(asked, cells) == claims.DEPENDS
    assert {k: len(part) for k, part in claims.by_choice(asked, cells).items()} == {"a": 4, "b": 4}
    assert claims.verdict(asked._replace(choice=()), cells) == claims.PARTLY
    both = claims.by_choice(asked._replace(choice=("weights", "dropout")), cells)
    assert {k: list(part) for k, part in both.items()} == {
        "a, p": [1, 2], "a, q": [3, 3], "b, p": [1, 1], "b, q": [2, 2],
    }  # fmt: skip
    assert claims.verdict(asked, cells + 7) == claims.NO


def test_how_many_are_within():
    """Both ends are within."""
    numbers = pd.Series([0.9, 1, 1.5, 2, 2.1, np.inf])
    assert claims.Decision(claim(1, 2), numbers, "").within == 3
    assert claims.Decision(claim(-np.inf, 2), numbers, "").within == 4
    assert claims.Decision(claim(2, np.inf), numbers, "").within == 3


def test_missing_runs_and_runs_that_do_not_count_judge_nothing(world):
    before = decide(world)
    assert {d.verdict for d in before.values()} <= {*claims.VERDICTS} - {claims.UNJUDGED}
    affected = {c.id for c in DECIDABLE if "decay" in c.experiments}
    assert affected
    without = {e: group for e, group in world.items() if e != "decay"}
    first, second = world["decay"].items()
    for found, reason in (
        (without, "runs missing: 2"),
        (world | {"decay": dict([first])}, "runs missing: 1"),
    ):
        after = {d.claim.id: d for d in claims.decide(found, world)}
        assert {k for k, d in after.items() if d.verdict == claims.UNJUDGED} == affected
        assert {after[k].reason for k in affected} == {reason}
    short = Made(first[0], first[1].folder, first[1].record | {"counts": False})
    after = decide(world | {"decay": dict([(first[0], short), second])})
    assert {k for k, d in after.items() if d.verdict == claims.UNJUDGED} == affected
    assert {after[k].reason for k in affected} == {"its runs do not count"}
    assert all(before[k].cells.equals(after[k].cells) for k in before)


def test_a_number_that_does_not_exist_is_not_decidable(world):
    after = decide(changed(world, "sigmoid", "V2", lambda x: 0 * x))
    assert after["c"].verdict == claims.UNDECIDABLE
    assert after["d-zero"].verdict == claims.YES
    assert {d.verdict for d in after.values() if not d.claim.quantity} == {claims.UNDECIDABLE}


def test_a_quantity_that_is_missing_is_told(world):
    run = world["sigmoid"]["sigmoid-0"]
    less = run.record | {"values": run.values.query("quantity != 'C12'")}
    with pytest.raises(ValueError, match="no C12: make that run again"):
        numbers({"sigmoid": {"sigmoid-0": Made(run.name, run.folder, less)}}, "sigmoid")


def test_a_quantity_sees_what_it_reads_and_nothing_else(world):
    run = world["sigmoid"]["sigmoid-0"]
    table = claims.quantity_table(run, run.values, ("V1", "num_samples"), of_layers=True)
    assert set(table) == {"V1", "num_samples"}
    assert len(table) == len(EPOCHS) * len(LAYERS)


@pytest.fixture(scope="module")
def unchanged(world):
    """What every experiment says as it is."""
    return {e: numbers(world, e) for e in EXPERIMENTS}


def touched(world, unchanged, experiment, name):
    """The claims whose numbers move with a quantity, and those that say that they read it."""
    factors = np.random.default_rng(0).lognormal(sigma=3, size=1000)
    other = changed(world, experiment, name, lambda x: (x + 1) * factors[: len(x)])
    found = different(unchanged[experiment], numbers(other, experiment))
    counts = {"both-preferable", "f-most", "b-both", "remark-4-5-zero"}  # which need not move
    if name == "s":
        counts = readers(experiment, name)
    if name == "V1_over_means":
        counts |= {"b-v2"}  # which reads there only which layers there are
    return found, readers(experiment, name), counts


@pytest.mark.parametrize("experiment", [e for e in EXPERIMENTS if e != "statements"])
def test_a_changed_quantity_touches_its_claims_only(world, unchanged, experiment):
    for name in columns(experiment):
        found, readers_, may_stay = touched(world, unchanged, experiment, name)
        assert readers_ - may_stay <= found <= readers_, name


@pytest.mark.full
def test_a_changed_statement_touches_its_claims_only(world, unchanged):
    for name in columns("statements"):
        found, readers_, _ = touched(world, unchanged, "statements", name)
        assert found == readers_, name


CHANGES = {
    "none of it": lambda x: 0 * x,
    "1": lambda x: 0 * x + 1,
    "25": lambda x: 0 * x + 25,
    "50": lambda x: 0 * x + 50,
    "0.15": lambda x: 0 * x + 0.15,
    "more": lambda x: 1e6 * x,
    "less": lambda x: 1e-6 * x,
    "another sign": lambda x: -x,
    "other factors": lambda x: x * np.random.default_rng(1).lognormal(sigma=9, size=len(x)),
    "falling": lambda x: x * np.logspace(0, -9, len(x)),
    "rising": lambda x: x * np.logspace(0, 9, len(x)),
}


def turns(world, unchanged, claim):
    """Whether a change of what a claim reads, each by itself or all, turns its verdict."""
    names = set(QUANTITIES[claim.quantity].reads(claim.arguments)) - set(PARAMETERS)
    for experiment in claim.experiments:
        verdict = claims.verdict(claim, unchanged[experiment][claim.id])
        for some, change in itertools.product([*([n] for n in names), names], CHANGES.values()):
            other = world
            for name in some:
                other = changed(other, experiment, name, change)
            cells = numbers(other, experiment, [claim])[claim.id]
            if len(cells) and claims.verdict(claim, cells) != verdict:
                return True
    return False


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_every_verdict_can_turn(world, unchanged, quantity):
    for claim in DECIDABLE:
        if claim.quantity == quantity:
            assert turns(world, unchanged, claim), claim.id


def test_a_changed_published_value_turns_exactly_its_row(world, tmp_path):
    """About 50 becomes about 5,000."""
    world = changed(world, "sigmoid", "V1_upper", lambda x: 0 * x + 50)
    world = changed(world, "sigmoid", "V1", lambda x: 0 * x + 1)
    with claims.CLAIMS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    row = next(row for row in rows if row["id"] == "b-v1-figure-1")
    row |= {"low": str(100 * float(row["low"])), "high": str(100 * float(row["high"]))}
    with (tmp_path / "claims.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerows(rows)
    before, after = decide(world), decide(world, tmp_path / "claims.csv")
    [turned] = {k for k in before if before[k].verdict != after[k].verdict}
    assert turned == row["id"]
    assert (before[turned].verdict, after[turned].verdict) == (claims.YES, claims.NO)


# A network that becomes sure of one of four classes, and one that has two.
SURE = {
    "a": {"largest_probability": [0.5, *[0.6] * 5, 0.9], "sum_of_squares": [0.25, *[0.5] * 5, 0.8]},
    "b": {"largest_probability": [0.5] * 6 + [0.75], "sum_of_squares": [0.5] * 6 + [0.625]},
}
# What Î₁ and Î₂ differ by: two hidden layers of 10 and 30 parameters, and an output.
APART = {
    "parameters": {1: [10] * 3, 2: [30] * 3, 3: [99] * 3},
    "I1_minus_I2_squared": {1: [4, 9, 16], 2: [8, 0, 0], 3: [99] * 3},
    "V1": {1: [3, 4, 1], 2: [1, 2, 0], 3: [99] * 3},
    "V2": {1: [5, 1, 1], 2: [1, 2, 0], 3: [0] * 3},
    "C12": {1: [0.5, 2, 1], 2: [1, 2, 0], 3: [7] * 3},
}
# Neurons at four pre-activations each; V₁ may be 0.
NEURONS = {
    "r, Sigmoid": {"s": [-4, 0, 2, 4], "V2": [1, 2, 16, 4], "V1": [0, 8, 1, 2]},
    "r, Softplus": {"s": [-4, 0, 2, 4], "V2": [20, 8, 24, 40], "V1": [1, 0, 1, 8]},
    "r, Tanh": {"s": [-4, 0, 2, 3], "V2": [2, 1, 4, 1], "V1": [1, 1, 1, 1]},
}
LABELS = {
    f"r, {case}": {"distance": {1: [first, *[7] * 5, last]}, "cosine": {1: [a, *[0.1] * 5, b]}}
    for case, first, last, a, b in (
        ("true labels, train", 8, 2, 0.5, 0),
        ("true labels, test", 0, 3, 1, 0),
        ("noisy labels, known q", 8, 4, 0, 0.5),
        ("noisy labels, test", 1, 3, 0.5, 1 + 1e-15),
        ("unknown noise, known q", 1, 4, 1, 0.5),
    )
}


# A network by its settings, that learns, and one that does not.
SET, DULL = (f"r, {kind} weights, dropout 0, SGD 1, 8x8" for kind in ("D", "X"))
NAMES = ("r", "D weights", "dropout 0", "SGD 1", "8x8")
LEARNS = {"test_accuracy": [0] * 6 + [0.5]}
# Every quantity by hand: small tables, and the numbers that a person gets from them. A table gives
# for each run, and each quantity, a list over the epochs, or such a list for each layer.
DECADES = [1, 10, 1, 10, 1, 1e6, 1e6, 1e6, 1e9]  # early steps 1, 1, 1, 1, 6; later ones 0, 0, 3
BY_HAND = [
    ("contradicted:p q", {"r": {"p_violations": [3], "q_violations": [0], "x_violations": [7]}},
     {"p_violations": 3, "q_violations": 0}),
    ("shown:p", {"r": {"p_worst": [0.5], "q_worst": [7]}}, {"p_worst": 0.5}),
    # 1 + 2 + 4 + 8.
    ("negative:I1", {"a": {"I1_negative": {1: [1, 2], 2: [4, 8]}}, "b": {"I1_negative": {1: [5]}}},
     {"a": 15, "b": 5}),
    # 1 + 2 + 4 + 8 + 16 + 32.
    ("violations", {
        "a": {"I_violations": {1: [1, 2]}, "V1_violations": {1: [4, 8]},
              "V2_violations": {1: [16, 32]}},
        "b": {f"{name}_violations": {1: [1], 2: [1]} for name in ("I", "V1", "V2")},
     }, {"a": 63, "b": 6}),
    # The last of two layers, and of three.
    ("last_layer:V2", {"a": {"V2": {1: [9, 9], 2: [0, 3]}},
                       "b": {"V2": {1: [8, 8], 2: [7, 7], 3: [5, 1]}}}, {"a": 3, "b": 5}),
    # 2, 4, 9; 1, –, 4: medians 4 and 2.5.
    ("upper_over:V1", {"r": {"V1": {1: [1, 1, 2], 2: [1, 0, 2], 3: [1, 1, 1]},
                             "V1_upper": {1: [2, 4, 18], 2: [1, 7, 8], 3: [5, 5, 5]}}},
     {("r", 1): 4, ("r", 2): 2.5}),
    # 1/4, 1/2; –, 1/10, the last layer among them.
    ("lower_over:V1", {"r": {"V1": {1: [0, 10], 2: [4, 2]}, "V1_lower": {1: [1, 1], 2: [1, 1]}}},
     {"r": 0.5}),
    # UB/V₂ is 6, 2, 2, UB/V₁ is 2, 2, 4, so 3, 1, 1/2. Where either V is 0 there is no number:
    # layer 2 has 1/2 and 1/4, layer 3 has 5 and 3.
    ("tightness_ratio", {"r": {
        "V1": {1: [2, 2, 2], 2: [0, 1, 1], 3: [1, 1, 1], 4: [1, 1, 1]},
        "V1_upper": {1: [4, 4, 8], 2: [1, 2, 4], 3: [1, 1, 1], 4: [1, 1, 1]},
        "V2": {1: [1, 1, 2], 2: [1, 1, 1], 3: [0, 1, 1], 4: [1, 1, 1]},
        "V2_upper": {1: [6, 2, 4], 2: [1, 1, 1], 3: [1, 5, 3], 4: [9, 9, 9]},
     }}, {("r", 1): 1, ("r", 2): 0.375, ("r", 3): 4}),
    # UB/V is 100 and 10, V/LB is 10,000: 2/4 and 1/4. LB = 0 is infinitely far away, V = 0 no case.
    ("upper_against_lower", {
        "a": {"V1": {1: [10, 10]}, "V1_upper": {1: [1000, 100]}, "V1_lower": {1: [1e-3, 1e-3]},
              "V2": {1: [0, 10]}, "V2_upper": {1: [0, 20]}, "V2_lower": {1: [0, 0]}},
        "b": {"V1": {1: [1]}, "V1_upper": {1: [10]}, "V1_lower": {1: [0.1]},
              "V2": {1: [0]}, "V2_upper": {1: [0]}, "V2_lower": {1: [0]}},
     }, {("a", "V1"): 0.5, ("a", "V2"): 0, ("b", "V1"): 1}),
    # One decade up, three down, and a V of 0.
    ("orders_of_magnitude:V2", {"r": {"V2": {1: [1, 2], 2: [0, 5]},
                                      "V2_upper": {1: [10, 0.002], 2: [5, 5]}}}, {"r": 3}),
    ("v1_over_v2", {"r": {"V1": {1: [1, 3], 2: [4, 4], 3: [8, 8]},
                          "V2": {1: [2, 1], 2: [0, 1], 3: [1, 1]}}},
     {("r", 0, 1): 0.5, ("r", 1, 1): 3, ("r", 1, 2): 4}),
    ("v1_over_v2_by_setting", {
        SET: {"V1": {1: [1, 3], 2: [4, 4], 3: [8, 8]}, "V2": {1: [2, 1], 2: [0, 1], 3: [1, 1]},
              "test_accuracy": [0, 0.6]},
        DULL: {"V1": {1: [1, 1], 2: [1, 1]}, "V2": {1: [1, 1], 2: [1, 1]},
               "test_accuracy": [0.6, 0.1]},
     }, {(*NAMES, 0, 1): 0.5, (*NAMES, 1, 1): 3, (*NAMES, 1, 2): 4}),
    # 8 over the largest of 1, 4; 1 over that of 2, 1; then over 0.
    ("last_over_hidden:V1", {"a": {"V1": {1: [1, 2, 0], 2: [4, 1, 0], 3: [8, 1, 1]}},
                             "b": {"V1": {1: [5, 5, 1], 2: [1, 1, 1]}}},
     {("a", 0): 2, ("a", 1): 0.5, ("b", 0): 0.2, ("b", 1): 0.2, ("b", 2): 1}),
    # The output's, and N is 4: 4/1, 6/1, 8/8, – at one label by norms, and 8, 12, 4, – by means.
    ("relative_error_over_n", {"r": {"V1": {1: [1] * 4, 2: [4, 9, 16, 1]},
                                     "I": {1: [1] * 4, 2: [0.5, 0.5, 2, 0]},
                                     "I_squared": {1: [1] * 4, 2: [1, 1, 64, 0]}}},
     {(reading, f"N = {n:,}", "r"): k / n**0.5
      for reading, k in (("means", 8), ("norms", 4)) for n in (1, 10, 100, 1_000, 10_000)}),
    ("relative_error:V2", {"r": {"V2": {1: [4, 9, 16, 1, 0], 2: [0] * 5, 3: [25] * 5},
                                 "I_squared": {1: [1, 1, 64, 0, 1], 2: [1] * 5, 3: [1] * 5}}},
     {("r", 1): 4, ("r", 3): 10}),
    ("relative_error_hidden:V2", {"r": {"V2": {1: [4, 9, 16, 1], 2: [0] * 4, 3: [25] * 4},
                                        "I_squared": {1: [1, 1, 64, 0], 2: [1] * 4, 3: [1] * 4}}},
     {("r", 1): 4}),
    ("relative_error_at_n:V2", {"r": {"V2": {1: [4, 9, 16, 1, 0], 2: [0] * 5, 3: [25] * 5},
                                      "I_squared": {1: [1, 1, 64, 0, 1], 2: [1] * 5, 3: [1] * 5}}},
     {("r", 1): 2, ("r", 3): 5}),
    # The medians 4 and 2 of layers 1 and 2, by three readings; the output's is left out, also
    # where V₂ has none there; and so is the network that does not learn.
    *((f"tightness:{V}", {
        name: {
            f"{V}_{reading}": {1: [k, 4 * k, 9 * k], 2: [2 * k] * 3} | output
            for reading, k in (("over_means", 1), ("over_geometric", 10), ("over_mean", 100))
        } | more | {"test_accuracy": [0, 0, accuracy]}
        for name, accuracy in ((SET, 0.5), (DULL, 0.4))
    }, {
        (layers, reading, *NAMES, layer): k * (4 if layer == 1 else 2)
        for layers, numbers in (("hidden layers", (1, 2)), ("first layer", (1,)))
        for reading, k in (("ratio of means", 1), ("exponential of the mean log-ratio", 10),
                           ("mean of ratios", 100))
        for layer in numbers
    }) for V, output, more in (
        ("V1", {3: [99] * 3}, {}), ("V2", {}, {"V1_over_means": {k: [1] * 3 for k in (1, 2, 3)}}),
    )),
    # UB/V₁ is 100, 25 and 50, UB/V₂ 20, 20 and 30, so that the last one is off by 1.5 only.
    ("nearest_setting", {SET: {
        f"{V}_{reading}": {1: [number], 2: [number], 3: [1]}
        for V, numbers in (("V1", (100, 25, 50)), ("V2", (20, 20, 30)))
        for reading, number in zip(("over_means", "over_geometric", "over_mean"), numbers,
                                   strict=True)
    } | {"test_accuracy": [0.9]}},
     {("first layer", "mean of ratios", "D weights", "SGD 1", "8x8"): 1.5}),
    # One estimator wins in the first layer, in most epochs; the other in the next two; none where
    # they are equal, nor where one wins half of the epochs and is equal in the rest.
    *(("layers_each_wins", {name: {
        one: {1: [1, 1, 1, 9], 2: [5] * 4, 3: [5] * 4, 4: [1] * 4, 5: [1, 1, 2, 2]},
        two: {1: [2, 2, 2, 2], 2: [1] * 4, 3: [1] * 4, 4: [1] * 4, 5: [2, 2, 2, 2]},
     }}, {name: 1}) for name, one, two in (("a", "V1", "V2"), ("b", "V2", "V1"))),
    # Means: 10/5 over 3/3; where nothing moves later there is no number; 4/5 over 4/3.
    ("early_over_late:V1", {"a": {"V1": {1: DECADES, 2: [1, 10, *[1] * 7]}},
                            "b": {"V1": {1: [1e9, *[1e7] * 4, 1e5, 1e1, 1e1, 1e1]}}},
     {("a", 1): 2, ("b", 1): 0.6}),
    # A network that does not learn is left out.
    ("fades:I", {SET: {"I": {1: [8, 9, 9, 9, 9, 2, 1], 2: [0, 9, 9, 9, 9, 2, 1]}} | LEARNS,
                 DULL: {"I": {1: [8, 9, 9, 9, 9, 2, 1]}, "test_accuracy": [0.9] * 6 + [0.49]}},
     {(*NAMES, 1): 0.25}),
    ("stays_faded:V1", {
        SET: {"V1": {1: [8, 9, 9, 9, 9, 4, 1], 2: [4, 9, 9, 9, 9, 1, 8],
                     3: [0, 9, 9, 9, 9, 2, 1]}} | LEARNS,
        DULL: {"V1": {1: [16, 9, 9, 9, 9, 12, 1]}, "test_accuracy": [0.1] * 7},
     }, {(*NAMES, 1): 0.5, (*NAMES, 2): 2}),
    ("falls_from_its_peak:V2", {
        SET: {"V2": {1: [1, 8, 3, 9, 9, 10, 2], 2: [4, 0, 0, 0, 0, 0, 1], 3: [0] * 7}} | LEARNS,
        DULL: {"V2": {1: [1] * 7}, "test_accuracy": [0.1] * 7},
     }, {(*NAMES, 1): 0.2, (*NAMES, 2): 0.25}),
    # 1/10 and 0.5/10 fade, 3/0 is none; 0.2, 1 do not, 0/1 does: three of five.
    ("share_that_fades", {
        SET: {"I": {1: [10, 9, 9, 9, 9, 1, 9], 2: [10, 9, 9, 9, 9, 2, 0]},
              "V1": {1: [10, 9, 9, 9, 9, 0.5, 9], 2: [10, 9, 9, 9, 9, 10, 0]},
              "V2": {1: [0, 9, 9, 9, 9, 3, 9], 2: [1, 9, 9, 9, 9, 0, 9]}} | LEARNS,
        DULL: {"I": {1: [1, 9, 9, 9, 9, 9, 0]}, "V1": {1: [0] * 7}, "V2": {1: [0] * 7},
               "test_accuracy": [0.1] * 7},
     }, {NAMES: 0.6}),
    # 2/4, 3/1, 2/1, –.
    ("estimates_apart", {"r": {"I1": {1: [3, 5, 1, 1], 2: [1] * 4},
                               "I2": {1: [5, 2, 3, 9], 2: [9] * 4},
                               "I": {1: [4, 1, 1, 0], 2: [1] * 4}}}, {("r", 1): 2}),
    # Hidden layers with 10 and 30 parameters: 10·4 + 30·8 = 280 over 10·(3 + 5 − 1) + 30·0 = 70,
    # the root is 2; then 10·9 + 30·0 over 10·1 + 30·0, it is 3; then nothing is predicted.
    ("apart_over_predicted", {"r": APART}, {("r", 0): 2, ("r", 1): 3}),
    # (280 + 90 + 160)/(70 + 10 + 0) = 6.625, and 40/70.
    ("apart_over_predicted_in_all", {"a": APART, "b": {k: {1: v[1][:1], 2: v[3][:1]}
                                                       for k, v in APART.items()}},
     {"a": 6.625**0.5, "b": (4 / 7) ** 0.5}),
    # In decades, less their mean: (−1, 0, 1), (0, 0, 0), (1, 0, −1) in layer 1, so √(2/3), √(8/3),
    # √(2/3); V₂ of b is 0, which leaves √(8/3). Layer 2 keeps its shape.
    ("shape_over_seeds:V1 V2", {
        "a": {"V1": {1: [1, 10, 100], 2: [1, 1, 1]}, "V2": {1: [1, 10, 100], 2: [1, 1, 1]}},
        "b": {"V1": {1: [10, 10, 10], 2: [5, 5, 5]}, "V2": {1: [0, 0, 0], 2: [5, 5, 5]}},
        "c": {"V1": {1: [100, 10, 1], 2: [7, 7, 7]}, "V2": {1: [100, 10, 1], 2: [7, 7, 7]}},
     }, {("V1", 1): (2 / 3) ** 0.5, ("V1", 2): 0, ("V2", 1): (8 / 3) ** 0.5, ("V2", 2): 0}),
    ("shape_over_seeds:V1", {"a": {"V1": {1: [1, 10]}}}, {}),
    # Three activations of one network: √(2/3), √(8/3), √(2/3) in its first layer, √(8/3), √(8/3), 0
    # in its second, so the median is between √(2/3) and √(8/3). The other network has no pair.
    ("shape_over_activations:V1", {
        "s, Sigmoid-8x8-SGD": {"V1": {1: [1, 10, 100], 2: [1, 10, 100]}},
        "t, Tanh-8x8-SGD": {"V1": {1: [10, 10, 10], 2: [100, 10, 1]}},
        "u, ReLU-8x8-SGD": {"V1": {1: [100, 10, 1], 2: [100, 10, 1]}},
        "t, Tanh-8-SGD": {"V1": {1: [1, 10, 100]}},
     }, {"8x8-SGD": ((2 / 3) ** 0.5 + (8 / 3) ** 0.5) / 2}),
    # 0.5 − (1 − 0.25) and 0.5 − (1 − 0.5); 0.9 − (1 − 0.8) and 0.75 − (1 − 0.625).
    ("first_minus_second:0", SURE, {"a": -0.25, "b": 0}),
    ("first_minus_second:last", SURE, {"a": 0.7, "b": 0.375}),
    ("largest_probability_at_start", SURE, {"a": 0.5, "b": 0.5}),
    # 2/4, 6/3, 1/0.
    ("full_spectrum_over_4_1:V1", {
        "a": {"sum_V1_upper_c1": [2, 6, 1], "sum_V1_upper_4_1": [4, 3, 0]},
        "b": {"sum_V1_upper_c1": [2], "sum_V1_upper_4_1": [8]},
     }, {"a": 2, "b": 0.25}),
    ("worst:p", {"a": {"p": {1: [1, 5], 2: [2, 3]}}, "b": {"p": {1: [4]}}}, {"a": 5, "b": 4}),
    # 1/4, 1/2; 3/1, 1/0.
    ("joint_over_its_bound:V1", {
        "a": {"joint_V1": {1: [1, 1], 2: [3, 1]}, "joint_V1_upper": {1: [4, 2], 2: [1, 0]}},
        "b": {"joint_V1": {1: [1, 1]}, "joint_V1_upper": {1: [1, 8]}},
     }, {("a", 1): 0.5, ("a", 2): 3, ("b", 1): 1}),
    # The largest V₂ is 16, in the middle; the other activation's is larger still.
    ("v2_at_zero:Sigmoid", NEURONS, {0: 0.125}),
    ("v2_saturated:Sigmoid", NEURONS, {-4: 0.0625, 4: 0.25}),
    ("v2_saturated:Softplus", NEURONS, {-4: 0.5, 4: 1}),
    ("v2_saturated:Tanh", NEURONS, {-4: 0.5}),
    ("v2_over_v1_at_zero:Sigmoid", NEURONS, {0: 0.25}),
    ("v2_over_v1_saturated:Sigmoid", NEURONS, {4: 2}),
    ("v2_over_v1_saturated:Softplus", NEURONS, {-4: 20, 4: 5}),
    ("v2_over_v1_at_zero:Softplus", NEURONS, {}),
    # Wider: of 10, 100, 1,000 and 10⁹ parameters the larger half has slope 12/6, and a network
    # without cost is no case. Deeper: of 10, 100, 1,000 the larger half is 100 and 1,000, slope 1.
    ("cost_exponent:p", {
        "r, 2x5x2": {"parameters": [10], "p_numbers": [7]},
        "r, 2x50x2": {"parameters": [100], "p_numbers": [7]},
        "r, 2x500x2": {"parameters": [1000], "p_numbers": [3]},
        "r, 2x600x2": {"parameters": [1e12], "p_numbers": [0]},
        "r, 2x5000x2": {"parameters": [1e9], "p_numbers": [3e12]},
        "r, 2x5^2x2": {"parameters": [10], "p_numbers": [9]},
        "r, 2x5^4x2": {"parameters": [100], "p_numbers": [1]},
        "r, 2x5^8x2": {"parameters": [1000], "p_numbers": [10]},
     }, {"wider": 2, "deeper": 1}),
    ("cost_exponent:p", {"r, 2x5x2": {"parameters": [10], "p_numbers": [7]}}, {}),
    ("full_spectrum_cost", {"r": {"sum_theorem_c_1_numbers": [6], "sum_theorem_4_1_numbers": [2]}},
     {("r", 0): 3}),
    ("draws:p q", {"r": {"draws_z_p": {1: [1, -2]}, "draws_z_q": {1: [3, 4]}}},
     {("r", 0, 1, "draws_z_p"): 1, ("r", 1, 1, "draws_z_p"): -2,
      ("r", 0, 1, "draws_z_q"): 3, ("r", 1, 1, "draws_z_q"): 4}),
    ("fades_at_the_end:EV1", {"r": {
        "EV1": {1: [8, 9, 9, 9, 9, 4, 2], 2: [0, 1, 1, 1, 1, 1, 1]},
        "EV1_moments": {1: [2, 9, 9, 9, 9, 4, 1], 2: [1, 1, 1, 1, 1, 1, 3]},
     }}, {("the term", "r", 1): 0.25, ("its moments alone", "r", 1): 0.5,
          ("its moments alone", "r", 2): 3}),
    ("output_over_input:EV1", {"r": {"EV1": {1: [7, 7, 7, 7, 7, 7, 3], 2: [1] * 7},
                                     "var_I": {1: [1] * 6 + [2], 2: [1] * 6 + [0]}}},
     {("r", 1): 1.5}),
    ("input_variance_over_its_bound", {"r": {"var_I": {1: [1, 3], 2: [1, 1]},
                                             "lemma_4_8": {1: [4, 2], 2: [0, 5]}}},
     {("r", 0, 1): 0.25, ("r", 1, 1): 1.5, ("r", 1, 2): 0.2}),
    ("distance_at_the_end", LABELS,
     {("r, true labels, train", 1): 2, ("r, true labels, test", 1): 3,
      ("r, unknown noise, known q", 1): 4}),
    ("distance_end_over_start:known", LABELS, {("r, noisy labels, known q", 1): 0.5}),
    # Where it was 0 at the start there is no number.
    ("distance_end_over_start:observed", LABELS,
     {("r, true labels, train", 1): 0.25, ("r, noisy labels, test", 1): 3}),
    # From a right angle to 60°; from 60° to a right angle, and to none, for which rounding may
    # leave a cosine above 1. Where the angle was none at the start there is no number.
    ("angle_end_over_start:known", LABELS, {("r, noisy labels, known q", 1): 2 / 3}),
    ("angle_end_over_start:observed", LABELS,
     {("r, true labels, train", 1): 1.5, ("r, noisy labels, test", 1): 0}),
    ("crossing_labels:i1", {"r": {"crossing_labels_i1": {1: [9, 9, 9, 9, 9, 8, 2], 2: [5] * 7}}},
     {("r", 1): 2, ("r", 2): 5}),
]  # fmt: skip


def put_down(key, given):
    """A run as `Made`, whose values are given by hand; its case stands behind a comma."""
    name, _, case = key.partition(", ")
    rows = [
        (case or name, epoch, str(layer), quantity, value)
        for quantity, entry in given.items()
        for layer, numbers in (
            entry if isinstance(entry, dict) else {results.NETWORK: entry}
        ).items()
        for epoch, value in enumerate(numbers)
    ]
    record = {"values": pd.DataFrame(rows, columns=results.COLUMNS)}
    return Made(name, results.ROOT, record | {"parameters": {"num_samples": 4}})


def by_hand(text, given):
    """The numbers of a quantity, named as in the table of claims, by case."""
    group, values = {}, {}
    for key, entry in given.items():
        run = put_down(key, entry)
        group[run.name] = run
        values[run.name] = pd.concat([values.get(run.name), run.values], ignore_index=True)
    quantity, _, arguments = text.partition(":")
    asked = CLAIMS[0]._replace(quantity=quantity, arguments=tuple(arguments.split()))
    cells = claims.cells(asked, group, values)
    assert cells.index.is_unique
    return cells.to_dict()


@pytest.mark.parametrize(("text", "given", "expected"), BY_HAND, ids=[row[0] for row in BY_HAND])
def test_quantities_by_hand(text, given, expected):
    found = by_hand(text, given)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-7, abs=1e-12)


def test_every_quantity_is_tried_by_hand():
    assert {row[0].partition(":")[0] for row in BY_HAND} == set(QUANTITIES)
    assert all(quantity.says.endswith(".") for quantity in QUANTITIES.values())


TINY = {"epochs": 6, "train_limit": 300, "num_samples": 5000, "hidden": [8, 6]}


def opposite(diagonal):
    terms = diagonal._terms
    return fimlib.Diagonal(tuple(dataclasses.replace(term, left=-term.left) for term in terms))


def test_the_sign_of_an_estimator_turns_exactly_the_claims_on_it(tmp_path, monkeypatch):
    """The real notebook, once with fimlib as it is and once with the wrong sign of Î₂."""

    def said(folder):
        folder.mkdir()
        values, record = execute("mnist.ipynb", folder, dataset="digits", **TINY)
        made = Made("sigmoid-seed-0", folder, record | {"values": values})
        return numbers({"sigmoid": {made.name: made}}, "sigmoid")

    before, right = said(tmp_path / "as it is"), fimlib.estimate_i2
    monkeypatch.setattr(fimlib, "estimate_i2", lambda *given: opposite(right(*given)))
    after = said(tmp_path / "wrong sign")
    assert different(before, after) == {"g", "g-noise", "g-noise-size", "i2-negative"}
    by_id = {claim.id: claim for claim in CLAIMS}
    for name in ("g-noise", "g-noise-size"):
        assert claims.verdict(by_id[name], before[name]) == claims.YES
        assert claims.verdict(by_id[name], after[name]) != claims.YES


def test_a_verdict_says_what_it_rests_on():
    for decision in report.decide(results.load(report.REFERENCE)):
        if decision.claim.whose == "paper" and decision.verdict in (claims.NO, claims.PARTLY):
            assert decision.claim.rests_on.endswith("."), decision.claim.id


def test_the_reference_has_what_the_claims_read():
    """Every experiment that was published gives numbers to the claims that ask it."""
    groups = report.experiments(results.load(report.REFERENCE))
    for claim in DECIDABLE:
        for experiment in set(claim.experiments) & set(groups):
            values = {name: run.values for name, run in groups[experiment].items()}
            assert len(claims.cells(claim, groups[experiment], values)), (claim.id, experiment)
