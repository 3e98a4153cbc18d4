r"""Numbers in running text that are read when the book is built.

* ``{claim}`c:within` `` is a number of the report: what the runs say of the claim ``c`` of
  ``data/claims.csv``. ``mathematical`` and ``empirical`` stand for all claims of a kind, and
  ``sigmoid`` and ``log-sigmoid`` for which estimator is the better one there.
  `support.report.facts` lists the fields.
* ``{minutes}`section-3` `` is how long it takes to read some pages, in whole minutes; code and
  checks of formulas come on top.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole

logger = logging.getLogger(__name__)
FACTS = "_generated/facts.json"
KINDS = ("mathematical", "empirical")  # of claims
PER_MINUTE = 200  # words
PER_FORMULA, PER_FIGURE = 10, 25  # as many words take as long
FENCE = re.compile(r"\s*(?:`{3,}|:{3,})\s*(\S*)")
SILENT = ("{code-block}", "{dropdown}", "{math}", "{paper-map}")  # no prose in view
FORMULA = re.compile(r"\$\$.*?\$\$(?: *\(\S+\))?", re.DOTALL)
MARKUP = re.compile(r"^\s*:[\w-]+:.*$|^\(\S+\)=$|[|*#>]|\]\([^)]*\)", re.MULTILINE)
ONE_WORD = re.compile(r"\{[\w:-]+\}`[^`]*`|\$[^$\n]+\$|`[^`]*`")


class ClaimRole(SphinxRole):
    """``{claim}`id:field` ``: a number, or the verdict, that the report has for a claim."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """The text, marked as read from a run, or an estimator; unknown names are a warning."""
        self.env.note_dependency(FACTS)
        claim, _, field = self.text.partition(":")
        known = facts(Path(self.env.srcdir))
        told = {**known["claims"], **known["better"], **{k: known[k] for k in KINDS}}
        text = told.get(claim, {}).get(field)
        if text is None:
            logger.warning("no such number in the report: %s", self.text, location=self.env.docname)
        if field == "which":
            return [nodes.math("", text)], []
        is_number = any(c.isdigit() for c in text or "?")
        return [nodes.inline("", text or "?", classes=["pasted-text"] if is_number else [])], []


class MinutesRole(SphinxRole):
    """``{minutes}`page, page` ``: how long it takes to read these pages."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """The number alone; a page that is not there is a warning."""
        paths = [Path(self.env.srcdir, f"{name.strip()}.md") for name in self.text.split(",")]
        for path in paths:
            self.env.note_dependency(path.name)
            if not path.is_file():
                logger.warning("no such page: %s", path.name, location=self.env.docname)
        found = sum(words(path) for path in paths if path.is_file())
        return [nodes.Text(str(math.ceil(found / PER_MINUTE)))], []


def facts(book: Path) -> dict[str, Any]:
    """What the runs say of the paper's claims; nothing before `support.book` has written it."""
    path = book / FACTS
    nothing: dict[str, Any] = {name: {} for name in ("claims", "runs", "better", *KINDS)}
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else nothing


def words(page: Path) -> int:
    """How long a page is, in words: its prose, displayed formulas and figures, but not its code.

    What it includes does not count: those are tables to look things up.
    """
    text = page.read_text(encoding="utf-8")
    plain, formulas = FORMULA.subn("", "\n".join(prose(text)))
    plain = MARKUP.sub(" ", ONE_WORD.sub(" word ", plain))
    shown = PER_FORMULA * formulas + PER_FIGURE * text.count("{figure}")
    return shown + sum(any(c.isalnum() for c in word) for word in plain.split())


def prose(text: str) -> Iterator[str]:
    """The lines of a page that are no code and no fences."""
    silent: list[bool] = []  # for every fence that is open
    for line in text.splitlines():
        fence = FENCE.match(line)
        if fence and (fence[1] or not silent):
            silent.append(not fence[1].startswith("{") or fence[1].startswith(SILENT))
        elif fence:
            silent.pop()
        elif not any(silent):
            yield line


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the roles with Sphinx."""
    app.add_role("claim", ClaimRole())
    app.add_role("minutes", MinutesRole())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
