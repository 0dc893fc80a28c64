"""Communication among training processes; with a single process every function does nothing.

No other module asks for the process group. A batch consists of groups, which
`groups_of_workers` divides among the processes.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from upreid_ray.config.errors import InputError, RunFailed
from upreid_ray.core.groups import groups_of_workers

T = TypeVar("T")


def world_size() -> int:
    """Return the number of training processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the index of this process among the training processes."""
    return dist.get_rank() if dist.is_initialized() else 0


def data_parallel(model: nn.Module) -> nn.Module:
    """Wrap ``model`` so that backward averages its gradients over the processes."""
    if world_size() == 1:
        return model
    # Gradients of 1x1 kernels have other strides than these, which mean the same memory.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    # Buffers are not synchronized: batch-norm statistics are averaged where they are read, and
    # the queue is equal everywhere because the keys of all processes enter it.
    return DistributedDataParallel(
        model, forward_sync_buffers=False, gradient_as_bucket_view=True
    )


def groups_of_this_worker(num_groups: int) -> range:
    """Return which groups of a batch this process computes."""
    return groups_of_workers(num_groups, world_size())[rank()]


def gather_rows(rows: Tensor, *, num_groups: int) -> Callable[[], Tensor]:
    """Start to gather the rows of all processes.

    Args:
        rows: ``[n, ...]``, the rows of this process, equally many for each of its groups.
        num_groups: Number of groups of all processes.

    Returns:
        A function that waits for the rows of all processes and returns them in rank order:
        ``[N, ...]``.
    """
    if world_size() == 1:
        return lambda: rows
    parts = groups_of_workers(num_groups, world_size())
    counts = [len(part) * len(rows) // len(parts[rank()]) for part in parts]
    most = max(counts)
    # Collectives need equal shapes, so processes with one group less add rows of zeros.
    filled = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
    gathered = rows.new_empty(world_size() * most, *rows.shape[1:])
    work = dist.all_gather_into_tensor(gathered, filled, async_op=True)

    def wait() -> Tensor:
        work.wait()  # type: ignore[union-attr]  # None only outside of the process group
        by_process = torch.split(gathered, most)
        return torch.cat([part[:count] for part, count in zip(by_process, counts, strict=True)])

    return wait


def permute_rows(rows: Tensor, permutation: Tensor, *, num_groups: int) -> Tensor:
    """Shuffle rows over all processes; each row is sent only where it is needed.

    Args:
        rows: ``[n, ...]``, this process's part of the joined rows of all processes.
        permutation: ``[N]``, int64 on the CPU, equal on all processes; N is the number of
            joined rows.
        num_groups: Number of groups of all processes; a group has N / num_groups rows.

    Returns:
        ``[n, ...]``: row ``i`` of the joined result is row ``permutation[i]`` of the joined
        input.
    """
    if world_size() == 1:
        return rows[permutation.to(rows.device, non_blocking=True)]
    size = len(permutation) // num_groups
    parts = [
        range(p.start * size, p.stop * size)
        for p in groups_of_workers(num_groups, world_size())
    ]
    here = parts[rank()]
    wanted_by = torch.split(permutation, [len(part) for part in parts])
    sent = [
        wanted[(wanted >= here.start) & (wanted < here.stop)] - here.start
        for wanted in wanted_by
    ]
    ends = torch.tensor([part.stop for part in parts])
    source = torch.bucketize(wanted_by[rank()], ends, right=True)
    received = torch.empty_like(rows)
    dist.all_to_all_single(
        received,
        rows[torch.cat(sent).to(rows.device, non_blocking=True)],
        output_split_sizes=source.bincount(minlength=world_size()).tolist(),
        input_split_sizes=[len(index) for index in sent],
    )
    # Rows arrive by source; within a source they keep the order in which they are wanted.
    order = source.argsort(stable=True).argsort()
    return received[order.to(rows.device, non_blocking=True)]


def share_from_first(value: T) -> T:
    """Return, on every process, the picklable value that rank 0 passes."""
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


def run_at_first(function: Callable[[], T]) -> T | None:
    """Return what a function returns at rank 0; None elsewhere, where it is not called.

    Raises:
        InputError: The function raised it; every process raises it then.
        RunFailed: As above.
    """
    result: T | None = None
    failure: InputError | RunFailed | None = None
    if rank() == 0:
        try:
            result = function()
        except (InputError, RunFailed) as error:
            failure = error
    failure = share_from_first(failure)
    if failure is not None:
        raise failure
    return result


@torch.no_grad()
def average_(tensors: Iterable[Tensor], *, weight: float = 1.0) -> None:
    """Replace each floating-point tensor by its mean over the processes.

    Args:
        tensors: Tensors of this process, changed in place.
        weight: Weight of this process; the mean of all weights is 1.
    """
    if world_size() == 1:
        return
    for tensor in tensors:
        tensor.mul_(weight)
        dist.all_reduce(tensor)
        tensor.div_(world_size())
