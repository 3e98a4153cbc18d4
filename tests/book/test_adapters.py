"""A diagonal of fimlib in other libraries; skipped where one is missing.

They are installed by hand: ``.venv/bin/python -m pip install laplace-torch torch-pruning
avalanche-lib``.
"""

import copy
import importlib.util
import warnings

import pytest
import torch
from strategies import inputs, mlp
from support import results
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fimlib
from fimlib import Categorical, Gaussian


def adapter(name):
    """The module of an adapter; the test is skipped where its library cannot be imported."""
    path = results.ROOT / "book" / "adapters" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # their business
            spec.loader.exec_module(module)
    except (ImportError, RuntimeError) as error:  # of torchvision beside another torch
        pytest.skip(f"{name}: {error}")
    return module


def problem():
    """A network, its inputs, and labels."""
    net, x = mlp([4, 6, 3], nn.Tanh).float(), inputs(20, 4).float()
    return net, x, torch.arange(20) % 3


def exact(net, x, family=None):
    joint = fimlib.accumulate(net, x, family or Categorical(), quantities=["I"])
    return joint.fisher_information()


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_laplace_torch_with_the_exact_diagonal_is_its_own(likelihood):
    adapters = adapter("laplace_torch")
    net, x, y = problem()
    family = Categorical() if likelihood == "classification" else Gaussian()
    y = y if likelihood == "classification" else inputs(20, 3, seed=2).float()
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    ours = adapters.laplace_of(net, loader, exact(net, x, family), likelihood)
    theirs = adapters.Laplace(net, likelihood, subset_of_weights="all", hessian_structure="diag")
    theirs.fit(loader)
    torch.testing.assert_close(ours.posterior_precision, theirs.posterior_precision)
    torch.testing.assert_close(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    for a, b in zip(ours(x, link_approx="probit"), theirs(x, link_approx="probit"), strict=True):
        torch.testing.assert_close(a, b)


def test_laplace_torch_with_a_frozen_layer():
    adapters = adapter("laplace_torch")
    net, x, y = problem()
    net[0].requires_grad_(requires_grad=False)
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    ours = adapters.laplace_of(net, loader, exact(net, x), "classification")
    assert ours.H.shape == (sum(p.numel() for p in net[2].parameters()),)
    assert torch.allclose(ours.H[-3:], 20 * exact(net, x)["2.bias"].float())


def test_torch_pruning_scores_channels_by_the_diagonal():
    adapters = adapter("torch_pruning_score")
    net, x, _ = problem()
    I = exact(net, x)
    graph = adapters.torch_pruning.DependencyGraph().build_dependency(net, example_inputs=x[:1])
    group = graph.get_pruning_group(
        net[0], adapters.torch_pruning.prune_linear_out_channels, idxs=list(range(6))
    )
    score = adapters.score_by(net, I)(group)
    weighted = {n: p.detach().square() * I[n] for n, p in net.named_parameters()}
    expected = weighted["0.weight"].sum(1) + weighted["0.bias"] + weighted["2.weight"].sum(0)
    torch.testing.assert_close(score, expected.float(), check_dtype=False)
    least = int(score.argmin())
    graph.get_pruning_group(
        net[0], adapters.torch_pruning.prune_linear_out_channels, idxs=[least]
    ).prune()
    assert net[0].out_features == net[2].in_features == 5


def test_the_score_has_an_error():
    adapters = adapter("torch_pruning_score")
    net, x, _ = problem()
    graph = adapters.torch_pruning.DependencyGraph().build_dependency(net, example_inputs=x[:1])
    group = graph.get_pruning_group(
        net[0], adapters.torch_pruning.prune_linear_out_channels, idxs=list(range(6))
    )
    estimate = fimlib.estimate(net, x, Categorical(), passes=64)
    right = adapters.score_by(net, exact(net, x))(group)
    found = adapters.score_by(net, estimate.value)(group)
    error = adapters.score_by(net, estimate.standard_error)(group)
    assert ((found - right).abs() < 4 * error).all()
    assert (error < right).all()


class Strategy:
    """What a plugin reads of avalanche's training."""

    def __init__(self, net, dataset):
        self.model, self.device, self.train_mb_size = net, "cpu", 10
        self._criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(net.parameters(), 0.1)
        self.clock = type("Clock", (), {"train_exp_counter": 0})()
        self.experience = type("Experience", (), {"dataset": dataset})()
        self.loss = torch.zeros(())


def test_avalanche_penalises_by_the_exact_diagonal():
    adapters = adapter("avalanche_ewc")
    net, x, y = problem()
    I = exact(net, x)
    plugin = adapters.FisherPlugin(Categorical(), ewc_lambda=2.0)
    tasks = torch.zeros(20, dtype=torch.long)
    strategy = Strategy(net, TensorDataset(x, y, tasks))
    plugin.after_training_exp(strategy)
    before = copy.deepcopy(net)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)
    strategy.clock.train_exp_counter = 1
    plugin.before_backward(strategy)
    pairs = zip(net.named_parameters(), before.parameters(), strict=True)
    expected = 2 * sum((I[n] * (p - old).square()).sum() for (n, p), old in pairs)
    torch.testing.assert_close(strategy.loss, expected.float(), check_dtype=False)


def test_what_avalanche_squares_by_itself():
    adapters = adapter("avalanche_ewc")
    net, x, y = problem()
    batches = [(x[:10], y[:10]), (x[10:], y[10:])]

    def importances(model, _):
        strategy = Strategy(copy.deepcopy(model), TensorDataset(x, y, y))
        found = adapters.EWCPlugin(1.0).compute_importances(
            strategy.model, strategy._criterion, strategy.optimizer, strategy.experience.dataset,
            "cpu", 10,
        )  # fmt: skip
        return {n: data.data for n, data in found.items()}

    found = fimlib.identify(importances, net, batches, Categorical())
    assert "square of the mean gradient of a batch, with the labels of the data" in str(found)
    assert found.rank_correlation < 0.5


def test_what_torch_pruning_accumulates_by_itself():
    adapters = adapter("torch_pruning_score")
    net, x, y = problem()

    def diagonal(model, _):
        own = copy.deepcopy(model)
        scorer = adapters.torch_pruning.importance.GroupHessianImportance()
        for one in nn.functional.cross_entropy(own(x), y, reduction="none"):
            own.zero_grad()
            one.backward(retain_graph=True)
            scorer.accumulate_grad(own)
        sums, counts = (vars(scorer)[name] for name in ("_accu_grad", "_counter"))
        return {n: sums[p] / counts[p] for n, p in own.named_parameters()}

    found = fimlib.identify(diagonal, net, [(x, y)], Categorical())
    assert "square of the last example's gradient" in str(found)
