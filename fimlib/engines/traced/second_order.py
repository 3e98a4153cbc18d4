r"""Exact J and S of any network of products and elementwise functions, along autograd's graph.

Let every operation be one of three. *Linear* in all its arguments: sums, convolutions by constant
weights, pooling, views; piecewise, too (ReLU, max). *Elementwise*: z = f(s), or z = f(s, r) for the
product and the quotient of two tensors. A *product* of two factors (a layer of its weight and its
input): linear in each of them, so along a parameter that not both depend on. Then, along one
parameter θᵢ, curvature arises in the elementwise functions alone, and travels on to the outputs
linearly:

    ∂²h^a/∂θᵢ² = Σ_u (∂h^a/∂z_u) (f_ss (∂s_u)² + 2 f_sr ∂s_u ∂r_u + f_rr (∂r_u)²),  ∂ = ∂/∂θᵢ,

u over the units of all of them, all derivatives total. The Jacobian of the units is the same for
all outputs a. Whatever is none of the three is refused.

Much else is computed in such operations (see ``rewrite``): norms, softmax, activations in closed
forms.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from fimlib.derivatives import Block, Derivatives
from fimlib.engines.traced.graph import Edge, Trace, kind, shape, trace
from fimlib.engines.traced.linearised import (
    ELEMENTWISE,
    Linearised,
    Tangents,
    closed_form,
    inputs_are_rows,
    sum_to,
    units_alone,
)
from fimlib.engines.traced.parameters import Reached, places
from fimlib.memory import raise_if_out_of_memory

# Of rows or tangents carried together, and of their results: as much as a cache holds. More
# inputs than that go in pieces.
NUMBERS_AT_A_TIME = 2**22
ROWS_AT_A_TIME = 16  # at least, where there are as many

LINEAR = re.compile(
    r"""Add|Sub|Rsub|Neg|Sum|Mean|Cumsum|Cat|Stack|Where|MaskedFill
    |(Unsafe)?View|ReshapeAlias|T|Transpose|Permute|Expand|Squeeze|Unsqueeze|Clone|Alias|ToCopy
    |Embedding|Repeat|Roll|Flip|AsStrided|Unfold|Im2Col|Col2Im|PixelShuffle|PixelUnshuffle
    |Index|IndexSelect|Select|Slice|Gather|Unbind|Split|SplitWithSizes|Diagonal|Trace|Triu|Tril
    |ConstantPadNd|(Reflection|Replication)Pad[123]D|Upsample\w+|(Mkldnn)?(Adaptive)?AvgPool[23]D
    |Relu|LeakyRelu|Threshold|Hardtanh|Hardsigmoid|Softshrink|Hardshrink|RreluWithNoise|Abs
    |Sign|Sgn|Round|Floor|Ceil|Trunc|Copy|IndexCopy|DiagEmbed|(Native)?ChannelShuffle
    |Clamp|ClampMin|ClampMax|Maximum|Minimum|Max|Min|Amax|Amin|Median|Topk|Sort
    |(Adaptive)?MaxPool[23]D(WithIndices)?""",
    re.VERBOSE | re.IGNORECASE,
)
# Positions of the two factors; any other argument is added.
PRODUCTS = {
    "Mm": (0, 1),
    "Bmm": (0, 1),
    "Mv": (0, 1),
    "Dot": (0, 1),
    "Vdot": (0, 1),
    "Addmm": (1, 2),
    "Addmv": (1, 2),
    "Baddbmm": (1, 2),
    "Convolution": (0, 1),
    "NativeBatchNorm": (0, 1),
    "PreluKernel": (0, 1),
}


@dataclass(frozen=True)
class Bend:
    """Curvature of an elementwise z = f(s, r): ``factor · ∂s_u ∂r_u`` is added to ∂²z_u."""

    z: Edge
    s: Edge
    r: Edge
    factor: Tensor


def differentiate(
    model: nn.Module, x: Tensor, *, order: int = 2, wanted: frozenset[str] | None = None
) -> Derivatives:
    """J and S from one graph for all inputs, or from one for each piece of them.

    See ``fimlib.differentiate``.
    """
    t, size = trace(model, x, wanted), len(x)
    if (root := t.root) is None:
        return Derivatives(t.outputs.detach(), tuple(no_part(t, order)))
    check_nodes(t)
    bends = [bend for node in t.nodes for bend in curvature(t, node)] if order == 2 else []
    found = places(t, size)
    net = Linearised(t)
    at_once = inputs_at_once(net, root, bends, found)
    if at_once < size:
        del t, net, bends, found
        pieces = x.split(at_once)
        return stack([differentiate(model, piece, order=order, wanted=wanted) for piece in pieces])
    ends = list(dict.fromkeys([p.edge for p in found] + [bend.z for bend in bends]))
    eye = torch.eye(t.outputs.shape[1], dtype=t.outputs.dtype, device=t.outputs.device)
    rows = net.carry_back(root, eye[:, None].expand(-1, size, -1), ends)
    J = {p: p.pull(rows[p.edge], 1).transpose(0, 1) for p in found}
    check_first(t, J)
    weights = {bend: (rows[bend.z] * bend.factor).reshape(len(eye), size, -1) for bend in bends}
    del rows
    S = second_order(net, J, weights) if order == 2 else {}
    blocks = [Block(p.layer, J[p], S.get(p), p.inputs) for p in found] + list(no_part(t, order))
    names = [name for name, _ in model.named_parameters()]
    blocks.sort(key=lambda block: min(map(names.index, block.inputs)))
    return Derivatives(t.outputs.detach(), tuple(blocks))


def no_part(t: Trace, order: int) -> Iterator[Block]:
    """Zeros for the parameters that the outputs do not depend on."""
    for name, parameter in t.unused.items():
        zero = parameter.new_zeros(()).expand(*t.outputs.shape, *parameter.shape)
        yield Block(name.rpartition(".")[0], zero, zero if order == 2 else None, {name: None})


def inputs_at_once(net: Linearised, root: Edge, bends: list[Bend], found: list[Reached]) -> int:
    """How many inputs to differentiate together: 1 if their graph mixes them up."""
    t = net.t
    size, num_outputs = t.outputs.shape
    if size > 1 and not inputs_stay_apart(net, root, bends, found):
        return 1
    ends = {p.edge for p in found} | {bend.s for bend in bends}
    numbers = sum(prod(shape(end)) for end in ends) // size
    num_rows = ROWS_AT_A_TIME if bends else num_outputs / 2
    num_pieces = ceil(size * num_rows * numbers / limit(t))
    return ceil(size / max(1, num_pieces))


def limit(t: Trace) -> int:
    """How many numbers to work on at a time: a GPU needs more to be busy."""
    return NUMBERS_AT_A_TIME * (16 if t.outputs.is_cuda else 1)


def stack(alone: list[Derivatives]) -> Derivatives:
    """Derivatives at several inputs, joined from pieces."""
    found = [{tuple(block.inputs): block for block in d.blocks} for d in alone]
    forms = [{(n, z is None) for b in d.blocks for n, z in b.inputs.items()} for d in alone]
    if any(b.keys() != found[0].keys() for b in found) or any(f != forms[0] for f in forms):
        raise NotImplementedError(
            "the network uses its parameters differently at different inputs: differentiate at "
            "each input alone."
        )

    def cat(names: tuple[str, ...]) -> Block:
        same = [blocks[names] for blocks in found]
        factors = {n: [z for b in same if (z := b.inputs[n]) is not None] for n in names}
        inputs = {n: torch.cat(zs) if zs else None for n, zs in factors.items()}
        seconds = [b.S for b in same if b.S is not None]
        S = torch.cat(seconds) if seconds else None
        return Block(same[0].layer, torch.cat([b.J for b in same]), S, inputs)

    return Derivatives(torch.cat([d.outputs for d in alone]), tuple(map(cat, found[0])))


def check_first(t: Trace, J: dict[Reached, Tensor]) -> None:
    """Derivatives must be finite, and of their parameter's shape or they belong to another."""
    leaves = {name: leaf for leaf, name in t.names.items()}
    for p, left in J.items():
        if not torch.isfinite(left).all():
            raise ValueError(
                f"the outputs have no finite derivative with respect to {', '.join(p.inputs)} at "
                "this input."
            )
        for name, z in p.inputs.items():
            found = (*left.shape[2:], *(() if z is None else z.shape[1:]))
            if found != shape((leaves[name], 0)):
                raise NotImplementedError(
                    f"the derivatives of parameter {name!r} come in shape {list(found)}: use it as "
                    "it is, without a view."
                )


