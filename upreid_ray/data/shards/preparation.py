"""Records -> shards with a manifest, in Ray Data tasks.

A task reads, checks and measures the images of a shard, and writes it. Duplicates are found
when all images were measured: then shards with duplicates are written again, without decoding
anything. Each file appears whole; its metadata say what it was made from. A
later call with the same arguments keeps such files, so that it continues a killed one.
"""

import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from upreid_ray.config.errors import InputError, first_line
from upreid_ray.data.shards.duplicates import equal_originals, near_originals
from upreid_ray.data.shards.images import (
    MAX_IMAGE_BYTES,
    ImageRules,
    RefusedImageError,
    check,
    measure,
    usable_image,
)
from upreid_ray.data.shards.manifest import (
    FORMAT_VERSION,
    MADE_FROM,
    MANIFEST_FILE,
    REFUSED_FILE,
    SCHEMA,
    TRAIN_SPLITS,
    Manifest,
    Shard,
    written_from,
)
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.data.sources.records import Record, Records, Refused
from upreid_ray.storage import Location

ROW_GROUP_IMAGES = 64
SHARD_BYTES = 128 * 2**20
# Small sets are cut finer, so that several cores prepare them.
SMALL_SHARD_IMAGES = 512
NUM_SMALL_SHARDS = 8
# Column of a task's records: position in the source, which is the order of reading.
PLACE = "place"


class Written(BaseModel):
    """A shard on disk, described without its images.

    It has the images that the task of the shard refused, and mean and mean square of each
    channel over the others, ``[3]``, zero if there are none.
    """

    model_config = ConfigDict(frozen=True)

    shard: Shard
    refused: tuple[Refused, ...]
    mean: tuple[float, ...]
    mean_square: tuple[float, ...]


def write_shards(
    records: Records,
    uri: str,
    *,
    source: str,
    seed: int,
    rules: ImageRules,
    on_progress: Callable[[int], None],
) -> ShardSet:
    """Write the records as shards, and the manifest last.

    A complete set is left as it is. Shards that a killed call with the same arguments finished
    are kept. ``on_progress`` is called with the number of images done since the last call.

    Raises:
        InputError: The folder holds another set or cannot be written, or no image is usable.
    """
    made_from = records.digest(FORMAT_VERSION, seed, rules)
    if ShardSet.exists(uri):
        shards = _open_complete(uri, made_from)
        on_progress(len(records))
        return shards
    folder = Location(uri)
    try:
        folder.make_folder()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({first_line(error)})") from error

    writer = ShardWriter(folder, made_from, rules, records.read, records.num_readers)
    parts = cut_into_shards(records.table, seed=seed)
    written: dict[str, Written] = {}
    for each in _in_tasks(ray.data.from_arrow(list(parts)), writer.write):
        written[each.shard.name] = each
        on_progress(each.shard.num_images + len(each.refused))
    if rules.duplicates != "keep":
        removal = _duplicates(folder, written, rules)
        rows = [{"name": name, "again": json.dumps(again)} for name, again in removal.items()]
        if rows:
            tasks = ray.data.from_items(rows, override_num_blocks=len(rows))
            for each in _in_tasks(tasks, writer.remove):
                written[each.shard.name] = each

    used, refused = _outcome(records, written.values(), source)
    if refused:
        lines = "".join(json.dumps(asdict(one)) + "\n" for one in refused)
        (folder / REFUSED_FILE).write_whole(lines.encode())
    mean, std = _statistics(used)
    manifest = Manifest(
        version=FORMAT_VERSION,
        source=source,
        made_from=made_from,
        rules=asdict(rules),
        row_group_images=ROW_GROUP_IMAGES,
        shards=tuple(each.shard for each in used),
        num_refused=dict(Counter(one.kind for one in refused)),
        mean=mean,
        std=std,
    )
    (folder / MANIFEST_FILE).write_whole(manifest.model_dump_json(indent=1).encode())
    return ShardSet(folder, manifest)


def _open_complete(uri: str, made_from: str) -> ShardSet:
    """Open the complete set of an earlier call with the same arguments.

    Raises:
        InputError: The set was made with other arguments.
    """
    shards = ShardSet.open(uri)
    if shards.manifest.made_from != made_from:
        raise InputError(f"--out {uri}: holds another set of shards; choose an empty folder")
    return shards


def _outcome(
    records: Records, written: Iterable[Written], source: str
) -> tuple[list[Written], list[Refused]]:
    """Return the shards that have images, sorted by name, and refused images, sorted by key.

    Raises:
        InputError: No shard has images.
    """
    shards = sorted(written, key=lambda each: each.shard.name)
    refused = [*records.refused, *(one for each in shards for one in each.refused)]
    used = [each for each in shards if each.shard.num_images]
    if not used:
        first = refused[0]
        raise InputError(
            f"{source}: none of {len(records)} images can be used; {first.key}: {first.reason}"
        )
    return used, sorted(refused, key=lambda one: one.key)


