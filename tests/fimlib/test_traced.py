"""The engine that follows autograd's graph: against the oracle, and what it must refuse."""

import copy
import warnings

import lying
import pytest
import reference
import torch
import torch.nn.functional as F  # noqa: N812
from strategies import Call, inputs, mlp
from torch import nn
from torch.nn.utils import parametrizations

import fimlib
from fimlib import differentiate


def chain(*layers):
    return Call(lambda self, x: self.net(x), net=nn.Sequential(*layers))


def elementwise(f):
    """A network with f between its layers."""
    return Call(lambda self, x: self.b(f(self.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2))


def parameter(*shape):
    return nn.Parameter(torch.empty(*shape))


def residual(pre):
    def forward(self, x):
        z = self.first(x)
        for block in (self.one, self.two):
            z = z + block(torch.tanh(z)) if pre else torch.sigmoid(block(z) + z)
        return self.last(z)

    return Call(
        forward,
        first=nn.Linear(3, 4),
        one=nn.Linear(4, 4),
        two=nn.Linear(4, 4),
        last=nn.Linear(4, 3),
    )


def residual_cnn():
    def forward(self, x):
        z = F.softplus(self.bn1(self.conv1(x)))
        z = z + torch.tanh(self.bn2(self.conv2(z)))
        z = F.relu(F.gelu(self.conv3(z)) + self.short(z))
        return self.fc(z.mean((2, 3)))

    return Call(
        forward,
        conv1=nn.Conv2d(1, 3, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(3),
        conv2=nn.Conv2d(3, 3, 3, padding="same"),
        bn2=nn.BatchNorm2d(3),
        conv3=nn.Conv2d(3, 4, 3, stride=2, padding=1),
        short=nn.Conv2d(3, 4, 1, stride=2),
        fc=nn.Linear(4, 3),
    )


def dense_net():
    def forward(self, x):
        z = x
        for conv in (self.one, self.two):
            z = torch.cat([z, torch.sigmoid(conv(z))], dim=1)
        return self.fc(F.adaptive_avg_pool2d(z, 1).flatten(1))

    convs = {"one": nn.Conv2d(1, 2, 3, padding=1), "two": nn.Conv2d(3, 2, 3, padding=1)}
    return Call(forward, **convs, fc=nn.Linear(5, 2))


def mixer(self, x):
    z = x.view(len(x), 3, 4)
    z = z + self.tokens(torch.tanh(z).transpose(1, 2)).transpose(1, 2)
    return self.head(F.silu(self.channels(z)).mean(1))


def gated(self, x):
    """Gates of every kind: by units, by a number for all of them, by a quotient."""
    z = self.a(x)
    z = z * torch.sigmoid(self.gate(z))
    z = z * torch.exp(-self.squeeze(z)) / (1 + z * z)
    return self.b(z / (2 + torch.tanh(z)))


def affine(self, x):
    z = self.shift + self.scale * torch.tanh(x @ self.weight)
    z = self.slope * z.view(-1, 2, 2) - self.offset.view(1, 2, 1)
    return self.head(F.elu(F.softsign(z)).flatten(1))


def time_first(self, x):
    z = x.view(len(x), 3, 4).transpose(0, 1)
    return self.head(torch.tanh(self.inner(torch.sin(self.outer(z)))).transpose(0, 1).flatten(1))


def patches_as_inputs(self, x):
    z = torch.tanh(self.conv(x.view(len(x) * 2, 2, 3)))
    return self.head(z.view(len(x), 4))


def two_towers(self, x):
    return self.head(torch.tanh(self.tower(x[:, :3])) - torch.sigmoid(self.tower(x[:, 3:])))


def by_hand(z):
    p = torch.exp(z) / torch.exp(z).sum(1, keepdim=True)
    return p + z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-3)


def odds_and_ends(self, x):
    a, b = self.first(x).chunk(2, dim=1)
    z = torch.stack([a.clamp(-1, 1), torch.maximum(a, b), F.pad(b, (1, 0))[:, :-1]], dim=1)
    z = torch.where(z > 0, z.exp(), z * 0.5).permute(0, 2, 1).reshape(len(x), -1)
    z = z[:, [2, 0, 1]].cumsum(1) ** 2 + 2 ** z[:, -3:] + 1 / (3 + z[:, :3].abs())
    return self.last(z - z.max(1, keepdim=True).values) + torch.zeros_like(z[:, :2])


def listed():
    net = Call(lambda self, x: self.b(torch.tanh(self.a(x) * self.more[0])), **linear_pair())
    net.more = [net.a.bias]
    return net


def linear_pair():
    return {"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)}


IMAGES = {
    "lenet": lambda: chain(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.Sigmoid(),
        nn.AvgPool2d(2),
        nn.Conv2d(3, 4, 2, stride=2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4, 4),
        nn.Softplus(),
        nn.Linear(4, 3),
    ),
    "vgg": lambda: chain(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.ReLU(inplace=True),
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.SELU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 2, (2, 1), padding=(0, 1), padding_mode="reflect"),
        nn.BatchNorm2d(2, affine=False),
        nn.LogSigmoid(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(2, 3),
    ),
    "dilated, transposed": lambda: chain(
        nn.Conv2d(1, 2, 2, dilation=2, stride=(1, 2)),
        nn.GELU(),
        nn.ConvTranspose2d(2, 2, 2),
        nn.Tanh(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(2, 2),
    ),
    "residual": residual_cnn,
    "dense": dense_net,
    "circular, ceil mode": lambda: chain(
        nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"),
        nn.BatchNorm2d(2),
        nn.SiLU(),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.Conv2d(2, 4, 2, groups=2, dilation=2),
        nn.Tanh(),
        nn.MaxPool2d(2, stride=1, padding=1),
        nn.Flatten(),
        nn.Linear(4 * 4, 2),
    ),
    "pooled, then flat": lambda: chain(
        nn.Conv2d(1, 2, 2),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Tanh(),
        nn.Linear(8, 3),
        nn.Sigmoid(),
        nn.Linear(3, 2),
    ),
    "channels apart": lambda: Call(
        channels_apart,
        one=nn.Conv2d(1, 2, 2),
        gate=nn.Conv2d(2, 1, 1),
        two=nn.Conv2d(2, 3, 2),
        head=nn.Linear(3, 2),
    ),
}

VECTORS = {
    "conv1d": lambda: chain(
        nn.Unflatten(1, (2, 6)),
        nn.Conv1d(2, 4, 3, groups=2, padding=1),
        nn.BatchNorm1d(4),
        nn.Mish(),
        nn.MaxPool1d(2),
        nn.Conv1d(4, 2, 2, stride=2),
        nn.SiLU(),
        nn.AvgPool1d(1),
        nn.Flatten(),
        nn.BatchNorm1d(2),
        nn.Linear(2, 3),
    ),
    "conv3d": lambda: chain(
        nn.Unflatten(1, (1, 2, 2, 3)),
        nn.Conv3d(1, 2, 2),
        nn.CELU(),
        nn.Flatten(),
        nn.Linear(4, 2),
    ),
    "residual, post-activation": lambda: residual(pre=False),
    "residual, pre-activation": lambda: residual(pre=True),
    "functional sigmoid": lambda: elementwise(F.sigmoid),
    "mixer": lambda: Call(
        mixer, tokens=nn.Linear(3, 3), channels=nn.Linear(4, 5), head=nn.Linear(5, 2)
    ),
    "gates": lambda: Call(
        gated,
        a=nn.Linear(3, 4),
        gate=nn.Linear(4, 4, bias=False),
        squeeze=nn.Linear(4, 1),
        b=nn.Linear(4, 2),
    ),
    "gate on the first layer": lambda: Call(
        lambda self, x: self.head(F.silu(self.a(x)) * self.b(x)),
        a=nn.Linear(3, 4),
        b=nn.Linear(3, 4),
        head=nn.Linear(4, 2),
    ),
    "scales and shifts": lambda: Call(
        affine,
        weight=parameter(3, 4),
        shift=parameter(4),
        scale=parameter(1, 4),
        slope=parameter(1),
        offset=parameter(2),
        head=nn.Linear(4, 2),
    ),
    "divided by one number": lambda: Call(
        lambda self, x: self.b(self.a(x) / self.one(x)),
        a=nn.Linear(3, 4),
        one=nn.Linear(3, 1),
        b=nn.Linear(4, 2),
    ),
    "addmm": lambda: Call(
        lambda self, x: torch.addmm(
            self.shift, torch.addmm(self.one, x, self.weight).sin(), self.head, beta=2, alpha=0.5
        ),
        one=parameter(1),
        weight=parameter(3, 4),
        shift=parameter(2),
        head=parameter(4, 2),
    ),
    "prelu": lambda: chain(
        nn.Linear(3, 4), nn.PReLU(4), nn.Tanh(), nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 2)
    ),
    "time first": lambda: Call(
        time_first, outer=nn.Linear(4, 3), inner=nn.Linear(3, 2), head=nn.Linear(6, 2)
    ),
    "patches in the batch axis": lambda: Call(
        patches_as_inputs, conv=nn.Conv1d(2, 2, 3), head=nn.Linear(4, 2)
    ),
    "one module in two towers": lambda: Call(
        two_towers, tower=nn.Linear(3, 4), head=nn.Linear(4, 2)
    ),
    "low rank": lambda: Call(
        lambda self, x: self.head(torch.tanh(x @ (self.left @ self.right))),
        left=parameter(3, 1),
        right=parameter(1, 4),
        head=nn.Linear(4, 2),
    ),
    "positive weights": lambda: Call(
        lambda self, x: self.head(torch.tanh(F.linear(x, self.log_weight.exp()))),
        log_weight=parameter(4, 3),
        head=nn.Linear(4, 2),
    ),
    "expanded factor": lambda: Call(
        lambda self, x: self.head(torch.exp(x @ self.v.expand(3, 2))),
        v=parameter(1, 1),
        head=nn.Linear(2, 2),
    ),
    "expanded bias": lambda: Call(
        lambda self, x: self.head(torch.tanh(F.linear(x, self.w, self.v.expand(4)))),
        w=parameter(4, 3),
        v=parameter(1),
        head=nn.Linear(4, 2),
    ),
    "viewed bias": lambda: Call(
        lambda self, x: self.head(torch.tanh(F.linear(x, self.w, self.v.view(4)))),
        w=parameter(4, 3),
        v=parameter(2, 2),
        head=nn.Linear(4, 2),
    ),
    "nothing is done to a parameter": lambda: Call(
        lambda self, x: torch.tanh(x @ self.w.to(x.dtype).contiguous()) @ self.v.double(),
        w=parameter(3, 4),
        v=parameter(4, 2),
    ),
    "dot": lambda: Call(
        lambda self, x: torch.stack([z.dot(self.v).sin() for z in x])[:, None], v=parameter(3)
    ),
    "rows of a tensor": lambda: Call(
        lambda self, x: torch.stack([self.b(row.tanh()) for row in self.a(x)]),
        a=nn.Linear(3, 4),
        b=nn.Linear(4, 2),
    ),
    "parameter in a list, too": listed,
    "rounded quotient": lambda: elementwise(
        lambda s: s.tanh() + torch.div(9 * s, 1 + s * s, rounding_mode="floor")
    ),
    "odds and ends": lambda: Call(odds_and_ends, first=nn.Linear(3, 4), last=nn.Linear(3, 2)),
    "softmax and norms, written out": lambda: Call(
        lambda self, x: self.head(by_hand(self.second(by_hand(self.first(x))))),
        first=nn.Linear(3, 4),
        second=nn.Linear(4, 4),
        head=nn.Linear(4, 2),
    ),
    "stacked": lambda: chain(nn.Linear(3, 2), nn.Linear(2, 4), nn.Tanhshrink(), nn.Linear(4, 2)),
}
WIDTHS = {
    "patches in the batch axis": 12,
    "conv1d": 12,
    "conv3d": 12,
    "mixer": 12,
    "time first": 12,
    "one module in two towers": 6,
}


def token_net(self, x):
    return self.head(torch.tanh(self.mix(self.table(x).flatten(1))))


def channels_apart(self, x):
    """Poolings and a gate between convolutions; channels are shuffled on the way."""
    z = F.max_pool2d(torch.sin(self.one(x)), 2, stride=1)
    z = z.flip(1) * torch.sigmoid(self.gate(z)) + F.interpolate(z[:, :, ::2, ::2], size=z.shape[2:])
    z = F.avg_pool2d(F.softplus(self.two(z)), 2, padding=1, count_include_pad=False)
    return self.head(torch.exp(-(z.mean((2, 3)) ** 2)))


FUNCTIONS = [
    torch.sigmoid, torch.tanh, F.softplus, F.logsigmoid, F.gelu, F.silu, F.mish, F.elu, F.selu,
    F.celu, F.softsign, F.tanhshrink, F.relu, F.relu6, F.leaky_relu, F.hardtanh,
    F.softshrink, F.hardshrink, F.hardswish, torch.exp, torch.expm1, torch.exp2, torch.sin,
    torch.cos, torch.atan, torch.asinh, torch.sinh, torch.erf, torch.square, torch.abs,
    torch.reciprocal, lambda s: s**3, lambda s: s.square().add(1).sqrt(), lambda s: s * s * s,
    lambda s: (s * s + 1).log(), lambda s: 2.0 ** (1 - s), lambda s: s * F.sigmoid(s), torch.cosh,
    lambda s: torch.rsqrt(1 + s**2), lambda s: F.gelu(s, approximate="tanh"), F.relu_,
]  # fmt: skip


def errors(net, x, derivs):
    """Largest relative error over parameters and inputs, of J and of S."""
    worst = 0.0
    for b in range(len(x)):
        J, S = reference.derivatives(net, x[b : b + 1])
        assert set(J) == {n for block in derivs.blocks for n in block.inputs}
        for name in J:
            pairs = (derivs.jacobian(name)[b], J[name]), (derivs.second(name)[b], S[name])
            for ours, exact in pairs:
                assert ours.shape == exact.shape
                scale = exact.abs().max() if exact.any() else torch.ones(())
                worst = max(worst, float((ours - exact).abs().max() / scale))
    return worst


def network(case):
    if case in IMAGES:
        return IMAGES[case](), inputs(3, 25).view(3, 1, 5, 5)
    return VECTORS[case](), inputs(3, WIDTHS.get(case, 3))


@pytest.mark.parametrize("case", [*IMAGES, *VECTORS])
def test_traced_equals_autograd(case):
    net, x = network(case)
    derivs = differentiate(net, x, engine="traced")
    assert torch.allclose(derivs.outputs, net(x))
    assert errors(net, x, derivs) < 1e-10
    alone = [differentiate(net, one, engine="traced") for one in x.split(1)]
    for name, _ in net.named_parameters():
        together = torch.cat([d.second(name) for d in alone])
        assert torch.allclose(derivs.second(name), together, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("forward", [True, False], ids=["tangents", "rows"])
@pytest.mark.parametrize("case", [*IMAGES, *VECTORS])
def test_tangents_and_rows_give_the_same(case, forward, monkeypatch):
    net, x = network(case)
    expected = differentiate(net, x, engine="traced")
    monkeypatch.setattr("fimlib.engines.traced.second_order.tangents_are_fewer", lambda *_: forward)
    derivs = differentiate(net, x, engine="traced")
    for name, _ in net.named_parameters():
        ours, exact = derivs.second(name), expected.second(name)
        assert float((ours - exact).abs().max()) <= 1e-11 * max(1, float(exact.abs().max()))


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 4, 5])
@pytest.mark.parametrize("case", VECTORS)
def test_batches_as_large_as_a_layer_is_wide(case, size):
    """A first axis of the right length need not count the inputs."""
    net, x = VECTORS[case](), inputs(size, WIDTHS.get(case, 3))
    derivs = differentiate(net, x, engine="traced")
    alone = [differentiate(net, one, engine="traced") for one in x.split(1)]
    for name, _ in net.named_parameters():
        for which in ("jacobian", "second"):
            together = torch.cat([getattr(d, which)(name) for d in alone])
            ours = getattr(derivs, which)(name)
            assert torch.allclose(ours, together, rtol=1e-10, atol=1e-12)


def jacobians(net, x):
    """J at every input, output by output."""
    found = {name: [] for name, _ in net.named_parameters()}
    for h in net(x).flatten():
        rows = torch.autograd.grad(h, list(net.parameters()), retain_graph=True)
        for J, row in zip(found.values(), rows, strict=True):
            J.append(row)
    return {name: torch.stack(J).unflatten(0, (len(x), -1)) for name, J in found.items()}


def assert_first_order(net, x):
    derivs, expected = differentiate(net, x, engine="traced", order=1), jacobians(net, x)
    assert set(expected) == {n for block in derivs.blocks for n in block.inputs}
    assert all(block.S is None for block in derivs.blocks)
    for name, J in expected.items():
        error = float((derivs.jacobian(name) - J).abs().max())
        assert error <= 1e-12 * max(1, float(J.abs().max()))


@pytest.mark.parametrize("case", [*IMAGES, *VECTORS])
def test_first_order(case):
    assert_first_order(*network(case))


def test_only_the_layers_asked_for():
    net, x = network("residual")
    whole = differentiate(net, x, engine="traced")
    some = differentiate(net, x, engine="traced", layers=["bn2", "fc"])
    assert [b.layer for b in some.blocks] == ["bn2", "bn2", "fc"]
    for name in ("bn2.weight", "bn2.bias", "fc.weight", "fc.bias"):
        assert torch.allclose(some.jacobian(name), whole.jacobian(name), rtol=1e-12, atol=1e-15)
        assert torch.allclose(some.second(name), whole.second(name), rtol=1e-11, atol=1e-14)


def test_what_lies_before_the_layers_asked_for_does_not_matter():
    net = Call(
        lambda self, x: self.head(torch.tanh(self.inner(self.first(x).cumprod(1)))),
        first=nn.Linear(3, 4),
        inner=nn.Linear(4, 3),
        head=nn.Linear(3, 2),
    )
    x = inputs(2, 3)
    derivs = differentiate(net, x, engine="traced", layers=["inner", "head"])
    for b in range(len(x)):
        J, S = reference.derivatives(net, x[b : b + 1])
        for name in ("inner.weight", "inner.bias", "head.weight", "head.bias"):
            assert torch.allclose(derivs.jacobian(name)[b], J[name], rtol=1e-10, atol=1e-13)
            assert torch.allclose(derivs.second(name)[b], S[name], rtol=1e-10, atol=1e-13)
    with pytest.raises(NotImplementedError, match="Cumprod"):
        differentiate(net, x, engine="traced", layers=["first"])
    cut = Call(
        lambda self, x: self.head(torch.tanh(self.inner(self.first(x).detach()))),
        first=nn.Linear(3, 4),
        inner=nn.Linear(4, 3),
        head=nn.Linear(3, 2),
    )
    cut.load_state_dict(net.state_dict())
    plain = copy.deepcopy(cut)
    plain.run = lambda self, x: self.head(torch.tanh(self.inner(self.first(x))))
    for order in (1, 2):
        some, every = (
            differentiate(n, x, engine="traced", order=order, layers=["inner", "head"])
            for n in (cut, plain)
        )
        for a, b in zip(some.blocks, every.blocks, strict=True):
            assert torch.equal(a.J, b.J)
            assert order == 1 or torch.equal(a.S, b.S)
    with pytest.raises(NotImplementedError, match="detach"):
        differentiate(cut, x, engine="traced", layers=["first"])


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"padding_idx": -2}])
def test_embeddings_of_integers(options):
    tables = {"table": nn.Embedding(5, 2, **options), "mix": nn.Linear(6, 3)}
    net = Call(token_net, **tables, head=nn.Linear(3, 2))
    x = torch.tensor([[0, 2, 2], [4, 1, 0]])
    derivs = differentiate(net, x, engine="traced")
    assert derivs.jacobian("table.weight").shape == (2, 2, 5, 2)
    assert errors(net, x, derivs) < 1e-10
    assert_first_order(net, x)


