"""Shards -> uint8 batches, in an order that is a pure function of (seed, epoch, step).

An epoch is a random order of row groups. It is cut into rounds of a few steps, and a round
into blocks, one for each group of a batch; the rows of a block are shuffled. A Ray Data task
reads and decodes one block, and a worker gets the blocks of its groups. The number of workers
decides who gets which group of a step, never which images are in it.

Nothing here imports torch: that would add seconds to the start of each task process.

Dimensions: B images of a batch, W workers, b = B / W images of a worker's batch, H x W pixels.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
from numpy.typing import NDArray
from PIL import Image
from ray.data import DataIterator

from upreid_ray.config import InputError, PretrainConfig
from upreid_ray.data.folders import open_folder
from upreid_ray.data.shards import Manifest

TRAIN_SPLITS = ("train", "unlabeled")
EVALUATION_SPLITS = ("query", "gallery")
# A task of Ray costs milliseconds: it should decode at least this many images.
MIN_BLOCK_IMAGES = 256
# Each block of a dataset is known to its executor from the start: longer runs take several.
MAX_DATASET_BLOCKS = 1024

NUMBER = "block"

T = TypeVar("T")
Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class RowRange:
    """Rows ``start`` to ``stop`` of one row group of one shard."""

    shard: str
    row_group: int
    start: int
    stop: int


class RowGroups:
    """The row groups of some splits of a set of shards, in the manifest's order."""

    def __init__(self, manifest: Manifest, splits: Sequence[str]) -> None:
        size = manifest.row_group_images
        self._groups = [
            (shard.name, number, min(size, shard.num_images - number * size))
            for shard in manifest.shards
            if shard.split in splits
            for number in range(-(-shard.num_images // size))
        ]
        self._sizes = np.array([size for _, _, size in self._groups], dtype=np.int64)
        self.num_images = int(self._sizes.sum())

    def __len__(self) -> int:
        """Count the row groups."""
        return len(self._groups)

    def ranges(self, order: NDArray[np.int64], start: int, stop: int) -> list[RowRange]:
        """Return what rows ``start`` to ``stop`` are when the row groups stand in ``order``."""
        ends = self._sizes[order].cumsum()
        ranges = []
        for place in range(int(np.searchsorted(ends, start, "right")), len(order)):
            shard, row_group, size = self._groups[order[place]]
            begin = int(ends[place]) - size
            if begin >= stop:
                break
            ranges.append(
                RowRange(shard, row_group, max(start - begin, 0), min(stop - begin, size))
            )
        return ranges


@dataclass(frozen=True)
class Block:
    """What one task decodes for training: some rows of an epoch, shuffled.

    Attributes:
        epoch: Whose order counts.
        start: First row of the epoch's order.
        stop: Row after the last.
        skip: Shuffled rows that a resumed run has seen already.
    """

    epoch: int
    start: int
    stop: int
    skip: int


@dataclass(frozen=True)
class Round:
    """A few steps that are read together.

    Attributes:
        first_step: Of the run.
        num_steps: Steps that are still to be taken.
        blocks: One for each group of a batch, together ``num_steps`` batches.
    """

    first_step: int
    num_steps: int
    blocks: tuple[Block, ...]

    def by_worker(self, num_workers: int) -> list[Block]:
        """Return the blocks such that block ``i`` is of worker ``i % num_workers``.

        Worker ``r`` has the r-th part of the groups, since its images are the r-th part of the
        batch.
        """
        each = len(self.blocks) // num_workers
        return [self.blocks[r * each + i] for i in range(each) for r in range(num_workers)]


class TrainingImages:
    """The unlabeled images of a set of shards, in the order of training.

    Attributes:
        num_images: Of one epoch.
        steps_per_epoch: Whole batches of one epoch; which images are left over differs.

    Raises:
        InputError: There are fewer images than one batch takes.
    """

    def __init__(self, uri: str, manifest: Manifest, config: PretrainConfig) -> None:
        self._uri = uri
        self._groups = RowGroups(manifest, TRAIN_SPLITS)
        self._config = config
        self._steps_per_block = -(-MIN_BLOCK_IMAGES // config.training.group_size)
        self.num_images = self._groups.num_images
        self.steps_per_epoch = self.num_images // config.training.batch_size
        if self.steps_per_epoch == 0:
            msg = (
                f"--training.batch_size {config.training.batch_size}: exceeds the "
                f"{self.num_images} training images of {uri}"
            )
            raise InputError(msg)

    def rounds(self, start_step: int, stop_step: int) -> Iterator[Round]:
        """Yield the rounds of these steps; the last one may go on beyond ``stop_step``."""
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
        """Return the names of the images of a step's batch, in order."""
        this = next(self.rounds(step, step + 1))
        size = self._config.training.group_size
        return [
            key
            for block in this.blocks
            for key in self._shuffled(block, "key").slice(block.skip, size).to_pylist()
        ]

    def read(self, block: Block) -> Columns:
        """Read, shuffle and decode the images of one block.

        Returns:
            ``image``, uint8 ``[n, 3, H, W]``, and ``decoded``, bool ``[n]``. What does not
            decode is replaced by another image, so that all others keep their place.
        """
        data = self._config.data
        columns = decode(self._shuffled(block, "image"), data.height, data.width)
        # What was seen is decoded too: a later image may be replaced by one of these.
        return {name: column[block.skip :] for name, column in columns.items()}

    def _shuffled(self, block: Block, column: str) -> pa.ChunkedArray:
        """Return a column of the rows of one block, in the order of training."""
        seed = self._config.seed
        order = np.random.default_rng((seed, block.epoch)).permutation(len(self._groups))
        ranges = self._groups.ranges(order, block.start, block.stop)
        values = read_rows(self._uri, ranges, [column]).column(column)
        shuffle = np.random.default_rng((seed, block.epoch, block.start))
        return values.take(pa.array(shuffle.permutation(len(values))))

    def batches(
        self, rounds: Iterable[Round], blocks: Iterator[Columns], num_workers: int
    ) -> Iterator[NDArray[np.uint8]]:
        """Yield one worker's batch of each step of the rounds.

        Args:
            rounds: From `rounds`.
            blocks: Decoded blocks of the worker's groups, in the order of the rounds.
            num_workers: W.

        Yields:
            uint8 ``[b, 3, H, W]``.

        Raises:
            InputError: More images fail to decode than --data.max_undecodable allows.
        """
        group_size, limit = self._config.training.group_size, self._config.data.max_undecodable
        num_seen = num_undecodable = 0
        for this in rounds:
            mine = list(islice(blocks, len(this.blocks) // num_workers))
            num_seen += sum(len(block["decoded"]) for block in mine)
            num_undecodable += sum(int((~block["decoded"]).sum()) for block in mine)
            if num_undecodable > limit * max(num_seen, self.num_images / num_workers):
                msg = (
                    f"{self._uri}: {num_undecodable} of {num_seen} images do not decode, more "
                    f"than --data.max_undecodable {limit} allows"
                )
                raise InputError(msg)
            for start in range(0, this.num_steps * group_size, group_size):
                groups = [block["image"][start : start + group_size] for block in mine]
                yield np.concatenate(groups)


class LabelledImages:
    """The query and gallery images of a set of shards, in the manifest's order."""

    def __init__(self, uri: str, manifest: Manifest, *, height: int, width: int) -> None:
        self._uri = uri
        self._size = (height, width)
        self._groups = RowGroups(manifest, EVALUATION_SPLITS)
        self.num_blocks = -(-self._groups.num_images // MIN_BLOCK_IMAGES)

    def read(self, number: int) -> Columns:
        """Read and decode block ``number``; what does not decode is left out.

        Returns:
            ``image``, uint8 ``[n, 3, H, W]``, and of each image ``pid``, ``camid`` and
            ``is_query``.
        """
        order = np.arange(len(self._groups))
        start = number * MIN_BLOCK_IMAGES
        ranges = self._groups.ranges(order, start, start + MIN_BLOCK_IMAGES)
        table = read_rows(self._uri, ranges, ["image", "pid", "camid", "split"])
        columns = decode(table.column("image"), *self._size)
        decoded = columns.pop("decoded")
        columns["pid"] = table.column("pid").to_numpy()
        columns["camid"] = table.column("camid").to_numpy()
        columns["is_query"] = pc.equal(table.column("split"), "query").to_numpy()
        return {name: column[decoded] for name, column in columns.items()}


def check_labels(uri: str, manifest: Manifest) -> None:
    """Refuse a set whose query and gallery images cannot be scored.

    Raises:
        InputError: There are none, persons or cameras are unknown, or no query has a match.
    """
    cameras: dict[str, dict[int, set[int]]] = {split: {} for split in EVALUATION_SPLITS}
    for split, of_person in cameras.items():
        groups = RowGroups(manifest, (split,))
        if groups.num_images == 0:
            msg = f"{uri}: has no {split} images"
            raise InputError(msg)
        ranges = groups.ranges(np.arange(len(groups)), 0, groups.num_images)
        labels = read_rows(uri, ranges, ["pid", "camid"])
        for name, meaning in (("pid", "person"), ("camid", "camera")):
            if labels.column(name).null_count:
                msg = (
                    f"{uri}: {labels.column(name).null_count} {split} images have no {meaning}"
                )
                raise InputError(msg)
        for pid, camid in zip(*(column.to_pylist() for column in labels), strict=True):
            of_person.setdefault(pid, set()).add(camid)
    if not any(
        cameras["gallery"].get(pid, set()) - {camid}
        for pid, camids in cameras["query"].items()
        for camid in camids
    ):
        msg = f"{uri}: no query image has a match in the gallery under another camera"
        raise InputError(msg)


def stream_blocks(
    read: Callable[[T], Columns],
    blocks: Sequence[T],
    *,
    num_workers: int,
) -> list[DataIterator]:
    """Start a Ray Dataset whose tasks read the blocks; block ``i`` goes to worker ``i % W``.

    Args:
        read: Called with one block in a task.
        blocks: In the order in which they are wanted.
        num_workers: W.

    Returns:
        An iterator for each worker, to be read with `read_stream`.
    """

    def read_one(ids: Columns) -> Columns:
        number = int(ids["id"][0])
        columns = read(blocks[number])
        return {**columns, NUMBER: np.full(len(columns["image"]), number)}

    dataset = ray.data.range(len(blocks), override_num_blocks=len(blocks)).map_batches(
        read_one, batch_size=None
    )
    dataset.context.enable_progress_bars = False
    dataset.context.execution_options.preserve_order = True
    return dataset.streaming_split(num_workers, equal=False)


def read_stream(iterator: DataIterator, *, rank: int, num_workers: int) -> Iterator[Columns]:
    """Yield the decoded blocks of one worker, and check that each is the one that is due.

    Raises:
        RuntimeError: Ray Data handed out the blocks in another order.
    """
    due = rank
    for columns in iterator.iter_batches(batch_size=None, prefetch_batches=2):
        if columns[NUMBER][0] != due:
            msg = f"Ray Data delivered block {columns[NUMBER][0]} where block {due} was due"
            raise RuntimeError(msg)
        due += num_workers
        yield columns


def read_rows(uri: str, ranges: Sequence[RowRange], columns: list[str]) -> pa.Table:
    """Read some columns of some rows, in this order."""
    return pa.concat_tables(
        _open_shard(uri, part.shard)
        .read_row_group(part.row_group, columns=columns)
        .slice(part.start, part.stop - part.start)
        for part in ranges
    ).combine_chunks()


@lru_cache(maxsize=64)
def _open_shard(uri: str, name: str) -> pq.ParquetFile:
    filesystem, path = open_folder(uri)
    return pq.ParquetFile(filesystem.open_input_file(f"{path}/{name}"))


def decode(encoded: pa.ChunkedArray, height: int, width: int) -> Columns:
    """Decode and resize images; what does not decode repeats one that does."""
    images = np.zeros((len(encoded), 3, height, width), np.uint8)
    decoded = np.zeros(len(encoded), bool)
    for row, content in enumerate(encoded):
        try:
            image = Image.open(io.BytesIO(content.as_buffer()))
            image.draft("RGB", (width, height))  # JPEG decodes at half the size for less
            pixels = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        except (OSError, SyntaxError, ValueError):  # what Pillow's decoders raise
            continue
        else:
            images[row] = np.asarray(pixels).transpose(2, 0, 1)
            decoded[row] = True
    if decoded.any():
        # The nearest decoded image before, or the first one where there is none before.
        source = np.maximum.accumulate(np.where(decoded, np.arange(len(decoded)), -1))
        source[source < 0] = decoded.argmax()
        images[~decoded] = images[source[~decoded]]
    return {"image": images, "decoded": decoded}
