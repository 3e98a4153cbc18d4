"""One number per parameter and input, kept as outer products where the network allows it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Term:
    """Entries ``left ⊗ right`` of the parameters of one layer.

    Attributes:
        layer: Name of the layer in the network.
        left: [B, *K], one factor per output unit (or per entry, where nothing factors).
        rights: For every parameter its other factor [B, n], or None where that is 1.
    """

    layer: str
    left: Tensor
    rights: Mapping[str, Tensor | None]

    def dense(self, name: str) -> Tensor:
        """The entries of one parameter, [B, *shape]."""
        right = self.rights[name]
        if right is None:
            return self.left.clone()  # the caller may write to it
        return torch.einsum("b...,bn->b...n", self.left, right)

    def mean_over_inputs(self, name: str) -> Tensor:
        """The entries of one parameter, averaged over the inputs by one matmul: its shape."""
        right = self.rights[name]
        if right is None:
            return self.left.mean(0)
        return torch.einsum("b...,bn->...n", self.left, right) / len(right)

    def sum_and_count(self) -> tuple[Tensor, int]:
        """Sum over all entries, [B], and how many there are."""
        left, size = self.left.reshape(len(self.left), -1).sum(1), self.left[0].numel()
        sums = [left if r is None else left * r.sum(1) for r in self.rights.values()]
        count = sum(size if r is None else size * r.shape[1] for r in self.rights.values())
        return torch.stack(sums).sum(0), count

    def square(self) -> Term:
        """The squared entries: of an outer product, the outer product of the squares."""
        rights = {name: None if r is None else r.square() for name, r in self.rights.items()}
        return Term(self.layer, self.left.square(), rights)


class Diagonal(Mapping[str, Tensor]):
    """A diagonal quantity of the paper: parameter name → float64 tensor [B, *parameter shape].

    Behaves like a read-only dict; an entry is expanded from its factors when it is asked for, so
    averages over layers or inputs never build it.

    Example: two inputs, I of a weight and a bias.
        >>> from fimlib import Gaussian, differentiate, fisher_information
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> I = fisher_information(differentiate(torch.nn.Linear(1, 1), x), Gaussian())
        >>> list(I), I["weight"].shape, I["weight"].flatten().tolist()
        (['weight', 'bias'], torch.Size([2, 1, 1]), [1.0, 9.0])
        >>> I.mean_over_inputs()["weight"].tolist(), I.layer_means()[""].tolist()
        ([[5.0]], [1.0, 5.0])
    """

    def __init__(self, terms: tuple[Term, ...]) -> None:
        self._terms = terms
        self._owner = {name: term for term in terms for name in term.rights}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._owner:
            raise KeyError(f"no parameter {name!r}; there are: {', '.join(self._owner)}")
        return self._owner[name].dense(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __len__(self) -> int:
        return len(self._owner)

    def __repr__(self) -> str:
        return f"Diagonal({', '.join(self)})"

    def mean_over_inputs(self) -> dict[str, Tensor]:
        """Average over the inputs: the joint quantity, one tensor of each parameter's own shape."""
        return {name: term.mean_over_inputs(name) for name, term in self._owner.items()}

    def square(self) -> Diagonal:
        """Every entry squared, in the same factored form."""
        return Diagonal(tuple(term.square() for term in self._terms))

    def total(self) -> Tensor:
        """Sum over all parameters of all layers (Corollary 4.6), [B]."""
        return torch.stack([term.sum_and_count()[0] for term in self._terms]).sum(0)

    def layer_means(self) -> dict[str, Tensor]:
        """Arithmetic mean over all parameters of each layer (Sec. 5.3): layer name → [B]."""
        parts = defaultdict(list)
        for term in self._terms:
            parts[term.layer].append(term.sum_and_count())
        return {
            layer: torch.stack([s for s, _ in sums]).sum(0) / sum(n for _, n in sums)
            for layer, sums in parts.items()
        }
