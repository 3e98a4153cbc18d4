r"""J and S through BackPACK, as the paper computed them (Appendix E.I).

BackPACK differentiates losses, so output a is wrapped into one whose residual is e_a/2: with
``loss = ‖h − y‖²`` and ``y = h − e_a/2``, the gradient is J^a and the Hessian's diagonal is
``2‖J‖² + S^a``. That takes T backward passes and keeps everything dense.
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn

from fimlib.derivatives import Block, Derivatives


def differentiate(model: nn.Module, x: Tensor) -> Derivatives:
    """J and S by T passes of BackPACK over a copy of the model; see ``fimlib.differentiate``."""
    try:
        import backpack
        from backpack.extensions import BatchDiagHessian, BatchGrad
    except ImportError as error:
        raise ImportError(
            "engine='backpack' needs BackPACK: pip install backpack-for-pytorch, or use the "
            "layerwise engine."
        ) from error
    if any(True for _ in model.buffers()):
        raise NotImplementedError(
            "the backpack engine takes modules without buffers (no batch norm): their second "
            "derivatives are not implemented there."
        )
    model = copy.deepcopy(model).requires_grad_(True)
    net, loss = backpack.extend(model), backpack.extend(nn.MSELoss(reduction="sum"))
    names = [name for name, _ in model.named_parameters()]
    gradients: dict[str, list[Tensor]] = {name: [] for name in names}
    hessians: dict[str, list[Tensor]] = {name: [] for name in names}
    num_outputs = check_outputs(model, x)
    for a in range(num_outputs):
        outputs = net(x)
        half = torch.zeros_like(outputs)
        half[:, a] = 0.5
        with backpack.backpack(BatchGrad(), BatchDiagHessian()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's and BackPACK's own notices on hooks
            try:
                loss(outputs, outputs.detach() - half).backward()
            except NotImplementedError as error:
                raise NotImplementedError(
                    f"BackPACK has no second derivative for a module of this network: {error}"
                ) from error
        for name, parameter in model.named_parameters():
            if not hasattr(parameter, "grad_batch"):
                raise NotImplementedError(
                    f"BackPACK did not reach parameter {name!r}: the network must be made of "
                    "modules that BackPACK knows, in an nn.Sequential."
                )
            gradients[name].append(parameter.__dict__.pop("grad_batch"))
            hessians[name].append(parameter.__dict__.pop("diag_h_batch"))
    blocks = []
    for name in names:
        J = torch.stack(gradients[name], dim=1).detach()
        S = torch.stack(hessians[name], dim=1).detach() - 2 * J.square().sum(1, keepdim=True)
        blocks.append(Block(name.rpartition(".")[0], J, S, {name: None}))
    return Derivatives(outputs.detach(), tuple(blocks))


def check_outputs(model: nn.Module, x: Tensor) -> int:
    """T, the number of outputs; a ValueError if they are not [B, T]."""
    with torch.no_grad():
        try:
            shape = model(x).shape
        except RuntimeError as error:
            raise ValueError(
                f"the input {list(x.shape)} does not fit the model: {error}"
            ) from error
    if len(shape) != 2 or shape[0] != len(x):
        raise ValueError(f"the model must return [B, T] outputs, got {list(shape)}.")
    return int(shape[1])
