"""Passports: what made a figure, and the notebook that makes it again.

A passport is plain data. `book.prepare` writes those of all figures and executed notebooks to
``_generated/passports.json``, by file name, and beside it for every run a notebook without outputs
whose parameters are exactly this run's; the book shows both under the figure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat

from support import cells, forks, results, runs
from support.results import Run

FILE = "passports.json"
READY = "fork"  # the folder of notebooks that are ready to fork
Passport = dict[str, Any]


def passport(run: Run, page: str) -> Passport:
    """What made a run, in full; the page is its executed notebook, from the passports' folder."""
    record, notebook = run.record, ready(run)
    return {
        "run": run.name,
        "title": record["title"],
        "data": record["data"],
        "counts": record["counts"],
        "parameters": cells.parameters(notebook),
        **{key: record[key] for key in ("commit", "machine", "versions", "started", "seconds")},
        "command": command(run),
        "page": page,
        "notebook": f"{READY}/{page}",
    }


def command(run: Run) -> str:
    """What makes the run again."""
    given, name = run.record["parameters"], run.name
    text = f"make run NAME={name}"
    if given.get("dataset", "mnist") != "mnist":
        text += f" DATASET={given['dataset']}"
    full, small = (forks.known(smoke=smoke).get(name) for smoke in (False, True))
    if full and small and full != small and small.parameters.items() <= given.items():
        text += " SMOKE=1"
    return text


def ready(run: Run) -> Any:
    """The notebook of a run without outputs, its parameters set to this run's: ready to fork."""
    notebook = source(run)
    notebook.cells = [c for c in notebook.cells if "injected-parameters" not in cells.tags(c)]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
        if "parameters" in cells.tags(cell):
            cell.source = cells.with_values(
                cell.source, run.record["parameters"] | {"name": run.name}
            )
    note = f"Its parameters are those of the run `{run.name}`. Keep it in the folder `notebooks/`."
    notebook.cells.insert(1, nbformat.v4.new_markdown_cell(note, id="passport"))
    return notebook


def source(run: Run) -> Any:
    """The notebook as the run executed it; where that is not kept, the one of the project.

    Raises:
        ValueError: there is neither.
    """
    path = run.folder / "notebook.ipynb"
    if not path.is_file():
        path = runs.NOTEBOOKS / notebook_name(run)
    if not path.is_file():
        raise ValueError(f"run {run.name} has no notebook: make it again.")
    return nbformat.read(path, as_version=4)


def notebook_name(run: Run) -> str:
    """File name of the notebook that a run was made from."""
    spec = forks.known().get(run.name)
    return str(run.record.get("notebook") or (spec.notebook.name if spec else "?"))


def write_passports(
    folder: Path,
    made: Mapping[str, list[Run]],
    pages: Mapping[Path, str],
    kept: Mapping[str, list[Passport]] | None = None,
) -> None:
    """Write the passports, and the notebooks that are ready to fork.

    Args:
        folder: Where figures and pages lie.
        made: The runs behind every file there; none if they are still to be made.
        pages: The executed notebook of every run there, by the run's folder.
        kept: Passports of other files, as they are.
    """
    found = dict(kept or {}) | {
        file: [passport(run, pages[run.folder]) for run in group] for file, group in made.items()
    }
    for run in {run.folder: run for group in made.values() for run in group}.values():
        path = folder / READY / pages[run.folder]
        path.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(path, nbformat.writes(ready(run)) + "\n")
    text = json.dumps(found, indent=1, ensure_ascii=False)
    results.write_text(folder / FILE, text + "\n")
