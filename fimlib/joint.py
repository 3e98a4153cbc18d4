r"""Estimators over random inputs *and* labels: their exact variances and bounds (Section 4.1).

A joint estimator draws n_x inputs from a data set and n_y labels for each. By the law of total
variance (Theorem 4.7) its variance is a sum of two averages over the inputs, so one pass over the
data, in batches of any size, tells it for every n_x and n_y.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from fimlib._checks import check_dtype, check_estimator, check_integer
from fimlib.derivatives import Batch, Derivatives
from fimlib.families.base import (
    QUANTITIES,
    Family,
    Labels,
    Moments,
    check_family,
    weighted_variance,
)
from fimlib.fisher import check_labels, family_of
from fimlib.intervals import Interval
from fimlib.precision import chebyshev
from fimlib.spectra.extreme import Spectrum, spectrum

PerParameter = dict[str, Tensor]
# Of degree 2 in J, where S counts twice; all others are of degree 4.
DEGREE_2 = ("I", "I_lower")


class Joint:
    r"""Averages over the inputs that have been seen, for the joint estimators (Theorem 4.7).

    Feed it the derivatives batch by batch. Accumulators of different batches merge exactly, in any
    order, so a data set may be split over processes or devices. Each quantity of a batch is
    averaged in its factors, by one matmul per layer: nothing of size inputs × parameters is built.

    Args:
        family: The output family.
        method: How λ_max(M) is found for the bounds, see ``spectrum``. "certified" is a true upper
            bound, and cheap for a classifier; for Gaussian outputs "multistart" is exact, and the
            cheaper one from about ten outputs on. None accumulates no bounds.
        quantities: Which of "I" (always there), "Var_x I", "V1", "V2", "C12" and "bounds" to
            accumulate; None: all that the derivatives, labels and ``method`` allow.
            ``variance_i1`` needs "Var_x I" and "V1", ``variance_i2`` "Var_x I" and "V2".
        dtype: Of the contractions of a classifier. float32 halves memory and time; all averages
            over inputs are kept in float64 all the same. A batch's sums are then off by about
            1e-6 of themselves, and its Var_x I by about 1e-7 E_x I². Where float32 is too narrow,
            which takes V₁ or V₂ below 1e-30, an error says so, unless V₂ is below 1e-20 I².

    Attributes:
        count: m, the inputs seen.

    Memory: 88 bytes per parameter; 56 with order=1; 40 with method=None, 24 with data labels or
    order=1 and method=None; 8 for I alone.

    Example: h = w·x with a Gaussian label: I(w|x) = x², which is 1 and 9 here.
        >>> from fimlib import Gaussian, differentiate
        >>> net = torch.nn.Linear(1, 1, bias=False).double()
        >>> joint = Joint(Gaussian())
        >>> joint.update(differentiate(net, torch.tensor([[1.0], [3.0]]).double()))
        >>> float(joint.fisher_information()["weight"]), float(joint.input_variance()["weight"])
        (5.0, 16.0)
        >>> float(joint.variance_i1(num_inputs=1)["weight"])  # 16 + E 2x⁴ = 16 + 82
        98.0
    """

    def __init__(
        self,
        family: Family,
        *,
        method: str | None = "certified",
        quantities: Collection[str] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        check_family(family)
        self.family = family
        self.quantities = check_quantities(quantities)
        self.method = method if "bounds" in self.quantities else None
        self.dtype = check_dtype(dtype)
        self.count = 0
        self._layers: dict[str, list[str]] = {}
        self._means: dict[str, PerParameter] = {}  # quantity → its average over the inputs
        self._scatter: PerParameter = {}  # Σ_x (I(θᵢ|x) − E_x I)²

    def update(self, derivs: Derivatives, labels: Labels | None = None) -> None:
        r"""Take in a batch of inputs.

        Args:
            derivs: J, S and the outputs at B inputs.
            labels: q(y|x) at these inputs, ``family.expected(...)`` or ``family.observed(...)``.
                Then Ĩ of Eq. 21 and the variance of one label drawn from q (Corollary F.1) take the
                places of I and V₁⁽¹⁾, and ``variance_i1`` is Corollary F.2 (Eq. 32); Î₂ and the
                bounds have no counterpart.

        Raises:
            ValueError: the outputs do not fit the family; NaN or infinite derivatives; other
                parameters than before; batches with and without data labels; labels for other
                outputs or of another family; float32 is too narrow. The accumulator is then left
                as it was.
        """
        self.update_batch(Batch.of(derivs), labels)

    def update_batch(self, batch: Batch, labels: Labels | None = None) -> None:
        """Take in a batch of inputs whose derivatives come piece by piece; see ``update``."""
        if batch.projected and (labels is not None or self.method is not None):
            raise ValueError(
                "these derivatives are projected on the model's labels: they serve no bounds and "
                "no data labels. Use differentiate()."
            )
        means, narrow = self._batch_means(batch, labels)
        _check(means, narrow, self.family, batch)
        fresh = self._empty()
        fresh.count = len(batch.outputs)
        mean_square = means.pop("I²", {})
        fresh._means = means
        fresh._scatter = {
            name: square.sub_(means["I"][name].square()).clamp_min_(0).mul_(fresh.count)
            for name, square in mean_square.items()
        }
        layers: dict[str, list[str]] = defaultdict(list)
        for layer, inputs in batch.inputs:
            layers[layer].extend(inputs)
        fresh._layers = dict(layers)
        self.merge(fresh)

    def _empty(self) -> Joint:
        return Joint(self.family, method=self.method, quantities=self.quantities, dtype=self.dtype)

    def _batch_means(
        self, batch: Batch, labels: Labels | None
    ) -> tuple[dict[str, PerParameter], list[Narrow]]:
        """Every quantity averaged over the inputs of a batch; "I²" among them for Var_x I."""
        if labels is not None:
            _check_same_family(self.family, family_of(labels))
            check_labels(batch.outputs, labels)
        means: dict[str, PerParameter] = defaultdict(dict)
        narrow: list[Narrow] = []
        for index, form in self._forms(batch, labels):
            layer, inputs = batch.inputs[index]
            largest = form.largest() if self.dtype == torch.float32 else None
            if largest is not None:
                narrow += narrowest(index, layer, dict(zip(form.keys, largest, strict=True)))
            for name, z in inputs.items():
                for key, mean in form.means(z, self.dtype, largest):
                    means[key][name] = mean
        names = [name for _, inputs in batch.inputs for name in inputs]
        return {key: {n: of[n] for n in names} for key, of in means.items()}, narrow

    def _forms(self, batch: Batch, labels: Labels | None) -> Iterator[tuple[int, Forms | Totals]]:
        """Left factors of every quantity, for each block of the batch, in whatever order."""
        h = unchecked_natural(self.family, batch.outputs)
        eigenvalues = None
        if self.method is not None and labels is None:
            eigenvalues = spectrum(self.family, batch.outputs, method=self.method)
        found: dict[int, list[Forms]] = defaultdict(list)
        totals: dict[int, dict[int | None, Totals]] = defaultdict(dict)
        for i, at, rows, derivs, is_last in batch.pieces():
            contract = self._contraction(h[at], labels, batch.projected)
            (block,) = self.family.natural_derivatives(derivs).blocks
            lefts = contract(block.J, block.S)
            if "Var_x I" in self.quantities:
                lefts["I²"] = lefts["I"]
            if eigenvalues is not None:
                lam = Spectrum(*(values[at] for values in eigenvalues))
                lefts.update(_bounds(block.J, block.S, lam, self.dtype))
            if all(z is None for z in block.inputs.values()):
                totals[i][rows.start] = Totals.of(lefts, totals[i].get(rows.start))
                if is_last:
                    yield i, Totals.joined(list(totals.pop(i).values()))
                continue
            found[i].append(Forms.of(lefts))
            if is_last:
                yield i, Forms.joined(found.pop(i))

    def _contraction(self, h: Tensor, labels: Labels | None, projected: bool) -> Moments:
        """From J and S of a block, left factors [B, *K] of I and of what is wanted besides."""
        if labels is None:
            return self.family.moments(
                h, quantities=self.quantities, dtype=self.dtype, projected=projected
            )

        def contract(J: Tensor, _: Tensor | None) -> dict[str, Tensor]:
            squares = labels.project(J).square()
            found = {"I": labels.mean(squares)}
            if "V1" in self.quantities:
                found["V1"] = weighted_variance(labels.weights, squares)
            return found

        return contract

    def merge(self, other: Joint) -> None:
        r"""Take in the inputs that another accumulator has seen, by Chan's formula; exact.

        ``Σ(I − E I)²`` of the union is the sum of both plus ``(n m / (n + m)) (E_n I − E_m I)²``.
        State on another device is moved to this accumulator's.

        Raises:
            ValueError: another family, other parameters, or other quantities (data labels or
                bounds in one of them only).
        """
        _check_same_family(self.family, other.family)
        settings = [(j.method, sorted(j.quantities), j.dtype) for j in (self, other)]
        if settings[0] != settings[1]:
            raise ValueError(
                f"the accumulators were made with different settings: {settings[0]} and "
                f"{settings[1]}, (method, quantities, dtype). Make all of them alike."
            )
        if other.count == 0:
            return
        if self.count == 0:
            self.count, self._layers = other.count, other._layers
            self._means = {
                key: {n: alone(t) for n, t in means.items()} for key, means in other._means.items()
            }
            self._scatter = {n: alone(t) for n, t in other._scatter.items()}
            return
        self._check_same_content(other)
        count = self.count + other.count
        share = other.count / count
        scatter = {}
        for name, mine in self._scatter.items():
            gap = other._means["I"][name].to(mine.device) - self._means["I"][name]
            added = other._scatter[name].to(mine.device) + self.count * share * gap.square()
            scatter[name] = mine + added
        self._means = {
            key: {n: t + share * (other._means[key][n].to(t.device) - t) for n, t in means.items()}
            for key, means in self._means.items()
        }
        self.count, self._scatter = count, scatter

    def fisher_information(self) -> PerParameter:
        """I(θᵢ) = E_x I(θᵢ|x) (Eq. 2), or E_x Ĩ(θᵢ|x) with data labels; in nat/θ²."""
        return self._mean("I")

    def input_variance(self) -> PerParameter:
        """Var_x I(θᵢ|x), over the inputs seen as the whole population (divisor m); nat²/θ⁴.

        A spread within one batch is told from rounding down to about 1e-15 E_x I².
        """
        if self._mean("I").keys() != self._scatter.keys():
            raise ValueError(
                '"Var_x I" is not among the quantities of this Joint, and all variances need it: '
                "add it to them."
            )
        return {name: scatter / self.count for name, scatter in self._scatter.items()}

    def label_variance(self, estimator: int) -> PerParameter:
        """E_x V_j⁽¹⁾(θᵢ|x), the average variance of Î_j on one label; j = 1 or 2."""
        return self._mean(f"V{check_estimator(estimator)}")

    def label_covariance(self) -> PerParameter:
        """E_x C₁₂⁽¹⁾(θᵢ|x), the average covariance of Î₁ and Î₂ on one and the same label."""
        return self._mean("C12")

    def variance_i1(
        self, num_inputs: int, num_labels: int = 1, *, replacement: bool = True
    ) -> PerParameter:
        r"""Variance of the joint Î₁ (Theorem 4.7, Eq. 20; Eq. 32 with data labels).

        ``Var Î_j = (1/n_x) [Var_x I(θᵢ|x) + (1/n_y) E_x V_j⁽¹⁾(θᵢ|x)]``, x uniform over the inputs
        seen. More labels per input do not touch the first term.

        Args:
            num_inputs: n_x ≥ 1, inputs that are drawn.
            num_labels: n_y ≥ 1, labels for each of them. N pairs (x, y) are n_x = N, n_y = 1.
            replacement: False draws different inputs, and (m − n_x)/(m − 1) multiplies the first
                term: a full pass, n_x = m, has only the second.

        Returns:
            Parameter name → its shape, in nat²/θ⁴.

        Raises:
            ValueError: nothing accumulated; n_x or n_y < 1; n_x > m without replacement.
        """
        return self._total(self._mean("V1"), num_inputs, num_labels, replacement)

    def variance_i2(
        self, num_inputs: int, num_labels: int = 1, *, replacement: bool = True
    ) -> PerParameter:
        """Variance of the joint Î₂ (Theorem 4.7, Eq. 20); see ``variance_i1``."""
        return self._total(self._mean("V2"), num_inputs, num_labels, replacement)

    def covariance_i1_i2(
        self, num_inputs: int, num_labels: int = 1, *, replacement: bool = True
    ) -> PerParameter:
        """Covariance of the joint Î₁ and Î₂ on the same inputs and labels; see ``variance_i1``.

        Eq. 20 with C₁₂ for V: both share the first term, so no mixture of the two is free of it.
        """
        return self._total(self._mean("C12"), num_inputs, num_labels, replacement)

    def lemma_4_8(self, *, tight: bool = False) -> Interval[PerParameter]:
        r"""Bounds of Var_x I(θᵢ|x) (Lemma 4.8).

        ``0 ≤ Var_x I(θᵢ|x) ≤ E_x[λ_max(𝓘)² ‖J‖⁴]``. The product stays inside the expectation:
        ``E_x[λ_max(𝓘)²] E_x[‖J‖⁴]`` is no upper bound.

        Args:
            tight: Subtract ``(E_x[λ_min(𝓘) ‖J‖²])²`` from the upper bound (not in the paper). For
                a classifier this is 0.

        Raises:
            ValueError: nothing accumulated; data labels; or method=None.
        """
        lower, upper = self._mean("I_lower"), self._mean("I_upper²")
        if tight:
            upper = {name: upper[name] - lower[name].square() for name in upper}
        return Interval({name: torch.zeros_like(t) for name, t in upper.items()}, upper)

    def variance_bounds(
        self, num_inputs: int, num_labels: int = 1, estimator: int = 1
    ) -> Interval[PerParameter]:
        r"""Bounds of Eq. 20 by Lemma 4.8 and Theorem 4.1, inputs drawn with replacement.

        For the Gaussian of Section 5.1 and N pairs the upper bounds are ``(3/N) E‖J‖⁴`` and
        ``(1/N) (E‖J‖⁴ + E‖S‖²)``.

        Args, Raises: as ``variance_i1`` and ``lemma_4_8``, and
            estimator: j = 1 or 2.
        """
        quantity, inputs = f"V{check_estimator(estimator)}", self.lemma_4_8()

        def bound(side: str) -> PerParameter:
            labels = self._mean(f"{quantity}_{side}")
            return self._total(labels, num_inputs, num_labels, True, getattr(inputs, side))

        return Interval(bound("lower"), bound("upper"))

    def num_inputs_needed(
        self, relative_error: float, confidence: float, num_labels: int = 1, estimator: int = 1
    ) -> dict[str, float]:
        r"""Inputs that bring a layer's estimate within a relative error, by Chebyshev.

        The smallest n_x for which Eq. 20 and Markov's inequality on the squared norm give
        ``P(‖Î_j − I‖ ≥ ε‖I‖) ≤ 1 − confidence``, norms over a layer's parameters, inputs drawn
        with replacement. Conservative, like all of its kind: fewer inputs will mostly do.

        Args:
            relative_error: ε > 0.
            confidence: Between 0 and 1, both excluded.
            num_labels: n_y ≥ 1, labels for each input.
            estimator: j = 1 or 2.

        Returns:
            Layer name → n_x ≥ 1, a whole number; inf where I is 0 and its estimate is not.

        Raises:
            ValueError: an argument out of its range, or nothing accumulated.
        """
        label_variance = self.label_variance(estimator)
        variance = self._total(label_variance, 1, num_labels, True)
        fisher = self._mean("I")

        def needed(names: list[str]) -> float:
            total = torch.stack([variance[name].sum() for name in names]).sum()
            squared_norm = torch.stack([fisher[name].square().sum() for name in names]).sum()
            return float(chebyshev(total, squared_norm, relative_error, confidence))

        return {layer: needed(names) for layer, names in self._layers.items()}

    def _total(
        self,
        label_term: PerParameter,
        num_inputs: int,
        num_labels: int,
        replacement: bool,
        input_term: PerParameter | None = None,
    ) -> PerParameter:
        """Eq. 20."""
        n_x = check_integer(num_inputs, "num_inputs (n_x)")
        n_y = check_integer(num_labels, "num_labels (n_y)")
        first = self.input_variance() if input_term is None else input_term
        factor = 1.0 if replacement else self._finite_population(n_x)
        return {name: (factor * first[name] + label_term[name] / n_y) / n_x for name in first}

    def _finite_population(self, num_inputs: int) -> float:
        if num_inputs > self.count:
            raise ValueError(
                f"num_inputs (n_x) is {num_inputs}, but only {self.count} inputs were seen: draw "
                "at most that many without replacement, or set replacement=True."
            )
        return (self.count - num_inputs) / max(self.count - 1, 1)

    def _mean(self, quantity: str) -> PerParameter:
        if self.count == 0:
            raise ValueError("no inputs seen yet: call update(derivs) first.")
        if quantity not in self._means:
            raise ValueError(
                "this was not accumulated: with data labels there is Î₁ only and no bounds, with "
                "method=None there are no bounds, with order=1 there is no V₂, and quantities= "
                "leaves out what it does not name. Use a Joint without them."
            )
        return {name: mean.clone() for name, mean in self._means[quantity].items()}

    def _check_same_content(self, other: Joint) -> None:
        mine, theirs = (
            {name: tuple(mean.shape) for name, mean in joint._means["I"].items()}
            for joint in (self, other)
        )
        if mine != theirs:
            raise ValueError(f"other parameters than before: {theirs} instead of {mine}.")
        if (
            self._means.keys() != other._means.keys()
            or self._scatter.keys() != other._scatter.keys()
        ):
            raise ValueError(
                "data labels, bounds, second derivatives or other quantities on one side only: "
                "keep one Joint for batches with data labels and another for those without, all "
                "of them with the same method, order and quantities."
            )


def joint_covariance(
    derivs: Derivatives,
    family: Family,
    *,
    parameters: Sequence[str],
    num_inputs: int,
    num_labels: int = 1,
) -> tuple[Tensor, Tensor]:
    r"""Covariances between diagonal entries of the joint Î₁, and of Î₂ (Theorem 4.7, extended).

    The law of total covariance, with x uniform over the B inputs and drawn with replacement:
    ``Cov(Î_j(θ_i), Î_j(θ_k)) = (1/n_x) [Cov_x(I_i, I_k) + (1/n_y) E_x C_j]`` where C_j, the
    covariance over one label, is ``M[J_i, J_i, J_k, J_k]`` for Î₁ and ``𝓘[S_i, S_k]`` for Î₂.

    Args:
        derivs: J, S and the outputs at B inputs.
        family: The output family.
        parameters: Names; flattened and joined in this order.
        num_inputs: n_x ≥ 1.
        num_labels: n_y ≥ 1, labels for each input.

    Returns:
        [P, P] for Î₁ and [P, P] for Î₂, float64, in nat²/θ⁴; their diagonals are Eq. 20.

    Raises:
        ValueError: n_x or n_y < 1, no or repeated names, or the outputs do not fit the family.
        KeyError: an unknown name.

    Memory: dense, B × (T⁴ + T² P): for chosen parameters and small T.
    """
    n_x = check_integer(num_inputs, "num_inputs (n_x)")
    n_y = check_integer(num_labels, "num_labels (n_y)")
    if isinstance(parameters, str) or not parameters or len(set(parameters)) != len(parameters):
        raise ValueError(f"parameters must be a list of different names, got {parameters!r}.")
    h = family.natural(derivs.outputs)
    derivs = family.natural_derivatives(derivs)
    J = torch.cat([derivs.jacobian(name).double().flatten(2) for name in parameters], dim=2)
    S = torch.cat([derivs.second(name).double().flatten(2) for name in parameters], dim=2)
    I = family.information(h, J)
    centred = I - I.mean(0)
    input_term = centred.T @ centred / len(h)
    JJ = torch.einsum("bip,bjp->bijp", J, J).flatten(1, 2)
    M = family.outer_covariance(h).flatten(3, 4).flatten(1, 2)
    label_terms = (JJ.mT @ M @ JJ).mean(0), (S.mT @ family.covariance(h) @ S).mean(0)
    covariance_1, covariance_2 = ((input_term + term / n_y) / n_x for term in label_terms)
    return covariance_1, covariance_2


def check_quantities(quantities: Collection[str] | None) -> frozenset[str]:
    """The names of quantities to accumulate, "I" among them; None: all."""
    known = (*QUANTITIES, "Var_x I", "bounds")
    if quantities is None:
        return frozenset(known)
    if isinstance(quantities, str) or not set(quantities) <= set(known):
        raise ValueError(f"quantities must be a list of some of {known}, got {quantities!r}.")
    return frozenset(("I", *quantities))


def unchecked_natural(family: Family, outputs: Tensor) -> Tensor:
    """``family.natural``, with the look at NaN left for later where nothing else is looked at.

    What comes of the outputs is looked at anyway, and every look waits for the device.
    """
    is_common = type(family).natural is Family.natural
    if is_common and outputs.ndim == 2 and outputs.shape[1] >= family.min_outputs:
        return outputs.detach().double()
    return family.natural(outputs)


def alone(t: Tensor) -> Tensor:
    """A tensor that keeps no larger one, of which it would be a part."""
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone()


ROWS = 256  # inputs in a product, so that their powers stay in the processor's cache


@dataclass(frozen=True)
class Forms:
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
    def of(cls, lefts: Mapping[str, Tensor]) -> Forms:
        """From [B, *K] for every quantity."""
        low = [key for key in lefts if key in DEGREE_2]
        keys = (*low, *(key for key in lefts if key not in DEGREE_2))
        return cls(keys, len(low), torch.stack([lefts[key] for key in keys], dim=1))

    @classmethod
    def joined(cls, parts: list[Forms]) -> Forms:
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
    ) -> Iterator[tuple[str, Tensor]]:
        """Averages over the inputs of ``left · z²`` or, of degree 4, ``left · z⁴``.

        Args:
            z: [B, n], or None for 1.
            dtype: Of the matmuls.
            largest: As ``largest`` says, where dtype may be too narrow for what is squared once
                more: that is brought to about 1 before.

        Yields:
            Quantity and its averages, [*K, n] or [*K], float64, each a tensor of its own.
        """
        size, _, *rest = self.values.shape
        if z is None:
            yield from Totals.of(dict(zip(self.keys, self.values.unbind(1), strict=True))).means()
            return
        low, high = self.values.to(dtype).tensor_split([self.low], dim=1)
        sizes, shrink = z.new_ones(high.shape[1], dtype=torch.float64), None
        if largest is not None and high.numel() and z.numel():
            sizes = magnitudes(largest[self.low :])
            furthest = torch.stack(z.aminmax()).abs().amax()
            shrink = 1 / magnitudes(furthest.double().square())
        high = high * (1 / sizes).to(dtype).reshape(-1, *[1] * len(rest))
        scale = sizes if shrink is None else sizes / shrink.square()
        if "I²" in self.keys:
            at = self.keys.index("I²") - self.low
            high[:, at].square_()
            scale = scale.clone()
            scale[at] *= sizes[at]
        totals = sums_of_products(low.flatten(1), high.flatten(1), z, shrink)
        parts = [t.unflatten(0, (-1, *rest)) for t in totals if len(t)]
        factors = torch.cat([scale.new_ones(self.low), scale]) / size
        for key, part, factor in zip(self.keys, chain.from_iterable(parts), factors, strict=True):
            yield key, part.double().mul_(factor)


@dataclass(frozen=True)
class Totals:
    """Sums over inputs of several quantities, for a block without right factors.

    Attributes:
        sums: Quantity → [*K], float64.
        most: Their largest absolute values, [Q].
        size: How many inputs there are.
    """

    sums: PerParameter
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
        """As of ``Forms``."""
        return self.most

    def means(self, *_: object) -> Iterator[tuple[str, Tensor]]:
        """As of ``Forms``; every parameter has a tensor of its own."""
        for key, total in self.sums.items():
            yield key, total / self.size


def largest_of(t: Tensor, *, signed: bool) -> Tensor:
    """The largest absolute value; 0 of nothing."""
    if not t.numel():
        return t.new_zeros(())
    return t.abs().amax() if signed else t.amax()


def sums_of_products(
    low: Tensor, high: Tensor, z: Tensor, shrink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sums over the inputs of ``low · z²`` and of ``high · (z²·shrink)²``.

    Args:
        low: [B, k].
        high: [B, m]; m may be 0.
        z: [B, n].
        shrink: One number; None for 1.

    Returns:
        [k, n] and [m, n], of the dtype of ``low``.
    """
    lows, highs = (left.new_zeros(left.shape[1], z.shape[1]) for left in (low, high))
    rows = ROWS if z.device.type == "cpu" else max(1, len(z))
    for start in range(0, len(z), rows):
        at = slice(start, start + rows)
        right = z[at].to(low.dtype).square()
        lows.addmm_(low[at].T, right)
        if high.shape[1]:
            right = right if shrink is None else right.mul_(shrink)
            highs.addmm_(high[at].T, right.square_())
    return lows, highs


