"""The network as autograd recorded it, linearised: derivatives carried along its graph.

A row of derivatives with respect to one tensor is carried back to earlier ones, a tangent (how a
tensor changes along a direction) on to later ones, from operation to operation: a row by autograd's
rule for it, a tangent by that rule transposed. For those that matter most there is something
faster. What operations do to units, and to the inputs of a batch, is known here, too: which of them
keep every one apart.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from fimlib.engines.activations import Two
from fimlib.engines.traced.graph import Edge, Trace, kind, shape

ELEMENTWISE = re.compile(
    r"""Activation|Sigmoid|LogSigmoid|Tanh|Softplus|Gelu|Silu|Mish|Elu|Celu|Hardswish|Exp|Exp2
    |Expm1|Log|Log2|Log10|Log1p|Sin|Cos|Tan|Sinh|Cosh|Asin|Acos|Atan|Asinh|Acosh|Atanh|Sqrt|Rsqrt
    |Pow|Reciprocal|Erf|Erfc|Erfinv|Logit|Lgamma|Digamma""",
    re.VERBOSE | re.IGNORECASE,
)
# Every number of the result depends on one number of each argument of its shape ...
UNITWISE = re.compile(
    r"""Add|Sub|Rsub|Neg|Mul|Div|Where|MaskedFill|Maximum|Minimum|Abs|Clamp|ClampMin|ClampMax
    |Relu|LeakyRelu|Threshold|Hardtanh|Hardsigmoid|Softshrink|Hardshrink|Clone|Alias|ToCopy|Copy
    |Sign|Sgn|Round|Floor|Ceil|Trunc""",
    re.VERBOSE | re.IGNORECASE,
)
# ... and these only number them, in the same order.
FLAT = ("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze")
VIEWS = ("T", "Transpose", "Permute", *FLAT)  # every number is one number of the argument
POOLING = re.compile(r"(Mkldnn)?(Adaptive)?AvgPool2D|(Adaptive)?MaxPool2D(WithIndices)?", re.I)

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rule:
    """The linear map of one operation on c derivatives at once, all but one argument fixed.

    Attributes:
        on: From tangents of the argument, [c, ...], to tangents of the result.
        back: Rows at the result, [c, ...], to rows at the argument.
        keeps_channels: Whether the second axis, the channels of [B, O, ...], stay apart.
    """

    on: Map
    back: Map
    keeps_channels: bool = False


def is_unitwise(node: Any, i: int) -> bool:
    """Whether each number of the result depends on no number of argument i but the same."""
    name, z, s = kind(node), shape((node, 0)), shape(node.next_functions[i])
    if name in FLAT:
        return True
    if name in ("NativeBatchNorm", "PreluKernel"):
        return i == 0
    return z == s and bool(UNITWISE.fullmatch(name) or ELEMENTWISE.fullmatch(name))


def units_alone(t: Trace, edge: Edge) -> set[Node]:
    """Nodes behind an edge each of whose units depends on one unit there, the one in its place."""
    found: set[Node] = {edge[0]}
    mixed: set[Node] = set()
    for node in t.nodes:
        below = [(i, n) for i, (n, _) in t.dependent(node).items() if n in found or n in mixed]
        if below and node not in found:
            is_alone = all(n in found and is_unitwise(node, i) for i, n in below)
            (found if is_alone else mixed).add(node)
    return found


def inputs_are_rows(t: Trace, size: int) -> bool:
    """Whether every operation is known to map row b of the first axis to row b, at B = size."""

    def keeps_rows(node: Node, i: int, edge: Edge) -> bool:
        name, z, s = kind(node), shape((node, 0)), shape(edge)
        if is_parameter(t, edge):
            return True  # rows end there
        if not z or not s or z[0] != size or s[0] != size:
            return False
        if name in ("Addmm", "Mm", "Convolution"):
            return i == (1 if name == "Addmm" else 0)
        is_known = UNITWISE.fullmatch(name) or POOLING.fullmatch(name)
        return is_unitwise(node, i) or (is_known is not None and len(z) == len(s))

    return all(
        keeps_rows(node, i, edge) for node in t.nodes for i, edge in t.dependent(node).items()
    )


def is_parameter(t: Trace, edge: Edge) -> bool:
    """Whether a parameter is there, or a view of one."""
    node = edge[0]
    while node not in t.names and kind(node) in VIEWS:
        ((node, _),) = t.dependent(node).values()
    return node in t.names


@dataclass(frozen=True)
class Tangents:
    """Directions at a tensor [B, ...], and how it changes along them.

    Attributes:
        values: [O, c, B, ...]; or, if ``by_channel``, [c, B, O, ...]: the tangent of number o of
            O lives in channel o of that tensor alone, so one tensor holds them all.
        by_channel: Which of both.
    """

    values: Tensor
    by_channel: bool

    def spread(self) -> Tangents:
        """The same, [O, c, B, ...]."""
        if not self.by_channel:
            return self
        c, size, channels, *rest = self.values.shape
        spread = self.values.new_zeros(channels, c, size, channels, *rest)
        index = torch.arange(channels, device=spread.device)
        spread[index, :, :, index] = self.values.movedim(2, 0)
        return Tangents(spread, False)

    def broadcast(self, target: tuple[int, ...]) -> Tensor:
        """Spread tangents in a shape that their own broadcasts to: [O, c, *target]."""
        values = self.spread().values
        lead, own = values.shape[:2], values.shape[2:]
        values = values.reshape(*lead, *[1] * (len(target) - len(own)), *own)
        return values.expand(*lead, *target)

    def through(self, rule: Rule) -> Tangents:
        """Carry them through an operation."""
        if self.by_channel and rule.keeps_channels:
            return Tangents(rule.on(self.values), True)
        spread = self.spread().values
        return Tangents(rule.on(spread.flatten(0, 1)).unflatten(0, spread.shape[:2]), False)

    def __add__(self, other: Tangents) -> Tangents:
        if self.by_channel == other.by_channel:
            return Tangents(self.values + other.values, self.by_channel)
        return Tangents(self.spread().values + other.spread().values, False)


class Linearised:
    """Carries rows and tangents along a traced graph, whose inputs do not meet."""

    def __init__(self, t: Trace) -> None:
        self.t = t
        self.rules: dict[tuple[Node, int, int], Rule] = {}
        self.paths: dict[tuple[frozenset[Edge], frozenset[Edge]], list[Step]] = {}

    def carry_back(self, source: Edge, seeds: Tensor, ends: Iterable[Edge]) -> dict[Edge, Tensor]:
        """A row for each of the seeds [c, ...] at the source: [c, ...] at each of the ends."""
        ends = frozenset(ends)
        rows = {source: seeds}
        for step in reversed(self.path(ends, frozenset([source]))):
            found = [(s, rule.back(rows[z])) for s, z, rule in step if z in rows]
            for z in {z for _, z, _ in step} - ends:
                rows.pop(z, None)  # all that was made of it has had its part
            for s, row in found:
                rows[s] = rows[s] + row if s in rows else row
        missing = (end for end in ends if end not in rows)
        rows.update({end: seeds.new_zeros(len(seeds), *shape(end)) for end in missing})
        return {end: rows[end] for end in ends}

    def carry_on(self, start: Edge, seeds: Tangents, ends: Iterable[Edge]) -> dict[Edge, Tangents]:
        """From tangents at the start to tangents at the ends, which all lie behind it."""
        ends = frozenset(ends)
        found = {start: seeds}
        for step in self.path(frozenset([start]), ends):
            for s, z, rule in step:
                tangents = found[s].through(rule)
                found[z] = found[z] + tangents if z in found else tangents
        return {end: found[end] for end in ends}

    def path(self, low: frozenset[Edge], high: frozenset[Edge]) -> list[Step]:
        """The nodes between tensors, in the order of the forward pass."""
        if (low, high) in self.paths:
            return self.paths[low, high]
        t, reached = self.t, set(low)
        leading = {node for node, _ in high}
        for node in reversed(t.nodes):
            if node in leading:
                leading |= {n for n, _ in t.dependent(node).values()}
        steps = []
        for node in t.nodes:
            arguments = [(i, s) for i, s in t.dependent(node).items() if s in reached]
            if node in leading and arguments:
                users = [user for user in t.users[node] if user[0] in leading]
                used = {user.next_functions[j] for user, j in users} | high
                results = [(node, k) for n, k in used if n is node]
                reached.update(results)
                steps.append(
                    [(s, z, self.rule(node, i, z[1])) for i, s in arguments for z in results]
                )
        self.paths[low, high] = steps
        return steps

    def rule(self, node: Node, i: int, k: int) -> Rule:
        """From argument i of a node to its result k."""
        if (node, i, k) not in self.rules:
            self.rules[node, i, k] = rule_of(node, i, k, self.t.outputs)
        return self.rules[node, i, k]


Step = list[tuple[Edge, Edge, Rule]]  # argument, result


def rule_of(node: Any, i: int, k: int, like: Tensor) -> Rule:
    """The rule from argument i of a node to its result k; numbers are of the type of ``like``."""
    name, z, s = kind(node), shape((node, k)), shape(node.next_functions[i])
    if is_unitwise(node, i):
        keeps = len(z) >= 2 and z[:2] == s[:2]
        if name in FLAT:
            return Rule(lambda ds: ds.reshape(-1, *z), lambda row: row.reshape(-1, *s), keeps)
        with torch.no_grad():
            known = closed_form(node)
            slope = row_through(node, i, k, like.new_ones(z)) if known is None else known[0]
        return Rule(lambda ds: ds * slope, lambda row: row * slope, keeps)
    if name == "Convolution" and i == 0:
        return convolution(node, s)
    if name == "AvgPool2D" and len(z) == 4:
        return average_pooling(node, s)
    if name == "MaxPool2DWithIndices" and len(z) == 4:
        return max_pooling(node, z, s)
    if (name, i) in (("Addmm", 1), ("Mm", 0)):
        alpha = node._saved_alpha if name == "Addmm" else 1
        weight = alpha * node._saved_mat2.detach()
        return Rule(lambda ds: ds @ weight, lambda row: row @ weight.T)
    return any_operation(node, i, k, like)


def closed_form(node: Any) -> Two | None:
    """The two derivatives of an activation."""
    if kind(node) != "Activation":
        return None
    (s,) = node.saved_tensors
    found: Two = node.curve.slopes(s.detach())
    return found


def merged(function: Map) -> Map:
    """Call a function of a batch with all derivatives of all inputs as one."""
    return lambda d: function(d.flatten(0, 1)).unflatten(0, d.shape[:2])


def convolution(node: Any, s: tuple[int, ...]) -> Rule:
    """By the weights of a convolution."""
    weight = node._saved_weight.detach()
    how = (
        node._saved_stride,
        node._saved_padding,
        node._saved_dilation,
        node._saved_transposed,
        node._saved_output_padding,
        node._saved_groups,
    )

    def back(row: Tensor) -> Tensor:
        for_shape = row.new_empty(1).expand(len(row), *s[1:])
        needed = [True, False, False]
        found: Tensor = torch.ops.aten.convolution_backward(
            row, for_shape, weight, None, *how, needed
        )[0]
        return found

    return Rule(merged(lambda ds: torch.convolution(ds, weight, None, *how)), merged(back))


def average_pooling(node: Any, s: tuple[int, ...]) -> Rule:
    """Averages over windows."""
    how = (
        node._saved_kernel_size,
        node._saved_stride or node._saved_kernel_size,
        node._saved_padding,
        node._saved_ceil_mode,
        node._saved_count_include_pad,
        node._saved_divisor_override,
    )

    def back(row: Tensor) -> Tensor:
        for_shape = row.new_empty(1).expand(len(row), *s[1:])
        found: Tensor = torch.ops.aten.avg_pool2d_backward(row, for_shape, *how)
        return found

    return Rule(merged(lambda ds: torch.nn.functional.avg_pool2d(ds, *how)), merged(back), True)


def max_pooling(node: Any, z: tuple[int, ...], s: tuple[int, ...]) -> Rule:
    """The largest number of every window, where it was found."""
    picked = node._saved_result1.flatten(2)[None]  # [1, B, C, windows]

    def on(ds: Tensor) -> Tensor:
        return torch.take_along_dim(ds.flatten(3), picked, -1).reshape(-1, *z)

    def back(row: Tensor) -> Tensor:
        found = row.new_zeros(len(row), *s).flatten(3)
        found.scatter_add_(3, picked.expand(len(row), -1, -1, -1), row.flatten(3))
        return found.view(-1, *s)

    return Rule(on, back, True)


def any_operation(node: Any, i: int, k: int, like: Tensor) -> Rule:
    """Autograd's rule for rows, and as that is linear, its own derivative for tangents."""

    def back(rows: Tensor) -> Tensor:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where torch has no batched derivative it says so
            return torch.vmap(lambda row: row_through(node, i, k, row))(rows)

    def on(ds: Tensor) -> Tensor:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = like.new_ones(shape((node, k))).requires_grad_()
            found = torch.autograd.grad(
                row_through(node, i, k, row), row, ds, is_grads_batched=True, materialize_grads=True
            )
        return found[0]

    return Rule(on, back)


def row_through(node: Any, i: int, k: int, row: Tensor) -> Tensor:
    """The row at argument i of one node, from a row at its result k, by autograd's rule."""
    rows: list[Tensor | None] = [None] * len(node._input_metadata)
    rows[k] = row
    found = node(*rows)
    found = found[i] if isinstance(found, tuple) else found
    target = shape(node.next_functions[i])
    return row.new_zeros(target) if found is None else sum_to(found[None], target)[0]


def sum_to(rows: Tensor, target: tuple[int, ...]) -> Tensor:
    """Sum rows [c, ...] over the axes broadcast from the target's shape: [c, *target]."""
    extra = rows.ndim - 1 - len(target)
    rows = rows.flatten(1, extra).sum(1) if extra else rows
    axes = [d + 1 for d, n in enumerate(target) if n == 1 != rows.shape[d + 1]]
    return rows.sum(axes, keepdim=True) if axes else rows
