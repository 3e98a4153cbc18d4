r"""J of any network by plain backward passes to the places where its parameters enter (Section 3).

A weight enters by a product s = W z, a bias by a sum. From the row ∂h^a/∂s at the result follows

    ∂h^a/∂W = Σ_r (∂h^a/∂s_r) ⊗ z_r,

r over the rows of s that belong to one input: its positions in a sequence or an image. One backward
pass for every output a, through the whole batch, carries these rows to all places at once. Autograd
does that, so the operations between need no rules here. The derivatives of a parameter that enters
in several places add up.

Autograd also shows to which input a row belongs: if the row of input b at the outputs is multiplied
by a number c_b, every row of s is multiplied by the c_b of its own input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from fimlib.derivatives import Block, Derivatives, Share, Sweep
from fimlib.engines import functional
from fimlib.engines.checks import short
from fimlib.engines.layerwise import identity
from fimlib.engines.model import exact_kernels
from fimlib.engines.traced.graph import Edge, kind, made_by, shape, walk
from fimlib.engines.traced.linearised import VIEWS
from fimlib.engines.traced.parameters import Place, place, through_views
from fimlib.memory import raise_if_out_of_memory

NUMBERS_AT_A_TIME = 2**20  # of J that are computed together: as fit in a cache
MOST_STEPS = 16  # from a parameter to what is computed of it, and to the network

# Operations that only rearrange a parameter or select a part of it.
PARTS = (*VIEWS, "Alias", "Clone", "Split", "SplitWithSizes", "Slice", "Select", "Unbind")


# From rows to inputs.


@dataclass(frozen=True)
class Layout:
    """N rows in the order [outer, B, inner].

    Attributes:
        size: B.
        inner: Rows of the same input that follow each other.
    """

    size: int
    inner: int

    def by_input(self, rows: Tensor, dim: int) -> Tensor:
        """Rows along an axis, to [B, L] in its place."""
        rows = rows.unflatten(dim, (-1, self.size, self.inner))
        return rows.movedim(dim, dim + 1).flatten(dim + 1, dim + 2)


def layout_of(plain: Tensor, weighted: Tensor, weights: Tensor) -> Layout | None:
    """To which input each row belongs; None if to several, or if they lie in no regular order.

    Args:
        plain: Rows carried back from random ones at the outputs, [N, ...].
        weighted: The same, after the rows of input b were multiplied by weights[b].
        weights: [B], all different.
    """
    size, count = len(weights), len(plain)
    if count == 0 or count % size:
        return None
    g, found = (rows.reshape(count, -1) for rows in (plain, weighted))
    length = torch.linalg.vector_norm(g, dim=1)
    eps = torch.finfo(plain.dtype).eps
    slack = eps**0.5 * length + 2**6 * eps * length.amax()
    each = count // size
    for inner in dict.fromkeys([each, 1, *(n for n in range(2, each) if each % n == 0)]):
        layout = Layout(size, inner)
        own = weights.repeat_interleave(inner).repeat(each // inner)
        off = torch.addcmul(found, own[:, None], g, value=-1)
        if bool((torch.linalg.vector_norm(off, dim=1) <= slack).all()):
            return layout
    return None


class Probe:
    """Two backward passes with random rows; in the second, the row of input b is multiplied by c_b.

    Attributes:
        h: The outputs, [B, T], with their graph.
        weights: c_b, [B].
    """

    def __init__(self, h: Tensor) -> None:
        generator = torch.Generator("cpu").manual_seed(0)  # not the caller's
        size, num_outputs = h.shape
        noise = torch.rand(size + num_outputs, generator=generator, device="cpu").to(h) + 1
        self.h, (self.weights, row) = h, noise.split([size, num_outputs])
        self.seeds = row.expand(size, -1), self.weights[:, None] * row

    def __call__(self, places: Sequence[Place]) -> Iterator[Layout | None]:
        """The layout of the rows at each of the places; None where they mix the inputs."""
        edges = {p.edge: GradientEdge(*p.edge) for p in places}
        plain, weighted = (
            dict(zip(edges, backward(self.h, list(edges.values()), seed), strict=True))
            for seed in self.seeds
        )
        for p in places:
            here, there = (p.rows(g[p.edge][None])[0] for g in (plain, weighted))
            yield layout_of(here, there, self.weights)


def backward(h: Tensor, edges: list[GradientEdge], seed: Tensor) -> tuple[Tensor, ...]:
    """One backward pass, from a number: given a tensor, torch would import sympy first."""
    return torch.autograd.grad((h * seed).sum(), edges, retain_graph=True)


class Search:
    """All places of one parameter, found step by step.

    A tensor computed from parameters alone, such as a normalised weight, belongs to no single
    input. It counts as a view of the parameter, and the operations that use it may be places.

    Attributes:
        found: The places, and the layouts of their rows.
        ends: Views whose users are still to be searched.
        is_lost: Whether the parameter enters in a way that is not known.
    """

    def __init__(self, leaf: Node, root: Node, users: Mapping[Node, list[Edge]]) -> None:
        self.root, self.users = root, users
        self.found: dict[Place, Layout] = {}
        self.ends: list[list[Edge]] = [[(leaf, 0)]]
        self.seen: set[Edge] = set()
        self.is_lost = False

    def candidates(self, *, is_single: bool) -> list[Place]:
        """Known operations that use the views; of the others the results become views."""
        found = []
        while self.ends:
            views = self.ends.pop()
            for op, i in self.users[views[-1][0]]:
                if op.next_functions[i] != views[-1]:
                    continue
                known = None if kind(op) in PARTS else place(views, op, i)
                if known is not None:
                    found.append(known)
                elif is_single and kind(op) not in PARTS:
                    self.is_lost = True  # one input alone shows no batch axis
                else:
                    self.extend(views, op)
        return found

    def extend(self, views: list[Edge], op: Node) -> None:
        """The results of an operation are views, each once."""
        for k in range(len(op._input_metadata)):
            if (op, k) not in self.seen:
                self.seen.add((op, k))
                self.ends.append([*views, (op, k)])
        self.is_lost |= op is self.root

    def decide(self, candidate: Place, layout: Layout | None) -> None:
        """Take a place, or go behind it."""
        if layout is None:
            self.extend(candidate.views, candidate.edge[0])
        else:
            self.found[candidate] = layout


def locate(h: Tensor, leaves: Mapping[str, Node]) -> dict[str, dict[Place, Layout] | None]:
    """The places of every parameter; None where one of them is not known."""
    nodes, users = walk(h.grad_fn)
    present, probe = set(nodes), Probe(h)
    searches = {n: Search(leaf, nodes[-1], users) for n, leaf in leaves.items() if leaf in present}
    active = list(searches.values())
    for _ in range(MOST_STEPS):
        asked = [(s, p) for s in active for p in s.candidates(is_single=len(h) == 1)]
        if not asked:
            break
        for (search, p), layout in zip(asked, probe([p for _, p in asked]), strict=True):
            search.decide(p, layout)
        active = [s for s in active if s.ends and not s.is_lost]
    unknown = {id(s) for s in active if s.ends} | {id(s) for s in searches.values() if s.is_lost}
    return {
        n: {} if n not in searches else None if id(searches[n]) in unknown else searches[n].found
        for n in leaves
    }


@dataclass(frozen=True, eq=False)
class Entrance:
    """One place of a parameter, with the rows there or the derivatives made from them.

    Attributes:
        place: The place.
        rows: [A, B, L, ...]; or derivatives in the view already, [B, A, *view].
        z: The factor of the rows, [B, L, ...]; None for 1.
        is_pulled: Whether ``rows`` holds derivatives, where these need less memory.
    """

    place: Place
    rows: Tensor
    z: Tensor | None
    is_pulled: bool

    def at(self, inputs: slice | Tensor) -> Entrance:
        """The same at some of the inputs, with its factor as the place takes it."""
        if self.is_pulled:
            return replace(self, rows=self.rows[inputs])
        z = None if self.z is None else self.place.prepare(self.z[inputs])
        return replace(self, rows=self.rows[:, inputs], z=z)

    def derivatives(self, part: slice = slice(None)) -> Tensor:
        """Of the outputs in the parameter, [b, A, *shape], where it is ``at`` some inputs.

        Or in a part of it along its first axis, where the place is by row.
        """
        if self.is_pulled:
            return through_views(self.place.views, self.rows)
        rows = self.rows[:, :, :, part] if self.place.is_by_row else self.rows
        return through_views(self.place.views, self.place.pull(rows, self.z))

    @property
    def is_outer(self) -> bool:
        """Whether the derivatives are an outer product for each input, or a factor of one."""
        return self.place.is_linear and not self.is_pulled and self.rows.shape[2] == 1


def entrances(h: Tensor, rows: Tensor, places: Mapping[Place, Layout]) -> dict[Place, Entrance]:
    """The places with the rows that backward passes carry there, one pass for each row."""
    size, number = rows.shape[:2]
    edges = {p.edge: GradientEdge(*p.edge) for p in places}
    z = {p: None if p.z is None else at.by_input(p.z, 0) for p, at in places.items()}
    pulled = {p for p in places if prod(shape(p.views[-1])) * size < prod(shape(p.edge))}
    ready = {p: None if (factor := z[p]) is None else p.prepare(factor) for p in pulled}
    found: dict[Place, Tensor] = {}
    for a in range(number if edges else 0):
        here = dict(zip(edges, backward(h, list(edges.values()), rows[:, a]), strict=True))
        for p, layout in places.items():
            part = layout.by_input(p.rows(here[p.edge][None]), 1)
            if p in pulled:
                part = p.pull(part, ready[p]).transpose(0, 1)
            if p not in found:
                found[p] = part.new_empty(number, *part.shape[1:])
            found[p][a] = part[0]
    return {
        p: Entrance(p, t.transpose(0, 1), None, True)
        if p in pulled
        else Entrance(p, t, z[p], False)
        for p, t in found.items()
    }


# The engine.

Planned = tuple[str, list[Entrance] | None, dict[str, Tensor | None]]


def differentiate(
    model: nn.Module,
    x: Tensor,
    *,
    wanted: frozenset[str] | None,
    combine: Callable[[Tensor], Tensor] | None = None,
) -> Sweep:
    """J of any network; see ``fimlib.differentiate``.

    Args:
        model: The network.
        x: [B, ...].
        wanted: Names of parameters; None: all.
        combine: From the outputs [B, T] to rows [B, A, T]. Then J is that of A combinations of the
            outputs, by a backward pass for each.

    Raises:
        NotImplementedError: autograd cannot differentiate the network.
    """
    own, h = functional.recorded(model, x, wanted)
    names = [n for n, _ in own.named_parameters() if wanted is None or n in wanted]
    outputs = h.detach()
    rows = identity(outputs) if combine is None else combine(outputs).to(outputs)
    located = locate(h, {n: made_by(own.get_parameter(n)) for n in names})
    places = {p: layout for of in located.values() if of for p, layout in of.items()}
    found = entrances(h, rows, places)
    by_name = {n: None if of is None else [found[p] for p in of] for n, of in located.items()}
    del h
    plan = blocks_of(by_name)

    def one(i: int, at: slice | Tensor) -> Callable[[slice], Block]:
        layer, entered, inputs = plan[i]
        name = next(iter(inputs))
        factors = {n: None if z is None else z[at] for n, z in inputs.items()}
        with torch.inference_mode(False):
            here = None if entered is None else [entrance.at(at) for entrance in entered]

        def part(numbers: slice) -> Block:
            with torch.inference_mode(False), exact_kernels(own):
                if here is None:
                    J = input_by_input(own, x[at], name)
                    J = J if combine is None else torch.einsum("bat,bt...->ba...", rows[at], J)
                else:
                    J = derivatives(here, own.get_parameter(name), rows[at], numbers)
            block = Block(layer, J, None, factors)
            functional.check_finite(block)
            check_shapes(block, own)
            return block

        return part

    def sweep(at: slice | Tensor) -> Derivatives:
        return Derivatives(outputs[at], tuple(one(i, at)(slice(None)) for i in range(len(plan))))

    inputs = tuple((layer, factors) for layer, _, factors in plan)
    shares = tuple(share_of(p, own, rows) for p in plan)
    return Sweep(outputs, inputs, sweep, max(1, len(outputs)), one=one, shares=shares)


def check_shapes(block: Block, own: nn.Module) -> None:
    """Raise an error unless the derivatives, or a part of them, are of the parameters' shapes."""
    for name, z in block.inputs.items():
        found = (*block.J.shape[2:], *(() if z is None else z.shape[1:]))
        right = tuple(own.get_parameter(name).shape)
        if found[1:] != right[1:] or len(found) != len(right):
            raise NotImplementedError(
                f"parameter {name!r}: its derivatives come in the shape {list(found)}, not "
                f"{list(right)}."
            )


