"""The report: every claim of the paper with its verdict, and what moved against the reference."""

from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from support import claims, cli, figures, results, runs, sweep_figures
from support.claims import Decision
from support.markdown import escaped, markdown_table
from support.quantities import QUANTITIES
from support.results import Run

REFERENCE = results.ROOT / "data" / "reference"
LIKE_FIGURE_1 = ("sigmoid", "log-sigmoid")  # experiments whose runs are drawn like Figure 1
KEYS = ["run", "epoch", "layer", "quantity"]
ROUNDING = 1e-6  # relative; what other versions may change where nothing is trained
NUMERALS = ("I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX")
FIGURES = {"sigmoid-seed-0": "Figure 1"}
FIGURES |= {f"sigmoid-seed-{k}": f"Figure {NUMERALS[k - 1]}" for k in range(1, 5)}
FIGURES |= {f"log-sigmoid-seed-{k}": f"Figure {NUMERALS[k + 4]}" for k in range(5)}
MARKS = {claims.YES: "✓", claims.PARTLY: "◐", claims.DEPENDS: "◇", claims.NO: "✗"}
CHOICES = {  # what the text we had leaves open, by the level of a quantity's index
    "weights": "the initial weights",
    "dropout": "dropout",
    "optimizer": "the optimiser",
    "widths": "the widths",
    "layers": "the layers",
    "reading": "the reading",
    "N": "N",
}
LOG_SIGMOID = {  # the columns of a table: rows of claims.csv
    "f-i": "I: a tenth by epoch 5",
    "f-v1": "V₁: a tenth",
    "f-v2": "V₂: a tenth",
    "f-most": "networks: most of these",
    "f-only-start-v1": "V₁: a hundredth, and stays",
    "f-only-start-v2": "V₂: a hundredth, and stays",
}
ONE_NETWORK = ("run", "weights", "dropout", "optimizer", "widths")  # levels that name a network
OTHER = "none: other settings"
WIDTH = 100  # of a terminal
MANY = 6  # values of a choice that are listed one by one
RULE = (
    "One rule for all claims, ours: a claim comes with a quantity that gives a number for every "
    "case, and with the range in which it must be. If every number is in it the claim is "
    "reproduced; if at least half of them are, in part; else not reproduced. Where a claim names a "
    "choice that the text leaves open, each value of it is judged by itself; if the verdicts "
    "differ, the claim depends on that choice."
)


# What the runs are.


def experiments(found: Mapping[str, Run]) -> dict[str, dict[str, Run]]:
    """The runs that have values, by the entry of runs.yml that they belong to."""
    groups: dict[str, dict[str, Run]] = {}
    for name, run in sorted(found.items(), key=lambda item: seed(item[1])):
        if (run.folder / "values.csv").is_file():
            groups.setdefault(run.record["experiment"], {})[name] = run
    return groups


def seed(run: Run) -> int:
    """The seed of a run, for sorting."""
    return int(run.record["parameters"].get("seed", 0))


def warning(group: Mapping[str, Run]) -> str:
    """What the runs are if any of them does not count; else nothing."""
    return figures.warning(*(run.record for run in group.values()))


def settings(run: Run) -> dict[str, Any]:
    """The parameters of a run, but for those in which the runs of its experiment differ."""
    varied = run.record.get("varied", ["seed"])
    return {k: v for k, v in run.record["parameters"].items() if k not in varied}


def differences(one: Run, other: Run) -> dict[str, str]:
    """The settings in which two runs differ: "2 against 20" by name."""
    a, b = settings(one), settings(other)
    return {k: f"{a.get(k)} against {b.get(k)}" for k in (a | b) if a.get(k) != b.get(k)}


def check_same_settings(group: Mapping[str, Run]) -> None:
    """Raise a ValueError if runs of one experiment differ in more than they should."""
    first, *others = group.values()
    names = sorted({name for run in others for name in differences(first, run)})
    if names:
        raise ValueError(
            f"runs of experiment {first.record['experiment']!r} differ in {', '.join(names)}: make "
            "them again, all with the same settings."
        )


