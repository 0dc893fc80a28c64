"""Shards -> uint8 batches, in an order that is a pure function of (seed, epoch, step).

An epoch is a random order of row groups. It is cut into rounds of a few steps, and a round
into blocks, one for each group of a batch; the rows of a block are shuffled. A Ray Data task
reads and decodes one block, and a worker gets the blocks of its groups. The number of workers
decides who gets which group of a step, never which images are in it.

Nothing here imports torch: that would add seconds to the start of each task process.

Dimensions: B images of a batch, W workers, b = B / W images of a worker's batch, H x W pixels.
"""

import io
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, zip_longest
from threading import Timer, get_ident
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
from numpy.typing import NDArray
from PIL import Image
from ray.data import DataIterator

from upreid_ray.config import InputError, PretrainConfig, first_line
from upreid_ray.core.groups import shares
from upreid_ray.data.folders import opened_folder
from upreid_ray.data.shards import TRAIN_SPLITS, Manifest

logger = logging.getLogger(__name__)

EVALUATION_SPLITS = ("query", "gallery")
# Between two tasks a core idles for about 80 ms: a block should be worth the wait, in images
# and in bytes, and half a CPU for each task lets another one work meanwhile.
MIN_BLOCK_IMAGES = 256
MAX_BLOCK_IMAGES = 1024
BLOCK_BYTES = 32 * 2**20
TASK_CPUS = 0.5
# Each block of a dataset is known to its executor from the start: longer runs take several.
MAX_DATASET_BLOCKS = 1024
LONG_WAIT_SECONDS = 60.0

# Of each process that decodes.
MAX_OPEN_SHARDS = 64
STORED_FORMATS = ("JPEG", "PNG")
# What Pillow's decoders raise; a flipped bit of a size makes an image a bomb.
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

NUMBER = "block"

T = TypeVar("T", bound=Sized)
Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class RowRange:
    """Rows ``start`` to ``stop`` of one row group of one shard.

    Attributes:
        shard: Name of the shard.
        num_bytes: Of the whole shard.
        number: Place of the shard in the manifest.
        row_group: In the shard.
        start: First row of the row group.
        stop: Row after the last.
    """

    shard: str
    num_bytes: int
    number: int
    row_group: int
    start: int
    stop: int


