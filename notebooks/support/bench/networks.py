"""The networks that are measured, with random weights and inputs from fixed seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """A network to measure.

    Attributes:
        title: What it is, in words.
        shape: Of one input.
        make: Makes it, weights from torch's generator.
        dense: Inputs at a time for those who keep outputs × parameters for each: the fastest of
            a few that were tried, and within memory.
    """

    title: str
    shape: tuple[int, ...]
    make: Callable[[], nn.Sequential]
    dense: int


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with sigmoids between them."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.Sigmoid()]
    return nn.Sequential(*layers[:-1])


def lenet(
    size: int, channels: tuple[int, int], hidden: Sequence[int], kernel: int
) -> nn.Sequential:
    """Two convolutions with average pooling, three linear layers, sigmoids; size × size pixels."""
    first, second = channels
    side = ((size - kernel + 1) // 2 - kernel + 1) // 2
    return nn.Sequential(
        nn.Conv2d(1, first, kernel),
        nn.Sigmoid(),
        nn.AvgPool2d(2),
        nn.Conv2d(first, second, kernel),
        nn.Sigmoid(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        *mlp(second * side**2, *hidden),
    )


def of_widths(widths: Sequence[int], dense: int, title: str = "") -> Network:
    """An MLP of these widths."""
    text = "-".join(map(str, widths))
    return Network(f"{title}{text}", (widths[0],), lambda: mlp(*widths), dense)


FULL = {
    "mlp": of_widths([784, 128, 64, 32, 10], 10, "MLP "),
    "wide": of_widths([784, 1024, 1024, 1024, 10], 2, "wide MLP "),
    "lenet": Network(
        "LeNet (two convolutions, three linear layers)",
        (1, 28, 28),
        lambda: lenet(28, (6, 16), [120, 84, 10], 5),
        10,
    ),
}
QUICK = {
    "mlp": of_widths([12, 8, 6, 4, 3], 40, "tiny MLP "),
    "wide": of_widths([12, 16, 16, 16, 3], 40, "tiny wide MLP "),
    "lenet": Network("tiny LeNet", (1, 10, 10), lambda: lenet(10, (2, 3), [6, 5, 3], 3), 40),
}


def network(key: str | Sequence[int], *, quick: bool = False) -> Network:
    """A network by its name, or an MLP by its widths."""
    if isinstance(key, str):
        return (QUICK if quick else FULL)[key]
    return of_widths(key, 10)


def problem(
    network: Network, batch: int, device: str, seed: int = 0
) -> tuple[nn.Module, Tensor, Tensor]:
    """The network in eval mode, inputs between 0 and 1, and labels: float32, on the device."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network.make().eval()
    x = torch.rand(batch, *network.shape, generator=generator)
    y = torch.randint(_outputs(model), (batch,), generator=generator)
    return model.to(device), x.to(device), y.to(device)


def _outputs(model: nn.Module) -> int:
    *_, last = (m for m in model.modules() if isinstance(m, nn.Linear))
    return last.out_features
