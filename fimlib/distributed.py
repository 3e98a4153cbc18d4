"""Accumulators of many processes become one (Section 4.1)."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from fimlib.joint import Joint


def all_reduce(joint: Joint, group: dist.ProcessGroup | None = None) -> Joint:
    r"""One accumulator for what all processes of a group have seen, the same on each of them.

    The accumulators merge in the order of the ranks, by the same operations everywhere, so that
    all processes hold the same numbers, to the bit. Every process of the group must call it, those
    that have seen no inputs too. ``joint`` itself is left as it was.

    Args:
        joint: What this process has accumulated.
        group: The processes; all of them by default.

    Returns:
        The merged accumulator, on the device of ``joint``; on the CPU if that has seen nothing.

    Raises:
        ValueError: the accumulators are for different parameters, families or settings: the same
            error on every process. Or torch.distributed is not initialised, or this process does
            not belong to the group.

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
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "torch.distributed is not initialised: call torch.distributed.init_process_group(...) "
            "first, in a program that torchrun starts. A single process needs no all_reduce."
        )
    own = dist.get_rank(group)
    if own < 0:
        raise ValueError("this process does not belong to the group: only its members may call.")
    total: Joint | None = None
    for rank in range(dist.get_world_size(group)):
        sent: list[Any] = [joint.to("cpu") if rank == own else None]
        dist.broadcast_object_list(sent, group=group, group_src=rank)
        theirs: Joint = sent[0]
        if total is None:
            total = theirs
            continue
        try:
            total.merge(theirs)
        except ValueError as error:
            raise ValueError(f"rank {rank} does not fit the ranks before it: {error}") from error
    assert total is not None
    return total.to(joint.device)
