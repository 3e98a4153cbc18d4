"""Build the book: put runs into ``book/_generated`` and let Jupyter Book render it.

The results of Section 5.3 made on this machine are shown if all of them are there and count, else
the committed reference run. Results that do not count (a stand-in data set, smoke size) are shown
apart from those, and say on every page what they are.

Everything is built anew if anything but the pages of forks changed since the last whole build, else
only these pages.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import nbformat
import pandas as pd
from matplotlib.figure import Figure

from support import (
    cells,
    choice_figures,
    cli,
    comparison,
    excerpts,
    explorers,
    figures,
    forks,
    listings,
    optimiser_figures,
    passports,
    projection_figures,
    report,
    results,
    run_list,
    runs,
    sweep_figures,
    torture,
)
from support.bench import tables, today
from support.markdown import markdown_table
from support.results import Run

BOOK = results.ROOT / "book"
GENERATED = BOOK / "_generated"
PAPER = "sigmoid"  # the experiment of Section 5.3; its first run is the one of Figure 1
MUTATION = results.ROOT / "data" / "mutation.json"
WHICH = "which-estimator"  # the figure that says which estimator is the better one where
# Experiments that are drawn together, from the rows of all their runs.
OVER_RUNS: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "sweep": sweep_figures.validity,
    "decay": choice_figures.decay,
    "optimisers": optimiser_figures.losses,
    "projections": projection_figures.errors,
}
ASIDE = "not-counted-"  # before the names of figures of runs that do not count
FORKS = "forks/"  # the folder of their pages
# Beside what the last whole build wrote: the digest of all that it was made from.
WHOLE = ".whole"
TOOLS = ("Sphinx", "jupyter-book", "myst-nb", "sphinx-book-theme")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
PICTURE = "picture:"  # a cell with the tag picture:NAME draws _generated/NAME.svg


Made = dict[str, list[Run]]  # the runs behind every file; none if they are still to be made


class BookError(Exception):
    """The book cannot be built; the message says why and what to do."""


def sources(folder: Path, *, smoke: bool = False) -> tuple[dict[str, Run], dict[str, Run]]:
    """The runs whose numbers the book tells, and runs that do not count, to show beside them.

    The experiment of Section 5.3 decides. Where it was made here as a whole and counts, the runs
    made here are told, and the reference fills the gaps; else the reference is told alone.

    Raises:
        BookError: there is no reference run and nothing to show instead.
    """
    here, reference = results.load(folder, runs.specs()), results.load(report.REFERENCE)
    wanted = {name for name, spec in runs.specs(smoke=smoke).items() if spec.experiment == PAPER}
    there = {name for name, run in here.items() if run.record["experiment"] == PAPER}
    complete = there == wanted
    aside = {name: run for name, run in here.items() if complete and not run.counts}
    if complete and not aside.keys() & there:
        others = {n: run for n, run in reference.items() if run.record["experiment"] != PAPER}
        return others | {name: run for name, run in here.items() if run.counts}, aside
    if PAPER not in report.experiments(reference):
        raise BookError(f"no reference run in {os.path.relpath(report.REFERENCE)}: make reproduce")
    return reference, aside


def forked(folder: Path) -> dict[str, tuple[Run, Run | None]]:
    """The forks and large runs that were made here, each with the original beside it, if any."""
    here = results.load(folder)
    pool = [*here.values(), *results.load(report.REFERENCE).values()]
    return {
        name: (here[name], comparison.original(here[name], [r for r in pool if r.name != name]))
        for name in [*forks.read(), *runs.specs(section="large")]
        if name in here
    }


def prepare(
    main: Mapping[str, Run],
    aside: Mapping[str, Run],
    own: Mapping[str, tuple[Run, Run | None]] | None = None,
) -> None:
    """Write everything that the pages include: notebooks, figures, passports, fragments.

    Args:
        main: The runs whose numbers the book tells.
        aside: Runs that do not count, shown apart from those.
        own: Forks, with their originals.

    Raises:
        BookError: a notebook's picture is missing, or two have one name.
    """
    shutil.rmtree(GENERATED, ignore_errors=True)
    GENERATED.mkdir(parents=True)
    pages = write_pages(main, aside, own or {})
    made = {file: [run] for file, run in pages.items()}
    made |= draw(main, "") | draw(aside, ASIDE) | draw_values(main) | draw_errors(main)
    of_experiment: dict[str, Run] = {}
    for run in main.values():  # the first one speaks for all that differ in the seed
        of_experiment.setdefault(run.record["experiment"], run)
    saved: Made = {}
    for run in of_experiment.values():
        saved |= save_pictures(run, saved)
        excerpts.write(GENERATED, run.folder / "notebook.ipynb", executed=True)
    made |= saved
    made |= explorers.write_explorers(main, GENERATED)
    made |= fill_gaps(set(made))
    passports.write_passports(GENERATED, made, {run.folder: file for file, run in pages.items()})
    write_fragments(main, aside)
    (GENERATED / "source").mkdir()
    for path in listings.paths():
        listing = GENERATED / "source" / f"{listings.page_name(path)}.md"
        results.write_text(listing, listings.listing_page(path))


def prepare_forks(
    main: Mapping[str, Run], aside: Mapping[str, Run], own: Mapping[str, tuple[Run, Run | None]]
) -> None:
    """Write what `prepare` does of the forks alone; the rest is there."""
    file = GENERATED / passports.FILE
    kept = json.loads(file.read_text(encoding="utf-8"))
    kept = {name: passed for name, passed in kept.items() if not name.startswith(FORKS)}
    for folder in (GENERATED / FORKS, GENERATED / passports.READY / FORKS):
        shutil.rmtree(folder, ignore_errors=True)
    pages = write_pages(main, aside, own, only=FORKS)
    made = {file: [run] for file, run in pages.items() if file.startswith(FORKS)}
    passports.write_passports(
        GENERATED, made, {run.folder: file for file, run in pages.items()}, kept
    )


def write_pages(
    main: Mapping[str, Run],
    aside: Mapping[str, Run],
    own: Mapping[str, tuple[Run, Run | None]],
    only: str = "",
) -> dict[str, Run]:
    """Write the executed notebooks of the runs that `prepare` gets; return which stands where.

    Only files whose names begin with ``only`` are written.
    """
    pages = {f"notebooks/{name}.ipynb": run for name, run in main.items()}
    pages |= {f"not-counted/{name}.ipynb": run for name, run in aside.items()}
    for _, original in own.values():
        if original and original.folder not in [run.folder for run in pages.values()]:
            pages[f"{FORKS}{original.name}.ipynb"] = original
    file_of = {run.folder: file for file, run in pages.items()}
    compared = {}
    for name, (run, original) in own.items():
        pages[f"{FORKS}{name}.ipynb"] = run
        if original:
            link = f"../{file_of[original.folder]}"
            compared[run.folder] = comparison.compare(run, original, link)
    for folder in ("notebooks", "not-counted", FORKS):
        (GENERATED / folder).mkdir(exist_ok=True)
    for file, run in pages.items():
        if not file.startswith(only):
            continue
        text = notebook_page(run, compared.get(run.folder, ""))
        results.write_text(GENERATED / file, text)
    return pages


def write_fragments(main: Mapping[str, Run], aside: Mapping[str, Run]) -> None:
    """Write what the pages include of the report, with the figures that belong to it."""
    counted, beside = paper(main), paper(aside)
    made = origin(first(counted))
    landing = [report.landing(main, made), shown(counted, "")]
    section = [shown(counted, ""), report.section_5_3(main, made), seeds(counted, "")]
    if beside:
        landing.append(shown(beside, ASIDE))
        section += [shown(beside, ASIDE), seeds(beside, ASIDE)]
    results.write_text(GENERATED / "landing.md", "\n".join(landing))
    results.write_text(GENERATED / "section-5-3-results.md", "\n".join(section))
    results.write_text(GENERATED / "facts.json", json.dumps(report.facts(main), indent=1))
    reference = results.load(report.REFERENCE)
    results.write_text(GENERATED / "report.md", report.report_page(main, reference, made))
    results.write_text(GENERATED / "sweep.md", report.sweep(main))
    experiments = report.experiments(main)
    decay = experiments.get("decay", {}) | experiments.get("decay-even", {})
    results.write_text(GENERATED / "decay.md", choice_figures.decay_table(decay))
    results.write_text(GENERATED / "decay-verdicts.md", report.log_sigmoid(main))
    tightness = choice_figures.tightness_table(experiments.get("tightness", {}))
    results.write_text(GENERATED / "tightness.md", tightness)
    projections = experiments.get("projections", {})
    results.write_text(GENERATED / "projections.md", projection_figures.table(projections))
    results.write_text(GENERATED / "projections-costs.md", projection_figures.costs(projections))
    optimisers = optimiser_figures.losses_table(experiments.get("optimisers", {}))
    results.write_text(GENERATED / "optimisers.md", optimisers)
    results.write_text(GENERATED / "runs.md", run_list.all_runs(main))
    results.write_text(GENERATED / "mutation.md", mutation())
    results.write_text(GENERATED / "benchmark.md", tables.benchmark_page(tables.read_benchmark()))
    results.write_text(GENERATED / "today.md", today.page(today.read()))
    results.write_text(GENERATED / "intervals.md", today.intervals(today.read()))
    results.write_text(GENERATED / "torture.md", torture.page(today.read(torture.FOUND)))


def paper(group: Mapping[str, Run]) -> dict[str, Run]:
    """The runs of the experiment of Section 5.3 among others."""
    return report.experiments(group).get(PAPER, {})


def first(group: Mapping[str, Run]) -> Run:
    """The run of a group that its figure shows."""
    return next(iter(group.values()))


def origin(run: Run) -> str:
    """Whose run this is, in words."""
    if run.folder.parent == report.REFERENCE:
        return "the reference run, committed with this book"
    return "a run on the machine that built this book"


def notebook_page(run: Run, compared: str) -> str:
    """The executed notebook as a page: its own title, and on top what it is, and ``compared``.

    Where the executed notebook is not kept, the page has no outputs.
    """
    path = run.folder / "notebook.ipynb"
    if path.is_file():
        notebook = nbformat.read(path, as_version=4)
        source = runs.NOTEBOOKS / passports.notebook_name(run)
        if source.is_file():
            cells.with_text(notebook, nbformat.read(source, as_version=4))
        what = f"This page is the executed notebook of {origin(run)}."
    else:
        notebook = passports.ready(run)
        what = (
            f"This page is the notebook of {origin(run)}, with its parameters but without its "
            f"outputs, which were not kept. `{passports.command(run)}` makes them."
        )
    warn = figures.warning(run.record)
    title = f"{warn.split(':')[0]}: {run.record['title']}" if warn else run.record["title"]
    cells.entitle(notebook, title)
    head, _, rest = notebook.cells[0].source.partition("\n")
    kind, what = ("warning", f"{warn}. {what}") if warn else ("note", what)
    notebook.cells[0].source = f"{head}\n\n```{{{kind}}}\n{what}\n```\n\n{compared}\n{rest}"
    text: str = nbformat.writes(notebook)
    return text


def draw(group: Mapping[str, Run], prefix: str) -> Made:
    """Draw Figure 1 and the variances over all seeds, if their runs are there."""
    group = paper(group)
    if not group:
        return {}
    run, warn = first(group), report.warning(group)
    figure = figures.figure_1(run.values, run.record, warn)
    figures.save(figure, GENERATED / f"{prefix}figure-1.svg")
    tables = {f"seed {report.seed(run)}": run.values for run in group.values()}
    figures.save(figures.variance_ratios(tables, warn), GENERATED / f"{prefix}seeds.svg")
    return {f"{prefix}figure-1.svg": [run], f"{prefix}seeds.svg": list(group.values())}


def draw_values(main: Mapping[str, Run]) -> Made:
    """Draw the other figures that come from tables: one per run, or one per experiment."""
    made = {}
    for experiment, group in report.experiments(main).items():
        if experiment in report.LIKE_FIGURE_1:
            for name, run in group.items():
                figures.save(figures.figure_1(run.values, run.record), GENERATED / f"{name}.svg")
                made[f"{name}.svg"] = [run]
        if experiment in OVER_RUNS:
            values = pd.concat(run.values.assign(made=name) for name, run in group.items())
            figure = OVER_RUNS[experiment](values)
            figures.save(figure, GENERATED / f"{experiment}.svg")
            made[f"{experiment}.svg"] = list(group.values())
    return made


def draw_errors(main: Mapping[str, Run]) -> Made:
    """Draw how far off both estimators are, for the experiments that are drawn like Figure 1."""
    found = report.experiments(main)
    groups = {name: found[name] for name in report.LIKE_FIGURE_1 if name in found}
    if not groups:
        return {}
    tables = {
        f"{name} network": {
            n: (r.values, r.record["parameters"]["num_samples"]) for n, r in g.items()
        }
        for name, g in groups.items()
    }
    figures.save(figures.errors_of_one_label(tables), GENERATED / f"{WHICH}.svg")
    return {f"{WHICH}.svg": [run for group in groups.values() for run in group.values()]}


def save_pictures(run: Run, made_before: Mapping[str, list[Run]] | None = None) -> Made:
    """Write the picture of every cell that is tagged ``picture:NAME`` to ``NAME.svg``.

    A picture that an earlier run of the same notebook has drawn stays; ``made_before`` has the
    runs behind those that are there.

    Raises:
        BookError: the name does not suit a file or is taken, or the cell has not one SVG output.
    """
    made = {}
    for name, drawn in pictures(run.folder / "notebook.ipynb"):
        where, path = f"run {run.name}, tag {PICTURE}{name}", GENERATED / f"{name}.svg"
        if not re.fullmatch("[a-z0-9_-]+", name):
            raise BookError(f"{where}: use lower-case letters, digits, - and _ for the name.")
        if len(drawn) != 1:
            raise BookError(f"{where}: the cell has {len(drawn)} SVG outputs; let it show one.")
        before = (made_before or {}).get(path.name, [])
        if any(passports.notebook_name(r) == passports.notebook_name(run) for r in before):
            continue
        if path.exists():
            raise BookError(f"{where}: another picture has this name; choose a new one.")
        results.write_text(path, figures.compact(drawn[0]))
        made[path.name] = [run]
    return made


def pictures(notebook: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and SVG outputs of every cell of a notebook that is tagged ``picture:NAME``."""
    if not notebook.is_file():
        return
    for cell in nbformat.read(notebook, as_version=4).cells:
        data = [output.get("data", {}) for output in cell.get("outputs", [])]
        for tag in cells.tags(cell):
            if tag.startswith(PICTURE):
                yield tag.removeprefix(PICTURE), [x[figures.SVG] for x in data if figures.SVG in x]


