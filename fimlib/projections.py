r"""I of any network and any number of outputs, by random projections, with its standard error.

Take independent random vectors w_x with E w_x = 0 and E w_x w_xᵀ = 𝓘(x). One backward pass of
Σ_x w_x·h(x) through a batch gives g_i = Σ_x w_x·J_i(x) for every parameter of any network, and

    E g_i² = Σ_x I(θᵢ|x),    Var g_i² = 2 (Σ_x I(θᵢ|x))² + Σ_x κ₄(w_x·J_i(x)).

κ₄ is a fourth cumulant; for random signs it is not positive. Each input may be squared by itself,
too; then no cross terms scatter: Var = Σ_x [2 I(θᵢ|x)² + κ₄]. The passes are independent, so their
spread is the standard error.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import random
import signal
import time
from abc import ABC, abstractmethod
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from fimlib._checks import check_choice, check_estimator, check_integer
from fimlib._files import DataDigest, check_path, model_digest, tensor_digest, versions
from fimlib._progress import progress
from fimlib._signals import later
from fimlib.derivatives import Derivatives
from fimlib.diagonal import Diagonal
from fimlib.distributed import process
from fimlib.engines import first_order, functional
from fimlib.engines.checks import (
    check_forward,
    check_model,
    check_module,
    check_outputs,
    check_plain,
    failed,
)
from fimlib.engines.choose import differentiate_checked
from fimlib.engines.confirm import MIXES, fits, inputs_to_check, positions_to_check
from fimlib.engines.held import Forward, Held
from fimlib.engines.model import (
    differentiating,
    finite_outputs,
    perturb_weights,
    private_copy,
    selected,
)
from fimlib.engines.rewrite import exact_lookups
from fimlib.estimates import Estimate, Record
from fimlib.families.base import Family, check_family, random_signs
from fimlib.families.probabilities import warn, warn_of_probabilities
from fimlib.joint import settings_of
from fimlib.left_factors import left_factors
from fimlib.memory import raise_if_out_of_memory
from fimlib.precision import variance_of
from fimlib.streaming import Batches, Pick, check_finite, check_shape, check_width, named

__all__ = ["estimate", "variance_importance", "variance_signs"]

PerParameter = dict[str, Tensor]
Draw = Callable[[Family, Tensor, torch.Generator], Tensor]

DRAWS: dict[str, Draw] = {
    "signs": lambda family, h, generator: family.draw_signs(h, generator),
    "labels": lambda family, h, generator: family.draw_residual(h, generator),
    "importance": lambda family, h, generator: family.draw_important(h, generator),
}
HALF = (torch.bfloat16, torch.float16)
PASSES = 32
PASSES_BEFORE_STOP = 16  # fewer do not tell their own spread
MOST_PASSES = 10_000
SECONDS_BETWEEN_CHECKPOINTS = 10.0
SMALLEST_ERROR = 1e-6
BATCHES_BETWEEN_WAITS = 64  # for a GPU
SHARE = 0.01  # of their size, by which weights move


def estimate(
    model: nn.Module,
    inputs: Tensor | Iterable[Any],
    family: Family,
    *,
    estimator: str = "signs",
    squares: str = "batch",
    passes: int | None = None,
    relative_error: float | None = None,
    batch_size: int = 256,
    layers: Sequence[str] | str | None = None,
    pick: Pick = None,
    forward: Forward | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Estimate:
    r"""The diagonal Fisher information E_x I(θᵢ|x) of any network, estimated with standard errors.

    Each pass draws a random vector w for every input, with E w = 0 and E wwᵀ = 𝓘, and squares the
    gradient of ``Σ_x w·h(x)``; the mean of these squares is ``Σ_x I(θᵢ|x)``, their variance is in
    Proposition 9.1 (beyond the paper, as all numbers from 9.1 on). A pass costs one forward and one
    backward pass for any number of outputs. The exact I takes a backward pass for each output.

    Args:
        model: Maps inputs to natural parameters [B, T]; in eval mode. What is float16 or bfloat16
            is computed in a float32 copy. Forward hooks are part of it; see ``differentiate``.
        inputs: [M, ...], or an iterable of batches that can be used again, as in ``accumulate``.
        family: The output family.
        estimator: How w is drawn. "signs": w = Lξ with random signs ξ and 𝓘 = LLᵀ, so that one
            pass has a relative standard deviation of √2 at most, for every parameter (Martens et
            al., arXiv:1206.6464; Sun, arXiv:2505.13614). "labels": the residual of one label that
            the model draws, as in Î₁ (Eq. 5); a rare label that no pass has drawn is missing from
            the standard error as well. "importance": the same, but rare classes are drawn
            more often and count less, for ``Categorical`` alone.
        squares: "batch" squares the gradient of a whole batch, for the price of a training step.
            "input" squares the gradient of each input: more memory, less variance.
        passes: How many, at least 2; 32 by default, where the relative error of "signs" is at most
            25 %. With ``relative_error`` the most that it may take.
        relative_error: ε. Stop once √(Σ SE² / Σ I²) over all parameters is at most ε. "signs" take
            2/ε² passes at most. Stopping by the measured error makes it look slightly smaller than
            it is: 0.203 for 0.207 in a small classifier with ε = 0.2.
        batch_size: Of a tensor ``inputs``, how many at a time.
        layers: Names of the modules to report, all by default; see ``differentiate``.
        pick: Which part of every batch is x; see ``accumulate``.
        forward: From the model and a batch of any kind to the outputs; see ``accumulate``.
        seed: Of the random vectors. Equal seeds give equal numbers on one machine. Processes of a
            group, as of torchrun, draw different ones; ``all_reduce`` merges their estimates.
        checkpoint: A file. Passes are saved to it at least every ten seconds, and when the call
            ends; the same call goes on from there, to the same numbers. More ``passes`` go on, too.
            One more forward pass sees that model and inputs are those of the file.

    Returns:
        The estimate; ``print`` shows its layers, ``save`` keeps it. Ctrl-C after two passes or more
        ends it early, with a warning.

    Raises:
        ValueError: an argument is out of its range; there are no batches, or an iterator, which can
            be used only once; the number of inputs changes between passes; ``accumulate`` would
            refuse a batch, which the message names; or the checkpoint is of another estimate, or
            cannot be written.
        NotImplementedError: autograd's derivative is not that of the outputs, or the outputs of an
            input depend on the others of the batch. Up to 8 inputs are checked, as in
            ``differentiate``.

    Memory: that of a training step, a copy of the weights, and three float64 numbers per parameter.
    With random signs, a GPU is waited for at every 64th batch only.

    Example: h = w·x with a Gaussian label has I = E x² = 5. Signs are exact where T = 1 and each
    input is squared by itself.
        >>> from fimlib import Gaussian
        >>> net = torch.nn.Linear(1, 1, bias=False).double()
        >>> x = torch.tensor([[1.0], [3.0]]).double()
        >>> found = estimate(net, x, Gaussian(), squares="input", passes=2)
        >>> float(found.value["weight"]), float(found.standard_error["weight"])
        (5.0, 0.0)
    """
    check_family(family)
    draw = DRAWS[check_choice(estimator, "estimator", DRAWS)]
    most = passes_to_take(estimator, passes, relative_error)
    model = check_module(model)
    check_parameters(model)
    origin = {
        "family": json.dumps(in_json(settings_of(family))),
        "seed": f"{seed}{process()}",
        "model": model_digest(model),
    }
    if any(p.dtype in HALF for p in model.parameters()):
        model = private_copy(model).float()
    batches_of = ""
    if isinstance(inputs, Tensor):
        size = check_integer(batch_size, "batch_size")
        inputs, batches_of = list(inputs.split(size)) if len(inputs) else [], str(size)
    elif hasattr(inputs, "__next__"):
        raise ValueError(
            "inputs is an iterator, which can be used only once, and every pass goes through all "
            "of them: pass a list, a DataLoader or a tensor."
        )
    source = Source(Batches(model, inputs, family, pick, forward), draw, seed)
    square = SQUARES[check_choice(squares, "squares", SQUARES)](model, layers, source)
    record = Record.of(square.shapes)
    file = None
    if checkpoint is not None:
        told = {**origin, "estimator": estimator, "squares": squares}
        told |= {"parameters": ", ".join(record.mean), "batch_size": batches_of}
        file = Checkpoint(check_path(checkpoint), record, source, told)
    try:
        interrupted = go_through(record, source, square, most, relative_error, file)
    finally:
        if file is not None:
            file.save()
    if interrupted:
        warn(f"interrupted: this estimate rests on {record.passes} of {most} passes.")
    origin |= {"data": str(source.digest), **versions()}
    return record.estimate(estimator, squares, origin)


def go_through(
    record: Record,
    source: Source,
    square: Square,
    most: int,
    relative_error: float | None,
    file: Checkpoint | None,
) -> bool:
    """Add passes until there are enough; whether Ctrl-C ended it."""
    with progress(most, "estimate", "passes") as bar:
        bar.update(record.passes)
        while record.passes < most and not is_reached(record, relative_error):
            try:
                record.add(*source.run(record.passes, square))
                if file is not None:
                    file.save(SECONDS_BETWEEN_CHECKPOINTS)
            except KeyboardInterrupt:
                if record.passes < 2:
                    raise
                return True
            if bar.update() and record.passes > 1:  # it was drawn
                bar.set_postfix_str(f"relative error {record.relative_error():.2g}")
    return False


def is_reached(record: Record, relative_error: float | None) -> bool:
    """Whether the requested relative error is reached."""
    if relative_error is None or record.passes < PASSES_BEFORE_STOP:
        return False
    return record.relative_error() <= relative_error


class Checkpoint:
    """The file of an estimate that is under way; the record goes on from it, if it is there."""

    def __init__(
        self, path: Path, record: Record, source: Source, origin: Mapping[str, str]
    ) -> None:
        self.path, self.record = path, record
        self.outputs = source.look_through()
        self.origin = {**origin, "data": str(source.digest)}
        if path.exists():
            record.resume(path, self.origin, self.outputs)
            source.num_inputs = record.num_inputs
        self.saved, self.time = record.passes, time.monotonic()

    def save(self, seconds: float = 0.0) -> None:
        """Write the passes so far, if there are new ones and the last were so long ago."""
        is_new = self.record.is_whole and self.record.passes > self.saved
        if not is_new or time.monotonic() - self.time < seconds:
            return
        try:
            with later(signal.SIGINT):
                self.record.save(self.path, self.origin, self.outputs)
            self.saved = self.record.passes
        except (OSError, ValueError) as error:
            warn(f"{self.path} cannot be written now: {error}")
        self.time = time.monotonic()


def check_parameters(model: nn.Module) -> None:
    """A ValueError where there is nothing to differentiate in yet."""
    parameters = list(model.parameters())
    if not parameters:
        raise ValueError("the model has no parameters: there is nothing to differentiate in.")
    if any(is_lazy(p) for p in parameters):
        raise ValueError(
            "the model has lazy parameters without a shape: call it once, model(x), before."
        )


def in_json(value: Any) -> Any:
    """A setting of a family in what JSON knows; the order of a dict counts."""
    if isinstance(value, Mapping):
        return [[in_json(key), in_json(inside)] for key, inside in value.items()]
    if isinstance(value, list | tuple):
        return [in_json(inside) for inside in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Tensor | np.ndarray):
        return tensor_digest(torch.as_tensor(value))
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    try:
        return f"{kind} {hashlib.sha256(pickle.dumps(value)).hexdigest()}"
    except Exception:  # of any kind, as objects have their own
        return kind


def passes_to_take(estimator: str, passes: int | None, relative_error: float | None) -> int:
    """The most passes; for signs 2/ε² are enough for a relative error ε, and 16 at least."""
    is_number = isinstance(relative_error, int | float) and not isinstance(relative_error, bool)
    if relative_error is not None and not (
        is_number and SMALLEST_ERROR <= relative_error < math.inf
    ):
        raise ValueError(
            f"relative_error must be a positive number, {SMALLEST_ERROR:g} or more, got "
            f"{relative_error!r}."
        )
    if passes is not None:
        return check_integer(passes, "passes", 2, remedy="one pass has no standard error.")
    if relative_error is None:
        return PASSES
    if estimator == "signs":
        return max(PASSES_BEFORE_STOP, math.ceil(2 / relative_error**2 * (1 - 1e-12)))
    return MOST_PASSES


# One pass.


@dataclass
class Source:
    """Batches with random rows, the same for every equal (seed, pass, batch).

    Attributes:
        stream: The batches.
        place: The pass and the batch, from 0 and 1.
        num_inputs: m, once a pass is through.
        width: T, after the first batch.
        digest: A checksum of the inputs, once they were all seen.
    """

    stream: Batches
    draw: Draw
    seed: int
    place: tuple[int, int] = (0, 1)
    num_inputs: int = 0
    width: int | None = None
    digest: DataDigest | None = None

    def run(self, number: int, square: Square) -> tuple[PerParameter, int]:
        """Σ_x of one pass, and how many inputs there are."""
        total = {n: torch.zeros(s, dtype=torch.float64, device=d) for n, s, d in square.shapes}
        shape, count = None, 0
        digest = DataDigest() if self.digest is None else None
        device = next(self.stream.model.parameters()).device
        for at, held, x in self.stream:
            self.place = (number, at)
            with named(f"batch {at}"):
                shape = check_shape(x, shape)
                check_finite(x)
                if digest is not None:
                    digest.add(tensors_of(held, x))
                x = x.float() if x.dtype in HALF else x
                square.add(held, x.to(device), total)
            square.settle(0 if self.waits else BATCHES_BETWEEN_WAITS)
            count += len(x)
        square.settle()
        if count == 0:
            raise ValueError("there are no inputs: pass M ≥ 1.")
        if number and count != self.num_inputs:
            raise ValueError(
                f"pass {number + 1} went through {count} inputs, the first through "
                f"{self.num_inputs}: every pass needs the same."
            )
        self.num_inputs = count
        if digest is not None:
            self.digest = digest
        return total, count

    @property
    def waits(self) -> bool:
        """Whether every batch is checked for NaN at once; a GPU with random signs need not wait."""
        is_on_cpu = next(self.stream.model.parameters()).device.type == "cpu"
        return is_on_cpu or self.draw is not DRAWS["signs"]  # drawing classes waits anyway

    def look_through(self) -> Tensor:
        """Take a checksum of all inputs; and the sums of the outputs and of their squares, [2]."""
        digest, found = DataDigest(), torch.zeros(2, dtype=torch.float64)
        own = private_copy(self.stream.model)
        device = next(own.parameters()).device
        for at, held, x in self.stream:
            digest.add(tensors_of(held, x))
            x = x.float() if x.dtype in HALF else x
            network = held.around(own) if isinstance(held, Held) else own
            with named(f"batch {at}"), differentiating(network, x), torch.no_grad():
                h = outputs_of(network, x.to(device))
                check_outputs(h, len(x))
            found += torch.stack([h.double().sum(), h.double().square().sum()]).cpu()
        self.digest = digest
        return found

    def rows(self, outputs: Tensor) -> Tensor:
        """Random rows w of every input at the outputs, [B, 1, T], float64."""
        family = self.stream.family
        self.width = check_width(outputs, family, self.width)
        h = (family.natural if self.waits else family.natural_unseen)(outputs)
        generator = torch.Generator(h.device)
        generator.manual_seed(random.Random(f"{self.seed}{process()}/{self.place}").getrandbits(63))
        w = self.draw(family, h, generator)
        if not family.is_natural:
            with torch.enable_grad():
                z = h.clone().requires_grad_()
                (w,) = torch.autograd.grad(family.link(z, at=h), z, w)
        return w[:, None]


def tensors_of(held: nn.Module, x: Tensor) -> list[Tensor]:
    """The tensors of a batch that hold its inputs."""
    if not isinstance(held, Held):
        return [x]
    inside = held.batch.data if isinstance(held.batch, UserDict) else held.batch
    return [t for t in tree_leaves(inside) if isinstance(t, Tensor) and t.ndim]


class Square(ABC):
    """Adds the squares of one batch to a total, after a check at the first.

    Attributes:
        shapes: Name, shape and device of every parameter that is reported.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str] | str | None, source: Source
    ) -> None:
        wanted = selected(model, layers)
        self.model, self.source, self.wanted = model, source, wanted
        self.shapes = [
            (n, p.shape, p.device)
            for n, p in model.named_parameters()
            if wanted is None or n in wanted
        ]
        self.checked = 0  # inputs of checked batches
        self.unseen: list[tuple[int, list[str], Tensor]] = []  # batches not yet checked

    def check(self, held: nn.Module, x: Tensor) -> None:
        """Compare autograd with difference quotients at a few inputs, as for every engine.

        The outputs are combined at random, each in units of how far it moves with the weights, so
        that thousands of outputs cost no more than one, and a constant in one hides no other.
        """
        at = positions_to_check(len(x), self.model).to(x.device)
        some = x[at]
        check_model(held, some)
        check_plain(held)
        with differentiating(held, x):
            check_forward(held, some)
            _, h = functional.private(held, some)
            _, whole = functional.private(held, x)
            movement = movement_of(held, some, h)
        warn_of_probabilities(self.source.stream.family, h, self.model)
        wanted = None if self.wanted is None else frozenset(f"network.{n}" for n in self.wanted)
        check_whole(whole[at], h, movement / SHARE)
        try:
            differentiate_checked(Combined(held, movement), some, "functional", 1, wanted)
        except (ValueError, NotImplementedError) as error:
            message = str(error).replace("'network.", "'").replace("'network'", "''")
            raise type(error)(message) from error

    def add(self, held: nn.Module, x: Tensor, total: PerParameter) -> None:
        """Add this batch's squares to the total, which is valid once ``settle`` has passed."""
        if self.checked < inputs_to_check(self.model):
            self.check(held, x)
            self.checked += len(x)
        try:
            found = self.squares(held, x)
        except (ValueError, NotImplementedError):
            raise
        except Exception as error:  # of any kind, from forward()
            raise_if_out_of_memory(error)
            check_forward(held, x)
            raise
        if not found:
            return
        sums = [square.sum() for square in found.values()]
        is_finite = torch.stack([s.to(sums[0].device) for s in sums]).isfinite()
        self.unseen.append((self.source.place[1], list(found), is_finite))
        for name, square in found.items():
            total[name] += square

    def settle(self, most: int = 0) -> None:
        """Check the squares of the batches not yet checked, if there are more than ``most``.

        A GPU is waited for once.
        """
        if len(self.unseen) <= most:
            return
        where = [(at, name) for at, names, _ in self.unseen for name in names]
        seen = torch.cat([is_finite for _, _, is_finite in self.unseen]).tolist()
        self.unseen.clear()
        wrong = next((place for place, is_fine in zip(where, seen, strict=True) if not is_fine), ())
        if wrong:
            raise ValueError(
                "batch {}: the derivative in parameter {!r} is NaN, infinite or too large to be "
                "squared: check the weights and the inputs.".format(*wrong)
            )

    @abstractmethod
    def squares(self, held: nn.Module, x: Tensor) -> PerParameter:
        """(Σ_x w_x·J)², or Σ_x (w_x·J)²; a parameter that the outputs do not use may be missing."""


