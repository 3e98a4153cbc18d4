"""A device "fake" beside the CPU, as strict as CUDA, on a machine that has no other device.

A tensor on it is an ordinary ``torch.Tensor`` of PyTorch's backend for devices from outside
(PrivateUse1). So autograd, ``torch.func`` and all of C++ see a device that is not the CPU. Its
storage has no address. The bytes lie in a CPU storage, the attribute ``bytes`` of the storage, and
kernels run on these, which gives the values of the CPU.

As with CUDA, an operation on tensors of both devices is an error, except for 0-dimensional tensors
and indices on the CPU. So is a CPU generator. Operations that make the host wait for the device are
counted: see `waits`. Not noticed is a generator of the device that draws numbers on the CPU.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration

NAME = "fake"
aten = torch.ops.aten
CPU = torch._C.DispatchKey.CPU
# Operations whose CUDA kernels copy a number to the host, most of them to know a shape.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "histc")
WAITING += ("repeat_interleave", "_unique2", "unique_dim", "unique_consecutive")
INDEXING = ("index", "index_put", "_index_put_impl", "_unsafe_index")
INDICES = (torch.int64, torch.int32, torch.bool, torch.uint8)
WAITS: Counter[str] = Counter()
LIBRARY: list[torch.library.Library] = []  # kernels are there as long as the library is


# The device, as PyTorch wants it. ---------------------------------------------------------------


class Hook(torch._C._acc.PrivateUse1Hooks):
    """Says that the device is there, while it is."""

    on = False

    def is_available(self) -> bool:
        """Whether it is installed."""
        return self.on

    def has_primary_context(self, _index: int) -> bool:
        """As asked by autograd."""
        return True

    def is_built(self) -> bool:
        """Always."""
        return True


class Module:
    """``torch.fake``, as ``torch.cuda`` is for CUDA."""

    default = torch.Generator("cpu").manual_seed(0)

    def is_initialized(self) -> bool:
        """Always."""
        return True

    def is_available(self) -> bool:
        """Whether it is installed."""
        return Hook.on

    def current_device(self) -> int:
        """The only one."""
        return 0

    def device_count(self) -> int:
        """The only one."""
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Seed the device's own generator, as ``torch.manual_seed`` wants it."""
        self.default.manual_seed(seed)

    def get_rng_state(self, _device: Any = NAME) -> Tensor:
        """State of the device's own generator."""
        return self.default.get_state()

    def set_rng_state(self, state: Tensor, _device: Any = NAME) -> None:
        """Set it back."""
        self.default.set_state(state)

    def synchronize(self, _device: Any = None) -> None:
        """Nothing is under way."""


PLAIN_GENERATOR = torch.Generator


class AnyGenerator(type(PLAIN_GENERATOR)):
    """Counts generators of the CPU in, as ``torch.Generator`` does."""

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, PLAIN_GENERATOR)


class Generator(PLAIN_GENERATOR, metaclass=AnyGenerator):
    """``torch.Generator``, and for the device a CPU one that says that it is of the device."""

    # All of them: kernels get other Python objects.
    alive: ClassVar[weakref.WeakSet[Generator]] = weakref.WeakSet()

    def __new__(cls, device: torch.device | str = "cpu") -> Any:
        """A generator; a plain one where the device is another."""
        if torch.device(device).type != NAME:
            return PLAIN_GENERATOR(device)
        made = super().__new__(cls, "cpu")
        cls.alive.add(made)
        return made

    def __init__(self, device: Any = NAME) -> None:
        """All is done."""

    @property
    def device(self) -> torch.device:
        """The device."""
        return torch.device(NAME, 0)


def is_same(a: torch.Generator, b: torch.Generator) -> bool:
    """Whether two Python objects are one generator: whether a number drawn from a moves b."""
    state, before = a.get_state(), b.get_state()
    torch.empty(1, device="cpu").normal_(generator=a)
    has_moved = not torch.equal(before, b.get_state())
    a.set_state(state)
    return has_moved


# Memory. ----------------------------------------------------------------------------------------


class Wrapper(Tensor):
    """For its storage alone: Python can make one on a device without memory in no other way."""

    @classmethod
    def __torch_dispatch__(cls, *_arguments: Any, **_options: Any) -> Any:
        raise AssertionError("nothing is computed with a wrapper")


def storage_of(memory: torch.UntypedStorage) -> torch.UntypedStorage:
    """A storage of the device with these bytes."""
    wrapper = Tensor._make_wrapper_subclass(
        Wrapper, (0,), dtype=torch.uint8, device=f"{NAME}:0", storage_size=memory.nbytes()
    )
    storage = wrapper.untyped_storage()
    storage.bytes = memory
    return storage


