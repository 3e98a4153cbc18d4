"""What the runs say of the paper's statements: a table, from the values alone."""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from support import figures, results, runs
from support.results import Run

REFERENCE = results.ROOT / "data" / "reference"
TIGHT_2 = "UB/V₂ in the hidden layers"
TIGHT_1 = "UB/V₁ in the hidden layers"
SMALLER = "V₁ < V₂ in the hidden layers"
LARGEST = "V₁ is largest in the last layer"
VANISHES = "V₂ in the last layer"
BOUNDS = "bounds of Theorem 4.1 hold"

YES, PARTLY, NO = "reproduced", "in part", "not reproduced"
SILENT, UNJUDGED = "–", "not judged"
RULES = (
    "The rules of the verdicts are ours, not the paper's, and were set after a first look at such "
    "runs, so take them as a summary: what is said to hold always is "
    "reproduced if it always does, and in part if in at least half of the cases; *about 50* and "
    "*about 20* are reproduced if the median is within a factor of 2, in part if within 10; *close "
    "to the scale of I* if the median of √V₁/I is within a factor of 3 at the N used, in part if "
    "within 10; *almost "
    "identical* if the median of |Î₁ − Î₂|/I is at most 0.1, in part if at most 1."
)
QUANTITIES = ["parameters", "I", "V1", "V2", "I1", "I2", "V1_upper", "V2_upper", "V1_certified"]
VIOLATIONS = ["I_violations", "V1_violations", "V2_violations"]


class Fact(NamedTuple):
    """A statement of Section 5.3 beside what the runs show."""

    claim: str  # its letter on the page on Section 5.3, if the paper makes it
    statement: str
    paper: str
    ours: str
    verdict: str = SILENT


def facts(group: Mapping[str, Run]) -> list[Fact]:
    """The statements of Section 5.3 that this experiment can speak of.

    A verdict is computed by the rules of ``always``, ``within`` and ``at_most``, which ``RULES``
    puts into words; none is given by runs that do not count.

    Args:
        group: Runs of one experiment with different seeds.

    Raises:
        ValueError: the runs differ in more than their seed, or a table is damaged.
    """
    check_same_settings(group)
    values = pd.concat([read(run).assign(run=name) for name, run in group.items()])
    wide = figures.by_layer(values, ["run", "epoch", "layer"])
    last = wide.index.get_level_values("layer").max()
    output = pd.DataFrame(wide.xs(last, level="layer"))
    hidden = wide.drop(index=last, level="layer")
    accuracy = values[values.quantity == "test_accuracy"].sort_values("epoch")
    num_samples = next(iter(group.values())).record["parameters"]["num_samples"]
    found = [
        accuracy_fact(accuracy.groupby("run").value.last()),
        *output_facts(wide, output, hidden, num_samples),
        *hidden_facts(hidden, num_samples),
        Fact(
            "",
            "sample variance of Î₁ is 0 while V₁ > 0",
            "not discussed",
            share((wide.V1_sample == 0) & (wide.V1 > 0), "layer-epochs")
            if "V1_sample" in wide
            else "needs N > 1",
        ),
    ]
    if all(run.counts for run in group.values()):
        return found
    return [f if f.verdict == SILENT else f._replace(verdict=UNJUDGED) for f in found]


def accuracy_fact(accuracy: pd.Series[float]) -> Fact:
    """How well the network learnt."""
    ours = f"{accuracy.min():.2%} to {accuracy.max():.2%} over {len(accuracy)} seeds"
    return Fact("", "test accuracy after training", "not printed", ours)


def output_facts(
    wide: pd.DataFrame, output: pd.DataFrame, hidden: pd.DataFrame, num_samples: int
) -> list[Fact]:
    """Statements on all layers, and on the last one."""
    checks, violations = 3 * wide.parameters.sum(), wide[VIOLATIONS].to_numpy().sum()
    largest = hidden.V1.groupby(["run", "epoch"]).max() < output.V1
    scale = np.sqrt(output.V1) / output.I
    ours = f"√V₁/I: {spread(scale)} at N = {num_samples:,}"
    if num_samples > 1:
        ours += f"; {spread(scale * num_samples**0.5)} at N = 1"
    return [
        Fact(
            "a",
            BOUNDS,
            "always",
            f"{violations:,.0f} violations in {checks:,.0f} checks (I, V₁, V₂ at every parameter, "
            "epoch and seed)",
            always(1 - violations / checks),
        ),
        Fact(
            "d", VANISHES, "0", f"largest value {output.V2.max():g}",
            always((output.V2 == 0).mean()),
        ),
        Fact("d", LARGEST, "yes", share(largest, "epochs"), always(largest.mean())),
        Fact(
            "d", "√V₁ against I in the last layer", "close to the scale of I", ours,
            within(scale.median(), 1, yes=3, partly=10),
        ),
    ]  # fmt: skip