@pytest.mark.long
@pytest.mark.parametrize("lookup", [None, F.embedding])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("options", [{"padding_idx": -5}, {"scale_grad_by_freq": True}])
@pytest.mark.parametrize("engine", ["traced", "functional"])
def test_every_row_that_is_looked_up_has_its_derivative(order, lookup, options, engine):
    """Autograd leaves out the row of padding, and divides the others by their counts."""

    def forward(self, x):
        z = lookup(x, self.table.weight, **options) if lookup else self.table(x)
        return self.head(torch.tanh(self.mix(z.flatten(1))))

    parts = {"mix": nn.Linear(6, 3), "head": nn.Linear(3, 1)}
    net = Call(forward, table=nn.Embedding(5, 2, **({} if lookup else options)), **parts)
    plain = Call(token_net, table=nn.Embedding(5, 2), **parts)
    plain.load_state_dict(net.state_dict())
    for x in (torch.tensor([[4, 0, 2]]), torch.tensor([[3, 1, 2], [0, 0, 0]])):
        derivs = differentiate(net, x, engine=engine, order=order)
        for one, J in zip(x.split(1), derivs.jacobian("table.weight"), strict=True):
            expected, _ = reference.derivatives(plain, one)
            assert torch.allclose(J, expected["table.weight"])
        if order == 2:
            expected = differentiate(plain, x).second("table.weight")
            assert torch.allclose(derivs.second("table.weight"), expected)
    gaussian, one = fimlib.Gaussian(), x[1:]  # of one output and one input, signs are exact
    exact = fimlib.fisher_matrix(net, one, gaussian, parameters=["table.weight"]).diagonal()
    for squares in ("batch", "input"):
        estimate = fimlib.estimate(net, one, gaussian, squares=squares, passes=2)
        assert torch.allclose(estimate.value["table.weight"].flatten(), exact)
    assert exact[0] > 0


