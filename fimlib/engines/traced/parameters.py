"""Where parameters enter a network, and how derivatives there become derivatives in them.

A parameter that enters by one product or sum is reached from the output of that operation: a weight
through the input that it multiplies, the rows of every input of a batch apart. Any other parameter
is reached by autograd itself, which adds up the inputs: one at a time then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from fimlib.engines.traced.graph import Edge, Trace, kind, shape
from fimlib.engines.traced.linearised import VIEWS, Tangents, sum_to

Pull = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, eq=False)
class Place:
    """Parameters that are reached from one edge of the graph.

    Attributes:
        layer: Name of the module that owns them.
        edge: Where rows of derivatives are to be carried to.
        pull: Maps rows there, [c, ...], to left factors [c, B, *K]. With power 2 it maps weights of
            one-hot rows to the weighted sum of the squares of what it maps those rows to.
        inputs: Their right factors, as in ``Block``.
        by_channel: Whether number o of the first axis of K acts on channel o of the edge's tensor,
            [B, O, ...], alone.
    """

    layer: str
    edge: Edge
    pull: Pull
    inputs: Mapping[str, Tensor | None]
    by_channel: bool = False

    def push(self, chosen: Tensor, J: Tensor) -> Tangents:
        """The transposed map: the tangents at the edge of some of the left factors.

        Args:
            chosen: Which of the numbers of K; where ``by_channel``, which of those of each channel.
            J: The left factors of first derivatives, [B, T, *K], for their shape and type.
        """
        size, _, *numbers = J.shape
        channels = numbers[0] if self.by_channel else 1
        with torch.enable_grad():
            row = J.new_zeros(1, *shape(self.edge)).requires_grad_()
            left = self.pull(row, 1)
        seeds = J.new_zeros(len(chosen), size, channels, prod(numbers) // channels)
        seeds[torch.arange(len(chosen), device=J.device), :, :, chosen] = 1
        (found,) = torch.autograd.grad(
            left, row, seeds.view(-1, 1, size, *numbers), is_grads_batched=True
        )
        found = found[:, 0]
        return Tangents(found, True) if self.by_channel else Tangents(found[None], False)


def places(t: Trace, size: int) -> list[Place]:
    """One or more for each parameter, in the order of the forward pass, at B = size inputs."""
    found: dict[tuple[Node, str], Place] = {}
    for leaf, name in sorted(t.names.items(), key=lambda item: first_use(t, item[0])):
        layer = name.rpartition(".")[0]
        views, op, i = way_in(t, leaf)
        pull = None if op is None else pull_of(op, i, shape(views[-1]), size)
        if op is None or pull is None:
            found[leaf, name] = Place(layer, (leaf, 0), directly, {name: None})
        elif is_linear_layer(op, i, views, size):
            # the weight and the bias share their left factors
            z = right_factor(op) if i > 0 else None
            shared = found[op, layer].inputs if (op, layer) in found else {}
            inputs = {**shared, name: z}
            found[op, layer] = Place(layer, (op, 0), per_input(size), inputs, by_channel=True)
        else:
            by_channel = len(views) == 1 and kind(op) in ("Convolution", "NativeBatchNorm")
            back = to_parameter(pull, views)
            found[op, name] = Place(layer, (op, 0), back, {name: None}, by_channel)
    return list(found.values())


def first_use(t: Trace, leaf: Node) -> int:
    """When the parameter is used for the first time; autograd numbers the nodes as they come."""
    return min(node._sequence_nr() for node, _ in t.users[leaf])


def way_in(t: Trace, leaf: Node) -> tuple[list[Edge], Node | None, int]:
    """The parameter and its views in a row; who multiplies or adds the last, if it is just one."""
    views: list[Edge] = [(leaf, 0)]
    while len(users := t.users[views[-1][0]]) == 1:
        op, i = users[0]
        if kind(op) not in VIEWS:
            return views, op, i
        views.append((op, 0))
    return views, None, 0


def is_linear_layer(op: Node, i: int, views: list[Edge], size: int) -> bool:
    """Whether the parameter is W or b in a plain ``W z + b``, one z for each input."""
    if kind(op) not in ("Addmm", "Mm") or shape((op, 0))[0] != size:
        return False
    is_bias = kind(op) == "Addmm" and i == 0
    kinds = [kind(node) for node, _ in views[1:]]
    if is_bias:  # a view would give the left factors another shape than the parameter's
        return not kinds and shape(views[0]) == shape((op, 0))[1:]
    return kinds == ["T"]


def right_factor(op: Any) -> Tensor:
    """The inputs z, [positions, n], of a product of matrices."""
    z: Tensor = op._saved_mat1 if kind(op) == "Addmm" else op._saved_self
    return z.detach()


def pull_of(op: Any, i: int, view: tuple[int, ...], size: int) -> Pull | None:
    """From rows behind the operation to rows of its argument i, for each input; None if unknown.

    Its argument 0 or 1 is a factor, or its argument is added, as ``PRODUCTS`` of the engine says.
    """
    name, out = kind(op), shape((op, 0))
    if (
        not out
        or out[0] % size
        or (name == "Addmm" and (op._saved_alpha, op._saved_beta) != (1, 1))
    ):
        return None
    if name in ("Addmm", "Mm") and i == len(op.next_functions) - 1:
        return matrix(right_factor(op), size)
    if name == "Embedding":
        return embedding(op, view[0]) if out[0] == size else None
    if name == "Convolution" and i == 1:
        return convolution(op) if out[0] == size and not op._saved_transposed else None
    factor = factor_of(op, i)
    on_channels = name in ("Convolution", "NativeBatchNorm")
    lead = 1 if on_channels else len(out) - len(view)
    aligned = (1,) * lead + view + (1,) * (len(out) - lead - len(view))
    if factor is None or out[0] != size or aligned[0] != 1:
        return None
    return scaled(factor, (size, *aligned[1:]), view)


def factor_of(op: Any, i: int) -> Tensor | float | None:
    """The factor of argument i in an elementwise or channelwise operation; None: unknown."""
    name = kind(op)
    if name == "NativeBatchNorm" and i == 1:
        by_channel = [-1] + [1] * (op._saved_input.ndim - 2)
        mean, var = (v.view(by_channel) for v in (op._saved_running_mean, op._saved_running_var))
        normalised: Tensor = (op._saved_input.detach() - mean) * (var + op._saved_eps).rsqrt()
        return normalised
    if name in ("NativeBatchNorm", "Convolution") and i == 2:
        return 1.0
    if name == "PreluKernel" and i == 1:
        return torch.clamp(op._saved_self.detach(), max=0)
    if name == "Addmm" and i == 0:
        return 1.0
    if name in ("Add", "Sub"):
        return 1.0 if i == 0 else float(op._saved_alpha) * (1 if name == "Add" else -1)
    if name == "Mul":
        other: Tensor | float = op._saved_other if i == 0 else op._saved_self
        return other.detach() if isinstance(other, Tensor) else other
    return None


def directly(rows: Tensor, _power: int) -> Tensor:
    """Rows that autograd carried to the parameter itself, of one input."""
    return rows[:, None]


def per_input(size: int) -> Pull:
    """The left factors of a linear layer are the rows behind it."""
    return lambda rows, _power: rows.view(len(rows), size, -1)


def matrix(z: Tensor, size: int) -> Pull:
    """W [n, o] in z W, with inputs z [B · L, n] at L positions."""
    z = z.view(size, -1, z.shape[1])

    def pull(rows: Tensor, power: int) -> Tensor:
        by_position = rows.reshape(len(rows), *z.shape[:2], -1)
        return torch.einsum("cblo,bln->cbno", by_position, z if power == 1 else z**power)

    return pull


def convolution(op: Any) -> Pull:
    """W [O, C / groups, *kernel] of a convolution: one product at every position of its output."""

    @cache
    def patches(power: int) -> Tensor:  # [B, groups, positions, numbers in a patch]
        found = unfolded(op, op._saved_input.detach())
        return found if power == 1 else found.square()

    def pull(rows: Tensor, power: int) -> Tensor:
        by_group = rows.unflatten(2, (op._saved_groups, -1)).flatten(4)
        weight: Tensor = torch.einsum("cbgol,bgln->cbgon", by_group, patches(power))
        return weight.reshape(*rows.shape[:2], *op._saved_weight.shape)

    return pull


def unfolded(op: Any, z: Tensor) -> Tensor:
    """The patches of z that a convolution multiplies by its weights: [B, G, positions, n]."""
    kernel = op._saved_weight.shape[2:]
    z = nn.functional.pad(z, [p for p in reversed(op._saved_padding) for _ in range(2)])
    for d, k in enumerate(kernel):  # [B, C, *positions, *kernel] at the end
        stride, dilation = op._saved_stride[d], op._saved_dilation[d]
        z = z.unfold(2 + d, (k - 1) * dilation + 1, stride)[..., ::dilation]
    z = z.unflatten(1, (op._saved_groups, -1)).movedim(2, 2 + len(kernel))
    return z.flatten(2, 1 + len(kernel)).flatten(3)


def embedding(op: Any, num_rows: int) -> Pull:
    """A table [V, D] whose rows are looked up, at any positions of an input."""
    index = op._saved_indices.reshape(len(op._saved_indices), -1)  # [B, positions], no padding
    start = num_rows * torch.arange(len(index), device=index.device)[:, None]

    def pull(rows: Tensor, _power: int) -> Tensor:
        given = rows.reshape(len(rows), *index.shape, -1)
        left = given.new_zeros(len(rows), len(index) * num_rows, given.shape[-1])
        left = left.index_add(1, (start + index).flatten(), given.flatten(1, 2))
        return torch.unflatten(left, 1, (len(index), num_rows))

    return pull


def scaled(factor: Tensor | float, target: tuple[int, ...], view: tuple[int, ...]) -> Pull:
    """A parameter that is added, or multiplied by a factor; broadcast from the target's shape."""
    is_one = isinstance(factor, float) and factor == 1

    def pull(rows: Tensor, power: int) -> Tensor:
        rows = rows if is_one else rows * factor**power
        return sum_to(rows, target).reshape(len(rows), target[0], *view)

    return pull


def to_parameter(pull: Pull, views: list[Edge]) -> Pull:
    """From rows behind the operation to the parameter itself, if they go to its last view."""
    return lambda rows, power: through_views(views, pull(rows, power))


def through_views(views: list[Edge], left: Tensor) -> Tensor:
    """From derivatives in the last view of a parameter, [c, b, *view], to those in itself."""
    if len(views) == 1:
        return left
    (found,) = torch.autograd.grad(
        [GradientEdge(*views[-1])],
        [GradientEdge(*views[0])],
        [left.flatten(0, 1)],
        is_grads_batched=True,
        retain_graph=True,
        create_graph=left.requires_grad,
    )
    return torch.unflatten(found, 0, left.shape[:2])
