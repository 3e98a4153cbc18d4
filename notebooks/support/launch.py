"""Notebooks in the browser, at Binder or Colab: one setting, and the first cell.

The setting is ``repository: url:`` in ``book/_config.yml``: where your copy of the project can be
cloned from. While it is empty, no page has a button and no notebook has a cell more. ``make
launch`` brings the notebooks up to date with it: Colab opens a notebook alone, so each needs a
cell that fetches the rest. That cell counts for nothing else: no run has to be made again because
of it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
import yaml

from support import cells, results

SETTING = Path("book") / "_config.yml"
TAG = "launch"  # of the cell
# Files that name the address as well: below which line, and how.
LINES = {
    "pyproject.toml": ("[project.urls]", 'Repository = "{}"'),
    "CITATION.cff": ("license: MIT", 'repository-code: "{}"'),
}
FORM = re.compile(r"(https://[\w.-]+/[\w.-]+/[\w.-]+?)(?:\.git)?/?")
CELL = """\
# Where the rest of the project is missing, as on Colab: fetch it. Elsewhere this does nothing.
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("support") is None:
    folder = os.path.abspath("fimlib-project")
    if not os.path.isdir(folder):
        subprocess.run(["git", "clone", "--depth", "1", "REPO_URL", folder], check=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", f"{folder}[notebooks,bench]"]
    subprocess.run(pip, check=True)
    os.chdir(os.path.join(folder, "notebooks"))
    sys.path.insert(0, os.getcwd())"""


def repo_url(root: Path = results.ROOT) -> str:
    """The address of this project's public copy, or nothing; see `address`."""
    return address(yaml.safe_load((root / SETTING).read_text("utf-8"))["repository"]["url"])


def address(setting: str | None) -> str:
    """The setting as an address without ``.git``; nothing if it is empty.

    Raises:
        ValueError: the setting is no address of a repository.
    """
    found = FORM.fullmatch(setting or "")
    if setting and not found:
        raise ValueError(
            f"repository: url: in {SETTING} must be empty or an address such as "
            f"https://github.com/you/project, not {setting!r}."
        )
    return found[1] if found else ""


def with_cell(text: str, url: str) -> str:
    """A notebook as text, with the cell for an address as first code; with none if it is empty."""
    notebook = nbformat.reads(text, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if TAG not in cells.tags(cell)]
    if url:
        code = CELL.replace("REPO_URL", url)
        cell = nbformat.v4.new_code_cell(code, id=TAG, metadata={"tags": [TAG]})
        notebook.cells.insert(1, cell)  # the title comes first
    return str(nbformat.writes(notebook)) + "\n"


def with_line(text: str, head: str, form: str, url: str) -> str:
    r"""A text with a line that names the address below its head, or without it if that is empty.

    >>> with_line("a\nb: 1\nc\n", "a", "b: {}", "2")
    'a\nb: 2\nc\n'
    """
    line = re.escape(form).replace(re.escape("{}"), ".*")
    text = re.sub(rf"^{line}\n", "", text, flags=re.MULTILINE)
    new = f"{head}\n{form.format(url)}\n" if url else f"{head}\n"
    return text.replace(f"{head}\n", new, 1)


def updated(path: Path, url: str) -> str:
    """A file's text as it should be for an address."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return with_cell(text, url)
    return with_line(text, *LINES[path.name], url)


def main(root: Path = results.ROOT) -> int:
    """Bring all notebooks, and what names the address, up to date with the setting."""
    try:
        url = repo_url(root)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    changed = 0
    for path in [*sorted(root.glob("notebooks/*.ipynb")), *(root / name for name in LINES)]:
        old, new = path.read_text(encoding="utf-8"), updated(path, url)
        if new != old:
            results.write_text(path, new)
            changed += 1
    what = f"can be opened from {url}" if url else "cannot be opened from elsewhere"
    print(f"the notebooks {what} ({changed} files changed); `make book` does the buttons")
    return 0


if __name__ == "__main__":
    sys.exit(main())
