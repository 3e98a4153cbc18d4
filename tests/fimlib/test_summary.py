"""One call for all questions: its numbers are those of the functions that it stands on."""

import builtins
import dataclasses
import itertools
import math
import re
import time

import numpy as np
import pytest
import torch
from torch import nn

import fimlib
from fimlib import projections, streaming
from fimlib.summary import measure as module
from fimlib.summary import plot as drawing
from fimlib.summary import text as words

FAMILIES = {
    "categorical": fimlib.Categorical(),
    "bernoulli": fimlib.Bernoulli(),
    "poisson": fimlib.Poisson(),
    "gaussian": fimlib.Gaussian(),
    "gaussian-head": fimlib.GaussianHead(),
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Small networks are slower on several threads, much so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mlp(outputs=4):
    torch.manual_seed(0)
    layers = nn.Linear(3, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, outputs)
    return nn.Sequential(*layers).double()


def inputs(count=7):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(1)).double()


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        z, _ = self.attention(x, x, x, need_weights=False)
        return self.head(self.norm(x + z).mean(1))


def attends():
    torch.manual_seed(0)
    return Attends().double().eval()


def layer_sums(diagonal):
    """Sums over each layer's parameters of the mean over the inputs, entry by entry."""
    found = {}
    for name, value in diagonal.items():
        layer = name.rpartition(".")[0]
        found[layer] = found.get(layer, 0.0) + value.mean(0).sum()
    return found


def squared_norms(I):
    found = {}
    for name, value in I.items():
        layer = name.rpartition(".")[0]
        found[layer] = found.get(layer, 0.0) + value.mean(0).square().sum()
    return found


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_errors_and_counts_are_those_of_the_definitions(family):
    """Over m inputs with N labels each the variance is E_x V / (m N)."""
    net, x, num_samples = mlp(), inputs(), 3
    found = fimlib.summarise(net, x, family, num_samples=num_samples, relative_error=0.2)
    derivs = fimlib.differentiate(net, x)
    I = fimlib.fisher_information(derivs, family)
    norm, means = squared_norms(I), layer_sums(I)
    V = [layer_sums(f(derivs, family)) for f in (fimlib.variance_i1, fimlib.variance_i2)]
    signs = layer_sums(projections.variance_signs(derivs, family))
    important = None
    if isinstance(family, fimlib.Categorical):
        important = layer_sums(projections.variance_importance(derivs, family))
    assert [row.layer for row in found.layers] == ["0", "2", "4"]
    assert [row.num_parameters for row in found.layers] == [20, 24, 20]
    for row in found.layers:
        v1, v2 = (float(v[row.layer]) for v in V)
        squared = float(norm[row.layer])
        assert row.mean_fisher == pytest.approx(float(means[row.layer]) / row.num_parameters)
        assert row.relative_sd_i1 == pytest.approx((v1 / (len(x) * num_samples) / squared) ** 0.5)
        assert row.relative_sd_i2 == pytest.approx((v2 / (len(x) * num_samples) / squared) ** 0.5)
        assert row.relative_sd_i2_error == 0
        unit = len(x) * num_samples * squared
        assert row.relative_sd_signs == pytest.approx(float(signs[row.layer] / unit) ** 0.5)
        if important is None:
            assert row.relative_sd_importance is row.labels_needed_importance is None
        else:
            v = float(important[row.layer])
            assert row.relative_sd_importance == pytest.approx((v / unit) ** 0.5)
            wanted = v / len(x) / (0.2**2 * 0.05 * squared)
            assert row.labels_needed_importance == max(1, math.ceil(wanted * (1 - 1e-9)))
        wanted = float(signs[row.layer]) / len(x) / (0.2**2 * 0.05 * squared)
        assert row.labels_needed_signs == max(1, math.ceil(wanted * (1 - 1e-9)))
        assert row.better == (2 if v2 < v1 else 1)
        for v, needed in ((v1, row.labels_needed_i1), (v2, row.labels_needed_i2)):
            wanted = v / len(x) / (0.2**2 * 0.05 * squared)
            assert needed == max(1, math.ceil(wanted * (1 - 1e-9)))
    assert {row.better for row in found.layers} <= {1, 2}
    assert (found.num_probes, found.num_estimated, found.engine) == (0, 0, "layerwise")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_nearly_normal_errors_need_fewer_samples(family):
    """At 95 %, the square of 1.96 in the place of 1/0.05; for random inputs, too."""
    sure, near = (
        fimlib.summarise(mlp(), inputs(), family, relative_error=1e-3, rule=rule)
        for rule in ("chebyshev", "approximate")
    )
    share = 1.959963984540054**2 * 0.05
    for a, b in zip(sure.layers, near.layers, strict=True):
        for field in a._fields:
            x, y = getattr(a, field), getattr(b, field)
            if "needed" in field and x is not None:
                assert y == pytest.approx(max(1, x * share), abs=1.2)
            else:
                assert x == y
    joint = fimlib.accumulate(mlp(), inputs(), family)
    needed = joint.num_inputs_needed(1e-3, 0.95, rule="approximate")
    assert {row.layer: row.inputs_needed_i1 for row in near.layers} == needed
    text = str(sure).replace("\n", " ")
    fewer = int(
        re.search(r"; about ([\d,]+) if errors are nearly normal", text)[1].replace(",", "")
    )
    best = [r.labels_needed_i2 if r.better == 2 else r.labels_needed_i1 for r in near.layers]
    assert fewer == pytest.approx(max(best), abs=1)
    assert "are enough in every layer if errors are nearly normal;" in str(near).replace("\n", " ")
    assert (sure.rule, near.rule) == ("chebyshev", "approximate")


