r"""Estimators over random inputs *and* labels: their exact variances and bounds (Section 4.1).

A joint estimator draws n_x inputs from a data set and n_y labels for each. By the law of total
variance (Theorem 4.7) its variance is a sum of two averages over the inputs, so one pass over the
data, in batches of any size, tells it for every n_x and n_y.
"""

from __future__ import annotations

import numbers
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fimlib.derivatives import Block, Derivatives
from fimlib.families import Family, Labels, weighted_variance
from fimlib.family import QUANTITIES, Moments, check_family
from fimlib.fisher import check_labels
from fimlib.precision import chebyshev, check_estimator
from fimlib.spectra import Spectrum, spectrum

PerParameter = dict[str, Tensor]
# Of degree 2 in J, where S counts twice; all others are of degree 4.
DEGREE_2 = ("I", "I_lower")


class JointInterval(NamedTuple):
    """A lower and an upper bound of one joint quantity: parameter name → its shape."""

    lower: PerParameter
    upper: PerParameter


class JointBounds(NamedTuple):
    """Bounds of the variances of the joint Î₁ and Î₂."""

    variance_i1: JointInterval
    variance_i2: JointInterval


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
        if derivs.projected and (labels is not None or self.method is not None):
            raise ValueError(
                "these derivatives are projected on the model's labels: they serve no bounds and "
                "no data labels. Use differentiate()."
            )
        batch = self._empty()
        batch.count = len(derivs.outputs)
        means, smallest = self._batch_means(derivs, labels)
        _check(means, smallest, self.family, derivs.outputs)
        mean_square = means.pop("I²", {})
        batch._means = means
        batch._scatter = {
            name: batch.count * (square - means["I"][name].square()).clamp_min(0)
            for name, square in mean_square.items()
        }
        layers: dict[str, list[str]] = defaultdict(list)
        for block in derivs.blocks:
            layers[block.layer].extend(block.inputs)
        batch._layers = dict(layers)
        self.merge(batch)

    def _empty(self) -> Joint:
        return Joint(self.family, method=self.method, quantities=self.quantities, dtype=self.dtype)

    def _batch_means(
        self, derivs: Derivatives, labels: Labels | None
    ) -> tuple[dict[str, PerParameter], list[Narrow]]:
        """Every quantity averaged over the inputs of a batch; "I²" among them for Var_x I."""
        if labels is not None:
            _check_same_family(self.family, labels.family)
            check_labels(derivs.outputs, labels)
        h = unchecked_natural(self.family, derivs.outputs)
        eigenvalues = None
        if self.method is not None and labels is None:
            eigenvalues = spectrum(self.family, derivs.outputs, method=self.method)
        contract = self._contraction(h, labels, derivs.projected)
        means: dict[str, PerParameter] = defaultdict(dict)
        narrow: list[Narrow] = []
        for block in self.family.natural_derivatives(derivs).blocks:
            lefts = contract(block.J, block.S)
            if self.dtype == torch.float32:
                narrow += narrowest(block, lefts)
            if "Var_x I" in self.quantities:
                lefts["I²"] = lefts["I"].double().square()
            if eigenvalues is not None:
                lefts.update(_bounds(block.J, block.S, eigenvalues, self.dtype))
            second = {key: left for key, left in lefts.items() if key in DEGREE_2}
            fourth = {key: left for key, left in lefts.items() if key not in DEGREE_2}
            for name, z in block.inputs.items():
                squares = None if z is None else z.to(self.dtype).square()
                for key, mean in _means(second, squares, 1, self.dtype):
                    means[key][name] = mean
                for key, mean in _means(fourth, squares, 2, self.dtype):
                    means[key][name] = mean
        return dict(means), narrow

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
            # copies: they may be parts of larger tensors, which they would keep
            self._means = {
                key: {n: t.clone() for n, t in means.items()} for key, means in other._means.items()
            }
            self._scatter = {n: t.clone() for n, t in other._scatter.items()}
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

    def lemma_4_8(self, *, tight: bool = False) -> JointInterval:
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
        return JointInterval({name: torch.zeros_like(t) for name, t in upper.items()}, upper)

    def variance_bounds(self, num_inputs: int, num_labels: int = 1) -> JointBounds:
        r"""Bounds of Eq. 20 by Lemma 4.8 and Theorem 4.1, inputs drawn with replacement.

        For the Gaussian of Section 5.1 and N pairs the upper bounds are ``(3/N) E‖J‖⁴`` and
        ``(1/N) (E‖J‖⁴ + E‖S‖²)``.

        Args, Raises: as ``variance_i1`` and ``lemma_4_8``.
        """
        inputs = self.lemma_4_8()._asdict()

        def interval(quantity: str) -> JointInterval:
            sides = {
                side: self._total(
                    self._mean(f"{quantity}_{side}"), num_inputs, num_labels, True, inputs[side]
                )
                for side in ("lower", "upper")
            }
            return JointInterval(**sides)

        return JointBounds(interval("V1"), interval("V2"))

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
        n_x = _check_count(num_inputs, "num_inputs (n_x)")
        n_y = _check_count(num_labels, "num_labels (n_y)")
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
    n_x = _check_count(num_inputs, "num_inputs (n_x)")
    n_y = _check_count(num_labels, "num_labels (n_y)")
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


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of contractions, if it is one of the two that make sense."""
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float64 or torch.float32, got {dtype!r}.")
    return dtype


def unchecked_natural(family: Family, outputs: Tensor) -> Tensor:
    """``family.natural``, with the look at NaN left for later where nothing else is looked at.

    What comes of the outputs is looked at anyway, and every look waits for the device.
    """
    is_common = type(family).natural is Family.natural
    if is_common and outputs.ndim == 2 and outputs.shape[1] >= family.min_outputs:
        return outputs.detach().double()
    return family.natural(outputs)


def _means(
    lefts: dict[str, Tensor], squares: Tensor | None, power: int, dtype: torch.dtype
) -> list[tuple[str, Tensor]]:
    """Averages over the inputs of ``left · squares^power``, by one matmul in the given dtype.

    Args:
        lefts: Quantity → [B, *K].
        squares: [B, n], or None for 1.
        power: 1 or 2. What is squared once more is scaled to about 1 before, with its left factors,
            so that float32 holds it.
        dtype: Of the matmul.

    Returns:
        Quantity and its averages, [*K, n] or [*K], float64.
    """
    if not lefts:
        return []
    left = torch.stack(list(lefts.values()), dim=1)
    size, _, *rest = left.shape
    if squares is None:
        return list(zip(lefts, left.sum(0, dtype=torch.float64) / size, strict=True))
    shrink = dtype == torch.float32 and power == 2
    own = magnitude(left.abs(), (0, *range(2, left.ndim))) if shrink else None
    theirs = magnitude(squares, (0, 1)) if shrink else None
    if own is not None and theirs is not None:
        left, squares = left / own, squares / theirs.to(dtype)
    right = squares if power == 1 else squares.square()
    product = (left.to(dtype).flatten(1).T @ right).double()
    product = product.reshape(len(lefts), *rest, -1)
    if own is not None and theirs is not None:
        product *= (own[0] * theirs.square()).reshape(-1, *[1] * (product.ndim - 1))
    return list(zip(lefts, product.div_(size), strict=True))


def magnitude(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """A power of two near the largest entry along the axes, which stay as 1; float64."""
    largest = x.amax(axes, keepdim=True).double()
    return torch.where(largest > 0, largest.log2().floor().exp2(), 1.0)


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
    """Whether float32 may be too narrow for a form in a block, and what it is a form of."""

    layer: str
    is_low: Tensor
    D: Tensor


SMALLEST = 1e-30  # of float32 forms, whose terms may be as small as 1e-38
NOTHING = 1e-20  # V₂ in units of I², below which it is rounding where S is a difference


def narrowest(block: Block, lefts: dict[str, Tensor]) -> list[Narrow]:
    """What shows whether float32 is too narrow for a block."""
    if not lefts["I"].numel():
        return []
    first, nothing = lefts.get("V1", lefts["I"]), lefts["I"].amax().double().square() * NOTHING
    found = [Narrow(block.layer, first.amax() < SMALLEST, block.J)]
    # zeros that are known beforehand are one number
    if block.S is not None and "V2" in lefts and any(block.S.stride()):
        largest = lefts["V2"].amax()
        found.append(Narrow(block.layer, (largest < SMALLEST) & (largest >= nothing), block.S))
    return found


def _check(
    means: dict[str, PerParameter], narrow: list[Narrow], family: Family, outputs: Tensor
) -> None:
    """A ValueError if anything is NaN, infinite or lost; one look at the device if nothing is."""
    sums = [t.sum() for mean in means.values() for t in mean.values()]  # infinite if one of them is
    is_fine = torch.isfinite(torch.stack(sums)).all()
    if narrow:
        is_fine = is_fine & ~torch.stack([n.is_low for n in narrow]).any()
    if is_fine:
        return
    family.natural(outputs)  # its message comes first
    for mean in means.values():
        for name, tensor in mean.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"the derivatives of parameter {name!r} are NaN, infinite or too large to be "
                    "raised to the fourth power: check the weights and the inputs."
                )
    for layer, is_low, D in narrow:
        if is_low and D.any():
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


def _check_count(count: int, name: str) -> int:
    is_integer = isinstance(count, numbers.Integral) and not isinstance(count, bool)
    if not is_integer or count < 1:
        raise ValueError(f"{name} must be an integer ≥ 1, got {count!r}.")
    return int(count)
