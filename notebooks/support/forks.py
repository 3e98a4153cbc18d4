"""Forks: your own copies of the notebooks, run and shown beside the originals.

``python -m support.forks new NAME --source mnist`` (`make fork`) copies a notebook and notes it in
``forks.yml``; ``python -m support.forks run NAME`` (`make run`) executes it, or a run of
``runs.yml``, into the folder of results.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
import yaml

from support import cells, data, results, runs
from support.runs import NOTEBOOKS, OURS, RunError, Spec

FILE = "forks.yml"
HEAD = "# Your forks: made by `make fork`, executed by `make run`.\n"
KEYS = ("notebook", "from", "title", "parameters")
MODEL = "def build_model("
MARK = (
    "# The cell to change: everything below goes on with the network that this function returns.\n"
)
NAME = re.compile(r"[a-z][a-z0-9_-]*")


def read() -> dict[str, dict[str, Any]]:
    """The forks in ``forks.yml`` by name.

    Raises:
        RunError: the file is not as it should be.
    """
    path = NOTEBOOKS / FILE
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{FILE} is not valid YAML: {error}") from error
    for name, entry in found.items() if isinstance(found, dict) else [("?", None)]:
        if not isinstance(entry, dict) or set(entry) != set(KEYS):
            raise RunError(f"{FILE}, fork {name}: it needs exactly {', '.join(KEYS)}.")
    return dict(found)


def specs(*, smoke: bool = False) -> dict[str, Spec]:
    """The forks as runs, by name; at smoke size if wanted."""
    small = runs.read_plan(NOTEBOOKS / "runs.yml")["smoke"]["parameters"] if smoke else {}
    return {
        name: Spec(
            name,
            fork["title"],
            NOTEBOOKS / fork["notebook"],
            fork["parameters"] | small.get(fork["from"], {}),
            name,
        )
        for name, fork in read().items()
    }


def new(name: str, source: str) -> Path:
    """Copy a notebook under a new name and note it in ``forks.yml``.

    Args:
        name: Of the fork.
        source: Name of the notebook, with or without ``.ipynb``.

    Raises:
        RunError: the name does not suit or is taken, or there is no such notebook.
    """
    original = NOTEBOOKS / f"{Path(source).name.removesuffix('.ipynb')}.ipynb"
    runs.check_parameters(original, {})
    if not NAME.fullmatch(name):
        raise RunError(
            f"{name!r} is no name for a fork: use lower-case letters, digits, - and _, a letter "
            "first, as in NAME=mynet."
        )
    path, forks = NOTEBOOKS / f"{name}.ipynb", read()
    if path.exists() or name in forks or name in runs.specs():
        raise RunError(f"there is already a notebook or a run named {name}; choose another NAME.")
    notebook = nbformat.read(original, as_version=4)
    title = f"{name}, a fork of {original.name}"
    cells.entitle(notebook, title)
    for cell in notebook.cells:
        if cell.cell_type == "code" and MODEL in cell.source and MARK not in cell.source:
            cell.source = MARK + cell.source
    forks[name] = dict(
        zip(KEYS, (path.name, original.name, title, {}), strict=True)  # in this order in the file
    )
    results.write_text(path, nbformat.writes(notebook) + "\n")
    save(forks)
    return path


def save(forks: Mapping[str, Any]) -> None:
    """Write ``forks.yml``."""
    text = yaml.safe_dump(dict(forks), sort_keys=False, allow_unicode=True, width=100)
    results.write_text(NOTEBOOKS / FILE, HEAD + text)


def set_parameters(name: str, text: str) -> None:
    """Note other parameters for a fork, as in ``activation=tanh epochs=5``.

    Raises:
        RunError: they do not suit the notebook.
    """
    forks = read()
    if name not in forks:
        raise RunError(
            f"{name} is a run of runs.yml, whose parameters stand there. To change them, fork its "
            f"notebook: make fork NAME=mynet FROM={runs.specs()[name].notebook.stem}"
        )
    fork = forks[name]
    path = NOTEBOOKS / fork["notebook"]
    given = parse(text)
    for reserved in sorted(OURS.keys() & given.keys()):
        raise RunError(f"the parameter {reserved} is {OURS[reserved]}; leave it out of PARAMS.")
    runs.check_parameters(path, {})
    defaults = cells.parameters(nbformat.read(path, as_version=4))
    if unknown := sorted(given.keys() - defaults.keys()):
        there = ", ".join(sorted(defaults.keys() - OURS.keys()))
        raise RunError(
            f"PARAMS: {path.name} has no parameter {', '.join(unknown)}; there are: {there}."
        )
    changed = fork["parameters"] | {k: suited(k, v, defaults[k]) for k, v in given.items()}
    fork["parameters"] = {k: v for k, v in changed.items() if v != defaults.get(k)}
    save(forks)


def parse(text: str) -> dict[str, Any]:
    """Parameters from a line.

    >>> parse("activation=tanh hidden=[64, 32] learning_rate=1e-3")
    {'activation': 'tanh', 'hidden': [64, 32], 'learning_rate': 0.001}

    Raises:
        RunError: the line does not read ``name=value name=value``.
    """
    found = {}
    for item in re.split(r"\s+(?=[A-Za-z_]\w*=)", text.strip()):
        name, sign, value = item.partition("=")
        if name in found:
            raise RunError(f"PARAMS: {name} is given twice.")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            sign = ""
        if not sign or not name.isidentifier() or found[name] in (None, ""):
            raise RunError(f'PARAMS: {item!r} does not read name=value, as in "epochs=5".')
        if isinstance(found[name], str):  # YAML wants a dot in 1.0e-3
            with suppress(ValueError):
                found[name] = float(value)
    return found


def suited(name: str, value: Any, default: Any) -> Any:
    """A value of the kind of the notebook's own; text may stand where a number may.

    Raises:
        RunError: it is of another kind, or negative where the notebook's own is not.
    """
    numbers = all(type(x) in (int, float) for x in (value, default))
    if numbers and value < 0 <= default:
        raise RunError(f"PARAMS: {name} must not be negative, but is {value}.")
    if type(default) is float and type(value) is int:
        return float(value)
    if type(value) is not type(default) and not (type(default) is str and type(value) is int):
        raise RunError(f"PARAMS: {name} is {default!r} in the notebook; {value!r} does not suit.")
    return value


def run(name: str, folder: Path, dataset: str, *, smoke: bool = False) -> None:
    """Make a fork, or a run of ``runs.yml``, unless it is finished already.

    Raises:
        RunError: there is none of this name, or it failed.
    """
    start, spec = time.monotonic(), known(smoke=smoke)[name]
    kept = ", ".join(f"{key}={value}" for key, value in spec.parameters.items())
    try:
        if runs.execute(spec, folder, dataset):
            runs.say(name, f"finished in {time.monotonic() - start:.0f} s")
    except RunError as error:
        if name in read() and kept:
            raise RunError(
                f"{error}\n{name} keeps these parameters until PARAMS changes them: {kept}"
            ) from error
        raise


def known(*, smoke: bool = False) -> dict[str, Spec]:
    """The runs of ``runs.yml`` and the forks, by name."""
    return runs.specs(smoke=smoke) | specs(smoke=smoke)


def main(argv: list[str] | None = None) -> int:
    """Make a fork or a run; see the module. Exit status 1 with a message if it cannot be made."""
    parser = argparse.ArgumentParser(prog="support.forks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("new", help="copy a notebook")
    maker.add_argument("name")
    maker.add_argument("--source", default="mnist", help="the notebook to copy")
    runner = commands.add_parser("run", help="execute a fork, or a run of runs.yml")
    runner.add_argument("name")
    runner.add_argument("--parameters", default="", help='such as "activation=tanh epochs=5"')
    runner.add_argument("--smoke", action="store_true", help="at smoke size")
    runner.add_argument("--dataset", default="mnist", choices=("mnist", "digits"))
    runner.add_argument("--results", type=Path, default=results.ROOT / "results" / "mnist")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "new":
            path = new(arguments.name, arguments.source)
            has_model = MARK.strip() in path.read_text(encoding="utf-8")
            cell = f"its cell {MODEL[4:-1]} (or any other)" if has_model else "what you like"
            print(
                f"notebooks/{path.name} is a copy of {arguments.source}, noted in notebooks/{FILE}."
                f" Change {cell}, then: make run NAME={path.stem}"
            )
            return 0
        if arguments.name not in known():
            mine = ", ".join(read()) or "none yet: make fork NAME=mynet FROM=mnist"
            raise RunError(
                f"there is no fork and no run named {arguments.name!r}. Forks: {mine}. Runs: "
                f"{', '.join(runs.specs())}."
            )
        if arguments.parameters.strip():
            set_parameters(arguments.name, arguments.parameters)
        run(arguments.name, arguments.results, arguments.dataset, smoke=arguments.smoke)
    except (RunError, data.DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = error.filename or getattr(arguments, "results", NOTEBOOKS)
        print(f"error: {runs.remedy(error.errno, f'{error.strerror} ({where})')}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: run again to continue.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
