r"""Is it the derivative? The one check that every engine's J and S must pass.

Whatever an engine believes (a rule, a module it does not know, another library), its numbers must
agree with difference quotients of the network itself, in float64, at a few inputs of the batch:

    J·v = (h(θ + εv) − h(θ − εv)) / 2ε,    S_i = (∂ᵢh(θ + εeᵢ) − ∂ᵢh(θ − εeᵢ)) / 2ε.

v moves all parameters at once, so that each layer counts alike; layers whose influence on the
outputs differs too much for that get directions of their own. S is a diagonal, which no single
direction shows: it is compared entry by entry, at all entries of a small network and at some of
every parameter of a large one. Before that, the network is called with each input alone and with
several together: an output must be a function of its own input.

Every output has a tolerance of its own, from its own size and its own rounding error, so that no
large output hides a small one. At a kink (a ReLU at 0) no quotient is the derivative; a kink goes
away when all weights move a little, so inputs in doubt are looked at again with other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fimlib._blame import mixing_module, wrong_module
from fimlib.derivatives import Block, Derivatives, all_finite, call, perturb, random_step, separate

INPUTS = 8  # at most, spread over the batch
PARAMETERS_AT_ALL_INPUTS = 2**17  # a larger network is looked at at fewer inputs
ENTRIES = 8  # of S that are compared, at least one of every parameter
RANGE = 100.0  # contributions to J·v that one direction may sum up, largest over smallest
TINY = 1e-100  # whose square is lost
STEPS = (1.0, 2.0**5, 2.0**10, 2.0**-4, 2.0**-8)  # large outputs need long, steep networks short
STEPS_OF_ENTRIES = (2.0**6, 1.0, 2.0**-4, 2.0**10)
RESOLUTION = 0.01  # of a quotient, or it confirms nothing
STRENGTHS = (0.01, 0.02, 0.03)  # how far weights move where a kink hides the derivative

PerParameter = dict[str, Tensor]
Again = Callable[[nn.Module, Tensor], Derivatives]
Rows = Callable[[Tensor], Tensor | None]


class Unconfirmed(NotImplementedError):  # noqa: N818
    """What an engine found is not the derivative of the outputs."""


def few(size: int, model: nn.Module) -> Tensor:
    """Positions of the inputs that are looked at."""
    is_large = sum(p.numel() for p in model.parameters()) > PARAMETERS_AT_ALL_INPUTS
    most = max(2, size // 8) if is_large else INPUTS
    count = min(size, most, INPUTS)
    return torch.linspace(0, size - 1, count, device="cpu").round().long()


def confirm(
    model: nn.Module,
    x: Tensor,
    found: Derivatives,
    again: Again,
    rows: Rows | None = None,
    most: int = ENTRIES,
) -> None:
    """Raise an error unless J and S are the derivatives of the outputs at these inputs.

    Args:
        model: The network; it is copied.
        x: [k, ...], some of its inputs.
        found: What is in question, at these inputs.
        again: The engine, for other weights.
        rows: From outputs to the rows that were carried back, where these are not the outputs.
        most: Entries of S to compare, or one of every parameter.

    Raises:
        Unconfirmed: they are not, or an input's outputs depend on the others.
    """
    check_finite(found)
    truth = Truth.of(model, x)
    check_values(truth, found)
    doubt = doubts(truth, found, rows, most)
    if doubt.any() and len(x) > 2:  # the first and a neighbour: where numbers are wrong, enough
        first = int(doubt.nonzero()[0])
        pair = torch.tensor([first, first - 1 if first else 1], device=x.device)
        confirm_nearby(model, x[pair], doubt[pair], again, rows, most)
    if doubt.any():
        confirm_nearby(model, x, doubt, again, rows, most)


def check_finite(found: Derivatives) -> None:
    """Refuse NaN and infinite values, which no other weights excuse.

    Raises:
        Unconfirmed: naming the layer.
    """
    for block in found.blocks:
        for D in (block.J, block.S, *block.inputs.values()):
            if D is not None and not all_finite(D):
                raise Unconfirmed(
                    f"layer {block.layer!r}: its derivatives at these inputs are NaN or infinite. "
                    "A function in the forward pass has none there, as sqrt() at 0: keep away by "
                    "a small constant."
                )


def confirm_nearby(
    model: nn.Module, x: Tensor, doubt: Tensor, again: Again, rows: Rows | None, most: int
) -> None:
    """Raise an error unless the inputs in doubt are confirmed at other weights, close by."""
    for strength in STRENGTHS:
        nearby = separate(model)
        perturb(nearby, strength)
        truth, found = Truth.of(nearby, x), again(nearby, x)
        doubt = doubt & doubts(truth, found, rows, most, doubt)
        if not doubt.any():
            return
    raise Unconfirmed(explanation(truth, found, rows))


def explanation(truth: Truth, found: Derivatives, rows: Rows | None) -> str:
    """Which module is differentiated wrongly, and why."""
    is_first = bool(first_order_doubts(truth, found, rows).any())
    where = wrong_module(separate(truth.own), truth.x, order=1 if is_first else 2)
    if where is None:
        names = wrong_parameters(truth, found, rows) or ["?"]
        which = "first" if is_first else "second"
        return (
            f"parameter {names[0]!r}: what this engine finds are not the {which} derivatives of the "
            "outputs."
        )
    if is_first:
        return (
            f"{where}: what autograd says is not the derivative of its values. Either something "
            "cuts the derivatives off (detach(), .data, .item(), torch.no_grad()), or an "
            "autograd.Function has another backward(), or a straight-through estimator stands in "
            "for the derivative; the Fisher information needs the true one."
        )
    return f"{where}: {NO_SECOND}"


NO_SECOND = (
    "what autograd says of its second derivative is not the derivative of the first. Something "
    "cuts it off, or an autograd.Function has a backward() that autograd cannot differentiate."
)


def wrong_parameters(truth: Truth, found: Derivatives, rows: Rows | None) -> list[str]:
    """Names of the parameters whose derivatives are in doubt each by itself."""
    wrong = []
    for block in found.blocks:
        for n, z in block.inputs.items():
            one = Derivatives(
                found.outputs,
                (Block(block.layer, block.J, block.S, {n: z}),),
                projected=found.projected,
            )
            if doubts(truth, one, rows).any():
                wrong.append(n)
    return wrong


# The network itself, in float64.


@dataclass(frozen=True)
class Truth:
    """A private copy of the network at some inputs, in float64.

    Attributes:
        own: The copy; in the network's own type where that computes in nothing else.
        alone: Another such copy, which has not been called.
        x: [k, ...], the inputs.
        outputs: h, [k, T].
        noise: Rounding errors to expect in h, [T].
        in_its_type: The outputs in the network's own type, [k, T].
    """

    own: nn.Module
    alone: nn.Module
    x: Tensor
    outputs: Tensor
    noise: Tensor
    in_its_type: Tensor

    @classmethod
    def of(cls, model: nn.Module, x: Tensor) -> Truth:
        """Copy the network and call it; a float32 network once in each type.

        Raises:
            Unconfirmed: the network rounds numbers to a narrower type than its own.
        """
        plain, alone = separate(model).requires_grad_(), separate(model)
        dtype = next(plain.parameters()).dtype
        h = outputs_without_narrowing(plain, x)
        if dtype == torch.float64:
            narrow = call(separate(model).float(), x.float() if x.is_floating_point() else x)
            return cls(plain, alone, x, h, noise_of(h, narrow), h)
        own, z, wide = in_double(model, x)
        if wide is None:
            return cls(plain, alone, x, h, noise_of(h, None), h)
        return cls(own, alone.double(), z, wide, noise_of(wide, h), h)

    @property
    def dtype(self) -> torch.dtype:
        """The type that quotients are computed in."""
        return self.outputs.dtype

    @cached_property
    def v(self) -> PerParameter:
        """A random direction, every parameter in proportion to its size."""
        generator = torch.Generator("cpu").manual_seed(0)  # not the caller's
        return {n: random_step(p, generator) for n, p in self.own.named_parameters()}


def outputs_without_narrowing(plain: nn.Module, x: Tensor) -> Tensor:
    """The outputs in the network's own type; an Unconfirmed if it computes in a narrower one."""
    dtype = next(plain.parameters()).dtype
    seen = Narrowing(dtype)
    with seen:
        h = outputs_of(plain, x)
    if seen.narrowest is not None:
        raise Unconfirmed(
            f"the forward pass computes in {seen.narrowest}, narrower than the parameters' {dtype}: "
            "remove the cast, or torch.autocast, inside the model."
        )
    return h


