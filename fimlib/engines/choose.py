"""Which engine differentiates a network: tried in order, each confirmed before its numbers leave.

Every engine is one row of ``ENGINES``. Its derivatives at the first batch are compared with the
network itself (``confirm``). An engine that does not support the network, or fails this check, is
skipped. If none is left, the error names the cause that the most general engine found, and a remedy
that has been tried on the first inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fimlib.derivatives import Derivatives, Sweep, all_finite
from fimlib.engines import backpack, first_order, forward_mode, functional, layerwise
from fimlib.engines.checks import (
    ForwardError,
    check_forward,
    check_model,
    check_module,
    check_plain,
    short,
)
from fimlib.engines.confirm import (
    ENTRIES,
    INPUTS,
    check_inputs_apart,
    confirm,
    inputs_to_check,
    positions_to_check,
)
from fimlib.engines.model import differentiating, selected, tied
from fimlib.engines.traced import second_order as traced
from fimlib.engines.truth import Unconfirmed
from fimlib.memory import raise_if_out_of_memory

Attempt = Callable[[nn.Module, Tensor, int, frozenset[str] | None], Sweep]


@dataclass(frozen=True)
class Engine:
    """One way to the derivatives of a network.

    Attributes:
        name: As in ``differentiate(..., engine=name)``.
        attempts: From the order of the derivatives, 1 or 2, to the functions to try, in order.
        takes_ties: Whether it has the derivatives of tied parameters.
    """

    name: str
    attempts: Callable[[int], tuple[Attempt, ...]]
    takes_ties: bool = False


def plain_engine(name: str, function: Callable[..., Derivatives]) -> Engine:
    """An engine with one attempt, which carries back the rows of the outputs only."""

    def attempt(model: nn.Module, x: Tensor, order: int, wanted: frozenset[str] | None) -> Sweep:
        return Sweep.from_derivatives(function(model, x.clone(), order=order, wanted=wanted))

    return Engine(name, lambda _: (attempt,))


def attempt_first_order(
    model: nn.Module, x: Tensor, _order: int, wanted: frozenset[str] | None
) -> Sweep:
    """J by one backward pass for each output."""
    try:
        return first_order.differentiate(model, x.clone(), wanted=wanted)
    except first_order.NeedsTheBatchError:
        check_inputs_apart(model, x)
        raise


def attempt_input_by_input(
    model: nn.Module, x: Tensor, _order: int, wanted: frozenset[str] | None
) -> Sweep:
    """J by autograd at one input after the other."""
    return functional.differentiate(model, x.clone(), wanted=wanted, way=functional.first_order)


def functional_attempt(way: functional.Way) -> Attempt:
    """One of these ways."""

    def attempt(model: nn.Module, x: Tensor, _order: int, wanted: frozenset[str] | None) -> Sweep:
        found = functional.differentiate(model, x.clone(), wanted=wanted, way=way)
        return Sweep.from_derivatives(found.derivatives())  # at once, since passes are many

    return attempt


FUNCTIONAL = {
    1: (attempt_first_order, attempt_input_by_input),
    2: tuple(functional_attempt(functional.second_order(c)) for c in forward_mode.WAYS),
}
ENGINES = {
    engine.name: engine
    for engine in (
        Engine("layerwise", lambda _: (layerwise.differentiate,)),
        plain_engine("traced", traced.differentiate),
        plain_engine("backpack", backpack.differentiate),
        Engine("functional", lambda order: FUNCTIONAL[order], takes_ties=True),
    )
}
AUTO = {1: ("layerwise", "functional"), 2: ("layerwise", "traced", "functional")}
ENTRIES_OF_THE_SLOW = 64  # of S that are compared where every one of them took a pass
LAYERS_TO_TRY = 4  # from the last on, as a remedy
SECONDS_OF_A_REMEDY = 10.0  # at most, where passes take long


class TooManyParameters(NotImplementedError):  # noqa: N818
    """The network is supported, but at a cost that the user has not accepted.

    Attributes:
        most: How many parameters may be differentiated as a remedy.
    """

    def __init__(self, message: str, most: int) -> None:
        super().__init__(message)
        self.most = most


def candidates(model: nn.Module, engine: str, order: int) -> tuple[str, ...]:
    """The engines to try, in order."""
    if order not in (1, 2):
        raise ValueError(f"order must be 1 (J) or 2 (J and S), got {order!r}.")
    if engine == "auto":
        return tuple(n for n in AUTO[order] if ENGINES[n].takes_ties or not tied(model))
    if engine not in ENGINES:
        known = ", ".join(("auto", *ENGINES))
        raise ValueError(f"unknown engine {engine!r}; choose one of: {known}.")
    return (engine,)


class Chosen(NamedTuple):
    """Confirmed derivatives.

    Attributes:
        batch: The derivatives.
        exact: The outputs in float64 at the inputs that were checked, as in ``confirm``.
        attempt: The function that found them, for later batches.
        refusals: Why the engines before it failed, by name.
    """

    batch: Sweep
    exact: Tensor
    attempt: Attempt
    refusals: dict[str, Exception]


def differentiate_checked(
    model: nn.Module,
    x: Tensor,
    engine: str,
    order: int,
    wanted: frozenset[str] | None = None,
) -> Chosen:
    """Confirmed derivatives in the named parameters.

    Raises:
        NotImplementedError: no engine supports the network; with the cause and a remedy.
    """
    names = candidates(model, engine, order)
    chosen = attempted(names, model, x, order, wanted, unasked=engine == "auto")
    if isinstance(chosen, dict):
        with differentiating(model, x):
            check_forward(model, x.detach())
        reason = cause(chosen)
        if isinstance(reason, ImportError):
            raise reason
        message = str(reason).rstrip(".")
        advice = remedy(chosen, model, x, engine, order, wanted)
        raise NotImplementedError(f"{message}.{advice}") from reason
    if not all_finite(chosen.batch.outputs):
        raise ValueError("the outputs hold NaN or infinite values: the weights are too large.")
    return chosen


def attempted(
    names: Sequence[str],
    model: nn.Module,
    x: Tensor,
    order: int,
    wanted: frozenset[str] | None,
    *,
    unasked: bool,
) -> Chosen | dict[str, Exception]:
    """Confirmed derivatives by the first of these engines that supports the network, or why not."""
    with differentiating(model, x):
        try:
            check_model(model, x)
            check_plain(model)
            return choose(names, model, x.detach(), order, wanted, unasked=unasked)
        except ForwardError:
            check_forward(model, x.detach())
            raise


def differentiate(
    model: nn.Module,
    x: Tensor,
    *,
    engine: str = "auto",
    order: int = 2,
    layers: Sequence[str] | str | None = None,
) -> Derivatives:
    r"""J = ∂h and S = ∂²h of every parameter, exactly, at each of B inputs.

    S vanishes in a last layer that is linear (Remark 4.4); one layer before, it is
    ``w_out σ''(s) z²`` (Remark 4.5). The weights, the mode and ``requires_grad`` of the model are
    left as they are. Frozen parameters are reported like all others.

    Args:
        model: Maps x to natural parameters of shape [B, T]; in eval mode, float32 or float64.
            Forward hooks and replaced ``forward()`` are part of it. Copies of the model call them
            often, also at other weights: a hook that fills a list of yours adds useless values.
        x: [B, ...], the inputs, of the model's dtype (or integers, where it embeds them) and on its
            device.
        engine: "layerwise" (``nn.Sequential`` of ``Linear``, elementwise activations, ``Dropout``,
            ``Flatten``, ``Identity``; anything without parameters before the first ``Linear``),
            "traced" (any ``forward()`` made of linear operations, elementwise functions and
            products: convolutional and residual networks, gates, norms, softmax), "functional"
            (any module, tied parameters too; S takes a pass for every parameter), "backpack" (the
            paper's way: ``nn.Sequential`` of what BackPACK has second derivatives for; keeps J and
            S dense, much slower, and rounds S to about the precision of ‖J‖²), or "auto": the first
            of the first three that supports the model, with order=1 "layerwise" or "functional",
            with order=2 "functional" only up to 10,000 parameters; ``plan`` says which.
        order: 2, or 1 for J alone: all that I, V₁, Î₁ and their bounds need, and cheaper.
        layers: Names of modules or parameters, e.g. ["0", "head.bias"], or "trainable" for those
            that require grad: only they are reported, and work for others is saved. None: all.

    Raises:
        ValueError: random layers are in training mode; weights or inputs are NaN or infinite;
            shapes or dtypes do not fit; the engine or a layer is unknown.
        NotImplementedError: no engine supports a module, or it cannot be copied, or has a backward
            hook, which may change gradients; or what autograd says is not the derivative of the
            outputs, as with ``detach()`` or a straight-through estimator; or the outputs for one
            input depend on the others of the batch. The message names the module, and a remedy that
            works if there is one.
        ImportError: BackPACK is asked for and not installed.
        TypeError: the model is no module, or x no tensor.

    Precision: that of the model's dtype. J and S of torch's activations have closed forms, to a
    relative error of 1e-10 for pre-activations in [−50, 50]; inside the kernels of ``nn.GRU`` and
    ``nn.LSTM``, and where an activation works in place under "functional", they are torch's own,
    which lose digits in proportion to 1/(1 − |σ|).

    Check: at up to 8 inputs J is compared with difference quotients of the outputs, in float64, a
    sample of the entries of S with those of J, and the outputs of these inputs together with those
    of each alone. A fault in few entries of S in one layer can escape it.

    Cost: that of the check, one forward pass, and one backward sweep that carries T + U rows for
    each of the B inputs, U the hidden units behind the next layer: split large batches where memory
    is short (``accumulate`` does). "traced" carries one row for every unit with curvature, and goes
    input by input where inputs share a tensor without a batch axis, or a parameter is used in more
    than one place. With order=1, T rows. "functional" takes one pass for every parameter; with
    order=1 it takes T backward passes through the whole batch, and keeps their rows at the places
    where parameters enter.

    Example: h = w·tanh(v·x) at x = 1, v = 0, w = 3: ∂h/∂v = w tanh'(0) = 3, ∂²h/∂v² = 0.
        >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False))
        >>> _ = nn.init.zeros_(net[0].weight), nn.init.constant_(net[2].weight, 3.0)
        >>> d = differentiate(net, torch.ones(1, 1))
        >>> float(d.jacobian("0.weight")), float(d.second("0.weight")) == 0.0
        (3.0, True)
    """
    model = check_module(model)
    x = x.detach().clone() if isinstance(x, Tensor) else x  # the result keeps parts of it
    return differentiate_checked(
        model, x, engine, order, selected(model, layers)
    ).batch.derivatives()


def differentiator(
    model: nn.Module,
    *,
    engine: str = "auto",
    order: int = 2,
    layers: Sequence[str] | str | None = None,
    compare: Callable[[Tensor, Tensor], None] = lambda *_: None,
) -> Callable[..., Sweep]:
    """``differentiate`` for many similar batches; the first is checked in full.

    Where that has very few inputs the next are, too, as one dead ReLU may hide everything.

    The others go to the engine that supports the first. The caller checks for finite values, so
    that a GPU is synchronised once. The function takes x, and the network that holds a batch, if
    x are positions in one (``Held``). ``compare`` receives the outputs at the inputs that are
    checked, and the same in float64.
    """
    model = check_module(model)
    wanted = selected(model, layers)
    first: list[tuple[Attempt, str, torch.dtype, torch.device]] = []
    seen = 0  # inputs of confirmed batches

    def differentiate_batch(x: Tensor, held: nn.Module | None = None) -> Sweep:
        nonlocal seen
        network = held or model
        if first:
            attempt, name, *kind = first[0]
            if [x.dtype, x.device] != kind:
                raise ValueError(
                    f"the input is {x.dtype} on {x.device}, those before were {kind[0]} on "
                    f"{kind[1]}: convert it with .to(...)."
                )
            if seen >= inputs_to_check(model):
                try:
                    with differentiating(network, x):
                        found = attempt(network, x.detach(), order, wanted)
                    return replace(found, engine=name)
                except NotImplementedError:  # these inputs take another path through the network
                    pass
        chosen = differentiate_checked(network, x, engine, order, wanted)
        at = positions_to_check(len(x), model).to(x.device)
        compare(chosen.batch.outputs[at], chosen.exact)
        seen += len(x)
        first[:] = [(chosen.attempt, chosen.batch.engine, x.dtype, x.device)]
        return chosen.batch

    return differentiate_batch


def choose(
    names: Sequence[str],
    model: nn.Module,
    x: Tensor,
    order: int,
    wanted: frozenset[str] | None,
    *,
    unasked: bool,
) -> Chosen | dict[str, Exception]:
    """Derivatives by the first engine that supports the network, or every engine's refusal."""
    refusals: dict[str, Exception] = {}
    for name in names:
        if name == "functional" and order == 2:
            try:
                check_first_order(model, x, wanted)
                if unasked:
                    check_affordable(model, x, wanted)
            except NotImplementedError as refusal:
                refusals[name] = refusal
                continue
        for attempt in ENGINES[name].attempts(order):
            try:
                found = tried(name, attempt, model, x, order, wanted)
            except (NotImplementedError, ImportError) as refusal:
                if not isinstance(refusals.get(name), Unconfirmed):
                    refusals[name] = refusal
                continue
            return Chosen(*found, attempt, refusals)
    return refusals


