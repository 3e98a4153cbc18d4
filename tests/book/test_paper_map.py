"""The maps of the book: that of the paper is complete, and nothing of them dangles."""

import ast
import functools
import inspect
import json
import pkgutil
import re

import api_reference
import books
import paper_map
import pytest
from support import checks, listings, results, runs

import fimlib

BOOK = results.ROOT / "book"
EQUATIONS = [*range(1, 33), 36]  # 33 to 35 are lost
STATEMENTS = [
    "Theorem 4.1", "Corollary 4.2", "Proposition 4.3", "Remark 4.4", "Remark 4.5", "Corollary 4.6",
    "Theorem 4.7", "Lemma 4.8", "Proposition 5.1", "Theorem 5.2", "Lemma 6.1", "Lemma A.1",
    "Theorem B.1", "Lemma B.2", "Corollary B.3", "Theorem C.1", "Theorem C.2", "Corollary F.1",
    "Corollary F.2", "Corollary Q.1",
]  # fmt: skip
PICTURES = {
    "Table 1": "table-1", "Figure 1": "figure-1",
    "Figures I–IV": "figures-i-iv", "Figures V–IX": "figures-v-ix",
}  # fmt: skip
OPEN: set[str] = set()
PROVED = {"Eq. 5", "Eq. 6"} | {name for name in STATEMENTS if not name.startswith("Remark")}
WITHOUT_CODE = {"Proposition 9.8", "Proposition 9.9", "Proposition 9.10"}

GROUPS = paper_map.read_map(BOOK / paper_map.PAPER)
OURS = paper_map.read_map(BOOK / paper_map.BEYOND)
PAPERS = {number: item for items in GROUPS.values() for number, item in items.items()}
OF_OURS = {number: item for items in OURS.values() for number, item in items.items()}
ITEMS = PAPERS | OF_OURS
PROVED |= set(OF_OURS)
DONE = [number for number in ITEMS if number not in OPEN]

LABEL = re.compile(
    r"^[ >]*(?:\$\$ *\((?P<math>\S+)\)|\((?P<target>\S+)\)=|:(?:label|name): *(?P<option>\S+)) *$",
    re.MULTILINE,
)
EQUATION = re.compile(r"^[ >]*\$\$[ ]*\n(.*?)^[ >]*\$\$ *\((\S+)\)", re.MULTILINE | re.DOTALL)
BOX = re.compile(r"^[ >]*[:`]{3,}\{prf:(\w+)\}.*\n((?:[ >]*:\w+:.*\n)*)", re.MULTILINE)
KINDS = {"Eq": "Eq.", "Thm": "Theorem", "Prop": "Proposition"}
KINDS |= dict.fromkeys(("Cor", "Corollarie"), "Corollary")
NUMBER = r"(?:[A-Z]\.\d+|\d+\.\d+|\d+)(?!\w)"
MENTION = re.compile(
    rf"\b(Eq|Th(?:eore)?m|Corollary|Corollarie|Cor|Prop(?:osition)?|Remark|Lemma|Table)s?\.?\s+"
    rf"({NUMBER}(?:(?:\s*[,–-]\s*|,?\s+(?:and|to)\s+){NUMBER})*)"
)


def anchor_of(number):
    """The label that the book gives a number."""
    return re.sub(r"[ .]+", "-", number).lower()


@functools.cache
def pages():
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(BOOK.glob("*.md"))}


@functools.cache
def labels():
    """Every label that the pages define, as often as they do."""
    return ["".join(filter(None, m.groups())) for t in pages().values() for m in LABEL.finditer(t)]


def mentioned(text):
    """The numbers of the paper that a text names; "Eqs 10–12" are three, and " (10)" is Eq. 10."""
    found = {f"Eq. {number}" for number in re.findall(r"\s\((\d{1,2})\)", text)}
    for kind, numbers in MENTION.findall(text):
        for first, last in re.findall(rf"({NUMBER})(?:\s*(?:[–-]|\sto\s)\s*({NUMBER}))?", numbers):
            span = range(int(first), int(last) + 1) if last.isdigit() else (first, last)
            found |= {f"{KINDS.get(kind, kind)} {number}" for number in span if number}
    return found


def test_mentions_are_read():
    text = "Eq. 1, (Eqs 3-5; Eqs. 7, 9 and 12–13) Lemma A.1, Theorems 4.1 and 5.2; Cor. F.1 Table 1"
    equations = {f"Eq. {n}" for n in (1, 3, 4, 5, 7, 9, 12, 13)}
    others = {"Lemma A.1", "Theorem 4.1", "Theorem 5.2", "Corollary F.1", "Table 1"}
    assert mentioned(text) == equations | others
    assert mentioned("Corollaries 4.2 and 4.6, Eqs 14 to\n16") == {
        "Corollary 4.2", "Corollary 4.6", "Eq. 14", "Eq. 15", "Eq. 16",
    }  # fmt: skip
    assert mentioned("``a ≤ b`` (10), c\n(11)") == {"Eq. 10", "Eq. 11"}
    assert not mentioned("Section 4.1, 23 labels, Eq. x, theorem_4_1, Eq. 2a, f(3), (1994)")


