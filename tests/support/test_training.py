"""What the notebooks share of networks, their training, and numbers per layer."""

import fake_device
import pytest
import torch
from support import layers, training
from torch import nn

import fimlib


def test_violations_are_counted_where_there_are_some():
    """On made-up bounds: beyond either side by more than the stated rounding."""
    ones = torch.ones(1, 6, dtype=torch.float64)
    interval = fimlib.Interval({"0.w": ones, "0.b": ones, "2.w": ones}, {
        "0.w": 2 * ones, "0.b": 2 * ones, "2.w": 2 * ones,
    })  # fmt: skip
    at = torch.tensor([[0.9, 1 - 1e-9, 1.0, 2.0, 2 + 1e-8, 3.0]], dtype=torch.float64)
    rounding = torch.tensor([[1 - 1e-12, 1.5, 1.5, 1.5, 1.5, 2 + 1e-12]], dtype=torch.float64)
    value = {"0.w": at, "0.b": rounding, "2.w": rounding}
    assert layers.violations(value, interval) == {"1": 4, "2": 0}
    assert layers.violations(value | {"2.w": at}, interval) == {"1": 4, "2": 4}


def test_means_sums_and_sizes_are_by_layer():
    net = training.mlp([3, 2, 4], "Sigmoid").double()
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    I = fimlib.fisher_information(fimlib.differentiate(net.eval(), x), fimlib.Categorical())
    assert layers.sizes(I) == {"1": 8, "2": 12}
    total = layers.sums({name: value.sum() for name, value in I.items()})
    assert layers.means(I) == pytest.approx({"1": total["1"] / 40, "2": total["2"] / 60})


def test_a_network_is_described_and_its_parts_are_found_by_name():
    net = training.mlp([4, 3, 2], "logsigmoid", dropout=0.5)
    assert training.describe(net) == "Linear(4, 3), LogSigmoid(), Dropout(p=0.5), Linear(3, 2)"
    assert training.named(torch.optim, "sgd") is torch.optim.SGD
    with pytest.raises(ValueError, match=r"torch.nn.* has no class 'Sigmod'; write it as PyTorch"):
        training.named(nn, "Sigmod")


def test_an_epoch_visits_every_example_once_and_learns():
    torch.manual_seed(0)
    net = nn.Linear(2, 2)
    x = torch.randn(50, 2)
    y = (x[:, 0] > 0).long()
    seen = []

    def loss(outputs, labels):
        seen.extend(labels.tolist())
        return nn.functional.cross_entropy(outputs, labels)

    step, shuffle = torch.optim.SGD(net.parameters(), lr=0.5), torch.Generator().manual_seed(0)
    losses = [
        training.train_epoch(net, step, x, y, batch_size=8, shuffle=shuffle, loss=loss)
        for _ in range(5)
    ]
    assert len(seen) == 5 * 50
    assert sum(seen) == 5 * int(y.sum())
    assert seen[:50] != y.tolist()  # in random order
    assert losses[-1] < 0.5 * losses[0]
    assert training.accuracy(net, x, y) > 0.9
    assert not net.training


def test_an_epoch_waits_for_a_gpu_once():
    with fake_device.installed() as device:
        net = training.mlp([3, 4, 2], "Sigmoid").to(device)
        x, y = torch.zeros(60, 3, device=device), torch.zeros(60, dtype=torch.long, device=device)
        step = torch.optim.Adam(net.parameters())
        with fake_device.waits() as waits:
            training.train_epoch(
                net, step, x, y, batch_size=2, shuffle=torch.Generator().manual_seed(0)
            )
    assert waits.total() == 1
