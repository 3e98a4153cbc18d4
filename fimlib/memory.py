"""How much memory a step may take, and how much it does take."""

from __future__ import annotations

import weakref
from collections.abc import Callable
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


def keep_freed_memory() -> None:
    """Teach glibc to keep blocks of this size when they are freed; elsewhere it does nothing.

    By default it gives the memory of nearly every array back, and gets it again page by page.
    """
    torch.empty(KEPT_BYTES, dtype=torch.uint8, device="cpu")


class LiveBytes(TorchDispatchMode):
    """Follows the memory of the tensors that are made inside it.

    Attributes:
        live: Bytes of those that exist.
        history: The same, after every operation so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.history: list[int] = []
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        self.history.append(self.live)
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


def default_batch_size(work: Callable[[Tensor], None], x: Tensor) -> int:
    """How many inputs like x, [1, ...], ``work`` takes in about 256 MB of tensors; at least 1.

    It is tried on copies of x. What an input adds to every operation is compared, since what any
    batch takes, as copies of the weights, may hide the growth of the peak.
    """
    one, two = live_bytes(work, x), live_bytes(work, x.expand(2, *x.shape[1:]))
    if 2 * (max(two) - max(one)) >= BATCH_BYTES:
        return 1
    three = live_bytes(work, x.expand(3, *x.shape[1:]))
    added = max(b - a for a, b in zip(two, three, strict=False))
    return max(1, BATCH_BYTES // max(1, added))


def live_bytes(work: Callable[[Tensor], None], x: Tensor) -> list[int]:
    """Bytes of the tensors that live after every operation of ``work``."""
    live = LiveBytes()
    with live:
        work(x)
    return live.history
