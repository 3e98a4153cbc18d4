r"""One call for one question: how wrong is my diagonal Fisher, and what would make it better?

Nothing new is computed here: I, Var_x I and the variances come from ``accumulate``, an estimated
V₂ from ``hutchinson_variance_i2``.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fimlib._checks import check_num_samples
from fimlib._progress import progress
from fimlib.derivatives import Sweep
from fimlib.engines.checks import check_module
from fimlib.engines.choose import Chosen, attempted, candidates, differentiate_checked
from fimlib.engines.confirm import inputs_to_check
from fimlib.engines.held import Forward, Held
from fimlib.engines.model import selected
from fimlib.families.base import Family, check_family
from fimlib.families.gaussian import Gaussian, GaussianHead
from fimlib.families.product import Product
from fimlib.hutchinson import blocks_of, hutchinson_variance_i2
from fimlib.joint import Joint
from fimlib.memory import JACOBIAN_NUMBERS
from fimlib.precision import has_classes, number_needed, ratio
from fimlib.streaming import (
    Batch,
    Batches,
    Pick,
    accumulate_stream,
    check_finite,
    check_shape,
    named,
)
from fimlib.summary.findings import Findings, LayerSummary
from fimlib.summary.plot import draw
from fimlib.summary.text import text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_PROBES = 128  # are enough for most
BUDGET = 60.0  # seconds
FEW_PARAMETERS = 3_000  # second derivatives along each of them take seconds
FIRST_ORDER = ("I", "Var_x I", "V1")
MOST_ESTIMATED = 32  # inputs at which V₂ is estimated, where S is not known
MOST_OUTPUTS_FOR_BOUNDS = 32  # eigenvalue problems of the bounds cost the cube of their number


class Summary(Findings):
    """What ``summarise`` found; ``print`` it, or draw it with ``plot``.

    Attributes:
        layers: One ``LayerSummary`` per layer, from the first to the last.
        num_inputs: m, the inputs that were given.
        num_samples: N, labels for each of them.
        num_outputs: T, the backward passes that the exact I takes.
        relative_error: ε, the error that the numbers of labels and inputs are to keep.
        confidence: The probability with which they keep it.
        rule: How the numbers of labels and inputs were found.
        engine: Which engine made the derivatives.
        num_probes: Random probes behind the estimate of V₂; 0 where V₂ is none.
        num_estimated: Inputs at which V₂ was estimated; 0 where V₂ is no estimate.
        is_cut: Whether the budget ended before the inputs did.
        joint: All averages behind it, per parameter: ``joint.fisher_information()`` is I itself.
    """

    def __str__(self) -> str:
        """A table, and what follows from it."""
        return text(self)

    def plot(self) -> Figure:
        """Relative error against labels per input: one panel per layer, Î₁ blue, Î₂ vermilion.

        Their names stand where the lines end. Both axes are logarithmic; dashed lines are upper
        bounds, where there are any; green is the Fisher information itself, where the error is as
        large as what is estimated; the dotted line is the relative error that was asked for.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return draw(self)


