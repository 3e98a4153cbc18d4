"""Print the built book as one PDF with the Chromium that is installed: ``make pdf``.

The pages that are written by hand are put into one page, in the order of the list of contents,
behind a title and that list; links between them lead from page to page of the PDF. Executed
notebooks, listings of code and interactive pages stay in the book itself: what leads to them is
plain text here. (Sphinx's builder ``singlehtml`` also makes one page, but leaves ids that several
pages share, and links to pages that are left out.)
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup, Tag
from pypdf import PdfReader

from support import results
from support.browser import BrowserError, Tab, launch

BUILT = results.ROOT / "book" / "_build" / "html"
STYLE = Path(__file__).with_name("pdf.css")
LEFT_OUT = ("_generated/", "explore-")
# On no page: what is for the mouse, and the values behind every verdict of the report, 40 pages.
NOT_PRINTED = "script, .headerlink, button, input, #all-cases"
LONG_FOLD = 4_000  # characters, more than a page: what unfolds to more is not printed either
NOTE = (
    "Printed from the pages of the book. The executed notebooks, the listings of code, the values "
    "behind the report's verdicts and the interactive pages are in the book itself."
)
NUMBER_CONTENTS = """for (const link of document.querySelectorAll("nav.contents a"))
  link.dataset.page = NUMBERS[link.hash.slice(1)]"""
MINUTES = 10 * 60  # seconds to typeset and print, at most; two cores take half a minute


class Pages:
    """The printed pages of a built book: addresses in it become anchors in one document."""

    def __init__(self, built: Path):
        self.built = built.resolve()
        self.index = parsed_page(self.built / "index.html")
        contents = self.index.select_one("nav.bd-links")
        if contents is None:
            raise BrowserError(f"{built / 'index.html'} has no list of contents: make book")
        self.contents = contents
        self.paths: list[Path] = []
        for link in contents.select("a"):
            path = self.target(str(link["href"]), self.built / "index.html")[0]
            if path and path not in self.paths and not self.left_out(path):
                self.paths.append(path)

    def left_out(self, path: Path) -> bool:
        """Whether a file of the book is not printed."""
        name = path.relative_to(self.built).as_posix()
        return not name.endswith(".html") or name.startswith(LEFT_OUT)

    def target(self, address: str, page: Path) -> tuple[Path | None, str]:
        """File and anchor of an address on a page; no file if it leads out of the book."""
        parts = urlsplit(address)
        if parts.scheme or parts.netloc:
            return None, ""
        path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        return path, unquote(parts.fragment)

    def anchor(self, path: Path, fragment: str = "") -> str:
        """The anchor in the printed document of one on a page."""
        return f"{path.stem}--{fragment}" if fragment else path.stem

    def relink(self, part: Tag, page: Path) -> None:
        """Let links lead into the printed document, or to the web, or nowhere."""
        for link in part.select("a[href]"):
            path, fragment = self.target(str(link["href"]), page)
            if path in self.paths:
                link["href"] = f"#{self.anchor(path, fragment)}"
            elif path:
                link.unwrap()

    def article(self, page: Path) -> Tag:
        """What is printed of a page."""
        article = parsed_page(page).select_one("article")
        assert article is not None, page
        for part in article.select(NOT_PRINTED):
            part.decompose()
        self.relink(article, page)
        for part in article.select("[id]"):
            part["id"] = self.anchor(page, str(part["id"]))
        for image in article.select("img"):
            image["src"] = (page.parent / unquote(str(image["src"]))).resolve().as_uri()
        for fold in article.select("details:not(.passport)"):
            fold["open"] = ""
            if len(fold.text) > LONG_FOLD and fold.summary:
                fold.replace_with(f"{fold.summary.get_text(' ', strip=True)}: in the book itself.")
        article["id"] = self.anchor(page)
        return article

    def list_of_contents(self) -> Tag:
        """The book's list, without what is not printed."""
        for part in self.contents.select("summary"):
            part.decompose()
        for part in self.contents.select("details"):
            part.unwrap()
        self.relink(self.contents, self.built / "index.html")
        for item in self.contents.select("li"):
            if not item.select("a"):
                item.decompose()
        for caption in self.contents.select("p.caption"):
            entries = caption.find_next_sibling("ul")
            if entries is None or not entries.select("a"):
                caption.decompose()
        for part in (self.contents, *self.contents.select("[class]:not(.caption)")):
            del part["class"]  # it is no bar at the side
        return self.contents

    def document(self) -> str:
        """One page of HTML with everything that is printed."""
        head = self.index.head
        assert head is not None
        style = [
            self.absolute(link, "href")
            for link in head.select('link[rel~="stylesheet"]')
            if "fontawesome" not in str(link["href"])
        ]
        scripts = [tag for tag in head.select("script") if "MathJax" in tag.text]
        scripts += [self.absolute(tag, "src") for tag in head.select('script[src*="tex-"]')]
        name = self.index.select_one(".navbar-brand")
        title = name.get_text(" ", strip=True) if name else ""
        parts = [
            '<!DOCTYPE html><html lang="en" data-theme="light" data-mode="light"><head>',
            f'<meta charset="utf-8"><title>{title}</title>',
            *(str(tag) for tag in (*style, *scripts)),
            f"<style>{STYLE.read_text(encoding='utf-8')}</style></head><body>",
            f'<header><p class="title">{title}</p><p>{NOTE}</p></header>',
            f'<nav class="contents"><h1>Contents</h1>{self.list_of_contents()}</nav><main>',
            *(str(self.article(path)) for path in self.paths),
            "</main></body></html>",
        ]
        return "\n".join(parts)

    def absolute(self, tag: Tag, attribute: str) -> Tag:
        """A tag of the first page whose address is absolute."""
        path = self.built / unquote(urlsplit(str(tag[attribute])).path)
        tag[attribute] = path.as_uri()
        return tag


