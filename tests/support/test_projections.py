"""The experiment of Section 9.1 at a tiny size: what it predicts, measures, and shows."""

import re

import pandas as pd
import pytest
from by_cell import execute
from support import projection_figures as drawn
from support import results

TINY = {
    "dataset": "digits", "training_size": 200, "epochs": 1, "measured": [0, 1], "num_inputs": 3,
    "passes": [8], "repeats": 6, "summary_budget": 1.0, "name": "projections-network-tiny",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of the sigmoid network."""
    folder = tmp_path_factory.mktemp("projections")
    values, record = execute("projections.ipynb", folder, **TINY, network="sigmoid")
    return results.Run(TINY["name"], folder, record), values


def test_errors_are_as_predicted(made):
    _, values = made
    at = drawn.last_epoch(values)
    for kind in drawn.KINDS:
        for squares in drawn.DASHES:
            one = at[f"predicted_{kind}_{squares}"]
            for count in TINY["passes"]:
                assert at[f"measured_{kind}_{squares}_{count}"] == pytest.approx(
                    one / count**0.5, rel=0.6
                )
    assert 1 < drawn.farthest(at) < 2.5


def test_signs_obey_their_bound_in_every_layer(made):
    _, values = made
    signs = values[values.quantity.isin(["predicted_signs_batch", "predicted_signs_input"])]
    assert len(signs) > 4
    assert signs.value.max() <= 2**0.5


def test_the_farthest_error_is_the_worst_ratio():
    at = pd.Series({"predicted_signs_batch": 2.0, "measured_signs_batch_4": 0.5, "outputs": 9.0})
    assert drawn.farthest(at) == 2  # half of what is predicted
    assert drawn.farthest(at.replace(0.5, 3.0)) == 3


def test_the_figure_and_the_tables_show_the_run(made):
    run, values = made
    figure = drawn.errors(pd.concat([values, values.assign(run="another")]))
    assert sorted(ax.get_title() for ax in figure.axes) == ["another", "tiny"]
    dots = [line for line in figure.axes[0].lines if line.get_linestyle() == "None"]
    assert len(dots) == 6 * len(TINY["passes"])
    [row] = drawn.table({run.name: run}).splitlines()[2:]
    assert re.match(r"\| sigmoid \| [\d,]+ \| 10 \|", row)
    [row] = drawn.costs({run.name: run}).splitlines()[2:]
    assert len(re.findall(r"[\d.]+ s, [\d,]+ MB", row)) == 3
    assert len(drawn.table_of_passes(values).splitlines()) == 2 + 6
