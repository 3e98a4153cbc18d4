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
from fimlib.engines.traced.linearised import VIEWS, Tangents

Pull = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, eq=False)
class Reached:
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


def places(t: Trace, size: int) -> list[Reached]:
    """One or more for each parameter, in the order of the forward pass, at B = size inputs."""
    found: dict[tuple[Node, str], Reached] = {}
    for leaf, name in sorted(t.names.items(), key=lambda item: first_use(t, item[0])):
        layer = name.rpartition(".")[0]
        views, op, i = way_in(t, leaf)
        known = None if op is None else place(views, op, i)
        if op is None or known is None or not keeps_inputs(known, op, i, size):
            found[leaf, name] = Reached(layer, (leaf, 0), directly, {name: None})
        elif known.is_linear and shape(known.edge)[0] == size:
            # the weight and the bias share their left factors
            shared = found[op, layer].inputs if (op, layer) in found else {}
            inputs = {**shared, name: known.z}
            found[op, layer] = Reached(layer, (op, 0), per_input(size), inputs, by_channel=True)
        else:
            pull, on_channels = pull_of(known, size), ("Convolution", "NativeBatchNorm")
            by_channel = len(views) == 1 and kind(op) in on_channels
            found[op, name] = Reached(layer, (op, 0), pull, {name: None}, by_channel)
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


def keeps_inputs(known: Place, op: Node, i: int, size: int) -> bool:
    """Whether the first axis of the rows at a place counts the inputs, or their positions."""
    name, view, out = kind(op), shape(known.views[-1]), shape(known.edge)
    if name in ("Addmm", "Mm") and i == len(op.next_functions) - 1:
        return out[0] % size == 0
    if name in ("Mm", "Bmm") or not out or out[0] != size:
        return False
    is_looked_up = name == "Embedding" or (name == "Convolution" and i == 1)
    return is_looked_up or len(view) < len(out) or view[0] == 1


def directly(rows: Tensor, _power: int) -> Tensor:
    """Rows that autograd carried to the parameter itself, of one input."""
    return rows[:, None]


def per_input(size: int) -> Pull:
    """The left factors of a linear layer are the rows behind it."""
    return lambda rows, _power: rows.view(len(rows), size, -1)


def pull_of(known: Place, size: int) -> Pull:
    """From rows at a place to left factors in the parameter, as in ``Reached``."""

    @cache
    def right(power: int) -> Tensor | None:
        if known.z is None:
            return None
        z = known.prepare(known.z.view(size, -1, *known.z.shape[1:]))
        return z.square() if power == 2 and z.is_floating_point() else z

    def pull(rows: Tensor, power: int) -> Tensor:
        behind = known.rows(rows)
        left = known.pull(behind.unflatten(1, (size, -1)), right(power)).transpose(0, 1)
        left = left if known.factor == 1 or power == 1 else known.factor * left
        return through_views(known.views, left)

    return pull


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


def unfolded(op: Any, z: Tensor) -> Tensor:
    """The patches of z that a convolution multiplies by its weights: [B, G, positions, n]."""
    kernel = op._saved_weight.shape[2:]
    z = nn.functional.pad(z, [p for p in reversed(op._saved_padding) for _ in range(2)])
    for d, k in enumerate(kernel):  # [B, C, *positions, *kernel] at the end
        stride, dilation = op._saved_stride[d], op._saved_dilation[d]
        z = z.unfold(2 + d, (k - 1) * dilation + 1, stride)[..., ::dilation]
    z = z.unflatten(1, (op._saved_groups, -1)).movedim(2, 2 + len(kernel))
    return z.flatten(2, 1 + len(kernel)).flatten(3)


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


@dataclass(frozen=True, eq=False)
class Place:
    """Where a parameter, or a view of it, enters the network.

    Attributes:
        views: The parameter and its views in a row.
        edge: The result of the operation by which the last of them enters.
        rows: From derivatives at the edge, [c, *shape], to rows [c, N, ...], N ≥ B.
        pull: From rows [c, b, L, ...] and z [b, L, ...] of b inputs to derivatives in the view,
            [b, c, *view].
        z: The factor of the rows, [N, ...]; None for a number.
        factor: That number.
        prepare: From z [b, L, ...] to what ``pull`` takes for it.
        is_linear: Whether the parameter is the weight or the bias of W z + b.
        is_by_row: Whether the numbers of rows along their first axis behind L are the parameter's
            along its first, each for itself.
    """

    views: list[Edge]
    edge: Edge
    rows: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor, Tensor | None], Tensor]
    z: Tensor | None = None
    factor: float = 1.0
    prepare: Callable[[Tensor], Tensor] = lambda z: z
    is_linear: bool = False
    is_by_row: bool = False


