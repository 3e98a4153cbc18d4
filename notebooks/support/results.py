"""A result: a tidy table of values, and a record of what made it.

A run is a folder with ``values.csv`` (run, epoch, layer, quantity, value), ``record.json``
(parameters, seeds, data digest, versions, commit, machine, time), its figure and its executed
notebook. The record names the digests of these files, and its own: a folder that does not hold what
its record says is not a run. Figures, report and book read such folders; they never compute.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import fimlib

ROOT = Path(__file__).resolve().parents[2]
NETWORK = "network"  # the layer column of values that belong to no single layer
DIGITS = 12  # significant ones of a value in a table
COLUMNS = ["run", "epoch", "layer", "quantity", "value"]
FILES = ("values.csv", "notebook.ipynb", "figure.svg")  # whose digests a record names, if there
PACKAGES = ("numpy", "scipy", "pandas", "matplotlib", "papermill")


@dataclass(frozen=True)
class Run:
    """A finished run, as it lies on disk."""

    name: str
    folder: Path
    record: dict[str, Any]

    @property
    def values(self) -> pd.DataFrame:
        """The tidy table."""
        return pd.read_csv(self.folder / "values.csv", dtype={"layer": str})

    @property
    def counts(self) -> bool:
        """Whether the paper's claims may be judged by it: real MNIST, nothing cut short."""
        return bool(self.record.get("counts", False))


class Table:
    """Collects rows of (epoch, layer, quantity, value) while an experiment goes on."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.rows: list[tuple[str, int, str, str, float]] = []

    def add(self, epoch: int, quantity: str, value: float | Mapping[str, float]) -> None:
        """Add one value of the network, or one per layer if ``value`` is a mapping."""
        by_layer = value if isinstance(value, Mapping) else {NETWORK: value}
        for layer, number in by_layer.items():
            self.rows.append((self.run, epoch, layer, quantity, float(number)))

    def frame(self) -> pd.DataFrame:
        """The tidy table so far."""
        return pd.DataFrame(self.rows, columns=COLUMNS)


def record(
    parameters: Mapping[str, Any], data: Mapping[str, Any], started: float, device: torch.device
) -> dict[str, Any]:
    """What made a result: everything needed to make it again, and the machine that did.

    Args:
        parameters: All parameters of the notebook.
        data: Name, title, digest of the data set, and whether it is the real MNIST; empty for a
            run that needs none.
        started: ``time.time()`` at the start.
        device: Where the network was trained and measured.
    """
    limited = bool(parameters.get("train_limit"))
    return {
        "parameters": dict(parameters),
        "data": dict(data),
        "counts": bool(data.get("is_mnist", True)) and not limited,
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"fimlib": fimlib.__version__}  # an installation in place keeps the version of its day
        | {p: version(p) for p in PACKAGES},
        "commit": commit(),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "system": platform.system(),
        },
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        "memory_mb": peak_memory(),
    }


def save(folder: str | Path, values: pd.DataFrame | None, made_by: Mapping[str, Any]) -> None:
    """Write table and record into a folder; each file appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if values is not None:
        write_text(folder / "values.csv", values.to_csv(index=False, float_format=f"%.{DIGITS}g"))
    sealed = dict(made_by) | {"digest": seal(made_by)}
    write_text(folder / "record.json", json.dumps(sealed, indent=1, ensure_ascii=False) + "\n")


def load(folder: Path, names: Collection[str] | None = None) -> dict[str, Run]:
    """The finished runs in a folder, all or those named; what is half-made or damaged is none."""
    found = {}
    for path in sorted(folder.glob("*/record.json")):
        run, made_by = path.parent, read_record(path.parent)
        if run.name.startswith(".") or (names is not None and run.name not in names):
            continue
        if not made_by or made_by.get("digest") != seal(made_by):
            continue
        if made_by.get("files") == file_digests(run):
            found[run.name] = Run(run.name, run, made_by)
    return found


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record in a folder; None if there is none or it is damaged."""
    try:
        made_by = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return made_by if isinstance(made_by, dict) else None


def seal(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record, but for its own digest."""
    text = json.dumps({k: v for k, v in record.items() if k != "digest"}, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of those of a run's `FILES` that are there."""
    there = [name for name in FILES if (folder / name).is_file()]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in there}


def write_text(path: str | Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    write(path, text.encode())


def write(path: str | Path, content: bytes) -> None:
    """Write a file under a temporary name, wait until it is on the disk, and rename it."""
    partial = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 of several byte strings, each closed off from the next by its length."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "big") + part)
    return sha.hexdigest()


def version(package: str) -> str:
    """Installed version of a package, or "unknown" where it runs from its folder."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def commit() -> str:
    """The commit that is checked out, marked where files differ from it; "unknown" without git.

    A repository around the project's folder is another one, as is one that a variable of git names.
    """
    here = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE")}
    here["GIT_CEILING_DIRECTORIES"] = str(ROOT.parent)
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(
            command, cwd=ROOT, env=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "unknown"
    )


def peak_memory() -> int:
    """The most memory that this process has held, in MB (10⁶ bytes)."""
    try:  # Linux counts in resource the memory of the process that started this one, too
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 // 10**6 for x in lines if x.startswith("VmHWM"))
    except (OSError, StopIteration):
        return megabytes(resource.getrusage(resource.RUSAGE_SELF))


def megabytes(usage: resource.struct_rusage) -> int:
    """The peak memory that the system reports of processes, in MB (10⁶ bytes)."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) // 10**6
