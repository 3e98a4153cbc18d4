r"""Which formula a given diagonal follows: ``identify`` compares it with those in use."""

from __future__ import annotations

import copy
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fimlib._tables import aligned
from fimlib.audit.formulas import FORMULAS, RANDOM, UNKNOWN, Totals, of_batch
from fimlib.engines.checks import check_module
from fimlib.engines.choose import differentiator
from fimlib.engines.held import Forward
from fimlib.engines.model import kept_random_state, selected
from fimlib.families.base import Family, check_family
from fimlib.streaming import Batches, named

__all__ = ["Identified", "identify"]

PerParameter = Mapping[str, Tensor]
Compute = Callable[[nn.Module, list[Any]], PerParameter]

EXACT = 1e-3  # relative distance up to which a deterministic formula matches
ROUNDED = 2.0**-7  # of a number in bfloat16
SAME, ROUNDING = 30.0, 1e-6  # a formula this much farther than the nearest is another one
CALLS = 8  # of a function whose results differ
WIDEST = 4.0  # standard deviations that chance may explain
NOTHING = 1e-10  # a tensor with a smaller share of the norm may be rounding noise
MOST_LABELS = 1e4  # per input; nobody draws more
MOST_PARAMETERS = 2**21  # for which all draws are kept, in about 3 GB
WIDTH = 79  # of a line
LARGEST_SHARE = 0.1  # of the entries; their overlap with I's is stated


@dataclass(frozen=True)
class Identified:
    """The formula that a diagonal follows; ``print`` it.

    Attributes:
        formula: A key of ``fimlib.audit.formulas.FORMULAS``, or "unknown".
        text: What it computes.
        factor: By which the result is larger than the formula.
        factor_text: The simplest reason for it; "" for 1, "unknown" if no reason is known.
        distance: ‖result − factor·formula‖ / ‖result‖; of "unknown", the smallest of all.
        z: For a random formula, how many standard deviations the sum of all entries is off; else
            None.
        num_samples: For a random formula, the labels per input that explain the noise; else None.
        is_mean_of_tensor: Whether every tensor holds one number, the mean of the formula's.
        is_bfloat16: Whether all numbers are rounded to bfloat16.
        is_random: Whether two calls of a function differed; None for a result.
        is_certain: Whether more than chance speaks for a random formula: the mean and the spread of
            several calls.
        also: Other formulas that give the same numbers here.
        distances: Formula → its distance to the result, with the factor that suits it best.
        ratio: ΣResult / ΣI.
        distance_to_fisher: ‖result − I‖ / ‖I‖.
        rank_correlation: Spearman's, of the entries with those of I; 0 where all are equal.
        overlap: The share of the largest tenth of I's entries that is in the result's largest
            tenth.
        remedy: How to get the right numbers.
        fisher: I itself, parameter → its shape, float64.
    """

    formula: str
    text: str
    factor: float
    factor_text: str
    distance: float
    z: float | None
    num_samples: float | None
    is_mean_of_tensor: bool
    is_bfloat16: bool
    is_random: bool | None
    is_certain: bool
    also: tuple[str, ...]
    distances: Mapping[str, float]
    ratio: float
    distance_to_fisher: float
    rank_correlation: float
    overlap: float
    remedy: str
    fisher: PerParameter

    def __str__(self) -> str:
        """What it is, what it does to decisions, and the nearest formulas."""
        verb = "It is" if self.is_certain else "It may be"
        lines = [f"{verb} {self.text}{self._how()}."]
        if self.z is not None and self.num_samples is not None:
            lines.append(
                f"The noise is that of about {self.num_samples:.3g} labels per input, and the sum "
                f"is off by {self.z:+.1f} standard deviations."
            )
        if not self.is_certain:
            lines.append("Chance would explain it; pass the function that made it to be sure.")
        if self.is_random and self.z is None:
            lines.append("Two calls of the function differ.")
        lines += [f"The same here: {FORMULAS[key].text}." for key in self.also]
        lines += [
            f"ΣResult / ΣI is {self.ratio:.4g}; ‖result − I‖ / ‖I‖ is "
            f"{self.distance_to_fisher:.2g}; the rank correlation with I is "
            f"{self.rank_correlation:.3f}; "
            f"{self.overlap:.0%} of the largest tenth of I's entries are among its own.",
            self.remedy,
        ]
        nearest = sorted(self.distances.items(), key=lambda pair: pair[1])[:5]
        rows = [("nearest formulas, at their best factor", "distance")]
        rows += [(FORMULAS[key].text, f"{distance:.2g}") for key, distance in nearest]
        wrapped = [part for line in lines for part in textwrap.wrap(line, WIDTH)]
        return "\n".join([*wrapped, "", *aligned(rows)])

    def _how(self) -> str:
        factor = "" if self.factor_text == "" else f", times {self.factor:.4g}"
        reason = "" if self.factor_text in ("", "unknown") else f" ({self.factor_text})"
        mean = ", one mean for each tensor" if self.is_mean_of_tensor else ""
        low = ", in bfloat16" if self.is_bfloat16 else ""
        return f"{mean}{low}{factor}{reason}"


