r"""Exact J of any network with outputs of each input alone, by ``torch.func``: first order only.

J = ∂h comes from one backward pass per output, over all inputs at once (``vmap`` of ``jacrev``);
where ``vmap`` cannot follow the network, from plain autograd, input by input. Nothing is known of
the operations, so nothing of them could be refused. Instead, J is *checked*: along random
directions v in the parameters, J·v must be the difference quotient of the outputs,

    J·v = (h(θ + εv) − h(θ − εv)) / 2ε,

which it is not where the graph was cut (``detach``, ``.data``, ``no_grad``) or an operation has
another derivative than it says.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fimlib._rewrite import rewritten
from fimlib._trace import Uncaptured, walk, without_randomness
from fimlib.derivatives import (
    Block,
    Derivatives,
    call_with,
    check_alone,
    check_outputs,
    is_same,
    perturb,
    separate,
)

NUMBERS_AT_A_TIME = 2**22  # of J that are computed together: 32 MB
STRENGTHS = (0.01, 0.02, 0.03)  # how far weights move where a kink hides the derivative
RANGE = 100.0  # contributions to J·v that one direction may sum up, largest over smallest

PerParameter = dict[str, Tensor]
Jacobian = Callable[[nn.Module, Tensor, list[str]], PerParameter]


def differentiate(
    model: nn.Module, x: Tensor, *, order: int = 2, wanted: frozenset[str] | None = None
) -> Derivatives:
    """J of any network, S of none; see ``fimlib.differentiate``.

    A tied parameter has the total derivative with respect to the shared tensor, under the first
    of its names. Everything is dense: [B, T, *shape] per parameter.

    Raises:
        NotImplementedError: order=2; the outputs are random, or depend on the other inputs; or J
            is not the derivative of the outputs.
        ValueError: the outputs are not [B, T], or a derivative is not finite.
    """
    if order != 1:
        raise NotImplementedError(
            "the functional engine has first derivatives only: use order=1 (enough for I, V₁, Î₁ "
            "and their bounds), or fimlib.hutchinson_variance_i2 for an unbiased estimate of V₂."
        )
    own, outputs = private(model, x)
    names = [n for n, _ in own.named_parameters() if wanted is None or n in wanted]
    check_alone(model, x, outputs)
    J = checked_jacobian(own, x, names, outputs)
    blocks = (Block(n.rpartition(".")[0], J[n], None, {n: None}) for n in names)
    return Derivatives(outputs, tuple(blocks), "functional")


def private(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """A copy that is safe to differentiate in its own parameters, and its outputs.

    Raises:
        ValueError: the input does not fit, or the outputs are not [B, T] and finite.
        NotImplementedError: the pass is random, or uses what the copy does not own.
    """
    own = separate(model).requires_grad_()
    foreign = {id(p): n for n, p in model.named_parameters()}

    def run() -> Tensor:
        with torch.enable_grad(), Uncaptured(foreign):
            h: Tensor = own(x.clone())
        return h

    outputs = without_randomness(run, x)
    check_outputs(outputs, len(x))
    parameters = {id(p) for p in own.parameters()}
    for node in walk(outputs.grad_fn)[0]:
        if id(getattr(node, "variable", None)) not in {*parameters, id(None)}:
            raise NotImplementedError(
                f"{type(model).__name__} uses a tensor that requires grad and is no parameter of "
                "the model: make it a parameter, or a buffer that does not."
            )
    return own, outputs.detach()


# The two ways to J.


def checked_jacobian(own: nn.Module, x: Tensor, names: list[str], outputs: Tensor) -> PerParameter:
    """J by the first of the two ways that gives the derivative of the outputs."""
    for way in (vectorised, one_by_one):
        try:
            J = in_chunks(way, own, x, names, outputs.shape[1])
        except (ValueError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever vmap or autograd does not know
            if way is one_by_one:
                raise NotImplementedError(
                    f"autograd cannot differentiate {type(own).__name__}: "
                    f"{type(error).__name__}: {error}"
                ) from error
            continue
        check_finite(J)
        wrong = doubted(way, own, x, J)
        if not wrong:
            return J
    raise NotImplementedError(
        f"what autograd says of parameter {', '.join(map(repr, wrong[:3]))} is not the "
        "derivative of the outputs (J·v differs from their difference quotient along v): the "
        "forward pass cuts the derivatives off, as detach(), .data, .item() and torch.no_grad() "
        "do, or your own autograd.Function has another backward()."
    )


def check_finite(J: PerParameter) -> None:
    """A ValueError that names a parameter whose derivative is not finite."""
    for name, rows in J.items():
        if not torch.isfinite(rows).all():
            raise ValueError(
                f"the derivative of the outputs in parameter {name!r} is NaN or infinite at one "
                "of the inputs, e.g. of a root at 0: check the weights and the inputs."
            )


def in_chunks(
    way: Jacobian, own: nn.Module, x: Tensor, names: list[str], num_outputs: int
) -> PerParameter:
    """J, [B, T, *shape] per parameter, a few inputs at a time."""
    parts = split(own, x, names, num_outputs)
    first = way(own, parts[0], names)
    if len(parts) == 1:
        return first
    J = {n: d.new_empty(len(x), *d.shape[1:]) for n, d in first.items()}
    done = 0
    for i, part in enumerate(parts):
        rows = way(own, part, names) if i else first
        for n in names:
            J[n][done : done + len(part)] = rows[n]
        done += len(part)
    return J


def split(own: nn.Module, x: Tensor, names: list[str], num_outputs: int) -> tuple[Tensor, ...]:
    """The inputs in parts whose J are small."""
    size = num_outputs * sum(own.get_parameter(n).numel() for n in names)
    parts: tuple[Tensor, ...] = x.split(max(1, NUMBERS_AT_A_TIME // max(1, size)))
    return parts


def outputs_from(own: nn.Module, names: list[str]) -> Callable[[PerParameter, Tensor], Tensor]:
    """The outputs [T] at one input, as a function of the named parameters."""
    fixed = {n: p.detach() for n, p in own.named_parameters() if n not in names}

    def outputs(values: PerParameter, one: Tensor) -> Tensor:
        with rewritten():
            h: Tensor = call_with(own, {**fixed, **values}, one[None])
        return h[0]

    return outputs


def values_of(own: nn.Module, names: list[str]) -> PerParameter:
    """The named parameters without a graph."""
    return {n: own.get_parameter(n).detach() for n in names}


def vectorised(own: nn.Module, x: Tensor, names: list[str]) -> PerParameter:
    """J at all inputs at once, by ``torch.func``."""
    outputs = outputs_from(own, names)

    def twice(values: PerParameter, one: Tensor) -> tuple[Tensor, Tensor]:
        h = outputs(values, one)
        return h, h.detach()

    jacobian = torch.func.jacrev(twice, has_aux=True)
    with quiet(), torch.enable_grad():
        J, h = torch.func.vmap(jacobian, in_dims=(None, 0))(values_of(own, names), x)
        whole = own(x.clone()).detach()
    if not is_same(h, whole, whole):
        raise NotImplementedError("the outputs are others under torch.vmap.")
    return {n: d.detach() for n, d in J.items()}


def one_by_one(own: nn.Module, x: Tensor, names: list[str]) -> PerParameter:
    """J at one input after the other, by plain autograd."""
    parameters = [own.get_parameter(n) for n in names]
    rows = [rows_at(own, one, parameters) for one in x.split(1)]
    return {n: torch.stack(d) for n, d in zip(names, zip(*rows, strict=True), strict=True)}


def rows_at(own: nn.Module, one: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """J at one input, [T, *shape] for each of the parameters."""
    with torch.enable_grad(), rewritten():
        h = own(one.clone())[0]
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    if not h.requires_grad:
        return [p.new_zeros(len(h), *p.shape) for p in parameters]

    def pull(seeds: Tensor, *, batched: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            h, parameters, seeds, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )

    try:
        with quiet():
            found = pull(eye, batched=True)
    except RuntimeError as error:  # an operation without a batched derivative
        if isinstance(error, torch.OutOfMemoryError):
            raise
        rows = zip(*(pull(seed, batched=False) for seed in eye), strict=True)
        found = tuple(
            torch.stack([p.new_zeros(p.shape) if g is None else g for g in row])
            for p, row in zip(parameters, rows, strict=True)
        )
    return [
        p.new_zeros(len(h), *p.shape) if g is None else g.detach()
        for p, g in zip(parameters, found, strict=True)
    ]


@contextmanager
def quiet() -> Iterator[None]:
    """Where torch has no batched derivative it says so, at length."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# Is it the derivative?


