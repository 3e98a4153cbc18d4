"""The benchmark: that it measures what it says, and says what it measured."""

import copy
import json
import os
import time
import warnings

import pytest
import torch
from support import results
from support.bench import __main__ as bench
from support.bench import agreement, apart, candidates, measure, networks, tables, targets
from support.bench.approximate import METHODS
from support.bench.candidates import CANDIDATES, Candidate
from support.bench.measure import Case

TINY = networks.QUICK["mlp"]


@pytest.fixture(autouse=True)
def _torch_as_before():
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


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
        ("beside", ("unit", "ours-fisher", "backpack-fisher")),
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
    assert timed["repetitions"] == 3
    assert fisher["agrees"] is True
    assert fisher["difference"] < 1e-5
    assert {row["status"] for row in found["costs"]} == {"measured"}
    errors = {row["candidate"]: row.get("errors") for row in found["approximate"]}
    assert errors["auto"] is None
    assert errors["hesscale"]["0"] > agreement.TOLERANCE > errors["hesscale"]["8"]
    printed = capfd.readouterr().out
    assert "beside others, mlp, B = 1, ours-fisher: " in printed
    for text in ("| **fimlib** ", "## Targets", "| labels N ", "one thread:", "| hesscale "):
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
    plan = [("unit", Case("mlp", b), {"errors": b}) for b in (1, 2, 3)]
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


def test_rows_are_kept_under_what_decides_them(monkeypatch):
    first = bench.place(False)
    assert first == bench.place(False)
    monkeypatch.setattr(bench.results, "version", lambda _: "0.0")
    assert bench.place(False) != first
    assert bench.place(True) is None


