"""The runner: finished runs are kept, half-made ones never count, mistakes are named."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from support import forks, results, runs

TINY = """\
import json, pathlib, time
for i in range(pauses):
    print("step", i, flush=True)
    time.sleep(0.2)
pathlib.Path(out, "value.txt").write_text(str(2 * number))
"""

FILES = {"notebook.ipynb", "record.json", "value.txt"}

WRITES = """\
import time, torch
from support import results
if out:
    record = results.record({}, {}, time.time(), torch.device("cpu"))
    results.save(out, results.Table(name).frame(), record)
    results.write_text(f"{out}/figure.svg", "<svg/>")
"""


def notebook(folder, code=TINY, tags=("parameters",), name="tiny.ipynb"):
    cells = [nbformat.v4.new_markdown_cell("# Tiny")]
    cells.append(nbformat.v4.new_code_cell('number = 1\npauses = 0\nout = name = dataset = ""'))
    cells[-1].metadata.tags = list(tags)
    cells.append(nbformat.v4.new_code_cell(code))
    path = folder / name
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def spec(path, **parameters):
    return runs.Spec("tiny", "A tiny run", path, parameters, "tiny", tuple(parameters))


def test_a_finished_run_is_kept_until_something_changes(tmp_path, capsys):
    folder, path = tmp_path / "results", notebook(tmp_path)
    assert runs.execute(spec(path, number=21), folder, "digits")
    assert (folder / "tiny" / "value.txt").read_text() == "42"
    record = json.loads((folder / "tiny" / "record.json").read_text())
    assert record["title"] == "A tiny run"
    assert (record["run"], record["varied"], record["attempts"]) == ("tiny", ["number"], 1)
    assert record["machine"]["threads"] == 1
    assert record["wall_seconds"] > record["calibration"] > 0
    assert record["memory_mb"] > 50
    assert {p.name for p in folder.rglob("*")} == FILES | {".partial", ".tiny.lock", "tiny"}
    executed = (folder / "tiny" / "notebook.ipynb").read_text()
    assert str(tmp_path) not in executed.replace(os.path.relpath(folder, runs.NOTEBOOKS), "")
    assert not runs.execute(spec(path, number=21), folder, "digits")
    assert "kept" in capsys.readouterr().out
    assert runs.execute(spec(path, number=4), folder, "digits")  # other parameters
    assert (folder / "tiny" / "value.txt").read_text() == "8"
    notebook(tmp_path, TINY + "# changed\n")  # other code
    assert runs.execute(spec(path, number=4), folder, "digits")
    assert "to be made again" in capsys.readouterr().out
    assert set(results.load(folder)) == {"tiny"}


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("made")
    assert runs.execute(spec(notebook(folder, WRITES)), folder / "results", "digits")
    return folder


@pytest.fixture
def made(made_once, tmp_path):
    """A copy of it, and how to ask for it again."""
    shutil.copytree(made_once, tmp_path, dirs_exist_ok=True)
    folder, wanted = tmp_path / "results", spec(tmp_path / "tiny.ipynb")
    assert runs.is_finished(wanted, folder, "digits")
    return folder, lambda: runs.execute(wanted, folder, "digits")


def test_other_data_make_the_run_again(made, monkeypatch):
    _, again = made
    monkeypatch.setattr(runs, "data_digest", lambda _name: "of other images")
    assert [again(), again()] == [True, False]


USES = """\
%precision 3
import helper
def later():
    from package import inner
