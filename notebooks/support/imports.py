"""Which files of this project a piece of code imports, directly or through other files."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path


def followed(cells: Iterable[str], roots: Sequence[Path]) -> list[Path]:
    """The files that cells of code import, and the files that those import, sorted.

    Imports inside functions count. A name that is computed at run time is not followed.

    Args:
        cells: Code; a cell that cannot be parsed imports nothing.
        roots: The folders in which Python looks for modules, in its order; other modules, such as
            torch, are not followed.
    """
    todo = [name for cell in cells for name in imported(cell)]
    found: dict[str, Path | None] = {}
    while todo:
        name = todo.pop()
        if name in found:
            continue
        path = found[name] = located(name, roots)
        package = name.rpartition(".")[0]
        todo += [package] if package else []
        if path:
            inside = name if path.name == "__init__.py" else package
            todo += imported(path.read_text(encoding="utf-8"), inside)
    return sorted({path for path in found.values() if path})


@functools.cache
def imported(code: str, package: str = "") -> tuple[str, ...]:
    """The full names that code imports; ``from a import b`` may mean the module ``a.b``."""
    try:
        return tuple(_names(ast.parse(code), package))
    except SyntaxError:
        return ()


def _names(tree: ast.AST, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            parts = [*(above if node.level else []), *([node.module] if node.module else [])]
            yield ".".join(parts)
            yield from (".".join([*parts, alias.name]) for alias in node.names)


def located(name: str, roots: Sequence[Path]) -> Path | None:
    """The file of a module, as Python would find it; None if it lies elsewhere."""
    for root in roots:
        path = root.joinpath(*name.split("."))
        for file in (path / "__init__.py", path.with_name(f"{path.name}.py")):
            if file.is_file():
                return file
    return None
