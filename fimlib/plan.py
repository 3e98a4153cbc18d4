"""Which engine supports a network, and what it costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fimlib.engines.checks import check_module
from fimlib.engines.choose import differentiate_checked
from fimlib.engines.model import call_with, exact_kernels, private_copy, selected
from fimlib.memory import live_bytes

REPETITIONS = 3


class Plan(NamedTuple):
    """What ``differentiate`` does with a network at a batch of inputs; ``print`` it.

    Attributes:
        engine: The engine that takes the network.
        order: 1 or 2, the order of the derivatives.
        num_inputs: B, the inputs that the costs belong to.
        seconds: Median time of ``differentiate`` here, checks included.
        relative: The same in units of one forward and backward pass of the batch.
        peak_bytes: Largest memory of the tensors that it holds at one time.
        refusals: Why not the engines that were tried before, by name.
    """

    engine: str
    order: int
    num_inputs: int
    seconds: float
    relative: float
    peak_bytes: int
    refusals: dict[str, str]

    def __str__(self) -> str:
        """A sentence on the choice, and one for each engine that was passed over."""
        of = "J and S" if self.order == 2 else "J"
        lines = [
            f"{of} by engine {self.engine!r}: {self.seconds * 1e3:.3g} ms for "
            f"{self.num_inputs} inputs, {self.relative:.3g} × one forward and backward pass, "
            f"{self.peak_bytes / 2**20:.3g} MiB."
        ]
        return "\n".join([*lines, *(f"not {name!r}: {why}" for name, why in self.refusals.items())])


def plan(
    model: nn.Module,
    x: Tensor,
    *,
    engine: str = "auto",
    order: int = 2,
    layers: Sequence[str] | str | None = None,
) -> Plan:
    """Say which engine ``differentiate`` uses, why not the ones before it, and what it costs.

    The cost is measured by running it on x, so pass only a few inputs.

    Args:
        model: Maps x to the outputs [B, T]; in eval mode.
        x: [B, ...], a few inputs.
        engine: An engine's name, or "auto".
        order: 2, or 1 for J alone.
        layers: Names of modules or parameters to report; "trainable"; or None for all.

    Raises:
        ValueError, NotImplementedError, ImportError, TypeError: as ``differentiate``.

    Example:
        >>> net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(4, 2))
        >>> found = plan(net, torch.ones(1, 1, 4))
        >>> found.engine, found.order, list(found.refusals)
        ('traced', 2, ['layerwise'])
    """
    model = check_module(model)
    wanted = selected(model, layers)
    x = x.detach().clone() if isinstance(x, Tensor) else x
    chosen = differentiate_checked(model, x, engine, order, wanted)
    taken, refusals = chosen.batch.engine, {n: str(e) for n, e in chosen.refusals.items()}

    def work() -> None:
        differentiate_checked(model, x, taken, order, wanted).batch.derivatives()

    own = private_copy(model)  # a forward pass may leave its traces
    seconds = median_time(work, x.device)
    unit = median_time(lambda: forward_backward(own, x), x.device)
    return Plan(taken, order, len(x), seconds, seconds / unit, live_bytes(work), refusals)


def forward_backward(own: nn.Module, x: Tensor) -> None:
    """One pass to the sum of the outputs and back to all parameters."""
    with torch.inference_mode(False), exact_kernels(own), torch.enable_grad():
        named = {n: p.detach().clone().requires_grad_() for n, p in own.named_parameters()}
        outputs: Tensor = call_with(own, named, x)
        torch.autograd.grad(outputs.sum(), [*named.values()], allow_unused=True)


def median_time(work: Callable[[], None], device: torch.device) -> float:
    """Seconds that one call takes, once it has been called."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        return time.perf_counter() - start

    once()
    return statistics.median(once() for _ in range(REPETITIONS))
