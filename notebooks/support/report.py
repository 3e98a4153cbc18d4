"""What the runs say of the paper's statements: a table, from the values alone."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from support import figures, results, runs
from support.results import NETWORK, Run

REFERENCE = results.ROOT / "data" / "reference"
TIGHT_2 = "UB/V₂ in the hidden layers"
TIGHT_1 = "UB/V₁ in the hidden layers"
SMALLER = "V₁ < V₂ in the hidden layers"
LARGEST = "V₁ is largest in the last layer"
BOUNDS = "bounds of Theorem 4.1 hold"


class Fact(NamedTuple):
    """A statement of Section 5.3 beside what the runs show."""

    statement: str
    paper: str
    ours: str


def facts(group: Mapping[str, Run]) -> list[Fact]:
    """The statements of Section 5.3 that this experiment can speak of.

    Args:
        group: Runs of one experiment with different seeds.
    """
    tables = {name: run.values for name, run in group.items()}
    values = pd.concat(tables.values())
    wide = values[values.layer != NETWORK].pivot_table(
        index=["run", "epoch", "layer"], columns="quantity", values="value"
    )
    last = values[values.layer != NETWORK].layer.max()
    output = wide.xs(last, level="layer")
    hidden = wide.drop(index=last, level="layer")
    accuracy = values[values.quantity == "test_accuracy"].groupby("run").value.last()
    checks = 3 * wide.parameters.sum()
    violations = wide[["I_violations", "V1_violations", "V2_violations"]].to_numpy().sum()
    smaller = hidden.V1 < hidden.V2
    by_layer = smaller.groupby("layer").agg(["sum", "count"])
    largest = hidden.V1.groupby(["run", "epoch"]).max() < output.V1
    scale = np.sqrt(output.V1) / output.I
    num_samples = next(iter(group.values())).record["parameters"]["num_samples"]
    silent = (wide.V1_sample == 0) & (wide.V1 > 0) if "V1_sample" in wide else None
    difference = (hidden.I1 - hidden.I2).abs() / hidden.I
    return [
        Fact(
            "test accuracy after training",
            "not printed",
            f"{accuracy.min():.2%} to {accuracy.max():.2%} over {len(accuracy)} seeds",
        ),
        Fact(
            BOUNDS,
            "always",
            f"{violations:,.0f} violations in {checks:,.0f} checks (I, V₁, V₂ at every parameter, "
            "epoch and seed)",
        ),
        Fact("V₂ in the last layer", "0", f"largest value {output.V2.max():g}"),
        Fact(LARGEST, "yes", share(largest)),
        Fact(
            "√V₁ against I in the last layer",
            "close to the scale of I",
            f"√V₁/I: {spread(scale)} at N = {num_samples:,}; "
            f"{spread(scale * num_samples**0.5)} at N = 1",
        ),
        Fact(
            SMALLER,
            "in the first three layers",
            share(smaller)
            + "; "
            + ", ".join(f"layer {k}: {r['sum']} of {r['count']}" for k, r in by_layer.iterrows()),
        ),
        Fact(TIGHT_1, "about 50", spread(hidden.V1_upper / hidden.V1)),
        Fact(TIGHT_2, "about 20", spread(hidden.V2_upper / hidden.V2)),
        Fact(
            "|Î₁ − Î₂| / I in the hidden layers",
            "almost identical",
            spread(difference) + f" with N = {num_samples:,} labels",
        ),
        Fact(
            "sample variance of Î₁ is 0 while V₁ > 0",
            "not discussed",
            "needs N > 1" if silent is None else share(silent),
        ),
    ]


def share(holds: pd.Series[bool]) -> str:
    """How often something holds, as counts."""
    return f"{int(holds.sum())} of {len(holds)} layer-epochs ({holds.mean():.1%})"


def spread(x: pd.Series[float]) -> str:
    """Median and range over layers, epochs and seeds."""
    return f"median {short(x.median())}, from {short(x.min())} to {short(x.max())}"


def short(x: float) -> str:
    """Two significant digits, without an exponent where that is easier to read."""
    return f"{float(f'{x:.2g}'):g}"


def against_reference(group: Mapping[str, Run], reference: Mapping[str, Run]) -> str:
    """In a sentence: are the results those of the committed reference run, and if not how far."""
    common = sorted(set(group) & set(reference))
    if not common:
        return "There is no reference run to compare with."
    if all(group[n].values.equals(reference[n].values) for n in common):
        return f"All values of {len(common)} runs are identical to the reference run's."
    keys = ["run", "epoch", "layer", "quantity"]
    both = pd.concat([group[n].values for n in common]).merge(
        pd.concat([reference[n].values for n in common]), on=keys, suffixes=("", "_reference")
    )
    both = both[both.quantity.isin(["I", "V1", "V2"]) & (both.value > 0)]
    moved = (both.value / both.value_reference).map(math.log10).abs()
    return (
        f"Against the reference run (other machine or versions; training drifts from the last bits "
        f"on): I, V₁ and V₂ differ by a median factor of {10 ** moved.median():.2f}, at most "
        f"{10 ** moved.max():.2g}."
    )


def experiments(found_runs: Mapping[str, Run]) -> dict[str, dict[str, Run]]:
    """The runs that have values, by the experiment that they repeat with another seed."""
    found: dict[str, dict[str, Run]] = {}
    for name, run in found_runs.items():
        if (run.folder / "values.csv").is_file():
            found.setdefault(run.record["experiment"], {})[name] = run
    return found


def as_text(rows: list[Fact]) -> str:
    """The table for a terminal."""
    width = max(len(f.statement) for f in rows) + 2
    return "\n".join(
        f"  {f.statement:<{width}} paper: {f.paper}\n{'':{width + 3}}here:  {f.ours}" for f in rows
    )


def as_markdown(rows: list[Fact]) -> str:
    """The table for the book."""
    lines = ["| statement | the paper | these runs |", "| --- | --- | --- |"]
    cells = [[text.replace("|", "\\|") for text in row] for row in rows]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in cells])


def main(argv: list[str] | None = None) -> int:
    """Print what reproduced, from finished runs."""
    parser = argparse.ArgumentParser(prog="support.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=results.ROOT / "results" / "mnist")
    arguments = parser.parse_args(argv)
    found = experiments(results.load(arguments.results, runs.specs()))
    if not found:
        print(f"error: no finished runs in {arguments.results}: make reproduce", file=sys.stderr)
        return 1
    reference = results.load(REFERENCE)
    for name, group in found.items():
        record = next(iter(group.values())).record
        print(f"\nExperiment {name!r} on {record['data']['title']}, {len(group)} runs:")
        print(as_text(facts(group)))
        if all(run.counts for run in group.values()):
            print(against_reference(group, reference))
        else:
            print(
                f"*** {figures.warning(record)}. None of the paper's claims is judged by this. ***"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
