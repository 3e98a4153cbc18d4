"""What the commands share: mistakes end with one line on the terminal, not with a traceback."""

from __future__ import annotations

import argparse
import errno
import functools
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from support import results

Main = Callable[[Sequence[str] | None], None]
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)


def command(*mistakes: type[Exception]) -> Callable[[Main], Callable[..., int]]:
    """Let a main function return an exit status: 1 after a mistake, 130 after Ctrl-C.

    Args:
        mistakes: Errors whose message says why something cannot be done, and what to do.
    """

    def decorate(main: Main) -> Callable[..., int]:
        @functools.wraps(main)
        def guarded(argv: Sequence[str] | None = None) -> int:
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, io.TextIOWrapper):
                    stream.reconfigure(errors="replace")  # a terminal may not know λ
            try:
                main(argv)
            except BrokenPipeError:  # as of `make report | head`
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            except mistakes as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
            except OSError as error:
                print(f"error: {remedy(error)}", file=sys.stderr)
                return 1
            except KeyboardInterrupt:
                print(
                    "\ninterrupted: what is finished is kept; run again to go on.", file=sys.stderr
                )
                return 130
            return 0

        return guarded

    return decorate


def remedy(error: OSError) -> str:
    """What to do about an error of the operating system."""
    what = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    if error.errno in FULL:
        text = f"the disk is full: {what}\nFree some space"
    elif error.errno in CLOSED:
        text = f"no permission to write: {what}\nMake the folder writable"
    else:
        text = f"the system reports: {what}\nMend that"
    return f"{text}, and run again: what is finished is kept."


def add_results(parser: argparse.ArgumentParser) -> None:
    """Let a command be told which results it is about."""
    parser.add_argument("--smoke", action="store_true", help="at smoke size")
    parser.add_argument("--dataset", default="mnist", choices=("mnist", "digits"))
    parser.add_argument("--results", type=Path, default=results.ROOT / "results" / "mnist")
