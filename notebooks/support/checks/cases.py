"""Random and adversarial cases: softmax vectors, derivative vectors, trained networks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import fimlib
from fimlib import Block, Derivatives, Family, Spectrum

Activation = Callable[[], nn.Module]
CLASSES = (2, 3, 4, 5, 7, 10, 20, 50, 100)
RESTS = (*range(1, 13), 14, 16, 30, 100)  # exponents of what a nearly certain class leaves
SCALES = (1e-3, 0.1, 1.0, 3.0, 10.0, 30.0)
MANY = 10_000  # cases; with fewer, fewer outputs of ten classes are taken, whose spectra cost most


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers of a seed, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def logits(num_classes: int, count: int, *, seed: int = 0) -> Tensor:
    """``count`` logit vectors [count, C]: a fifth of each kind.

    Random logits from nearly uniform to nearly certain; one class at 1 − 10⁻ᵏ, k from 1 to 100;
    two classes with ½ each but for such a rest; exactly uniform and a little off; classes that
    split into two sets of mass ½.
    """
    noise = normal(count, num_classes, seed=seed)
    rows = torch.arange(count)
    rest = 10.0 ** -torch.tensor(RESTS, dtype=torch.float64)[(rows // 5) % len(RESTS)][:, None]
    shares = torch.softmax(noise, 1)
    one = torch.zeros_like(noise)
    one[rows, rows % num_classes] = 1
    two = one + one.roll(1, 1)
    half = (torch.arange(num_classes) < (num_classes + 1) // 2).expand_as(noise)
    in_half = torch.where(half, shares, 0)
    in_half = in_half / in_half.sum(1, keepdim=True) + (shares - in_half) / (
        (shares - in_half).sum(1, keepdim=True)
    )
    kinds = torch.stack(
        [
            noise * torch.tensor(SCALES, dtype=noise.dtype)[(rows // 5) % len(SCALES)][:, None],
            ((1 - rest) * one + rest * shares).log(),
            ((1 - rest) * two / 2 + rest * shares).log(),
            noise * rest * (rows // 5 % 2)[:, None],
            (in_half / 2).log(),
        ]
    )
    return kinds[rows % 5, rows]


def vectors(h: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """``count`` derivative vectors for each of B logit vectors: [B, C, count].

    Single classes, differences and sums of two, a common shift, a common shift with a little
    noise, eigenvectors of 𝓘, the directions from which λ_max(M) is searched, copies of one vector
    (rank one), and random ones for the rest; of lengths from 10⁻³ to 10³.
    """
    family, (inputs, num_classes) = fimlib.Categorical(), h.shape
    eye = torch.eye(num_classes, dtype=torch.float64).expand(inputs, -1, -1)
    ones = torch.ones_like(eye[:, :, :1])
    fixed = [
        eye,
        eye - eye.roll(1, 2),
        eye + eye.roll(1, 2),
        ones,
        ones + 1e-6 * normal(inputs, num_classes, 3, seed=seed + 1),
        torch.linalg.eigh(family.covariance(h)).eigenvectors,
        family.directions(h).mT,
        normal(inputs, num_classes, 1, seed=seed + 2).expand(-1, -1, 5),
    ]
    adversarial = torch.cat(fixed, 2)
    order = torch.randperm(adversarial.shape[2], generator=torch.Generator().manual_seed(seed))
    adversarial = adversarial[:, :, order[: (3 * count) // 4]]
    random = normal(inputs, num_classes, count - adversarial.shape[2], seed=seed + 3)
    length = 10 ** (3 * torch.sin(torch.arange(count, dtype=torch.float64)))
    return torch.cat([adversarial, random], 2) * length


class Group(NamedTuple):
    """Softmax outputs of one number of classes, with derivative vectors and eigenvalues."""

    h: Tensor  # [B, C]
    derivs: Derivatives  # J and S, [B, C, n]
    eigenvalues: Spectrum


@functools.cache
def grid(cases: int) -> tuple[Group, ...]:
    """At least so many pairs of a softmax vector and a derivative vector, C from 2 to 100."""
    groups = []
    for index, num_classes in enumerate(CLASSES):
        most = 10 if cases >= MANY else 7
        inputs = 25 if num_classes <= most else 5 if num_classes <= 20 else 2
        count = -(-cases // (len(CLASSES) * inputs))
        chosen = torch.randperm(120, generator=torch.Generator().manual_seed(index))[:inputs]
        h = logits(num_classes, 120, seed=index)[chosen]
        J, S = (vectors(h, count, seed=100 * index + shift) for shift in (10, 20))
        lam = fimlib.spectrum(fimlib.Categorical(), h)
        groups.append(Group(h, as_derivatives(h, J, S), lam))
    return tuple(groups)


@functools.cache
def other_groups(cases: int) -> tuple[tuple[Family, Group], ...]:
    """At least so many pairs for families whose λ_min(𝓘) and λ_min(M) are not 0."""
    spread = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 1.5]], dtype=torch.float64)
    families = (
        (fimlib.Gaussian(spread), 3),
        (fimlib.Gaussian(1e8 * spread), 3),
        (fimlib.Bernoulli(), 1),
        (fimlib.Bernoulli(), 4),
        (fimlib.Poisson(), 3),
        (fimlib.GaussianHead(), 4),
    )
    groups, inputs = [], 10
    for family, num_outputs in families:
        h = normal(inputs, num_outputs, seed=num_outputs)
        eigenvectors = torch.linalg.eigh(family.covariance(h)).eigenvectors
        count = -(-cases // (len(families) * inputs))
        J, S = (normal(inputs, num_outputs, count, seed=seed) for seed in (7, 8))
        J, S = (torch.cat([eigenvectors, D], 2) for D in (J, S))
        lam = fimlib.spectrum(family, h)
        groups.append((family, Group(h, as_derivatives(h, J, S), lam)))
    return tuple(groups)


def as_derivatives(h: Tensor, J: Tensor, S: Tensor) -> Derivatives:
    """Made-up derivatives [B, T, n] as those of a layer with n parameters."""
    return Derivatives(h, (Block("layer", J, S, {"theta": None}),))


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits: [1797, 64] in [0, 1] and labels."""
    from sklearn.datasets import load_digits  # here, for it takes a while to import

    bunch = load_digits()
    return torch.tensor(bunch.data) / 16, torch.tensor(bunch.target)


@functools.cache
def trained(activation: Activation = nn.Sigmoid, seed: int = 0) -> nn.Sequential:
    """A 64-20-16-12-10 network that has learnt the digits (Adam, 150 full-batch steps)."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise([64, 20, 16, 12, 10]):
        layers += [nn.Linear(n_in, n_out), activation()]
    net = nn.Sequential(*layers[:-1]).double()
    x, y = digits()
    optimiser = torch.optim.Adam(net.parameters(), lr=0.03)
    for _ in range(150):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    return net.eval()


@functools.cache
def trained_derivatives(activation: Activation = nn.Sigmoid, inputs: int = 20) -> Derivatives:
    """J and S of a trained network at the first inputs."""
    return fimlib.differentiate(trained(activation), digits()[0][:inputs])


def unit(x: Tensor) -> Tensor:
    """Vectors along axis 1, of length 1."""
    return normalize(x, dim=1)