def check_nodes(t: Trace) -> None:
    """Refuse functions that change the precision, mix the inputs, or have no true gradient."""
    for node in t.nodes:
        if getattr(node, "_saved_training", False):
            raise t.refusal(node, "it normalises by the statistics of the batch.")
        others = {m.dtype for m in node._input_metadata} - {t.outputs.dtype, torch.int64}
        if others:
            raise t.refusal(node, f"it changes the type of the numbers to {others.pop()}.")


def curvature(t: Trace, node: Any) -> list[Bend]:
    """The curvature that a node adds, none for a linear one or a product.

    Raises:
        NotImplementedError: it is something else, or both factors depend on the same parameter.
    """
    name, arguments, z = kind(node), t.dependent(node), (node, 0)
    if LINEAR.fullmatch(name):
        return []
    if name == "Pow":
        return power(t, node, arguments)
    if ELEMENTWISE.fullmatch(name) and len(arguments) == 1:
        (s,) = arguments.values()
        if shape(s) == shape(z):
            second = second_derivative(t, node, s)
            return [] if second is None else [Bend(z, s, s, second)]
    if name == "Mul":
        if not shared(t, arguments):
            return []
        twice = t.outputs.new_full(shape(z), 2.0)
        return [Bend(z, arguments[0], arguments[1], twice)]
    if name == "Div":
        return quotient(t, node, arguments)
    if name in PRODUCTS:
        common = shared(t, {i: arguments[i] for i in PRODUCTS[name] if i in arguments})
        if not common:
            return []
        why = f"both factors of this product depend on parameter {min(common)!r}."
        raise t.refusal(node, why)
    raise t.refusal(node, "second derivatives of this operation are not known.")


