"""J by backward passes to the places where parameters enter: every kind of place and of layout."""

import pytest
import torch
from strategies import inputs
from torch import nn
from torch.nn import functional as F  # noqa: N812

import fimlib
from fimlib.engines import first_order, functional
from fimlib.engines.first_order import Layout, layout_of


class Own(nn.Module):
    """A network from its forward pass and its parts."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


def tokens(batch_first=True, norm=nn.LayerNorm, length=6):
    """A linear layer, positions, a class token, attention, a norm: [B, L, 5] → [B, 3]."""

    def run(self, x):
        z = self.embed(x) + self.positions
        z = torch.cat([self.token.expand(len(x), 1, 8), z], 1)
        z = z if batch_first else z.transpose(0, 1)
        z = self.norm(z + self.attention(z, z, z, need_weights=False)[0])
        return self.head(z.mean(1 if batch_first else 0))

    return Own(
        run,
        embed=nn.Linear(5, 8),
        positions=parameter(length, 8),
        token=parameter(1, 1, 8),
        attention=nn.MultiheadAttention(8, 2, batch_first=batch_first),
        norm=norm(8),
        head=nn.Linear(8, 3),
    )


def encoder(**options):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(48, 3))


def images():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.Sigmoid(),
        nn.Conv2d(4, 6, 3, groups=2, dilation=2), nn.GroupNorm(2, 6), nn.PReLU(6),
        nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


def frames():
    """Several images for each input, the inputs' frames in a row."""
    parts = {"conv": nn.Conv2d(1, 2, 3, bias=True), "head": nn.Linear(2, 3)}
    return Own(
        lambda m, x: m.head(m.conv(x.flatten(0, 1)).tanh().mean((2, 3)).view(len(x), -1, 2).sum(1)),
        **parts,
    )


def tied():
    """A table that is also the last weight; a linear layer that is used twice; recurrence."""
    table = nn.Embedding(7, 4)

    def run(self, x):
        z = self.cell(self.twice(self.twice(self.table(x)).tanh()))[0]
        return z[:, -1] @ self.table.weight.T

    return Own(run, table=table, twice=nn.Linear(4, 4), cell=nn.GRU(4, 4, batch_first=True))


def adapters():
    """A product of parameters, as a weight and factor by factor; several weights at once."""

    def run(self, x):
        h = self.base(x) + x @ self.A.T @ self.B.T + F.linear(x, self.B @ self.A)
        heads = torch.einsum("bi,kio->bko", x, self.heads).flatten(1)
        return torch.cat([h * self.scale, heads, x @ self.W.exp() - self.shift], 1)

    return Own(
        run, base=nn.Linear(5, 4), A=parameter(2, 5), B=parameter(4, 2), scale=parameter(),
        heads=parameter(3, 5, 2), W=parameter(5, 2), shift=parameter(2),
        unused=nn.Linear(2, 2),
    )  # fmt: skip


def both_ways():
    """A parameter twice in what is computed of it alone, and once elsewhere."""
    return Own(
        lambda m, x: (x * (m.p * m.p.exp())).cumsum(1) + m.p * x.sin() + (m.p[:2] @ m.p[1:]) * x,
        p=parameter(3),
    )


def experts():
    """Positions go to one layer or another, by their numbers: no regular order of rows."""

    def run(self, x):
        z, chosen = x.flatten(0, 1), x.flatten(0, 1).sum(1) > 0
        out = x.new_zeros(len(z), 3)
        out = out.index_put((chosen,), self.one(z[chosen]))
        out = out.index_put((~chosen,), self.other(z[~chosen]))
        return out.view(*x.shape[:2], 3).sum(1)

    return Own(run, one=nn.Linear(5, 3), other=nn.Linear(5, 3))