def hidden_facts(hidden: pd.DataFrame, num_samples: int) -> list[Fact]:
    """Statements on the layers before the last."""
    smaller = hidden.V1 < hidden.V2
    layers = smaller.groupby("layer").agg(["sum", "count"]).iterrows()
    by_layer = ", ".join(f"layer {k}: {row['sum']} of {row['count']}" for k, row in layers)
    tight_1, tight_2 = hidden.V1_upper / hidden.V1, hidden.V2_upper / hidden.V2
    difference = (hidden.I1 - hidden.I2).abs() / hidden.I
    return [
        Fact(
            "c", SMALLER, "in the first three layers",
            f"{share(smaller, 'layer-epochs')}; {by_layer}", always(smaller.mean()),
        ),
        Fact(
            "b", TIGHT_1, "about 50, layers not named", spread(tight_1),
            within(tight_1.median(), 50, yes=2, partly=10),
        ),
        Fact(
            "b", TIGHT_2, "about 20, layers not named", spread(tight_2),
            within(tight_2.median(), 20, yes=2, partly=10),
        ),
        Fact(
            "g", "|Î₁ − Î₂| / I in the hidden layers", "almost identical",
            f"{spread(difference)} with N = {num_samples:,} labels",
            at_most(difference.median(), yes=0.1, partly=1),
        ),
    ]  # fmt: skip


def always(fraction: float) -> str:
    """Verdict on what is said to hold always: reproduced if so, in part from half on."""
    return YES if fraction == 1 else PARTLY if fraction >= 0.5 else NO


def within(value: float, expected: float, *, yes: float, partly: float) -> str:
    """Verdict on a positive number, by the factor between it and the paper's."""
    if not 0 < value < math.inf:
        return NO
    return at_most(max(value / expected, expected / value), yes=yes, partly=partly)


def at_most(value: float, *, yes: float, partly: float) -> str:
    """Verdict on a number that should be small."""
    return YES if value <= yes else PARTLY if value <= partly else NO


def share(holds: pd.Series[bool], cases: str) -> str:
    """How often something holds, as counts of what the cases are called."""
    return f"{int(holds.sum())} of {len(holds)} {cases} ({holds.mean():.1%})"


def spread(x: pd.Series[float]) -> str:
    """Median and range over layers, epochs and seeds."""
    return f"median {short(x.median())}, from {short(x.min())} to {short(x.max())}"


def short(x: float) -> str:
    """Two significant digits, without an exponent where that is easier to read."""
    return f"{float(f'{x:.2g}'):g}"


def tally(rows: list[Fact]) -> str:
    """How many of the rows met which verdict, in a line."""
    counts = Counter(fact.verdict for fact in rows)
    kinds = [kind for kind in (YES, PARTLY, NO, UNJUDGED) if counts[kind]]
    return f"{len(rows) - counts[SILENT]} rows with a verdict: " + ", ".join(
        f"{counts[kind]} {kind}" for kind in kinds
    )


