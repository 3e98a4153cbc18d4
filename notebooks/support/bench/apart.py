"""Work in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# Every process starts with the imports of a program that uses fimlib. A peer's own are made in the
# process before anything is timed.
PRELOAD = ["support.bench.measure"]


def apart(work: Callable[..., Any], *arguments: Any, limit: float = 600) -> Any:
    """The result of ``work`` in a fresh process.

    Raises:
        RuntimeError: it did not come: the work failed, or the system ended the process.
        TimeoutError: it took longer than ``limit`` seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            raise TimeoutError(f"no result after {limit:.0f} seconds")
        done, result = receiver.recv()
    except EOFError as error:
        process.join()
        raise RuntimeError(
            f"the process ended by itself (exit code {process.exitcode}); a negative one is a "
            "signal, and -9 mostly a lack of memory"
        ) from error
    finally:
        process.kill()
        process.join()
    if not done:
        raise RuntimeError(result)
    return result


def _send(sender: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        sender.send((True, work(*arguments)))
    except Exception as error:  # whatever it is, it is told where the work was asked for
        sender.send((False, f"{type(error).__name__}: {error}"))
