r"""Several labels for one input: of one family at every position, or of several families.

Given the input the labels are independent, so that cumulants add up. With one label p,

    I = Σ_p I_p,    V₂ = Σ_p V₂_p,    C₁₂ = Σ_p C₁₂_p,    V₁ = Σ_p V₁_p + 4 Σ_{p<q} I_p I_q,

since V₁ is the fourth cumulant of δ·J and 2I². All quantities are those of an input, summed over
its labels. An output that is constant, as one that is multiplied by a mask of 0, has J = S = 0 and
adds nothing. Not in the paper.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fimlib._checks import check_integer
from fimlib.families.base import Family, Labels, check_family, pairings, sum_of_pairs

IGNORED = -100  # the label that torch's losses leave out by default
Function = Callable[..., Tensor]  # of a family, its outputs, and derivatives of these


class Product(Family):
    """Independent labels of one input, of families that a subclass knows."""

    @abstractmethod
    def each(self, function: Function, h: Tensor, *D: Tensor) -> Tensor:
        """One number per label: function(family, h, *D) of its outputs; → [B, P, ...]."""

    @abstractmethod
    def rows(self, function: Function, h: Tensor, *D: Tensor) -> Tensor:
        """One number per output, in their order: [B, T]."""

    @property
    @abstractmethod
    def families(self) -> list[Family]:
        """Those of the labels, once each."""

    @property
    def is_natural(self) -> bool:
        """Whether the outputs are the natural parameters of every label."""
        return all(family.is_natural for family in self.families)

    def unmasked(self, h: Tensor) -> Tensor:
        """Those of every label."""
        return self.rows(lambda family, h: family.unmasked(h), h)

    def log_partition(self, h: Tensor) -> Tensor:
        """Σ_p F_p."""
        return self.each(lambda family, h: family.log_partition(h), h).sum(1)

    def mean(self, h: Tensor) -> Tensor:
        """η of every label."""
        return self.rows(lambda family, h: family.mean(h), h)

    @abstractmethod
    def blocks(self, function: Function, h: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The columns of every label, and a dense tensor of it, [B, k, ...]."""

    def covariance(self, h: Tensor) -> Tensor:
        """𝓘, with those of the labels on the diagonal."""
        found = h.new_zeros(*h.shape, h.shape[1], dtype=torch.float64)
        for at, cov in self.blocks(lambda family, h: family.covariance(h), h):
            found[:, at, at] = cov
        return found

    def fourth_moment(self, h: Tensor) -> Tensor:
        """𝓚: the pairings of 𝓘, and the fourth cumulants of each label."""

        def cumulant(family: Family, h: Tensor) -> Tensor:
            return family.fourth_moment(h) - pairings(family.covariance(h))

        fourth = pairings(self.covariance(h))
        for at, own in self.blocks(cumulant, h):
            fourth[:, at, at, at, at] += own
        return fourth

    def link(self, h: Tensor, at: Tensor) -> Tensor:
        """That of every label."""
        return self.rows(lambda family, h, at: family.link(h, at), h, at)

    def information(self, h: Tensor, J: Tensor) -> Tensor:
        """Σ_p I_p."""
        return self.each(lambda family, h, J: family.information(h, J), h, J).sum(1)

    def variance1(self, h: Tensor, J: Tensor) -> Tensor:
        """Σ_p V₁_p + 4 Σ_{p<q} I_p I_q."""
        return self.sum_of_variances(lambda family, h, J: family.variance1(h, J), h, J)

    def variance_signs(self, h: Tensor, J: Tensor) -> Tensor:
        """As V₁, since fourth cumulants of independent labels add."""
        return self.sum_of_variances(lambda family, h, J: family.variance_signs(h, J), h, J)

    def variance_importance(self, h: Tensor, J: Tensor) -> Tensor:
        """As V₁; every label must be a class."""
        return self.sum_of_variances(lambda family, h, J: family.variance_importance(h, J), h, J)

    def variance2_importance(self, h: Tensor, S: Tensor) -> Tensor:
        """Σ_p of the labels' variances, since each has mean 0; every label must be a class."""
        return self.each(lambda family, h, S: family.variance2_importance(h, S), h, S).sum(1)

    def sum_of_variances(self, variance: Function, h: Tensor, J: Tensor) -> Tensor:
        """Σ_p Var_p + 4 Σ_{p<q} I_p I_q."""
        information = self.each(lambda family, h, J: family.information(h, J), h, J)
        return self.each(variance, h, J).sum(1) + 4 * sum_of_pairs(information)

    def covariance12(self, h: Tensor, J: Tensor, S: Tensor) -> Tensor:
        """Σ_p C₁₂_p."""
        return self.each(lambda family, h, J, S: family.covariance12(h, J, S), h, J, S).sum(1)

    def residual_bound(self, h: Tensor) -> Tensor:
        """The sum over the labels."""
        return self.each(lambda family, h: family.residual_bound(h), h).sum(1)

    def draw(self, h: Tensor, num_samples: int, generator: torch.Generator | None) -> Labels:
        """Draw N labels per input: A = N, and the cost grows with N."""
        many = h.repeat_interleave(num_samples, 0)
        drawn = self.rows(lambda family, h: statistics(family.draw(h, 1, generator)), many)
        return self.equally_weighted(h, drawn.unflatten(0, (len(h), num_samples)))

    def draw_signs(self, h: Tensor, generator: torch.Generator | None) -> Tensor:
        """Lξ of every label."""
        return self.rows(lambda family, h: family.draw_signs(h, generator), h)

    def draw_important(self, h: Tensor, generator: torch.Generator | None) -> Tensor:
        """Those of every label, which must be a class."""
        return self.rows(lambda family, h: family.draw_important(h, generator), h)

    def draw_residual(self, h: Tensor, generator: torch.Generator | None) -> Tensor:
        """δ of every label."""
        return self.rows(lambda family, h: family.draw_residual(h, generator), h)


