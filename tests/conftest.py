"""No test writes into the project's own notebooks and data; each works on one core."""

import os
from pathlib import Path

import pytest

# Tests run side by side, and torch's threads would wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported, here and in subprocesses

ROOT = Path(__file__).parents[1]
PATTERNS = ("notebooks/*.ipynb", "notebooks/*.yml", "data/*", "data/reference/*")


def listing():
    """What lies there, and when it was last changed."""
    return {
        path.relative_to(ROOT).as_posix(): path.stat().st_mtime_ns
        for pattern in PATTERNS
        for path in ROOT.glob(pattern)
    }


@pytest.fixture(autouse=True)
def _the_projects_own_files_stay():
    before = listing()
    yield
    changed = sorted({name for name, _ in before.items() ^ listing().items()})
    assert not changed, f"changed during this test, which needs a folder of its own: {changed}"
