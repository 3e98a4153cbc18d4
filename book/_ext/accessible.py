"""Mend what the theme and its helpers write, so that every reader can use the pages.

What is mended is what the tests in a browser find (``make test-book``). Where the theme mends it
itself one day, the line here can go.
"""

import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

NOTEBOOKS = "_generated/"
UNNAMED_IMAGE = "Figure drawn by the code above"  # of a notebook that gives no alt text
SCROLLS = '<div class="pst-scrollable-table-container" tabindex="0">'
FORMULA = r'<span class="math notranslate nohighlight">[^<]*</span>'
EXPLAINED = rf'<span class="sym"><a [^>]*>{FORMULA}</a><span class="tip"[^>]*>[^<]*</span></span>'
KEPT = '<span class="kept">'
MENDS = [
    # Fonts that are loaded ahead are refused where a page is opened without a server.
    (r'<link rel="preload" as="font"[^>]*>', ""),
    # The lines of a long signature are no list of definitions.
    (r'<dl>(\s*<dd><em class="sig-param")', r'<dl role="presentation">\1'),
    # A table that is wider than its place can be scrolled by keyboard, too.
    (r'<div class="pst-scrollable-table-container">', SCROLLS),
    # The anchor of a box without a number stands on the box and on its title, and each box has a
    # part named alike.
    (r'(<p class="admonition-title") id="[^"]*"', r"\1"),
    (r' id="proof-content"', ""),
    # A role of the bibliography is deprecated; the plain one says the same in a list.
    (r'role="doc-biblioentry"', 'role="listitem"'),
    # A line may break between a formula and the full stop after it: MathJax makes boxes.
    (rf"(?<!{KEPT})({EXPLAINED}|{FORMULA})([.,;:!?)]+)", rf"{KEPT}\1\2</span>"),
    # The page of the search has two fields.
    (r'(?s)(id="search-input".*?)id="search-input"', r'\1id="search-field"'),
]
# The sign that unfolds a chapter in the list of contents, after the chapter's title.
UNFOLDS = re.compile(r"(<a [^>\n]*>((?:(?!</a>).)*)</a><details[^>]*><summary)>")

# The search shows a line of every page that it finds, and fetches it from a server.
NO_FETCHING = (
    'if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;'
)


def name_images(app: Sphinx, doctree: nodes.document) -> None:
    """Give the pictures of notebooks an alt text where they have none."""
    if app.env.docname.startswith(NOTEBOOKS):
        for image in doctree.findall(nodes.image):
            image.setdefault("alt", UNNAMED_IMAGE)


def mend(html: str) -> str:
    """The mended page."""
    for wrong, right in MENDS:
        html = re.sub(wrong, right, html)
    return UNFOLDS.sub(name_chapter, html)


def name_chapter(sign: re.Match[str]) -> str:
    """The sign, and which chapter it unfolds."""
    title = re.sub("<[^>]*>", "", sign[2])
    return f'{sign[1]} aria-label="Pages of {title}">'


def mend_pages(app: Sphinx, failed: Exception | None) -> None:
    """Mend all pages that were built."""
    if failed or app.builder.format != "html":
        return
    for path in Path(app.outdir).rglob("*.html"):
        path.write_text(mend(path.read_text(encoding="utf-8")), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension with Sphinx."""
    app.add_js_file(None, body=NO_FETCHING)
    app.connect("doctree-read", name_images)
    app.connect("build-finished", mend_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
