"""Runs that are killed at random, given again, and end with the very same table of values."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
import yaml
from project import copy, environment, make
from support import results, runs

TRAINS = """\
import time
import torch
from support import checkpoint, results
torch.manual_seed(0)
net, table = torch.nn.Linear(5, 5), results.Table(name)
step, inputs = torch.optim.Adam(net.parameters()), torch.Generator().manual_seed(1)
progress = checkpoint.Progress(out, net=net, step=step, table=table, inputs=inputs)
for epoch in range(progress.next, 41):
    x = torch.randn(8, 5, generator=inputs)
    step.zero_grad()
    (net(x) - torch.nn.functional.dropout(x)).square().mean().backward()
    step.step()
    table.add(epoch, "norm", net.weight.norm().item())
    time.sleep(0.05)
    progress.save(epoch, f"epoch {epoch}")
results.save(out, table.frame(), results.record({}, {}, time.time(), torch.device("cpu")))
"""


VICTIMS = ("all", "all", "make", "support.reproduce", "support.runs", "support.runs", "ipykernel")


def notebook(folder):
    """A small notebook that trains."""
    cell = nbformat.v4.new_code_cell
    cells = [cell('name = out = ""', metadata={"tags": ["parameters"]}), cell(TRAINS)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "trains.ipynb")
    return folder / "trains.ipynb"


def tables(folder):
    return {path.parent.name: path.read_bytes() for path in folder.glob("[a-z]*/values.csv")}


def kill(*processes):
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def kill_all(process):
    """What is left of its group; by then all of it may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def below(process, program=""):
    """The processes that it started, and that these started, of a program."""
    found = []
    try:
        for one in psutil.Process(process.pid).children(recursive=True):
            if program in " ".join(one.cmdline()):
                found.append(one)
    except psutil.Error:
        pass  # one has just ended
    return found


def await_checkpoints(process, folder, number, seconds):
    """Wait until checkpoints were written so many times, or so long, or until the process ends."""
    deadline, seen = time.monotonic() + seconds, set()
    while process.poll() is None and len(seen) < number and time.monotonic() < deadline:
        for path in folder.glob(".partial/*/*/checkpoint.pt"):
            try:
                seen.add((path, path.stat().st_mtime_ns))
            except FileNotFoundError:
                continue
        time.sleep(0.01)


@pytest.mark.full
def test_a_killed_runner_and_the_kernel_that_it_leaves_change_nothing(tmp_path):
    """The kernel still writes when the next runner begins; a moment later it is gone."""
    path, folder = notebook(tmp_path), tmp_path / "results"
    code = (
        "from pathlib import Path; from support import runs\n"
        f"spec = runs.Spec('trains', 't', Path({str(path)!r}))\n"
        f"runs.execute(spec, Path({str(folder)!r}), 'digits')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=runs.NOTEBOOKS)
    await_checkpoints(process, folder, random.Random().randint(1, 15), seconds=300)
    [orphan] = below(process, "ipykernel")
    kill(process)
    process.wait()
    spec = runs.Spec("trains", "t", path)
    assert runs.execute(spec, folder, "digits")
    psutil.wait_procs([orphan], timeout=5)
    assert not orphan.is_running()
    run = results.load(folder)["trains"]
    assert run.record["attempts"] == 2
    assert "continues after epoch" in (run.folder / "notebook.ipynb").read_text()
    assert runs.execute(spec, tmp_path / "uninterrupted", "digits")
    assert tables(folder) == tables(tmp_path / "uninterrupted")


@pytest.mark.full
@pytest.mark.parametrize("seed", range(2))
def test_whatever_is_killed_whenever_the_tables_are_those_of_an_uninterrupted_run(tmp_path, seed):
    """Two runs at a time; make, the scheduler, a runner, a kernel, or all of them are killed."""
    project, dice = copy(tmp_path), random.Random(seed)
    path = project / "notebooks/runs.yml"
    plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    few = {"title": "Run {seed}", "parameters": {"epochs": 12, "train_limit": 400}}
    plan["runs"] = {"run": few | {"notebook": "mnist.ipynb", "each": {"seed": [0, 1]}}}
    path.write_text(yaml.safe_dump(plan), encoding="utf-8")
    command = ["experiments", "JOBS=2", "DATASET=digits"]
    folder, aside = project / "results/digits", tmp_path / "uninterrupted"
    assert make(project, *command).returncode == 0
    shutil.move(folder, aside)

    for victim in dice.sample(VICTIMS, len(VICTIMS)):
        process = subprocess.Popen(
            ["make", f"PY={sys.executable}", *command], cwd=project, env=environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        await_checkpoints(process, folder, dice.randint(1, 8), seconds=300)
        time.sleep(dice.uniform(0, 1))
        started = below(process)
        match victim:
            case "make":  # its runs go on beside those of the next call, which waits for them
                kill(process)
            case "support.reproduce" | "support.runs" | "ipykernel":
                kill(*below(process, victim)[:1])
                time.sleep(dice.uniform(0, 2))
                kill_all(process)
            case "all":
                kill_all(process)
                kill(*started)
        process.wait()
    done = make(project, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert tables(folder) == tables(aside)
    assert len(tables(folder)) == 2
    assert any(run.record["attempts"] > 1 for run in results.load(folder).values())
    assert not list(folder.glob(".partial/*/*"))
