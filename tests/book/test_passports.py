"""Passports: complete, enough to make a figure again, and shown under every figure."""

import json
import re
from pathlib import Path

import books
import nbformat
import pytest
from by_cell import execute
from support import cells, figures, passports, results, runs

SIZE = {"epochs": 1, "train_limit": 100, "num_samples": 20, "hidden": [5], "activation": "tanh"}
EXTENSIONS = Path(__file__).parents[2] / "book" / "_ext"
PAGE = "notebooks/tiny.ipynb"

CONFIG = f"""
title: tiny
exclude_patterns: ["_generated/fork/*"]
execute: {{execute_notebooks: "off"}}
sphinx:
  local_extensions: {{passports: {EXTENSIONS}}}
  config: {{suppress_warnings: [myst.domains]}}
"""
TOC = """
format: jb-book
root: index
chapters:
  - file: _generated/notebooks/tiny
"""
INDEX = """
# Figures

```{figure} _generated/known.svg
:alt: A figure.
Its caption.
```

```{figure} _generated/later.svg
Not run yet.
```

```{figure} _generated/unknown.svg
Where is this one from?
```

```{figure} drawn.svg
Not of a run.
```
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    spec = runs.Spec("tiny", "Tiny <run>", runs.NOTEBOOKS / "mnist.ipynb", SIZE, "tiny")
    runs.execute(spec, folder, "digits")
    return results.load(folder)["tiny"]


@pytest.fixture(scope="module")
def generated(tmp_path_factory, run):
    """A figure of the run with its passport, and one without."""
    folder = tmp_path_factory.mktemp("book") / "_generated"
    folder.mkdir()
    figures.save(figures.figure_1(run.values, run.record), folder / "known.svg")
    made = {"known.svg": [run], "later.svg": [], PAGE: [run]}
    passports.write_passports(folder, made, {run.folder: PAGE})
    return folder


def test_from_the_passport_alone_the_figure_can_be_made_again(generated, tmp_path):
    [passport] = json.loads((generated / "passports.json").read_text("utf-8"))["known.svg"]
    _, record = execute(generated / passport["notebook"], tmp_path)
    again = results.Run(passport["run"], tmp_path, record)
    figures.save(figures.figure_1(again.values, again.record), tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == (generated / "known.svg").read_bytes()


def test_a_passport_is_complete(generated, run):
    found = json.loads((generated / "passports.json").read_text("utf-8"))
    assert found.keys() == {"known.svg", "later.svg", PAGE}
    assert found["later.svg"] == []
    [passport] = found["known.svg"]
    assert passport["parameters"] == run.record["parameters"]
    assert passport["parameters"] | SIZE == passport["parameters"]
    assert passport["data"] == run.record["data"]
    for key in ("commit", "machine", "versions", "started", "seconds", "counts"):
        assert passport[key] == run.record[key]
    assert passport["command"] == "make run NAME=tiny DATASET=digits"
    assert (passport["page"], passport["notebook"]) == (PAGE, f"fork/{PAGE}")


def test_the_notebook_to_fork_has_the_runs_parameters_and_no_outputs(generated, run):
    notebook = nbformat.read(generated / "fork" / PAGE, as_version=4)
    source = nbformat.read(runs.NOTEBOOKS / "mnist.ipynb", as_version=4)
    assert cells.parameters(notebook) == run.record["parameters"]
    assert cells.parameters(source) != run.record["parameters"]
    [mine] = [c.source for c in notebook.cells if "parameters" in cells.tags(c)]
    assert "train_limit = 100  # train on the first images only" in mine  # comments are kept
    assert 'activation = "tanh"  #' in mine
    assert 'name = "tiny"' in mine
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert not any(c.outputs or c.execution_count for c in code)
    others = [c.source for c in code if c.source != mine]
    assert others == [
        c.source
        for c in source.cells
        if c.cell_type == "code" and "parameters" not in cells.tags(c)
    ]


def test_without_the_executed_notebook_the_projects_is_taken(run, tmp_path):
    alone = results.Run("tiny", tmp_path, run.record)
    assert cells.parameters(passports.ready(alone)) == run.record["parameters"]
    with pytest.raises(ValueError, match="run tiny has no notebook: make it again"):
        passports.ready(results.Run("tiny", tmp_path, run.record | {"notebook": "none.ipynb"}))


def test_commands(run):
    def command(name, **parameters):
        return passports.command(results.Run(name, run.folder, {"parameters": parameters}))

    full, small = (runs.specs(smoke=s)["sigmoid-seed-0"].parameters for s in (False, True))
    assert command("sigmoid-seed-0", **full) == "make run NAME=sigmoid-seed-0"
    assert command("sigmoid-seed-0", **small) == "make run NAME=sigmoid-seed-0 SMOKE=1"
    assert command("x", dataset="mnist") == "make run NAME=x"


def test_values_of_several_lines_and_names():
    code = (
        "# Ä\na = [\n    1,\n    2,\n]  # two\nb, c = (0.1, 'é'), 3; d = 4\ne: int = 5\nf = g = 6\n"
    )
    new = cells.with_values(code, {"a": [7], "b": 8, "c": 'say "x"', "d": True, "f": 9, "x": 0})
    assert new == "# Ä\na = [7]  # two\nb, c = 8, 'say \"x\"'; d = True\ne: int = 5\nf = g = 9\n"
    assert cells.with_values(code, {"a": [1, 2], "d": 4}) == code


@pytest.fixture(scope="module")
def built(generated):
    """A book whose index shows three figures of `_generated`, one of them without a passport."""
    book = generated.parent
    files = {"_config.yml": CONFIG, "_toc.yml": TOC, "index.md": INDEX}
    for name in ("_generated/later.svg", "_generated/unknown.svg", "drawn.svg"):
        files[name] = '<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Tiny", id="a")])
    (book / "_generated/notebooks").mkdir()
    nbformat.write(page, book / "_generated" / PAGE)
    return books.build(book, files)


def test_a_figure_without_a_passport_fails_the_build(built):
    assert built.status != 0
    warnings = [x for x in built.said.splitlines() if "WARNING" in x]
    assert len(set(warnings)) == 1, warnings
    assert "no passport for the figure _generated/unknown.svg" in warnings[0]


def test_passports_stand_under_figures_and_on_notebooks(built, run):
    html = built.html
    index = (html / "index.html").read_text(encoding="utf-8")
    assert index.count('<details class="passport">') == 1
    title, commit = run.record["data"]["title"], run.record["commit"]
    start = f"Passport: {title} · seed 0 · commit {commit} · {run.record['started'][:10]} · "
    assert start in index
    assert index.index("Its caption.") < index.index(start) < index.index("later.svg")
    assert "make run NAME=tiny DATASET=digits" in re.sub("<[^>]+>", "", index)
    assert run.record["data"]["digest"] in index
    assert "num_samples" in index
    assert "Not run yet: make reproduce." in index
    assert 'href="_generated/notebooks/tiny.html"' in index
    [download] = re.findall(r'href="(_downloads/[^"]+)"', index)
    ready = nbformat.reads((html / download).read_text(encoding="utf-8"), as_version=4)
    assert cells.parameters(ready) == run.record["parameters"]
    assert not (html / "_generated/fork").exists()
    assert (html / PAGE.replace("notebooks/tiny.ipynb", "_generated/notebooks/tiny.html")).is_file()
    page = (html / "_generated/notebooks/tiny.html").read_text(encoding="utf-8")
    assert start in page
    assert page.index("<h1>Tiny") < page.index(start)
    assert "this page" in page


def test_a_compact_picture_keeps_its_shapes():
    svg = (
        '<svg width="10.12345pt" viewBox="0 0 10.12345 5">\n <metadata>\n  today\n </metadata>\n'
        ' <g id="figure_1">\n  <g id="axes_1" clip-path="url(#p1.23456)">\n   <defs>\n'
        '    <path id="m1.23456" d="M 0 -0.001 \nL 3.50049 1e-05 "/>\n   </defs>\n  </g>\n'
        '  <!-- text_1.23456 -->\n  <g transform="translate(37.69123 -216.7559) scale(0.015625)">\n'
        '   <use xlink:href="#m1.23456" x="1234.56789" style="stroke-width: 1.23456"/>\n'
        "  </g>\n </g>\n</svg>\n"
    )
    assert figures.compact(svg) == (
        '<svg width="10.12345pt" viewBox="0 0 10.12345 5">'
        '<g id="axes_1" clip-path="url(#p1.23456)"><defs>'
        '<path id="m1.23456" d="M 0 0 L 3.5 0"/></defs></g>'
        "<!-- text_1.23456 -->"
        '<g transform="translate(37.69 -216.76) scale(0.015625)">'
        '<use xlink:href="#m1.23456" x="1234.57" style="stroke-width: 1.23456"/></g></svg>\n'
    )
    other = '<svg viewBox="0 0 1 1">\n <path d="M 0.12345 0"/></svg>'
    assert figures.compact(other) == other
    assert figures.compact(figures.compact(svg)) == figures.compact(svg)
