"""What a reader meets first: heads of pages, notation, reading times, live numbers."""

import json
import pkgutil
import re

import books
import live
import notation
import page_head
import pytest
import yaml
from docutils import nodes
from support import checks, claims, listings, report, results

import fimlib  # noqa: F401  # for names that are resolved

BOOK = results.ROOT / "book"
LISTS = {"bibliography", "runs"}  # pages without text of their own
HEAD = re.compile(
    r"^```\{page-head\}\n((?::[^\n]*\n)*)\n?(.*?)\n\n(.*?)\n```$", re.MULTILINE | re.DOTALL
)
SYMBOL = re.compile(r"\{sym\}`(?:[^`<]*<)?([^`>]+)>?`")


def pages():
    """The pages of the list of contents that are written by hand."""

    def names(node):
        if isinstance(node, dict):
            yield from [node["file"]] if "file" in node else []
            node = [v for k, v in node.items() if k in ("parts", "chapters", "sections")]
        for part in node if isinstance(node, list) else []:
            yield from names(part)

    return [*names(yaml.safe_load((BOOK / "_toc.yml").read_text("utf-8")))]


def text(page):
    return (BOOK / f"{page}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", sorted(set(pages()) - LISTS))
def test_every_page_has_a_head(page):
    [(options, learn, result)] = HEAD.findall(text(page))
    assert text(page).index("```{page-head}") < text(page).find("\n## ") % 10**9
    assert len(learn.split()) <= 45
    assert len(live.ONE_WORD.sub(" word ", result).split()) <= 60
    assert "{div} learn" not in text(page)
    for name in re.findall(r"\S+", " ".join(re.findall(r"^:checks: (.*)$", options, re.M))):
        file, _, test = name.partition("::")
        known = (
            f"def {test}(" in (results.ROOT / file).read_text("utf-8")
            if test
            else file in checks.CHECKS
        )
        assert known, f"{page}: no such check: {name}"


def test_ten_minutes_are_ten():
    assert 1500 <= live.words(BOOK / "in-ten-minutes.md") <= 10 * live.PER_MINUTE


def test_the_example_by_hand_is_what_fimlib_gives():
    page = text("in-ten-minutes")
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, names := {})
    said = re.search(
        r"is 0 at \$p = 0.5\$.* It is (.*?) at \$p = 0.01\$, and (.*?) at \$p = 0.0001\$", page
    )
    rounded = [float(f"{error:.2g}") for error in names["error"].flatten().tolist()]
    assert rounded == [0.0, *map(float, said.groups())]
    assert code.endswith("# 0, {}, {}\n".format(*said.groups()))


def test_an_hour_is_an_hour():
    [listed] = re.findall(r"Eight pages, \{minutes\}`(.*?)`", text("reading-path"))
    names = listed.split(", ")
    assert len(names) == 8
    assert re.findall(r"^\| \d \| \[.*?\]\((.*?)\.md\)", text("reading-path"), re.M) == names
    prose = sum(live.words(BOOK / f"{name}.md") for name in names)
    assert 45 <= prose / live.PER_MINUTE <= 60


def test_words_are_counted(tmp_path):
    (tmp_path / "page.md").write_text(
        "# One\n\n```{page-head}\n:sure: not counted\n\ntwo $x + y$ – [here](there.md)\n```\n\n"
        "$$\nx\n$$ (eq-1)\n\n```python\nnot = counted\n```\n\n```{include} part.md\n```\n"
        ":::{admonition} x\nsix {glue:text}`a b::c:.2f`.\n:::\n"
        ":::{dropdown} More\nfolded, not counted\n:::\n",
        "utf-8",
    )
    assert live.words(tmp_path / "page.md") == live.PER_FORMULA + len(
        ["One", "two", "x+y", "here", "six", "0.12"]
    )


@pytest.mark.parametrize("page", [path.stem for path in sorted(BOOK.glob("*.md"))])
def test_symbols_and_claims_of_a_page_are_known(page):
    assert set(SYMBOL.findall(text(page))) <= set(notation.entries(BOOK))
    known = {claim.id for claim in claims.load_claims()} | {*live.KINDS, "sigmoid", "log-sigmoid"}
    assert {c for c, _ in re.findall(r"\{claim\}`([^:`]+):([^`]+)`", text(page))} <= known


def test_the_notation_is_whole():
    groups = notation.read_notation(BOOK)
    found = notation.entries(BOOK)
    assert sum(map(len, groups.values())) == len(found)  # no name stands in two groups
    assert re.findall(r"^```\{notation\} (\w+)$", text("notation"), re.M) == list(groups)
    places = {notation.anchor(key) for key in found}
    assert len(places) == len(found)
    words = [word for entry in found.values() for word in entry.get("words", [])]
    assert len(words) == len(set(words))
    for key, entry in found.items():
        assert {"says", "at"} <= set(entry), key
        assert not entry["says"].endswith("."), key
        assert not set("$`*{") & set(entry["says"]), f"{key}: a tooltip is plain text"
        for name in entry.get("code", []):
            pkgutil.resolve_name(f"fimlib.{name}")