def in_double(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor, Tensor | None]:
    """A float64 copy, its inputs and outputs; None for these where it computes in less."""
    own = separate(model).double().requires_grad_()
    z = x.double() if x.is_floating_point() else x
    seen = Narrowing(torch.float64)
    try:
        with seen:
            h = outputs_of(own, z)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # whatever a module raises at numbers of another type
        return own, z, None
    is_double = h.dtype == torch.float64 and seen.narrowest is None
    return own, z, h if is_double and bool(torch.isfinite(h).all()) else None


def outputs_of(own: nn.Module, x: Tensor) -> Tensor:
    """The outputs [k, T], under grad: without it attention takes another way."""
    with torch.enable_grad():
        h: Tensor = own(x.clone())
    return h.detach()


class Narrowing(TorchFunctionMode):
    """Notices numbers that are rounded to a narrower type than the network's.

    Attributes:
        bits: Of the network's numbers.
        narrowest: The narrowest type that numbers of it were rounded to, if they were.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.bits = torch.finfo(dtype).bits
        self.narrowest: torch.dtype | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function; where numbers come out narrower, see whether wider ones came in."""
        result = func(*args, **(kwargs or {}))
        found = [t for t in tree_leaves(result) if 0 < bits(t) < self.bits]
        if found and any(bits(t) >= self.bits for t in tree_leaves((args, kwargs))):
            self.narrowest = min((t.dtype for t in found), key=lambda d: torch.finfo(d).bits)
        return result