def read(run: Run) -> pd.DataFrame:
    """A run's table of values.

    Raises:
        ValueError: the table cannot be read, or lacks quantities in some layer and epoch.
    """
    try:
        values = run.values
        wide = figures.by_layer(values, ["epoch", "layer"])
        whole = not wide[QUANTITIES + VIOLATIONS].isna().any(axis=None)
    except (OSError, ValueError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{run.folder / 'values.csv'} is not whole: make that run again.")
    return values


def settings(run: Run) -> dict[str, Any]:
    """The parameters of a run, but for the seed."""
    return {k: v for k, v in run.record["parameters"].items() if k != "seed"}


def differences(one: Run, other: Run) -> dict[str, str]:
    """The settings in which two runs differ: "2 against 20" by name."""
    a, b = settings(one), settings(other)
    return {k: f"{a.get(k)} against {b.get(k)}" for k in (a | b) if a.get(k) != b.get(k)}


def check_same_settings(group: Mapping[str, Run]) -> None:
    """Raise a ValueError if runs of one experiment differ in more than their seed."""
    first, *others = group.values()
    names = sorted({name for run in others for name in differences(first, run)})
    if names:
        raise ValueError(
            f"runs of experiment {first.record['experiment']!r} differ in {', '.join(names)}: make "
            "them again, all with the same settings."
        )


def against_reference(group: Mapping[str, Run], reference: Mapping[str, Run]) -> str:
    """In a sentence: are the results those of the committed reference run, and if not how far."""
    common = sorted(set(group) & set(reference))
    if not common:
        return "There is no reference run to compare with."
    different: dict[str, str] = {}
    for name in common:
        different |= differences(group[name], reference[name])
    if different:
        listed = ", ".join(f"{name}: {values}" for name, values in different.items())
        return f"Other settings than the reference run ({listed}): values are not compared."
    here, there = ({n: read(side[n]) for n in common} for side in (group, reference))
    if all(here[n].equals(there[n]) for n in common):
        return f"All values of {len(common)} runs are identical to the reference run's."
    keys = ["run", "epoch", "layer", "quantity"]
    both = pd.concat(here.values()).merge(
        pd.concat(there.values()), on=keys, suffixes=("", "_reference")
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
    for name, run in sorted(found_runs.items(), key=lambda item: seed(item[1])):
        if (run.folder / "values.csv").is_file():
            found.setdefault(run.record["experiment"], {})[name] = run
    return found


def seed(run: Run) -> int:
    """The seed of a run, for sorting."""
    return int(run.record["parameters"].get("seed", 0))


def warning(group: Mapping[str, Run]) -> str:
    """What the runs are if any of them does not count; else nothing."""
    return figures.warning(*(run.record for run in group.values()))


def as_text(rows: list[Fact]) -> str:
    """The table for a terminal, and the tally."""
    width = max(len(fact.statement) for fact in rows) + 6
    lines = []
    for claim, statement, paper, ours, verdict in rows:
        lines.append(f"  {f'({claim}) ' if claim else '    '}{statement:<{width - 4}} {verdict}")
        lines += [f"{'':{width + 3}}paper: {paper}", f"{'':{width + 3}}here:  {ours}"]
    return "\n".join([*lines, tally(rows)])


def as_markdown(rows: list[Fact]) -> str:
    """The table for the book."""
    lines = ["| | statement | the paper | these runs | verdict |", "| --- " * 5 + "|"]
    for row in rows:
        cells = [text.replace("|", "\\|") for text in row]
        lines.append(f"| {' | '.join([f'({cells[0]})' if row.claim else '', *cells[1:]])} |")
    return "\n".join(lines)


def report(folder: Path) -> None:
    """Print what reproduced, from the finished runs in a folder.

    Raises:
        ValueError: there are none, they do not belong together, or a table is damaged.
    """
    there = results.load(folder, runs.specs())
    found = experiments(there)
    if not found:
        raise ValueError(f"no finished runs in {folder}: make reproduce")
    reference = results.load(REFERENCE)
    for name, group in found.items():
        rows, warn = facts(group), warning(group)
        missing = [n for n, s in runs.specs().items() if s.experiment == name and n not in there]
        title = next(iter(group.values())).record["data"]["title"]
        print(f"\nExperiment {name!r} on {title}, {len(group)} runs:")
        if missing and not warn:
            print(f"not finished: {', '.join(missing)}")
        if warn:
            print(f"*** {warn}. None of the paper's claims is judged by this. ***")
        else:
            print(against_reference(group, reference))
            print(textwrap.fill(RULES.replace("*", ""), 100))
        print(as_text(rows))


def main(argv: list[str] | None = None) -> int:
    """Print what reproduced; see the module."""
    parser = argparse.ArgumentParser(prog="support.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=results.ROOT / "results" / "mnist")
    try:
        report(parser.parse_args(argv).results)
    except (ValueError, OSError, runs.RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