@pytest.mark.long
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_with_so_many_labels_the_error_is_as_small_as_asked_for(confidence):
    """Labels are drawn for 7 inputs, as counts of classes; errors of Î₁ over a layer."""
    net, x, family, draws = mlp(), inputs(), FAMILIES["categorical"], 4000
    ask = {"relative_error": 0.1, "confidence": confidence}
    found = fimlib.summarise(net, x, family, **ask, rule="approximate")
    derivs = fimlib.differentiate(net, x)
    h = family.natural(derivs.outputs)
    generator = torch.Generator().manual_seed(0)
    for row in found.layers:
        keys = [f"{row.layer}.weight", f"{row.layer}.bias"]
        J = torch.cat([derivs.jacobian(key).double().flatten(2) for key in keys], 2)
        squares = family.project(h, J).square()
        shares = [
            family.sample(one.expand(draws, -1), int(row.labels_needed_i1), generator).weights
            for one in h[:, None]
        ]
        I = torch.einsum("bk,bki->i", family.mean(h), squares) / len(x)
        off = sum(w @ of_one for w, of_one in zip(shares, squares, strict=True)) / len(x) - I
        kept = float((torch.linalg.vector_norm(off, dim=1) < 0.1 * I.norm()).double().mean())
        assert kept >= confidence - 0.02
        assert row.labels_needed_i1 > 1


def test_for_one_input_it_is_what_the_other_functions_say():
    net, x, family = mlp(), inputs(1), FAMILIES["categorical"]
    found = fimlib.summarise(net, x, family, relative_error=0.3, confidence=0.8)
    derivs = fimlib.differentiate(net, x)
    compared = fimlib.compare_estimators(derivs, family)
    bounds = fimlib.theorem_4_1(
        derivs, family, eigenvalues=fimlib.spectrum(family, derivs.outputs, method="certified")
    )
    norm = squared_norms(fimlib.fisher_information(derivs, family))
    for row in found.layers:
        assert row.relative_sd_i1 == pytest.approx(float(compared[row.layer].relative_sd_i1))
        assert row.relative_sd_i2 == pytest.approx(float(compared[row.layer].relative_sd_i2))
        assert row.better == int(compared[row.layer].less_variance)
        for j, needed in ((1, row.labels_needed_i1), (2, row.labels_needed_i2)):
            expected = fimlib.num_samples_needed(
                derivs, family, relative_error=0.3, confidence=0.8, estimator=j
            )
            assert needed == float(expected[row.layer])
        assert (row.inputs_needed_i1, row.inputs_needed_i2) == (None, None)
        for bound, upper in (
            (row.bound_i1, bounds.variance_i1.upper),
            (row.bound_i2, bounds.variance_i2.upper),
        ):
            expected = (layer_sums(upper)[row.layer] / norm[row.layer]) ** 0.5
            assert bound == pytest.approx(float(expected))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_random_inputs_are_those_of_joint_and_bounds_hold(family):
    found = fimlib.summarise(mlp(), inputs(), family, num_samples=2)
    joint = fimlib.accumulate(mlp(), inputs(), family)
    needed = [joint.num_inputs_needed(0.1, 0.95, num_labels=2, estimator=j) for j in (1, 2)]
    for row in found.layers:
        assert row.inputs_needed_i1 == needed[0][row.layer]
        assert row.inputs_needed_i2 == needed[1][row.layer]
        assert row.bound_i1 >= row.relative_sd_i1 * (1 - 1e-12)
        assert row.bound_i2 >= row.relative_sd_i2 * (1 - 1e-12)
    if isinstance(family, fimlib.Gaussian):  # Prop. 5.1
        for row in found.layers:
            assert row.bound_i1 == pytest.approx(row.relative_sd_i1)
            assert row.bound_i2 == pytest.approx(row.relative_sd_i2)


