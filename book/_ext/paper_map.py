r"""Show a map of the book, as ``paper.yml``: what is where, and what checks it.

The directive ``{paper-map} FILE`` becomes a section with a table for every group. It writes
Markdown with ordinary roles, so a missing anchor, notebook or key is a warning of Sphinx. Code and
checks are linked to the pages of their sources.
"""

import inspect
import pkgutil
from pathlib import Path
from typing import Any

import nbformat
import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from support import checks, listings
from support.results import ROOT

PAPER, BEYOND = MAPS = ("paper.yml", "beyond.yml")  # numbers of the paper, and ours
NOTEBOOKS = "_generated/notebooks"
FIELDS = ("cases", "violations", "worst")  # of an outcome

Item = dict[str, Any]
Groups = dict[str, dict[str, Item]]  # items by number, in groups by title


class PaperMap(SphinxDirective):
    """``{paper-map} FILE``: all items of a map, in tables."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """One section with a table for every group."""
        book, file = Path(self.env.srcdir), self.arguments[0]
        self.env.note_dependency(file)
        results = glued(book / NOTEBOOKS)
        return [
            self.section(title, map_table(items, results))
            for title, items in read_map(book / file).items()
        ]

    def section(self, title: str, markdown: str) -> nodes.section:
        """A section of the page with parsed content."""
        content = [nodes.title(title, title), *self.parse_text_to_nodes(markdown)]
        return nodes.section("", *content, ids=[nodes.make_id(title)])


def read_map(path: Path) -> Groups:
    """The groups of the map."""
    groups: Groups = yaml.safe_load(path.read_text(encoding="utf-8"))
    return groups


def read_maps(book: Path) -> Groups:
    """The groups of all maps."""
    return {title: items for file in MAPS for title, items in read_map(book / file).items()}


def map_table(items: dict[str, Item], results: dict[str, str]) -> str:
    """A table, one row per item."""
    head = "```{list-table}\n:header-rows: 1\n:widths: 28 30 42\n:class: paper-map\n"
    rows = [row(number, item, results) for number, item in items.items()]
    return "\n".join([head, "* - number\n  - code\n  - checks", *rows, "```"])


def row(number: str, item: Item, results: dict[str, str]) -> str:
    """The cells of an item: number and title, code, checks."""
    name = f"{link(number, item['anchor'])}: {item['title']}"
    if item.get("status") == "open":
        return f"* - {name}\n  - **open**\n  - {item['reason']}"
    made_by = [where(name) for name in item.get("code", [])]
    made_by += [f"[{run}](/{NOTEBOOKS}/{run}.ipynb)" for run in item.get("runs", [])]
    checks = [outcome(name, results) for name in item["checks"]]
    return f"* - {name}\n  - {cell(made_by)}\n  - {cell(checks)}"


def cell(lines: list[str]) -> str:
    """A list in a cell, or a dash if it is empty."""
    return "".join(f"* {line}\n    " for line in lines).rstrip() or "–"


def link(number: str, anchor: str) -> str:
    """A reference that fails the build if nothing has this label."""
    kind = anchor.partition("-")[0]
    if kind == "eq":
        return f"Eq. {{eq}}`{anchor}`"
    if kind in ("table", "figure", "figures"):
        return f"{{ref}}`{number} <{anchor}>`"
    return f"{{prf:ref}}`{anchor}`"


def where(name: str) -> str:
    """A name of the library, linked to its entry in the reference, and its place in the source."""
    path, line = place(name)
    link = f"{{ref}}`line {line} <{listings.label(path, line)}>`"
    return f"{{py:obj}}`{name}` {listings.relative(path)}, {link}"


def code(name: str) -> str:
    """A name of the library without the package's, linked to its source."""
    return f"{{ref}}`{name.removeprefix('fimlib.')} <{listings.label(*place(name))}>`"


def place(name: str) -> tuple[Path, int]:
    """File and line of a name of the library."""
    target = pkgutil.resolve_name(name.replace(".", ":", 1))  # no module that is named likewise
    return Path(inspect.getfile(target)), inspect.getsourcelines(target)[1]


def outcome(check: str, results: dict[str, str]) -> str:
    """A check, and what came out if an executed notebook has glued it."""
    keys = {field: f"{check}_{field}" for field in FIELDS}
    parts = [f"{field} {results[key]}" for field, key in keys.items() if key in results]
    parts += [results[check]] if check in results else []
    return source(check) + (f" → {', '.join(parts)}" if parts else "")


def source(check: str) -> str:
    """A check, linked to its code: a test, or one of ``support.checks``."""
    file, _, test = check.partition("::")
    if test:
        return f"{{ref}}`{check} <{listings.label_of_name(ROOT / file, test)}>`"
    function = checks.CHECKS[check]
    path = Path(inspect.getfile(function))
    return f"{{ref}}`{check} <{listings.label_of_name(path, check)}>`"


def glued(folder: Path) -> dict[str, str]:
    """Roles that show the results of executed notebooks, by the key under which they are glued."""
    return {
        key: f"{{glue:text}}`/{NOTEBOOKS}/{name}::{key}:{spec(text)}`"
        for key, (name, text) in values(folder).items()
    }


def values(folder: Path) -> dict[str, tuple[str, str]]:
    """Results of executed notebooks as they are: file and text, by the key of the glue."""
    found = {}
    for path in sorted(folder.glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", []):
                if key := output.get("metadata", {}).get("scrapbook", {}).get("name"):
                    found[key] = path.name, "".join(output.data.values())
    return found


def spec(result: str) -> str:
    """How to write a result: as it is, or a number with three digits."""
    try:
        float(result)
    except ValueError:
        return "s"
    return ",.0f" if result.isdigit() else ".3g"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive with Sphinx."""
    app.add_directive("paper-map", PaperMap)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