def bits(t: object) -> int:
    """Of one number of a floating-point tensor; 0 of anything else."""
    is_real = isinstance(t, Tensor) and t.is_floating_point()
    return torch.finfo(t.dtype).bits if is_real else 0  # type: ignore[attr-defined]


def noise_of(h: Tensor, narrow: Tensor | None) -> Tensor:
    """Rounding errors to expect in each output, [T].

    In float32 they are 2²⁹ times as large as in float64, and there they can be measured.
    """
    eps = torch.finfo(h.dtype).eps
    least = 4 * eps * h.abs().amax(0)
    if narrow is None or narrow.shape != h.shape:
        return least + 16 * eps * h.abs().amax()
    error = (narrow.double() - h).abs()
    error = error.nan_to_num(0.0, 0.0, 0.0).amax(0)
    return least + 2**5 * error * (eps / torch.finfo(torch.float32).eps)


# Values: of each input alone.


MIXES = (
    "the outputs for one input depend on the others of the batch, on how often the model was "
    "called, or on chance"
)


def check_values(truth: Truth, found: Derivatives) -> None:
    """Refuse outputs that depend on more than their own input, or that are rounded too much.

    Raises:
        Unconfirmed: naming the module where that shows.
    """
    scale = sizes(truth, found)
    check_alone(truth, scale)
    dtype = truth.in_its_type.dtype
    slack = 4 * torch.finfo(dtype).eps ** 0.5 * scale + 2**6 * truth.noise
    for h in (truth.in_its_type, found.outputs):
        if not fits(h.to(truth.dtype), truth.outputs, slack):
            raise Unconfirmed(
                f"the outputs of a batch differ from those of its inputs in float64: {MIXES}; or "
                f"{dtype} rounds too much, and .double() on the model and the inputs helps."
            )


def sizes(truth: Truth, found: Derivatives) -> Tensor:
    """The size of every output [k, T]: its value, and how far it moves with its parameters."""
    h = truth.outputs.abs()
    if found.projected:
        return h + truth.outputs.std(1, keepdim=True, correction=0)
    moves = [contraction(block, n, truth.v[n], 2) for block in found.blocks for n in block.inputs]
    return h + torch.stack(moves).double().sum(0).sqrt().to(h)


