r"""Which formula does a given diagonal follow? ``identify`` compares it with those in use.

Code that says "diagonal Fisher" computes many things. Each formula here is a mean over the inputs
or the batches of squares of rows r·J, where J are the first derivatives of the natural parameters
and r says whose labels are meant: r = δ for a label, Σ_k √p_k δ_k for classes that are summed
before they are squared, and so on. A result may be such a mean times a factor.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from scipy import stats
from torch import Tensor, nn

from fimlib._tables import aligned
from fimlib.derivatives import Block, Derivatives, Sweep, slices
from fimlib.engines.checks import check_module
from fimlib.engines.choose import differentiator
from fimlib.engines.held import Forward
from fimlib.engines.model import selected
from fimlib.families.base import Family, check_family
from fimlib.families.categorical import Categorical
from fimlib.families.product import Positions, Product
from fimlib.memory import JACOBIAN_NUMBERS
from fimlib.streaming import batches, named

__all__ = ["Formula", "Identified", "identify"]

PerParameter = Mapping[str, Tensor]
Compute = Callable[[nn.Module, list[Any]], PerParameter]
Form = Callable[[Tensor], Tensor]

EXACT = 1e-3  # relative distance up to which a formula without chance is the one
ROUNDED = 2.0**-7  # of a number in bfloat16
SAME, ROUNDING = 30.0, 1e-6  # formulas whose distances differ by no more are equal here
DRAWS = 32  # of every random formula
CALLS = 8  # of a function whose results differ
WIDEST = 4.0  # standard deviations that chance may explain
BETAS = (0.9, 0.95, 0.99, 0.999)  # of Adam's second moment
NOTHING = 1e-10  # the share of a tensor that rounding may have made
MOST_LABELS = 1e4  # per input, that anybody draws
LARGEST_SHARE = 0.1  # of the entries, whose overlap is stated


class Formula(NamedTuple):
    """A formula in use.

    Attributes:
        text: What it computes.
        remedy: How to get I, or what is meant instead, from the same backward passes.
    """

    text: str
    remedy: str


SAMPLE = "Draw the labels from the model, torch.distributions.Categorical(logits=h).sample()"
PER_EXAMPLE = "square the gradient of every example by itself"
FORMULAS = {
    "exact": Formula("I, the exact diagonal", "It is right."),
    "sampled": Formula(
        "Î₁, squares for every example with labels drawn from the model (Eq. 5)",
        "It is right on average; summarise() says how many labels it takes.",
    ),
    "data": Formula(
        "squares for every example with the labels of the data (the empirical Fisher, Eq. 21)",
        f"{SAMPLE}; or take it for what it is.",
    ),
    "batch": Formula(
        "the square of the mean gradient of a batch, with the labels of the data",
        f"{SAMPLE}, and {PER_EXAMPLE}.",
    ),
    "sampled batch": Formula(
        "the square of the mean gradient of a batch, with labels drawn from the model",
        f"Multiply by the batch size, which gives I on average; or {PER_EXAMPLE}, for less noise.",
    ),
    "whole": Formula(
        "the square of the mean gradient of all inputs, with the labels of the data",
        f"{SAMPLE}, and {PER_EXAMPLE}: this is the squared gradient of the loss.",
    ),
    "position": Formula(
        "squares for every position, with the labels of the data",
        f"{SAMPLE}; sum the gradients of a sequence before they are squared, or state that one "
        "position counts as an input.",
    ),
    "word": Formula(
        "the square of the mean gradient over the labelled positions of a batch",
        f"{SAMPLE}, and square the gradient of every sequence, summed over its positions.",
    ),
    "likeliest": Formula(
        "squares for every example with its likeliest class as the label",
        f"{SAMPLE}: the likeliest class is no sample.",
    ),
    "no label": Formula(
        "squares of the gradient of all log-probabilities, summed over the classes",
        "Choose a label: weigh the squares of the classes' own gradients by p(y|x).",
    ),
    "root": Formula(
        "squares of the classes' gradients summed with √p; it keeps the cross terms",
        "Square before summing over the classes; or give every class a random sign, which makes "
        "the cross terms vanish on average.",
    ),
    "Gauss-Newton": Formula(
        "Σ_t J_t², the Gauss–Newton diagonal of half the squared error of the outputs",
        "Weigh the outputs by their covariance: fisher_information() with the labels' family.",
    ),
    "Brier": Formula(
        "Σ_k (∂p_k)², the Gauss–Newton diagonal of half the squared error of the probabilities",
        "Take the derivatives of log p(k|x), and weigh their squares by p(k|x).",
    ),
    "last": Formula(
        "the square of the last example's gradient, with the label of the data",
        "Add to the sum in the loop; it is overwritten. Then see to the labels.",
    ),
    "last batch": Formula(
        "the square of the last batch's mean gradient, with the labels of the data",
        f"Add to the sum in the loop; it is overwritten. {SAMPLE}, and {PER_EXAMPLE}.",
    ),
} | {
    f"Adam {beta}": Formula(
        f"Adam's second moment with β₂ = {beta}, at these weights",
        f"It is a running mean of squared batch gradients. {SAMPLE}, and {PER_EXAMPLE}.",
    )
    for beta in BETAS
}
UNKNOWN = Formula(
    "none of the formulas", "Compare with accumulate(..., quantities=['I']).fisher_information()."
)
RANDOM = ("sampled", "sampled batch")
PER_BATCH = {"batch", "sampled batch", "word"}  # means over the batches, not over the inputs
ONCE = {"whole", "last", "last batch", *(f"Adam {beta}" for beta in BETAS)}  # no means


@dataclass(frozen=True)
class Identified:
    """The formula that a diagonal follows; ``print`` it.

    Attributes:
        formula: A key of ``FORMULAS``, or "unknown".
        text: What it computes.
        factor: By which the result is larger than the formula.
        factor_text: Where that comes from; "" for 1, "unknown" if no reason is known.
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
            f"{self.distance_to_fisher:.2g}; rank correlation with I {self.rank_correlation:.3f};",
            f"{self.overlap:.0%} of the largest tenth of I's entries are among its own.",
            self.remedy,
            "",
        ]
        nearest = sorted(self.distances.items(), key=lambda pair: pair[1])[:5]
        rows = [("nearest formulas, at their best factor", "distance")]
        rows += [(FORMULAS[key].text, f"{distance:.2g}") for key, distance in nearest]
        return "\n".join([*lines, *aligned(rows)])

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
    r"""Which formula a diagonal follows that somebody's code computed, and how far it is from I.

    Formulas without chance match if they agree to a thousandth, at any factor. Of random ones a
    few dozen draws show what chance explains. A result that is none of them is "unknown".

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
    found, is_random = computed(diagonal, model, data)
    wanted = selected(model, layers)
    names = [n for n, _ in model.named_parameters() if wanted is None or n in wanted]
    results = torch.stack([flattened(one, names, model) for one in found])
    device = next(p.device for p in model.parameters())
    generator = generator or torch.Generator(device).manual_seed(0)  # not the caller's
    differentiate = differentiator(model, order=1, layers=layers)
    totals = Totals()
    for number, batch in enumerate(data, start=1):
        y = labels(batch) if labels else labels_in(batch)
        pick = 0 if forward is None and y is not None and not labels else None
        with named(f"batch {number}"):
            ((_, network, x),) = batches(model, [batch], family, pick, forward)
            totals.add(of_batch(differentiate(x.to(device), network), family, y, names, generator))
    totals.settle()
    shapes = {n: model.get_parameter(n).shape for n in names}
    return judged(results, totals, shapes, is_random)


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


# The formulas.


@dataclass
class OfBatch:
    """The formulas at one batch, flattened to [P].

    Attributes:
        count: b, its inputs.
        outputs, positions: T, and L of ``Positions``, else 1.
        squares: Formula → the sum over the inputs.
        draws: Random formula → the same of K draws, [K, P].
        gradient: The sum of the gradients with the labels of the data, if there are any.
        last: The square of the last of them.
        num_labels: Of ``Positions``: how many labels count; else 0.
    """

    count: int
    outputs: int
    positions: int
    squares: dict[str, Tensor]
    draws: dict[str, Tensor]
    gradient: Tensor | None = None
    last: Tensor | None = None
    num_labels: int = 0


def of_batch(
    sweep: Sweep, family: Family, y: Any, names: Sequence[str], generator: torch.Generator
) -> OfBatch:
    """All of them, a few inputs at a time, since the rows take much memory."""
    count, outputs = sweep.outputs.shape
    size = family.size if isinstance(family, Positions) else outputs
    h = family.natural(sweep.outputs)
    rows = of_classes(family, h)
    if y is not None:
        rows["data"] = family.observed(h, y).mean_residual()
    drawn = [family.draw_residual(h, generator) for _ in range(DRAWS)]
    R = torch.stack([*drawn, *rows.values()], 2)
    kinds, squares, sums = [], [], []
    for at in slices(count, max(1, JACOBIAN_NUMBERS // (R.shape[2] * num_entries(sweep)))):
        derivs = family.natural_derivatives(sweep.sweep(at))
        others = forms(family, h[at], rows.get("data", h)[at], size, has_labels="data" in rows)
        kinds = [*rows, *others]
        squares.append(flat(derivs, partial(all_squares, R[at], others), 2, names))
        sums.append(flat(derivs, partial(products, R[at]), 1, names))
    square, total = torch.stack(squares).sum(0), torch.stack(sums).sum(0)
    own = dict(zip(kinds, square[DRAWS:], strict=True))
    found = OfBatch(
        count, outputs, outputs // size, {**own, "sampled": own["exact"]},
        {"sampled": square[:DRAWS], "sampled batch": (total[:DRAWS] / count).square()},
    )  # fmt: skip
    if "data" in rows:
        last = family.natural_derivatives(sweep.sweep(slice(count - 1, count)))
        found.gradient = total[DRAWS + list(rows).index("data")]
        found.last = flat(last, partial(products, rows["data"][-1:, :, None]), 1, names)[0].square()
        found.num_labels = num_labels(family, y, count * outputs // size)
    return found


def products(R: Tensor, block: Block) -> Tensor:
    """r·J of A rows, [b, T, A] → [b, A, *K]."""
    return torch.einsum("bta,bt...->ba...", R, block.J.double())


def all_squares(R: Tensor, others: Mapping[str, Form], block: Block) -> Tensor:
    """(r·J)² of A rows, and what is no such square: [b, A + A', *K]."""
    J = block.J.double()
    return torch.cat([products(R, block).square(), *(f(J)[:, None] for f in others.values())], 1)


def forms(family: Family, h: Tensor, r: Tensor, size: int, *, has_labels: bool) -> dict[str, Form]:
    """Sums of several squares for every example, from J: [b, T, *K] → [b, *K]."""
    found: dict[str, Form] = {
        "exact": lambda J: family.information(h, J),
        "Gauss-Newton": lambda J: J.square().sum(1),
    }
    if has_classes(family):
        slopes = family.covariance(h)  # of p in h
        found["Brier"] = lambda J: torch.einsum("bst,bt...->bs...", slopes, J).square().sum(1)
    if has_labels and size < h.shape[1]:
        found["position"] = lambda J: of_positions(r, J, size).square().sum(1)
    return found


def num_labels(family: Family, y: Any, count: int) -> int:
    """How many labels of ``Positions`` count; 0 for other families."""
    if not isinstance(family, Positions):
        return 0
    ignored = family.ignore_index
    return count - (0 if ignored is None else int((torch.as_tensor(y) == ignored).sum()))


def num_entries(sweep: Sweep) -> int:
    """About how many numbers J of one output has at one input: those of its factors."""
    few = sweep.sweep(slice(0, 1))
    return sum(block.J[0, 0].numel() for block in few.blocks)


def flat(
    derivs: Derivatives, form: Callable[[Block], Tensor], degree: int, names: Sequence[str]
) -> Tensor:
    """The sum over the inputs of several contractions at once, [A, P]."""
    means = derivs.contract(form, degree).mean_over_inputs()
    return len(derivs.outputs) * torch.cat([means[n].flatten(1) for n in names], 1)


def has_classes(family: Family) -> bool:
    """Whether all labels are classes."""
    families = family.families if isinstance(family, Product) else [family]
    return all(isinstance(one, Categorical) for one in families)


def of_classes(family: Family, h: Tensor) -> dict[str, Tensor]:
    """The rows r of formulas that are about classes, [B, T] each."""

    def likeliest(p: Tensor) -> Tensor:
        return nn.functional.one_hot(p.argmax(1), p.shape[1]) - p

    def summed(p: Tensor) -> Tensor:
        return 1 - p.shape[1] * p

    def root(p: Tensor) -> Tensor:
        return p.sqrt() - p.sqrt().sum(1, keepdim=True) * p

    if not has_classes(family):
        return {}
    ways = {"likeliest": likeliest, "no label": summed, "root": root}
    if not isinstance(family, Product):
        return {key: way(family.mean(h)) for key, way in ways.items()}
    return {
        key: family.rows(lambda own, h, way=way: way(own.mean(h)), h) for key, way in ways.items()
    }


def of_positions(r: Tensor, J: Tensor, size: int) -> Tensor:
    """The products r·J of every position by itself, [B, L, ...]."""
    apart = (t.unflatten(1, (-1, size)) for t in (r, J))
    return torch.einsum("bls,bls...->bl...", *apart)


class Totals:
    """Every formula over the data, batch by batch.

    Attributes:
        means: Formula → [P], its mean over the inputs or the batches; of a random one, expected.
        low: The same where a loop adds the batches up in bfloat16.
        draws: Random formula → [K, P].
        sizes: Of the batches.
        outputs, positions: T, and L of ``Positions``, else 1.
    """

    def __init__(self) -> None:
        self.means: dict[str, Tensor] = {}
        self.low: dict[str, Tensor] = {}
        self.draws: dict[str, Tensor] = {}
        self.sizes: list[int] = []
        self.outputs = self.positions = 1
        self._gradient: Tensor | None = None

    @property
    def inputs(self) -> int:
        """The number of all inputs, m."""
        return sum(self.sizes)

    def add(self, batch: OfBatch) -> None:
        """Add a batch."""
        count, g = batch.count, batch.gradient
        self.outputs, self.positions = batch.outputs, batch.positions
        self.sizes.append(count)
        shares = {**batch.squares, "sampled batch": batch.squares["exact"] / count**2}
        if g is not None:
            shares["batch"] = (g / count).square()
            if batch.num_labels:
                shares["word"] = (g / batch.num_labels).square()
        for key, share in shares.items():
            mean = (share if key in PER_BATCH else share / count).bfloat16()
            self.means[key] = self.means[key] + share if key in self.means else share
            self.low[key] = self.low[key] + mean if key in self.low else mean
        for key, drawn in batch.draws.items():
            self.draws[key] = self.draws[key] + drawn if key in self.draws else drawn
        if g is None or batch.last is None:
            return
        self._gradient = g if self._gradient is None else self._gradient + g
        self.means |= {"last": batch.last, "last batch": shares["batch"]}
        for beta in BETAS:
            new = (1 - beta) * shares["batch"]
            before = self.means.get(f"Adam {beta}")
            self.means[f"Adam {beta}"] = new if before is None else beta * before + new

    def settle(self) -> None:
        """Turn sums into means, and leave out what is another formula by another name here.

        Raises:
            ValueError: there are no batches.
        """
        if not self.sizes:
            raise ValueError("there are no batches: pass a DataLoader, or [(x, y)].")
        count = len(self.sizes)
        for of in (self.means, self.draws):
            for key in of.keys() - ONCE:
                of[key] = of[key] / (count if key in PER_BATCH else self.inputs)
        self.low = {key: t.double() / count for key, t in self.low.items()}
        for beta in BETAS:
            if (key := f"Adam {beta}") in self.means:
                self.means[key] /= 1 - beta**count
        if self._gradient is not None:
            self.means["whole"] = (self._gradient / self.inputs).square()
        doubled = ONCE - {"last"} if count == 1 else set()
        doubled |= PER_BATCH - {"word"} | {"last batch"} if max(self.sizes) == 1 else set()
        for of in (self.means, self.low, self.draws):
            for key in doubled & of.keys():
                del of[key]

    def simple_factors(self, key: str) -> list[tuple[float, str]]:
        """By what a loop over the batches may exceed the formula, and why; 1 comes first."""
        m, n = self.inputs, len(self.sizes)
        b, known = m / n, {"": 1.0}
        if key in PER_BATCH:
            known |= {
                "summed over the batches": n,
                "times the batch size": b,
                "of gradients summed over the batch": b**2,
                "summed over the batches, of gradients summed over each": n * b**2,
                "divided by the inputs in place of the batches": 1 / b,
                "divided by the batches less one": n / max(1, n - 1),
            }
        elif key in ONCE:
            known |= (
                {"of the gradient summed over all inputs": float(m) ** 2} if key == "whole" else {}
            )
            known |= {"of the gradient summed over the batch": b**2} if key == "last batch" else {}
            if key.startswith("Adam"):
                known["without the correction for its start"] = 1 - float(key.split()[1]) ** n
        else:
            known |= {
                "summed over the inputs": m,
                "divided by the batches in place of the inputs": b,
                "divided by the inputs less one": m / max(1, m - 1),
                "divided by the batch size as well": 1 / b,
                "divided by the inputs twice": 1 / m,
            }
        return [(value, text) for text, value in known.items()]

    def factors(self, key: str) -> list[tuple[float, str]]:
        """The same, and what the loss may add to it."""
        T, L = self.outputs, self.positions
        more = {"": 1.0, "halved": 0.5, "doubled": 2.0, "divided by the outputs": 1 / T}
        if L > 1:
            more |= {"divided by the positions": 1 / L}
            more |= {"of gradients averaged over the positions": 1 / L**2}
        return [
            (value * more[other], ", ".join(filter(None, (text, other))))
            for other, (value, text) in itertools.product(more, self.simple_factors(key))
        ]


# Which one it is.


class Match(NamedTuple):
    """A formula that explains the result.

    Attributes:
        key: The formula.
        factor, text: As in ``Identified``.
        distance: To the result.
        z, num_samples: Of a random formula.
    """

    key: str
    factor: float
    text: str
    distance: float
    z: float | None = None
    num_samples: float | None = None


def judged(
    results: Tensor, totals: Totals, shapes: Mapping[str, torch.Size], is_random: bool | None
) -> Identified:
    """What the first result is, [R, P] with those of further calls, and how far it is from I."""
    result = results[0]
    sizes = [shape.numel() for shape in shapes.values()]
    parts = [r for r in result.split(sizes) if r.numel() > 1]
    is_mean = bool(parts) and all(
        bool(((r - r[0]).abs() <= 1e-6 * r[0].abs()).all()) for r in parts
    )
    is_narrow = bool((result == result.bfloat16().double()).all()) and bool(result.any())

    def seen(t: Tensor) -> Tensor:
        if not is_mean:
            return t
        means = [p.mean(-1, keepdim=True).expand(p.shape) for p in t.split(sizes, -1)]
        return torch.cat(means, -1)

    limit = ROUNDED if is_narrow else EXACT
    distances: dict[str, float] = {}
    matches: list[Match] = []
    for key in (k for k in FORMULAS if k in totals.means):
        wide = best(key, result, seen(totals.means[key]), sizes, totals, limit)
        if is_narrow:
            low = best(
                key, result, seen(totals.low.get(key, totals.means[key])), sizes, totals, limit
            )
            wide = min(wide, low, key=lambda m: m.distance)
        distances[key] = wide.distance
        if key not in RANDOM:
            matches.append(wide)
    nearest = min(m.distance for m in matches)
    found = [m for m in matches if m.distance <= min(limit, SAME * nearest + ROUNDING)]
    found.sort(key=lambda m: m.text == "unknown")
    if not found and is_random is not False:
        chance = (by_chance(key, results, seen, sizes, totals) for key in RANDOM)
        found = sorted(filter(None, chance), key=lambda m: m.text != "")
    fisher = totals.means["exact"]
    best_match = found[0] if found else Match("unknown", 1.0, "", min(distances.values()))
    is_certain = best_match.z is None or bool(is_random)
    also = tuple(m.key for m in found[1:] if m.text != "unknown")
    formula = FORMULAS.get(best_match.key, UNKNOWN)
    pairs = zip(shapes.items(), fisher.split(sizes), strict=True)
    return Identified(
        best_match.key, formula.text, best_match.factor, best_match.text, best_match.distance,
        best_match.z, best_match.num_samples, is_mean and best_match.key != "unknown",
        is_narrow and best_match.key != "unknown", is_random, is_certain, also, distances,
        float(result.sum() / fisher.sum()), float((result - fisher).norm() / fisher.norm()),
        rank_correlation(result, fisher), overlap(result, fisher), formula.remedy,
        {n: t.view(shape).clone() for (n, shape), t in pairs},
    )  # fmt: skip


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's; 0 where all numbers are equal."""
    if any(bool((t == t[0]).all()) for t in (a, b)):
        return 0.0
    return float(stats.spearmanr(a.cpu(), b.cpu()).statistic)


def overlap(a: Tensor, b: Tensor) -> float:
    """The share of the largest tenth of the entries that both have in common."""
    count = max(1, round(LARGEST_SHARE * len(a)))
    one, other = (set(t.topk(count).indices.tolist()) for t in (a, b))
    return len(one & other) / count


def best(
    key: str, result: Tensor, mean: Tensor, sizes: list[int], totals: Totals, limit: float
) -> Match:
    """The formula at the factor that suits it best, a known one if that is as good."""
    norm = mean.square().sum()
    factor = float((result * mean).sum() / norm) if norm > 0 else 1.0
    factor = factor if factor > 0 else 1.0
    known = totals.factors(key)
    near = min(known, key=lambda pair: abs(pair[0] - factor))
    choices = [
        Match(key, value, text, worst(result, value * mean, sizes))
        for value, text in (known[0], near, (factor, "unknown"))
    ]
    plain, other, free = choices
    if limit > EXACT and plain.distance <= limit:  # rounding may look like a factor near 1
        return plain
    return other if other.distance <= max(limit, 1.01 * free.distance) else free


def worst(result: Tensor, mean: Tensor, sizes: list[int]) -> float:
    """The largest relative distance over the tensors, but for those that are nearly nothing."""
    pairs = zip(result.split(sizes), mean.split(sizes), strict=True)
    norms = [(float((r - t).norm()), float(r.norm()), float(t.norm())) for r, t in pairs]
    most = max(max(r, t) for _, r, t in norms)
    counting = [(off, r, t) for off, r, t in norms if max(r, t) > NOTHING * most]
    return max((off / max(r, t) for off, r, t in counting), default=0.0)


def by_chance(
    key: str,
    results: Tensor,
    seen: Callable[[Tensor], Tensor],
    sizes: list[int],
    totals: Totals,
) -> Match | None:
    """The random formula, if chance explains how far the results are from its expectation."""
    if key not in totals.draws:
        return None
    mean, draws = seen(totals.means[key]), seen(totals.draws[key])
    errors = (draws - mean).square().sum(1)
    sums = torch.stack([d.sum(1) for d in draws.split(sizes, 1)], 1)
    expected = torch.stack([t.sum() for t in mean.split(sizes)])
    spread = (sums - expected).square().mean(0).sqrt()
    whole = (sums.sum(1) - expected.sum()).square().mean().sqrt()
    found: list[Match] = []
    for factor, text in totals.simple_factors(key):
        rows = results / factor
        off = rows.mean(0) - mean
        is_likely = True
        error = errors.log().mean().exp()
        own = off.square().sum()
        if len(rows) > 1:
            error, own = errors.mean(), rows.var(0).sum()
            is_likely = bool(off.square().sum() <= WIDEST * own / len(rows))
        count = float(error / own)
        narrower = (max(1.0, count) * len(rows)) ** 0.5
        parts = torch.stack([t.sum() for t in off.split(sizes)])
        z = (parts / spread * narrower)[spread > 0]
        is_likely &= -WIDEST * float(errors.log().std()) <= math.log(count) <= math.log(MOST_LABELS)
        if is_likely and bool((z.abs() <= WIDEST).all()) and bool((z.abs() > NOTHING).any()):
            distance = float((results[0] / factor - mean).norm() / (results[0] / factor).norm())
            z_of_all = float(parts.sum() / whole * narrower)
            found.append(Match(key, factor, text, distance, z_of_all, count))
    plain = [m for m in found if m.text == ""]  # another factor may suit the noise by chance
    return min(plain or found, key=lambda m: abs(math.log(m.num_samples or 1)), default=None)
