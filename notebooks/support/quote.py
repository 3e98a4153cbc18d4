"""Say what `make reproduce` will take on this machine, and what is done already; run nothing.

The times come from the records of runs made before, here or for ``data/reference``. Each is scaled
by the time of one small fixed piece of work, `speed.calibration`, here and when the run was made.
That work is the processor's: a time from a run without this machine's GPU says so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from support import checkpoint, cli, results, runs, speed
from support.report import REFERENCE
from support.results import Run
from support.runs import Spec

BEFORE = 4.0  # seconds that a run needs before its notebook starts counting, in older records
PYTHON = 3.0  # seconds that the runner needs to start
# Of the book, which has no record; what we saw, roughly. Its pages hold every run several times.
BOOK_SECONDS, BOOK_MB, COPIES = 60.0, 30.0, 4
DONE, BEGUN, TO_DO = "done", "begun", ""


class Quote(NamedTuple):
    """What a run will take; None where nothing is known."""

    name: str
    state: str
    seconds: float | None
    memory: float | None  # MB
    disk: float | None  # MB
    source: str  # which records say so


def quotes(
    plan: Mapping[str, Spec], folder: Path, reference: Path, dataset: str, here: float
) -> list[Quote]:
    """What every planned run will take; ``here`` is this machine's `speed.calibration`."""
    mine = results.load(folder, plan)
    known = results.load(reference, plan) | mine
    return [quote(spec, plan, known, state(spec, mine, folder, dataset), here)
            for spec in plan.values()]  # fmt: skip


def state(spec: Spec, mine: Mapping[str, Run], folder: Path, dataset: str) -> str:
    """Whether a run is done or begun here. Its data are taken to be what they were."""
    if run := mine.get(spec.name):
        digest = run.record["data"].get("digest", "none")
        if run.record.get("fingerprint") == runs.fingerprint(spec, dataset, digest):
            return DONE
    saved = (folder / ".partial" / spec.name).glob(f"*/{checkpoint.FILE}")
    return BEGUN if any(saved) else TO_DO


def quote(
    spec: Spec, plan: Mapping[str, Spec], known: Mapping[str, Run], state: str, here: float
) -> Quote:
    """What one run will take: by its own record, else by its nearest relatives' median."""
    relatives, source = nearest(spec, plan, known)
    if not relatives:
        return Quote(spec.name, state, None, None, None, f"no record of {spec.notebook.name}")
    if not all("calibration" in run.record for run in relatives):
        source += ", scaled by nothing"
    if any(is_of_another_device(run.record) for run in relatives):
        source += ", made without this GPU"
    memory = [r.record["memory_mb"] for r in relatives if "memory_mb" in r.record]
    return Quote(
        spec.name,
        state,
        statistics.median(seconds(run.record, here) for run in relatives),
        statistics.median(memory) if memory else None,
        statistics.median(size(run.folder) for run in relatives),
        source,
    )


def nearest(
    spec: Spec, plan: Mapping[str, Spec], known: Mapping[str, Run]
) -> tuple[list[Run], str]:
    """The records that tell most of a run, and what they are."""
    fixed = {k: v for k, v in spec.parameters.items() if k not in spec.varied}
    same = {n: run for n, run in known.items() if plan[n].notebook == spec.notebook}
    alike = {n: run for n, run in same.items() if fits(fixed, run)}
    if spec.name in alike and fits(spec.parameters, alike[spec.name]):
        return [alike[spec.name]], "its own record"
    family = [run for n, run in alike.items() if plan[n].experiment == spec.experiment]
    if family:
        return family, f"runs of {spec.experiment}"
    return list(same.values()), f"runs of {spec.notebook.name} with other settings"


def is_of_another_device(record: Mapping[str, Any]) -> bool:
    """Whether the run would now take a GPU, and took none or another when it was recorded."""
    takes_gpu = record["parameters"].get("device") == "auto" and bool(speed.gpu())
    return takes_gpu and record.get("machine", {}).get("device") != speed.gpu()


def fits(parameters: Mapping[str, Any], run: Run) -> bool:
    """Whether a recorded run had these parameters."""
    return all(run.record["parameters"].get(k) == v for k, v in parameters.items())