def identify(
    diagonal: PerParameter | Compute,
    model: nn.Module,
    data: Iterable[Any],
    family: Family,
    *,
    layers: Sequence[str] | str | None = None,
    forward: Forward | None = None,
    labels: Callable[[Any], Any] | None = None,
    generator: torch.Generator | None = None,
) -> Identified:
    r"""Which formula the diagonal of some code follows, and how far it is from I.

    A deterministic formula matches if it agrees to a thousandth, up to a factor. For a random one,
    a few dozen draws show how far off chance can be. Anything else is "unknown".

    Args:
        diagonal: Parameter → its tensor; or a function that makes it of a copy of the model and the
            list of batches. It is called twice, or eight times if it gives different results.
        model: The network, with the weights that the diagonal was made at; in eval mode.
        data: The batches (x, y) as the code saw them, in that order: a ``DataLoader`` without
            shuffling, a list. Without labels y the formulas that need them are left out.
        family: The output family.
        layers: Names of modules or parameters, if the diagonal has only those; see
            ``differentiate``.
        forward: From the model and a batch of any kind to the outputs; see ``accumulate``.
        labels: From such a batch to its labels y, as ``family.observed`` takes them.
        generator: Of the draws, on the model's device; None: a fixed seed.

    Raises:
        ValueError: a parameter is missing from the diagonal, has another shape, or is NaN or
            infinite; there are no batches; and what ``accumulate`` refuses.
        TypeError: the diagonal is neither a mapping nor a function; or as in ``accumulate``.
        NotImplementedError: as in ``accumulate``.

    Cost: that of J for every input, and about 40 more numbers per parameter. It is meant for a few
        hundred inputs, or ``layers`` of a large network.

    Example: squared gradients of the mean loss of a batch, as one finds them.
        >>> from fimlib import Categorical
        >>> _ = torch.manual_seed(0)
        >>> net, x, y = nn.Linear(3, 4), torch.randn(8, 3), torch.randint(4, (8,))
        >>> nn.functional.cross_entropy(net(x), y).backward()
        >>> found = identify({n: p.grad.square() for n, p in net.named_parameters()}, net,
        ...                  [(x, y)], Categorical())
        >>> found.formula, found.factor_text
        ('batch', '')
    """
    check_family(family)
    model = check_module(model)
    data = list(data)
    wanted = selected(model, layers)
    names = [n for n, _ in model.named_parameters() if wanted is None or n in wanted]
    check_size(model, names)
    first = model.get_parameter(names[0])
    with kept_random_state(first):
        found, is_random = computed(diagonal, model, data)
    results = torch.stack([flattened(one, names, model) for one in found])
    generator = generator or torch.Generator(first.device).manual_seed(0)  # not the caller's
    differentiate = differentiator(model, order=1, layers=layers)
    totals = Totals()
    ys = list(map(labels or labels_in, data))
    pick = 0 if labels is None and forward is None and None not in map(labels_in, data) else None
    stream = Batches(model, data, family, pick, forward)
    for y, (number, network, x) in zip(ys, stream, strict=True):
        with named(f"batch {number}"):
            sweep = differentiate(x.to(first.device), network)
            totals.add(of_batch(sweep, family, y, names, generator))
    totals.settle()
    shapes = {n: model.get_parameter(n).shape for n in names}
    return Case(results, totals, shapes).judged(is_random)


def check_size(model: nn.Module, names: Sequence[str]) -> None:
    """A ValueError if there are no parameters, or too many for all draws."""
    count = sum(model.get_parameter(n).numel() for n in names)
    if not names:
        raise ValueError("the model has no parameters.")
    if count > MOST_PARAMETERS:
        raise ValueError(
            f"identify keeps some hundred numbers for each of the {count:,} parameters: take a few "
            f"layers=, with at most {MOST_PARAMETERS:,}, which follow the same formula."
        )