def on_device(like: Tensor, into: Tensor | None = None) -> Tensor:
    """A tensor of the device with the memory and the shape of a CPU tensor."""
    if into is None:
        into = torch._C._acc.create_empty_tensor((0,), like.dtype)
    set_, storage = aten.set_.source_Storage_storage_offset, storage_of(like.untyped_storage())
    return set_._op_dk(CPU, into, storage, like.storage_offset(), like.shape, like.stride())


def on_cpu(t: Tensor) -> Tensor:
    """A CPU tensor with the memory and the shape of one of the device."""
    made = torch.empty(0, dtype=t.dtype, device="cpu")
    made = made.set_(t.untyped_storage().bytes, t.storage_offset(), t.shape, t.stride())
    return torch._conj(made) if t.is_conj() else made


def is_fake(value: Any) -> bool:
    """Whether a value is a tensor of the device."""
    return isinstance(value, Tensor) and value.device.type == NAME


def each(value: Any, change: Callable[[Tensor], Tensor], *, fake: bool) -> Any:
    """A value with all its tensors changed that are on the device, or on the CPU."""
    if isinstance(value, Tensor):
        return change(value) if is_fake(value) is fake else value
    if isinstance(value, list | tuple):
        return type(value)([each(v, change, fake=fake) for v in value])
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in arguments of an operation."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for v in value:
            yield from tensors(v)


PLAIN = {name: getattr(torch.UntypedStorage, name) for name in ("clone", "cpu", "data_ptr")}


def clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """As ``copy.deepcopy`` copies a storage."""
    is_ours = storage.device.type == NAME
    return storage_of(PLAIN["clone"](storage.bytes)) if is_ours else PLAIN["clone"](storage)


