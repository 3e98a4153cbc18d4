"""The source notebooks, and the MNIST experiment at a tiny size on the bundled digits."""

import nbformat
import numpy as np
import pytest
import torch
from support import figures, report, results, runs

import fimlib

SOURCES = sorted(runs.NOTEBOOKS.glob("*.ipynb"))
SIZE = {"epochs": 2, "train_limit": 300, "num_samples": 50, "hidden": [8, 6], "seed": 3}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_sources_store_no_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_every_run_fits_its_notebook():
    for smoke in (False, True):
        for spec in runs.specs(smoke=smoke).values():
            runs.check_parameters(spec.notebook, spec.parameters)
    assert set(runs.specs(smoke=True)) < set(runs.specs())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Two equal runs, and one with a single label."""
    folder = tmp_path_factory.mktemp("results")
    for name, size in (("a", SIZE), ("b", SIZE), ("single", SIZE | {"num_samples": 1})):
        spec = runs.Spec(name, "Tiny", runs.NOTEBOOKS / "mnist.ipynb", size)
        runs.execute(spec, folder, "digits")
    return results.load(folder)


def wide(run):
    values = run.values
    return values[values.layer != results.NETWORK].pivot_table(
        index=["epoch", "layer"], columns="quantity", values="value"
    )


def test_the_same_seed_gives_the_same_bytes(tiny):
    a, b = (tiny[k].folder / "values.csv" for k in "ab")
    assert a.read_text().replace("\na,", "\nb,") == b.read_text()


def test_values_obey_the_theory(tiny):
    table = wide(tiny["a"])
    assert list(table.index.get_level_values("epoch").unique()) == [0, 1, 2]
    assert list(table.index.get_level_values("layer").unique()) == ["1", "2", "3"]
    for quantity in ("I", "V1", "V2"):
        assert (table[f"{quantity}_violations"] == 0).all()
        assert (table[f"{quantity}_lower"] <= table[quantity]).all()
        assert (table[quantity] <= table[f"{quantity}_upper"] * (1 + 1e-12)).all()
    assert (table.V1_upper <= table.V1_certified * (1 + 1e-12)).all()
    last = table.xs("3", level="layer")
    assert (last.V2 == 0).all()
    assert np.allclose(last.I2, last.I, rtol=1e-12)
    hidden = table.drop(index="3", level="layer")
    assert (hidden.V2 > 0).all()
    assert not np.allclose(hidden.I1, hidden.I, rtol=1e-6)  # an estimate, not the exact value


def test_estimates_scatter_as_the_variances_say(tiny):
    """Layer means of Î₁, Î₂ against I: at most as far as if all parameters moved together."""
    table = wide(tiny["a"])
    for estimate, variance in (("I1", "V1"), ("I2", "V2")):
        # sd of a mean ≤ mean of sds ≤ root of the mean variance
        assert ((table[estimate] - table.I).abs() <= 5 * np.sqrt(table[variance]) + 1e-15).all()


def test_one_label_has_no_sample_variance(tiny):
    table = wide(tiny["single"])
    assert "V1_sample" not in table
    assert np.allclose(table.V1, 50 * wide(tiny["a"]).V1, rtol=1e-12)


def test_a_run_on_digits_says_what_it_is(tiny):
    run = tiny["a"]
    assert run.record["data"]["is_mnist"] is False
    assert run.record["counts"] is False
    assert run.record["parameters"]["seed"] == 3
    assert len(run.record["data"]["digest"]) == 64
    assert "NOT MNIST" in figures.caption(run.record)
    figure = figures.figure_1(run.values, run.record)
    assert "NOT MNIST" in figure.get_suptitle()
    assert [ax.get_title() for ax in figure.axes[:3]] == ["layer 1", "layer 2", "layer 3 (output)"]
    assert len(figure.legends) == 1


def test_a_figure_shows_the_table(tiny):
    run = tiny["a"]
    table = wide(run)
    figure = figures.figure_1(run.values, run.record)
    top, bottom = figure.axes[0], figure.axes[3]
    lines = {line.get_label(): line.get_ydata() for line in [*top.lines, *bottom.lines]}
    first = table.xs("1", level="layer")
    assert np.allclose(lines["Fisher information I"], first.I)
    assert np.allclose(lines[r"$\sqrt{V_2}$"], np.sqrt(first.V2))
    assert np.allclose(lines[r"log(UB/$V_1$)"], np.log(first.V1_upper / first.V1))
    output = {line.get_label() for line in figure.axes[2].lines}
    assert not any("V_2" in label for label in output)


def test_facts_are_counted_from_the_table(tiny):
    """Change the table, and exactly the statement that depends on it changes."""
    runs_ = {"a": tiny["a"]}
    rows = {f.statement: f.ours for f in report.facts(runs_)}

    class Changed(results.Run):
        @property
        def values(self):
            values = super().values
            at = (values.quantity == "V1_violations") & (values.epoch == 1) & (values.layer == "2")
            values.loc[at, "value"] = 7
            return values

    run = tiny["a"]
    changed = {
        f.statement: f.ours for f in report.facts({"a": Changed(run.name, run.folder, run.record)})
    }
    differ = {k for k in rows if rows[k] != changed[k]}
    assert differ == {"bounds of Theorem 4.1 hold"}
    assert rows["bounds of Theorem 4.1 hold"].startswith("0 violations")
    assert changed["bounds of Theorem 4.1 hold"].startswith("7 violations")


def test_against_the_reference(tiny):
    a = {"run": tiny["a"]}
    assert "identical" in report.against_reference(a, a)
    assert "no reference" in report.against_reference(a, {})

    class Doubled(results.Run):
        @property
        def values(self):
            values = super().values
            return values.assign(value=2 * values.value)

    run = tiny["a"]
    moved = report.against_reference({"run": Doubled(run.name, run.folder, run.record)}, a)
    assert "median factor of 2.00" in moved


def test_the_notebook_counts_violations_where_there_are_some():
    """Its own function on made-up bounds: beyond either side by more than the stated rounding."""
    cells = nbformat.read(runs.NOTEBOOKS / "mnist.ipynb", as_version=4).cells
    source = next(cell.source for cell in cells if "def violations(" in cell.source)
    functions = source[source.index("def count_by_layer(") : source.index("def measure(")]
    namespace = {}
    exec(functions, namespace)
    ones = torch.ones(1, 6, dtype=torch.float64)
    interval = fimlib.Interval({"0.w": ones, "0.b": ones, "2.w": ones}, {
        "0.w": 2 * ones, "0.b": 2 * ones, "2.w": 2 * ones,
    })  # fmt: skip
    at = torch.tensor([[0.9, 1 - 1e-9, 1.0, 2.0, 2 + 1e-8, 3.0]], dtype=torch.float64)
    rounding = torch.tensor([[1 - 1e-12, 1.5, 1.5, 1.5, 1.5, 2 + 1e-12]], dtype=torch.float64)
    value = {"0.w": at, "0.b": rounding, "2.w": rounding}
    assert namespace["violations"](value, interval) == {"1": 4, "2": 0}
    assert namespace["violations"](value | {"2.w": at}, interval) == {"1": 4, "2": 4}
