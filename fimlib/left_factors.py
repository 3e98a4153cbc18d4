r"""Left factors of several quantities for one block, and their averages over the inputs.

An entry of a quantity is ``left · z²`` or ``left · z⁴``, z the right factor of its parameter. One
matmul for each layer averages all of them, and nothing of size inputs × parameters is built.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from fimlib.derivatives import Derivatives, Sweep
from fimlib.spectra.extreme import Spectrum

DEGREE_2 = ("I", "I_lower")  # in J, where S counts twice; all others are of degree 4
ROWS = 256  # inputs in a product, so that their powers stay in the processor's cache
SMALLEST = 1e-30  # of float32 forms, whose terms may be as small as 1e-38
LOST = 1e-24  # of the largest left factor: below, sums of products may lack other products
FURTHEST = 1e4  # z for which no more than 1e-30 of I is lost with left factors below 1e-38
NOTHING = 1e-20  # V₂ in units of I², below which it is rounding where S is a difference


@dataclass(frozen=True)
class LeftFactors:
    """Left factors of several quantities for one block.

    Attributes:
        keys: The quantities, those of degree 2 first; what stands for "I²" is I itself.
        low: How many are of degree 2.
        values: [B, Q, *K].
    """

    keys: tuple[str, ...]
    low: int
    values: Tensor

    @classmethod
    def of(cls, lefts: Mapping[str, Tensor]) -> LeftFactors:
        """From [B, *K] for every quantity."""
        low = [key for key in lefts if key in DEGREE_2]
        keys = (*low, *(key for key in lefts if key not in DEGREE_2))
        return cls(keys, len(low), torch.stack([lefts[key] for key in keys], dim=1))

    @classmethod
    def joined(cls, parts: list[LeftFactors]) -> LeftFactors:
        """Those at some inputs, and at more inputs, in one."""
        first = parts[0]
        if len(parts) == 1:
            return first
        return cls(first.keys, first.low, torch.cat([part.values for part in parts]))

    def largest(self) -> Tensor:
        """The largest absolute value of each quantity, [Q]."""
        parts = zip(self.keys, self.values.unbind(1), strict=True)
        return torch.stack([largest_of(v, signed=k == "C12") for k, v in parts])

    def means(
        self, z: Tensor | None, dtype: torch.dtype, largest: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Averages over the inputs of ``left · z²`` or, of degree 4, ``left · z⁴``.

        Args:
            z: [B, n], or None for 1.
            dtype: Of the matmuls.
            largest: As ``largest`` says, where dtype is narrow. Left factors that are squared once
                more and the columns of z are brought to about 1 before.

        Returns:
            Quantity → its averages, [*K, n] or [*K], float64, each a tensor of its own; and whether
            dtype is too narrow for them.
        """
        if z is None:
            return Totals.of(dict(zip(self.keys, self.values.unbind(1), strict=True))).means()
        size, _, *rest = self.values.shape
        low, high = self.values.to(dtype).tensor_split([self.low], dim=1)
        sizes, furthest = high.new_ones(high.shape[1]).double(), z.new_ones(z.shape[1]).double()
        if largest is not None and z.numel():
            sizes = magnitudes(largest[self.low :])
            furthest = torch.maximum(z.amax(0), -z.amin(0)).double()  # aminmax(dim=0) is slow
        shrink, scale = 1 / magnitudes(furthest), sizes.clone()
        high = high * (1 / sizes).to(dtype).reshape(-1, *[1] * len(rest))
        if "I²" in self.keys:
            at = self.keys.index("I²") - self.low
            high[:, at].square_()
            scale[at] *= sizes[at]
        totals = sums_of_products(low.flatten(1), high.flatten(1), z, shrink)
        parts = list(chain.from_iterable(t.unflatten(0, (-1, *rest)) for t in totals if len(t)))
        lost = None
        if largest is not None:
            lefts = torch.cat([largest[: self.low], largest[self.low :] / sizes])
            lost = self._lost(parts, lefts, furthest)
        factors = [*[1 / shrink.square()] * self.low, *(scale[:, None] / shrink.pow(4))]
        pairs = zip(self.keys, parts, factors, strict=True)
        return {key: part.double().mul_(factor / size) for key, part, factor in pairs}, lost

    def _lost(self, totals: list[Tensor], lefts: Tensor, furthest: Tensor) -> Tensor:
        """Whether sums of products may lack terms that their dtype cannot hold.

        It may be so in a column of z whose sums are all tiny beside the largest left factor, since
        the inputs with the largest z then add nothing to them; and where z is large and the left
        factors of degree 2 of some unit are close to the smallest number.
        """
        units = self.values[:, : self.low].amax(0)
        narrow = [(furthest.amax() > FURTHEST) & (units < SMALLEST).any()]
        for key, total, left in zip(self.keys, totals, lefts, strict=True):
            least = LOST * left * (left if key == "I²" else 1)
            most = total.flatten(0, -2).abs().amax(0).double()
            narrow.append(((most < least) & (furthest > 0)).any())
        return torch.stack(narrow).any()


