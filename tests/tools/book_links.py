"""Find what is broken in built pages without a browser: links, anchors, files, ids."""

import re
from collections import Counter
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

ADDRESSES = ("href", "src", "data", "poster")
CLASSES = re.compile(r'class="([^"]*)"')
NOT_OURS = ("http", "https", "mailto", "data", "javascript")


class Page(HTMLParser):
    """Addresses that a page uses, and its anchors."""

    def __init__(self, path):
        super().__init__()
        self.addresses, self.anchors, self.raw = set(), Counter(), []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ADDRESSES and tag != "use" and value is not None:
                self.addresses.add(value)
            elif name == "id":
                self.anchors[value] += 1


def pages(folder):
    """All pages of a built book, folder by folder."""
    found = (p for p in folder.rglob("*.html") if not p.is_relative_to(folder / "_static"))
    return sorted(found, key=lambda p: (p.parent.parts, p.name))


def kinds(folder):
    """Pages that are unlike each other: those that are written by hand, and of the generated ones
    as many as have every class of content and of coloured code.
    """
    seen, chosen = set(), []
    for path in pages(folder):
        classes = set(" ".join(CLASSES.findall(path.read_text(encoding="utf-8"))).split())
        if path.parent == folder or classes - seen:
            chosen.append(path)
        seen |= classes
    return chosen


def faults(folder):
    """What is broken, in a line each."""
    parsed = {path.resolve(): Page(path) for path in pages(folder)}
    found = []
    for path, page in parsed.items():
        here = path.relative_to(folder.resolve())
        found += [f"{here}: id {i} stands {n} times" for i, n in page.anchors.items() if n > 1]
        for address in sorted(page.addresses):
            if fault := broken(address, path, parsed):
                found.append(f"{here}: {fault}")
    return found


def broken(address, path, parsed):
    """What is wrong with an address on a page, or nothing."""
    parts = urlsplit(address)
    if parts.scheme in NOT_OURS:
        return None
    if parts.scheme or parts.netloc:
        return f"{address} leaves the book"
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not target.is_file():
        return f"{address} is no file"
    anchor = unquote(parts.fragment)
    if anchor and target in parsed and anchor not in parsed[target].anchors:
        return f"{address}: no such anchor"
    return None
