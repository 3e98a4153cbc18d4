"""The book's own Sphinx extensions: the paper's numbers, and MathJax from the book itself."""

from pathlib import Path

import books
import pytest

EXTENSIONS = Path(__file__).parents[2] / "book" / "_ext"

CONFIG = """
title: tiny
exclude_patterns: ["_generated/*.md"]
execute: {execute_notebooks: "off"}
sphinx:
  extra_extensions: [sphinx_proof]
  local_extensions: {paper_numbers: EXTENSIONS, offline_mathjax: EXTENSIONS}
  config: {suppress_warnings: [myst.domains, etoc.glob]}
"""

TOC = """
format: jb-book
root: uses
chapters:
  - file: states
  - glob: _generated/notebooks/*
"""

USES = r"""
# Uses

Because of {eq}`square`, or {ref}`its sign <square>`, {prf:ref}`the-lemma`, and
{prf:ref}`the-theorem` hold.

```{figure} dot.svg
A caption.
```
"""

STATES = r"""
# States

:::{prf:lemma} on squares
:label: the-lemma
:number: A.1
$$
a^2 \ge 0
\tag{23}
$$ (square)
:::

:::{prf:theorem}
:label: the-theorem
:number: 4.1
See {eq}`square`.
:::
"""


def build(book: Path, **pages: str) -> books.Built:
    """A book of two pages."""
    files = {"uses": USES, "states": STATES} | pages
    files = {f"{name}.md": text for name, text in files.items()}
    files["_config.yml"] = CONFIG.replace("EXTENSIONS", str(EXTENSIONS))
    files["_toc.yml"] = TOC
    files["dot.svg"] = '<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'
    files["_generated/fragment.md"] = "Included by others, no page."
    return books.build(book, files)


def test_numbers_are_the_papers_on_every_page(tmp_path: Path) -> None:
    done = build(tmp_path)
    assert done.status == 0, done.said
    html = done.html
    states = (html / "states.html").read_text(encoding="utf-8")
    uses = (html / "uses.html").read_text(encoding="utf-8")

    assert '<span class="eqno">(23)' in states
    assert '<span class="caption-number">Lemma A.1 </span>' in states
    assert '<span class="caption-number">Theorem 4.1 </span>' in states
    assert r"\tag" not in states  # or MathJax would show a second number
    for link in ("#equation-square", "#the-lemma", "#the-theorem"):
        assert f'href="states.html{link}"' in uses
    for text in (">(23)<", ">its sign<", ">Lemma A.1<", ">Theorem 4.1<"):
        assert text in uses
    assert '"caption-number"' not in uses  # the figure: no "Fig. 1" that is not the paper's

    assert 'src="_static/tex-svg-full.js' in states
    assert (html / "_static" / "tex-svg-full.js").stat().st_size > 2_000_000
    assert "cdn" not in states
    assert not (html / "_generated" / "fragment.html").exists()


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("{eq}`square`", "{eq}`nowhere`", "equation not found: nowhere"),
        ("<square>", "<nowhere>", "undefined label: 'nowhere'"),
        ("{prf:ref}`the-lemma`", "{prf:ref}`nowhere`", "label 'nowhere' not found"),
        (":number: A.1\n", "", "'the-lemma' needs either :number:"),
        (r"\tag{23}", "", r"equation 'square' has a label but no \tag"),
    ],
)
def test_what_is_missing_fails_the_build(
    tmp_path: Path, old: str, new: str, complaint: str
) -> None:
    done = build(tmp_path, uses=USES.replace(old, new), states=STATES.replace(old, new))
    assert done.status != 0
    assert complaint in done.said
    assert "Traceback" not in done.said
