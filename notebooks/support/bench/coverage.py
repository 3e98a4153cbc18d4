"""How often ``Estimate.interval`` holds the exact sum of a layer.

The sum of a layer in one pass is ‖Σ_x w_x·J_x‖²/m = wᵀGw with the Gram matrix G of all outputs, so
that a hundred thousand passes take a second. With squares="input" only the blocks of G that belong
to one input count.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import fimlib
from fimlib import estimates
from fimlib.projections import DRAWS, SQUARES
from support import data, training
from support.bench.measure import Row

PASSES = (32, 128, 512)
REPETITIONS, QUICK_REPETITIONS = 1000, 20
EPOCHS, QUICK_EPOCHS = 40, 2
IMAGES = 8
CASES = ("before training", "trained", "trained, the surest image alone")
Sums = dict[str, Tensor]


def rows(quick: bool) -> list[Row]:
    """The shares held in every layer of a network that learns digits."""
    torch.set_num_threads(1)
    repetitions, found = QUICK_REPETITIONS if quick else REPETITIONS, []
    family = fimlib.Categorical()
    for case, net, x in cases(QUICK_EPOCHS if quick else EPOCHS):
        grams, h = gram_matrices(net, x, family)
        about = {"case": case, "images": len(x), "repetitions": repetitions}
        about["probability"] = float(h.softmax(1).amax(1).median())
        for kind, squares in itertools.product(DRAWS, SQUARES):
            count = repetitions * max(PASSES)
            sums, means = sums_of_passes(grams, h, family, kind, squares, count)
            for layer, passes in itertools.product(sums, PASSES):
                share = share_held(sums[layer][: repetitions * passes], means[layer], passes)
                what = {"estimator": kind, "squares": squares, "layer": layer, "passes": passes}
                found.append({**about, **what, "share": share})
    return found


def cases(epochs: int) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """A small network before and after so many epochs on the bundled digits, and test images."""
    digits = data.load("digits")
    images, labels = (torch.from_numpy(a) for a in (digits.train_images, digits.train_labels))
    x = torch.from_numpy(digits.test_images[:IMAGES]).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = training.mlp([images.shape[1], 16, 10], "Sigmoid")
        yield CASES[0], copy.deepcopy(net).double().eval(), x
        optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(epochs):
            training.train_epoch(
                net, optimiser, images, labels, batch_size=64, shuffle=torch.default_generator
            )
    net = net.double().eval()
    surest = net(x).softmax(1).amax(1).argmax()
    yield CASES[1], net, x
    yield CASES[2], net, x[surest, None]


def gram_matrices(net: nn.Module, x: Tensor, family: fimlib.Family) -> tuple[Sums, Tensor]:
    """Layer → G, [B T, B T], and the natural parameters."""
    derivs = family.natural_derivatives(fimlib.differentiate(net, x, order=1))
    h = family.natural(derivs.outputs)
    found: Sums = {}
    for name, _ in net.named_parameters():
        J, layer = derivs.jacobian(name).double().reshape(h.numel(), -1), estimates.layer_of(name)
        found[layer] = found.get(layer, torch.zeros(())) + J @ J.T / len(x)
    return found, h


def sums_of_passes(
    grams: Sums, h: Tensor, family: fimlib.Family, kind: str, squares: str, count: int
) -> tuple[Sums, dict[str, float]]:
    """Layer → its sums in so many passes, and their mean."""
    generator = torch.Generator().manual_seed(0)
    own = torch.block_diag(*[torch.ones(h.shape[1], h.shape[1])] * len(h))
    covariance = torch.block_diag(*family.covariance(h))
    found: dict[str, list[Tensor]] = {layer: [] for layer in grams}
    for part in torch.arange(count).split(max(1, 200_000 // h.numel())):
        w = DRAWS[kind](family, h.repeat(len(part), 1), generator).reshape(len(part), -1)
        for layer, G in grams.items():
            mine = G * own if squares == "input" else G
            found[layer].append(((w @ mine) * w).sum(1))
    means = {layer: float((G * covariance).sum()) for layer, G in grams.items()}
    return {layer: torch.cat(sums) for layer, sums in found.items()}, means


def share_held(sums: Tensor, right: float, passes: int) -> float:
    """How often the interval of so many passes holds the right sum."""
    layers = {"": estimates.LayerEstimate(1.0, 0.01, 0.0)}
    _, high = estimates.Estimate({}, {}, layers, 0.0, passes, 1, "", "").interval("")
    groups = sums.view(-1, passes)
    total, error = groups.mean(1), groups.std(1) / passes**0.5
    held = (right / total).log().abs() <= math.log(high) / 0.01 * error / total
    return float(held.double().mean())