@pytest.mark.parametrize("order", [1, 2])
def test_an_embedding_that_changes_its_table_is_refused(order):
    net = Call(token_net, table=nn.Embedding(5, 2, max_norm=0.1), mix=nn.Linear(6, 3))
    net.head = nn.Linear(3, 2).double()
    with pytest.raises(NotImplementedError, match="no_grad"):
        differentiate(net, torch.tensor([[0, 2, 2]]), engine="traced", order=order)


def test_pieces_of_a_batch_change_nothing(monkeypatch):
    net, x = IMAGES["lenet"](), inputs(7, 25).view(7, 1, 5, 5)
    expected = [differentiate(net, x, engine="traced", order=order) for order in (1, 2)]
    monkeypatch.setattr("fimlib.engines.traced.second_order.NUMBERS_AT_A_TIME", 2**12)
    for order, exact in zip((1, 2), expected, strict=True):
        ours = differentiate(net, x, engine="traced", order=order)
        for a, b in zip(ours.blocks, exact.blocks, strict=True):
            assert torch.allclose(a.J, b.J, rtol=1e-12, atol=1e-15)
            assert (a.S is None) == (order == 1)
            assert order == 1 or torch.allclose(a.S, b.S, rtol=1e-11, atol=1e-14)


def over(f, width=6):
    """A network with f between its layers, of any number of results."""

    def build():
        num = f(torch.rand(1, width, dtype=torch.float64) + 0.5).flatten(1).shape[1]
        parts = {"a": nn.Linear(3, width), "b": nn.Linear(num, 2)}
        return Call(lambda self, x: self.b(torch.sin(f(self.a(x)).flatten(1))), **parts)

    return build


