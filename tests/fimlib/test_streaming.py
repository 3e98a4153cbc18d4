"""A data set in batches: the same answer for every size of them, in bounded memory."""

import copy
import gc
import re
import traceback
import weakref
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
import reference
import torch
from strategies import Failing, inputs, mlp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fimlib
from fimlib import Categorical, Gaussian, Joint, differentiate, left_factors, memory, streaming
from fimlib.engines import choose, functional, layerwise
from fimlib.engines.choose import differentiator
from fimlib.memory import BatchSize, LiveBytes, live_bytes
from fimlib.streaming import accumulate

NET, X = mlp([4, 5, 3], nn.Tanh, scale=1.5), inputs(11, 4)
CNN = nn.Sequential(
    nn.Conv2d(1, 2, 3), nn.Sigmoid(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)
)
CNN = CNN.double().eval()
IMAGES = inputs(5, 36, seed=3).reshape(5, 1, 6, 6)


def state(joint):
    """All numbers of an accumulator, copied."""
    found = joint.state_dict()
    return {
        key: {name: t.clone() for name, t in tensors.items()}
        for key, tensors in {**found["means"], "scatter": found["scatter"]}.items()
    }


def assert_same(joint, other, tolerance=1e-12):
    assert joint.count == other.count
    mine, theirs = state(joint), state(other)
    assert mine.keys() == theirs.keys()
    for key in mine:
        assert mine[key].keys() == theirs[key].keys()
        for name, tensor in mine[key].items():
            # Var_x I is the small difference of two averages
            scale = theirs[key][name].abs().max()
            if key == "scatter":
                scale = scale + other.count * theirs["I"][name].square().max()
            assert (tensor - theirs[key][name]).abs().max() <= tolerance * scale, (key, name)


def whole(model, x, family, **options):
    """One batch, by hand."""
    joint = Joint(family, **options)
    joint.update(differentiate(model, x))
    return joint


# The answer. ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 10, 11, 100, None])
@pytest.mark.parametrize("family", [Categorical(), Gaussian()], ids=["categorical", "gaussian"])
def test_every_batch_size_gives_the_same(family, batch_size):
    found = accumulate(NET, X, family, bounds="certified", batch_size=batch_size)
    assert_same(found, whole(NET, X, family, bounds="certified"))


