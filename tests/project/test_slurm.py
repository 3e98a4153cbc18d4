"""Runs through a real scheduler, `make … RUN="srun …"`; skipped where no Slurm can run."""

import os
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pytest
import slurm
import yaml
from project import copy as project_copy
from project import environment, make
from support import results

DIGITS = ("SMOKE=1", "DATASET=digits")
SRUN = "RUN=srun -n1 --gres=gpu:1"
# A notebook that needs no time.
QUICK = """\
import os, pathlib
pathlib.Path(out, "job.txt").write_text(os.environ.get("SLURM_JOB_ID", ""))
"""


@pytest.fixture(scope="module")
def cluster():
    started = slurm.slurm()
    try:
        yield started.__enter__()
    except slurm.SlurmError as error:
        pytest.skip(f"no Slurm can run here: {error}")
    started.__exit__(None, None, None)


@pytest.fixture
def project(tmp_path):
    """A copy of the project with two quick runs."""
    copy = project_copy(tmp_path)
    cells = [nbformat.v4.new_markdown_cell("# Quick")]
    cells += [nbformat.v4.new_code_cell('seed = 0\nout = ""', metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(QUICK)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), copy / "notebooks/quick.ipynb")
    give(copy, {name: {"title": "Quick", "notebook": "quick.ipynb"} for name in ("one", "two")})
    return copy


def give(project, runs):
    """Let the project have these runs only."""
    path = project / "notebooks/runs.yml"
    plan = yaml.safe_load(path.read_text(encoding="utf-8")) | {"runs": runs}
    path.write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")


def tables(folder):
    return {path.parent.name: path.read_bytes() for path in folder.glob("[a-z]*/values.csv")}


def test_every_run_is_a_job_with_its_name(cluster, project):
    done = make(project, "experiments", "JOBS=4", *DIGITS, SRUN, **cluster.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "=== 2 of 2 runs done ===" in done.stdout
    ended = [job for job in cluster.ended() if job.name in ("one", "two")]
    assert sorted((job.name, job.state) for job in ended) == [
        ("one", "COMPLETED"), ("two", "COMPLETED"),
    ]  # fmt: skip
    made = (project / "results/smoke/digits" / job.name / "job.txt" for job in ended)
    assert [path.read_text() for path in made] == [job.number for job in ended]


def test_a_scheduler_that_is_none_is_named(project):
    done = make(project, "experiments", *DIGITS, "RUN=srn --gres=gpu:1")
    assert done.returncode != 0
    assert "error: RUN starts with srn, which is no command here" in done.stderr
    assert "starts" not in done.stdout
    assert make(project, "--dry-run", "experiments", RUN="nobody's wish").stderr == ""


@pytest.mark.full
def test_a_request_that_no_node_can_meet_ends_with_the_schedulers_words(cluster, project):
    done = make(project, "experiments", *DIGITS, "RUN=srun --gres=gpu:3", **cluster.environment)
    assert done.returncode != 0
    assert "Requested node configuration is not available" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_slurm_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(slurm.os, "geteuid", lambda: 0)
    monkeypatch.setattr(slurm, "PROGRAMS", ("sh", "slurmctld-of-nowhere"))
    with pytest.raises(slurm.SlurmError, match="no slurmctld-of-nowhere here: apt-get install"):
        slurm.slurm().__enter__()
    monkeypatch.setattr(slurm.os, "geteuid", lambda: 1000)
    with pytest.raises(slurm.SlurmError, match="needs root"):
        slurm.slurm().__enter__()


@pytest.mark.full
def test_results_are_those_of_a_run_without_a_scheduler(cluster, project):
    """Also where a job is cancelled in the middle and the command is given again."""
    plan = yaml.safe_load((results.ROOT / "notebooks/runs.yml").read_text(encoding="utf-8"))
    longer = plan["runs"]["sigmoid"] | {"parameters": {"activation": "Tanh"}}
    give(project, {"sigmoid": plan["runs"]["sigmoid"], "longer": longer})
    plain = make(project, "experiments", *DIGITS)
    assert plain.returncode == 0, plain.stdout + plain.stderr
    folder = project / "results/smoke/digits"
    wanted = tables(folder)
    assert len(wanted) == 2
    shutil.rmtree(folder)

    asked = ["make", f"PY={sys.executable}", "experiments", "JOBS=4", *DIGITS, SRUN]
    process = subprocess.Popen(
        asked, cwd=project, env=environment(**cluster.environment), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    name = "sigmoid-seed-0"
    try:
        deadline = time.monotonic() + 300
        while not any((folder / ".partial" / name).rglob("checkpoint.pt")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        cluster.run("scancel", cluster.running()[name])
        _, errors = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert name in errors
    again = make(project, "experiments", "JOBS=4", *DIGITS, SRUN, **cluster.environment)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "continues after epoch" in again.stdout
    assert tables(folder) == wanted
    states = [job.state for job in cluster.ended() if job.name == name]
    assert states == ["CANCELLED", "COMPLETED"]
