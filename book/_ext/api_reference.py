"""Make the reference of ``fimlib`` from its docstrings, and link it to the paper's numbers.

``{api} fimlib.fisher fimlib.diagonal`` documents every public name that these modules define, and
``{api-list}`` with the same modules lists them. Public is what ``fimlib`` or one of its modules has
in ``__all__``. Sphinx's autodoc and napoleon read the docstrings.
Before they do, this extension turns into links what a docstring says anyway: a number of the
paper ("Eq. 24", "Theorem 4.1", or an inequality's "(10)") to its place in the book by
``paper.yml``, a section to its page, and ````spectrum```` to its entry here. Names that other
libraries own are not linked: the book needs no network.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import paper_map
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.domains.python import PyClasslike
from sphinx.util.docutils import SphinxDirective
from support import listings

import fimlib

# What a family shows of its own: formulas. How it shares in the work stands with Family.
CLOSED_FORMS = ["covariance", "fourth_moment", "cumulants", "information", "variance1"]
CLOSED_FORMS += ["covariance12", "outer_covariance_min", "residual_bound", "observed", "expected"]

LITERAL = re.compile(r"(``.+?``)", re.DOTALL)
EMPHASIS = re.compile(r"(?<![\w*\\])\*(?=\w)[^*\n]*(?<=\w)\*(?![\w*])")
SPECIAL = re.compile(r"[\\*|`'\"]|_(?!\w)")  # markup of reStructuredText, quotes to make round
NUMBER = r"(?:[A-Z]\.\d+|\d+\.\d+|\d+)(?!\w)"
KINDS = {"Eq": "Eq.", "Eqs": "Eq.", "Thm": "Theorem", "Prop": "Proposition", "Cor": "Corollary"}
KINDS |= {f"{kind}s": kind for kind in ("Theorem", "Lemma", "Proposition", "Remark", "Table")}
KINDS |= {"Corollaries": "Corollary"}
SINGLE = ("Theorem", "Lemma", "Corollary", "Proposition", "Remark", "Table")
MENTION = re.compile(
    rf"\b({'|'.join([*KINDS, *SINGLE])})\b\.?\s+"
    rf"({NUMBER}(?:(?:\s*[,–-]\s*|,?\s+(?:and|to)\s+){NUMBER})*)"
)
BARE = re.compile(r"(?<=\s)\((\d{1,2})\)")  # the number of an inequality, as "(10)"
PLACE = re.compile(r"\b(Section|Appendix)\s+(\d(?:\.\d)?|[A-F])\b(?!\.)")
LABEL = re.compile(r"([A-Z][a-z]+):(?= )")  # "Cost: ..."


class Api(SphinxDirective):
    """``{api} module ...``: an entry for every public name that the modules define."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """The entries: functions, classes, named tuples, each in the order of the source."""
        lines = [".. currentmodule:: fimlib", ""]
        for name in of_modules(self.arguments[0].split()):
            self.env.note_dependency(inspect.getfile(public()[name]))
            lines += entry(name)
        return self.parse_lines(lines)

    def parse_lines(self, lines: list[str]) -> list[nodes.Node]:
        """Nodes of reStructuredText, which is what autodoc writes, inside of Markdown."""
        fence = "```````"
        text = "\n".join([f"{fence}{{eval-rst}}", *lines, fence])
        return [nodes.container("", *self.parse_text_to_nodes(text), classes=["api"])]


class ApiList(Api):
    """``{api-list} module ...``: the same names, each with the first line of its docstring."""

    def run(self) -> list[nodes.Node]:
        """A bullet list."""
        lines = [".. currentmodule:: fimlib", ""]
        for name in of_modules(self.arguments[0].split()):
            first = (inspect.getdoc(public()[name]) or "").partition("\n")[0]
            link = f":py:obj:`{name} <{full(name)}>`"
            lines.append(f"* {link}: {prose(first, anchors(self.env.srcdir))}")
        return self.parse_lines(lines)


@cache
def homes() -> dict[str, str]:
    """The module from which to import each public name: ``fimlib`` where that has it."""
    modules = filter(re.compile(r"fimlib(\.\w+)?").fullmatch, sys.modules)
    found: dict[str, str] = {}
    for module in sorted(modules, reverse=True):
        found |= dict.fromkeys(getattr(sys.modules[module], "__all__", ()), module)
    return found


@cache
def public() -> dict[str, Any]:
    """Functions and classes by their public names."""
    return {name: getattr(sys.modules[home], name) for name, home in homes().items()}


def full(name: str) -> str:
    """A public name, or a member of one, with the module from which to import it."""
    name = short(name)
    return f"{homes()[name.partition('.')[0]]}.{name}"


def short(name: str) -> str:
    """A name without ``fimlib`` and modules before it."""
    parts = name.split(".")
    return ".".join(parts[next((i for i, p in enumerate(parts) if p in homes()), 0) :])


def of_modules(modules: list[str]) -> list[str]:
    """Public names that modules define: functions, then classes, then what functions return."""
    found: list[str] = []
    for module in modules:
        importlib.import_module(module)
        here = [n for n, target in public().items() if target.__module__ == module]
        if not here:
            raise ValueError(f"{module} defines no public name of fimlib: correct the page.")
        found += sorted(here, key=lambda n: inspect.getsourcelines(public()[n])[1])
    return sorted(found, key=kind)  # a stable sort


def kind(name: str) -> int:
    """0 for a function, 1 for a class, 2 for a named tuple."""
    target = public()[name]
    return inspect.isclass(target) + (inspect.isclass(target) and issubclass(target, tuple))


def entry(name: str) -> list[str]:
    """The autodoc directive of a public name."""
    target = public()[name]
    if not inspect.isclass(target):
        return [f".. autofunction:: {full(name)}", ""]
    lines = [f".. autoclass:: {full(name)}"]
    if own := members(target):
        lines.append(f"   :members: {', '.join(own)}")
    if is_a_family(target):
        lines.append("   :show-inheritance:")
    return [*lines, ""]


def is_a_family(target: type) -> bool:
    """Whether a class fills in the interface ``Family``."""
    return issubclass(target, fimlib.Family) and target is not fimlib.Family


def members(target: type) -> list[str]:
    """The methods and properties of a class that have an entry."""
    if is_a_family(target):
        return [name for name in CLOSED_FORMS if name in vars(target)]
    return [
        name
        for name, value in vars(target).items()
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
    ]


@cache
def anchors(book: str | Path) -> dict[str, str]:
    """Labels in the book by number."""
    groups = paper_map.read_maps(Path(book))
    return {number: item["anchor"] for items in groups.values() for number, item in items.items()}


def process(
    app: Sphinx, what: str, name: str, target: object, _options: object, lines: list[str]
) -> None:
    """Rewrite a docstring from its own style into what napoleon reads, links included."""
    lines[:] = rewritten(lines, anchors(app.srcdir), short(name).partition(".")[0])
    if what in ("function", "class"):
        lines += ["", source(target)]


def rewritten(lines: list[str], known: dict[str, str], owner: str = "") -> list[str]:
    """A docstring's lines with labels in bold, links, and markup of other languages escaped.

    Args:
        lines: The docstring.
        known: Labels in the book by the numbers of the paper.
        owner: The public name that it belongs to; of a class, bare names are its members first.
    """
    found: list[str] = []
    for verbatim, block in blocks(unfolded(lines)):
        found += block if verbatim else prose("\n".join(block), known, owner).split("\n")
    return found


def unfolded(lines: list[str]) -> Iterator[str]:
    """Paragraphs that begin with a label as paragraphs of their own, not as definitions.

    "Example: a text" with indented lines below is a label, a text and lines without indentation.
    """
    inside = False
    for i, line in enumerate(lines):
        label = LABEL.match(line)
        if label:
            inside = not line.endswith("::")
            yield f"**{label[1]}:**{line[label.end() :]}"
            if inside and i + 1 < len(lines) and lines[i + 1].lstrip().startswith(">>>"):
                yield ""
        elif inside and line.startswith("    "):
            yield line[4:]
        else:
            inside = inside and not line
            yield line


def blocks(lines: Iterator[str]) -> Iterator[tuple[bool, list[str]]]:
    """Runs of lines, each with whether it is code: doctests, and what follows a "::"."""
    block: list[str] = []
    code, literal = False, False
    for line in lines:
        doctest = line.lstrip().startswith(">>>")
        starts = doctest and not code
        ends = code and (bool(line) and not line.startswith(" ") if literal else not line)
        if starts or ends:
            yield code, block
            block, code, literal = ([""] if starts else []), starts, False
        block.append(line)
        if not code and line.endswith("::"):
            yield code, block
            block, code, literal = [], True, True
    yield code, block


def prose(text: str, known: dict[str, str], owner: str = "") -> str:
    """Text with links, escaped outside of its literals."""
    parts = LITERAL.split(text)
    parts[::2] = [linked(part, known) for part in parts[::2]]
    parts[1::2] = [literal(part, owner) for part in parts[1::2]]
    return "".join(parts)


def literal(code: str, owner: str = "") -> str:
    """Code in double backticks: a link if it is a name that has an entry."""
    name = code.strip("`")
    target = short(name.removesuffix("()"))
    for candidate in (f"{owner}.{target}", target):
        if has_entry(candidate):
            return f":py:obj:`{name} <{full(candidate)}>`"
    return code


def has_entry(name: str) -> bool:
    """Whether the reference has an entry for a public name, or a member of one."""
    owner, _, member = short(name).partition(".")
    if owner not in public() or not member:
        return owner in public()
    target = public()[owner]
    return inspect.isclass(target) and member in members(target)


def linked(text: str, known: dict[str, str]) -> str:
    """Text without literals, escaped, with a link for everything that has a place in the book."""
    roles: list[str] = []

    def keep(role: str) -> str:
        roles.append(role)
        return f"\0{len(roles) - 1}\0"

    text = EMPHASIS.sub(lambda m: keep(m[0]), text)
    text = re.sub(r"\*\*.+?:\*\*|^(\s*)\* ", lambda m: keep(m[0]), text, flags=re.MULTILINE)
    text = MENTION.sub(partial(mention, known, keep), text)
    text = BARE.sub(lambda m: keep(to_number(f"Eq. {m[1]}", m[0], known)), text)
    text = PLACE.sub(lambda m: keep(f":doc:`{m[0]} <{place_page(m[1], m[2])}>`"), text)
    text = SPECIAL.sub(lambda m: f"\\{m[0]}", text)
    while roles and "\0" in text:
        text = re.sub("\0(\\d+)\0", lambda m: roles[int(m[1])], text)
    return text


def mention(known: dict[str, str], keep: Callable[[str], str], found: re.Match[str]) -> str:
    """The numbers of a mention as links: "Theorem 4.1", or "Eqs 3 to 5" one by one."""
    kind = KINDS.get(found[1], found[1])
    numbers = re.findall(NUMBER, found[2])
    if len(numbers) == 1:
        words = re.sub(r"\s+", " ", found[0])
        return keep(to_number(f"{kind} {numbers[0]}", words, known))
    return re.sub(NUMBER, lambda m: keep(to_number(f"{kind} {m[0]}", m[0], known)), found[0])


def to_number(number: str, words: str, known: dict[str, str]) -> str:
    """A link to a number of the paper; as it is, if the map does not know it."""
    anchor = known.get(number)
    if not anchor:
        return words
    role = "ref" if number.startswith(("Eq.", "Table")) else "prf:ref"
    return f":{role}:`{words} <{anchor}>`"


def place_page(kind: str, number: str) -> str:
    """The page of a section or an appendix of the paper."""
    return f"/{kind}-{number}".lower().replace(".", "-")


def source(target: Any) -> str:
    """A link to the code."""
    path, (_, line) = Path(inspect.getfile(target)), inspect.getsourcelines(target)
    words = f"{listings.relative(path)}, line {line}"
    return f"**Source:** :ref:`{words} <{listings.label(path, line)}>`"


def settings(_app: Sphinx, config: Config) -> None:
    """How autodoc and napoleon shall write."""
    config.add_module_names = False
    config.autodoc_member_order = "bysource"
    config.autodoc_preserve_defaults = True
    config.napoleon_use_ivar = True
    config.napoleon_attr_annotations = False  # they stand in the signature
    config.napoleon_use_rtype = False
    config.python_maximum_signature_line_length = 110  # full names are counted
    config.toc_object_entries_show_parents = "hide"
    # Types of Python, torch and numpy have no entry here, nor what fimlib keeps to itself; a
    # public name must have one.
    others = r"(?!fimlib\.).*|fimlib\.\w+\.\w+"
    config.nitpick_ignore_regex = [*config.nitpick_ignore_regex, ("py:.*", others)]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension with Sphinx."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("config-inited", settings)
    app.connect("autodoc-process-docstring", process)  # connected first, so before napoleon
    app.setup_extension("sphinx.ext.napoleon")
    for field in PyClasslike.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"  # as in the docstrings
    app.add_directive("api", Api)
    app.add_directive("api-list", ApiList)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