def assigned(s):
    z = s * 1
    z[:, 0] = s[:, 1].sin()
    z[:, [2, 3]] = 0.0
    z[z > 9] = 9.0
    z[:, 4:] = s[:, :2] ** 2
    return z


def in_place(s):
    z = s * 1
    y = F.elu(z, inplace=True)
    assert y is z
    return y + nn.Sequential(nn.Hardswish(True), nn.Sigmoid())(2 * s) + (3 * s).tanh_()


def powers(**shapes):
    parts = {"a": nn.Linear(3, 4), "b": nn.Linear(4, 2), "p": parameter(*shapes["p"])}
    return lambda: Call(lambda self, x: self.b(self.a(x).exp() ** self.p), **parts)


SOLID = torch.tensor([2.0, 3.0, 4.0, 1.0, 0.0, 2.0], dtype=torch.float64)
REWRITTEN = {
    "circular padding": over(lambda s: F.pad(s[:, None], (2, 1), mode="circular")),
    "circular padding of images": over(
        lambda s: F.pad(s.view(-1, 1, 2, 3), (1, 1, 1, 0), mode="circular")
    ),
    "circular convolution": lambda: chain(
        nn.Linear(3, 4),
        nn.Unflatten(1, (1, 4)),
        nn.Tanh(),
        nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular"),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(8, 2),
    ),
    "glu": over(lambda s: F.glu(s, 1)),
    "glu as a module": over(nn.GLU()),
    "addcmul": over(lambda s: torch.addcmul(s, s.sin(), s.flip(1), value=0.5)),
    "addcdiv": over(lambda s: s.addcdiv(s, 2 + s.square())),
    "diag_embed": over(torch.diag_embed),
    "channel shuffle": over(lambda s: nn.ChannelShuffle(2)(s.view(-1, 6, 1, 1))),
    "lp pool": over(lambda s: nn.LPPool1d(2.0, 3)(s[:, None])),
    "lp pool of images": over(lambda s: F.lp_pool2d(s.view(-1, 1, 2, 3), 2, 2, stride=1)),
    "powers with a parameter": powers(p=(4,)),
    "powers with one number": powers(p=(1,)),
    "powers of itself": over(lambda s: s.exp() ** s),
    "powers by other shapes": over(lambda s: torch.pow(s.square() + 0.1, s.sum(1, keepdim=True))),
    "powers of 2": over(lambda s: 2**s),
    "powers of a tensor": over(lambda s: SOLID ** s.abs()),
    "powers by a tensor": over(lambda s: s.exp() ** SOLID),
    "product": over(lambda s: s.prod(1, keepdim=True)),
    "products": over(lambda s: s.view(-1, 2, 3).prod(2)),
    "softmax": over(lambda s: F.softmax(s, 1)),
    "masked softmax": over(lambda s: s.masked_fill(SOLID == 2, -torch.inf).softmax(1)),
    "log-softmax": over(lambda s: F.log_softmax(s, 1)),
    "softmin": over(nn.Softmin(1)),
    "softmax at the end": lambda: chain(nn.Linear(3, 2), nn.Softmax(1)),
    "logsumexp": over(lambda s: s - s.logsumexp(1, keepdim=True)),
    "logaddexp": over(lambda s: torch.logaddexp(s, s.flip(1))),
    "cosine similarity": over(
        lambda s: F.cosine_similarity(s.view(-1, 2, 3), s.view(-1, 2, 3).flip(1).sin(), 2)
    ),
    "normalize": over(F.normalize),
    "norm": over(lambda s: s / s.norm(dim=1, keepdim=True)),
    "norm of degree 3": over(lambda s: s.norm(3, dim=1, keepdim=True)),
    "linalg norm": over(lambda s: torch.linalg.norm(s, dim=1, keepdim=True)),
    "distance": over(lambda s: F.pairwise_distance(s, s.flip(1), keepdim=True)),
    "var": over(lambda s: s.var(1, keepdim=True)),
    "std": over(lambda s: torch.std(s, 1, keepdim=True)),
    "layer norm": lambda: chain(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)),
    "layer norm as a function": over(lambda s: F.layer_norm(s, (6,))),
    "group norm": lambda: chain(nn.Linear(3, 6), nn.GroupNorm(2, 6), nn.Tanh(), nn.Linear(6, 2)),
    "instance norm": over(lambda s: F.instance_norm(s.view(-1, 2, 3))),
    "instance norm with a weight": lambda: chain(
        nn.Linear(3, 6),
        nn.Unflatten(1, (2, 3)),
        nn.InstanceNorm1d(2, affine=True),
        nn.Flatten(),
        nn.Linear(6, 2),
    ),
    "rms norm": lambda: chain(nn.Linear(3, 4), nn.RMSNorm(4), nn.Tanh(), nn.Linear(4, 2)),
    "rms norm as a function": over(lambda s: F.rms_norm(s, (6,))),
    "local response norm": over(lambda s: F.local_response_norm(s.view(-1, 6, 1), 3)),
    "bilinear": lambda: Call(
        lambda self, x: self.b(self.c(self.a(x), self.a(x).sin())),
        a=nn.Linear(3, 4),
        b=nn.Linear(2, 2),
        c=nn.Bilinear(4, 4, 2),
    ),
    "spectral norm": lambda: chain(
        parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)
    ),
    "lerp": over(lambda s: torch.lerp(s, -s, s.exp())),
    "assignments": over(assigned),
    "in place": over(in_place),
    "softmax of maps": over(lambda s: nn.Softmax2d()(s.view(-1, 3, 2, 1))),
    "signs and rounding": over(lambda s: s.sign() * s + s - s.floor()),
}


