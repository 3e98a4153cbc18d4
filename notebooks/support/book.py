"""Build the book: put runs into ``book/_generated`` and let Jupyter Book render it.

The results of Section 5.3 made on this machine are shown if all of them are there and count, else
the committed reference run. Results that do not count (a stand-in data set, smoke size) are shown
apart from those, and say on every page what they are.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import nbformat

from support import figures, listings, report, results, runs
from support.results import Run

BOOK = results.ROOT / "book"
GENERATED = BOOK / "_generated"
PAPER = "sigmoid"  # the experiment of Section 5.3; its first run is the one of Figure 1
SVG = "image/svg+xml"
MUTATION = results.ROOT / "data" / "mutation.json"
PICTURE = "picture:"  # a cell with the tag picture:NAME draws _generated/NAME.svg


class BookError(Exception):
    """The book cannot be built; the message says why and what to do."""


def sources(folder: Path, *, smoke: bool = False) -> tuple[dict[str, Run], dict[str, Run]]:
    """The runs whose numbers the book tells, and runs that do not count, to show beside them.

    The experiment of Section 5.3 decides. Where it was made here as a whole and counts, the runs
    made here are told, and the reference fills the gaps; else the reference is told alone.

    Args:
        folder: Runs that were made here.
        smoke: Whether those are at smoke size.

    Raises:
        BookError: there is no reference run and nothing to show instead.
    """
    here, reference = results.load(folder, runs.specs()), results.load(report.REFERENCE)
    wanted = {name for name, spec in runs.specs(smoke=smoke).items() if spec.experiment == PAPER}
    paper = {name: run for name, run in here.items() if run.record["experiment"] == PAPER}
    complete = set(paper) == wanted
    aside = {name: run for name, run in here.items() if complete and not run.counts}
    if complete and not aside.keys() & paper.keys():
        others = {n: run for n, run in reference.items() if run.record["experiment"] != PAPER}
        return others | {name: run for name, run in here.items() if run.counts}, aside
    if PAPER not in report.experiments(reference):
        raise BookError(f"no reference run in {os.path.relpath(report.REFERENCE)}: make reproduce")
    return reference, aside


def prepare(main: Mapping[str, Run], aside: Mapping[str, Run]) -> None:
    """Write everything that the pages include: notebooks, figures, pictures, fragments.

    Raises:
        BookError: a notebook's picture is missing, or two have one name.
    """
    shutil.rmtree(GENERATED, ignore_errors=True)
    for folder, group in (("notebooks", main), ("not-counted", aside)):
        (GENERATED / folder).mkdir(parents=True)
        for name, run in group.items():
            results.write_text(GENERATED / folder / f"{name}.ipynb", page(run, origin(run)))
    counted, beside = (report.experiments(group).get(PAPER, {}) for group in (main, aside))
    draw(counted, "")
    landing = [shown(counted, ""), summary(counted)]
    section = [shown(counted, ""), table(counted, "")]
    if beside:
        draw(beside, "not-counted-")
        landing.append(shown(beside, "not-counted-"))
        section += [shown(beside, "not-counted-"), table(beside, "not-counted-")]
    results.write_text(GENERATED / "landing.md", "\n".join(landing))
    results.write_text(GENERATED / "section-5-3-results.md", "\n".join(section))
    results.write_text(GENERATED / "mutation.md", mutation())
    (GENERATED / "source").mkdir()
    for path in listings.paths():
        listing = GENERATED / "source" / f"{listings.page_name(path)}.md"
        results.write_text(listing, listings.page(path))
    for run in main.values():
        save_pictures(run)


def first(group: Mapping[str, Run]) -> Run:
    """The run of a group that its figure shows."""
    return next(iter(group.values()))


def origin(run: Run) -> str:
    """Whose run this is, in words."""
    if run.folder.parent == report.REFERENCE:
        return "the reference run, committed with this book"
    return "a run on the machine that built this book"


def page(run: Run, made: str) -> str:
    """The executed notebook as a page: its own title, and on top what it is and what made it."""
    notebook = nbformat.read(run.folder / "notebook.ipynb", as_version=4)
    cells = notebook.cells
    if not (cells and cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")):
        cells.insert(0, nbformat.v4.new_markdown_cell(id="title"))
    rest = cells[0].source.partition("\n")[2]
    warn = figures.warning(run.record)
    title = f"{warn.split(':')[0]}: {run.record['title']}" if warn else run.record["title"]
    machine = run.record["machine"]
    cells[0].source = (
        f"# {title}\n\n```{{{'warning' if warn else 'note'}}}\n"
        f"{warn + '. ' if warn else ''}This page is the executed notebook of {made}: commit "
        f"{run.record['commit']}, {run.record['started']}, {run.record['seconds']:.0f} s on "
        f"{machine['processor']} ({machine['threads']} thread, {machine['device']}).\n```\n{rest}"
    )
    text: str = nbformat.writes(notebook)
    return text


def save_pictures(run: Run) -> None:
    """Write the picture of every cell that is tagged ``picture:NAME`` to ``NAME.svg``.

    Raises:
        BookError: the name does not suit a file or is taken, or the cell has not one SVG output.
    """
    for name, drawn in pictures(run):
        where, path = f"run {run.name}, tag {PICTURE}{name}", GENERATED / f"{name}.svg"
        if not re.fullmatch("[a-z0-9_-]+", name):
            raise BookError(f"{where}: use lower-case letters, digits, - and _ for the name.")
        if len(drawn) != 1:
            raise BookError(f"{where}: the cell has {len(drawn)} SVG outputs; let it show one.")
        if path.exists():
            raise BookError(f"{where}: another picture has this name; choose a new one.")
        results.write_text(path, drawn[0])


def pictures(run: Run) -> Iterator[tuple[str, list[str]]]:
    """Name and SVG outputs of every cell of a run's notebook that is tagged ``picture:NAME``."""
    for cell in nbformat.read(run.folder / "notebook.ipynb", as_version=4).cells:
        data = [output.get("data", {}) for output in cell.get("outputs", [])]
        for tag in cell.metadata.get("tags", []):
            if tag.startswith(PICTURE):
                yield tag.removeprefix(PICTURE), [x[SVG] for x in data if SVG in x]


