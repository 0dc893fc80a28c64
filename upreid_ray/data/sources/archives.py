"""Files that hold many images -> records: tar files, LMDB, Parquet.

Names inside an archive are used as keys only: nothing is unpacked.
"""

import itertools
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from upreid_ray.config.errors import InputError, first_line
from upreid_ray.data.sources.pickles import read_pickle
from upreid_ray.data.sources.records import (
    Record,
    Records,
    Refused,
    is_image_name,
    make_records,
    num_readers,
)
from upreid_ray.storage import Location, reading

LMDB_FILE = "data.mdb"
LMDB_KEYS_FILE = "keys.pkl"
# Keys under which converters of datasets keep the list and the number of the others.
LMDB_META_KEYS = ("__keys__", "__len__")
# Columns of a Parquet source, which have these names unless the user gives others.
PARQUET_COLUMNS = ("image", "key", "pid", "camid", "split")
SPLITS = ("train", "query", "gallery", "unlabeled")


def tar_records(source: str, tars: Sequence[str]) -> Records:
    """Return the images in tar files, such as WebDataset's shards.

    A key is the name in the tar file, after that of the tar file if there are several. A tar
    file that is damaged gives the images before the damage.

    Raises:
        InputError: A file cannot be read or is compressed, or there are no images.
    """
    keys: list[str] = []
    places: list[tuple[int, int, int]] = []
    refused: list[Refused] = []
    for number, uri in enumerate(tars):
        tar = Location(uri)
        prefix = f"{tar.name}/" if len(tars) > 1 else ""
        with reading(uri), tar.open_input_file() as stream:
            try:
                for member in _members(stream):
                    key = f"{prefix}{member.name}"
                    if member.isreg() and not member.issparse():
                        keys.append(key)
                        places.append((number, member.offset_data, member.size))
                    else:
                        reason = "is a link, a device or a sparse file"
                        refused.append(Refused(key, "unreadable", reason))
            except tarfile.TarError as error:
                refused.append(Refused(uri, "unreadable", f"ends early: {first_line(error)}"))
    if not keys and refused:
        raise InputError(f"{refused[0].key}: {refused[0].reason}")
    files, offsets, sizes = np.array(places, np.int64).reshape(-1, 3).T
    columns = {"key": keys, "num_bytes": sizes, "file": files, "offset": offsets}
    readers = num_readers([Location(tars[0])] if tars else [])
    return make_records(
        source, columns, TarReader(tuple(tars)), num_readers=readers, refused=refused
    )


@dataclass(frozen=True)
class TarReader:
    """Function that reads images out of tar files."""

    tars: tuple[str, ...]

    def __call__(self, record: Record) -> bytes:
        """Return the bytes of a member."""
        content: bytes = _opened(self.tars[record["file"]]).read_at(
            record["num_bytes"], record["offset"]
        )
        return content


@lru_cache(maxsize=32)
def _opened(uri: str) -> pa.NativeFile:
    return Location(uri).open_input_file()


def _members(stream: pa.NativeFile) -> Iterable[tarfile.TarInfo]:
    """Yield the images of a tar file, including links and such, which are refused later."""
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # otherwise it keeps every member
            if not member.isdir() and is_image_name(member.name):
                yield member