@pytest.mark.parametrize("case", REWRITTEN)
def test_what_is_made_of_known_operations_is_known(case):
    net, x = REWRITTEN[case](), inputs(3, 3)
    derivs = differentiate(net, x, engine="traced")
    assert torch.allclose(derivs.outputs, net(x), rtol=1e-12, atol=1e-14)
    assert errors(net, x, derivs) < 1e-9


def test_weight_norm_has_the_second_derivatives_that_torch_gets_wrong():
    net = chain(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))

    def spelled(self, x):
        g, v = (p for n, p in self.net[0].named_parameters() if "original" in n)
        w = v * g / v.square().sum(1, keepdim=True).sqrt()
        return self.net[2](torch.tanh(F.linear(x, w, self.net[0].bias)))

    x, plain = inputs(3, 3), copy.deepcopy(net)
    plain.run = spelled
    assert errors(plain, x, differentiate(net, x, engine="traced")) < 1e-10


@pytest.mark.parametrize("order", [1, 2])
def test_a_parameter_without_a_part_has_derivatives_0(order):
    net = Call(lambda self, x: self.b(torch.tanh(self.a(x))), c=nn.Linear(2, 2), **linear_pair())
    x = inputs(3, 3)
    derivs = differentiate(net, x, engine="traced", order=order)
    assert derivs.jacobian("c.weight").shape == (3, 2, 2, 2)
    assert not derivs.jacobian("c.weight").any()
    assert derivs.jacobian("a.weight").any()
    assert order == 1 or not derivs.second("c.bias").any()
    alone = differentiate(net, x, engine="traced", order=order, layers=["c"])
    assert torch.equal(alone.outputs, derivs.outputs)
    assert [list(b.inputs) for b in alone.blocks] == [["c.weight"], ["c.bias"]]
    assert not alone.jacobian("c.bias").any()


def test_one_index_for_each_input_of_an_embedding():
    parts = {"table": nn.Embedding(5, 3), "head": nn.Linear(3, 2)}
    net = Call(lambda self, x: self.head(torch.tanh(self.table(x[:, 0]))), **parts)
    x = torch.tensor([[0, 2], [4, 1], [4, 4]])
    assert errors(net, x, differentiate(net, x, engine="traced")) < 1e-10
    assert_first_order(net, x)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_elementwise_functions(function):
    net, x = elementwise(function), inputs(2, 3)
    assert errors(net, x, differentiate(net, x, engine="traced")) < 1e-10


