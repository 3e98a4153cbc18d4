"""One measurement, in a process of its own: time against the unit, memory, and the values.

The process does nothing before the first call, as when a user's program gets there: no warming up,
and no word to the allocator. What takes too long or too much is broken off.
"""

from __future__ import annotations

import copy
import ctypes
import resource
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fimlib.engines.choose import differentiator
from support import results
from support.bench import agreement, candidates, networks

LIMIT_SECONDS, LIMIT_MB = 30.0, 8000.0  # of a call
SLOW = 2.0  # seconds; what takes longer is measured on one thread only
Row = dict[str, Any]


class TooLong(BaseException):
    """A call takes longer than the limit; not an Exception, which the call itself may handle."""


@dataclass(frozen=True)
class Case:
    """Where a candidate is measured."""

    network: str | tuple[int, ...]  # a name, or the widths of an MLP
    batch: int  # B, the inputs
    device: str = "cpu"  # or "cuda"
    quick: bool = False  # the tiny networks, and three repetitions
    check: bool = True  # whether values are compared


def heading(key: str, case: Case) -> Row:
    """What a row is about."""
    network = case.network if isinstance(case.network, str) else "-".join(map(str, case.network))
    return {"candidate": key, "network": network, "batch": case.batch, "device": case.device}


def measure(key: str, case: Case, threads: int) -> Row:
    """Measure a candidate in a case; what is returned says what came of it (``status``)."""
    candidate = candidates.CANDIDATES[key]
    return within_limits(lambda: measure_whole(candidate, case, threads), candidate.package)


def within_limits(
    work: Callable[[], Row], package: str, seconds: float | None = None, *, of_cpu: bool = False
) -> Row:
    """The row that the work makes; or one that says why there is none.

    Args:
        work: What may take too long or too much, or fail.
        package: What pip calls the libraries that it needs; "" for torch and fimlib.
        seconds: How long the first call may take, by default ``LIMIT_SECONDS``.
        of_cpu: Whether these are seconds of the CPU, which other programs do not use up.
    """
    seconds = LIMIT_SECONDS if seconds is None else seconds
    try:
        with limits(seconds, of_cpu=of_cpu):
            return work()
    except ImportError:
        if not package:
            raise
        return {"status": "not installed", "why": f"pip install {package}"}
    except TooLong:
        return {"status": "skipped", "why": f"over {seconds:.0f} s"}
    except (MemoryError, RuntimeError, ValueError) as error:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            return {"status": "skipped", "why": f"over {LIMIT_MB / 1000:.0f} GB"}
        return {"status": "failed", "why": f"{type(error).__name__}: {error}"[:300]}


def measure_whole(candidate: candidates.Candidate, case: Case, threads: int) -> Row:
    """The calls of a candidate, and its values."""
    prepare_torch(threads)
    network = networks.network(case.network, quick=case.quick)
    model, x, y = networks.problem(network, case.batch, case.device)

    def fresh() -> Callable[[], object]:
        call = candidate.prepare(copy.deepcopy(model), network)
        return lambda: call(x, y)

    step = candidates.unit(copy.deepcopy(model), network)
    meter, passes = Meter(case.device), candidate.passes
    timed = calls(meter, fresh, lambda: step(x, y), lambda t: enough(t, case.quick))
    timed |= {key: timed[key] / passes for key in ("first", "seconds", "ratio")}
    found: Row = {"status": "measured", "times": {str(threads): timed}}
    if case.check and threads == 1:
        found |= agreement.compare(candidate, model, network, x, y)
    return found


def prepare_torch(threads: int) -> None:
    """So many threads, no notices, and float32 that is float32."""
    warnings.simplefilter("ignore")  # torch's and the libraries' notices on hooks
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False


def calls(
    meter: Meter,
    fresh: Callable[[], Callable[[], object]],
    step: Callable[[], object],
    are_enough: Callable[[Sequence[float]], bool],
    steps: int = 1,
) -> Row:
    """The first call of the process, and the later ones in turn with the unit.

    Args:
        meter: Measures them.
        fresh: Makes a call with a fresh copy of the model, so that nothing is remembered.
        step: The unit, a training step.
        are_enough: Whether there are enough later calls, by their seconds.
        steps: How many units are measured in turn with one call.
    """
    first = meter.time(fresh())
    for timer in (signal.ITIMER_REAL, signal.ITIMER_PROF):
        signal.setitimer(timer, 0)  # a later call may take a little longer
    second, mb = meter.run(fresh())
    step()
    _, unit_mb = meter.run(step)
    units, times = [meter.time(step) for _ in range(steps)], [second]
    while not are_enough(times):
        times.append(meter.time(fresh()))
        units += [meter.time(step) for _ in range(steps)]
    unit, seconds = statistics.median(units), statistics.median(times)
    return {
        "first": first / unit,
        "unit": unit,
        "seconds": seconds,
        "ratio": seconds / unit,
        "repetitions": len(times),
        "memory_mb": mb,
        "unit_memory_mb": unit_mb,
    }


