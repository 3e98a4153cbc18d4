"""The commands of the README, in a copy of the project, at smoke size and without a network."""

import os
import re
import subprocess
from pathlib import Path

import nbformat
import pytest
import yaml
from by_cell import SMOKE
from project import NOT_COPIED, copy, make
from support import book, data, figures, results, runs

OFFLINE = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")


# Runs that only `make test-full` makes: other tests execute their notebooks cell by cell.
BY_CELL = (*SMOKE, "log-sigmoid", "population", "empirical", "sweep", "decay", "decay-even")
BY_CELL += ("tightness", "regression", "saturation", "cost", "projections", "population-more")
BY_CELL += ("optimisers",)


@pytest.fixture(
    scope="module", params=["some runs", pytest.param("all runs", marks=pytest.mark.full)]
)
def project(request, tmp_path_factory):
    """A copy of the project in a folder with a space, for this environment's Python."""
    made = copy(tmp_path_factory.mktemp("copy"))
    if request.param == "some runs":
        path = made / "notebooks" / "runs.yml"
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
        plan["runs"] = {name: run for name, run in plan["runs"].items() if name not in BY_CELL}
        path.write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")
        leave_out_tests_without_a_link(made)
    return made


def leave_out_tests_without_a_link(project):
    """Every file of tests is a page; `make book` and `make test-full` build them all."""
    book = "".join(path.read_text(encoding="utf-8") for path in (project / "book").glob("*.*"))
    for path in (project / "tests").rglob("test_*.py"):
        if path.name not in book:
            path.unlink()


def specs(project):
    return runs.specs(project / "notebooks" / "runs.yml", smoke=True)


@pytest.fixture(scope="module")
def smoke(project):
    """`make smoke` with MNIST where it lies here, else the stand-in, the network cut."""
    try:
        folder = data.find_mnist()
    except data.DataError:
        folder = None
    extra = [f"MNIST_DIR={folder}"] if folder else []
    return make(project, "smoke", *extra, **OFFLINE), "mnist" if folder else "digits"


def test_what_is_left_out_is_executed_elsewhere():
    plan = runs.read_plan(runs.NOTEBOOKS / "runs.yml")["runs"]
    texts = [path.read_text(encoding="utf-8") for path in (results.ROOT / "tests").rglob("*.py")]
    for name in set(BY_CELL) - set(SMOKE):
        call = re.compile(rf'execute\(\s*"{plan[name]["notebook"]}"')
        assert any(call.search(text) for text in texts), name


def html(project, page):
    return (project / "results/smoke/_build/html" / page).read_text(encoding="utf-8")


def test_the_whole_path(project, smoke):
    done, chosen = smoke
    assert done.returncode == 0, done.stdout + done.stderr
    planned = set(specs(project))
    assert f"=== {len(planned)} of {len(planned)} runs done ===" in done.stdout
    assert re.search(r"=== \d+ of \d+ runs done, \d under way, about .* left ===", done.stdout)
    assert "epoch  1/1  loss" in done.stdout
    assert "No claim is judged by this" in done.stdout
    assert "the book's first page: results/smoke/_build/html/index.html" in done.stdout
    assert re.search(
        r"^\d+ mathematical claims: \d+ not judged; \d+ empirical claims: \d+ not judged; "
        r"\d+ more are not decidable\.$",
        done.stdout,
        re.MULTILINE,
    )
    assert set(results.load(project / "results/smoke" / chosen)) == planned


def test_the_book_shows_the_reference_and_says_what_does_not_count(project, smoke):
    warning = {"mnist": "SMOKE SIZE", "digits": "NOT MNIST"}[smoke[1]]
    for page in ("index.html", "section-5-3.html"):
        text = html(project, page)
        assert "the reference run, committed with this book" in text
        assert warning in text
    for folder, there in (("not-counted", True), ("notebooks", False)):
        page = html(project, f"_generated/{folder}/sigmoid-seed-0.html")
        [article] = re.findall(r"<article.*?</article>", page, re.DOTALL)
        assert (warning in re.search(r"<h1>(.*?)<", article)[1]) == there
        assert (warning in article) == there