X = inputs(4, 30).view(4, 6, 5)
NETWORKS = {
    "tokens": (tokens, X),
    "positions first": (lambda: tokens(batch_first=False), X),
    "as many positions as inputs": (lambda: tokens(False, length=4), X[:, :4]),
    "rms norm": (lambda: tokens(norm=nn.RMSNorm), X),
    "one input": (tokens, X[:1]),
    "encoder": (lambda: encoder(activation="gelu"), inputs(4, 48).view(4, 6, 8)),
    "encoder, norm first": (lambda: encoder(norm_first=True), inputs(4, 48).view(4, 6, 8)),
    "images": (images, inputs(3, 144).view(3, 1, 12, 12)),
    "one image": (images, inputs(1, 144).view(1, 1, 12, 12)),
    "frames": (frames, inputs(3, 50).view(3, 2, 1, 5, 5)),
    "tied": (tied, torch.tensor([[0, 3, 1], [6, 2, 2], [1, 1, 5]])),
    "adapters": (adapters, inputs(4, 5)),
    "adapters, one input": (adapters, inputs(1, 5)),
    "one number, one input": (lambda: nn.Linear(3, 1), inputs(1, 3)),
    "one number": (lambda: nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 2)), inputs(2, 3)),
    "one channel": (
        lambda: nn.Sequential(nn.Conv1d(1, 1, 1), nn.BatchNorm1d(1), nn.PReLU(), nn.Flatten()),
        inputs(1, 1).view(1, 1, 1),
    ),
    "both ways": (both_ways, inputs(4, 3)),
    "both ways, one input": (both_ways, inputs(1, 3)),
    "experts": (experts, X),
    "weight norm": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)
        ),
        inputs(3, 4),
    ),
    "a scalar of C++, as in attention": (
        lambda: Own(
            lambda m, x: torch.ops.aten.mul.Scalar(m.p, 2.0) * x[:, :3],
            p=parameter(3),
        ),
        inputs(4, 5),
    ),
    "a parameter alone": (lambda: Own(lambda m, x: m.p.expand(len(x), 3), p=parameter(3)), X),
}
# Where a parameter has no place, and autograd is asked at each input alone.
ALONE = {
    "experts": {"one.weight", "one.bias", "other.weight", "other.bias"},
    "adapters, one input": {"W"},
    "both ways, one input": {"p"},
}


def made(name):
    make, x = NETWORKS[name]
    torch.manual_seed(1)
    return make().double().eval(), x


