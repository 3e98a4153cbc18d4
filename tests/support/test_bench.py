"""The benchmark: that it measures what it says, and says what it measured."""

import dataclasses
import json
import os
import time
import warnings

import pytest
import torch
from support import results
from support.bench import __main__ as bench
from support.bench import agreement, apart, candidates, measure, networks, tables, targets
from support.bench.candidates import CANDIDATES, Candidate
from support.bench.measure import Case

pytestmark = pytest.mark.usefixtures("torch_as_before")
TINY = networks.QUICK["mlp"]


def few(plan, keys):
    """The parts of a plan with these candidates, each of them once per network or series."""
    seen = set()

    def shortened(*arguments):
        for key, case, more in plan(*arguments):
            part = (key, case.network, more.get("series"))
            if key in keys and part not in seen:
                seen.add(part)
                yield key, case, more

    return shortened


# From end to end.


def test_a_quick_run_writes_json_and_prints_tables(tmp_path, monkeypatch, capfd):
    for plan, keys in (
        ("beside", ("unit", "ours-fisher", "ours-estimate")),
        ("varied", ("ours-all", "ours-i1-1")),
    ):
        monkeypatch.setattr(bench, plan, few(getattr(bench, plan), keys))
    output = tmp_path / "folder" / "bench.json"
    assert bench.main(["--quick", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    record = found["record"]
    assert record["quick"] is True
    assert record["versions"]["torch"] == torch.__version__
    assert {"processor", "cores"} <= set(record["machine"])
    assert record["source"] == tables.runs.fimlib_digest()
    [fisher] = (
        row for row in found["peers"]
        if (row["candidate"], row["network"]) == ("ours-fisher", "mlp")
    )  # fmt: skip
    assert fisher["status"] == "measured", fisher
    timed = fisher["times"]["1"]
    assert timed["ratio"] == pytest.approx(timed["seconds"] / timed["unit"])
    assert timed["first"] > 0
    assert {row["network"] for row in found["peers"]} == set(networks.FULL)
    assert timed["repetitions"] == 3
    assert fisher["agrees"] is True
    assert fisher["difference"] < 1e-5
    assert {row["status"] for row in found["costs"]} == {"measured"}
    errors = {row["candidate"]: row.get("errors") for row in found["approximate"]}
    assert errors["ours-v2"] is None
    assert errors["hesscale"]["0"] > agreement.TOLERANCE > errors["hesscale"]["8"]
    printed = capfd.readouterr().out
    assert "beside others, mlp, B = 32, ours-fisher: " in printed
    for text in ("| **fimlib** ", "## Targets", "| labels N ", "one thread:", "| diagonals only "):
        assert text in printed
    assert ":::" not in printed


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [(KeyboardInterrupt(), 130, "interrupted"), (RuntimeError("no memory"), 1, "no memory")],
)
def test_what_is_not_finished_is_not_written(error, status, message, tmp_path, monkeypatch, capsys):
    output = tmp_path / "bench.json"
    output.write_text("of before")

    def fail(*_):
        raise error

    monkeypatch.setattr(bench, "run", fail)
    assert bench.main(["--output", str(output)]) == status
    assert message in capsys.readouterr().err
    assert output.read_text() == "of before"
    assert os.listdir(tmp_path) == ["bench.json"]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    kept, measured = tmp_path / "rows.jsonl", []

    def attempt(_work, key, case, _threads):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append((key, case.batch))
        return {"status": "failed" if key == "broken" else "skipped", "n": len(measured)}

    monkeypatch.setattr(bench, "attempt", attempt)
    monkeypatch.setattr(tables, "cell", lambda *_: "")
    plan = [("unit", Case("mlp", b), {"series": "B"}) for b in (1, 2, 3)]
    with pytest.raises(KeyboardInterrupt):
        bench.carry_out(iter(plan), [1], "cost", kept)
    kept.write_text(kept.read_text() + '\n["cut sho')
    measured.clear()
    rows = bench.carry_out(iter([*plan, ("broken", Case("mlp", 1), {})]), [1], "cost", kept)
    assert measured == [("unit", 3), ("broken", 1)]
    assert [row["n"] for row in rows] == [1, 2, 1, 2]
    assert len(bench.read_kept(kept)) == 3  # what failed is tried again
    assert bench.read_kept(tmp_path / "none") == bench.read_kept(None) == {}
    measured.clear()
    bench.carry_out(iter(plan[:1]), [1, 2], "cost", kept)  # on other threads: another row
    assert measured == [("unit", 1)]


def test_what_takes_long_is_measured_on_one_thread_only(monkeypatch):
    for seconds, threads in ((0.9 * measure.SLOW, ["1", "2"]), (1.1 * measure.SLOW, ["1"])):
        monkeypatch.setattr(
            bench, "attempt",
            lambda *a, s=seconds: {"status": "measured", "times": {str(a[-1]): {"seconds": s}}},
        )  # fmt: skip
        row = bench.on_threads("unit", Case("mlp", 1), [1, 2])
        assert list(row["times"]) == threads


def test_rows_are_kept_under_what_decides_them(monkeypatch):
    first = bench.place(False)
    assert first == bench.place(False)
    monkeypatch.setattr(bench.results, "version", lambda _: "0.0")
    assert bench.place(False) != first
    assert bench.place(True) is None


def test_a_quick_run_leaves_the_book_s_file_alone(monkeypatch, tmp_path):
    written, asked = [], []
    monkeypatch.setattr(bench, "run", lambda _quick, of: asked.append(of) or {})
    monkeypatch.setattr(bench.results, "write_text", lambda path, _: written.append(path))
    monkeypatch.setattr(bench.tables, "terminal", lambda _: "")
    monkeypatch.setattr(bench.tables, "FOUND", tmp_path / "bench.json")
    bench.main(["--quick"])
    bench.main([])
    bench.main(["--networks", "mlp", "vit"])
    assert written[:2] == [results.ROOT / "results" / "bench-quick.json", tmp_path / "bench.json"]
    assert asked == [[*networks.QUICK], [*networks.FULL], ["mlp", "vit"]]


def test_a_part_of_the_networks_is_measured_alone(monkeypatch):
    monkeypatch.setattr(bench, "carry_out", lambda plan, *_: [*plan])
    monkeypatch.setattr(bench, "confirmed", lambda _: {})
    monkeypatch.setattr(bench.apart, "PRELOAD", [])
    part, whole = (bench.run(True, of) for of in (["mlp"], [*networks.QUICK]))
    assert {case.network for _, case, _ in part["peers"]} == {"mlp"}
    assert [*part["networks"]] == ["mlp"]
    assert [*whole["networks"]] == [*networks.QUICK]
    assert not part["costs"]
    assert whole["costs"]


# One measurement.


MEASURED = [
    (network, key)
    for key, candidate in CANDIDATES.items()
    for network in (candidate.on or ("mlp",))
    if key != "hesscale"  # which is wrong on purpose
]


@pytest.mark.parametrize(("network", "key"), MEASURED)
def test_every_candidate_computes_what_it_is_measured_for(key, network, monkeypatch):
    candidate, tiny = CANDIDATES[key], networks.QUICK[network]
    model, x, y = networks.problem(tiny, 3, "cpu")
    monkeypatch.setattr(candidates, "CHUNK", 10_000)  # so that there are several
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compared = agreement.compare(candidate, model, tiny, x, y)
        except ImportError:
            pytest.skip(f"pip install {candidate.package}")
    assert compared.get("agrees", key == "unit"), compared
    if not candidate.estimate and key != "unit":
        assert compared["difference"] < 1e-4


def wrong(factor, estimate=False):
    """A candidate whose values are off by a factor in one parameter."""
    of = CANDIDATES["ours-i1-1" if estimate else "ours-all"]

    def prepare(model, network):
        call = of.prepare(model, network)

        def worse(x, y):
            values = call(x, y)
            values["I" if estimate else "V2"]["2.weight"] *= factor
            return values

        return worse

    return Candidate("wrong", "V₂, a factor off", prepare, estimate=estimate)


@pytest.mark.parametrize(
    ("factor", "estimate", "agrees"),
    [(1, False, True), (1.01, False, False), (0, False, False), (1, True, True), (4, True, False)],
)
def test_other_values_are_flagged(factor, estimate, agrees):
    model, x, y = networks.problem(TINY, 8, "cpu")
    candidate = wrong(factor, estimate)
    compared = agreement.compare(candidate, model, TINY, x, y)
    assert compared["agrees"] is agrees
    if not estimate:
        assert compared["difference"] == pytest.approx(abs(factor - 1), abs=1e-5)


def test_differences_are_relative_to_the_parameter_but_not_to_nothing():
    exact = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2), "c": torch.tensor([1e-9])}
    same = {name: t.clone() for name, t in exact.items()}
    found = same | {"a": torch.tensor([3.0, 4.5])}
    assert agreement.largest_difference(found, exact, {}) == pytest.approx(0.1)
    found = same | {"b": torch.tensor([0.0, 1e-4])}
    assert agreement.largest_difference(found, exact, {}) == pytest.approx(1e-4 / 5e-3)
    assert agreement.largest_difference(found, exact, {"b": 2.0}) == pytest.approx(5e-5)