def shared(t: Trace, factors: dict[int, Edge]) -> frozenset[str]:
    """Parameters on which both of two factors depend."""
    if len(factors) < 2:
        return frozenset()
    first, second = (t.ancestors[node] for node, _ in factors.values())
    return first & second


def second_derivative(t: Trace, node: Node, s: Edge) -> Tensor | None:
    """f''(s) of an elementwise z = f(s): known, or from differentiating autograd's rule for f'.

    None is 0 everywhere.
    """
    if (known := closed_form(node)) is not None:
        return known[1]
    end, weight = [GradientEdge(*s)], [t.outputs.new_ones(shape((node, 0)))]
    source = [GradientEdge(node, 0)]
    try:
        (first,) = torch.autograd.grad(source, end, weight, create_graph=True)
        second = torch.zeros_like(first)
        if first.requires_grad:
            (found,) = torch.autograd.grad(first, end, weight, retain_graph=True, allow_unused=True)
            second = second if found is None else found
    except RuntimeError as error:
        raise_if_out_of_memory(error)
        raise t.refusal(node, f"autograd cannot differentiate it twice ({error}).") from error
    if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
        raise ValueError(f"{t.made[node]} has no finite derivative at this input.")
    return second


def quotient(t: Trace, node: Any, arguments: dict[int, Edge]) -> list[Bend]:
    """Curvature of z = s / r: −2/r² between the two, 2s/r³ in r."""
    if 1 not in arguments or getattr(node, "_saved_rounding_mode", None):
        return []  # a rounded quotient is piecewise constant
    z, s, r = (node, 0), node._saved_self.detach(), node._saved_other.detach()
    bends = [Bend(z, arguments[1], arguments[1], (2 * s / r**3).expand(shape(z)))]
    if shared(t, arguments):
        bends.append(Bend(z, arguments[0], arguments[1], (-2 / r**2).expand(shape(z))))
    return bends


