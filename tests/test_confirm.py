"""The check that every engine's numbers must pass: it notices wrong ones, and lets right ones be."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from strategies import inputs, mlp
from torch import nn

import fimlib
from fimlib import _choose
from fimlib._confirm import Unconfirmed, confirm

# Right derivatives that are changed.


def convolutional():
    layers = [nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(12, 3))


class Attention(nn.Module):
    """One head over three tokens of width 4."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        z = torch.softmax(q @ k.transpose(1, 2) / 2, -1) @ v
        return self.out(self.norm(x + z).mean(1))


NETWORKS = {  # the network, its input, an engine and an order
    "mlp": (lambda: mlp([4, 5, 5, 3], nn.Tanh), (4,), "layerwise", 2),
    "one output": (lambda: mlp([4, 6, 1], nn.Softplus), (4,), "layerwise", 2),
    "cnn": (convolutional, (1, 4, 4), "traced", 2),
    "attention": (Attention, (3, 4), "functional", 1),
    "attention, order 2": (Attention, (3, 4), "functional", 2),
}


def network(name, dtype=torch.float64, batch=5):
    make, shape, engine, order = NETWORKS[name]
    torch.manual_seed(0)
    net, generator = make().to(dtype).eval(), torch.Generator().manual_seed(1)
    x = torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return net, x, engine, order


def judge(net, x, engine, order, change=lambda d: d, rows=None):
    """Confirm what an engine finds, if it always made this change to it."""
    attempt = _choose.ENGINES[engine].attempts(order)[0]

    def found(model, x):
        return change(attempt(model, x, order, None, rows).derivatives())

    confirm(net, x, found(net, x), found, rows)


def blocks(change, at=-1):
    """Change one block of the derivatives."""

    def changed(derivs):
        new = list(derivs.blocks)
        new[at] = change(new[at])
        return replace(derivs, blocks=tuple(new))

    return changed


def of_J(change, at=-1):
    return blocks(lambda b: replace(b, J=change(b.J.clone())), at)


def of_S(change, at=0):
    return blocks(lambda b: replace(b, S=change(b.S.clone())), at)


def entry_negated(J):
    """Of every input, so that the change does not depend on which are looked at."""
    largest = J.abs().flatten(1).argmax(1)
    J.flatten(1).scatter_(1, largest[:, None], -J.flatten(1).gather(1, largest[:, None]))
    return J


def row_of_zeros(J):
    J[:, 0] = 0
    return J


def of_another_input(J):
    return J.roll(1, 0)


def one_of_another_input(J):
    J[0] = J[-1]
    return J


def swapped(derivs):
    """The derivatives of two layers of the same shape, swapped."""
    first, second = derivs.blocks[:2]
    new = (
        replace(first, J=second.J, S=second.S),
        replace(second, J=first.J, S=first.S),
        *derivs.blocks[2:],
    )
    return replace(derivs, blocks=new)


def other_outputs(derivs):
    h = derivs.outputs.clone()
    h[-1] *= 1.01
    return replace(derivs, outputs=h)


def other_small_output(derivs):
    h = derivs.outputs.clone()
    h[0, h[0].abs().argmin()] += 1e-2
    return replace(derivs, outputs=h)