def decide(found: Mapping[str, Run]) -> list[Decision]:
    """Every claim's decision by these runs.

    Raises:
        ValueError: runs of one experiment do not belong together, or a table is damaged.
    """
    groups = experiments(found)
    for group in groups.values():
        check_same_settings(group)
    wanted: dict[str, list[str]] = {}
    for name, spec in runs.specs().items():
        wanted.setdefault(spec.experiment, []).append(name)
    return claims.decide(groups, wanted)


# The comparison with the committed reference results.


class Comparison(NamedTuple):
    """A run beside the reference run of its name."""

    figure: str  # the paper's figure, or the run's name
    how: str  # which kind of comparison was made
    moved: bool  # whether the values are others, by that kind's measure
    text: str  # what was found


def compare(found: Mapping[str, Run], reference: Mapping[str, Run]) -> list[Comparison]:
    """Compare the runs of one's own with the reference runs of the same names."""
    groups = experiments(reference)
    return [
        compare_one(run, groups[run.record["experiment"]])
        for group in experiments(found).values()
        for name, run in group.items()
        if name in groups.get(run.record["experiment"], {})
    ]


def compare_one(run: Run, group: Mapping[str, Run]) -> Comparison:
    """Compare a run with the reference run of its name, in the group of its experiment.

    On one machine, with the same versions, every difference counts. Elsewhere training drifts
    from the last bits on, so values are compared on the log scale, and what two seeds of the
    reference differ by says how much is nothing. Without other seeds, rounding is granted.
    """
    there, figure = group[run.name], FIGURES.get(run.name, run.name)
    if other := differences(run, there):
        text = ", ".join(f"{name}: {values}" for name, values in other.items())
        return Comparison(figure, OTHER, moved=False, text=text)
    ours, theirs = run.values, there.values
    if ours.equals(theirs):
        return Comparison(figure, "exact", moved=False, text="identical")
    both = ours.merge(theirs, on=KEYS, how="outer", suffixes=("", "_reference"))
    apart = decades(both.value, both.value_reference)
    size = f"at most by {factor(apart.max())}" if apart.any() else "where one is 0 or negative"
    if apart.median() > 0:
        size = f"by {factor(apart.median())} in the median, {size}"
    if same_machine(run, there):
        changed = both.value.ne(both.value_reference) & both[["value", "value_reference"]].any(
            axis=1
        )
        return Comparison(
            figure, "exact", moved=True, text=f"{changed.sum():,} of {len(both):,} values, {size}"
        )
    spread = between_seeds(there, group)
    if spread:
        text = f"{size}; two seeds of the reference differ by {factor(spread)}"
        return Comparison(figure, "log scale, against the seeds", apart.median() > spread, text)
    error = (both.value - both.value_reference).abs()
    granted = ROUNDING * (1e-3 + both[["value", "value_reference"]].abs().max(axis=1))
    beyond = (~(error <= granted)).sum()
    return Comparison(
        figure, f"up to {ROUNDING:g}", beyond > 0, f"{beyond:,} values beyond that; {size}"
    )


def decades(a: pd.Series[float], b: pd.Series[float]) -> pd.Series[float]:
    """|log₁₀(a/b)| where both are positive."""
    ratio = (a / b)[(a > 0) & (b > 0)]
    return ratio.map(math.log10).abs()


def factor(apart: float) -> str:
    """A difference in decades, in words."""
    ratio = 10**apart
    return f"a factor of {ratio:.3g}" if ratio >= 1.01 else f"{ratio - 1:.1g} of the value"


def same_machine(one: Run, other: Run) -> bool:
    """Whether two runs were made by the same kind of machine and the same versions."""
    return all(one.record[key] == other.record[key] for key in ("machine", "versions"))


def between_seeds(run: Run, group: Mapping[str, Run]) -> float:
    """The median difference in decades between runs that differ from this one in the seed, or 0."""
    others = {k: v for k, v in run.record["parameters"].items() if k != "seed"}
    like = [
        r.values.assign(run=lambda t: t.run.str.replace(r"-?seed-\d+", "", regex=True))
        for r in group.values()
        if {k: v for k, v in r.record["parameters"].items() if k != "seed"} == others
    ]
    pairs = [
        decades(both.value, both.value_reference)
        for a, b in itertools.combinations(like, 2)
        for both in [a.merge(b, on=KEYS, suffixes=("", "_reference"))]
    ]
    return float(pd.concat(pairs).median()) if pairs else 0.0


