"""Shards -> uint8 batches, in an order that is a pure function of (seed, epoch, step).

An epoch is a random order of row groups. It is cut into rounds of a few steps, and a round
into blocks, one for each group of a batch; the rows of a block are shuffled. A Ray Data task
reads and decodes one block, and a worker gets the blocks of its groups. The number of workers
decides which worker gets a group, never which images are in it.

This module does not import torch, which would add seconds to the start of each task process.

Dimensions: B images of a batch, W workers, b = B / W images of a worker's batch, H x W pixels.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from upreid_ray.config.errors import InputError
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.core.groups import groups_of_workers
from upreid_ray.data.shards.manifest import TRAIN_SPLITS
from upreid_ray.data.shards.row_groups import RowRange
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.data.stream.decode import Columns, decode_images
from upreid_ray.data.stream.ray_data import (
    BLOCK_BYTES,
    MAX_BLOCK_IMAGES,
    MIN_BLOCK_IMAGES,
    join_groups,
)


@dataclass(frozen=True)
class Block:
    """Images that one task decodes for training: some rows of an epoch, shuffled.

    Attributes:
        epoch: Epoch, which decides the order.
        start: First row in the epoch's order.
        stop: Row after the last one.
        skip: Number of shuffled rows that a resumed run has seen already.
    """

    epoch: int
    start: int
    stop: int
    skip: int

    def __len__(self) -> int:
        """Return the number of images that are still to be seen."""
        return self.stop - self.start - self.skip


@dataclass(frozen=True)
class Round:
    """A few steps that are read together.

    Attributes:
        first_step: First step, counted from the beginning of the run.
        num_steps: Number of steps that are still to be taken.
        blocks: Blocks, one for each group of a batch; together they hold ``num_steps`` batches.
    """

    first_step: int
    num_steps: int
    blocks: tuple[Block, ...]

    def by_worker(self, num_workers: int) -> list[list[Block]]:
        """Return the blocks of each worker."""
        parts = groups_of_workers(len(self.blocks), num_workers)
        return [[self.blocks[group] for group in part] for part in parts]


class TrainingImages:
    """The unlabeled images of a set of shards, in the order of training.

    Attributes:
        row_groups: Row groups of the training images.
        num_images: Number of images in one epoch.
        steps_per_epoch: Number of whole batches in one epoch; the images that are left over
            differ from epoch to epoch.

    Raises:
        InputError: There are fewer images than in one batch.
    """

    def __init__(self, shards: ShardSet, config: PretrainConfig) -> None:
        self.row_groups = shards.row_groups(TRAIN_SPLITS)
        self._config = config
        fitting = BLOCK_BYTES // (3 * config.data.height * config.data.width)
        num_images = max(MIN_BLOCK_IMAGES, min(MAX_BLOCK_IMAGES, fitting))
        self._steps_per_block = -(-num_images // config.training.group_size)
        self.num_images = self.row_groups.num_images
        self.steps_per_epoch = self.num_images // config.training.batch_size
        if self.steps_per_epoch == 0:
            raise InputError(
                f"--training.batch_size {config.training.batch_size}: exceeds the "
                f"{self.num_images} training images of {shards.uri}"
            )

    def rounds(self, start_step: int, stop_step: int) -> Iterator[Round]:
        """Yield the rounds of these steps; the last one may end after ``stop_step``."""
        batch_size, group_size = (
            self._config.training.batch_size,
            self._config.training.group_size,
        )
        step = start_step
        while step < stop_step:
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            seen = step_of_epoch % self._steps_per_block
            first = step_of_epoch - seen
            num_steps = min(self._steps_per_block, self.steps_per_epoch - first)
            size = num_steps * group_size
            rows = range(first * batch_size, (first + num_steps) * batch_size, size)
            blocks = tuple(Block(epoch, row, row + size, seen * group_size) for row in rows)
            yield Round(step, num_steps - seen, blocks)
            step += num_steps - seen

    def keys(self, step: int) -> list[str]:
        """Return the keys of the images in a step's batch, in order."""
        this = next(self.rounds(step, step + 1))
        size = self._config.training.group_size
        names: list[str] = []
        for block in this.blocks:
            keys, _ = self._shuffled(block, "key")
            names += pc.fill_null(keys.slice(block.skip, size), "(damaged)").to_pylist()
        return names

    def rows(self, block: Block) -> tuple[list[RowRange], NDArray[np.int64]]:
        """Return the row ranges of a block, and the order in which its images are seen."""
        seed, epoch = self._config.seed, block.epoch
        order = np.random.default_rng((seed, epoch)).permutation(len(self.row_groups))
        shuffle = np.random.default_rng((seed, epoch, block.start))
        return (
            self.row_groups.ranges(block.start, block.stop, order),
            shuffle.permutation(block.stop - block.start),
        )

    def read(self, block: Block) -> Columns:
        """Read, shuffle and decode the images of one block.

        Returns:
            ``image``, uint8 ``[n, 3, H, W]``, ``decoded``, bool ``[n]``, and ``shard``, int
            ``[n]``, the place of the shard in the manifest. An image that cannot be read or
            decoded is replaced by another one, so that all others keep their place; it is black
            if no other one can be found.
        """
        encoded, shards = self._shuffled(block, "image")
        columns = decode_images(encoded, self._config.data.height, self._config.data.width)
        columns["shard"] = shards
        if not columns["decoded"].any() and block.start > 0:
            # Replace them by images from the beginning of the epoch.
            first = Block(block.epoch, 0, min(block.start, MIN_BLOCK_IMAGES), 0)
            begin = self.read(first)["image"]
            columns["image"] = begin[np.arange(block.stop - block.start) % len(begin)]
        # Images that were seen are decoded too, since one of them may replace a later image.
        return {name: column[block.skip :] for name, column in columns.items()}

    def _shuffled(self, block: Block, column: str) -> tuple[pa.Array, NDArray[np.int64]]:
        """Return a column of the rows of one block and their shards, in the order of training.

        A value that cannot be read is null.
        """
        ranges, order = self.rows(block)
        table, shards = self.row_groups.read_intact(ranges, [column])
        return table.column(column).combine_chunks().take(pa.array(order)), shards[order]

    def batches(
        self,
        rounds: Iterable[Round],
        blocks: Iterator[Columns],
        *,
        rank: int = 0,
        num_workers: int = 1,
    ) -> Iterator[Columns]:
        """Yield one worker's part of each step's batch: the columns that `read` returns.

        The blocks are the decoded ones of the worker's groups, in the order of the rounds.
        """
        for this in rounds:
            mine = list(islice(blocks, len(this.by_worker(num_workers)[rank])))
            yield from join_groups(mine, this.num_steps, self._config.training.group_size)
