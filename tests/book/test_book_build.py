"""What is built anew: everything if anything changed, else the pages of forks alone."""

import json
import subprocess

import nbformat
import pytest
from support import book, cells, forks, passports, report, results, runs


@pytest.fixture
def built(tmp_path, monkeypatch):
    """Build a book without rendering it; which steps were taken."""
    steps, pages = [], tmp_path / "book"
    (pages / "_generated").mkdir(parents=True)
    (pages / "index.md").write_text("# A book")
    monkeypatch.setattr(book, "BOOK", pages)
    monkeypatch.setattr(book, "GENERATED", pages / "_generated")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    for name, folder in (("FIMLIB", "fimlib"), ("NOTEBOOKS", "notebooks")):
        (tmp_path / folder).mkdir()
        monkeypatch.setattr(runs, name, tmp_path / folder)
    monkeypatch.setattr(forks, "read", lambda: {"mynet": {"notebook": "mynet.ipynb"}})
    run = results.Run("a", tmp_path, {"digest": "1", "counts": True})
    monkeypatch.setattr(book, "sources", lambda *_, **__: ({"a": run}, {}))
    monkeypatch.setattr(book, "forked", lambda _folder: {})
    monkeypatch.setattr(book, "paper", lambda group: group)
    for name in ("prepare", "prepare_forks"):
        monkeypatch.setattr(book, name, lambda *_, name=name: steps.append(name))

    def render(command, **_):
        steps.append("--all" in command)
        failed = (pages / "broken").exists()
        text = "\x1b[91ma.md:1: WARNING: what a page\x1b[39;49;00m\n"
        return subprocess.CompletedProcess(command, int(failed), text, "")

    monkeypatch.setattr(book.subprocess, "run", render)
    monkeypatch.setattr(results, "commit", lambda: "unknown")

    def build(output="out"):
        steps.clear()
        (tmp_path / output / "_build").mkdir(parents=True, exist_ok=True)
        book.make(tmp_path / "results", tmp_path / output)
        return list(steps)

    return build, tmp_path, run


WHOLE, FORKS_ALONE = ["prepare", True], ["prepare_forks", False]


def test_a_second_build_does_the_forks_alone(built):
    build, folder, _ = built
    assert [build(), build()] == [WHOLE, FORKS_ALONE]
    (folder / "notebooks/mynet.ipynb").write_text("of a fork")
    (folder / "notebooks/forks.yml").write_text("of forks")
    (folder / "book/_generated/forks").mkdir()
    assert build() == FORKS_ALONE


@pytest.mark.parametrize(
    "file", ["book/index.md", "fimlib/a/b.py", "notebooks/mnist.ipynb", "notebooks/support/a.py",
             "data/claims.csv", "data/reference/a/values.csv"],
)  # fmt: skip
def test_whatever_else_changes_all_is_built_anew(built, file):
    build, folder, _ = built
    build()
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text("changed")
    assert [build(), build()] == [WHOLE, FORKS_ALONE]


def test_another_run_or_place_or_version_builds_all_anew(built, monkeypatch):
    build, _, run = built
    build()
    run.record["digest"] = "2"
    assert [build(), build()] == [WHOLE, FORKS_ALONE]
    assert [build("elsewhere"), build("elsewhere")] == [WHOLE, FORKS_ALONE]
    monkeypatch.setattr(results, "version", lambda _name: "9")
    assert [build(), build()] == [WHOLE, FORKS_ALONE]
    monkeypatch.setattr(results, "commit", lambda: "0123")
    assert build() == WHOLE


def test_what_failed_is_built_anew_and_its_errors_are_plain_text(built):
    build, folder, _ = built
    build()
    (folder / "book/broken").touch()
    for _ in range(2):
        with pytest.raises(book.BookError) as error:
            build()
        assert str(error.value).endswith("found:\na.md:1: WARNING: what a page")
    (folder / "book/broken").unlink()
    assert build() == WHOLE


def test_forks_alone_leave_the_rest_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(book, "GENERATED", tmp_path)
    found = results.load(report.REFERENCE, ["checks", "joint"])
    first, other = found["checks"], found["joint"]
    monkeypatch.setattr(book.comparison, "compare", lambda *_: "compared")
    passed = {"notebooks/checks.ipynb": ["of checks"], "forks/gone.ipynb": ["of a fork"]}
    (tmp_path / passports.FILE).write_text(json.dumps(passed))
    (tmp_path / "forks").mkdir()
    (tmp_path / "forks/gone.ipynb").touch()
    book.prepare_forks({"checks": first}, {}, {"joint": (other, first)})
    passed = json.loads((tmp_path / passports.FILE).read_text())
    assert set(passed) == {"notebooks/checks.ipynb", "forks/joint.ipynb"}
    assert passed["notebooks/checks.ipynb"] == ["of checks"]
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.ipynb")}
    assert files == {"forks/joint.ipynb", "fork/forks/joint.ipynb"}
    page = nbformat.read(tmp_path / "forks/joint.ipynb", as_version=4)
    assert "compared" in page.cells[0].source


def notebook(*made):
    new = {"t": nbformat.v4.new_markdown_cell, "c": nbformat.v4.new_code_cell}
    found = [new[kind](text) for kind, text in made]
    for cell in found:
        if cell.source == "injected":
            cell.metadata["tags"] = ["injected-parameters"]
        if cell.source == "launch":
            cell.metadata["tags"] = ["launch"]
    return nbformat.v4.new_notebook(cells=found)


def test_a_page_has_the_text_that_its_notebook_has_now():
    executed = notebook(("t", "old"), ("c", "a"), ("c", "injected"), ("c", "b"))
    executed.cells[1].outputs = ["kept"]
    source = notebook(
        ("t", "new"), ("c", "launch"), ("c", "a"), ("t", "more"), ("c", "b"), ("t", "z")
    )
    cells.with_text(executed, source)
    assert [c.source for c in executed.cells] == ["new", "a", "injected", "more", "b", "z"]
    assert executed.cells[1].outputs == ["kept"]
    other = notebook(("t", "new"), ("c", "changed"))
    cells.with_text(executed, other)
    assert executed.cells[0].source == "new"
    assert len(executed.cells) == 6
