"""Choose the data, make the runs that are missing, build the book, say what reproduced.

This is `make reproduce`. Every run is a process of its own, ``python -m support.runs NAME``; as
many go on at a time as cores and memory allow. The data set is chosen once and handed on to all of
them, so that another `make` beside this one changes nothing here. With ``--name`` it is `make run`:
one run or fork, and the book.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fimlib._signals import later
from support import book, cli, data, forks, quote, report, results, runs, speed
from support.quote import Quote
from support.runs import RunError

CHOICE = ".dataset"  # in the folder of results: the data set last chosen
PAUSE = 0.2  # seconds between two looks at the processes
PATIENCE = 30.0  # seconds without a line on the progress of all runs
# Of a run of which nothing is known: seconds, and MB.
SECONDS, MEMORY = 60.0, 1500.0


class Running(NamedTuple):
    """A run under way."""

    quote: Quote
    process: subprocess.Popen[bytes]
    since: float


@dataclass
class Pool:
    """Makes runs, several at a time."""

    queue: list[Quote]  # what each run will take; the first one that fits is started next
    done: int  # how many are finished
    jobs: int  # how many may go on at a time
    memory: float  # MB that all of them may take together; one goes on in any case
    start: Callable[[str], subprocess.Popen[bytes]]  # starts the process of a run
    rough: bool = False  # whether the quotes are of another size of run: they alone tell no time
    running: list[Running] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    took: float = 0.0  # seconds, by the runs that were finished here
    quoted: float = 0.0  # seconds that were quoted for these
    told: float = 0.0  # when progress was told last

    def __post_init__(self) -> None:
        self.queue = [*self.queue]
        self.total = self.done + len(self.queue)

    def work(self) -> list[str]:
        """Make all runs; after a failure no more are started. Returns the names that failed."""
        try:
            self.tell()
            while self.running or (self.queue and not self.failed):
                self.start_more()
                time.sleep(PAUSE)
                self.collect()
        except SystemExit:  # told to end: so are the runs
            for run in self.running:
                run.process.terminate()
            raise
        finally:
            for run in self.running:  # after Ctrl-C, which they got as well
                run.process.wait()
        return self.failed

    def start_more(self) -> None:
        """Start what fits beside the runs that are under way."""
        for one in [*self.queue]:
            taken = sum(needed(run.quote) for run in self.running)
            fits = len(self.running) < self.jobs and taken + needed(one) <= self.memory
            if not self.failed and (fits or not self.running):
                self.queue.remove(one)
                with later(signal.SIGTERM):  # or a run would be started and then forgotten
                    self.running.append(Running(one, self.start(one.name), time.monotonic()))

    def collect(self) -> None:
        """Note which runs have ended."""
        for run in [run for run in self.running if run.process.poll() is not None]:
            self.running.remove(run)
            if run.process.returncode:
                self.failed.append(run.quote.name)
            else:
                self.done += 1
                self.took += time.monotonic() - run.since
                self.quoted += run.quote.seconds or SECONDS
            self.tell()
        if time.monotonic() - self.told > PATIENCE:
            self.tell()

    def tell(self) -> None:
        """Print how far all runs are."""
        self.told = time.monotonic()
        under_way = f", {len(self.running)} under way" if self.running else ""
        seconds = self.seconds_left()
        left = f", about {quote.duration(seconds)} left" if seconds else ""
        print(f"=== {self.done} of {self.total} runs done{under_way}{left} ===", flush=True)

    def seconds_left(self) -> float | None:
        """How long it will take, by the quotes and by how far they were off so far."""
        if self.rough and not self.quoted:
            return None
        pace = self.took / self.quoted if self.quoted else 1.0
        now = time.monotonic()
        begun = [(r.quote.seconds or SECONDS) * pace - (now - r.since) for r in self.running]
        queued = [(q.seconds or SECONDS) * pace for q in self.queue]
        return quote.makespan([*(max(x, 0.0) for x in begun), *queued], self.jobs)


def needed(run: Quote) -> float:
    """MB that a run and its runner need."""
    return (run.memory or MEMORY) + results.peak_memory()


def in_order(quotes: Sequence[Quote]) -> list[Quote]:
    """The first run of the plan, which is Figure 1; then the longest ones first."""
    rest = sorted(quotes[1:], key=lambda q: q.seconds or SECONDS, reverse=True)
    return [*quotes[:1], *rest]


def make_all(
    folder: Path, dataset: str, digest: str, jobs: int, prefix: Sequence[str], *, smoke: bool
) -> None:
    """Make all runs of ``runs.yml`` that are not finished, so many jobs at a time.

    With 0 jobs: as many as fit, or all of them if a scheduler takes them. The prefix is a command
    that is put before every run, such as ``srun -n1``.

    Raises:
        RunError: one failed, or the plan is not as it should be.
    """
    plan = runs.specs(smoke=smoke)
    runs.select([*plan], plan)
    todo = [n for n, spec in plan.items() if not runs.is_finished(spec, folder, dataset, digest)]
    found = quote.quotes(plan, folder, report.REFERENCE, dataset, speed.calibration())
    queue = in_order([q for q in found if q.name in todo])
    memory = float("inf") if prefix else speed.free_memory()
    jobs = jobs or (len(plan) if prefix else speed.at_a_time())

    def start(name: str) -> subprocess.Popen[bytes]:
        command = [*prefix, *python("support.runs", name), *options(folder, dataset, smoke=smoke)]
        return subprocess.Popen(command, env=os.environ | {"SLURM_JOB_NAME": name})

    print(f"{jobs} runs at a time at most", flush=True)
    if failed := Pool(queue, len(plan) - len(todo), jobs, memory, start, rough=smoke).work():
        raise RunError(f"not made: {', '.join(failed)}, see above. What is finished is kept.")


def make_one(
    name: str, given: str, folder: Path, dataset: str, prefix: Sequence[str], *, smoke: bool
) -> None:
    """Make a fork or a run; end with its exit status if it fails."""
    command = [*prefix, *python("support.forks", "run", name, "--parameters", given)]
    command += options(folder, dataset, smoke=smoke)
    status = subprocess.call(command, env=os.environ | {"SLURM_JOB_NAME": name})
    if status:
        sys.exit(status)


def python(module: str, *arguments: str) -> list[str]:
    """The command that starts one of our modules."""
    return [sys.executable, "-m", module, *arguments]


def options(folder: Path, dataset: str, *, smoke: bool) -> list[str]:
    """What all commands about results are told."""
    return ["--dataset", dataset, "--results", str(folder), *(["--smoke"] if smoke else [])]


def choose(dataset: str) -> data.Dataset:
    """The data set to use; it is downloaded if need be."""
    found = data.load(data.resolve(dataset))
    print(f"data: {found.title}, SHA-256 {found.digest[:12]}", flush=True)
    return found


def launcher(text: str) -> list[str]:
    """The command that is put before every run.

    Raises:
        RunError: there is no such command.
    """
    found = shlex.split(text)
    if found and not shutil.which(found[0]):
        raise RunError(f"RUN starts with {found[0]}, which is no command here.")
    return found


def tell_to_end(*_: object) -> None:
    """A signal's handler."""
    sys.exit(128 + signal.SIGTERM)


