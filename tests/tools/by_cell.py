"""A notebook's cells, executed in this process, without a kernel."""

from contextlib import contextmanager

import matplotlib as mpl
import nbformat
import pandas as pd
import pytest
import torch
from support import results, runs, training

# Runs that test_notebooks makes in this way, at smoke size.
SMOKE = (
    "statements",
    "bounds",
    "joint",
    "shortcuts",
    "recipes",
    "beyond",
    "paths",
    "audit",
    "exercises",
)


@contextmanager
def device_settings():
    """Set back what ``training.pick_device`` sets for a GPU."""
    mode, tf32 = torch.get_deterministic_debug_mode(), torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.backends.cudnn.allow_tf32 = tf32


def run(notebook, **parameters):
    """Execute the cells with these parameters in the place of the notebook's own; its names."""
    runs.check_parameters(runs.NOTEBOOKS / notebook, parameters)
    namespace = {"__name__": "notebook"}
    with mpl.rc_context(), torch.random.fork_rng(), device_settings():
        for cell in nbformat.read(runs.NOTEBOOKS / notebook, as_version=4).cells:
            if cell.cell_type == "code":
                exec(cell.source, namespace)
            if "parameters" in cell.metadata.get("tags", []):
                namespace |= parameters
    return namespace


def execute(notebook, folder, **parameters):
    """The table and the record that the cells leave in a folder; fimlib may be spoilt beneath."""
    run(notebook, out=str(folder), **parameters)
    values = pd.read_csv(folder / "values.csv", dtype={"layer": str})
    record = results.read_record(folder)
    assert list(values.columns) == results.COLUMNS
    assert set(record["parameters"]) == runs.check_parameters(runs.NOTEBOOKS / notebook, {}) - {
        "name",
        "out",
    }
    return values, record


def execute_in_two_sittings(
    notebook, folder, monkeypatch, first, second, *, step=(training, "train_epoch"), **parameters
):
    """As ``execute``, but stopped after some steps (epochs of training) and resumed for more."""
    function, left = getattr(*step), first

    def once(*arguments, **options):
        nonlocal left
        if left == 0:
            raise InterruptedError
        left -= 1
        return function(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(*step, once)
        with pytest.raises(InterruptedError):
            execute(notebook, folder, **parameters)
        left = second
        return execute(notebook, folder, **parameters)