def test_a_quick_run_leaves_the_book_s_file_alone(monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(bench, "run", lambda quick: {"quick": quick})
    monkeypatch.setattr(bench.results, "write_text", lambda path, _: written.append(path))
    monkeypatch.setattr(bench.tables, "terminal", lambda _: "")
    monkeypatch.setattr(bench.tables, "FOUND", tmp_path / "bench.json")
    bench.main(["--quick"])
    bench.main([])
    assert written == [results.ROOT / "results" / "bench-quick.json", tmp_path / "bench.json"]


# One measurement.


@pytest.mark.parametrize("network", ["mlp", "lenet"])
@pytest.mark.parametrize("key", [k for k in CANDIDATES if k not in METHODS])
def test_every_candidate_computes_what_it_is_measured_for(key, network):
    candidate = CANDIDATES[key]
    if network not in (candidate.only or (network,)):
        pytest.skip("not measured there")
    model, x, y = networks.problem(networks.QUICK[network], 3, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call = candidate.prepare(copy.deepcopy(model), networks.QUICK[network])
            call = measure.streamed(call, 2 if candidate.chunk(TINY) else None)
            compared = agreement.compare(candidate, call, model, x, y)
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
    compared = agreement.compare(candidate, candidate.prepare(model, TINY), model, x, y)
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
    found = same | {"a": torch.tensor([float("nan"), 4.5])}  # not asked for, and wrong
    assert agreement.largest_difference(found, exact, {}) == pytest.approx(0.1)


def test_a_missing_library_is_said_to_be_missing(monkeypatch):
    for module in ("backpack", "nngeometry.metrics", "curvlinops"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    packages = set()
    for key, candidate in CANDIDATES.items():
        if candidate.package:
            row = measure.measure(key, Case("mlp", 2, quick=True), [1])
            assert (row["status"], row["why"]) == (
                "not installed", f"pip install {candidate.package}",
            )  # fmt: skip
            assert tables.cell(row, "1") == f"not installed: `{row['why']}`"
            packages.add(candidate.package)
    assert packages == {"backpack-for-pytorch", "nngeometry", "curvlinops-for-pytorch"}


@pytest.mark.parametrize(
    ("limit", "value", "why"), [("LIMIT_SECONDS", 0.0, "time"), ("LIMIT_MB", -1.0, "memory")]
)
def test_what_would_take_too_long_or_too_much_is_not_run(limit, value, why, monkeypatch):
    monkeypatch.setattr(measure, limit, value)
    row = measure.measure("ours-fisher", Case("mlp", 2, quick=True), [1])
    assert (row["status"], row["why"]) == ("skipped", why)
    assert "times" not in row
    assert tables.cell(row, "1").startswith("skipped: ")
    assert tables.cell(row, "1").endswith(" predicted")


def test_what_fails_is_a_row_too(monkeypatch):
    def prepare(*_):
        raise ValueError("no such network")

    monkeypatch.setitem(CANDIDATES, "broken", Candidate("broken", "nothing", prepare))
    row = measure.measure("broken", Case("mlp", 2, quick=True), [1])
    assert (row["status"], row["why"]) == ("failed", "ValueError: no such network")
    assert "broken, B = 2: ValueError: no such network" in tables.peers([row], "1")


def test_predictions_lie_on_a_line_through_the_last_two_points():
    points = [(1, 9.0, 9.0), (8, 1.0, 100.0), (64, 3.8, 660.0)]
    assert measure.line(points, 1, 1000) == pytest.approx((3.8 + 0.05 * 936, 660 + 10 * 936))
    assert measure.line(points, 7, 64) == pytest.approx((7 * 3.8, 660))
    assert measure.line(points[:1], 2, 10) == pytest.approx((180, 90))
    assert measure.line([(1, 2.0, 5.0), (8, 1.0, 4.0)], 1, 800) == (1.0, 4.0)  # never downwards


def test_a_prediction_knows_passes_and_what_is_held():
    class Clock(measure.Meter):
        def run(self, work):
            size = work()
            return 0.01 * size, 5.0 * size

    x = torch.zeros(1000, 1)
    predicted = measure.predict(lambda x, _: len(x), x, x, Clock("cpu"), 10, held=100)
    assert predicted == pytest.approx({"seconds": 100, "mb": 500, "from": 64})
    predicted = measure.predict(lambda x, _: len(x), x, x, Clock("cpu"), 1, held=0)
    assert predicted == pytest.approx({"seconds": 10, "mb": 320, "from": 64})


@pytest.mark.parametrize(
    ("seconds", "quick", "n"),
    [(1e-4, False, 200), (0.005, False, 40), (0.24, False, 20), (0.3, False, 10), (1.1, False, 3),
     (9, False, 1), (1e-4, True, 3)],
)  # fmt: skip
def test_repetitions(seconds, quick, n):
    assert measure.repetitions(seconds, quick=quick) == n


def test_unit_and_work_are_timed_in_turn():
    calls = []

    class Clock(measure.Meter):
        def time(self, work):
            work()
            return {"unit": 2.0, "work": 3.0}[calls[-1]] + len(calls)

    timed = measure.interleaved(
        lambda: calls.append("unit"), lambda: calls.append("work"), 5, Clock("cpu")
    )
    assert calls == ["unit", "work"] * 6  # the first of each warms up
    assert timed == {"unit": 2.0 + 7, "seconds": 3.0 + 8, "repetitions": 5}


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
        "memory_allocated", "reset_peak_memory_stats", "synchronize", "work", "synchronize",
        "max_memory_allocated",
    ]  # fmt: skip
    plan = list(bench.beside(["cpu", "cuda"], quick=True))
    assert {case.device for _, case, _ in plan} == {"cpu", "cuda"}
    asked = []
    monkeypatch.setattr(bench, "attempt", lambda *a: asked.append(a) or {"status": "failed"})
    bench.carry_out(iter([("unit", Case("mlp", 1, "cuda"), {})]), [1, 2], "")
    assert asked[0][-1] == [1]  # the threads of the CPU are no matter there


def test_parts_of_a_batch_are_averaged_by_their_sizes():
    call = measure.streamed(lambda x, _: {"I": {"w": x.mean(0)}}, 2)
    x = torch.tensor([[1.0], [3.0], [8.0]])
    assert call(x, x)["I"]["w"].item() == pytest.approx(4.0)
    whole = measure.streamed(lambda x, _: {"I": {"w": x.mean(0)}}, None)
    assert whole(x, x)["I"]["w"].item() == pytest.approx(4.0)


def test_products_are_counted():
    model = torch.nn.Linear(5, 3, bias=False)
    x, y = torch.ones(7, 5), torch.zeros(7, dtype=torch.long)
    # forward 2·7·5·3, and the same for the gradient; none for that of the input
    assert measure.count_flops(lambda: candidates.unit(model)(x, y)) == 4 * 7 * 5 * 3


def test_products_in_place_are_counted_like_the_others():
    a, b, c = torch.ones(4, 3), torch.ones(3, 5), torch.zeros(4, 5)
    for work in (lambda: a @ b, lambda: torch.addmm(c, a, b), lambda: c.addmm_(a, b)):
        assert measure.count_flops(work) == 2 * 4 * 3 * 5
    batch = torch.zeros(2, 4, 5)
    assert measure.count_flops(
        lambda: batch.baddbmm_(*(t.expand(2, *t.shape) for t in (a, b)))
    ) == (2 * 2 * 4 * 3 * 5)
    assert measure.count_flops(lambda: c.add_(1)) == 0


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
    timed = {"unit": 0.01, "seconds": 0.01 * (ratio or 0), "repetitions": 20, "ratio": ratio}
    measured = {
        "status": "measured", "times": {"1": timed}, "memory_mb": 12.3, "flops": 30,
        "unit_flops": 20, "counted_inputs": 10, "difference": 1e-7, "agrees": True,
    }  # fmt: skip
    return {
        "candidate": candidate, "network": network, "batch": batch, "device": "cpu",
        **(measured if ratio else {}), **more,
    }  # fmt: skip


def made_up(**changed):
    """What a run may have found: everything reached, but for what ``changed`` says."""
    costs = {
        "unit": 1, "ours-fisher": 1.9, "ours-first": 3.4, "ours-all": 5.4, "ours-i1-1": 2.0,
        "ours-i1-5000": 2.2, "ours-i2-1": 3.0, "ours-i2-5000": 3.3, "backpack-fisher": 5.9,
        "nngeometry-fisher": 10.8,
    } | {k.replace("_", "-"): v for k, v in changed.items()}  # fmt: skip
    peers = [row(key, cost) for key, cost in costs.items()]
    peers += [row("ours-all", 20.0, batch=1), row("backpack-all", 220.0, batch=1)]
    peers += [
        row("ours-fisher", 4.0, "lenet"), row("backpack-fisher", 7.0, "lenet"),
        row("ours-all", 9.0, "lenet", 1), row("backpack-all", 900.0, "lenet", 1),
        row("backpack-hessian", 100.0, "lenet", 1),
        row("backpack-hessian", network="lenet", status="skipped", why="memory",
            predicted={"seconds": 9.0, "mb": 48_000.0}),
        row("curvlinops-exact", status="skipped", why="time",
            predicted={"seconds": 7_200.0, "mb": 5.0}),
        row("jacrev-fisher", status="not installed", why="pip install torch"),
        row("backpack-mc", status="failed", why="ValueError: oh"),
    ]  # fmt: skip
    return {
        "record": {
            "started": "2001-02-03T04:05:06Z", "seconds": 600.0, "commit": "abc", "source": "old",
            "quick": False, "load": 0.25, "versions": {"torch": "2.13"},
            "machine": {"processor": "a processor", "cores": 2, "gpu": ""},
        },
        "networks": {"mlp": "the MLP", "lenet": "the LeNet"},
        "peak": {"cpu 1": 1e9, "cuda": 1e12},
        "peers": peers,
        "costs": [
            row("ours-all", 5.0, series="classes C", point=10),
            row("ours-all", series="classes C", point=1000, status="skipped", why="time",
                predicted={"seconds": 90.0, "mb": 1.0}),
            row("ours-i1-1", 2.0, series="labels N", point=1, line="Î₁"),
        ],
        "approximate": [
            row("auto", 5.0, "9-8"), row("hesscale", 4.0, "9-8", errors={"0": 0.25, "2": 1e-9}),
        ],
    }  # fmt: skip


def lines_with(text, *words):
    return [line for line in text.splitlines() if all(word in line for word in words)]


def test_the_page_says_what_was_found():
    text = tables.benchmark_page(made_up())
    assert "Measured on 2001-02-03 at commit abc, in 10 min, on a processor, 2 cores" in text
    assert "`fimlib` has changed since" in text
    assert "takes 1.9 times one forward and backward pass here, and 5.9 times" in text
    assert "the exact value 0.95 times the cheapest estimate from one label" in text
    others = [row("backpack-mc", 1.0) if r["candidate"] == "backpack-mc" else r
              for r in made_up()["peers"]]  # fmt: skip
    cheaper = made_up() | {"peers": others}
    assert "the exact value 1.9 times the cheapest estimate" in tables.benchmark_page(cheaper)
    [line] = lines_with(text, "**fimlib**", "exact diagonal", "1.9 ×")
    assert "1.9 ×, 12 MB" in line
    assert "| 1.5 " in line  # products
    assert "1e-07" in line
    assert lines_with(text, "forward + backward", "10 ms, 12 MB")
    assert lines_with(text, "basis vectors", "skipped: 2 h predicted")
    assert lines_with(text, "one pass", "skipped: 48 GB predicted")
    assert lines_with(text, "vmap(jacrev)", "not installed: `pip install torch`")
    assert lines_with(text, "* BackPACK DiagGGNMC, B = 1,000: ValueError: oh")
    assert lines_with(text, "everything", "5 ×, 12 MB", "skipped: 90 s predicted")
    assert lines_with(text, "| Î₁ ", "2 ×, 12 MB")
    assert lines_with(text, "| hesscale ", "4 ×", "25.0%", "| exact")
    assert "**missed**" not in text
    assert len(lines_with(text, "| reached |")) == len(targets.TARGETS)


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"ours_fisher": 2.01}, "exact diagonal I, in units"),
        ({"ours_first": 3.6}, "I, Varₓ I and V₁"),
        ({"ours_all": 5.6}, "Varₓ I, V₁ and V₂, in units"),
        ({"ours_i1_5000": 2.5}, "Î₁ from 5,000 labels"),
        ({"ours_i2_1": 2.7}, "Î₂ from 5,000 labels"),
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
        ("backpack-all", "mlp", 1, 199.0, "a single input"),
        ("backpack-fisher", "lenet", 1000, 5.9, "DiagGGNExact"),
        ("backpack-all", "lenet", 1, 89.0, "passes for V₂"),
        ("backpack-hessian", "lenet", 1, 89.0, "a single pass"),
    ],
)
def test_how_many_times_faster_is_a_target_too(candidate, network, batch, ratio, missed):
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
    [line] = lines_with(text, "**fimlib**", "exact diagonal", "**differs: 0.5**")
    assert "other values" in line
    assert "1.9 ×" not in line
    assert lines_with(text, "exact diagonal I, in units", "not measured", "open")


