r"""How many labels are enough, and which estimator to use (the remark on Chebyshev, Section 3).

Both read the exact variances of Lemma A.1; nothing is sampled.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from scipy import special
from torch import Tensor

from fimlib._checks import check_choice, check_estimator
from fimlib.derivatives import Block, Derivatives, flat
from fimlib.diagonal import Diagonal
from fimlib.families.base import Family
from fimlib.families.categorical import Categorical
from fimlib.families.product import Product
from fimlib.fisher import covariance_i1_i2, fisher_information, natural, variance_i1, variance_i2

RULES = ("chebyshev", "bernstein", "approximate")
BY_VARIANCE = ("chebyshev", "approximate")  # rules that know nothing else
MOST_DEGREES = 1000  # of freedom; more come close to 1
SMALLEST_SQUARE = 1e-290  # that has all its digits
# Label variances that cost more, and go beyond the paper; the last is that of Î₂.
PROJECTIONS = ("signs", "importance", "importance2")


class Comparison(NamedTuple):
    """Î₁ against Î₂ in one layer at B inputs, each [B].

    Attributes:
        relative_sd_i1: √(ΣV₁ / ΣI²) for one label, sums over the layer: the typical ‖Î₁ − I‖ in
            units of ‖I‖; 1/√N times it for N labels. 0/0 counts as 0.
        relative_sd_i2: The same of Î₂.
        less_variance: 1 or 2, the estimator with less variance on equally many labels.
        less_variance_at_cost: 1 or 2, the one with less variance at equal cost.
        weight_i1: α of the mixture α Î₁ + (1 − α) Î₂ with the least variance on equal labels.
        relative_sd_combined: As ``relative_sd_i1``, of that mixture. Not in the paper.
        relative_sd_signs: The same of one projection by random signs.
        relative_sd_importance: The same of one class that is drawn by importance; None where the
            labels are no classes.
    """

    relative_sd_i1: Tensor
    relative_sd_i2: Tensor
    less_variance: Tensor
    less_variance_at_cost: Tensor
    weight_i1: Tensor
    relative_sd_combined: Tensor
    relative_sd_signs: Tensor
    relative_sd_importance: Tensor | None


class Combination(NamedTuple):
    """The mixture α Î₁ + (1 − α) Î₂ of least variance, on equal labels.

    Attributes:
        weight_i1: α, which may lie outside [0, 1].
        variance: Of one label, summed over the layer's parameters.
    """

    weight_i1: float
    variance: float


def mixture(v1: Tensor, v2: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """α and the variance of the mixture, from ΣV₁, ΣV₂ and ΣC₁₂; Î₁ where both are equal."""
    of_difference = v1 + v2 - 2 * covariance
    differ = of_difference > 0
    weight = torch.where(differ, (v2 - covariance) / of_difference, 1)
    variance = torch.where(differ, (v1 * v2 - covariance.square()) / of_difference, v1)
    return weight, variance.clamp_min(0).minimum(v1).minimum(v2)  # but for rounding


def num_samples_needed(
    derivs: Derivatives,
    family: Family,
    *,
    relative_error: float,
    confidence: float,
    estimator: int | str = 1,
    rule: str = "chebyshev",
) -> dict[str, Tensor]:
    r"""Labels that bring a layer's estimate within a relative error, by Chebyshev's inequality.

    The smallest N for which Markov's inequality on the squared norm,
    ``P(‖Î − I‖ ≥ ε‖I‖) ≤ (1/N) ΣV⁽¹⁾ / (ε² ΣI²)``, guarantees at most 1 − confidence. Norms and
    sums run over all parameters of a layer, so single entries may be much farther off. It uses
    nothing but the variance, and is conservative: where the error is nearly normal, a confidence
    of 0.95 asks for about five times the labels that would do for one parameter, and more for many.
    Two rules are sharper; see ``number_needed`` and ``sharper``.

    Args:
        derivs: J, S and the outputs at B inputs.
        family: The output family.
        relative_error: ε > 0.
        confidence: Between 0 and 1, both excluded.
        estimator: 1 for Î₁ or 2 for Î₂; or "signs" or "importance", for random projections that
            are squared input by input; or "importance2", for Î₂ on labels drawn by importance.
        rule: "chebyshev"; "bernstein", no larger and also a guarantee (Proposition 9.7), for Î₁ and
            Î₂ of ``Categorical``; or "approximate", as many as it takes where N is large, and no
            guarantee. Beyond Î₁ and Î₂ of ``Categorical`` it is the most that any network with this
            variance takes there.

    Returns:
        Layer name → N ≥ 1 for each input, [B], float64 whole numbers; inf where the layer's I is 0
        and its estimate is not; NaN where the squares of I are too small for float64.

    Raises:
        ValueError: an argument out of its range, or the outputs do not fit the family.

    Example: a Gaussian label and one weight: V₁ = 2I², so N = 2 / (0.1² × 0.05).
        >>> from fimlib import Gaussian, differentiate
        >>> derivs = differentiate(torch.nn.Linear(1, 1, bias=False), torch.ones(1, 1))
        >>> num_samples_needed(derivs, Gaussian(), relative_error=0.1, confidence=0.95)
        {'': tensor([4000.], dtype=torch.float64)}
    """
    check_choice(rule, "rule", RULES)
    variance = variance_of(estimator, derivs, family)
    means, norms = variance.layer_means(), squared_norms(fisher_information(derivs, family))
    by_variance = "chebyshev" if rule == "bernstein" else rule
    needed = {
        layer: number_needed(means[layer], squared_norm, relative_error, confidence, by_variance)
        for layer, squared_norm in norms.items()
    }
    if rule == "chebyshev":
        return needed
    if estimator in PROJECTIONS or not isinstance(family, Categorical):
        if rule == "approximate":
            return needed
        raise ValueError("rule 'bernstein' is for Î₁ and Î₂ of Categorical(): take 'chebyshev'.")
    found = sharper(derivs, family, int(estimator), relative_error, 1 - confidence, rule)
    if rule == "approximate":
        return {layer: n.masked_fill(norms[layer].isnan(), math.nan) for layer, n in found.items()}
    return {layer: torch.minimum(n, found[layer]) for layer, n in needed.items()}


def variance_of(estimator: int | str, derivs: Derivatives, family: Family) -> Diagonal:
    """The exact variance of one label, or of one projection."""
    if estimator in PROJECTIONS:
        derivs, h = natural(derivs, family)
        form = partial(variance_of_projection, str(estimator), family, h)
        return derivs.contract(form, degree=4)
    return (variance_i1, variance_i2)[check_estimator(estimator) - 1](derivs, family)


def variance_of_projection(estimator: str, family: Family, h: Tensor, block: Block) -> Tensor:
    """The variance of one of ``PROJECTIONS`` in a block, [B, *K]; h are the natural parameters."""
    if estimator == "importance2":
        return family.variance2_importance(h, block.second)
    variance: Tensor = getattr(family, f"variance_{estimator}")(h, block.J)
    return variance


def sharper(
    derivs: Derivatives,
    family: Categorical,
    estimator: int,
    relative_error: float,
    alpha: float,
    rule: str,
) -> dict[str, Tensor]:
    r"""Layer → N by Bernstein's inequality, or approximately, [B]. Not in the paper.

    With a_k the error of one label k over the layer's parameters, all that matters is the Gram
    matrix ``G_kl = a_k·a_l``, [C, C]: σ² = Σp_k G_kk = ΣV⁽¹⁾, b² = max G_kk and, for the
    eigenvalues λ of the errors' covariance, Σλ = σ² and Σλ² = Σp_k p_l G_kl². With t = ε‖I‖,

    * ``P(‖Î − I‖ ≥ t) ≤ 2 exp(−N t² / (2σ² + 2bt/3))`` (Bernstein's inequality in a Hilbert space,
      Pinelis 1994);
    * N‖Î − I‖² ~ Σλ_r χ²₁ for large N, here with two moments: g χ²_f, g = Σλ²/Σλ, f = (Σλ)²/Σλ².
    """
    h = family.natural(derivs.outputs)
    p = family.mean(h)
    gram: dict[str, Tensor] = {}
    squared_norm: dict[str, Tensor] = {}
    for block in family.natural_derivatives(derivs).blocks:
        first = flat(family.project(h, block.J).square())
        I = torch.einsum("bk,bki->bi", p, first)
        errors = first - I[:, None]
        if estimator == 2:
            errors = flat(family.project(h, block.second))
        inputs = [z for z in block.inputs.values() if z is not None]
        right = h.new_full((len(h),), len(block.inputs) - len(inputs))
        right = right + sum(z.double().pow(4).sum(1) for z in inputs)
        products = torch.einsum("bki,bli->bkl", errors, errors) * right[:, None, None]
        gram[block.layer] = gram.get(block.layer, 0) + products
        squares = I.square().sum(1) * right
        squared_norm[block.layer] = squared_norm.get(block.layer, 0) + squares
    labels = bernstein if rule == "bernstein" else chi_squared
    return {
        layer: labels(G, p, relative_error * squared_norm[layer].sqrt(), alpha)
        for layer, G in gram.items()
    }


def bernstein(gram: Tensor, p: Tensor, t: Tensor, alpha: float) -> Tensor:
    """N = ln(2/α) (2σ²/t² + 2b/(3t)), at least 1: [B]."""
    squares = gram.diagonal(dim1=1, dim2=2)
    variance = (p * squares).sum(1)
    most = squares.masked_fill(p == 0, 0.0).amax(1).sqrt()
    needed = 2 * ratio(variance, t.square()) + 2 / 3 * ratio(most, t)
    return torch.ceil(math.log(2 / alpha) * needed * (1 - 1e-12)).clamp_min(1)


def chi_squared(gram: Tensor, p: Tensor, t: Tensor, alpha: float) -> Tensor:
    """N = g χ²_f / t² with the quantile of χ²_f at 1 − α, at least 1: [B]."""
    total = (p * gram.diagonal(dim1=1, dim2=2)).sum(1)
    squares = torch.einsum("bk,bl,bkl->b", p, p, gram.square())
    g = ratio(squares, total)
    f = torch.where(squares > 0, total.square() / squares, 1)
    half = special.gammaincinv(f.cpu().numpy() / 2, 1 - alpha)  # scipy.stats is slow to import
    quantile = torch.as_tensor(2 * half, dtype=g.dtype).to(g)
    return torch.ceil(ratio(g * quantile, t.square()) * (1 - 1e-12)).clamp_min(1)


def compare_estimators(
    derivs: Derivatives, family: Family, *, cost_ratio: float = 1.0
) -> dict[str, Comparison]:
    r"""Which of Î₁ and Î₂ is the better one, layer by layer.

    Sums over a layer's parameters, ΣV₁ against ΣV₂; a tie goes to Î₁, which is never negative. At
    equal cost Î₂ gets 1/cost_ratio as many labels, so V₁ is compared with cost_ratio × V₂.

    Args:
        derivs: J, S and the outputs at B inputs.
        family: The output family.
        cost_ratio: Cost of one sample of Î₂ in units of one of Î₁; > 0.

    Returns:
        Layer name → the comparison at every input. Average over inputs yourself, or use ``Joint``.

    Raises:
        ValueError: cost_ratio is not a positive number, or the outputs do not fit the family.
    """
    if not 0 < cost_ratio < math.inf:
        raise ValueError(f"cost_ratio must be a positive number, got {cost_ratio!r}.")
    squared_norm = squared_norms(fisher_information(derivs, family))
    v1, v2, signs = (variance_of(e, derivs, family).layer_means() for e in (1, 2, "signs"))
    c12 = covariance_i1_i2(derivs, family).layer_means()
    important = None
    if has_classes(family):
        important = variance_of("importance", derivs, family).layer_means()

    def compared(layer: str) -> Comparison:
        def relative(variance: Tensor) -> Tensor:
            return ratio(variance, squared_norm[layer]).sqrt()

        weight, mixed = mixture(v1[layer], v2[layer], c12[layer])
        return Comparison(
            relative(v1[layer]),
            relative(v2[layer]),
            1 + (v2[layer] < v1[layer]).long(),
            1 + (v2[layer] * cost_ratio < v1[layer]).long(),
            weight,
            relative(mixed),
            relative(signs[layer]),
            relative(important[layer]) if important else None,
        )

    return {layer: compared(layer) for layer in v1}


def labels_of(family: Family) -> list[Family]:
    """The family itself, or those of which it is a product."""
    return family.families if isinstance(family, Product) else [family]


def has_classes(family: Family) -> bool:
    """Whether all labels are classes, which can be drawn by importance."""
    return all(isinstance(one, Categorical) for one in labels_of(family))


def number_needed(
    variance: Tensor,
    squared_norm: Tensor,
    relative_error: float,
    confidence: float,
    rule: str = "chebyshev",
) -> Tensor:
    r"""⌈q variance / (ε² squared_norm)⌉ ≥ 1, from a variance alone.

    * "chebyshev": q = 1/(1 − confidence), whatever the distribution of the error.
    * "approximate": q = max_f χ²_f/f, the quantile at the confidence. Where N is large,
      N‖Î − I‖² ~ Σλ_r χ²₁ with Σλ = variance, and of all such λ equal ones have the largest
      quantile (Székely & Bakirov 2003); a single one from a confidence of 0.785 on. Not in the
      paper.

    >>> one = torch.ones(())
    >>> [float(number_needed(one, one, 0.1, 0.95, rule)) for rule in ("chebyshev", "approximate")]
    [2000.0, 385.0]
    """
    check_choice(rule, "rule", BY_VARIANCE)
    if not 0 < relative_error < math.inf:
        raise ValueError(f"relative_error (ε) must be a positive number, got {relative_error!r}.")
    if not 0 < confidence < 1:
        raise ValueError(
            f"confidence must lie between 0 and 1, both excluded, got {confidence!r}: no number of "
            "samples gives certainty."
        )
    q = 1 / (1 - confidence) if rule == "chebyshev" else largest_quantile(confidence)
    needed = ratio(variance, squared_norm) * q / relative_error**2
    return torch.ceil(needed * (1 - 1e-12)).clamp_min(1)  # 1 − 0.9 is not quite 0.1


def largest_quantile(confidence: float) -> float:
    """The largest quantile of Σλ_r χ²₁ with Σλ = 1: that of χ²_f/f for the worst f, or 1."""
    f = np.arange(1, MOST_DEGREES + 1)
    return max(1.0, float((2 * special.gammaincinv(f / 2, confidence) / f).max()))


def ratio(variance: Tensor, squared_norm: Tensor) -> Tensor:
    """The variance in units of the squared norm; 0 where there is no variance."""
    return (variance / squared_norm).masked_fill((variance <= 0) & ~squared_norm.isnan(), 0.0)


def squares_or_nan(squares: Tensor, numbers: Tensor) -> Tensor:
    """Sums or means of squares of numbers ≥ 0; NaN where the squares are too small for float64."""
    return squares.masked_fill((numbers > 0) & (squares < SMALLEST_SQUARE), math.nan)


def squared_norms(fisher: Diagonal) -> dict[str, Tensor]:
    """Layer → the mean of I², [B], as ``squares_or_nan``."""
    means = fisher.layer_means()
    squares = fisher.square().layer_means()
    return {layer: squares_or_nan(squares[layer], I) for layer, I in means.items()}
