"""The paper's checkable claims, and what decides them: one number per case, from the runs' values.

``data/claims.csv`` has a row per claim: where it stands, the experiments that decide it, the
quantity (a row of `support.quantities`), and between which numbers a case must be. A quantity sees
nothing but what it says that it reads, so that a changed value touches the claims that depend on
it and no others.

A claim may name a choice that the paper's text leaves open, such as the initial weights. Then every
value of that choice is judged by itself, and if the verdicts differ, the claim depends on it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from support import results
from support.quantities import QUANTITIES
from support.results import NETWORK, Run

CLAIMS = results.ROOT / "data" / "claims.csv"
YES, PARTLY, NO = "reproduced", "in part", "not reproduced"
DEPENDS = "depends on a choice"
UNDECIDABLE, UNJUDGED = "not decidable", "not judged"
VERDICTS = (YES, PARTLY, DEPENDS, NO, UNDECIDABLE, UNJUDGED)
SEVERAL = {DEPENDS: "depend on a choice"}  # how a verdict reads of several claims
STATEMENTS = "statements"  # the experiment that tries statements on made-up cases

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
    choice: tuple[str, ...]  # levels of the quantity's index over which the verdict may turn
    rests_on: str  # what a verdict other than "reproduced" rests on
    was: str  # the verdict before the question was changed; empty if it never was
    note: str

    @property
    def is_mathematical(self) -> bool:
        """Whether made-up cases decide it, and no trained network."""
        return self.experiments == (STATEMENTS,)


class Decision(NamedTuple):
    """A claim with its numbers and the verdict."""

    claim: Claim
    cells: pd.Series
    verdict: str
    reason: str = ""  # why there is none, or why it cannot be judged

    @property
    def within(self) -> int:
        """How many cases are within the tolerance."""
        return within(self.claim, self.cells)

    @property
    def by_choice(self) -> dict[str, pd.Series]:
        """The numbers at every value of the choice that the claim names; all, if it names none."""
        return by_choice(self.claim, self.cells)


def load_claims(path: Path = CLAIMS) -> list[Claim]:
    """The claims, in the paper's order.

    Raises:
        ValueError: a row names a quantity that there is not, or a tolerance that is none.
    """
    with path.open(newline="", encoding="utf-8") as file:
        return [read_claim(row, path) for row in csv.DictReader(file)]


def read_claim(row: Mapping[str, str], path: Path) -> Claim:
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
        tuple(arguments.split()), low, high, row["set"], tuple(row["choice"].split()),
        row["rests on"], row["was"], row["note"],
    )  # fmt: skip


def decide(
    groups: Groups, wanted: Mapping[str, Iterable[str]], path: Path = CLAIMS
) -> list[Decision]:
    """Decide every claim by the runs that are there.

    ``wanted`` has the names of the runs that each experiment consists of.

    Raises:
        ValueError: the table of claims or that of a run is damaged.
    """
    values = {name: run.values for group in groups.values() for name, run in group.items()}
    return [decide_one(claim, groups, wanted, values) for claim in load_claims(path)]


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
    """The verdict at every value of the claim's choice, or that it depends on the choice."""
    verdicts = {by_rule(claim, part) for part in by_choice(claim, numbers).values()}
    return verdicts.pop() if len(verdicts) == 1 else DEPENDS


def by_rule(claim: Claim, numbers: pd.Series) -> str:
    """Reproduced if every number is within the tolerance, in part if at least half of them are."""
    share = within(claim, numbers) / len(numbers)
    return YES if share == 1 else PARTLY if share >= 0.5 else NO


def within(claim: Claim, numbers: pd.Series) -> int:
    """How many numbers are within the tolerance."""
    return int(numbers.between(claim.low, claim.high).sum())


def by_choice(claim: Claim, numbers: pd.Series) -> dict[str, pd.Series]:
    """The numbers by the value of the claim's choice; under "" if it names none, or none exist."""
    if not claim.choice or numbers.empty:
        return {"": numbers}
    names = numbers.index.to_frame()[list(claim.choice)].agg(", ".join, axis=1)
    return {str(name): part for name, part in numbers.groupby(names, sort=False)}


def cells(
    claim: Claim, group: Mapping[str, Run], values: Mapping[str, pd.DataFrame]
) -> pd.Series[float]:
    """A claim's numbers in the runs of one experiment; those that do not exist are left out."""
    return ask(claim.quantity, claim.arguments, group, values)


def ask(
    quantity: str,
    arguments: Sequence[str],
    group: Mapping[str, Run],
    values: Mapping[str, pd.DataFrame],
) -> pd.Series[float]:
    """The numbers of a quantity in some runs."""
    row = QUANTITIES[quantity]
    names = row.reads(arguments)
    tables = [
        quantity_table(run, values[name], names, row.of_layers) for name, run in group.items()
    ]
    numbers = row.function(pd.concat(tables).sort_index(), *arguments)
    return numbers.dropna().astype(float)


def quantity_table(
    run: Run, values: pd.DataFrame, names: Iterable[str], of_layers: bool
) -> pd.DataFrame:
    """Some quantities of a run, a column each; what else there is stays out of sight.

    In a table of layers a quantity that only the network has stands at each of its layers.

    Raises:
        ValueError: the run has no such quantity.
    """
    rows = values[values.quantity.isin(list(names))]
    same = rows.run.eq(run.name)
    rows = rows.assign(run=rows.run.where(same, f"{run.name}, " + rows.run))
    of_network = rows.layer == NETWORK
    wide = rows[of_network].pivot(index=["run", "epoch"], columns="quantity", values="value")
    if of_layers:
        layers = rows[~of_network].astype({"layer": int})
        index = ["run", "epoch", "layer"]
        by_layer = layers.pivot(index=index, columns="quantity", values="value")
        wide = by_layer.join(wide[wide.columns.difference(by_layer.columns)])
    for name in names:
        if name not in wide:
            if name not in run.record["parameters"]:
                raise ValueError(
                    f"{run.folder / 'values.csv'} is not whole, it has no {name}: make that run "
                    "again."
                )
            wide[name] = run.record["parameters"][name]
    return wide