def test_a_missing_library_is_said_to_be_missing(monkeypatch):
    for module in ("backpack", "nngeometry.metrics", "curvlinops"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    packages = set()
    for key, candidate in CANDIDATES.items():
        if candidate.package:
            row = measure.measure(key, Case("mlp", 2, quick=True), 1)
            assert (row["status"], row["why"]) == (
                "not installed", f"pip install {candidate.package}",
            )  # fmt: skip
            assert tables.cell(row, "1") == f"not installed: `{row['why']}`"
            packages.add(candidate.package)
    assert packages == {"backpack-for-pytorch", "nngeometry", "curvlinops-for-pytorch"}


def of_one_input(work):
    """A candidate that does this, whatever the inputs."""
    return Candidate("made up", "nothing", lambda *_: lambda *_: work() or {})


@pytest.mark.parametrize(
    ("limit", "value", "work", "why"),
    [("LIMIT_SECONDS", 0.2, lambda: [time.sleep(0.1) for _ in range(99)], "over 0 s"),
     ("LIMIT_MB", 100.0, lambda: torch.ones(100_000_000), "over 0 GB")],
)  # fmt: skip
def test_what_takes_too_long_or_too_much_is_broken_off(limit, value, work, why, monkeypatch):
    monkeypatch.setattr(measure, limit, value)
    monkeypatch.setitem(CANDIDATES, "made up", of_one_input(work))
    start = time.monotonic()
    row = measure.measure("made up", Case("mlp", 2, quick=True), 1)
    assert (row["status"], row["why"]) == ("skipped", why)
    assert time.monotonic() - start < 5
    assert tables.cell({**row, "candidate": "made up"}, "1") == f"skipped: {why}"
    assert torch.ones(100_000_000).numel()  # the limits are gone


def test_seconds_of_the_cpu_are_counted_where_asked():
    def spin(seconds):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        return {"status": "measured"}

    def sleep():
        time.sleep(0.5)
        return {"status": "measured"}

    assert measure.within_limits(sleep, "", 0.2, of_cpu=True)["status"] == "measured"
    assert measure.within_limits(sleep, "", 0.2)["why"] == "over 0 s"
    assert measure.within_limits(lambda: spin(1.0), "", 0.2, of_cpu=True)["why"] == "over 0 s"
    meter = measure.Meter("cpu", time.process_time)
    assert meter.time(sleep) < 0.2 < meter.time(lambda: spin(0.3))


def test_what_fails_is_a_row_too(monkeypatch):
    def prepare(*_):
        raise ValueError("no such network")

    monkeypatch.setitem(CANDIDATES, "broken", Candidate("broken", "nothing", prepare))
    row = measure.measure("broken", Case("mlp", 2, quick=True), 1)
    assert (row["status"], row["why"]) == ("failed", "ValueError: no such network")
    row |= measure.heading("broken", Case("mlp", 2))
    assert "broken, B = 2: ValueError: no such network" in tables.peers([row], "1")


def test_every_call_gets_a_model_of_its_own(monkeypatch):
    models, calls = [], []

    def prepare(model, _):
        models.append(model)
        return lambda *_: calls.append(model) or {}

    monkeypatch.setitem(CANDIDATES, "made up", Candidate("made up", "nothing", prepare))
    row = measure.measure("made up", Case("mlp", 2, quick=True, check=False), 1)
    assert row["times"]["1"]["repetitions"] == 3  # and the first call
    assert len(calls) == len({id(m) for m in models}) == 4
    assert all(a is b for a, b in zip(calls, models, strict=True))


def test_a_call_of_many_passes_is_divided_by_them(monkeypatch):
    once = of_one_input(lambda: time.sleep(0.05))
    for passes in (1, 10):
        monkeypatch.setitem(CANDIDATES, "made up", dataclasses.replace(once, passes=passes))
        row = measure.measure("made up", Case("mlp", 2, quick=True, check=False), 1)
        assert 0.9 * 0.05 / passes < row["times"]["1"]["seconds"] < 3 * 0.05 / passes


def test_the_straight_line_through_smaller_batches_decides():
    def at(batch, seconds):
        return {"status": "measured", "batch": batch, "times": {"1": {"seconds": seconds}}}

    limit = measure.LIMIT_SECONDS
    # 32 inputs take 31 s / 31 more than one: a second each
    assert measure.hopeless([at(1, 1.0), at(32, 32.0)], int(limit) - 1) is None
    assert measure.hopeless([at(1, 1.0), at(32, 32.0)], int(limit) + 1)["status"] == "skipped"
    assert measure.hopeless([at(1, 5.0), at(32, 4.0)], 10**9) is None  # never downwards
    assert measure.hopeless([at(1, 9.0)], 1000) is None  # one point is no line
    assert measure.hopeless([], 1000) is None
    skipped = {"status": "skipped", "why": "over 8 GB", "batch": 32}
    assert measure.hopeless([at(1, 1.0), skipped], 1000) == {
        k: skipped[k] for k in ("status", "why")
    }


@pytest.mark.parametrize(
    ("seconds", "quick", "n"),
    [(1e-4, False, 100), (0.06, False, 17), (0.5, False, 9), (2.5, False, 3), (9, False, 3),
     (1e-4, True, 3), (90, False, 3)],
)  # fmt: skip
def test_how_many_calls_are_enough(seconds, quick, n):
    times = []
    while not measure.enough(times, quick):
        times.append(seconds)
    assert len(times) == n


def test_memory_is_that_of_the_work():
    def work():
        return torch.ones(25_000_000).sum()  # 100 MB

    meter = measure.Meter("cpu")
    _, once = meter.run(work)
    _, less = meter.run(lambda: None)
    assert 90 < once < 130
    assert less < 20


def test_a_gpu_is_waited_for_and_has_its_own_memory(monkeypatch):
    called = []
    for name, value in (
        ("synchronize", None), ("reset_peak_memory_stats", None), ("memory_allocated", 1e6),
        ("max_memory_allocated", 5e6),
    ):  # fmt: skip
        monkeypatch.setattr(
            torch.cuda, name, lambda name=name, value=value: (called.append(name), value)[1]
        )
    meter = measure.Meter("cuda")
    _, mb = meter.run(lambda: called.append("work"))
    assert mb == 4.0
    assert called == [
        "reset_peak_memory_stats", "memory_allocated", "synchronize", "work", "synchronize",
        "max_memory_allocated",
    ]  # fmt: skip
    plan = list(bench.beside(["cpu", "cuda"], quick=True))
    assert {case.device for _, case, _ in plan} == {"cpu", "cuda"}
    asked = []
    monkeypatch.setattr(bench, "attempt", lambda *a: asked.append(a) or {"status": "failed"})
    bench.carry_out(iter([("unit", Case("mlp", 1, "cuda"), {})]), [1, 2], "")
    assert [a[-1] for a in asked] == [1]  # the threads of the CPU are no matter there


def test_parts_of_a_batch_are_averaged_by_their_sizes(monkeypatch):
    x, model = torch.tensor([[1.0], [3.0], [8.0]]), torch.nn.Linear(1, 1)
    sizes = []
    for chunk in (4, 100):  # 2 inputs at a time, or all
        monkeypatch.setattr(candidates, "CHUNK", chunk)
        call = candidates.in_chunks(
            lambda x, _: sizes.append(len(x)) or {"I": {"w": x.mean(0)}}, model, 1
        )
        assert call(x, x)["I"]["w"].item() == pytest.approx(4.0)
    assert sizes == [2, 1, 3]


# Processes.


def test_a_process_that_dies_or_dawdles_is_reported():
    assert apart.apart(max, 2, 3) == 3
    with pytest.raises(RuntimeError, match="ValueError: math domain error"):
        apart.apart(__import__("math").sqrt, -1)
    with pytest.raises(RuntimeError, match=r"ended by itself \(exit code 7\)"):
        apart.apart(os._exit, 7)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="no result after"):
        apart.apart(time.sleep, 60, limit=0.2)
    assert time.monotonic() - start < 20
    assert bench.attempt(os._exit, 7)["status"] == "failed"