"""


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """A notebook that calls modules beside it, and its fingerprint."""
    (tmp_path / "helper.py").write_text("x = 1\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").write_text("")
    (tmp_path / "package/inner.py").write_text("from .most import y\n")
    (tmp_path / "package/most.py").write_text('"""Most."""\ny = 1\n')
    monkeypatch.setattr(runs, "NOTEBOOKS", tmp_path)
    path = notebook(tmp_path, USES)
    return path, lambda: runs.fingerprint(spec(path), "mnist", "digest")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("helper.py", "x = 2\n"),
        ("package/__init__.py", "import helper\n"),
        ("package/most.py", '"""Most."""\ny = 2\n'),
    ],
)
def test_a_change_in_what_a_notebook_imports_is_noticed(fork, tmp_path, file, text):
    before = fork[1]()
    (tmp_path / file).write_text(text)
    assert fork[1]() != before


def test_a_new_library_is_noticed(fork, monkeypatch):
    before, real = fork[1](), results.version
    for library in ("torch", "numpy"):
        monkeypatch.setattr(
            results, "version", lambda name, library=library: "9" if name == library else real(name)
        )
        assert fork[1]() != before
    monkeypatch.setattr(results, "version", real)
    assert fork[1]() == before


def test_of_a_notebook_code_and_tags_count_and_nothing_else(fork, tmp_path):
    path, fingerprint = fork
    before = fingerprint()
    read = nbformat.read(path, as_version=4)
    read.cells[0].source = "# Another title"
    read.cells.append(nbformat.v4.new_markdown_cell("A word."))
    read.metadata["language_info"] = {"name": "python", "version": "3.13.1"}
    read.cells[2].update(execution_count=3, outputs=[nbformat.v4.new_output("stream", text="a")])
    read.cells[2].metadata["collapsed"] = True
    nbformat.write(read, path)
    assert fingerprint() == before
    (tmp_path / "package/most.py").write_text('"""Other words."""\ny = 1\n')
    assert fingerprint() == before
    read.cells[2].metadata["tags"] = ["picture:a"]
    nbformat.write(read, path)
    tagged = fingerprint()
    read.cells[2].source += "# more"
    nbformat.write(read, path)
    assert len({before, tagged, fingerprint()}) == 3


def test_a_notebook_depends_on_the_files_that_it_imports(tmp_path):
    path = notebook(tmp_path, "import fimlib\nfrom support import validity\n")
    names = {p.relative_to(runs.results.ROOT).as_posix() for p in runs.sources(path)}
    support = {n for n in names if n.startswith("notebooks/")}
    expected = ("__init__", "layers", "validity")  # layers by way of validity
    assert support == {f"notebooks/support/{name}.py" for name in expected}
    assert {"fimlib/fisher.py", "fimlib/__init__.py", "fimlib/engines/choose.py"} <= names
    assert "fimlib/__main__.py" not in names


@pytest.mark.parametrize("path", sorted(runs.NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.name)
def test_every_module_of_fimlib_that_a_notebook_loads_is_among_its_files(path):
    """Also what is imported inside of functions."""
    names = {p.relative_to(runs.results.ROOT).as_posix() for p in runs.sources(path)}
    every = {f.relative_to(runs.results.ROOT).as_posix() for f in runs.FIMLIB.rglob("*.py")}
    assert every - names <= {"fimlib/__main__.py"}


SPOILED = """\
import matplotlib, os, pathlib
assert "spoiled" not in globals(), "IPython's start-up files ran"
assert matplotlib.rcParams["font.size"] == 10.0
from support import figures
assert matplotlib.rcParams["lines.linewidth"] == 1.5
"""


@pytest.mark.full
def test_settings_of_the_user_change_nothing(tmp_path, monkeypatch):
    startup = tmp_path / "ipython/profile_default/startup/a.py"
    startup.parent.mkdir(parents=True)
    startup.write_text("spoiled = 1\n")
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nlines.linewidth: 9\n")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONSTARTUP", str(startup))
    monkeypatch.setenv("MATPLOTLIBRC", str(tmp_path / "matplotlibrc"))
    assert runs.execute(spec(notebook(tmp_path, SPOILED)), tmp_path / "results", "digits")
    assert os.environ["IPYTHONDIR"] == str(tmp_path / "ipython")  # for what comes after
    assert os.environ["PYTHONSTARTUP"] == str(startup)


def test_a_kernel_that_does_not_start_is_started_again(tmp_path, monkeypatch):
    asked = []

    def execute_notebook(*_, **__):
        asked.append(0)
        if len(asked) < tries:
            raise RuntimeError(f"{runs.NO_KERNEL} to kernel_info")

    monkeypatch.setattr(runs.papermill, "execute_notebook", execute_notebook)
    spec = runs.specs()["checks"]
    tries = 3
    runs.run_notebook(spec, tmp_path / "notebook.ipynb", {})
    assert len(asked) == 3
    asked.clear()
    tries = 4
    with pytest.raises(runs.RunError, match=r"checks\.ipynb could not be run: Kernel died"):
        runs.run_notebook(spec, tmp_path / "notebook.ipynb", {})
    assert len(asked) == 3


@pytest.mark.full
def test_figures_drawn_here_ignore_a_matplotlibrc(tmp_path):
    (tmp_path / "matplotlibrc").write_text("font.size: 30\n")
    code = "from support import figures; print(figures.mpl.rcParams['font.size'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "10.0\n"


def test_docstrings_are_no_code_and_all_else_is(tmp_path):
    path = tmp_path / "module.py"

    def digest(text):
        path.write_text(text)
        return runs.code(path)

    plain = 'def f(x):\n    return x + 1\n\n\nclass A:\n    s = """a\n    b"""\n'
    documented = (
        '"""M.\n\nMore.\n"""\ndef f(x):\n    """F.\n\n    >>> f(1)\n    """\n    return x + 1\n'
    )
    documented += 'class A:\n    """A."""\n    s = """a\n    b"""\n'
    assert digest(plain) == digest(documented)
    for old, new in (("+ 1", "- 1"), ("    b", "   b"), ("return", "x = 2\n    return")):
        assert digest(plain) != digest(plain.replace(old, new))


def test_a_damaged_run_is_none_and_made_again(made, capsys):
    folder, again = made
    for file in ("record.json", "values.csv", "notebook.ipynb", "figure.svg"):
        path = folder / "tiny" / file
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert results.load(folder) == {}, file
        path.unlink()
        assert results.load(folder) == {}, file
        if file != "figure.svg":
            path.write_bytes(whole)
            assert set(results.load(folder)) == {"tiny"}
    assert [again(), again()] == [True, False]
    assert "missing or damaged" in capsys.readouterr().out
    assert set(results.load(folder)) == {"tiny"}


def test_a_record_that_was_edited_is_damaged(made, monkeypatch):
    folder, again = made
    path = folder / "tiny" / "record.json"
    whole = path.read_text()
    for change in ({"counts": False}, {"seconds": 1.0}, {"more": 1}, {"digest": ""}):
        path.write_text(json.dumps(json.loads(whole) | change))
        assert results.load(folder) == {}, change
        with monkeypatch.context() as patch:
            patch.setattr(runs, "run_notebook", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):  # it is to be made again
                again()
    assert [again(), again()] == [True, False]


def test_a_record_that_vouches_for_no_files_is_none(tmp_path):
    for name, more in (("with", {"files": {}}), ("without", {})):
        results.save(tmp_path / name, None, {"title": "A run"} | more)
    assert set(results.load(tmp_path)) == {"with"}


def test_a_failing_cell_leaves_no_result_and_no_traceback(tmp_path):
    folder, path = tmp_path / "results", notebook(tmp_path, "raise ValueError('no such luck')")
    with pytest.raises(runs.RunError, match=r"tiny.ipynb failed with ValueError: no such luck"):
        runs.execute(spec(path), folder, "digits")
    assert results.load(folder) == {}
    runs.execute(spec(notebook(tmp_path)), folder, "digits")  # mended: made as if nothing had been
    assert set(results.load(folder)) == {"tiny"}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("open('nothing.csv')", "failed with FileNotFoundError: [Errno 2] No such file"),
        (
            "raise PermissionError(13, 'Permission denied', 'secret')",
            "with PermissionError: [Errno",
        ),
    ],
)
def test_an_error_of_the_cells_own_is_not_blamed_on_the_disk(tmp_path, code, message):
    with pytest.raises(runs.RunError, match=re.escape(message)) as caught:
        runs.execute(spec(notebook(tmp_path, code)), tmp_path / "results", "digits")
    assert "Free some space" not in str(caught.value)
    assert "Make the folder writable" not in str(caught.value)


def test_a_record_of_the_notebooks_own_may_lack_what_the_runner_knows(tmp_path):
    code = "import json, pathlib\npathlib.Path(out, 'record.json').write_text('{\"mine\": 1}')"
    runs.execute(spec(notebook(tmp_path, code)), tmp_path, "digits")
    record = results.load(tmp_path)["tiny"].record
    assert record["mine"] == 1
    assert {"parameters", "data", "counts", "versions", "machine", "seconds"} <= record.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "tiny.ipynb cannot be read as a notebook"),
        ("[]", "tiny.ipynb cannot be read as a notebook"),
        ('{"nbformat": 3, "nbformat_minor": 0, "worksheets": [], "metadata": {}}', "format 4"),
    ],
)
def test_what_is_not_a_notebook_is_named(tmp_path, text, message):
    (tmp_path / "tiny.ipynb").write_text(text)
    with pytest.raises(runs.RunError, match=message):
        runs.execute(spec(tmp_path / "tiny.ipynb"), tmp_path / "results", "digits")


def test_attempts_are_counted_and_their_seconds_kept(tmp_path, monkeypatch):
    """Up to the last checkpoint: what was made after it is lost, and made again."""
    now = [1000.0]
    monkeypatch.setattr(runs.time, "time", lambda: now[0])
    folder = tmp_path / "tiny"
    partial, attempts = runs.begin(folder, "digest")
    assert (attempts.number, attempts.started, attempts.earlier) == (1, 1000, 0)
    now[0] = 1100
    assert runs.begin(folder, "digest")[1].earlier == 0  # no checkpoint
    (partial / "checkpoint.pt").write_bytes(b"")
    os.utime(partial / "checkpoint.pt", (1130, 1130))
    now[0] = 2000
    again, attempts = runs.begin(folder, "digest")
    assert again == partial
    assert (attempts.number, attempts.started, attempts.earlier) == (3, 1000, 30)
    now[0] = 3000  # killed before another checkpoint was made
    assert runs.begin(folder, "digest")[1].earlier == 30
    (partial / runs.ATTEMPTS).write_text("{")
    assert runs.begin(folder, "digest")[1].number == 1


def test_what_was_begun_with_other_code_or_elsewhere_is_removed(tmp_path, monkeypatch):
    partial, _ = runs.begin(tmp_path / "tiny", "digest")
    (partial / "checkpoint.pt").write_bytes(b"")
    other, attempts = runs.begin(tmp_path / "tiny", "of other code")
    assert attempts.number == 1
    assert [*(tmp_path / "tiny").iterdir()] == [other]
    monkeypatch.setattr(results, "processor", lambda: "another")
    elsewhere, _ = runs.begin(tmp_path / "tiny", "of other code")
    assert [*(tmp_path / "tiny").iterdir()] == [elsewhere] != [other]
    monkeypatch.setattr(runs.torch.cuda, "is_available", lambda: True)
    folders = set()
    for gpu in ("a GPU", "another GPU"):
        monkeypatch.setattr(runs.torch.cuda, "get_device_name", lambda gpu=gpu: gpu)
        folders.add(runs.begin(tmp_path / "tiny", "of other code")[0])
    assert len({elsewhere, *folders}) == 3


def test_a_killed_run_is_no_result(tmp_path):
    """SIGKILL in the middle: nothing counts, the lock is free, the next call makes the run."""
    folder, path = tmp_path / "results", notebook(tmp_path)
    code = (
        "from pathlib import Path; from support import runs\n"
        f"spec = runs.Spec('tiny', 't', Path({str(path)!r}), {{'pauses': 100}})\n"
        f"runs.execute(spec, Path({str(folder)!r}), 'digits')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=runs.NOTEBOOKS, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert any("step 1" in line for line in process.stdout)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert results.load(folder) == {}
    assert runs.execute(spec(path), folder, "digits")
    assert set(results.load(folder)) == {"tiny"}


def test_two_processes_make_a_run_once(tmp_path):
    folder, path = tmp_path / "results", notebook(tmp_path)
    code = (
        "from pathlib import Path; from support import runs\n"
        f"spec = runs.Spec('tiny', 't', Path({str(path)!r}), {{'pauses': 5}})\n"
        f"print('made', runs.execute(spec, Path({str(folder)!r}), 'digits'))"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=runs.NOTEBOOKS, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    made = sorted(p.communicate()[0].split("made ")[-1].strip() for p in both)
    assert made == ["False", "True"]


@pytest.mark.parametrize(
    ("tags", "parameters", "message"),
    [
        (
            ("parameters",),
            {"numbr": 3},
            r"no parameter numbr; there are: dataset, name, number, out, pauses",
        ),
        ((), {"number": 3}, r"no cell tagged 'parameters'"),
    ],
)
def test_parameters_that_papermill_would_let_pass(tmp_path, tags, parameters, message):
    path = notebook(tmp_path, tags=tags)
    with pytest.raises(runs.RunError, match=message):
        runs.execute(spec(path, **parameters), tmp_path / "results", "digits")


def test_missing_notebook_names_those_there(tmp_path):
    notebook(tmp_path)
    with pytest.raises(runs.RunError, match=r"no notebook other.ipynb; there are: tiny.ipynb"):
        runs.execute(spec(tmp_path / "other.ipynb"), tmp_path / "results", "digits")


SMOKE = "\nsmoke: {each: {seed: [0]}, parameters: {tiny.ipynb: {number: 2}}}"
EACH = r"run a: `each:` must be lists of values by parameter, such as \{seed: \[0, 1\]\}, not "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runs: {a: [}", r"runs.yml is not valid YAML: [^$]* line 1"),
        ("", r"runs.yml: it needs `runs:` and `smoke:`"),
        ("runs:" + SMOKE, r"runs.yml: `runs:` must be the runs by name, not None"),
        ("runs: {a: }" + SMOKE, r"run a: it needs `title:` and `notebook:`"),
        ("runs: {a: {title: A}}" + SMOKE, r"run a: it needs `title:` and `notebook:`"),
        ("runs: {a: {notebook: tiny.ipynb}}" + SMOKE, r"run a: it needs `title:`"),
        ("runs: {a: {HEAD, each: 3}}" + SMOKE, EACH + "3"),
        ("runs: {a: {HEAD, each: {}}}" + SMOKE, EACH),
        ("runs: {a: {HEAD, each: {seed: 3}}}" + SMOKE, EACH + "{'seed': 3}"),
        ("runs: {a: {HEAD, each: {seed: []}}}" + SMOKE, EACH),
        ("runs: {a: {HEAD, each: {seed: [[1]]}}}" + SMOKE, EACH),
        ("runs: {a: {HEAD, each: {x: [A, a]}}}" + SMOKE, r"the run a-x-a: two runs have this"),
        ("runs: {a: {HEAD, each: {x: [../b]}}}" + SMOKE, r"the run a-x-../b: it is no name"),
        ("runs: {a: {HEAD, each: {name: [b]}}}" + SMOKE, r"run a: .* name is chosen by the r"),
        ("runs: {a: {HEAD, parameters: }}" + SMOKE, r"run a: `parameters:` .* or left out"),
        ("runs: {a: {HEAD, parametres: {}}}" + SMOKE, r"run a: unknown parametres; there are: ti"),
        ("runs: {a: {HEAD, parameters: {out: x}}}" + SMOKE, r"run a: .* out is chosen by the run"),
        ("runs: {a: {HEAD, parameters: {name: x}}}" + SMOKE, r"run a: .* name is chosen by the r"),
        ("runs: {a: {HEAD, parameters: {dataset: x}}}" + SMOKE, r"run a: .* by .*DATASET="),
        ("runs: {a: {HEAD, each: {seed: [1]}, parameters: {seed: 2}}}" + SMOKE, r"run a: seed is"),
        ("runs: {1: {HEAD}}" + SMOKE, r"run 1: a name is a letter"),
        ("runs: {a/b: {HEAD}}" + SMOKE, r"run a/b: a name is a letter"),
        ("runs: {a: {HEAD}}\nlarge: {a: {HEAD}}" + SMOKE, r"a is in `runs:` and in `large:`"),
        ("runs: {a: {HEAD}}\nlarge: {b: {title: B}}" + SMOKE, r"run b: it needs `title:` and"),
        ("runs: {a: {HEAD}}\nsmoke: {seeds: [0]}", r"smoke: it needs `each:` and `parameters:`"),
        ("runs: {a: {HEAD}}\nsmoke: {each: {b: [0]}, parameters: {tiny.ipynb: 3}}", r"ipynb: `p"),
    ],
)  # fmt: skip
def test_mistakes_in_the_plan_are_named(tmp_path, text, message):
    plan = tmp_path / "runs.yml"
    plan.write_text(text.replace("HEAD", "title: A, notebook: tiny.ipynb"))
    with pytest.raises(runs.RunError, match=message):
        runs.specs(plan)


def test_runs_for_a_gpu_stand_apart_and_fit_their_notebooks():
    """`make reproduce` leaves them out; `make run NAME=…` makes them, at smoke size as well."""
    large = runs.specs(section="large")
    assert large
    assert not large.keys() & runs.specs().keys()
    assert large.keys() < forks.known().keys()
    for name, spec in large.items():
        defaults = runs.check_parameters(spec.notebook, spec.parameters)
        assert "device" in defaults, name
        assert spec.parameters.items() <= forks.known()[name].parameters.items()
        forks.check_name(name)


PLAN = """
runs:
  a:
    title: With {activation}, seed {seed}
    notebook: tiny.ipynb
    parameters: {number: 3}
    each: {seed: [0, 1], activation: [Sigmoid, LogSigmoid]}
  b: {title: B, notebook: tiny.ipynb, each: {rate: [0.001], seed: [7, 8]}}
  c: {title: C, notebook: other.ipynb}