def to_host(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """As ``torch.save`` brings a storage to the host."""
    is_ours = storage.device.type == NAME
    return PLAIN["clone"](storage.bytes) if is_ours else PLAIN["cpu"](storage)


def pointer(storage: torch.UntypedStorage) -> int:
    """The address; of memory on the device, a number that no other has."""
    return storage._cdata if storage.device.type == NAME else PLAIN["data_ptr"](storage)


# Kernels. ---------------------------------------------------------------------------------------


class Kernel:
    """One operation of PyTorch on the device."""

    def __init__(self, op: Any) -> None:
        self.op, self.name = op, op._schema.name.removeprefix("aten::")
        known = op._schema.arguments
        self.names = [a.name for a in known]
        self.tensors = [str(a.type) == "Tensor" for a in known]
        aliases = [a.alias_info for a in known]
        self.written = [i for i, alias in enumerate(aliases) if alias and alias.is_write]
        self.returns = len(op._schema.returns)
        # What a tensor is made of, and none of its numbers, is the same on every device.
        is_view = bool(aliases) and aliases[0] is not None and not aliases[0].is_write
        self.is_view = is_view or self.name == "set_"
        self.generator = self.names.index("generator") if "generator" in self.names else None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Compute it on the bytes."""
        self.check_devices(arguments, tuple(options.values()))
        if self.is_view:
            return self.op._op_dk(CPU, *arguments, **options)
        if self.name == "cumsum" and torch.get_deterministic_debug_mode() == 2:
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
        if self.name in WAITING:
            WAITS[self.name] += 1
        if "device" in options:
            options["device"] = torch.device("cpu")
        if self.generator is not None:
            arguments, options = self.with_generator(arguments, options)
        given = each(arguments, on_cpu, fake=True)
        named = {k: each(v, on_cpu, fake=True) for k, v in options.items()}
        has_number = any(
            is_tensor and isinstance(v, int | float)
            for is_tensor, v in zip(self.tensors, arguments, strict=False)
        )
        found = (self.op.overloadpacket if has_number else self.op)(*given, **named)
        if not self.written:
            return each(found, on_device, fake=False)
        into = [self.grown(i, (arguments, options), (given, named)) for i in self.written]
        return None if found is None else into[0] if self.returns == 1 else tuple(into)

    def grown(self, i: int, ours: Any, bytes_: Any) -> Any:
        """Argument i, which was written, also where that needed another shape."""
        mine, raw = (a[i] if i < len(a) else o.get(self.names[i]) for a, o in (ours, bytes_))
        for t, r in zip(tensors(mine), tensors(raw), strict=True):
            if t.shape != r.shape:
                on_device(r, t)
        return mine

    def check_devices(self, *arguments: Any) -> None:
        """Refuse what CUDA would refuse."""
        all_of_them = list(tensors(arguments))
        if not any(map(is_fake, all_of_them)):
            return
        is_indexing = self.name.removesuffix("_") in INDEXING and is_fake(all_of_them[0])
        for t in all_of_them:
            if not is_fake(t) and t.dim() and not (is_indexing and t.dtype in INDICES):
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two "
                    f"devices, {NAME}:0 and {t.device}! (when checking aten::{self.name})"
                )

    def with_generator(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The arguments, with the device's own generator where there is none."""
        i = self.generator
        given = arguments[i] if i < len(arguments) else options.get("generator")
        if given is not None and not any(is_same(given, g) for g in list(Generator.alive)):
            raise RuntimeError(
                f"Expected a '{NAME}' device type for generator but found '{given.device}'"
            )
        chosen = Module.default if given is None else given
        if i < len(arguments):
            return (*arguments[:i], chosen, *arguments[i + 1 :]), options
        return arguments, options | {"generator": chosen}


def resize(t: Tensor, shape: list[int], **_options: Any) -> Tensor:
    """Give a tensor another shape, and new memory for it."""
    return on_device(on_cpu(t).resize_(shape), t)


def copy_from(source: Tensor, target: Tensor, _non_blocking: bool = False) -> Tensor:
    """Copy between the devices, or on one. The host waits for what it is sent."""
    if is_fake(source) and not is_fake(target):
        WAITS["copy to the host"] += 1
    memory = [on_cpu(t) if is_fake(t) else t for t in (source, target)]
    memory[1].copy_(memory[0])
    return target


def convolution(*arguments: Any) -> Tensor:
    """A convolution, of which PyTorch leaves every part to the device."""
    return Kernel(aten.convolution.default)(*arguments)


def convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Any:
    """Its derivatives."""
    kernel = Kernel(aten.convolution_backward.default)
    return kernel(gradient, x, weight, [weight.shape[0]], *rest)


def zeros(size: list[int], dtype: torch.dtype | None = None, **_options: Any) -> Tensor:
    """A derivative that is 0, for which the CPU has tensors without memory."""
    return torch.zeros(size, dtype=dtype, device=NAME)


def lstm_cell(x: Tensor, hidden: Tensor, c: Tensor, *biases: Tensor | None) -> Any:
    """One step of ``nn.LSTM``, which the CPU has in parts only: h, c, and the gates."""
    gates = sum((b for b in biases if b is not None), x + hidden)
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    new = f * c + i * g
    return o * new.tanh(), new, torch.cat([i, f, g, o], 1)


def lstm_cell_backward(
    dh: Tensor | None, dc: Tensor | None, c: Tensor, new: Tensor, gates: Tensor, has_bias: bool
) -> Any:
    """Its derivatives. As with CUDA, there are none in eval mode while cuDNN is on."""
    if torch.backends.cudnn.enabled:
        raise RuntimeError("cudnn RNN backward can only be called in training mode")
    i, f, g, o = gates.chunk(4, 1)
    dh = torch.zeros_like(new) if dh is None else dh
    dnew = dh * o * (1 - new.tanh() ** 2) + (0 if dc is None else dc)
    inner = [dnew * g * i * (1 - i), dnew * c * f * (1 - f), dnew * i * (1 - g**2)]
    total = torch.cat([*inner, dh * new.tanh() * o * (1 - o)], 1)
    return total, dnew * f, total.sum(0) if has_bias else None


OWN = {"resize_": resize, "_copy_from": copy_from, "_copy_from_and_resize": copy_from}
OWN |= {"convolution_overrideable": convolution, "_efficientzerotensor": zeros}
OWN |= {"convolution_backward_overrideable": convolution_backward}
OWN |= {"_thnn_fused_lstm_cell": lstm_cell}
OWN |= {"_thnn_fused_lstm_cell_backward_impl": lstm_cell_backward}


def missing() -> Iterator[Any]:
    """The operations with a kernel for the CPU and none that suits devices from outside."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    suits = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::") and has(name, "CPU") and not suits(name, "PrivateUse1"):
            packet, _, overload = name.removeprefix("aten::").partition(".")
            yield getattr(getattr(aten, packet), overload or "default")


# For tests. -------------------------------------------------------------------------------------


@functools.cache
def announce() -> None:
    """Tell PyTorch that there is such a device: before the first use of autograd, or never."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, Module(), Hook())


@functools.cache
def register() -> None:
    """Give the device its kernels, in half a second."""
    announce()
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in OWN.items():
        library.impl(name, kernel, "PrivateUse1")
    for op in missing():
        library.impl(op._name.removeprefix("aten::"), Kernel(op), "PrivateUse1")
    LIBRARY.append(library)


@contextmanager
def installed() -> Iterator[torch.device]:
    """The device, while it is there. Autograd works in this thread, as on the CPU.

    A Python hook of autograd must not raise an error: PyTorch (2.13) would end the process.
    """
    register()
    with pytest.MonkeyPatch.context() as patch, torch.autograd.set_multithreading_enabled(False):
        patch.setattr(Hook, "on", True)
        patch.setattr(torch, "Generator", Generator)
        for name, ours in {"clone": clone, "cpu": to_host, "data_ptr": pointer}.items():
            patch.setattr(torch.UntypedStorage, name, ours)
        yield torch.device(NAME, 0)


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """How often the host waits for the device inside, by operation."""
    WAITS.clear()
    yield WAITS
