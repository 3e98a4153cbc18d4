"""``make bench``: measure everything, write ``data/bench.json``, print the tables.

Ratios only: every candidate is timed in turn with the unit, one forward pass, mean loss and
backward pass to all parameters of the same batch (float32, eval mode).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from support import results, runs, speed
from support.bench import apart, coverage, measure, networks, tables, today
from support.bench.candidates import CANDIDATES, DENSE, LABELS
from support.bench.measure import Case, Row

PACKAGES = ("numpy", "backpack-for-pytorch", "nngeometry", "curvlinops-for-pytorch")
PACKAGES_OF_TODAY = ("transformers", "peft")
CONFIRMED_BATCHES, QUICK_CONFIRMED = (8, 100, 1000), (8,)
QUICK = ("unit", "ours-fisher", "ours-estimate")  # where not all are measured
OURS = ("ours-fisher", "ours-first", "ours-all")
MLP, DEEP = (784, 128, 64, 32, 10), (784, *[64] * 7, 10)
Plan = Iterator[tuple[str, Case, Row]]  # candidate, where, and what else the row says


def beside(devices: Sequence[str], quick: bool) -> Plan:
    """The first table: every candidate on its networks, from the smallest batch on."""
    for device in devices:
        for name, network in (networks.QUICK if quick else networks.FULL).items():
            for key, candidate in CANDIDATES.items():
                batches = network.batches[1:2] if quick else network.batches
                if name not in candidate.on or (quick and name != "mlp" and key not in QUICK):
                    continue
                for batch in batches:
                    yield key, Case(name, batch, device, quick), {}


def varied(quick: bool) -> Plan:
    """The second table: one thing at a time, the rest as in the MLP of the experiment."""
    mlp, batch = ((12, 8, 4, 3), 8) if quick else (MLP, 100)
    first, *hidden, last = mlp
    series: dict[str, dict[int, tuple[tuple[int, ...], int]]] = {
        "inputs B": {b: (mlp, b) for b in ((1, 8) if quick else (1, 10, 100, 1000, 10_000))},
        "classes C": {
            c: ((first, *hidden, c), batch) for c in ((3, 9) if quick else (10, 100, 1000))
        },
        "hidden layers of 64 units": {
            d: ((first, *[64] * d, last), batch) for d in ((1, 2) if quick else (1, 2, 4, 8))
        },
        "units in each of 3 hidden layers": {
            w: ((first, w, w, w, last), batch) for w in ((4, 8) if quick else (64, 256, 1024))
        },
    }
    for name, points in series.items():
        for point, (widths, inputs) in points.items():
            for key in OURS[-1:] if quick else OURS:
                more = {"series": name, "point": point}
                yield key, Case(widths, inputs, quick=quick, check=False), more
    for n in LABELS[:2] if quick else LABELS:
        for j, estimator in enumerate(("Î₁", "Î₂"), start=1):
            more = {"series": "labels N", "point": n, "line": estimator}
            yield f"ours-i{j}-{n}", Case(mlp, 10 * batch, quick=quick, check=False), more


def approximate(quick: bool) -> Plan:
    """The fourth table: a recursion whose S is approximate, beside the exact S."""
    for widths in ((12, 8, 6, 5, 4, 3),) if quick else (MLP, DEEP):
        small = Case(widths, 16 if quick else 100)
        case = Case(widths, 16 if quick else 1000, quick=quick, check=False)
        yield "ours-v2", case, {}
        yield "hesscale", case, {"errors": attempt(measure.layer_errors, small)}


def confirmed(quick: bool) -> Row:
    """The fifth table: what the check of the first batch adds, and what made the measurement."""
    started, load, rows = time.time(), os.getloadavg()[0], []
    for network in (*DENSE, "lenet"):
        for batch in QUICK_CONFIRMED if quick else CONFIRMED_BATCHES:
            for order in (1, 2):
                row = attempt(measure.confirmation, Case(network, batch, quick=quick), order)
                rows.append(row)
                print(f"check, {network}, B = {batch:,}, order {order}: {row.get('check')}")
    return {"record": record(started, load, quick), "rows": rows}


def attempt(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a measurement in a process of its own; where it fails, a row that says so."""
    try:
        return apart.apart(work, *arguments)
    except (RuntimeError, TimeoutError) as error:
        return {"status": "failed", "why": str(error)}


def carry_out(
    plan: Plan, threads: Sequence[int], total: str, kept: Path | None = None
) -> list[Row]:
    """Measure, and say how it goes; what an interrupted run has kept is not measured again."""
    rows: list[Row] = []
    done = read_kept(kept)
    for key, case, more in plan:
        numbers = [1] if case.device == "cuda" else list(threads)
        where = {k: v for k, v in more.items() if k != "errors"}
        name = json.dumps([total, key, *dataclasses.astuple(case), numbers, where])
        if name in done:
            rows.append(done[name])
            continue
        head = measure.heading(key, case)
        smaller = [r for r in rows if all(r[k] == head[k] for k in head if k != "batch")]
        hopeless = None if more else measure.hopeless(smaller, case.batch)
        row = head | (hopeless or on_threads(key, case, numbers)) | more
        rows.append(row)
        if kept is not None and row["status"] in ("measured", "skipped"):
            with kept.open("a", encoding="utf-8") as file:
                # a line of its own, even where the one before it was cut short
                file.write("\n" + json.dumps([name, row], ensure_ascii=False))
        seen = tables.cell(row, "1")
        print(f"{total}, {row['network']}, B = {case.batch:,}, {key}: {seen}", flush=True)
    return rows


