"""One measurement, in a process of its own: time against the unit, memory, and the values.

The process does nothing else, so its memory is the candidate's. A prediction from small batches
comes first; what would take too long or too much is not run.
"""

from __future__ import annotations

import copy
import ctypes
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fimlib.engines.choose import differentiator
from support import results
from support.bench import agreement, candidates, networks
from support.bench.candidates import Call, Candidate, Values

LIMIT_SECONDS, LIMIT_MB = 60.0, 8000.0
SLOW = 3.0  # seconds; what takes longer is done once, and on one thread only
CHECKED = 16  # inputs at which values are compared
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Where a candidate is measured.

    Attributes:
        network: A name, or the widths of an MLP.
        batch: B, the inputs.
        device: "cpu" or "cuda".
        quick: The tiny networks, and three repetitions.
        check: Whether values are compared.
    """

    network: str | tuple[int, ...]
    batch: int
    device: str = "cpu"
    quick: bool = False
    check: bool = True


def measure(key: str, case: Case, threads: Sequence[int]) -> Row:
    """Measure a candidate in a case; the row says what came of it (``status``)."""
    candidate = candidates.CANDIDATES[key]
    row = heading(key, case)
    try:
        return row | _measure(candidate, case, threads)
    except ImportError:
        if not candidate.package:
            raise
        return row | {"status": "not installed", "why": f"pip install {candidate.package}"}
    except (torch.OutOfMemoryError, NotImplementedError, RuntimeError, ValueError) as error:
        return row | {"status": "failed", "why": f"{type(error).__name__}: {error}"[:300]}


def heading(key: str, case: Case) -> Row:
    """What a row is about."""
    network = case.network if isinstance(case.network, str) else "-".join(map(str, case.network))
    return {"candidate": key, "network": network, "batch": case.batch, "device": case.device}


def _measure(candidate: Candidate, case: Case, threads: Sequence[int]) -> Row:
    warnings.simplefilter("ignore")  # torch's and the libraries' notices on hooks
    keep_freed()
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, as in matrix products
    network = networks.network(case.network, quick=case.quick)
    model, x, y = networks.problem(network, case.batch, case.device)
    yardstick, passes = candidates.unit(copy.deepcopy(model)), candidate.passes(model)
    call = streamed(candidate.prepare(copy.deepcopy(model), network), candidate.chunk(network))
    for work in (yardstick, call):  # warm up: what the libraries load and keep is not counted
        work(x[:1], y[:1])
    meter = Meter(case.device)
    found: Row = {"passes": passes}
    chunk = candidate.chunk(network) or len(x)
    predicted = predict(call, x, y, meter, passes, 0 if candidate.bounded else min(chunk, len(x)))
    if predicted["seconds"] > LIMIT_SECONDS or predicted["mb"] > LIMIT_MB:
        why = "time" if predicted["seconds"] > LIMIT_SECONDS else "memory"
        return found | {"status": "skipped", "why": why, "predicted": predicted}
    once, found["memory_mb"] = meter.run(lambda: call(x, y))
    found["times"] = {}
    for number in threads if once * passes < SLOW else threads[:1]:
        torch.set_num_threads(number)
        n = repetitions(once * passes, quick=case.quick)
        if n == 1:  # too long to be done again
            units = [meter.time(lambda: yardstick(x, y)) for _ in range(3)]
            timed = {"unit": statistics.median(units), "seconds": once, "repetitions": 1}
        else:
            timed = interleaved(lambda: yardstick(x, y), lambda: call(x, y), n, meter)
        timed["seconds"] *= passes
        found["times"][str(number)] = timed | {"ratio": timed["seconds"] / timed["unit"]}
    torch.set_num_threads(threads[0])
    found["flops"] = count_flops(lambda: call(x[:CHECKED], y[:CHECKED])) * passes
    found["counted_inputs"] = len(x[:CHECKED])
    found["unit_flops"] = count_flops(lambda: yardstick(x[:CHECKED], y[:CHECKED]))
    if case.check:
        found |= agreement.compare(candidate, call, model, x[:CHECKED], y[:CHECKED])
    return found | {"status": "measured"}


# Time and memory.


class Meter:
    """Runs work, and tells how long it took and how much memory it added."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        give_back()
        self.base = self._now()

    def run(self, work: Callable[[], object]) -> tuple[float, float]:
        """Seconds, and the MB (10⁶ bytes) at the peak beyond those at the start."""
        self._reset()
        seconds = self.time(work)
        return seconds, max(0.0, self._peak() - self.base) / 1e6

    def time(self, work: Callable[[], object]) -> float:
        """Seconds."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize()

    def _now(self) -> float:
        return torch.cuda.memory_allocated() if self.cuda else resident("VmRSS")

    def _peak(self) -> float:
        return torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")

    def _reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            give_back()
            with suppress(OSError):  # elsewhere than on Linux: the peak since the start
                Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> float:
    """Bytes of this process's memory, now (VmRSS) or at the peak (VmHWM)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024.0 * int(x.split()[1]) for x in lines if x.startswith(field))
    except (OSError, StopIteration):
        return 1e6 * results.peak_memory()


