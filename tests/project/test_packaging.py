"""What is installed and published: one version, light dependencies, pins for every extra."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from support import launch, results

import fimlib

ROOT = results.ROOT
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
LINES = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
PINS = {
    canonicalize_name(name): Version(version)
    for name, _, version in (line.partition("==") for line in LINES if line[:1].isalpha())
}
NEEDED = {"torch", "numpy", "scipy", "tqdm"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source distribution and the wheel made of it, by setuptools alone, from a copy."""
    folder = tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md",
                 "CITATION.cff"):  # fmt: skip
        (folder / name).write_bytes((ROOT / name).read_bytes())
    for package in ("fimlib", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    code = "from setuptools import build_meta as b; print(b.build_sdist('.'), b.build_wheel('.'))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    sdist, wheel = done.stdout.split()[-2:]
    return folder / sdist, folder / wheel


def test_the_wheel_holds_the_library_alone(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
        [metadata] = [n for n in names if n.endswith("METADATA")]
        head = wheel.read(metadata).decode().partition("\n\n")[0]
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "fimlib").rglob("*")
        if path.suffix in (".py", ".typed")
    }
    assert {name for name in names if ".dist-info/" not in name} == files
    assert "fimlib/py.typed" in files
    assert f"Version: {fimlib.__version__}\n" in head
    assert "License-Expression: MIT\n" in head
    assert "License-File: LICENSE" in head
    needed = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", head, re.MULTILINE)
    assert set(needed) == NEEDED


def test_the_source_distribution_holds_what_belongs_to_it(built):
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"}
    assert wanted | {"fimlib/__init__.py", "fimlib/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests", "notebooks", "data", "book"))]


def test_the_library_imports_what_it_asks_for_and_no_more():
    """All else is imported where it is used: `import fimlib` works without any extra."""
    code = """
import sys
class Refuses:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in sys.argv[1:]:
            raise ImportError(name)
sys.meta_path.insert(0, Refuses())
import doctest, fimlib
print(doctest.testmod(fimlib))
"""
    names = [Requirement(text).name for texts in EXTRAS.values() for text in texts]
    others = {"backpack", "torchmin", "sklearn", "yaml", "IPython"} | set(names) - {"fimlib"}
    command = [sys.executable, "-c", code, *others]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.search(r"failed=0, attempted=[1-9]", done.stdout)


def test_one_version():
    [assigned] = re.findall(
        r'^__version__ = "(.+)"$', (ROOT / "fimlib/_version.py").read_text("utf-8"), re.MULTILINE
    )
    assert assigned == fimlib.__version__ == str(CITATION["version"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", assigned)
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.findall(r"^## \[(\d.*?)\]", changes, re.MULTILINE)[0] == assigned


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_what_is_asked_for_is_pinned(extra):
    """The lock has a version of all that the package and its extras ask for, and one that fits."""
    for text in EXTRAS[extra] if extra else PROJECT["dependencies"]:
        wanted = Requirement(text)
        if wanted.name == PROJECT["name"]:
            assert wanted.extras <= set(EXTRAS)
        else:
            assert PINS[canonicalize_name(wanted.name)] in wanted.specifier, text


def test_dependencies_are_light():
    assert {Requirement(text).name for text in PROJECT["dependencies"]} == NEEDED


def imported(folder):
    """The top-level modules that the files of a folder import."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("fimlib", {"backpack", "files", "minimize", "sos", "plot"}),
        ("notebooks", {"notebooks", "bench", "book"}),
    ],
)
def test_the_extras_name_all_imports(folder, extras):
    modules = {"backpack-for-pytorch": "backpack", "pytorch-minimize": "torchmin"}
    modules |= {"curvlinops-for-pytorch": "curvlinops", "scikit-learn": "sklearn"}
    modules |= {"PyYAML": "yaml", "myst-nb": "myst_nb", "beautifulsoup4": "bs4"}
    modules |= {"ipython": "IPython"}
    asked = [Requirement(text).name for text in PROJECT["dependencies"]]
    for extra in extras | (
        {"backpack", "files", "minimize", "sos", "plot"} if "notebooks" in extras else set()
    ):
        asked += [Requirement(text).name for text in EXTRAS[extra]]
    assert imported(ROOT / folder) <= {modules.get(n, n) for n in asked} | {"support", "fimlib"}


def test_addresses_are_those_of_the_setting():
    url = launch.repo_url()
    assert PROJECT["urls"].get("Repository", "") == url
    assert CITATION.get("repository-code", "") == url


def test_the_citation_has_what_the_format_needs():
    """Keys of the Citation File Format 1.2.0."""
    assert CITATION["cff-version"] == "1.2.0"
    assert {"title", "message", "authors"} <= CITATION.keys()
    known = {"cff-version", "title", "message", "type", "version", "license", "authors", "keywords",
             "repository-code", "preferred-citation"}  # fmt: skip
    assert CITATION.keys() <= known
    assert CITATION["license"] == PROJECT["license"]
    paper = CITATION["preferred-citation"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert all("family-names" in author or "name" in author for author in paper["authors"])


def test_conda_takes_the_lock():
    """The environment for conda is this project and its lock, on a Python that it supports."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    [python] = [d for d in environment["dependencies"] if str(d).startswith("python=")]
    assert (
        Version(python.partition("=")[2]) in Requirement(f"x{PROJECT['requires-python']}").specifier
    )
    [pip] = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert pip == ["-r requirements.txt", "-e ."]
    assert "pip" in environment["dependencies"]
    assert len(PINS) == len({line for line in LINES if line[:1].isalpha()})  # none twice
