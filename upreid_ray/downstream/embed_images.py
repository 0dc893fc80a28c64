"""The images of a source, in blocks that tasks read and decode.

Dimensions: n images of a block, H x W pixels.
"""

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
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
    _content: RowGroups | Records = field(repr=False)

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
            return cls(name, shards.manifest.digest(), groups.num_images, groups)
        file = Location(name)
        if is_image_name(name) and file.is_file():
            columns = {"key": [name], "num_bytes": [file.num_bytes()]}
            records = make_records(name, columns, _read_file)
        else:
            records = source_records(name, {})
        return cls(name, records.digest(), len(records), records)

    def block(self, start: int, stop: int) -> pa.Table:
        """Return a table from which `reader` reads the images ``start`` to ``stop``."""
        if isinstance(self._content, RowGroups):
            return pa.table({"start": [start], "stop": [min(stop, self.num_images)]})
        table = self._content.table.slice(start, stop - start)
        return table.append_column("place", pa.array(np.arange(start, start + len(table))))

    def reader(self, height: int, width: int) -> Callable[[pa.Table], Columns]:
        """Return a function that reads and decodes a block in any process.

        It returns ``image``, uint8 ``[n, 3, H, W]``; ``key``, ``split`` and ``error`` (empty
        for an image that decodes), text ``[n]``; ``place``, ``pid``, ``camid``, ``width`` and
        ``height``, int64 ``[n]``, `NULL` where unknown.
        """
        content = self._content
        if isinstance(content, RowGroups):
            return partial(_read_shards, groups=content, height=height, width=width)
        return partial(
            _read_records,
            read=content.read,
            num_readers=content.num_readers,
            height=height,
            width=width,
        )

    def encoded(self, place: int) -> bytes | None:
        """Return one image as it is stored, None if it cannot be read."""
        content = self._content
        try:
            if isinstance(content, RowGroups):
                ranges = content.ranges(place, place + 1)
                image: bytes = content.read(ranges, ["image"])["image"][0].as_py()
                return image
            return content.read(content.table.slice(place, 1).to_pylist()[0])
        except (OSError, ValueError, InputError):
            return None


@dataclass(frozen=True)
class _Found:
    """An encoded image, its size in pixels, and what is wrong with it."""

    encoded: bytes = b""
    width: int = 0
    height: int = 0
    error: str = ""


def _read_shards(block: pa.Table, *, groups: RowGroups, height: int, width: int) -> Columns:
    start, stop = block["start"][0].as_py(), block["stop"][0].as_py()
    table, _ = groups.read_intact(groups.ranges(start, stop), [*NAMES, "image"])
    # `prepare` has made these images usable.
    found = [_opened(each) for each in table["image"]]
    return _columns(table, np.arange(start, stop), found, height, width)


def _read_records(
    block: pa.Table,
    *,
    read: Callable[[Record], bytes],
    num_readers: int,
    height: int,
    width: int,
) -> Columns:
    def read_one(record: Record) -> _Found:
        try:
            image = usable_image(read(record), max_height=None)
        except (OSError, ValueError, InputError) as error:
            is_refusal = isinstance(error, RefusedImageError)
            return _Found(error=str(error) if is_refusal else first_line(error))
        return _Found(image.encoded, image.picture.width, image.picture.height)

    with ThreadPoolExecutor(num_readers) as pool:
        found = list(pool.map(read_one, block.to_pylist()))
    return _columns(block, block["place"].to_numpy(), found, height, width)


def _columns(
    table: pa.Table, place: NDArray[np.int64], found: list[_Found], height: int, width: int
) -> Columns:
    encoded = pa.array([each.encoded for each in found], pa.binary())
    columns = decode_images(encoded, height, width)
    decoded = columns.pop("decoded")
    errors = [
        "" if is_decoded else each.error or "does not decode"
        for each, is_decoded in zip(found, decoded, strict=True)
    ]
    columns |= {
        "width": np.array([each.width for each in found], np.int64),
        "height": np.array([each.height for each in found], np.int64),
        "error": np.array(errors, np.object_),
        "place": place,
    }
    for name in ("key", "split"):
        columns[name] = np.array(table[name].fill_null("").to_pylist(), np.object_)
    for name in ("pid", "camid"):
        columns[name] = table[name].cast(pa.int64()).fill_null(NULL).to_numpy()
    return columns


def _opened(stored: pa.Scalar) -> _Found:
    """Return an image of a shard, and its size, from its head alone."""
    if not stored.is_valid:
        return _Found(error="its shard is damaged")
    encoded: bytes = stored.as_py()
    try:
        with Image.open(io.BytesIO(encoded), formats=STORED_FORMATS) as image:
            return _Found(encoded, image.width, image.height)
    except (OSError, ValueError, SyntaxError) as error:
        return _Found(error=first_line(error))
