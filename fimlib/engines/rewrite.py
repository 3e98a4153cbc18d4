"""Torch's functions in other words: the same values, and derivatives that can be relied on.

Within ``rewritten()`` torch's functions are computed by others, for three reasons:

* Of its activations, torch's derivatives lose digits far from 0, or round a constant to float32.
  Here they have those of ``activations``.
* Forward mode over forward mode through torch's norms (``native_layer_norm`` and the like) is wrong
  in torch 2.13: the second derivatives lack terms, and nothing says so.
* An engine that knows linear and elementwise functions and products knows all that is made of them.

Functions that torch writes in Python (``torch.nn.functional``) are followed inside.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

from fimlib.engines import activations
from fimlib.engines.activations import Curve

Rule = Callable[..., Any]  # called as the function in its place; NotImplemented: torch's own
Dims = int | tuple[int, ...] | list[int] | None

RULES: dict[Any, Rule] = {}
IN_PYTHON = ("torch.nn.functional", "torch.functional")
ELSEWHERE = (torch.batch_norm,)  # rules that readers of the graph do without ...
IN_NODES = (Tensor.__setitem__,)  # ... and that they alone need
GUARDS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


class Rewriting(TorchFunctionMode):
    """Calls the rules in the place of torch's functions.

    Attributes:
        node: Whether an activation becomes one node of autograd's graph, an ``Activation``, whose
            derivatives are for the reader of that graph to take.
        rules: The functions that are replaced; None: all that there are rules for, and what torch
            itself writes in Python is followed inside.
    """

    def __init__(self, *, node: bool, rules: frozenset[Any] | None = None) -> None:
        super().__init__()
        self.node, self.rules = node, rules

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the rule for func, or func itself."""
        kwargs = kwargs or {}
        if self.rules is not None and func not in self.rules:
            return func(*args, **kwargs)
        rule = rule_for(func, self.node)
        if rule is not None and takes(rule, args, kwargs):
            with self:
                result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        elif rule is None and is_written_in_python(func):
            with self:
                return body(func)(*args, **kwargs)
        return func(*args, **kwargs)


def rewritten(*, node: bool = False) -> Rewriting:
    """Compute torch's functions by the rules; see ``Rewriting``."""
    return Rewriting(node=node)


def exact_activations() -> Rewriting:
    """Derivatives of activations keep all digits; of everything else torch's own are taken."""
    return Rewriting(node=True, rules=OF_ACTIVATIONS)


def exact_lookups() -> Rewriting:
    """Every row of a table has its derivative; of everything else torch's own are taken."""
    return Rewriting(node=True, rules=OF_LOOKUPS)


def rule_for(func: Any, node: bool) -> Rule | None:
    """The rule in the place of a function, if there is one."""
    if func is elementwise:
        return None if node else expanded
    return None if func in (ELSEWHERE if node else IN_NODES) else RULES.get(func)