def test_batches_a_loader_and_other_engines_say_the_same():
    net, x, family = mlp(), inputs(), FAMILIES["categorical"]
    whole = fimlib.summarise(net, x, family)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x), batch_size=3)
    for other in (
        fimlib.summarise(net, [x[:2], x[2:]], family),
        fimlib.summarise(net, iter([x[:2], x[2:]]), family),
        fimlib.summarise(net, loader, family),
        fimlib.summarise(net, x, family, engine="traced"),
    ):
        assert other.num_inputs == 7
        for a, b in zip(whole.layers, other.layers, strict=True):
            for key in ("mean_fisher", "relative_sd_i1", "relative_sd_i2", "bound_i1"):
                assert getattr(b, key) == pytest.approx(getattr(a, key), rel=1e-9)
            assert (a.better, a.labels_needed_i1) == (b.better, b.labels_needed_i1)


def test_only_the_named_layers():
    net, x, family = mlp(), inputs(), FAMILIES["categorical"]
    whole, one = (fimlib.summarise(net, x, family, layers=names) for names in (None, ["2"]))
    assert [row.layer for row in one.layers] == ["2"]
    assert one.layers[0].relative_sd_i2 == pytest.approx(whole.layers[1].relative_sd_i2)
    assert "Take Î₁ for layer 2." in str(one)


@pytest.fixture
def first_order_only(monkeypatch):
    """As if the network were too large for second derivatives."""

    def functional(model, x, _engine, layers, _clock):
        return fimlib.differentiate(model, x, engine="functional", order=1, layers=layers), 1

    return lambda: monkeypatch.setattr(module, "_engine", functional)


@pytest.mark.long
@pytest.mark.parametrize("count", [7, 50])
def test_an_estimate_of_v2_says_so_and_its_error_covers_the_truth(count, first_order_only):
    """Where S is known, too; at all inputs, or at 32 of 50."""
    net, x, family = mlp(), inputs(count), FAMILIES["categorical"]
    exact = fimlib.summarise(net, x, family)
    first_order_only()
    found = fimlib.summarise(net, x, family, engine="functional", num_probes=64)
    assert found.num_estimated == min(count, 32)
    assert found.num_probes == 64
    for a, b in zip(exact.layers, found.layers, strict=True):
        assert b.relative_sd_i1 == pytest.approx(a.relative_sd_i1)
        assert b.bound_i2 is None
        v = [row.relative_sd_i2**2 for row in (a, b)]
        error = (b.relative_sd_i2 + b.relative_sd_i2_error) ** 2 - v[1]
        assert error > 0
        assert abs(v[0] - v[1]) <= 5 * error
        assert b.labels_needed_i2 >= 1
        assert b.better in (a.better, None)
    said = str(found)
    assert f"V₂ estimated from 64 probes at {min(count, 32)} inputs" in said
    assert said.count(" % ± ") == 3
    assert "all exact" in str(exact)
    assert "±" not in str(exact)


@pytest.mark.parametrize("count", [7, 50])
def test_the_error_of_an_estimate_is_that_of_its_probes_or_of_its_inputs(count, first_order_only):
    first_order_only()
    net, x, family = mlp(), inputs(count), FAMILIES["categorical"]
    found = fimlib.summarise(net, x, family, engine="functional", num_probes=8)
    sample = module._Sample(32)
    list(sample.of([(1, net, x)]))
    [(_, _, drawn)] = sample.kept
    estimate = fimlib.hutchinson_variance_i2(
        net, drawn, family, num_probes=8, generator=torch.Generator().manual_seed(0)
    )
    norm = squared_norms(fimlib.fisher_information(fimlib.differentiate(net, x), family))
    for row in found.layers:
        means, errors = estimate.layer_means[row.layer]
        if count == 7:
            error = row.num_parameters * errors.square().sum().sqrt() / 7
        else:
            error = row.num_parameters * means.std() / 32**0.5
        v, unit = row.num_parameters * means.mean(), count * norm[row.layer]
        assert row.relative_sd_i2 == pytest.approx(float(v.clamp_min(0) / unit) ** 0.5)
        above = row.relative_sd_i2 + row.relative_sd_i2_error
        assert above == pytest.approx(float((v.clamp_min(0) + error) / unit) ** 0.5)
        wanted = float((v + 2 * error).clamp_min(0) / unit) / (0.1**2 * 0.05)
        assert row.labels_needed_i2 == max(1, math.ceil(wanted * (1 - 1e-9)))


