"""Run notebooks through papermill, once each: finished runs are kept, half-made ones never count.

``python -m support.runs NAME …`` makes the named runs of ``runs.yml``, one after the other; a run
is made in a folder of its own and gets its final name when it is finished. A finished run is kept
as long as its files are whole and `fingerprint` is the same: of its code, parameters, and data. A
run that was interrupted goes on from its last checkpoint if the machine is the same as well.

A runner that is killed leaves its kernel behind for about a second. That does no harm: the kernel
may still write what the next runner's kernel writes as well, since both compute the same, and every
file appears whole; a run of other code or parameters has another folder.
"""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import itertools
import json
import logging
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import papermill
import torch
import yaml
from filelock import FileLock, Timeout
from IPython.core.inputtransformer2 import TransformerManager
from papermill.exceptions import PapermillException, PapermillExecutionError

from support import cells as of_notebook
from support import checkpoint, cli, data, figures, imports, launch, results, speed

NOTEBOOKS = results.ROOT / "notebooks"
FIMLIB = results.ROOT / "fimlib"
# How the entries of runs.yml look.
FORMS: dict[str, tuple[type, str]] = {
    "runs": (dict, "the runs by name"),
    "smoke": (dict, "what is made, and with which parameters, at smoke size"),
    "large": (dict, "runs for a GPU by name"),
    "title": (str, "a text"),
    "notebook": (str, "the name of a notebook beside runs.yml"),
    "each": (dict, "lists of values by parameter, such as {seed: [0, 1]}"),
    "parameters": (dict, "a mapping such as {epochs: 5}, or left out"),
}
# Parameters that no run of runs.yml may set.
OURS = {
    "dataset": "chosen by `make … DATASET=`",
    "out": "chosen by the runner",
    "name": "chosen by the runner",
}
PLAIN = (int, float, str)  # what a value in `each:` may be
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
parsed = functools.cache(yaml.safe_load)  # a book asks for runs.yml hundreds of times
ATTEMPTS = "attempts.json"  # in the folder of an unfinished run: when it was begun, and how often
POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
NO_KERNEL = "Kernel died before replying"  # as jupyter_client says it
LIBRARIES = ("torch", "numpy", "scipy")  # whose versions the values depend on


class RunError(Exception):
    """A run cannot be made; the message says why and what to do."""


@dataclass(frozen=True)
class Spec:
    """What a run is made of."""

    name: str
    title: str
    notebook: Path
    parameters: dict[str, Any] = field(default_factory=dict)
    experiment: str = ""  # what the runs of one entry of runs.yml have in common
    varied: tuple[str, ...] = ()  # the parameters in which those differ


@dataclass
class Attempts:
    """The attempts at a run, this one included; times in seconds since 1970."""

    number: int
    started: float  # the first one
    latest: float  # this one
    earlier: float = 0.0  # seconds that those before took, up to the checkpoint that is used


def specs(
    path: Path = NOTEBOOKS / "runs.yml", *, smoke: bool = False, section: str = "runs"
) -> dict[str, Spec]:
    """All runs of a section of ``runs.yml`` by name.

    The section "large" has those that `make run` makes alone, at the size of a GPU.

    Raises:
        RunError: the file is not as it should be.
    """
    plan = read_plan(path)
    found: dict[str, Spec] = {}
    for name, run in plan.get(section, {}).items():
        parameters, each = dict(run.get("parameters", {})), dict(run.get("each", {}))
        if smoke:
            parameters |= plan["smoke"]["parameters"].get(run["notebook"], {})
            each = {k: fewer(v, plan["smoke"]["each"].get(k, v)) for k, v in each.items()}
        for values in itertools.product(*each.values()):
            chosen = dict(zip(each, values, strict=True))
            key, title = name, run["title"]
            for parameter, value in chosen.items():
                key += f"-{parameter}-{value}".lower()
                title = title.replace(f"{{{parameter}}}", str(value))
            if key in found or not NAME.fullmatch(key):
                why = "two runs have this name" if key in found else "it is no name for a folder"
                raise RunError(f"{path.name}, run {name}: the run {key}: {why}.")
            notebook = path.parent / run["notebook"]
            found[key] = Spec(key, title, notebook, parameters | chosen, name, tuple(each))
    return found


