"""Networks, inputs and outputs that no engine can use, refused in words that help."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.spectral_norm import SpectralNorm

from fimlib.derivatives import all_finite
from fimlib.engines.model import PARAMETRISATIONS, hooks_of, is_compiled, is_sharded, private_copy
from fimlib.memory import raise_if_out_of_memory

WITHOUT_FLOAT64 = ("mps",)  # devices; moments and checks need it
WRAPPER = (
    "a network that takes a dict or several tensors needs forward=, as lambda model, batch: "
    "model(**batch), in accumulate, estimate or summarise."
)


def check_module(model: object) -> nn.Module:
    """The network; where torch.compile has wrapped it, the one inside.

    Raises:
        TypeError: it is no module.
        ValueError: a parameter has no values here.
        NotImplementedError: a module inside it is compiled or sharded, or the wrapper has hooks.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise TypeError(f"{model.__name__} is a class: make an instance of it.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be an nn.Module, got {type(model).__name__}.")
    found: nn.Module = model.get_submodule("_orig_mod") if is_compiled(model) else model
    if found is not model and any(hooks_of(model)):
        raise NotImplementedError(
            "a hook is on what torch.compile returned, and not on the network inside it: register "
            "it on model._orig_mod."
        )
    for name, module in found.named_modules():
        if is_compiled(module):
            raise NotImplementedError(
                f"module {name!r} is compiled by torch.compile, which hides its forward pass: put "
                "its _orig_mod, the module as it was before, in its place."
            )
        if is_sharded(module):
            raise NotImplementedError(
                f"module {name!r} ({type(module).__name__}) is sharded, and this process has a "
                "part of its weights only: in every process load get_model_state_dict(model, "
                "options=StateDictOptions(full_state_dict=True)), of torch.distributed.checkpoint."
                "state_dict, into a plain network."
            )
    for name, parameter in found.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"parameter {name!r} is on the meta device, without its values: load the model "
                "without offloading parts of it."
            )
    return found


