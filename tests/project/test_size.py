"""How many lines the code has: a budget for each part, to be raised with a reason only."""

from pathlib import Path

import pytest
from support import results

# Lines of Python, comments and docstrings counted. Lower a budget when its part shrinks.
BUDGETS = {
    "engines": 6200,
    "core": 6945,
    "rest": 2915,
    "support and extensions": 14_595,
}
REST = {"__init__", "__main__", "_checks", "_progress", "derivatives", "diagonal", "distributed"}
REST |= {"_files", "_signals", "_tables", "_version", "memory", "plan", "streaming"}


def part_of(path: Path) -> str:
    """The part to which a file belongs."""
    folder, *inside = path.parts
    if folder != "fimlib":
        return "support and extensions"
    if inside[0] == "engines":
        return "engines"
    return "rest" if inside[0] == "summary" or (path.stem in REST and len(inside) == 1) else "core"


@pytest.mark.parametrize("part", BUDGETS)
def test_no_part_grows_beyond_its_budget(part):
    folders = ("fimlib", "notebooks/support", "book/_ext")
    files = [p for folder in folders for p in (results.ROOT / folder).rglob("*.py")]
    here = [p for p in files if part_of(p.relative_to(results.ROOT)) == part]
    lines = sum(len(p.read_text("utf-8").splitlines()) for p in here)
    assert lines <= BUDGETS[part]
    assert lines > 0.9 * BUDGETS[part]  # else lower the budget
