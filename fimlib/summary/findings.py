"""The numbers of a summary, which are printed and drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from fimlib.joint import Joint


class LayerSummary(NamedTuple):
    """How far the estimates of one layer's I are off; norms and sums over its parameters.

    Attributes:
        layer: Its name in the network; "" for parameters of the network itself.
        num_parameters: Its parameters.
        mean_fisher: Mean of I over them, in nat/θ².
        relative_sd_i1: √(ΣV₁ / ΣI²) of an estimate from N labels for each of the inputs: the
            typical ‖Î₁ − I‖ in units of ‖I‖. 0/0 counts as 0.
        relative_sd_i2: The same of Î₂; None where V₂ is not known.
        relative_sd_i2_error: How much larger ``relative_sd_i2`` is if V₂ lies one standard error
            above its estimate; 0 where V₂ is no estimate.
        relative_sd_importance: The same of N classes drawn by importance; None for other labels.
        relative_sd_signs: The same of N projections by random signs.
        better: 1 or 2, the estimator with less variance on equally many labels, 1 in a tie; None
            where V₁ lies within two standard errors of the estimate of V₂, or V₂ is not known.
        labels_needed_i1: Labels for each of these inputs that bring ‖Î₁ − I‖ within the relative
            error at the confidence, by the rule; inf where none do.
        labels_needed_i2: The same of Î₂; of a V₂ two standard errors above where it is an estimate.
        labels_needed_importance: The same of classes drawn by importance.
        labels_needed_signs: Projections by random signs, for the same.
        inputs_needed_i1: The same for inputs that are drawn at random, from these as the
            population, with N labels for each; None where only one input was given.
        inputs_needed_i2: The same of Î₂.
        bound_i1: Upper bound of ``relative_sd_i1`` by Theorem 4.1; None where it was not computed.
        bound_i2: The same of Î₂.
    """

    layer: str
    num_parameters: int
    mean_fisher: float
    relative_sd_i1: float
    relative_sd_i2: float | None
    relative_sd_i2_error: float
    relative_sd_importance: float | None
    relative_sd_signs: float
    better: int | None
    labels_needed_i1: float
    labels_needed_i2: float | None
    labels_needed_importance: float | None
    labels_needed_signs: float
    inputs_needed_i1: float | None
    inputs_needed_i2: float | None
    bound_i1: float | None
    bound_i2: float | None


@dataclass(frozen=True)
class Findings:
    """The fields of a ``Summary``, which names them."""

    layers: tuple[LayerSummary, ...]
    num_inputs: int
    num_samples: int
    num_outputs: int
    relative_error: float
    confidence: float
    rule: str
    engine: str
    num_probes: int
    num_estimated: int
    is_cut: bool
    joint: Joint = field(repr=False)

    @property
    def has_i2(self) -> bool:
        """Whether V₂ is known, or estimated."""
        return self.layers[0].relative_sd_i2 is not None