def test_what_autograd_cannot_differentiate_twice_may_still_be_piecewise_linear():
    x = inputs(2, 3)
    ours, same = (elementwise(f) for f in (F.hardsigmoid, lambda s: F.relu6(s + 3) / 6))
    derivs, expected = (differentiate(net, x, engine="traced") for net in (ours, same))
    for name, _ in ours.named_parameters():
        assert torch.allclose(derivs.jacobian(name), expected.jacobian(name))
        assert not derivs.second(name).any()


@pytest.mark.parametrize("case", ["lenet", "gates"])
def test_quantities_equal_enumerated_labels(case):
    net, x = network(case)
    exact, derivs = reference.categorical(net, x[:1]), differentiate(net, x[:1])
    family = fimlib.Categorical()
    for quantity, ours in {
        "I": fimlib.fisher_information(derivs, family),
        "v1": fimlib.variance_i1(derivs, family),
        "v2": fimlib.variance_i2(derivs, family),
        "c12": fimlib.covariance_i1_i2(derivs, family),
    }.items():
        scale = max(float(expected.abs().max()) for expected in exact[quantity].values())
        for name, expected in exact[quantity].items():
            assert float((ours[name][0] - expected).abs().max()) <= 1e-10 * scale


def test_traced_equals_layerwise_in_the_same_blocks():
    net, x = mlp([3, 5, 4, 3], nn.Tanh, scale=1.5), inputs(4, 3)
    ours, theirs = (differentiate(net, x, engine=e) for e in ("traced", "layerwise"))
    for a, b in zip(ours.blocks, theirs.blocks, strict=True):
        assert (a.layer, list(a.inputs), a.J.shape) == (b.layer, list(b.inputs), b.J.shape)
        assert torch.allclose(a.J, b.J, rtol=1e-12)
        assert torch.allclose(a.S, b.S, rtol=1e-10, atol=1e-14)
        assert torch.equal(a.inputs[f"{a.layer}.weight"], b.inputs[f"{a.layer}.weight"])


def test_traced_equals_backpack():
    layers = nn.Conv2d(1, 2, 2, stride=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(8, 3)
    torch.manual_seed(0)
    net, x = nn.Sequential(*layers).double(), inputs(2, 25).view(2, 1, 5, 5)
    ours, theirs = (differentiate(net, x, engine=e) for e in ("traced", "backpack"))
    for name, _ in net.named_parameters():
        assert torch.allclose(ours.jacobian(name), theirs.jacobian(name), rtol=1e-10)
        assert torch.allclose(ours.second(name), theirs.second(name), rtol=1e-9, atol=1e-13)


def test_layers_come_in_the_order_of_use():
    net, x = network("residual")
    blocks = differentiate(net, x).blocks
    layers = list(dict.fromkeys(block.layer for block in blocks))
    assert layers == ["conv1", "bn1", "conv2", "bn2", "conv3", "short", "fc"]
    assert [list(b.inputs) for b in blocks if b.layer == "fc"] == [["fc.weight", "fc.bias"]]


def test_chunks_of_units_change_nothing(monkeypatch):
    net, x = network("lenet")
    expected = differentiate(net, x)
    monkeypatch.setattr("fimlib.engines.traced.second_order.NUMBERS_AT_A_TIME", 1)
    for ours, exact in zip(differentiate(net, x).blocks, expected.blocks, strict=True):
        assert torch.allclose(ours.S, exact.S, rtol=1e-12, atol=1e-15)


def test_float32_stays_float32():
    net, x = network("residual")
    exact = differentiate(net, x)
    rough = differentiate(copy.deepcopy(net).float(), x.float())
    for name, _ in net.named_parameters():
        S = rough.second(name)
        assert S.dtype == torch.float32
        assert float((S - exact.second(name)).abs().max()) <= 1e-4 * exact.second(name).abs().max()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_model_is_left_as_it_was(context):
    net, x = network("vgg")
    net.train()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.Dropout):
            module.eval()
    net.net[0].weight.requires_grad_(False)
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    modes = [m.training for m in net.modules()]
    with context():
        derivs = differentiate(net, x)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert [m.training for m in net.modules()] == modes
    assert not net.net[0].weight.requires_grad
    assert derivs.jacobian("net.0.weight").any()
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks
    assert not any(block.S.requires_grad or block.J.requires_grad for block in derivs.blocks)


def no_grad(s):
    with torch.no_grad():
        return s.exp()


def part_overwritten(s):
    z = s.clone()
    z[:, 0] += 3
    return z


def scaled_unseen(s):
    z = s.clone()
    with torch.no_grad():
        z.mul_(10)
    return z


def clamped(self, x):
    with torch.no_grad():
        self.a.weight.clamp_(-0.1, 0.1)
    return self.b(self.a(x))


def through_data(self, x):
    """Overwrites what the layer has kept for its derivatives, unseen by autograd."""
    z = self.a(x)
    x.data.add_(1)
    return self.b(z)


def captured(is_frozen, view=lambda w: w):
    """A weight that is used once by its name and once out of a closure."""

    def build():
        net = Call(lambda self, x: self.b(torch.tanh(self.a(x) * also[0])), **linear_pair())
        net.a.bias.requires_grad_(not is_frozen)
        also = [view(net.a.bias)]
        return net

    return build


def saved_and_changed(s):
    z = s.clone()
    y = z * s.sin()
    z.add_(1)
    return y + z


LEAF = torch.ones(4, dtype=torch.float64, requires_grad=True)


def new_tensor(s):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises against it
        return s * s.new_tensor(s)


def scripted_product():
    @torch.jit.script
    def product(z):
        return z * z.detach()

    return product


def script_module():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to remove it
        return torch.jit.trace(net, inputs(3, 3))


def by_sign(self, x):
    """A factor in one input, used twice in another."""
    return torch.cat(
        [self.a(z) if z.sum() > 0 else self.a(z) + self.a(z.sin()) for z in x.split(1)]
    )


def zero_start():
    net = Call(lambda self, x: self.b(x - x.mean(0)), b=nn.Linear(3, 2))
    nn.init.zeros_(net.b.weight)
    return net


class KeepFirst(nn.Module):
    """Keeps for later what it saw in the first batch."""

    def __init__(self):
        super().__init__()
        self.mean = None
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        if self.mean is None:
            self.mean = x.mean(0)
        return self.layer(x - self.mean)


def wrong_argument(_self, _x):
    raise KeyError("my own key")


def attention(self, x):
    z = self.embed(x).view(len(x), 2, 4)
    return self.head(self.attend(z, z, z, need_weights=False)[0].flatten(1))