def tried(
    name: str,
    attempt: Attempt,
    model: nn.Module,
    x: Tensor,
    order: int,
    wanted: frozenset[str] | None,
) -> tuple[Sweep, Tensor]:
    """The derivatives of one attempt, confirmed, and what ``confirm`` returns.

    Raises:
        ValueError, NotImplementedError, ImportError: in fimlib's words.
    """
    names = tied(model)
    if names and not ENGINES[name].takes_ties:
        first, second = names
        raise NotImplementedError(
            f"parameter {second!r} is the same tensor as {first!r}: engine {name!r} has no "
            "derivatives of tied parameters."
        )
    try:
        batch = replace(attempt(model, x, order, wanted), engine=name)
        at = positions_to_check(len(x), model).to(x.device)

        def again(moved: nn.Module, inputs: Tensor) -> Sweep:
            return attempt(moved, inputs, order, wanted)

        most = ENTRIES if name != "functional" else ENTRIES_OF_THE_SLOW
        exact = confirm(model, x[at], batch, at, again, most)
    except (ValueError, NotImplementedError, ImportError):
        raise
    except Exception as error:  # a forward pass may hold anything
        raise_if_out_of_memory(error)
        raise NotImplementedError(
            f"engine {name!r} cannot follow the forward pass of {type(model).__name__}: "
            f"{short(error)}."
        ) from error
    return batch, exact


