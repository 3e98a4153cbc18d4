"""How often ``Estimate.interval`` holds the exact sum of a layer, over random networks."""

import itertools
import random

import pytest
import torch
from scipy import stats
from support.bench.coverage import gram_matrices, share_held, sums_of_passes
from torch import nn

import fimlib
from fimlib import estimates
from fimlib.families import Positions
from fimlib.precision import labels_of
from fimlib.projections import DRAWS, SQUARES

pytestmark = pytest.mark.long
PASSES = (32, 64)
FAMILIES = {
    "classes": (fimlib.Categorical(), 5),
    "gaussian": (fimlib.Gaussian(), 3),
    "bernoulli": (fimlib.Bernoulli(), 3),
    "poisson": (fimlib.Poisson(), 2),
    "positions": (Positions(fimlib.Categorical(), 4), 4),
}
ACTIVATIONS = nn.Sigmoid, nn.Tanh, nn.ReLU, nn.LogSigmoid


class Attends(nn.Module):
    """Attention over three positions; its outputs are those of each, or their mean."""

    def __init__(self, outputs, at_each):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, outputs)
        self.at_each = at_each

    def forward(self, x):
        z, _ = self.attention(x, x, x, need_weights=False)
        z = self.head(self.norm(x + z))
        return z.flatten(1) if self.at_each else z.mean(1)


def network(seed):
    """A random network with its inputs and family; some are very sure of their outputs."""
    r = random.Random(seed)
    name = list(FAMILIES)[seed % len(FAMILIES)]
    family, outputs = FAMILIES[name]
    kind = "attention" if name == "positions" else r.choice(["mlp", "mlp", "cnn", "attention"])
    act, size = r.choice(ACTIVATIONS), r.choice([1, 4, 16])
    torch.manual_seed(seed)
    if kind == "mlp":
        shape, parts = (4,), [nn.Linear(4, 6), act(), nn.Linear(6, 5), act(), nn.Linear(5, outputs)]
    elif kind == "cnn":
        shape = (1, 4, 4)
        parts = [nn.Conv2d(1, 3, 3), act(), nn.Flatten(), nn.Linear(12, outputs)]
    else:
        shape, parts = (3, 4), [Attends(outputs, at_each=name == "positions")]
    net, x = nn.Sequential(*parts).double().eval(), torch.randn(size, *shape).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(r.choice([1.0, 2.0, 4.0]))
        if name == "poisson":  # whose rates are the exponentials of the outputs
            *_, weight, bias = net.parameters()
            shrink = max(1.0, float(net(x).abs().max()))
            weight.div_(shrink)
            bias.div_(shrink)
    return net, x, family


def shares(seed, kinds, repetitions):
    """(estimator, squares, passes, layer) → share held, but for layers where all is exact."""
    net, x, family = network(seed)
    grams, h = gram_matrices(net, x, family)
    found = {}
    for kind, squares in itertools.product(kinds, SQUARES):
        if kind == "importance" and not isinstance(labels_of(family)[0], fimlib.Categorical):
            continue
        count = repetitions * max(PASSES)
        sums, means = sums_of_passes(grams, h, family, kind, squares, count)
        for layer, passes in itertools.product(sums, PASSES):
            if (sums[layer] / means[layer] - 1).abs().max() > 1e-9:
                few = sums[layer][: repetitions * passes]
                found[kind, squares, passes, layer] = share_held(few, means[layer], passes)
    return found


def is_kept(share, repetitions):
    """Between 93 and 97 %, but for three standard errors of so many repetitions."""
    noise = 3 * (0.95 * 0.05 / repetitions) ** 0.5
    return 0.93 - noise <= share <= 0.97 + noise


@pytest.mark.long
@pytest.mark.parametrize(
    "seed", [*range(5), *(pytest.param(s, marks=pytest.mark.full) for s in range(5, 40))]
)
def test_intervals_of_random_signs_cover_what_they_say(seed):
    count = 2000 if seed < 5 else 10_000  # of many networks one would be off by chance
    found = shares(seed, ["signs"], count)
    assert {key: share for key, share in found.items() if not is_kept(share, count)} == {}


@pytest.mark.full
def test_intervals_of_labels_cover_as_much_as_is_said():
    """Most do; where a rare label carries much of the sum, none does with few passes."""
    found = [item for seed in range(40) for item in shares(seed, DRAWS, 1000).items()]
    for kind, passes, share_kept, least in (
        ("labels", 32, 0.75, 0.70),
        ("labels", 64, 0.85, 0.75),
        ("importance", 32, 0.85, 0.75),
        ("importance", 64, 0.95, 0.90),
    ):
        of_kind = [share for key, share in found if (key[0], key[2]) == (kind, passes)]
        kept = sum(is_kept(share, 1000) for share in of_kind) / len(of_kind)
        assert kept >= share_kept, (kind, passes)
        assert min(of_kind) >= least, (kind, passes)


def sure(rare):
    """A coin whose rarer side has this probability."""
    net = nn.Linear(1, 2, bias=False).double()
    net.weight.data = torch.tensor([[1 - rare], [rare]]).double().log()
    return net, torch.ones(1, 1).double(), fimlib.Categorical()


@pytest.mark.parametrize(("rare", "low", "high"), [(0.1, 0.9, 1.0), (0.01, 0.1, 0.4)])
def test_labels_of_a_sure_network_say_too_little_and_other_vectors_do_not(rare, low, high):
    """A side that no pass has drawn is missing from the estimate and from its error."""
    net, x, family = sure(rare)
    grams, h = gram_matrices(net, x, family)
    for kind in DRAWS:
        sums, means = sums_of_passes(grams, h, family, kind, "input", 2000 * 32)
        share = share_held(sums[""], means[""], 32)
        assert low < share < high if kind == "labels" else is_kept(share, 1000)


@pytest.mark.long
@pytest.mark.parametrize("seed", [4, 10])
def test_the_passes_are_those_of_estimate(seed, monkeypatch):
    """Means are right, and the distribution of a layer's sum is that of the formula."""
    net, x, family = network(seed)
    grams, h = gram_matrices(net, x, family)
    record = {}
    monkeypatch.setattr(
        estimates.Record, "estimate", lambda self, *_: record.update(sums=self.sums)
    )
    for kind, squares in itertools.product(DRAWS, SQUARES):
        options = {"estimator": kind, "squares": squares, "passes": 150}
        fimlib.estimate(net, x, family, **options)
        sums, means = sums_of_passes(grams, h, family, kind, squares, 3000)
        for layer, many in sums.items():
            few = torch.stack([one[layer] for one in record["sums"]])
            if (many / means[layer] - 1).abs().max() > 1e-9:
                rounded = ((t / means[layer]).numpy().round(9) for t in (few, many))
                assert stats.ks_2samp(*rounded).pvalue > 1e-3, (options, layer)
            assert float(many.mean()) == pytest.approx(means[layer], abs=float(many.std()) / 10)
