import pytest
import torch
from torch import nn

import fimlib


def small_mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)).double()


class Cumulative(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.body(x).cumprod(1))


class Cut(Cumulative):
    def forward(self, x):
        return self.head(self.body(x).detach())


def test_an_mlp_is_planned_layerwise_with_its_cost():
    found = fimlib.plan(small_mlp(), torch.ones(5, 3).double())
    assert (found.engine, found.order, found.num_inputs) == ("layerwise", 2, 5)
    assert found.refusals == {}
    assert found.seconds > 0
    assert found.relative > 0
    # at least J and S of both layers are held at the same time: 2 · 5 inputs · 2 · (4 + 2) numbers
    assert found.peak_bytes >= 8 * 2 * 5 * 2 * (4 + 2)


def test_the_cost_is_that_of_the_derivatives_not_of_the_forward_pass_before_them():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 400), nn.Sigmoid(), nn.Linear(400, 20)).double()
    for order in (1, 2):
        found = fimlib.plan(net, torch.ones(50, 3).double(), order=order)
        assert found.peak_bytes >= order * 8 * 50 * 20 * 400


def test_the_plan_names_what_differentiate_takes_and_why_not_the_others():
    torch.manual_seed(0)
    x = torch.randn(2, 3).double()
    found = fimlib.plan(Cumulative().double(), x, order=1)
    assert found.engine == fimlib.differentiate(Cumulative().double(), x, order=1).engine
    assert "layerwise" in found.refusals
    assert "not 'layerwise': " in str(found)
    assert "Cumulative" in str(found)


def test_where_no_engine_fits_the_error_is_that_of_differentiate():
    x = torch.ones(2, 3).double()
    with pytest.raises(NotImplementedError) as planned:
        fimlib.plan(Cut().double(), x)
    with pytest.raises(NotImplementedError) as tried:
        fimlib.differentiate(Cut().double(), x)
    assert str(planned.value) == str(tried.value)
    assert "layers=['head']" in str(tried.value)


def test_the_model_is_as_before():
    net, x = small_mlp(), torch.ones(2, 3).double()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before = [p.clone() for p in net.parameters()]
    fimlib.plan(net, x)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight))
    assert net[0].bias.grad is None


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(3, 2), []
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x):
        self.n += 1
        self.calls.append(1)
        return self.layer(x)


def test_a_model_that_counts_its_calls_has_none():
    net = Counts().double()
    fimlib.plan(net, torch.ones(2, 3).double(), order=1)
    assert float(net.n) == 0
    assert net.calls == []


def test_inputs_and_weights_of_every_kind():
    x = torch.ones(2, 1, 4).double()
    net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(4, 2)).double()
    for order, engine in ((1, "functional"), (2, "traced")):
        found = fimlib.plan(net, x.clone().requires_grad_(), order=order)
        assert found.engine == engine
    with torch.inference_mode():
        frozen = small_mlp()
    assert fimlib.plan(frozen, torch.ones(2, 3).double()).engine == "layerwise"
    broken = small_mlp()
    with torch.no_grad():
        broken[2].weight.fill_(1.7e308)
    with pytest.raises(ValueError, match="outputs hold NaN or infinite values"):
        fimlib.plan(broken, torch.ones(2, 3).double())
