"""The experiments of Sections 4.1 and 6 at a tiny size: their tables against independent means."""

import matplotlib as mpl
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from reference import categorical
from support import data, results, runs, training

TINY = {"hidden": [3], "dropout": 0.5, "seed": 3, "train_limit": 100, "repeats": 40}
POPULATION = TINY | {
    "epochs": 2, "measured": [0, 2], "drawn": [0, 2], "sizes": [[5, 2]], "test_limit": 6,
    "sure": 0.9,
}  # fmt: skip
EMPIRICAL = TINY | {"epochs": 2, "measured": [0, 2], "subset": 5, "pairs": [4]}
CASES = [
    "true labels, train",
    "true labels, test",
    "noisy labels, train",
    "noisy labels, test",
    "noisy labels, known q",
    "unknown noise, known q",
    "linear model, train",
    "linear model, test",
]


def execute(notebook, folder, parameters, last="", killed_after=None):
    """The table that a notebook's cells make here, without a kernel.

    Args:
        notebook: Its name.
        folder: Where its results go.
        parameters: In the place of its own.
        last: Text of the last cell that is executed; "": all are, pictures too.
        killed_after: The epoch after which the run is to be killed.
    """
    namespace = {}
    for cell in nbformat.read(runs.NOTEBOOKS / notebook, as_version=4).cells:
        source = cell.source if cell.cell_type == "code" else ""
        if killed_after is not None and "progress.save(" in source:
            source += f"\n    if epoch == {killed_after}:\n        raise KeyboardInterrupt"
        exec(source, namespace)
        if "parameters" in cell.metadata.get("tags", []):
            namespace |= parameters | {"dataset": "digits", "out": str(folder)}
        if last and last in source:
            break
    return pd.read_csv(folder / "values.csv", dtype={"layer": str})


def wide(values, epoch, run=None):
    at = values[(values.epoch == epoch) & (values.layer != results.NETWORK)]
    at = at if run is None else at[at.run == run]
    return at.pivot_table(index="layer", columns="quantity", values="value")


@pytest.fixture(scope="module")
def population(tmp_path_factory):
    with mpl.rc_context():
        return execute("population.ipynb", tmp_path_factory.mktemp("population"), POPULATION)


@pytest.fixture(scope="module")
def empirical(tmp_path_factory):
    with mpl.rc_context():
        return execute("empirical.ipynb", tmp_path_factory.mktemp("empirical"), EMPIRICAL)


@pytest.fixture(scope="module")
def untrained():
    """The network at epoch 0, and the test images, as the notebooks make them."""
    torch.manual_seed(TINY["seed"])
    net = training.mlp([64, 3, 10], "Sigmoid", 0.5).double().eval()
    images = data.load("digits")
    return net, torch.tensor(images.test_images).double(), torch.tensor(images.test_labels)


def flat(values, layer):
    """The entries of one layer's parameters in a row."""
    return torch.cat([v.flatten() for name, v in values.items() if name.split(".")[0] == layer])


@pytest.fixture(scope="module")
def enumerated(untrained):
    """I, V₁, V₂, C₁₂ of one label at the first test images, by enumeration: [images, entries]."""
    net, X, _ = untrained
    at = [categorical(net, x[None]) for x in X[: POPULATION["test_limit"]]]
    return {
        number: {q: torch.stack([flat(one[q], layer) for one in at]) for q in at[0]}
        for number, layer in (("1", "0"), ("2", "3"))
    }


def test_population_against_enumeration(population, enumerated):
    """The terms of Theorem 4.7, by loops over the images, the labels and the parameters."""
    table = wide(population, 0)
    for layer, q in enumerated.items():
        row = table.loc[layer]
        assert row["I"] == pytest.approx(float(q["I"].mean()), rel=1e-9)
        assert row.I_squared == pytest.approx(float(q["I"].mean(0).square().mean()), rel=1e-9)
        assert row.var_I == pytest.approx(float(q["I"].var(0, correction=0).mean()), rel=1e-8)
        assert row["EV1"] == pytest.approx(float(q["v1"].mean()), rel=1e-9)
        assert row["EV2"] == pytest.approx(float(q["v2"].mean()), rel=1e-9, abs=1e-30)
        assert row["EC12"] == pytest.approx(float(q["c12"].mean()), rel=1e-8, abs=1e-18)
        assert row.parameters == q["I"].shape[1]
    assert (table.EV2 == 0).tolist() == [False, True]


