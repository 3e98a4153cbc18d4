"""What the notebooks share of networks and their training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

DETAILS = ("in_features=", "out_features=", ", bias=True", ", inplace=False")


def named(module: ModuleType, name: str) -> Any:
    """A class of a module by its name, upper or lower case: ``named(nn, "tanh")`` is ``nn.Tanh``.

    Raises:
        ValueError: there is none of this name, or several.

    >>> named(nn, "logsigmoid"), named(torch.optim, "SGD")
    (<class 'torch.nn.modules.activation.LogSigmoid'>, <class 'torch.optim.sgd.SGD'>)
    """
    classes = {k: v for k, v in vars(module).items() if isinstance(v, type)}
    found = [k for k in classes if k == name] or [k for k in classes if k.lower() == name.lower()]
    if len(found) != 1:
        raise ValueError(
            f"{module.__name__} has no class {name!r}; write it as PyTorch does, such as "
            '"Sigmoid", "LogSigmoid", "Adam".'
        )
    return classes[found[0]]


def pick_device(device: str) -> torch.device:
    """The device of a parameter: "auto" is a GPU if there is one, else the CPU.

    On a GPU, PyTorch is set to kernels that give the same values every time, in float32 and not in
    TF32; it warns of an operation without such a kernel.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    picked = torch.device(device)
    if picked.type != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.allow_tf32 = False
    return picked


def mlp(widths: Sequence[int], activation: str, dropout: float = 0.0) -> nn.Sequential:
    """Dense layers from the first width to the last, dropout before the last layer.

    >>> [str(module) for module in mlp([784, 8, 10], "tanh")][1]
    'Tanh()'
    """
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths[:-1]):
        layers += [nn.Linear(n_in, n_out), named(nn, activation)()]
    return nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(widths[-2], widths[-1]))


def initialise(net: nn.Module, weights: str) -> None:
    """Draw the weights of all dense layers anew, with biases 0; "default" leaves PyTorch's.

    "Kaiming" and "Xavier" are normal, as of ``torch.nn.init``.

    Raises:
        ValueError: there is no such way.
    """
    ways = {
        "default": None,
        "Kaiming": nn.init.kaiming_normal_,
        "Xavier": nn.init.xavier_normal_,
    }
    if weights not in ways:
        raise ValueError(f"initial weights {weights!r}: write one of {', '.join(ways)}.")
    draw = ways[weights]
    for layer in net.modules():
        if draw and isinstance(layer, nn.Linear):
            draw(layer.weight)
            nn.init.zeros_(layer.bias)


def describe(net: nn.Module) -> str:
    """A network in one line, for records and captions."""
    text = ", ".join(str(m) for m in net.modules() if not any(m.children()))
    for detail in DETAILS:
        text = text.replace(detail, "")
    return text


def train_epoch(
    net: nn.Module,
    step: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    *,
    batch_size: int,
    shuffle: torch.Generator,
    loss: Any = nn.functional.cross_entropy,
) -> float:
    """One pass over the data in random order; the mean loss while it went on."""
    net.train()
    total = torch.zeros((), dtype=torch.float64, device=x.device)  # a GPU is waited for once
    for batch in torch.randperm(len(x), generator=shuffle).to(x.device).split(batch_size):
        value = loss(net(x[batch]), y[batch])
        step.zero_grad()
        value.backward()
        step.step()
        total += value.detach().double() * len(batch)
    return total.item() / len(x)


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the inputs whose likeliest class is the right one; leaves the net in eval mode."""
    net.eval()
    return float((net(x).argmax(1) == y).double().mean())
