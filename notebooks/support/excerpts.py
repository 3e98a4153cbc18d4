"""What pages show of a notebook's code and output, so that neither is ever copied by hand.

Cells with the tag ``excerpt:NAME`` become ``_generated/NAME.md``: their code in one block, and what
it printed in another. A cell with the tag ``table:NAME`` becomes the Markdown that it displayed,
without its code. Pages include these files. Where the run is still to be made, an excerpt has the
code of the notebook as it is now, and both say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat

from support import cells, results

EXCERPT, TABLE = "excerpt:", "table:"
MARKDOWN = "text/markdown"
MISSING = "*Not run yet: `make reproduce`.*\n"


def write(folder: Path, notebook: Path, *, executed: bool) -> list[str]:
    """Write all that a notebook has into a folder, unless it is there already.

    Returns:
        The names, those that were there included.
    """
    found = read(notebook, executed=executed) if notebook.is_file() else {}
    for name, text in found.items():
        path = folder / f"{name}.md"
        if executed or not path.exists():
            results.write_text(path, text)
    return list(found)


def read(notebook: Path, *, executed: bool) -> dict[str, str]:
    """Name → Markdown of every excerpt and table of a notebook."""
    blocks: dict[str, list[str]] = {}
    printed: dict[str, list[str]] = {}
    found: dict[str, str] = {}
    for cell in nbformat.read(notebook, as_version=4).cells:
        for tag in cells.tags(cell):
            if tag.startswith(EXCERPT):
                name = tag.removeprefix(EXCERPT)
                blocks.setdefault(name, []).append(cell.source)
                printed.setdefault(name, []).append(said(cell))
                found.setdefault(name, "")  # in the order of the notebook
            if tag.startswith(TABLE):
                name = tag.removeprefix(TABLE)
                found[name] = displayed(cell) if executed else MISSING
    for name, code in blocks.items():
        output = "".join(printed[name]).rstrip()
        after = f"```text\n{output}\n```\n" if output else "" if executed else MISSING
        found[name] = "```python\n{}\n```\n\n{}".format("\n\n".join(code), after)
    return found


def said(cell: Mapping[str, Any]) -> str:
    """What a cell printed."""
    streams = (o for o in cell.get("outputs", []) if o["output_type"] == "stream")
    return "".join(o["text"] for o in streams if o["name"] == "stdout")


def displayed(cell: Mapping[str, Any]) -> str:
    """The Markdown that a cell displayed."""
    shown = (o.get("data", {}).get(MARKDOWN, "") for o in cell.get("outputs", []))
    return "\n\n".join(text for text in shown if text) + "\n"
