"""What contributors are told: commands and files exist, versions agree, forms are forms."""

import re

import pytest
import yaml
from support import results

ROOT = results.ROOT
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TEMPLATES = ROOT / ".github" / "ISSUE_TEMPLATE"
FORMS = sorted(TEMPLATES.glob("*.yml"))


def test_commands_and_files_are_there():
    commands = re.findall(r"(?:`|^)make ([a-z-]+)", TEXT, re.MULTILINE)
    assert {"lint", "test", "test-fast", "reproduce"} <= set(commands)
    for target in commands:
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT) + re.findall(r"tests/[\w/]+\.py", TEXT):
        assert (ROOT / target).exists(), target
    readme = (ROOT / "README.md").read_text("utf-8")
    assert "(CONTRIBUTING.md)" in readme


def test_the_style_has_ten_lines():
    style = TEXT.partition("## Style\n")[2].partition("\n## ")[0]
    assert re.findall(r"^(\d+)\. ", style, re.MULTILINE) == [str(k) for k in range(1, 11)]


def test_pre_commit_has_the_versions_of_the_lock():
    settings = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    lock = (ROOT / "requirements.txt").read_text("utf-8")
    pins = dict(re.findall(r"^(ruff|mypy)==(\S+)$", lock, re.MULTILINE))
    hooks = {hook["id"]: repo["rev"] for repo in settings["repos"] for hook in repo["hooks"]}
    assert hooks == {
        "ruff-check": f"v{pins['ruff']}",
        "ruff-format": f"v{pins['ruff']}",
        "mypy": f"v{pins['mypy']}",
    }


@pytest.mark.parametrize("path", FORMS, ids=lambda p: p.stem)
def test_a_form_is_short_and_asks_for_something(path):
    form = yaml.safe_load(path.read_text("utf-8"))
    assert set(form) == {"name", "description", "labels", "body"}
    assert 3 <= len(form["body"]) <= 5
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    assert any(field.get("validations", {}).get("required") for field in form["body"])
    for field in form["body"]:
        assert field["type"] in ("input", "textarea", "checkboxes")
        assert field["attributes"]["label"]


def test_there_is_a_form_for_every_kind_of_report():
    assert [path.stem for path in FORMS] == ["bug", "network", "reproduction"]
    words = (ROOT / ".github" / "pull_request_template.md").read_text("utf-8")
    for target in re.findall(r"`make ([a-z-]+)`", words):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target


# The fast tests.

OUTSIDE = re.compile(
    r"^\s*(?:from|import) "
    r"(?:support|subprocess|nbclient|architecture|books|by_cell|torch\.multiprocessing)\b",
    re.MULTILINE,
)


def test_tests_of_the_library_start_no_process_or_are_long():
    for path in ROOT.glob("tests/fimlib/test_*.py"):
        text = path.read_text("utf-8")
        assert not OUTSIDE.search(text) or "\npytestmark = pytest.mark.long\n" in text, path.name