def cut_into_shards(table: pa.Table, *, seed: int) -> Iterator[pa.Table]:
    """Yield the records of each shard: a random part of a split, of bounded size.

    Returns:
        The columns of the records, the ``name`` of the shard, and `PLACE`. Records of one
        unit are in one shard.
    """
    table = table.append_column(PLACE, pa.array(np.arange(len(table))))
    for split in sorted(pc.unique(table.column("split")).to_pylist()):
        members = table.filter(pc.equal(table.column("split"), split))
        num_shards = max(
            math.ceil(pc.sum(members.column("num_bytes")).as_py() / SHARD_BYTES),
            min(NUM_SMALL_SHARDS, math.ceil(len(members) / SMALL_SHARD_IMAGES)),
        )
        for number, part in enumerate(_random_parts(members, num_shards, seed)):
            name = f"{split}-{number:05d}-of-{num_shards:05d}.parquet"
            yield members.take(pa.array(part)).append_column(
                "name", pa.array([name] * len(part))
            )


def _random_parts(members: pa.Table, num_parts: int, seed: int) -> list[NDArray[np.int64]]:
    """Return shuffled row numbers of the random parts of a table."""
    draw = np.random.default_rng(seed)
    if "unit" not in members.column_names:
        return np.array_split(draw.permutation(len(members)), num_parts)
    _, unit = np.unique(members.column("unit").to_numpy(), return_inverse=True)
    num_units = int(unit.max()) + 1
    part_of_unit = np.empty(num_units, np.int64)
    order = draw.permutation(num_units)
    for number, units in enumerate(np.array_split(order, min(num_parts, num_units))):
        part_of_unit[units] = number
    part = part_of_unit[unit]
    return [draw.permutation(np.flatnonzero(part == n)) for n in range(part.max() + 1)]


@dataclass(frozen=True)
class ShardWriter:
    """Writer of the shards of a set; tasks call its methods. ``read`` is that of `Records`."""

    folder: Location
    made_from: str
    rules: ImageRules
    read: Callable[[Record], bytes]
    num_readers: int

    def write(self, part: pa.Table) -> Written:
        """Write the shard of these records, from `cut_into_shards`, unless it is there."""
        file, split = (
            self.folder / part.column("name")[0].as_py(),
            part.column("split")[0].as_py(),
        )
        if written_from(file, self.made_from) is None:
            table, refused = self._table(part, split)
            self._save(file, table, refused)
        return self._written(file, split)

    def remove(self, removal: pa.Table) -> Written:
        """Write a shard again without its duplicates.

        Args:
            removal: One row, with the ``name`` of the shard and ``again``: a JSON object that
                maps the row of each duplicate to the key of its original.
        """
        file = self.folder / removal.column("name")[0].as_py()
        again = {int(k): v for k, v in json.loads(removal.column("again")[0].as_py()).items()}
        with file.open_input_file() as stream:
            table = pq.read_table(stream)
        refused = json.loads(table.schema.metadata[b"refused"])
        keys = table.column("key").to_pylist()
        refused += [
            asdict(Refused(keys[row], "duplicate", f"is a duplicate of {original}"))
            for row, original in again.items()
        ]
        stays = np.ones(len(table), bool)
        stays[list(again)] = False
        split = table.column("split")[0].as_py()
        self._save(file, table.filter(pa.array(stays)), refused)
        return self._written(file, split)

    def _table(self, part: pa.Table, split: str) -> tuple[pa.Table, list[dict[str, str]]]:
        """Read and check the images of a shard; return the usable and the refused ones."""
        records = part.append_column("order", pa.array(np.arange(len(part))))
        in_source = records.sort_by(PLACE).to_pylist()  # in the order on disk
        rows, refused = [], []
        for record, encoded in zip(in_source, self._read_all(in_source), strict=True):
            try:
                if isinstance(encoded, Exception):
                    raise RefusedImageError("unreadable", first_line(encoded)) from encoded
                image = usable_image(encoded, max_height=self.rules.max_height)
                measures = measure(image.picture)
                if split in TRAIN_SPLITS:
                    check(measures, self.rules)
            except RefusedImageError as error:
                refused.append(asdict(Refused(record["key"], error.kind, str(error))))
                continue
            labels = {name: record[name] for name in ("key", "pid", "camid", "split")}
            rows.append((record["order"], {**labels, "image": image.encoded, **vars(measures)}))
        rows.sort(key=lambda row: row[0])
        return pa.Table.from_pylist([row for _, row in rows], schema=SCHEMA), refused

    def _read_all(self, records: Sequence[Record]) -> Iterator[bytes | Exception]:
        """Yield the encoded image of each record, or the error of reading it."""

        def read_one(record: Record) -> bytes | Exception:
            if record["num_bytes"] > MAX_IMAGE_BYTES:
                return ValueError(f"has {record['num_bytes']} bytes, too many for an image")
            try:
                return self.read(record)
            except (OSError, ValueError, InputError) as error:
                return error

        if self.num_readers == 1:
            yield from map(read_one, records)
            return
        with ThreadPoolExecutor(self.num_readers) as pool:
            yield from pool.map(read_one, records)

    def _save(self, file: Location, table: pa.Table, refused: list[dict[str, str]]) -> None:
        metadata = {MADE_FROM: self.made_from, "refused": json.dumps(refused)}
        buffer = io.BytesIO()
        small = [name for name in _leaves(table.schema) if name != "image"]
        pq.write_table(
            table.replace_schema_metadata(metadata),
            buffer,
            row_group_size=ROW_GROUP_IMAGES,
            # JPEG does not compress further, and statistics of image bytes are useless.
            compression={"image": "none"} | dict.fromkeys(small, "zstd"),
            use_dictionary=small,
            write_statistics=small,
            write_page_checksum=True,
        )
        file.write_whole(buffer.getvalue())

    def _written(self, file: Location, split: str) -> Written:
        """Describe a shard from what is on disk."""
        with file.open_input_file() as stream:
            content = stream.read_buffer()
        table = pq.read_table(pa.BufferReader(content), columns=["mean", "mean_square"])
        shard = Shard(
            name=file.name,
            split=split,
            num_images=len(table),
            num_bytes=len(content),
            sha256=sha256(content).hexdigest(),
        )
        mean, mean_square = (
            tuple(np.stack(column.to_numpy()).astype(np.float64).mean(0).tolist())
            if len(table)
            else (0.0, 0.0, 0.0)
            for column in table
        )
        refused = json.loads(table.schema.metadata[b"refused"])
        return Written(shard=shard, refused=refused, mean=mean, mean_square=mean_square)