def own_attention(self, x):
    z = self.embed(x).view(len(x), 2, 4)
    return self.head((z @ z.transpose(1, 2) @ z).flatten(1))


def recurrent(self, x):
    return self.head(self.rnn(x[:, None])[0][:, 0])


def linears(forward, **more):
    return lambda: Call(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2), **more)


def between(f):
    return lambda: elementwise(f)


TRAPS = {
    "batch statistics": (
        linears(lambda self, x: self.b(F.batch_norm(self.a(x), None, None, training=True))),
        r"batch_norm\(\) in .*statistics of the batch",
    ),
    "attention": (
        lambda: Call(
            attention,
            embed=nn.Linear(3, 8),
            attend=nn.MultiheadAttention(4, 2, batch_first=True),
            head=nn.Linear(8, 2),
        ),
        r"'attend' \(MultiheadAttention\)|multi_head_attention_forward",
    ),
    "attention without softmax": (
        lambda: Call(own_attention, embed=nn.Linear(3, 8), head=nn.Linear(8, 2)),
        r"BmmBackward0 of .*both factors of this product depend on parameter 'embed.bias'",
    ),
    "recurrence": (
        lambda: Call(recurrent, rnn=nn.GRU(3, 4, batch_first=True), head=nn.Linear(4, 2)),
        r"'rnn' \(GRU\)",
    ),
    "called twice": (
        linears(lambda self, x: self.b(torch.tanh(self.c(self.c(self.a(x))))), c=nn.Linear(4, 4)),
        r"'c' \(Linear\).*both factors of this product depend on parameter 'c.weight'",
    ),
    "weight from activations": (
        linears(lambda self, x: self.b(self.a(x) @ self.a(x).T @ self.a(x))),
        "both factors",
    ),
    "custom function": (between(lying.WrongCube.apply), r"pow\(\) .*autograd.Function"),
    "custom function with a known name": (
        between(lambda s: lying.Sigmoid.apply(s.clone())),
        "SigmoidBackward, of no function of torch",
    ),
    "detach": (between(lambda s: s * s.detach()), r"detach\(\) in module '' \(Call\) cuts"),
    "data": (between(lambda s: s + s.data.exp()), r"data\(\) in module '' \(Call\) cuts"),
    "parameter's data": (
        linears(lambda self, x: x @ self.a.weight.data.T @ self.b.weight.T),
        "data",
    ),
    "no grad": (between(lambda s: s + no_grad(s)), r"exp\(\) .*cuts"),
    "item": (between(lambda s: s * s.sum().item()), r"item\(\) .*cuts"),
    "aten detach": (between(lambda s: s * torch.ops.aten.detach(s)), r"detach\(\) .*cuts"),
    "data set": (between(lambda s: setattr(s, "data", s.exp()) or s), r"data\(\) .*cuts"),
    "gradient hook": (between(lambda s: s.register_hook(lambda g: 2 * g) and s), "register_hook"),
    "gradient": (
        between(lambda s: torch.autograd.grad(s.exp().sum(), s, create_graph=True)[0] + s),
        r"grad\(\) .* hides",
    ),
    "cumulative product": (between(lambda s: s.cumprod(1)), "Cumprod"),
    "part overwritten": (between(part_overwritten), "assignments into a tensor"),
    "random dropout": (between(lambda s: F.dropout(s, 1e-9)), "random numbers"),
    "noise": (between(lambda s: s + torch.rand_like(s)), "random numbers"),
    "mixes the batch": (between(lambda s: s - s.mean(0)), "depend on the others of the batch"),
    "mixes the inputs": (
        linears(lambda self, x: self.b(torch.tanh(self.a(x - x.mean(0))))),
        "depend on the others of the batch",
    ),
    "other precision": (between(lambda s: s.float().double()), "torch.float32"),
    "complex numbers": (between(lambda s: s.to(torch.complex128).abs()), "torch.complex128"),
    "new tensor": (between(new_tensor), r"new_tensor\(\)"),
    "filled with a value": (
        between(lambda s: s + torch.full_like(s, s.max().detach())),
        r"detach\(\)|full_like",
    ),
    "filled with a maximum": (between(lambda s: s + torch.full_like(s, s.max())), "full_like"),
    "input's data": (linears(through_data), r"data\(\) .*cuts"),
    "changed without a trace": (between(scaled_unseen), r"mul_\(\) .*no_grad"),
    "weight changed without a trace": (linears(clamped), r"clamp_\(\) .*no_grad"),
    "captured": (captured(False), "'a.bias'.*not by its name"),
    "captured, frozen": (captured(True), "'a.bias'.*not by its name"),
    "captured view": (captured(False, lambda w: w.view(1, 4)), "of no function of torch"),
    "foreign leaf": (
        linears(lambda self, x: self.b(self.a(x) * LEAF)),
        "a tensor that requires grad",
    ),
    "vmap": (between(torch.vmap(lambda s: s * s.detach())), r"torch.vmap"),
    "script function": (between(lambda s: scripted_product()(s)), "of no function of torch"),
    "script module": (script_module, "before torch.jit"),
    "DataParallel": (lambda: nn.DataParallel(chain(nn.Linear(3, 2))), "model.module"),
    "sinc": (between(torch.sinc), r"sinc\(\)"),
    "saved, then changed": (between(saved_and_changed), r"Call.*modified by an inplace"),
    "factored in one input only": (
        lambda: Call(by_sign, a=nn.Linear(3, 2, bias=False)),
        "differently at different inputs",
    ),
    "mixes the inputs behind zeros": (zero_start, "depend on the others of the batch"),
    "small outputs": (
        linears(lambda self, x: 1e-9 * self.b(torch.tanh(self.a(x - x.mean(0))))),
        "depend on the others of the batch",
    ),
    "keeps the first batch": (lambda: KeepFirst().double(), "depend on the others of the batch"),
    "key error": (linears(wrong_argument), "my own key"),
    "no rule": (
        between(
            lambda s: F.grid_sample(
                s[:, None, None], torch.zeros(len(s), 1, 4, 2).double(), align_corners=False
            )[:, 0, 0]
        ),
        "GridSampler",
    ),
}