def place(views: list[Edge], op: Any, i: int) -> Place | None:
    """Where the last of the views is argument i of an operation; None: it is not known how."""
    name, view, out = kind(op), shape(views[-1]), shape((op, 0))
    is_plain = name != "Addmm" or (op._saved_alpha, op._saved_beta) == (1, 1)
    if name in ("Addmm", "Mm") and is_plain and i == len(op.next_functions) - 1:
        z = (op._saved_mat1 if name == "Addmm" else op._saved_self).detach()
        if [kind(node) for node, _ in views[1:]] == ["T"]:  # as in nn.Linear
            return Place(
                views[:1], (op, 0), lambda g: g, product, z, is_linear=True, is_by_row=True
            )
        return Place(views, (op, 0), lambda g: g, lambda *both: product(*both).mT, z)
    if name == "Mm" and i == 0:
        return Place(views, (op, 0), lambda g: g.mT, product, op._saved_mat2.detach().mT)
    if name == "Bmm":
        return of_matrices(views, op, i)
    if name == "Embedding":
        return embedding(views, op, view[0])
    if name == "Convolution" and i == 1 and not op._saved_transposed:
        return convolution(views, op)
    if name in ("NativeLayerNorm", "NativeGroupNorm") and i > 0:
        first = 1 if name == "NativeGroupNorm" else None  # by channel
        return broadcast(views, op, normalised(op) if i == 1 else 1.0, first=first)
    if name == "Addmm" and is_plain and i == 0:
        return broadcast(views, op, 1.0, is_linear=len(views) == 1 and view == out[1:])
    is_known = name != "Addmm" and not getattr(op, "_saved_training", False)
    factor = 1.0 if name == "Expand" else factor_of(op, i) if is_known else None
    if factor is None:
        return None
    first = 1 if name in ("NativeBatchNorm", "Convolution") else None  # by channel
    return broadcast(views, op, factor, first=first)


def product(rows: Tensor, z: Tensor | None) -> Tensor:
    """Of W [o, n], in products with z."""
    assert z is not None
    left = rows.permute(1, 0, 3, 2).flatten(1, 2)  # [b, c o, L]
    return torch.unflatten(torch.bmm(left, z), 1, (len(rows), -1))


def of_matrices(views: list[Edge], op: Any, i: int) -> Place:
    """W [G, n, o] in the products z_g W_g, or W [G, o, n] in W_g z_gᵀ."""
    z = op._saved_self if i == 1 else op._saved_mat2.mT  # [G, N, n]
    letters = "cblgo,blgn->bcgno" if i == 1 else "cblgo,blgn->bcgon"

    def rows(g: Tensor) -> Tensor:
        return (g if i == 1 else g.mT).movedim(1, 2)

    def pull(rows: Tensor, z: Tensor | None) -> Tensor:
        return torch.einsum(letters, rows, z)

    return Place(views, (op, 0), rows, pull, z.detach().movedim(0, 1))


def embedding(views: list[Edge], op: Any, num_rows: int) -> Place:
    """A table [V, D] whose rows are looked up."""
    index = op._saved_indices.flatten()

    def pull(rows: Tensor, index: Tensor | None) -> Tensor:
        assert index is not None
        found = rows.new_zeros(*rows.shape[:2], num_rows, rows.shape[-1])
        where = index[None, ..., None].expand(rows.shape)
        return found.scatter_add_(2, where, rows).transpose(0, 1)

    return Place(views, (op, 0), lambda g: g.flatten(1, -2), pull, index)


def convolution(views: list[Edge], op: Any) -> Place:
    """W [O, C / groups, *kernel]: one product at every position of every image."""
    groups, target = op._saved_groups, op._saved_weight.shape

    def patches(images: Tensor) -> Tensor:  # [b G, L positions, n]
        found = unfolded(op, images.flatten(0, 1)).unflatten(0, images.shape[:2])
        by_group: Tensor = found.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        return by_group

    def pull(rows: Tensor, patches: Tensor | None) -> Tensor:
        assert patches is not None
        number, size = rows.shape[:2]
        by_group = rows.unflatten(3, (groups, -1)).flatten(5)  # [c, b, L, G, o, positions]
        left = by_group.permute(1, 3, 0, 4, 2, 5).flatten(4).flatten(2, 3).flatten(0, 1)
        found = torch.bmm(left, patches).view(size, groups, number, -1, patches.shape[-1])
        return found.transpose(1, 2).reshape(size, number, -1, *target[1:])

    z, is_by_row = op._saved_input.detach(), groups == 1 and len(views) == 1
    return Place(views, (op, 0), lambda g: g, pull, z, prepare=patches, is_by_row=is_by_row)


def normalised(op: Any) -> Tensor:
    """The normalised input of a layer norm or a group norm, which its weight multiplies."""
    z: Tensor = op._saved_input.detach()
    by_group = z.reshape(*op._saved_result1.shape, -1)
    mean, scale = (s.detach()[..., None] for s in (op._saved_result1, op._saved_result2))
    return torch.mul(by_group - mean, scale).view_as(z)


def broadcast(
    views: list[Edge],
    op: Any,
    factor: Tensor | float,
    *,
    first: int | None = None,
    is_linear: bool = False,
) -> Place:
    """A parameter that is added, or multiplied by a factor, over the axes that it does not have.

    Args:
        views: The parameter and its views.
        op: The operation.
        factor: By which it is multiplied.
        first: The axis of the result that is the view's first; None: its last is the last.
        is_linear: As in ``Place``.
    """
    view, out = shape(views[-1]), shape((op, 0))
    first = len(out) - len(view) if first is None else first
    own = [first + d for d, n in enumerate(view) if n == out[first + d]]
    over = [d for d in range(len(out)) if d not in own]

    def rows(g: Tensor) -> Tensor:
        order = [0, *(d + 1 for d in over), *(d + 1 for d in own)]
        return g.permute(order).flatten(1, len(over)) if over else g[:, None]

    z = rows(factor.expand(out)[None])[0] if isinstance(factor, Tensor) else None
    number = 1.0 if isinstance(factor, Tensor) else factor

    def pull(rows: Tensor, z: Tensor | None) -> Tensor:
        sums = (number * rows.sum(2) if z is None else (rows * z).sum(2)).transpose(0, 1)
        return sums.reshape(*sums.shape[:2], *view)

    return Place(views, (op, 0), rows, pull, z, number, is_linear=is_linear)
