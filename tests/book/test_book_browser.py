"""The book as its readers see it: every page in Chromium, opened from disk, without a network.

``make test-book`` runs these tests; it builds the book from the committed results first, or takes
one that is built already: ``make test-book BOOK=book/_build/html``. The last tests plant a defect
of every kind on a page, and see it found.
"""

import asyncio
import json
import os
import re
import shutil
from importlib.metadata import files
from pathlib import Path
from urllib.parse import urlsplit

import book_browser
import book_links
import pytest
import torch
from project import copy, make
from pypdf import PdfReader
from support import browser, pdf, report, results

import fimlib

ROOT = Path(__file__).parents[2]
PAPER = 643  # pixels: 170 mm, A4 within its margins
pytestmark = [pytest.mark.browser, pytest.mark.full]


@pytest.fixture(scope="session", autouse=True)
def _chromium():
    """These tests are for machines that have a browser."""
    try:
        browser.find()
    except browser.BrowserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def axe():
    """The script of axe-core."""
    script = book_browser.axe()
    if script is None:
        pytest.skip("axe-core is missing: pip install --no-deps -r requirements-browser.txt")
    return script


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    """The folder of the built book."""
    if built := os.environ.get("BOOK"):
        return (ROOT / built).resolve()
    project = copy(tmp_path_factory.mktemp("book"))
    done = make(project, "book")
    assert done.returncode == 0, done.stdout + done.stderr
    return project / "book/_build/html"


def told(found):
    """Faults of many pages, to read."""
    return "\n".join(f"{a}\n    " + "\n    ".join(faults) for a, faults in found.items() if faults)


def test_every_link_leads_somewhere(book):
    assert len(book_links.pages(book)) > 100
    faults = book_links.faults(book)
    assert not faults, "\n".join(faults)


def test_every_page_looks_right(book):
    """See `book_browser.look` and book_checks.js for what is looked at."""
    addresses = [path.as_uri() for path in book_links.pages(book)]
    found = book_browser.each(addresses, book_browser.look)
    assert len(found) == len(addresses) > 100
    assert not told(found), told(found)


def test_readers_with_other_eyes_can_use_it(book, axe):
    """The rules of WCAG 2.2, levels A and AA, as far as axe-core can decide them."""
    addresses = [path.as_uri() for path in book_links.kinds(book)]
    found = book_browser.each(addresses, book_browser.judge, axe)
    assert len(found) == len(addresses) > 40
    assert not told(found), told(found)


def test_the_search_finds(book):
    async def search(*queries):
        async with browser.launch() as chromium:
            tab = await chromium.tab()
            return [await book_browser.search(tab, book, words) for words in queries]

    theorem, fisher, nothing = asyncio.run(search("Theorem 4.1", "Fisher", "z" * 12))
    assert not theorem[1] + fisher[1] + nothing[1]
    first = urlsplit(theorem[0][0])
    page = (book / first.path).read_text(encoding="utf-8")
    assert first.fragment == "theorem-4-1"
    assert '<span class="caption-number">Theorem 4.1 </span>' in page
    assert len(fisher[0]) > 20
    assert not nothing[0]


SET = """(() => {
  for (const [id, value] of Object.entries(VALUES)) {
    const control = document.getElementById(id);
    control.value = value;
    control.dispatchEvent(new Event("input", { bubbles: true }));
  }
  const shown = [...document.querySelectorAll(".explorer data[data-value]")];
  return Object.fromEntries(shown.map((node) => [node.dataset.value, node.value]));
})()"""


def explore(page, *choices):
    """What an explorer shows after each choice of its controls, {id: value}: name → number."""

    async def run():
        async with browser.launch() as chromium:
            tab = await chromium.tab()
            await tab.goto(page.as_uri())
            return [
                await tab.evaluate(SET.replace("VALUES", json.dumps(choice))) for choice in choices
            ]

    found = asyncio.run(run())
    return [{name: float(text) for name, text in one.items() if text} for one in found]


def test_the_softmax_explorer_shows_what_fimlib_says(book):
    three = [(4, 21), (10, 10), (28, 1)]
    choices = [{"softmax-first": i, "softmax-second": j} for i, j in three]
    choices += [{"softmax-classes": "10", "softmax-temperature": k} for k in (5, 40)]
    found = explore(book / "explore-softmax.html", *choices)
    logits = [torch.tensor([[i, j, 30 - i - j]]).double().div(30).log() for i, j in three]
    logits += [-torch.arange(10).double()[None] / one["temperature"] for one in found[3:]]
    family = fimlib.Categorical()
    for one, h in zip(found, logits, strict=True):
        exact, bound = fimlib.spectrum(family, h), fimlib.table_1(family, h)
        expected = {
            "lambda-max-i": exact.max_cov,
            "lambda-max-m": exact.max_outer,
            "theorem-5-2-i": bound.max_cov,
            "theorem-5-2-m": bound.max_outer,
            "certified-m": fimlib.lambda_max(family, h, method="certified"),
            "lower-m": fimlib.lambda_max(family, h, method="lower"),
            "corollary-4-2": fimlib.corollary_4_2(family, h).upper,
        }
        for name, value in expected.items():
            assert one[name] == pytest.approx(value.item(), rel=1e-9, abs=1e-15), name
    assert len({one["lambda-max-m"] for one in found}) == len(found)  # it does react


