"""A user's network: copies of it, calls of the copies, its parameters by their names."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from fimlib.derivatives import all_finite
from fimlib.memory import raise_if_out_of_memory


def selected(model: nn.Module, layers: Sequence[str] | str | None) -> frozenset[str] | None:
    """Names of the parameters inside the named modules, or of those named; None for all."""
    if layers is None:
        return None
    if layers == "trainable":
        trainable = frozenset(n for n, p in model.named_parameters() if p.requires_grad)
        if not trainable:
            raise ValueError("no parameter of the model requires grad, so none is trainable.")
        return trainable
    if isinstance(layers, str):
        raise ValueError(
            f"layers must be a list of names, or 'trainable', got the string {layers!r}."
        )
    parameters = [name for name, _ in model.named_parameters()]
    found: set[str] = set()
    for layer in layers:
        inside = [n for n in parameters if layer in ("", n) or n.startswith(f"{layer}.")]
        if not inside:
            known = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
            raise ValueError(
                f"no layer {layer!r} with parameters; there are: {', '.join(map(repr, known))}."
            )
        found.update(inside)
    if not found:
        raise ValueError("layers names no module: pass at least one, or None for all.")
    return frozenset(found)


# Hooks that make a weight of other parameters, before each call and of these alone.
PARAMETRISATIONS = (BasePruningMethod, WeightNorm, SpectralNorm)


def hooks_of(module: nn.Module) -> Iterator[object]:
    """The hooks on a module itself that have a part in its calls or gradients."""
    for hooks in (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    ):
        yield from hooks.values()


def tied(model: nn.Module) -> tuple[str, str] | None:
    """Two names of the same parameter, if any parameter has two."""
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(parameter), name)
        if first != name:
            return first, name
    return None


def call_with(model: nn.Module, values: Mapping[str, Tensor], x: Tensor) -> Any:
    """The outputs with other values of the named parameters, wherever these are used.

    torch's own way to follow ties restores a module that stands under two names wrongly. So every
    place that holds one of the parameters is named here, and named once.
    """
    owners: dict[int, str] = {}
    places: dict[tuple[int, str], str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), name)
        path, _, attribute = name.rpartition(".")
        places.setdefault((id(model.get_submodule(path)), attribute), name)
    of = {name: owners[id(model.get_parameter(name))] for name in places.values()}
    everywhere = {name: values[owner] for name, owner in of.items() if owner in values}
    return torch.func.functional_call(model, everywhere, (x.clone(),), tie_weights=False)


def kept_random_state(x: object) -> AbstractContextManager[None]:
    """Restore the random generators afterwards, in case a model draws numbers."""
    if not isinstance(x, Tensor) or x.device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([x.device], device_type=x.device.type)


@contextmanager
def exact_kernels(model: nn.Module) -> Iterator[None]:
    """Let cuDNN keep all digits of float32, and leave recurrent layers to PyTorch.

    By default it convolves in TF32, with 10 bits, and refuses their backward pass in eval mode.
    """
    cudnn = torch.backends.cudnn
    is_recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with cudnn.flags(
        enabled=cudnn.enabled and not is_recurrent,
        benchmark=cudnn.benchmark,
        benchmark_limit=None,
        deterministic=cudnn.deterministic,
        allow_tf32=False,
    ):
        yield


@contextmanager
def differentiating(model: nn.Module, x: object) -> Iterator[None]:
    """PyTorch set as derivatives of a model at x need it, and as it was afterwards."""
    with torch.inference_mode(False), exact_kernels(model), kept_random_state(x):
        yield


EMPTY = (dict, OrderedDict, set)  # empty ones are copied by hand


def private_copy(model: nn.Module, around: nn.Module | None = None) -> nn.Module:
    """A copy to be called, so that nothing that a call changes is the caller's.

    It is built ``around`` the parameters of an earlier copy, if there is one.

    Raises:
        NotImplementedError: an attribute of the model cannot be copied.
    """
    # deepcopy() would spend most of its time on the many empty dicts of hooks
    values = (v for m in model.modules() for v in vars(m).values())
    memo: dict[int, Any] = {id(v): type(v)() for v in values if type(v) in EMPTY and not v}
    if around is not None:
        memo |= zip(map(id, model.parameters()), around.parameters(), strict=True)
    try:
        with ComputedToo():
            own = copy.deepcopy(model, dict(memo))
    except Exception as error:  # every attribute may have its own
        raise_if_out_of_memory(error)
        holders = (n for n, m in model.named_modules() if not is_copyable(m, dict(memo)))
        name = next(holders, "")
        raise NotImplementedError(
            f"module {name!r} ({type(model.get_submodule(name)).__name__}) cannot be copied, which "
            f"keeps yours as it is: {error}. Remove the attribute that cannot, or give the class a "
            "__deepcopy__."
        ) from error
    for module in own.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False  # the same gradients, which can be read
    return own


class ComputedToo(TorchFunctionMode):
    """Copies results of autograd as leaves, so that their use in a forward pass shows."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, unless it would copy such a tensor."""
        if func is not Tensor.__deepcopy__ or args[0].grad_fn is None:
            return func(*args, **(kwargs or {}))
        t, memo = args
        return memo.setdefault(id(t), t.detach().clone().requires_grad_())


