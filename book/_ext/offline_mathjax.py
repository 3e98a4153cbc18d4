"""Serve MathJax from the book itself, so that its pages need no network, not even a server."""

from importlib.metadata import files

from sphinx.application import Sphinx
from sphinx.config import Config

SCRIPT = "tex-svg-full.js"  # one file: TeX input, SVG output, glyphs included


def ship_mathjax(_app: Sphinx, config: Config) -> None:
    """Copy the script into ``_static`` and point the pages at it."""
    # The package's folder has a dash in its name: it cannot be imported, only looked up.
    [script] = (f for f in files("sphinx-mathjax-offline") or [] if f.name == SCRIPT)
    config.html_static_path.append(str(script.locate()))
    config.mathjax_path = SCRIPT


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension with Sphinx."""
    app.connect("config-inited", ship_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
