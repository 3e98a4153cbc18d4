r"""A data set of any size in bounded memory (Section 4.1): of every batch, only averages stay."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fimlib._checks import check_integer
from fimlib.derivatives import all_finite
from fimlib.engines.checks import (
    WRAPPER,
    add_axis,
    check_model,
    check_module,
    check_plain,
    short,
)
from fimlib.engines.choose import differentiate, differentiator
from fimlib.engines.confirm import inputs_to_check
from fimlib.engines.held import Forward, Held, hold
from fimlib.engines.model import differentiating, finite_outputs, private_copy
from fimlib.families.base import Family
from fimlib.families.probabilities import warn_of_probabilities
from fimlib.families.product import Positions
from fimlib.joint import Joint
from fimlib.memory import (
    BATCH_BYTES,
    BatchSize,
    LiveBytes,
    keep_freed_memory,
    out_of_memory,
    raise_if_out_of_memory,
)


def accumulate(
    model: nn.Module,
    inputs: Tensor | Iterable[Any],
    family: Family,
    *,
    quantities: Collection[str] | None = None,
    bounds: str | None = None,
    batch_size: int | None = None,
    layers: Sequence[str] | str | None = None,
    engine: str = "auto",
    dtype: torch.dtype | None = None,
    pick: Pick = None,
    forward: Forward | None = None,
) -> Joint:
    r"""Averages over a whole data set, batch by batch, in bounded memory (Theorem 4.7).

    Every batch is differentiated, averaged into one ``Joint``, and forgotten. The result does not
    depend on the size of the batches, up to rounding (1e-12, or 1e-6 where it is in float32).

    Args:
        model: Maps inputs to natural parameters [B, T]; in eval mode. See ``differentiate``.
        inputs: [M, ...], or an iterable of batches: a ``DataLoader``, a list, a generator. Batches
            go to the model's device one at a time. A batch is a tensor x or, with labels that are
            left out, (x, y), where y has one label for each input: [B] or [B, 1], or floating-point
            [B, k] if ``forward()`` takes one argument. Whatever may mean something else, as other
            tuples, dicts, or a tuple of equally long tensors in the place of a list of batches, is
            an error; ``pick`` says what is x.
        family: The output family.
        quantities: Which of "I", "Var_x I", "V1", "V2" and "C12" to accumulate; see ``Joint``. All
            by default. Without "V2" and "C12", first derivatives are enough, and cheaper.
        bounds: How λ_max(M) is found for the bounds; None, the default, for no bounds. See
            ``Joint``.
        batch_size: Inputs that are differentiated at a time; larger batches are split. By default
            as many as take about 256 MB, at least 1. For first derivatives a forward pass of one
            input says how many; what comes next is as large as those before show that it may be.
        layers: Names of the modules to report, all by default; see ``differentiate``.
        engine: Where the derivatives come from; see ``differentiate``.
        dtype: What contractions are computed in; the accumulators are float64. None: the network's
            own dtype for I alone, else float64. See ``Joint``.
        pick: Which part of every batch is x: a position, the key of a dict, or a function of the
            batch. The other parts are left out.
        forward: From the model and a batch of any kind to the outputs, as
            ``lambda model, batch: model(batch["ids"], batch["mask"])``. Every tensor of a batch
            counts the inputs along its first axis.

    Returns:
        The accumulator, on the model's device. It is empty where ``inputs`` is a tensor with
        M = 0, as the share of a process may be.

    Raises:
        ValueError: no batches; doubt about what is x; inputs of another shape than before, NaN or
            infinite; batch_size < 1; weights, buffers or mode of the model were changed on the way;
            and what ``differentiate`` and ``Joint.update`` refuse. The message names the batch,
            counted from 1.
        NotImplementedError: as in ``differentiate``.
        TypeError: a data set instead of batches of it, or batches that are no tensors.

    Warns:
        UserWarning: the outputs look like probabilities, and ``Categorical`` or ``Bernoulli`` takes
            logits; that is looked at in the first batch.

    Memory: about 256 MB for a batch, however many there are, beside the accumulator's 40 bytes per
        parameter (see ``Joint``) and two or three times as much while a batch is merged into it.

    Cost: that of ``differentiate`` and ``Joint.update`` for every batch. With a thousand classes,
        bounds take most of the time: an eigenvalue problem, O(C³), for each input. Batches are
        looked at for NaN where they are: those on the CPU before they move, so that a GPU is not
        waited for; those on a GPU cost one more wait each.

    Precision: a float32 model is differentiated in float32, and with ``dtype=torch.float32``
        contracted in it, too. Layer means of I, V₁ and V₂ are then within 1e-5 of those in float64
        while all logits stay below 250, also where σ_max is 1 − 1e-6; that of I where 1 − σ_max is
        1e-30. With larger logits the error grows in proportion: they are rounded, and the softmax
        with them. So it does where J has a large part that all classes share. Of I alone, numbers
        below 1e-30 may be lost.

    Example: h = w·x with a Gaussian label: I(w|x) = x², on average (1 + 9 + 4)/3.
        >>> from fimlib import Gaussian
        >>> net = torch.nn.Linear(1, 1, bias=False).double()
        >>> x = torch.tensor([[1.0], [3.0], [2.0]]).double()
        >>> joint = accumulate(net, x, Gaussian(), batch_size=2)
        >>> joint.count, round(float(joint.fisher_information()["weight"]), 12)
        (3, 4.666666666667)
    """
    model = check_module(model)
    stream = Batches(model, inputs, family, pick, forward)
    joint = Joint(family, quantities=quantities, bounds=bounds, dtype=dtype)
    is_whole = isinstance(inputs, Tensor)
    done = accumulate_stream(model, stream, joint, batch_size, layers, engine, is_whole=is_whole)
    if done.count == 0 and not is_whole:
        raise ValueError(
            "there are no batches: an iterator can be used only once, make it anew; a process "
            "without inputs passes a tensor of shape [0, ...]."
        )
    return done


Batch = tuple[int, nn.Module, Tensor]  # its number, and a network with its inputs


def accumulate_stream(
    model: nn.Module,
    stream: Iterable[Batch],
    joint: Joint,
    batch_size: int | None,
    layers: Sequence[str] | str | None,
    engine: str,
    *,
    is_whole: bool = False,
    go_on: Callable[[int], bool] = lambda _: True,
) -> Joint:
    """Take the batches of a stream, or of one whole tensor, into an empty accumulator.

    After every part of a batch ``go_on`` is told how many inputs are done, and may end it.
    """
    family = joint.family
    keep_freed_memory()
    order = 2 if {"V2", "C12", "importance2"} & joint.quantities else 1
    choice: dict[str, Any] = {"engine": engine, "order": order, "layers": layers}
    compare = partial(check_rounding, family=family)
    differentiate_batch = differentiator(model, compare=compare, **choice)
    size = None if batch_size is None else BatchSize(check_integer(batch_size, "batch_size"))
    shape, width = None, None
    before: list[Part] = []
    device = next((p.device for p in model.parameters()), None)
    for number, held, batch in stream:
        again = partial(differentiate_batch, held=held)
        with named(f"batch {number}"):
            shape = check_shape(batch, shape)
            is_free = size is None
            size = size or first_size(held, batch, joint, order)
        start = joint.count
        chosen = portions(batch, size, is_spread=is_free)
        for i, (first, last, part) in enumerate(chosen, start=1):
            place = f"batch {i if is_whole else number} (inputs {start + first} to {start + last})"
            has_more = joint.count - start + len(part) < len(batch)
            with named(place), size.measured(wanted=joint.count > 0 and has_more):
                if before:
                    check_unchanged(before, parts_of(model))
                check_finite(part)
                try:
                    done = again(part.to(device))
                    width = check_width(done.outputs, family, width)
                    if joint.count == 0:
                        warn_of_probabilities(family, done.outputs, model)
                    joint.update_sweep(done)
                    del done  # before the next needs the memory
                    before = before or parts_of(model)
                except NotImplementedError:
                    raise
                except Exception as error:  # of any kind, from forward()
                    raise_if_out_of_memory(error)
                    differentiate(held, part.to(device), **choice)  # with all checks
                    raise
            if not go_on(joint.count):
                return joint
    return joint


def check_rounding(outputs: Tensor, exact: Tensor, family: Family) -> None:
    """Refuse outputs that are rounded so much that the family has another mean.

    Large outputs may agree to all their digits where a softmax of them does not.
    """
    if outputs.dtype == exact.dtype:  # float64, or a network that insists on its type
        return
    means = [family.mean(family.natural(h)) for h in (outputs, exact)]
    slack = 4 * torch.finfo(outputs.dtype).eps ** 0.5 * (1 + means[1].abs())
    if bool(((means[0] - means[1]).abs() > slack).any()):
        raise ValueError(
            f"{outputs.dtype} rounds the outputs so much that {type(family).__name__} has another "
            "mean: call .double() on the model and on the inputs."
        )


def portions(
    batch: Tensor, size: BatchSize, *, is_spread: bool
) -> Iterator[tuple[int, int, Tensor]]:
    """Parts of a batch, with the first and the last of their positions in it.

    The first part is the one that is checked. If asked, it is spread over the batch.
    """
    count, start = len(batch), 0
    order = spread_first(count, size.now) if is_spread and size.now < count else None
    while start < max(1, count):
        stop = min(start + size.now, count)
        if order is None:
            yield start, stop - 1, batch[start:stop]
        else:
            at = order[start:stop]
            yield int(at[0]), int(at[-1]), batch[at.to(batch.device)]
        start = max(1, stop)


def spread_first(count: int, few: int) -> Tensor:
    """All positions in a batch: first so few that are spread over it, then the others."""
    is_early = torch.zeros(count, dtype=torch.bool, device="cpu")
    is_early[torch.arange(few, device="cpu") * count // few] = True
    return torch.cat([is_early.nonzero()[:, 0], (~is_early).nonzero()[:, 0]])


ROWS = 6  # of as many numbers as a forward pass keeps, beside those of outputs and quantities


def first_size(model: nn.Module, batch: Tensor, joint: Joint, order: int) -> BatchSize:
    """How many inputs to take while none was measured.

    For S as few as are checked. For J as many as fit if the backward pass of every output leaves as
    many numbers as the forward pass, which is called with one input.
    """
    check_plain(model)
    x = batch[:1].to(next(model.parameters()).device)
    check_model(model, x)
    kinds = len(joint.quantities) + (0 if joint.bounds is None else 8)
    room = BATCH_BYTES + 16 * kinds * sum(p.numel() for p in model.parameters())
    few = inputs_to_check(model)
    if len(batch) <= few or order == 2:
        return BatchSize(few, room)
    own = private_copy(model).requires_grad_()
    kept = LiveBytes([x, *own.parameters(), *own.buffers()])
    with differentiating(own, x), kept:
        h = finite_outputs(own, x, grad=True)
    if h is None:  # the first batch will tell why
        return BatchSize(few, room)
    rows = h.numel() + ROWS + 2 * kinds
    return BatchSize(max(few, BATCH_BYTES // max(1, rows * kept.peak)), room)


# What is x.

Pick = Callable[[Any], Tensor] | int | str | None


@dataclass
class Batches:
    """The number of each batch, from 1, with a network and the inputs x to differentiate it at.

    With ``forward``, several labels for one input, or masked classes, the network holds the batch,
    and x are positions in it.

    Attributes:
        is_masked: Whether some outputs for the first inputs are −∞, and the family has a meaning
            for them; None before the first batch.
    """

    model: nn.Module
    inputs: Tensor | Iterable[Any]
    family: Family
    pick: Pick = None
    forward: Forward | None = None
    is_masked: bool | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self.forward is not None and self.pick is not None:
            raise ValueError("forward is given the whole batch: leave pick out.")
        is_held = self.forward is not None or isinstance(self.family, Positions)
        for number, batch in self.whole():
            network, x = self.model, batch
            with named(f"batch {number}"):
                if is_held or self.is_masked:
                    network, x = self.hold(batch)
                if self.is_masked is None:
                    self.is_masked = self.has_masks(network, x)
                    if self.is_masked:
                        network, x = self.hold(batch)
            yield number, network, x

    def whole(self) -> Iterator[tuple[int, Any]]:
        """Every batch, or its x, counted from 1."""
        if self.forward is not None:
            return whole_batches(self.inputs)
        return inputs_of(self.model, self.inputs, self.pick)

    def hold(self, batch: Any) -> tuple[Held, Tensor]:
        """The network that holds a batch, and positions in it."""
        held = hold(self.model, self.outputs, batch)
        return held, held.positions

    def outputs(self, network: nn.Module, batch: Any) -> Tensor:
        """[b, T], of a part of a batch."""
        h = self.forward(network, batch) if self.forward else network(batch)
        if isinstance(h, Tensor) and isinstance(self.family, Positions):
            h = self.family.flatten(h)
        return self.family.unmasked(h) if self.is_masked else h

    def has_masks(self, network: nn.Module, x: Tensor) -> bool:
        """Whether a few of the outputs hold −∞, and the family allows that."""
        if type(self.family).unmasked is Family.unmasked:
            return False
        try:
            few = x[: inputs_to_check(network)]
            check_finite(few)
            few = few.to(next(network.parameters()).device)
            own = private_copy(network)
            with differentiating(own, few), torch.no_grad():
                return bool(torch.isneginf(own(few.clone())).any())
        except Exception:  # of any kind: the first batch will tell why
            return False


def whole_batches(inputs: Tensor | Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Every batch, counted from 1; a tensor is one batch, and none where it is empty."""
    if isinstance(inputs, Tensor):
        yield from [(1, inputs)] if len(inputs) else []
        return
    check_iterable(inputs)
    if isinstance(inputs, tuple) and any(isinstance(t, Tensor) for t in inputs):
        raise ValueError(
            "inputs is a tuple of tensors, which may be one batch: pass [inputs] then, or "
            "list(inputs) if every one is a batch of its own."
        )
    yield from enumerate(inputs, start=1)