# In words.


def short(x: float) -> str:
    """Two significant digits, without an exponent where that is easier to read.

    >>> [short(x) for x in (0.0123, 12.3, 224000.0, 1.8e6, -0.5)]
    ['0.012', '12', '220,000', '1.8e+06', '-0.5']
    """
    return f"{float(f'{x:.2g}'):,g}"


def ours(decision: Decision) -> str:
    """The numbers of a claim: the median and the range over its cells, and how many are within."""
    cells = decision.cells
    if len(cells) <= 1:
        return spread(cells)
    return f"{spread(cells)}, {decision.within} of {len(cells)} within{by_network(decision)}"


def spread(cells: pd.Series[float]) -> str:
    """The median of some numbers and their range."""
    if cells.empty:
        return "–"
    low, middle, high = (short(x) for x in (cells.min(), cells.median(), cells.max()))
    return middle if low == high else f"{middle} ({low} to {high})"


def by_network(decision: Decision) -> str:
    """In how many networks all cases are within, where a network gives several."""
    cells = decision.cells
    levels = [level for level in ONE_NETWORK if level in cells.index.names]
    if not levels or set(decision.claim.choice) - set(ONE_NETWORK):
        return ""  # one network is asked in several ways
    whole = cells.between(decision.claim.low, decision.claim.high).groupby(level=levels).all()
    told = f"; {whole.sum()} of {len(whole)} networks throughout"
    return told if len(whole) < len(cells) else ""


def said(decision: Decision) -> str:
    """The verdict in words: how often where it is in part, by which choice where it depends."""
    if decision.verdict == claims.PARTLY:
        return f"{decision.verdict} ({decision.within} of {len(decision.cells)})"
    if decision.verdict == claims.DEPENDS:
        return f"{dependence(decision)}: {judged_by_choice(decision)}"
    return f"{decision.verdict}{f': {decision.reason}' if decision.reason else ''}"


def dependence(decision: Decision) -> str:
    """Which choice the verdict depends on, in words."""
    *others, last = (CHOICES[level] for level in decision.claim.choice)
    return f"depends on {', '.join(others)} and {last}" if others else f"depends on {last}"


def judged_by_choice(decision: Decision) -> str:
    """Which verdict each value of the choice leads to; how many of them, where they are many."""
    parts = decision.by_choice
    verdicts = {value: claims.by_rule(decision.claim, part) for value, part in parts.items()}
    if len(parts) > MANY:
        counts = Counter(verdicts.values())
        told = [f"{counts[kind]} {kind}" for kind in claims.VERDICTS if counts[kind]]
        return f"of {len(parts)} settings {', '.join(told)}"
    within = {v: f"{claims.within(decision.claim, part)}/{len(part)}" for v, part in parts.items()}
    return "; ".join(f"{v} {verdicts[v]} ({within[v]})" for v in parts)


def tolerance(decision: Decision) -> str:
    """The range in which a claim's numbers must be."""
    low, high = decision.claim.low, decision.claim.high
    if low == high:
        return f"{low:g}"
    if math.isinf(low) or math.isinf(high):
        return f"≤ {high:.3g}" if math.isinf(low) else f"≥ {low:.3g}"
    if f"{low:.3g}" == f"{high:.3g}":
        return f"{(low + high) / 2:.3g} ± {(high - low) / 2:.0e}"
    return f"{low:.3g} to {high:.3g}"


def counts(decisions: Iterable[Decision]) -> dict[str, Counter[str]]:
    """How many of the paper's claims met which verdict, mathematical and empirical ones apart.

    Questions of ours and claims that name no number are in neither count.
    """
    asked = [d for d in decisions if d.claim.whose == "paper" and d.claim.quantity]
    return {
        "mathematical": Counter(d.verdict for d in asked if d.claim.is_mathematical),
        "empirical": Counter(d.verdict for d in asked if not d.claim.is_mathematical),
    }