def check_plain(model: nn.Module) -> None:
    """Refuse wrappers that hide the network, and hooks that may change gradients."""
    if modules._global_backward_hooks or modules._global_backward_pre_hooks:
        raise NotImplementedError(
            "a global backward hook may change all gradients: remove it, by handle.remove() of the "
            "handle that its registration returned."
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise NotImplementedError(
                f"module {name!r} ({type(module).__name__}) spreads the batch over devices: pass "
                "model.module, the network inside it."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise NotImplementedError(
                f"module {name!r} ({type(module).__name__}) is a script module, which hides its "
                "forward pass: pass the network as it was before torch.jit."
            )
        if module._backward_hooks or module._backward_pre_hooks:
            raise NotImplementedError(
                f"module {name!r} ({type(module).__name__}) has a backward hook, which may change "
                "gradients: remove it, by handle.remove() of the handle that its registration "
                "returned."
            )
    if next(model.parameters(), None) is None:
        raise ValueError("the model has no parameters: there is nothing to differentiate in.")


def check_no_hooks(model: nn.Module) -> None:
    """Refuse hooks and replaced forward passes, for engines that know modules by their types."""
    if modules._global_forward_hooks or modules._global_forward_pre_hooks:
        raise NotImplementedError(
            "a global forward hook (torch.nn.modules.module.register_module_forward_hook) may "
            "change what every module computes, which this engine would miss."
        )
    for name, module in model.named_modules():
        if not all(isinstance(hook, PARAMETRISATIONS) for hook in hooks_of(module)):
            raise NotImplementedError(
                f"module {name!r} ({type(module).__name__}) has a hook, which this engine would "
                "miss."
            )
        if "forward" in vars(module):
            raise NotImplementedError(
                f"module {name!r} ({type(module).__name__}) has a replaced forward(), which this "
                "engine would miss."
            )


def short(error: Exception) -> str:
    """The type of an error and the first sentence of its message."""
    lines = str(error).strip().splitlines() or [""]
    said = lines[0].partition(". ")[0].rstrip(".")
    said = said if len(said) <= 160 else f"{said[:160]} …"
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


class ForwardError(ValueError):
    """The forward pass fails on the inputs, or its outputs have a wrong shape or type."""


def failed(x: Tensor, error: Exception, where: str = "") -> ForwardError:
    """The error for a forward pass that raises one."""
    return ForwardError(
        f"the forward pass fails{where} on an input of shape {list(x.shape)}: {short(error)}."
    )


def check_forward(model: nn.Module, x: Tensor) -> None:
    """Raise a ForwardError, and say so if x is a single input, unless the forward pass works."""
    try:
        run_alone(model, x)
    except ForwardError as error:
        try:
            run_alone(model, x[None])
        except ForwardError:
            raise error from None
        raise ForwardError(f"{error} For a single input pass x[None].") from error


def run_alone(model: nn.Module, x: Tensor) -> None:
    """Call a copy; a ForwardError if that fails or returns no [B, T] tensor."""
    own, inside = private_copy(model), list[str]()

    def leave(*_: Any) -> None:
        inside.pop()

    for name, module in own.named_modules():
        label = f" in module {name!r} ({type(module).__name__})" if name else ""
        module.register_forward_pre_hook(lambda *_, label=label: inside.append(label))
        module.register_forward_hook(leave)
    try:
        with torch.enable_grad():
            outputs = own(x.clone())
    except Exception as error:  # every network may raise its own
        raise_if_out_of_memory(error)
        raise failed(x, error, inside[-1] if inside else "") from error
    check_outputs(outputs, len(x))


def check_outputs(outputs: Any, size: int, *, numbers: bool = True) -> None:
    """A ForwardError unless the outputs for so many inputs are a [B, T] tensor, of finite numbers.

    With ``numbers=False`` they are not looked at, and a GPU is not waited for.
    """
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != size:
        got = list(outputs.shape) if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise ForwardError(
            f"the model must return one [B, T] tensor, here [{size}, T], got {got}: "
            f"{to_rows(outputs, size)}."
        )
    if outputs.shape[1] == 0:
        raise ForwardError("the model returns no outputs: T must be at least 1.")
    if not outputs.is_floating_point() or outputs.layout != torch.strided:
        raise ForwardError(
            f"the outputs are {outputs.dtype}, {outputs.layout}: return dense real numbers, before "
            "argmax(), round(), comparisons or to_sparse()."
        )
    if not numbers or all_finite(outputs):
        return
    if torch.isneginf(outputs).any():
        raise ForwardError(
            "some outputs are -inf: the weights are too large, or logits are masked by -inf. "
            "accumulate, estimate and summarise accept a mask for Categorical if the first inputs "
            "show it; elsewhere mask by -1e4, which a softmax also turns into 0."
        )
    raise ForwardError(
        "the outputs hold NaN or infinite values: the weights are too large, or forward() has "
        f"no value for {size} of these inputs at a time."
    )


def to_rows(outputs: Any, size: int) -> str:
    """How to make one row of outputs per input from the result of a model."""
    if not isinstance(outputs, Tensor):
        return 'return its tensor, by a wrapper (see "Bring your own network" in the book)'
    if outputs.ndim == 0:
        return "return the outputs of each input, and no loss"
    if len(outputs) != size:
        return "the first axis must count the inputs, and no squeeze() may drop it"
    if outputs.ndim == 1:
        return "add an axis, h[:, None]"
    return (
        "a family describes one label per input. For one at every position take the family "
        "fimlib.families.Positions in accumulate or estimate; else pick one, as h[:, -1] of "
        "[B, L, V], or pool them, as h.mean((2, 3)) of [B, C, H, W]"
    )


def add_axis(x: Tensor) -> str:
    """How to make a batch of a tensor with fewer than two axes."""
    if x.ndim == 1 and not (x.is_floating_point() or x.is_complex()):
        return "for one index per input add an axis, x[:, None], and take x[:, 0] in forward()"
    return "for a single input add a batch dimension, x[None]"


def check_model(model: nn.Module, x: Tensor) -> None:
    """Raise a helpful ValueError if derivatives at x would be random or undefined."""
    check_module(model)
    if not isinstance(x, Tensor):
        raise TypeError(
            f"the input must be a tensor, got {type(x).__name__}: convert it, e.g. by "
            f"torch.as_tensor(x, dtype=...); {WRAPPER}"
        )
    if x.is_meta:
        raise ValueError("the input is on the meta device and has no values.")
    if x.device.type in WITHOUT_FLOAT64:
        raise ValueError(
            f"the input is on {x.device}, which has no float64: take the CPU, model.cpu() and "
            "x.cpu()."
        )
    if x.layout != torch.strided:
        raise ValueError(f"the input is {x.layout}: pass a dense tensor, x.to_dense().")
    if torch.is_autocast_enabled(x.device.type):
        raise ValueError("torch.autocast is on and would round the derivatives: turn it off.")
    check_training(model)
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype}; derivatives need float32 or float64: "
                "call model.double() or model.float()."
            )
        if isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(
                f"parameter {name!r} has no values yet: call the model once on an input first."
            )
        if parameter.numel() == 0:
            raise ValueError(
                f"parameter {name!r} has no entries, its shape being {list(parameter.shape)}: "
                "remove its layer, or make it wider."
            )
        fits = parameter.dtype == x.dtype or not (x.is_floating_point() or x.is_complex())
        if not fits or parameter.device != x.device:
            raise ValueError(
                f"the input is {x.dtype} on {x.device}, parameter {name!r} is {parameter.dtype} on "
                f"{parameter.device}: convert one of them with .to(...)."
            )
        if not all_finite(parameter.detach()):
            raise ValueError(
                f"parameter {name!r} holds NaN or infinite values: the training diverged or the "
                "file is damaged. Restore finite weights first."
            )
    if x.ndim < 2:
        raise ValueError(
            f"the input must have shape [B, ...] with B ≥ 1, got {list(x.shape)}: {add_axis(x)}."
        )
    if len(x) == 0:
        raise ValueError(f"there are no inputs: the shape is {list(x.shape)}; pass B ≥ 1.")
    if not all_finite(x):
        raise ValueError("the input holds NaN or infinite values.")


def check_training(model: nn.Module) -> None:
    """A ValueError if the outputs are random, or depend on the other inputs of the batch."""
    for name, module in model.named_modules():
        # Batch norm mixes the inputs of a batch; the others draw random numbers.
        dropout = module.p if isinstance(module, _DropoutNd) else 0.0
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            dropout = module.dropout
        is_moving = isinstance(module, nn.RReLU | _BatchNorm) or any(
            isinstance(hook, SpectralNorm) for hook in hooks_of(module)
        )
        if module.training and (dropout > 0 or is_moving):
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) is in training mode, so the outputs "
                "are random, change with every call or depend on the other inputs of the batch. "
                "Call model.eval() first."
            )
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) has no running statistics, so that it "
                "normalises by those of the batch in eval mode, too: make it with "
                "track_running_stats=True, and train it."
            )
