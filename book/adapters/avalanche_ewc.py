"""avalanche's elastic weight consolidation with the exact diagonal."""

# ruff: noqa: ARG002
from __future__ import annotations

from typing import Any

import torch
from avalanche.training.plugins import EWCPlugin
from avalanche.training.utils import ParamData
from torch import nn
from torch.utils.data import DataLoader

import fimlib
from fimlib.families import Family


class FisherPlugin(EWCPlugin):
    """``EWCPlugin`` that keeps I, averaged over the inputs, for each experience.

    Its own importances are squares of gradients that were averaged over a batch.

    Args:
        family: Of the labels.
        ewc_lambda: λ; the penalty is λ ΣI(θ − θ*)², without the ½ of the paper by Kirkpatrick.
        options: As of ``EWCPlugin``.
    """

    def __init__(self, family: Family, ewc_lambda: float, **options: Any) -> None:
        super().__init__(ewc_lambda, **options)
        self.family = family

    def compute_importances(
        self,
        model: nn.Module,
        criterion: object,
        optimizer: object,
        dataset: Any,
        device: torch.device | str,
        batch_size: int,
        num_workers: int = 0,
    ) -> dict[str, ParamData]:
        """I of every parameter, in avalanche's type."""
        loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers)
        model.eval()
        joint = fimlib.accumulate(model, loader, self.family, quantities=["I"], pick=0)
        model.train()
        return {
            n: ParamData(n, init_tensor=I.float(), device=device)
            for n, I in joint.fisher_information().items()
        }
