"""Signals that wait."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def later(number: int) -> Iterator[None]:
    """Hold a signal back for a moment; outside the main thread it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told: list[int] = []
    before = signal.signal(number, lambda one, _: told.append(one))
    try:
        yield
    finally:
        signal.signal(number, before)
        if told:
            signal.raise_signal(number)