def summarise(
    model: nn.Module,
    inputs: Tensor | Iterable[Any],
    family: Family,
    *,
    num_samples: int = 1,
    relative_error: float = 0.1,
    confidence: float = 0.95,
    rule: str = "chebyshev",
    layers: Sequence[str] | str | None = None,
    engine: str = "auto",
    num_probes: int | None = None,
    budget: float = BUDGET,
    pick: Pick = None,
    forward: Forward | None = None,
) -> Summary:
    r"""How wrong estimates of I are, layer by layer; which is better; how many samples it takes.

    The estimate in question is the usual one: a pass over the m inputs, with N labels for each that
    the model draws. ``Î_j(θᵢ) = (1/m) Σ_x Î_j(θᵢ|x)`` is an estimate of ``(1/m) Σ_x I(θᵢ|x)``, with
    the variance ``E_x V_j⁽¹⁾ / (m N)`` (Theorem 4.7 without its first term; for m = 1, Lemma A.1).
    Beside Î₁ and Î₂ stand the random projections of ``estimate``, squared input by input.
    Nothing is sampled and all is exact. Where no engine has the network's S at a bearable cost, Î₂
    is left out, or V₂ is estimated from ``num_probes``; the result says how far that may be off.

    Args:
        model: Maps inputs to outputs [B, T] of the family; in eval mode.
        inputs: [m, ...], or an iterable of batches x or (x, y), as a ``DataLoader``; for what is
            x see ``accumulate``. Memory does not depend on m.
        family: The output family.
        num_samples: N ≥ 1, labels for each input.
        relative_error: ε > 0, of ‖Î − I‖ in units of ‖I‖, norms over a layer.
        confidence: Between 0 and 1, both excluded.
        rule: How the numbers of labels and inputs are found: "chebyshev", for any distribution of
            the error; or "approximate", about a fifth of it at 95 %, the most that it takes where
            the error is nearly normal, as with many inputs or labels. See ``num_samples_needed``,
            which has sharper rules for the labels of one input.
        layers: Names of modules: only their parameters are looked at. None: all.
        engine: Where the derivatives come from; see ``differentiate``.
        num_probes: ≥ 3, to estimate V₂ where it is not known exactly; 128 is a fair number. See
            ``hutchinson_variance_i2``. None: leave Î₂ out there.
        budget: Seconds that it may take. S is given up where the first few inputs take half of it.
            The batch that is under way is finished; inputs that are left then are left out, as the
            result says, which takes one more batch of a stream.
        pick: Which part of every batch is x; see ``accumulate``.
        forward: From the model and a batch of any kind to the outputs; see ``accumulate``.

    Raises:
        ValueError: an argument out of its range, no inputs, and what ``accumulate`` refuses.
        NotImplementedError, TypeError: as in ``accumulate``.

    Warns:
        UserWarning: as ``accumulate``.

    Cost: that of ``accumulate`` with both orders, if V₂ fits into the budget, else with one; from 2
        seconds on a bar shows how many inputs are done. Bounds are computed for up to 32 outputs.
        An estimate of V₂ takes at most 32 of the inputs, picked at random by a fixed seed, and
        num_probes times three passes for J at each.

    Example: a Gaussian label and one weight: V₁ = 2I², so that one label is off by √2 I.
        >>> from fimlib import Gaussian
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> found = summarise(net, torch.ones(1, 1), Gaussian())
        >>> [(round(layer.relative_sd_i1, 6), layer.relative_sd_i2) for layer in found.layers]
        [(1.414214, 0.0)]
        >>> found.layers[0].labels_needed_i1, found.layers[0].better
        (4000.0, 2)
    """
    check_family(family)
    check_num_samples(num_samples)
    needs = partial(number_needed, relative_error=relative_error, confidence=confidence, rule=rule)
    needs(torch.ones(()), torch.ones(()))
    if num_probes is not None:
        blocks_of(num_probes)
    model = check_module(model)
    count = len(inputs) if isinstance(inputs, Tensor) else None
    clock = Clock(budget, count)
    first, stream = _peek(iter(Batches(model, inputs, family, pick, forward)))
    found, order = _engine(*first, engine, layers, clock)
    num_outputs = found.outputs.shape[1]
    is_estimate = order == 1 and num_probes is not None
    sample = _Sample(MOST_ESTIMATED if is_estimate else 0)
    projections = ["signs", "importance"] if has_classes(family) else ["signs"]
    quantities = [*(FIRST_ORDER if order == 1 else (*FIRST_ORDER, "V2", "C12")), *projections]
    empty = Joint(family, quantities=quantities, bounds=_method(num_outputs, family))
    with clock:
        joint = accumulate_stream(
            model, sample.of(stream), empty, None, layers, engine, go_on=clock.goes_on
        )
    is_cut = clock.is_over and (joint.count < sample.seen or _goes_on(stream))
    means, norms = joint.layer_sums(joint.fisher_information()), joint.squared_norms()
    kinds: list[int | str] = [1, *([2] if order == 2 else []), *projections]
    variances = {kind: joint.layer_sums(joint.label_variance(kind)) for kind in kinds}
    errors = dict.fromkeys(norms, norms[next(iter(norms))].new_zeros(()))
    if is_estimate and num_probes is not None:
        of_one = num_outputs * sum(t.numel() for t in joint.fisher_information().values())
        at_once = max(1, JACOBIAN_NUMBERS // of_one)
        variances[2], errors = _estimate(sample, family, joint, num_probes, layers, at_once)
    spread = joint.layer_sums(joint.input_variance())
    bounds, sizes, m = _bounds(joint, order), _sizes(joint), joint.count

    def row(layer: str) -> LayerSummary:
        error, norm = errors[layer], norms[layer]
        v = {kind: variance[layer] for kind, variance in variances.items()}
        safe = v | ({2: v[2] + 2 * error} if 2 in v else {})

        def relative(variance: Tensor) -> float:
            found = ratio(variance.clamp_min(0) / (m * num_samples), norm)
            return math.sqrt(found.nan_to_num(math.inf, math.inf))

        def needed(variance: Tensor) -> float:
            return float(needs(variance, norm).nan_to_num(math.inf, math.inf))

        sd = {kind: relative(variance) for kind, variance in v.items()}
        labels_needed = {kind: needed(variance / m) for kind, variance in safe.items()}
        inputs_needed = {
            kind: needed(spread[layer] + variance / num_samples)
            for kind, variance in safe.items()
            if m > 1
        }
        has_i2 = 2 in v
        above = relative(v[2].clamp_min(0) + error) if has_i2 else 0.0
        return LayerSummary(
            layer=layer,
            num_parameters=sizes[layer],
            mean_fisher=float(means[layer]) / sizes[layer],
            relative_sd_i1=sd[1],
            relative_sd_i2=sd.get(2),
            relative_sd_i2_error=above - sd[2] if has_i2 and above > sd[2] else 0.0,
            relative_sd_importance=sd.get("importance"),
            relative_sd_signs=sd["signs"],
            better=_better(float(v[1]), float(v[2]), float(error)) if has_i2 else None,
            labels_needed_i1=labels_needed[1],
            labels_needed_i2=labels_needed.get(2),
            labels_needed_importance=labels_needed.get("importance"),
            labels_needed_signs=labels_needed["signs"],
            inputs_needed_i1=inputs_needed.get(1),
            inputs_needed_i2=inputs_needed.get(2),
            bound_i1=relative(bounds[0][layer]) if bounds[0] else None,
            bound_i2=relative(bounds[1][layer]) if bounds[1] else None,
        )

    return Summary(
        tuple(map(row, norms)), m, num_samples, num_outputs, relative_error, confidence, rule,
        found.engine, num_probes or 0 if is_estimate else 0, len(sample) if is_estimate else 0,
        is_cut, joint,
    )  # fmt: skip


class Clock:
    """The time that is left of the budget, and a progress bar."""

    def __init__(self, seconds: float, count: int | None) -> None:
        if not seconds > 0:
            raise ValueError(f"budget must be a positive number of seconds, got {seconds!r}.")
        self.seconds, self.start, self.count, self.is_over = seconds, time.monotonic(), count, False

    def __enter__(self) -> None:
        self.bar = progress(self.count, "summarise", "inputs")

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    @property
    def left(self) -> float:
        """Seconds."""
        return self.start + self.seconds - time.monotonic()

    def goes_on(self, done: int) -> bool:
        """Whether there is time for more inputs."""
        self.bar.update(done - self.bar.n)
        self.is_over = self.left <= 0
        return not self.is_over


# What goes in.


def _peek(
    stream: Iterator[Batch],
) -> tuple[tuple[nn.Module, Tensor], Iterator[Batch]]:
    """The inputs to try, on the model's device, with their network; and all batches."""
    first = next(stream, None)
    if first is None:
        raise ValueError(
            "there are no inputs: pass a tensor [m, ...] with m ≥ 1, or batches; an iterator can "
            "be used only once, make it anew."
        )
    _, network, x = first
    with named("batch 1"):
        check_shape(x, None)
        check_finite(x[:1])
    few = x[: inputs_to_check(network)]
    with named(f"batch 1 (inputs 0 to {len(few) - 1})"):
        check_finite(few)
    device = next((p.device for p in network.parameters()), None)
    return (network, few.to(device)), itertools.chain([first], stream)


def _goes_on(stream: Iterator[Batch]) -> bool:
    """Whether there is another batch, be it one that would be refused."""
    try:
        return next(stream, None) is not None
    except (ValueError, TypeError, NotImplementedError):
        return True


def _engine(
    model: nn.Module, x: Tensor, engine: str, layers: Sequence[str] | str | None, clock: Clock
) -> tuple[Sweep, int]:
    """By the engine that takes the network; and whether S is affordable (2) or J alone (1)."""
    wanted = selected(model, layers)
    count = sum(p.numel() for n, p in model.named_parameters() if wanted is None or n in wanted)

    def twice(names: Sequence[str], x: Tensor, seconds: float) -> Sweep | None:
        deadline = Deadline(seconds)
        try:
            with deadline:
                found = attempted(names, model, x, 2, wanted, unasked=False)
        except (ValueError, TimeoutError):
            if not deadline.is_over:
                raise
            return None
        return found.batch if isinstance(found, Chosen) else None

    names = ("layerwise", "traced") if engine == "auto" else candidates(model, engine, 2)
    if (found := twice(names, x, clock.left / 2)) is not None:
        return found, 2
    if engine == "auto" and count <= FEW_PARAMETERS:
        seconds = clock.left / (clock.count or 1)
        if (found := twice(("functional",), x[:1], seconds)) is not None:
            return found, 2
    return differentiate_checked(model, x[:1], engine, 1, wanted).batch, 1


class Deadline(TorchDispatchMode):
    """Ends the work inside it, by a TimeoutError, once it has taken so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.end, self.is_over = time.monotonic() + seconds, False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: else torch imports its compiler at the first use, which takes two seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.monotonic() > self.end:
            self.is_over = True
            raise TimeoutError("the time is over")
        return func(*args, **(kwargs or {}))


def _method(num_outputs: int, family: Family) -> str | None:
    """How λ_max(M) is found, where that is cheap."""
    if num_outputs > MOST_OUTPUTS_FOR_BOUNDS or isinstance(family, Product):
        return None
    return "multistart" if isinstance(family, Gaussian | GaussianHead) else "certified"


class _Sample:
    """Random inputs of a stream, at most so many, each as likely as the others.

    Attributes:
        kept: For every batch with some of them: a random key of each, the network, and the inputs.
        seen: Inputs of the stream so far.
    """

    def __init__(self, most: int) -> None:
        self.most, self.seen = most, 0
        self.kept: list[tuple[Tensor, nn.Module, Tensor]] = []
        self._generator = torch.Generator().manual_seed(0)  # not the caller's

    def __len__(self) -> int:
        return sum(len(x) for _, _, x in self.kept)

    def of(self, stream: Iterable[Batch]) -> Iterator[Batch]:
        """The same stream; what passes may stay in the sample."""
        for batch in stream:
            self.seen += len(batch[2])
            if self.most:
                self._take(*batch[1:])
            yield batch

    def _take(self, network: nn.Module, x: Tensor) -> None:
        self.kept.append((torch.rand(len(x), generator=self._generator), network, x))
        every = torch.cat([keys for keys, _, _ in self.kept])
        least = every.topk(min(self.most, len(every))).values.min()
        self.kept = [
            (keys[keys >= least], *_some(network, x, keys >= least))
            for keys, network, x in self.kept
            if (keys >= least).any()
        ]


def _some(network: nn.Module, x: Tensor, chosen: Tensor) -> tuple[nn.Module, Tensor]:
    """The chosen ones of the inputs, in memory of their own."""
    x = x[chosen.to(x.device)].detach()
    if not isinstance(network, Held):
        return network, x
    held = network.at(x)
    return held, held.positions


# From one number per parameter to one per layer.


def _sizes(joint: Joint) -> dict[str, int]:
    """How many parameters each layer has."""
    fisher = joint.fisher_information()
    return {layer: sum(fisher[n].numel() for n in names) for layer, names in joint.layers.items()}


def _bounds(joint: Joint, order: int) -> list[dict[str, Tensor] | None]:
    """Upper bounds of both label variances by Theorem 4.1, where they were accumulated."""
    return [
        joint.layer_sums(joint.label_variance_bounds(j).upper)
        if joint.bounds is not None and j <= order
        else None
        for j in (1, 2)
    ]


def _estimate(
    sample: _Sample,
    family: Family,
    joint: Joint,
    num_probes: int,
    layers: Sequence[str] | str | None,
    at_once: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums of E_x V₂⁽¹⁾ over each layer, estimated at so many inputs at once, and their errors.

    The standard errors come from the probes where all inputs were taken, else from the spread of
    the inputs, whose probes are independent, so that it contains theirs.
    """
    fisher = joint.fisher_information()
    device = next(iter(fisher.values())).device
    generator = torch.Generator(device).manual_seed(0)  # not the caller's
    found = [
        hutchinson_variance_i2(
            network, part, family, num_probes=num_probes, generator=generator, layers=layers
        ).layer_means
        for _, network, x in sample.kept
        for part in x.to(device).split(at_once)
    ]
    sums, errors = {}, {}
    for layer, size in _sizes(joint).items():
        means, of_probes = (torch.cat([part[layer][i] for part in found]) for i in (0, 1))
        count = len(sample)
        error = means.std() / count**0.5
        if count == joint.count:
            error = of_probes.square().sum().sqrt() / count
        sums[layer], errors[layer] = size * means.mean(), size * error
    return sums, errors


def _better(v1: float, v2: float, error: float) -> int | None:
    """The estimator with less variance, if that is beyond two standard errors."""
    if abs(v1 - v2) <= 2 * error and error > 0:
        return None
    return 2 if v2 < v1 else 1