def _leaves(schema: pa.Schema) -> list[str]:
    """Return the columns of a Parquet file, in which the elements of a list are a column."""
    return [
        f"{field.name}.list.element" if pa.types.is_fixed_size_list(field.type) else field.name
        for field in schema
    ]


def _in_tasks(inputs: ray.data.Dataset, do: Callable[[pa.Table], Written]) -> Iterator[Written]:
    """Call a function on each block of a dataset in a task; yield the results as they come."""

    def do_one(block: pa.Table) -> dict[str, list[str]]:
        return {"written": [do(block).model_dump_json()]}

    results = inputs.map_batches(do_one, batch_size=None, batch_format="pyarrow")
    results.context.enable_progress_bars = False
    for row in results.iter_rows():
        yield Written.model_validate_json(row["written"])


def _duplicates(
    folder: Location, written: dict[str, Written], rules: ImageRules
) -> dict[str, dict[int, str]]:
    """Return the rows of duplicates, with the keys of their originals, by name of the shard."""
    names = [
        name
        for name, each in sorted(written.items())
        if each.shard.split in TRAIN_SPLITS and each.shard.num_images
    ]
    column = "fingerprint" if rules.duplicates == "near" else "digest"
    tables = []
    for name in names:
        with (folder / name).open_input_file() as stream:
            tables.append(pq.read_table(stream, columns=["key", column]))
    if not tables:
        return {}
    keys = pa.chunked_array(
        [
            chunk.cast(pa.large_string())
            for table in tables
            for chunk in table.column("key").chunks
        ]
    )
    values: Any = pa.concat_tables(tables, promote_options="none").column(column)
    if rules.duplicates == "near":
        originals = near_originals(values.to_numpy(), max_distance=rules.max_distance)
    else:
        originals = equal_originals(
            np.frombuffer(b"".join(values.to_pylist()), dtype=np.dtype("V16"))
        )
    repeats = np.flatnonzero(originals != np.arange(len(originals)))
    names_of = keys.take(pa.array(originals[repeats])).to_pylist()
    starts = np.cumsum([0, *(len(table) for table in tables)])
    removal: dict[str, dict[int, str]] = {}
    for place, original in zip(repeats.tolist(), names_of, strict=True):
        number = int(np.searchsorted(starts, place, "right")) - 1
        removal.setdefault(names[number], {})[place - int(starts[number])] = original
    return removal


def _statistics(
    written: Sequence[Written],
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return mean and standard deviation of each channel.

    They are those of the training images, or of all images if there are no training images.
    """
    used = [each for each in written if each.shard.split in TRAIN_SPLITS] or written
    weights = np.array([each.shard.num_images for each in used], np.float64)
    weights /= weights.sum()
    mean = weights @ np.array([each.mean for each in used])
    mean_square = weights @ np.array([each.mean_square for each in used])
    std = np.sqrt(np.maximum(mean_square - mean**2, 0))
    red, green, blue = (round(float(value), 4) for value in mean)
    red_std, green_std, blue_std = (round(float(value), 4) for value in std)
    return (red, green, blue), (red_std, green_std, blue_std)
