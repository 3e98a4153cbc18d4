"""What a diagonal is: every formula in use is told from the others, with its factor."""

import copy
import functools
import random

import pytest
import torch
from support import in_use
from torch import nn
from torch.nn.functional import cross_entropy

import fimlib
from fimlib.audit import identify, judge
from fimlib.families import Positions

pytestmark = pytest.mark.long
FAMILY = fimlib.Categorical()
WAYS_PLAIN = in_use.WAYS.keys() - {in_use.in_bfloat16, in_use.one_mean_for_each_tensor}


class Attention(nn.Module):
    """Words, a layer norm, attention, classes."""

    def __init__(self, classes=5):
        super().__init__()
        self.table, self.norm = nn.Embedding(9, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, classes)

    def forward(self, ids):
        z = self.table(ids)
        n = self.norm(z)
        return self.head((z + self.attention(n, n, n, need_weights=False)[0]).mean(1))


def perceptron(classes=4):
    layers = [nn.Linear(6, 10), nn.Sigmoid(), nn.Linear(10, 8), nn.Sigmoid(), nn.Linear(8, classes)]
    return nn.Sequential(*layers)


def convolutional(classes=3):
    first = nn.Conv2d(1, 3, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(27, classes))


NETWORKS = {
    "perceptron": (perceptron, lambda count: torch.randn(count, 6)),
    "convolutional": (convolutional, lambda count: torch.randn(count, 1, 6, 6)),
    "attention": (Attention, lambda count: torch.randint(9, (count, 5))),
}


def problem(name, seed=1, count=24, size=4, **options):
    """A network, and its batches."""
    torch.manual_seed(seed)
    make, inputs = NETWORKS[name]
    net, x = make(**options), inputs(count)
    y = torch.randint(net(x).shape[1], (count,))
    return net, list(zip(x.split(size), y.split(size), strict=True))


def in_turn(network, i):
    """Every formula on one network at least, and on all of them at length."""
    is_quick = network == "perceptron" or list(NETWORKS)[i % 3] == network
    return [] if is_quick else [pytest.mark.full]


@pytest.mark.parametrize(
    ("network", "way"),
    [
        pytest.param(network, way, marks=in_turn(network, i), id=f"{network}-{way.__name__}")
        for network in NETWORKS
        for i, way in enumerate(in_use.WAYS)
    ],
)
def test_every_formula_in_use_is_told_from_the_others(network, way):
    net, data = problem(network)
    torch.manual_seed(2)
    found = identify(way, net, data, FAMILY)
    formula, factor = in_use.WAYS[way]
    assert (found.formula, found.factor_text) == (formula, factor)
    assert found.is_random == (formula in ("sampled", "sampled batch"))
    assert found.is_bfloat16 == (way is in_use.in_bfloat16)
    assert found.is_mean_of_tensor == (way is in_use.one_mean_for_each_tensor)
    exact = fimlib.accumulate(net, data, FAMILY).fisher_information()
    for n, I in exact.items():
        assert torch.allclose(found.fisher[n], I, rtol=1e-5, atol=1e-12)
    words = " ".join(str(found).split())
    assert found.text in words
    assert found.remedy in words


INPUTS, BATCHES, SIZE, OUTPUTS = 24, 6, 4, 5  # m, n, b and T
REASONS = {
    "data": {
        "": 1, "summed over the inputs": INPUTS, "divided by the inputs twice": 1 / INPUTS,
        "divided by the batches in place of the inputs": INPUTS / BATCHES,
        "divided by the inputs less one": INPUTS / (INPUTS - 1),
        "divided by the batch size as well": 1 / SIZE, "halved": 0.5, "doubled": 2,
        "divided by the outputs": 1 / OUTPUTS, "summed over the inputs, halved": INPUTS / 2,
    },
    "batch": {
        "summed over the batches": BATCHES, "times the batch size": SIZE,
        "of gradients summed over the batch": SIZE**2,
        "summed over the batches, of gradients summed over each": BATCHES * SIZE**2,
        "divided by the inputs in place of the batches": BATCHES / INPUTS,
        "divided by the batches less one": BATCHES / (BATCHES - 1),
    },
    "whole": {"of the gradient summed over all inputs": INPUTS**2},
    "last batch": {"of the gradient summed over the batch": SIZE**2},
    "Adam 0.95": {"without the correction for its start": 1 - 0.95**BATCHES},
}  # fmt: skip


