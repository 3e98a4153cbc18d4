"""Batches of any kind for engines, which know one tensor of inputs: the network holds the batch.

The inputs that an engine sees are then positions in the batch, [B, 1]. ``forward(network, part)``
returns the outputs of a part of it, in which every tensor has the same inputs along its first axis.
"""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fimlib.engines.checks import check_plain, check_training

Forward = Callable[[nn.Module, Any], Tensor]


class Held(nn.Module):
    """A network that holds a batch; its parameters and modules have the network's names.

    Attributes:
        network: The network.
        forward_of: From the network and a part of the batch to the outputs, [b, T].
        batch: Tensors in dicts, tuples and lists.
        size: B, the inputs in the batch.
    """

    network: nn.Module
    forward_of: Forward
    batch: Any

    def __init__(self, network: nn.Module, forward_of: Forward, batch: Any) -> None:
        super().__init__()
        self.training = network.training
        self.__dict__ |= {"network": network, "forward_of": forward_of, "batch": batch}
        self.__dict__ |= {n: vars(network)[n] for n in ("_parameters", "_buffers", "_modules")}
        self.size = size_of(batch)

    @property
    def positions(self) -> Tensor:
        """What an engine takes for the inputs, [B, 1]."""
        device = next((p.device for p in self.network.parameters()), None)
        return torch.arange(self.size, device=device)[:, None]

    def around(self, network: nn.Module) -> Held:
        """The same batch, held by another network, as a copy of this one."""
        return type(self)(network, self.forward_of, self.batch)

    def at(self, positions: Tensor) -> Held:
        """The same network with a part of the batch."""
        return type(self)(self.network, self.forward_of, self.part(positions))

    def part(self, positions: Tensor) -> Any:
        """What the batch holds at some positions, [b, 1], in tensors of its own."""
        return each_tensor(lambda t: t[positions[:, 0]] if t.ndim else t.clone(), self.batch)

    def forward(self, positions: Tensor) -> Tensor:
        """The outputs at some positions of the batch."""
        return self.forward_of(self.network, self.part(positions))

    def _apply(self, fn: Callable[[Tensor], Tensor], *options: bool) -> Held:
        """Also of the batch: it has the type and the device of the network."""
        super()._apply(fn, *options)  # type: ignore[no-untyped-call]
        self.batch = each_tensor(fn, self.batch)
        return self


def hold(network: nn.Module, forward_of: Forward, batch: Any) -> Held:
    """A network that holds a batch, in the type and on the device of its parameters.

    Raises:
        ValueError: the batch has no tensors, or its tensors differ in their first axis; it holds
            NaN.
        NotImplementedError: the network is hidden by a wrapper; see ``check_plain``.
    """
    check_plain(network)
    check_training(network)
    like = next(network.parameters())
    size_of(batch)

    def placed(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t.to(like.device)
        if torch.isnan(t).any():
            raise ValueError("the batch holds NaN.")
        return t.detach().to(like)

    kind = type(type(network).__name__, (Held,), {})  # messages name the network
    held: Held = kind(network, forward_of, each_tensor(placed, batch))
    return held


def other_input(model: nn.Module, x: Tensor) -> Tensor | None:
    """The next input of the batch that a network holds; None if it holds none."""
    held = next((m for m in model.modules() if isinstance(m, Held)), None)
    return None if held is None else (x + 1) % held.size


def each_tensor(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The same batch with other tensors in it."""
    if isinstance(batch, UserDict):  # as of tokenisers
        other = copy.copy(batch)
        other.data = each_tensor(function, batch.data)
        return other
    return tree_map_only(Tensor, function, batch)


def size_of(batch: Any) -> int:
    """How many inputs a batch has.

    Raises:
        ValueError: it has no tensors, or they differ in their first axis.
    """
    inside = batch.data if isinstance(batch, UserDict) else batch
    sizes = {len(t) for t in tree_leaves(inside) if isinstance(t, Tensor) and t.ndim}
    if len(sizes) != 1:
        found = f"have first axes of lengths {sorted(sizes)}" if sizes else "are none"
        raise ValueError(
            f"the tensors of a batch, a {type(batch).__name__}, {found}: the first axis must count "
            "the inputs; keep what all inputs share out of the batch, in forward."
        )
    return sizes.pop()
