"""No test writes into the project's own notebooks and data; each works on one core."""

import os
from pathlib import Path

import pytest

# Tests run side by side, and torch's threads would wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported, here and in subprocesses

import fake_device

fake_device.announce()  # before autograd is used for the first time
ROOT = Path(__file__).parents[1]
# Two processes take file by file, so that each makes what the tests of a file share once. These
# take longest and come first, or one process would wait for the other in the end.
LONGEST = ("reproduce", "caller", "runs", "notebooks", "fuzz", "confirm", "traced", "refusals")
LONGEST += ("report", "checks", "interruptions", "forks", "claims", "spectra", "hutchinson")
LONGEST += ("summary", "streaming", "distributed")
OWN = {"notebooks": (".ipynb", ".yml"), "data": "", "data/reference": ""}  # and their endings


def pytest_collection_modifyitems(items):
    """Sort the files; the tests of a file keep their order."""
    rank = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def listing():
    """What lies there, and when it was last changed; for every test, so by the fastest way."""
    return {
        f"{folder}/{entry.name}": entry.stat().st_mtime_ns
        for folder, endings in OWN.items()
        for entry in os.scandir(ROOT / folder)
        if entry.name.endswith(endings)
    }


@pytest.fixture(autouse=True)
def _the_projects_own_files_stay():
    before = listing()
    yield
    changed = sorted({name for name, _ in before.items() ^ listing().items()})
    assert not changed, f"changed during this test, which needs a folder of its own: {changed}"