def check_alone(truth: Truth, scale: Tensor) -> None:
    """Refuse a network whose outputs for one input are not a function of that input alone.

    It is called with several inputs, and with each alone; under grad and without; at its weights,
    and at others, since weights of 0 hide what is before them. The single inputs meet another copy
    than the batch, so that traces which a call leaves show.
    """
    own, x, alone = truth.own, truth.x, truth.alone
    slack = 2**6 * truth.noise + torch.finfo(truth.dtype).eps ** 0.575 * scale
    fine = fits(call(own, x), truth.outputs, slack)
    for i, (one, h, s) in enumerate(
        zip(x.split(1), truth.outputs.split(1), slack.split(1), strict=True)
    ):
        fine = fine and fits(call(alone, one, grad=i % 2 == 0), h, s)
    if fine and len(x) > 1:
        with shifted(own, truth.v, 0.5), shifted(alone, truth.v, 0.5):
            whole, *halves = call(own, x), call(alone, x[:1]), call(alone, x[1:])
        if whole is not None and all(half is not None for half in halves):
            size, eps = whole.abs(), torch.finfo(whole.dtype).eps
            slack = (eps**0.575 * size.amax(0) + 2**12 * eps * size.amax()).expand_as(whole)
            fine = all(
                fits(half, whole[at], slack[at])
                for half, at in zip(halves, (slice(1), slice(1, None)), strict=True)
            )
    if not fine:
        where = mixing_module(separate(own), x)
        raise Unconfirmed(
            f"{f'{where}: ' if where else ''}{MIXES}. Make forward() a function of each input alone."
        )


def fits(a: Tensor | None, b: Tensor, slack: Tensor) -> bool:
    """Whether two outputs agree."""
    return a is not None and a.shape == b.shape and bool(((a - b).abs() <= slack).all())


# First derivatives.


def doubts(
    truth: Truth,
    found: Derivatives,
    rows: Rows | None,
    most: int = ENTRIES,
    among: Tensor | None = None,
) -> Tensor:
    """At which inputs, of those ``among``, J or S differs from the difference quotients: [k]."""
    doubt = first_order_doubts(truth, found, rows)
    if all(block.S is None for block in found.blocks) or doubt.all():
        return doubt
    places = torch.arange(len(doubt)) if among is None else among.nonzero()[:, 0]
    return doubt | second_order_doubts(truth, found, rows, most, places.tolist())


def first_order_doubts(truth: Truth, found: Derivatives, rows: Rows | None) -> Tensor:
    """At which inputs J·v differs from the difference quotient of the outputs: [k], bool."""
    v = truth.v
    terms = {n: (block, v[n]) for block in found.blocks for n in block.inputs}
    products = {n: contraction(block, n, d, 1).double() for n, (block, d) in terms.items()}
    squares = {n: contraction(block, n, d, 2).double() for n, (block, d) in terms.items()}
    influence = {n: float(s.mean().sqrt()) for n, s in squares.items()}
    carried = rows(found.outputs) if found.projected and rows is not None else None
    eps = torch.finfo(found.blocks[0].J.dtype).eps
    noise = truth.noise.double().expand(truth.outputs.shape)
    if carried is not None:
        noise = (carried.double().abs() @ noise[..., None])[..., 0]
    doubt = torch.zeros(len(truth.x), dtype=torch.bool, device=truth.x.device)
    for shares in directions(influence):
        w = {n: share * v[n] for n, share in shares.items()}
        claim = torch.stack([share * products[n] for n, share in shares.items()]).sum(0)
        scale = torch.stack([share**2 * squares[n] for n, share in shares.items()]).sum(0).sqrt()
        rounding = 4 * noise * (eps / torch.finfo(truth.dtype).eps) + eps * scale.max() + TINY
        left = torch.ones_like(claim, dtype=torch.bool)
        for factor in STEPS:
            step = factor * step_of(truth.dtype)
            plus, minus = (outputs_at(truth, w, sign * step) for sign in (1, -1))
            quotient = (plus - minus).double() / (2 * step)
            if carried is not None:
                quotient = (carried.double() @ quotient[..., None])[..., 0]
            slack = eps**0.35 * scale + rounding + bounded(noise, step, scale, truth.dtype)
            left &= ~((claim - quotient).abs() <= slack)  # NaN is in doubt
            if not left.any():
                break
        doubt |= left.any(1)
    return doubt


