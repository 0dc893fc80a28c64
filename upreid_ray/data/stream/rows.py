"""Rows of shards -> uint8 images."""

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import get_ident
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from upreid_ray.config.errors import InputError, first_line
from upreid_ray.data.shards.manifest import Manifest
from upreid_ray.storage import opened_folder

logger = logging.getLogger(__name__)

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
            raise InputError(f"{uri}/{part.shard}: is damaged ({first_line(error)})") from error
        tables.append(group.slice(part.start, part.stop - part.start))
    return pa.concat_tables(tables).combine_chunks()


@lru_cache(maxsize=MAX_OPEN_SHARDS)
def _open_shard(uri: str, name: str, num_bytes: int, _thread: int) -> pq.ParquetFile:
    # Each thread has its own: two that read from one ParquetFile crash the process.
    filesystem, path = opened_folder(uri)
    file = filesystem.open_input_file(f"{path}/{name}")
    if file.size() != num_bytes:
        raise ValueError(f"it has {file.size()} bytes instead of {num_bytes}")
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