def check_iterable(inputs: object) -> None:
    """A TypeError for one batch, or a data set, in the place of batches."""
    if isinstance(inputs, Mapping):
        raise TypeError(
            f"inputs is a {type(inputs).__name__}, which may be one batch: pass [inputs], and "
            "forward= to say what the model makes of it."
        )
    if isinstance(inputs, Dataset) or not hasattr(inputs, "__iter__"):
        raise TypeError(
            f"inputs is a {type(inputs).__name__}, which yields single inputs or none: pass "
            "torch.utils.data.DataLoader(inputs, batch_size=...), or a tensor [M, ...]."
        )


def inputs_of(
    model: nn.Module, inputs: Tensor | Iterable[Any], pick: Pick
) -> Iterator[tuple[int, Tensor]]:
    """The x of every batch, counted from 1; a tensor is one batch, and none where it is empty."""
    if isinstance(inputs, Tensor):
        if pick is not None:
            raise ValueError("inputs is a tensor, x itself, so that there is nothing to pick.")
        if inputs.ndim == 0 or len(inputs):
            yield 1, inputs
        return
    check_iterable(inputs)
    arguments = count_arguments(model)
    if pick is None:
        check_many(inputs, arguments)
    for number, batch in enumerate(inputs, start=1):
        place = f"batch {number}"
        yield number, x_of(batch, place, arguments) if pick is None else picked(batch, place, pick)


