"""The paper's checkable claims, and what decides them: one number per case, from the runs' values.

``data/claims.csv`` has a row per claim: where it stands, the experiments that decide it, the
quantity (a row of `support.quantities`), and between which numbers a case must be. A quantity sees
nothing but what it says that it reads, so that a changed value touches the claims that depend on
it and no others.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from support import results
from support.quantities import QUANTITIES
from support.results import NETWORK, Run

CLAIMS = results.ROOT / "data" / "claims.csv"
YES, PARTLY, NO = "reproduced", "in part", "not reproduced"
UNDECIDABLE, UNJUDGED = "not decidable", "not judged"
VERDICTS = (YES, PARTLY, NO, UNDECIDABLE, UNJUDGED)

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
    """Reproduced if every number is within the tolerance, in part if at least half of them are."""
    share = numbers.between(claim.low, claim.high).mean()
    return YES if share == 1 else PARTLY if share >= 0.5 else NO


def cells(
    claim: Claim, group: Mapping[str, Run], values: Mapping[str, pd.DataFrame]
) -> pd.Series[float]:
    """A claim's numbers in the runs of one experiment; those that do not exist are left out."""
    quantity = QUANTITIES[claim.quantity]
    names = quantity.reads(claim.arguments)
    tables = [
        quantity_table(run, values[name], names, quantity.of_layers) for name, run in group.items()
    ]
    numbers = quantity.function(pd.concat(tables).sort_index(), *claim.arguments)
    return numbers.dropna().astype(float)


def quantity_table(
    run: Run, values: pd.DataFrame, names: Iterable[str], of_layers: bool
) -> pd.DataFrame:
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