# The page.


def row(candidate, ratio=None, network="mlp", batch=1000, **more):
    timed = {
        "unit": 0.01, "seconds": 0.01 * (ratio or 0), "repetitions": 20, "ratio": ratio,
        "first": 70.0, "memory_mb": 12.3,
    }  # fmt: skip
    measured = {"status": "measured", "times": {"1": timed}, "difference": 1e-7, "agrees": True}
    return {
        "candidate": candidate, "network": network, "batch": batch, "device": "cpu",
        **(measured if ratio else {}), **more,
    }  # fmt: skip


def made_up(**changed):
    """What a run may have found: everything reached, but for what ``changed`` says."""
    costs = {
        "unit": 1, "ours-fisher": 1.9, "ours-first": 3.2, "ours-all": 5.4, "backpack-fisher": 5.9,
        "nngeometry-fisher": 10.8,
    } | {k.replace("_", "-"): v for k, v in changed.items()}  # fmt: skip
    peers = [row(key, cost) for key, cost in costs.items()]
    for network in ("mlp", "wide", "lenet"):
        peers += [row("ours-all", 20.0, network, 1), row("backpack-all", 220.0, network, 1)]
    peers += [
        row("ours-fisher", 4.0, "lenet"), row("ours-fisher", 9.0, "vit", 32),
        row("ours-estimate", 1.2, "gpt", 8),
        row("ours-fisher", 7.0, "resnet", 8), row("loop", 10.0, "resnet", 8),
        row("ours-fisher", 9.0, "decoder", 8), row("loop", 10.0, "decoder", 8),
        row("backpack-all", network="lenet", status="skipped", why="over 8 GB"),
        row("loop", status="skipped", why="over 30 s"),
        row("jacobians", status="not installed", why="pip install torch"),
        row("backpack-mc", status="failed", why="ValueError: oh"),
    ]  # fmt: skip
    return {
        "record": {
            "started": "2001-02-03T04:05:06Z", "seconds": 600.0, "commit": "abc", "source": "old",
            "quick": False, "load": 0.25, "versions": {"torch": "2.13"},
            "machine": {"processor": "a processor", "cores": 2, "gpu": ""},
        },
        "networks": {"mlp": "the MLP", "lenet": "the LeNet"},
        "peers": peers,
        "costs": [
            row("ours-all", 5.0, series="classes C", point=10),
            row("ours-all", series="classes C", point=1000, status="skipped", why="over 30 s"),
            row("ours-i1-1", 2.0, series="labels N", point=1, line="Î₁"),
        ],
        "approximate": [
            row("ours-v2", 5.0, "9-8"), row("hesscale", 4.0, "9-8", errors={"0": 0.25, "2": 1e-9}),
        ],
    }  # fmt: skip