def lmdb_records(source: str) -> Records:
    """Return the images in an LMDB, as LUPerson comes.

    The source is its file, its folder, or a folder that holds this folder alone. The keys are
    those of a pickled list, or of ``keys`` in a pickled dictionary, in ``keys.pkl`` in or
    beside the folder; without it, all keys of the LMDB. The ``pids`` of the dictionary, if
    there are any, are kept. The images stay unlabeled all the same, since those of LUPerson-NL
    are noisy: a tracker gave them.

    Raises:
        InputError: It cannot be read, is not local, or has no images.
    """
    location = Location(source)
    if not location.is_local:
        raise InputError(
            f"{source}: an LMDB is mapped into memory, so it must be on a local disk"
        )
    path = Path(location.path)
    file = path / LMDB_FILE if path.is_dir() else path
    if not file.exists():
        file = inner_lmdb(location) or file
    places = [folder / LMDB_KEYS_FILE for folder in file.parents[:2]]
    listed = next((place for place in places if place.is_file()), None)
    raw: Sequence[str | bytes] = []
    raw_pids: Sequence[Any] | None = None
    if listed is not None:
        raw, raw_pids = _listed_keys(listed)
    try:
        env = _opened_lmdb(str(file))
        stat = env.stat()
        if listed is None:
            with env.begin() as transaction:
                raw = list(transaction.cursor().iternext(values=False))
    except lmdb.Error as error:
        raise InputError(f"{source}: cannot be read as LMDB ({first_line(error)})") from error
    pages = stat["leaf_pages"] + stat["overflow_pages"]
    mean_size = pages * stat["psize"] // max(1, stat["entries"])
    keys: list[str] = []
    pids: list[Any] = []
    for each, pid in zip(raw, raw_pids or itertools.repeat(None)):  # noqa: B905, one is endless
        key = each if isinstance(each, str) else each.decode(errors="surrogateescape")
        if key not in LMDB_META_KEYS:
            keys.append(key)
            pids.append(pid)
    columns = {"key": keys, "pid": pids, "num_bytes": np.full(len(keys), mean_size)}
    return make_records(source, columns, LmdbReader(str(file)))


def inner_lmdb(folder: Location) -> Path | None:
    """Return the file of the LMDB in the only folder of a folder; None if there is none.

    Raises:
        InputError: There are several LMDBs, or images or other folders beside it.
    """
    if not folder.is_local:
        return None
    path = Path(folder.path)
    found = sorted(path.glob(f"*/{LMDB_FILE}"))
    if not found:
        return None
    beside = [
        each
        for each in path.iterdir()
        if each != found[0].parent
        and not each.name.startswith((".", "__MACOSX"))
        and (each.is_dir() or is_image_name(each.name))
    ]
    if beside:
        raise InputError(
            f"{folder}: holds {beside[0].name} beside the LMDB {found[0].parent}; give one of "
            "them"
        )
    return found[0]


def _listed_keys(file: Path) -> tuple[Sequence[str | bytes], Sequence[Any] | None]:
    """Return the keys of a list of keys, and the persons of its images if it has them."""
    content = read_pickle(file.read_bytes(), str(file))
    keys, pids = (
        (content.get("keys"), content.get("pids"))
        if isinstance(content, dict)
        else (content, None)
    )
    if not isinstance(keys, list) or not all(isinstance(k, str | bytes) for k in keys):
        raise InputError(
            f"{file}: holds neither a list of keys nor a dictionary with such a list as keys"
        )
    if pids is not None and not (
        isinstance(pids, list | tuple)
        and len(pids) == len(keys)
        and all(isinstance(pid, int) for pid in pids)
    ):
        raise InputError(f"{file}: its pids are not a list of one whole number for each key")
    return keys, pids


@dataclass(frozen=True)
class LmdbReader:
    """Function that reads images out of an LMDB."""

    file: str

    def __call__(self, record: Record) -> bytes:
        """Return the value of a key."""
        try:
            with _opened_lmdb(self.file).begin() as transaction:
                content: bytes | None = transaction.get(record["key"].encode())
        except lmdb.Error as error:
            raise OSError(f"the LMDB cannot be read: {first_line(error)}") from error
        if content is None:
            raise ValueError("the LMDB has no such key")
        return content


# A process may open an LMDB only once.
@lru_cache(maxsize=1)
def _opened_lmdb(file: str) -> lmdb.Environment:
    return lmdb.open(file, subdir=False, readonly=True, lock=False, readahead=False)


