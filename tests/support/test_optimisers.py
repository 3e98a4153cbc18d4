"""The notebook of optimisers at a tiny size, cell by cell; its figure and its table."""

import pandas as pd
import pytest
import torch
from by_cell import execute, execute_in_two_sittings, run
from support import checkpoint, data, optimiser_figures, report, results, training
from torch.nn.functional import cross_entropy

TINY = {
    "dataset": "digits", "hidden": [6], "measured": [6, 12], "batch_size": 8, "rates": [1.0, 3.0],
    "dampings": [0.01], "windows": [3, 10], "roots": [[0.01], [1e-4]], "seeds": [0, 1],
    "train_limit": 200, "device": "cpu",
}  # fmt: skip
METHODS = {
    "none (SGD)", "none (SGD), half the steps", "data's labels, half the steps",
    *(f"{kind}{error}" for kind in optimiser_figures.COLOURS
                    for error in ("", " + SE") if kind != "none (SGD)"),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return execute("optimisers.ipynb", tmp_path_factory.mktemp("optimisers"), **TINY)


def test_every_diagonal_is_tried_with_and_without_its_error(made):
    values, record = made
    assert set(values.run) == METHODS
    assert not record["counts"]  # digits are not MNIST
    assert set(values[values.quantity == "nll"].epoch) == {6, 12}


@pytest.mark.parametrize("method", ["none (SGD)", "data's labels", "data's labels + SE", "Adam's"])
def test_a_network_trained_in_a_plain_loop(made, method):
    """Gradients of one input at a time by autograd, the moving mean written out as a sum."""
    values, _ = made
    rate, damping, window = (
        float(values[(values.run == method) & (values.quantity == quantity)].value.iloc[0])
        for quantity in ("rate", "damping", "window")
    )
    images = data.load("digits")
    X, y = (torch.tensor(a[:160]) for a in (images.train_images, images.train_labels))
    torch.manual_seed(1)
    net = training.mlp([64, 6, 10], "Sigmoid").eval()
    training.initialise(net, "Xavier")
    params, shuffle, history = list(net.parameters()), torch.Generator().manual_seed(1), []
    beta = 1 - 1 / window
    for step in range(12):
        rows = torch.randint(160, (8,), generator=shuffle)
        of_input = [
            torch.autograd.grad(cross_entropy(net(X[k][None]), y[k][None]), params) for k in rows
        ]
        stacked = [torch.stack(parts) for parts in zip(*of_input, strict=True)]
        gradient = [g.mean(0) for g in stacked]
        squares = gradient if method == "Adam's" else stacked
        history.append(
            [(g.square() if method == "Adam's" else g.square().mean(0)) for g in squares]
        )
        weights = torch.tensor([beta ** (step - k) for k in range(step + 1)]).double()
        weights /= weights.sum()
        r = float(weights.square().sum())
        for k, (p, g) in enumerate(zip(params, gradient, strict=True)):
            seen = torch.stack([d[k] for d in history]).double()
            mean = torch.einsum("t,t...->...", weights, seen)
            spread = torch.einsum("t,t...->...", weights, (seen - mean).square())
            if method.endswith("+ SE") and step:
                mean = mean + (spread * r / (1 - r)).sqrt()
            moved = g.double()
            if method == "Adam's":
                moved = moved / (mean.sqrt() + damping)
            elif method != "none (SGD)":
                moved = moved / (1 + mean / damping)
            p.data -= (rate * (1 - step / 12) * moved).float()
    x_test, y_test = torch.tensor(images.test_images), torch.tensor(images.test_labels)
    loss = float(cross_entropy(net(x_test), y_test).detach())
    at = values[(values.run == method) & (values.quantity == "nll") & (values.epoch == 12)]
    assert at.set_index("layer").value["seed 1"] == pytest.approx(loss, rel=1e-3)


@pytest.fixture(scope="module")
def names():
    return run("optimisers.ipynb", **TINY)


def test_every_estimate_is_right_on_average(names):
    """Many equal networks at the same batch: labels, signs and probes are drawn for each anew."""
    torch.manual_seed(0)
    many = 2000
    net = names["run_forward"](names["new_networks"]([3] * many), names["X"][:8])
    I = [v[0] for v in names["exact"](net, names["logits"](net))]
    for source in (*names["DRAWS"], names["PROBES"]):
        for D, right in zip(names["new_estimate"](source, 0, net, None, None), I, strict=True):
            z = (D.mean(0) - right) / (D.std(0) / many**0.5 + 1e-9)
            assert z.abs().max() < 5.5, source


def test_the_exact_diagonal_is_made_anew_when_its_passes_are_paid(names):
    net = names["run_forward"](names["new_networks"]([3]), names["X"][:8])
    due = [names["new_estimate"]("exact", k, net, None, None) is not None for k in range(21)]
    assert [k for k in range(21) if due[k]] == [0, 10, 20]  # ten classes, one pass for each step


def test_a_network_that_diverges_is_not_chosen_and_stops_nothing(tmp_path):
    values, _ = execute("optimisers.ipynb", tmp_path, **TINY | {"rates": [1.0, 1e30]})
    assert set(values.run) == METHODS
    rates = values[(values.quantity == "rate") & ~values.run.str.contains("SGD|Adam")].value
    assert set(rates) == {1.0}


def test_a_run_that_was_stopped_goes_on(made, tmp_path, monkeypatch):
    step = (checkpoint.Progress, "save")
    values, _ = execute_in_two_sittings(
        "optimisers.ipynb", tmp_path, monkeypatch, 4, 13, step=step, **TINY
    )
    pd.testing.assert_frame_equal(values, made[0])


def test_the_table_and_the_figure(made):
    values, _ = made
    made_here = type("Run", (), {"values": values})
    table = optimiser_figures.losses_table({"optimisers-activation-sigmoid": made_here})
    assert table.startswith("**sigmoid**")
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(METHODS)
    assert all(row.rstrip(" |").endswith("of 2") for row in rows[1:])
    assert optimiser_figures.losses_table({}) == "*These networks have not been trained yet.*\n"
    figure = optimiser_figures.losses(values.assign(made="optimisers-activation-sigmoid"))
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert set(lines) == METHODS
    means = values[values.quantity == "nll"].groupby(["run", "epoch"]).value.mean()
    assert list(lines["signs"]) == pytest.approx(list(means["signs"]))


@pytest.fixture(scope="module", params=["sigmoid", "logsigmoid"])
def reference(request):
    """Which activation, and (method, seed) → loss at the end and error of D, of the reference."""
    values = results.load(report.REFERENCE)[f"optimisers-activation-{request.param}"].values
    values = values[values.epoch == values.epoch.max()]
    return request.param, values.pivot(index=["run", "layer"], columns="quantity", values="value")


def test_what_the_page_says_of_networks(reference):
    which, found = reference
    losses = found.nll.unstack()
    mean, sgd, half = losses.mean(axis=1), losses.loc["none (SGD)"], ", half the steps"
    two_passes = [m for m in losses.index if m.startswith(("Î", "importance", "signs", "exact"))]
    assert len(two_passes) == 10
    assert (losses.loc[two_passes] > sgd).all(axis=None)
    labels = mean[["Î₁", "importance", "signs"]]
    assert labels.max() < mean[f"none (SGD){half}"]
    assert mean[f"data's labels{half}"] < labels.min() + 0.005
    for kind in ("data's labels", "Adam's"):
        assert (losses.loc[kind] < sgd).all()
    probes = "Î₂, probes"
    assert mean[probes] == mean.max()
    assert found.error[probes].mean() > 1
    assert mean[f"{probes} + SE"] < mean[probes]
    if which == "sigmoid":
        assert labels.max() - labels.min() < 0.006
        assert abs(mean["exact"] - labels.mean()) < 0.006
    else:
        assert (losses.loc["signs"] < losses.loc["Î₁"]).all()
        assert found.error["signs"].mean() > found.error["Î₁"].mean()
        assert (losses.loc["exact"] > 0.5).sum() == 1


@pytest.fixture(scope="module")
def paths():
    return run("paths.ipynb", repeats=4000, rates=[0.5], dampings=[0.1], steps=1)


@pytest.mark.parametrize("which", ["linear", "logistic"])
def test_a_step_of_a_path(paths, which):
    problem, start = paths["problems"][which], paths["START"]
    theta = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.loss(theta), theta)
    step = paths["walk"](problem, paths["PLAIN"], 0.5, 0.1)[1]
    torch.testing.assert_close(step[0], start - 0.5 * gradient / 1.1)


