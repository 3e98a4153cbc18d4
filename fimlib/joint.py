r"""Estimators over random inputs *and* labels: their exact variances and bounds (Section 4.1).

A joint estimator draws n_x inputs from a data set and n_y labels for each. By the law of total
variance (Theorem 4.7) its variance is a sum of two averages over the inputs, so one pass over the
data, in batches of any size, is enough for every n_x and n_y.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fimlib._checks import check_dtype, check_estimator, check_integer
from fimlib.derivatives import Derivatives, Sweep, flat
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
from fimlib.left_factors import (
    Float32Check,
    LeftFactors,
    Totals,
    bound_factors,
    float32_checks,
    left_factors,
)
from fimlib.precision import (
    PROJECTIONS,
    Combination,
    mixture,
    number_needed,
    squares_or_nan,
    variance_of_projection,
)
from fimlib.spectra.extreme import Spectrum, spectrum

PerParameter = dict[str, Tensor]
Estimator = int | str
FEW = 64  # outputs: up to here I comes fastest from a factor of 𝓘


class Joint:
    r"""Averages over the inputs that have been seen, for the joint estimators (Theorem 4.7).

    Feed it the derivatives batch by batch. Accumulators of different batches merge exactly, in any
    order, so a data set may be split over processes or devices. Each quantity of a batch is
    averaged in its factors, by one matmul per layer: nothing of size inputs × parameters is built.

    Args:
        family: The output family.
        quantities: Which of "I" (always there), "Var_x I", "V1", "V2" and "C12" to accumulate;
            None: all that the derivatives and labels allow. ``variance_i1`` needs "Var_x I" and
            "V1", ``variance_i2`` "Var_x I" and "V2". On request "signs" and "importance", too: the
            variances of the random projections of ``estimate``; and "importance2", that of Î₂ on a
            label drawn by importance.
        bounds: None for no bounds; else how λ_max(M) is found for them, see ``lambda_max``.
            "certified" is a true upper bound, and cheap for a classifier; for Gaussian outputs
            "multistart" is exact, and the cheaper one from about ten outputs on.
        dtype: Of the contractions; averages over inputs are kept in float64 all the same. None: the
            network's own for I alone, where squares of J below 1e-38 become 0, and float64 for
            variances or where float32 is too narrow. float32 halves memory and time. A batch's sums
            are then off by about 1e-6 of themselves, and its Var_x I by about 1e-7 E_x I². Where it
            is too narrow, which takes V₁ or V₂ below 1e-30, an error says so, unless V₂ is below
            1e-20 I².

    Attributes:
        count: m, the inputs seen.
        layers: Layer name → its parameters.

    Memory: 40 bytes per parameter; 24 with data labels or without second derivatives; 8 for I
    alone. With bounds 88, and 56 without second derivatives.

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
        quantities: Collection[str] | None = None,
        bounds: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_family(family)
        self.family = family
        self.quantities = check_quantities(quantities)
        self.bounds = bounds
        self.dtype = check_dtype(dtype)
        self.count = 0
        self.layers: dict[str, list[str]] = {}
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
        self.update_sweep(Sweep.from_derivatives(derivs), labels)

    def update_sweep(self, sweep: Sweep, labels: Labels | None = None) -> None:
        """Take in a batch of inputs whose derivatives come piece by piece; see ``update``."""
        means = self._checked_means(sweep, labels)
        fresh = self._empty()
        fresh.count = len(sweep.outputs)
        mean_square = means.pop("I²", {})
        fresh._means = means
        fresh._scatter = {
            name: square.sub_(means["I"][name].square()).clamp_min_(0).mul_(fresh.count)
            for name, square in mean_square.items()
        }
        layers: dict[str, list[str]] = defaultdict(list)
        for layer, inputs in sweep.inputs:
            layers[layer].extend(inputs)
        fresh.layers = dict(layers)
        self.merge(fresh)

    def _empty(self) -> Joint:
        return Joint(self.family, quantities=self.quantities, bounds=self.bounds, dtype=self.dtype)

    def _checked_means(self, sweep: Sweep, labels: Labels | None) -> dict[str, PerParameter]:
        """Every quantity averaged over the inputs of a batch; "I²" among them for Var_x I."""
        own = sweep.outputs.dtype if self._is_alone(labels) else torch.float64
        try:
            return self._means_in(sweep, labels, self.dtype or own)
        except ValueError:
            if self.dtype is not None or own == torch.float64:
                raise
        return self._means_in(sweep, labels, torch.float64)  # where float32 is too narrow

    def _is_alone(self, labels: Labels | None) -> bool:
        """Whether I(θᵢ) is all that is asked for."""
        return self.quantities == {"I"} and self.bounds is None and labels is None

    def _means_in(
        self, sweep: Sweep, labels: Labels | None, dtype: torch.dtype
    ) -> dict[str, PerParameter]:
        """The same, contracted in a dtype."""
        if labels is not None:
            check_same_family(self.family, family_of(labels))
            check_labels(sweep.outputs, labels)
        found: dict[str, PerParameter] = defaultdict(dict)
        float32: list[Float32Check] = []
        for index, factors in self._left_factors(sweep, labels, dtype):
            layer, inputs = sweep.inputs[index]
            largest = factors.largest() if dtype == torch.float32 else None
            if largest is not None:
                by_key = dict(zip(factors.keys, largest, strict=True))
                float32 += float32_checks(index, layer, by_key)
            for name, z in inputs.items():
                of_one, lost = factors.means(z, dtype, largest)
                for key, mean in of_one.items():
                    found[key][name] = mean
                if lost is not None:
                    float32.append(Float32Check(index, layer, lost, "J"))
        names = [name for _, inputs in sweep.inputs for name in inputs]
        means = {key: {n: of[n] for n in names} for key, of in found.items()}
        check_means(means, float32, self.family, sweep)
        return means

    def _left_factors(
        self, sweep: Sweep, labels: Labels | None, dtype: torch.dtype
    ) -> Iterator[tuple[int, LeftFactors | Totals]]:
        """Left factors of every quantity, for each block of the batch, in any order."""
        is_alone = self._is_alone(labels) and dtype == sweep.outputs.dtype
        if is_alone and has_short_factor(self.family, sweep):
            return columns_of_factor(self.family, sweep)
        h = self.family.natural_unseen(sweep.outputs)
        eigenvalues = None
        if self.bounds is not None and labels is None:
            eigenvalues = spectrum(self.family, sweep.outputs, method=self.bounds)

        def of_piece(derivs: Derivatives, at: slice) -> dict[str, Tensor]:
            contract = self._contraction(h[at], labels, dtype)
            (block,) = self.family.natural_derivatives(derivs).blocks
            lefts = contract(block.J, block.S)
            for name in self.quantities & set(PROJECTIONS) if labels is None else ():
                variance = variance_of_projection(name, self.family, h[at], block)
                lefts[name] = variance.to(lefts["I"].dtype)
            if "Var_x I" in self.quantities:
                lefts["I²"] = lefts["I"]
            if eigenvalues is not None:
                lam = Spectrum(*(values[at] for values in eigenvalues))
                lefts.update(bound_factors(block.J, block.S, lam, dtype))
            return lefts

        return left_factors(sweep, of_piece)

    def _contraction(self, h: Tensor, labels: Labels | None, dtype: torch.dtype) -> Moments:
        """From J and S of a block, left factors [B, *K] of I and of the other quantities."""
        if labels is None:
            return self.family.moments(h, quantities=self.quantities, dtype=dtype)

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
        check_same_family(self.family, other.family)
        settings = [(sorted(j.quantities), j.bounds, j.dtype) for j in (self, other)]
        if settings[0] != settings[1]:
            raise ValueError(
                f"the accumulators were made with different settings: {settings[0]} and "
                f"{settings[1]}, (quantities, bounds, dtype). Make all of them alike."
            )
        if other.count == 0:
            return
        if self.count == 0:
            self.count, self.layers = other.count, other.layers
            self._means = {
                key: {n: owning_its_memory(t) for n, t in means.items()}
                for key, means in other._means.items()
            }
            self._scatter = {n: owning_its_memory(t) for n, t in other._scatter.items()}
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

    def state_dict(self) -> dict[str, Any]:
        """All numbers, for ``torch.save``; see ``load_state_dict``.

        Returns:
            "settings" of the Joint; "count"; "layers"; "means": quantity → parameter name → its
            average over the inputs; and "scatter": parameter name → Σ_x (I(θᵢ|x) − E_x I)².
        """
        return {
            "settings": self._settings(),
            "count": self.count,
            "layers": {layer: list(names) for layer, names in self.layers.items()},
            "means": {key: dict(means) for key, means in self._means.items()},
            "scatter": dict(self._scatter),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all numbers by those of a ``state_dict``.

        Raises:
            ValueError: it is no such state, or that of a Joint with other settings.
        """
        mine = self._settings()
        is_whole = state.keys() >= {"count", "layers", "means", "scatter"}
        if not is_whole or not are_equal(mine, state.get("settings")):
            raise ValueError(
                "this is not the state of a Joint with the same settings, which are "
                f"{', '.join(mine)}: make the Joint as the one that was saved."
            )
        self.count, self.layers = state["count"], state["layers"]
        self._means, self._scatter = state["means"], state["scatter"]

    def _settings(self) -> dict[str, Any]:
        """The settings that the numbers depend on, in types that ``torch.load`` accepts."""
        return {
            "family": settings_of(self.family),
            "quantities": sorted(self.quantities),
            "bounds": self.bounds,
            "dtype": str(self.dtype),
        }

    @property
    def device(self) -> torch.device:
        """Where the averages are; the CPU before any input is seen."""
        return next((t.device for t in self._means.get("I", {}).values()), torch.device("cpu"))

    def to(self, device: torch.device | str) -> Joint:
        """A copy on another device."""
        copy = self._empty()
        copy.count, copy.layers = self.count, self.layers
        copy._means = {
            key: {n: t.to(device) for n, t in means.items()} for key, means in self._means.items()
        }
        copy._scatter = {n: t.to(device) for n, t in self._scatter.items()}
        return copy

    def layer_sums(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums of a quantity over each layer's parameters: parameter → tensor to layer → number."""
        return {
            layer: torch.stack([values[name].sum() for name in names]).sum()
            for layer, names in self.layers.items()
        }

    def squared_norms(self) -> dict[str, Tensor]:
        """Layer → ΣI(θᵢ)²; NaN where the squares are too small for float64."""
        I = self._mean("I")
        norms = self.layer_sums({name: t.square() for name, t in I.items()})
        return {layer: squares_or_nan(norms[layer], t) for layer, t in self.layer_sums(I).items()}

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

    def label_variance(self, estimator: Estimator) -> PerParameter:
        """E_x V_j⁽¹⁾(θᵢ|x), the average variance of Î_j on one label.

        Args:
            estimator: j = 1 or 2; or "signs" or "importance", of one random projection; or
                "importance2", of Î₂ on one label drawn by importance.
        """
        if estimator in PROJECTIONS:
            return self._mean(str(estimator))
        return self._mean(f"V{check_estimator(estimator)}")

    def label_variance_bounds(self, estimator: int) -> Interval[PerParameter]:
        """E_x of Theorem 4.1's bounds of V_j⁽¹⁾(θᵢ|x), the variance of Î_j on one label."""
        quantity = f"V{check_estimator(estimator)}"
        return Interval(self._mean(f"{quantity}_lower"), self._mean(f"{quantity}_upper"))

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
        return self.variance(1, num_inputs, num_labels, replacement=replacement)

    def variance_i2(
        self, num_inputs: int, num_labels: int = 1, *, replacement: bool = True
    ) -> PerParameter:
        """Variance of the joint Î₂ (Theorem 4.7, Eq. 20); see ``variance_i1``."""
        return self.variance(2, num_inputs, num_labels, replacement=replacement)

    def variance(
        self,
        estimator: Estimator,
        num_inputs: int,
        num_labels: int = 1,
        *,
        replacement: bool = True,
    ) -> PerParameter:
        """Variance of a joint estimator (Theorem 4.7, Eq. 20); see ``variance_i1``.

        Args:
            estimator: 1 or 2; or "signs" or "importance", with n_y random projections squared
                input by input, as ``estimate(squares="input")`` takes them (Proposition 9.2, not in
                the paper); or "importance2", for Î₂ on labels drawn by importance.
            num_inputs: As in ``variance_i1``.
            num_labels: The same.
            replacement: The same.
        """
        return self._total(self.label_variance(estimator), num_inputs, num_labels, replacement)

    def combination(self) -> dict[str, Combination]:
        r"""The best mixture α Î₁ + (1 − α) Î₂ of both on the same labels, layer by layer.

        ``α = (V₂ − C₁₂) / (V₁ + V₂ − 2C₁₂)`` with sums over the layer's parameters. Its label
        variance, ``(V₁V₂ − C₁₂²) / (V₁ + V₂ − 2C₁₂)``, is never above V₁ or V₂. It needs "V1", "V2"
        and "C12" (Proposition 9.5). Not in the paper.
        """
        v1, v2, c = (
            self.layer_sums(v) for v in (*map(self.label_variance, (1, 2)), self.label_covariance())
        )
        found = {layer: mixture(v1[layer], v2[layer], c[layer]) for layer in v1}
        return {layer: Combination(float(a), float(v)) for layer, (a, v) in found.items()}

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
            tight: Subtract ``(E_x[λ_min(𝓘) ‖J‖²])²`` from the upper bound (beyond the paper). For
                a classifier this is 0.

        Raises:
            ValueError: nothing accumulated; data labels; or bounds=None.
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

        Args:
            num_inputs: n_x ≥ 1.
            num_labels: n_y ≥ 1, labels for each input.
            estimator: j = 1 or 2.

        Raises:
            ValueError: a count below 1; nothing accumulated; data labels; or bounds=None.
        """
        sides = zip(self.label_variance_bounds(estimator), self.lemma_4_8(), strict=True)
        return Interval(*(self._total(v, num_inputs, num_labels, True, x) for v, x in sides))

    def num_inputs_needed(
        self,
        relative_error: float,
        confidence: float,
        num_labels: int = 1,
        estimator: Estimator = 1,
        rule: str = "chebyshev",
    ) -> dict[str, float]:
        r"""Inputs that bring a layer's estimate within a relative error, by Chebyshev.

        The smallest n_x for which Eq. 20 and Markov's inequality on the squared norm give
        ``P(‖Î_j − I‖ ≥ ε‖I‖) ≤ 1 − confidence``, norms over a layer's parameters, inputs drawn
        with replacement. Conservative, like all of its kind: fewer inputs will mostly do.

        Args:
            relative_error: ε > 0.
            confidence: Between 0 and 1, both excluded.
            num_labels: n_y ≥ 1, labels for each input.
            estimator: As in ``variance``.
            rule: "chebyshev"; or "approximate", the most that it takes where n_x is large, and no
                guarantee. See ``num_samples_needed``.

        Returns:
            Layer name → n_x ≥ 1, a whole number; inf where I is 0 and its estimate is not; NaN
            where the squares of I are too small for float64.

        Raises:
            ValueError: an argument out of its range, or nothing accumulated.
        """
        label_variance = self.label_variance(estimator)
        totals = self.layer_sums(self._total(label_variance, 1, num_labels, True))
        norms = self.squared_norms()
        return {
            layer: float(number_needed(total, norms[layer], relative_error, confidence, rule))
            for layer, total in totals.items()
        }

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
                "bounds=None there are no bounds, with first derivatives alone there is no V₂, and "
                "quantities= leaves out the others. Use a Joint with it."
            )
        return {name: mean.clone() for name, mean in self._means[quantity].items()}

    def _check_same_content(self, other: Joint) -> None:
        mine, theirs = (
            {name: tuple(mean.shape) for name, mean in joint._means["I"].items()}
            for joint in (self, other)
        )
        if mine != theirs:
            raise ValueError(f"other parameters than before: {theirs} instead of {mine}.")
        if self._means.keys() != other._means.keys():
            raise ValueError(
                "data labels, bounds, second derivatives or other quantities on one side only: "
                "keep one Joint for batches with data labels and another for those without, and "
                "derivatives of different orders apart."
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
    J = torch.cat([flat(derivs.jacobian(name).double()) for name in parameters], dim=2)
    S = torch.cat([flat(derivs.second(name).double()) for name in parameters], dim=2)
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
    known = (*QUANTITIES, "Var_x I", *PROJECTIONS)
    if quantities is None:
        return frozenset(known) - set(PROJECTIONS)
    if isinstance(quantities, str) or not set(quantities) <= set(known):
        raise ValueError(f"quantities must be a list of some of {known}, got {quantities!r}.")
    return frozenset(("I", *quantities))


def has_short_factor(family: Family, sweep: Sweep) -> bool:
    """Whether a family knows a factor of 𝓘 in the outputs, and they are few."""
    knows_one = family.is_natural and type(family).factor is not Family.factor
    return knows_one and sweep.outputs.shape[1] <= FEW


def columns_of_factor(family: Family, sweep: Sweep) -> Iterator[tuple[int, LeftFactors | Totals]]:
    """Left factors of I(θᵢ|x) = Σ_a (LᵀJ)_a² alone, where 𝓘 = LLᵀ (Eq. 23)."""

    def factor(outputs: Tensor) -> Tensor:
        return family.factor(family.natural_unseen(outputs))

    def of_piece(derivs: Derivatives, _: slice) -> dict[str, Tensor]:
        J = derivs.blocks[0].J
        if sweep.combined is None:  # else the engine has carried LᵀJ back
            L = factor(derivs.outputs).to(J)
            J = torch.bmm(L.mT, flat(J)).view(len(J), -1, *J.shape[2:])
        return {"I": J.square().sum(1)}

    return left_factors(sweep.combined(factor) if sweep.combined else sweep, of_piece)


def owning_its_memory(t: Tensor) -> Tensor:
    """A tensor that keeps no larger one, of which it would be a part."""
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone()


def check_means(
    means: dict[str, PerParameter], float32: list[Float32Check], family: Family, sweep: Sweep
) -> None:
    """A ValueError if anything is NaN, infinite or lost; one synchronisation if all is well."""
    sums = [t.sum() for mean in means.values() for t in mean.values()]  # infinite if one of them is
    is_fine = torch.isfinite(torch.stack(sums)).all()
    if float32:
        is_fine = is_fine & ~torch.stack([check.is_low for check in float32]).any()
    if is_fine:
        return
    family.natural(sweep.outputs)  # its message comes first
    for mean in means.values():
        for name, tensor in mean.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"the derivatives of parameter {name!r} are NaN, infinite or too large to be "
                    "raised to the fourth power: check the weights and the inputs."
                )
    for index, layer, is_low, which in float32:
        pieces = (p.derivs.blocks[0] for p in sweep.pieces() if p.block == index)
        if is_low and any(getattr(block, which).any() for block in pieces):
            raise ValueError(
                f"layer {layer!r}: float32 is too narrow for its derivatives or inputs, or for "
                "probabilities this close to 0: take dtype=torch.float64."
            )


def check_same_family(mine: Family, theirs: Family) -> None:
    """A ValueError unless both are of one type and have the same settings."""
    if not are_equal(settings_of(mine), settings_of(theirs)):
        raise ValueError(
            f"this accumulator is for {type(mine).__name__} outputs, the other side for "
            f"{type(theirs).__name__} outputs or the same with other settings: keep one Joint for "
            "each family."
        )


def settings_of(value: Any) -> Any:
    """A family's settings, in types that ``torch.load`` accepts."""
    if isinstance(value, Family):
        kind = type(value)
        return {"family": f"{kind.__module__}.{kind.__qualname__}", **settings_of(vars(value))}
    if isinstance(value, Mapping):
        return {key: settings_of(inside) for key, inside in value.items()}
    return [settings_of(inside) for inside in value] if isinstance(value, tuple | list) else value


def are_equal(a: Any, b: Any) -> bool:
    """Whether two settings have the same value."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(are_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(are_equal, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a.cpu(), b.cpu())
    return a is b or bool(np.array_equal(np.asarray(a), np.asarray(b)))
