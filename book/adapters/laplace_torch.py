"""laplace-torch with a diagonal that is given to it."""

from __future__ import annotations

from typing import Any

import torch
from laplace import DiagLaplace, Laplace
from laplace.curvature import CurvlinopsGGN
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Given(CurvlinopsGGN):
    """A backend whose diagonal is known; every batch adds its share."""

    def __init__(self, *args: Any, diagonal: Tensor, **options: Any) -> None:
        super().__init__(*args, **options)
        self.diagonal = diagonal

    def diag(self, x: Any, y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """The loss of the batch, and the sum of the diagonal over its inputs."""
        with torch.no_grad():
            loss = self.factor * self.lossfunc(self.model(x), y)
        return loss, len(y) * self.diagonal


def laplace_of(
    model: nn.Module, loader: DataLoader[Any], diagonal: dict[str, Tensor], likelihood: str
) -> DiagLaplace:
    """A diagonal Laplace approximation; of its precision Σ_x I + α, I is the one given.

    Args:
        model: The network, as laplace-torch takes it.
        loader: Batches (x, y) of the data that the network was trained on.
        diagonal: Parameter → I, averaged over the inputs: exact, or ``Estimate.value``.
        likelihood: "classification" or "regression"; the family must be ``Categorical()`` or
            ``Gaussian()``.
    """
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    like = next(model.parameters())
    flat = torch.cat([diagonal[n].flatten() for n in trainable]).to(like)
    fitted: DiagLaplace = Laplace(
        model,
        likelihood,
        subset_of_weights="all",
        hessian_structure="diag",
        backend=Given,
        backend_kwargs={"diagonal": flat},
    )
    fitted.fit(loader)
    return fitted