smoke: {each: {seed: [1], activation: [Sigmoid]}, parameters: {tiny.ipynb: {number: 2}}}
"""


def test_each_makes_all_combinations(tmp_path):
    plan = tmp_path / "runs.yml"
    plan.write_text(PLAN)
    specs = runs.specs(plan)
    assert list(specs) == [
        "a-seed-0-activation-sigmoid", "a-seed-0-activation-logsigmoid",
        "a-seed-1-activation-sigmoid", "a-seed-1-activation-logsigmoid",
        "b-rate-0.001-seed-7", "b-rate-0.001-seed-8", "c",
    ]  # fmt: skip
    one = specs["a-seed-1-activation-logsigmoid"]
    assert one.parameters == {"number": 3, "seed": 1, "activation": "LogSigmoid"}
    assert (one.title, one.experiment) == ("With LogSigmoid, seed 1", "a")
    assert (one.varied, specs["c"].varied) == (("seed", "activation"), ())
    small = runs.specs(plan, smoke=True)
    assert list(small) == ["a-seed-1-activation-sigmoid", "b-rate-0.001-seed-7", "c"]
    assert small["a-seed-1-activation-sigmoid"].parameters["number"] == 2


def test_mistakes_in_the_plan_are_no_traceback(tmp_path, capsys, monkeypatch):
    """Whichever run it is in, before the first run starts."""
    path, none = notebook(tmp_path), []
    plan = {"a": spec(path), "b": spec(path, numbr=3)}
    monkeypatch.setattr(runs, "specs", lambda smoke: plan)  # noqa: ARG005
    monkeypatch.setattr(runs, "execute", lambda *run: none.append(run))
    assert runs.main(["a", "b", "--results", str(tmp_path / "results")]) == 1
    assert "error: tiny.ipynb has no parameter numbr" in capsys.readouterr().err
    assert none == []

    def broken(smoke):  # noqa: ARG001
        raise runs.RunError("runs.yml, run a: …")

    monkeypatch.setattr(runs, "specs", broken)
    assert runs.main(["a"]) == 1
    assert capsys.readouterr().err == "error: runs.yml, run a: …\n"


def test_command_line(tmp_path, capsys, monkeypatch):
    assert runs.main(["sigmoid-seed-9", "--results", str(tmp_path)]) == 1
    assert "no runs named sigmoid-seed-9; there are: sigmoid-seed-0" in capsys.readouterr().err

    def full(*_args):
        raise OSError(28, "No space left on device", "values.csv")

    monkeypatch.setattr(runs, "execute", full)
    assert runs.main(["checks", "--results", str(tmp_path)]) == 1
    text = capsys.readouterr().err
    assert "error: the disk is full: No space left on device (values.csv)\nFree some sp" in text


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 100 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "none", folder]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


FILLS = """\
from support import results
for i in range(100):
    results.write(f"{out}/file-{i}", bytes(10_000))
