r"""Give equations and theorem boxes the numbers of the paper.

* A labelled equation that contains ``\tag{23}`` has the number 23: beside it, and in every
  ``{eq}`` that points at it, from any page. Its label serves ``{ref}`` as well, so that a text
  may point at it in words of its own.
* A ``prf:*`` box with the option ``:number: 4.1`` has the number 4.1: in its title, and in every
  ``{prf:ref}`` that points at it. A box without a number says so with ``:nonumber:``.
  The search of the book finds it by its number.

A number that is not the paper's would mislead. So an equation or a box without one is a warning,
and figures, tables and listings have captions but no numbers.
"""

import re
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx_proof.directive import ElementDirective
from sphinx_proof.proof_type import PROOF_TYPES

logger = logging.getLogger(__name__)
TAG = re.compile(r"\s*\\tag\{([^{}]+)\}")
UNKNOWN = "?"  # beside a warning


class NumberedBox(ElementDirective):  # type: ignore[misc]  # sphinx-proof has no types
    """A theorem-like box with an option ``:number:``."""

    option_spec = ElementDirective.option_spec | {"number": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        """Build the box and note its number on it."""
        [box] = super().run()
        if ("number" in self.options) == ("nonumber" in self.options):
            message = "%s '%s' needs either :number: (the paper's) or :nonumber:"
            logger.warning(message, self.name, box["label"], location=self.get_location())
        if "nonumber" not in self.options:
            box["paper_number"] = number = self.options.get("number", UNKNOWN)
            entry = f"{self.name.removeprefix('prf:').title()} {number}"  # for the search
            box += addnodes.index(entries=[("single", entry, box["ids"][0], "main", None)])
        return [box]


def take_tags(app: Sphinx, doctree: nodes.document) -> None:
    r"""Move the ``\tag`` of each labelled equation out of its LaTeX, onto its node."""
    for equation in doctree.findall(nodes.math_block):
        if not equation.get("label"):
            continue
        latex = equation.astext()
        tag = TAG.search(latex)
        if tag is None:
            message = r"equation '%s' has a label but no \tag{number}"
            logger.warning(message, equation["label"], location=equation)
        equation["paper_number"] = tag[1] if tag else UNKNOWN
        equation.clear()
        equation += nodes.Text(TAG.sub("", latex))
        labels: dict[str, tuple[str, str]] = app.env.get_domain("std").data["anonlabels"]
        labels[equation["label"]] = (app.env.docname, equation["ids"][0])


def number_as_in_paper(_app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Replace Sphinx's own numbers, counted just before, by those of the paper."""
    env.toc_fignumbers.clear()
    numbers: dict[str, dict[str, dict[str, Any]]] = env.toc_fignumbers  # page, kind, id
    for docname in env.found_docs:
        for node in env.get_doctree(docname).findall(nodes.Element):
            if number := node.get("paper_number"):
                kind = node.get("countertype", "displaymath")
                of_kind = numbers.setdefault(docname, {}).setdefault(kind, {})
                of_kind[node["ids"][0]] = tuple(number.split("."))
    return []


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension with Sphinx."""
    app.setup_extension("sphinx_proof")
    for name in PROOF_TYPES:
        app.add_directive_to_domain("prf", name, NumberedBox, override=True)
    app.connect("doctree-read", take_tags)
    app.connect("env-get-updated", number_as_in_paper, priority=900)  # after Sphinx's count
    return {"parallel_read_safe": True, "parallel_write_safe": True}
