"""The cells of a notebook: tags, title, and the parameters cell, read and rewritten."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

import nbformat

INSERTED = {"injected-parameters", "launch"}  # tags of cells that the runner or `launch` puts in


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
    """The value of every name in a cell of assignments, as ``a = b = 1`` or ``a, b = 1, 2``."""
    found: dict[str, ast.expr] = {}
    for line in ast.parse(code).body:
        if not isinstance(line, ast.Assign | ast.AnnAssign) or line.value is None:
            continue
        targets = line.targets if isinstance(line, ast.Assign) else [line.target]
        target, value = targets[0], line.value
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = list(zip(target.elts, value.elts, strict=True))
        else:
            pairs = [(name, value) for name in targets]
        found |= {name.id: value for name, value in pairs if isinstance(name, ast.Name)}
    return found


def evaluated(node: ast.expr) -> Any:
    """The value of a literal, or of an expression of literals such as ``[[8] * 2]``.

    Of another expression, its code.
    """
    try:
        return eval(compile(ast.Expression(node), "parameters", "eval"), {"__builtins__": {}})
    except Exception:  # a name, or a function
        return ast.unparse(node)


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


def with_text(executed: nbformat.NotebookNode, source: nbformat.NotebookNode) -> None:
    """Give an executed notebook the text that its source has now, if both have the same code."""
    if own_code(executed) != own_code(source):
        return
    made = [cell for cell in executed.cells if cell.cell_type == "code"]
    found = []
    for cell in source.cells:
        if cell.cell_type != "code":
            found.append(cell)
        elif is_own(cell):
            number = next(i for i, c in enumerate(made, 1) if is_own(c))
            while number < len(made) and not is_own(made[number]):  # inserted after it
                number += 1
            found += made[:number]
            del made[:number]
    executed.cells = found


def is_own(cell: nbformat.NotebookNode) -> bool:
    """Whether a cell is the notebook's own, not `INSERTED`."""
    return not INSERTED & set(tags(cell))


def own_code(notebook: nbformat.NotebookNode) -> list[tuple[list[str], str]]:
    """Tags and code of the cells that are not `INSERTED`."""
    return [(tags(c), c.source) for c in notebook.cells if c.cell_type == "code" and is_own(c)]