@pytest.mark.parametrize("bounds", [None, "certified"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pieces_as_small_as_they_get_give_the_same(dtype, bounds, monkeypatch):
    """As large batches go through the cache: many pieces, and blocks and products within them."""
    net, x = mlp([4, 6, 5, 5, 3], nn.Sigmoid, scale=2.0), inputs(50, 4)
    net, x = net.to(dtype), x.to(dtype)
    expected = whole(net, x, Categorical(), bounds=bounds, dtype=dtype)
    sizes = []
    sweep = layerwise.backward
    monkeypatch.setattr(layerwise, "PIECE_BYTES", 1)
    monkeypatch.setattr(layerwise, "BLOCK_BYTES", 1)
    monkeypatch.setattr(left_factors, "ROWS", 7)
    monkeypatch.setattr(
        layerwise, "backward", lambda J, *rest: (sizes.append(len(J)), sweep(J, *rest))[1]
    )
    found = accumulate(net, x, Categorical(), batch_size=50, bounds=bounds, dtype=dtype)
    assert sizes == [8, 16, 16, 16, 2]  # eight are confirmed
    assert_same(found, expected, 1e-12 if dtype == torch.float64 else 2e-6)


def test_float32_that_is_too_narrow_is_seen_in_any_piece(monkeypatch):
    monkeypatch.setattr(layerwise, "PIECE_BYTES", 1)
    net, x = mlp([4, 5, 4, 3], nn.Tanh).float(), inputs(40, 4).float()
    options = {"batch_size": 40, "dtype": torch.float32}
    assert accumulate(net, x, Categorical(), **options).count == 40
    with torch.no_grad():
        net[4].bias[0] += 95.0
    with pytest.raises(ValueError, match=r"layer '\d': float32 is too narrow"):
        accumulate(net, x, Categorical(), **options)


def test_it_is_what_the_oracle_averages():
    net, x = mlp([2, 3, 3], nn.Tanh, scale=1.5), inputs(5, 2)
    joint = accumulate(net, x, Categorical(), batch_size=2)
    table = [reference.categorical(net, one[None]) for one in x]
    found = joint.fisher_information(), joint.label_variance(1), joint.label_variance(2)
    found = dict(zip(("I", "v1", "v2"), found, strict=True), c12=joint.label_covariance())
    for key, means in found.items():
        scale = max(t.abs().max() for one in table for t in one[key].values())
        for name, mean in means.items():
            expected = torch.stack([one[key][name] for one in table]).mean(0)
            assert (mean - expected).abs().max() <= 1e-10 * scale
    for name, variance in joint.input_variance().items():
        expected = torch.stack([one["I"][name] for one in table]).var(0, correction=0)
        assert (variance - expected).abs().max() <= 1e-10 * expected.max()


@pytest.mark.parametrize("batch_size", [2, None])
def test_any_iterable_of_batches(batch_size):
    y = torch.zeros(11, dtype=torch.long)
    kinds = {
        "list": [X[:4], X[4:9], X[9:]],
        "pairs": [(X[:4], y[:4]), [X[4:], y[4:]]],
        "generator": (part for part in X.split(3)),
        "loader of pairs": DataLoader(TensorDataset(X, y), batch_size=4),
        "loader": DataLoader(X, batch_size=4),
    }
    for kind, data in kinds.items():
        joint = accumulate(NET, data, Categorical(), batch_size=batch_size)
        assert joint.count == 11, kind
        assert_same(joint, whole(NET, X, Categorical()))


@pytest.mark.parametrize("bounds", ["certified", None])
def test_a_convolutional_network(bounds):
    joint = accumulate(CNN, IMAGES, Categorical(), batch_size=2, bounds=bounds)
    assert_same(joint, whole(CNN, IMAGES, Categorical(), bounds=bounds))


def test_options_reach_their_places():
    family = Categorical()
    some = accumulate(NET, X, family, layers=["2"], batch_size=4)
    assert set(some.fisher_information()) == {"2.weight", "2.bias"}
    first = accumulate(NET, X, family, quantities=["Var_x I", "V1"], batch_size=4)
    assert torch.allclose(
        first.label_variance(1)["0.bias"],
        accumulate(NET, X, family).label_variance(1)["0.bias"],
        rtol=1e-12,
    )
    with pytest.raises(ValueError, match="not accumulated"):
        first.label_variance(2)
    alone = accumulate(NET, X, family, quantities=["V1"])
    assert set(alone.state_dict()["means"]) == {"I", "V1"}
    bounded = accumulate(NET, X, family, quantities=["V1"], bounds="certified")
    assert {"V1_upper", "I_upper²"} <= set(bounded.state_dict()["means"])
    assert "V2_upper" not in bounded.state_dict()["means"]
    assert accumulate(NET, X, family, dtype=torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match="unknown engine 'warp'"):
        accumulate(NET, X, family, engine="warp")


def test_a_share_without_inputs_is_an_empty_accumulator():
    joint = accumulate(NET, X[:0], Categorical())
    assert joint.count == 0
    with pytest.raises(ValueError, match="no inputs seen yet"):
        joint.fisher_information()
    joint.merge(whole(NET, X, Categorical()))
    assert joint.count == 11


def test_the_model_and_the_random_state_stay():
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    net.eval()
    net[0].weight.requires_grad_(False)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    versions = [p._version for p in net.parameters()]
    torch.manual_seed(5)
    accumulate(net, X, Categorical())
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert versions == [p._version for p in net.parameters()]
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True]
    assert not any(m.training or m._forward_hooks for m in net.modules())
    assert all(p.grad is None for p in net.parameters())


# Refusals. -------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        yield from X


class Pairs:
    """A data set as PyTorch knows it, without its base class."""

    def __len__(self):
        return 11

    def __getitem__(self, i):
        return X[i], 0


@pytest.mark.parametrize(
    "data", [TensorDataset(X), Stream(), Pairs(), 3.0], ids=lambda d: type(d).__name__
)
def test_a_data_set_is_refused_with_the_remedy(data):
    with pytest.raises(TypeError, match=r"pass torch\.utils\.data\.DataLoader\(inputs, batch_"):
        accumulate(NET, data, Categorical())


@pytest.mark.parametrize(
    "batch", [X.numpy(), "abc", None, (), ("abc", 0)], ids=lambda b: type(b).__name__
)
def test_batches_must_be_tensors(batch):
    with pytest.raises(TypeError, match="batch 2 is a .*as_tensor.*needs forward="):
        accumulate(NET, [X, batch], Categorical())


class TakesTwo(nn.Module):
    """Of two arguments, the second may be left out."""

    def __init__(self):
        super().__init__()
        self.net = NET

    def forward(self, x, more=None):
        return self.net(x if more is None else x * more)


class NeedsThree(TakesTwo):
    def forward(self, x, more, most):
        return self.net(x * more * most)


class TakesAll(TakesTwo):
    def forward(self, *parts):
        return self.net(parts[0])


IDS = torch.arange(11).long()
CLEAR = {
    "one tensor": [X],
    "a tuple of one": [(X,)],
    "classes": [(X, IDS)],
    "classes, a column": [[X, IDS[:, None]]],
    "yes or no": [(X, IDS > 3)],
    "one target": [(X, X[:, 0])],
    "targets": [(X, X[:, :2])],
    "a data set of one tensor": DataLoader(TensorDataset(X), batch_size=4),
    "regression": DataLoader(TensorDataset(X, X[:, :2]), batch_size=4),
    "a tuple of batches": X.split(4),
    "a list of batches": [X[:5], X[5:10], X[10:]],
}


@pytest.mark.parametrize("data", CLEAR.values(), ids=CLEAR)
def test_what_is_beyond_doubt_is_taken(data):
    assert_same(accumulate(NET, data, Categorical()), whole(NET, X, Categorical()))


DOUBTFUL = {
    "two tensors, one model": (NET, [(X, X[:, None])], "batch 1 is a tuple of torch.float64"),
    "mask": (NET, [(IDS[:, None].expand(-1, 3), IDS[:, None].expand(-1, 3))], "batch 1 is a tuple"),
    "integer rows": (NET, [(X, torch.ones(11, 3).long())], r"torch.int64 \[11, 3\], which is more"),
    "mask, labels": (NET, [(X, X, IDS)], "batch 1 is a tuple of .* which is more than x and its"),
    "other length": (NET, [(X, IDS[:10])], r"torch.int64 \[10\], which is more"),
    "number": (NET, [(X, torch.tensor(3))], r"torch.int64 \[\], which is more"),
    "no tensor": (NET, [(X, "abc")], r"\[11, 4\], str, which is more"),
    "a second argument": (TakesTwo(), [(X, X)], "batch 1 is a tuple"),
    "a second of many": (TakesAll(), [[X, X]], "batch 1 is a list"),
    "loader": (NET, DataLoader(TensorDataset(X, X, IDS), batch_size=4), "batch 1 is a list of"),
    "a pair of inputs": (NET, (X, X), "inputs is a tuple of 2 tensors, which may be the parts"),
    "a pair": (NET, (X, IDS), "inputs is a tuple of 2 tensors"),
    "a pair in a list": (NET, [X, IDS], "inputs is a list of 2 tensors"),
    "targets in a list": (NET, [X, X[:, 0]], "inputs is a list of 2 tensors"),
    "other types in a list": (NET, [X, X.float()], "inputs is a list of 2 tensors"),
    "a triple": (NET, (X, X, IDS), "inputs is a tuple of 3 tensors"),
    "arguments": (NeedsThree(), [X, X, X], "inputs is a list of 3 tensors"),
    "arguments, shorter": (NeedsThree(), [X, X[:3], X], "inputs is a list of 3 tensors"),
    "optional arguments": (TakesTwo(), [X, X], "inputs is a list of 2 tensors"),
    "any arguments": (TakesAll(), [X, X], "inputs is a list of 2 tensors"),
}


@pytest.mark.parametrize("call", [accumulate, fimlib.summarise])
@pytest.mark.parametrize(("model", "data", "message"), DOUBTFUL.values(), ids=DOUBTFUL)
def test_what_is_in_doubt_is_refused_with_the_word_that_settles_it(call, model, data, message):
    with pytest.raises(ValueError, match=rf"{message}.*pick=0"):
        call(model, data, Categorical())


def test_the_remedies_of_doubt_help():
    expected = whole(NET, X, Categorical())
    for data in ([X[:6], X[6:]], (X[:6], X[6:])):
        assert_same(accumulate(NET, iter(data), Categorical()), expected)
    assert accumulate(TakesTwo(), iter((X, X)), Categorical()).count == 22
    assert_same(accumulate(NET, [(X, X)], Categorical(), pick=0), expected)
    assert accumulate(TakesTwo(), [X[:2], X[:2], X[:2]], Categorical()).count == 6


PICKS = {
    "position": ([(IDS, X[:6]), [IDS, X[6:]]], 1),
    "from behind": ([(IDS, IDS, X)], -1),
    "key": ([{"ids": IDS, "x": X}], "x"),
    "function": ([({"x": X}, IDS)], lambda batch: batch[0]["x"]),
    "function of a tensor": (iter([X * 2]), lambda batch: batch / 2),
    "loader": (DataLoader(TensorDataset(IDS, X), batch_size=4), 1),
}


@pytest.mark.parametrize("case", PICKS)
def test_pick_says_what_is_x(case):
    data, pick = PICKS[case]
    data = list(data)
    expected = whole(NET, X, Categorical())
    assert_same(accumulate(NET, data, Categorical(), pick=pick), expected)
    found = fimlib.summarise(NET, data, Categorical(), pick=pick)
    assert found.joint.count == 11
    for name, I in expected.fisher_information().items():
        assert torch.allclose(found.joint.fisher_information()[name], I, rtol=1e-12)


@pytest.mark.parametrize(
    ("data", "pick", "error", "message"),
    [
        (X, 0, ValueError, "^inputs is a tensor, x itself"),
        ([X], 0, ValueError, r"^batch 1 is a tensor, and pick=0 takes an entry.*pass \[inputs\]"),
        ([(X,), (IDS, X)], 1, ValueError, "^batch 1: pick=1 is no entry of its tuple"),
        ([{"x": X}], "y", ValueError, "^batch 1: pick='y' is no entry of its dict of 'x'"),
        ([(X,)], "x", ValueError, "^batch 1: pick='x' is no entry of its tuple"),
        ([(X, "abc")], 1, TypeError, "^batch 1: pick gives a str, and x must be a tensor"),
        (
            [{"x": X, "y": IDS}],
            None,
            TypeError,
            "^batch 1 holds a dict: .*pick='x' or pick='y'; a",
        ),
        ([({"x": X}, IDS)], None, TypeError, "^batch 1 holds a dict: .*by a function pick="),
    ],
)
def test_what_pick_cannot_take(data, pick, error, message):
    with pytest.raises(error, match=message):
        accumulate(NET, data, Categorical(), pick=pick)


def test_swapped_arguments_and_a_dict_are_told_what_goes_where():
    with pytest.raises(TypeError, match=r"^inputs is a dict.*pass \[inputs\], and forward="):
        accumulate(NET, {"x": X}, Categorical())
    for x in (X, [X]):
        with pytest.raises(TypeError, match="^a (Tensor|list) is no .* order is model, inputs"):
            accumulate(NET, Categorical(), x)
    with pytest.raises(TypeError, match="^Linear is a class"):
        accumulate(nn.Linear, X, Categorical())


@pytest.mark.parametrize("data", [[], iter(()), (x for x in ())], ids=["list", "iterator", "gen"])
def test_no_batches(data):
    with pytest.raises(ValueError, match="an iterator can be used only once"):
        accumulate(NET, data, Categorical())


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "4"])
def test_batch_size_is_checked(size):
    with pytest.raises(ValueError, match="batch_size must be an integer ≥ 1"):
        accumulate(NET, X, Categorical(), batch_size=size)