def test_the_explorer_of_figure_1_shows_the_runs(book):
    places = [("sigmoid", 0, 1, 0), ("sigmoid", 3, 4, 20), ("log-sigmoid", 2, 5, 7)]
    names = ("figure-1-activation", "figure-1-seed", "figure-1-layer", "figure-1-epoch")
    choices = [dict(zip(names, map(str, place), strict=True)) for place in places]
    found = explore(book / "explore-figure-1.html", *choices)
    runs = results.load(report.REFERENCE)
    for one, (activation, seed, layer, epoch) in zip(found, places, strict=True):
        values = runs[f"{activation}-seed-{seed}"].values
        row = values[(values.layer == str(layer)) & (values.epoch == epoch)]
        value = dict(zip(row.quantity, row.value, strict=True))
        assert one["fisher"] == pytest.approx(value["I"], rel=1e-12)
        assert one["sd-1"] ** 2 == pytest.approx(value["V1"], rel=1e-12)
        assert one["sd-1-bound"] ** 2 == pytest.approx(value["V1_upper"], rel=1e-12)
        assert one["sd-2"] ** 2 == pytest.approx(value["V2"], rel=1e-12)  # 0 in the output layer


@pytest.fixture(scope="session")
def printed(book, tmp_path_factory):
    """The book as PDF, and beside it the page that was printed."""
    output = tmp_path_factory.mktemp("printed") / "book.pdf"
    pdf.write_pdf(book, output)
    return output


def test_the_pdf_is_the_whole_book(printed, book):
    """Every page of the book starts where the list of contents says, and so does a theorem."""
    reader, anchors = PdfReader(printed), pdf.page_numbers(printed.read_bytes())
    paths = pdf.Pages(book).paths
    assert len(reader.pages) > 100
    assert len(paths) > 30
    contents = spelled(reader.pages[1]) + spelled(reader.pages[2])
    for path in paths:
        title = re.sub(r"\W", "", pdf.parsed_page(path).h1.find(string=True))
        number = anchors[path.stem]
        assert title in spelled(reader.pages[number - 1]).replace("|", "")
        line = r"\|?".join(title) + rf"\|?{number}\|"
        assert re.search(line, contents), (title, number, contents)
    theorem = reader.pages[anchors["section-4--theorem-4-1"] - 1]
    assert "Theorem 4.1" in theorem.extract_text()


def spelled(page):
    """Letters and digits of a page, with a bar for the end of a line."""
    return "".join(re.sub(r"\W", "", line) + "|" for line in page.extract_text().splitlines())


def test_every_link_in_the_pdf_leads_somewhere(printed):
    reader = PdfReader(printed)
    names = {name.removeprefix("/") for name in reader.named_destinations}
    links = [
        annotation.get_object() for page in reader.pages for annotation in page.get("/Annots") or []
    ]
    inside = {str(link["/Dest"]).removeprefix("/") for link in links if "/Dest" in link}
    outside = {str(link["/A"]["/URI"]) for link in links if "/A" in link}
    assert len(inside) > 100
    assert inside <= names
    assert not [address for address in outside if not address.startswith("https://")]


def test_what_is_printed_looks_right(printed):
    """A page that is too wide would also make Chromium print all pages smaller."""

    async def look():
        async with browser.launch() as chromium:
            tab = await chromium.tab()
            await tab.call("Emulation.setEmulatedMedia", media="print")
            await book_browser.resize(tab, PAPER)
            await tab.goto(printed.with_suffix(".html").as_uri())
            faults = await tab.evaluate(book_browser.CHECKS, limit=300)
            wide = await tab.evaluate(book_browser.WIDTH)
            return [*faults, *([wide] if wide else []), *book_browser.complaints(tab.events)]

    assert asyncio.run(look()) == []


# -- Can these tests fail? -------------------------------------------------------------------