def check_first_order(model: nn.Module, x: Tensor, wanted: frozenset[str] | None) -> None:
    """Refuse a network whose first derivatives are wrong, before every parameter takes a pass.

    Raises:
        Unconfirmed: they are.
    """
    at = positions_to_check(len(x), model).to(x.device)
    first = choose(("functional",), model, x[at], 1, wanted, unasked=False)
    if isinstance(first, dict) and isinstance(first["functional"], Unconfirmed):
        raise first["functional"]


def check_affordable(model: nn.Module, x: Tensor, wanted: frozenset[str] | None) -> None:
    """Refuse a computation of very many passes, unless the user asked for it by name.

    Raises:
        TooManyParameters: with about how long it takes.
    """
    parameters = dict(model.named_parameters())
    names = [n for n in parameters if wanted is None or n in wanted]
    count = sum(parameters[n].numel() for n in names)
    if count <= forward_mode.MANY_PARAMETERS:
        return
    own, _ = functional.private(model, x[:1])
    each = forward_mode.seconds_each(own, x[:1], names)
    if each == float("inf"):  # the engine itself says why
        return
    inputs = "this input" if len(x) == 1 else f"these {len(x)} inputs"
    raise TooManyParameters(
        f"second derivatives of this network take one pass for each of {count:,} parameters, about "
        f"{duration(each * count * len(x))} for {inputs}; engine='functional' makes them.",
        min(forward_mode.MANY_PARAMETERS, int(SECONDS_OF_A_REMEDY / each)),
    )