def test_the_batch_with_nan_is_named():
    x = X.clone()
    x[8, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^batch 3 \(inputs 8 to 10\): the input holds NaN"):
        accumulate(NET, x, Categorical(), batch_size=4)
    with pytest.raises(ValueError, match=r"^batch 2 \(inputs 6 to 8\): the input holds NaN"):
        accumulate(NET, [x[:6], x[6:]], Categorical(), batch_size=3)
    with pytest.raises(ValueError, match=r"^batch 1: the input holds NaN"):
        accumulate(NET, x[8:], Categorical())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("engine", ["layerwise", "traced"])
def test_inputs_whose_activations_are_finite_are_looked_at_themselves(value, engine):
    flat = nn.Sequential(nn.Hardtanh(), *mlp([4, 3, 3], nn.Sigmoid)).eval()
    for net in (mlp([4, 3, 3], nn.Sigmoid), flat):
        options = {"layers": [f"{len(net) - 1}"], "engine": engine}
        x = X.clone()
        x[7, 1] = value
        assert value != value or net(x).isfinite().all()
        message = "the input holds NaN or infinite values"
        with pytest.raises(ValueError, match=rf"^batch 2 \(inputs 4 to 7\): {message}"):
            accumulate(net, x, Categorical(), batch_size=4, **options)
        with pytest.raises(ValueError, match=rf"^batch 2 \(inputs 6 to 10\): {message}"):
            accumulate(net, [x[:6], x[6:]], Categorical(), **options)


class Traveller(torch.Tensor):
    """Notes what is done to it, until it goes to the model's device."""

    done = ()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = func.__name__
        cls.done = (*cls.done, name)
        result = super().__torch_function__(func, types, args, kwargs)
        return result.as_subclass(torch.Tensor) if name == "to" else result


def test_batches_are_looked_at_before_they_move():
    Traveller.done = ()
    accumulate(NET, X.as_subclass(Traveller), Categorical(), batch_size=4)
    steps = [name for name in Traveller.done if name in ("isfinite", "to")]
    assert steps == ["isfinite", "to"] * 4  # the first inputs are looked at for masks before


def test_inputs_of_another_shape():
    pooled = nn.Sequential(nn.AdaptiveAvgPool1d(4), nn.Flatten(), NET).eval()
    assert accumulate(pooled, [X[:, None], X[:, None]], Categorical()).count == 22
    with pytest.raises(ValueError, match=r"^batch 2: its inputs have shape \[1, 3\], those before"):
        accumulate(pooled, [X[:, None], X[:, None, :3]], Categorical())
    for x in (X[0], X[0, 0]):
        with pytest.raises(ValueError, match=r"^batch 1: a batch must have shape \[B, \.\.\.\]"):
            accumulate(NET, x, Categorical())
    with pytest.raises(ValueError, match=r"^batch 2 \(inputs 11 to 10\): there are no inputs"):
        accumulate(NET, [X, X[:0]], Categorical())


def test_what_differentiate_refuses_keeps_its_kind():
    net = nn.Sequential(nn.Linear(4, 3), nn.Softmax(dim=1), nn.Linear(3, 3)).double().eval()
    with pytest.raises(NotImplementedError, match=r"^batch 1 \(inputs 0 to 1\): .*Softmax"):
        accumulate(net, X, Categorical(), batch_size=2, engine="layerwise")


def test_where_second_derivatives_take_too_long_the_error_says_what_to_accumulate(monkeypatch):
    monkeypatch.setattr("fimlib.engines.forward_mode.MANY_PARAMETERS", 5)

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.GRU(4, 3, batch_first=True)

        def forward(self, x):
            return self.inner(x[:, None])[0][:, 0]

    net = Recurrent().double()
    message = r"^batch 1 .*take quantities=\['Var_x I', 'V1'\]\.$"
    with pytest.raises(NotImplementedError, match=message):
        accumulate(net, X, Categorical())
    assert accumulate(net, X, Categorical(), quantities=["Var_x I", "V1"]).count == 11


class Shift(nn.Module):
    """Adds the buffers of a batch norm."""

    def __init__(self, size=1):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("running_var", torch.zeros(size, dtype=torch.float64))

    def forward(self, x):
        return x + self.running_mean + self.running_var


def batches_and(change, net):
    yield X[:6]
    change(net)
    yield X[6:]


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.to("meta"),
        lambda net: nn.init.zeros_(net[2].bias),
        lambda net: setattr(net[0], "bias", nn.Parameter(net[0].bias * 2)),
        lambda net: setattr(net[0], "bias", None),
        lambda net: net.append(nn.Linear(3, 3).double()),
        lambda net: net.append(nn.Tanh()),
        lambda net: net.train(),
        lambda net: net[5].train(),
        lambda net: setattr(net, "1", nn.ReLU()),
        lambda net: setattr(net, "1", nn.Tanh()),
        lambda net: net[4].running_mean.add_(5),
        lambda net: setattr(net[4], "running_var", net[4].running_var * 2),
    ],
)
@pytest.mark.parametrize("engine", ["layerwise", "traced"])
def test_the_model_must_not_change_on_the_way(change, engine):
    norm = nn.BatchNorm1d(3, track_running_stats=True).double()
    net = nn.Sequential(
        *mlp([4, 5, 3], nn.Tanh), nn.Identity(), norm, nn.Dropout(0.5), nn.LeakyReLU()
    ).eval()
    if engine == "layerwise":  # which has no rule for batch norm: nothing looks at it
        net[4] = Shift()
    message = r"^batch 2 \(inputs 6 to 10\): the model was changed since the first batch: leave it"
    with pytest.raises(ValueError, match=message):
        accumulate(net, batches_and(change, net), Categorical(), batch_size=10, engine=engine)


