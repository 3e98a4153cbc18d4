"""Tables of words."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], titles: int = 1) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right, a rule in between.

    >>> for line in aligned([["layer", "I"], ["a", "12"]]):
    ...     print(line)
    layer   I
    ─────────
    a      12
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]).rstrip()
        for cells in rows
    ]
    return [*lines[:titles], "─" * max(map(len, lines)), *lines[titles:]]