def tally(decisions: Sequence[Decision]) -> str:
    """Both counts in a line, and how many claims name no number."""
    parts = [
        f"{found.total()} {kind} claims: "
        + ", ".join(f"{found[v]} {claims.SEVERAL.get(v, v)}" for v in claims.VERDICTS if found[v])
        for kind, found in counts(decisions).items()
        if found
    ]
    silent = sum(not d.claim.quantity for d in decisions)
    return "; ".join(parts + [f"{silent} more are {claims.UNDECIDABLE}"] * bool(silent))


def as_text(decisions: Iterable[Decision]) -> str:
    """A line for every claim, for a terminal."""
    lines = [
        (d.claim.id, ours(d), said(d) if d.verdict == claims.PARTLY else d.verdict)
        for d in decisions
    ]
    left, right = (max(len(line[k]) for line in lines) for k in (0, 2))
    middle = WIDTH - left - right - 4
    return "\n".join(f"{a:<{left}}  {b[:middle]:<{middle}}  {c}" for a, b, c in lines)


# For the book.


def landing(found: Mapping[str, Run], made: str) -> str:
    """What was found, in a few lines for the first page; ``made`` says whose runs these are."""
    decisions = decide(found)
    by_id = {d.claim.id: d for d in decisions}
    lines = [
        ("Do the bounds hold?", "number of values beyond a bound, per run:", "a"),
        ("The output layer", "largest V₂ there:", "d-zero"),
        ("The output layer", "V₁ there over the largest V₁ of the other layers:", "d-largest"),
        ("The hidden layers", "V₁/V₂:", "c"),
        ("How tight are the bounds?", "UB/V₁ in hidden layers, over many settings:", "b-v1"),
        ("How tight are the bounds?", "UB/V₂ in hidden layers, over many settings:", "b-v2"),
        ("Log-sigmoid", "share of layers' I, V₁, V₂ that fell to a tenth by epoch 5:", "f-most"),
    ]
    points = []
    for topic, text, key in lines:
        decision = by_id[key]
        cells, asked = decision.cells, tolerance(decision)
        numbers = f"{spread(cells)}, {decision.within} of {len(cells)} within {asked}"
        if decision.claim.low == decision.claim.high and len(cells):
            numbers = f"{decision.within} of {len(cells)} are {asked}"
        depends = decision.verdict == claims.DEPENDS
        verdict = dependence(decision) if depends else said(decision)
        points.append(f"* *{topic}* {text} {numbers}{by_network(decision)}. **{verdict}**\n")
    return (
        f"From {made}. Numbers are medians and ranges over all cases, followed "
        "by how many cases agree with the paper, and our verdict.\n\n"
        f"{''.join(points)}\n[The report](report.md) gives a verdict on every claim of the paper "
        f"that we could test: {tally(decisions)}.\n"
    )


def facts(found: Mapping[str, Run]) -> dict[str, dict[str, Any]]:
    """The report's numbers one by one, as texts for running text and for the heads of pages.

    Returns:
        ``claims``: by id the verdict, how many cases there are and are within, their least, median
        and greatest number, the range asked for, and where the claim stands. ``mathematical`` and
        ``empirical``: how many of the paper's claims of this kind have which verdict, and of how
        many the range was set after a look. ``runs``: the names of every experiment's runs.
        ``better``: by experiment, which estimator (in LaTeX) has the smaller variance more often
        in hidden layers, in how many of how many cases (seeds, layers and epochs), and in how many
        of the networks it does so in most of them.
    """
    decisions = decide(found)
    names: dict[str, list[str]] = {}
    for name, run in found.items():
        names.setdefault(run.record["experiment"], []).append(name)
    return {
        "claims": {d.claim.id: fact(d) for d in decisions},
        **tallied(decisions),
        "runs": names,
        "better": better(found),
    }


def tallied(decisions: Sequence[Decision]) -> dict[str, dict[str, str]]:
    """Both counts for running text."""
    told = {
        kind: {verdict: str(found[verdict]) for verdict in claims.VERDICTS}
        | {"all": str(found.total())}
        for kind, found in counts(decisions).items()
    }
    papers = [d.claim for d in decisions if d.claim.whose == "paper"]
    after = sum(c.set == "after" for c in papers if c.quantity and not c.is_mathematical)
    told["empirical"]["after"] = str(after)
    told["empirical"]["silent"] = str(sum(not c.quantity for c in papers))
    return told


