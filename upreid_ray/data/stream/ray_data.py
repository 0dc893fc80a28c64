"""Blocks of images on Ray Data: tasks read them, and workers get them in order."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import zip_longest
from threading import Timer
from typing import TypeVar

import numpy as np
import ray.data
from ray.data import DataIterator

from upreid_ray.data.stream.decode import Columns

logger = logging.getLogger(__name__)
# A core idles for about 80 ms between two tasks. Therefore blocks have a least size, in images
# and in bytes, and a task takes half a CPU, so that another one works meanwhile.
TASK_CPUS = 0.5
MIN_BLOCK_IMAGES = 256
MAX_BLOCK_IMAGES = 1024
BLOCK_BYTES = 32 * 2**20
# A dataset's executor knows all of its blocks from the start: long runs need several datasets.
MAX_DATASET_BLOCKS = 1024
LONG_WAIT_SECONDS = 60.0

NUMBER = "block"

T = TypeVar("T", bound=Sized)


def stream_blocks(
    read: Callable[[T], Columns], rounds: Iterable[Sequence[Sequence[T]]]
) -> list[DataIterator]:
    """Start a Ray Dataset whose tasks read blocks, and which hands them to workers in order.

    Args:
        read: Function that a task calls with a block; it returns ``len(block)`` rows.
        rounds: Blocks of each worker, in their order, for each round. Blocks of a round have
            the same length. A worker may have one block less than another.

    Returns:
        An iterator for each worker, which `read_stream` reads.
    """
    turns = [turn for each in rounds for turn in zip_longest(*each)]
    num_workers = len(turns[0])
    blocks = [block for turn in turns for block in turn]
    num_rows = [len(turn[0]) for turn in turns]

    def read_one(numbers: Columns) -> Columns:
        number = int(numbers["item"][0])
        block = blocks[number]
        # Ray Data gives the next block to the worker with the fewest rows. Therefore a worker
        # without a block in a turn gets rows without content.
        columns = {} if block is None else read(block)
        return {**columns, NUMBER: np.full(num_rows[number // num_workers], number)}

    # Items are made on the driver: `range` would start tasks to make them, `from_arrow` tasks
    # to inspect them.
    numbers = ray.data.from_items(list(range(len(blocks))), override_num_blocks=len(blocks))
    dataset = numbers.map_batches(read_one, batch_size=None, num_cpus=TASK_CPUS)
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    dataset.context.execution_options.preserve_order = True
    return dataset.streaming_split(num_workers, equal=False)


def read_stream(iterator: DataIterator, *, rank: int, num_workers: int) -> Iterator[Columns]:
    """Yield the decoded blocks of one worker, and check their order.

    Raises:
        RuntimeError: Ray Data handed out the blocks in another order.
    """
    due = rank
    blocks = iter(iterator.iter_batches(batch_size=None, prefetch_batches=2))
    for columns in _warn_about_waits(blocks) if rank == 0 else blocks:
        if columns[NUMBER][0] != due:
            raise RuntimeError(
                f"Ray Data delivered block {columns[NUMBER][0]} where block {due} was due"
            )
        due += num_workers
        del columns[NUMBER]
        if columns:  # otherwise this worker has no block in this turn
            yield columns


def join_groups(
    blocks: Sequence[Columns], num_steps: int, group_size: int
) -> Iterator[Columns]:
    """Yield a worker's part of the batch of each step, from one block for each of its groups.

    A block has ``group_size`` rows for each step, one step after the other.
    """
    for start in range(0, num_steps * group_size, group_size):
        rows = slice(start, start + group_size)
        yield {
            name: np.concatenate([each[name][rows] for each in blocks]) for name in blocks[0]
        }


def _warn_about_waits(blocks: Iterator[T]) -> Iterator[T]:
    """Yield the blocks, and log a warning if none arrives for a minute."""
    while True:
        timer = Timer(LONG_WAIT_SECONDS, _warn_about_wait)
        timer.daemon = True
        timer.start()
        try:
            block = next(blocks, None)
        finally:
            timer.cancel()
        if block is None:
            return
        yield block


def _warn_about_wait() -> None:
    logger.warning(
        "no images for %g s; %g CPUs are free, and a task that decodes takes %g. If workers "
        "take them all, lower --scaling.max_workers or --scaling.cpus_per_worker; if not, the "
        "storage of the shards is slow",
        LONG_WAIT_SECONDS,
        ray.available_resources().get("CPU", 0.0),
        TASK_CPUS,
    )