def bounded(noise: Tensor, step: float, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounding errors of a quotient, as far as they do not hide what it is to confirm."""
    least = noise / (max(STEPS) * step_of(dtype))
    return torch.minimum(noise / step, torch.maximum(RESOLUTION * scale, least))


def contraction(block: Block, name: str, v: Tensor, power: int) -> Tensor:
    """Σ_i (J_i v_i)^power over the entries of one parameter: [k, T]."""
    z = block.inputs[name]
    J, v = block.J, v.to(block.J)
    if power == 2:
        J, v, z = J.square(), v.square(), None if z is None else z.square()
    if z is None:
        return J.flatten(2) @ v.flatten() if J.ndim > 2 else J * v
    moved = v.reshape(-1, z.shape[1]) @ z.T.to(v)  # [K, k]
    return torch.einsum("kto,ok->kt", J.flatten(2), moved)


def step_of(dtype: torch.dtype) -> float:
    """ε, along such a direction: so small that few kinks lie between, for rounding as large."""
    return float(torch.finfo(dtype).eps ** 0.42)


@contextmanager
def shifted(own: nn.Module, v: PerParameter, step: float) -> Iterator[None]:
    """Move the parameters of ``own`` to θ + step · v for a while."""
    before = {n: own.get_parameter(n).data for n in v}
    try:
        for n, old in before.items():
            own.get_parameter(n).data = old + step * v[n].to(old)
        yield
    finally:
        for n, old in before.items():
            own.get_parameter(n).data = old


def outputs_at(truth: Truth, v: PerParameter, step: float) -> Tensor:
    """The outputs at θ + step · v, [k, T]."""
    with shifted(truth.own, v, step):
        return outputs_of(truth.own, truth.x)


def directions(influence: dict[str, float]) -> Iterator[dict[str, float]]:
    """Parameters of similar influence together, each with the share that makes them alike.

    So that no parameter hides another; and no share exceeds 1. Those of no influence at all come
    first, together.
    """
    group: dict[str, float] = {}
    least = 0.0
    for n in sorted(influence, key=lambda n: influence[n]):
        if group and influence[n] > RANGE * least:
            yield group
            group = {}
        least = least if group else influence[n]
        group[n] = least / influence[n] if influence[n] > 0 else 1.0
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
        nearby = separate(model)
        perturb(nearby, strength)
        truth = Truth.of(nearby, x)
        v = {n: truth.v[n] for n in names}
        flat = torch.cat([v[n].flatten() for n in names]).double()
        H = (again(nearby) if strength else found).double()
        scale = (H.square() @ flat.square()).sqrt()
        for factor in STEPS:
            step = factor * step_of(truth.dtype)
            plus, minus = (gradient(truth, v, sign * step, objective) for sign in (1, -1))
            noise = 16 * torch.finfo(truth.dtype).eps * (plus.abs() + minus.abs()).amax() / step
            slack = torch.finfo(found.dtype).eps ** 0.35 * (scale + 1e-6 * scale.amax()) + noise
            if bool(((H @ flat - (plus - minus) / (2 * step)).abs() <= slack).all()):
                return
    where = wrong_module(separate(truth.own), truth.x, order=2)
    raise Unconfirmed(f"{where or type(model).__name__}: {NO_SECOND}")


def gradient(
    truth: Truth, v: PerParameter, step: float, objective: Callable[[Tensor], Tensor]
) -> Tensor:
    """The gradient of the objective in the parameters that v moves, at θ + step · v: [P]."""
    with shifted(truth.own, v, step), torch.enable_grad():
        parameters = [truth.own.get_parameter(n).requires_grad_() for n in v]
        y = objective(truth.own(truth.x.clone()))
        if not y.requires_grad:
            return torch.cat([p.new_zeros(p.numel(), dtype=torch.float64) for p in parameters])
        found = torch.autograd.grad(y, parameters, materialize_grads=True)
    return torch.cat([g.flatten() for g in found]).double()


@dataclass(frozen=True)
class Entry:
    """One entry of a parameter at one input, and what was found there.

    Attributes:
        name: The parameter.
        index: The entry's position.
        b: The input's.
        J: First derivatives of the outputs, [T].
        S: Second derivatives, [T].
        unit: What they are measured in, [T].
        size: Of the parameter's entries.
        precision: Of the numbers that J and S were computed in.
    """

    name: str
    index: int
    b: int
    J: Tensor
    S: Tensor
    unit: Tensor
    size: float
    precision: float


def second_order_doubts(
    truth: Truth, found: Derivatives, rows: Rows | None, most: int, among: Sequence[int]
) -> Tensor:
    """At which inputs S differs from the difference quotient of J, at the chosen entries: [k]."""
    doubt = torch.zeros(len(truth.x), dtype=torch.bool, device=truth.x.device)
    generator = torch.Generator("cpu").manual_seed(0)  # not the caller's
    carried = rows(found.outputs) if found.projected and rows is not None else None
    for entry in entries(truth, found, most, among):
        r = torch.randn(entry.S.shape, generator=generator, device="cpu", dtype=torch.float64)
        r, row = r.to(entry.S.device) / entry.unit, None
        if carried is not None:
            row = carried[entry.b].double()
        if not doubt[entry.b] and not is_second_derivative(truth, entry, r, row):
            doubt[entry.b] = True
    return doubt


def is_second_derivative(truth: Truth, entry: Entry, r: Tensor, carried: Tensor | None) -> bool:
    """Whether Σ_a r_a S_a of one entry is the derivative of Σ_a r_a J_a along it."""
    parameter = truth.own.get_parameter(entry.name)
    weights = (r if carried is None else r @ carried).to(truth.dtype)
    claim, terms = r @ entry.S, (r * entry.S).square().sum().sqrt()
    eps = torch.finfo(truth.dtype).eps
    slack = entry.precision**0.35 * (1 + terms) * len(r) ** 0.5
    moves = (r * entry.J).abs().sum()
    quotients = {}
    for factor in STEPS_OF_ENTRIES:
        step = factor * eps ** (1 / 3) * entry.size
        try:
            plus, minus = (slope(truth, parameter, entry, sign * step, weights) for sign in (1, -1))
        except RuntimeError:  # autograd has no derivative: of leaky_relu_(s), for one
            return is_second_difference(truth, parameter, entry, weights, claim, slack)
        quotients[step] = (plus - minus) / (2 * step)
        noise = 8 * eps * (moves + plus.abs() + minus.abs()) / step
        if bool((claim - quotients[step]).abs() <= slack + noise):
            return True
    rounding = slope_noise(truth, entry, weights)
    most = torch.maximum(RESOLUTION * (1 + terms), rounding / max(quotients))
    return any(
        bool((claim - q).abs() <= slack + torch.minimum(rounding / step, most))
        for step, q in quotients.items()
    )


def slope_noise(truth: Truth, entry: Entry, weights: Tensor) -> Tensor:
    """Rounding errors to expect in a slope, measured in float32 as those of the outputs are."""
    exact = slope(truth, truth.own.get_parameter(entry.name), entry, 0.0, weights)
    narrow = separate(truth.own).float().requires_grad_()
    x = truth.x.float() if truth.x.is_floating_point() else truth.x
    other = replace(truth, own=narrow, x=x)
    try:
        found = slope(other, narrow.get_parameter(entry.name), entry, 0.0, weights.float())
    except (RuntimeError, TypeError):
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
    step = float(torch.finfo(truth.dtype).eps ** 0.25) * entry.size
    values = []
    for shift in (step, 0.0, -step):
        with moved(parameter, entry.index, shift):
            values.append(outputs_of(truth.own, truth.x[entry.b : entry.b + 1])[0] @ weights)
    quotient = (values[0] - 2 * values[1] + values[2]).double() / step**2
    noise = 4 * (weights.abs().double() @ truth.noise.double()) / step**2
    return bool((claim - quotient).abs() <= slack + torch.minimum(noise, 1 + claim.abs()))


@contextmanager
def moved(parameter: nn.Parameter, index: int, shift: float) -> Iterator[None]:
    """Move one entry of a parameter for a while."""
    number = parameter.data.view(-1)[index : index + 1]
    before = number.clone()
    try:
        number += shift
        yield
    finally:
        number.copy_(before)


def noise_of_rows(truth: Truth, r: Tensor, carried: Tensor | None) -> Tensor:
    """Rounding errors to expect in the outputs, or in the rows that were carried back."""
    noise = truth.noise.double()
    return noise if carried is None else noise.amax().expand_as(r)


def slope(
    truth: Truth, parameter: nn.Parameter, entry: Entry, shift: float, weights: Tensor
) -> Tensor:
    """The derivative of Σ_a weights_a h_a along one entry, where that is shifted."""
    with moved(parameter, entry.index, shift), torch.enable_grad():
        h = truth.own(truth.x[entry.b : entry.b + 1].clone())[0]
        if not h.requires_grad:
            return weights.new_zeros((), dtype=torch.float64)
        y = (h * weights).sum()
        (found,) = torch.autograd.grad(y, parameter, materialize_grads=True)
    return found.reshape(-1)[entry.index].double()


def entries(
    truth: Truth, found: Derivatives, most: int, among: Sequence[int]
) -> Iterator[Entry]:
    """The entries at which S is compared, each at one of the inputs ``among`` them.

    All of a small network; else at least one of every parameter, the first where S is large, every
    other one by chance.
    """
    generator = torch.Generator("cpu").manual_seed(0)  # not the caller's
    places = [(block, n) for block in found.blocks for n in block.inputs]
    parameters = dict(truth.own.named_parameters())
    total = sum(parameters[n].numel() for _, n in places)
    turn = 0
    for block, n in places:
        shares = most if total <= most else max(1, most // len(places))
        for i in positions(block, n, shares, generator):
            yield entry_at(truth, block, n, i, among[turn % len(among)])
            turn += 1


def positions(block: Block, name: str, most: int, generator: torch.Generator) -> Sequence[int]:
    """So many entries of a parameter, by position."""
    S, z = flat(block.second).detach().double(), block.inputs[name]
    unit = S.square().mean(2, keepdim=True).clamp_min(1e-300)
    lefts = (S.square() / unit).sum((0, 1)).cpu()
    rights = lefts.new_ones(1) if z is None else z.double().pow(4).sum(0).cpu()
    count = len(lefts) * len(rights)
    if count <= most:
        return range(count)
    chosen = []
    for i in range(most):
        parts = [w if i % 2 == 0 and bool(w.any()) else torch.ones_like(w) for w in (lefts, rights)]
        k, j = (int(torch.multinomial(w, 1, generator=generator)) for w in parts)
        chosen.append(k * len(rights) + j)
    return list(dict.fromkeys(chosen))


def flat(D: Tensor) -> Tensor:
    """Left factors with their numbers in a row: [k, T, K]."""
    return D.reshape(*D.shape[:2], -1)


def entry_at(truth: Truth, block: Block, name: str, i: int, b: int) -> Entry:
    """One entry; S of an output counts in units of that output's S, or of its J where S is 0.

    Or in units of rounding errors, where J is nothing else. BackPACK rounds S to about ‖J‖².
    """
    z, size = block.inputs[name], float(size_of(truth.own.get_parameter(name)))
    J, S = flat(block.J)[b].double(), flat(block.second)[b].double()
    right = J.new_ones(1) if z is None else z[b].double()
    k, j = divmod(i, len(right))
    J_rms = J.square().mean(1).sqrt() * right.square().mean().sqrt()
    S_rms = S.square().mean(1).sqrt() * right.pow(4).mean().sqrt()
    eps = torch.finfo(block.J.dtype).eps
    rounding = eps * (J_rms / size + J_rms.square().sum())
    if eps > torch.finfo(truth.dtype).eps:
        rounding = (
            rounding + truth.noise.double().amax() / torch.finfo(truth.dtype).eps * eps / size**2
        )
    unit = S_rms + 1e-8 * J_rms / size + 2**6 * rounding
    unit = unit.masked_fill(unit == 0, 1.0)
    return Entry(name, i, b, J[:, k] * right[j], S[:, k] * right[j].square(), unit, size, eps)


def size_of(parameter: Tensor) -> Tensor:
    """The size of a parameter's entries, or of what they may become where they are 0."""
    size = parameter.detach().square().mean().sqrt()
    fallback = max(1, parameter[:1].numel()) ** -0.5 if parameter.ndim else 1.0
    return torch.where(size > 0, size, torch.full_like(size, fallback))