@pytest.mark.long
def test_large_networks_without_an_exact_s_are_estimated(monkeypatch):
    monkeypatch.setattr(module, "FEW_PARAMETERS", 20)
    x = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    found = fimlib.summarise(attends(), x, FAMILIES["categorical"], num_probes=8)
    again = fimlib.summarise(attends(), x, FAMILIES["categorical"], num_probes=8)
    assert found.layers == again.layers  # probes of a fixed seed
    assert found.num_estimated == 4
    monkeypatch.undo()
    exact = fimlib.summarise(attends(), x, FAMILIES["categorical"])
    assert (exact.engine, exact.num_estimated) == ("functional", 0)
    assert [row.layer for row in found.layers] == [
        "attention", "attention.out_proj", "norm", "head",
    ]  # fmt: skip
    V1 = fimlib.accumulate(attends(), x, FAMILIES["categorical"], quantities=["V1"])
    total = sum(V1.label_variance(1)[f"head.{k}"].sum() for k in ("weight", "bias")) / 4
    norm = sum(V1.fisher_information()[f"head.{k}"].square().sum() for k in ("weight", "bias"))
    assert found.layers[-1].relative_sd_i1 == pytest.approx(float((total / norm) ** 0.5))


@pytest.mark.long
def test_the_callers_random_numbers_stay(monkeypatch):
    x = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    network = attends()
    before = torch.get_rng_state()
    for most in (10_000, 0):
        monkeypatch.setattr(module, "FEW_PARAMETERS", most)
        fimlib.summarise(network, x, FAMILIES["categorical"], num_probes=4)
        assert torch.equal(torch.get_rng_state(), before)


def test_without_an_affordable_s_the_second_estimator_is_left_out(monkeypatch):
    from matplotlib import pyplot as plt

    monkeypatch.setattr(module, "FEW_PARAMETERS", 20)
    x = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    found = fimlib.summarise(attends(), x, FAMILIES["categorical"])
    V = fimlib.accumulate(attends(), x, FAMILIES["categorical"], quantities=["signs"])
    signs = V.layer_sums(V.label_variance("signs"))
    norms = V.layer_sums({n: I.square() for n, I in V.fisher_information().items()})
    for row in found.layers:
        assert row.relative_sd_i2 is row.labels_needed_i2 is row.inputs_needed_i2 is None
        assert row.better is None
        expected = float(signs[row.layer] / 4 / norms[row.layer]) ** 0.5
        assert row.relative_sd_signs == pytest.approx(expected)
    said = str(found)
    assert "Î₂ is left out" in said
    assert "num_probes=128 estimates it" in said
    assert said.split("\n")[6].split()[-6:] == ["Î₁", "imp.", "sign"] * 2
    figure = found.plot()
    assert {text.get_text() for ax in figure.axes for text in ax.texts} == {r"$\hat I_1$"}
    plt.close(figure)


def test_the_cheapest_way_counts_backward_passes():
    found = fimlib.summarise(mlp(), inputs(), FAMILIES["categorical"])
    line = str(found).replace("\n", " ").partition("The cheapest")[2]
    assert "is I itself (joint.fisher_information() of this summary): 4;" in line
    most = {
        "Î₁": max(row.labels_needed_i1 for row in found.layers),
        "important classes": max(row.labels_needed_importance for row in found.layers),
        "random signs": max(row.labels_needed_signs for row in found.layers),
    }
    for name, passes in most.items():
        assert f"{name} {passes:,.0f}" in line
    few = fimlib.summarise(mlp(), inputs(), FAMILIES["categorical"], relative_error=10)
    assert "The cheapest in backward passes is Î₁ (estimate, estimator='labels'" in str(
        few
    ).replace("\n", " ")