def better(found: Mapping[str, Run]) -> dict[str, dict[str, str]]:
    """How often which estimator has less variance, in the experiments that are like Figure 1."""
    [claim] = [c for c in claims.load_claims() if c.id == "c"]
    told = {}
    for name, group in experiments(found).items():
        if name in LIKE_FIGURE_1:
            ratio = claims.cells(claim, group, {n: run.values for n, run in group.items()})
            wins = {r"\hat I_1": (ratio < 1).sum(), r"\hat I_2": (ratio > 1).sum()}
            best = max(wins, key=lambda which: wins[which])
            by_network = ((ratio < 1) if best == r"\hat I_1" else (ratio > 1)).groupby("run").mean()
            told[name] = {
                "which": best, "wins": f"{wins[best]:,}", "cases": f"{len(ratio):,}",
                "networks": str((by_network > 0.5).sum()), "of": str(len(by_network)),
            }  # fmt: skip
    return told


def fact(decision: Decision) -> dict[str, Any]:
    """What the report has on one claim."""
    claim, cells = decision.claim, decision.cells
    told = {
        "verdict": decision.verdict,
        "said": said(decision),
        "where": claim.where,
        "whose": claim.whose,
        "experiments": list(claim.experiments),
    }
    if cells.empty:
        return told
    numbers = {"least": cells.min(), "median": cells.median(), "greatest": cells.max()}
    return told | {
        "cases": f"{len(cells):,}",
        "within": f"{decision.within:,}",
        "range": tolerance(decision),
        **{name: short(x) for name, x in numbers.items()},
    }


def section_5_3(found: Mapping[str, Run], made: str) -> str:
    """What the runs say of the claims of Section 5.3 and its figures: a table."""
    here = [d for d in decide(found) if re.match("Section 5.3|Figure 1|Appendix E", d.claim.where)]
    return (
        f"All numbers below come from {made}. {RULE} The [report](report.md) shows all cases of "
        f"every claim.\n\n{claims_table(here)}\n"
    )


def log_sigmoid(found: Mapping[str, Run]) -> str:
    """Statement (f) by weights, dropout and optimiser: a table of how often, and of verdicts."""
    by_id = {d.claim.id: d for d in decide(found)}
    columns = {title: by_id[key] for key, title in LOG_SIGMOID.items()}
    if any(decision.cells.empty for decision in columns.values()):
        return "*These networks have not been trained yet.*\n"
    cells: dict[str, list[str]] = {}
    for decision in columns.values():
        for value, part in sorted(decision.by_choice.items(), key=lambda item: item[0].lower()):
            mark = MARKS[claims.by_rule(decision.claim, part)]
            cell = f"{mark} {claims.within(decision.claim, part)} of {len(part)}"
            cells.setdefault(value, []).append(cell)
    return markdown_table(["", *columns], [[value, *row] for value, row in cells.items()])


def sweep(found: Mapping[str, Run]) -> str:
    """How often the sweep's bounds failed, were vacuous, or had nothing to bound: a table."""
    group = experiments(found).get("sweep", {})
    if not group:
        return "*The sweep has not been run yet.*\n"
    values = pd.concat((run.values for run in group.values()), ignore_index=True)
    layers = values[values.layer != results.NETWORK]
    activation = layers.run.map(lambda run: sweep_figures.network(run).activation)
    sums = layers.groupby([activation, "quantity"]).value.sum().unstack()
    violations = sums.I_violations + sums.V1_violations + sums.V2_violations
    shares = sums[["V1_vacuous", "V1_zero", "V2_vacuous", "V2_zero"]].div(sums.checks, axis=0)
    head = ["", "bounds checked", "violations", "lower bounds above 0"]
    head += ["UB of V₁ vacuous", "V₁: 0 = 0", "UB of V₂ vacuous", "V₂: 0 = 0"]
    counts = [3 * sums.checks, violations, sums.lower_positive]
    rows = [
        [name, *(f"{x[name]:,.0f}" for x in counts), *(f"{x:.2%}" for x in shares.loc[name])]
        for name in sums.index
    ]
    return markdown_table(head, rows)


