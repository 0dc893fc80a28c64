"""The images of a source, in blocks that tasks read and decode.

Dimensions: n images of a block, H x W pixels.
"""

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pyarrow as pa
from PIL import Image

from upreid_ray.config.errors import InputError, first_line
from upreid_ray.data.shards.images import RefusedImageError, usable_image
from upreid_ray.data.shards.manifest import EVALUATION_SPLITS, TRAIN_SPLITS
from upreid_ray.data.shards.row_groups import RowGroups
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.data.sources.records import Record, Records, is_image_name, make_records
from upreid_ray.data.sources.source import source_records
from upreid_ray.data.stream.decode import STORED_FORMATS, Columns, decode_images
from upreid_ray.storage import Location

NAMES = ("key", "pid", "camid", "split")
NULL = np.iinfo(np.int64).min
"""Number that stands for an unknown person or camera in a block."""


def _read_file(record: Record) -> bytes:
    return Location(record["key"]).read_bytes()


@dataclass(frozen=True)
class SourceImages:
    """The images of a set of shards or of any source that `prepare` reads, in a fixed order.

    Attributes:
        name: Folder, file or URI of the source.
        digest: Digest of the images.
        num_images: Number of images, those that do not decode included.
    """

    name: str
    digest: str
    num_images: int
    _groups: RowGroups | None = field(default=None, repr=False)
    _records: Records | None = field(default=None, repr=False)

    @classmethod
    def open(cls, name: str) -> Self:
        """Find the images of a folder, file or URI; a file may be a single image.

        Raises:
            InputError: There are none, or they cannot be read.
        """
        if ShardSet.exists(name):
            shards = ShardSet.open(name)
            groups = shards.row_groups((*TRAIN_SPLITS, *EVALUATION_SPLITS))
            if not groups.num_images:
                raise InputError(f"{name}: holds no images")
            return cls(name, shards.manifest.digest(), groups.num_images, _groups=groups)
        file = Location(name)
        if is_image_name(name) and file.is_file():
            columns = {"key": [name], "num_bytes": [file.num_bytes()]}
            records = make_records(name, columns, _read_file)
        else:
            records = source_records(name, {})
        return cls(name, records.digest(), len(records), _records=records)

    def block(self, start: int, stop: int) -> pa.Table:
        """Return a table from which `reader` reads the images ``start`` to ``stop``."""
        if self._groups is not None:
            return pa.table({"start": [start], "stop": [min(stop, self.num_images)]})
        assert self._records is not None  # noqa: S101, one of the two is there
        table = self._records.table.slice(start, stop - start)
        return table.append_column("place", pa.array(np.arange(start, start + len(table))))

    def reader(self, height: int, width: int) -> "BlockReader":
        """Return a function that reads and decodes a block in any process."""
        if self._groups is not None:
            return BlockReader(height, width, groups=self._groups)
        assert self._records is not None  # noqa: S101, one of the two is there
        return BlockReader(
            height, width, read=self._records.read, num_readers=self._records.num_readers
        )

    def encoded(self, place: int) -> bytes | None:
        """Return one image as it is stored, None if it cannot be read."""
        try:
            if self._groups is not None:
                ranges = self._groups.ranges(place, place + 1)
                content: bytes = self._groups.read(ranges, ["image"])["image"][0].as_py()
                return content
            assert self._records is not None  # noqa: S101, one of the two is there
            return self._records.read(self._records.table.slice(place, 1).to_pylist()[0])
        except (OSError, ValueError, InputError):
            return None


@dataclass(frozen=True)
class BlockReader:
    """Reads and decodes a block of `SourceImages`.

    Attributes:
        height: Height of the resized images in pixels.
        width: Width of the resized images in pixels.
        groups: Rows of a set of shards; None for records.
        read: Function that reads the image of a record; None for shards.
        num_readers: Number of images that are read at a time.
    """

    height: int
    width: int
    groups: RowGroups | None = None
    read: Callable[[Record], bytes] | None = None
    num_readers: int = 1

    def __call__(self, block: pa.Table) -> Columns:
        """Return the images of a block, and what is known of them.

        Returns:
            ``image``, uint8 ``[n, 3, H, W]``; ``key``, ``split`` and ``error`` (empty for an
            image that decodes), text ``[n]``; ``place``, ``pid``, ``camid``, ``width`` and
            ``height``, int64 ``[n]``, `NULL` where unknown.
        """
        if self.groups is not None:
            start, stop = block["start"][0].as_py(), block["stop"][0].as_py()
            ranges = self.groups.ranges(start, stop)
            table, _ = self.groups.read_intact(ranges, [*NAMES, "image"])
            place = np.arange(start, stop)
            # `prepare` has made these images usable.
            found = [_opened(each) for each in table["image"]]
        else:
            table, place = block, block["place"].to_numpy()
            found = self._read_all(block.to_pylist())
        encoded = pa.array([each for each, _, _, _ in found], pa.binary())
        columns = decode_images(encoded, self.height, self.width)
        decoded = columns.pop("decoded")
        errors = [error for _, _, _, error in found]
        for row in np.flatnonzero(~decoded).tolist():
            errors[row] = errors[row] or "does not decode"
        columns |= {
            "width": np.array([width for _, width, _, _ in found], np.int64),
            "height": np.array([height for _, _, height, _ in found], np.int64),
            "error": np.array(errors, np.object_),
            "place": place,
        }
        for name in ("key", "split"):
            columns[name] = np.array(table[name].fill_null("").to_pylist(), np.object_)
        for name in ("pid", "camid"):
            columns[name] = table[name].cast(pa.int64()).fill_null(NULL).to_numpy()
        return columns

    def _read_all(self, records: list[dict[str, Any]]) -> list[tuple[bytes, int, int, str]]:
        with ThreadPoolExecutor(self.num_readers) as pool:
            return list(pool.map(self._read_one, records))

    def _read_one(self, record: Record) -> tuple[bytes, int, int, str]:
        """Return an image as `prepare` stores it, its width and height, and what is wrong."""
        assert self.read is not None  # noqa: S101, records have it
        try:
            image = usable_image(self.read(record), max_height=None)
        except RefusedImageError as error:
            return b"", 0, 0, str(error)
        except (OSError, ValueError, InputError) as error:
            return b"", 0, 0, first_line(error)
        return image.encoded, image.picture.width, image.picture.height, ""


def _opened(stored: pa.Scalar) -> tuple[bytes, int, int, str]:
    """Return an image of a shard, and its size, from its head alone."""
    if not stored.is_valid:
        return b"", 0, 0, "its shard is damaged"
    encoded: bytes = stored.as_py()
    try:
        with Image.open(io.BytesIO(encoded), formats=STORED_FORMATS) as image:
            return encoded, image.width, image.height, ""
    except (OSError, ValueError, SyntaxError) as error:
        return b"", 0, 0, first_line(error)
