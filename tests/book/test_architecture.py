"""The page on the architecture: its picture is that of the contracts, its recipes are true."""

import io
import re
from types import SimpleNamespace

import architecture
import nbformat
import pandas as pd
import pytest
import torch
import yaml
from bs4 import BeautifulSoup
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace, patch_docutils
from strategies import inputs
from support import cells, listings, quantities, results
from torch import Tensor, nn

import fimlib
from fimlib.engines import choose
from fimlib.families import Independent, Labels

ROOT = results.ROOT
PAGE = (ROOT / "book" / "architecture.md").read_text("utf-8")
PROJECT = """
[[tool.importlinter.contracts]]
type = "layers"
layers = ["tiny.top", "tiny.left | tiny.wing", "tiny.data"]

[[tool.importlinter.contracts]]
type = "acyclic_siblings"
ancestors = ["tiny"]
"""
MODULES = {
    "__init__": "The face.",
    "top": "All of it.\n\nMore.",
    "left": "On the *left*.",
    "wing/__init__": "A folder.",
    "wing/part": "A ``part``.",
    "data": "Numbers.",
}


def build(folder, project=PROJECT, modules=MODULES):
    """The boxes of a tiny project, layer by layer, and what Sphinx complained about."""
    for name, text in modules.items():
        path = folder / "tiny" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""{text}"""\n', "utf-8")
    (folder / "pyproject.toml").write_text(project, "utf-8")
    book, said = folder / "book", io.StringIO()
    book.mkdir(exist_ok=True)
    (book / "index.md").write_text("# Tiny\n\n```{architecture} ../pyproject.toml\n```\n", "utf-8")
    settings = {"extensions": ["myst_parser", "architecture"], "html_theme": "basic"}
    settings["source_suffix"] = {".md": "markdown"}  # else later books of this process have it
    with patch_docutils(), docutils_namespace():
        app = Sphinx(
            book, None, folder / "html", folder / "trees", "html", settings, None, said,
        )  # fmt: skip
        app.build()
    html = BeautifulSoup((folder / "html/index.html").read_text("utf-8"), "html.parser")
    floors = html.select("ol.architecture > li")
    boxes = [
        [one.get_text(" ", strip=True) for one in f.select(":scope > ul > li")] for f in floors
    ]
    return SimpleNamespace(boxes=boxes, html=html, said=said.getvalue())


def test_the_picture_is_the_contract(tmp_path):
    made = build(tmp_path)
    assert made.boxes == [
        ["top.py All of it."],
        ["left.py On the left .", "wing/ A folder. 1 file in wing/ part.py A part ."],
        ["data.py Numbers."],
    ]
    assert not made.said
    assert [str(x) for x in made.html.select("ol.architecture em")] == ["<em>left</em>"]
    assert made.html.select_one("ol.architecture details summary")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"tiny.top", "tiny.left |', '"tiny.left", "tiny.top |', "left top|wing data"),
        ('left | tiny.wing"', 'left", "tiny.wing"', "top left wing data"),
        ("left | tiny.wing", "left | tiny.wing | tiny.more", "top left|wing|more data"),
    ],
)
def test_another_contract_is_another_picture(tmp_path, old, new, expected):
    assert old in PROJECT
    modules = MODULES | ({"more": "More."} if "more" in new else {})
    made = build(tmp_path, PROJECT.replace(old, new), modules)
    names = [[re.match(r"\w+", box)[0] for box in boxes] for boxes in made.boxes]
    assert " ".join("|".join(floor) for floor in names) == expected
    assert not made.said


@pytest.mark.parametrize(
    ("old", "new", "modules", "complaint"),
    [
        ('"tiny.top", ', "", {}, "top.py stands in no layer: add it to pyproject.toml"),
        ("", "", {"new/__init__": "New."}, "new stands in no layer"),
        ("tiny.data", "tiny.lost", {}, "there is no module tiny.lost: remove it"),
        ("left | ", "left : ", {}, "put | between its modules"),
        ('type = "acyclic_siblings"', 'type = "layers"\nlayers = []', {}, "2 contracts of type"),
        ("", "", {"data": ""}, "data.py has no docstring: say in its first line"),
    ],
)
def test_what_cannot_be_drawn_is_told(tmp_path, old, new, modules, complaint):
    made = build(tmp_path, PROJECT.replace(old, new), MODULES | modules)
    assert complaint in made.said
    assert not made.boxes


def test_every_file_of_the_library_is_in_the_picture_once():
    file = ROOT / "pyproject.toml"
    floors = [
        [architecture.module_path(file, n) for n in names] for names in architecture.layers(file)
    ]
    architecture.check_complete(file, floors)
    drawn = [p for floor in floors for path in floor for p in (path, *architecture.files(path))]
    drawn = [path / "__init__.py" if path.is_dir() else path for path in drawn]
    assert sorted([*drawn, ROOT / "fimlib/__init__.py"]) == sorted((ROOT / "fimlib").rglob("*.py"))
    assert set(drawn) <= set(listings.paths())  # whose pages the names lead to


# The words.


def defined(name, text):
    """Whether a file defines a name: a function, a class, a constant, a method."""
    return re.search(rf"^ *(?:(?:def|class) {name}\b|{name}\b.*? = )", text, re.MULTILINE)


def test_names_are_where_the_page_says():
    found = re.findall(r"`(\w+)`(?: of `\w+`)? in\s+`([\w/]+\.py)`", PAGE)
    assert len(found) >= 20
    for name, file in found:
        assert defined(name, (ROOT / file).read_text("utf-8")), f"{file} does not define {name}"


def test_files_are_where_the_page_says():
    found = set(re.findall(r"`((?:fimlib|notebooks|book|tests|data)/[\w./-]+)`", PAGE))
    assert len(found) >= 20
    made = ("book/_generated",)
    assert [f for f in found if not (ROOT / f).exists() and not f.startswith(made)] == []
    for target in re.findall(r"`make ([a-z-]+)", PAGE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)


# The recipes.


def block(start):
    """The code of the page that starts like this."""
    every = re.findall(r"^ *```(?:python|yaml)\n(.*?)^ *```", PAGE, re.MULTILINE | re.DOTALL)
    [found] = [text for text in every if text.lstrip().startswith(start)]
    return "\n".join(line.removeprefix("   ") for line in found.splitlines())


def test_the_family_of_the_recipe_is_one():
    names = {"Independent": Independent, "Labels": Labels, "Tensor": Tensor, "torch": torch}
    exec(block("class Spin"), names)
    family, h = names["Spin"](), inputs(2, 3)
    for one, eta, cov in zip(h, family.mean(h), family.covariance(h), strict=True):
        F = lambda v: family.log_partition(v[None])[0]  # noqa: E731
        torch.testing.assert_close(eta, torch.func.grad(F)(one))
        torch.testing.assert_close(cov, torch.func.hessian(F)(one))
    y = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 3)
    p = (y @ h[0] - family.log_partition(h[:1])).exp()
    delta, J = y - family.mean(h[:1]), inputs(1, 3, seed=1)
    squares = (delta @ J[0]).square()
    v1 = p @ (squares - p @ squares).square()
    torch.testing.assert_close(family.variance1(h[:1], J[..., None])[0, 0], v1)
    drawn = family.sample(h, 5, torch.Generator().manual_seed(0)).values
    assert set(drawn.unique().tolist()) == {-1, 1}


def test_the_abstract_methods_are_as_many_as_the_page_says():
    assert "Two methods are needed, $F$ and a way to draw labels" in " ".join(PAGE.split())
    for family in (Independent, fimlib.Family):
        assert family.__abstractmethods__ == {"log_partition", "draw"}


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return net, inputs(4, 3)


def test_the_engine_of_the_recipe_is_one(tiny, monkeypatch):
    names = {}
    exec(block("from torch import Tensor, nn"), names)
    mine = SimpleNamespace(differentiate=names["differentiate"])
    [row] = re.findall(r"`(plain_engine\(.*?\))`", PAGE)
    engine = eval(row, {"plain_engine": choose.plain_engine, "mine": mine})
    monkeypatch.setitem(choose.ENGINES, engine.name, engine)
    derivs = fimlib.differentiate(*tiny, engine="mine")
    expected = fimlib.differentiate(*tiny, engine="traced")
    assert derivs.engine == fimlib.plan(*tiny, engine="mine").engine == "mine"
    torch.testing.assert_close(derivs.second("0.weight"), expected.second("0.weight"))
    assert fimlib.accumulate(*tiny, fimlib.Categorical(), engine="mine").count == 4


def test_a_wrong_engine_is_found_out(tiny, monkeypatch):
    def wrong(model, x, *, order, wanted):
        right = choose.layerwise.differentiate(model, x, order=order, wanted=wanted)
        return choose.replace(right.derivatives(), outputs=2 * right.outputs)

    monkeypatch.setitem(choose.ENGINES, "mine", choose.plain_engine("mine", wrong))
    with pytest.raises(NotImplementedError):
        fimlib.differentiate(*tiny, engine="mine")


def test_the_experiment_of_the_recipe_runs(tmp_path):
    names = {}
    exec("import time\nimport torch\nimport fimlib\nstarted = time.time()", names)
    exec("from support import data, layers, results, training", names)
    given = block('dataset = "mnist"').replace('"mnist"', '"digits"', 1)
    tags = {"tags": ["parameters"]}
    parameters_cell = nbformat.v4.new_code_cell(given, metadata=tags)
    exec(given, names)
    names["out"] = str(tmp_path / "run")
    exec(block("torch.set_num_threads"), names)
    values = results.Run("run", tmp_path / "run", {}).values
    assert list(values.quantity) == ["I", "I"]
    tagged = cells.parameters(nbformat.v4.new_notebook(cells=[parameters_cell]))
    assert results.read_record(tmp_path / "run")["parameters"] == tagged
    plan = yaml.safe_load(block("untrained:"))["untrained"]
    assert set(plan["each"]) <= set(names["parameters"])


def test_the_quantity_of_the_recipe_is_one():
    row = block('"spread_of_i1": layers')
    quantity = eval(f"{{{row}}}", dict(vars(quantities)))["spread_of_i1"]
    assert quantity.of_layers
    assert quantity.reads(()) == ("V1", "I_squared")
    table = pd.DataFrame({"V1": [16.0, 9.0], "I_squared": [4.0, 0.0]})
    assert quantity.function(table).dropna().tolist() == [2.0]
    fields = re.search(r"`support.report.fact` lists its fields: (.*?)\.\n", PAGE)[1]
    source = (ROOT / "notebooks/support/report.py").read_text("utf-8").partition("def fact(")[2]
    for field in re.findall(r"`(\w+)`", fields):
        assert f'"{field}"' in source.partition("\ndef ")[0], field