def test_facts_are_the_report():
    found = results.load(report.REFERENCE)
    facts, decisions = report.facts(found), {d.claim.id: d for d in report.decide(found)}
    paper = [d for d in decisions.values() if d.claim.whose == "paper"]
    all_told = [int(facts[kind]["all"]) for kind in live.KINDS]
    assert sum(all_told) + int(facts["empirical"]["silent"]) == len(paper)
    for kind, total in zip(live.KINDS, all_told, strict=True):
        assert sum(int(facts[kind][verdict]) for verdict in claims.VERDICTS) == total
    after = [d for d in paper if d.claim.set == "after" and not d.claim.is_mathematical]
    assert facts["empirical"]["after"] == str(len(after))
    assert set(facts["claims"]) == set(decisions)
    c, fact = decisions["c"], facts["claims"]["c"]
    assert f"{fact['median']} ({fact['least']} to {fact['greatest']})" in report.ours(c)
    assert f"{fact['within']} of {fact['cases']} within" in report.ours(c)
    assert facts["better"]["sigmoid"] == {
        "which": r"\hat I_1", "wins": fact["within"], "cases": fact["cases"],
        "networks": "5", "of": "5",
    }  # fmt: skip
    assert len(facts["runs"]["sigmoid"]) == 5


def test_what_was_tried_adds_up():
    found = {"eq_10_lower_cases": "1200", "eq_10_lower_violations": "2", "eq_5_cases": "30",
             "eq_5_violations": "1", "centring_helps_cases": "1"}  # fmt: skip
    names = ["eq_10_lower", "eq_5", "eq_6", "centring_helps", "tests/test_a.py::test_b"]
    assert page_head.tried(names, found) == (
        "Tried: 1,230 cases in 2 checks, **3** contradict it; 1 finding; 1 test."
    )
    assert page_head.tried(["eq_6"], {}) == ""


def test_a_claim_belongs_to_its_section_and_its_statement():
    def about(where, page, *own):
        return page_head.is_about({"where": where}, page, {number: {} for number in own})

    assert about("Section 5.3 (f), Appendix E", "section-5-3")
    assert about("Section 5.3 (f), Appendix E", "appendix-e")
    assert about("Theorem 4.1, Eq. 10", "section-4", "Theorem 4.1")
    assert not about("Section 4.1", "section-4", "Theorem 4.1")
    assert not about("Section 4", "section-4-1", "Theorem 4.7")


CONFIG = """
title: tiny
execute: {execute_notebooks: "off"}
exclude_patterns: ["_generated/*.md"]
parse: {myst_enable_extensions: [colon_fence, dollarmath]}
sphinx:
  extra_extensions: [sphinx_proof]
  local_extensions: {NAMES}
  config: {suppress_warnings: [myst.domains, etoc.glob]}
""".replace(
    "NAMES",
    ", ".join(
        f"{n}: {BOOK / '_ext'}"
        for n in ("paper_numbers", "paper_map", "live", "notation", "page_head")
    ),
)
TOC = """
format: jb-book
root: section-3
chapters: [{file: notation}, {file: proof-eq-5-6}, {file: report}]
"""
MAP = """
Section 3:
  Eq. 5:
    title: an entry
    anchor: eq-5
    proof: proof-eq-5-6
    code: [fimlib.Family.mean]
    checks: [eq_5, "tests/support/test_checks.py::test_the_other_kinds"]
"""
PAGE = r"""
# Section 3. Some softmax

```{page-head}
:where: and by hand

the softmax, and {sym}`J`.

It is {claim}`c:within` of a {sym}`sum <J>`; see `softmax`.
```

Of a softmax, twice. Formulas: $J$, $A$, and $I$. {minutes}`section-3` minute.

$$
a
\tag{5}
$$ (eq-5)
"""
NOTATION = """
letters:
  I: {math: I, also: [A], says: an identity, at: here}
  J: {math: J, says: "first < derivatives", at: '{eq}`eq-5`', code: [Family.mean]}
  word: {says: a vector, at: here, words: [softmax]}
"""
FACTS = {
    "mathematical": {"all": "1"}, "empirical": {}, "better": {},
    "runs": {"sigmoid": ["a", "b"], "statements": ["s"]},
    "claims": {
        "c": {"verdict": "in part", "within": "294", "whose": "paper", "where": "Section 3",
              "experiments": ["sigmoid"]},
        "d": {"verdict": "reproduced", "whose": "paper", "where": "Section 3",
              "experiments": ["statements"]},
    },
}  # fmt: skip
LISTED = [
    results.ROOT / "fimlib" / "families" / "base.py",
    results.ROOT / "notebooks" / "support" / "checks" / "exact.py",
    results.ROOT / "tests" / "support" / "test_checks.py",
]


