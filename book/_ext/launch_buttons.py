"""Buttons on the pages of executed notebooks that open their sources at Binder and Colab.

The theme has such buttons, but they open the page itself, and the executed notebooks are no files
of the repository. So this extension puts the source's addresses into the theme's menu. It does
nothing while the file ``REPO_URL`` is empty.
"""

from typing import Any

from sphinx.application import Sphinx
from support import launch, runs

PAGES = ("_generated/notebooks/", "_generated/not-counted/")
ICONS = {"Binder": "_static/images/logo_binder.svg", "Colab": "_static/images/logo_colab.png"}


def add_buttons(
    _app: Sphinx, pagename: str, _template: str, context: dict[str, Any], _doctree: object
) -> None:
    """Add a menu to the buttons on top of a page, if it shows a run of ``runs.yml``."""
    folder, _, run = pagename.rpartition("/")
    spec = runs.specs().get(run) if f"{folder}/" in PAGES else None
    found = launch.addresses(launch.repo_url(), spec.notebook.name) if spec else {}
    buttons = [
        {
            "type": "link",
            "text": service,
            "tooltip": f"Open the source of this notebook at {service}",
            "icon": ICONS[service],
            "url": url,
        }
        for service, url in found.items()
    ]
    if buttons:
        menu = {"type": "group", "tooltip": "Run this notebook", "icon": "fas fa-rocket"}
        context["header_buttons"].insert(0, menu | {"buttons": buttons, "label": "launch-buttons"})


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension with Sphinx."""
    app.connect("html-page-context", add_buttons, priority=502)  # the theme's list is there
    return {"parallel_read_safe": True, "parallel_write_safe": True}