def fill_gaps(made: set[str]) -> Made:
    """Say "not run yet" in place of what the runs of runs.yml are still to draw or to print."""
    wanted = {}
    for name, spec in runs.specs().items():
        if excerpts.write(GENERATED, spec.notebook, executed=False):
            promise(name, spec)
        if spec.experiment in report.LIKE_FIGURE_1:
            wanted[name] = name
        if spec.experiment in OVER_RUNS:
            wanted[spec.experiment] = spec.experiment
        wanted |= {picture: name for picture, _ in pictures(spec.notebook)}
    missing = {file: name for file, name in wanted.items() if f"{file}.svg" not in made}
    for file, name in missing.items():
        figures.save(figures.not_yet(name), GENERATED / f"{file}.svg")
    return {f"{file}.svg": [] for file in missing}


def promise(name: str, spec: runs.Spec) -> None:
    """A page for a run that pages link to, where it is still to be made: its notebook as it is."""
    path = GENERATED / "notebooks" / f"{name}.ipynb"
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    notebook = nbformat.read(spec.notebook, as_version=4)
    cells.entitle(notebook, f"{spec.title} (not run yet: make reproduce)")
    results.write_text(path, nbformat.writes(notebook) + "\n")


def mutation() -> str:
    """What ``make mutants`` found last, for the page of the map."""
    if not MUTATION.is_file():
        return "The formulas have not been mutated yet: `make mutants`.\n"
    found = json.loads(MUTATION.read_text(encoding="utf-8"))
    modules, survivors = found["modules"], found["survivors"]
    mutants, killed = (sum(m[key] for m in modules.values()) for key in ("mutants", "killed"))
    rows = [[f"`{n}`", f"{m['mutants']:,}", f"{m['killed']:,}"] for n, m in modules.items()]
    current = found["source"] == runs.fimlib_digest()
    head = (
        f"{found['tool']} made {mutants:,} changes to the formulas, one at a time; the tests "
        f"noticed {killed:,} of them, **{killed / mutants:.1%}**."
        + ("" if current else " *`fimlib` has changed since; `make mutants` brings it up to date.*")
    )
    table = markdown_table(["module", "changes", "noticed"], rows)
    listed = "\n".join(
        f"* `{s['function']}`: `{s['old']}` → `{s['new']}`. {s['why'] or 'Not argued yet.'}"
        for s in survivors
    )
    fold = f":::{{dropdown}} The {len(survivors)} changes that no test noticed\n{listed}\n:::\n"
    return f"{head}\n\n{table}\n{fold}"