def power(t: Trace, node: Any, arguments: dict[int, Edge]) -> list[Bend]:
    """Curvature of z = s^r: r(r − 1)s^(r−2), s^(r−1)(1 + r log s) between the two, z log² s."""
    saved = (node._saved_self, node._saved_exponent)  # tensors or numbers
    if not isinstance(saved[0], Tensor):  # autograd counts tensors alone
        arguments = {1: arguments[0]}
    dtype, device = t.outputs.dtype, t.outputs.device
    s, r = (torch.as_tensor(v, dtype=dtype, device=device).detach() for v in saved)
    log = torch.special.xlogy  # 0 at 0, for any second argument
    factors = {
        (0, 0): torch.where(r * (r - 1) == 0, 0.0, r * (r - 1) * s ** (r - 2)),
        (0, 1): torch.where(r == 0, 0.0, s ** (r - 1)) + log(r * s ** (r - 1), s),
        (1, 1): log(log(s**r, s), s),
    }
    is_crossed = bool(shared(t, arguments))
    found = []
    for (i, j), factor in factors.items():
        if i in arguments and j in arguments and (i == j or is_crossed):
            if not torch.isfinite(factor).all():
                raise ValueError(f"{t.made[node]} has no finite derivative at this input.")
            factor = (2 * factor if i != j else factor).expand(shape((node, 0)))
            found.append(Bend((node, 0), arguments[i], arguments[j], factor))
    return found


def second_order(
    net: Linearised, J: dict[Reached, Tensor], weights: dict[Bend, Tensor]
) -> dict[Reached, Tensor]:
    """S, out of the curvature of all units; weights are factor · ∂h/∂z, [T, B, U].

    There are three ways to the squares of ∂s/∂θ. Where each unit depends on one number of a place
    alone, weights go there and are pulled. Else rows are carried back from every unit, or tangents
    on from every number of the place: whatever is fewer.
    """
    t, S = net.t, {p: J[p].new_zeros(J[p].shape) for p in J}
    bends = {bend: weight for bend, weight in weights.items() if weight.any()}
    from_units: dict[Bend, list[Reached]] = defaultdict(list)
    for edge in dict.fromkeys(p.edge for p in J):
        here = [p for p in J if p.edge == edge]
        alone = units_alone(t, edge)
        far = []
        for bend, weight in bends.items():
            if not t.ancestors[bend.s[0]] & t.ancestors[bend.r[0]] & here[0].inputs.keys():
                continue
            is_spread = shape(bend.s) != shape(bend.z) or shape(bend.r) != shape(bend.z)
            if bend.s[0] in alone and bend.r[0] in alone and not is_spread:
                pull_weights(net, bend, weight, edge, {p: S[p] for p in here})
            else:
                far.append(bend)
        numbers = sum(J[p][0, 0].numel() for p in here)
        if tangents_are_fewer(numbers, sum(bends[bend].shape[2] for bend in far)):
            carry_tangents(net, {b: bends[b] for b in far}, edge, {p: S[p] for p in here})
        else:
            for bend in far:
                from_units[bend] += here
    for bend, upstream in from_units.items():
        carry_rows(net, bend, bends[bend], {p: S[p] for p in upstream})
    return S


def tangents_are_fewer(num_numbers: int, num_units: int) -> bool:
    """Whether tangents from the numbers of a place cost less than rows from the units behind it."""
    return num_numbers < num_units


def pull_weights(
    net: Linearised, bend: Bend, weight: Tensor, edge: Edge, S: dict[Reached, Tensor]
) -> None:
    """Add the curvature of units that depend on the numbers at the edge one by one."""
    slopes = [
        net.carry_back(e, weight.new_ones(1, *shape(e)), [edge])[edge] for e in {bend.s, bend.r}
    ]
    own = weight.reshape(len(weight), *shape(edge)) * slopes[0] * slopes[-1]
    for p in S:
        S[p] += p.pull(own, 2).transpose(0, 1)


