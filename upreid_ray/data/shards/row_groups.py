"""Rows of a set of shards: where they lie, and how they are read."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import get_ident

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from upreid_ray.config.errors import InputError, first_line
from upreid_ray.data.shards.manifest import SCHEMA, Manifest
from upreid_ray.storage import Location

logger = logging.getLogger(__name__)

# Limit of each process that reads.
MAX_OPEN_SHARDS = 64


@dataclass(frozen=True)
class RowRange:
    """Rows ``start`` to ``stop`` of a row group of a shard, by its place in the manifest."""

    shard: int
    row_group: int
    start: int
    stop: int


class RowGroups:
    """The row groups of some splits of a set of shards, in the manifest's order.

    Every task that reads gets a copy. Therefore it holds arrays instead of objects, and no
    connection: each process opens shards when it reads them.

    Attributes:
        folder: Folder of the set.
        shard_names: Names of all shards, in the manifest's order.
        num_images: Number of images in these splits.
    """

    def __init__(self, folder: Location, manifest: Manifest, splits: Collection[str]) -> None:
        size = manifest.row_group_images
        self.folder = folder
        self.shard_names = [shard.name for shard in manifest.shards]
        self._num_bytes = [shard.num_bytes for shard in manifest.shards]
        images = np.array(
            [shard.num_images * (shard.split in splits) for shard in manifest.shards], np.int64
        )
        counts = -(-images // size)
        self._shard = np.repeat(np.arange(len(images)), counts)
        self._row_group = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        self._sizes = np.minimum(size, images[self._shard] - self._row_group * size)
        self.num_images = int(images.sum())

    def __len__(self) -> int:
        """Return the number of row groups."""
        return len(self._sizes)

    def ranges(
        self, start: int, stop: int, order: NDArray[np.int64] | None = None
    ) -> list[RowRange]:
        """Return where the images ``start`` to ``stop`` of an order lie.

        Args:
            start: First image.
            stop: Image after the last; may exceed ``num_images``.
            order: Order of the row groups; that of the manifest by default.
        """
        order = np.arange(len(self)) if order is None else order
        ends = self._sizes[order].cumsum()
        ranges = []
        for place in range(int(np.searchsorted(ends, start, "right")), len(order)):
            group = order[place]
            size = int(self._sizes[group])
            begin = int(ends[place]) - size
            if begin >= stop:
                break
            ranges.append(
                RowRange(
                    int(self._shard[group]),
                    int(self._row_group[group]),
                    max(start - begin, 0),
                    min(stop - begin, size),
                )
            )
        return ranges

    def read(self, ranges: Sequence[RowRange], columns: list[str]) -> pa.Table:
        """Read some columns of some rows, in the order of the ranges.

        Raises:
            InputError: A shard is missing or damaged: its size, or the checksum of what is
                read, is not that of the manifest.
        """
        tables = []
        for part in ranges:
            name, num_bytes = self.shard_names[part.shard], self._num_bytes[part.shard]
            try:
                file = _open_shard(self.folder / name, num_bytes, get_ident())
                # Threads for one column cost more than they save.
                group = file.read_row_group(part.row_group, columns=columns, use_threads=False)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise InputError(
                    f"{self.folder / name}: is damaged ({first_line(error)})"
                ) from error
            tables.append(group.slice(part.start, part.stop - part.start))
        return pa.concat_tables(tables).combine_chunks()

    def read_intact(
        self, ranges: Sequence[RowRange], columns: list[str]
    ) -> tuple[pa.Table, NDArray[np.int64]]:
        """Read as `read` does, with nulls for all rows of a range that cannot be read.

        Returns:
            The columns, and the place of each row's shard in the manifest.
        """
        tables = []
        for part in ranges:
            try:
                tables.append(self.read([part], columns))
            except InputError as error:
                logger.warning("left out: %s", error)
                num_rows = part.stop - part.start
                nulls = {name: pa.nulls(num_rows, SCHEMA.field(name).type) for name in columns}
                tables.append(pa.table(nulls))
        shards = np.repeat([p.shard for p in ranges], [p.stop - p.start for p in ranges])
        # Columns without nulls are not nullable in a shard.
        return pa.concat_tables(tables, promote_options="default").combine_chunks(), shards

    def read_all(self, columns: list[str]) -> pa.Table:
        """Read some columns of all rows, in the manifest's order.

        Raises:
            InputError: As `read` does.
        """
        return self.read(self.ranges(0, self.num_images), columns)


@lru_cache(maxsize=MAX_OPEN_SHARDS)
def _open_shard(shard: Location, num_bytes: int, _thread: int) -> pq.ParquetFile:
    # Each thread has its own: two that read from one ParquetFile crash the process.
    file = shard.open_input_file()
    if file.size() != num_bytes:
        raise ValueError(f"it has {file.size()} bytes instead of {num_bytes}")
    return pq.ParquetFile(file, page_checksum_verification=True)
