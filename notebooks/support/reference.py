"""Publish the results made here as the reference run in ``data/reference`` (`make reference`).

Its Figure 1 is drawn as ``data/figure-1.svg``, which the README shows.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from support import cli, figures, report, results, runs

PICTURE = results.ROOT / "data" / "figure-1.svg"
SHOWN = "sigmoid-seed-0"  # the run of Figure 1


def publish(folder: Path, target: Path) -> list[str]:
    """Copy all runs of ``runs.yml`` from ``folder``; return their names.

    To stay small, only the first run of an experiment keeps its executed notebook: those of the
    others differ in their parameters, and all values are kept.

    Raises:
        ValueError: a run is missing, one does not count, or runs of one experiment differ in more
            than their seed.
    """
    found, wanted = results.load(folder), runs.specs()
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise ValueError(f"not finished: {', '.join(missing)}. Run: make reproduce DATASET=mnist")
    if not all(found[name].counts for name in wanted):
        raise ValueError("these runs are not of the full, real MNIST: they cannot be a reference.")
    for group in report.experiments({name: found[name] for name in wanted}).values():
        report.check_same_settings(group)
    fresh = target.with_name(target.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    first = {spec.experiment: name for name, spec in reversed(wanted.items())}
    for name, spec in wanted.items():
        shown = first[spec.experiment] == name
        (fresh / name).mkdir(parents=True)
        for file in ("values.csv", "notebook.ipynb") if shown else ("values.csv",):
            if (found[name].folder / file).is_file():
                shutil.copyfile(found[name].folder / file, fresh / name / file)
        record = found[name].record | {"files": results.file_digests(fresh / name)}
        results.save(fresh / name, None, record)
    shutil.rmtree(target, ignore_errors=True)
    fresh.replace(target)
    return list(wanted)


def draw(target: Path = PICTURE, reference: Path = report.REFERENCE) -> None:
    """Draw Figure 1 from the values of the reference run."""
    run = results.load(reference)[SHOWN]
    figures.save(figures.figure_1(run.values, run.record), target)


@cli.command(ValueError, runs.RunError)
def main(argv: Sequence[str] | None = None) -> None:
    """Publish; see the module."""
    parser = argparse.ArgumentParser(prog="support.reference", description=__doc__)
    parser.add_argument("--results", type=Path, default=results.ROOT / "results" / "mnist")
    parser.add_argument("--picture", action="store_true", help="only draw data/figure-1.svg again")
    arguments = parser.parse_args(argv)
    names = [] if arguments.picture else publish(arguments.results, report.REFERENCE)
    draw()
    if names:
        print(f"data/reference now holds: {', '.join(names)}")
    print(f"drawn from it: {PICTURE.relative_to(results.ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
