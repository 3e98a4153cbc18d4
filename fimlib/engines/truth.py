"""The network itself: a private copy in float64, with the rounding errors of its outputs.

Checks compare with it and move its weights; the caller's network stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fimlib.engines.model import finite_outputs, or_initial, private_copy
from fimlib.memory import raise_if_out_of_memory

PerParameter = dict[str, Tensor]


class Unconfirmed(NotImplementedError):  # noqa: N818
    """An engine's numbers are not the derivatives of the outputs."""


@dataclass(frozen=True)
class Truth:
    """A private copy of the network at some inputs, in float64.

    Attributes:
        own: The copy; in the network's own type where that computes in nothing else.
        alone: Another copy, which has not been called; it has the same parameters.
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
            Unconfirmed: the network rounds numbers to a narrower type than its own, or changes its
                parameters.
        """
        own = private_copy(model).requires_grad_()
        alone = private_copy(model, own)
        h = outputs_without_narrowing(own, x)
        check_unchanged(model, own)
        h = h.to(min((h, *own.parameters()), key=bits).dtype)  # forward() may widen its outputs
        if h.dtype == torch.float64:
            narrow = finite_outputs(
                private_copy(model).float(), x.float() if x.is_floating_point() else x
            )
            return cls(own, alone, x, h, noise_of(h, narrow), h)
        z, wide = in_double(own, x)
        if wide is None:
            for copied in (own, alone):
                widen(copied, h.dtype)
            z, wide = in_double(own, x)
        if wide is None:
            own.__class__ = alone.__class__ = type(model)
            return cls(own.to(h.dtype), alone, x, h, noise_of(h, None), h)
        return cls(own, alone.double(), z, wide, noise_of(wide, h), h)

    @property
    def dtype(self) -> torch.dtype:
        """The type that quotients are computed in."""
        return self.outputs.dtype

    @cached_property
    def v(self) -> PerParameter:
        """A random direction, every parameter in proportion to its size."""
        generator = torch.Generator("cpu").manual_seed(0)  # not the caller's
        return {n: direction(p.detach(), generator) for n, p in self.own.named_parameters()}