def is_copyable(module: nn.Module, memo: dict[int, Any]) -> bool:
    """Whether the module's own attributes can be copied, those inside it left out."""
    try:
        with ComputedToo():
            copy.deepcopy({k: v for k, v in vars(module).items() if k != "_modules"}, memo)
    except Exception:  # the one that is being explained
        return False
    return True


def tensors(values: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple | dict):
        for value in values.values() if isinstance(values, dict) else values:
            yield from tensors(value)


def finite_outputs(model: nn.Module, x: Tensor, *, grad: bool = False) -> Tensor | None:
    """The outputs, without a graph, if there are any and they are finite."""
    try:
        with torch.set_grad_enabled(grad):
            h = model(x.clone())
    except Exception as error:  # of any kind, from a batch or weights that a module rejects
        raise_if_out_of_memory(error)
        return None
    return h.detach() if isinstance(h, Tensor) and all_finite(h) else None


def perturb_weights(model: nn.Module, strength: float) -> None:
    """Move all weights at random by a share of their size, weights of 0 too."""
    if strength == 0:
        return
    generator = torch.Generator("cpu").manual_seed(0)  # not the caller's
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter)
        parameter.data += strength * size_of(parameter) * noise


def size_of(parameter: Tensor) -> Tensor:
    """The size of a parameter's entries; the size at initialisation where all are 0."""
    size = torch.linalg.vector_norm(parameter.detach()) / parameter.numel() ** 0.5
    return or_initial(size, parameter)


def or_initial(sizes: Tensor, parameter: Tensor) -> Tensor:
    """Sizes of a parameter's entries, with that at initialisation where they are 0."""
    initial = max(1, parameter[:1].numel()) ** -0.5 if parameter.ndim else 1.0
    return sizes.masked_fill(sizes == 0, initial)


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two batches of rows agree up to rounding, each column in units of its own size.

    How the numbers of one input are rounded depends on the size of its batch.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or not b.numel():
        return torch.equal(a, b)
    eps, size = torch.finfo(a.dtype).eps, b.detach().abs()
    slack = 4 * eps**0.5 * size.amax(0) + 16 * eps * size.amax()
    return bool(((a - b).abs() <= slack).all())


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile made this module."""
    return type(module).__module__.startswith("torch._dynamo")


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP made this module, or its parameters are spread over processes."""
    kinds = {*type(module).__mro__, *map(type, module.parameters(recurse=False))}
    return any(kind.__module__.startswith(SHARDED) for kind in kinds)


SHARDED = ("torch.distributed.fsdp", "torch.distributed.tensor")