def report_page(found: Mapping[str, Run], reference: Mapping[str, Run], made: str) -> str:
    """The whole report: all claims, all their cases, and the comparison with the reference."""
    decisions = decide(found)
    tried = [d for d in decisions if d.claim.is_mathematical]
    silent = [d for d in decisions if not d.claim.quantity]
    measured = [d for d in decisions if not d.claim.is_mathematical and d.claim.quantity]
    paper = [d for d in measured if d.claim.whose == "paper"]
    failed = [d for d in decisions if d.claim.whose == "paper" and d.verdict == claims.NO]
    depends = [d for d in decisions if d.claim.whose == "paper" and d.verdict == claims.DEPENDS]
    before = sum(d.claim.set == "before" for d in paper)
    return "\n".join(
        [
            f"All numbers below come from {made}.\n\n**{tally(decisions)}.**\n",
            "## What did not come out\n",
            claims_table(failed),
            "\n## What depends on a choice\n",
            claims_table(depends),
            "\n## Claims that experiments decide\n",
            f"{tally(measured)}. Of their ranges {before} were set before, {len(paper) - before} "
            f"after such runs had been looked at (†).\n\n{claims_table(paper)}\n",
            "## Questions of ours\n",
            "Next to the paper's claims: other readings, and what a user may ask. They are in no "
            f"count.\n\n{claims_table(d for d in measured if d.claim.whose != 'paper')}\n",
            "### All cases\n",
            *(all_cells(d) for d in measured if len(d.cells) > 1),
            "## Statements, tried on many cases\n",
            f"{tally(tried)}. The numbers are those of the [list of all "
            f"checks](_generated/notebooks/{claims.STATEMENTS}.ipynb).\n\n{claims_table(tried)}\n",
            "## What cannot be decided\n",
            *(f"* **{d.claim.where}.** {d.claim.claim} *{d.claim.note}*" for d in silent),
            "\n## Questions that were changed\n",
            "Some verdicts of an earlier version of this report rested on a choice of ours that "
            "had never been varied, or on a reading. These questions were changed afterwards. New "
            "grids and ranges were committed before the runs that decide them; what was changed "
            "after those, a row says.\n\n"
            f"{changes(decisions)}\n",
            "## Against the reference results\n",
            compared(found, reference),
            "",
        ]
    )


def changes(decisions: Iterable[Decision]) -> str:
    """The claims whose question was changed: the verdict before, and now."""
    rows = [
        [f"{d.claim.claim} (`{d.claim.id}`)", d.claim.was,
         said(d) if d.claim.whose == "paper" else "a question of ours", d.claim.note]
        for d in decisions
        if d.claim.was
    ]  # fmt: skip
    return markdown_table(["claim", "verdict before", "now", "why"], rows)


def compared(found: Mapping[str, Run], reference: Mapping[str, Run]) -> str:
    """The comparison with the reference, for the page."""
    if all(run.folder.parent == REFERENCE for run in found.values()):
        return "These are the reference results themselves.\n"
    rows = compare(found, reference)
    moved = [row for row in rows if row.moved]
    without = [name for name, run in found.items() if not (run.folder / "values.csv").is_file()]
    left_out = f" Without a table of values, and so not compared: {', '.join(without)}."
    cells = [[r.figure, r.how, "**yes**" if r.moved else "no", r.text] for r in rows]
    table = markdown_table(["run", "kind of comparison", "moved?", "values"], cells)
    return f"{summary(rows, moved)}{left_out if without else ''}\n\n{table}"


def summary(rows: list[Comparison], moved: list[Comparison]) -> str:
    """The comparison in a sentence or two."""
    if not rows:
        return "There is no reference run to compare with."
    same = sum(row.text == "identical" for row in rows)
    other = sum(row.how == OTHER for row in rows)
    skipped = f" {other} have other settings and are not compared." if other else ""
    listed = f": {', '.join(row.figure for row in moved)}" if moved else ""
    return (
        f"Of {len(rows)} runs {same} are identical to the committed reference; {len(moved)} moved"
        f"{listed}.{skipped}"
    )


