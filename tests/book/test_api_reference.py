"""The reference of fimlib in the book: complete, readable, linked to the paper and back."""

import inspect
import re
from collections import Counter
from html import unescape

import api_reference
import books
import paper_map
import pytest
from support import listings, results
from test_paper_map import mentioned

import fimlib

BOOK = results.ROOT / "book"
PAGES = sorted(BOOK.glob("api-*.md"))
KNOWN = api_reference.anchors(BOOK)
ENTRIES = [
    *api_reference.public(),
    *(
        f"{name}.{member}"
        for name, target in api_reference.public().items()
        if inspect.isclass(target)
        for member in api_reference.members(target)
    ),
]


def listed(text, directive):
    """The names that a page's directives of one kind stand for."""
    modules = re.findall(rf"^```{{{directive}}} (.+)$", text, re.MULTILINE)
    return [name for line in modules for name in api_reference.of_modules(line.split())]


def test_every_public_name_has_one_entry():
    entries = Counter(n for page in PAGES for n in listed(page.read_text("utf-8"), "api"))
    assert entries == Counter(list(api_reference.public()))
    first = listed((BOOK / "api.md").read_text("utf-8"), "api-list")
    assert Counter(first) == entries
    contents = (BOOK / "_toc.yml").read_text("utf-8")
    assert all(f"- file: {page.stem}\n" in contents for page in [BOOK / "api.md", *PAGES])


def test_what_a_family_does_otherwise_than_all_is_shown():
    """Categorical takes classes where the others take labels."""
    assert {"observed", "expected"} <= {*api_reference.members(fimlib.Categorical)}
    assert "observed" not in api_reference.members(fimlib.Bernoulli)


def test_the_top_has_few_names_and_the_modules_have_all():
    assert len(fimlib.__all__) <= 50
    assert set(fimlib.__all__) < set(api_reference.public())
    assert api_reference.full("theorem_b_1") == "fimlib.bounds.theorem_b_1"
    assert api_reference.full("Joint.update") == "fimlib.Joint.update"
    assert api_reference.short("fimlib.trace_bounds.TraceBound.upper") == "TraceBound.upper"


def test_a_module_without_public_names_is_refused():
    with pytest.raises(ValueError, match=r"fimlib\.engines\.traced\.graph defines no public name"):
        api_reference.of_modules(["fimlib.engines.traced.graph"])


@pytest.mark.parametrize("entry", ENTRIES)
def test_numbers_in_a_docstring_are_links(entry):
    """What the independent reader of test_paper_map finds is linked, and nothing else."""
    public, _, member = entry.partition(".")
    target = api_reference.public()[public]
    text = inspect.getdoc(getattr(target, member) if member else target)
    made = "\n".join(api_reference.rewritten(text.splitlines(), KNOWN, public))
    linked = set(re.findall(r":(?:prf:)?ref:`[^`<]+ <([^`>]+)>`", made))
    plain = re.sub(r"``.+?``", " ", text, flags=re.DOTALL)
    plain = plain.replace("–", ", ")  # of a range the ends are linked
    assert linked == {KNOWN[number] for number in mentioned(plain) if number in KNOWN}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("as in (Lemma A.1, Eq. 24).",
         "as in (:prf:ref:`Lemma A.1 <lemma-a-1>`, :ref:`Eq. 24 <eq-24>`)."),
        ("Eqs 3 and 4", "Eqs :ref:`3 <eq-3>` and :ref:`4 <eq-4>`"),
        ("``a`` (10), f(10)", "``a`` :ref:`(10) <eq-10>`, f(10)"),
        ("Table 1 and Theorem 9.9", ":ref:`Table 1 <table-1>` and Theorem 9.9"),
        ("(Section 5.2, Appendix D)",
         "(:doc:`Section 5.2 </section-5-2>`, :doc:`Appendix D </appendix-d>`)"),
        ("[B, *K] and L' of |x|, a_ b", r"[B, \*K] and L\' of \|x\|, a\_ b"),
        ("an *estimate*\n* a point", "an *estimate*\n* a point"),
        ("``plan`` and ``fimlib.Joint.update``, not ``plan(x)``",
         ":py:obj:`plan <fimlib.plan>` and :py:obj:`fimlib.Joint.update <fimlib.Joint.update>`, "
         "not ``plan(x)``"),
        ("Cost: low,\n    mostly.\n\nArgs:\n    x: An input.",
         "**Cost:** low,\nmostly.\n\nArgs:\n    x: An input."),
        ("Example: Eq. 1.\n    >>> a*b  # Eq. 1\n    (1, 2)",
         "**Example:** :ref:`Eq. 1 <eq-1>`.\n\n>>> a*b  # Eq. 1\n(1, 2)"),
        ("Example: a file::\n\n    a*b  # Eq. 1",
         "**Example:** a file::\n\n    a*b  # Eq. 1"),
    ],
)  # fmt: skip
def test_a_docstring_becomes_restructuredtext(text, expected):
    made = "\n".join(api_reference.rewritten(text.splitlines(), KNOWN))
    assert re.sub(r"\n{3,}", "\n\n", made) == expected