def parquet_records(source: str, files: Sequence[str], columns: Mapping[str, str]) -> Records:
    """Return the images in Parquet files.

    Reading one image of a row group costs the whole of it, so a row group of the source stays
    together: its images go into one shard, shuffled with those of others.

    Args:
        source: Name of the source in errors.
        files: Paths or URIs.
        columns: Names of the columns for ``image`` (encoded bytes), ``key``, ``pid``,
            ``camid`` and ``split`` if they differ from these; a dot leads into a structure
            (``image.bytes``). Without a column of keys, a key is made of file and row.

    Raises:
        InputError: A file cannot be read, or a column is missing or does not fit.
    """
    tables = []
    unit = 0
    for number, uri in enumerate(files):
        location = Location(uri)
        with reading(uri), location.open_input_file() as stream:
            file = pq.ParquetFile(stream)
            names = _column_names(uri, file.schema_arrow, columns)
            labels = file.read([name for name in names.values() if name != names["image"]])
            sizes = [
                file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)
            ]
            size = file.metadata.num_rows
            table = {
                column: _field(labels, name)
                for column, name in names.items()
                if column != "image"
            }
            keys = [f"{location.name}/{row:08d}" for row in range(size)]
            table.setdefault("key", pa.array(keys))
            groups = np.repeat(np.arange(len(sizes)), sizes)
            table |= {
                "num_bytes": pa.array(_mean_sizes(file, names["image"])[groups]),
                "file": pa.array(np.full(size, number)),
                "row_group": pa.array(groups),
                "row": pa.array(np.concatenate([np.arange(n) for n in [*sizes, 0]])),
                "unit": pa.array(unit + groups),
            }
            unit += len(sizes)
            tables.append(pa.table(table))
    try:
        joined = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(
            f"{source}: its files do not fit each other ({first_line(error)})"
        ) from error
    table = {name: joined.column(name) for name in joined.column_names}
    if "split" in table:
        unknown = set(pc.unique(table["split"]).to_pylist()) - set(SPLITS)
        if unknown:
            raise InputError(
                f"{source}: the split {unknown.pop()!r} is none of {', '.join(SPLITS)}"
            )
    image = columns.get("image", "image")
    return make_records(source, table, ParquetReader(tuple(files), image))


def _column_names(uri: str, schema: pa.Schema, given: Mapping[str, str]) -> dict[str, str]:
    """Return the names in the file of the columns that it has for records."""
    names = {}
    for ours in PARQUET_COLUMNS:
        name = given.get(ours, ours)
        if name.partition(".")[0] in schema.names:
            names[ours] = name
        elif ours in given or ours == "image":
            raise InputError(
                f"{uri}: has no column {name}; name it with --columns {ours}=NAME (it has "
                f"{', '.join(schema.names[:20])})"
            )
    return names


def _field(table: pa.Table, name: str) -> pa.ChunkedArray:
    """Return a column, or the field of a structure if the name has dots."""
    column, *parts = name.split(".")
    return pc.struct_field(table.column(column), parts) if parts else table.column(column)


def _mean_sizes(file: pq.ParquetFile, image: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the mean size of an image of each row group, in bytes."""
    sizes = []
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        columns = [group.column(i) for i in range(group.num_columns)]
        of_image = [c.total_uncompressed_size for c in columns if c.path_in_schema == image]
        sizes.append(sum(of_image) // max(1, group.num_rows))
    return np.array(sizes, np.int64)


@dataclass(frozen=True)
class ParquetReader:
    """Function that reads images out of Parquet files."""

    files: tuple[str, ...]
    image: str

    def __call__(self, record: Record) -> bytes:
        """Return the image of a row."""
        images = _row_group(self.files[record["file"]], record["row_group"], self.image)
        content = images[record["row"]].as_py()
        if not isinstance(content, bytes):
            raise ValueError("has no bytes" if content is None else "is not bytes")
        return content


@lru_cache(maxsize=1)
def _row_group(uri: str, number: int, image: str) -> pa.ChunkedArray:
    with Location(uri).open_input_file() as stream:
        return _field(pq.ParquetFile(stream).read_row_group(number, columns=[image]), image)
