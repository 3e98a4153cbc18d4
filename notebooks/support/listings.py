"""Source files as pages of the book, so that the map of the paper can link to code and tests.

A page has a section for every definition at the top level of a file, with its line numbers.
"""

from __future__ import annotations

import ast
import functools
import itertools
import os
from pathlib import Path

from support import results

FOLDERS = ("fimlib", "notebooks/support/checks", "tests")


def paths() -> list[Path]:
    """The files that have a page."""
    return sorted(path for folder in FOLDERS for path in (results.ROOT / folder).rglob("*.py"))


def page_name(path: Path) -> str:
    """Name of a file's page, without ending."""
    return relative(path).removesuffix(".py").replace("/", "-")


def listing_page(path: Path) -> str:
    """A file as Markdown: what precedes the first definition, then one section for each."""
    lines = path.read_text(encoding="utf-8").splitlines()
    starts = definitions(path)
    bounds = [*starts, len(lines) + 1]
    head = block(lines, 1, bounds[0]) if bounds[0] > 1 else ""
    sections = [
        f"({label(path, first)})=\n## `{starts[first]}`\n\n{block(lines, first, end)}"
        for first, end in itertools.pairwise(bounds)
    ]
    title = relative(path).replace("_", r"\_")
    return "\n".join(["---\norphan: true\n---", f"# {title}\n", head, *sections])


def block(lines: list[str], first: int, end: int) -> str:
    """Lines ``first`` to ``end − 1`` as code with line numbers."""
    code = "\n".join(lines[first - 1 : end - 1]).rstrip()
    return f"`````{{code-block}} python\n:lineno-start: {first}\n\n{code}\n`````\n"


@functools.cache
def definitions(path: Path) -> dict[int, str]:
    """Names of a file's functions and classes by their first lines, decorators included."""
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    return {
        min([node.lineno, *(d.lineno for d in node.decorator_list)]): node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def label(path: Path, line: int) -> str:
    """Label of the definition that a line belongs to."""
    return f"source-{page_name(path)}-{max(n for n in definitions(path) if n <= line)}"


def label_of_name(path: Path, name: str) -> str:
    """Label of a definition at the top level."""
    return label(path, next(line for line, n in definitions(path).items() if n == name))


def relative(path: Path) -> str:
    """A file's path inside the project."""
    return Path(os.path.relpath(path, results.ROOT)).as_posix()