class Positions(Product):
    """One label at each position of a sequence or an image, all of the same family.

    I is that of the whole input, summed over its positions (Proposition 9.6, beyond the paper).

    The outputs are [B, T], position by position: T = L·size. ``accumulate`` and ``estimate`` bring
    outputs [B, L, size], or [B, size, H, W] with ``class_dim=1``, into this form; for
    ``differentiate`` let the network do it.

    Args:
        family: Of the label at one position.
        size: The outputs of one position, as V words or C classes.
        class_dim: Their axis in what the network returns.
        ignore_index: In ``observed``, the label of a position that counts nothing, as −100 in
            torch's losses; None: there is none. The model has a label at such a position all the
            same, so I and the estimators count it unless its outputs are multiplied by 0.

    Raises:
        ValueError: size is no integer, or too small for the family.
        TypeError: it is no family.

    Example: two Gaussian labels with J = 1 have I = 1 + 1 and V₁ = 2 + 2 + 4·1·1.
        >>> from fimlib import Gaussian
        >>> pair, h, J = Positions(Gaussian(), 1), torch.zeros(1, 2), torch.ones(1, 2)
        >>> float(pair.information(h, J)), float(pair.variance1(h, J))
        (2.0, 8.0)
    """

    def __init__(
        self, family: Family, size: int, *, class_dim: int = -1, ignore_index: int | None = None
    ) -> None:
        check_family(family)
        self.family, self.class_dim, self.ignore_index = family, class_dim, ignore_index
        self.size = check_integer(size, "size", family.min_outputs)
        self.min_outputs = self.size

    @property
    def families(self) -> list[Family]:  # noqa: D102
        return [self.family]

    def flatten(self, outputs: Tensor) -> Tensor:
        """From the network's outputs, ``size`` of them along ``class_dim``, to [B, T]."""
        if outputs.ndim < 3:
            return outputs
        axis = self.class_dim % outputs.ndim
        if outputs.shape[axis] != self.size:
            raise ValueError(
                f"Positions: axis {axis} of the outputs {list(outputs.shape)} must hold the "
                f"{self.size} outputs of one position: check size and class_dim."
            )
        return outputs.movedim(axis, -1).flatten(1)

    def natural(self, h: Tensor) -> Tensor:
        """As for every family; and T must be a multiple of ``size``."""
        h = super().natural(h)
        if h.shape[1] % self.size:
            raise ValueError(
                f"Positions: the model has {h.shape[1]} outputs, no multiple of size = {self.size}."
            )
        return self.rows(lambda family, h: family.natural(h), h)

    def each(self, function: Function, h: Tensor, *D: Tensor) -> Tensor:
        """[B, L, ...]."""
        apart = (d.reshape(-1, self.size, *d.shape[2:]) for d in (h, *D))
        return torch.unflatten(function(self.family, *apart), 0, (len(h), -1))

    def blocks(self, function: Function, h: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Position by position."""
        for i, own in enumerate(self.each(function, h).unbind(1)):
            yield slice(i * self.size, (i + 1) * self.size), own

    def rows(self, function: Function, h: Tensor, *D: Tensor) -> Tensor:
        """[B, L·size]."""
        return self.each(function, h, *D).flatten(1)

    def observed(self, h: Tensor, y: Any) -> Labels:
        """Labels that were observed: [B, L] classes, or [B, L, size] for other families.

        The residual is 0 where all of y at a position is ``ignore_index``.

        Raises:
            ValueError: y has other positions, or as the family's.
        """
        h, y = self.natural(h), torch.as_tensor(y)
        length = h.shape[1] // self.size
        if y.shape[:1] != h.shape[:1] or y[0].numel() % length:
            raise ValueError(
                f"Positions: the outputs are those of {length} positions of {len(h)} inputs, and y "
                f"is {list(y.shape)}: give a label for each position."
            )
        y = y.reshape(len(h) * length, -1).to(h.device)
        ignored = (y == self.ignore_index).all(1) if self.ignore_index is not None else None
        if ignored is not None:
            y = y.masked_fill(ignored[:, None], 0)
        try:
            t = self.rows(lambda family, h: statistics(family.observed(h, y)), h)
        except ValueError as error:
            if ignored is None and bool((y == IGNORED).any()):
                hint = (
                    f" If {IGNORED} stands for no label, pass ignore_index={IGNORED} to Positions."
                )
                raise ValueError(f"{error}{hint}") from error
            raise
        if ignored is not None:
            outputs = ignored.view(len(h), length).repeat_interleave(self.size, 1)
            t = torch.where(outputs, self.mean(h), t)
        return self.equally_weighted(h, t[:, None])


class Heads(Product):
    """Labels of several kinds, each with outputs of its own: a class, a box, a count.

    Args:
        heads: Name → the family and its number of outputs, in the order of the outputs.

    Raises:
        ValueError: there are no heads, or a number is too small for its family.
        TypeError: a head is no such pair.

    Example: one of three classes, and a number with J = 2.
        >>> from fimlib import Categorical, Gaussian
        >>> heads = Heads({"class": (Categorical(), 3), "size": (Gaussian(), 1)})
        >>> heads.information(torch.zeros(1, 4), torch.tensor([[0.0, 0.0, 0.0, 2.0]])).item()
        4.0
    """

    def __init__(self, heads: Mapping[str, tuple[Family, int]]) -> None:
        if not isinstance(heads, Mapping) or not heads:
            raise TypeError(
                "heads must be a dict: the name of a head, then its family and its number of "
                "outputs, as Heads({'class': (Categorical(), 10)})."
            )
        for name, (family, size) in heads.items():
            check_family(family)
            check_integer(size, f"the number of outputs of head {name!r}", family.min_outputs)
        self.heads = dict(heads)
        self.min_outputs = sum(size for _, size in self.heads.values())

    def natural(self, h: Tensor) -> Tensor:
        """As for every family, and for every head; T must be the sum of their outputs."""
        h = super().natural(h)
        if h.shape[1] != self.min_outputs:
            raise ValueError(
                f"Heads: the model has {h.shape[1]} outputs, and the heads "
                f"{', '.join(self.heads)} have {self.min_outputs}."
            )
        return self.rows(lambda family, h: family.natural(h), h)

    @property
    def families(self) -> list[Family]:  # noqa: D102
        return [family for family, _ in self.heads.values()]

    def parts(self, function: Function, h: Tensor, *D: Tensor) -> list[Tensor]:
        """The function of every head."""
        sizes = [size for _, size in self.heads.values()]
        columns = zip(*(d.split(sizes, dim=1) for d in (h, *D)), strict=True)
        return [function(f, *own) for f, own in zip(self.families, columns, strict=True)]

    def blocks(self, function: Function, h: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Head by head."""
        start = 0
        for own in self.parts(function, h):
            yield slice(start, start + own.shape[1]), own
            start += own.shape[1]

    def each(self, function: Function, h: Tensor, *D: Tensor) -> Tensor:
        """[B, number of heads, ...]."""
        return torch.stack(self.parts(function, h, *D), dim=1)

    def rows(self, function: Function, h: Tensor, *D: Tensor) -> Tensor:
        """[B, T]."""
        return torch.cat(self.parts(function, h, *D), dim=1)

    def observed(self, h: Tensor, y: Any) -> Labels:
        """Labels that were observed: name of a head → what its family takes.

        Raises:
            ValueError: other heads, or as the families'.
        """
        if not isinstance(y, Mapping) or y.keys() != self.heads.keys():
            raise ValueError(f"Heads: y must be a dict with the heads {', '.join(self.heads)}.")
        h, of = self.natural(h), iter(y[name] for name in self.heads)
        found = self.rows(lambda family, h: statistics(family.observed(h, next(of))), h)
        return self.equally_weighted(h, found[:, None])


def statistics(labels: Labels) -> Tensor:
    """t(y) of one label for every input, or their mean: [B, T]."""
    return labels.weights if labels.values is None else labels.mean(labels.values)