@cli.command(RunError, data.DataError, book.BookError, ValueError)
def main(argv: Sequence[str] | None = None) -> None:
    """Reproduce; see the module."""
    parser = argparse.ArgumentParser(prog="support.reproduce", description=__doc__)
    parser.add_argument("--name", help="make this fork or run only, and the book")
    parser.add_argument("--parameters", default="", help="of the fork")
    parser.add_argument("--runs-only", action="store_true", help="neither book nor report")
    parser.add_argument("--smoke", action="store_true", help="at smoke size")
    parser.add_argument("--dataset", default="auto", help="auto (default), mnist or digits")
    parser.add_argument("--results", type=Path, default=results.ROOT / "results")
    parser.add_argument("--output", type=Path, default=book.BOOK, help="where _build will lie")
    parser.add_argument("--jobs", type=int, default=0, help="runs at a time; 0: as many as fit")
    parser.add_argument("--run", default="", help="a command to put before every run")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, tell_to_end)
    prefix, smoke = launcher(arguments.run), arguments.smoke
    if arguments.name is not None:
        forks.check_name(arguments.name)
    chosen = choose(arguments.dataset)
    folder = arguments.results.resolve() / chosen.name
    if arguments.name is not None:
        make_one(arguments.name, arguments.parameters, folder, chosen.name, prefix, smoke=smoke)
        book.make(folder, arguments.output, smoke=smoke)
        return
    arguments.results.mkdir(parents=True, exist_ok=True)
    results.write_text(arguments.results / CHOICE, f"{chosen.name}\n")
    make_all(folder, chosen.name, chosen.digest, arguments.jobs, prefix, smoke=smoke)
    if not arguments.runs_only:
        book.make(folder, arguments.output, smoke=smoke)
        report.report(folder, smoke=smoke)


if __name__ == "__main__":
    sys.exit(main())
