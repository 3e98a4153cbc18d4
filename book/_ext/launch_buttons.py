"""Let the theme's buttons for Binder and Colab open the sources of executed notebooks.

The theme opens the page itself, but the executed notebooks are no files of the repository. Its
buttons need an address: without one, or on pages without a source there, they are left out.
"""

from typing import Any
from urllib.parse import quote

from sphinx.application import Sphinx
from sphinx.config import Config
from support import launch, runs

PAGES = ("_generated/notebooks/", "_generated/not-counted/")


def settle(_app: Sphinx, config: Config) -> None:
    """Hand the theme what it supports: no button without an address, Colab for GitHub alone."""
    options = config.html_theme_options
    options["repository_url"] = url = launch.address(options["repository_url"])
    if not url:
        options["launch_buttons"] = {}
    elif not url.startswith("https://github.com/"):
        options["repository_provider"] = "gitlab"  # like any server that is not GitHub
        options["launch_buttons"] = options["launch_buttons"] | {"colab_url": ""}


def open_source(
    app: Sphinx, pagename: str, _template: str, context: dict[str, Any], _doctree: object
) -> None:
    """Let the buttons on the page of a run of ``runs.yml`` open its source; drop all others."""
    folder, _, run = pagename.rpartition("/")
    spec = runs.specs().get(run) if f"{folder}/" in PAGES else None
    options = app.config.html_theme_options
    page = f"{options.get('path_to_docs', '')}/{pagename}.ipynb"
    url = quote(options["repository_url"])
    for menu in [m for m in context["header_buttons"] if m.get("label") == "launch-buttons"]:
        if spec is None:
            context["header_buttons"].remove(menu)
            continue
        for button in menu["buttons"]:
            opened = button["url"].replace(page, f"notebooks/{quote(spec.notebook.name)}")
            button["url"] = opened.replace(url, quote(url, safe="%"))  # Binder wants one word


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension with Sphinx."""
    app.connect("config-inited", settle)
    app.connect("html-page-context", open_source, priority=502)  # the theme's buttons are there
    return {"parallel_read_safe": True, "parallel_write_safe": True}
