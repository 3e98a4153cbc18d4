"""Bad batches, masks and families: refused by estimate and accumulate alike, in words that help."""

import functools

import pytest
import torch
from strategies import inputs, mlp
from torch import nn

from fimlib import (
    Bernoulli,
    Categorical,
    Gaussian,
    GaussianHead,
    accumulate,
    differentiate,
    estimate,
)
from fimlib.families import Heads, Positions

WORDS, LENGTH = 7, 5
FIRST = r"batch 1( \(inputs 0 to \d\))?"  # with the part of it that a call took
X = inputs(6, 4)
CALLS = {
    "estimate": functools.partial(estimate, passes=2),
    "estimate, each input": functools.partial(estimate, passes=2, squares="input"),
    "accumulate": accumulate,
    "accumulate I": functools.partial(accumulate, quantities=["I"]),
}
each_call = pytest.mark.parametrize("call", CALLS)
each_first_order = pytest.mark.parametrize(
    "call", ["estimate", "estimate, each input", "accumulate I"]
)


def network():
    torch.manual_seed(0)
    return mlp([4, 5, 3], nn.Tanh)


def of_x(model, batch):
    return model(batch["x"])


class Language(nn.Module):
    """Logits at every position."""

    def __init__(self):
        super().__init__()
        self.table, self.rnn = nn.Embedding(WORDS, 3), nn.GRU(3, 3, batch_first=True)
        self.head = nn.Linear(3, WORDS)

    def forward(self, ids):
        return self.head(self.rnn(self.table(ids))[0])


def language():
    torch.manual_seed(0)
    return Language().double()


def text(lengths=(5, 3, 2)):
    torch.manual_seed(1)
    ids = torch.randint(WORDS, (len(lengths), LENGTH))
    return {"ids": ids, "mask": (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).long()}


def masked(by=lambda mask: mask[..., None]):
    return lambda model, batch: model(batch["ids"]) * by(batch["mask"])


TEXTS = Positions(Categorical(), WORDS)
WRONG_MASKS = {
    "no axis for the words": (masked(lambda m: m), "RuntimeError: The size of tensor a"),
    "turned": (masked(lambda m: m.T[..., None]), "RuntimeError: The size of tensor a"),
    "a position too short": (masked(lambda m: m[:, 1:, None]), "RuntimeError: The size of tensor"),
    "in a row": (masked(lambda m: m.flatten()), "RuntimeError: The size of tensor a"),
    "positions taken out": (
        lambda model, batch: model(batch["ids"])[batch["mask"].bool()],
        r"got \[10, 7\]: the first axis must count the inputs",
    ),
    "a loss": (
        lambda model, batch: (model(batch["ids"]) * batch["mask"][..., None]).sum(),
        "return the outputs of each input, and no loss",
    ),
}


@each_first_order
@pytest.mark.parametrize("name", WRONG_MASKS)
def test_a_mask_of_a_wrong_shape_names_the_batch(name, call):
    forward, says = WRONG_MASKS[name]
    with pytest.raises(ValueError, match=rf"^{FIRST}: .*{says}"):
        CALLS[call](language(), [text()], TEXTS, forward=forward)
    short = {**text(), "mask": text()["mask"][:, :-1]}
    with pytest.raises(ValueError, match="^batch 2.*the forward pass fails.*The size of tensor a"):
        CALLS[call](language(), [text(), short], TEXTS, forward=masked())


@pytest.mark.long
@each_first_order
def test_an_input_that_is_all_padding_has_no_information(call):
    def value(data):
        found = CALLS[call](language(), data, TEXTS, forward=masked())
        return found.value if "estimate" in call else found.fisher_information()

    assert not any(I.any() for I in value([text((0, 0))]).values())
    if "estimate" not in call:
        some, more = value([text((5, 3))]), value([text((5, 3, 0))])
        for name, I in some.items():
            assert torch.allclose(more[name], 2 / 3 * I, rtol=1e-9, atol=1e-14)
    assert all(I.isfinite().all() for I in value([text((0, 5)), text((0, 0))]).values())


NAN = X.clone()
NAN[4, 0] = torch.nan
BATCHES = {
    "no examples in one": ([X, X[:0]], None, "batch 2.*there are no inputs"),
    "no examples in a dict": ([{"x": X[:0]}], of_x, "batch 1: there are no inputs"),
    "no batches": ([], None, "there are no (inputs|batches)"),
    "another key": ([{"x": X}, {"y": X}], of_x, "batch 2.*forward pass fails.*KeyError: 'x'"),
    "another kind": ([{"x": X}, [X]], of_x, "batch 2.*forward pass fails.*TypeError"),
    "more tensors": ([X, (X, X, X)], None, "batch 2 is a tuple of .*more than x and its labels"),
    "wider inputs": ([X, X[:, :3]], None, r"batch 2: its inputs have shape \[3\], those before"),
    "wider outputs": (
        [{"x": X, "to": 3}, {"x": X, "to": 2}],
        lambda model, batch: model(batch["x"])[:, : batch["to"]],
        "batch 2.*the model gives 2 outputs, and gave 3 before",
    ),
    "a loss": (X, lambda model, x: model(x).sum(), "batch 1.*: .*and no loss"),
    "a loss of each input": (X, lambda model, x: model(x).sum(1), "batch 1.*: .*add an axis"),
    "a tuple": (X, lambda model, x: (model(x), 0), "batch 1.*: .*got a tuple: return its tensor"),
    "NaN": ([X, NAN], None, "batch 2.*the input holds NaN"),
    "NaN in a dict": ([{"x": X}, {"x": NAN}], of_x, "batch 2: the batch holds NaN"),
    "NaN outputs": (
        [X, X - 9], lambda model, x: model(x) * (x[:, :1] + 6).sqrt(), "batch 2.*outputs hold NaN"
    ),
}  # fmt: skip