def keep_freed() -> None:
    """Let the allocator keep what is freed, for all candidates alike.

    By default glibc gives it back to the system after nearly every call, and the time to get it
    again, page by page, depends on what else the process has done before.
    """
    with suppress(OSError, AttributeError):  # no glibc
        trim_threshold, mmap_threshold, libc = -1, -3, ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**30)
        libc.mallopt(mmap_threshold, 2**30)


def give_back() -> None:
    """Let the allocator return what is free, so that it is not counted as held."""
    with suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def repetitions(seconds: float, *, quick: bool) -> int:
    """At least 20 where one takes less than a quarter of a second, fewer of longer ones."""
    if quick:
        return 3
    if seconds < 0.25:
        return max(20, min(200, int(0.2 / max(seconds, 1e-6))))
    return max(3, int(3 / seconds)) if seconds < SLOW else 1


def interleaved(
    yardstick: Callable[[], object], work: Callable[[], object], n: int, meter: Meter
) -> Row:
    """Medians of n repetitions in turn, after one of each that warms up if they are short."""
    if n > 1:
        yardstick(), work()
    times = [(meter.time(yardstick), meter.time(work)) for _ in range(n)]
    units, works = zip(*times, strict=True)
    return {
        "unit": statistics.median(units),
        "seconds": statistics.median(works),
        "repetitions": n,
    }


def predict(
    call: Call, x: Tensor, y: Tensor, meter: Meter, passes: int, held: int
) -> dict[str, float]:
    """Seconds and MB of all inputs, on a straight line through two smaller batches.

    Batches grow eightfold while that is cheap. Memory grows up to ``held`` inputs only.
    """
    points: list[tuple[int, float, float]] = []
    predicted = {"seconds": 0.0, "mb": 0.0}
    size = 1
    while size == 1 or (size <= len(x) // 4 and points[-1][1] < 0.5):
        if len(points) > 1 and line(points, 1, min(size, held))[1] > LIMIT_MB:
            break
        runs = [meter.run(lambda n=size: call(x[:n], y[:n]))]  # type: ignore[misc]
        if runs[0][0] < 0.5:
            runs.append(meter.run(lambda n=size: call(x[:n], y[:n])))  # type: ignore[misc]
        points.append((size, min(s for s, _ in runs), max(mb for _, mb in runs)))
        predicted["seconds"] = line(points, passes, len(x))[0]
        predicted["mb"] = line(points, passes, max(held, size))[1]
        size *= 8
    return predicted | {"from": float(points[-1][0])}


def line(points: Sequence[tuple[int, float, float]], passes: int, size: int) -> tuple[float, float]:
    """Seconds and MB at a size, from the last two points (one: in proportion)."""
    (b, *at_b), (a, *at_a) = points[-1], points[-2] if len(points) > 1 else (0, 0.0, 0.0)
    seconds, mb = (
        late + max(0.0, late - early) / (b - a) * (size - b)
        for early, late in zip(at_a, at_b, strict=True)
    )
    return seconds * passes, mb


def streamed(call: Call, chunk: int | None) -> Call:
    """The same over parts of the batch, one after the other, averaged."""
    if chunk is None:
        return call

    def parts(x: Tensor, y: Tensor) -> Iterator[tuple[Values, int]]:
        for one, labels in zip(x.split(chunk), y.split(chunk), strict=True):
            yield call(one, labels), len(one)

    return lambda x, y: candidates.average(parts(x, y))


class FlopCounter(TorchDispatchMode):
    """Counts the multiplications and additions of matrix products and convolutions."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # what works in place counts like what does not
        name = func.overloadpacket.__name__.removesuffix("_")
        packet = getattr(torch.ops.aten, name, func.overloadpacket)
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return result


def count_flops(work: Callable[[], object]) -> int:
    """Multiplications and additions of the products in ``work``."""
    with FlopCounter() as counter:
        work()
    return int(counter.flops)


def matmul_speed(device: str, threads: int, quick: bool) -> float:
    """Multiplications and additions a second in a large float32 matrix product."""
    torch.set_num_threads(threads)
    size = 64 if quick else 8192 if device == "cuda" else 1536
    a, meter = torch.ones(size, size, device=device), Meter(device)
    meter.time(lambda: a @ a)
    return 2 * size**3 / statistics.median(meter.time(lambda: a @ a) for _ in range(5))


def layer_errors(method: str, case: Case) -> dict[str, float]:
    """The error of V₂ in each layer, S by a recursion of diagonals."""
    torch.set_num_threads(1)
    network = networks.network(case.network, quick=case.quick)
    model, x, _ = networks.problem(network, case.batch, "cpu")
    return agreement.layer_errors(method, model, x)


def confirmation(case: Case, order: int) -> Row:
    """What the check of a first batch adds to it, in units of a training step, on one thread.

    A batch that ``accumulate`` meets first is confirmed, the next one of the same kind is not.
    """
    torch.set_num_threads(1)
    network = networks.network(case.network, quick=case.quick)
    model, x, y = networks.problem(network, case.batch, case.device)
    yardstick = candidates.unit(copy.deepcopy(model))
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