def mutation() -> str:
    """What ``make mutants`` found last, for the page of the map."""
    if not MUTATION.is_file():
        return "The formulas have not been mutated yet: `make mutants`.\n"
    found = json.loads(MUTATION.read_text(encoding="utf-8"))
    modules, survivors = found["modules"], found["survivors"]
    mutants, killed = (sum(m[key] for m in modules.values()) for key in ("mutants", "killed"))
    rows = [f"| `{n}` | {m['mutants']:,} | {m['killed']:,} |" for n, m in modules.items()]
    current = found["source"] == runs.fimlib_digest()
    head = (
        f"{found['tool']} made {mutants:,} changes to the formulas, one at a time; the tests "
        f"noticed {killed:,} of them, **{killed / mutants:.1%}**."
        + ("" if current else " *`fimlib` has changed since; `make mutants` brings it up to date.*")
    )
    table = ["| module | changes | noticed |", "| --- | --- | --- |", *rows]
    listed = "\n".join(
        f"* `{s['function']}`: `{s['old']}` → `{s['new']}`. {s['why'] or 'Not argued yet.'}"
        for s in survivors
    )
    fold = f":::{{dropdown}} The {len(survivors)} changes that no test noticed\n{listed}\n:::\n"
    return "\n".join([head, "", *table, "", fold])


def draw(group: Mapping[str, Run], prefix: str) -> None:
    """Figure 1 and the variances over all seeds."""
    run, warn = first(group), report.warning(group)
    figure = figures.figure_1(report.read(run), run.record, warn)
    figures.save(figure, GENERATED / f"{prefix}figure-1.svg")
    tables = {f"seed {report.seed(run)}": report.read(run) for run in group.values()}
    figures.save(figures.variance_ratios(tables, warn), GENERATED / f"{prefix}seeds.svg")


def shown(group: Mapping[str, Run], prefix: str) -> str:
    """Figure 1 with its caption."""
    run, warn = first(group), report.warning(group)
    alt = (
        "One column per layer. Above, over the epochs: Fisher information, standard deviations of "
        "both estimators, upper bounds. Below: log-ratios of bounds and variances."
    )
    return (
        f"```{{figure}} _generated/{prefix}figure-1.svg\n:alt: {warn + '. ' if warn else ''}{alt}\n"
        f":width: 100%\n\nOur counterpart of the paper's Figure 1, from "
        f"{origin(run)}. {figures.caption(run.record, warn)}\n```\n"
    )