def lines_with(text, *words):
    return [line for line in text.splitlines() if all(word in line for word in words)]


def test_the_page_says_what_was_found():
    text = tables.benchmark_page(made_up())
    assert "Measured on 2001-02-03 at commit abc, in 10 min, on a processor, 2 cores" in text
    assert "`fimlib` has changed since" in text
    assert "* the MLP, B = 1,000: the exact diagonal takes 1.9 training steps, and 5.9 with" in text
    [line] = lines_with(text, "**fimlib**", "| I  ", "1.9 ×")
    assert "1.9 ×, 12 MB; first 70 ×" in line
    assert "1e-07" in line
    assert lines_with(text, "training step", "10 ms, 12 MB; first 70 ×")
    assert lines_with(text, "loop over outputs", "skipped: over 30 s")
    assert lines_with(text, "a pass for each output", "skipped: over 8 GB")
    assert lines_with(text, "vmap(jacrev)", "not installed: `pip install torch`")
    assert lines_with(text, "* BackPACK DiagGGNMC, B = 1,000: ValueError: oh")
    assert lines_with(text, "I, Varₓ I, V₁, V₂", "5 ×, 12 MB", "skipped: over 30 s")
    assert lines_with(text, "| Î₁ ", "2 ×, 12 MB")
    assert lines_with(text, "| diagonals only ", "4 ×", "25.0%", "| exact")
    assert "**missed**" not in text
    assert len(lines_with(text, "| reached |")) == len(targets.TARGETS)


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"ours_fisher": 2.01}, "MLP: I, in training steps"),
        ({"ours_first": 3.4}, "MLP: I, Varₓ I, V₁"),
        ({"ours_all": 5.6}, "MLP: I, Varₓ I, V₁, V₂"),
    ],
)
def test_a_missed_target_says_why(changed, missed):
    text = tables.targets(made_up(**changed))
    [line] = lines_with(text, "**missed**")
    assert missed in line
    [reason] = lines_with(text, "* MLP")
    assert missed in reason
    assert "Why targets are missed" in text