def shown(group: Mapping[str, Run], prefix: str) -> str:
    """Figure 1 with its caption."""
    run, warn = first(group), report.warning(group)
    alt = figures.seen(run.values)
    return (
        f"```{{figure}} _generated/{prefix}figure-1.svg\n:alt: {warn + '. ' if warn else ''}{alt}\n"
        f":width: 100%\n\nOur counterpart of the paper's Figure 1, from "
        f"{origin(run)}. {figures.caption(run.record, warn)}\n```\n"
    )


def seeds(group: Mapping[str, Run], prefix: str) -> str:
    """The picture over all seeds, with links to their notebooks."""
    warn = report.warning(group)
    links = ", ".join(
        f"[{report.seed(r)}](_generated/{'not-counted' if warn else 'notebooks'}/{name}.ipynb)"
        for name, r in group.items()
    )
    below, points = figures.count_below([run.values for run in group.values()])
    return (
        f"```{{figure}} _generated/{prefix}seeds.svg\n:alt: Ratio of the two variances in each "
        f"hidden layer over the epochs, one line per seed; below 1 at {below} of {points} points\n"
        f":width: 100%\n\nRatio of the layers' "
        f"mean variances, one line per seed; below 1 the paper's V₁ < V₂ holds. "
        f"{warn + '. ' if warn else ''}Executed notebooks by seed: "
        f"{links}.\n```\n"
    )