def test_a_budget_is_kept(monkeypatch):
    """Inputs that are left when it ends are left out, and the result says so."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    batches = []

    def slowly():
        for batch in inputs(30).split(5):
            now[0] += 10.0
            batches.append(batch)
            yield batch

    found = fimlib.summarise(mlp(), slowly(), FAMILIES["categorical"], budget=25.0)
    assert found.is_cut
    assert found.num_inputs == 15
    assert len(batches) == 4  # the last of them tells that there is more
    assert str(found).startswith("the first 15 inputs (budget=), Categorical outputs")
    whole = fimlib.summarise(mlp(), inputs(30)[:15], FAMILIES["categorical"])
    assert not whole.is_cut
    assert [row.relative_sd_i1 for row in found.layers] == pytest.approx(
        [row.relative_sd_i1 for row in whole.layers]
    )


@pytest.mark.parametrize("after", [[], [inputs(5)], [inputs(5)[0, 0]]])
def test_a_budget_that_ends_with_the_last_input_cuts_nothing(monkeypatch, after):
    """A batch that would be refused is one that is left."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def slowly():
        for batch in [*inputs(15).split(5), *after]:
            now[0] += 10.0
            yield batch

    found = fimlib.summarise(mlp(), slowly(), FAMILIES["categorical"], budget=25.0)
    assert found.num_inputs == 15
    assert found.is_cut == bool(after)


def test_a_budget_that_ends_inside_a_batch_cuts_it(monkeypatch):
    monkeypatch.setattr(streaming, "first_size", lambda *_: streaming.BatchSize(4))
    for budget, count in ((1.0, 4), (None, 10)):
        clock = iter([0.0, *[100.0] * 100]) if budget else itertools.repeat(0.0)
        monkeypatch.setattr(module.time, "monotonic", lambda clock=clock: next(clock))
        found = fimlib.summarise(mlp(), [inputs(10)], FAMILIES["categorical"], budget=budget or 60)
        assert (found.num_inputs, found.is_cut) == (count, bool(budget))