@pytest.mark.parametrize(
    ("candidate", "network", "batch", "ratio", "missed"),
    [
        ("backpack-all", "mlp", 1, 199.0, "MLP, one input"),
        ("backpack-all", "lenet", 1, 199.0, "LeNet, one input"),
        ("loop", "resnet", 8, 8.7, "ResNet-18"),
        ("loop", "decoder", 8, 8.9, "4,096 outputs"),
        ("ours-estimate", "gpt", 8, 1.31, "GPT"),
        ("ours-fisher", "vit", 32, 10.1, "Vision transformer"),
        ("ours-fisher", "lenet", 1000, 6.1, "LeNet: I"),
    ],
)
def test_other_networks_have_targets_too(candidate, network, batch, ratio, missed):
    found = made_up()
    found["peers"] = [
        row(candidate, ratio, network, batch)
        if (r["candidate"], r["network"], r["batch"], r["status"])
        == (candidate, network, batch, "measured")
        else r
        for r in found["peers"]
    ]
    [line] = lines_with(tables.targets(found), "**missed**")
    assert missed in line


def test_other_values_have_no_cost_and_reach_no_target():
    found = made_up()
    for r in found["peers"]:
        if r["candidate"] == "ours-fisher" and r["network"] == "mlp":
            r.update(agrees=False, difference=0.5)
    text = tables.benchmark_page(found)
    [line] = lines_with(text, "**fimlib**", "| I  ", "**differs: 0.5**")
    assert "other values" in line
    assert "1.9 ×" not in line
    assert lines_with(text, "MLP: I, in training steps", "not measured", "open")