def test_the_book_needs_no_network(project, smoke):  # noqa: ARG001
    """Nothing is loaded from elsewhere: scripts, styles, images and fonts lie beside the pages."""
    root = project / "results/smoke/_build/html"
    for path in root.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|iframe|source)[^>]*?\bsrc=\"([^\"]+)\"", path.read_text()
        )
        loaded += re.findall(r"<link[^>]*?\bhref=\"([^\"]+)\"", path.read_text())
        assert loaded
        for target in loaded:
            assert not re.match(r"(https?:)?//", target), (path.name, target)
    index = html(project, "index.html")
    assert "tex-svg-full.js" in index
    assert (root / "_static/tex-svg-full.js").stat().st_size > 1e6


def test_paper_numbers_in_the_book(project, smoke):  # noqa: ARG001
    """Equations and statements carry the paper's numbers, on other pages too."""
    appendix = html(project, "appendix-a.html")
    assert "Lemma A.1" in appendix
    section = html(project, "section-5-3.html")
    assert "Theorem 4.1" in section
    assert re.search(r'href="appendix-a.html#[^"]*eq-24"[^>]*>\s*\(?24\)?', section)


def test_numbers_of_the_pages_come_from_the_notebook(project, smoke):  # noqa: ARG001
    """A number that is quoted on a page is the one in the executed notebook, rounded."""
    notebook = (results.ROOT / "data/reference/checks/notebook.ipynb").read_text()
    value = float(re.search(r"s1_min_eigenvalue_i2 = (\S+?)\\n", notebook)[1])
    assert f"{value:.2f}".lstrip("-") in html(project, "section-1.html")


def run_with(folder, *cells):
    """A run whose notebook has a cell for each (tag, outputs as dictionaries of MIME types)."""
    notebook = nbformat.v4.new_notebook()
    for tag, *outputs in cells:
        shown = [nbformat.v4.new_output("display_data", data) for data in outputs]
        cell = nbformat.v4.new_code_cell("draw()", outputs=shown, metadata={"tags": ["x", tag]})
        notebook.cells += [nbformat.v4.new_markdown_cell("See below."), cell]
    folder.mkdir(parents=True)
    nbformat.write(notebook, folder / "notebook.ipynb")
    return results.Run(folder.name, folder, {})


def test_pictures_come_from_tagged_cells(tmp_path, monkeypatch):
    monkeypatch.setattr(book, "GENERATED", tmp_path)
    one, two = ({"image/svg+xml": f"<svg>{n}</svg>\n<!-- -->"} for n in (1, 2))
    text = {"text/plain": "3"}
    book.save_pictures(run_with(tmp_path / "a", ("picture:two", text, two), ("other", one)))
    book.save_pictures(run_with(tmp_path / "b", ("picture:o_n-e1", one | text)))
    saved = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert saved == {"two.svg": two["image/svg+xml"], "o_n-e1.svg": one["image/svg+xml"]}


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([("picture:a", {"image/png": ""})], "run r, tag picture:a: the cell has 0 SVG outputs"),
        ([("picture:a",)], "has 0 SVG outputs; let it show one"),
        ([("picture:a", {figures.SVG: "1"}, {figures.SVG: "2"})], "has 2 SVG outputs"),
        ([("picture:a", {figures.SVG: "1"})] * 2, "run r, tag picture:a: another picture has this"),
        ([("picture:../a", {figures.SVG: "1"})], "run r, tag picture:../a: use lower-case letters"),
        ([("picture:", {figures.SVG: "1"})], "use lower-case letters, digits"),
    ],
)
def test_a_picture_that_cannot_be_shown_is_named(tmp_path, monkeypatch, cells, message):
    monkeypatch.setattr(book, "GENERATED", tmp_path)
    with pytest.raises(book.BookError, match=re.escape(message)):
        book.save_pictures(run_with(tmp_path / "r", *cells))


