"""The source notebooks, and the MNIST experiment at a tiny size on the bundled digits."""

import json
import random
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import fake_device
import nbformat
import numpy as np
import pandas as pd
import pytest
from by_cell import SMOKE, execute, run
from support import checks, figures, results, runs

SOURCES = sorted(runs.NOTEBOOKS.glob("*.ipynb"))
SIZE = {"epochs": 2, "train_limit": 300, "num_samples": 50, "hidden": [8, 6], "seed": 3}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_sources_store_no_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_every_run_fits_its_notebook():
    for smoke in (False, True):
        for spec in runs.specs(smoke=smoke).values():
            runs.check_parameters(spec.notebook, spec.parameters)
    assert set(runs.specs(smoke=True)) < set(runs.specs())


@pytest.mark.parametrize("name", SMOKE)
def test_the_cells_run_at_smoke_size(name, tmp_path, monkeypatch):
    spec = runs.specs(smoke=True)[name]
    ours = {"out": str(tmp_path), "dataset": "digits", "name": name}
    known = runs.check_parameters(spec.notebook, spec.parameters)
    for group in ("INEQUALITIES", "EQUALITIES", "SAMPLING", "FINDINGS", "BEYOND"):
        monkeypatch.setattr(checks, group, getattr(checks, group)[-2:])  # test_checks has them all
    run(spec.notebook.name, **spec.parameters, **{k: v for k, v in ours.items() if k in known})
    assert ("out" in known) == (tmp_path / "values.csv").exists()


ON_A_DEVICE = {
    "mnist": SIZE | {"epochs": 1},
    "sweep": {"hidden": [[6]], "epochs": 1, "measured": [0, 1], "num_inputs": 2},
    "choices": {"hidden": [[6]], "weights": ["Xavier"], "dropouts": [0.5], "epochs": 1}
    | {"measured": [0, 1], "num_inputs": 2, "optimizers": [["SGD", 0.1, 0.9]]},
    "population": {"epochs": 1, "measured": [0, 1], "drawn": [0, 1], "repeats": 3}
    | {"test_limit": 60, "hidden": [8, 6]},
    "empirical": {"epochs": 1, "measured": [0, 1], "subset": 40, "repeats": 3, "hidden": [8, 6]},
    "projections": {"network": "residual", "training_size": 100, "epochs": 1}
    | {"measured": [0, 1], "num_inputs": 2, "passes": [2], "repeats": 2, "summary_budget": 0.1},
    "optimisers": {"hidden": [6], "measured": [6], "batch_size": 8, "rates": [1.0], "seeds": [0]}
    | {"dampings": [0.01], "windows": [3], "roots": [[0.01], [1e-4]]},
    "recipes": {"hidden": [6], "training_size": 100, "steps": 5, "passes": [20, 40], "seeds": [0]}
    | {"strengths": [10.0], "floors": [0.1], "shares": [0.5]},
}
SLOW = ("population", "empirical", "projections", "recipes", "sweep", "choices")
TWO_STREAMS = ("recipes",)  # of random numbers: labels are drawn on the device, batches on the CPU