class Arguments(NamedTuple):
    """How many positional arguments a forward() needs, and how many it takes at most."""

    needed: float
    taken: float


def count_arguments(model: nn.Module) -> Arguments:
    """Those of the model's forward(); one where there is no telling."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return Arguments(1, 1)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    is_open = any(p.kind == p.VAR_POSITIONAL for p in parameters)
    needed = sum(p.default is p.empty for p in named)
    return Arguments(needed, math.inf if is_open else len(named))


def check_many(inputs: Iterable[Any], arguments: Arguments) -> None:
    """A ValueError if tensors side by side may be one batch (x, y), or several arguments."""
    if not isinstance(inputs, tuple | list) or len(inputs) < 2:
        return
    if not all(isinstance(t, Tensor) for t in inputs):
        return
    is_one = len({t.shape[:1] for t in inputs}) == 1 and (
        isinstance(inputs, tuple)
        or len({t.dtype for t in inputs}) > 1
        or any(t.ndim < 2 for t in inputs)
        or len(inputs) <= arguments.taken
    )
    if is_one or arguments.needed > 1:
        raise ValueError(
            f"inputs is a {type(inputs).__name__} of {len(inputs)} tensors, which may be the parts "
            "of one batch, as in (x, y): pass x alone, or [inputs] and pick=0 for the first of "
            f"them. If every one is a batch of its own, pass iter(inputs); {WRAPPER}"
        )


def x_of(batch: Any, place: str, arguments: Arguments) -> Tensor:
    """The x of a batch x, (x,) or (x, y); an error where that is in doubt."""
    x, *others = batch if isinstance(batch, tuple | list) and batch else (batch,)
    if isinstance(x, Mapping):
        names = " or ".join(f"pick={name!r}" for name in x) if x is batch else "a function pick="
        raise TypeError(f"{place} holds a {type(x).__name__}: say what is x by {names}; {WRAPPER}")
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{place} is a {type(x).__name__}: batches must be tensors x of shape [B, ...] or "
            "pairs (x, y); convert them, e.g. by torch.as_tensor, or by the collate_fn of a "
            f"DataLoader; {WRAPPER}"
        )
    if others and not (len(others) == 1 and are_labels(others[0], x, arguments)):
        parts = ", ".join(map(in_words, (x, *others)))
        raise ValueError(
            f"{place} is a {type(batch).__name__} of {parts}, which is more than x and its labels: "
            f"take the first alone by pick=0, or another; {WRAPPER}"
        )
    return x


def in_words(part: Any) -> str:
    """A part of a batch in a few words."""
    if isinstance(part, Tensor):
        return f"{part.dtype} {list(part.shape)}"
    return type(part).__name__


def are_labels(y: Any, x: Tensor, arguments: Arguments) -> bool:
    """Whether y can be nothing but the labels of x."""
    if not isinstance(y, Tensor) or y.ndim == 0 or y.shape[:1] != x.shape[:1]:
        return False
    if arguments.needed > 1:
        return False
    if y.ndim == 1 or y.shape[1:] == (1,):
        return True
    return y.ndim == 2 and y.is_floating_point() and arguments.taken == 1


def picked(batch: Any, place: str, pick: Callable[[Any], Tensor] | int | str) -> Tensor:
    """What ``pick`` takes out of a batch."""
    if callable(pick):
        x = pick(batch)
    elif isinstance(batch, Tensor):
        raise ValueError(
            f"{place} is a tensor, and pick={pick!r} takes an entry of a tuple, list or dict: "
            "leave pick out, or pass [inputs] if they are one batch."
        )
    else:
        try:
            x = batch[pick]
        except (TypeError, LookupError) as error:
            known = f" of {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else ""
            raise ValueError(
                f"{place}: pick={pick!r} is no entry of its {type(batch).__name__}{known}."
            ) from error
    if not isinstance(x, Tensor):
        raise TypeError(f"{place}: pick gives a {type(x).__name__}, and x must be a tensor.")
    return x


@contextmanager
def named(place: str) -> Iterator[None]:
    """Say in an error where in the data it came up."""
    try:
        yield
    except NotImplementedError as error:
        # in terms of the call: accumulate takes no order
        told = str(error).replace("order=1", "quantities=['Var_x I', 'V1']")
        raise NotImplementedError(f"{place}: {told}") from error
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    except (MemoryError, RuntimeError) as error:
        if (full := out_of_memory(error)) is None:
            raise
        raise type(full)(
            f"{place}: {short(full)}: take smaller batches, by batch_size= where inputs are a "
            "tensor, else in your loader. estimate() needs the least: that of a training step."
        ) from error


def check_shape(batch: Tensor, shape: torch.Size | None) -> torch.Size:
    """The shape of one input, the same as before."""
    if batch.ndim < 2:
        raise ValueError(
            f"a batch must have shape [B, ...], got {list(batch.shape)}: {add_axis(batch)}."
        )
    if shape is not None and batch.shape[1:] != shape:
        raise ValueError(
            f"its inputs have shape {list(batch.shape[1:])}, those before {list(shape)}: pad them "
            "to one shape, or accumulate them apart and merge, joint.merge(other)."
        )
    return batch.shape[1:]


def check_width(outputs: Tensor, family: Family, width: int | None) -> int:
    """T, the same as before; but for sequences of any length."""
    found = outputs.shape[1]
    if width not in (None, found) and not isinstance(family, Positions):
        raise ValueError(f"the model gives {found} outputs, and gave {width} before.")
    return found


def check_finite(batch: Tensor) -> None:
    """Refuse NaN and infinite inputs, which a first activation may hide; wherever they are."""
    if not batch.is_meta and not all_finite(batch):
        raise ValueError("the input holds NaN or infinite values.")


Part = tuple[nn.Module | Tensor, Any]


def parts_of(model: nn.Module) -> list[Part]:
    """Modules with their mode, parameters and buffers with the number of writes to them."""
    tensors = (*model.parameters(), *model.buffers())
    versions = ((t.device, 0 if t.is_inference() else t._version) for t in tensors)
    return [*((m, m.training) for m in model.modules()), *zip(tensors, versions, strict=True)]


def check_unchanged(before: list[Part], now: list[Part]) -> None:
    """A ValueError if the model has other parts than before, or written ones."""
    same = len(now) == len(before) and all(
        part is old and state == was for (part, state), (old, was) in zip(now, before, strict=True)
    )
    if not same:
        raise ValueError(
            "the model was changed since the first batch: leave it as it is, its mode too, until "
            "the data are through, or give accumulate a copy of it."
        )
