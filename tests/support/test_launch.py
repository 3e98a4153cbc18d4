"""Buttons that open notebooks in the browser: only with an address, and at the right place."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from html import unescape
from importlib.metadata import packages_distributions, requires

import nbformat
import pytest
import yaml
from books import build_by_sphinx
from jupyter_book.config import get_final_config
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import cells, comparison, imports, launch, results, runs

SOURCES = sorted(runs.NOTEBOOKS.glob("*.ipynb"))
GITHUB = "https://github.com/example/fimlib"
ELSEWHERE = "https://git.example.org/group/fimlib"


def test_the_notebooks_agree_with_the_setting():
    url = launch.repo_url()
    for path in SOURCES:
        text = path.read_text("utf-8")
        assert launch.with_cell(text, url) == text, "run `make launch`"


def write_setting(root, url):
    """The book's settings, with an address, in a folder that stands for the project."""
    (root / "book").mkdir(exist_ok=True)
    text = (results.ROOT / launch.SETTING).read_text("utf-8")
    assert text.count('\n  url: ""\n') == 1
    (root / launch.SETTING).write_text(text.replace('\n  url: ""\n', f"\n  url: {url}\n"), "utf-8")


@pytest.mark.parametrize(
    ("setting", "url"),
    [("", ""), ('""', ""), (GITHUB + ".git", GITHUB), (GITHUB + "/", GITHUB), (GITHUB, GITHUB)],
)
def test_the_setting_is_that_of_jupyter_book(tmp_path, setting, url):
    write_setting(tmp_path, setting)
    assert launch.repo_url(tmp_path) == url


