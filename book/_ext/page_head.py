r"""The head of a page: what you will learn, the result, the evidence, the code.

The directive ``{page-head}`` has two paragraphs, written by hand: what one learns, and the result.
The other two lines are made when the book is built, from the maps ``paper.yml`` and ``beyond.yml``,
from the results of executed notebooks, and from the report's verdicts, so they cannot go stale. The
items of the maps that a page states or proves count as its own. Options add to that:

* ``:checks:`` and ``:code:`` name checks, tests and functions as the map does,
* ``:sure:`` and ``:where:`` are text for what no check and no function stands for.
"""

import functools
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import live
import paper_map
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from support import checks, listings
from support.claims import DEPENDS, NO, PARTLY, SEVERAL, STATEMENTS, YES
from support.results import ROOT

LABELS = ("You will learn", "Result", "Evidence", "Code")
FINDINGS = {c.__name__ for c in checks.FINDINGS}
COUNTED = {c.__name__ for c in checks.INEQUALITIES + checks.EQUALITIES + checks.BEYOND}
NOTEBOOK = re.compile(rf"{paper_map.NOTEBOOKS}/([\w-]+)\.ipynb")
FEW = 5  # functions that are named
VERDICTS = (YES, PARTLY, DEPENDS, NO)

Item = dict[str, Any]
Text = dict[str, str]  # options of the directive


class PageHead(SphinxDirective):
    """``{page-head}``: four short lines on top of a page."""

    has_content = True
    option_spec = dict.fromkeys(("checks", "code", "sure", "where"), directives.unchanged_required)

    def run(self) -> list[nodes.Node]:
        """A list of four entries."""
        book, page = Path(self.env.srcdir), self.env.docname
        for name in (*paper_map.MAPS, live.FACTS):
            self.env.note_dependency(name)
        paragraphs = "\n".join(self.content).strip().split("\n\n")
        if len(paragraphs) != 2:
            raise self.error("page-head wants two paragraphs: what one learns, and the result")
        source = (book / f"{page}.md").read_text(encoding="utf-8")
        own = items(book, page, source)
        lines = [
            *paragraphs,
            how_sure(book, page, own, self.options),
            where(source, own, self.options),
        ]
        if empty := [label for label, line in zip(LABELS, lines, strict=True) if not line]:
            raise self.error(f"page-head has nothing to say of: {', '.join(empty)}")
        entries = [self.entry(label, line) for label, line in zip(LABELS, lines, strict=True)]
        return [nodes.definition_list("", *entries, classes=["page-head"])]

    def entry(self, label: str, markdown: str) -> nodes.definition_list_item:
        """A line of the head."""
        definition = nodes.definition("", *self.parse_text_to_nodes(markdown))
        return nodes.definition_list_item("", nodes.term(label, label), definition)


def items(book: Path, page: str, source: str) -> dict[str, Item]:
    """The items of the map that a page states or proves."""
    return {
        number: item
        for group in paper_map.read_maps(book).values()
        for number, item in group.items()
        if item.get("proof") == page or defines(source, item["anchor"])
    }


def defines(source: str, anchor: str) -> bool:
    """Whether a page's text defines a label."""
    form = rf"^[ >]*(?:\$\$ *\({anchor}\)|\({anchor}\)=|:label: *{anchor}) *$"
    return re.search(form, source, re.MULTILINE) is not None


def listed(text: str) -> list[str]:
    """The names in an option."""
    return text.replace(",", " ").split()


def checked_by(own: dict[str, Item], options: Text) -> list[str]:
    """The checks and tests of a page, those of its items first."""
    names = [name for item in own.values() for name in item.get("checks", [])]
    return list(dict.fromkeys(names + listed(options.get("checks", ""))))


# Evidence.


def how_sure(book: Path, page: str, own: dict[str, Item], options: Text) -> str:
    """What is proved, what was tried, what was measured, in a line of Markdown."""
    names = checked_by(own, options)
    if "sure" in options:  # which says what the tests compare
        names = [name for name in names if "::" not in name]
    parts = [
        proved(page, own),
        tried(names, results(book / paper_map.NOTEBOOKS)),
        measured(live.facts(book), page, own),
        options.get("sure", ""),
    ]
    return " ".join(part for part in parts if part)


def proved(page: str, own: dict[str, Item]) -> str:
    """Where the statements of a page are proved."""
    others: dict[str, list[str]] = {}
    for number, item in own.items():
        if "proof" in item:
            others.setdefault(item["proof"], []).append(number)
    here = ["below"] if others.pop(page, []) else []
    links = here + [f"[{', '.join(numbers)}](/{file}.md)" for file, numbers in others.items()]
    return f"Proved: {', '.join(links)}." if links else ""


