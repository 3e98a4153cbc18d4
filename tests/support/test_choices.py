"""The notebook of our choices at a tiny size, cell by cell; its figure and tables."""

import pandas as pd
import pytest
import torch
from by_cell import execute, execute_in_two_sittings
from support import choice_figures, results, training
from torch import nn

import fimlib

TINY = {
    "dataset": "digits", "hidden": [[6, 5], [4]], "weights": ["default", "Kaiming"],
    "dropouts": [0.5], "optimizers": [["SGD", 0.1, 0.9]], "epochs": 5, "measured": [0, 1, 5],
    "num_inputs": 3, "bounds": True, "train_limit": 200, "device": "cpu", "seed": 4,
}  # fmt: skip
SETTING = "Kaiming weights, dropout 0.5, SGD 0.1 momentum 0.9, 6x5"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return execute("choices.ipynb", tmp_path_factory.mktemp("choices"), **TINY)


def test_every_combination_is_a_network(made):
    values, record = made
    shapes, kinds = ("6x5", "4"), ("default", "Kaiming")
    how = "dropout 0.5, SGD 0.1 momentum 0.9"
    assert set(values.run) == {f"{k} weights, {how}, {s}" for k in kinds for s in shapes}
    assert not record["counts"]  # digits are not MNIST
    assert len(record["input_indices"]) == 3


def test_the_values_are_those_of_fimlib(made):
    """A network trained here in the same way, and the median over the images."""
    from support import data

    values, record = made
    images = data.load("digits")
    X, y = (torch.tensor(a[:200]) for a in (images.train_images, images.train_labels))
    torch.manual_seed(4)
    net = training.mlp([64, 6, 5, 10], "LogSigmoid", 0.5)
    training.initialise(net, "Kaiming")
    step = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, foreach=True)
    training.train_epoch(net, step, X, y, batch_size=128, shuffle=torch.Generator().manual_seed(4))
    x = torch.tensor(images.test_images)[record["input_indices"]].double()
    derivs, family = fimlib.differentiate(net.double().eval(), x), fimlib.Categorical()
    V1, upper = fimlib.variance_i1(derivs, family), fimlib.theorem_4_1(derivs, family).variance_i1
    at = values[(values.run == SETTING) & (values.epoch == 1)].set_index(["quantity", "layer"])
    for k, (layer, mean) in enumerate(V1.layer_means().items(), start=1):
        assert at.value["V1", str(k)] == pytest.approx(float(mean.median()), rel=1e-9)
        names = [p for p in V1 if p.rpartition(".")[0] == layer]
        above, below = (torch.cat([d[p].flatten(1) for p in names], 1) for d in (upper.upper, V1))
        ratios = (above / below).where(below > 0, torch.nan)
        by_reading = {
            "over_means": above.mean(1) / below.mean(1),
            "over_geometric": ratios.log().nanmean(1).exp(),
            "over_mean": ratios.nanmean(1),
        }
        for reading, ratio in by_reading.items():
            found = at.value[f"V1_{reading}", str(k)]
            assert found == pytest.approx(float(ratio.median()), rel=1e-9), reading
    readings = at.loc[[f"V1_{r}" for r in by_reading]].value.unstack("layer")
    assert (readings.loc["V1_over_geometric"] <= readings.loc["V1_over_mean"]).all()  # Jensen


def test_a_stopped_run_goes_on_where_it_was(made, tmp_path, monkeypatch):
    values, _ = execute_in_two_sittings("choices.ipynb", tmp_path, monkeypatch, 12, 10, **TINY)
    pd.testing.assert_frame_equal(values, made[0], check_exact=True)


@pytest.mark.parametrize(("weights", "gain"), [("Kaiming", 2**0.5), ("Xavier", 1)])
def test_initial_weights(weights, gain):
    """Their spread is that of He et al. and of Glorot and Bengio; biases are 0."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(400, 600), nn.Tanh(), nn.Linear(600, 400))
    training.initialise(net, weights)
    for layer in (net[0], net[2]):
        fan = layer.in_features if weights == "Kaiming" else 500
        assert float(layer.weight.detach().std()) == pytest.approx(gain / fan**0.5, rel=0.02)
        assert not layer.bias.any()


def test_default_weights_stay_and_others_are_refused():
    net = nn.Linear(3, 2)
    before = net.weight.clone()
    training.initialise(net, "default")
    assert torch.equal(net.weight, before)
    with pytest.raises(ValueError, match="write one of default, Kaiming, Xavier"):
        training.initialise(net, "He")


# Two runs of two networks each, one of which does not learn.
A, B = "default weights, dropout 0, SGD 1, 8x8", "Xavier weights, dropout 0.5, SGD 1, 8x8"


def table(scale):
    rows = [
        (run, epoch, layer, quantity, value * scale**epoch)
        for run, factor in ((A, 1), (B, 2))
        for epoch in range(6)
        for layer in "123"
        for quantity, value in (("I", factor), ("V1", 3), ("V2", 0 if layer == "3" else 5))
    ]
    rows += [
        (run, epoch, results.NETWORK, "test_accuracy", accuracy)
        for run, accuracy in ((A, 0.9), (B, 0.1 if scale > 1 else 0.9))
        for epoch in range(6)
    ]
    return pd.DataFrame(rows, columns=results.COLUMNS)


def test_the_figure_shows_the_networks_that_learn():
    values = pd.concat([table(s).assign(made=f"decay-seed-{k}") for k, s in enumerate((0.5, 2))])
    figure = choice_figures.decay(values)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == [
        f"{kind} weights\ndropout {p}" for p in ("0", "0.5") for kind in ("default", "Xavier")
    ]
    first, empty, _, last = figure.axes
    drawn = {line.get_label(): line.get_ydata() for line in first.lines}
    # The median of (1/2)^epoch and 2^epoch.
    expected = [(0.5**epoch + 2.0**epoch) / 2 for epoch in range(6)]
    for label in ("Fisher information I", "$V_1$", "$V_2$"):
        assert drawn[label] == pytest.approx(expected)
    assert not any(line.get_label() == "$V_1$" for line in empty.lines)
    drawn = {line.get_label(): line.get_ydata() for line in last.lines}
    assert drawn["$V_2$"] == pytest.approx([0.5**epoch for epoch in range(6)])


def test_the_table_counts_layers_that_fall(tmp_path):
    group = {}
    for k, scale in enumerate((0.5, 2)):
        name = f"decay-seed-{k}"
        (tmp_path / name).mkdir()
        table(scale).to_csv(tmp_path / name / "values.csv", index=False)
        group[name] = results.Run(name, tmp_path / name, {"parameters": {}})
    lines = choice_figures.decay_table(group).splitlines()[2:]
    assert lines == [
        "| default weights | dropout 0 | 2 of 2 | 3 of 6 | 3 of 6 | 2 of 4 |",
        "| Xavier weights | dropout 0.5 | 1 of 2 | 3 of 3 | 3 of 3 | 2 of 2 |",
    ]
    assert "not been trained" in choice_figures.decay_table({})
    assert "not been trained" in choice_figures.tightness_table({})
