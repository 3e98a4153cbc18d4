"""Forks: your own copies of the notebooks, run and shown beside the originals.

``python -m support.forks new NAME --source mnist`` (`make fork`) copies a notebook and notes it in
``forks.yml``; ``python -m support.forks run NAME`` executes it, or a run of ``runs.yml``, into the
folder of results (`make run`, see `support.reproduce`).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
import yaml

from support import cells, cli, data, results, runs
from support.runs import NOTEBOOKS, OURS, RunError, Spec

FILE = "forks.yml"
HEAD = "# Your forks: made by `make fork`, executed by `make run`.\n"
KEYS = ("notebook", "from", "title", "parameters")
MODEL = "def build_model("
MARK = (
    "# The cell to change: everything below goes on with the network that this function returns.\n"
)
NAME = re.compile(r"[a-z][a-z0-9_-]*")
SHAPE = "lower-case letters, digits, - and _, a letter first"
RESET = "defaults"  # as PARAMS: the notebook's own values again


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
    if not isinstance(found, dict):
        raise RunError(f"{FILE} must have one entry for each fork, as `make fork` writes them.")
    return {name: checked(name, entry) for name, entry in found.items()}


def checked(name: Any, entry: Any) -> dict[str, Any]:
    """An entry of ``forks.yml``.

    Raises:
        RunError: it is not as it should be.
    """
    where = f"{FILE}, fork {name}"
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise RunError(f"{where}: a name has {SHAPE}.")
    if not isinstance(entry, dict) or set(entry) != set(KEYS):
        raise RunError(f"{where}: it needs exactly {', '.join(KEYS)}.")
    for key in ("notebook", "from"):
        file = entry[key]
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".ipynb"):
            raise RunError(f"{where}: `{key}:` must be a notebook beside {FILE}, not {file!r}.")
    parameters = entry["parameters"] or {}
    if not isinstance(entry["title"], str) or not isinstance(parameters, dict):
        raise RunError(f"{where}: `title:` must be text, `parameters:` a mapping or empty.")
    return entry | {"parameters": parameters}


def origins(name: str, forks: Mapping[str, Any]) -> list[str]:
    """The notebook that a fork is a copy of, the one that this is a copy of, and so on."""
    by_notebook = {fork["notebook"]: fork for fork in forks.values()}
    found: list[str] = []
    source = forks[name]["from"]
    while source and source not in found:
        found.append(source)
        source = by_notebook[source]["from"] if source in by_notebook else ""
    return found


def specs(forks: Mapping[str, Any] | None = None, *, smoke: bool = False) -> dict[str, Spec]:
    """The forks as runs, by name; at smoke size if wanted."""
    forks = read() if forks is None else forks
    small = runs.read_plan(NOTEBOOKS / "runs.yml")["smoke"]["parameters"] if smoke else {}
    return {
        name: Spec(
            name,
            fork["title"],
            NOTEBOOKS / fork["notebook"],
            fork["parameters"] | small.get(origins(name, forks)[-1], {}),
            name,
        )
        for name, fork in forks.items()
    }


def new(name: str, source: str) -> Path:
    """Copy a notebook, named with or without ``.ipynb``, and note the fork in ``forks.yml``.

    Raises:
        RunError: the name does not suit or is taken, or there is no such notebook.
    """
    original = NOTEBOOKS / f"{Path(source).name.removesuffix('.ipynb')}.ipynb"
    runs.check_parameters(original, {})
    if not NAME.fullmatch(name):
        raise RunError(f"{name!r} is no name for a fork: use {SHAPE}, as in NAME=mynet.")
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
    """Note other parameters for a fork; see `with_parameters`."""
    save(with_parameters(name, text))


def with_parameters(name: str, text: str) -> dict[str, Any]:
    """The forks, one of them with other parameters, as in ``activation=tanh epochs=5``.

    Parameters that are not named stay as they are; after the word ``defaults`` they are the
    notebook's own.

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
    first, _, rest = text.strip().partition(" ")
    before = {} if first == RESET else fork["parameters"]
    given = parse(rest if first == RESET else text)
    for reserved in sorted(OURS.keys() & given.keys()):
        raise RunError(f"the parameter {reserved} is {OURS[reserved]}; leave it out of PARAMS.")
    runs.check_parameters(path, {})
    defaults = cells.parameters(nbformat.read(path, as_version=4))
    if unknown := sorted(given.keys() - defaults.keys()):
        there = ", ".join(sorted(defaults.keys() - OURS.keys()))
        raise RunError(
            f"PARAMS: {path.name} has no parameter {', '.join(unknown)}; there are: {there}."
        )
    changed = before | {k: suited(k, v, defaults[k]) for k, v in given.items()}
    new = {k: v for k, v in changed.items() if v != defaults.get(k)}
    return forks | {name: fork | {"parameters": new}}