def test_every_number_of_the_paper_has_an_entry():
    expected = {name: anchor_of(name) for name in STATEMENTS} | PICTURES
    expected |= {f"Eq. {n}": f"eq-{n}" for n in EQUATIONS}
    assert {number: item["anchor"] for number, item in PAPERS.items()} == expected
    assert sum(map(len, GROUPS.values())) == len(PAPERS)  # none stands in two groups
    assert len(re.findall(r"^  \w.*:$", (BOOK / "paper.yml").read_text(), re.M)) == len(PAPERS)


def test_our_numbers_are_none_of_the_papers():
    assert all(re.fullmatch(r"Proposition 9\.\d+", number) for number in OF_OURS)
    assert {number: item["anchor"] for number, item in OF_OURS.items()} == {
        number: anchor_of(number) for number in OF_OURS
    }


@pytest.mark.parametrize("number", ITEMS)
def test_an_entry_has_what_it_needs(number):
    item = ITEMS[number]
    made_by = "runs" if number.startswith("Figure") else "code"
    keys = {"status", "reason"} if number in OPEN else {made_by, "checks"}
    keys -= {"code"} if number in WITHOUT_CODE else set()
    keys |= {"proof"} if number in PROVED else set()
    assert set(item) == {"title", "anchor"} | keys
    assert all(item.values()), f"{number}: {[k for k, v in item.items() if not v]} is empty"
    assert item.get("status", "open") == "open"


@pytest.mark.parametrize("number", sorted(PROVED))
def test_a_proof_is_there(number):
    page = pages()[f"{ITEMS[number]['proof']}.md"]
    assert r"\blacksquare" in page
    assert f"`{ITEMS[number]['anchor']}`" in page or f":label: {ITEMS[number]['anchor']}" in page


@pytest.mark.parametrize(
    ("number", "name"), [(n, name) for n in DONE for name in ITEMS[n].get("code", [])]
)
def test_code_is_public_and_names_the_number(number, name):
    assert api_reference.has_entry(name)
    assert name == api_reference.full(api_reference.short(name))
    documented = inspect.getdoc(pkgutil.resolve_name(name)) or ""
    assert number in mentioned(documented), f"the docstring of {name} does not name {number}"


@pytest.mark.parametrize("number", [n for n in DONE if "runs" in ITEMS[n]])
def test_runs_are_planned(number):
    assert set(ITEMS[number]["runs"]) <= set(runs.specs())