def seconds(record: Mapping[str, Any], here: float) -> float:
    """Seconds that a recorded run would take here, from start to end."""
    wall = record.get("wall_seconds", record["seconds"] + BEFORE)
    return float((wall + PYTHON) * here / record.get("calibration", here))


def size(folder: Path) -> float:
    """MB that a folder's files take."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def makespan(times: Iterable[float], workers: int) -> float:
    """Seconds until all are done, in this order, if every free worker takes the next one."""
    busy = [0.0] * workers
    for time in times:
        busy[busy.index(min(busy))] += time
    return max(busy)


def text(found: Sequence[Quote], cores: int, runner: float) -> str:
    """The quote for a terminal.

    Args:
        found: What every run will take.
        cores: How many runs at once are quoted beside one at a time.
        runner: MB that the runner itself needs beside every run.
    """
    width = max(len(q.name) for q in found)
    rows = [f"{'':{width}}  {'time':>8}  {'memory':>8}  {'disk':>8}  by"]
    for q in found:
        cells = (show(q.seconds, duration), show(q.memory, amount), show(q.disk, amount))
        columns = "  ".join(f"{cell:>8}" for cell in cells)
        rows.append(f"{q.name:{width}}  {columns}  {q.source}{f' ({q.state})' if q.state else ''}")
    todo = [q for q in found if q.state != DONE]
    times = [q.seconds for q in todo if q.seconds is not None]
    memory = sorted((q.memory for q in todo if q.memory is not None), reverse=True)
    disk = sum(q.disk for q in todo if q.disk is not None)
    unknown = [q.name for q in todo if q.seconds is None]
    least = "at least " if unknown else ""
    rows += ["", f"done: {len(found) - len(todo)} of {len(found)} runs. To do:"]
    for jobs in sorted({1, cores}):
        together = sum(memory[:jobs]) + min(jobs, len(memory)) * runner
        time = duration(makespan(times, jobs) + BOOK_SECONDS)
        rows.append(
            f"  make reproduce JOBS={jobs}: {least}{time}, the book's {duration(BOOK_SECONDS)} "
            f"among them; memory: {amount(together) if memory else 'not known'}"
        )
    book = BOOK_MB + COPIES * sum(q.disk for q in found if q.disk is not None)
    rows.append(
        f"  disk: {amount(disk)} for results, about {amount(book)} for the book, and 12 MB for "
        "MNIST if it has to be downloaded"
    )
    if unknown:
        rows.append(f"  not known, and not in these sums: {', '.join(unknown)}")
    if any(q.state == BEGUN for q in todo):
        rows.append("  begun runs go on from their last checkpoint; they are quoted as a whole")
    return "\n".join(rows)


def show(value: float | None, form: Any) -> str:
    """A number in its form, or a question mark."""
    return "?" if value is None else str(form(value))


def duration(seconds: float) -> str:
    """Seconds or minutes."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def amount(mb: float) -> str:
    """MB or GB."""
    return f"{mb:.1f} MB" if mb < 10 else f"{mb:.0f} MB" if mb < 1000 else f"{mb / 1000:.1f} GB"


def machine(folder: Path) -> str:
    """This machine in a line: processor, GPU, memory, free space where results will lie."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6
    free = shutil.disk_usage(there).free / 1e6
    gpu = f"{speed.gpu()}, " if speed.gpu() else ""
    return (
        f"{results.processor()}, {speed.cores()} cores, {gpu}{amount(memory)} of memory, "
        f"{amount(free)} free on the disk; speed: {speed.calibration():.3f} s for a fixed piece of "
        "work"
    )


@cli.command(runs.RunError)
def main(argv: Sequence[str] | None = None) -> None:
    """Print the quote; see the module."""
    parser = argparse.ArgumentParser(prog="support.quote", description=__doc__)
    cli.add_results(parser)
    arguments = parser.parse_args(argv)
    folder = arguments.results.resolve()
    print(machine(folder), flush=True)
    plan = runs.specs(smoke=arguments.smoke)
    found = quotes(plan, folder, REFERENCE, arguments.dataset, speed.calibration())
    print(text(found, speed.at_a_time(), results.peak_memory()))


if __name__ == "__main__":
    sys.exit(main())