def test_few_repetitions_are_told():
    r = row("ours-all", 50.0)
    r["times"]["1"]["repetitions"] = 3
    assert tables.cell(r, "1") == "50 ×, 12 MB, n = 3; first 70 ×"
    assert tables.cell(r, "2") == ""
    assert tables.cell(None, "1") == ""


def test_a_gpu_has_a_tab_of_its_own():
    found = made_up()
    found["peers"].append(row("ours-fisher", 2.5, device="cuda"))
    text = tables.benchmark_page(found)
    assert "tab-item} GPU" in text
    assert lines_with(text, "**fimlib**", "2.5 ×")
    assert "GPU" not in tables.benchmark_page(made_up())


def test_without_a_run_the_page_says_how_to_make_one(tmp_path):
    assert tables.read_benchmark(tmp_path / "bench.json") is None
    assert "make bench" in tables.benchmark_page(None)
    (tmp_path / "bench.json").write_text(json.dumps(made_up()))
    assert tables.read_benchmark(tmp_path / "bench.json") == made_up()
    before = made_up()
    del before["peers"][0]["times"]["1"]["first"]
    (tmp_path / "bench.json").write_text(json.dumps(before))
    assert tables.read_benchmark(tmp_path / "bench.json") is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2e-6, "2 µs"), (0.0123, "12.3 ms"), (1.0, "1 s"), (119, "119 s"), (600, "10 min"),
     (7200, "2 h"), (36_000_000, "10,000 h")],
)  # fmt: skip
def test_durations(seconds, text):
    assert tables.duration(seconds) == text