def test_weights_that_are_not_there_yet():
    with pytest.raises(ValueError, match=r"^batch 1.*call the model once on an input first"):
        accumulate(nn.Sequential(nn.LazyLinear(3, dtype=X.dtype)), X, Categorical())


def test_an_unchanged_model_is_taken_whatever_it_holds():
    net = nn.Sequential(Shift(), mlp([4, 3], nn.Tanh), nn.Identity()).eval()
    net.register_buffer("nothing", None)
    net.rate = float("nan")
    assert accumulate(net, [X, X], Categorical()).count == 22
    with torch.inference_mode():
        net = nn.Sequential(Shift(4), *mlp([4, 3], nn.Tanh))
    assert accumulate(net, [X, X], Categorical()).count == 22


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        net = mlp([4, 5, 3], nn.Tanh, scale=1.5)
        joint = accumulate(net, X, Categorical())
    assert_same(joint, whole(NET, X, Categorical()))


def test_an_accumulator_is_never_half_updated():
    derivs = [differentiate(NET, x) for x in X.split(6)]

    def begun():
        joint = Joint(Categorical())
        joint.update(derivs[0])
        return joint

    after, counted = begun(), Failing(-1)
    with counted:
        after.update(derivs[1])
    num_operations = -1 - counted.left
    assert num_operations > 50
    for passes in [*range(0, num_operations - 30, 9), *range(num_operations - 30, num_operations)]:
        joint = begun()
        before = copy.deepcopy(joint)
        with pytest.raises(KeyboardInterrupt), Failing(passes):
            joint.update(derivs[1])
        assert_same(joint, before, tolerance=0)
        assert vars(joint).keys() == vars(before).keys()
    joint.update(derivs[1])
    assert_same(joint, after)


