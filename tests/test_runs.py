"""The runner: finished runs are kept, half-made ones never count, mistakes are named."""

import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from support import results, runs

TINY = """\
import json, pathlib, time
for i in range(pauses):
    print("step", i, flush=True)
    time.sleep(0.2)
pathlib.Path(out, "value.txt").write_text(str(2 * number))
"""


def notebook(folder, code=TINY, tags=("parameters",), name="tiny.ipynb"):
    cells = [nbformat.v4.new_markdown_cell("# Tiny")]
    cells.append(nbformat.v4.new_code_cell('number = 1\npauses = 0\nout = ""\nname = ""'))
    cells[-1].metadata.tags = list(tags)
    cells.append(nbformat.v4.new_code_cell(code))
    path = folder / name
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def spec(path, **parameters):
    return runs.Spec("tiny", "A tiny run", path, parameters)


def test_a_finished_run_is_kept_until_something_changes(tmp_path, capsys):
    folder, path = tmp_path / "results", notebook(tmp_path)
    assert runs.execute(spec(path, number=21), folder, "digits")
    assert (folder / "tiny" / "value.txt").read_text() == "42"
    record = json.loads((folder / "tiny" / "record.json").read_text())
    assert record["title"] == "A tiny run"
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


def test_a_failing_cell_leaves_no_result_and_no_traceback(tmp_path):
    folder, path = tmp_path / "results", notebook(tmp_path, "raise ValueError('no such luck')")
    with pytest.raises(runs.RunError, match=r"tiny.ipynb failed with ValueError: no such luck"):
        runs.execute(spec(path), folder, "digits")
    assert results.load(folder) == {}
    runs.execute(spec(notebook(tmp_path)), folder, "digits")  # mended: made as if nothing had been
    assert set(results.load(folder)) == {"tiny"}


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
            r"no parameter numbr; there are: name, number, out, pauses",
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


def test_command_line(tmp_path, capsys, monkeypatch):
    todo = tmp_path / "todo"
    assert runs.main(["--todo", str(todo), "--results", str(tmp_path), "--dataset", "digits"]) == 0
    assert todo.read_text().split() == ["checks", *[f"sigmoid-seed-{seed}" for seed in range(5)]]
    assert "notebooks done: 0 of 6" in capsys.readouterr().out
    assert runs.main(["sigmoid-seed-9", "--results", str(tmp_path)]) == 1
    assert "no runs named sigmoid-seed-9; there are: checks" in capsys.readouterr().err

    def full(*_args):
        raise OSError(28, "No space left on device", "values.csv")

    monkeypatch.setattr(runs, "execute", full)
    assert runs.main(["checks", "--results", str(tmp_path)]) == 1
    assert "No space left on device (values.csv). Free some space" in capsys.readouterr().err


def test_read_only_folder_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert runs.main(["checks", "--results", str(tmp_path / "file")]) == 1
    assert "error: " in (text := capsys.readouterr().err)
    assert "Traceback" not in text


def test_write_text_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "values.csv"
    results.write_text(path, "old")

    def full(self, text, encoding):  # noqa: ARG001
        with self.open("w") as handle:
            handle.write(text[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        results.write_text(path, "new and longer")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["values.csv"]


def test_digest_tells_parts_apart():
    assert results.digest([b"ab", b"c"]) != results.digest([b"a", b"bc"])


def test_commit_is_unknown_without_git(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert results.commit() == "unknown"


def test_a_record_is_dated_in_utc():
    import torch

    made = results.record({"train_limit": 5}, {"is_mnist": True}, time.time(), torch.device("cpu"))
    assert made["started"].endswith("Z")
    assert made["counts"] is False  # cut short
    assert made["versions"]["torch"] == torch.__version__
