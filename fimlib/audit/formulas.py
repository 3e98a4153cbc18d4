r"""The formulas that public code computes under the name of a diagonal Fisher, over some data.

Each is a mean, over the inputs or the batches, of squares of rows r·J, where J are the first
derivatives of the natural parameters, and r says whose labels are meant: r = δ for a label,
Σ_k √p_k δ_k for classes that are summed before they are squared, and so on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fimlib.derivatives import Block, Derivatives, Sweep, slices
from fimlib.families.base import Family
from fimlib.families.categorical import Categorical
from fimlib.families.product import Positions, Product
from fimlib.memory import JACOBIAN_NUMBERS
from fimlib.precision import has_classes

__all__ = ["Formula"]

Form = Callable[[Tensor], Tensor]

DRAWS = 32  # of every random formula
ADAM = {f"Adam {beta}": beta for beta in (0.9, 0.95, 0.99, 0.999)}  # β₂ of the second moment


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
    "weighted": Formula(
        "squares for every example with the labels of the data, weighted by p(y|x)",
        "Sum over all classes with these weights; of the observed label alone they favour the "
        "examples that the model is sure of.",
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
    key: Formula(
        f"Adam's second moment with β₂ = {beta}, at these weights",
        f"It is a running mean of squared batch gradients. {SAMPLE}, and {PER_EXAMPLE}.",
    )
    for key, beta in ADAM.items()
}
UNKNOWN = Formula(
    "none of the formulas", "Compare with accumulate(..., quantities=['I']).fisher_information()."
)
RANDOM = ("sampled", "sampled batch")
PER_BATCH = {"batch", "sampled batch", "word"}  # means over the batches, not over the inputs
ONCE = {"whole", "last", "last batch", *ADAM}  # no means


# One batch.


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
        labels = family.observed(h, y)
        rows["data"] = r = labels.mean_residual()
        if isinstance(family, Categorical):
            rows["weighted"] = r * labels.mean(family.mean(h))[:, None].sqrt()
    drawn = [family.draw_residual(h, generator) for _ in range(DRAWS)]
    R = torch.stack([*drawn, *rows.values()], 2)
    kinds, squares, totals = [], [], []
    for at in slices(count, max(1, JACOBIAN_NUMBERS // (R.shape[2] * num_entries(sweep)))):
        derivs = family.natural_derivatives(sweep.sweep(at))
        others = forms(family, h[at], rows.get("data", h)[at], size, has_labels="data" in rows)
        kinds = [*rows, *others]
        squares.append(sums(derivs, partial(all_squares, R[at], others), 2, names))
        totals.append(sums(derivs, partial(products, R[at]), 1, names))
    square, total = torch.stack(squares).sum(0), torch.stack(totals).sum(0)
    own = dict(zip(kinds, square[DRAWS:], strict=True))
    found = OfBatch(
        count, outputs, outputs // size, {**own, "sampled": own["exact"]},
        {"sampled": square[:DRAWS], "sampled batch": (total[:DRAWS] / count).square()},
    )  # fmt: skip
    if "data" in rows:
        last = family.natural_derivatives(sweep.sweep(slice(count - 1, count)))
        found.gradient = total[DRAWS + list(rows).index("data")]
        found.last = sums(last, partial(products, rows["data"][-1:, :, None]), 1, names)[0].square()
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


def sums(
    derivs: Derivatives, form: Callable[[Block], Tensor], degree: int, names: Sequence[str]
) -> Tensor:
    """The sum over the inputs of several contractions at once, [A, P]."""
    means = derivs.contract(form, degree).mean_over_inputs()
    return len(derivs.outputs) * torch.cat([means[n].reshape(len(means[n]), -1) for n in names], 1)


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


# All batches.


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
        for key, beta in ADAM.items():
            new = (1 - beta) * shares["batch"]
            self.means[key] = beta * self.means[key] + new if key in self.means else new

    def settle(self) -> None:
        """Turn sums into means, and leave out what is another formula by another name here."""
        if not self.sizes:
            raise ValueError("there are no batches: pass a DataLoader, or [(x, y)].")
        count = len(self.sizes)
        for of in (self.means, self.draws):
            for key in of.keys() - ONCE:
                of[key] = of[key] / (count if key in PER_BATCH else self.inputs)
        self.low = {key: t.double() / count for key, t in self.low.items()}
        for key in ADAM.keys() & self.means.keys():
            self.means[key] /= 1 - ADAM[key] ** count
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
        elif key == "whole":
            known["of the gradient summed over all inputs"] = float(m) ** 2
        elif key == "last batch":
            known["of the gradient summed over the batch"] = b**2
        elif key in ADAM:
            known["without the correction for its start"] = 1 - ADAM[key] ** n
        elif key != "last":
            known |= {
                "summed over the inputs": m,
                "divided by the batches in place of the inputs": b,
                "divided by the inputs less one": m / max(1, m - 1),
                "divided by the batch size as well": 1 / b,
                "divided by the inputs twice": 1 / m,
            }
        return [(value, text) for text, value in known.items()]

    def factors(self, key: str) -> list[tuple[float, str]]:
        """The same, and what the loss may add to it; simple reasons come before double ones."""
        T, L = self.outputs, self.positions
        more = {"": 1.0, "halved": 0.5, "doubled": 2.0, "divided by the outputs": 1 / T}
        if L > 1:
            more |= {"divided by the positions": 1 / L}
            more |= {"of gradients averaged over the positions": 1 / L**2}
        found = [
            (value * more[other], list(filter(None, (text, other))))
            for other, (value, text) in itertools.product(more, self.simple_factors(key))
        ]
        return [
            (value, ", ".join(parts)) for value, parts in sorted(found, key=lambda f: len(f[1]))
        ]