def enough(times: Sequence[float], quick: bool) -> bool:
    """At least ten calls, or three where these take 4 s; up to a hundred of short ones."""
    total, n = sum(times), len(times)
    if quick or total > 4:
        return n >= 3
    return n >= 10 and (total > 1 or n >= 100)


@contextmanager
def limits(seconds: float, *, of_cpu: bool) -> Iterator[None]:
    """Break off what takes too long, and refuse memory beyond the limit."""

    def stop(*_: object) -> None:
        raise TooLong

    timer, alarm = (
        (signal.ITIMER_PROF, signal.SIGPROF) if of_cpu else (signal.ITIMER_REAL, signal.SIGALRM)
    )
    most, before = resource.RLIMIT_DATA, resource.getrlimit(resource.RLIMIT_DATA)
    handler = signal.signal(alarm, stop)
    signal.setitimer(timer, seconds)
    try:
        resource.setrlimit(most, (int(1e6 * LIMIT_MB + resident("VmData")), before[1]))
        yield
    finally:
        signal.setitimer(timer, 0)
        signal.signal(alarm, handler)
        resource.setrlimit(most, before)


def hopeless(rows: Sequence[Row], batch: int) -> Row | None:
    """A row for a larger batch, if smaller ones show on a straight line that it takes too long."""
    if rows and rows[-1]["status"] == "skipped":
        return {"status": "skipped", "why": rows[-1]["why"]}
    done = [(r["batch"], r["times"]["1"]["seconds"]) for r in rows if r["status"] == "measured"]
    if len(done) > 1:
        (a, early), (b, late) = done[-2:]
        if late + max(0.0, late - early) / (b - a) * (batch - b) > LIMIT_SECONDS:
            return {"status": "skipped", "why": f"over {LIMIT_SECONDS:.0f} s"}
    return None


# Time and memory.


class Meter:
    """Runs work, and tells how long it took by a clock, and how much memory it added."""

    def __init__(self, device: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.cuda, self.clock = device == "cuda", clock

    def run(self, work: Callable[[], object]) -> tuple[float, float]:
        """Seconds, and the MB (10⁶ bytes) at the peak beyond those at the start."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            give_back()
            with suppress(OSError):  # elsewhere than on Linux: the peak since the start
                Path("/proc/self/clear_refs").write_text("5")
        before = torch.cuda.memory_allocated() if self.cuda else resident("VmRSS")
        seconds = self.time(work)
        peak = torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")
        return seconds, max(0.0, peak - before) / 1e6

    def time(self, work: Callable[[], object]) -> float:
        """Seconds."""
        self.wait()
        start = self.clock()
        work()
        self.wait()
        return self.clock() - start

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize()


def resident(field: str) -> float:
    """Bytes of this process's memory, now (VmRSS) or at the peak (VmHWM)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024.0 * int(x.split()[1]) for x in lines if x.startswith(field))
    except (OSError, StopIteration):
        return 1e6 * results.peak_memory()


def give_back() -> None:
    """Let the allocator return what is free, so that it is not counted as held."""
    with suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def layer_errors(case: Case) -> dict[str, float]:
    """The error of V₂ in each layer, S by a recursion of diagonals."""
    torch.set_num_threads(1)
    network = networks.network(case.network, quick=case.quick)
    model, x, _ = networks.problem(network, case.batch, "cpu")
    return agreement.layer_errors(model, x)


def confirmation(case: Case, order: int) -> Row:
    """What the check of a first batch adds to it, in units of a training step, on one thread.

    A batch that ``accumulate`` meets first is confirmed, the next one of the same kind is not.
    """
    torch.set_num_threads(1)
    network = networks.network(case.network, quick=case.quick)
    model, x, y = networks.problem(network, case.batch, case.device)
    yardstick = candidates.unit(copy.deepcopy(model), network)
    rounds = []
    for _ in range(4 if case.quick else 12):
        again = differentiator(model, order=order)
        calls = (lambda: yardstick(x, y), *2 * [lambda: again(x).derivatives()])  # noqa: B023
        meter = Meter(case.device)
        rounds.append([meter.time(call) for call in calls])
        if len(rounds) > 1 and sum(rounds[-1]) > SLOW:
            break
    unit, first, next_one = (statistics.median(t) for t in zip(*rounds[1:], strict=True))
    return {
        **heading("check", case),
        "order": order,
        "unit": unit,
        "first": first / unit,
        "next": next_one / unit,
        "check": (first - next_one) / unit,
        "repetitions": len(rounds) - 1,
    }
