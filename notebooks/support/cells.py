"""The cells of a notebook: tags, title, and the parameters cell, read and rewritten."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

import nbformat


def tags(cell: nbformat.NotebookNode) -> list[str]:
    """The tags of a cell."""
    return list(cell.metadata.get("tags", []))


def parameters(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """The parameters of a notebook by name, but for the name of the run and its folder."""
    found: dict[str, Any] = {}
    for cell in notebook.cells:
        if "parameters" in tags(cell):
            found = {name: evaluated(node) for name, node in assigned(cell.source).items()}
    return {name: value for name, value in found.items() if name not in ("name", "out")}


def assigned(code: str) -> dict[str, ast.expr]:
    """The value of every name in a cell of plain assignments, ``a = 1`` or ``a, b = 1, 2``."""
    found: dict[str, ast.expr] = {}
    for line in ast.parse(code).body:
        if not isinstance(line, ast.Assign):
            continue
        target, value = line.targets[0], line.value
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = list(zip(target.elts, value.elts, strict=True))
        else:
            pairs = [(target, value)]
        found |= {name.id: value for name, value in pairs if isinstance(name, ast.Name)}
    return found


def evaluated(node: ast.expr) -> Any:
    """The value of a literal, or of an expression of literals such as ``[[8] * 2]``."""
    return eval(compile(ast.Expression(node), "parameters", "eval"), {"__builtins__": {}})


def with_values(code: str, values: Mapping[str, Any]) -> str:
    r"""A parameters cell with other values, its comments kept.

    >>> print(with_values("a = 1  # one\nb, c = [2], 'x'", {"b": [3, 4], "c": "y", "d": 5}))
    a = 1  # one
    b, c = [3, 4], "y"
    >>> with_values("a = [[8] * 2]", {"a": [[8, 8]]})
    'a = [[8] * 2]'
    """
    lines = code.encode().splitlines(keepends=True)  # columns are counted in bytes
    for name, node in reversed(assigned(code).items()):
        if name in values and evaluated(node) != values[name]:
            new = repr(values[name])
            new = new if '"' in new else new.replace("'", '"')
            first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
            before, after = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
            lines[first : last + 1] = [before + new.encode() + after]
    return b"".join(lines).decode()


def entitle(notebook: nbformat.NotebookNode, title: str) -> None:
    """Replace the first line of the first cell, the title, or put one there."""
    cells = notebook.cells
    if not (cells and cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")):
        cells.insert(0, nbformat.v4.new_markdown_cell(id="title"))
    cells[0].source = "\n".join([f"# {title}", *cells[0].source.splitlines()[1:]])
