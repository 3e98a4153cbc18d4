"""The table of all runs: what each of them took."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import nbformat

from support import passports, runs
from support.markdown import markdown_table
from support.quote import amount, duration
from support.results import Run

HEAD = ["run", "notebook", "code cells", "time", "memory", "made on", "processor"]


def all_runs(main: Mapping[str, Run]) -> str:
    """One row for each run, in the order of ``runs.yml``, with a link to its executed notebook."""
    if not main:
        return "*Nothing has been run yet.*\n"
    seconds = sum(run.record["seconds"] for run in main.values())
    names = [name for name in runs.specs() if name in main]
    table = markdown_table(HEAD, [row(name, main[name]) for name in names])
    return f"{len(names)} runs took {duration(seconds)} in all, each on one thread.\n\n{table}"


def row(name: str, run: Run) -> list[str]:
    """What one run took."""
    made, notebook = run.record, passports.notebook_name(run)
    return [
        f"[{made['title']}](_generated/notebooks/{name}.ipynb)",
        notebook,
        str(code_cells(runs.NOTEBOOKS / notebook)),
        duration(made["seconds"]),
        amount(made["memory_mb"]) if "memory_mb" in made else "–",  # older records have none
        made["started"].partition("T")[0],
        made["machine"]["processor"],
    ]


@functools.cache
def code_cells(notebook: Path) -> int:
    """How many cells of code a notebook has; 0 where it is gone."""
    if not notebook.is_file():
        return 0
    cells = nbformat.read(notebook, as_version=4).cells
    return sum(cell.cell_type == "code" for cell in cells)