def fewer(values: list[Any], wanted: list[Any]) -> list[Any]:
    """Those values that are wanted, or the first one: something of every run is tried."""
    return [value for value in values if value in wanted] or values[:1]


def read_plan(path: Path) -> dict[str, Any]:
    """Read ``runs.yml``; a RunError says which run is not as it should be, and how it should."""
    try:
        plan = copy.deepcopy(parsed(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{path.name} is not valid YAML: {error}") from error
    check_entry(plan, path.name, needed=("runs", "smoke"), optional=("large",))
    check_entry(plan["smoke"], f"{path.name}, smoke", needed=("each", "parameters"))
    for notebook, parameters in plan["smoke"]["parameters"].items():
        where = f"{path.name}, smoke, {notebook}"
        check_entry({"parameters": parameters}, where, needed=("parameters",))
    if both := sorted(plan["runs"].keys() & plan.get("large", {}).keys()):
        raise RunError(f"{path.name}: {both[0]} is in `runs:` and in `large:`; rename one.")
    for name, run in (plan["runs"] | plan.get("large", {})).items():
        where = f"{path.name}, run {name}"
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise RunError(f"{where}: a name is a letter, then letters, digits or any of _ . -")
        check_entry(run, where, needed=("title", "notebook"), optional=("each", "parameters"))
        if both := sorted(run.get("each", {}).keys() & run.get("parameters", {}).keys()):
            raise RunError(f"{where}: {both[0]} is in `each:` and in `parameters:`; give one.")
    return dict(plan)


def check_entry(
    entry: Any, where: str, *, needed: tuple[str, ...], optional: tuple[str, ...] = ()
) -> None:
    """Raise a RunError unless a mapping has the keys that it needs, no unknown ones, in form."""
    keys = needed + optional
    if not isinstance(entry, dict) or any(key not in entry for key in needed):
        raise RunError(f"{where}: it needs {' and '.join(f'`{key}:`' for key in needed)}.")
    if unknown := [str(key) for key in entry if key not in keys]:
        raise RunError(f"{where}: unknown {', '.join(unknown)}; there are: {', '.join(keys)}.")
    for key, value in entry.items():
        kind, form = FORMS[key]
        if not isinstance(value, kind) or not value:
            raise RunError(f"{where}: `{key}:` must be {form}, not {value!r}.")
    for values in entry.get("each", {}).values():
        if not isinstance(values, list) or not values or any(type(v) not in PLAIN for v in values):
            raise RunError(f"{where}: `each:` must be {FORMS['each'][1]}, not {entry['each']!r}.")
    for reserved in sorted(OURS.keys() & (entry.get("parameters", {}) | entry.get("each", {}))):
        raise RunError(f"{where}: the parameter {reserved} is {OURS[reserved]}; leave it out.")


def execute(spec: Spec, folder: Path, dataset: str) -> bool:
    """Make a run, ``folder / spec.name``, unless it is finished; return whether it was made now.

    Raises:
        RunError: the parameters do not fit the notebook, or a cell failed.
        DataError: the data cannot be read.
    """
    defaults = check_parameters(spec.notebook, spec.parameters)
    with lock(folder, spec.name):
        if is_finished(spec, folder, dataset):
            return False
        digest = fingerprint(spec, dataset)
        partial, attempts = begin(folder / ".partial" / spec.name, digest)
        ours = {"dataset": dataset, "out": os.path.relpath(partial, NOTEBOOKS), "name": spec.name}
        parameters = spec.parameters | {k: v for k, v in ours.items() if k in defaults}
        calibration = speed.calibration()
        run_notebook(spec, partial / "notebook.ipynb", parameters)
        finish(partial, folder / spec.name, spec, attempts, digest, calibration)
    return True


def begin(folder: Path, digest: str) -> tuple[Path, Attempts]:
    """The folder for an attempt at a run: the one of an interrupted attempt at the same, if any.

    Others in the folder of the run's attempts are removed. Attempts are the same if what the run is
    made of has the same digest, and if the machine is the same: the last bits depend on it.
    """
    machine = (results.processor(), torch.__version__, speed.gpu() or "no GPU")
    partial = folder / results.digest(x.encode() for x in (digest, *machine))[:12]
    for other in folder.glob("*"):
        if other != partial:
            shutil.rmtree(other, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    attempts = Attempts(1, time.time(), time.time())
    try:
        old = Attempts(**json.loads((partial / ATTEMPTS).read_text()))
        attempts.number, attempts.started = old.number + 1, old.started
        saved = (partial / checkpoint.FILE).stat().st_mtime
        attempts.earlier = old.earlier + max(0.0, saved - old.latest)
    except (FileNotFoundError, ValueError, TypeError):
        pass  # no attempt, or none that can be continued
    results.write_text(partial / ATTEMPTS, json.dumps(vars(attempts)))
    return partial, attempts


def is_finished(spec: Spec, folder: Path, dataset: str, digest: str = "") -> bool:
    """Whether the run lies in ``folder`` as its code, parameters and data make it.

    The arguments are those of `execute` and `fingerprint`.
    """
    old = results.load(folder, [spec.name]).get(spec.name)
    if old and old.record.get("fingerprint") == fingerprint(spec, dataset, digest):
        say(spec.name, f"kept, finished {old.record['started']}")
        return True
    if old:
        say(spec.name, "code, parameters, data or libraries changed: to be made again")
    elif (folder / spec.name).exists():
        say(spec.name, "files are missing or damaged: to be made again")
    return False


def fingerprint(spec: Spec, dataset: str, digest: str = "") -> str:
    """SHA-256 of what a run is made of: code, parameters, data, and versions of libraries.

    Of the notebook, the code cells and their tags count; text and stored outputs do not. So do the
    files that they import, but for docstrings. The data are read if their digest is not given.
    """
    parts = [json.dumps([of_notebook.tags(c), c.source]) for c in code_cells(spec.notebook)]
    parts += [repr(sorted(spec.parameters.items()))]
    parts += [f"{name} {results.version(name)}" for name in LIBRARIES]
    parts += [code(path) for path in sources(spec.notebook)]
    if "dataset" in check_parameters(spec.notebook, spec.parameters):
        parts.append(digest or data_digest(dataset))
    return results.digest(part.encode() for part in parts)


def sources(notebook: Path) -> list[Path]:
    """The files of this project that a notebook imports, directly or through others."""
    shell = TransformerManager()  # turns %magic into Python
    found = [shell.transform_cell(cell.source) for cell in code_cells(notebook)]
    return imports.followed(found, [NOTEBOOKS, results.ROOT])


def code_cells(notebook: Path) -> list[nbformat.NotebookNode]:
    """The code cells of a notebook, but for the one of `launch`."""
    cells = read_notebook(notebook).cells
    return [c for c in cells if c.cell_type == "code" and launch.TAG not in of_notebook.tags(c)]


def fimlib_digest() -> str:
    """SHA-256 of fimlib's code."""
    return results.digest(code(path).encode() for path in sorted(FIMLIB.rglob("*.py")))


def code(path: Path) -> str:
    """A Python file without its docstrings, which change no result."""
    return without_docstrings(path.read_text(encoding="utf-8"))


@functools.cache
def without_docstrings(text: str) -> str:
    """Python code without its docstrings and empty lines."""
    lines = text.split("\n")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            for number in range(first.lineno - 1, first.end_lineno or first.lineno):
                lines[number] = ""
    return "\n".join(line for line in lines if line)


@functools.cache
def data_digest(dataset: str) -> str:
    """SHA-256 of a data set."""
    return data.load(dataset).digest


def check_parameters(notebook: Path, parameters: dict[str, Any]) -> set[str]:
    """Names of the notebook's parameters; a RunError if others are asked for.

    papermill itself would run on with the notebook's own values.
    """
    tagged = [c.source for c in code_cells(notebook) if "parameters" in of_notebook.tags(c)]
    if not tagged:
        raise RunError(
            f"{notebook.name} has no cell tagged 'parameters': tag the cell that sets them, else "
            "parameters given from outside would be overwritten."
        )
    try:
        known = set(of_notebook.assigned(tagged[0]))
    except (ValueError, SyntaxError) as error:
        raise RunError(f"{notebook.name}: its parameters cell cannot be read: {error}") from error
    if unknown := sorted(set(parameters) - known):
        raise RunError(
            f"{notebook.name} has no parameter {', '.join(unknown)}; there are: "
            f"{', '.join(sorted(known))}. Correct runs.yml or the notebook's parameters cell."
        )
    return known


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook as it is.

    Raises:
        RunError: there is none, or it is not one.
    """
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in path.parent.glob("*.ipynb")))
        raise RunError(f"there is no notebook {path.name}; there are: {there}.")
    try:
        found: nbformat.NotebookNode = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    except Exception as error:  # what is not a notebook fails in many ways
        raise RunError(f"{path.name} cannot be read as a notebook: {error}") from error
    if found.get("nbformat") != 4 or not isinstance(found.get("cells"), list):
        raise RunError(f"{path.name} is not in Jupyter's format 4: open and save it in Jupyter.")
    return found


def run_notebook(spec: Spec, output: Path, parameters: dict[str, Any], starts: int = 3) -> None:
    """Execute through papermill, its printed lines shown as they come.

    A kernel that does not start is started again, `starts` times in all: of two that start at once
    one may find its port taken.
    """
    logging.getLogger("papermill").setLevel(logging.ERROR)
    say(spec.name, f"{spec.notebook.name} starts")
    try:
        with plain_environment(threads(spec.parameters)):
            papermill.execute_notebook(
                str(spec.notebook), str(output), parameters, kernel_name="python3",
                cwd=str(NOTEBOOKS), progress_bar=False, stdout_file=Lines(spec.name),
                start_timeout=600,  # many runs at once may take long to start
                # No tracebacks of its own upon Ctrl-C, no history in the home folder.
                extra_arguments=["--log-level=CRITICAL", "--HistoryManager.enabled=False"],
                language="python",
            )  # fmt: skip
    except PapermillExecutionError as error:
        if unwritable := cannot_write(error.evalue, output.parent):
            raise RunError(f"{spec.name}: {cli.remedy(unwritable)}") from error
        raise RunError(
            f"{spec.name}: a cell of {spec.notebook.name} failed with "
            f"{error.ename}: {error.evalue}\nThe half-executed notebook, with the traceback, is "
            f"{os.path.relpath(output)}"
        ) from error
    except (PapermillException, RuntimeError) as error:
        if starts > 1 and NO_KERNEL in str(error):
            return run_notebook(spec, output, parameters, starts - 1)
        raise RunError(f"{spec.name}: {spec.notebook.name} could not be run: {error}") from error


@contextmanager
def plain_environment(threads: int) -> Iterator[None]:
    """Let a kernel start with a fixed number of threads and without the user's own settings.

    The last bits of sums depend on the threads, values on whatever IPython's start-up files do, and
    figures on matplotlib's settings.
    """
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="fimlib-") as empty:
        settings = Path(empty, "matplotlibrc")
        settings.touch()
        os.environ.update(dict.fromkeys(POOLS, str(threads)))
        os.environ.update(IPYTHONDIR=empty, MATPLOTLIBRC=str(settings))
        os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")  # this environment's own kernel
        os.environ.pop("PYTHONSTARTUP", None)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def cannot_write(message: str, folder: Path) -> OSError | None:
    """The error of the system behind a cell's error, if the run's folder cannot be written."""
    found = re.match(r"\[Errno (\d+)\] (.*)", message)
    if found and (int(found[1]) in cli.FULL or folder.name in message):
        return OSError(int(found[1]), found[2], os.path.relpath(folder))
    return None


def threads(parameters: Mapping[str, Any]) -> int:
    """CPU threads of a run: one, if its parameters do not say otherwise."""
    return int(parameters.get("threads", 1))


def finish(
    partial: Path, final: Path, spec: Spec, attempts: Attempts, digest: str, calibration: float
) -> None:
    """Clean the executed notebook, complete the record, give the folder its final name."""
    path = partial / "notebook.ipynb"
    notebook = nbformat.read(path, as_version=4)
    if notebook.metadata.papermill.exception:
        raise RunError(f"{spec.name}: the notebook ended with an error; see {path}")
    notebook.metadata.pop("papermill")  # it holds this machine's paths
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if "outputs" in cell:
            cell.outputs = figures.compacted(merge_lines(cell.outputs))
    results.write_text(path, nbformat.writes(notebook).replace(str(results.ROOT), "."))
    record = results.record(spec.parameters, {}, attempts.latest, torch.device("cpu"))
    record["machine"]["threads"] = threads(spec.parameters)
    record["memory_mb"] = results.megabytes(resource.getrusage(resource.RUSAGE_CHILDREN))
    record |= results.read_record(partial) or {}  # the notebook's own, if it writes one
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(attempts.started))
    record |= {
        "title": spec.title,
        "run": spec.name,
        "notebook": spec.notebook.name,
        "experiment": spec.experiment,
        "varied": list(spec.varied),
        "fingerprint": digest,
        "started": started,
        "seconds": round(record["seconds"] + attempts.earlier, 1),
        "wall_seconds": round(time.time() - attempts.latest + attempts.earlier, 1),
        "attempts": attempts.number,
        "calibration": calibration,
        "files": results.file_digests(partial),
    }
    results.save(partial, None, record)
    shutil.rmtree(final, ignore_errors=True)
    partial.replace(final)
    for left in (final / checkpoint.FILE, final / ATTEMPTS, *final.glob(".*")):
        left.unlink(missing_ok=True)
    shutil.rmtree(partial.parent, ignore_errors=True)


def merge_lines(outputs: list[Any]) -> list[Any]:
    """Join printed lines that came one by one into one output."""
    merged: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and merged and merged[-1].get("name") == output.name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


@contextmanager
def lock(folder: Path, name: str) -> Iterator[None]:
    """Let one process at a time make a run; the lock ends with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    # Across the nodes of a cluster, too, if their shared file system knows locks.
    file = FileLock(folder / f".{name}.lock")
    try:
        held = file.acquire(timeout=0)
    except Timeout:
        say(name, "another process is making it: waits")
        held = file.acquire()
    with held:
        yield


class Lines:
    """A stream that puts the run's name before every line."""

    def __init__(self, name: str) -> None:
        self.name, self.rest = name, ""

    def write(self, text: str) -> None:
        """Print the lines that are complete."""
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            say(self.name, line)

    def flush(self) -> None:
        """Lines are shown as they are complete."""


def say(name: str, text: str) -> None:
    """One line of progress."""
    print(f"[{name}] {text}", flush=True)


def make(spec: Spec, folder: Path, dataset: str) -> None:
    """Make a run unless it is finished already, and say so."""
    start = time.monotonic()
    if execute(spec, folder, dataset):
        say(spec.name, f"finished in {time.monotonic() - start:.0f} s")
        if (figure := folder / spec.name / "figure.svg").is_file():
            say(spec.name, f"figure: {os.path.relpath(figure, results.ROOT)}")


def select(names: Sequence[str], known: Mapping[str, Spec]) -> list[Spec]:
    """The named runs; a mistake in the last one is noticed before the first one starts.

    Raises:
        RunError: there is none of this name, or its parameters do not fit its notebook.
    """
    if unknown := sorted(set(names) - set(known)):
        raise RunError(f"no runs named {', '.join(unknown)}; there are: {', '.join(known)}.")
    for name in names:
        check_parameters(known[name].notebook, known[name].parameters)
    return [known[name] for name in names]


@cli.command(RunError, data.DataError)
def main(argv: Sequence[str] | None = None) -> None:
    """Make runs; see the module."""
    parser = argparse.ArgumentParser(prog="support.runs", description=__doc__)
    parser.add_argument("names", nargs="+", help="runs to make")
    cli.add_results(parser)
    arguments = parser.parse_args(argv)
    for spec in select(arguments.names, specs(smoke=arguments.smoke)):
        make(spec, arguments.results, arguments.dataset)


if __name__ == "__main__":
    sys.exit(main())