FIRST = {
    "one entry's sign": of_J(entry_negated),
    "one entry's sign, first layer": of_J(entry_negated, 0),
    "one row of zeros": of_J(row_of_zeros),
    "one row of zeros, first layer": of_J(row_of_zeros, 0),
    "J negated": of_J(torch.neg),
    "J of 0": of_J(torch.zeros_like, 0),
    "NaN": of_J(lambda J: J * torch.nan),
    "another input's J": of_J(of_another_input, 0),
    "one input's J is another's": of_J(one_of_another_input, 0),
    "another input's outputs": lambda d: replace(d, outputs=d.outputs.roll(1, 0)),
    "outputs off at one input": other_outputs,
    "the smallest output off": other_small_output,
}
SECOND = {
    "S negated": of_S(torch.neg),
    "S of 0": of_S(torch.zeros_like),
    "S doubled": of_S(lambda S: 2 * S),
    "NaN in S": of_S(lambda S: S * torch.nan),
    "S of another output": of_S(lambda S: S.roll(1, 1)),
    "S where there is none": of_S(lambda S: S + 1, -1),
    "S of another input": of_S(of_another_input),
}
FACTOR = {torch.float64: 1.01, torch.float32: 1.1}
DTYPES = tuple(FACTOR)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_right_derivatives_pass(name, dtype):
    judge(*network(name, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", FIRST)
@pytest.mark.parametrize("name", NETWORKS)
def test_wrong_first_derivatives_are_noticed(name, change, dtype):
    if name == "one output" and "smallest" in change:
        pytest.skip("there is one output")
    net, x, engine, _ = network(name, dtype)
    with pytest.raises(Unconfirmed):
        judge(net, x, engine, 1, FIRST[change])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", SECOND)
@pytest.mark.parametrize("name", [n for n, (*_, order) in NETWORKS.items() if order == 2])
def test_wrong_second_derivatives_are_noticed(name, change, dtype):
    net, x, engine, order = network(name, dtype)
    if name == "one output" and "another output" in change:
        pytest.skip("there is one output")
    with pytest.raises(Unconfirmed):
        judge(net, x, engine, order, SECOND[change])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_each_layer_counts(name, dtype):
    net, x, engine, _ = network(name, dtype)
    for at in range(len(list(net.parameters())) // 2):
        with pytest.raises(Unconfirmed):
            judge(net, x, engine, 1, of_J(lambda J: FACTOR[dtype] * J, at))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [1, 2])
def test_swapped_layers_are_noticed(order, dtype):
    torch.manual_seed(0)
    net = mlp([4, 4, 4, 4], nn.Tanh).to(dtype)
    with pytest.raises(Unconfirmed):
        judge(net, inputs(5, 4).to(dtype), "layerwise", order, swapped)


@pytest.mark.parametrize("batch", [1, 2, 3, 20])
def test_a_wrong_input_is_noticed_in_every_batch(batch):
    net, x, *_ = network("mlp", batch=batch)

    def last_wrong(derivs):
        blocks = [replace(b, J=b.J.clone()) for b in derivs.blocks]
        blocks[0].J[-1] *= 1.5
        return replace(derivs, blocks=tuple(blocks))

    with pytest.raises(Unconfirmed):
        judge(net, x, "layerwise", 1, last_wrong)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", [None, *FIRST, *SECOND])
def test_rows_that_were_carried_back_are_judged(change, dtype):
    """J and S of the residuals' directions, as ``accumulate`` has them."""
    net, x, engine, order = network("mlp", dtype)
    rows = fimlib.Categorical().directions_of_labels
    assert _choose.layerwise(net, x, 2, None, rows).derivatives().projected
    if change is None:
        judge(net, x, engine, order, rows=rows)
        return
    with pytest.raises(Unconfirmed):
        judge(net, x, engine, order, (FIRST | SECOND)[change], rows)


# Networks that no engine may answer.


class Straight(nn.Module):
    """A straight-through estimator."""

    def forward(self, x):
        return x + (torch.sign(x) - x).detach()


class Cut(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x).detach() + x**2


class DetachedMean(nn.Module):
    def forward(self, x):
        return torch.sin(x) + x.mean(1, keepdim=True).detach()


class Doubles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x * grad


class Forgets(torch.autograd.Function):
    """x³ with its derivative, whose own is cut off."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x.detach() ** 2 * grad


class WrongBackward(nn.Module):
    def forward(self, x):
        return Doubles.apply(x)


class WrongSecond(nn.Module):
    def forward(self, x):
        return Forgets.apply(x)


class BatchMean(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


class BatchMedian(nn.Module):
    def forward(self, x):
        return x * (x > x.median())


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (1 + self.calls)


class KeepsFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = None

    def forward(self, x):
        self.first = x.detach() if self.first is None else self.first
        return x + self.first[: len(x)]


class Dropout(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, training=True)


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x).to(x.dtype)


class Narrow(nn.Module):
    def forward(self, x):
        return torch.tanh(x.to(torch.bfloat16)).to(x.dtype)


class Single(nn.Module):
    def forward(self, x):
        return torch.tanh(x.float()).to(x.dtype)


def around(module, dtype=torch.float64, *, last=None):
    """A network with this module in its middle."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 3), module, nn.Tanh(), nn.Linear(3, 2), *([last] if last else [])]
    return nn.Sequential(*layers).to(dtype).eval()


class Unevenly(nn.Module):
    """One output that dwarfs the other."""

    def __init__(self, add, factor):
        super().__init__()
        for name, value in (("add", add), ("factor", factor)):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, h):
        return h * self.factor + self.add


UNEVEN = {
    "none": lambda: None,
    "ten thousands": lambda: Unevenly([3e4, 0.0], [1e4, 1.0]),
    "masked class": lambda: Unevenly([-1e9, 0.0], [1.0, 1.0]),
}
WRONG = {  # the module, and words of the refusal
    "straight-through": (Straight, r"'1' \(Straight\).*straight-through estimator"),
    "cut off": (Cut, r"'1' \(Cut\).*detach"),
    "detached mean": (DetachedMean, r"'1' \(DetachedMean\)"),
    "wrong backward": (WrongBackward, r"'1' \(WrongBackward\).*backward"),
    "batch mean": (BatchMean, r"'1' \(BatchMean\).*others of the batch"),
    "batch median": (BatchMedian, r"'1' \(BatchMedian\).*others of the batch"),
    "counter": (Counter, r"how often the model was called"),
    "first batch kept": (KeepsFirst, r"how often the model was called"),
    "dropout": (Dropout, r"chance"),
    "autocast": (Autocast, r"computes in torch.bfloat16"),
    "bfloat16": (Narrow, r"computes in torch.bfloat16"),
}
FAMILY, LABEL = fimlib.Categorical(), torch.zeros(5, dtype=torch.long)




def labels_of(net, x):  # noqa: ARG001
    h = torch.randn(len(x), 2, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    return FAMILY.sample(h, 3, generator=torch.Generator().manual_seed(0))


def of_engine(engine, order):
    return lambda net, x: fimlib.differentiate(net, x, engine=engine, order=order)


NAMES = {"parameters": ["0.bias"]}
CALLS = {
    "auto": of_engine("auto", 2),
    "auto, order 1": of_engine("auto", 1),
    "layerwise": of_engine("layerwise", 2),
    "traced": of_engine("traced", 2),
    "functional": of_engine("functional", 1),
    "functional, order 2": of_engine("functional", 2),
    "hesscale": of_engine("hesscale", 2),
    "accumulate": lambda net, x: fimlib.accumulate(net, x, FAMILY),
    "fisher_matrix": lambda net, x: fimlib.fisher_matrix(net, x, FAMILY, **NAMES),
    "i1": lambda net, x: fimlib.estimate_i1_matrix(net, x, labels_of(net, x), **NAMES),
    "i2": lambda net, x: fimlib.estimate_i2_matrix(net, x, labels_of(net, x), **NAMES),
    "data": lambda net, x: fimlib.data_fisher_matrix(net, x, LABEL, FAMILY, **NAMES),
    "data covariance": lambda net, x: fimlib.data_fisher_covariance(
        net, x, LABEL, FAMILY, **NAMES
    ),
    "hutchinson": lambda net, x: fimlib.hutchinson_variance_i2(net, x, FAMILY, num_probes=3),
}