def summary(group: Mapping[str, Run]) -> str:
    """What was found, in a few lines for the landing page."""
    rows = report.facts(group)
    ours = {fact.statement: fact.ours for fact in rows}
    return (
        f"**What we find**, with {len(group)} seeds, from {origin(first(group))}:\n\n"
        f"* *Do the bounds hold?* {ours[report.BOUNDS]}.\n"
        f"* *The output layer:* V₂ there: {ours[report.VANISHES]}; V₁ is the largest of all "
        f"layers in {ours[report.LARGEST]}.\n"
        f"* *The hidden layers:* Î₁ has the smaller variance in {ours[report.SMALLER]}.\n"
        f"* *How tight are the bounds?* In the hidden layers, UB/V₁: {ours[report.TIGHT_1]}; "
        f"UB/V₂: {ours[report.TIGHT_2]}.\n"
        f"* *What reproduced?* Of {report.tally(rows)}; the rules are in "
        "[Section 5.3](section-5-3.md).\n"
    )


def table(group: Mapping[str, Run], prefix: str) -> str:
    """What the runs say of the paper's statements, and the picture over all seeds."""
    run, warn = first(group), report.warning(group)
    head = (
        f"**{warn}. None of the paper's statements is judged by these runs.**"
        if warn
        else f"All numbers below come from {origin(run)}: the experiment of Figure 1 with seeds "
        f"{', '.join(str(report.seed(r)) for r in group.values())}, none dropped. {report.RULES}"
    )
    seeds = ", ".join(
        f"[{report.seed(r)}](_generated/{'not-counted' if warn else 'notebooks'}/{name}.ipynb)"
        for name, r in group.items()
    )
    return (
        f"\n{head}\n\n{report.as_markdown(report.facts(group))}\n\n"
        f"```{{figure}} _generated/{prefix}seeds.svg\n:alt: Ratio of the two variances in each "
        f"hidden layer over the epochs, one line per seed\n:width: 100%\n\nRatio of the layers' "
        f"mean variances, one line per seed; below 1 the paper's V₁ < V₂ holds. "
        f"{warn + '. ' if warn else ''}Settings as in the figure above. Executed notebooks by "
        f"seed: {seeds}.\n```\n"
    )


def build(output: Path) -> Path:
    """Render ``book/`` with warnings as errors; return the first page.

    Raises:
        BookError: Jupyter Book reported a warning or an error.
    """
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(BOOK)]
    command += ["--path-output", str(output), "--all", "-W", "-n", "--keep-going", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [
            x for x in (done.stdout + done.stderr).splitlines() if "WARNING" in x or "ERROR" in x
        ]
        raise BookError("Jupyter Book found:\n" + "\n".join(lines or [done.stdout, done.stderr]))
    return output / "_build" / "html" / "index.html"


def main(argv: list[str] | None = None) -> int:
    """Build the book from the runs of a folder; see the module."""
    parser = argparse.ArgumentParser(prog="support.book", description=__doc__)
    parser.add_argument("--results", type=Path, default=results.ROOT / "results" / "mnist")
    parser.add_argument("--smoke", action="store_true", help="the results are at smoke size")
    parser.add_argument("--output", type=Path, default=BOOK, help="where _build will lie")
    arguments = parser.parse_args(argv)
    try:
        main_runs, aside = sources(arguments.results.resolve(), smoke=arguments.smoke)
        made = origin(first(report.experiments(main_runs)[PAPER]))
        print(f"building the book with {made} …", flush=True)
        if aside:
            print(f"… and apart from it {report.warning(aside)}", flush=True)
        with runs.lock(BOOK, "build"):  # two builds would mix their pages
            prepare(main_runs, aside)
            index = build(arguments.output.resolve())
    except (BookError, ValueError, runs.RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}. Free some space or make the folder writable.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: run again to build the book.", file=sys.stderr)
        return 130
    print(f"the book's first page: {os.path.relpath(index, results.ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