@pytest.mark.parametrize("which", ["linear", "logistic"])
def test_the_diagonals_of_a_path(paths, which):
    """Labels of the model are right on average, those of the data are not; the error is added."""
    problem, many = paths["problems"][which], paths["START"].repeat(4000, 1)
    I, _, _ = paths["by_fimlib"](problem, paths["START"])
    drawn = {k: paths["diagonal"](problem, many, paths[k]) for k in ("EXACT", "LABELS", "DATA")}
    for kind, D in drawn.items():
        z = (D.mean(0) - I.mean(0)) / (D.std(0) / 4000**0.5 + 1e-12)
        assert (abs(z) < 5).all() == (kind != "DATA")
    with_error = paths["diagonal"](problem, many, paths["WITH_ERROR"]).mean(0)
    assert (with_error > drawn["LABELS"].mean(0) * 1.2).all()


def test_what_the_page_says_of_paths():
    values = results.load(report.REFERENCE)["paths"].values
    found = values.set_index(["layer", "quantity"]).value
    exact, labels, error, data = "I, Î₂, signs", "Î₁", "Î₁ + SE", "data's labels"
    linear = [found["linear", f"mean, {kind}"] for kind in (exact, labels, error, data)]
    assert linear == sorted(linear)
    dampings = [found["linear", f"damping, {kind}"] for kind in (exact, labels, data)]
    assert dampings == sorted(set(dampings))
    logistic = {k: found["logistic", f"mean, {k}"] for k in ("1", exact, labels, error, data)}
    assert min(logistic, key=logistic.get) == "1"
    assert logistic[exact] < logistic[labels]