def carry_rows(net: Linearised, bend: Bend, weight: Tensor, S: dict[Reached, Tensor]) -> None:
    """Add the curvature of units from each of which a row is carried back."""
    _, size, num_units = weight.shape
    ends = list(dict.fromkeys(p.edge for p in S))
    numbers = sum(prod(shape(end)) for end in ends) + max(S[p][:, 0].numel() for p in S)
    units = weight.flatten(0, 1).any(0).nonzero()[:, 0]
    for chunk in units.split(max(1, limit(net.t) // numbers)):
        seeds = weight.new_zeros(len(chunk), size, num_units)
        seeds[torch.arange(len(chunk), device=chunk.device), :, chunk] = 1
        seeds = seeds.reshape(len(chunk), *shape(bend.z))
        ds = net.carry_back(bend.s, sum_to(seeds, shape(bend.s)), ends)
        dr = ds if bend.r == bend.s else net.carry_back(bend.r, sum_to(seeds, shape(bend.r)), ends)
        for p in S:
            squares = p.pull(ds[p.edge], 1)
            squares = squares * (squares if dr is ds else p.pull(dr[p.edge], 1))
            S[p] += torch.einsum("tbc,cb...->bt...", weight[..., chunk], squares)


def carry_tangents(
    net: Linearised, bends: dict[Bend, Tensor], edge: Edge, S: dict[Reached, Tensor]
) -> None:
    """Add the curvature of units to which a tangent is carried from each number at the edge."""
    ends = {end for bend in bends for end in (bend.s, bend.r)}
    for p, total in S.items():
        size, num_outputs, *numbers = total.shape
        channels = numbers[0] if p.by_channel else 1
        total = total.view(size, num_outputs, channels, -1)
        width = prod(shape(edge)) + channels * sum(w[0].numel() for w in bends.values())
        every = torch.arange(total.shape[-1], device=total.device)
        for chunk in every.split(max(1, limit(net.t) // width)):
            found = net.carry_on(edge, p.push(chunk, S[p]), ends)
            for bend, weight in bends.items():
                ds, dr = found[bend.s], found[bend.r]
                total[..., chunk] += weighted_squares(weight, ds, dr, shape(bend.z))


def weighted_squares(weight: Tensor, ds: Tangents, dr: Tangents, units: tuple[int, ...]) -> Tensor:
    """Σ_u weight_u ∂s_u ∂r_u over tangents, with units of the given shape: [B, T, O, c]."""
    if ds.by_channel and dr.by_channel and ds.values.shape[1:] == dr.values.shape[1:] == units:
        squares = (ds.values * dr.values).flatten(3)
        by_channel = weight.unflatten(2, (units[1], -1))
        if squares.ndim == 3:
            squares = squares[..., None]
        return torch.einsum("tbol,cbol->btoc", by_channel, squares)
    ds, dr = ds.spread(), dr.spread()
    squares = (ds.broadcast(units) * dr.broadcast(units)).reshape(
        *ds.values.shape[:2], *weight.shape[1:]
    )
    return torch.einsum("tbu,ocbu->btoc", weight, squares)


def inputs_stay_apart(net: Linearised, root: Edge, bends: list[Bend], found: list[Reached]) -> bool:
    """Whether the first axis of all tensors that matter counts the inputs, and none meets another.

    Every two inputs differ in a bit of their numbers. Random rows at all units of the inputs with
    (or without) that bit must not reach the others.
    """
    t, size = net.t, len(net.t.outputs)
    sources = list(dict.fromkeys([root, *(e for bend in bends for e in (bend.s, bend.r))]))
    ends = list(dict.fromkeys([*sources, *(b.z for b in bends), *(p.edge for p in found)]))
    if any(not shape(e) or shape(e)[0] % size or e[0] in t.names for e in ends):
        return False
    number = torch.arange(size, device=t.outputs.device)
    bits = torch.stack([number >> k & 1 for k in range((size - 1).bit_length())])
    kept = torch.cat([bits, 1 - bits])  # [masks, B]
    generator = torch.Generator("cpu").manual_seed(0)  # the same numbers on every device
    if inputs_are_rows(t, size):
        return True
    is_other = kept[..., None] == 0
    for source in sources:
        noise = torch.rand(shape(source), generator=generator, device="cpu") + 0.5
        seeds = kept[..., None] * noise.view(size, -1).to(t.outputs)
        rows = net.carry_back(source, seeds.view(len(kept), *shape(source)), ends)
        met = [((r.reshape(*kept.shape, -1) != 0) & is_other).any() for r in rows.values()]
        if met and torch.stack(met).any():  # one look at the device for all
            return False
    return True
