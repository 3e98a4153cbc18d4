"""A notebook's cells, executed in this process."""

import matplotlib as mpl
import nbformat
import pandas as pd
import torch
from support import results, runs


def execute(notebook, folder, **parameters):
    """Run a notebook's cells here, without a kernel, so that fimlib can be spoilt beneath it."""
    runs.check_parameters(runs.NOTEBOOKS / notebook, parameters)
    namespace = {"__name__": "notebook"}
    with mpl.rc_context(), torch.random.fork_rng():
        for cell in nbformat.read(runs.NOTEBOOKS / notebook, as_version=4).cells:
            if cell.cell_type == "code":
                exec(cell.source, namespace)
            if "parameters" in cell.metadata.get("tags", []):
                namespace |= parameters | {"out": str(folder)}
    values = pd.read_csv(folder / "values.csv", dtype={"layer": str})
    record = results.read_record(folder)
    assert list(values.columns) == results.COLUMNS
    assert set(record["parameters"]) == runs.check_parameters(runs.NOTEBOOKS / notebook, {}) - {
        "name",
        "out",
    }
    return values, record