def test_in_a_class_bare_names_are_its_own():
    assert api_reference.literal("``variance_i1``") == ":py:obj:`variance_i1 <fimlib.variance_i1>`"
    own = api_reference.literal("``variance_i1``", "Joint")
    assert own == ":py:obj:`variance_i1 <fimlib.Joint.variance_i1>`"
    assert api_reference.literal("``values``", "Labels") == "``values``"  # a field, no entry


@pytest.mark.parametrize(
    "name", sorted({c for g in paper_map.read_maps(BOOK).values() for i in g.values()
                    for c in i.get("code", [])}),
)  # fmt: skip
def test_code_of_the_map_has_an_entry(name):
    assert api_reference.has_entry(name.removeprefix("fimlib."))


# Sphinx keeps suffixes that are not set here for the next book of this process.
CONFIG = """
source_suffix = {".md": "markdown"}
extensions = ["myst_parser", "sphinx_design", "sphinx_proof", "paper_numbers", "api_reference"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
root_doc = "api"
html_theme = "basic"
suppress_warnings = ["myst.domains"]
"""


def stubs():
    """Pages with nothing but what the reference points at: numbers, sections, sources."""
    stated = ["# Paper"]
    for number, anchor in KNOWN.items():
        kind, _, value = number.partition(" ")
        if kind == "Eq.":
            stated.append(f"$$\na\n\\tag{{{value}}}\n$$ ({anchor})")
        elif kind.startswith(("Table", "Figure")):
            stated.append(f"({anchor})=\n{number}")
        else:
            stated.append(
                f":::{{prf:{kind.lower()}}}\n:label: {anchor}\n:number: {value}\ntrue\n:::"
            )
    linked = {
        "section",
        "appendix",
        "engines",
        "report",
        "notes",
        "proofs",
        "benchmark",
        "audit",
    }
    pages = {p.stem: f"# {p.stem}\n" for p in BOOK.glob("*.md") if p.stem.split("-")[0] in linked}
    library = results.ROOT / "fimlib"
    sources = [p for p in listings.paths() if p.is_relative_to(library)]
    pages |= {
        f"_generated/source/{listings.page_name(p)}": listings.listing_page(p) for p in sources
    }
    return pages | {"paper-map": "\n\n".join(stated)}


def without_head(page):
    """A page's text; the head needs the whole book, and has tests of its own."""
    return re.sub(r"```\{page-head\}\n.*?\n```\n", "", page.read_text("utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """The real pages of the reference, built beside stubs, with warnings as errors."""
    book = tmp_path_factory.mktemp("book")
    pages = stubs() | {p.stem: without_head(p) for p in [BOOK / "api.md", *PAGES]}
    orphan = "---\norphan: true\n---\n"
    files = {f"{name}.md": orphan + text.removeprefix(orphan) for name, text in pages.items()}
    files |= {"conf.py": CONFIG} | {m: (BOOK / m).read_text("utf-8") for m in paper_map.MAPS}
    for name, text in files.items():
        (book / name).parent.mkdir(parents=True, exist_ok=True)
        (book / name).write_text(text, encoding="utf-8")
    done = books.build_by_sphinx(book, book / "_build")
    assert done.status == 0, done.said
    made = [book / "_build" / f"{page.stem}.html" for page in [BOOK / "api.md", *PAGES]]
    return {path.stem: path.read_text("utf-8") for path in made}


def test_the_pages_have_the_entries_and_no_markup(html):
    for entry in ENTRIES:
        assert (
            sum(page.count(f'id="{api_reference.full(entry)}"') for page in html.values()) == 1
        ), entry
    for stem, page in html.items():
        text = unescape(re.sub(r"<[^>]*>", "", page[page.index("<h1") :]))
        assert "Alias for field" not in text
        assert not re.findall(r":\w+:`|``|\*\*|\\[*|_]", text), stem
        assert "docutils system" not in page


def test_an_entry_has_arguments_results_errors_an_example_and_links(html):
    page = html["api-fisher"]
    start = page.index('id="fimlib.variance_i1"')
    entry = page[start : page.index('id="fimlib.variance_i2"')]
    for label in ("Parameters", "Returns", "Raises"):
        assert f"{label}<span" in entry
    assert "<strong>num_samples</strong>" in entry
    assert "&gt;&gt;&gt; " in entry
    line = inspect.getsourcelines(fimlib.variance_i1)[1]
    for target in (
        "paper-map.html#equation-eq-24", "paper-map.html#lemma-a-1",
        "api-derivatives.html#fimlib.Derivatives", "api-derivatives.html#fimlib.Family",
        f"_generated/source/fimlib-fisher.html#source-fimlib-fisher-{line}",
    ):  # fmt: skip
        assert f'href="{target}"' in entry, target
    assert ">Eq. 24</span>" in entry
    assert 'href="api-fisher.html#fimlib.variance_i1"' in html["api"]
