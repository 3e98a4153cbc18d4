"""Scores of channels for torch-pruning by a diagonal that is given to it."""

from __future__ import annotations

from collections.abc import Mapping

import torch_pruning
from torch import Tensor, nn


def score_by(
    model: nn.Module, diagonal: Mapping[str, Tensor]
) -> torch_pruning.importance.GroupHessianImportance:
    """Importance of a group of channels, Σθ²I over all weights and biases that go with each.

    Half of it is about how far the predictions move without the channel, in nat. With standard
    errors in the place of I it is the most that the score may be off by one standard error.

    Args:
        model: The network; its gradients become the diagonal, which is where torch-pruning looks.
        diagonal: Parameter → I, averaged over the inputs: exact, ``Estimate.value``, or
            ``Estimate.standard_error``.
    """
    for name, parameter in model.named_parameters():
        parameter.grad = diagonal[name].to(parameter)
    return torch_pruning.importance.GroupHessianImportance(
        group_reduction="sum", normalizer=None, bias=True
    )