def duration(seconds: float) -> str:
    """A time in the largest unit that makes it at least 1."""
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return "a second" if seconds < 2 else f"{seconds:.0f} seconds"


# Messages.


def cause(refusals: dict[str, Exception]) -> Exception:
    """The refusal by the engine that came furthest."""
    every = list(refusals.values())
    return ([e for e in every if isinstance(e, Unconfirmed)] or every)[-1]


class Remedy(NamedTuple):
    """Another call, and the sentence that advises it."""

    sentence: str
    engine: str
    order: int
    wanted: frozenset[str] | None


def remedy(
    refusals: dict[str, Exception],
    model: nn.Module,
    x: Tensor,
    engine: str,
    order: int,
    wanted: frozenset[str] | None,
) -> str:
    """The first remedy that works at the first inputs, as a sentence; "" if none does."""
    costly = next((e for e in refusals.values() if isinstance(e, TooManyParameters)), None)
    trials: list[Remedy] = []
    if engine != "auto":
        trials.append(Remedy(" engine='auto' supports it.", "auto", order, wanted))
    if wanted is None:
        for chosen in parts(model, costly.most if costly else None):
            named = ", ".join(map(repr, chosen))
            sentence = f" For a part of the network take layers=[{named}]."
            trials.append(Remedy(sentence, engine, order, selected(model, chosen)))
    if order == 2:
        trials.append(Remedy(" For I, V₁ and Î₁ alone take order=1.", engine, 1, wanted))
    few_inputs = x[: 1 if costly else INPUTS]
    return next((t.sentence for t in trials if works(model, few_inputs, t)), "")


def works(model: nn.Module, x: Tensor, trial: Remedy) -> bool:
    """Whether the network can be differentiated so."""
    _, engine, order, wanted = trial
    names = candidates(model, engine, order)
    try:
        chosen = attempted(names, model, x, order, wanted, unasked=engine == "auto")
    except (ValueError, NotImplementedError):
        return False
    return isinstance(chosen, Chosen)


def parts(model: nn.Module, most: int | None) -> list[list[str]]:
    """Layers to try in place of the whole network, the last first.

    Args:
        model: The network.
        most: Parameters that they may have, and then several together at first; None: any number.
    """
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        layer = name.rpartition(".")[0]
        sizes[layer] = sizes.get(layer, 0) + parameter.numel()
    layers = [layer for layer in reversed(sizes) if layer]
    if most is None:
        return [[layer] for layer in layers[:LAYERS_TO_TRY]]
    last: list[str] = []
    for layer in layers:
        if sum(sizes[n] for n in [*last, layer]) > most:
            break
        last.insert(0, layer)
    several = [last] if 1 < len(last) < len(sizes) else []
    return several + [[n] for n in layers if sizes[n] <= most][:LAYERS_TO_TRY]