def build(output: Path, *, whole: bool = True) -> Path:
    """Render ``book/`` into ``output/_build`` with warnings as errors; return the first page.

    If not ``whole``, only the pages whose sources changed are rendered.

    Raises:
        BookError: Jupyter Book reported a warning or an error.
    """
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(BOOK)]
    command += ["--path-output", str(output), "-W", "-n", "--keep-going", "-q"]
    command += ["--all"] if whole else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = COLOUR.sub("", done.stdout + done.stderr)
        lines = [x for x in said.splitlines() if "WARNING" in x or "ERROR" in x]
        raise BookError("Jupyter Book found:\n" + "\n".join(lines or [said]))
    return output / "_build" / "html" / "index.html"


def made_of(*groups: Mapping[str, Run]) -> str:
    """SHA-256 of all that the pages are made from, but for those of forks."""
    parts = [[name, run.record["digest"]] for group in groups for name, run in group.items()]
    parts += [[len(group)] for group in groups]
    parts += [[name, results.version(name)] for name in TOOLS]
    parts += [["commit", results.commit()]]
    found = [json.dumps(parts).encode()]
    for path in sorted(inputs()):
        found += [path.relative_to(results.ROOT).as_posix().encode(), path.read_bytes()]
    return results.digest(found)


def inputs() -> Iterator[Path]:
    """The project's files that pages are made from, but for those of forks."""
    of_forks = {fork["notebook"] for fork in forks.read().values()} | {forks.FILE}
    left_out = {BOOK / "_build", GENERATED, results.ROOT / "data" / "mnist"}
    for folder in (BOOK, runs.FIMLIB, runs.NOTEBOOKS, results.ROOT / "data"):
        for path in folder.rglob("*"):
            kept = not left_out & {*path.parents} and path.name not in of_forks
            hidden = any(p.startswith((".", "__")) for p in path.relative_to(folder).parts[:-1])
            if path.is_file() and kept and not hidden:
                yield path


