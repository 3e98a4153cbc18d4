"""A copy of the project, and make in it."""

import os
import shutil
import subprocess
import sys

from support import results

NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", "results", "mnist", "_build", "_generated", "build", "mutants", "*.egg-info",
    ".*_cache", "__pycache__", ".hypothesis", ".ipynb_checkpoints",
)  # fmt: skip
# Variables of make that are nobody's wish here.
OURS = ("MNIST_DIR", "DATASET", "PY", "RUN", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES")


def copy(folder):
    """The project, in a folder with a space."""
    return shutil.copytree(results.ROOT, folder / "a project", ignore=NOT_COPIED)


def environment(**more):
    return {k: v for k, v in os.environ.items() if k not in OURS} | more


def make(project, *arguments, python=(f"PY={sys.executable}",), **more):
    return subprocess.run(
        ["make", *python, *arguments], cwd=project, capture_output=True, text=True,
        env=environment(**more), check=False,
    )  # fmt: skip
