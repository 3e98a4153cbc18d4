r"""First and second derivatives J = ∂h, S = ∂²h of a network's outputs, per parameter (Section 3).

For one scalar parameter θᵢ, J = ∂ᵢh and S = ∂²ᵢᵢh are vectors of length T. For a linear layer with
input z, both factor: ``J[W_oj] = J_o z_j`` and ``S[W_oj] = S_o z_j²``, where J_o and S_o are first
and second derivatives with respect to the layer's o-th output (its pre-activation). So that is
what is kept; nothing of size outputs × parameters is built unless it is asked for.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fimlib.diagonal import Diagonal, Term


@dataclass(frozen=True)
class Block:
    """J and S of parameters that share their left factors.

    Attributes:
        layer: Name of the layer in the network.
        J: [B, T, *K], left factor of the first derivatives.
        S: [B, T, *K], left factor of the second derivatives; None where only first ones were
            asked for.
        inputs: For every parameter its right factor z, [B, n], or None where it is 1
            (a bias, or a parameter whose derivatives are kept dense).
    """

    layer: str
    J: Tensor
    S: Tensor | None
    inputs: Mapping[str, Tensor | None]

    def at(self, inputs: slice | Tensor) -> Block:
        """The same at some of the inputs."""
        S = None if self.S is None else self.S[inputs]
        factors = {n: None if z is None else z[inputs] for n, z in self.inputs.items()}
        return Block(self.layer, self.J[inputs], S, factors)

    @property
    def second(self) -> Tensor:
        """S; a ValueError where there is none."""
        if self.S is None:
            raise ValueError(
                "these derivatives are of first order only, and this quantity needs the second: "
                "differentiate(..., order=2), or for a network whose second derivatives no engine "
                "knows, fimlib.hutchinson_variance_i2."
            )
        return self.S


@dataclass(frozen=True)
class Derivatives:
    """J and S of all parameters at B inputs.

    Attributes:
        outputs: The network's outputs h, [B, T].
        blocks: From the first layer to the last.
        engine: Which engine made them; of those in ``APPROXIMATE``, S is an approximation.
        projected: Whether J and S are those of the residuals' directions J·δ_k already, as
            ``Family.directions_of_labels`` says, and not those of the outputs.
    """

    outputs: Tensor
    blocks: tuple[Block, ...]
    engine: str = ""
    projected: bool = False

    def at(self, inputs: slice | Tensor) -> Derivatives:
        """The same at some of the inputs."""
        blocks = tuple(block.at(inputs) for block in self.blocks)
        return replace(self, outputs=self.outputs[inputs], blocks=blocks)

    def first_order(self) -> Derivatives:
        """The same without S."""
        return replace(self, blocks=tuple(replace(block, S=None) for block in self.blocks))

    def contract(self, form: Callable[[Block], Tensor], degree: int) -> Diagonal:
        """Apply a form to every parameter's derivatives.

        Args:
            form: Maps a block to [B, *K]; it reads J and S along their axis 1. It must be
                homogeneous, of the given degree if J counts once and S twice: then the form of
                an outer product is the outer product of the forms.
            degree: That degree.
        """

        def term(block: Block) -> Term:
            left = form(block)
            factors = block.inputs.items()
            return Term(
                block.layer,
                left,
                {n: None if z is None else power(z.to(left.dtype), degree) for n, z in factors},
            )

        return Diagonal(tuple(map(term, self.blocks)))

    def jacobian(self, name: str) -> Tensor:
        """J of one parameter, dense: [B, T, *shape]."""
        return self._dense(name, "J", 1)

    def second(self, name: str) -> Tensor:
        """S of one parameter, dense: [B, T, *shape]."""
        return self._dense(name, "second", 2)

    def _dense(self, name: str, which: str, degree: int) -> Tensor:
        for block in self.blocks:
            if name in block.inputs:
                left, z = getattr(block, which), block.inputs[name]
                if z is None:
                    return left.clone()  # type: ignore[no-any-return]
                return torch.einsum("bt...,bn->bt...n", left, power(z, degree))
        known = ", ".join(n for block in self.blocks for n in block.inputs)
        raise KeyError(f"no parameter {name!r}; there are: {known}")


@dataclass(frozen=True)
class Batch:
    """B inputs after their forward pass, whose J and S come when they are asked for.

    A backward sweep carries T or more rows for every input. What it carries for a few inputs at a
    time stays in the processor's cache; for small networks that decides the speed.

    Attributes:
        outputs: The network's outputs h at all of them, [B, T].
        inputs: The layer of every block, and its right factors at all of them, as in ``Block``.
        sweep: From some of the inputs, a slice or positions, to the derivatives there.
        size: How many inputs to take at a time.
        engine: As in ``Derivatives``.
        projected: As in ``Derivatives``.
    """

    outputs: Tensor
    inputs: tuple[tuple[str, Mapping[str, Tensor | None]], ...]
    sweep: Callable[[slice | Tensor], Derivatives]
    size: int
    engine: str
    projected: bool = False

    @classmethod
    def of(cls, derivs: Derivatives) -> Batch:
        """Derivatives that are there already, in one piece."""
        inputs = tuple((block.layer, block.inputs) for block in derivs.blocks)
        size = max(1, len(derivs.outputs))
        return cls(derivs.outputs, inputs, derivs.at, size, derivs.engine, derivs.projected)

    def derivatives(self) -> Derivatives:
        """Those at all inputs."""
        return replace(self.sweep(slice(None)), engine=self.engine)

    def at(self, inputs: Tensor) -> Derivatives:
        """Those at some of the inputs, by position."""
        return self.sweep(inputs)

    def pieces(self) -> Iterator[tuple[slice, Derivatives]]:
        """The inputs in order, ``size`` at a time, and the derivatives there; one piece of none."""
        for start in range(0, max(1, len(self.outputs)), self.size):
            at = slice(start, start + self.size)
            yield at, self.sweep(at)


def all_finite(x: Tensor) -> bool:
    """Whether no entry is NaN or infinite; mostly one sum shows it."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def power(z: Tensor, degree: int) -> Tensor:
    """The power 1, 2 or 4 of z, by squaring."""
    return z if degree == 1 else power(z.square(), degree // 2)


FIRST_AXIS = "the first axis must count the inputs"
WRAPPER = (
    "for a network that takes a dict or several tensors write a module with one that unpacks it "
    '(see "Bring your own network" in the book).'
)
EXACT = ("layerwise", "traced", "backpack", "functional")
APPROXIMATE = ("becker-lecun", "hesscale")

Seeds = Callable[[Tensor], Tensor | None]


def differentiate(
    model: nn.Module,
    x: Tensor,
    *,
    engine: str = "auto",
    order: int = 2,
    layers: Sequence[str] | None = None,
) -> Derivatives:
    r"""J = ∂h and S = ∂²h of every parameter, exactly, at each of B inputs.

    S vanishes in a last layer that is linear (Remark 4.4); one layer before, it is
    ``w_out σ''(s) z²`` (Remark 4.5). The weights, the mode and ``requires_grad`` of the model are
    left as they are. Frozen parameters are reported like all others.

    Args:
        model: Maps x to natural parameters of shape [B, T]; in eval mode, float32 or float64.
        x: [B, ...], the inputs, of the model's dtype (or integers, where it embeds them) and on its
            device.
        engine: "layerwise" (``nn.Sequential`` of ``Linear``, elementwise activations, ``Dropout``,
            ``Flatten``, ``Identity``; anything without parameters before the first ``Linear``),
            "traced" (any ``forward()`` made of linear operations, elementwise functions and
            products: convolutional and residual networks, gates, norms, softmax), "functional"
            (any module, tied parameters too; S takes a pass for every parameter), "backpack" (the
            paper's way: ``nn.Sequential`` of what BackPACK has second derivatives for; keeps J and
            S dense, much slower, and rounds S to about the precision of ‖J‖²), "becker-lecun" and
            "hesscale" (J exact, S approximate), or "auto": the first of the first three that
            supports the model, "functional" with order=2 only up to 10,000 parameters; ``plan``
            says which.
        order: 2, or 1 for J alone: all that I, V₁, Î₁ and their bounds need, and cheaper.
        layers: Names of modules, e.g. ["0", "head"]: only the parameters inside them are reported,
            and work for others is saved. None: all.

    Raises:
        ValueError: random layers are in training mode; weights or inputs are NaN or infinite;
            shapes or dtypes do not fit; the engine or a layer is unknown.
        NotImplementedError: no engine supports a module, or it cannot be copied; or what autograd
            says is not the derivative of the outputs, as with ``detach()`` or a straight-through
            estimator; or the outputs for one input depend on the others of the batch. The message
            names the module, and a remedy that works if there is one.
        ImportError: BackPACK is asked for and not installed.
        TypeError: the model is no module, or x no tensor.

    Precision: that of the model's dtype. J and S of torch's activations have closed forms, to a
    relative error of 1e-10 for pre-activations in [−50, 50]; inside the kernels of ``nn.GRU`` and
    ``nn.LSTM``, and where an activation works in place under "functional", they are torch's own,
    which lose digits in proportion to 1/(1 − |σ|).

    Check: at up to 8 inputs J is compared with difference quotients of the outputs, in float64, a
    sample of the entries of S with those of J, and the outputs of these inputs together with those
    of each alone. A fault in few entries of S in one layer can escape it.

    Cost: that of the check, one forward pass, and one backward sweep that carries T + U rows for
    each of the B inputs, U the hidden units behind the next layer: split large batches where memory
    is short (``accumulate`` does). "traced" carries one row for every unit with curvature, and goes
    input by input where inputs share a tensor without a batch axis, or a parameter is used in more
    than one place. With order=1, T rows. "functional" takes one pass for every parameter, or T with
    order=1.

    Example: h = w·tanh(v·x) at x = 1, v = 0, w = 3: ∂h/∂v = w tanh'(0) = 3, ∂²h/∂v² = 0.
        >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False))
        >>> _ = nn.init.zeros_(net[0].weight), nn.init.constant_(net[2].weight, 3.0)
        >>> d = differentiate(net, torch.ones(1, 1))
        >>> float(d.jacobian("0.weight")), float(d.second("0.weight")) == 0.0
        (3.0, True)
    """
    from fimlib._choose import checked

    model = check_module(model)
    x = x.detach().clone() if isinstance(x, Tensor) else x  # what is kept of it is not the caller's
    return checked(model, x, engine, order, selected(model, layers)).batch.derivatives()


def selected(model: nn.Module, layers: Sequence[str] | None) -> frozenset[str] | None:
    """Names of the parameters inside the named modules; None for all."""
    if layers is None:
        return None
    if isinstance(layers, str):
        raise ValueError(f"layers must be a list of names of modules, got the string {layers!r}.")
    parameters = [name for name, _ in model.named_parameters()]
    found: set[str] = set()
    for layer in layers:
        inside = [n for n in parameters if layer == "" or n.startswith(f"{layer}.")]
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


def check_plain(model: nn.Module) -> None:
    """Refuse what the engines cannot see: hooks, replaced forward passes."""
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
        if not all(isinstance(hook, PARAMETRISATIONS) for hook in hooks_of(module)):
            raise NotImplementedError(
                f"module {name!r} ({type(module).__name__}) has a hook, which an engine would "
                "miss: remove it, by handle.remove() of the handle that its registration returned."
            )
        if "forward" in vars(module):
            raise NotImplementedError(
                f"module {name!r} ({type(module).__name__}) has a replaced forward(), which an "
                "engine would miss: make it a method of a class of its own."
            )
    if next(model.parameters(), None) is None:
        raise ValueError("the model has no parameters: there is nothing to differentiate in.")


def tied(model: nn.Module) -> tuple[str, str] | None:
    """Two names of one and the same parameter, if there are such."""
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
    """Afterwards the generators are as before, whatever a model has drawn."""
    return torch.random.fork_rng([x.device] if isinstance(x, Tensor) and x.is_cuda else [])


def check_no_global_hooks() -> None:
    """Refuse hooks on all modules, for the engines that know modules by their types."""
    if modules._global_forward_hooks or modules._global_forward_pre_hooks:
        raise NotImplementedError(
            "a global forward hook (torch.nn.modules.module.register_module_forward_hook) may "
            "change what every module computes: remove it, or take engine='traced'."
        )


EMPTY = (dict, OrderedDict, set)  # types that ``separate`` copies by hand where they hold nothing


def separate(model: nn.Module) -> nn.Module:
    """A copy to be called, so that nothing that a call changes is the caller's.

    Raises:
        NotImplementedError: the model holds what cannot be copied.
    """
    # autograd forbids copies of what it has computed; where these are used, the copies show up as
    # no parameters
    kept = (t for m in model.modules() for t in tensors(vars(m)) if t.grad_fn is not None)
    memo: dict[int, Any] = {id(t): t.detach().clone().requires_grad_() for t in kept}
    # the many empty dicts of hooks are most of what deepcopy() would take its time for
    values = (v for m in model.modules() for v in vars(m).values())
    memo |= {id(v): type(v)() for v in values if type(v) in EMPTY and not v}
    try:
        own = copy.deepcopy(model, dict(memo))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # every attribute may have its own
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


def is_copyable(module: nn.Module, memo: dict[int, Any]) -> bool:
    """Whether the module's own attributes can be copied, those inside it left out."""
    try:
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


def call(model: nn.Module, x: Tensor, *, grad: bool = False) -> Tensor | None:
    """The outputs, without a graph, if there are any and they are finite."""
    try:
        with torch.set_grad_enabled(grad):
            h = model(x.clone())
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # whatever a module raises at a batch, or at weights, that it rejects
        return None
    return h.detach() if isinstance(h, Tensor) and bool(torch.isfinite(h).all()) else None


def perturb(model: nn.Module, strength: float) -> None:
    """Move all weights at random, by so much of their size, those that are 0 as well."""
    if strength == 0:
        return
    generator = torch.Generator("cpu").manual_seed(0)  # not the caller's
    for parameter in model.parameters():
        parameter.data += strength * random_step(parameter.detach(), generator)


def random_step(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers as large as a parameter's, or as they may become where all are 0."""
    parameter = parameter.detach()
    size = parameter.square().mean().sqrt()
    fallback = max(1, parameter[:1].numel()) ** -0.5 if parameter.ndim else 1.0
    noise = torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter)
    return torch.where(size > 0, size, torch.full_like(size, fallback)) * noise


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


def check_module(model: object) -> nn.Module:
    """The network; where torch.compile has wrapped it, the one inside.

    Raises:
        TypeError: it is no module.
        NotImplementedError: a module inside it is compiled.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise TypeError(f"{model.__name__} is a class: make an instance of it.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be an nn.Module, got {type(model).__name__}.")
    found: nn.Module = model.get_submodule("_orig_mod") if is_compiled(model) else model
    for name, module in found.named_modules():
        if is_compiled(module):
            raise NotImplementedError(
                f"module {name!r} is compiled by torch.compile, which hides its forward pass: put "
                "its _orig_mod, the module as it was before, in its place."
            )
    return found


def is_compiled(module: nn.Module) -> bool:
    """Whether it is what torch.compile makes of a module."""
    return type(module).__module__.startswith("torch._dynamo")


def short(error: Exception, most: int = 160) -> str:
    """What kind of error it is, and the first sentence of what it says."""
    lines = str(error).strip().splitlines() or [""]
    said = lines[0].partition(". ")[0].rstrip(".")
    said = said if len(said) <= most else f"{said[:most]} …"
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


class ForwardError(ValueError):
    """The forward pass fails on the inputs, or its outputs are not what they must be."""


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
    own, inside = separate(model), list[str]()

    def leave(*_: Any) -> None:
        inside.pop()

    for name, module in own.named_modules():
        label = f" in module {name!r} ({type(module).__name__})" if name else ""
        module.register_forward_pre_hook(lambda *_, label=label: inside.append(label))
        module.register_forward_hook(leave)
    try:
        with torch.enable_grad():
            outputs = own(x.clone())
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # every network may raise its own
        raise failed(x, error, inside[-1] if inside else "") from error
    check_outputs(outputs, len(x))


def check_outputs(outputs: Any, size: int) -> None:
    """A ForwardError unless the outputs for so many inputs are a finite [B, T] tensor."""
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
    if not torch.isfinite(outputs).all():
        raise ForwardError(
            "the outputs hold NaN or infinite values: the weights are too large, or forward() has "
            f"no value for {size} of these inputs at a time."
        )


def to_rows(outputs: Any, size: int) -> str:
    """What makes one row of outputs for each input of what a model returns."""
    if not isinstance(outputs, Tensor):
        return 'return its tensor, by a wrapper (see "Bring your own network" in the book)'
    if outputs.ndim == 0:
        return "return the outputs of each input, and no loss"
    if len(outputs) != size:
        return f"{FIRST_AXIS}, and no squeeze() may drop it"
    if outputs.ndim == 1:
        return "add an axis, h[:, None]"
    return (
        "a family describes one label per input, and not one for every position. Write a module "
        "around it that picks one, as h[:, -1] of [B, L, V], or pools them, as h.mean((2, 3)) of "
        "[B, C, H, W]"
    )


def add_axis(x: Tensor) -> str:
    """What makes a batch of a tensor with less than two axes."""
    if x.ndim == 1 and not (x.is_floating_point() or x.is_complex()):
        return "for one index per input add an axis, x[:, None], and take x[:, 0] in forward()"
    return "for a single input add a batch dimension, x[None]"


def check_model(model: nn.Module, x: Tensor) -> None:
    """Raise a ValueError that says what to do if derivatives at x would be random or undefined."""
    check_module(model)
    if not isinstance(x, Tensor):
        raise TypeError(
            f"the input must be a tensor, got {type(x).__name__}: convert it, e.g. by "
            f"torch.as_tensor(x, dtype=...); {WRAPPER}"
        )
    if x.is_meta:
        raise ValueError("the input is on the meta device and has no values.")
    if x.layout != torch.strided:
        raise ValueError(f"the input is {x.layout}: pass a dense tensor, x.to_dense().")
    if torch.is_autocast_enabled(x.device.type):
        raise ValueError("torch.autocast is on and would round the derivatives: leave it first.")
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
