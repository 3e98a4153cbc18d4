r"""Is it the derivative? The one check that every engine's J and S must pass.

Every engine relies on something: a rule, an unknown module, another library. Its numbers must agree
with difference quotients of the network itself, in float64, at a few inputs of the batch:

    J·v = (h(θ + εv) − h(θ − εv)) / 2ε,    S_i = (∂ᵢh(θ + εeᵢ) − ∂ᵢh(θ − εeᵢ)) / 2ε.

v moves all parameters at once, every row of a weight in proportion to its size, so that each layer
and each output counts alike; layers whose influence differs too much for that get directions of
their own. S is a diagonal, which no single direction shows: a sample of its entries is compared, at
least one of every block, so a fault in few entries of one layer can escape, or one that is within
the rounding error of the outputs. Before that, the network is called with each input alone and with
several together: an output must be a function of its own input.

Every output has its own tolerance, from its size and its rounding error, so that no large output
hides a small one. At a kink (a ReLU at 0) no quotient is the derivative. A kink disappears when all
weights move a little, so inputs in doubt are compared again at other weights. So J escapes the
check at a kink that only autograd has, as that of relu(s) - relu(-s) at exactly 0.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fimlib.derivatives import Block, Derivatives, Sweep, all_finite, flat, power
from fimlib.engines.blame import mixing_module, wrong_module
from fimlib.engines.held import other_input
from fimlib.engines.model import finite_outputs, perturb_weights, private_copy, size_of
from fimlib.engines.rewrite import exact_lookups
from fimlib.engines.truth import (
    MARGIN,
    Comparison,
    PerParameter,
    Truth,
    Unconfirmed,
    moved,
    outputs_at,
    outputs_of,
    shifted,
    step_of,
)
from fimlib.memory import raise_if_out_of_memory

ALL = slice(None)
INPUTS = 8  # at most, spread over the batch
PARAMETERS_AT_ALL_INPUTS = 2**15  # a larger network is checked at fewer inputs
PIECE = 2**18  # entries of J to contract at a time
ENTRIES = 8  # of S that are compared, at least one of every block
# Contributions to J·v that one direction may sum up, largest over smallest.
RANGE = {torch.float64: 100.0, torch.float32: 1e4}
TINY = 1e-100  # whose square is lost
# Large outputs need long steps, steep networks short ones.
STEPS = (2.0**5, 1.0, 2.0**10, 2.0**-4, 2.0**-8, 2.0**-11)
STEPS_OF_ENTRIES = (2.0**6, 1.0, 2.0**-4, 2.0**-8, 2.0**10, 2.0**-12)
RESOLUTION = 0.01  # of a quotient, or it confirms nothing
STRENGTHS = (0.01, 0.02, 0.03)  # how far weights move where a kink hides the derivative

Again = Callable[[nn.Module, Tensor], Sweep]


def inputs_to_check(model: nn.Module) -> int:
    """The least number of inputs to check, if the batch has as many."""
    count = sum(p.numel() for p in model.parameters() if not is_lazy(p))
    is_large = count > PARAMETERS_AT_ALL_INPUTS
    return 2 if is_large else INPUTS


def positions_to_check(size: int, model: nn.Module) -> Tensor:
    """Positions of the inputs to check, spread over a batch."""
    count = min(size, INPUTS, max(inputs_to_check(model), size // 8))
    return torch.linspace(0, size - 1, count, device="cpu").round().long()


def confirm(
    model: nn.Module,
    x: Tensor,
    found: Sweep,
    at: slice | Tensor,
    again: Again,
    most: int = ENTRIES,
) -> Tensor:
    """Raise an error unless J and S are the derivatives of the outputs at these inputs.

    Args:
        model: The network; it is copied.
        x: [k, ...], some of its inputs.
        found: J and S of a batch, to be checked.
        at: The positions of x in it.
        again: The engine, for other weights.
        most: Entries of S to compare, or one of every block.

    Returns:
        The outputs in float64, or in the network's own type if it computes in nothing else.

    Raises:
        Unconfirmed: they are not, or an input's outputs depend on the others.
    """
    claim = Claim(Truth.of(model, x), found, at)
    check_values(claim)
    doubt = doubts(claim, most)
    if doubt.any() and len(x) > 2:  # the first and a neighbour: where numbers are wrong, enough
        first = int(doubt.nonzero()[0])
        pair = torch.tensor([first, first - 1 if first else 1], device=x.device)
        confirm_nearby(model, x[pair], doubt[pair], again, most)
    if doubt.any():
        confirm_nearby(model, x, doubt, again, most)
    return claim.truth.outputs


class Sums(NamedTuple):
    """Σ_i (J_i v_i)^degree over the entries of every parameter, [k, T] each.

    Attributes:
        products: J·v.
        squares: The sum of the squares of its terms.
        dtype: Of J.
        has_second: Whether there is an S.
    """

    products: PerParameter
    squares: PerParameter
    dtype: torch.dtype
    has_second: bool


@dataclass(frozen=True)
class Claim:
    """Derivatives to be checked, beside the network itself.

    Attributes:
        truth: The network.
        sweep: J and S, to be checked.
        at: The positions in the sweep of the inputs of the truth.
    """

    truth: Truth
    sweep: Sweep
    at: slice | Tensor

    @cached_property
    def found(self) -> Derivatives:
        """J and S at these inputs, all of them at once."""
        return self.sweep.sweep(self.at)

    @property
    def eps(self) -> float:
        """The precision of the numbers that J and S were computed in."""
        return torch.finfo(self.sums.dtype).eps

    @cached_property
    def noise(self) -> Tensor:
        """Rounding errors to expect in the outputs, [k, T]."""
        return self.truth.noise.double().expand(self.truth.outputs.shape)

    @cached_property
    def sums(self) -> Sums:
        """Block by block, as J of a large network takes much memory.

        Raises:
            Unconfirmed: a derivative is NaN or infinite.
        """
        one, v = self.sweep.one, self.truth.v
        count = len(self.sweep.inputs)
        each = self.found.blocks if one is None else (one(i, self.at)(ALL) for i in range(count))
        found = Sums({}, {}, torch.float64, has_second=False)
        for block in each:
            check_finite(block)
            found = found._replace(dtype=block.J.dtype, has_second=block.S is not None)
            for n, sums in contractions(block, v):
                found.products[n], found.squares[n] = sums
        return found


def check_finite(block: Block) -> None:
    """Refuse NaN and infinite values, which no other weights excuse.

    Raises:
        Unconfirmed: naming the layer.
    """
    for D in (block.J, block.S, *block.inputs.values()):
        if D is not None and not all_finite(D):
            narrow = " If float32 is too narrow for them, take .double() of model and inputs."
            raise Unconfirmed(
                f"layer {block.layer!r}: its derivatives at these inputs are NaN or infinite. "
                "A function in the forward pass has none there, as sqrt() at 0: keep away by "
                f"a small constant.{narrow if D.dtype == torch.float32 else ''}"
            )


def confirm_nearby(model: nn.Module, x: Tensor, doubt: Tensor, again: Again, most: int) -> None:
    """Raise an error unless the inputs in doubt are confirmed at other weights, close by."""
    for strength in STRENGTHS:
        nearby = private_copy(model)
        perturb_weights(nearby, strength)
        claim = Claim(Truth.of(nearby, x), again(nearby, x), ALL)
        doubt = doubt & doubts(claim, most, doubt)
        if not doubt.any():
            return
    if claim.eps > torch.finfo(torch.float64).eps:
        exact = claim_in_double(nearby, x, again)
        if exact is not None and not (doubt & doubts(exact, most, doubt)).any():
            raise Unconfirmed(
                "float32 rounds the derivatives of this network too much: take .double() of the "
                "model and the inputs."
            )
    raise Unconfirmed(explanation(claim))


def claim_in_double(model: nn.Module, x: Tensor, again: Again) -> Claim | None:
    """The derivatives of the same network in float64; None where it insists on its type."""
    wide, z = private_copy(model).double(), x.double() if x.is_floating_point() else x
    try:
        return Claim(Truth.of(wide, z), again(wide, z), ALL)
    except Exception as error:  # of any kind, from numbers of another type
        raise_if_out_of_memory(error)
        return None


def explanation(claim: Claim) -> str:
    """Which module is differentiated wrongly, and why."""
    is_first = bool(first_order_doubts(claim).any())
    where = wrong_module(private_copy(claim.truth.own), claim.truth.x, order=1 if is_first else 2)
    if where is None:
        names = wrong_parameters(claim) or ["?"]
        which = "first" if is_first else "second"
        return (
            f"parameter {names[0]!r}: this engine's numbers are not the {which} derivatives of the "
            "outputs."
        )
    if is_first:
        return (
            f"{where}: autograd's derivative is not the derivative of its values. Either something "
            "cuts the derivatives off (detach(), .data, .item(), torch.no_grad()), or an "
            "autograd.Function has another backward(), or a straight-through estimator stands in "
            "for the derivative; the Fisher information needs the true one."
        )
    return f"{where}: {NO_SECOND}"


NO_SECOND = (
    "autograd's second derivative is not the derivative of the first. Something cuts it off, or an "
    "autograd.Function has a backward() that autograd cannot differentiate."
)


def wrong_parameters(claim: Claim) -> list[str]:
    """Names of the parameters whose derivatives are in doubt each by itself."""
    wrong = []
    for block in claim.found.blocks:
        for n, z in block.inputs.items():
            one = replace(claim.found, blocks=(replace(block, inputs={n: z}),))
            if doubts(Claim(claim.truth, Sweep.from_derivatives(one), ALL)).any():
                wrong.append(n)
    return wrong


# Values: of each input alone.


MIXES = (
    "the outputs for one input depend on the others of the batch, on how often the model was "
    "called, or on chance"
)


def check_values(claim: Claim) -> None:
    """Refuse outputs that depend on more than their own input, or that are rounded too much.

    Raises:
        Unconfirmed: naming the module where that shows.
    """
    truth, squares = claim.truth, torch.stack(list(claim.sums.squares.values()))
    # how far every output moves with its parameters; added constants do not count
    scale = squares.sum(0).sqrt().to(truth.outputs)
    check_alone(truth, scale)
    dtype = truth.in_its_type.dtype
    eps, noise = torch.finfo(dtype).eps, truth.noise / torch.finfo(truth.dtype).eps
    slack = 4 * eps**0.5 * scale + 2**6 * eps * noise
    for h in (truth.in_its_type, claim.sweep.outputs[claim.at]):
        if not fits(h.to(truth.dtype), truth.outputs, slack):
            raise Unconfirmed(
                f"the outputs of a batch differ from those of its inputs in float64: {MIXES}; or "
                f"{dtype} rounds too much, and .double() on the model and the inputs helps."
            )


def check_alone(truth: Truth, scale: Tensor) -> None:
    """Refuse a network whose outputs for one input are not a function of that input alone.

    It is called with all inputs, and with each alone, under grad and without. The single inputs
    meet another copy than the batch, so that traces which a call leaves show. If there is only one
    input, it gets an artificial neighbour, since others may follow.

    Raises:
        Unconfirmed: naming the module.
    """
    x, h = truth.x, truth.outputs
    slack = 2**6 * truth.noise + torch.finfo(truth.dtype).eps ** 0.575 * scale
    pair, fine = x[:2], True
    if len(x) == 1:
        pair = torch.cat([x, neighbour(truth.own, x)])
        fine = fits(finite_outputs(truth.own, x), h, slack)
        finite_outputs(truth.alone, pair[1:])  # which it may remember
    for i in reversed(range(len(x))):
        fine = fine and fits(
            finite_outputs(truth.alone, x[i : i + 1], grad=i % 2 == 0), h[[i]], slack[i]
        )
    if not (fine and is_alone_elsewhere(truth, pair, 0.0 if len(x) == 1 else 0.5)):
        where = mixing_module(private_copy(truth.own), pair)
        prefix = f"{where}: " if where else ""
        raise Unconfirmed(f"{prefix}{MIXES}. Make forward() a function of each input alone.")


def check_inputs_apart(model: nn.Module, x: Tensor) -> None:
    """Refuse a network whose outputs for one input depend on the others.

    Raises:
        Unconfirmed: naming the module.
    """
    truth = Truth.of(model, x)
    spread = (truth.outputs - truth.outputs.mean(0)).abs().amax(0)
    check_alone(truth, spread.expand(truth.outputs.shape))


def neighbour(model: nn.Module, x: Tensor) -> Tensor:
    """Another input: of the batch if it is held, else these numbers in reverse, and smaller."""
    held = other_input(model, x)
    if held is not None:
        return held
    other = x.flatten(1).flip(1).view_as(x)
    return other / 2 if x.is_floating_point() else other


def is_alone_elsewhere(truth: Truth, pair: Tensor, strength: float) -> bool:
    """The same for two inputs at other weights, since weights of 0 hide earlier layers."""
    with shifted(truth.alone, truth.v, strength):
        whole, *halves = (finite_outputs(truth.alone, part) for part in (pair, *pair.split(1)))
    if whole is None or any(half is None for half in halves):
        return True  # it rejects these inputs, or has no finite value there
    size, eps = (whole - truth.outputs[:1]).abs(), torch.finfo(whole.dtype).eps
    slack = eps**0.575 * size.amax(0) + 2**12 * truth.noise
    return all(fits(half, whole[i : i + 1], slack) for i, half in enumerate(halves))


def fits(a: Tensor | None, b: Tensor, slack: Tensor) -> bool:
    """Whether two outputs agree."""
    return a is not None and a.shape == b.shape and bool(((a - b).abs() <= slack).all())


# First derivatives.


def doubts(claim: Claim, most: int = ENTRIES, among: Tensor | None = None) -> Tensor:
    """At which inputs, of those ``among``, J or S differs from the difference quotients: [k]."""
    doubt = first_order_doubts(claim)
    if not claim.sums.has_second or doubt.all():
        return doubt
    places = torch.arange(len(doubt), device="cpu") if among is None else among.nonzero()[:, 0]
    return doubt | second_order_doubts(claim, most, places.tolist())


def first_order_doubts(claim: Claim) -> Tensor:
    """At which inputs J·v differs from the difference quotient of the outputs: [k], bool."""
    truth, eps, noise, unit = claim.truth, claim.eps, claim.noise, step_of(claim.truth.dtype)
    doubt = torch.zeros(len(truth.x), dtype=torch.bool, device=truth.x.device)
    for w, found, scale in along(claim):
        coarser = eps / torch.finfo(truth.dtype).eps  # of which the noise was measured
        rounding = 4 * noise / MARGIN * coarser + eps * scale.max() + TINY
        slack = eps**0.35 * scale + rounding
        most = torch.maximum(RESOLUTION * scale, noise / unit)
        comparison = Comparison(found, slack, knows_noise=True)
        for factor in STEPS:
            step = factor * unit
            plus, minus = (outputs_at(truth, w, sign * step) for sign in (1, -1))
            comparison.add((plus - minus).double() / (2 * step), noise / step, most)
            if not comparison.doubt.any():
                break
        doubt |= comparison.doubt.any(1)
    return doubt


def along(claim: Claim) -> Iterator[tuple[PerParameter, Tensor, Tensor]]:
    """Directions, with J·v along each and the size of its terms: [k, T]."""
    names = list(claim.sums.squares)
    products, squares = (torch.stack(list(sums.values())) for sums in claim.sums[:2])
    shares = (squares / squares.sum(0)).nan_to_num(0.0)  # of each output and input by itself
    influence = dict(zip(names, shares.flatten(1).mean(1).sqrt().tolist(), strict=True))
    for group in directions(influence, RANGE[claim.sums.dtype]):
        weights = squares.new_tensor([group.get(n, 0.0) for n in names])
        scale = torch.tensordot(weights.square(), squares, 1).sqrt()
        w = {n: share * claim.truth.v[n] for n, share in group.items()}
        yield w, torch.tensordot(weights, products, 1), scale


def contractions(block: Block, v: PerParameter) -> Iterator[tuple[str, list[Tensor]]]:
    """Over the entries of every parameter of a block, Σ_i J_i v_i and Σ_i (J_i v_i)²: [k, T]."""
    J = flat(block.J)
    rights = [z for z in block.inputs.values() if z is not None]
    dtype = holding_squares([J, *(v[n] for n in block.inputs), *rights])
    for name, z in block.inputs.items():
        w = v[name].to(dtype)
        if z is None:
            right, squares = w.flatten(), w.flatten().square()
        else:
            z, w = z.to(dtype), w.reshape(-1, z.shape[1])
            right, squares = z @ w.T, z.square() @ w.square().T
        yield name, [contraction(J, right, 1), contraction(J, squares, 2)]


def contraction(J: Tensor, right: Tensor, degree: int) -> Tensor:
    """Σ_i J_i^degree right_i, [k, T]; a piece at a time, as there may be many entries."""
    pieces = zip(J.split(PIECE, 2), right.unsqueeze(-1).split(PIECE, -2), strict=True)
    sums = [(power(D.to(r), degree) @ r).squeeze(-1).double() for D, r in pieces]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def holding_squares(factors: list[Tensor]) -> torch.dtype:
    """The type of the first factor if it holds the square of the product of all, else float64."""
    if sum(t.numel() for t in factors) < PIECE:  # to look would take longer
        return torch.float64
    extremes = [torch.stack(t.aminmax()) for t in factors if t.numel()]
    sizes = torch.stack([pair.abs().amax().double() for pair in extremes])
    is_fine = bool(((sizes > 1e-6) & (sizes < 1e6)).all())
    return factors[0].dtype if is_fine else torch.float64


def directions(influence: dict[str, float], most: float) -> Iterator[dict[str, float]]:
    """Parameters of similar influence together, each with a share that makes them similar.

    So no parameter hides another, and no share exceeds 1. They are not made equal, or a weight and
    a bias of one unit would cancel at one input. Parameters without influence come first, together.
    """
    group: dict[str, float] = {}
    least = 0.0
    uneven = random.Random(0)
    for n in sorted(influence, key=lambda n: influence[n]):
        if group and influence[n] > most * least:
            yield group
            group = {}
        least = least if group else influence[n]
        alike = least / influence[n] if influence[n] > 0 else 1.0
        group[n] = alike * uneven.uniform(0.5, 1)
    yield group


# Second derivatives.


def confirm_hessian(
    model: nn.Module,
    x: Tensor,
    names: Sequence[str],
    found: Tensor,
    objective: Callable[[Tensor], Tensor],
    again: Callable[[nn.Module], Tensor],
) -> None:
    """Raise an error unless H·v is the difference quotient of the gradient, for a random v.

    Args:
        model: The network; it is copied.
        x: [B, ...].
        names: Of parameters.
        found: H of the objective in these, [P, P].
        objective: A number, of the outputs.
        again: H at other weights.

    Raises:
        Unconfirmed: it is not.
    """
    for strength in (0.0, *STRENGTHS):
        nearby = private_copy(model)
        perturb_weights(nearby, strength)
        truth = Truth.of(nearby, x)
        unit = step_of(truth.dtype)
        v = {n: truth.v[n] for n in names}
        flat = torch.cat([v[n].flatten() for n in names]).double()
        H = (again(nearby) if strength else found).double()
        scale = (H.square() @ flat.square()).sqrt()
        slack = torch.finfo(found.dtype).eps ** 0.35 * (scale + 1e-6 * scale.amax())
        comparison = Comparison(H @ flat, slack)
        for factor in STEPS:
            step = factor * unit
            plus, minus = (gradient(truth, v, sign * step, objective) for sign in (1, -1))
            noise = 16 * torch.finfo(truth.dtype).eps * (plus.abs() + minus.abs()).amax()
            most = torch.maximum(RESOLUTION * scale.amax(), noise / unit)
            comparison.add((plus - minus) / (2 * step), noise / step, most)
            if not comparison.doubt.any():
                return
    where = wrong_module(private_copy(truth.own), truth.x, order=2)
    raise Unconfirmed(f"{where or type(model).__name__}: {NO_SECOND}")


def gradient(
    truth: Truth, v: PerParameter, step: float, objective: Callable[[Tensor], Tensor]
) -> Tensor:
    """The gradient of the objective in the parameters that v moves, at θ + step · v: [P]."""
    with shifted(truth.own, v, step), torch.enable_grad(), exact_lookups():
        parameters = [truth.own.get_parameter(n).requires_grad_() for n in v]
        y = objective(truth.own(truth.x.clone()))
        if not y.requires_grad:
            return torch.cat([p.new_zeros(p.numel(), dtype=torch.float64) for p in parameters])
        found = torch.autograd.grad(y, parameters, materialize_grads=True)
    return torch.cat([g.flatten() for g in found]).double()


@dataclass(frozen=True)
class Entry:
    """One entry of a parameter at one input, with its derivatives.

    Attributes:
        name: The parameter.
        index: The entry's position.
        b: The input's.
        J: First derivatives of the outputs, [T].
        S: Second derivatives, [T].
        unit: In which they are measured, [T].
        size: Of the parameter's entries.
        precision: Of the numbers that J and S were computed in.
        noise: Rounding errors to expect in the outputs, [T].
    """

    name: str
    index: int
    b: int
    J: Tensor
    S: Tensor
    unit: Tensor
    size: float
    precision: float
    noise: Tensor


def second_order_doubts(claim: Claim, most: int, among: Sequence[int]) -> Tensor:
    """At which inputs S differs from the difference quotient of J, at the chosen entries: [k]."""
    truth = claim.truth
    doubt = torch.zeros(len(truth.x), dtype=torch.bool, device=truth.x.device)
    generator = torch.Generator("cpu").manual_seed(0)  # not the caller's
    for entry in entries(claim, most, among):
        r = torch.randn(entry.S.shape, generator=generator, device="cpu", dtype=torch.float64)
        r = r.to(entry.S.device) / entry.unit
        if not doubt[entry.b] and not is_second_derivative(truth, entry, r):
            doubt[entry.b] = True
    return doubt


def is_second_derivative(truth: Truth, entry: Entry, r: Tensor) -> bool:
    """Whether Σ_a r_a S_a of one entry is the derivative of Σ_a r_a J_a along it."""
    parameter = truth.own.get_parameter(entry.name)
    weights = r.to(truth.dtype)
    claim, terms = r @ entry.S, (r * entry.S).square().sum().sqrt()
    eps = torch.finfo(truth.dtype).eps
    floor = r.abs() @ entry.noise / entry.size  # of saturated units autograd rounds slopes to 0
    slack = entry.precision**0.35 * (1 + terms) * len(r) ** 0.5
    slack = slack + floor / entry.size * (entry.precision / eps)
    moves, most = (r * entry.J).abs().sum(), RESOLUTION * (1 + terms)
    comparison, quotients = Comparison(claim, slack), {}
    for factor in STEPS_OF_ENTRIES:
        step = factor * eps ** (1 / 3) * entry.size
        try:
            plus, minus = (slope(truth, parameter, entry, sign * step, weights) for sign in (1, -1))
        except RuntimeError as error:  # autograd has no derivative: of leaky_relu_(s), for one
            raise_if_out_of_memory(error)
            return is_second_difference(truth, parameter, entry, weights, claim, slack)
        quotients[step] = (plus - minus) / (2 * step)
        noise = (8 * eps * (moves + plus.abs() + minus.abs()) + floor) / step
        comparison.add(quotients[step], noise, most)
        if not comparison.doubt:
            return True
    if comparison.wrong:
        return False
    noise = slope_noise(truth, entry, weights)
    most = torch.maximum(most, noise / max(quotients))
    comparison = Comparison(claim, slack)
    for step, quotient in quotients.items():
        comparison.add(quotient, noise / step, most)
    return not comparison.doubt


def slope_noise(truth: Truth, entry: Entry, weights: Tensor) -> Tensor:
    """Rounding errors to expect in a slope, measured in float32, as for the outputs."""
    exact = slope(truth, truth.own.get_parameter(entry.name), entry, 0.0, weights)
    narrow = private_copy(truth.own).float().requires_grad_()
    x = truth.x.float() if truth.x.is_floating_point() else truth.x
    other = replace(truth, own=narrow, x=x)
    try:
        found = slope(other, narrow.get_parameter(entry.name), entry, 0.0, weights.float())
    except (RuntimeError, TypeError) as error:
        raise_if_out_of_memory(error)
        found = torch.zeros_like(exact)
    eps = torch.finfo(truth.dtype).eps / torch.finfo(torch.float32).eps
    return 2**5 * eps * (found - exact).abs().nan_to_num(0.0, 0.0, 0.0)


def is_second_difference(
    truth: Truth,
    parameter: nn.Parameter,
    entry: Entry,
    weights: Tensor,
    claim: Tensor,
    slack: Tensor,
) -> bool:
    """The same from the outputs alone: (h(θ + εe) − 2h(θ) + h(θ − εe)) / ε²."""
    for factor in STEPS_OF_ENTRIES:
        step = factor * float(torch.finfo(truth.dtype).eps ** 0.25) * entry.size
        values = []
        for shift in (step, 0.0, -step):
            with moved(parameter, entry.index, shift):
                values.append(outputs_of(truth.own, truth.x[entry.b : entry.b + 1])[0] @ weights)
        quotient = (values[0] - 2 * values[1] + values[2]).double() / step**2
        noise = 4 * (weights.abs().double() @ truth.noise.double()) / step**2
        if bool((claim - quotient).abs() <= slack + torch.minimum(noise, 1 + claim.abs())):
            return True
    return False


def slope(
    truth: Truth, parameter: nn.Parameter, entry: Entry, shift: float, weights: Tensor
) -> Tensor:
    """The derivative of Σ_a weights_a h_a along one entry, where that is shifted."""
    with moved(parameter, entry.index, shift), torch.enable_grad(), exact_lookups():
        h = truth.own(truth.x[entry.b : entry.b + 1].clone())[0]
        if not h.requires_grad:
            return weights.new_zeros((), dtype=torch.float64)
        most = weights.abs().amax()  # the backward pass of matrix_exp() rounds large gradients
        (found,) = torch.autograd.grad(h @ (weights / most), parameter, materialize_grads=True)
    return found.reshape(-1)[entry.index].double() * most.double()


def entries(claim: Claim, most: int, among: Sequence[int]) -> Iterator[Entry]:
    """The entries at which S is compared, each at one of the inputs ``among`` them.

    All of a small network; else at least one of every block, whose parameters share their S: the
    first where it is large, every other one by chance.
    """
    generator = torch.Generator("cpu").manual_seed(0)  # not the caller's
    blocks, own = claim.found.blocks, claim.truth.own
    size = {n: own.get_parameter(n).numel() for block in blocks for n in block.inputs}
    is_small = sum(size.values()) <= most
    share = max(1, most // len(size))
    turn = 0
    for block in blocks:
        names = sorted(block.inputs, key=lambda n: -size[n])  # a weight before its bias
        if is_small:
            places = [(n, i) for n in names for i in range(size[n])]
        else:
            places = [(names[i % len(names)], -1) for i in range(share)]
        for at, (n, i) in enumerate(places):
            b = among[turn % len(among)]
            turn += 1
            index = i if is_small else position(block, n, b, at % 2 == 0, generator)
            yield entry_at(claim, block, n, index, b)


def position(block: Block, name: str, b: int, is_large: bool, generator: torch.Generator) -> int:
    """One entry of a parameter at input b, by chance; more often than not where S is large."""
    S, z = flat(block.second)[b].detach(), block.inputs[name]
    lefts = S.abs().amax(0).cpu().double()
    rights = lefts.new_ones(1) if z is None else z[b].abs().cpu().double()
    parts = [w if is_large and bool(w.any()) else torch.ones_like(w) for w in (lefts, rights)]
    k, j = (int(torch.multinomial(w / w.sum(), 1, generator=generator)) for w in parts)
    return k * len(rights) + j


def entry_at(claim: Claim, block: Block, name: str, i: int, b: int) -> Entry:
    """One entry; S of an output counts in units of that output's S, or of its J where S is 0.

    Or in units of rounding errors, where J is nothing else. BackPACK rounds S to about ‖J‖².
    """
    z, size = block.inputs[name], float(size_of(claim.truth.own.get_parameter(name)))
    J, S = flat(block.J)[b], flat(block.second)[b]
    right = J.new_ones(1, dtype=torch.float64) if z is None else z[b].double()
    k, j = divmod(i, len(right))
    J_rms = root_mean_square(J) * right.square().mean().sqrt()
    S_rms = root_mean_square(S) * right.pow(4).mean().sqrt()
    eps, fine = claim.eps, torch.finfo(claim.truth.dtype).eps
    rounding = eps * (J_rms / size + J_rms.square().sum())
    step = STEPS_OF_ENTRIES[0] * fine ** (1 / 3)  # in units of the size
    visible = claim.noise[b] / size**2 * max(2**6 * eps / fine, 1 / (RESOLUTION * step))
    unit = S_rms + 1e-8 * J_rms / size + 2**6 * rounding + visible
    unit = unit.masked_fill(unit == 0, 1.0)
    J, S = J[:, k].double() * right[j], S[:, k].double() * right[j].square()
    return Entry(name, i, b, J, S, unit, size, eps, claim.noise[b])


def root_mean_square(D: Tensor) -> Tensor:
    """Of every row, in float64; of its own size, so that no square is lost."""
    most = D.abs().amax(1, keepdim=True).clamp_min(torch.finfo(D.dtype).tiny)
    return (D / most).square().mean(1).sqrt().double() * most[:, 0].double()