@pytest.mark.parametrize("at", [0, 4, 8])
@pytest.mark.parametrize("batches", [1, 3])
def test_damaged_inputs_are_named_as_accumulate_names_them(at, batches):
    x = inputs(9)
    x[at, 1] = math.nan
    said = []
    for function in (fimlib.accumulate, fimlib.summarise):
        with pytest.raises(ValueError, match="NaN or infinite values") as caught:
            function(mlp(), list(x.split(9 // batches)), FAMILIES["categorical"])
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert said[0].startswith(f"batch {1 + at * batches // 9}")


def test_ctrl_c_ends_it_as_it_ends_accumulate():
    def interrupted():
        yield inputs(3)
        raise KeyboardInterrupt

    for function in (fimlib.accumulate, fimlib.summarise):
        with pytest.raises(KeyboardInterrupt):
            function(mlp(), interrupted(), FAMILIES["categorical"])


class Slow(torch.autograd.Function):
    """Its second derivative takes a second; of nothing else."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    def backward(ctx, grad):
        return SlowSlope.apply(ctx.saved_tensors[0]) * grad


class SlowSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.cos(x)

    @staticmethod
    def backward(ctx, grad):
        time.sleep(1)
        return -torch.sin(ctx.saved_tensors[0]) * grad


class Sluggish(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 40), nn.Linear(40, 2)  # 243 parameters

    def forward(self, x):
        return self.outer(Slow.apply(self.inner(x)))


@pytest.mark.long
@pytest.mark.parametrize("engine", ["auto", "functional"])
def test_second_derivatives_are_given_up_within_the_budget(engine):
    net, x = Sluggish().double(), inputs(20)
    start = time.monotonic()
    found = fimlib.summarise(net, x, FAMILIES["categorical"], engine=engine, budget=4.0)
    assert time.monotonic() - start < 10
    assert not found.has_i2
    assert found.num_inputs > 0
    assert torch.is_grad_enabled()


def test_second_derivatives_that_take_too_long_are_left_out(monkeypatch):
    x = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    found = fimlib.summarise(attends(), x, FAMILIES["categorical"], budget=1000.0)
    assert found.has_i2
    times = iter(range(0, 100_000, 300))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))  # 300 s for one input
    assert not fimlib.summarise(attends(), x, FAMILIES["categorical"], budget=1000.0).has_i2


def test_tied_parameters_are_taken():
    net = mlp(outputs=4)
    net[2] = nn.Linear(5, 5).double()
    net[4] = nn.Linear(5, 5).double()
    net[4].weight = net[2].weight
    found = fimlib.summarise(net, inputs(3), FAMILIES["gaussian"])
    assert [(row.layer, row.num_parameters) for row in found.layers] == [
        ("0", 20), ("2", 30), ("4", 5),
    ]  # fmt: skip
    assert (found.engine, found.num_estimated) == ("functional", 0)


def test_an_uncertain_choice_is_none():
    assert module._better(1.0, 0.5, 0.3) is None
    assert module._better(1.0, 0.5, 0.2) == 2
    assert module._better(1.0, 1.5, 0.2) == 1
    assert module._better(1.0, 1.0, 0.0) == 1
    assert module._better(0.0, 0.0, 0.0) == 1
    found = fimlib.summarise(mlp(), inputs(), FAMILIES["categorical"])
    row = found.layers[0]._replace(better=None)
    text = str(dataclasses.replace(found, layers=(row, *found.layers[1:])))
    assert "V₂ is too uncertain to choose for layer 0: Î₁ is counted on there" in text
    assert "standard error" not in text


def test_an_error_that_counts_a_standard_error_says_so():
    found = fimlib.summarise(mlp(), inputs(), FAMILIES["categorical"])
    for better, is_said in ((2, True), (1, False), (None, False)):
        row = found.layers[0]._replace(
            better=better, relative_sd_i1=0.3, relative_sd_i2=0.1, relative_sd_i2_error=0.05
        )
        text = str(dataclasses.replace(found, layers=(row,)))
        expected = "15 % of I (counting one standard error)." if is_said else "30 % of I."
        assert f"\nThe error is then {expected}\n" in text
    assert re.search(r"^0 .*\?$", text, re.MULTILINE)


def test_a_sample_is_some_of_the_inputs_each_as_likely():
    counts = torch.zeros(40)
    for seed in range(300):
        sample = module._Sample(10)
        sample._generator.manual_seed(seed)
        stream = [(1, None, x) for x in torch.arange(40.0)[:, None].split([1, 20, 0, 19])]
        assert list(sample.of(stream)) == stream
        assert len(sample) == 10
        chosen = torch.cat([x for _, _, x in sample.kept]).flatten().long()
        assert len(set(chosen.tolist())) == 10
        counts[chosen] += 1
    # binomial with mean 75 and standard deviation 7.5
    assert (counts - 75).abs().max() < 5 * 7.5
    few = module._Sample(10)
    list(few.of([(1, None, torch.ones(3, 1))]))
    assert len(few) == 3


def test_the_table_is_aligned_and_says_what_it_found():
    found = fimlib.summarise(mlp(), inputs(), FAMILIES["categorical"])
    lines = str(found).split("\n")
    assert lines[0] == "7 inputs, Categorical outputs; all exact (engine 'layerwise')."
    rule = next(i for i, line in enumerate(lines) if line.startswith("─"))
    titles, rows = lines[rule - 1], lines[rule + 1 : rule + 4]
    names = ["Î₁", "Î₂", "imp.", "sign"]
    assert titles.split() == [*["layer", "params", "mean", "I"], *names * 2, "better"]
    assert {len(line) for line in [titles, lines[rule], *rows]} == {len(titles)}
    for line, row in zip(rows, found.layers, strict=True):
        cells = re.split(r"\s{2,}", line)
        assert cells[0] == row.layer
        assert cells[-1] == f"Î{'₁₂'[row.better - 1]}"
        assert cells[3] == words.percent(row.relative_sd_i1)
        assert cells[5] == words.percent(row.relative_sd_importance)
        assert cells[8] == f"{row.labels_needed_i2:,.0f}"
        assert cells[10] == f"{row.labels_needed_signs:,.0f}"
    best = max(
        row.labels_needed_i2 if row.better == 2 else row.labels_needed_i1 for row in found.layers
    )
    assert f"\n{best:,.0f} labels per input are enough in every layer" in str(found)
    one = str(fimlib.summarise(mlp(), inputs(1), FAMILIES["categorical"], num_samples=10**9))
    assert "inputs" not in one
    assert "per input" not in one
    assert "no more labels are needed" in one
    assert "1,000,000,000 labels for it" in one


def test_an_estimate_that_no_labels_mend_is_called_one():
    found = fimlib.summarise(mlp(), inputs(), FAMILIES["categorical"])
    row = found.layers[0]._replace(labels_needed_i1=math.inf, labels_needed_i2=math.inf)
    text = str(dataclasses.replace(found, layers=(row,)))
    assert "no number of labels is enough" in text
    assert re.search(r"^0 .* inf +inf ", text, re.MULTILINE)


def test_where_no_number_of_labels_is_enough_it_is_infinite():
    class Squared(nn.Module):  # h = w²x at w = 0: J = 0 and S = 2x, so that I = 0 and V₂ = 4x²
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1).double())

        def forward(self, x):
            return self.w.square() * x

    found = fimlib.summarise(Squared(), inputs()[:, :1], fimlib.Gaussian()).layers[0]
    assert found.relative_sd_i2 == found.labels_needed_i2 == found.inputs_needed_i2 == math.inf
    assert (found.relative_sd_i1, found.labels_needed_i1) == (0.0, 1.0)
    assert found.relative_sd_i2_error == 0.0  # and not ∞ − ∞


def test_the_summary_holds_the_fisher_information_itself():
    net, x, family = mlp(), inputs(), FAMILIES["categorical"]
    I = fimlib.summarise(net, x, family).joint.fisher_information()
    exact = fimlib.fisher_information(fimlib.differentiate(net, x), family).mean_over_inputs()
    for name, value in exact.items():
        torch.testing.assert_close(I[name], value)


def test_many_outputs_have_no_bounds():
    found = fimlib.summarise(mlp(outputs=33), inputs(2), FAMILIES["categorical"])
    assert {(row.bound_i1, row.bound_i2) for row in found.layers} == {(None, None)}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples (N) must be an integer ≥ 1"),
        ({"relative_error": 0}, ValueError, "relative_error (ε) must be a positive number"),
        ({"confidence": 1.0}, ValueError, "confidence must lie between 0 and 1"),
        ({"rule": "bernstein"}, ValueError, "rule must be one of 'chebyshev', 'approximate'"),
        ({"num_probes": 2}, ValueError, "num_probes must be an integer ≥ 3"),
        ({"budget": 0}, ValueError, "budget must be a positive number of seconds, got 0"),
        ({"layers": ["9"]}, ValueError, "no layer '9' with parameters; there are: '0', '2', '4'"),
        ({"engine": "magic"}, ValueError, "unknown engine 'magic'"),
        ({"inputs": torch.ones(0, 3)}, ValueError, "there are no inputs"),
        ({"inputs": iter([])}, ValueError, "make it anew"),
        ({"inputs": torch.ones(3)}, ValueError, "add a batch dimension"),
        ({"inputs": torch.ones(2, 3)}, ValueError, "convert one of them with .to(...)"),
        ({"inputs": [[1.0]]}, TypeError, "batch 1 is a float"),
        (
            {"inputs": {"x": inputs()}},
            TypeError,
            "inputs is a dict, which may be one batch",
        ),
        ({"family": inputs()}, TypeError, "a Tensor is no output family: the order is model, inp"),
        ({"model": nn.Linear}, TypeError, "Linear is a class: make an instance of it"),
        ({"family": fimlib.Categorical}, TypeError, "Categorical()"),
        ({"model": lambda x: x}, TypeError, "must be an nn.Module"),
        ({"model": mlp(outputs=1)}, ValueError, "Categorical needs outputs of shape [B, T]"),
        ({"model": nn.Sequential(nn.Linear(3, 2), nn.Dropout()).double()}, ValueError, "eval()"),
    ],
)
def test_mistakes_are_named(arguments, error, message):
    given = {"model": mlp(), "inputs": inputs(), "family": fimlib.Categorical()} | arguments
    model, x, family = (given.pop(key) for key in ("model", "inputs", "family"))
    with pytest.raises(error, match=re.escape(message)):
        fimlib.summarise(model, x, family, **given)


def test_the_figure_shows_the_numbers():
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    found = fimlib.summarise(mlp(), inputs(), FAMILIES["categorical"], num_samples=4)
    figure = found.plot()
    assert [ax.get_title() for ax in figure.axes] == ["0", "2", "4"]
    for ax, row in zip(figure.axes, found.layers, strict=True):
        lines = {line.get_label(): line for line in ax.lines}
        for j, sd, needed in (
            (1, row.relative_sd_i1, row.labels_needed_i1),
            (2, row.relative_sd_i2, row.labels_needed_i2),
        ):
            name = rf"$\hat I_{j}$"
            assert (name in lines) == (sd > 0)
            assert [text.get_text() for text in ax.texts].count(name) == (sd > 0)
            if sd > 0:
                assert lines[name].get_xdata()[0] == 1
                assert lines[name].get_ydata()[0] == pytest.approx(2 * sd)  # N = 4
                [at] = lines[f"labels needed of {name}"].get_xdata()
                assert at == needed
                [error] = lines[f"labels needed of {name}"].get_ydata()
                # Chebyshev: sd = ε √(1 − confidence), rounded up to whole labels
                assert error <= 0.1 * 0.05**0.5 * (1 + 1e-9)
    assert any(text.get_text() == "$V_2 = 0$" for text in figure.axes[2].texts)
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "Fisher information I", "error asked for", "upper bound", "labels needed",
    ]  # fmt: skip
    plt.close(figure)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("num_samples", [1, pytest.param(50, marks=pytest.mark.full)])
def test_names_stand_beside_their_lines_and_meet_nothing(family, num_samples):
    from matplotlib import colors
    from matplotlib import pyplot as plt

    figure = fimlib.summarise(mlp(), inputs(), family, num_samples=num_samples).plot()
    figure.canvas.draw()
    for ax in figure.axes:
        courses = {line.get_label(): course(line) for line in ax.lines}
        boxes = [text.get_window_extent() for text in ax.texts]
        assert len(boxes) == 2
        assert not boxes[0].overlaps(boxes[1])
        for text, box in zip(ax.texts, boxes, strict=True):
            for at in courses.values():
                inside = (at > [box.x0, box.y0]) & (at < [box.x1, box.y1])
                assert not inside.all(1).any(), text.get_text()
            assert ax.bbox.x0 < box.x0 < box.x1 < ax.bbox.x1
            assert ax.bbox.y0 < box.y0 < box.y1 < ax.bbox.y1
            assert contrast_to_white(colors.to_rgb(text.get_color())) >= 4.5
            if own := [at for name, at in courses.items() if name == text.get_text()]:
                line = next(line for line in ax.lines if line.get_label() == text.get_text())
                hues = [colors.rgb_to_hsv(colors.to_rgb(t.get_color()))[0] for t in (line, text)]
                assert hues[0] == pytest.approx(hues[1], abs=0.02)
                centre = [(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2]
                away = ((own[0] - centre) ** 2).sum(1).min() ** 0.5
                assert away < 1.5 * max(box.width, box.height)
    plt.close(figure)


def course(line):
    """Where a line runs, in pixels: [n, 2]."""
    ends = line.get_transform().transform(line.get_xydata())
    share = np.linspace(0, 1, 501)[:, None]
    return ends[0] * (1 - share) + ends[-1] * share


def contrast_to_white(rgb):
    """By the formula of the WCAG."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 1.05 / (np.dot([0.2126, 0.7152, 0.0722], linear) + 0.05)


def test_where_no_place_is_free_a_name_stands_where_there_is_most_room():
    at = np.array([[0.5, y] for y in np.linspace(0, 1, 101)])
    places = [np.array([0.5, 0.5]), np.array([0.47, 0.5]), np.array([0.48, 0.5])]
    found = drawing.freest(places, np.array([0.1, 0.1]), [at])
    assert found.tolist() == [0.47, 0.5]
    free = np.array([0.6, 0.5])
    found = drawing.freest([*places, free, free + 0.1], np.array([0.1, 0.1]), [at])
    assert found.tolist() == free.tolist()


def test_the_figure_says_where_v2_is_an_estimate():
    from matplotlib import pyplot as plt

    found = fimlib.summarise(mlp(), inputs(), FAMILIES["categorical"])
    unsure = found.layers[2]._replace(relative_sd_i2_error=0.25)
    figure = dataclasses.replace(found, layers=(unsure,)).plot()
    assert [t.get_text() for t in figure.axes[0].texts] == [r"$\hat I_1$", r"$V_2 \approx 0$"]
    assert figure.legends[0].get_texts()[-1].get_text() == "one standard error above"
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["one standard error above"].get_ydata()[0] == pytest.approx(0.25)
    plt.close(figure)


def test_the_figure_says_where_there_is_nothing_to_estimate():
    from matplotlib import pyplot as plt

    found = fimlib.summarise(mlp(), inputs(), FAMILIES["categorical"])
    endless = found.layers[0]._replace(
        relative_sd_i1=0.0, relative_sd_i2=math.inf, labels_needed_i2=math.inf, bound_i2=math.inf
    )
    figure = dataclasses.replace(found, layers=(endless,)).plot()
    figure.canvas.draw()
    [ax] = figure.axes
    assert [t.get_text() for t in ax.texts] == ["$V_1 = 0$", "$V_2 > I = 0$"]
    assert not ax.texts[0].get_window_extent().overlaps(ax.texts[1].get_window_extent())
    assert len(ax.lines) == 2
    plt.close(figure)


def test_without_matplotlib_the_figure_says_how_to_get_it(monkeypatch):
    found = fimlib.summarise(mlp(), inputs(2), FAMILIES["categorical"])
    real = builtins.__import__

    def missing(name, *rest, **more):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=re.escape("not installed: pip install matplotlib")):
        found.plot()
