"""Records: the images of a source, described without their pixels.

There may be millions of records. Therefore they are rows of a table, not objects, and a
function reads the image of a record in the process that needs it.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from upreid_ray.config.errors import InputError, first_line
from upreid_ray.storage import Location

Split = Literal["train", "query", "gallery", "unlabeled"]
Record = Mapping[str, Any]
"""A row of `Records.table`: the value of each column."""

# Requests that a process has under way if files are not local.
NUM_REMOTE_READERS = 16
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")

FIELDS = {
    "key": pa.large_string(),
    "split": pa.string(),
    "pid": pa.int32(),
    "camid": pa.int32(),
    "num_bytes": pa.int64(),
}


@dataclass(frozen=True)
class Refused:
    """An image that does not become part of a set.

    Attributes:
        key: Key of the image, or its file name if it has no key.
        kind: One word, by which refused images are counted.
        reason: Reason in one line.
    """

    key: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Records:
    """The images of a source.

    Attributes:
        table: One row for each image, sorted by ``key``, which is unique. Other columns are
            ``split``, ``pid`` and ``camid`` (null if unknown) and ``num_bytes`` (size of the
            encoded image, may be an estimate). Rows with an equal ``unit``, if there is such a
            column, are read together and stay in one shard. More columns are for ``read``.
        read: Function that returns the encoded image of a record, in any process. It raises
            OSError or ValueError with the reason if it cannot.
        num_readers: Number of images that a process reads at a time; more than one if reading
            waits for a network.
        refused: Entries of the source that cannot be images.
    """

    table: pa.Table
    read: Callable[[Record], bytes]
    num_readers: int
    refused: tuple[Refused, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.table)

    def digest(self, *settings: object) -> str:
        """Return a digest of the images, and of settings that decide how they are kept."""
        digest = hashlib.sha256(repr(settings).encode())
        keys = self.table.column("key").combine_chunks()
        digest.update(pc.binary_length(keys).to_numpy().tobytes())
        digest.update(memoryview(keys.buffers()[2])[: pc.sum(pc.binary_length(keys)).as_py()])
        for name in ("pid", "camid", "num_bytes"):
            # No person and no camera has the number that stands for null here.
            column = pc.fill_null(self.table.column(name).cast(pa.int64()), -(2**40))
            digest.update(column.to_numpy().tobytes())
        return digest.hexdigest()


def make_records(
    source: str,
    columns: Mapping[str, Sequence[Any] | pa.Array],
    read: Callable[[Record], bytes],
    *,
    num_readers: int = 1,
    refused: Iterable[Refused] = (),
) -> Records:
    """Return records: sorted by key, with all columns, and without repeated keys.

    Names that are not text cannot be keys, and are refused. All columns of `Records.table` but
    ``key`` and ``num_bytes`` may be missing. Errors name the source.

    Raises:
        InputError: There are no images, or a column has values that do not fit it.
    """
    refused = [not_text(each.key) or each for each in refused]
    if not isinstance(columns["key"], pa.Array | pa.ChunkedArray):
        refusals = [not_text(key) for key in columns["key"]]
        refused += filter(None, refusals)
        is_text = [each is None for each in refusals]
        columns = {name: list(compress(column, is_text)) for name, column in columns.items()}
    size = len(columns["key"])
    if size == 0:
        endings = " ".join(IMAGE_SUFFIXES)
        raise InputError(f"{source}: no images found (files that end in {endings})")
    filled = {"split": pa.repeat("unlabeled", size), **columns}
    table = {}
    for name in [*FIELDS, *(name for name in filled if name not in FIELDS)]:
        try:
            if name not in filled:
                table[name] = pa.nulls(size, FIELDS[name])
            elif isinstance(filled[name], pa.Array | pa.ChunkedArray):
                table[name] = filled[name].cast(FIELDS.get(name, filled[name].type))
            else:
                table[name] = pa.array(filled[name], FIELDS.get(name))
        except (pa.ArrowException, OverflowError) as error:
            raise InputError(
                f"{source}: the column {name} cannot be used ({first_line(error)})"
            ) from error
    records = pa.table(table)
    order = pc.sort_indices(records, [("key", "ascending")])
    keys = records.column("key").take(order).combine_chunks()
    repeated = np.concatenate([[False], pc.equal(keys[1:], keys[:-1]).to_numpy(False)])
    again = [
        Refused(key, "repeated", "another image of the source has this key")
        for key in keys.filter(pa.array(repeated)).to_pylist()
    ]
    kept = records.take(order.filter(pa.array(~repeated))).combine_chunks()
    return Records(kept, read, num_readers, (*refused, *again))


def num_readers(files: Iterable[Location]) -> int:
    """Return how many of these files a process reads at a time."""
    return 1 if all(file.is_local for file in files) else NUM_REMOTE_READERS


def is_image_name(name: str) -> bool:
    """Return whether a file name has a suffix of images."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def not_text(name: str) -> Refused | None:
    """Return the refusal of a name that is not text and cannot be a key; None for text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = name.encode(errors="backslashreplace").decode()
        return Refused(shown, "unreadable", "its name is not text (UTF-8)")
    return None