def direction(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers between −√3 and √3 times the size of a parameter's, row by row.

    The rows of a weight may differ by powers of ten, as the outputs of its layer do.
    """
    numbers = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    numbers.uniform_(-(3**0.5), 3**0.5, generator=generator)
    rows = parameter.reshape(len(parameter), -1) if parameter.ndim else parameter.reshape(1, 1)
    sizes = torch.linalg.vector_norm(rows, dim=1, keepdim=True) / rows.shape[1] ** 0.5
    scaled = numbers.to(parameter).reshape(rows.shape) * or_initial(sizes, parameter)
    return scaled.reshape(parameter.shape)


def check_unchanged(model: nn.Module, called: nn.Module) -> None:
    """An Unconfirmed if a call has changed a parameter of the copy, as ``max_norm`` does."""
    pairs = zip(model.named_parameters(), called.parameters(), strict=True)
    for (name, before), after in pairs:
        if not torch.equal(before.detach(), after.detach()):
            raise Unconfirmed(
                f"parameter {name!r} is changed by the forward pass itself, as by max_norm of an "
                "embedding: the outputs are no function of it."
            )


def outputs_without_narrowing(plain: nn.Module, x: Tensor) -> Tensor:
    """The outputs in the network's own type; an Unconfirmed if it computes in a narrower one."""
    dtype = next(plain.parameters()).dtype
    seen = Narrowing(dtype)
    with seen:
        h = outputs_of(plain, x)
    if seen.narrowest is not None:
        raise Unconfirmed(
            f"the forward pass computes in {seen.narrowest}, narrower than the parameters' "
            f"{dtype}: remove the cast, or torch.autocast, inside the model."
        )
    return h


def in_double(own: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Make a copy float64: its inputs, and its outputs unless it computes in less."""
    own.double()
    z = x.double() if x.is_floating_point() else x
    seen = Narrowing(torch.float64)
    try:
        with seen:
            h = outputs_of(own, z)
    except Exception as error:  # of any kind, from numbers of another type
        raise_if_out_of_memory(error)
        return z, None
    is_double = h.dtype == torch.float64 and seen.narrowest is None
    return z, h if is_double and bool(torch.isfinite(h).all()) else None


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


class Widened(TorchFunctionMode):
    """Puts float64 in place of every type that a network of this type may cast to without loss."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.bits = torch.finfo(dtype).bits

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function with the types replaced."""
        if func is Tensor.float and self.bits <= 32:
            func = Tensor.double
        args, kwargs = tree_map_only(torch.dtype, self.wide, (args, kwargs or {}))
        return func(*args, **kwargs)

    def wide(self, dtype: torch.dtype) -> torch.dtype:
        """The type to take in place of this one."""
        is_wide = dtype.is_floating_point and torch.finfo(dtype).bits >= self.bits
        return torch.float64 if is_wide else dtype


def widen(own: nn.Module, dtype: torch.dtype) -> None:
    """Let a copy compute in float64 where its forward pass names a type, as many norms do."""
    kind = type(own)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with Widened(dtype):
            return kind.__call__(self, *args, **kwargs)

    own.__class__ = type(kind.__name__, (kind,), {"__call__": call})  # survives deepcopy()


def bits(t: object) -> int:
    """Of one number of a floating-point tensor; 0 of anything else."""
    is_real = isinstance(t, Tensor) and t.is_floating_point()
    return torch.finfo(t.dtype).bits if is_real else 0  # type: ignore[attr-defined]


def noise_of(h: Tensor, narrow: Tensor | None) -> Tensor:
    """Rounding errors to expect in each output, [T].

    In float32 they are 2²⁹ times as large as in float64, and there they can be measured. Not where
    float32 has no right digit of an output, as of 1 + tanh(-10): there numbers of size 8, or of the
    largest output, were rounded.
    """
    eps, size = torch.finfo(h.dtype).eps, h.abs().amax(0)
    least, most = 4 * eps * size, 16 * eps * size.amax()
    if narrow is None or narrow.shape != h.shape:
        return least + most
    error = (narrow.double() - h).abs()
    error = error.nan_to_num(0.0, 0.0, 0.0).amax(0)
    least = least + (error >= size / 2) * most.clamp_min(2**7 * eps)
    return least + MARGIN * error * (eps / torch.finfo(torch.float32).eps)


MARGIN = 2.0**5  # of the noise to expect over the noise that was measured


class Comparison:
    """A derivative beside difference quotients with several steps, entry by entry.

    The allowance for rounding errors has a limit, lest they hide the derivative. A quotient whose
    step is lost in them confirms nothing, since the outputs did not move. Neither does one that is
    less precise than an earlier quotient that disagreed. Where two quotients agree with each other
    and not with the derivative, the derivative is wrong.

    Args:
        found: The derivative.
        slack: How far it may be off, beside the rounding errors of a quotient.
        knows_noise: Whether those were measured, so that a single quotient is conclusive.

    Attributes:
        doubt: Which entries no quotient has confirmed.
    """

    def __init__(self, found: Tensor, slack: Tensor, *, knows_noise: bool = False) -> None:
        self.found, self.slack, self.knows_noise = found, slack, knows_noise
        self.doubt = torch.ones_like(found, dtype=torch.bool)
        self.wrong = torch.zeros_like(self.doubt)
        self.last, self.last_noise = torch.full_like(found, float("nan")), torch.zeros_like(found)
        self.least = torch.full_like(found, float("inf"))  # error shown by a precise quotient

    def add(self, quotient: Tensor, noise: Tensor, most: Tensor) -> None:
        """Compare with a quotient, whose rounding errors count up to ``most``."""
        slack, off = self.slack + torch.minimum(noise, most), (self.found - quotient).abs()
        is_fine = (noise / MARGIN <= slack) & (slack < self.least)
        near = is_fine & (off <= slack)  # NaN is not
        both = self.slack + noise + self.last_noise
        self.wrong |= ((quotient - self.last).abs() <= both) & (off > 4 * both)
        self.doubt &= ~near | self.wrong
        self.last, self.last_noise = quotient, noise
        if self.knows_noise:
            is_far = off > 4 * (self.slack + noise)
            self.least = torch.where(is_far, torch.minimum(self.least, off), self.least)


# Moved weights.


def step_of(dtype: torch.dtype) -> float:
    """ε along a direction: small, so that it crosses few kinks, yet well above rounding."""
    return float(torch.finfo(dtype).eps ** 0.42)


@contextmanager
def shifted(own: nn.Module, v: PerParameter, step: float) -> Iterator[None]:
    """Move the parameters of ``own`` to θ + step · v for a while."""
    moving = [(p, p.data, v[n]) for n, p in own.named_parameters() if n in v]
    try:
        for p, old, w in moving:
            p.data = torch.add(old, w.to(old), alpha=step)
        yield
    finally:
        for p, old, _ in moving:
            p.data = old


def outputs_at(truth: Truth, v: PerParameter, step: float) -> Tensor:
    """The outputs at θ + step · v, [k, T]."""
    with shifted(truth.own, v, step):
        return outputs_of(truth.own, truth.x)


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