def claims_table(decisions: Iterable[Decision]) -> str:
    """Claims with tolerance, our numbers, verdict and reason."""
    rows = []
    for d in decisions:
        dagger = " †" if d.claim.set == "after" else ""
        mark = MARKS.get(d.verdict, "")
        quantity = QUANTITIES.get(d.claim.quantity)
        how = f"{quantity.says if quantity else ''} {d.claim.note}".strip()
        row = [
            f"**{d.claim.where}.** {'*Ours:* ' * (d.claim.whose != 'paper')}{d.claim.claim} "
            f"(`{d.claim.id}`)" + (f"<br>*{how}*" if how else ""),
            f"{tolerance(d)}{dagger}" if d.claim.quantity else "–",
            ours(d),
            f"{mark} {said(d)}{rests_on(d)}".strip(),
        ]
        rows.append(row)
    table = markdown_table(["claim", "range", "ours", "verdict"], rows)
    return f"{table}\n† set after such runs had been looked at; all others before."


def rests_on(decision: Decision) -> str:
    """What a verdict rests on, where it is not simply that the claim is reproduced."""
    is_open = decision.verdict in (claims.NO, claims.PARTLY) and decision.claim.rests_on
    return f". *Rests on {decision.claim.rests_on}*" if is_open else ""


def all_cells(decision: Decision) -> str:
    """Every case of a claim, folded."""
    cells = decision.cells
    low, high = decision.claim.low, decision.claim.high
    numbers = cells.map(lambda x: short(x) if low <= x <= high else f"**{short(x)}**")
    wide = numbers.unstack(-1) if numbers.index.nlevels > 1 else numbers.to_frame("")
    names = [" ".join(map(str, key)) if isinstance(key, tuple) else str(key) for key in wide.index]
    titles = [f"{wide.columns.name or ''} {column}".strip() for column in wide.columns]
    head = [" / ".join(map(str, wide.index.names)), *titles]
    rows = [
        [name, *("" if pd.isna(x) else x for x in row)]
        for name, row in zip(names, wide.itertuples(index=False), strict=True)
    ]
    title = f"{decision.claim.id}: {ours(decision)}; range {tolerance(decision)}"
    claim = escaped(decision.claim.claim)
    return f"::::{{dropdown}} {title}\n{claim}\n\n{markdown_table(head, rows)}::::\n"


# For the terminal.


def report(folder: Path, *, smoke: bool = False) -> None:
    """Print what reproduced, from the finished runs in a folder; at smoke size nothing is judged.

    Raises:
        ValueError: there are none, they do not belong together, or a table is damaged.
    """
    wanted, reference = runs.specs(smoke=smoke), results.load(REFERENCE)
    found = results.load(folder, wanted)
    if smoke:
        found = {n: Run(n, r.folder, r.record | {"counts": False}) for n, r in found.items()}
    groups = experiments(found)
    if not groups:
        raise ValueError(f"no finished runs in {folder}: make reproduce")
    decisions = decide(found)
    print(f"\nWhat the {len(found)} runs in {folder} say of the paper's claims:\n")
    print(as_text(decisions))
    missing = [name for name in wanted if name not in found]
    if missing:
        print("\n" + textwrap.fill(f"not finished: {', '.join(missing)}", WIDTH))
    for name, group in groups.items():
        if warn := warning(group):
            print(f"*** {name}: {warn}. No claim is judged by this. ***")
    rows = compare(found, reference)
    moved = [row for row in rows if row.moved]
    print(f"\n{textwrap.fill(summary(rows, moved), WIDTH)}")
    for row in moved:
        print(textwrap.fill(f"{row.figure} ({row.how}): {row.text}", WIDTH, subsequent_indent="  "))
    print(f"{tally(decisions)}.")


@cli.command(ValueError, runs.RunError)
def main(argv: Sequence[str] | None = None) -> None:
    """Print what reproduced; see the module."""
    parser = argparse.ArgumentParser(prog="support.report", description=__doc__)
    cli.add_results(parser)
    arguments = parser.parse_args(argv)
    report(arguments.results, smoke=arguments.smoke)


if __name__ == "__main__":
    sys.exit(main())