def on_threads(key: str, case: Case, numbers: Sequence[int]) -> Row:
    """One process for each number of threads; what takes long is measured on one only."""
    row: Row = {}
    for number in numbers:
        found = attempt(measure.measure, key, case, number)
        if row and found["status"] == "measured":
            row["times"] |= found["times"]
        row = row or found
        if row["status"] != "measured" or row["times"]["1"]["seconds"] > measure.SLOW:
            break
    return row


def read_kept(kept: Path | None) -> dict[str, Row]:
    """Rows by what they measure; a last line that was cut short is left out."""
    if kept is None or not kept.is_file():
        return {}
    done = {}
    for line in kept.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            name, row = json.loads(line)
            done[name] = row
    return done


def place(quick: bool) -> Path | None:
    """Where rows are kept until all are there, one file for everything that decides them."""
    if quick:
        return None
    made = [runs.fimlib_digest(), torch.__version__, *map(results.version, PACKAGES)]
    sources = sorted(Path(__file__).parent.glob("*.py"))
    made += [source.read_text(encoding="utf-8") for source in sources]
    digest = hashlib.sha256(json.dumps(made).encode()).hexdigest()[:12]
    found = results.ROOT / "results" / f"bench-{digest}.jsonl"
    found.parent.mkdir(parents=True, exist_ok=True)
    return found


def run(quick: bool, of: Collection[str]) -> Row:
    """All measurements on these networks, and what made them; the curves with all networks only."""
    if quick:
        apart.PRELOAD.append("torch._dynamo")  # seconds, at the first call of torch.func
    kept = place(quick)
    started, load = time.time(), os.getloadavg()[0]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    threads = [1] if quick else sorted({1, speed.cores()})
    every = networks.QUICK if quick else networks.FULL
    is_whole = set(of) == set(every)
    peers = (plan for plan in beside(devices, quick) if plan[1].network in of)
    found: Row = {
        "networks": {key: every[key].title for key in of},
        "peers": carry_out(peers, threads, "beside others", kept),
        "costs": carry_out(varied(quick) if is_whole else iter(()), [1], "cost", kept),
        "approximate": carry_out(approximate(quick), [1], "approximate", kept),
        "check": confirmed(quick),
    }
    if kept is not None:
        kept.unlink(missing_ok=True)
    return {"record": record(started, load, quick)} | found


def of_today(quick: bool) -> Row:
    """Networks of today, and what made the measurement."""
    apart.PRELOAD.append("support.bench.preload")
    started, load = time.time(), os.getloadavg()[0]
    held = apart.apart(coverage.rows, quick)
    found = {"rows": today.rows(quick, attempt), "coverage": held}
    packages = [p for p in ("numpy", *PACKAGES_OF_TODAY) if results.version(p) != "unknown"]
    return {"record": record(started, load, quick, packages)} | found


def record(started: float, load: float, quick: bool, packages: Collection[str] = PACKAGES) -> Row:
    """What made the measurements."""
    made = results.record({"quick": quick}, {}, started, torch.device("cpu"))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "started": made["started"],
        "seconds": made["seconds"],
        "commit": made["commit"],
        "source": runs.fimlib_digest(),
        "quick": quick,
        "load": load,
        "limits": {"seconds": measure.LIMIT_SECONDS, "mb": measure.LIMIT_MB},
        "machine": made["machine"] | {"cores": speed.cores(), "gpu": gpu},
        "versions": {"python": made["versions"]["python"], "torch": torch.__version__}
        | {package: results.version(package) for package in packages},
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, write, print; see the module."""
    parser = argparse.ArgumentParser(prog="support.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny networks, some seconds")
    parser.add_argument("--output", type=Path, help="where to write (default: data/bench.json)")
    parser.add_argument("--check", action="store_true", help="only what the check costs, anew")
    parser.add_argument("--today", action="store_true", help="only the networks of today")
    parser.add_argument(
        "--networks", nargs="*", default=[*networks.FULL], choices=[*networks.FULL], metavar="NAME",
        help=f"some of {', '.join(networks.FULL)}: the whole takes about an hour",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    of = [*networks.QUICK] if arguments.quick else arguments.networks
    kind = "today" if arguments.today else "bench"
    output = arguments.output or (
        results.ROOT / "results" / f"{kind}-quick.json" if arguments.quick
        else today.FOUND if arguments.today else tables.FOUND
    )  # fmt: skip
    try:
        if arguments.today:
            found = of_today(arguments.quick)
        elif arguments.check:
            found = {
                **(tables.read_benchmark(output) or {}),
                "check": confirmed(arguments.quick),
            }
        else:
            found = run(arguments.quick, of)
        output.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(output, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    except KeyboardInterrupt:
        later = "nothing was written" if arguments.today else "the same command goes on from here"
        print(f"\ninterrupted: {later}.", file=sys.stderr)
        return 130
    except (OSError, RuntimeError) as error:
        print(f"error: {error}; nothing was written.", file=sys.stderr)
        return 1
    page = (
        today.page if arguments.today
        else tables.confirmation if arguments.check else tables.terminal
    )  # fmt: skip
    print(f"\n{page(found)}\nwritten: {os.path.relpath(output)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
