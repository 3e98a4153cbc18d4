"""Accumulators, or estimates, of many processes become one (Section 4.1)."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

from fimlib.estimates import Estimate, merged
from fimlib.joint import Joint

Found = TypeVar("Found", Joint, Estimate)


def all_reduce(joint: Found, group: dist.ProcessGroup | None = None) -> Found:
    r"""One accumulator, or estimate, for what all processes of a group have seen, equal on each.

    They merge in the order of the ranks, by the same operations everywhere, so that all processes
    hold the same numbers, to the bit. Every process of the group must call it, those whose
    accumulator has seen no inputs too. ``joint`` itself is left as it was.

    Args:
        joint: What this process has accumulated; or what ``estimate`` returned for its share of the
            inputs, with the whole model in every process, as ``model.module`` of DDP. Load the full
            state dict of an FSDP model into a plain one, in every process.
        group: The processes; all of them by default.

    Returns:
        The merged accumulator, or estimate, on the device of ``joint``; on the CPU if that has seen
        nothing. Errors of estimates add in squares, as their random vectors are independent.

    Raises:
        ValueError: the accumulators are for different parameters, families or settings, or the
            estimates for different models: the same error on every process. Or torch.distributed is
            not initialised, or this process does not belong to the group.

    Cost: every process sends its accumulator once (see ``Joint`` for its size), pickled, and
        receives the others', one after the other; memory for three more. They merge on the CPU.
        "nccl" sends them through the current GPU: call ``torch.cuda.set_device(local_rank)`` first.

    Example: ``torchrun --standalone --nproc-per-node 2 this_file.py``, the file being::

        import torch, fimlib
        torch.distributed.init_process_group("gloo")
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        model, x = torch.nn.Linear(4, 3).double(), torch.linspace(-1, 1, 28).double().view(7, 4)
        torch.nn.init.eye_(model.weight), torch.nn.init.zeros_(model.bias)
        joint = fimlib.accumulate(model, x[rank::world], fimlib.Categorical())
        joint = fimlib.all_reduce(joint)
        print(rank, joint.count, joint.variance_i1(num_inputs=100)["bias"].tolist())
        torch.distributed.destroy_process_group()
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "torch.distributed is not initialised: call torch.distributed.init_process_group(...) "
            "first, in a program that torchrun starts. A single process needs no all_reduce."
        )
    own = dist.get_rank(group)
    if own < 0:
        raise ValueError("this process does not belong to the group: only its members may call.")
    total: Any = None
    for rank in range(dist.get_world_size(group)):
        sent: list[Any] = [joint.to("cpu") if rank == own else None]
        dist.broadcast_object_list(sent, group=group, group_src=rank)
        try:
            total = sent[0] if total is None else together(total, sent[0])
        except ValueError as error:
            raise ValueError(f"rank {rank} does not fit the ranks before it: {error}") from error
    merged_all: Found = total.to(joint.device)
    return merged_all


def together(one: Any, other: Any) -> Any:
    """Both in one; the first may be changed."""
    if type(one) is not type(other):
        raise ValueError("an estimate and an accumulator cannot be merged.")
    if isinstance(one, Joint):
        one.merge(other)
        return one
    return merged(one, other)


def process() -> str:
    """The rank, as a part of a seed; empty for rank 0 and outside a group."""
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return f", process {rank}" if rank else ""