def doubted(way: Jacobian, own: nn.Module, x: Tensor, J: PerParameter) -> list[str]:
    """Parameters whose J is not the derivative of the outputs; [] if all are.

    At a kink (a ReLU at 0) no difference quotient is the derivative. A kink goes away when all
    weights are moved a little, a cut does not; so inputs in doubt get more chances.
    """
    left = x[~confirmed(own, x, J)]
    wrong: list[str] = []
    names, num_outputs = list(J), next(iter(J.values())).shape[1]
    for strength in STRENGTHS:
        if not len(left):
            return []
        moved, still, wrong = separate(own), [], []
        perturb(moved, strength)
        for part in split(own, left, names, num_outputs):
            again = way(moved, part, names)
            is_bad = ~confirmed(moved, part, again)
            still.append(part[is_bad])
            if is_bad.any():
                wrong += [n for n in names if not confirmed(moved, part, {n: again[n]}).all()]
        left = torch.cat(still)
    return list(dict.fromkeys(wrong or names)) if len(left) else []


def entries(rows: Tensor) -> Tensor:
    """All numbers of a parameter in a row, one for a parameter without axes: [B, T, numel]."""
    return rows.reshape(*rows.shape[:2], -1)


def confirmed(own: nn.Module, x: Tensor, J: PerParameter) -> Tensor:
    """At which inputs J·v agrees with the difference quotient of the outputs: [B], bool.

    The quotient is taken in float64, also for a float32 network, along directions that each let
    parameters of similar influence count alike. What moves no output by more than about 1e-8 of
    its size, when it changes by its own, is lost in rounding.
    """
    v = direction(own, list(J))
    flat = {n: (entries(J[n]), d.flatten()) for n, d in v.items()}
    products = {n: (rows @ d).double() for n, (rows, d) in flat.items()}
    squares = {n: (rows.square() @ d.square()).double() for n, (rows, d) in flat.items()}
    influence = {n: float(terms.mean().sqrt()) for n, terms in squares.items()}
    precise, z = in_double(own, x)
    step = step_of(precise)
    fine = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for shares in directions(influence):
        w = {n: share * v[n] for n, share in shares.items()}
        plus, minus = (outputs_at(precise, z, w, sign * step) for sign in (1, -1))
        quotient = (plus.double() - minus.double()) / (2 * step)
        claim = torch.stack([share * products[n] for n, share in shares.items()]).sum(0)
        scale = torch.stack([share**2 * squares[n] for n, share in shares.items()]).sum(0).sqrt()
        fine &= agree(claim, quotient, scale, J[next(iter(w))].dtype, noise(plus, step))
    return fine


