"""What this machine can do: its speed, by a small fixed piece of work, and its cores and memory."""

from __future__ import annotations

import functools
import time
from contextlib import suppress
from pathlib import Path

import joblib
import psutil
import torch

import fimlib
from support import training

STEPS = 150  # of training
REPEATS = 3
GPU_MB = 2000.0  # of GPU memory for each run
CONTAINER = Path("/sys/fs/cgroup/memory.max")


@functools.cache
def calibration() -> float:
    """Seconds for a fixed piece of work on one CPU thread, about 0.3: the best of a few.

    They are of processor time: what else goes on here at the moment does not count.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return round(min(workload() for _ in range(REPEATS)), 4)
    finally:
        torch.set_num_threads(before)


def workload() -> float:
    """Processor time to train a network of Figure 1's size on noise, and to bound its variances."""
    start = time.process_time()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = training.mlp([784, 128, 64, 32, 10], "Sigmoid")
        x, y = torch.rand(STEPS, 128, 784), torch.randint(10, (STEPS, 128))
    step = torch.optim.Adam(net.parameters())
    for images, labels in zip(x, y, strict=True):
        step.zero_grad()
        torch.nn.functional.cross_entropy(net(images), labels).backward()
        step.step()
    derivs = fimlib.differentiate(net.double().eval(), x[0, :1].double())
    fimlib.theorem_4_1(derivs, fimlib.Categorical(), num_samples=1)
    return time.process_time() - start


def cores() -> int:
    """How many CPU cores this process may use, also within a container."""
    return int(joblib.cpu_count())


def free_memory() -> float:
    """MB of memory that are free, also within a container."""
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # there is no container, or it has no limit
        free = min(free, int(CONTAINER.read_text()))
    return float(free / 1e6)


def gpu() -> str:
    """The name of the GPU that runs use; empty where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def at_a_time() -> int:
    """How many runs to make at a time: one for each core, fewer if a GPU has little memory."""
    if not gpu():
        return cores()
    return max(1, min(cores(), int(torch.cuda.mem_get_info()[0] / 1e6 / GPU_MB)))