def magnitudes(largest: Tensor) -> Tensor:
    """A power of two near each number, whose inverse float32 holds; float64."""
    return torch.frexp(largest).exponent.clamp_min(-120).double().exp2()


def _bounds(J: Tensor, S: Tensor | None, lam: Spectrum, dtype: torch.dtype) -> dict[str, Tensor]:
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


class Narrow(NamedTuple):
    """Whether float32 may be too narrow for a form of J or of S in a block."""

    block: int
    layer: str
    is_low: Tensor
    which: str


SMALLEST = 1e-30  # of float32 forms, whose terms may be as small as 1e-38
NOTHING = 1e-20  # V₂ in units of I², below which it is rounding where S is a difference


def narrowest(block: int, layer: str, largest: Mapping[str, Tensor]) -> list[Narrow]:
    """What shows whether float32 is too narrow for a block, by its largest forms."""
    nothing = largest["I"].double().square() * NOTHING
    found = [Narrow(block, layer, largest.get("V1", largest["I"]) < SMALLEST, "J")]
    if "V2" in largest:
        is_low = (largest["V2"] < SMALLEST) & (largest["V2"] >= nothing)
        found.append(Narrow(block, layer, is_low, "S"))
    return found


def _check(
    means: dict[str, PerParameter], narrow: list[Narrow], family: Family, batch: Batch
) -> None:
    """A ValueError if anything is NaN, infinite or lost; one look at the device if nothing is."""
    sums = [t.sum() for mean in means.values() for t in mean.values()]  # infinite if one of them is
    is_fine = torch.isfinite(torch.stack(sums)).all()
    if narrow:
        is_fine = is_fine & ~torch.stack([n.is_low for n in narrow]).any()
    if is_fine:
        return
    family.natural(batch.outputs)  # its message comes first
    for mean in means.values():
        for name, tensor in mean.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"the derivatives of parameter {name!r} are NaN, infinite or too large to be "
                    "raised to the fourth power: check the weights and the inputs."
                )
    for index, layer, is_low, which in narrow:
        pieces = (p.derivs.blocks[0] for p in batch.pieces() if p.block == index)
        if is_low and any(getattr(block, which).any() for block in pieces):
            raise ValueError(
                f"layer {layer!r}: float32 is too narrow for its derivatives, or for probabilities "
                "this close to 0: take dtype=torch.float64."
            )


def _check_same_family(mine: Family, theirs: Family) -> None:
    same = type(mine) is type(theirs) and vars(mine).keys() == vars(theirs).keys()
    if not (same and all(_equal(value, vars(theirs)[key]) for key, value in vars(mine).items())):
        raise ValueError(
            f"this accumulator is for {type(mine).__name__} outputs, the other side for "
            f"{type(theirs).__name__} outputs or the same with other settings: keep one Joint for "
            "each family."
        )


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a.cpu(), b.cpu())
    return a is b