def test_population_trains_the_network_of_figure_1(population, tmp_path):
    """The same seed gives the weights of the MNIST experiment: same losses, to the last bit."""
    same = {key: POPULATION[key] for key in ("hidden", "dropout", "seed", "train_limit", "epochs")}
    other = execute("mnist.ipynb", tmp_path, same | {"num_samples": 5}, last="results.save(")
    losses = [t[t.quantity == "train_loss"].value.tolist() for t in (population, other)]
    assert len(losses[0]) == POPULATION["epochs"]
    assert losses[0] == losses[1]


def test_population_predicts_its_draws(population, enumerated):
    table = wide(population, 0)
    for layer, q in enumerated.items():
        inputs = q["I"].var(0, correction=0).mean()
        for j in (1, 2):
            predicted = float((inputs + q[f"v{j}"].mean() / 2) / 5)
            row = table.loc[layer]
            assert row[f"draws_predicted_i{j}_5_2"] == pytest.approx(predicted, rel=1e-8)
            off = row[f"draws_observed_i{j}_5_2"] - predicted
            assert row[f"draws_z_i{j}_5_2"] == pytest.approx(off / row[f"draws_error_i{j}_5_2"])
            assert abs(row[f"draws_z_i{j}_5_2"]) < 5
            assert 0 < row[f"draws_mean_off_i{j}_5_2"] < 5  # by Chebyshev; a wrong mean is far off


def test_population_bound_and_sure_images(population):
    for epoch in (0, 2):
        table = wide(population, epoch)
        assert (table.lemma_4_8_violations == 0).all()
        assert (table.var_I <= table.lemma_4_8).all()
        network = population[(population.epoch == epoch) & (population.layer == results.NETWORK)]
        network = network.set_index("quantity").value
        assert 0 < network.unsure_median <= network.unsure_largest < 1
        if network.sure_share == 1:  # all images, once more
            assert np.allclose(table.sure_EV1, table.EV1, rtol=1e-12)
            assert np.allclose(table.sure_var_I, table.var_I, rtol=1e-9)
    assert "I" not in wide(population, 1)  # not measured


@pytest.mark.parametrize("notebook", ["population.ipynb", "empirical.ipynb"])
def test_an_interrupted_run_goes_on(notebook, request, tmp_path, capsys):
    """Killed in the middle: the run goes on from there, to the same bytes."""
    name = notebook.partition(".")[0]
    whole = request.getfixturevalue(name)
    size = {"population": POPULATION, "empirical": EMPIRICAL}[name]
    with mpl.rc_context():
        with pytest.raises(KeyboardInterrupt):
            execute(notebook, tmp_path, size, killed_after=size["epochs"] - 1)
        assert not (tmp_path / "values.csv").exists()
        continued = execute(notebook, tmp_path, size, last="results.save(")
    assert f"continues after epoch {size['epochs'] - 1}" in capsys.readouterr().out
    pd.testing.assert_frame_equal(continued, whole, check_exact=True)


def test_empirical_has_its_cases(empirical):
    assert list(empirical.run.unique()) == CASES
    values = empirical.set_index("quantity").value
    assert np.isfinite(values[~values.index.str.startswith("crossing")]).all()


def chosen_test_images(untrained):
    """The notebook's choice of images and its noisy labels, made again in the same order."""
    _, X, y = untrained
    generator = torch.Generator().manual_seed(TINY["seed"])
    for size in (TINY["train_limit"], len(y)):
        other = torch.randint(10, (size,), generator=generator)
        replaced = torch.rand(size, generator=generator) < 0.3
        rows = torch.randperm(size, generator=generator)[: EMPIRICAL["subset"]]
    noisy = torch.where(replaced, other, y)
    return X[rows], y[rows], noisy[rows]


def data_fisher(net, x, q):
    """Ĩ(θ_i|x) and the variance of one label from q, by a gradient per class: layer → entries."""
    squares = []
    for k in range(10):
        gradient = torch.autograd.grad(
            torch.log_softmax(net(x[None])[0], 0)[k], list(net.parameters())
        )
        named = zip(dict(net.named_parameters()), gradient, strict=True)
        squares.append({name: g.square() for name, g in named})
    found = {}
    for number, layer in (("1", "0"), ("2", "3")):
        per_class = torch.stack([flat(one, layer) for one in squares])
        mean = q @ per_class
        found[number] = mean, q @ (per_class - mean).square()
    return found