def test_pictures_of_runs_that_count_are_prepared(tmp_path, monkeypatch):
    """The book's own figures keep their names, and what does not count draws nothing."""
    monkeypatch.setattr(book, "GENERATED", tmp_path / "generated")
    monkeypatch.setattr(
        book.explorers, "write_explorers", lambda *_: {}
    )  # which has tests of its own
    for name in ("fill_gaps", "draw_values", "draw_errors", "write_fragments"):
        monkeypatch.setattr(book, name, lambda *_: {})  # nothing that this test looks at
    for name in ("figure_1", "variance_ratios"):  # of which the names of the files count here
        monkeypatch.setattr(figures, name, lambda *_: None)
    monkeypatch.setattr(figures, "save", lambda _figure, path: path.write_text("<svg/>"))
    reference = results.load(results.ROOT / "data/reference", ["sigmoid-seed-0", "sigmoid-seed-1"])
    record = reference["sigmoid-seed-0"].record | {"counts": False, "experiment": "extra"}
    extra = {}
    for name, tag in (("new", "picture:new"), ("clash", "picture:seeds")):
        folder = run_with(tmp_path / name, (tag, {figures.SVG: "<svg/>"})).folder
        extra[name] = results.Run(name, folder, record)
    book.prepare(reference, {"new": extra["new"]})
    assert not (tmp_path / "generated/new.svg").exists()
    book.prepare(reference | {"new": extra["new"]}, {})
    assert (tmp_path / "generated/new.svg").read_text() == "<svg/>"
    # Another experiment with the same notebook has the same pictures, and the first one's stay.
    folder = run_with(tmp_path / "again", ("picture:new", {figures.SVG: "<svg>2</svg>"})).folder
    again = results.Run("again", folder, record | {"experiment": "more"})
    book.prepare(reference | {"new": extra["new"], "again": again}, {})
    assert (tmp_path / "generated/new.svg").read_text() == "<svg/>"
    with pytest.raises(book.BookError, match="picture:seeds: another picture has this name"):
        book.prepare(reference | {"clash": extra["clash"]}, {})


def test_a_second_call_keeps_what_is_finished(project, smoke):
    before = results.load(project / "results/smoke" / smoke[1])
    extra = [] if smoke[1] == "digits" else [f"MNIST_DIR={data.find_mnist()}"]
    done = make(project, "experiments", "SMOKE=1", *extra, **OFFLINE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("kept, finished") == len(specs(project))
    after = results.load(project / "results/smoke" / smoke[1])
    assert {n: r.record for n, r in before.items()} == {n: r.record for n, r in after.items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "DATASET=mnist"], "MNIST"),
        (["data", "MNIST_DIR=no/such/folder"], "no/such/folder"),
        (["data", "DATASET=cifar"], "cifar"),
        (["run", "NAME=nothing"], "no run named 'nothing'. Forks: none yet"),
        (["experiments", "RUN=srn -n1"], "RUN starts with srn, which is no command here"),
        (["experiments", "JOBS=many"], "invalid int value: 'many'"),
        (["report", "RESULTS=nowhere"], "no finished runs"),
    ],
)
def test_targets_fail_with_a_message_and_no_traceback(project, arguments, message):
    done = make(project, *arguments, **OFFLINE)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("target", ["reproduce", "smoke", "experiments", "run", "book", "data"])
def test_a_dry_run_shows_the_commands_and_touches_nothing(project, target):
    def files():
        return {p: p.stat().st_mtime_ns for p in project.rglob("*") if "__pycache__" not in str(p)}

    before = files()
    done = make(project, "--dry-run", target, "DATASET=digits", "NAME=mynet")
    assert done.returncode == 0, done.stderr
    assert "-m support." in done.stdout
    assert files() == before


def test_make_works_in_its_own_folder_only(project, tmp_path):
    done = make(tmp_path, "-f", str(project / "Makefile"), "help")
    assert done.returncode != 0
    assert "run make in the project's own folder" in done.stderr


def test_a_colon_in_the_path_is_refused(project, tmp_path):
    folder = tmp_path / "a:b"
    (folder / "notebooks/support").mkdir(parents=True)
    (folder / "notebooks/support/runs.py").touch()
    (folder / "Makefile").write_text((project / "Makefile").read_text())
    done = make(folder, "help")
    assert done.returncode != 0
    assert "a folder with a colon in its path" in done.stderr


