"""The table of all runs."""

import nbformat
from support import report, results, run_list, runs


def test_every_run_has_a_row_with_what_its_record_says():
    reference = results.load(report.REFERENCE, runs.specs())
    text = run_list.all_runs(reference)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| [")]
    assert len(rows) == len(reference)
    assert text.startswith(f"{len(reference)} runs took ")
    for name, row in zip((n for n in runs.specs() if n in reference), rows, strict=True):
        run, link = reference[name], f"[{reference[name].record['title']}]"
        assert row[0] == f"| {link}(_generated/notebooks/{name}.ipynb)"
        source = nbformat.read(runs.specs()[name].notebook, as_version=4)
        assert row[1] == runs.specs()[name].notebook.name
        assert row[2] == str(sum(cell.cell_type == "code" for cell in source.cells))
        assert run.record["started"].startswith(row[5])


def test_before_the_first_run():
    assert run_list.all_runs({}) == "*Nothing has been run yet.*\n"