def movement_of(model: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    """How far the outputs h move with the weights, [T], where these move by ``SHARE``."""
    moved = private_copy(model)
    perturb_weights(moved, SHARE)
    other = finite_outputs(moved, x)
    return (h if other is None else other.to(h) - h).abs().amax(0)


def check_whole(outputs: Tensor, alone: Tensor, scale: Tensor) -> None:
    """Refuse outputs of a batch that differ from those of a few of its inputs, [k, T] both.

    ``scale`` is how far every output would move if the weights moved by their size, [T].
    """
    eps = torch.finfo(alone.dtype).eps
    slack = 4 * eps**0.5 * scale + 2**6 * eps * alone.abs().amax(0)
    if not fits(outputs, alone, slack):
        raise NotImplementedError(f"{MIXES}. Make forward() a function of each input alone.")


class Combined(nn.Module):
    """A random combination of a network's outputs, each in units of its own."""

    weights: Tensor

    def __init__(self, network: nn.Module, units: Tensor) -> None:
        super().__init__()
        self.network = network
        signs = random_signs(units, torch.Generator(units.device).manual_seed(0)).to(units)
        self.register_buffer("weights", signs / torch.where(units > 0, units, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1]."""
        combined: Tensor = self.network(x) @ self.weights
        return combined[:, None]


class SquaredBatches(Square):
    """The square of a batch's gradient, by one plain backward pass."""

    @cached_property
    def own(self) -> nn.Module:
        """A copy of the model that may be differentiated."""
        own = private_copy(self.model)
        for name, parameter in own.named_parameters():
            parameter.requires_grad_(self.wanted is None or name in self.wanted)
        return own

    def squares(self, held: nn.Module, x: Tensor) -> PerParameter:
        """(Σ_x w_x·J)²."""
        with differentiating(held, x), torch.enable_grad():
            own = held.around(self.own) if isinstance(held, Held) else self.own
            parameters = [self.own.get_parameter(n) for n, _, _ in self.shapes]
            with exact_lookups():
                h = outputs_of(own, x)
            check_outputs(h, len(x), numbers=self.source.waits)
            rows = self.source.rows(h.detach())[:, 0].to(h.dtype)
            if not h.requires_grad:
                return {}
            gradients = torch.autograd.grad(h, parameters, rows, allow_unused=True)
        return {
            n: g.double().square()
            for (n, _, _), g in zip(self.shapes, gradients, strict=True)
            if g is not None
        }


def outputs_of(own: nn.Module, x: Tensor) -> Any:
    """What a copy of the network makes of the inputs."""
    try:
        return own(x.clone())
    except Exception as error:  # every network may raise its own
        raise_if_out_of_memory(error)
        raise failed(x, error) from error


class SquaredInputs(Square):
    """The sum of the squares of every input, by the engine for first derivatives."""

    def squares(self, held: nn.Module, x: Tensor) -> PerParameter:
        """Σ_x (w_x·J)²."""
        with differentiating(held, x):
            sweep = first_order.differentiate(
                held, x.detach().clone(), wanted=self.wanted, combine=self.source.rows
            )
        return {
            name: mean * len(x)
            for i, factors in left_factors(sweep, squared)
            for name, z in sweep.inputs[i][1].items()
            for mean in factors.means(z, torch.float64, None)[0].values()
        }


def squared(derivs: Derivatives, _: slice) -> dict[str, Tensor]:
    """Left factors of (w·J)², for one row w per input."""
    return {"I": derivs.blocks[0].J[:, 0].double().square()}


SQUARES = {"batch": SquaredBatches, "input": SquaredInputs}


# Exact variances of one label or projection, at one input.


def variance_signs(derivs: Derivatives, family: Family) -> Diagonal:
    r"""Variance of (w·J)² with random signs, at one input; never above 2 I².

    ``Var = 2 (I² − Σ_r a_r⁴)`` with a = LᵀJ, as 4 Σ_{r<s} a_r² a_s², where nothing cancels. It
    depends on the L that the family chooses: columns √σ_k (e_k − σ) for classes, diag √κ₂ for
    independent labels, L⁻ᵀ for Gaussian ones (Proposition 9.3). Not in the paper.

    Args:
        derivs: J and the outputs at B inputs.
        family: The output family.

    Returns:
        [B, *shape] per parameter, in nat²/θ⁴.

    Raises:
        ValueError: the outputs do not fit the family.

    Example: two independent Gaussian labels with J = 1 each: I = 2, and 4·1·1 = 2 I² − 4.
        >>> from fimlib import Gaussian, differentiate
        >>> class Twice(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w = nn.Parameter(torch.ones(1).double())
        ...     def forward(self, x):
        ...         return torch.cat([self.w * x, self.w * x], 1)
        >>> derivs = differentiate(Twice(), torch.ones(1, 1).double(), order=1)
        >>> float(variance_signs(derivs, Gaussian())["w"])
        4.0
    """
    return variance_of("signs", derivs, family)


def variance_importance(derivs: Derivatives, family: Family, *, estimator: int = 1) -> Diagonal:
    r"""Variance of Î₁ or Î₂ on one class k ~ q ∝ p_k ‖e_k − p‖ that counts p_k/q_k times.

    ``Var Î₁ = Σ_k q_k (p_k c_k²/q_k − I)²`` with c_k = ∂ log p(k|x), and
    ``Var Î₂ = Σ_k p_k² s_k²/q_k`` with s_k = S·δ_k (Proposition 9.4). Not in the paper.

    Args:
        derivs: J, for Î₂ also S, and the outputs at B inputs.
        family: The output family, of classes.
        estimator: 1 for Î₁, as ``estimate(estimator="importance")`` squares it; 2 for Î₂.

    Returns:
        [B, *shape] per parameter, in nat²/θ⁴.

    Raises:
        ValueError: the outputs do not fit the family, or its labels are no classes.

    Example: at p = (1/2, 1/2) both classes are equally important, and nothing changes.
        >>> from fimlib import Categorical, differentiate, variance_i2
        >>> net = nn.Sequential(nn.Linear(1, 1), nn.Sigmoid(), nn.Linear(1, 2)).double()
        >>> _ = nn.init.zeros_(net[2].bias), nn.init.ones_(net[2].weight)
        >>> derivs = differentiate(net, torch.ones(1, 1).double())
        >>> found = variance_importance(derivs, Categorical(), estimator=2)["0.weight"]
        >>> bool(torch.allclose(found, variance_i2(derivs, Categorical())["0.weight"]))
        True
    """
    kind = "importance" if check_estimator(estimator) == 1 else "importance2"
    return variance_of(kind, derivs, family)
