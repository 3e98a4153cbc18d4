r"""Draw the layers of a package from the contracts that ``make lint`` keeps.

``{architecture} ../pyproject.toml`` reads import-linter's contract of type ``layers`` and becomes
an ordered list, from the top layer to the bottom. A layer has a box for each of its modules, with
the first line of the module's docstring; the box of a folder unfolds to the files in it. A module
that the contract forgets is an error, so that the picture is whole.
"""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from support import listings

SOURCE = "_generated/source"
MARKUP = re.compile(r"``(.+?)``|\*(\w[^*]*)\*")  # of docstrings: code, emphasis


class Architecture(SphinxDirective):
    """``{architecture} FILE``: the layers of the contract in a ``pyproject.toml``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """An ordered list; each entry is a list of boxes."""
        file = Path(self.env.srcdir, self.arguments[0]).resolve()
        self.env.note_dependency(str(file))
        try:
            floors = [[module_path(file, name) for name in names] for names in layers(file)]
            check_complete(file, floors)
            entries = [self.floor(paths) for paths in floors]
        except (ValueError, OSError) as error:
            raise self.error(f"architecture: {error}") from error
        return [nodes.enumerated_list("", *entries, classes=["architecture"])]

    def floor(self, paths: list[Path]) -> nodes.list_item:
        """A layer: its modules side by side."""
        return nodes.list_item("", nodes.bullet_list("", *map(self.box, paths)))

    def box(self, path: Path) -> nodes.list_item:
        """A module, or a folder with a fold for the files in it."""
        box = nodes.list_item("", self.line(path, path.parent))
        if inner := files(path):
            lines = [nodes.list_item("", self.line(p, path)) for p in inner]
            count = f"{len(inner)} file{'s' * (len(inner) > 1)}"
            opened = f"<details><summary>{count} in {path.name}/</summary>"
            box += nodes.raw("", opened, format="html")
            box += nodes.bullet_list("", *lines)
            box += nodes.raw("", "</details>", format="html")
        return box

    def line(self, path: Path, folder: Path) -> nodes.paragraph:
        """The name of a module, linked to its source, and the first line of its docstring."""
        file = path / "__init__.py" if path.is_dir() else path
        self.env.note_dependency(str(file))
        name = path.relative_to(folder).as_posix() + "/" * path.is_dir()
        parts = [self.link(file, name), nodes.Text(" "), *inline(first_line(file))]
        return nodes.paragraph("", "", *parts, support_smartquotes=False)  # σ' is no quotation

    def link(self, file: Path, name: str) -> nodes.Node:
        """The name in code, linked to the listing of the file where the book has one."""
        code, page = nodes.literal("", name), f"{SOURCE}/{listings.page_name(file)}"
        if page not in self.env.found_docs:
            return code
        target = {"refdomain": "std", "reftype": "doc", "reftarget": f"/{page}"}
        more = {"refexplicit": True, "refwarn": True, "refdoc": self.env.docname}
        return addnodes.pending_xref("", code, **target, **more)


def layers(file: Path) -> list[list[str]]:
    """The names of the modules of each layer, from the top to the bottom.

    Raises:
        ValueError: there is not one contract of layers, or modules of a layer may import each
            other, which the picture does not show.
    """
    settings = tomllib.loads(file.read_text(encoding="utf-8"))["tool"]["importlinter"]
    found = [c["layers"] for c in settings["contracts"] if c["type"] == "layers"]
    if len(found) != 1:
        raise ValueError(f"{file.name} has {len(found)} contracts of type layers: keep one.")
    for layer in found[0]:
        if not re.fullmatch(r"[\w.]+( *\| *[\w.]+)*", layer):
            raise ValueError(f"the layer {layer!r} cannot be drawn: put | between its modules.")
    return [re.findall(r"[\w.]+", layer) for layer in found[0]]


def module_path(file: Path, name: str) -> Path:
    """The file of a module, or its folder; a ValueError if there is neither."""
    folder = file.parent.joinpath(*name.split("."))
    path = folder if folder.is_dir() else folder.with_suffix(".py")
    if not path.exists():
        raise ValueError(f"there is no module {name}: remove it from {file.name}.")
    return path


def check_complete(file: Path, floors: list[list[Path]]) -> None:
    """Raise a ValueError if a module beside those of the layers stands in none of them."""
    drawn = {path for paths in floors for path in paths}
    for folder in {path.parent for path in drawn}:
        for path in sorted({*folder.glob("*.py"), *(p.parent for p in folder.glob("*/*.py"))}):
            if path not in drawn and path.name != "__init__.py":
                raise ValueError(f"{path.name} stands in no layer: add it to {file.name}.")


def files(path: Path) -> list[Path]:
    """The modules in a folder, and those in its folders right behind the folder itself."""
    if not path.is_dir():
        return []
    inner = {p.parent if p.name == "__init__.py" else p for p in path.rglob("*.py")}
    return sorted(inner - {path}, key=lambda p: p.with_suffix("").parts)


def first_line(file: Path) -> str:
    """The first line of a module's docstring; a ValueError if it has none."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    if not text:
        raise ValueError(f"{file.name} has no docstring: say in its first line what it is for.")
    return text.partition("\n")[0]


def inline(text: str) -> Iterator[nodes.Node]:
    """A line of a docstring as nodes: code and emphasis are marked up."""
    end = 0
    for match in MARKUP.finditer(text):
        yield nodes.Text(text[end : match.start()])
        yield nodes.literal("", match[1]) if match[1] else nodes.emphasis("", match[2])
        end = match.end()
    yield nodes.Text(text[end:])


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive with Sphinx."""
    app.add_directive("architecture", Architecture)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
