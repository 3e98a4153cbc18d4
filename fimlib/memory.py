"""How much memory a step may take, and how much it does take."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BATCH_BYTES = 256 * 2**20  # of all that one batch of ``accumulate`` takes
KEPT_BYTES = 31 * 2**20  # glibc learns from blocks of less than 32 MiB
TRACE_NUMBERS = 2**27  # B·T⁴ of ``corollary_4_6``: 1 GiB in float64
PROBE_NUMBERS = 2**24  # in the means of all probes, of a few inputs: 128 MB
JACOBIAN_NUMBERS = 2**23  # of J, where V₂ is estimated: 64 MB


def out_of_memory(error: Exception) -> MemoryError | torch.OutOfMemoryError | None:
    """The error to raise if memory is full, else None; torch has no class for the CPU's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return error
    if not isinstance(error, RuntimeError) or "DefaultCPUAllocator" not in str(error):
        return None
    size = re.search(r"allocate (\d+) bytes", str(error))
    return MemoryError(f"torch needs {int(size[1]) / 2**30:,.1f} GiB more" if size else str(error))


def raise_if_out_of_memory(error: Exception) -> None:
    """Raise the error if memory is full.

    Raises:
        MemoryError: on the CPU.
        torch.OutOfMemoryError: on a GPU.
    """
    if (full := out_of_memory(error)) is not None:
        raise full


def keep_freed_memory() -> None:
    """Teach glibc to keep blocks of this size when they are freed; elsewhere it does nothing.

    By default it gives the memory of nearly every array back, and gets it again page by page.
    """
    torch.empty(KEPT_BYTES, dtype=torch.uint8, device="cpu")


class LiveBytes(TorchDispatchMode):
    """Follows the memory of the tensors that are made inside it.

    Args:
        given: Tensors whose views are not counted.

    Attributes:
        live: Bytes of those that exist.
        peak: The most so far.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: dict[int, Any] = {t.untyped_storage()._cdata: t for t in given}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: else torch imports its compiler at the first use, which takes two seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in [result] if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self.live += size
            # not weakref.finalize, which would stay for as long as the storage
            self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


def live_bytes(work: Callable[[], object]) -> int:
    """The most bytes of tensors that live at one time in ``work``."""
    live = LiveBytes()
    with live:
        work()
    return live.peak


class BatchSize:
    """How many inputs to take at a time: ``now``. Once a batch was measured, as many as fit.

    ``room`` are the bytes that a batch may take; None: the size stays.
    """

    def __init__(self, now: int, room: int | None = None) -> None:
        self.now, self.room = now, room

    @contextmanager
    def measured(self, *, wanted: bool) -> Iterator[None]:
        """Around a batch of this size: the next may take all the room, if that is wanted."""
        if self.room is None or not wanted:
            yield
            return
        live = LiveBytes()
        with live:
            yield
        self.now = max(1, self.now * self.room // max(1, live.peak))
        if 2 * live.peak > self.room:
            self.room = None