class RowGroups:
    """The row groups of some splits of a set of shards, in the manifest's order.

    Every task gets a copy, so they are arrays and not objects.
    """

    def __init__(self, manifest: Manifest, splits: Sequence[str]) -> None:
        size = manifest.row_group_images
        self._shards = [(shard.name, shard.num_bytes) for shard in manifest.shards]
        images = np.array(
            [shard.num_images * (shard.split in splits) for shard in manifest.shards], np.int64
        )
        counts = -(-images // size)
        self._shard = np.repeat(np.arange(len(images)), counts)
        self._row_group = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        self._sizes = np.minimum(size, images[self._shard] - self._row_group * size)
        self.num_images = int(images.sum())

    def __len__(self) -> int:
        """Count the row groups."""
        return len(self._sizes)

    def ranges(self, order: NDArray[np.int64], start: int, stop: int) -> list[RowRange]:
        """Return what rows ``start`` to ``stop`` are when the row groups stand in ``order``."""
        ends = self._sizes[order].cumsum()
        ranges = []
        for place in range(int(np.searchsorted(ends, start, "right")), len(order)):
            group = order[place]
            size, number = int(self._sizes[group]), int(self._shard[group])
            begin = int(ends[place]) - size
            if begin >= stop:
                break
            first, last = max(start - begin, 0), min(stop - begin, size)
            row_group = int(self._row_group[group])
            ranges.append(RowRange(*self._shards[number], number, row_group, first, last))
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

    def __len__(self) -> int:
        """Count the images that are still to be seen."""
        return self.stop - self.start - self.skip


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

    def by_worker(self, num_workers: int) -> list[list[Block]]:
        """Return the blocks of the groups of each worker."""
        parts = shares(len(self.blocks), num_workers)
        return [[self.blocks[group] for group in part] for part in parts]


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
        self._names = [shard.name for shard in manifest.shards]
        self._config = config
        fitting = BLOCK_BYTES // (3 * config.data.height * config.data.width)
        num_images = max(MIN_BLOCK_IMAGES, min(MAX_BLOCK_IMAGES, fitting))
        self._steps_per_block = -(-num_images // config.training.group_size)
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
        names: list[str] = []
        for block in this.blocks:
            keys, _ = self._shuffled(block, "key", pa.string())
            names += pc.fill_null(keys.slice(block.skip, size), "(damaged)").to_pylist()
        return names

    def rows(self, block: Block) -> tuple[list[RowRange], NDArray[np.int64]]:
        """Return where the images of a block lie, and the order in which they are seen."""
        seed, epoch = self._config.seed, block.epoch
        order = np.random.default_rng((seed, epoch)).permutation(len(self._groups))
        shuffle = np.random.default_rng((seed, epoch, block.start))
        return (
            self._groups.ranges(order, block.start, block.stop),
            shuffle.permutation(block.stop - block.start),
        )

    def read(self, block: Block) -> Columns:
        """Read, shuffle and decode the images of one block.

        Returns:
            ``image``, uint8 ``[n, 3, H, W]``, ``decoded``, bool ``[n]``, and ``shard``, int
            ``[n]``, its place in the manifest. What does not decode, or lies in a shard that
            cannot be read, is replaced by another image, so that all others keep their place.

        Raises:
            InputError: There is no other image.
        """
        encoded, shards = self._shuffled(block, "image", pa.binary())
        columns = decode(encoded, self._config.data.height, self._config.data.width)
        columns["shard"] = shards
        if not columns["decoded"].any():
            columns["image"] = self._others(block, self._names[int(shards[0])])
        # What was seen is decoded too: a later image may be replaced by one of these.
        return {name: column[block.skip :] for name, column in columns.items()}

    def _shuffled(
        self, block: Block, column: str, kind: pa.DataType
    ) -> tuple[pa.Array, NDArray[np.int64]]:
        """Return a column of the rows of one block and their shards, in the order of training.

        What cannot be read is null.
        """
        ranges, order = self.rows(block)
        values = []
        for part in ranges:
            try:
                values += read_rows(self._uri, [part], [column]).column(column).chunks
            except InputError as error:
                logger.warning("left out: %s", error)
                values.append(pa.nulls(part.stop - part.start, kind))
        shards = np.repeat([p.number for p in ranges], [p.stop - p.start for p in ranges])
        return pa.concat_arrays(values).take(pa.array(order)), shards[order]

    def _others(self, block: Block, shard: str) -> NDArray[np.uint8]:
        """Return images of the epoch's beginning instead of those of a block."""
        if block.start == 0:
            msg = f"{self._uri}/{shard}: its images do not decode, nor others of the set"
            raise InputError(msg)
        begin = self.read(Block(block.epoch, 0, min(block.start, MIN_BLOCK_IMAGES), 0))["image"]
        return begin[np.arange(block.stop - block.start) % len(begin)]

    def batches(
        self,
        rounds: Iterable[Round],
        blocks: Iterator[Columns],
        *,
        rank: int = 0,
        num_workers: int = 1,
    ) -> Iterator[NDArray[np.uint8]]:
        """Yield one worker's batch of each step of the rounds.

        Args:
            rounds: From `rounds`.
            blocks: Decoded blocks of the worker's groups, in the order of the rounds.
            rank: Of the worker.
            num_workers: W.

        Yields:
            uint8 ``[b, 3, H, W]``.

        Raises:
            InputError: More images fail to decode than --data.max_undecodable allows.
        """
        group_size, limit = self._config.training.group_size, self._config.data.max_undecodable
        num_seen = 0
        undecodable: Counter[int] = Counter()  # by shard
        for this in rounds:
            mine = list(islice(blocks, len(this.by_worker(num_workers)[rank])))
            num_seen += sum(len(block["decoded"]) for block in mine)
            for block in mine:
                undecodable.update(block["shard"][~block["decoded"]].tolist())
            if undecodable.total() > limit * max(num_seen, self.num_images / num_workers):
                (number, count), *_ = undecodable.most_common(1)
                msg = (
                    f"{self._uri}: {undecodable.total()} of {num_seen} images do not decode, "
                    f"more than --data.max_undecodable {limit} allows; {count} of them in "
                    f"{self._names[number]}"
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
            msg = f"Ray Data delivered block {columns[NUMBER][0]} where block {due} was due"
            raise RuntimeError(msg)
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


def read_rows(uri: str, ranges: Sequence[RowRange], columns: list[str]) -> pa.Table:
    """Read some columns of some rows, in this order.

    Raises:
        InputError: A shard is missing or damaged: its size, or the checksum of what is read, is
            not that of the manifest.
    """
    tables = []
    for part in ranges:
        try:
            file = _open_shard(uri, part.shard, part.num_bytes, get_ident())
            # Threads for one column cost more than they save.
            group = file.read_row_group(part.row_group, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError, ValueError) as error:
            msg = f"{uri}/{part.shard}: is damaged ({first_line(error)})"
            raise InputError(msg) from error
        tables.append(group.slice(part.start, part.stop - part.start))
    return pa.concat_tables(tables).combine_chunks()


@lru_cache(maxsize=MAX_OPEN_SHARDS)
def _open_shard(uri: str, name: str, num_bytes: int, _thread: int) -> pq.ParquetFile:
    # Each thread has its own: two that read from one ParquetFile crash the process.
    filesystem, path = opened_folder(uri)
    file = filesystem.open_input_file(f"{path}/{name}")
    if file.size() != num_bytes:
        msg = f"it has {file.size()} bytes instead of {num_bytes}"
        raise ValueError(msg)
    return pq.ParquetFile(file, page_checksum_verification=True)


def decode(encoded: pa.Array | pa.ChunkedArray, height: int, width: int) -> Columns:
    """Decode and resize images; what does not decode repeats one that does."""
    images = np.zeros((len(encoded), 3, height, width), np.uint8)
    decoded = np.zeros(len(encoded), bool)
    for row, content in enumerate(encoded):
        try:
            image = Image.open(io.BytesIO(content.as_buffer()), formats=STORED_FORMATS)
            image.draft("RGB", (width, height))  # JPEG decodes at half the size for less
            pixels = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        except DECODING_ERRORS:
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
