"""Checkpoints of an unfinished run, so that one that was killed goes on from where it stood."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from support import results

FILE = "checkpoint.pt"


class Progress:
    """Where an unfinished run stands: saved after every step, so that a killed run goes on there.

    A loop that survives looks like this; ``out`` is the run's folder, "" keeps nothing:

        progress = checkpoint.Progress(out, net=net, step=step, shuffle=shuffle, table=table)
        for epoch in range(progress.next, epochs + 1):
            if epoch:
                training.train_epoch(net, step, X, y, batch_size=128, shuffle=shuffle)
            measure(net, epoch)
            progress.save(epoch, f"epoch {epoch} of {epochs}")

    What changes from step to step must be among the states: it is set back in place. Continued and
    uninterrupted runs then have the same values, bit for bit.

    Args:
        out: The run's folder. If it holds a checkpoint of a run that began in the very same state,
            all states are what they were after its last step.
        unit: What a step is called when the run is continued.
        state: Objects with ``state_dict`` (modules, optimizers, schedulers), `torch.Generator`,
            `results.Table`, and lists or dicts of numbers, texts, tensors, and tables. PyTorch's
            global random states (CPU, CUDA) are always among them.

    Attributes:
        next: The first step that is still to be made; 0 at the start.

    Raises:
        TypeError: a state is of no such kind; on the first save, if it is inside a list or dict.
    """

    def __init__(self, out: str, unit: str = "epoch", /, **state: Any) -> None:
        self.path = Path(out, FILE) if out else None
        self.state, self.next, self.checked = state, 0, False
        self.lines: list[str] = []
        self.start = results.digest([self._bytes()])
        if self.path and self.path.is_file() and (saved := read(self.path)):
            if saved["start"] != self.start:
                print(f"{FILE} is of a run with another start: starts anew", flush=True)
                return
            self._restore(saved)
            print(*self.lines, f"continues after {unit} {self.next - 1}", sep="\n", flush=True)

    def save(self, step: int, line: str = "") -> None:
        """A step is made: print its line, write the checkpoint, whole or not at all.

        A continued run prints the lines of all steps made before, so that its notebook has them.

        Raises:
            OSError: it cannot be written; the one before is still there.
        """
        self.next = step + 1
        if line:
            self.lines.append(line)
            print(line, flush=True)
        if self.path:
            content = self._bytes(next=self.next, lines=self.lines, start=self.start)
            if not self.checked:  # at the first step, not when it is needed
                check(content)
                self.checked = True
            self.path.parent.mkdir(parents=True, exist_ok=True)
            results.write(self.path, content)

    def _bytes(self, **more: Any) -> bytes:
        """All states as they are now, for `load`."""
        buffer = io.BytesIO()
        more["state"] = {name: get(value, name) for name, value in self.state.items()}
        more["cpu"] = torch.get_rng_state()
        more["cuda"] = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        torch.save(more, buffer)
        return buffer.getvalue()

    def _restore(self, saved: dict[str, Any]) -> None:
        for name, value in self.state.items():
            put(value, saved["state"][name])
        torch.set_rng_state(saved["cpu"])
        torch.cuda.set_rng_state_all(saved["cuda"])  # nothing where there is none
        self.next, self.lines = saved["next"], saved["lines"]


def get(value: Any, name: str) -> Any:
    """The state of an object."""
    if hasattr(value, "state_dict"):
        return value.state_dict()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, results.Table):
        return value.rows
    if isinstance(value, list | dict):
        return value
    raise TypeError(
        f"{name} cannot be kept in a checkpoint: a {type(value).__name__} cannot be set back in "
        "place. Give an object with state_dict, a torch.Generator, a Table, a list or a dict."
    )


def put(value: Any, saved: Any) -> None:
    """Set an object back to a state, in place."""
    if hasattr(value, "load_state_dict"):
        value.load_state_dict(saved)
    elif isinstance(value, torch.Generator):
        value.set_state(saved)
    elif isinstance(value, dict):
        value.clear()
        value.update(saved)
    else:
        rows = value.rows if isinstance(value, results.Table) else value
        rows[:] = saved


def load(content: bytes) -> Any:
    """Read plain values and tables, and nothing that could run code."""
    with torch.serialization.safe_globals([results.Table]):
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def check(content: bytes) -> None:
    """Raise a TypeError unless the checkpoint can be read again."""
    try:
        load(content)
    except Exception as error:
        raise TypeError(
            "a checkpoint keeps numbers, texts, tensors, lists, dicts and Tables only; turn "
            f"others into these (float(x) of a NumPy number): {error}"
        ) from None


def read(path: Path) -> dict[str, Any] | None:
    """The checkpoint in a file; None if it is damaged."""
    try:
        found: dict[str, Any] = load(path.read_bytes())
        return found if found.keys() >= {"state", "next", "lines", "start", "cpu", "cuda"} else None
    except Exception:  # whatever half a file makes the reader say
        print(f"{path.name} is damaged: starts anew", flush=True)
        return None
