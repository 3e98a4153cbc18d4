"""What is printed, and what is mended, without a browser; with one: test_book_browser.py."""

import re

import accessible
import pytest
from support import browser, pdf

INDEX = """<html><head><link rel="stylesheet" href="_static/a.css?v=1"/>
<script>window.MathJax = {}</script><script src="_static/tex-svg-full.js?v=1"></script></head><body>
<a class="navbar-brand" href="#"><p>A book</p></a>
<nav class="bd-links"><ul><li><a href="#">Start</a></li></ul><p class="caption">Parts</p>
<ul><li><a href="one.html">One</a><details><summary>x</summary><ul><li><a href="two.html">Two</a>
</li></ul></details></li><li><a href="explore-it.html">Play</a></li></ul>
<p class="caption">Runs</p><ul><li><a href="_generated/run.html">Run</a></li></ul></nav>
<article class="bd-article"><h1>Start</h1></article></body></html>"""
ONE = """<article><section id="one"><h1>One<a class="headerlink" href="#one">#</a></h1>
<p id="a">See <a href="#a">here</a>, <a href="two.html#b">there</a>, <a href="index.html">first</a>,
<a href="_generated/run.html">the run</a>, <a href="https://example.org/">the web</a>.</p>
<img src="_images/dot.svg" alt="A dot"><script>alert(1)</script>
<details><summary>Hint</summary>Short.</details>
<details><summary>Numbers</summary>LONG</details></section></article>"""
TWO = '<article><h1>Two</h1><p id="b">B</p></article>'


@pytest.fixture
def built(tmp_path):
    """A built book of three pages, and two that are not printed."""
    (tmp_path / "index.html").write_text(INDEX)
    (tmp_path / "one.html").write_text(ONE.replace("LONG", "9" * (pdf.LONG_FOLD + 1)))
    (tmp_path / "two.html").write_text(TWO)
    return tmp_path


def test_pages_become_one_document(built):
    pages = pdf.Pages(built)
    assert [path.name for path in pages.paths] == ["index.html", "one.html", "two.html"]
    text = pages.document()
    assert re.findall(r'<article[^>]* id="([^"]*)"', text) == ["index", "one", "two"]
    assert '<p class="title">A book</p>' in text
    for there in (
        'id="one--a"',
        'href="#one--a"',
        'id="two--b"',
        'href="#two--b"',
        'href="#index"',
    ):
        assert there in text
    assert set(re.findall(r'href="#([^"]*)"', text)) <= set(re.findall(r'id="([^"]*)"', text))
    assert f'src="{(built / "_images/dot.svg").resolve().as_uri()}"' in text
    assert f'href="{(built / "_static/a.css").resolve().as_uri()}"' in text
    assert 'href="https://example.org/"' in text
    assert ">the run<" not in text
    assert "the run" in text


def test_what_is_for_the_screen_is_not_printed(built):
    text = pdf.Pages(built).document()
    for absent in ("alert", "headerlink", "Play", "Runs", "_generated", "9999", "<summary>x"):
        assert absent not in text
    assert "Parts" in text
    assert '<details open=""><summary>Hint</summary>' in text
    assert "Numbers: in the book itself." in text


@pytest.mark.parametrize(
    ("named", "message"),
    [("/nowhere/chromium", "CHROMIUM=/nowhere/chromium is no program"), ("true", "has stopped")],
)
def test_without_a_browser_it_says_what_to_do(built, monkeypatch, capsys, named, message):
    monkeypatch.setenv("CHROMIUM", named)
    output = built / "out" / "book.pdf"
    assert pdf.main(["--built", str(built), "--output", str(output)]) == 1
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_without_a_book_it_says_what_to_do(tmp_path, capsys):
    assert pdf.main(["--built", str(tmp_path), "--output", str(tmp_path / "book.pdf")]) == 1
    assert "index.html" in capsys.readouterr().err


def test_a_missing_browser_is_said(monkeypatch):
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setattr(browser, "NAMES", ())
    monkeypatch.setattr(browser, "MACOS", "/nowhere")
    with pytest.raises(browser.BrowserError, match="apt-get install -y chromium"):
        browser.find()


FORMULA = '<span class="math notranslate nohighlight">\\(h\\)</span>'
EXPLAINED = (
    f'<span class="sym"><a href="notation.html#sym-h">{FORMULA}</a>'
    '<span class="tip" role="tooltip">the output; of one input</span></span>'
)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ('<link rel="preload" as="font" href="a.woff2" />', ""),
        (
            '<a class="reference internal" href="p.html">P &amp; Q</a><details><summary><span>',
            '<a class="reference internal" href="p.html">P &amp; Q</a>'
            '<details><summary aria-label="Pages of P &amp; Q"><span>',
        ),
        (
            '<a href="a.html">A</a> <a href="p.html">Reference of <code>P</code></a>'
            "<details><summary><span>",
            '<a href="a.html">A</a> <a href="p.html">Reference of <code>P</code></a>'
            '<details><summary aria-label="Pages of Reference of P"><span>',
        ),
        (
            '<dl>\n<dd><em class="sig-param">x</em>,</dd>',
            '<dl role="presentation">\n<dd><em class="sig-param">x</em>,</dd>',
        ),
        ('<div class="pst-scrollable-table-container">', accessible.SCROLLS),
        (f"{FORMULA}, {FORMULA} and", f'<span class="kept">{FORMULA},</span> {FORMULA} and'),
        (f"({EXPLAINED}).", f'(<span class="kept">{EXPLAINED}).</span>'),
        ('<p class="admonition-title" id="box">', '<p class="admonition-title">'),
        ('<section class="lemma-content" id="proof-content">', '<section class="lemma-content">'),
        ('<div id="id4" role="doc-biblioentry">', '<div id="id4" role="listitem">'),
        (
            '<input id="search-input">\n<input id="search-input">',
            '<input id="search-input">\n<input id="search-field">',
        ),
    ],
)
def test_what_the_theme_writes_is_mended_once(wrong, right):
    assert accessible.mend(wrong) == right
    assert accessible.mend(right) == right