def computed(
    diagonal: PerParameter | Compute, model: nn.Module, data: list[Any]
) -> tuple[list[PerParameter], bool | None]:
    """The result, or those of several calls of a function; and whether two of them differ."""
    if isinstance(diagonal, Mapping):
        return [diagonal], None
    if not callable(diagonal):
        raise TypeError(
            f"diagonal is a {type(diagonal).__name__}: pass a dict from the parameters' names to "
            "tensors, or a function of the model and the batches that returns one."
        )

    def called() -> PerParameter:
        found = diagonal(copy.deepcopy(model), list(data))
        if not isinstance(found, Mapping):
            raise TypeError(
                f"the function returned a {type(found).__name__}: it must return a dict from the "
                "parameters' names to tensors."
            )
        return {n: torch.as_tensor(t).detach().clone() for n, t in found.items()}

    first, second = called(), called()
    pairs = ((t.double(), second[n].double()) for n, t in first.items())
    if all(bool((a - b).norm() <= EXACT * a.norm()) for a, b in pairs):
        return [first], False
    return [first, second, *(called() for _ in range(CALLS - 2))], True


def flattened(result: PerParameter, names: Sequence[str], model: nn.Module) -> Tensor:
    """All entries in a row, [P], float64."""
    rows = []
    for name in names:
        parameter = model.get_parameter(name)
        if name not in result:
            raise ValueError(
                f"the diagonal has no parameter {name!r}: its names must be those of "
                "model.named_parameters(); layers= leaves others out."
            )
        found = torch.as_tensor(result[name]).detach().to(parameter.device)
        if found.ndim and found.shape != parameter.shape:
            raise ValueError(
                f"parameter {name!r} is {list(parameter.shape)}, and {list(found.shape)} in the "
                "diagonal."
            )
        if not torch.isfinite(found).all():
            raise ValueError(f"the diagonal of parameter {name!r} is NaN or infinite.")
        rows.append(found.double().expand(parameter.shape).flatten())
    return torch.cat(rows)


def labels_in(batch: Any) -> Any:
    """The y of a batch (x, y); None of any other batch."""
    is_pair = isinstance(batch, tuple | list) and len(batch) == 2
    return batch[1] if is_pair else None


# Which one it is.


class Match(NamedTuple):
    """A formula that explains the result, with the numbers of ``Identified``."""

    key: str
    factor: float
    text: str
    distance: float
    z: float | None = None
    num_samples: float | None = None

    @property
    def off(self) -> float:
        """How far the number of labels is from one, on a logarithmic scale."""
        return abs(math.log(self.num_samples or 1))


