"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""A table whose cells may hold any text; nothing if it has no rows.

    >>> print(markdown_table(["case", "n"], [["|x|", "(*)"]]), end="")
    | case | n |
    | --- | --- |
    | \|x\| | (\*) |
    """
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(escaped, line))} |\n" for line in lines)


def escaped(text: str) -> str:
    """A text for a cell of a table."""
    return text.replace("|", "\\|").replace("(*)", "(\\*)")
