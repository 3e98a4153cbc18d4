"""Outputs that are probabilities already, for a family that takes logits.

Nothing fails there, and the answer is that of another distribution: so it is said aloud.
"""

from __future__ import annotations

import inspect
import warnings

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fimlib.families.base import Family
from fimlib.families.categorical import Categorical
from fimlib.families.independent import Bernoulli


def warn_of_probabilities(family: Family, outputs: Tensor, model: nn.Module | None = None) -> None:
    """Warn where outputs, [B, T], seem to be probabilities.

    Those of classes show it by their values. Those of yes-or-no labels do not, for logits may lie
    between 0 and 1, too: there the last module of a chain decides, where the model is given.
    """
    name = type(family).__name__
    if isinstance(family, Categorical) and are_distributions(outputs):
        warn(
            f"the outputs look like probabilities; {name} takes logits: remove the softmax at the "
            "end of the network."
        )
    if isinstance(family, Bernoulli) and model is not None and ends_in_sigmoid(model):
        warn(
            f"the network ends in a Sigmoid, so its outputs are probabilities; {name} takes "
            "logits: remove the sigmoid."
        )


def are_distributions(outputs: Tensor) -> bool:
    """Whether no output is negative and every row sums to 1, up to rounding."""
    if outputs.ndim != 2 or not (outputs >= 0).all():
        return False
    return bool(((outputs.detach().double().sum(1) - 1).abs() < 1e-5).all())


def ends_in_sigmoid(model: nn.Module) -> bool:
    """Whether the last module of nested ``nn.Sequential`` that does anything is a sigmoid."""
    if type(model).forward is not nn.Sequential.forward:
        return isinstance(model, nn.Sigmoid)
    idle = (nn.Identity, nn.Flatten, _DropoutNd)
    acting = [m for m in model.children() if not isinstance(m, idle)]
    return bool(acting) and ends_in_sigmoid(acting[-1])


def warn(message: str) -> None:
    """Warn at the line outside of the library that has called it."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").startswith("fimlib."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
