r"""The notation of the book, ``notation.yml``: a page of it, and its meaning wherever it is used.

* ``{sym}`V1` `` shows the symbol; ``{sym}`variance <V1>` `` shows other words. Its meaning appears
  over it when the mouse or the keyboard's focus is on it, and it leads to the page of notation.
  In headings use a formula instead.
* The directive ``{notation}`` shows a group of the file.
* On every page written by hand the first mention of each symbol, and of each of the ``words:``,
  does the same, unless the page has ``{sym}`` for it.

Everything is HTML and CSS, so it works without a server and without JavaScript.
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paper_map
import yaml
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import ReferenceRole, SphinxDirective
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)
FILE, PAGE = "notation.yml", "notation"
SHOWN = ("shape", "unit")  # below the meaning, if the entry has them
# A word is not explained inside these.
QUIET = (
    nodes.title, nodes.reference, nodes.literal, nodes.literal_block, nodes.math, nodes.raw,
    nodes.comment, nodes.caption, nodes.thead, nodes.footnote, nodes.citation, nodes.term,
    nodes.image, nodes.math_block, addnodes.pending_xref, addnodes.download_reference,
    addnodes.desc_signature,
)  # fmt: skip

Entry = dict[str, Any]


class symbol(nodes.Inline, nodes.TextElement):  # type: ignore[misc]  # noqa: N801  # as docutils does
    """Words or a formula with a meaning; ``key`` is the entry's name, ``says`` its meaning."""


class SymbolRole(ReferenceRole):
    """``{sym}`key` `` or ``{sym}`words <key>` ``."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """The symbol; one that the notation does not know is a warning."""
        self.env.note_dependency(FILE)
        entry = entries(Path(self.env.srcdir)).get(self.target)
        if entry is None:
            logger.warning("not in %s: %s", FILE, self.target, location=self.get_location())
            return [nodes.Text(self.title)], []
        shown = nodes.Text(self.title) if self.has_explicit_title else face(self.target, entry)
        return [explained(self.target, entry, shown)], []


class Notation(SphinxDirective):
    """``{notation} group``: the entries of a group, one below the other."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """A list of symbols with meaning, shape, unit, place of definition and name in code."""
        self.env.note_dependency(FILE)
        groups = read_notation(Path(self.env.srcdir))
        if self.arguments[0] not in groups:
            raise self.error(f"no such group in {FILE}: {self.arguments[0]}")
        items = [self.item(key, entry) for key, entry in groups[self.arguments[0]].items()]
        return [nodes.definition_list("", *items, classes=["notation"])]

    def item(self, key: str, entry: Entry) -> nodes.definition_list_item:
        """An entry, to be found as ``#sym-key``."""
        text = f"{entry['says'].strip()}.\n\n{details(entry)}"
        definition = nodes.definition("", *self.parse_text_to_nodes(text))
        defined = {k: f"{entry[k]} = {v}" for k, v in [("math", entry.get("is"))] if v}
        term = nodes.term("", "", face(key, entry | defined), ids=[anchor(key)])
        return nodes.definition_list_item("", term, definition)


def read_notation(book: Path) -> dict[str, dict[str, Entry]]:
    """All groups of the file; none if the book has no notation."""
    path = book / FILE
    return parsed(path, path.stat().st_mtime_ns) if path.is_file() else {}


