"""The sweep, regression, saturation and cost notebooks at a tiny size, cell by cell."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from by_cell import execute, execute_in_two_sittings
from support import results, sweep_figures, validity
from torch import nn

import fimlib

SWEEP = {
    "dataset": "digits", "hidden": [[6], [6, 5]], "activation": "Sigmoid", "epochs": 1,
    "measured": [0, 1], "num_inputs": 3, "train_limit": 200, "device": "cpu", "seed": 4,
}  # fmt: skip


def by_layer(values):
    return values[values.layer != results.NETWORK].pivot_table(
        index=["run", "epoch", "layer"], columns="quantity", values="value"
    )


# Counting.


def diagonal(*entries):
    values = torch.tensor([entries], dtype=torch.float64)
    return fimlib.Diagonal((fimlib.diagonal.Term("0", values, {"0.bias": None}),))


def test_every_case_is_counted_once_and_apart():
    value = diagonal(1.0, 1.0, 1.0, 1.0, 0.0, 0.0)
    lower = diagonal(0.0, 0.5, 1.1, 0.0, 0.0, 0.0)
    upper = diagonal(1000.0, 1001.0, 2.0, 0.9, 0.0, 1e-300)
    assert validity.counts(value, fimlib.Interval(lower, upper)) == {
        "violations": {"1": 2},  # 1 below 1.1, 1 above 0.9
        "vacuous": {"1": 2},  # 1001 : 1, and something : 0
        "zero": {"1": 1},
        "lower_positive": {"1": 2},
    }


# The sweep.


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return execute("sweep.ipynb", tmp_path_factory.mktemp("sweep"), **SWEEP)


def test_checks_are_parameters_times_inputs_times_epochs(sweep):
    values, record = sweep
    checks = values[values.quantity == "checks"].groupby("run").value.sum()
    shapes = {"6": (64, 6, 10), "6x5": (64, 6, 5, 10)}
    for shape, widths in shapes.items():
        number = sum((a + 1) * b for a, b in pairwise(widths))
        assert checks[f"Sigmoid-{shape}-Adam-0.001-seed-4"] == number * 3 * 2
    assert len(record["input_indices"]) == 3
    assert record["counts"] is False


def test_the_bounds_hold_and_zeros_are_counted(sweep):
    last = by_layer(sweep[0]).xs(1, level="epoch")
    assert (last[["I_violations", "V1_violations", "V2_violations"]] == 0).all(axis=None)
    assert (last.lower_positive == 0).all()
    for run in last.index.get_level_values("run").unique():
        output = last.loc[run].iloc[-1]
        assert output.V2_zero == output.checks  # Remark 4.4
        assert 0 < last.loc[run].V1_zero.iloc[0] < last.loc[run].checks.iloc[0]  # black pixels
        assert (last.loc[run].V1_upper >= last.loc[run].V1).all()


def test_sums_over_parameters_agree_with_the_layers(sweep):
    values = sweep[0].set_index(["run", "epoch", "layer", "quantity"]).value
    for run in sweep[0].run.unique():
        for which in ("I", "V1", "V2"):
            layers = values.loc[run, 1]
            sizes = layers[:, "checks"] / (3 * 2)
            total = layers.loc[results.NETWORK]
            for sum_of, mean_of in (
                (f"sum_{which}", which),
                (f"sum_{which}_upper_4_1", f"{which}_upper"),
            ):
                assert np.isclose(total[sum_of], (layers[:, mean_of] * sizes).sum(), rtol=1e-12)
            assert total[f"sum_{which}"] <= total[f"sum_{which}_upper_c1"] * (1 + 1e-12)
            assert total[f"sum_{which}_upper_4_6"] <= total[f"sum_{which}_upper_4_1"] * (1 + 1e-12)


def test_a_spoilt_bound_is_noticed_and_relu_has_no_second_variance(tmp_path, monkeypatch):
    right = fimlib.theorem_4_1

    def spoilt(*arguments, **options):
        bounds = right(*arguments, **options)
        low, high = bounds.variance_i1
        half = fimlib.Diagonal(
            tuple(fimlib.diagonal.Term(t.layer, t.left / 50, t.rights) for t in high._terms)
        )
        return bounds._replace(variance_i1=fimlib.Interval(low, half))

    monkeypatch.setattr(fimlib, "theorem_4_1", spoilt)
    values, _ = execute("sweep.ipynb", tmp_path, **SWEEP | {"activation": "ReLU", "hidden": [[6]]})
    last = by_layer(values).xs(1, level="epoch")
    assert (last.V1_violations > 0).all()
    assert (last[["I_violations", "V2_violations"]] == 0).all(axis=None)
    assert (last[["V2", "V2_upper"]] == 0).all(axis=None)
    assert (last.V2_zero == last.checks).all()
    assert (last.V2_vacuous == 0).all()


def test_a_stopped_sweep_goes_on_to_the_same_values(sweep, tmp_path, monkeypatch):
    values, _ = execute_in_two_sittings("sweep.ipynb", tmp_path, monkeypatch, 1, 1, **SWEEP)
    pd.testing.assert_frame_equal(values, sweep[0], check_exact=True)


def test_the_figures_show_the_tables(sweep):
    values = sweep[0]
    figure = sweep_figures.validity(values)
    assert "0 violations" in figure.axes[0].get_title()
    assert figure.axes[0].get_title().startswith("Sigmoid")
    broken = values.copy()
    broken.loc[(values.quantity == "V2_violations") & (values.layer == "1"), "value"] = 4
    assert "8 violations" in sweep_figures.validity(broken).axes[0].get_title()


def test_names_of_networks():
    found = sweep_figures.network("LogSigmoid-128x64-SGD-1e-05-seed-12")
    assert (found.activation, found.depth) == ("LogSigmoid", 3)
    with pytest.raises(ValueError, match="no name like"):
        sweep_figures.network("sweep")


# Regression.


def test_regression_meets_its_equalities(tmp_path):
    values, record = execute(
        "regression.ipynb", tmp_path, epochs=2, every=1, repeats=20, hidden=[4, 3], num_samples=50
    )
    assert set(values.run) == {"diabetes", "linnerud"}
    deviations = values[values.quantity.str.startswith("rel_")]
    assert len(deviations) == 2 * 3 * 3 * 5
    assert (deviations.value <= 1e-10).all()
    wide = by_layer(values)
    for j in (1, 2):
        assert (wide[f"joint_V{j}"] <= wide[f"joint_V{j}_upper"] * (1 + 1e-12)).all()
    network = values[values.layer == results.NETWORK].pivot_table(
        index="run", columns="quantity", values="value"
    )
    assert (network[["I1_z", "I2_z"]] < 6).all(axis=None)  # 5, and some for the many compared
    assert record["counts"] is True
    assert "is_mnist" not in record["data"]


# Saturation.


def test_saturation(tmp_path):
    values, _ = execute("saturation.ipynb", tmp_path, points=5, draws=2)
    wide = values.pivot(index=["run", "epoch"], columns="quantity", values="value")
    for activation in ("Sigmoid", "Tanh"):
        data = wide.loc[activation].set_index("s")
        assert data.V2[0.0] < 1e-25 < data.V1[0.0]
        ratio = data.V2 / data.V1
        assert ratio[8.0] > ratio[4.0] > ratio[0.0]
        assert ratio[-8.0] > ratio[-4.0]
    soft, log = (wide.loc[a].set_index("s") for a in ("Softplus", "LogSigmoid"))
    assert (np.diff(soft.V2 / soft.V1) < 0).all()
    assert np.allclose(soft.V2 / soft.V1, (log.V2 / log.V1).to_numpy()[::-1])
    relu = wide.loc["ReLU"].set_index("s")
    assert (relu[["V2", "scale_V2"]] == 0).all(axis=None)
    assert (relu.V1[relu.index > 0] > 0).all()


# Cost.


def test_cost_counts_what_is_written(tmp_path):
    values, record = execute(
        "cost.ipynb", tmp_path, wide=[[32, 32], [64, 64], [128, 128]],
        deep=[[32], [32, 32], [32] * 4], mnist=[20, 8, 8, 10], outputs=[3], repeats=2,
    )  # fmt: skip
    wide = values.pivot(index="run", columns="quantity", values="value")
    small, large = (wide.loc[f"64x{w}x{w}x10"] for w in (64, 128))
    assert small.parameters == sum(p.numel() for p in nn.Sequential(
        nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
    ).parameters())  # fmt: skip
    assert large.bounds_numbers >= 6 * large.parameters  # all of them, of three intervals
    growth = large.parameters / small.parameters
    assert large.bounds_numbers / small.bounds_numbers < 1.1 * growth
    assert large.layer_means_numbers < large.bounds_numbers / 3
    c1, simple = (wide.loc["20x8x8x10", f"sum_theorem_{t}_numbers"] for t in ("c_1", "4_1"))
    assert c1 > simple
    assert not values.quantity.str.contains("second|time").any()
    assert len(record["timings"]["64x128x128x10"]["bounds"]) == 2