def takes(rule: Rule, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the rule supports these arguments."""
    try:
        inspect.signature(rule).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def is_written_in_python(func: Any) -> bool:
    """Whether torch's function is one that calls others of torch."""
    return func is Tensor.norm or (
        isinstance(func, FunctionType)
        and func.__module__ in IN_PYTHON
        and not set(GUARDS).isdisjoint(func.__code__.co_names)
    )


@cache
def body(func: FunctionType) -> Callable[..., Any]:
    """The same function without its own call to the mode that is on, so that the mode sees inside.

    It looks names up in a copy of its module, in which no tensor is an unusual one.
    """
    inside = {**func.__globals__, **dict.fromkeys(GUARDS, lambda *_: False)}
    same = FunctionType(func.__code__, inside, func.__name__, func.__defaults__, func.__closure__)
    same.__kwdefaults__ = func.__kwdefaults__
    return same


def replaces(*functions: Any) -> Callable[[Rule], Rule]:
    """Enter a rule for some functions."""

    def enter(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return enter


# Activations.


def elementwise(s: Tensor, curve: Curve) -> Tensor:
    """σ(s), to be seen by function modes as a call of one function of torch."""
    if has_torch_function_unary(s):
        found: Tensor = handle_torch_function(elementwise, (s,), s, curve)
        return found
    result: Tensor = Activation.apply(s, curve)  # type: ignore[no-untyped-call]
    return result


class Activation(torch.autograd.Function):
    """The node of an activation, which keeps what is needed for closed forms."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, curve: Curve) -> Tensor:
        """σ(s)."""
        ctx.curve = curve
        ctx.save_for_backward(s)
        return curve.value(s)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, row: Tensor) -> tuple[Tensor, None]:
        """The row times σ', which is computed once for all rows."""
        if not hasattr(ctx, "slope"):
            (s,) = ctx.saved_tensors
            ctx.slope = ctx.curve.slopes(s)[0]
        return row * ctx.slope, None


def expanded(s: Tensor, curve: Curve) -> Tensor:
    """σ(s) by its Taylor polynomial around itself, of second degree.

    Its two derivatives are those of σ in every mode, and in one inside another, where torch's own
    ways to state derivatives (an ``autograd.Function`` with jvp) drop terms.
    """
    with torch._C.DisableTorchFunction():
        at = s.detach()
        first, second = curve.slopes(at)
        step = s - at  # 0, of slope 1
        slope = first if second is None else first + step * (second / 2)
        return curve.value(at) + step * slope


def activate(curve: Curve, s: Tensor, in_place: bool = False) -> Any:
    """σ(s), which may take the place of s."""
    if not isinstance(s, Tensor) or not s.is_floating_point():
        return NotImplemented
    return s.copy_(elementwise(s.clone(), curve)) if in_place else elementwise(s, curve)


def enter_activations() -> None:
    """Those by functions without numbers, and whether they work in place."""
    plain = {
        activations.SIGMOID: (torch.sigmoid, Tensor.sigmoid, torch.special.expit),
        activations.TANH: (torch.tanh, Tensor.tanh),
        activations.TANHSHRINK: (F.tanhshrink,),
        activations.SOFTSIGN: (F.softsign,),
        activations.LOGSIGMOID: (F.logsigmoid,),
        activations.SILU: (F.silu,),
        activations.MISH: (F.mish,),
        activations.HARDSIGMOID: (F.hardsigmoid,),
        activations.HARDSWISH: (F.hardswish,),
        activations.SELU: (F.selu, torch.selu),
    }
    for curve, functions in plain.items():
        replaces(*functions)(
            lambda input, inplace=False, *, curve=curve: activate(curve, input, inplace)
        )
    within = {
        activations.SIGMOID: (torch.sigmoid_, Tensor.sigmoid_),
        activations.TANH: (torch.tanh_, Tensor.tanh_),
        activations.SELU: (torch.selu_,),
    }
    for curve, functions in within.items():
        replaces(*functions)(lambda input, curve=curve: activate(curve, input, True))


enter_activations()


@replaces(F.gelu)
def gelu(input: Tensor, *, approximate: str = "none") -> Any:
    return activate(activations.gelu(approximate), input)


@replaces(F.softplus)
def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Any:
    return activate(activations.softplus(beta, threshold), input)


@replaces(F.elu)
def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Any:
    return activate(activations.elu(alpha), input, inplace)


@replaces(F.celu, torch.celu)
def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Any:
    return activate(activations.celu(alpha), input, inplace)


@replaces(F.leaky_relu)
def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    """In place with a negative slope torch has no derivative, for it sees the results alone."""
    if not inplace or negative_slope >= 0:
        return NotImplemented
    return input.copy_(F.leaky_relu(input.clone(), negative_slope))


@replaces(F.leaky_relu_)
def leaky_relu_(input: Tensor, negative_slope: float = 0.01) -> Any:
    return leaky_relu(input, negative_slope, True)


@replaces(F.elu_)
def elu_(input: Tensor, alpha: float = 1.0) -> Any:
    return activate(activations.elu(alpha), input, True)


@replaces(torch.celu_)
def celu_(input: Tensor, alpha: float = 1.0) -> Any:
    return activate(activations.celu(alpha), input, True)


@replaces(F.rrelu)
def rrelu(
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Any:
    return NotImplemented if training else F.leaky_relu(input, (lower + upper) / 2, inplace)


@replaces(F.glu)
def glu(input: Tensor, dim: int = -1) -> Any:
    a, b = input.chunk(2, dim)
    return a * b.sigmoid()


OF_ACTIVATIONS = frozenset(RULES)


# Norms.


def centred(s: Tensor, dim: Dims) -> Tensor:
    """S less its mean over some axes."""
    return s - s.mean(dim, keepdim=True)


def normalised(s: Tensor, dim: Dims, eps: float) -> Tensor:
    """S over the root of its mean square."""
    return s * torch.rsqrt(s.square().mean(dim, keepdim=True) + eps)


def scaled(s: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Multiply by the weight, if any, and add the bias, if any."""
    s = s if weight is None else s * weight
    return s if bias is None else s + bias


def by_channel(s: Tensor, values: Tensor | None) -> Tensor | None:
    """One number for each channel of [B, C, ...], in a shape that broadcasts to that."""
    return None if values is None else values.view(1, -1, *[1] * (s.ndim - 2))


def last(shape: Sequence[int]) -> tuple[int, ...]:
    """As many of the last axes."""
    return tuple(range(-len(shape), 0))


@replaces(torch.layer_norm)
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    dim = last(normalized_shape)
    return scaled(normalised(centred(input, dim), dim, eps), weight, bias)


@replaces(torch.rms_norm)
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return scaled(normalised(input, last(normalized_shape), eps), weight, None)


@replaces(torch.group_norm)
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    groups = input.reshape(len(input), num_groups, -1)
    whole = normalised(centred(groups, -1), -1, eps).view(input.shape)
    return scaled(whole, by_channel(input, weight), by_channel(input, bias))


@replaces(torch.instance_norm)
def instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    if not use_input_stats:
        return batch_norm(input, weight, bias, running_mean, running_var, False, momentum, eps)
    if running_mean is not None:  # which torch changes
        return NotImplemented
    dim = tuple(range(2, input.ndim))
    whole = normalised(centred(input, dim), dim, eps)
    return scaled(whole, by_channel(input, weight), by_channel(input, bias))


@replaces(torch.batch_norm)
def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Any:
    if training or running_mean is None or running_var is None:
        return NotImplemented
    mean, var = (v.view(1, -1, *[1] * (input.ndim - 2)) for v in (running_mean, running_var))
    whole = (input - mean) * torch.rsqrt(var + eps)
    return scaled(whole, by_channel(input, weight), by_channel(input, bias))


@replaces(torch._weight_norm)
def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Any:
    others = [d for d in range(v.ndim) if d != dim]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))


@replaces(torch.var, Tensor.var)
def var(
    input: Tensor,
    dim: Dims | bool = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> Any:
    if isinstance(dim, bool):
        dim, unbiased = None, bool(dim)
    correction = float(unbiased) if correction is None else correction
    dims = axes(input, dim)
    size = prod(input.shape[d] for d in dims)
    squares = centred(input, dims).square().sum(dims, keepdim=keepdim)
    return squares / max(0.0, size - correction)


@replaces(torch.std, Tensor.std)
def std(input: Tensor, *args: Any, **kwargs: Any) -> Any:
    return root(torch.var(input, *args, **kwargs))


@replaces(torch.var_mean)
def var_mean(input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return torch.var(input, *args, **kwargs), mean_like(input, *args, **kwargs)


@replaces(torch.std_mean)
def std_mean(input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return torch.std(input, *args, **kwargs), mean_like(input, *args, **kwargs)


def mean_like(
    input: Tensor,
    dim: Dims | bool = None,
    unbiased: bool = True,
    keepdim: bool = False,
    **_correction: Any,
) -> Tensor:
    """The mean over the axes that a variance is taken over."""
    return input.mean(axes(input, None if isinstance(dim, bool) else dim), keepdim=keepdim)


def axes(s: Tensor, dim: Dims) -> tuple[int, ...]:
    """The axes, all if none is named."""
    if isinstance(dim, int):
        return (dim,)
    return tuple(dim) if dim else tuple(range(s.ndim))


def root(s: Tensor, degree: float = 2.0) -> Tensor:
    """S to the power of 1 / degree; where s is 0, its derivatives are taken for 0, as by torch."""
    at_0 = s == 0
    s = s.masked_fill(at_0, 1.0)
    return (s.sqrt() if degree == 2 else s.pow(1 / degree)).masked_fill(at_0, 0.0)


@replaces(torch.linalg.vector_norm)
def vector_norm(
    x: Tensor,
    ord: float = 2,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    x = x if dtype is None else x.to(dtype)
    if x.is_complex() or ord == 0:
        return NotImplemented
    dims = axes(x, dim)
    if ord in (float("inf"), -float("inf")):
        return x.abs().amax(dims, keepdim) if ord > 0 else x.abs().amin(dims, keepdim)
    if ord == 1:
        return x.abs().sum(dims, keepdim=keepdim)
    powers = x.square() if ord == 2 else x.abs().pow(ord)
    return root(powers.sum(dims, keepdim=keepdim), ord)


@replaces(torch.linalg.norm)
def norm(
    A: Tensor,
    ord: float | str | None = None,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    is_vector = isinstance(dim, int) or (dim is None and A.ndim == 1)
    if ord is None or (ord == "fro" and not is_vector):
        return torch.linalg.vector_norm(A, 2, dim, keepdim, dtype=dtype)
    if is_vector and not isinstance(ord, str):
        return torch.linalg.vector_norm(A, ord, dim, keepdim, dtype=dtype)
    return NotImplemented


@replaces(torch.cosine_similarity)
def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Any:
    lengths = [torch.linalg.vector_norm(x, dim=dim).clamp_min(eps) for x in (x1, x2)]
    return (x1 * x2).sum(dim) / (lengths[0] * lengths[1])


@replaces(torch.pairwise_distance)
def pairwise_distance(
    x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> Any:
    return torch.linalg.vector_norm(x1 - x2 + eps, p, -1, keepdim)


# Softmax and its like.


def largest(s: Tensor, dim: Dims, keepdim: bool = True) -> Tensor:
    """The maximum as a constant, which is subtracted lest exponentials overflow."""
    with torch._C.DisableTorchFunction():
        top = s.detach().amax(axes(s, dim), keepdim)
        return top.masked_fill(top.isinf(), 0.0)


@replaces(torch.softmax, Tensor.softmax, torch.special.softmax)
def softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    s = input if dtype is None else input.to(dtype)
    e = (s - largest(s, dim)).exp()
    return e / e.sum(dim, keepdim=True)


@replaces(torch.log_softmax, Tensor.log_softmax, torch.special.log_softmax)
def log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    s = input if dtype is None else input.to(dtype)
    s = s - largest(s, dim)
    return s - s.exp().sum(dim, keepdim=True).log()


@replaces(torch.logsumexp, Tensor.logsumexp, torch.special.logsumexp)
def logsumexp(input: Tensor, dim: Dims, keepdim: bool = False) -> Any:
    e = (input - largest(input, dim)).exp()
    return e.sum(axes(input, dim), keepdim=keepdim).log() + largest(input, dim, keepdim)


@replaces(torch.logaddexp, Tensor.logaddexp)
def logaddexp(input: Tensor, other: Tensor) -> Any:
    return input + F.softplus(other - input, threshold=float("inf"))


# Products and sums.


@replaces(torch.addcmul, Tensor.addcmul)
def addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    return input + value * (tensor1 * tensor2)


@replaces(torch.addcdiv, Tensor.addcdiv)
def addcdiv(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    return input + value * (tensor1 / tensor2)


@replaces(torch.lerp, Tensor.lerp)
def lerp(input: Tensor, end: Tensor, weight: Tensor | float) -> Tensor:
    return input + weight * (end - input)


@replaces(torch.prod, Tensor.prod)
def product(
    input: Tensor,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    s = input if dtype is None else input.to(dtype)
    if not s.is_floating_point() or s.numel() == 0:
        return NotImplemented
    s, axis = (s.flatten(), 0) if dim is None else (s, dim)
    while (size := s.shape[axis]) > 1:
        half = size // 2
        both = s.narrow(axis, 0, half) * s.narrow(axis, half, half)
        s = torch.cat([both, s.narrow(axis, 2 * half, size % 2)], axis) if size % 2 else both
    return s if keepdim and dim is not None else s.squeeze(axis)


@replaces(torch.bilinear)
def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    by_first = F.linear(input2, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])
    z = (by_first * input1.unsqueeze(-2)).sum(-1)
    return z if bias is None else z + bias


@replaces(torch.cdist)
def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = "") -> Any:
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)


@replaces(torch.pdist)
def pdist(input: Tensor, p: float = 2.0) -> Any:
    first, second = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return torch.linalg.vector_norm(input[first] - input[second], p, -1)


@replaces(F.scaled_dot_product_attention)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(QKᵀ/√d) V; torch's own kernels crash or refuse within transforms of torch.func."""
    if dropout_p > 0:
        return NotImplemented
    if enable_gqa:  # a key serves several queries
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    s = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    seen = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device)
    seen = seen.tril() if is_causal else seen
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        seen = seen & attn_mask
    elif attn_mask is not None:
        seen = seen & (attn_mask > -torch.inf)
        s = s + attn_mask.masked_fill(~seen, 0.0)
    some = seen.any(-1, keepdim=True)  # a query that sees no key gives 0
    p = torch.softmax(s.masked_fill(~seen & some, -torch.inf), -1)
    return p.masked_fill(~some, 0.0) @ value


@replaces(torch.embedding)
def embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Autograd leaves out the row of padding, divides others by their counts, or is sparse."""
    if padding_idx < 0 and not scale_grad_by_freq and not sparse:
        return NotImplemented
    return torch.embedding(weight, indices)


OF_LOOKUPS = frozenset({F.embedding, torch.embedding})


@replaces(torch.embedding_bag)
def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """Sums (mode 0), means (1) or maxima (2) of rows of a table, for bags of the same size."""
    count = len(offsets) - include_last_offset
    size = len(indices) // max(1, count)
    starts = size * torch.arange(len(offsets), device=offsets.device)
    if size * count != len(indices) or size == 0 or not torch.equal(offsets, starts.to(offsets)):
        return NotImplemented
    index = indices.view(count, size)
    rows = F.embedding(index, weight)
    kept = torch.ne(index, -1 if padding_idx is None else padding_idx).unsqueeze(-1)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.view(count, size, 1)
    if mode == 2:
        some = kept.any(1)
        top = rows.masked_fill(~kept, -torch.inf).max(1).values.masked_fill(~some, 0.0)
        return top, None, None, None
    total = rows.masked_fill(~kept, 0.0).sum(1)
    return (total if mode == 0 else total / kept.sum(1).clamp_min(1)), None, None, None


@replaces(F.pad)
def pad(
    input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Any:
    if mode != "circular":
        return NotImplemented
    for i, (left, right) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        size = input.shape[-1 - i]
        if min(left, right) < 0 or max(left, right) > size:
            return NotImplemented
        index = torch.arange(-left, size + right, device=input.device) % size
        input = input.index_select(input.ndim - 1 - i, index)
    return input


@replaces(Tensor.__setitem__)
def assign(s: Tensor, index: Any, value: Any) -> Any:
    """Put all of a new tensor in the place of the old one, unless that is a part of another."""
    followed = s.requires_grad or (isinstance(value, Tensor) and value.requires_grad)
    if not followed or s._is_view() or not s.is_floating_point():
        return NotImplemented
    with torch._C.DisableTorchFunction():
        places = torch.arange(s.numel(), device=s.device).view(s.shape)[index]
    value = value.to(s) if isinstance(value, Tensor) else s.new_full((), value)
    lead = max(0, value.ndim - places.ndim)  # axes of length 1
    value = value.flatten(0, lead) if lead else value
    flat = s.flatten().index_copy(0, places.flatten(), value.expand(places.shape).flatten())
    s.copy_(flat.view(s.shape))
    return None