@each_call
@pytest.mark.parametrize("name", BATCHES)
def test_a_bad_batch_is_named(name, call):
    data, forward, says = BATCHES[name]
    with pytest.raises(ValueError, match=f"^{says}"):
        CALLS[call](network(), data, Categorical(), forward=forward)


FAMILIES = {
    "an odd number of outputs": (
        GaussianHead(),
        "needs an even number of outputs.*the model has 3",
    ),
    "a covariance of another size": (Gaussian(torch.eye(2)), "covariance is 2×2.*has 3 outputs"),
    "positions of another size": (Positions(Categorical(), 2), "no multiple of size = 2"),
    "other heads": (Heads({"a": (Bernoulli(), 2)}), "has 3 outputs, and the heads a have 2"),
}


@each_call
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_that_does_not_fit(name, call):
    family, says = FAMILIES[name]
    with pytest.raises(ValueError, match=rf"^{FIRST}: .*{says}"):
        CALLS[call](network(), X, family)
    with pytest.raises(ValueError, match="batch 1.*: Categorical needs outputs .* T ≥ 2"):
        CALLS[call](network(), X, Categorical(), forward=lambda model, x: model(x)[:, :1])


class Hungry(nn.Module):
    """Runs out of memory where there are many inputs."""

    def __init__(self, error, most):
        super().__init__()
        self.net, self.error, self.most = network(), error, most

    def forward(self, x):
        if len(x) > self.most:
            raise self.error("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.net(x)


@each_call
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_says_what_to_make_smaller(error, call):
    small, inputs_of_two = Hungry(error, most=3), list(X.split(2))
    for options in ({}, {"forward": lambda model, x: model(x)}):
        with pytest.raises(error, match=r"^batch 1.*out of memory: take smaller .* batch_size="):
            CALLS[call](small, X, Categorical(), batch_size=6, **options)
        CALLS[call](small, X, Categorical(), batch_size=2, **options)
        CALLS[call](small, inputs_of_two, Categorical(), **options)
    with pytest.raises(error, match=r"^batch 2.*in your loader"):
        CALLS[call](small, [X[:2], X[:5]], Categorical(), batch_size=5)


def too_much():
    """Ask torch for more memory than any machine has: on the CPU it raises a plain RuntimeError."""
    return torch.empty(2**52, device="cpu")


class HungryBackward(torch.autograd.Function):
    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(*_):
        too_much()


class HungrySecond(torch.autograd.Function):
    """A sine, whose second derivative takes all memory."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return HungryBackward.apply(ctx.saved_tensors[0].cos()) * grad


class Full(nn.Module):
    """Fills the memory in a backward pass, or in the forward pass of 3 inputs or more."""

    def __init__(self, where):
        super().__init__()
        self.net, self.where = network(), where

    def forward(self, x):
        if len(x) > 2 and self.where == "forward":
            too_much()
        h = self.net(x)
        passes = {"backward": HungryBackward, "second": HungrySecond}
        return passes[self.where].apply(h) if self.where in passes else h


FULL = r"torch needs 16,777,216\.0 GiB more"  # 2⁵² numbers of 4 bytes


@each_call
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_full_memory_of_the_cpu_is_told_from_other_errors(where, call):
    with pytest.raises(MemoryError, match=rf"^batch 1.*{FULL}: take smaller .* estimate\(\) needs"):
        CALLS[call](Full(where), X, Categorical(), batch_size=6)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("engine", ["auto", "traced", "functional"])
@pytest.mark.parametrize("order", [1, 2])
def test_full_memory_is_no_reason_for_another_engine(engine, order, where):
    with pytest.raises(MemoryError, match=FULL):
        differentiate(Full(where), X, engine=engine, order=order)


@pytest.mark.parametrize("engine", ["auto", "functional"])
def test_full_memory_in_the_second_derivatives(engine):
    differentiate(Full("second"), X, order=1)
    with pytest.raises(MemoryError, match=FULL):
        differentiate(Full("second"), X, engine=engine)


@pytest.mark.parametrize("passes", [-1, 0, 1, 1.5, True, "3"])
def test_passes(passes):
    with pytest.raises(ValueError, match="passes must be an integer ≥ 2, got"):
        estimate(network(), X, Categorical(), passes=passes)


@each_call
def test_nothing_to_differentiate_in(call):
    with pytest.raises(ValueError, match="the model has no parameters"):
        CALLS[call](nn.Tanh(), X, Categorical())
    with pytest.raises(ValueError, match="no parameter of the model requires grad"):
        CALLS[call](network().requires_grad_(False), X, Categorical(), layers="trainable")