def test_every_notebook_with_a_device_is_run_on_one():
    taking = {p.stem for p in SOURCES if "device" in runs.check_parameters(p, {})}
    assert taking == set(ON_A_DEVICE)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.full] * (n in SLOW)) for n in ON_A_DEVICE]
)
def test_the_cells_run_on_another_device_and_find_the_same(name, tmp_path):
    """As on a GPU: nothing is made on the CPU and mixed in, and the values are those of the CPU."""
    size = {"train_limit": 300, "dataset": "digits", "name": name} | ON_A_DEVICE[name]
    with fake_device.installed() as device:
        for place in ("cpu", device.type):
            run(f"{name}.ipynb", out=str(tmp_path / place), device=place, **size)
    ours, expected = (pd.read_csv(tmp_path / p / "values.csv") for p in (device.type, "cpu"))
    assert len(ours) > 10
    assert ours.drop(columns="value").equals(expected.drop(columns="value"))
    assert np.isfinite(ours.value).all()
    assert name in TWO_STREAMS or np.allclose(ours.value, expected.value, rtol=1e-6, atol=1e-12)
    assert results.read_record(tmp_path / device.type)["machine"]["device"] == device.type


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A run; the same without a kernel, its cells executed here; and one with a single label."""
    folder = tmp_path_factory.mktemp("results")
    runs.execute(runs.Spec("a", "Tiny", runs.NOTEBOOKS / "mnist.ipynb", SIZE), folder, "digits")
    made = results.load(folder)
    for name, size in (("b", SIZE), ("single", SIZE | {"num_samples": 1})):
        out = tmp_path_factory.mktemp(name)
        _, record = execute("mnist.ipynb", out, **size, dataset="digits", name=name)
        made[name] = results.Run(name, out, record)
    return made


def wide(run):
    values = run.values
    return values[values.layer != results.NETWORK].pivot_table(
        index=["epoch", "layer"], columns="quantity", values="value"
    )


def test_the_same_seed_gives_the_same_bytes(tiny):
    a, b = (tiny[k].folder / "values.csv" for k in "ab")
    assert a.read_text().replace("\na,", "\nb,") == b.read_text()


START = """\
import json, sys
from pathlib import Path
from support import runs
spec = runs.Spec("a", "Tiny", runs.NOTEBOOKS / "mnist.ipynb", json.loads(sys.argv[1]))
runs.execute(spec, Path(sys.argv[2]), "digits")
"""


@contextmanager
def started(folder, size):
    """A runner in a process of its own; SIGKILL ends it, its kernel notices and ends as well."""
    process = subprocess.Popen(
        [sys.executable, "-c", START, json.dumps(size), str(folder)], cwd=runs.NOTEBOOKS,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.full  # test_checkpoint and test_interruptions kill runs, too
def test_a_killed_run_goes_on_and_has_the_same_values(tiny, tmp_path, capsys):
    with started(tmp_path, SIZE) as process:
        assert any("epoch  1/2" in line for line in process.stdout)
    assert results.load(tmp_path) == {}
    spec = runs.Spec("a", "Tiny", runs.NOTEBOOKS / "mnist.ipynb", SIZE)
    assert runs.execute(spec, tmp_path, "digits")
    assert "continues after epoch" in capsys.readouterr().out
    run, whole = results.load(tmp_path)["a"], tiny["a"]
    for file in ("values.csv", "figure.svg"):
        assert (run.folder / file).read_bytes() == (whole.folder / file).read_bytes()
    assert run.record["attempts"] == 2
    assert run.record["wall_seconds"] > run.record["seconds"] > 0
    executed = (run.folder / "notebook.ipynb").read_text()
    assert all(f"epoch  {epoch}/2" in executed for epoch in range(3))
    assert {p.name for p in run.folder.iterdir()} == {p.name for p in whole.folder.iterdir()}


@pytest.mark.full
def test_a_run_killed_at_random_points_has_the_same_values(tmp_path):
    """Whatever the runner is doing: starting, training, drawing, giving the folder its name."""
    size, begun = SIZE | {"epochs": 40}, time.monotonic()
    with started(tmp_path / "whole", size) as process:
        process.wait()
    whole = time.monotonic() - begun
    delays, kills = random.Random(0), 0
    while not results.load(tmp_path / "killed"):
        with started(tmp_path / "killed", size) as process, suppress(subprocess.TimeoutExpired):
            process.wait(delays.uniform(whole / 4, whole * 0.8) if kills < 12 else None)
        kills += 1
    assert kills >= 2
    one, other = (tmp_path / name / "a/values.csv" for name in ("whole", "killed"))
    assert one.read_bytes() == other.read_bytes()


def test_values_obey_the_theory(tiny):
    table = wide(tiny["a"])
    assert list(table.index.get_level_values("epoch").unique()) == [0, 1, 2]
    assert list(table.index.get_level_values("layer").unique()) == ["1", "2", "3"]
    for quantity in ("I", "V1", "V2"):
        assert (table[f"{quantity}_violations"] == 0).all()
        assert (table[f"{quantity}_lower"] <= table[quantity]).all()
        assert (table[quantity] <= table[f"{quantity}_upper"] * (1 + 1e-12)).all()
    assert (table.V1_upper <= table.V1_certified * (1 + 1e-12)).all()
    last = table.xs("3", level="layer")
    assert (last.V2 == 0).all()
    assert np.allclose(last.I2, last.I, rtol=1e-12)
    hidden = table.drop(index="3", level="layer")
    assert (hidden.V2 > 0).all()
    assert not np.allclose(hidden.I1, hidden.I, rtol=1e-6)  # an estimate, not the exact value


def test_estimates_scatter_as_the_variances_say(tiny):
    """Layer means of Î₁, Î₂ against I: at most as far as if all parameters moved together."""
    table = wide(tiny["a"])
    for estimate, variance in (("I1", "V1"), ("I2", "V2")):
        # sd of a mean ≤ mean of sds ≤ root of the mean variance
        assert ((table[estimate] - table.I).abs() <= 5 * np.sqrt(table[variance]) + 1e-15).all()


def test_one_label_has_no_sample_variance(tiny):
    table = wide(tiny["single"])
    assert "V1_sample" not in table
    assert np.allclose(table.V1, 50 * wide(tiny["a"]).V1, rtol=1e-12)


def test_a_run_on_digits_says_what_it_is(tiny):
    run = tiny["a"]
    assert run.record["data"]["is_mnist"] is False
    assert run.record["counts"] is False
    assert run.record["parameters"]["seed"] == 3
    assert len(run.record["data"]["digest"]) == 64
    assert "NOT MNIST" in figures.caption(run.record)
    figure = figures.figure_1(run.values, run.record)
    assert "NOT MNIST" in figure.get_suptitle()
    assert [ax.get_title() for ax in figure.axes[:3]] == ["layer 1", "layer 2", "layer 3 (output)"]
    assert "Fisher information I" in [text.get_text() for ax in figure.axes for text in ax.texts]


def test_a_figure_shows_the_table(tiny):
    run = tiny["a"]
    table = wide(run)
    figure = figures.figure_1(run.values, run.record)
    top, bottom = figure.axes[0], figure.axes[3]
    lines = {line.get_label(): line.get_ydata() for line in [*top.lines, *bottom.lines]}
    first = table.xs("1", level="layer")
    assert np.allclose(lines["Fisher information I"], first.I)
    assert np.allclose(lines[r"$\sqrt{V_2}$"], np.sqrt(first.V2))
    assert np.allclose(lines[r"log(UB/$V_1$)"], np.log(first.V1_upper / first.V1))
    output = {line.get_label() for line in figure.axes[2].lines}
    assert not any("V_2" in label for label in output)