def test_empirical_against_autograd(empirical, untrained):
    """Both diagonals, their distance and angle, the variances and the crossing, all by loops."""
    net, m = untrained[0], EMPIRICAL["subset"]
    X, true, noisy = chosen_test_images(untrained)
    one_hot = torch.eye(10, dtype=torch.float64)
    q_of = {
        "true labels, test": one_hot[true],
        "noisy labels, test": one_hot[noisy],
        "noisy labels, known q": 0.7 * one_hot[true] + 0.03,
        "unknown noise, known q": 0.7 * one_hot[true] + 0.03,
    }
    model = [data_fisher(net, x, torch.softmax(net(x[None])[0], 0).detach()) for x in X]
    oracle = [categorical(net, x[None]) for x in X]
    for case, q in q_of.items():
        table = wide(empirical, 0, case)
        data_side = [data_fisher(net, x, row) for x, row in zip(X, q, strict=True)]
        for layer, name in (("1", "0"), ("2", "3")):
            row = table.loc[layer]
            I_x = torch.stack([one[layer][0] for one in model])
            D_x = torch.stack([one[layer][0] for one in data_side])
            v1 = torch.stack([one[layer][1] for one in model]).mean(0)
            v2 = torch.stack([flat(one["v2"], name) for one in oracle]).mean(0)
            vq = torch.stack([one[layer][1] for one in data_side]).mean(0)
            I, D = I_x.mean(0), D_x.mean(0)
            norm, bias = I @ I, (D - I) @ (D - I)
            wanted = {
                "I": I.mean(),
                "D": D.mean(),
                "distance": (bias / norm).sqrt(),
                "bias_squared": bias / norm,
                "cosine": I @ D / (norm * (D @ D)).sqrt(),
                "correlation": torch.corrcoef(torch.stack([I, D]))[0, 1],
                "distance_by_chance": (v1.sum() / m / norm).sqrt(),
                "variance_i1": (I_x.var(0, correction=0) + v1).sum() / norm,
                "variance_i2": (I_x.var(0, correction=0) + v2).sum() / norm,
                "variance_dfim": (D_x.var(0, correction=0) + vq).sum() / norm,
                "label_variance_i1": v1.sum() / norm,
                "label_variance_i2": v2.sum() / norm,
            }
            for quantity, value in wanted.items():
                assert row[quantity] == pytest.approx(float(value), rel=1e-8, abs=1e-25), quantity
            for j in (1, 2):
                gap = wanted[f"variance_i{j}"] - wanted["variance_dfim"]
                crossing = float(max(gap, torch.tensor(0.0)) / wanted["bias_squared"])
                assert row[f"crossing_i{j}"] == pytest.approx(crossing, rel=1e-6)
                labels = float(wanted[f"label_variance_i{j}"] / (m * wanted["bias_squared"]))
                assert row[f"crossing_labels_i{j}"] == pytest.approx(labels, rel=1e-7, abs=1e-25)


def test_kl_is_that_of_the_labels(empirical, untrained):
    net = untrained[0]
    X, true, _ = chosen_test_images(untrained)
    log_p = torch.log_softmax(net(X), 1).detach()
    q = 0.7 * torch.eye(10, dtype=torch.float64)[true] + 0.03
    wanted = {
        "true labels, test": -log_p[range(len(X)), true].mean(),
        "noisy labels, known q": (q * (q.log() - log_p)).sum(1).mean(),
    }
    at = empirical[(empirical.quantity == "kl") & (empirical.epoch == 0)].set_index("run").value
    for case, value in wanted.items():
        assert at[case] == pytest.approx(float(value), rel=1e-9)


def test_curves_meet_at_their_crossing(empirical):
    """At N = crossing both mean squared errors are the same; where it is 0, Î_j is never worse."""
    met = 0
    for case in CASES:
        table = wide(empirical, 2, case)
        for j in (1, 2):
            N = table[f"crossing_i{j}"]
            unbiased, other = table[f"variance_i{j}"], table.variance_dfim
            at = N > 0
            met += int(at.sum())
            assert np.allclose((unbiased / N)[at], (table.bias_squared + other / N)[at], rtol=1e-9)
            assert (unbiased <= other)[~at].all()
    assert met > 0


def test_empirical_draws_are_as_predicted(empirical):
    table = wide(empirical, 2, "true labels, train")
    for e in ("i1", "i2", "dfim"):
        bias = table.bias_squared if e == "dfim" else 0
        assert np.allclose(table[f"drawn_predicted_{e}_4"], bias + table[f"variance_{e}"] / 4)
        assert (table[f"drawn_z_{e}_4"].abs() < 5).all()
