"""Show under every figure that was made by a run what made it, and how to make it again.

``_generated/passports.json`` (see `support.passports`) holds the passports of all figures and
executed notebooks by file name. A figure of ``_generated`` without a passport is a warning.
"""

import json
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)
FOLDER = "_generated"
PICTURE = re.compile(rf"(?:.*/)?{FOLDER}/([^/]+\.svg)")
MISSING = "Not run yet: make reproduce."

Passport = dict[str, Any]


def add_passports(app: Sphinx, doctree: nodes.document) -> None:
    """Put passports under the figures of a page, and on top of an executed notebook."""
    file = Path(app.srcdir, FOLDER, "passports.json")
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    docname = app.env.docname
    for image in list(doctree.findall(nodes.image)):
        picture = PICTURE.fullmatch(image["uri"])
        if picture and picture[1] in known:
            below(image).extend(fold(known[picture[1]], docname))
        elif picture:
            logger.warning("no passport for the figure %s", image["uri"], location=image)
    page = known.get(f"{docname.removeprefix(f'{FOLDER}/')}.ipynb")
    if page:
        section = next(doctree.findall(nodes.section))
        section[1:1] = fold(page, docname)


def below(image: nodes.image) -> nodes.container:
    """An empty container right after an image, or after the figure that it is part of."""
    host: nodes.Element = image
    while not isinstance(host.parent, nodes.section | nodes.document | nodes.container):
        host = host.parent
    place = nodes.container()
    host.parent.insert(host.parent.index(host) + 1, place)
    return place


def fold(group: list[Passport], docname: str) -> list[nodes.Node]:
    """The passport of a figure on a page: a line to see, and what it unfolds to."""
    if not group:
        return [nodes.paragraph("", f"Passport. {MISSING}", classes=["passport"])]
    first, summary = group[0], escape(line(group), quote=False)
    opened = f'<details class="passport"><summary>Passport: {summary}</summary>'
    items = [
        item("Data", data(first)),
        item("Parameters", *assignments(group)),
        item("Code", f"commit {several(p['commit'] for p in group)}"),
        item("Machine", several(machine(p) for p in group)),
        item(
            "Software",
            several(", ".join(f"{k} {v}" for k, v in p["versions"].items()) for p in group),
        ),
        *(made(p, docname) for p in group),
    ]
    body = nodes.bullet_list("", *items)
    return [nodes.raw("", opened, format="html"), body, nodes.raw("", "</details>", format="html")]


def line(group: list[Passport]) -> str:
    """The passport in a line."""
    seeds = several(str(p["parameters"]["seed"]) for p in group if "seed" in p["parameters"])
    parts = [
        group[0]["data"].get("title", ""),
        f"seed{'s' * (',' in seeds)} {seeds}" if seeds else "",
        f"commit {several(p['commit'] for p in group)}",
        several(p["started"][:10] for p in group),
        f"{sum(p['seconds'] for p in group):.0f} s",
    ]
    return " · ".join(part for part in parts if part)


def several(texts: Iterable[str]) -> str:
    """Texts in a row, each only once."""
    return ", ".join(dict.fromkeys(texts))


def data(passport: Passport) -> str:
    """The data set, with its digest."""
    found = passport["data"]
    if not found:
        return "none but what the notebook itself makes or takes from a library"
    return f"{found['title']}, SHA-256 {found['digest']}"


def machine(passport: Passport) -> str:
    """The machine of a run, in words."""
    m = passport["machine"]
    return (
        f"{m['processor']}, {m['cores']} cores, {m['threads']} thread, {m['device']}, {m['system']}"
    )


def assignments(group: list[Passport]) -> list[nodes.Node]:
    """Every parameter with its value, or its values if the runs differ in it."""
    found: list[nodes.Node] = []
    for name in group[0]["parameters"]:
        values = several(repr(p["parameters"].get(name)) for p in group)
        found += [nodes.literal("", f"{name} = {values}"), nodes.Text("; ")]
    return found[:-1] or [nodes.Text("none")]


def made(passport: Passport, docname: str) -> nodes.list_item:
    """When a run was made, the command that makes it again, its notebooks."""
    page = f"/{FOLDER}/{passport['page'].removesuffix('.ipynb')}"
    executed = nodes.inline("", "executed notebook")
    target = {"refdomain": "std", "reftype": "doc", "reftarget": page, "refexplicit": True}
    link = addnodes.pending_xref("", executed, **target, refdoc=docname, refwarn=True)
    file = f"/{FOLDER}/{passport['notebook']}"
    name = nodes.literal("", "notebook with these parameters")
    fork = addnodes.download_reference("", "", name, reftarget=file, refdoc=docname)
    return item(
        f"Run {passport['run']}",
        f"{passport['started']}, {passport['seconds']:.0f} s; again: ",
        nodes.literal("", passport["command"]),
        "; ",
        link if passport["page"].removesuffix(".ipynb") not in docname else nodes.Text("this page"),
        "; to fork: ",
        fork,
    )


def item(label: str, *content: str | nodes.Node) -> nodes.list_item:
    """A line of the passport."""
    parts = [nodes.Text(part) if isinstance(part, str) else part for part in content]
    return nodes.list_item(
        "", nodes.paragraph("", "", nodes.strong("", label), nodes.Text(": "), *parts)
    )


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension with Sphinx."""
    # Before Sphinx collects what a page links and downloads.
    app.connect("doctree-read", add_passports, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