class NeedsTheBatchError(NotImplementedError):
    """The network does not take a single input."""


def input_by_input(own: nn.Module, x: Tensor, name: str) -> Tensor:
    """J of one parameter, [b, T, *shape], by autograd at each input alone.

    Raises:
        NeedsTheBatchError: the network does not take a single input.
    """
    try:
        return functional.one_by_one(own, x, [name])[name]
    except (RuntimeError, ValueError) as error:
        raise_if_out_of_memory(error)
        raise NeedsTheBatchError(
            f"torch cannot differentiate {type(own).__name__} at one input: {short(error)}."
        ) from error


def derivatives(entered: list[Entrance], parameter: Tensor, rows: Tensor, part: slice) -> Tensor:
    """Left factors of the derivatives in a parameter, [b, A, *K], at some inputs."""
    if not entered:
        return rows.new_zeros(()).expand(*rows.shape[:2], *parameter.shape)
    if len(entered) == 1:
        (one,) = entered
        return one.rows[:, :, 0].transpose(0, 1) if one.is_outer else one.derivatives(part)
    total = entered[0].derivatives()
    for entrance in entered[1:]:
        total = total + entrance.derivatives()
    return total


def share_of(planned: Planned, own: nn.Module, rows: Tensor) -> Share:
    """How much of a block stays in the cache, with its derivatives."""
    _, entered, inputs = planned
    most = NUMBERS_AT_A_TIME * (16 if rows.is_cuda else 1) // rows.shape[1]
    parameter = own.get_parameter(next(iter(inputs)))
    one = entered[0] if entered and len(entered) == 1 else None
    if one is not None and one.is_outer:
        return Share(max(1, most // one.rows[0, 0].numel()))
    if one is None or one.is_pulled or not one.place.is_by_row or parameter.numel() <= most:
        return Share(max(1, most // parameter.numel()))
    return Share(1, len(parameter), max(1, most * len(parameter) // parameter.numel()))


def blocks_of(by_name: Mapping[str, list[Entrance] | None]) -> list[Planned]:
    """Plans of all blocks: the layer, the places of its left factors, and its right factors."""
    found: list[Planned] = []
    shared: dict[tuple[str, Edge], Planned] = {}
    for name, entered in by_name.items():
        fresh: Planned = (name.rpartition(".")[0], entered, {name: None})
        if entered is None or len(entered) != 1 or not entered[0].is_outer:
            found.append(fresh)
            continue
        (one,) = entered
        if (key := (fresh[0], one.place.edge)) not in shared:
            shared[key] = fresh
            found.append(fresh)
        shared[key][2][name] = None if one.z is None else one.z[:, 0]
    return found
