"""The only place that asks for a process group; every function is the identity when alone."""

from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def world_size() -> int:
    """Number of training processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Index of this process among the training processes."""
    return dist.get_rank() if dist.is_initialized() else 0


def data_parallel(model: nn.Module) -> nn.Module:
    """Wrap ``model`` so that backward averages its gradients over the processes."""
    if world_size() == 1:
        return model
    # Buffers are not broadcast: batch-norm statistics are averaged where they are read, and
    # the queue is equal everywhere because the keys of all processes enter it.
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the equally shaped ``rows [n, ...]`` of all processes, in rank order."""
    if world_size() == 1:
        return rows
    gathered = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


def permute_rows(rows: Tensor, permutation: Tensor) -> Tensor:
    """Shuffle rows over all processes, each sending only what another one needs.

    Args:
        rows: ``[n, ...]``, rows ``rank * n`` to ``(rank + 1) * n`` of the joined rows.
        permutation: ``[world_size * n]``, int64 on the CPU, equal on all processes.

    Returns:
        ``[n, ...]``: row ``i`` of the joined result is row ``permutation[i]`` of the joined
        input.
    """
    n, here = len(rows), rank()
    if world_size() == 1:
        return rows[permutation.to(rows.device)]
    wanted_by = permutation.view(world_size(), n)
    sent = [wanted[wanted // n == here] - here * n for wanted in wanted_by]
    source = wanted_by[here] // n
    received = torch.empty_like(rows)
    dist.all_to_all_single(
        received,
        rows[torch.cat(sent).to(rows.device)],
        output_split_sizes=source.bincount(minlength=world_size()).tolist(),
        input_split_sizes=[len(index) for index in sent],
    )
    # Rows arrive by source; within a source they keep the order in which they are wanted.
    return received[source.argsort(stable=True).argsort().to(rows.device)]


def share_from_first(value: T) -> T:
    """Return the picklable value that rank 0 gave, on every process."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def gather_at_first(value: T) -> list[T] | None:
    """Collect a picklable value of each process, in rank order, at rank 0; None elsewhere."""
    if world_size() == 1:
        return [value]
    values = [value] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values


@torch.no_grad()
def average_(tensors: Iterable[Tensor]) -> None:
    """Replace each floating-point tensor by its mean over the processes."""
    if world_size() == 1:
        return
    for tensor in tensors:
        dist.all_reduce(tensor)
        tensor.div_(world_size())