def test_few_repetitions_are_told():
    r = row("ours-all", 50.0)
    r["times"]["1"]["repetitions"] = 3
    assert tables.cell(r, "1") == "50 ×, 12 MB, n = 3"
    assert tables.cell(r, "2") == ""
    assert tables.cell(None, "1") == ""


def test_a_gpu_s_times_stand_beside_the_roofline():
    found = made_up()
    found["peers"].append(row("ours-fisher", 2.0, device="cuda"))
    text = tables.benchmark_page(found)
    # 30 operations for 10 inputs, at 1e12 a second, for 1,000 inputs: 3 ns; it took 20 ms
    assert lines_with(text, "fimlib", "20 ms", "0.003 µs", "0%")
    assert "the MLP, on the GPU" in text
    assert "on the GPU" not in tables.benchmark_page(made_up())


def test_without_a_run_the_page_says_how_to_make_one(tmp_path):
    assert tables.read_benchmark(tmp_path / "bench.json") is None
    assert "make bench" in tables.benchmark_page(None)
    (tmp_path / "bench.json").write_text(json.dumps(made_up()))
    assert tables.read_benchmark(tmp_path / "bench.json") == made_up()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2e-6, "2 µs"), (0.0123, "12.3 ms"), (1.0, "1 s"), (119, "119 s"), (600, "10 min"),
     (7200, "2 h"), (36_000_000, "10,000 h")],
)  # fmt: skip
def test_durations(seconds, text):
    assert tables.duration(seconds) == text