def agree(
    claim: Tensor, quotient: Tensor, scale: Tensor, dtype: torch.dtype, noise: Tensor
) -> Tensor:
    """Whether [B, M] numbers are the quotients, row by row, within what rounding explains.

    Args:
        claim: In question, computed in ``dtype``.
        quotient: What they should be.
        scale: The size of the terms that were summed up to each.
        dtype: In which the claim was computed.
        noise: Of the quotients, [B, 1].
    """
    eps = torch.finfo(dtype).eps
    slack = eps**0.35 * scale + 1e3 * eps * scale.amax(1, keepdim=True) + noise
    fine: Tensor = ((claim - quotient).abs() <= slack).all(1)  # NaN is not
    return fine


def noise(h: Tensor, step: float) -> Tensor:
    """Rounding error of a difference quotient of the rows of h: [B, 1]."""
    return 16 * torch.finfo(h.dtype).eps * h.double().abs().amax(1, keepdim=True) / step


def in_double(own: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """A float64 copy and its inputs, or a plain copy where the network insists on its type."""
    copy = separate(own).double()
    z = x.double() if x.is_floating_point() else x
    try:
        with torch.enable_grad():
            if torch.isfinite(copy(z.clone())).all():
                return copy, z
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # whatever a module raises at numbers of another type
        pass
    return separate(own), x


def direction(own: nn.Module, names: list[str]) -> PerParameter:
    """A random direction, every parameter in proportion to its size."""
    moved = separate(own)
    perturb(moved, 1.0)
    return {n: (moved.get_parameter(n) - own.get_parameter(n)).detach() for n in names}


def step_of(own: nn.Module) -> float:
    """ε, along such a direction: so small that few kinks lie between, for rounding as large."""
    return float(torch.finfo(next(own.parameters()).dtype).eps ** 0.42)


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


def outputs_at(own: nn.Module, x: Tensor, v: PerParameter, step: float) -> Tensor:
    """The outputs at θ + step · v, [B, T]."""
    with shifted(own, v, step), torch.enable_grad():  # without it, attention takes another way
        h: Tensor = own(x.clone())
    return h.detach()


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