# Memory. ---------------------------------------------------------------------------------------


def held(joint):
    """Bytes of the storages of all tensors that an object holds, at any depth."""
    storages = [t.untyped_storage() for t in tensors_in(vars(joint))]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (t for v in value.values() for t in tensors_in(v))
    elif isinstance(value, list | tuple | set):
        yield from (t for v in value for t in tensors_in(v))
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value))


@pytest.mark.parametrize(
    ("options", "stated"),
    [
        ({}, r"(\d+) bytes per parameter"),
        ({"quantities": ["Var_x I", "V1"]}, r"(\d+) with data labels or without second"),
        ({"quantities": ["I"]}, r"(\d+) for I alone"),
        ({"bounds": "certified"}, r"With bounds (\d+)"),
        ({"bounds": "certified", "quantities": ["Var_x I", "V1"]}, r"and (\d+) without second"),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_batches", [1, 3])
def test_the_accumulator_takes_what_its_docstring_says(options, stated, num_batches):
    net = mlp([20, 30, 10], nn.Tanh)
    num_parameters = sum(p.numel() for p in net.parameters())
    joint = accumulate(net, inputs(4 * num_batches, 20), Categorical(), batch_size=4, **options)
    (per_parameter,) = re.findall(stated, " ".join(Joint.__doc__.split()))
    # after a single batch, what Var_x I was made of may still be there
    assert held(joint) == int(per_parameter) * num_parameters


def test_live_bytes_counts_what_lives():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a[10:]  # a view is nothing new
        c = torch.ones(500, dtype=torch.float64)
        assert live.live == 8000
        del a
        assert live.live == 8000
        del b
        assert live.live == 4000
        c.add_(1)
        del c
        assert live.live == 0
    assert live.peak == 8000
    there = torch.zeros(100)
    with LiveBytes([there]) as live:
        seen, _ = there[10:], torch.zeros(10)
        assert live.live == 40
    assert len(seen) == 90


def test_nothing_is_left_to_follow_afterwards():
    kept = []
    before = len(weakref.finalize._registry)
    for _ in range(3):
        live_bytes(lambda: kept.append(torch.zeros(1, 4)))
        accumulate(NET, X, Categorical())
    assert len(weakref.finalize._registry) == before
    with LiveBytes() as live:
        kept.append(torch.zeros(10))
    reference = weakref.ref(live)
    del live
    gc.collect()
    assert reference() is None  # though what it followed is there


def peak(action):
    """The most bytes of tensors that live at one time, counted by references to their storages."""
    return live_bytes(action)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["layerwise", "traced"])
def test_memory_does_not_grow_with_the_data(engine):
    net = mlp([20, 30, 10], nn.Tanh)

    def made(num_batches):
        return (torch.full((8, 20), 0.1 * i, dtype=torch.float64) for i in range(num_batches))

    peaks = [
        peak(lambda n=n: accumulate(net, made(n), Categorical(), batch_size=4, engine=engine))
        for n in (3, 24)
    ]
    assert peaks[1] <= 1.01 * peaks[0]
    first = weakref.WeakSet()

    def watched(num_batches):
        for x in made(num_batches):
            assert sum(len(t) for t in first) <= 8  # the batch before, not those before it
            first.add(x)
            yield x

    accumulate(net, watched(10), Categorical(), batch_size=4, engine=engine)


@pytest.mark.long
@pytest.mark.parametrize("order", [1, 2])
def test_no_batch_waits_for_the_garbage_collector(order):
    again, x = differentiator(CNN, order=order), IMAGES.repeat(2, 1, 1, 1)
    again(x)
    gc.collect()
    gc.disable()
    try:
        again(x).derivatives()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert not [t.shape for t in gc.garbage if isinstance(t, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def differentiated(monkeypatch):
    """The inputs that the engine is given from now on, call by call."""
    seen = []

    def prepared(*arguments, **options):
        again = differentiator(*arguments, **options)
        return lambda x, **held: (seen.append(x), again(x, **held))[1]

    monkeypatch.setattr(streaming, "differentiator", prepared)
    return seen


@pytest.mark.parametrize("quantities", [["I"], None], ids=str)
def test_every_input_is_differentiated_once(quantities, monkeypatch):
    seen, x = differentiated(monkeypatch), inputs(50, 4)
    joint = accumulate(NET, x, Categorical(), quantities=quantities)
    assert len(seen) == (1 if quantities else 3)  # S: eight, eight that are measured, the others
    assert torch.equal(torch.cat(seen).sort(0).values, x.sort(0).values)
    assert_same(joint, accumulate(NET, x, Categorical(), quantities=quantities, batch_size=50))


class Calls(nn.Module):
    """A network that writes down how many inputs it is called with."""

    counts: ClassVar = Counter()

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x):
        self.counts[len(x)] += 1
        return self.linear(x).sin()


def test_one_call_with_one_input_finds_the_size():
    calls, found = Calls().eval(), []
    for size in (None, 50):
        Calls.counts.clear()
        accumulate(calls, inputs(50, 4), Categorical(), quantities=["I"], batch_size=size)
        found.append(Counter(Calls.counts))
    assert found[0] - found[1] == Counter({1: 1})
    assert not found[1] - found[0]


@pytest.mark.parametrize("quantities", [["I"], None], ids=str)
def test_what_is_checked_is_spread_over_the_batch(quantities, monkeypatch):
    seen, x = differentiated(monkeypatch), inputs(50, 4)
    monkeypatch.setattr(streaming, "BATCH_BYTES", 10_000)
    accumulate(NET, x, Categorical(), quantities=quantities)
    few = len(seen[0])
    assert 8 <= few < 25
    assert torch.equal(seen[0], x[[i * 50 // few for i in range(few)]])
    x[7] = torch.nan
    with pytest.raises(ValueError, match=r"inputs (\d+) to (\d+)") as caught:
        accumulate(NET, x, Categorical(), quantities=quantities)
    first, last = map(int, re.search(r"inputs (\d+) to (\d+)", str(caught.value)).groups())
    assert first <= 7 <= last < 50


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [{"bounds": "certified"}, pytest.param({"quantities": ["V1"]}, marks=pytest.mark.full), {}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["deep", "wide", "cnn", "many classes"])
def test_the_default_batch_takes_what_it_may(kind, options, monkeypatch):
    net, x = {
        "deep": (mlp([20, 30, 30, 30, 10], nn.Tanh), inputs(1, 20)),
        "wide": (mlp([50, 400, 10], nn.Tanh), inputs(1, 50)),
        "cnn": (CNN, IMAGES[:1]),
        "many classes": (mlp([4, 5, 60], nn.Tanh), inputs(1, 4)),
    }[kind]
    may = 4 * 2**20
    monkeypatch.setattr(memory, "KEPT_BYTES", 1)  # it is never written to
    monkeypatch.setattr(streaming, "BATCH_BYTES", may)
    many = x.repeat(3000, *[1] * (x.ndim - 1))
    with monkeypatch.context() as patched:
        seen = differentiated(patched)
        found = peak(lambda: accumulate(net, many, Categorical(), **options))
    sizes = [len(part) for part in seen]
    assert sum(sizes) == len(many)  # none is thrown away
    assert max(sizes) < len(many)
    num_parameters = sum(p.numel() for p in net.parameters())
    averages = 88 if "bounds" in options else 24 if options else 40  # bytes, see ``Joint``
    low, high = (0.4, 1.5) if kind == "cnn" else (0.9, 1.25)
    assert found <= high * may + 4 * averages * num_parameters + many.nbytes
    assert found >= low * may


def test_dense_derivatives_come_for_a_few_inputs_at_a_time(monkeypatch):
    monkeypatch.setattr(functional, "NUMBERS_AT_A_TIME", 1000)
    net, x, joints = mlp([4, 5, 3], nn.Tanh), inputs(400, 4), []

    def taken(attempt):
        joints.append(Joint(Categorical(), quantities=["I", "V1"]))
        joints[-1].update_sweep(attempt(net, x, 1, None))

    taken(layerwise.differentiate)
    found = peak(lambda: taken(choose.attempt_input_by_input))
    assert_same(*joints)
    assert found < 8 * 3 * len(x) * sum(p.numel() for p in net.parameters()) / 3


def test_a_batch_that_is_too_large_makes_the_next_one_smaller():
    size = BatchSize(8, 1000)
    with size.measured(wanted=True):
        torch.zeros(250)
    assert (size.now, size.room) == (8, None)  # it took all of it
    size = BatchSize(8, 1000)
    with size.measured(wanted=True):
        torch.zeros(2500)
    assert (size.now, size.room) == (1, None)  # not 0
    size = BatchSize(8, 1000)
    with size.measured(wanted=True):
        torch.zeros(25)
    assert (size.now, size.room) == (80, 1000)  # and the next one is measured again
    with size.measured(wanted=True):
        torch.zeros(125)
    assert (size.now, size.room) == (160, 1000)
    with size.measured(wanted=False):
        torch.zeros(2500)
    assert (size.now, size.room) == (160, 1000)
    fixed = BatchSize(8)
    with fixed.measured(wanted=True):
        torch.zeros(2500)
    assert fixed.now == 8


# A thousand classes. -----------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The bytes of the largest storage that any operation makes or returns."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


def classifier(widths, dtype=torch.float64):
    return mlp(widths, nn.Tanh, scale=3.0).to(dtype)


def one_parameter(net, x, name, index):
    """I, v₁, v₂ of one scalar at x [1, n], from log p of every label, by autograd along it."""
    values = {n: p.detach() for n, p in net.named_parameters()}
    direction = torch.zeros_like(values[name])
    direction[index] = 1

    def log_p(t):
        moved = {**values, name: values[name] + t * direction}
        return torch.log_softmax(torch.func.functional_call(net, moved, (x,))[0], dim=0)

    zero = torch.zeros((), dtype=x.dtype)
    first = torch.func.jacfwd(log_p)(zero)
    second = torch.func.jacfwd(torch.func.jacfwd(log_p))(zero)
    p, i1, i2 = log_p(zero).exp(), first**2, -second
    mean = p @ i1
    return {"I": mean, "V1": p @ (i1 - mean) ** 2, "V2": p @ (i2 - p @ i2) ** 2}


CHOSEN = [("0.weight", (3, 5)), ("0.bias", (7,)), ("2.weight", (421, 6)), ("2.bias", (999,))]


@pytest.mark.parametrize("widths", [[64, 32, 1000], [784, 256, 1000]], ids=str)
def test_a_thousand_classes_without_a_matrix_of_them_times_the_parameters(widths):
    net, x = classifier(widths), inputs(1, widths[0])
    family, num_parameters = Categorical(), sum(p.numel() for p in net.parameters())
    with Largest() as largest:
        derivs = differentiate(net, x)
        found = {
            "I": fimlib.fisher_information(derivs, family),
            "V1": fimlib.variance_i1(derivs, family),
            "V2": fimlib.variance_i2(derivs, family),
        }
        means = {key: quantity.layer_means() for key, quantity in found.items()}
        drawn = family.sample(derivs.outputs, 50, torch.Generator().manual_seed(0))
        estimate = fimlib.estimate_i1(derivs, drawn).layer_means()
        eigenvalues = fimlib.spectrum(family, derivs.outputs, method="certified")
        bounds = fimlib.theorem_4_1(derivs, family, eigenvalues=eigenvalues)
        upper = {
            "I": bounds.fisher.upper.layer_means(),
            "V1": bounds.variance_i1.upper.layer_means(),
            "V2": bounds.variance_i2.upper.layer_means(),
        }
        lower_bound = fimlib.lambda_max(family, derivs.outputs, method="lower")
    # a few matrices of classes × classes; the starts of the lower bound are 1,090 vectors of 1,000
    assert largest.bytes <= 8 * 1.1 * 1000**2 < 8 * 1000 * num_parameters / 30
    for name, index in CHOSEN:
        expected = one_parameter(net, x, name, index)
        for key, value in expected.items():
            if key == "V2" and name.startswith("2"):  # rounding in the oracle
                assert value < 1e-30
                value = torch.zeros_like(value)
            assert abs(found[key][name][(0, *index)] - value) <= 1e-10 * value, (key, name)
    assert (lower_bound <= eigenvalues.max_outer).all()
    for key, layers in means.items():
        assert all((upper[key][layer] >= mean).all() for layer, mean in layers.items())
    assert all((mean > 0).all() for mean in estimate.values())


@pytest.mark.long
def test_a_thousand_classes_of_a_data_set(monkeypatch):
    monkeypatch.setattr(memory, "KEPT_BYTES", 1)  # it is never written to
    net, x = classifier([64, 32, 1000]), inputs(5, 64)
    num_parameters = sum(p.numel() for p in net.parameters())
    with Largest() as largest:
        joint = accumulate(net, x, Categorical(), bounds="certified", batch_size=2)
    assert largest.bytes <= 8 * 2 * 1000**2 < 8 * 1000 * num_parameters / 15
    for name, index in CHOSEN:
        each = [one_parameter(net, one[None], name, index) for one in x]
        expected = {key: torch.stack([one[key] for one in each]) for key in each[0]}
        found = {
            "I": joint.fisher_information(),
            "V1": joint.label_variance(1),
            "V2": joint.label_variance(2),
        }
        for key, values in expected.items():
            mean = values.mean()
            if key == "V2" and name.startswith("2"):  # rounding in the oracle
                assert mean < 1e-30
                mean = torch.zeros_like(mean)
            assert abs(found[key][name][index] - mean) <= 1e-10 * mean, (key, name)
        spread = joint.input_variance()[name][index]
        assert abs(spread - expected["I"].var(correction=0)) <= 1e-10 * spread
    interval = joint.variance_bounds(num_inputs=1)
    assert all((interval.upper[n] >= v).all() for n, v in joint.variance_i1(1).items())


def test_the_moments_of_a_thousand_classes_take_a_few_matrices():
    family, h = Categorical(), 3 * inputs(1, 1000)
    for method in (family.directions, family.unfolding, family.covariance):
        assert peak(lambda method=method: method(h)) <= 8 * 6e6, method


@pytest.mark.parametrize("method", ["multistart", "minimize", "sos"])
def test_the_other_ways_to_the_spectrum_refuse_a_thousand_classes(method):
    if method == "minimize":
        pytest.importorskip("torchmin")
    h = inputs(1, 1000)
    with Largest() as largest, pytest.raises(ValueError, match=r"use\s+method='certified'"):
        fimlib.lambda_max(Categorical(), h, method=method)
    assert largest.bytes <= 8 * 1.1e6
    derivs = differentiate(classifier([4, 3, 1000]), inputs(1, 4))
    with pytest.raises(
        ValueError, match=r"spectrum\(family, derivs\.outputs, method='certified'\)"
    ):
        fimlib.theorem_4_1(derivs, Categorical())


def test_multistart_takes_many_gaussian_outputs():
    h = inputs(1, 300)
    assert fimlib.lambda_max(Gaussian(), h).item() == pytest.approx(2, rel=1e-12)


# One synchronisation per batch, with the CPU standing in for a GPU. ----------------------------


class Waits(TorchDispatchMode):
    """Where the host asks for a number that the device would still be computing."""

    ASKING = frozenset(
        {"_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select"}
        | {"_unique2", "unique_consecutive", "unique_dim", "item", "bincount", "repeat_interleave"}
    )

    def __init__(self):
        super().__init__()
        self.places = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in self.ASKING or by_mask:
            self.places[self.place(name)] += 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def place(name):
        """file:line of fimlib that asks, the innermost one that is not ``all_finite`` itself."""
        inside = [
            f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
            for frame in traceback.extract_stack()
            if f"{Path(fimlib.__file__).parent}/" in frame.filename and frame.name != "all_finite"
        ]
        return f"{inside[-1] if inside else '?'} ({name})"


def waits_of_one_batch(net, x, **options):
    """What a third batch adds to two."""
    counts = []
    for num_batches in (2, 3):
        with Waits() as waits:
            accumulate(net, x[: 4 * num_batches], Categorical(), batch_size=4, **options)
        counts.append(waits.places)
    counts[1].subtract(counts[0])
    return +counts[1]


def test_waits_are_counted():
    x = torch.ones(3)
    with Waits() as waits:
        bool((x > 0).all())
        torch.allclose(x, x)
        torch.equal(x, x)
        x[x > 0]
        x[x > 0] = 1
        float(x.sum())
        x.sum() + 1
    assert sum(waits.places.values()) == 6


@pytest.mark.parametrize(("bounds", "most"), [(None, 1), ("certified", 3)])
def test_one_wait_for_every_batch_and_two_for_its_eigenvalues(bounds, most):
    net, x = mlp([4, 6, 5, 3], nn.Sigmoid), inputs(12, 4)
    places = waits_of_one_batch(net, x, engine="layerwise", bounds=bounds)
    # the one look at a batch before it moves, on a CPU: no GPU is waited for
    looks = [place for place in places if " check_finite (" in place]
    assert [places.pop(place) for place in looks] == [1]
    assert sum(places.values()) == most, places


# float32. -----------------------------------------------------------------------------------------


def layer_means(joint):
    """I, V₁ and V₂, averaged over the inputs and over the parameters of each layer: [3, layers]."""

    def means(quantity):
        layers = joint.layers.values()
        flat = [torch.cat([quantity[name].flatten() for name in names]) for names in layers]
        return torch.stack([entries.mean() for entries in flat])

    quantities = joint.fisher_information(), joint.label_variance(1), joint.label_variance(2)
    return torch.stack([means(quantity) for quantity in quantities])


def with_confidence(net, sigma_max):
    """The same network with its outputs scaled until one input's σ_max is this; float32 weights."""
    net = copy.deepcopy(net).float()
    x = inputs(64, net[0].in_features, seed=2).float()
    low, high = 1e-2, 1e6
    with torch.no_grad():
        for _ in range(60):
            scale = (low * high) ** 0.5
            sigma = torch.softmax(scale * net(x).double(), dim=1).amax(1)
            low, high = (scale, high) if sigma.median() < sigma_max else (low, scale)
        for parameter in net[-1].parameters():
            parameter.mul_(low)
    return net, x


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh])
@pytest.mark.parametrize("shift", [0.0, 10.0, 100.0])
@pytest.mark.parametrize("sigma_max", [None, 1 - 1e-3, 1 - 1e-6])
def test_float32_is_as_good_as_the_docstring_says(sigma_max, shift, activation):
    stated = r"are then within (1e-\d+) of those in float64 while all logits stay below (\d+)"
    ((bound, logits),) = re.findall(stated, " ".join(accumulate.__doc__.split()))
    net = mlp([20, 16, 12, 10], activation).float()
    x = inputs(64, 20, seed=2).float()
    if sigma_max is not None:
        net, x = with_confidence(net, sigma_max)
    with torch.no_grad():  # what all logits have in common, the softmax does not see
        net[-1].weight.add_(shift)
        largest = net(x).abs().max()
    family = Categorical()
    single = accumulate(net, x, family, dtype=torch.float32)
    double = accumulate(copy.deepcopy(net).double(), x.double(), family)
    assert all(t.dtype == torch.float64 for t in tensors_in(vars(single)))
    mine, exact = layer_means(single), layer_means(double)
    zero = exact == 0  # V₂ of the last layer
    assert zero.sum() == 1
    assert (mine[zero] == 0).all()
    error = ((mine - exact).abs() / exact)[~zero].max()
    assert 0 < error <= float(bound) * (largest / float(logits)).clamp_min(1)
