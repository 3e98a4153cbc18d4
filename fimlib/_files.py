"""Files of numbers (safetensors), and checksums of what the numbers were made from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fimlib._version import __version__

FORMAT = "fimlib estimate, format 1"


def safetensors() -> ModuleType:
    """The package."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "files of estimates need safetensors: pip install safetensors."
        ) from error
    return safetensors


def versions() -> dict[str, str]:
    """Of the packages that the numbers depend on."""
    return {"fimlib": __version__, "torch": torch.__version__}


def check_path(path: str | Path) -> Path:
    """The path, if a file can be written there; before anything is computed."""
    safetensors()
    found = Path(path)
    try:
        if found.is_dir():
            raise IsADirectoryError("it is a folder")
        part_of(found).touch()
        part_of(found).unlink()
    except OSError as error:
        raise ValueError(
            f"{found} cannot be written ({error.strerror or error}): give the path of a file in a "
            "folder of yours."
        ) from error
    return found


def part_of(path: Path) -> Path:
    """The temporary name of a file while it is being written."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def write(path: str | Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Write a file, whole or not at all."""
    package = safetensors()
    target = check_path(path)
    part = part_of(target)
    own = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}
    try:
        package.torch.save_file(own, part, {"format": FORMAT, **versions(), **notes})
        part.chmod(0o666 & ~umask())
        part.replace(target)
    except package.SafetensorError as error:
        raise OSError(f"{target} could not be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def umask() -> int:
    """The permissions that new files of this process do not get."""
    found = os.umask(0)
    os.umask(found)
    return found


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, on the CPU, and its notes."""
    package = safetensors()
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}.")
    try:
        with package.safe_open(path, "pt") as file:
            notes = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (package.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    if notes.get("format") != FORMAT:
        found = notes.get("format", "something else")
        raise ValueError(
            f"{path} holds {found!r}, and this version of fimlib reads {FORMAT!r}: use the version "
            f"that wrote it, {notes.get('fimlib', 'unknown')}, or make the estimate anew."
        )
    return tensors, notes


def model_digest(model: nn.Module) -> str:
    """A checksum of all parameters and buffers, with their names; of any floating-point type."""
    digest = hashlib.sha256()
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor_digest(t)}".encode())
    return digest.hexdigest()


def tensor_digest(t: Tensor) -> str:
    """A checksum of a tensor's numbers and shape."""
    if is_lazy(t) or t.is_meta:
        return "none"
    t = t.detach().to_dense() if t.layout != torch.strided else t.detach()
    t = t.double() if t.is_floating_point() else t.resolve_conj()
    digest = hashlib.sha256(f"{list(t.shape)}".encode())
    digest.update(raw(t[None]).numpy().data)
    return digest.hexdigest()


class DataDigest:
    """A checksum of inputs, which does not depend on their order or on their batches."""

    def __init__(self, total: int = 0) -> None:
        self.total = total

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Take in inputs, along the first axis of all these tensors."""
        parts = [raw(t).numpy() for t in tensors]
        for rows in zip(*parts, strict=True):
            one = hashlib.blake2b(digest_size=8)
            for row in rows:
                one.update(row.tobytes())
            self.total += int.from_bytes(one.digest(), "big")

    def __str__(self) -> str:
        return f"{self.total % 2**64:016x}"


def raw(t: Tensor) -> Tensor:
    """The bytes of every row, [B, n], on the CPU."""
    rows: Sequence[int] = (len(t), -1) if t.numel() else (len(t), 0)
    return t.detach().cpu().resolve_neg().contiguous().reshape(*rows).view(torch.uint8)
