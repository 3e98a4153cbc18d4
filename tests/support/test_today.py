"""Networks of today: that estimates agree with exact values there, and the table says so."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from support.bench import __main__ as bench
from support.bench import apart, architectures, coverage, today

from fimlib import estimates

pytestmark = pytest.mark.usefixtures("torch_as_before")
TINY = architectures.tasks(quick=True)
STANDARD_ERRORS = 5.0
FAST = {"mlp": today.ESTIMATES, "gpt": ("signs", "input"), "unet": ("importance",)}


# Estimates against exact values.


def compared(task, keys):
    """The rows of these estimates; skipped where a package is missing."""
    for package in task.packages:
        pytest.importorskip(package)
    model, batch = architectures.problem(task)
    value, _ = today.run(task, today.EXACT, model, batch)
    exact = {name: t.numpy() for name, t in value.items()}
    inputs, found = (model, task.inputs(batch), task.family), []
    for key in keys:
        options = {**task.options, **today.CALLS[key].options, "passes": 64}
        found.append(today.compare(today.fimlib.estimate(*inputs, **options), exact))
    return found


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft
@pytest.mark.parametrize("name", TINY)
def test_estimates_are_within_five_standard_errors(name):
    for row in compared(TINY[name], FAST.get(name, ("signs",))):
        assert row["z"] <= STANDARD_ERRORS, row
        assert 0 < row["error"] < 1


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft
@pytest.mark.full
@pytest.mark.parametrize("name", sorted(set(architectures.tasks()) - {"large"}))
def test_estimates_of_whole_networks_are_within_five_standard_errors(name):
    task = architectures.tasks()[name]
    keys = today.ESTIMATES[: 2 if name == "two-heads" else 3]
    for row in compared(task, keys):
        assert row["z"] <= STANDARD_ERRORS, row


def test_the_comparison_by_hand():
    layers = {
        "a": estimates.LayerEstimate(9.0, 0.5, 0.1),
        "b": estimates.LayerEstimate(1.0, 0.0, 0.0),
    }
    value = {"a.w": torch.tensor([4.0, 5.0]), "b.w": torch.tensor([1.0])}
    found = estimates.Estimate(value, {}, layers, 0.1, 3, 5, "signs", "batch")
    exact = {"a.w": np.array([4.0, 3.0]), "b.w": np.array([1.0 + 1e-7])}
    row = today.compare(found, exact)
    assert row["error"] == pytest.approx(2 / math.sqrt(4**2 + 3**2 + 1))
    assert row["z"] == pytest.approx(math.log(9 / 7) * 9 / 0.5)
    assert (row["layer"], row["layers"]) == ("a", 2)


# The cells.


def test_a_call_is_measured_in_a_process_of_its_own():
    row, I = apart.apart(today.cell, "mlp", today.EXACT, True, None)
    assert (row["status"], row["stated"]) == ("measured", None)
    assert (row["inputs"], row["outputs"], row["parameters"]) == (
        4,
        3,
        12 * 8 + 8 + 8 * 6 + 6 + 6 * 4 + 4 + 4 * 3 + 3,
    )
    assert row["ratio"] == pytest.approx(row["seconds"] / row["unit"])
    assert set(I) == {f"{i}.{name}" for i in (0, 2, 4, 6) for name in ("weight", "bias")}
    row, nothing = today.cell("mlp", "signs", True, I)
    assert nothing is None
    assert row["stated"] == pytest.approx(row["error"], rel=2)
    assert "z" not in today.cell("mlp", "signs", True, None)[0]


def test_summarise_states_the_error_of_one_label():
    _, stated = today.run(TINY["mlp"], "summary", *architectures.problem(TINY["mlp"]))
    model, x = architectures.problem(TINY["mlp"])
    family = TINY["mlp"].family
    derivs = today.fimlib.differentiate(model, x, order=1)
    V = today.fimlib.variance_i1(derivs, family).mean_over_inputs()
    I = today.fimlib.fisher_information(derivs, family).mean_over_inputs()
    right = sum(float(v.sum()) for v in V.values()) / len(x)
    right /= sum(float(v.square().sum()) for v in I.values())
    assert stated == pytest.approx(math.sqrt(right))


def test_refusals_and_missing_packages_are_lines_too(monkeypatch):
    row, _ = today.cell("two-heads", "importance", True, None)
    assert row["status"] == "refused"
    assert today.shown(row)[0] == (
        "refused: batch 1: importance sampling needs classes, Categorical()"
    )
    monkeypatch.setitem(sys.modules, "transformers", None)
    row, _ = today.cell("gpt2", "signs", True, None)
    assert today.shown(row)[0] == "needs `pip install transformers`"


def test_the_limit_of_memory_is_no_refusal(monkeypatch):
    def fail(*_):
        raise MemoryError("batch 1: torch needs 9.0 GiB more")

    monkeypatch.setattr(today, "run", fail)
    row, _ = today.cell("mlp", "signs", True, None)
    assert (row["status"], row["why"]) == ("skipped", "over 8 GB")
    small = {"memory_mb": 30.0, "unit_memory_mb": 0.5}
    assert today.memory(small) == "30 MB"


def test_a_crash_is_no_refusal(monkeypatch):
    def crash(*_):
        raise TypeError("unsupported operand")

    monkeypatch.setattr(today, "run", crash)
    with pytest.raises(TypeError, match="unsupported"):  # which its process reports as a failure
        today.cell("mlp", "signs", True, None)


def test_what_is_out_of_reach_is_not_tried_again(capsys):
    asked = []

    def attempt(_cell, name, key, _quick, exact):
        asked.append((key, exact))
        if key == "input":
            return {"status": "failed", "why": "the process ended by itself"}
        skipped = {"status": "skipped", "why": "over 30 s"}
        return {"network": name, "call": key, **skipped}, None

    rows = today.rows(True, attempt, ["mlp"])
    assert asked == [(key, None) for key in (today.EXACT, *today.ESTIMATES)]
    assert [row["call"] for row in rows] == [*today.CALLS]
    assert [today.shown(row)[0] for row in rows] == [
        "skipped: over 30 s", "failed: the process ended by itself", *["skipped: over 30 s"] * 4
    ]  # fmt: skip
    assert "today, mlp, input: failed" in capsys.readouterr().out


def test_the_estimates_get_the_exact_values():
    def attempt(_cell, name, key, _quick, exact):
        row = {"network": name, "call": key, "status": "skipped" if exact is None else "refused"}
        return {**row, "why": ""}, {"w": 1} if key == today.EXACT else None

    rows = {row["call"]: row["status"] for row in today.rows(True, attempt, ["mlp"])}
    assert {rows[key] for key in today.ESTIMATES} == {"refused"}


# The page.


def measured(call, **more):
    about = {"parameters": 1234, "inputs": 4, "outputs": 2000, "status": "measured"}
    timed = {
        "unit": 0.01, "ratio": 35.5, "memory_mb": 30.0, "unit_memory_mb": 20.0, "stated": 0.24,
    }  # fmt: skip
    return {"network": "gpt", "call": call, **about, **timed, **more}


def made_up():
    shares = [
        {"case": "trained", "probability": 0.994, "estimator": kind, "passes": k, "share": share}
        for kind, pairs in (("signs", (0.94, 0.957)), ("labels", (0.0, 0.78)))
        for k, share in zip((32, 128), pairs, strict=True)
    ]
    shares.append({**shares[0], "share": 0.96})
    record = {
        "started": "2001-02-03T04:05:06Z", "seconds": 600.0, "commit": "abc", "quick": False,
        "load": 0.25, "versions": {"torch": "2.13"},
        "machine": {"processor": "a processor", "cores": 2, "gpu": ""},
    }  # fmt: skip
    rows = [
        measured("signs", error=0.21, z=1.25, layers=7),
        measured("input", error=0.12, z=2.5, layers=7),
        measured(today.EXACT, stated=None, ratio=2041.0),
    ]
    return {"record": record, "rows": rows, "coverage": shares}


def test_the_page_says_what_was_found():
    page = today.page(made_up())
    assert "2 estimates could be compared with the exact $I$, in 14 sums over layers" in page
    assert "is 2.5 standard errors off (GPT, `estimate`, per input)" in page
    assert "Measured on 2001-02-03 at commit abc" in page
    lines = [
        [c.strip() for c in line.split("|")[1:-1]] for line in page.splitlines() if "|" in line
    ]
    assert lines[2] == ["**GPT**", "`estimate`", "35.5 ×", "30 MB, 1.5 ×", "0.24", "0.21", "1.2"]
    assert lines[3][0] == "`Positions(Categorical)`, T = 2,000"
    assert lines[4][0] == "1,234 parameters, B = 4"
    assert lines[4][2:] == ["2,041 ×", "30 MB, 1.5 ×", "exact", "", ""]
    assert "make bench TODAY=1" in today.page(None)


def test_the_intervals_as_a_table():
    lines = [
        [c.strip() for c in line.split("|")[1:-1]]
        for line in today.intervals(made_up()).splitlines()
    ]
    assert lines[0] == ["network", "vectors", "32 passes", "128 passes"]
    assert lines[2] == ["trained, p = 0.994", "signs", "94 to 96 %", "96 %"]
    assert lines[3] == ["trained, p = 0.994", "labels", "0 %", "78 %"]
    assert "make bench TODAY=1" in today.intervals(None)


def test_shares_are_measured_at_three_networks():
    rows = coverage.rows(quick=True)
    assert {row["case"] for row in rows} == set(coverage.CASES)
    assert len(rows) == 3 * len(today.ESTIMATES) * 2 * len(coverage.PASSES) * 2
    assert {row["images"] for row in rows} == {1, coverage.IMAGES}
    assert np.mean([row["share"] for row in rows if row["estimator"] == "signs"]) > 0.9


def test_the_command_writes_its_own_file(tmp_path, monkeypatch, capsys):
    written = []
    monkeypatch.setattr(bench.apart, "PRELOAD", [])
    monkeypatch.setattr(bench.today, "rows", lambda *_: [])
    monkeypatch.setattr(bench.apart, "apart", lambda *_: [])
    monkeypatch.setattr(
        bench.results, "write_text", lambda path, text: written.append((path, text))
    )
    for words, name in ((["--today"], today.FOUND), (["--today", "--quick"], "today-quick.json")):
        assert bench.main(words) == 0
        path, text = written.pop()
        assert path.name == getattr(name, "name", name)
        assert json.loads(text)["record"]["versions"]["torch"] == torch.__version__
    assert "| network" in capsys.readouterr().out
    assert today.read(tmp_path / "none") is None


def test_what_the_book_says_of_its_table_holds():
    """The sentences of Section 9.1 and of the page on costs, on the measurements behind them."""
    found = today.read()
    assert {row["network"] for row in found["rows"]} == set(architectures.tasks())
    assert max(row.get("z", 0.0) for row in found["rows"]) <= STANDARD_ERRORS
    noise = 3 * (0.95 * 0.05 / coverage.REPETITIONS) ** 0.5
    for row in found["coverage"]:
        is_kept = 0.93 - noise <= row["share"] <= 0.97 + noise
        if row["estimator"] != "labels" or row["case"] != coverage.CASES[2]:
            assert is_kept, row
        elif row["passes"] == min(coverage.PASSES):
            assert row["share"] < 0.5