def parse(text: str) -> dict[str, Any]:
    """Parameters from a line.

    >>> parse("activation=tanh hidden=[64, 32] learning_rate=1e-3")
    {'activation': 'tanh', 'hidden': [64, 32], 'learning_rate': 0.001}

    Raises:
        RunError: the line does not read ``name=value name=value``.
    """
    found = {}
    for item in re.split(r"\s+(?=[A-Za-z_]\w*=)", text.strip()) if text.strip() else []:
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


def run(name: str, folder: Path, dataset: str, *, given: str = "", smoke: bool = False) -> None:
    """Make a fork, or a run of ``runs.yml``, unless it is finished already.

    Other parameters are given as for `with_parameters`, and kept if the fork runs with them.

    Raises:
        RunError: it failed.
    """
    forks = with_parameters(name, given) if given.strip() else read()
    spec = (known(smoke=smoke) | specs(forks, smoke=smoke))[name]
    try:
        runs.make(spec, folder, dataset)
    except RunError as error:
        raise RunError(f"{error}{kept(name, given)}") from error
    if given.strip():
        set_parameters(name, given)  # in the file as it is now


def kept(name: str, given: str) -> str:
    """What becomes of a fork's parameters after a failure, in a line."""
    old = read().get(name, {}).get("parameters", {})
    text = "\nThe values in PARAMS are not kept." if given.strip() else ""
    if old:
        listed = ", ".join(f"{key}={value}" for key, value in old.items())
        text += f"\n{name} keeps from before: {listed}. PARAMS={RESET} forgets them."
    return text


def known(*, smoke: bool = False) -> dict[str, Spec]:
    """The runs of ``runs.yml``, the large ones included, and the forks, by name."""
    return runs.specs(smoke=smoke) | runs.specs(smoke=smoke, section="large") | specs(smoke=smoke)


def check_name(name: str) -> None:
    """Raise a RunError unless there is such a fork or run."""
    if name not in known():
        mine = ", ".join(read()) or "none yet: make fork NAME=mynet FROM=mnist"
        raise RunError(
            f"there is no fork and no run named {name!r}. Forks: {mine}. Runs: "
            f"{', '.join([*runs.specs(), *runs.specs(section='large')])}."
        )


@cli.command(RunError, data.DataError)
def main(argv: Sequence[str] | None = None) -> None:
    """Make a fork or a run; see the module."""
    parser = argparse.ArgumentParser(prog="support.forks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("new", help="copy a notebook")
    maker.add_argument("name")
    maker.add_argument("--source", default="mnist", help="the notebook to copy")
    runner = commands.add_parser("run", help="execute a fork, or a run of runs.yml")
    runner.add_argument("name")
    runner.add_argument("--parameters", default="", help='such as "activation=tanh epochs=5"')
    cli.add_results(runner)
    arguments = parser.parse_args(argv)
    if arguments.command == "run":
        check_name(arguments.name)
        run(
            arguments.name, arguments.results, arguments.dataset, given=arguments.parameters,
            smoke=arguments.smoke,
        )  # fmt: skip
        return
    path = new(arguments.name, arguments.source)
    has_model = MARK.strip() in path.read_text(encoding="utf-8")
    cell = f"its cell {MODEL[4:-1]} (or any other)" if has_model else "what you like"
    print(
        f"notebooks/{path.name} is a copy of {arguments.source}, noted in notebooks/{FILE}. "
        f"Change {cell}, then: make run NAME={path.stem}"
    )


if __name__ == "__main__":
    sys.exit(main())
