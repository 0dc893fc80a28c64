"""Blocks of images on Ray Data: read in tasks, handed to the workers in order."""

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
# Between two tasks a core idles for about 80 ms: a block should be worth the wait, in images
# and in bytes, and half a CPU for each task lets another one work meanwhile.
TASK_CPUS = 0.5
MIN_BLOCK_IMAGES = 256
MAX_BLOCK_IMAGES = 1024
BLOCK_BYTES = 32 * 2**20
# Each block of a dataset is known to its executor from the start: longer runs take several.
MAX_DATASET_BLOCKS = 1024
LONG_WAIT_SECONDS = 60.0

NUMBER = "block"

T = TypeVar("T", bound=Sized)


def stream_blocks(
    read: Callable[[T], Columns], rounds: Iterable[Sequence[Sequence[T]]]
) -> list[DataIterator]:
    """Start a Ray Dataset whose tasks read blocks, and hand each worker its own in order.

    Args:
        read: Called with one block in a task; returns ``len(block)`` rows.
        rounds: Of each round, the blocks of each worker in the order in which they are wanted.
            Blocks of a round have the same length. A worker may have one less than another.

    Returns:
        An iterator for each worker, to be read with `read_stream`.
    """
    turns = [turn for each in rounds for turn in zip_longest(*each)]
    num_workers = len(turns[0])
    blocks = [block for turn in turns for block in turn]
    num_rows = [len(turn[0]) for turn in turns]

    def read_one(numbers: Columns) -> Columns:
        number = int(numbers["item"][0])
        block = blocks[number]
        # Ray Data gives the worker with the fewest rows the next block, so who has no block in
        # a turn gets rows without content.
        columns = {} if block is None else read(block)
        return {**columns, NUMBER: np.full(num_rows[number // num_workers], number)}

    # Made here: a range has tasks of its own, and Arrow tables are looked at by one each.
    numbers = ray.data.from_items(list(range(len(blocks))), override_num_blocks=len(blocks))
    dataset = numbers.map_batches(read_one, batch_size=None, num_cpus=TASK_CPUS)
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    dataset.context.execution_options.preserve_order = True
    return dataset.streaming_split(num_workers, equal=False)


def read_stream(iterator: DataIterator, *, rank: int, num_workers: int) -> Iterator[Columns]:
    """Yield the decoded blocks of one worker, and check that each is the one that is due.

    Raises:
        RuntimeError: Ray Data handed out the blocks in another order.
    """
    due = rank
    blocks = iter(iterator.iter_batches(batch_size=None, prefetch_batches=2))
    for columns in _telling_of_waits(blocks) if rank == 0 else blocks:
        if columns[NUMBER][0] != due:
            raise RuntimeError(
                f"Ray Data delivered block {columns[NUMBER][0]} where block {due} was due"
            )
        due += num_workers
        if len(columns) > 1:  # else there is no block for this worker
            yield columns


def _telling_of_waits(blocks: Iterator[T]) -> Iterator[T]:
    """Yield what comes, and warn where nothing has come for a minute."""
    while True:
        timer = Timer(LONG_WAIT_SECONDS, _tell_of_wait)
        timer.daemon = True
        timer.start()
        try:
            block = next(blocks, None)
        finally:
            timer.cancel()
        if block is None:
            return
        yield block


def _tell_of_wait() -> None:
    logger.warning(
        "no images for %g s; %g CPUs are free, and a task that decodes takes %g. If workers "
        "take them all, lower --scaling.max_workers or --scaling.cpus_per_worker; if not, the "
        "storage of the shards is slow",
        LONG_WAIT_SECONDS,
        ray.available_resources().get("CPU", 0.0),
        TASK_CPUS,
    )