@functools.cache
def functions_of(file):
    tree = ast.parse((results.ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("check", sorted({c for n in DONE for c in ITEMS[n]["checks"]}))
def test_checks_exist(check):
    file, _, name = check.rpartition("::")
    if file:
        assert re.fullmatch(r"tests/\w+/test_\w+\.py", file)
        assert name.startswith("test_")
        assert name in functions_of(file)
    else:
        assert name in checks.CHECKS


@pytest.mark.parametrize("anchor", sorted({item["anchor"] for item in ITEMS.values()}))
def test_an_anchor_is_defined_once(anchor):
    assert labels().count(anchor) == 1


@pytest.mark.parametrize("page", pages())
def test_the_pages_define_nothing_that_is_not_in_the_map(page):
    anchors = {item["anchor"] for item in ITEMS.values()}
    for latex, label in EQUATION.findall(pages()[page]):
        tags = re.findall(r"\\tag\{(.+?)\}", latex)
        assert tags == [label.removeprefix("eq-")], f"{label}: its number is {tags}"
        assert label in anchors
    for kind, options in BOX.findall(pages()[page]):
        option = dict(re.findall(r":(\w+): *(.*)", options))
        if "number" in option:
            assert option["label"] == anchor_of(f"{kind}-{option['number']}")
            assert option["label"] in anchors
    for label in (m["math"] or m["option"] or m["target"] for m in LABEL.finditer(pages()[page])):
        assert not label.startswith("eq-") or label in anchors


CONFIG = """
title: tiny
execute: {execute_notebooks: "off"}
exclude_patterns: []
sphinx:
  extra_extensions: [sphinx_proof]
  local_extensions: {paper_numbers: EXTENSIONS, paper_map: EXTENSIONS}
  config: {suppress_warnings: [myst.domains, etoc.glob]}
"""

TOC = """
format: jb-book
root: index
chapters:
  - file: api
  - glob: _generated/notebooks/*
"""

PAGE = r"""
# Index

$$
a^2 \ge 0
\tag{23}
$$ (eq-23)

:::{prf:lemma}
:label: lemma-a-1
:number: A.1
See {eq}`eq-23`.
:::

(table-1)=

| a | b |
|---|---|
| 1 | 2 |

```{paper-map} paper.yml
```
"""
API = """
# Reference

```{py:method} fimlib.Family.mean(h)
```
```{py:function} fimlib.variance_i1(derivs)
```
"""

TINY = """
Section one:
  Eq. 23: {title: a *square*, anchor: eq-23, code: [fimlib.Family.mean], checks: [eq_23, eq_24]}
  Lemma A.1: {title: on it, anchor: lemma-a-1, code: [fimlib.variance_i1], checks: [kl_bound]}
Section two:
  Table 1:
    {title: numbers, anchor: table-1, runs: [run], checks: ["tests/support/test_checks.py::TEST"]}
  Figure 1: {title: later, anchor: table-1, status: open, reason: not drawn}
""".replace("TEST", "test_the_other_kinds")


LISTED = [
    results.ROOT / "fimlib" / "families" / "base.py",
    results.ROOT / "fimlib" / "fisher.py",
    results.ROOT / "notebooks" / "support" / "checks" / "exact.py",
    results.ROOT / "tests" / "support" / "test_checks.py",
]


def notebook(**glued):
    """A notebook with values under their keys, as myst_nb.glue leaves them."""
    outputs = [
        {
            "output_type": "display_data",
            "data": {"application/papermill.record/text/plain": value},
            "metadata": {"scrapbook": {"mime_prefix": "application/papermill.record/", "name": k}},
        }
        for k, value in glued.items()
    ]
    cell = {"cell_type": "code", "id": "a", "source": "glue()", "outputs": outputs}
    cells = [{"cell_type": "markdown", "id": "b", "source": "# A run", "metadata": {}}]
    cells.append(cell | {"metadata": {}, "execution_count": 1})
    made_by = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    return json.dumps({"cells": cells, "metadata": made_by, "nbformat": 4, "nbformat_minor": 5})


RESULTS = notebook(
    eq_23_worst="1.456e-16", eq_23_cases="1200", eq_23_violations="0", kl_bound="'holds'", eq_2="7"
)


def build(book, tiny=TINY):
    files = {
        "_config.yml": CONFIG.replace("EXTENSIONS", str(BOOK / "_ext")),
        "_toc.yml": TOC,
        "index.md": PAGE,
        "api.md": API,
        "paper.yml": tiny,
        "_generated/notebooks/run.ipynb": RESULTS,
    } | {f"_generated/source/{listings.page_name(p)}.md": listings.listing_page(p) for p in LISTED}
    return books.build(book, files)


def test_the_map_is_shown(tmp_path):
    done = build(tmp_path)
    assert done.status == 0, done.said
    html = (done.html / "index.html").read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", html))
    line = inspect.getsourcelines(fimlib.variance_i1)[1]
    for link in (
        "#equation-eq-23", "#lemma-a-1", "#table-1", "_generated/notebooks/run.html",
        f"_generated/source/fimlib-fisher.html#source-fimlib-fisher-{line}",
        "api.html#fimlib.Family.mean", "api.html#fimlib.variance_i1",
    ):  # fmt: skip
        assert html.count(f'href="{link}"') >= 1, link
    for page, name in (
        ("tests-support-test_checks", "test_the_other_kinds"),
        ("fimlib-families-base", "Family"),
    ):
        listing = (done.html / f"_generated/source/{page}.html").read_text("utf-8")
        [target] = re.findall(rf'href="_generated/source/{page}.html#([^"]+)"', html)
        section = listing[listing.index(f'id="{target}"') :]
        assert re.search(r"<h2>.*?</h2>", section)[0].count(name) == 1
    for said in (
        "Eq. (23): a square", "Lemma A.1: on it", "Table 1: numbers", "Figure 1: later",
        "eq_23 → cases 1,200, violations 0, worst 1.46e-16", "kl_bound → holds",
        "fimlib.Family.mean fimlib/",
        f"fimlib.variance_i1 fimlib/fisher.py, line {line}", "open not drawn",
    ):  # fmt: skip
        assert said in text, said
    assert "eq_24 →" not in text
    assert re.search(r"<section id=\"section-two\">\s*<h2>Section two", html)


def test_lost_anchors_fail_the_build(tmp_path):
    done = build(tmp_path, tiny=re.sub(r"(anchor: [\w-]+)", r"\1-lost", TINY))
    assert done.status != 0
    for label in ("eq-23", "lemma-a-1", "table-1"):
        assert re.search(rf"WARNING.*\b{label}-lost", done.said)
    assert "Traceback" not in done.said


def test_code_without_an_entry_in_the_reference_fails_the_build(tmp_path):
    done = build(tmp_path, tiny=TINY.replace("Family.mean", "Family.covariance"))
    assert done.status != 0
    assert re.search(r"WARNING.*py:obj.*fimlib\.Family\.covariance", done.said)