@dataclass(frozen=True)
class Totals:
    """Sums over inputs of several quantities, for a block without right factors.

    Attributes:
        sums: Quantity → [*K], float64.
        most: Their largest absolute values, [Q].
        size: How many inputs there are.
    """

    sums: dict[str, Tensor]
    most: Tensor
    size: int

    @classmethod
    def of(cls, lefts: Mapping[str, Tensor], before: Totals | None = None) -> Totals:
        """From [B, *K] for every quantity, and the sums over other inputs."""
        squared = {k: v.double().square() if k == "I²" else v for k, v in lefts.items()}
        sums = {k: v.sum(0, dtype=torch.float64) for k, v in squared.items()}
        most = torch.stack([largest_of(v, signed=k == "C12") for k, v in lefts.items()])
        size = len(next(iter(lefts.values())))
        if before is None:
            return cls(sums, most, size)
        added = {k: t.add_(before.sums[k]) for k, t in sums.items()}
        return cls(added, torch.maximum(most, before.most), size + before.size)

    @classmethod
    def joined(cls, parts: list[Totals]) -> Totals:
        """Of a block, its parts along the first axis in order."""
        first = parts[0]
        if len(parts) == 1:
            return first
        sums = {k: torch.cat([part.sums[k] for part in parts]) for k in first.sums}
        return cls(sums, torch.stack([part.most for part in parts]).amax(0), first.size)

    @property
    def keys(self) -> tuple[str, ...]:
        """The quantities."""
        return tuple(self.sums)

    def largest(self) -> Tensor:
        """As of ``LeftFactors``."""
        return self.most

    def means(self, *_: object) -> tuple[dict[str, Tensor], None]:
        """As of ``LeftFactors``; every parameter has a tensor of its own."""
        return {key: total / self.size for key, total in self.sums.items()}, None


def left_factors(
    sweep: Sweep, of_piece: Callable[[Derivatives, slice], dict[str, Tensor]]
) -> Iterator[tuple[int, LeftFactors | Totals]]:
    """Left factors of several quantities for each block of a batch, in any order.

    ``of_piece`` maps the derivatives of one block at some inputs, and these, to [b, *K] for every
    quantity.
    """
    found: dict[int, list[LeftFactors]] = defaultdict(list)
    totals: dict[int, dict[int | None, Totals]] = defaultdict(dict)
    for i, at, rows, derivs, is_last in sweep.pieces():
        lefts = of_piece(derivs, at)
        if all(z is None for z in derivs.blocks[0].inputs.values()):
            totals[i][rows.start] = Totals.of(lefts, totals[i].get(rows.start))
            if is_last:
                yield i, Totals.joined(list(totals.pop(i).values()))
            continue
        found[i].append(LeftFactors.of(lefts))
        if is_last:
            yield i, LeftFactors.joined(found.pop(i))


def largest_of(t: Tensor, *, signed: bool) -> Tensor:
    """The largest absolute value; 0 of nothing."""
    if not t.numel():
        return t.new_zeros(())
    return t.abs().amax() if signed else t.amax()


def sums_of_products(low: Tensor, high: Tensor, z: Tensor, shrink: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the inputs of ``low · (z·shrink)²`` and of ``high · (z·shrink)⁴``.

    [B, k], [B, m], where m may be 0, [B, n] and [n] → [k, n] and [m, n], of the dtype of ``low``.
    """
    lows, highs = (left.new_zeros(left.shape[1], z.shape[1]) for left in (low, high))
    rows = ROWS if z.device.type == "cpu" else max(1, len(z))
    for start in range(0, len(z), rows):
        at = slice(start, start + rows)
        right = (z[at].to(low.dtype) * shrink.to(low.dtype)).square_()
        lows.addmm_(low[at].T, right)
        if high.shape[1]:
            highs.addmm_(high[at].T, right.square_())
    return lows, highs


def magnitudes(largest: Tensor) -> Tensor:
    """A power of two near each number, whose inverse float32 holds; float64."""
    return torch.frexp(largest).exponent.clamp_min(-120).double().exp2()


def bound_factors(
    J: Tensor, S: Tensor | None, lam: Spectrum, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Left factors [B, *K] of the bounds of Theorem 4.1 and Lemma 4.8, for one label."""

    def scaled(eigenvalue: Tensor, form: Tensor) -> Tensor:
        return eigenvalue.to(dtype).reshape(-1, *[1] * (form.ndim - 1)) * form

    norm = J.to(dtype).square().sum(1)
    fourth = norm.square()
    found = {
        "I_lower": scaled(lam.min_cov, norm),
        "I_upper²": scaled(lam.max_cov, norm).square(),
        "V1_lower": scaled(lam.min_outer, fourth),
        "V1_upper": scaled(lam.max_outer, fourth),
    }
    if S is not None:
        norm = S.to(dtype).square().sum(1)
        found["V2_lower"] = scaled(lam.min_cov, norm)
        found["V2_upper"] = scaled(lam.max_cov, norm)
    return found


class Float32Check(NamedTuple):
    """Whether float32 may be too narrow for a form of J or of S in a block."""

    block: int
    layer: str
    is_low: Tensor
    which: str


def float32_checks(block: int, layer: str, largest: Mapping[str, Tensor]) -> list[Float32Check]:
    """Whether float32 may be too narrow for a block, by its largest forms."""
    nothing = largest["I"].double().square() * NOTHING
    found = [Float32Check(block, layer, largest.get("V1", largest["I"]) < SMALLEST, "J")]
    if "V2" in largest:
        is_low = (largest["V2"] < SMALLEST) & (largest["V2"] >= nothing)
        found.append(Float32Check(block, layer, is_low, "S"))
    return found