@pytest.mark.parametrize("case", TRAPS)
def test_traps_are_refused_by_name(case):
    build, message = TRAPS[case]
    net, random = build(), torch.get_rng_state()
    with pytest.raises((NotImplementedError, ValueError), match=message):
        differentiate(net, inputs(3, 3), engine="traced")
    if case in (*FIRST_ORDER_ONLY, *SUPPORTED_ELSEWHERE):
        assert differentiate(net, inputs(3, 3)).engine == "functional"
    else:
        with pytest.raises((NotImplementedError, ValueError)):
            differentiate(net, inputs(3, 3))
    assert torch.equal(random, torch.get_rng_state())
    assert not nn.modules.module._global_forward_pre_hooks


# By the functional engine; its results agree with difference quotients, or they would be refused.
SUPPORTED_ELSEWHERE = [
    "complex numbers", "factored in one input only", "part overwritten", "saved, then changed",
]  # fmt: skip
FIRST_ORDER_ONLY = [
    "attention", "attention without softmax", "recurrence", "called twice", "cumulative product",
    "no rule", "sinc",
]  # fmt: skip


@pytest.mark.parametrize("case", FIRST_ORDER_ONLY)
def test_first_order_needs_no_rules_for_second_derivatives(case):
    net = TRAPS[case][0]()
    assert_first_order(net, inputs(3, 3))
    if case != "called twice":
        assert_first_order(net, inputs(8, 3))


@pytest.mark.parametrize("case", sorted(TRAPS.keys() - FIRST_ORDER_ONLY))
def test_other_traps_are_refused_at_first_order_too(case):
    build, message = TRAPS[case]
    if case == "weight from activations":  # of all inputs
        message = "depend on the others of the batch"
    with pytest.raises((NotImplementedError, ValueError), match=message):
        differentiate(build(), inputs(3, 3), engine="traced", order=1)


def test_refusals_name_the_alternatives():
    net = TRAPS["sinc"][0]()
    with pytest.raises(NotImplementedError, match=r"sinc\(\).*engine='auto' supports it"):
        differentiate(net, inputs(2, 3), engine="traced")
    assert differentiate(net, inputs(2, 3)).engine == "functional"


def test_tied_parameters_are_refused():
    net = residual(pre=True)
    net.two.weight = net.one.weight
    with pytest.raises(NotImplementedError, match=r"'two.weight' is the same tensor as 'one.we"):
        differentiate(net, inputs(1, 3), engine="traced")


def own_error(_s):
    raise RuntimeError("my own words")


BAD = {
    "dropout": (lambda: chain(nn.Linear(3, 2), nn.Dropout()).train(), r"model.eval\(\)"),
    "width": (lambda: chain(nn.Linear(4, 2)), r"on an input of shape \[3, 3\]"),
    "own error": (between(own_error), r"^(?!.*not fit).*my own words"),
    "no finite derivative": (between(lambda s: (s * 0).sqrt()), r"sqrt\(\).* no finite derivative"),
    "overflow": (between(lambda s: (1e4 * s.abs()).exp()), "weights are too large"),
    "not [B, T]": (linears(lambda self, x: self.b(self.a(x))[:, None]), r"\[B, T\].*\[3, 1, 2\]"),
    "a parameter for each input": (
        linears(lambda self, x: self.b(self.shift + self.a(x)), shift=parameter(3, 4)),
        r"\[B, T\].*\[3, 2\]",
    ),
    "a tuple": (linears(lambda self, x: (self.b(self.a(x)),)), r"\[B, T\].*tuple"),
    "no outputs": (linears(lambda self, x: self.b(self.a(x))[:, :0]), "no outputs"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_a_remedy(case):
    build, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        differentiate(build(), inputs(3, 3), engine="traced")


@pytest.mark.parametrize("order", [1, 2])
def test_infinite_derivatives_are_refused(order):
    with pytest.raises(ValueError, match="no finite derivative"):
        differentiate(
            elementwise(lambda s: (s * 0).sqrt()), inputs(3, 3), engine="traced", order=order
        )


def test_float32_networks_are_not_refused_for_rounding():
    for seed in range(20):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten())
        net = nn.Sequential(*net, nn.Linear(1024, 10))
        for p in net.parameters():
            p.data *= 2
        differentiate(net, torch.randn(16, 1, 8, 8), engine="traced")


class Keeps(nn.Module):
    def forward(self, x):
        self.last = x
        return x


class Counter(nn.Module):
    """Changes what no state_dict shows, and what one shows."""

    def __init__(self):
        super().__init__()
        self.calls, self.last = [], None
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        self.calls.append(len(x))
        self.last = x
        return x


@pytest.mark.parametrize("engine", ["layerwise", "traced"])
def test_the_model_itself_is_never_called(engine):
    net = nn.Sequential(Counter(), nn.Linear(3, 2)).double()
    differentiate(net, inputs(2, 3), engine=engine)
    assert not net[0].calls
    assert net[0].last is None
    assert not net[0].mean.any()


def test_a_model_that_keeps_its_activations_is_no_reason_to_refuse():
    net = nn.Sequential(nn.Linear(3, 3), Keeps(), nn.Linear(3, 2)).double()
    net(inputs(2, 3))
    assert net[1].last.grad_fn is not None
    differentiate(net, inputs(2, 3), engine="traced")


def test_what_cannot_be_copied_is_refused():
    net = elementwise(torch.tanh)
    net.lines = (line for line in "ab")
    with pytest.raises(NotImplementedError, match=r"'' \(Call\) cannot be copied"):
        differentiate(net, inputs(1, 3), engine="traced")


def test_auto_reaches_inputs_with_positions():
    net = chain(nn.Unflatten(1, (2, 3)), nn.Linear(3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 2))
    net, x = net.net, inputs(2, 6)
    assert errors(net, x, differentiate(net, x)) < 1e-10


def test_zero_curvature_is_exactly_zero():
    """Piecewise linear networks have S = 0, and Î₂ no variance (Remark 4.4)."""
    net = chain(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    derivs = differentiate(net, inputs(2, 25).view(2, 1, 5, 5))
    assert not any(block.S.any() for block in derivs.blocks)


class LastState(nn.Module):
    """A recurrent layer, whose biases enter before the second of its weights."""

    def __init__(self):
        super().__init__()
        self.recurrent, self.head = nn.RNN(2, 2, batch_first=True), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.recurrent(x)[0][:, -1])


def test_parameters_are_listed_in_the_order_of_the_model():
    net = LastState().double()
    derivs = fimlib.differentiate(net, inputs(3, 4).view(3, 2, 2), engine="traced", order=1)
    listed = [name for block in derivs.blocks for name in block.inputs]
    assert listed == [name for name, _ in net.named_parameters()]