def build(book, changes=None):
    files = {
        "_config.yml": CONFIG,
        "_toc.yml": TOC,
        "paper.yml": MAP,
        "beyond.yml": "{}\n",
        "notation.yml": NOTATION,
        "section-3.md": PAGE,
        "notation.md": "# Notation\n\n```{notation} letters\n```\n",
        "proof-eq-5-6.md": "# Proof\n\nOf {eq}`eq-5`.\n",
        "report.md": "# Report\n",
        "_generated/facts.json": json.dumps(FACTS),
    } | {f"_generated/source/{listings.page_name(p)}.md": listings.listing_page(p) for p in LISTED}
    for old, new in (changes or {}).items():
        assert old in files["section-3.md"]
        files["section-3.md"] = files["section-3.md"].replace(old, new)
    return books.build(book, files)


def test_heads_and_symbols_are_shown(tmp_path):
    done = build(tmp_path)
    assert done.status == 0, done.said
    html = (done.html / "section-3.html").read_text(encoding="utf-8")
    head = re.search(r'<dl class="[^"]*\bpage-head\b.*?</dl>', html, re.DOTALL)[0]
    said = " ".join(re.sub(r"<[^>]*>", "", head).split())
    for label in page_head.LABELS:
        assert f"<dt>{label}</dt>" in head.replace("<dt>\n", "<dt>")
    assert (
        "Proved: Eq. 5. Tried: 1 test. Measured in 2 runs: of 1 claim of the paper, 1 in part"
        in said
    )
    assert "Family.mean · checks exact · tests checks · and by hand" in said
    assert "It is 294 of a" in said
    for link in (
        "proof-eq-5-6.html",
        "report.html",
        "_generated/source/tests-support-test_checks.html",
    ):
        assert f'href="{link}"' in head
    # Two symbols by hand, a word and a formula by themselves; not the title's, nor code, nor what
    # comes a second time or has been explained by hand.
    tips = re.findall(
        r'<span class="sym"><a aria-\w+by="(tip-\d)" href="notation.html#(sym-\w+)">(.*?)</a>'
        r'<span class="tip" role="tooltip" id="(tip-\d)">(.*?)</span></span>', html,
    )  # fmt: skip
    assert [tip[0] for tip in tips] == [tip[3] for tip in tips] == [f"tip-{k}" for k in range(1, 5)]
    meanings = {"sym-i": "an identity", "sym-word": "a vector", "sym-j": "first &lt; derivatives"}
    assert [tip[1] for tip in tips] == ["sym-word", "sym-j", "sym-j", "sym-i"]
    assert all(tip[4] == meanings[tip[1]] for tip in tips)
    assert [tips[0][2], tips[2][2]] == ["softmax", "sum"]
    assert r"\(J\)" in tips[1][2]
    assert r"\(A\)" in tips[3][2]
    # a formula has no text that would name the link
    assert re.findall(r'aria-(\w+)by="tip-\d"', html) == [
        "labelled" if r"\(" in tip[2] else "described" for tip in tips
    ]
    listed = (done.html / "notation.html").read_text(encoding="utf-8")
    assert listed.count('<dt id="sym-j">') == listed.count('<dt id="sym-word">') == 1
    assert "1 minute." in re.sub(r"<[^>]*>", "", html)


MISSING = {
    "{sym}`J`": ("{sym}`nowhere`", "not in notation.yml: nowhere"),
    "{claim}`c:within`": ("{claim}`c:nowhere`", "no such number in the report: c:nowhere"),
    "{minutes}`section-3`": ("{minutes}`nowhere`", "no such page: nowhere.md"),
    "```{page-head}\n:where": (
        "```{page-head}\n```\n\n```{page-head}\n:where",
        "wants two paragraphs",
    ),
}


def test_what_is_missing_fails_the_build(tmp_path):
    done = build(tmp_path, changes={old: new for old, (new, _) in MISSING.items()})
    assert done.status != 0
    for _, complaint in MISSING.values():
        assert complaint in done.said
    assert "Traceback" not in done.said


def test_words_are_replaced_once_and_whole():
    entry = {"says": "a", "words": ["score", "scores"]}
    parent = nodes.paragraph("", "underscore, scores and score")
    notation.replace_words(parent[0], {"score": ("s", entry), "scores": ("s", entry)})
    assert [type(n).__name__ for n in parent] == ["Text", "symbol", "Text"]
    assert [n.astext() for n in parent] == ["underscore, ", "scores", " and score"]
