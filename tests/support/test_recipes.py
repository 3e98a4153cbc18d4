"""The decisions of Section 9.9: the methods by hand, and what its page says of the reference."""

import copy

import pytest
import torch
from by_cell import run
from support import report, results, training

TINY = {
    "dataset": "digits", "hidden": [6], "training_size": 60, "steps": 3, "passes": [20],
    "strengths": [10.0], "floors": [0.1], "shares": [0.5], "seeds": [0], "train_limit": 100,
    "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def recipes():
    return run("recipes.ipynb", **TINY)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    net = training.mlp([64, 6, 10], "Tanh").eval()
    return net, {n: torch.rand_like(p) for n, p in net.named_parameters()}, torch.rand(5, 64)


def other(net):
    moved = copy.deepcopy(net)
    for p in moved.parameters():
        p.data += torch.rand_like(p)
    return moved


def test_the_penalty_holds_each_parameter_by_its_information(recipes, problem):
    net, I, _ = problem
    moved = other(net)
    recipes["consolidated"](net, I, 3.0)(moved).backward()
    for n, p in moved.named_parameters():
        torch.testing.assert_close(p.grad, 3.0 * I[n] * (p - net.get_parameter(n)).detach())


def test_merged_parameters_lie_nearer_to_the_network_that_needs_them(recipes, problem):
    net, I, _ = problem
    theirs = other(net)
    found = recipes["merged"](net, theirs, I, {n: 3 * v for n, v in I.items()}, 0.0)
    for n, p in found.named_parameters():
        torch.testing.assert_close(p, 0.25 * net.get_parameter(n) + 0.75 * theirs.get_parameter(n))


def test_the_least_salient_parameters_are_pruned(recipes, problem):
    net, I, _ = problem
    found = dict(recipes["pruned"](net, I, 0.5).named_parameters())
    flat = recipes["flat"]
    kept = flat(found) != 0
    saliency = flat({n: I[n] * p.detach().square() for n, p in net.named_parameters()})
    assert kept.sum() == len(kept) - len(kept) // 2
    assert saliency[kept].min() > saliency[~kept].max()


def test_the_variance_of_the_logits_is_that_of_the_last_layer(recipes, problem):
    net, I, x = problem
    z = net[:-1](x).detach()
    weight, bias = (7 * I[n] + 2.0 for n in ("3.weight", "3.bias"))
    expected = (z[:, None].square() / weight).sum(2) + 1 / bias
    found = recipes["logit_variance"](net, x, I, 7, 2.0)
    torch.testing.assert_close(found, expected.to(found))


@pytest.mark.parametrize("kind", ["exact I", "data's labels"])
def test_parts_of_a_sample_weigh_by_their_inputs(recipes, problem, kind, monkeypatch):
    net, _, _ = problem
    x, y = torch.rand(1, 64).repeat(30, 1), torch.zeros(30, dtype=torch.long)
    found = []
    for most in (1000, 7):
        monkeypatch.setitem(recipes["diagonal"].__globals__, "MOST", most)
        found.append(recipes["diagonal"](kind, net, x, y, 20 * recipes["PASSES"][kind]))
    one = recipes["exact"](net, x[:1]) if kind == "exact I" else None
    for n in found[0]:
        torch.testing.assert_close(found[0][n], found[1][n])
        assert one is None or torch.allclose(found[0][n], one[n].to(found[0][n]))


@pytest.fixture(scope="module")
def means():
    """(diagonal, passes) → the means over the seeds of the reference."""
    values = results.load(report.REFERENCE)["recipes"].values
    values[["outcome", "kind"]] = values.quantity.str.split(", ", n=1, expand=True)
    return values.pivot_table(index=["kind", "epoch"], columns="outcome", values="value")


def test_what_the_page_says_of_errors(means):
    for kind in ("Î₁", "importance", "signs", "exact I"):
        at = means.loc[kind]
        assert (abs(at.error / at.predicted - 1) < 0.15).all()
    assert (means.loc["Î₂"].error < means.loc["Î₂"].predicted).all()
    assert means.error["data's labels", 10_000] > 2 * means.error["exact I", 10_000]


def test_what_the_page_says_of_decisions(means):
    few, best = means.xs(100, level="epoch"), means.loc["I, all", 0]
    first = few.loc[["signs", "importance"]]
    for outcome in ("split", "pruned 0.8"):
        assert first[outcome].min() > few.drop(first.index)[outcome].max()
        assert few[outcome]["exact I"] < few[outcome]["Î₁"]
    later = means.loc[["Î₁", "importance", "signs", "exact I", "data's labels"]]
    later = later[later.index.get_level_values("epoch") >= 1000]
    for outcome in ("permuted", "merged", "pruned 0.5"):
        assert (abs(later[outcome] - best[outcome]) < 0.01).all()
    assert (abs(later.split - best.split) < 0.02).all()
    assert (means.loc["Î₂"].split < best.split - 0.1).all()
    alike, none = means.loc["all alike", 0], means.loc["none", 0]
    assert abs(alike.split - best.split) < 0.02
    assert abs(none.merged - best.merged) < 0.01
    assert alike["pruned 0.9"] > best["pruned 0.9"] + 0.05
    assert alike.laplace > means[means.index.get_level_values("epoch") > 0].laplace.max()
