"""What a full run takes: arithmetic from made-up records, unknown runs, runs that are done."""

from pathlib import Path

import pytest
import torch
from support import quote, results, runs

MLP, CNN = runs.NOTEBOOKS / "mnist.ipynb", runs.NOTEBOOKS / "checks.ipynb"
PLAN = {
    f"a-seed-{seed}": runs.Spec(f"a-seed-{seed}", "A", MLP, {"seed": seed}, "a", ("seed",))
    for seed in range(3)
} | {
    "deeper": runs.Spec("deeper", "D", MLP, {"hidden": [4, 4, 4]}, "deeper"),
    "other": runs.Spec("other", "O", CNN, {}, "other"),
}


def recorded(folder, name, parameters=None, **record):
    """A finished run of 1 kB, made up."""
    made = {"parameters": parameters or {}, "data": {"digest": "d"}, "files": {}} | record
    (folder / name).mkdir(parents=True)
    (folder / name / "more.svg").write_bytes(bytes(900 - len(str(made))))
    results.save(folder / name, None, made)


def quoted(tmp_path, here=0.5):
    found = quote.quotes(PLAN, tmp_path / "here", tmp_path / "reference", "mnist", here)
    return {q.name: q for q in found}


def test_times_are_scaled_by_the_machines_speed(tmp_path):
    recorded(
        tmp_path / "reference", "a-seed-0", {"seed": 0}, wall_seconds=97.0, seconds=90.0,
        memory_mb=500, calibration=0.25,
    )  # fmt: skip
    one = quoted(tmp_path)["a-seed-0"]
    assert one.seconds == pytest.approx((97 + quote.PYTHON) * 2)  # half as fast here
    assert (one.memory, one.source, one.state) == (500, "its own record", "")
    assert one.disk == pytest.approx(0.001, rel=0.2)


def test_older_records_are_scaled_by_nothing(tmp_path):
    recorded(tmp_path / "reference", "a-seed-0", {"seed": 0}, seconds=20.0)
    one = quoted(tmp_path)["a-seed-0"]
    assert one.seconds == 20 + quote.BEFORE + quote.PYTHON
    assert one.memory is None
    assert one.source == "its own record, scaled by nothing"


def test_relatives_speak_for_runs_without_a_record(tmp_path):
    for seed, wall in ((0, 10.0), (1, 20.0)):
        recorded(
            tmp_path / "reference", f"a-seed-{seed}", {"seed": seed}, wall_seconds=wall,
            seconds=0.0, memory_mb=100 * (seed + 1), calibration=0.5,
        )  # fmt: skip
    found = quoted(tmp_path)
    assert found["a-seed-2"].seconds == 15 + quote.PYTHON
    assert (found["a-seed-2"].memory, found["a-seed-2"].source) == (150, "runs of a")
    assert found["deeper"].seconds == 15 + quote.PYTHON
    assert found["deeper"].source == "runs of mnist.ipynb with other settings"
    assert found["other"] == ("other", "", None, None, None, "no record of checks.ipynb")


def test_a_record_with_other_settings_is_not_its_own(tmp_path):
    recorded(
        tmp_path / "reference", "deeper", {"hidden": [4]}, wall_seconds=1.0, seconds=0.0,
        calibration=0.5,
    )  # fmt: skip
    assert quoted(tmp_path)["deeper"].source == "runs of mnist.ipynb with other settings"


def test_this_machine_speaks_first_and_says_what_is_done(tmp_path):
    """By the record's own word on its data: none are read."""
    spec = PLAN["a-seed-0"]
    for folder, wall, fingerprint in (
        ("reference", 10.0, ""),
        ("here", 30.0, runs.fingerprint(spec, "mnist", "d")),
    ):
        recorded(
            tmp_path / folder, "a-seed-0", {"seed": 0}, wall_seconds=wall, seconds=0.0,
            calibration=0.5, fingerprint=fingerprint,
        )  # fmt: skip
    begun = tmp_path / "here/.partial/a-seed-1/0123/checkpoint.pt"
    begun.parent.mkdir(parents=True)
    begun.touch()
    found = quoted(tmp_path)
    assert (found["a-seed-0"].seconds, found["a-seed-0"].state) == (33, "done")
    assert (found["a-seed-1"].state, found["a-seed-2"].state) == ("begun", "")
    recorded(tmp_path / "here", "a-seed-2", {"seed": 2}, seconds=1.0, fingerprint="of other code")
    assert quoted(tmp_path)["a-seed-2"].state == ""


