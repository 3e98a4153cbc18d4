r"""J and S through BackPACK, as the paper computed them (Appendix E.I).

BackPACK differentiates losses, so output a is wrapped into one whose residual is e_a/2: with
``loss = ‖h − y‖²`` and ``y = h − e_a/2``, the gradient is J^a and the Hessian's diagonal is
``2‖J‖² + S^a``. That takes T backward passes and keeps everything dense.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from fimlib.derivatives import Block, Derivatives
from fimlib.engines.checks import check_no_hooks, check_outputs, failed, short
from fimlib.engines.model import private_copy, tensors
from fimlib.memory import raise_if_out_of_memory


def differentiate(
    model: nn.Module, x: Tensor, *, order: int = 2, wanted: frozenset[str] | None = None
) -> Derivatives:
    """J and S by T passes of BackPACK over a copy of the model; see ``fimlib.differentiate``."""
    check_no_hooks(model)
    return passes(private_copy(model), x, order, wanted)


def passes(model: nn.Module, x: Tensor, order: int, wanted: frozenset[str] | None) -> Derivatives:
    """One backward pass for each of the T outputs, over a model that nobody else has."""
    try:
        import backpack
        from backpack.extensions import BatchDiagHessian, BatchGrad
    except ImportError as error:
        raise ImportError(
            "engine='backpack' needs BackPACK: pip install backpack-for-pytorch."
        ) from error
    check_modules(model)
    num_outputs = count_outputs(model, x)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted is None or name in wanted)
    for module in model.modules():
        if hasattr(module, "inplace"):
            vars(module)["inplace"] = False  # BackPACK's hooks cannot follow it
    net, loss = backpack.extend(model), backpack.extend(nn.MSELoss(reduction="sum"))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    gradients: dict[str, list[Tensor]] = {name: [] for name in names}
    hessians: dict[str, list[Tensor]] = {name: [] for name in names}
    extensions = (BatchGrad(), BatchDiagHessian())[:order]
    for a in range(num_outputs):
        with (
            torch.enable_grad(),
            backpack.backpack(*extensions),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # torch's and BackPACK's own notices on hooks
            outputs = net(x.clone())
            half = torch.zeros_like(outputs)
            half[:, a] = 0.5
            try:
                loss(outputs, outputs.detach() - half).backward()
            except (RuntimeError, AssertionError) as error:
                raise_if_out_of_memory(error)
                blamed = [
                    (n, type(m).__name__) for n, m in leaves(model) if str(type(m)) in str(error)
                ]
                where = f"module {blamed[0][0]!r} ({blamed[0][1]})" if blamed else "this network"
                raise NotImplementedError(
                    f"BackPACK cannot differentiate {where}: {short(error)}."
                ) from error
        for name in names:
            found = model.get_parameter(name).__dict__
            gradients[name].append(found.pop("grad_batch"))
            if order == 2:
                hessians[name].append(found.pop("diag_h_batch"))
    blocks = []
    for name in names:
        J = torch.stack(gradients[name], dim=1).detach()
        S = None
        if order == 2:
            S = torch.stack(hessians[name], dim=1).detach() - 2 * J.square().sum(1, keepdim=True)
        blocks.append(Block(name.rpartition(".")[0], J, S, {name: None}))
    return Derivatives(outputs.detach(), tuple(blocks))


def leaves(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that hold no others, by name; one that is used twice comes twice."""
    modules = model.named_modules(remove_duplicate=False)
    return [(name, module) for name, module in modules if not any(module.children())]


def check_modules(model: nn.Module) -> None:
    """Refuse modules that BackPACK differentiates wrongly or fails on."""
    for name, module in model.named_modules():
        if any(module.children()) and type(module).forward is not nn.Sequential.forward:
            raise NotImplementedError(
                f"module {name!r} ({type(module).__name__}) has its own forward(): the backpack "
                "engine follows nn.Sequential only."
            )
    seen = set()
    for name, module in leaves(model):
        kind = f"module {name!r} ({type(module).__name__})"
        has_buffers = next(module.buffers(), None) is not None
        if not type(module).__module__.startswith("torch.nn.modules") or has_buffers:
            raise NotImplementedError(
                f"BackPACK has no second derivatives for {kind}: it knows torch's own modules, and "
                "none with buffers."
            )
        if any(t.requires_grad for t in tensors(vars(module) | {"_parameters": {}})):
            raise NotImplementedError(
                f"{kind} computes with a tensor that is made of other parameters: give it its own."
            )
        if getattr(module, "padding_mode", "zeros") != "zeros":
            raise NotImplementedError(
                f"BackPACK differentiates {kind} as if padding_mode were 'zeros'."
            )
        if id(module) in seen:
            raise NotImplementedError(f"{kind} is used twice: give every place its own module.")
        seen.add(id(module))


def count_outputs(model: nn.Module, x: Tensor) -> int:
    """T, the number of outputs; a ValueError if they are not [B, T]."""
    with torch.no_grad():
        try:
            outputs = model(x.clone())
        except RuntimeError as error:
            raise_if_out_of_memory(error)
            raise failed(x, error) from error
    check_outputs(outputs, len(x))
    return int(outputs.shape[1])