@pytest.mark.parametrize(
    "setting",
    ["github.com/a/b", "https://github.com/a", "git@github.com:a/b", f"{GITHUB} {GITHUB}"],
)
def test_what_is_no_address_is_refused(tmp_path, setting, capsys):
    write_setting(tmp_path, setting)
    with pytest.raises(ValueError, match="must be empty or an address such as https://"):
        launch.repo_url(tmp_path)
    assert launch.main(tmp_path) == 1
    assert "error: repository: url: in book/_config.yml must be" in capsys.readouterr().err


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_the_cell_comes_first_goes_again_and_costs_no_run(path, tmp_path):
    text = launch.with_cell(path.read_text("utf-8"), "")
    changed = launch.with_cell(text, GITHUB)
    notebook = nbformat.reads(changed, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells.tags(code[0]) == [launch.TAG]
    assert f'"{GITHUB}"' in code[0].source
    assert notebook.cells[0].source.startswith("# ")  # the title stays on top
    assert launch.with_cell(changed, GITHUB) == changed
    assert launch.with_cell(changed, "") == text
    copy = tmp_path / path.name
    made_of = []
    for version in (text, changed):
        copy.write_text(version, encoding="utf-8")
        made_of.append(runs.fingerprint(runs.Spec("a", "A", copy), "digits", "digest"))
    assert made_of[0] == made_of[1]


def test_the_cell_installs_all_that_a_notebook_imports():
    """Elsewhere nothing is there but what the extra names."""
    tables = tomllib.loads((results.ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = {
        name: list(map(Requirement, x)) for name, x in tables["optional-dependencies"].items()
    }
    asked = list(map(Requirement, tables["dependencies"])) + extras["notebooks"]
    asked += [r for base in asked for extra in base.extras for r in extras[extra]]
    asked += [Requirement(text) for r in asked for text in requires(r.name) or ()]  # come along
    names = {canonicalize_name(requirement.name) for requirement in asked}
    distributions = packages_distributions()
    for path in SOURCES:
        files = [f for f in runs.sources(path) if f.is_relative_to(runs.NOTEBOOKS)]
        code = [cell.source for cell in runs.code_cells(path)] + [f.read_text() for f in files]
        tops = {name.partition(".")[0] for text in code for name in imports.imported(text)}
        for top in tops & distributions.keys():
            found = {canonicalize_name(name) for name in distributions[top]}
            assert found & (names | {"fimlib"}), f"{path.name} imports {top}"


def test_make_launch_writes_and_takes_back(tmp_path, capsys):
    (tmp_path / "notebooks").mkdir()
    files = ["notebooks/mnist.ipynb", *launch.LINES]
    for name in files:
        (tmp_path / name).write_text((results.ROOT / name).read_text("utf-8"), encoding="utf-8")
    write_setting(tmp_path, "")
    assert launch.main(tmp_path) == 0
    old = {name: (tmp_path / name).read_text("utf-8") for name in files}
    for url, there in ((GITHUB, True), (GITHUB, True), ("", False)):
        write_setting(tmp_path, url)
        assert launch.main(tmp_path) == 0
        for name in files:
            assert ((tmp_path / name).read_text("utf-8").count(GITHUB) == 1) is there
        if there:
            urls = tomllib.loads((tmp_path / "pyproject.toml").read_text("utf-8"))["project"][
                "urls"
            ]
            assert urls["Repository"] == GITHUB
            citation = yaml.safe_load((tmp_path / "CITATION.cff").read_text("utf-8"))
            assert citation["repository-code"] == GITHUB
    assert {name: (tmp_path / name).read_text("utf-8") for name in files} == old
    said = capsys.readouterr().out.splitlines()[1:]
    assert [line.split("(")[1][0] for line in said] == list("303")


def executed(monkeypatch, folder, missing):
    """What the cell runs, in a folder, where ``support`` is missing or not."""
    calls = []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "run", lambda command, check: calls.append((command, check)))
    if missing:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    exec(launch.CELL.replace("REPO_URL", GITHUB), {})
    return calls


def test_the_cell_does_nothing_where_the_project_is(monkeypatch, tmp_path):
    assert executed(monkeypatch, tmp_path, missing=False) == []
    assert os.path.samefile(os.getcwd(), tmp_path)


@pytest.mark.parametrize("cloned", [False, True])
def test_the_cell_fetches_what_is_missing(monkeypatch, tmp_path, cloned):
    project = tmp_path / "fimlib-project"
    (project / "notebooks").mkdir(parents=True)
    if not cloned:  # as git would leave it
        monkeypatch.setattr(os.path, "isdir", lambda _path: False)
    clone = (["git", "clone", "--depth", "1", GITHUB, str(project)], True)
    pip = ([sys.executable, "-m", "pip", "install", "-q", f"{project}[notebooks,bench]"], True)
    assert executed(monkeypatch, tmp_path, missing=True) == ([] if cloned else [clone]) + [pip]
    assert os.path.samefile(os.getcwd(), project / "notebooks")
    assert sys.path[0] == os.getcwd()


def test_a_fork_made_before_or_after_shows_no_difference():
    plain = launch.with_cell((runs.NOTEBOOKS / "mnist.ipynb").read_text("utf-8"), "")
    found = []
    for text in (plain, launch.with_cell(plain, GITHUB)):
        notebook = nbformat.reads(text, as_version=4)
        found.append([c for c in notebook.cells if c.cell_type == "code"])
    assert len(found[1]) == len(found[0]) + 1
    assert comparison.compared(found[0]) == comparison.compared(found[1])


CONFIG = """
extensions = ["myst_nb", "sphinx_book_theme", "launch_buttons"]
nb_execution_mode = "off"
html_theme = "sphinx_book_theme"
root_doc = "index"
html_theme_options = OPTIONS
"""
PAGES = {
    "_generated/notebooks/sigmoid-seed-3": "mnist",
    "_generated/not-counted/bounds": "bounds",
    "_generated/notebooks/no-such-run": None,
    "_generated/forks/sigmoid-seed-3": None,
    "bounds": None,
}
SOURCE = "lab/tree/notebooks/{}.ipynb"
COLAB = "https://colab.research.google.com/github/example/fimlib/blob/main/notebooks/{}.ipynb"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("", []),
        (GITHUB, ["https://mybinder.org/v2/gh/example/fimlib/main?urlpath=" + SOURCE, COLAB]),
        (
            "https://gitlab.com/example/fimlib",
            ["https://mybinder.org/v2/gl/example%2Ffimlib/main?urlpath=" + SOURCE],
        ),
        (
            ELSEWHERE,
            [
                "https://mybinder.org/v2/git/https%3A%2F%2Fgit.example.org%2Fgroup%2Ffimlib/main"
                "?urlpath=" + SOURCE
            ],
        ),
    ],
)
def test_pages_of_runs_have_buttons_that_open_their_sources(tmp_path, url, expected):
    settings = yaml.safe_load((results.ROOT / launch.SETTING).read_text("utf-8"))
    settings["repository"]["url"] = url + ".git" if url else ""
    del settings["sphinx"]["local_extensions"]
    options = get_final_config(user_yaml=settings, cli_config={"latex_individualpages": False})[0][
        "html_theme_options"
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title")])
    for page in PAGES:
        path = tmp_path / f"{page}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
    contents = "\n".join(PAGES)
    (tmp_path / "index.md").write_text(f"# Index\n\n```{{toctree}}\n{contents}\n```\n")
    (tmp_path / "conf.py").write_text(CONFIG.replace("OPTIONS", repr(options)))
    built = build_by_sphinx(tmp_path, tmp_path / "html")
    assert built.status == 0, built.said
    for page, source in PAGES.items():
        html = unescape((tmp_path / "html" / f"{page}.html").read_text("utf-8"))
        found = re.findall(r'href="(https://(?:mybinder|colab)[^"]*)"', html)
        assert found == ([form.format(source) for form in expected] if source else [])
        assert ("launch-buttons" in html) is bool(found)
        icons = re.findall(r'src="([^"]*/logo_(?:binder|colab)[^"]*)"', html)
        assert len(icons) == len(found)
        for icon in icons:  # nothing is loaded from elsewhere
            assert (tmp_path / "html" / page).parent.joinpath(icon).is_file()


def test_binder_installs_this_project():
    config = results.ROOT / ".binder"
    lines = (config / "requirements.txt").read_text("utf-8").splitlines()
    assert "-r ../requirements.txt" in lines
    assert "-e ." in lines  # relative to the project: where Binder calls pip
    assert (config / "runtime.txt").read_text().strip() in ("python-3.11", "python-3.12")