def by_autograd(net, x):
    """J, output by output at each input alone: parameter → [B, T, *shape]."""
    found = {n: [] for n, _ in net.named_parameters()}
    for one in x.split(1):
        h = net(one)[0]
        for n, p in net.named_parameters():
            rows = [
                torch.autograd.grad(v, p, retain_graph=True, materialize_grads=True)[0] for v in h
            ]
            found[n].append(torch.stack(rows))
    return {n: torch.stack(rows) for n, rows in found.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_j_is_that_of_autograd_at_each_input(name):
    net, x = made(name)
    derivs = first_order.differentiate(net, x, wanted=None).derivatives()
    assert [n for b in derivs.blocks for n in b.inputs] == [n for n, _ in net.named_parameters()]
    J = by_autograd(net, x)
    for n, right in J.items():
        torch.testing.assert_close(derivs.jacobian(n), right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_autograd_is_asked_at_single_inputs_only_where_no_place_is_known(name, monkeypatch):
    net, x = made(name)
    asked, real = set(), functional.one_by_one

    def one_by_one(own, x, names):
        asked.update(names)
        return real(own, x, names)

    monkeypatch.setattr(functional, "one_by_one", one_by_one)
    first_order.differentiate(net, x, wanted=None).derivatives()
    assert asked == ALONE.get(name, set())


@pytest.mark.parametrize("name", ["tokens", "images", "tied", "adapters"])
def test_pieces_change_nothing(name, monkeypatch):
    net, x = made(name)
    family = fimlib.Categorical()
    whole = first_order.differentiate(net, x, wanted=None)
    monkeypatch.setattr(first_order, "NUMBERS_AT_A_TIME", 1)
    rows = first_order.differentiate(net, x, wanted=None)
    assert {share.inputs_at_a_time for share in rows.shares} == {1}
    assert any(share.rows for share in rows.shares) == (name in ("tokens", "tied"))
    joints = [fimlib.Joint(family) for _ in range(2)]
    for joint, batch in zip(joints, (whole, rows), strict=True):
        joint.update_sweep(batch)
    for quantity in ("fisher_information", "input_variance"):
        one, other = (getattr(joint, quantity)() for joint in joints)
        assert one.keys() == other.keys()
        for n in one:
            torch.testing.assert_close(one[n], other[n], rtol=1e-10, atol=1e-14)


def test_only_what_is_wanted_is_differentiated():
    net, x = made("tokens")
    wanted = frozenset({"norm.weight", "head.bias"})
    derivs = first_order.differentiate(net, x, wanted=wanted).derivatives()
    whole = first_order.differentiate(net, x, wanted=None).derivatives()
    assert {n for b in derivs.blocks for n in b.inputs} == wanted
    for n in wanted:
        torch.testing.assert_close(derivs.jacobian(n), whole.jacobian(n))


@pytest.mark.parametrize("inner", [1, 2, 3, 6])
def test_the_layout_of_rows_is_found(inner):
    weights, plain = 1 + torch.rand(4).double(), torch.randn(24, 5).double()
    right = Layout(4, inner)
    own = weights.repeat_interleave(inner).repeat(6 // inner)
    assert layout_of(plain, own[:, None] * plain, weights) == right
    rows = right.by_input(own, 0)
    assert torch.equal(rows, weights[:, None].expand(4, 6))


def test_rows_of_several_inputs_have_no_layout():
    weights, plain = 1 + torch.rand(4).double(), torch.randn(24, 5).double()
    own = weights.repeat_interleave(6)[:, None]
    assert layout_of(plain, own * plain + 1e-3, weights) is None
    assert layout_of(plain, own[torch.randperm(24)] * plain, weights) is None
    assert layout_of(plain[:23], plain[:23], weights) is None


def test_saturated_activations_keep_their_digits():
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Sigmoid(), nn.Linear(1, 1)).double()
    for p, value in zip(net.parameters(), (1.0, 1.0, 0.0), strict=True):
        nn.init.constant_(p, value)
    x = torch.tensor([[40.0]]).double()
    derivs = first_order.differentiate(net, x, wanted=None).derivatives()
    right = 40 * torch.exp(torch.tensor(-40.0).double())
    assert float(derivs.jacobian("0.weight")) == pytest.approx(float(right), rel=1e-12)


class Experts(nn.Module):
    """Each input goes to one of two; a batch may leave one of them without any."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.experts = nn.ModuleList([nn.Linear(4, 3) for _ in range(2)])

    def forward(self, x):
        p = self.gate(x).softmax(-1)
        chosen, out = p.argmax(-1), x.new_zeros(len(x), 3)
        for k, expert in enumerate(self.experts):
            at = (chosen == k).nonzero()[:, 0]
            out = out.index_add(0, at, p[at, k, None] * expert(x[at]))
        return out


@pytest.mark.parametrize("passes_of", ["accumulate", "estimate"])
def test_an_expert_without_inputs_in_a_batch(passes_of):
    torch.manual_seed(0)
    net, x = Experts().double(), torch.randn(32, 4).double()
    some = x[net.gate(x).argmax(1) == 0]
    family = fimlib.Categorical()
    exact = fimlib.accumulate(net, torch.cat([x, some]), family, quantities=["I"])
    assert exact.fisher_information()["experts.1.weight"].any()
    if passes_of == "accumulate":
        found = fimlib.accumulate(net, [x, some], family, quantities=["I"]).fisher_information()
        for name, value in exact.fisher_information().items():
            assert torch.allclose(found[name], value, rtol=1e-10, atol=0)
    else:
        found = fimlib.estimate(net, some, family, squares="input", passes=2)
        assert found.layers["experts.1"].total == 0
