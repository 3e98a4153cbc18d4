"""The mutation score of fimlib's formulas: ``make mutants``.

mutmut changes one thing at a time in the modules that pyproject.toml names, and runs the tests that
reach it. A mutant that no test notices survives. Every survivor must be listed with a reason in
``surviving_mutants.yml``; score and survivors are written to ``data/mutation.json`` for the book.

What lies in ``mutants/`` from a run before is used: mutants of functions that have not changed stay
killed; those that survived are tried again, as there may be new tests. `make clean` forgets all,
and from then on it takes an hour on two cores.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

import yaml
from support import book, runs

ROOT = Path(__file__).resolve().parents[2]
MUTANTS = ROOT / "mutants"
ARGUED = ROOT / "tests" / "tools" / "surviving_mutants.yml"
KILLED = {1, 3, -24, 24, 36, 152, 255}  # a failed test, or a time limit (mutmut's exit codes)
TARGET = 0.95


def run() -> dict[str, int | None]:
    """Make and test all mutants that are not killed yet; the exit codes of all by name."""
    survivors = [n for n, code in exit_codes().items() if code not in {None, *KILLED}]
    if survivors:
        mutmut(*survivors)
    mutmut()
    return exit_codes()


def mutmut(*names: str) -> None:
    """Run mutmut on the named mutants, or on all that have no result yet."""
    command = [str(Path(sys.executable).with_name("mutmut")), "run", "--max-children"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += [str(os.cpu_count() or 1), *names]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def exit_codes() -> dict[str, int | None]:
    """The exit codes of all mutants, by name."""
    codes: dict[str, int | None] = {}
    for meta in sorted(MUTANTS.rglob("*.meta")):
        codes |= json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"]
    return codes  # None: never run, and not killed


def change(name: str) -> tuple[str, str, str]:
    """Of a mutant: the function, and the changed line before and after."""
    os.chdir(ROOT)
    from mutmut.__main__ import find_mutant, get_diff_for_mutant

    diff = get_diff_for_mutant(name, path=find_mutant(name).path).splitlines()[2:]
    old = " ".join(line[1:].strip() for line in diff if line.startswith("-"))
    new = " ".join(line[1:].strip() for line in diff if line.startswith("+"))
    function = name.rpartition("__mutmut_")[0].replace("xǁ", "").replace("ǁ", ".")
    return function.replace(".x_", ".").removeprefix("fimlib."), old, new


def summarise(codes: dict[str, int | None]) -> dict[str, object]:
    """Score by module, and the survivors with their reasons."""
    reasons = yaml.safe_load(ARGUED.read_text(encoding="utf-8")) or []
    total = Counter(name.split(".")[1] for name in codes)
    killed = Counter(name.split(".")[1] for name, code in codes.items() if code in KILLED)
    survivors = []
    for name, code in codes.items():
        if code not in KILLED:
            function, old, new = change(name)
            why = next((r["why"] for r in reasons if applies(r, function, new)), None)
            survivors.append({"function": function, "old": old, "new": new, "why": why})
    return {
        "tool": f"mutmut {metadata.version('mutmut')}",
        "source": runs.fimlib_digest(),
        "modules": {m: {"mutants": total[m], "killed": killed[m]} for m in sorted(total)},
        "survivors": survivors,
    }


def applies(reason: dict[str, str], function: str, new: str) -> bool:
    """Whether a reason is about this function (all, if it names none) and this change."""
    return reason.get("function", function) == function and bool(re.search(reason["change"], new))


def main() -> int:
    """Run, report, and fail below 95 % or with a survivor that nobody has argued."""
    summary = summarise(run())
    modules = summary["modules"]
    for module, count in modules.items():
        print(f"{module:12s} {count['killed']:5d} of {count['mutants']:5d} killed")
    mutants, killed = (sum(c[k] for c in modules.values()) for k in ("mutants", "killed"))
    unexplained = [s for s in summary["survivors"] if s["why"] is None]
    for s in unexplained:
        print(f"\nnot argued: {s['function']}\n  - {s['old']}\n  + {s['new']}")
    print(
        f"\n{killed} of {mutants} mutants killed ({killed / mutants:.1%}); "
        f"{len(summary['survivors'])} survive, {len(unexplained)} of them without a reason"
    )
    text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    book.MUTATION.write_text(text, encoding="utf-8")
    return int(killed < TARGET * mutants or bool(unexplained))


if __name__ == "__main__":
    sys.exit(main())