@dataclass(frozen=True)
class Case:
    """The results of R calls, [R, P], beside all formulas."""

    results: Tensor
    totals: Totals
    shapes: Mapping[str, torch.Size]

    @property
    def result(self) -> Tensor:
        """The first result, [P]."""
        return self.results[0]

    @cached_property
    def sizes(self) -> list[int]:
        """Of the parameters."""
        return [shape.numel() for shape in self.shapes.values()]

    @cached_property
    def is_mean(self) -> bool:
        """Whether every tensor holds one number."""
        parts = [r for r in self.result.split(self.sizes) if r.numel() > 1]
        return bool(parts) and all(
            bool(((r - r[0]).abs() <= 1e-6 * r[0].abs()).all()) for r in parts
        )

    @cached_property
    def is_narrow(self) -> bool:
        """Whether all numbers are of bfloat16."""
        result = self.result
        return bool(result.any()) and bool((result == result.bfloat16().double()).all())

    @property
    def limit(self) -> float:
        """Up to which distance a formula may be the one."""
        return ROUNDED if self.is_narrow else EXACT

    def seen(self, t: Tensor) -> Tensor:
        """A formula's numbers [..., P], averaged over every tensor where the result is, too."""
        if not self.is_mean:
            return t
        means = [p.mean(-1, keepdim=True).expand(p.shape) for p in t.split(self.sizes, -1)]
        return torch.cat(means, -1)

    def judged(self, is_random: bool | None) -> Identified:
        """What the first result is, and how far it is from I."""
        nearest = {key: self.nearest(key) for key in FORMULAS if key in self.totals.means}
        plain = [m for key, m in nearest.items() if key not in RANDOM]
        limit = min(self.limit, SAME * min(m.distance for m in plain) + ROUNDING)
        found = sorted((m for m in plain if m.distance <= limit), key=lambda m: m.text == "unknown")
        if not found and is_random is not False:
            chance = (self.by_chance(key) for key in RANDOM if key in self.totals.draws)
            found = sorted(filter(None, chance), key=lambda m: m.text != "")
        distances = {key: m.distance for key, m in nearest.items()}
        is_known = bool(found)
        one = found[0] if found else Match("unknown", 1.0, "", min(distances.values()))
        formula = FORMULAS.get(one.key, UNKNOWN)
        result, fisher = self.result, self.totals.means["exact"]
        parts = zip(self.shapes.items(), fisher.split(self.sizes), strict=True)
        return Identified(
            formula=one.key,
            text=formula.text,
            factor=one.factor,
            factor_text=one.text,
            distance=one.distance,
            z=one.z,
            num_samples=one.num_samples,
            is_mean_of_tensor=self.is_mean and is_known,
            is_bfloat16=self.is_narrow and is_known,
            is_random=is_random,
            is_certain=one.z is None or bool(is_random),
            also=tuple(m.key for m in found[1:] if m.text != "unknown"),
            distances=distances,
            ratio=float(result.sum() / fisher.sum()),
            distance_to_fisher=float((result - fisher).norm() / fisher.norm()),
            rank_correlation=rank_correlation(result, fisher),
            overlap=overlap(result, fisher),
            remedy=formula.remedy,
            fisher={n: t.view(shape).clone() for (n, shape), t in parts},
        )

    def nearest(self, key: str) -> Match:
        """The formula at the factor that suits it best, summed in bfloat16 if that is nearer."""
        means = [self.totals.means[key]]
        if self.is_narrow and key in self.totals.low:
            means.append(self.totals.low[key])
        return min((self.scaled(key, self.seen(m)) for m in means), key=lambda m: m.distance)

    def scaled(self, key: str, mean: Tensor) -> Match:
        """These numbers at the factor that suits them best, a known one if that is as good."""
        norm = mean.square().sum()
        factor = float((self.result * mean).sum() / norm) if norm > 0 else 1.0
        factor = factor if factor > 0 else 1.0
        known = self.totals.factors(key)
        near = min(known, key=lambda pair: round(abs(pair[0] / factor - 1), 6))
        plain, other, free = (
            Match(key, value, text, self.worst(value * mean))
            for value, text in (known[0], near, (factor, "unknown"))
        )
        if self.is_narrow and plain.distance <= self.limit:  # rounding looks like a factor near 1
            return plain
        return other if other.distance <= max(self.limit, 1.01 * free.distance) else free

    def worst(self, mean: Tensor) -> float:
        """The largest relative distance over the tensors, but for those that are nearly nothing."""
        pairs = zip(self.result.split(self.sizes), mean.split(self.sizes), strict=True)
        norms = [
            (float((r - t).norm()), float(torch.maximum(r.norm(), t.norm()))) for r, t in pairs
        ]
        most = max(size for _, size in norms)
        return max((off / size for off, size in norms if size > NOTHING * most), default=0.0)

    def by_chance(self, key: str) -> Match | None:
        """The random formula, if chance explains how far the results are from its expectation."""
        mean, draws = self.seen(self.totals.means[key]), self.seen(self.totals.draws[key])
        errors = (draws - mean).square().sum(1)
        if not errors.all():  # there is no chance where I = 0
            return None
        spread = self.sums(draws - mean).square().mean(0).sqrt()
        whole = (draws - mean).sum(1).square().mean().sqrt()
        found: list[Match] = []
        for factor, text in self.totals.simple_factors(key):
            rows = self.results / factor
            off = rows.mean(0) - mean
            if len(rows) > 1:
                own = rows.var(0).sum()
                count = float(errors.mean() / own)
                is_likely = bool(off.square().sum() <= WIDEST * own / len(rows))
            else:
                count = float(errors.log().mean().exp() / off.square().sum())
                is_likely = True
            narrower = (max(1.0, count) * len(rows)) ** 0.5
            z = (self.sums(off[None])[0] / spread * narrower)[spread > 0]
            least = -WIDEST * float(errors.log().std())
            is_likely &= least <= math.log(count) <= math.log(MOST_LABELS)
            if is_likely and bool((z.abs() <= WIDEST).all()) and bool((z.abs() > NOTHING).any()):
                distance = float((rows[0] - mean).norm() / rows[0].norm())
                z_of_all = float(off.sum() / whole * narrower)
                found.append(Match(key, factor, text, distance, z_of_all, count))
        plain = [m for m in found if m.text == ""]  # another factor may suit the noise by chance
        return min(plain or found, key=lambda m: m.off, default=None)

    def sums(self, t: Tensor) -> Tensor:
        """Over every tensor: [K, P] → [K, number of tensors]."""
        return torch.stack([part.sum(1) for part in t.split(self.sizes, 1)], 1)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's; 0 where all numbers are equal."""
    if any(bool((t == t[0]).all()) for t in (a, b)):
        return 0.0
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def ranks(t: Tensor) -> Tensor:
    """From the smallest, 1, to the largest; equal numbers share the mean of theirs."""
    _, places, counts = t.unique(return_inverse=True, return_counts=True)
    rank: Tensor = counts.cumsum(0) - (counts - 1) / 2
    return rank[places]


def overlap(a: Tensor, b: Tensor) -> float:
    """The share of the largest tenth of the entries that both have in common."""
    count = max(1, round(LARGEST_SHARE * len(a)))
    one, other = (set(t.topk(count).indices.tolist()) for t in (a, b))
    return len(one & other) / count
