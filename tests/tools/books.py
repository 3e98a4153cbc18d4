"""Small books, built in this process: an own one would spend its time on imports."""

import contextlib
import io
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

from click.testing import CliRunner


class Built(NamedTuple):
    status: int
    said: str  # on both streams, with the traceback of an accident
    html: Path


def build(book: Path, files: dict[str, str]) -> Built:
    """Write files into a folder and build the book there as `make book` does: warnings are errors.

    Args:
        book: The folder.
        files: Texts by name.
    """
    for name, text in files.items():
        (book / name).parent.mkdir(parents=True, exist_ok=True)
        (book / name).write_text(text, encoding="utf-8")
    command = ["build", str(book), "-W", "-n", "--keep-going", "--all"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Jupyter Book and Sphinx, about their own
        from jupyter_book.cli.main import main

        done = CliRunner().invoke(main, command, env={"NO_COLOR": "1"})
    accident = done.exception if not isinstance(done.exception, SystemExit) else None
    said = done.output + "".join(traceback.format_exception(accident)) if accident else done.output
    return Built(done.exit_code, said, book / "_build" / "html")


def build_by_sphinx(source: Path, html: Path) -> Built:
    """Build the pages of a folder with a conf.py; warnings are errors."""
    said = io.StringIO()
    with warnings.catch_warnings(), contextlib.ExitStack() as streams:
        warnings.simplefilter("ignore")
        from sphinx.cmd.build import main

        streams.enter_context(contextlib.redirect_stdout(said))
        streams.enter_context(contextlib.redirect_stderr(said))
        status = main([str(source), str(html), "-W", "-n", "-q"])
    return Built(status, said.getvalue(), html)