def make(folder: Path, output: Path, *, smoke: bool = False) -> Path:
    """Build the book from the runs of a folder; return its first page."""
    main_runs, aside = sources(folder, smoke=smoke)
    own = forked(folder)
    print(f"building the book with {origin(first(paper(main_runs)))} …", flush=True)
    if aside:
        print(f"… and apart from it {report.warning(aside)}", flush=True)
    if own:
        print(f"… and with the forks {', '.join(own)}", flush=True)
    with runs.lock(BOOK, "build"):  # two builds would mix their pages
        digest, notes = made_of(main_runs, aside), (GENERATED / WHOLE, output / "_build" / WHOLE)
        whole = any(not note.is_file() or note.read_text() != digest for note in notes)
        notes[1].unlink(missing_ok=True)  # after a failure everything is built anew
        (prepare if whole else prepare_forks)(main_runs, aside, own)
        index = build(output.resolve(), whole=whole)
        for note in notes:
            results.write_text(note, digest)
    print(f"the book's first page: {os.path.relpath(index, results.ROOT)}", flush=True)
    return index


@cli.command(BookError, ValueError, runs.RunError)
def main(argv: Sequence[str] | None = None) -> None:
    """Build the book from the runs of a folder; see the module."""
    parser = argparse.ArgumentParser(prog="support.book", description=__doc__)
    cli.add_results(parser)
    parser.add_argument("--output", type=Path, default=BOOK, help="where _build will lie")
    arguments = parser.parse_args(argv)
    make(arguments.results.resolve(), arguments.output, smoke=arguments.smoke)


if __name__ == "__main__":
    sys.exit(main())