@pytest.mark.parametrize("formula", REASONS)
def test_a_factor_has_its_reason(formula):
    net, data = problem("perceptron", count=INPUTS, size=SIZE, classes=OUTPUTS)
    [way] = (w for w in WAYS_PLAIN if in_use.WAYS[w] == (formula, ""))
    result = way(net, data)
    for reason, factor in REASONS[formula].items():
        scaled = {n: factor * t for n, t in result.items()}
        found = identify(scaled, net, data, FAMILY)
        assert (found.formula, found.factor_text) == (formula, reason)
        assert found.factor == pytest.approx(factor)


def flipped(net, data):
    """Random, with the right sum over every tensor, and the right spread of it."""
    return {n: t.flatten().flip(0).view_as(t) for n, t in in_use.sampled(net, data).items()}


def dropped(net, data):
    """With dropout before the last layer."""
    own = copy.deepcopy(net)
    last = [m for m in own.modules() if isinstance(m, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda _, args: nn.functional.dropout(args[0], 0.5))
    return in_use.data_labels(own, data)


def absolute(net, data):
    """Not squared."""
    parts = (in_use.gradient(net, in_use.log_p(net, x)[y]) for x, y in in_use.examples(data))
    return in_use.mean({n: t.abs() for n, t in g.items()} for g in parts)


def elsewhere(net, data):
    """At other weights."""
    own = copy.deepcopy(net)
    with torch.no_grad():
        for p in own.parameters():
            p += 0.1 * torch.randn_like(p)
    return in_use.exact(own, data)


def of_the_weights(net, _):
    return {n: p.detach().square() for n, p in net.named_parameters()}


def smoothed(net, data):
    """Label smoothing belongs to the loss."""

    def of(x, y):
        return in_use.square(
            in_use.gradient(net, cross_entropy(net(x[None]), y[None], label_smoothing=0.3))
        )

    return in_use.mean(of(x, y) for x, y in in_use.examples(data))


def half_and_half(net, data):
    """Another formula in the last layer."""
    found, last = in_use.exact(net, data), in_use.data_labels(net, data)
    names = list(found)[-2:]
    return found | {n: last[n] for n in names}


UNKNOWN = [flipped, dropped, absolute, elsewhere, of_the_weights, smoothed, half_and_half]


@functools.cache
def mixed(seed):
    """A random case: what was computed, what is right, what was found."""
    draw = random.Random(seed)
    options = {"classes": draw.randint(2, 6)}
    size = draw.choice([1, 3, 5, 8])
    net, data = problem(draw.choice(list(NETWORKS)), seed, draw.randint(9, 30), size, **options)
    way = draw.choice([*in_use.WAYS, *UNKNOWN])
    factor = 1.0 if way in UNKNOWN else draw.choice([1.0, 1.0, 0.5, len(data), 17.3])
    torch.manual_seed(seed)

    def made(net, data):
        return {n: factor * t for n, t in way(net, data).items()}

    return way, factor, identify(draw.choice([made, made(net, data)]), net, data, FAMILY)


def is_wrong(seed):
    """A story, if a case is taken for another; "unknown" is never wrong."""
    way, factor, found = mixed(seed)
    expected = in_use.WAYS[way][0] if way in in_use.WAYS else "unknown"
    named = {found.formula, *found.also}
    if found.formula == "unknown" or expected in named or not found.is_certain:
        return None
    same = found.distances.get(expected, 0.0) < 1e-5  # equal here, or left out as equal
    return None if same else f"{seed}: {way.__name__} × {factor} taken for {found}"


def recognised(seeds):
    """How many of the known formulas were found."""
    cases = [mixed(seed) for seed in seeds]
    known = [found for way, factor, found in cases if way in in_use.WAYS and factor != 17.3]
    return sum(found.formula != "unknown" for found in known) / len(known)


def test_no_mixed_case_is_taken_for_another():
    assert list(filter(None, map(is_wrong, range(20)))) == []
    assert recognised(range(20)) > 0.9


@pytest.mark.full
def test_no_mixed_case_is_taken_for_another_at_length():
    assert list(filter(None, map(is_wrong, range(20, 240)))) == []
    assert recognised(range(20, 240)) > 0.9


@pytest.mark.parametrize("way", UNKNOWN, ids=lambda way: way.__name__)
def test_what_is_none_of_them_is_unknown(way):
    for network in NETWORKS:
        net, data = problem(network)
        found = identify(way, net, data, FAMILY)
        assert found.formula == "unknown"
        assert found.is_random == (way in (flipped, dropped, elsewhere))
        assert found.remedy in " ".join(str(found).split())
        assert found.distance == min(found.distances.values()) > 1e-3


class Language(nn.Module):
    """Logits at every position, from those before."""

    def __init__(self):
        super().__init__()
        self.table, self.rnn = nn.Embedding(7, 4), nn.GRU(4, 5, batch_first=True)
        self.head = nn.Linear(5, 6)

    def forward(self, ids):
        return self.head(self.rnn(self.table(ids))[0])


def texts(lengths=(4, 4, 4, 4, 4, 4)):
    torch.manual_seed(0)
    ids, y = torch.randint(7, (len(lengths), 4)), torch.randint(6, (len(lengths), 4))
    y[torch.arange(4) >= torch.tensor(lengths)[:, None]] = -100
    return Language(), list(zip(ids.split(2), y.split(2), strict=True))


def loss(net, ids, y, reduction):
    return cross_entropy(net(ids).flatten(0, 1), y.flatten(), reduction=reduction)


def of_batches(net, data, reduction):
    """The usual loop over a language model's loss."""
    return in_use.mean(
        in_use.square(in_use.gradient(net, loss(net, ids, y, reduction))) for ids, y in data
    )


def of_sequences(net, data, reduction):
    return in_use.mean(
        in_use.square(in_use.gradient(net, loss(net, ids[None], y[None], reduction)))
        for ids, y in in_use.examples(data)
    )


def of_positions(net, data):
    """Every position's own gradient, of full texts."""
    found = []
    for ids, y in in_use.examples(data):
        logs = net(ids[None])[0].log_softmax(1)
        one = [in_use.square(in_use.gradient(net, logs[i, y[i]])) for i in range(4)]
        found.append({n: 4 * t for n, t in in_use.mean(one).items()})
    return in_use.mean(found)


@pytest.mark.parametrize(
    ("way", "lengths", "formula", "factor"),
    [
        (of_positions, (4,) * 6, "position", ""),
        (lambda n, d: of_sequences(n, d, "sum"), (4,) * 6, "data", ""),
        (lambda n, d: of_sequences(n, d, "sum"), (4, 2, 3, 4, 1, 2), "data", ""),
        (
            lambda n, d: of_sequences(n, d, "mean"), (4,) * 6, "data",
            "of gradients averaged over the positions",
        ),
        (lambda n, d: of_batches(n, d, "mean"), (4, 2, 3, 4, 1, 2), "word", ""),
        (
            lambda n, d: of_batches(n, d, "sum"), (4, 2, 3, 4, 1, 2), "batch",
            "of gradients summed over the batch",
        ),
    ],
)  # fmt: skip
def test_a_language_models_loss(way, lengths, formula, factor):
    net, data = texts(lengths)
    found = identify(way, net, data, Positions(FAMILY, 6, ignore_index=-100))
    assert (found.formula, found.factor_text) == (formula, factor)


def test_batches_of_any_kind():
    net, data = texts()
    named = [{"ids": ids, "target": y} for ids, y in data]
    found = identify(
        of_positions(net, data), net, named, Positions(FAMILY, 6),
        forward=lambda model, batch: model(batch["ids"]), labels=lambda batch: batch["target"],
    )  # fmt: skip
    assert found.formula == "position"


def test_numbers_in_place_of_classes():
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(9, 3), None
    y = torch.randn(9, 2)
    net.zero_grad()
    nn.functional.mse_loss(net(x), y).backward()
    result = {n: p.grad.square() for n, p in net.named_parameters()}
    found = identify(result, net, [(x, y)], fimlib.Gaussian())
    assert found.formula == "batch"  # of ‖h − y‖²/2, times 4/T²
    exact = fimlib.accumulate(net, x, fimlib.Gaussian()).fisher_information()
    assert identify(exact, net, [x], fimlib.Gaussian()).formula == "exact"
    part = {n: t for n, t in exact.items() if n.startswith("2.")}
    assert identify(part, net, [x], fimlib.Gaussian(), layers=["2"]).formula == "exact"


def test_one_label_is_told_from_many():
    net, data = problem("perceptron", count=60)

    def many(net, data):
        return in_use.mean(in_use.sampled(net, data) for _ in range(5))

    found = identify(many, net, data, FAMILY)
    assert found.formula == "sampled"
    assert 2.5 < found.num_samples < 10
    assert found.is_certain
    alone = identify(many(net, data), net, data, FAMILY)
    assert not alone.is_certain
    assert (alone.z > 0) == (alone.ratio > 1)
    assert "It may be" in str(alone)


def test_what_it_does_to_decisions():
    net, data = problem("perceptron")
    exact = identify(in_use.exact, net, data, FAMILY)
    assert (exact.ratio, exact.overlap) == (pytest.approx(1, rel=1e-5), 1.0)
    assert exact.rank_correlation == pytest.approx(1)
    order = torch.arange(sum(t.numel() for t in exact.fisher.values())).double()
    places = torch.cat([t.flatten() for t in exact.fisher.values()]).argsort(descending=True)
    other = torch.empty_like(order)
    other[places] = order  # the smallest is the largest
    parts = other.split([t.numel() for t in exact.fisher.values()])
    turned = {n: p.view(t.shape) for p, (n, t) in zip(parts, exact.fisher.items(), strict=True)}
    found = identify(turned, net, data, FAMILY)
    assert found.formula == "unknown"
    assert (found.rank_correlation, found.overlap) == (pytest.approx(-1), 0.0)


def test_the_overlap_is_of_the_largest():
    a = torch.arange(20.0)
    b = a.clone()
    b[19] = 10.5
    assert (judge.overlap(a, a), judge.overlap(a, b)) == (1.0, 0.5)


def test_ranks_of_equal_numbers_are_their_mean():
    assert judge.ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


def test_the_callers_things_stay():
    net, data = problem("perceptron")
    state, before = torch.get_rng_state(), copy.deepcopy(net.state_dict())

    def spoils(own, batches):
        for p in own.parameters():
            p.data.zero_()
        batches.clear()
        return {n: p.detach() for n, p in own.named_parameters()}

    identify(spoils, net, data, FAMILY)
    assert len(data) == 6
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


NET, DATA = problem("perceptron")
RIGHT = in_use.exact(NET, DATA)


@pytest.mark.parametrize(
    ("diagonal", "data", "error", "message"),
    [
        (RIGHT, [], ValueError, "there are no batches"),
        ({}, DATA, ValueError, "has no parameter '0.weight'.*layers="),
        (RIGHT | {"0.weight": torch.ones(2)}, DATA, ValueError, r"is \[10, 6\], and \[2\] in"),
        (RIGHT | {"0.bias": RIGHT["0.bias"] / 0}, DATA, ValueError, "'0.bias' is NaN or infinite"),
        ([1.0], DATA, TypeError, "diagonal is a list: pass a dict"),
        (lambda *_: [1.0], DATA, TypeError, "the function returned a list"),
        (RIGHT, [(DATA[0][0], DATA[0][1] + 9)], ValueError, "batch 1: "),
        (RIGHT, [DATA[0], (DATA[0][0], DATA[0][1][:2])], ValueError, "batch 2: "),
    ],
)
def test_bad_input(diagonal, data, error, message):
    with pytest.raises(error, match=message):
        identify(diagonal, NET, data, FAMILY)


def test_a_network_without_information():
    """All classes have the same logit, so that no label says anything."""

    class Constant(nn.Linear):
        def forward(self, x):
            return super().forward(x).expand(-1, 3)

    net, x = Constant(2, 1), torch.randn(4, 2)
    ones = {n: torch.ones_like(p) for n, p in net.named_parameters()}
    found = identify(ones, net, [(x,)], FAMILY)
    assert (found.formula, found.ratio) == ("unknown", torch.inf)
    assert str(found).startswith("It is none of the formulas.")


def test_a_result_of_zeros_is_none_of_them():
    zeros = {n: torch.zeros_like(t) for n, t in RIGHT.items()}
    found = identify(zeros, NET, DATA, FAMILY)
    assert (found.formula, found.ratio) == ("unknown", 0.0)


def test_large_networks_take_layers(monkeypatch):
    monkeypatch.setattr(judge, "MOST_PARAMETERS", 100)
    with pytest.raises(ValueError, match="each of the 194 parameters: take a few layers="):
        identify(RIGHT, NET, DATA, FAMILY)
    assert identify(RIGHT, NET, DATA, FAMILY, layers=["4"]).formula == "exact"
    with pytest.raises(ValueError, match="the model has no parameters"):
        identify({}, nn.Tanh(), DATA, FAMILY)
