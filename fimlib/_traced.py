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
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from fimlib._places import Place, places, shape, sum_to
from fimlib._trace import REMEDY, Edge, Trace, kind, trace
from fimlib.derivatives import Block, Derivatives, check_alone

NUMBERS_AT_A_TIME = 2**20  # of rows carried back together, and of what they become: 8 MB each

LINEAR = re.compile(
    r"""Add|Sub|Rsub|Neg|Sum|Mean|Cumsum|Cat|Stack|Where|MaskedFill
    |(Unsafe)?View|ReshapeAlias|T|Transpose|Permute|Expand|Squeeze|Unsqueeze|Clone
    |Alias|ToCopy|Repeat|Roll|Flip|AsStrided|Unfold|Im2Col|Col2Im|PixelShuffle|PixelUnshuffle
    |Index|IndexSelect|Select|Slice|Gather|Unbind|Split|SplitWithSizes|Diagonal|Trace|Triu|Tril
    |ConstantPadNd|(Reflection|Replication)Pad[123]D|Upsample\w+|(Mkldnn)?(Adaptive)?AvgPool[23]D
    |Relu|LeakyRelu|Threshold|Hardtanh|Hardsigmoid|Softshrink|Hardshrink|RreluWithNoise|Abs
    |Clamp|ClampMin|ClampMax|Maximum|Minimum|Max|Min|Amax|Amin|Median|Topk|Sort
    |(Adaptive)?MaxPool[23]D(WithIndices)?""",
    re.VERBOSE | re.IGNORECASE,
)
ELEMENTWISE = re.compile(
    r"""Sigmoid|LogSigmoid|Tanh|Softplus|Gelu|Silu|Mish|Elu|Celu|Hardswish|Exp|Exp2|Expm1|Log|Log2
    |Log10|Log1p|Sin|Cos|Tan|Sinh|Cosh|Asin|Acos|Atan|Asinh|Acosh|Atanh|Sqrt|Rsqrt|Pow
    |Reciprocal|Erf|Erfc|Erfinv|Logit|Lgamma|Digamma""",
    re.VERBOSE | re.IGNORECASE,
)
# Positions of the two factors; any other argument is added.
PRODUCTS = {
    "Mm": (0, 1),
    "Bmm": (0, 1),
    "Mv": (0, 1),
    "Dot": (0, 1),
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


def differentiate(model: nn.Module, x: Tensor) -> Derivatives:
    """J and S along the graph of the model's forward pass; see ``fimlib.differentiate``."""
    try:
        derivs = along_graph(model, x)
        if derivs is None:
            alone = (along_graph(model, one) for one in x.split(1))
            derivs = stack([d for d in alone if d is not None])
    except (ValueError, NotImplementedError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a forward pass may hold that this engine never met
        raise NotImplementedError(
            f"the traced engine cannot follow the forward pass of {type(model).__name__}: "
            f"{type(error).__name__}: {error}. {REMEDY}"
        ) from error
    check_alone(model, x, derivs.outputs)
    return derivs


def stack(alone: list[Derivatives]) -> Derivatives:
    """Derivatives at several inputs out of those at each one."""
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
        J, S = torch.cat([b.J for b in same]), torch.cat([b.S for b in same])
        return Block(same[0].layer, J, S, inputs)

    return Derivatives(torch.cat([d.outputs for d in alone]), tuple(map(cat, found[0])))


def along_graph(model: nn.Module, x: Tensor) -> Derivatives | None:
    """J and S from one graph for all inputs; None if that graph mixes up several inputs."""
    t, size = trace(model, x), len(x)
    bends = [bend for node in t.nodes for bend in curvature(t, node)]
    found = places(t, size)
    if size > 1 and not inputs_stay_apart(t, bends, found):
        return None
    ends = list(dict.fromkeys([p.edge for p in found] + [bend.z for bend in bends]))
    eye = torch.eye(t.outputs.shape[1], dtype=x.dtype, device=x.device)
    rows = carry_back(t.root, eye[:, None].expand(-1, size, -1), ends)
    J = {p: p.pull(rows[p.edge], 1).transpose(0, 1) for p in found}
    check_shapes(t, J)
    S = {p: torch.zeros_like(J[p]) for p in found}
    for bend in bends:
        weight = (rows[bend.z] * bend.factor).reshape(len(eye), size, -1)
        if weight.any():
            add_curvature(t, bend, weight, S)
    return Derivatives(
        t.outputs.detach(), tuple(Block(p.layer, J[p], S[p], p.inputs) for p in found)
    )


def check_shapes(t: Trace, J: dict[Place, Tensor]) -> None:
    """Derivatives must have the shape of their parameter, or they belong to something else."""
    leaves = {name: leaf for leaf, name in t.names.items()}
    for p, left in J.items():
        for name, z in p.inputs.items():
            found = (*left.shape[2:], *(() if z is None else z.shape[1:]))
            if found != shape((leaves[name], 0)):
                raise NotImplementedError(
                    f"the derivatives of parameter {name!r} come in shape {list(found)}: use it as "
                    "it is, without a view."
                )


def carry_back(source: Edge, seeds: Tensor, ends: list[Edge]) -> dict[Edge, Tensor]:
    """One row of derivatives for each of the seeds [c, ...] at the source: [c, ...] at the ends.

    The inputs of a batch do not meet, so one pass carries a row for each of them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where torch has no batched derivative it says so
        found = torch.autograd.grad(
            [GradientEdge(*source)],
            [GradientEdge(*end) for end in ends],
            [seeds],
            is_grads_batched=True,
            retain_graph=True,
            allow_unused=True,
        )
    shapes = ((len(seeds), *shape(end)) for end in ends)
    return {
        end: seeds.new_zeros(s) if row is None else row
        for end, row, s in zip(ends, found, shapes, strict=True)
    }


def curvature(t: Trace, node: Any) -> list[Bend]:
    """The curvature that a node adds, none for a linear one or a product.

    Raises:
        NotImplementedError: it is something else, or both factors depend on the same parameter.
    """
    name, arguments, z = kind(node), t.dependent(node), (node, 0)
    others = {m.dtype for m in node._input_metadata} - {t.outputs.dtype, torch.int64}
    if others:
        raise t.refusal(node, f"it changes the type of the numbers to {others.pop()}.")
    if LINEAR.fullmatch(name):
        return []
    if ELEMENTWISE.fullmatch(name) and len(arguments) == 1:
        (s,) = arguments.values()
        if shape(s) == shape(z):
            return [Bend(z, s, s, second_derivative(t, node, s))]
    if name == "Mul":
        if not shared(t, arguments):
            return []
        return [Bend(z, arguments[0], arguments[1], 2 * ones(z, t.outputs))]
    if name == "Div":
        return quotient(t, node, arguments)
    if name in PRODUCTS and not getattr(node, "_saved_training", False):
        common = shared(t, {i: arguments[i] for i in PRODUCTS[name] if i in arguments})
        if not common:
            return []
        raise t.refusal(node, f"both factors of this product depend on parameter {min(common)!r}.")
    raise t.refusal(node, "second derivatives of this operation are not known.")


def shared(t: Trace, factors: dict[int, Edge]) -> frozenset[str]:
    """Parameters on which both of two factors depend."""
    if len(factors) < 2:
        return frozenset()
    first, second = (t.ancestors[node] for node, _ in factors.values())
    return first & second


def ones(edge: Edge, like: Tensor) -> Tensor:
    """Ones in the shape of the tensor at the edge."""
    return like.new_ones(shape(edge))


def second_derivative(t: Trace, node: Node, s: Edge) -> Tensor:
    """f''(s) of an elementwise z = f(s), by differentiating autograd's own rule for f'."""
    end, weight = [GradientEdge(*s)], [ones((node, 0), t.outputs)]
    source = [GradientEdge(node, 0)]
    try:
        (first,) = torch.autograd.grad(source, end, weight, create_graph=True)
        second = torch.zeros_like(first)
        if first.requires_grad:
            (found,) = torch.autograd.grad(first, end, weight, retain_graph=True, allow_unused=True)
            second = second if found is None else found
    except RuntimeError as error:
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


def add_curvature(t: Trace, bend: Bend, weight: Tensor, S: dict[Place, Tensor]) -> None:
    """Add to S what the units of one elementwise function bend; weight is factor · ∂h/∂z."""
    num_outputs, size, num_units = weight.shape
    below = t.ancestors[bend.s[0]] & t.ancestors[bend.r[0]]
    upstream = [p for p in S if below & p.inputs.keys()]
    for p in upstream:
        if p.edge == bend.s == bend.r:  # ∂s/∂s: one-hot rows
            own = weight.reshape(num_outputs, *shape(p.edge))
            S[p] += p.pull(own, 2).transpose(0, 1)
    upstream = [p for p in upstream if not p.edge == bend.s == bend.r]
    ends = list({p.edge: None for p in upstream})
    if not ends:
        return
    numbers = sum(prod(shape(end)) for end in ends) + max(S[p][:, 0].numel() for p in upstream)
    units = weight.flatten(0, 1).any(0).nonzero()[:, 0]
    for chunk in units.split(max(1, NUMBERS_AT_A_TIME // numbers)):
        seeds = weight.new_zeros(len(chunk), size, num_units)
        seeds[torch.arange(len(chunk), device=chunk.device), :, chunk] = 1
        seeds = seeds.reshape(len(chunk), *shape(bend.z))
        ds = carry_back(bend.s, sum_to(seeds, shape(bend.s)), ends)
        dr = ds if bend.r == bend.s else carry_back(bend.r, sum_to(seeds, shape(bend.r)), ends)
        for p in upstream:
            squares = p.pull(ds[p.edge], 1)
            squares = squares * (squares if dr is ds else p.pull(dr[p.edge], 1))
            S[p] += torch.einsum("tbc,cb...->bt...", weight[..., chunk], squares)


def inputs_stay_apart(t: Trace, bends: list[Bend], found: list[Place]) -> bool:
    """Whether the first axis of all tensors that matter counts the inputs, and none meets another.

    Every two inputs differ in a bit of their numbers. Random rows at all units of the inputs with
    (or without) that bit must not reach the others.
    """
    size = len(t.outputs)
    sources = list(dict.fromkeys([t.root, *(e for bend in bends for e in (bend.s, bend.r))]))
    ends = list(dict.fromkeys([*sources, *(b.z for b in bends), *(p.edge for p in found)]))
    if any(not shape(e) or shape(e)[0] % size or e[0] in t.names for e in ends):
        return False
    number = torch.arange(size, device=t.outputs.device)
    bits = torch.stack([number >> k & 1 for k in range((size - 1).bit_length())])
    kept = torch.cat([bits, 1 - bits])  # [masks, B]
    generator = torch.Generator("cpu").manual_seed(0)  # the same numbers on every device
    for source in sources:
        noise = torch.rand(shape(source), generator=generator, device="cpu") + 0.5
        seeds = kept[..., None] * noise.view(size, -1).to(t.outputs)
        rows = carry_back(source, seeds.view(len(kept), *shape(source)), ends)
        if any(row.reshape(*kept.shape, -1)[kept == 0].any() for row in rows.values()):
            return False
    return True