"""


def tried(path, folder, *limits, status=1, **environment):
    """What `python -m support.runs` says of the run, in a process of its own."""
    code = (
        "import resource, sys; from pathlib import Path; from support import runs\n"
        f"runs.specs = lambda smoke: {{'tiny': runs.Spec('tiny', 't', Path({str(path)!r}))}}\n"
        f"[resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)) for n in {limits}]\n"
        f"sys.exit(runs.main(['tiny', '--dataset', 'digits', '--results', {str(folder)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=runs.NOTEBOOKS, capture_output=True, text=True,
        check=False, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr if status else done.stdout


@pytest.mark.full
def test_a_terminal_that_knows_ascii_only_ends_no_run(tmp_path):
    path = notebook(tmp_path, "print('λ is', 3)")
    assert "[tiny] ? is 3" in tried(path, tmp_path, status=0, PYTHONIOENCODING="ascii")


@pytest.mark.full
def test_a_full_disk_ends_with_a_message(tmp_path, small_disk):
    text = tried(notebook(tmp_path, FILLS), small_disk)
    assert re.search(
        r"error: .*the disk is full: .*No space left.*\nFree some space, and run", text
    )
    assert results.load(small_disk) == {}


@pytest.mark.full  # the same error as of a full disk, which is tried above
def test_a_file_that_may_not_grow_ends_with_a_message(tmp_path):
    """A quota, where no small disk can be mounted."""
    text = tried(notebook(tmp_path, FILLS), tmp_path / "results", 9000)
    assert "error: tiny: the disk is full: File too large" in text


def test_read_only_folder_is_named(small_disk, capsys):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert runs.main(["checks", "--results", str(small_disk / "results")]) == 1
    text = capsys.readouterr().err
    assert re.search(
        r"error: no permission to write: Read-only .*disk.*\nMake the folder wri", text
    )


def test_a_file_in_place_of_the_folder_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert runs.main(["checks", "--results", str(tmp_path / "file")]) == 1
    assert "error: the system reports: " in capsys.readouterr().err


def test_write_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "values.csv"
    results.write_text(path, "old")

    def full(_file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        results.write_text(str(path), "new and longer")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["values.csv"]


def test_digest_tells_parts_apart():
    assert results.digest([b"ab", b"c"]) != results.digest([b"a", b"bc"])


def test_the_commit_is_the_projects_own(monkeypatch, tmp_path):
    """Unpacked inside another repository, or started from a hook of one, it has none."""

    def repository(folder):
        folder.mkdir(exist_ok=True)
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        for command in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "a"]):
            subprocess.run(["git", *command], cwd=folder, check=True)

    repository(tmp_path)
    monkeypatch.setattr(results, "ROOT", tmp_path / "project")
    (tmp_path / "project").mkdir()
    assert results.commit() == "unknown"
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert results.commit() == "unknown"
    monkeypatch.delenv("GIT_DIR")
    repository(tmp_path / "project")
    assert re.fullmatch("[0-9a-f]{12}", results.commit())


def test_a_record_is_dated_in_utc():
    import torch

    made = results.record({"train_limit": 5}, {"is_mnist": True}, time.time(), torch.device("cpu"))
    assert made["started"].endswith("Z")
    assert made["counts"] is False  # cut short
    assert made["versions"]["torch"] == torch.__version__
    assert 50 < made["memory_mb"] < 20_000


def test_memory_is_told_without_proc(monkeypatch):
    there = results.peak_memory()
    monkeypatch.setattr(results, "Path", lambda _name: (_ for _ in ()).throw(OSError()))
    assert results.peak_memory() == pytest.approx(there, rel=0.5)
