"""The table of claims, and that a changed value touches the claims that depend on it, no others."""

import csv
import itertools
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from support import claims, report, results, runs

CLAIMS = claims.load()
DECIDABLE = [claim for claim in CLAIMS if claim.quantity]
PARAMETERS = {"num_samples": 50}
EPOCHS, LAYERS = range(8), ("1", "2", "3")
# What tells the cases of an experiment apart, where it is not the run's name.
CASES = {
    "sweep": [f"{a}-{w}-SGD-seed-0" for a in ("Sigmoid", "Tanh", "ReLU") for w in ("8", "8x8")],
    "saturation": ["Sigmoid", "Softplus"],
    "cost": [f"64x{w}x10" for w in ("8", "16", "32", "8^4", "8^8", "8^16")],
    "empirical": ["true labels, train", "noisy labels, known q", "unknown noise, known q"],
}  # fmt: skip
SEEDS = {"sigmoid": 2, "log-sigmoid": 2, "decay": 2}


def columns(experiment):
    """The quantities of an experiment that some claim reads, and whether each is of layers."""
    found = {}
    for claim in DECIDABLE:
        if experiment in claim.experiments:
            quantity = claims.QUANTITIES[claim.quantity]
            names = quantity.reads(claim.arguments)
            found |= {name: quantity.of_layers for name in names if name not in PARAMETERS}
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
        and name in claims.QUANTITIES[claim.quantity].reads(claim.arguments)
    }


def test_the_table_is_in_order():
    ids = [claim.id for claim in CLAIMS]
    assert len(set(ids)) == len(ids) >= 60
    for claim in CLAIMS:
        assert claim.where
        assert claim.claim.endswith((".", "?"))
        assert claim.quantity or claim.note, f"{claim.id}: why is it not decidable?"
        assert claim.set in (("before", "after") if claim.quantity else ("",))
    assert {claim.quantity for claim in DECIDABLE} == set(claims.QUANTITIES), "an unused quantity"


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
        "quantity": "violations", "low": "0", "high": "", "set": "before", "note": "",
    }  # fmt: skip
    path = tmp_path / "claims.csv"
    for entry in (good, good | row):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(good))
            writer.writeheader()
            writer.writerow(entry)
        if entry is good:
            assert claims.load(path)[0].high == np.inf
    with pytest.raises(ValueError, match="claim 'x'"):
        claims.load(path)


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


def test_missing_runs_and_runs_that_do_not_count_judge_nothing(world):
    before = decide(world)
    assert {d.verdict for d in before.values()} <= {*claims.VERDICTS} - {claims.UNJUDGED}
    affected = {c.id for c in DECIDABLE if "decay" in c.experiments}
    assert affected
    without = {e: group for e, group in world.items() if e != "decay"}
    for found in (without, world | {"decay": dict(list(world["decay"].items())[:1])}):
        after = {d.claim.id: d for d in claims.decide(found, world)}
        assert {k for k, d in after.items() if d.verdict == claims.UNJUDGED} == affected
    short = {k: Made(k, r.folder, r.record | {"counts": False}) for k, r in world["decay"].items()}
    after = decide(world | {"decay": short})
    assert {k for k, d in after.items() if d.verdict == claims.UNJUDGED} == affected
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
    table = claims.table(run, run.values, ("V1", "num_samples"), of_layers=True)
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
    counts = {"both-preferable", "f-most", "remark-4-5-zero"}  # which need not move
    return found, readers(experiment, name), counts if name != "s" else readers(experiment, name)


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
    names = set(claims.QUANTITIES[claim.quantity].reads(claim.arguments)) - set(PARAMETERS)
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


@pytest.mark.parametrize("quantity", claims.QUANTITIES)
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
    row = next(row for row in rows if row["id"] == "b-v1")
    row |= {"low": str(100 * float(row["low"])), "high": str(100 * float(row["high"]))}
    with (tmp_path / "claims.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerows(rows)
    before, after = decide(world), decide(world, tmp_path / "claims.csv")
    assert {k for k in before if before[k].verdict != after[k].verdict} == {"b-v1"}
    assert (before["b-v1"].verdict, after["b-v1"].verdict) == (claims.YES, claims.NO)


TINY = {"epochs": 6, "train_limit": 300, "num_samples": 5000, "hidden": [8, 6]}
MAKE = f"""
from pathlib import Path
from support import runs
spec = runs.Spec("sigmoid-seed-0", "Tiny", runs.NOTEBOOKS / "mnist.ipynb", {TINY}, "sigmoid")
runs.execute(spec, Path("made"), "digits")
"""


def test_the_sign_of_an_estimator_turns_exactly_the_claims_on_it(tmp_path):
    """The real notebook, once with fimlib as it is and once with the wrong sign of Î₂."""
    old, new = "return family.information(h, block.J) -", "return -family.information(h, block.J) +"
    processes = {}
    for copy in ("as it is", "wrong sign"):
        root = tmp_path / copy
        for folder in ("fimlib", "notebooks"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(results.ROOT / folder, root / folder, ignore=ignore)
        source = root / "fimlib" / "fisher.py"
        text = source.read_text(encoding="utf-8")
        assert text.count(old) == 1
        if copy == "wrong sign":
            source.write_text(text.replace(old, new), encoding="utf-8")
        path = os.pathsep.join([str(root), str(root / "notebooks")])
        processes[root] = subprocess.Popen(
            [sys.executable, "-c", MAKE], cwd=root, env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
    assert [process.wait() for process in processes.values()] == [0, 0]
    before, after = (
        numbers({"sigmoid": results.load(root / "made")}, "sigmoid") for root in processes
    )
    assert different(before, after) == {"g", "g-noise", "g-noise-size", "i2-negative"}
    by_id = {claim.id: claim for claim in CLAIMS}
    for name in ("g-noise", "g-noise-size"):
        assert claims.verdict(by_id[name], before[name]) == claims.YES
        assert claims.verdict(by_id[name], after[name]) != claims.YES


def test_the_reference_has_what_the_claims_read():
    """Every experiment that was published gives numbers to the claims that ask it."""
    groups = report.experiments(results.load(report.REFERENCE))
    for claim in DECIDABLE:
        for experiment in set(claim.experiments) & set(groups):
            values = {name: run.values for name, run in groups[experiment].items()}
            assert len(claims.cells(claim, groups[experiment], values)), (claim.id, experiment)