def test_jobs_take_the_next_run_when_they_are_free():
    assert quote.makespan([5, 1, 1, 1, 4], 1) == 12
    assert quote.makespan([5, 1, 1, 1, 4], 2) == 7
    assert quote.makespan([5, 1, 1, 1, 4], 9) == 5
    assert quote.makespan([], 2) == 0


def test_the_sums_leave_out_what_is_done_and_name_what_is_unknown():
    found = [
        quote.Quote("a", "done", 1000.0, 9000.0, 70.0, "its own record"),
        quote.Quote("b", "", 300.0, 500.0, 2.0, "its own record"),
        quote.Quote("c", "begun", 120.0, 400.0, 2.5, "runs of b"),
        quote.Quote("d", "", None, None, None, "no record of d.ipynb"),
    ]
    text = quote.text(found, cores=2, runner=100.0)
    assert "done: 1 of 4 runs" in text
    assert (
        "make reproduce JOBS=1: at least 8.0 min, the book's 60 s among them; memory: 600 MB"
        in text
    )
    assert (
        "make reproduce JOBS=2: at least 6.0 min, the book's 60 s among them; memory: 1.1 GB"
        in text
    )
    assert "disk: 4.5 MB for results, about 328 MB for the book" in text
    assert "at least" not in quote.text(found[:3], cores=2, runner=100.0)
    assert "not known, and not in these sums: d\n" in text
    assert "begun runs go on from their last checkpoint" in text
    assert "a  16.7 min    9.0 GB     70 MB  its own record (done)" in text
    assert "d         ?         ?         ?  no record of d.ipynb" in text


def test_the_command_reads_no_mnist_and_makes_no_run(tmp_path, capsys, monkeypatch):
    def never(*_args):
        raise AssertionError

    for name in ("data_digest", "execute"):
        monkeypatch.setattr(runs, name, never)
    monkeypatch.setattr(quote.speed, "calibration", lambda: 0.25)
    assert quote.main(["--results", str(tmp_path / "none")]) == 0
    text = capsys.readouterr().out
    assert f"done: 0 of {len(runs.specs())} runs" in text
    assert all(name in text for name in runs.specs())
    assert not Path(tmp_path / "none").exists()
    assert "speed: 0.250 s" in text


def test_with_a_gpu_the_quote_names_it_and_says_which_times_were_made_without(
    tmp_path, capsys, monkeypatch
):
    cuda = quote.speed.torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(cuda, "mem_get_info", lambda: (3 * quote.speed.GPU_MB * 1e6, 0))
    monkeypatch.setattr(quote.speed, "cores", lambda: 8)
    for seed, device in enumerate(("a GPU", "cpu")):
        parameters = {"seed": seed, "device": "auto"}
        recorded(
            tmp_path / "reference", f"a-seed-{seed}", parameters, wall_seconds=9.0, seconds=0.0,
            calibration=0.5, machine={"device": device},
        )  # fmt: skip
    recorded(
        tmp_path / "reference", "other", wall_seconds=9.0, seconds=0.0, calibration=0.5,
        machine={"device": "cpu"},
    )  # fmt: skip
    found = quoted(tmp_path)
    assert found["a-seed-0"].source == found["other"].source == "its own record"
    assert found["a-seed-1"].source == "its own record, made without this GPU"
    assert found["a-seed-2"].source == "runs of a, made without this GPU"
    monkeypatch.setattr(quote.speed, "calibration", lambda: 0.25)
    assert quote.main(["--results", str(tmp_path / "none")]) == 0
    text = capsys.readouterr().out
    assert "8 cores, a GPU, " in text
    assert "make reproduce JOBS=3: " in text
    assert "JOBS=8" not in text


def test_the_calibration_changes_neither_threads_nor_random_numbers():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert 0.01 < quote.speed.calibration() < 60
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