def parsed_page(path: Path) -> BeautifulSoup:
    """A page, parsed."""
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


async def print_page(page: Path) -> bytes:
    """A page with its equations, as PDF; twice, for the list of contents to name its pages.

    Raises:
        BrowserError: there is no browser, or it could not do it.
    """
    async with launch() as browser:
        tab = await browser.tab()
        await tab.goto(page.as_uri(), limit=MINUTES)
        await tab.evaluate("MathJax.startup.promise.then(() => null)", limit=MINUTES)
        await tab.evaluate("document.fonts.ready.then(() => null)")
        numbers = page_numbers(await printed(tab))
        await tab.evaluate(NUMBER_CONTENTS.replace("NUMBERS", json.dumps(numbers)))
        return await printed(tab)


async def printed(tab: Tab) -> bytes:
    """What a tab shows, as PDF with links and an outline."""
    done = await tab.call(
        "Page.printToPDF",
        limit=MINUTES,
        preferCSSPageSize=True,
        printBackground=True,
        generateTaggedPDF=True,
        generateDocumentOutline=True,
    )
    return base64.b64decode(done["data"])


def page_numbers(pdf: bytes) -> dict[str, int]:
    """Numbers of the pages, from 1, on which the anchors of a PDF are."""
    reader = PdfReader(io.BytesIO(pdf))
    found = {
        name.removeprefix("/"): reader.get_destination_page_number(place)
        for name, place in reader.named_destinations.items()
    }
    return {name: number + 1 for name, number in found.items() if number is not None}


def write_pdf(built: Path, output: Path) -> None:
    """Print the book in a folder; beside the PDF stays the page that was printed.

    Raises:
        BrowserError: see `print_page`.
        OSError: the book is not built, or the PDF cannot be written.
    """
    page = output.with_suffix(".html")
    output.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(page, Pages(built).document())
    results.write(output, asyncio.run(print_page(page.resolve())))


def main(argv: list[str] | None = None) -> int:
    """Print the built book; see the module."""
    parser = argparse.ArgumentParser(prog="support.pdf", description=__doc__)
    parser.add_argument("--built", type=Path, default=BUILT, help="the built book")
    parser.add_argument("--output", type=Path, default=BUILT.parent / "fimlib-book.pdf")
    arguments = parser.parse_args(argv)
    print("printing the book (a minute or two) …", flush=True)
    try:
        write_pdf(arguments.built, arguments.output)
    except (BrowserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size = arguments.output.stat().st_size / 1e6
    print(f"the book as PDF: {os.path.relpath(arguments.output)}, {size:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