def tried(names: list[str], found: dict[str, str]) -> str:
    """How many cases the checks of a page tried, and how many contradicted it; its tests."""
    counted = [n for n in names if n in COUNTED and f"{n}_cases" in found]
    findings = [n for n in names if n in FINDINGS and f"{n}_cases" in found]
    tests = [n for n in names if "::" in n]
    parts = []
    if counted:
        cases, bad = (sum(int(found[f"{n}_{f}"]) for n in counted) for f in ("cases", "violations"))
        parts.append(f"{cases:,} cases in {several(counted, 'check')}, **{bad}** contradict it")
    if findings:
        parts.append(several(findings, "finding"))
    if tests:
        parts.append(several(tests, "test"))
    return f"Tried: {'; '.join(parts)}." if parts else ""


def measured(facts: dict[str, Any], page: str, own: dict[str, Item]) -> str:
    """What runs say of the paper's claims that a page is about."""
    claims = [
        c for c in facts["claims"].values()
        if c["whose"] == "paper" and set(c["experiments"]) - {STATEMENTS} and is_about(c, page, own)
    ]  # fmt: skip
    runs = {run for c in claims for e in c["experiments"] for run in facts["runs"].get(e, [])}
    verdicts = [c["verdict"] for c in claims]
    said = [f"{verdicts.count(v)} {SEVERAL.get(v, v)}" for v in VERDICTS if v in verdicts]
    if not runs or not said:
        return ""
    return (
        f"Measured in {several(list(runs), 'run')}: of {several(claims, 'claim')} of the paper, "
        f"{', '.join(said)} ([report](/report.md))."
    )


def is_about(claim: dict[str, Any], page: str, own: dict[str, Item]) -> bool:
    """Whether a claim stands in the section that a page is about, or in an item of it."""
    places = re.findall(r"(?:Section|Appendix|Table|Figure|[A-Z]\w+) [\dA-Z][\d.]*", claim["where"])
    kind, _, number = page.partition("-")
    section = f"{kind.capitalize()} {number.replace('-', '.').upper()}"
    return bool({p.rstrip(".") for p in places} & {section, *own})


def several(things: list[Any], name: str) -> str:
    """How many there are, with the name in the right number."""
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def results(folder: Path) -> dict[str, str]:
    """What executed notebooks glued, read once for all pages."""
    changed = tuple(path.stat().st_mtime_ns for path in sorted(folder.glob("*.ipynb")))
    return read_results(folder, changed)


@functools.cache
def read_results(folder: Path, _changed: tuple[int, ...]) -> dict[str, str]:
    """See ``results``."""
    return {key: text for key, (_, text) in paper_map.values(folder).items()}


# Where the code is.


def where(source: str, own: dict[str, Item], options: Text) -> str:
    """Functions, files of checks and tests, and notebooks, with links, in a line of Markdown."""
    code = [name for item in own.values() for name in item.get("code", [])]
    names = checked_by(own, options)
    runs = [run for item in own.values() for run in item.get("runs", [])] + NOTEBOOK.findall(source)
    parts = [
        functions(list(dict.fromkeys(listed(options.get("code", "")) + code))),
        group("checks", files(name for name in names if "::" not in name)),
        group("tests", files(name for name in names if "::" in name)),
        group("notebooks", notebooks(runs)),
        options.get("where", ""),
    ]
    return " · ".join(part for part in parts if part)


def functions(names: list[str]) -> str:
    """Links to the first few functions, and to the map for the others."""
    few = names if len(names) <= FEW + 1 else names[:FEW]
    more = [f"[{len(names) - FEW} more](/paper-map.md)"] if few != names else []
    return ", ".join([*map(paper_map.code, few), *more])


def group(title: str, links: list[str]) -> str:
    """Links of one kind."""
    return f"{title} {', '.join(links)}" if links else ""


def files(names: Iterable[str]) -> list[str]:
    """Links to the files of some checks or tests."""
    paths = [
        ROOT / name.partition("::")[0]
        if "::" in name
        else Path(inspect.getfile(checks.CHECKS[name]))
        for name in names
    ]
    return [
        f"[{path.stem.removeprefix('test_')}](/_generated/source/{listings.page_name(path)}.md)"
        for path in dict.fromkeys(paths)
    ]


def notebooks(names: list[str]) -> list[str]:
    """Links to executed notebooks, one for all runs that differ in the seed."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(re.sub(r"-?seed-\d+$", "", name), name)
    return [f"[{title}](/{paper_map.NOTEBOOKS}/{name}.ipynb)" for title, name in first.items()]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive with Sphinx."""
    app.add_directive("page-head", PageHead)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
