"""A fork beside its original: which settings and which quantities differ, and by how much."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import pandas as pd
from nbformat import NotebookNode

from support import cells, forks, launch, passports
from support.markdown import markdown_table
from support.results import NETWORK, Run

CASE, KEYS = "run", ["epoch", "layer", "quantity"]


def original(fork: Run, pool: Iterable[Run]) -> Run | None:
    """The run that a fork is compared with: of its original notebook, with the nearest parameters.

    If that notebook is a fork that was not run, its own original takes its place. Of several in
    the pool that are equally near, it is the first one.
    """
    pool = list(pool)
    for source in forks.origins(fork.name, forks.read()):
        if family := [run for run in pool if passports.notebook_name(run) == source]:
            # Another data set weighs more than all else.
            return min(family, key=lambda r: ("dataset" in (d := settings(r, fork)), len(d)))
    return None


def settings(one: Run, other: Run) -> dict[str, tuple[Any, Any]]:
    """The parameters in which two runs differ, and their networks if these differ."""
    a, b = (cells.parameters(passports.ready(run)) for run in (one, other))
    a, b = (x | {"network": run.record.get("network", "")} for x, run in ((a, one), (b, other)))
    return {k: (a.get(k, ""), b.get(k, "")) for k in a | b if a.get(k, "") != b.get(k, "")}


def compare(fork: Run, first: Run, link: str) -> str:
    """The comparison with the original, whose page the link is, for the top of the fork's page."""
    differ = settings(first, fork)
    parts = [f"**Compared with the original**, [{first.record['title']}]({link}).\n"]
    if "dataset" in differ:
        again = f"{passports.command(first)} DATASET={differ['dataset'][1]}"
        parts.append(f"The data differ; `{again}` makes the original on the same ones.\n")
    rows = [[f"`{name}`", *(code(x) for x in pair)] for name, pair in differ.items()]
    parts.append(
        markdown_table(["setting", "original", fork.name], rows) if rows else "Same settings.\n"
    )
    if all((run.folder / "values.csv").is_file() for run in (fork, first)):
        parts.append(values(first, fork))
    else:
        parts.append("There are no tables of values to compare.\n")
    if changed := code_changes(first, fork):
        parts.append(
            f":::{{dropdown}} What was changed in the code\n```diff\n{changed}\n```\n:::\n"
        )
    return "\n".join(parts)


def values(first: Run, fork: Run) -> str:
    """What the tables of two runs have in common, and where they differ."""
    a, b = (cases(run.values) for run in (first, fork))
    if a.equals(b):
        return f"**No difference: all {len(a):,} values are identical.**\n"
    note = ""
    layers = [sorted(set(x.layer) - {NETWORK}, key=int) for x in (a, b)]
    if layers[0] != layers[1]:
        a, b = ends(a), ends(b)
        note = (
            f"The networks have {len(layers[0])} and {len(layers[1])} layers with parameters: the "
            "first and the last ones are compared. "
        )
    both = a.merge(b, on=[CASE, *KEYS], suffixes=("_a", "_b"))
    if both.empty:
        return "The tables of values have no row in common.\n"
    same = int((both.value_a == both.value_b).sum())
    last = both[both.epoch == both.epoch.max()]
    return (
        f"{note}Of {len(both):,} values that both have, {same:,} are identical. After epoch "
        f"{both.epoch.max()}, the last one that both have:\n\n{of_network(last, fork.name)}\n"
        f"{of_layers(last)}"
    )


def cases(frame: pd.DataFrame) -> pd.DataFrame:
    """A table whose column of runs is empty where it holds nothing but the run's own name."""
    return frame.assign(run="") if frame.run.nunique() == 1 else frame


def ends(frame: pd.DataFrame) -> pd.DataFrame:
    """The values of the network, of its first layer and of its last, named so."""
    number = pd.to_numeric(frame.layer, errors="coerce")
    named = frame.layer.where(number.isna(), "")
    named = named.mask(number == number.min(), "first").mask(number == number.max(), "last")
    return frame.assign(layer=named)[named != ""]


def of_network(last: pd.DataFrame, name: str) -> str:
    """The quantities of the network: both values, and their difference."""
    rows = [
        [f"`{quantity}`", f"{a:.4g}", f"{b:.4g}", f"{b - a:+.2g}" if a != b else "="]
        for quantity, a, b in middle(last[last.layer == NETWORK])
    ]
    return markdown_table(["of the network", "original", name, "difference"], rows)


def of_layers(last: pd.DataFrame) -> str:
    """The layers' quantities: by which factor they changed."""
    found = last[last.layer != NETWORK]
    layers = list(dict.fromkeys(found.layer))
    by_layer = {
        layer: {q: (a, b) for q, a, b in middle(found[found.layer == layer])} for layer in layers
    }
    rows = [
        [f"`{quantity}`", *(factor(*by_layer[layer].get(quantity, (0, 0))) for layer in layers)]
        for quantity in dict.fromkeys(found.quantity)
    ]
    head = ["the fork's value over the original's", *(f"layer {layer}" for layer in layers)]
    return markdown_table(
        [h.replace("layer first", "first layer").replace("layer last", "last layer") for h in head],
        rows,
    )


def middle(rows: pd.DataFrame) -> list[tuple[str, float, float]]:
    """Every quantity with its two values; over several cases, their medians."""
    medians = rows.groupby("quantity", sort=False)[["value_a", "value_b"]].median()
    return [(str(quantity), a, b) for quantity, a, b in medians.itertuples()]


def factor(a: float, b: float) -> str:
    """By which factor a value changed.

    >>> factor(2, 3), factor(2, 2), factor(0, 2)
    ('× 1.5', '=', '0 → 2')
    """
    if a == b:
        return "="
    return f"× {b / a:.2g}" if a else f"0 → {b:.2g}"


def code(value: Any) -> str:
    """A value in a cell of a table."""
    return f"`{value}`" if value != "" else "–"


def code_changes(first: Run, fork: Run) -> str:
    """The lines of code that differ, but for the parameters."""
    one, other = (
        "\n\n".join(compared(passports.ready(run).cells)).splitlines() for run in (first, fork)
    )
    lines = difflib.unified_diff(one, other, lineterm="", n=2)
    return "\n".join(line for line in lines if not line.startswith(("---", "+++")))


def compared(found: list[NotebookNode]) -> list[str]:
    """The code of cells but for the parameters, `forks.MARK`, and the cell of `launch`."""
    left_out = {"parameters", launch.TAG}
    kept = [c for c in found if c.cell_type == "code" and not left_out & set(cells.tags(c))]
    return [c.source.replace(forks.MARK, "") for c in kept]