@functools.cache
def parsed(path: Path, _changed: int) -> dict[str, dict[str, Entry]]:
    """The file's groups, read once."""
    groups: dict[str, dict[str, Entry]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return groups


def entries(book: Path) -> dict[str, Entry]:
    """All entries by their names."""
    return {key: entry for group in read_notation(book).values() for key, entry in group.items()}


def anchor(key: str) -> str:
    """The place of an entry on the page of notation."""
    return f"sym-{nodes.make_id(key)}"


def face(key: str, entry: Entry) -> nodes.Node:
    """What an entry looks like: a formula, or a word."""
    return nodes.math("", entry["math"]) if "math" in entry else nodes.Text(key)


def details(entry: Entry) -> str:
    """Shape, unit, place of definition and names in the code, in a line of Markdown."""
    parts = [f"{name} {entry[name]}" for name in SHOWN if name in entry]
    parts += [f"defined in {entry['at']}"]
    parts += [paper_map.code(f"fimlib.{name}") for name in entry.get("code", [])]
    return " · ".join(parts)


def explained(key: str, entry: Entry, shown: nodes.Node) -> symbol:
    """A symbol or a word with its meaning."""
    return symbol("", "", shown, key=key, says=entry["says"].strip())


def explain_first_mentions(app: Sphinx, doctree: nodes.document) -> None:
    """Explain the first mention of every word and of every symbol of the notation on a page."""
    docname = app.env.docname
    if docname == PAGE or docname.startswith("_generated"):
        return
    by_hand = {node["key"] for node in doctree.findall(symbol)}
    found = entries(Path(app.srcdir)).items()
    known = {key: entry for key, entry in found if key not in by_hand}
    words = {w: (k, entry) for k, entry in known.items() for w in entry.get("words", [])}
    signs = {sign: (k, entry) for k, entry in known.items() for sign in signs_of(entry)}
    for text in list(doctree.findall(nodes.Text)):
        if words and not inside(text, (*QUIET, symbol)):
            replace_words(text, words)
    for sign in list(doctree.findall(nodes.math)):
        if sign.astext() in signs and not inside(sign, (*QUIET, symbol)):
            key, entry = signs[sign.astext()]
            signs = {s: what for s, what in signs.items() if what[0] != key}
            sign.replace_self(explained(key, entry, sign.deepcopy()))


def signs_of(entry: Entry) -> list[str]:
    """The formulas that stand for an entry; none if the letter has other meanings, too."""
    return [] if entry.get("ambiguous") else [entry.get("math", ""), *entry.get("also", [])]


def inside(node: nodes.Node, kinds: tuple[type[nodes.Node], ...]) -> bool:
    """Whether a node lies in one of some kinds."""
    while node := node.parent:
        if isinstance(node, kinds):
            return True
    return False


def replace_words(text: nodes.Text, open_: dict[str, tuple[str, Entry]]) -> None:
    """Put symbols in the place of words that are still open, and close their entries."""
    parent = text.parent
    place, pieces = parent.index(text), list(split(str(text), open_))
    if any(isinstance(piece, symbol) for piece in pieces):
        parent[place : place + 1] = pieces


def split(text: str, open_: dict[str, tuple[str, Entry]]) -> Iterator[nodes.Node]:
    """A text in pieces: what it says, and the first mentions in it."""
    while open_:
        longest_first = sorted(open_, key=len, reverse=True)
        words = "|".join(re.escape(word).replace(r"\ ", r"\s+") for word in longest_first)
        found = re.search(rf"(?<![\w-])(?:{words})(?![\w-])", text)
        if not found:
            break
        key, entry = open_[" ".join(found[0].split())]
        for word in entry["words"]:
            open_.pop(word, None)
        if found.start():
            yield nodes.Text(text[: found.start()])
        yield explained(key, entry, nodes.Text(found[0]))
        text = text[found.end() :]
    if text:
        yield nodes.Text(text)


def visit_symbol(self: HTML5Translator, node: symbol) -> None:
    """Open the link to the page of notation."""
    number = self.symbols = getattr(self, "symbols", 0) + 1
    page = self.builder.get_relative_uri(self.builder.current_docname, PAGE)
    # a formula has no text of its own that would name the link
    relation = "aria-labelledby" if any(node.findall(nodes.math)) else "aria-describedby"
    link = {"href": f"{page}#{anchor(node['key'])}", relation: f"tip-{number}"}
    self.body.append('<span class="sym">' + self.starttag(node, "a", "", **link))
    self.context.append(f'</a><span class="tip" role="tooltip" id="tip-{number}">')


def depart_symbol(self: HTML5Translator, node: symbol) -> None:
    """Close the link and say the meaning."""
    self.body.append(f"{self.context.pop()}{self.encode(node['says'])}</span></span>")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register role, directive and node with Sphinx."""
    app.add_node(symbol, html=(visit_symbol, depart_symbol))
    app.add_role("sym", SymbolRole())
    app.add_directive("notation", Notation)
    app.connect("doctree-read", explain_first_mentions)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