def test_a_folder_that_cannot_be_written_is_not_blamed_on_venv(project):
    """`test -w` is true for root everywhere, but on a disk that is read-only."""
    recipe = make(project, "--dry-run", "env", python=()).stdout
    guard = next(line for line in recipe.splitlines() if line.startswith("test -w ."))
    assert recipe.index(guard) < recipe.index("-m venv")
    script = guard.replace("test -w .", "test -w no-such-folder")
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: this folder is read-only" in done.stderr


def test_help_names_every_target(project):
    text = make(project, "help").stdout
    phony = re.search(r"^\.PHONY: (.*)$", (project / "Makefile").read_text(), re.MULTILINE)[1]
    assert all(f"  {target} " in text for target in phony.split())


def test_gpu_check_says_what_it_did(project):
    done = make(project, "gpu-check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"no CUDA device|: ok", done.stdout)


def test_old_python_is_refused(project):
    fake = project / "old-python"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    done = make(project, "env", python=(f"PYTHON={fake}",))
    assert done.returncode != 0
    assert "is not Python 3.11 to 3.13" in done.stderr


def test_only_the_command_line_chooses_the_python(project):
    """A variable PY of the environment is nobody's wish."""
    done = make(project, "--dry-run", "lint", python=(), PY="/none/such")
    assert f'"{project}/.venv/bin/python" -m ruff' in done.stdout
    assert "-m venv .venv" in done.stdout
    assert "/none/such" not in done.stdout + done.stderr
    assert '"/some/python" -m ruff' in make(
        project, "--dry-run", "lint", python=("PY=/some/python",)
    ).stdout  # fmt: skip


def test_the_mnist_folder_is_made_absolute(project, tmp_path):
    (project / "results" / "with space").mkdir(parents=True)
    (tmp_path / "show.mk").write_text('show: ; @echo "$$MNIST_DIR"\n')
    show = ("-f", "Makefile", "-f", str(tmp_path / "show.mk"), "show")
    for given, there in (
        ("results/with space", project / "results/with space"),
        (tmp_path, tmp_path),
        ("no/such folder", "no/such folder"),
    ):
        assert make(project, *show, f"MNIST_DIR={given}").stdout == f"{there}\n"


def test_conda_environment_is_the_same():
    environment = yaml.safe_load((results.ROOT / "environment.yml").read_text())
    python, *_, pip = environment["dependencies"]
    assert python == "python=3.11"
    assert pip == {"pip": ["-r requirements.txt", "-e ."]}


def test_everything_is_pinned():
    lines = (results.ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", pin) for pin in pins)
    names = {pin.split("==")[0].lower() for pin in pins}
    assert names >= {"jupyter-book", "torch", "backpack-for-pytorch", "pytorch-minimize"}
    assert names >= {"matplotlib", "papermill", "ruff", "mypy", "pytest"}


def project_files():
    for folder, subfolders, names in os.walk(results.ROOT):
        left_out = NOT_COPIED(folder, subfolders + names)
        subfolders[:] = [name for name in subfolders if name not in left_out]
        yield from (Path(folder, name) for name in names if name not in left_out)


def test_no_path_of_a_machine_in_the_project():
    """Also not in the files that git does not know yet, and without git."""
    homes = [f"/{name}/" for name in ("home", "root", "Users")]
    private = [*homes, f"{str(results.ROOT.parent).rstrip('/') or results.ROOT}/"]
    searched = set()
    for path in project_files():
        text = path.read_bytes().decode(errors="ignore")
        assert not re.search(rf"(?<![\w.-])({'|'.join(map(re.escape, private))})", text), path
        if path.is_relative_to(results.ROOT / "data/reference"):
            assert "site-packages" not in text, path
        searched.add(str(path.relative_to(results.ROOT)))
    assert searched >= {"Makefile", "notebooks/support/runs.py", "tests/project/test_reproduce.py"}
    assert any(name.startswith("data/reference/") for name in searched)