MATHJAX = next(f for f in files("sphinx-mathjax-offline") or [] if f.name == "tex-svg-full.js")
DOT = '<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'
PAGE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>A page</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>@media (prefers-color-scheme: dark) {
  body { background: #000; color: #fff } a { color: #8cf }
}</style>
</head><body><main>BODY</main></body></html>"""
SCRIPT = '<script src="tex-svg-full.js"></script>'
FLAWLESS = r"""<h1>Î₁ and θᵢ ↔ ∂²F — “fine”</h1>
<p><span class="math">\(x^2\)</span>, <code>\(x\)</code></p>
<img src="dot.svg" alt="A dot"> <a href="flawless.html#end">The end</a> <p id="end">…</p>
<div style="overflow-x: auto" tabindex="0"><p style="width: 3000px">A wide one.</p></div>"""

LOOKS = {
    "lost image": ('<img src="lost.svg" alt="x">', "image lost.svg is not shown"),
    "image without words": ('<img src="dot.svg" alt="_images/dot.svg">', "file name for its alt"),
    "raw TeX": (r"<p>\(x\)</p>", r"raw TeX: \(x\)"),
    "equation not made": ('<p class="math">x</p>', "no equation made of x"),
    "wrong equation": (rf'{SCRIPT}<p class="math">\(\frac\)</p>', "MathJax cannot read Missing"),
    "unknown macro": (rf'{SCRIPT}<p class="math">\(\fisher\)</p>', r"MathJax cannot read \fisher"),
    "missing glyph": ("<p>a \ue123</p>", "no font has \ue123 (U+e123)"),
    "wide table": ("<table><tr><td style='min-width: 600px'>x</table>", "at 390 pixels it scrolls"),
    "wide page": ('<p style="width: 2000px">x</p>', "at 1280 pixels it scrolls"),
    "complaint": ('<script>console.error("alas")</script>', "console: alas"),
    "error": ("<script>undefined.x</script>", "script: TypeError"),
    "no promise kept": ('<script>Promise.reject(Error("no"))</script>', "script: Error: no"),
    "network": ('<img src="https://example.org/x.svg" alt="x">', "asks for https://example.org/x"),
    "no server": ('<script>fetch("dot.svg")</script>', "dot.svg did not load"),
    "lost style": ('<link rel="stylesheet" href="lost.css">', "lost.css did not load"),
}
JUDGED = {
    "pale": ('<p style="color: #aaa; background: #fff">pale words</p>', "light: color-contrast: p"),
    "dark on dark": ('<p style="color: #222">dark words</p>', "dark: color-contrast: p"),
    "image without alt": ('<img src="dot.svg">', "image-alt: img"),
    "link without name": ('<a href="flawless.html"></a>', "link-name: a"),
}
LINKS = {
    "lost page": ('<a href="lost.html">x</a>', "lost.html is no file"),
    "lost anchor": ('<a href="flawless.html#lost">x</a>', "flawless.html#lost: no such anchor"),
    "lost download": ('<a download href="_downloads/x.ipynb">x</a>', "x.ipynb is no file"),
    "twice the same id": ('<p id="a">x</p><p id="a">y</p>', "id a stands 2 times"),
    "elsewhere": ('<a href="file:///etc/hostname">x</a>', "file:///etc/hostname leaves the book"),
}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """A folder with a flawless page, and a page for every defect."""
    folder = tmp_path_factory.mktemp("spoilt")
    (folder / "dot.svg").write_text(DOT)
    shutil.copy(str(MATHJAX.locate()), folder)
    bodies = {"flawless": FLAWLESS + SCRIPT}
    bodies |= {name: body for name, (body, _) in (LOOKS | JUDGED | LINKS).items()}
    for name, body in bodies.items():
        (folder / f"{name}.html").write_text(PAGE.replace("BODY", body), encoding="utf-8")
    return folder


def check(spoilt, planted, found):
    """Each planted defect was found on its page, and none on the flawless one."""
    assert found.pop((spoilt / "flawless.html").as_uri()) == []
    for name, (_, fault) in planted.items():
        faults = found.pop((spoilt / f"{name}.html").as_uri())
        assert any(fault in line for line in faults), (name, faults)
    assert not found


def test_what_looks_wrong_is_found(spoilt):
    pages = [(spoilt / f"{name}.html").as_uri() for name in ("flawless", *LOOKS)]
    check(spoilt, LOOKS, book_browser.each(pages, book_browser.look))


def test_what_other_eyes_cannot_use_is_found(spoilt, axe):
    pages = [(spoilt / f"{name}.html").as_uri() for name in ("flawless", *JUDGED)]
    check(spoilt, JUDGED, book_browser.each(pages, book_browser.judge, axe))


def test_what_leads_nowhere_is_found(spoilt):
    faults = book_links.faults(spoilt)
    assert not [line for line in faults if line.startswith("flawless")]
    for name, (_, fault) in LINKS.items():
        assert [line for line in faults if line.startswith(f"{name}.html: ") and fault in line]
