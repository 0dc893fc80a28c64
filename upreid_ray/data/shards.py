"""Records -> Parquet shards with a manifest, and back.

A shard is a Parquet file with the columns ``key``, ``image`` (encoded bytes), ``pid``,
``camid`` and ``split``; the images of a shard are a random part of their split. The
``manifest.json`` beside the shards is written last: where it is, the set is whole.
"""

import hashlib
import io
import json
import math
import pickle
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from PIL import Image, ImageOps
from pyarrow import fs
from pydantic import BaseModel, ConfigDict, ValidationError

from upreid_ray.config import InputError, first_line
from upreid_ray.data.layouts import Record

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
ROW_GROUP_IMAGES = 64
SHARD_BYTES = 128 * 2**20
# Small sets are cut finer, so that several cores prepare them.
SMALL_SHARD_IMAGES = 512
NUM_SMALL_SHARDS = 8
# What JPEG or PNG files of this kind decode to is RGB and upright as it is.
KEPT_FORMATS = {"JPEG", "PNG"}
KEPT_MODES = {"RGB", "L"}
ORIENTATION_TAG = 0x0112
JPEG_QUALITY = 95

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("pid", pa.int32()),
        pa.field("camid", pa.int32()),
        pa.field("split", pa.string(), nullable=False),
    ]
)


class Shard(BaseModel):
    """One Parquet file of the set."""

    model_config = ConfigDict(frozen=True)

    name: str
    split: str
    num_images: int
    num_bytes: int
    sha256: str


class Refused(BaseModel):
    """An image that did not go in."""

    model_config = ConfigDict(frozen=True)

    key: str
    reason: str


class Manifest(BaseModel):
    """What a set of shards holds.

    Attributes:
        version: Of the format.
        source: Where the images came from.
        plan: Digest of what was asked for: the records and all that decides how they are kept.
        row_group_images: Images of each row group of a shard, the last one excepted.
        shards: In order.
        refused: What did not go in, and why.
    """

    model_config = ConfigDict(frozen=True)

    version: int
    source: str
    plan: str
    row_group_images: int
    shards: tuple[Shard, ...]
    refused: tuple[Refused, ...]

    def digest(self, splits: Collection[str] | None = None) -> str:
        """Identify the content of these splits (of all): equal images have equal digests."""
        hashes = [
            shard.sha256 for shard in self.shards if splits is None or shard.split in splits
        ]
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def counts(self) -> dict[str, int]:
        """Count the images of each split."""
        counts: dict[str, int] = {}
        for shard in self.shards:
            counts[shard.split] = counts.get(shard.split, 0) + shard.num_images
        return counts


@dataclass(frozen=True)
class ShardPlan:
    """What one task writes: a file, its records in order, and the limits they are held to."""

    name: str
    uri: str
    digest: str
    records: tuple[Record, ...]
    max_height: int | None


def open_folder(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the filesystem and the path of a folder or URI.

    Raises:
        InputError: The URI has an unknown scheme or cannot be opened.
    """
    try:
        if "://" in uri:
            filesystem, path = fs.FileSystem.from_uri(uri)
        else:
            filesystem, path = fs.LocalFileSystem(), str(Path(uri).absolute())
    except (pa.ArrowException, OSError) as error:
        msg = f"{uri}: cannot be opened ({first_line(error)})"
        raise InputError(msg) from error
    return filesystem, path


def read_manifest(uri: str) -> Manifest:
    """Return the manifest of the set of shards at a folder or URI.

    Raises:
        InputError: There is none, or it cannot be read.
    """
    filesystem, path = open_folder(uri)
    try:
        with filesystem.open_input_stream(f"{path}/{MANIFEST_FILE}") as stream:
            return Manifest.model_validate_json(stream.read())
    except FileNotFoundError:
        msg = f"{uri}: no {MANIFEST_FILE}; make shards with jobs/prepare.py SOURCE --out {uri}"
        raise InputError(msg) from None
    except (pa.ArrowException, OSError, ValidationError) as error:
        msg = f"{uri}/{MANIFEST_FILE}: cannot be read ({first_line(error)})"
        raise InputError(msg) from error


def write_shards(
    records: Sequence[Record],
    uri: str,
    *,
    source: str,
    seed: int,
    max_height: int | None,
    on_progress: Callable[[int], None],
) -> Manifest:
    """Write the records as shards, one Ray Data task a shard, and the manifest last.

    A set that is whole already is left as it is, and shards that an earlier, killed call with
    the same arguments finished are kept.

    Args:
        records: Their keys are unique.
        uri: Folder or URI, made if it does not exist.
        source: Noted in the manifest.
        seed: Of the order of the images.
        max_height: Higher images are shrunk to it, in pixels; None leaves them.
        on_progress: Called with the number of images done since the last call.

    Raises:
        InputError: The folder holds another set or cannot be written, or no image is usable.
    """
    plans = _plan_shards(records, uri, seed=seed, max_height=max_height)
    digest = plans[0].digest
    filesystem, path = open_folder(uri)
    if filesystem.get_file_info(f"{path}/{MANIFEST_FILE}").type == fs.FileType.File:
        manifest = read_manifest(uri)
        if manifest.plan != digest:
            msg = f"--out {uri}: holds another set of shards; choose an empty folder"
            raise InputError(msg)
        on_progress(len(records))
        return manifest
    try:
        filesystem.create_dir(path, recursive=True)
    except OSError as error:
        msg = f"--out {uri}: cannot be written ({first_line(error)})"
        raise InputError(msg) from error

    shards, refused = _write_all(plans, on_progress)
    if not any(shard.num_images for shard in shards):
        first = refused[0]
        msg = (
            f"{source}: none of {len(records)} images can be used; {first.key}: {first.reason}"
        )
        raise InputError(msg)

    manifest = Manifest(
        version=FORMAT_VERSION,
        source=source,
        plan=digest,
        row_group_images=ROW_GROUP_IMAGES,
        shards=tuple(sorted((s for s in shards if s.num_images), key=lambda shard: shard.name)),
        refused=tuple(sorted(refused, key=lambda entry: entry.key)),
    )
    write_whole(
        filesystem, f"{path}/{MANIFEST_FILE}", manifest.model_dump_json(indent=1).encode()
    )
    return manifest


def usable_image(encoded: bytes, *, max_height: int | None) -> bytes:
    """Return an encoded image that decodes to upright RGB, re-encoded only if it must be.

    Raises:
        ValueError: With the reason why the image cannot be used.
    """
    if not encoded:
        msg = "the file is empty"
        raise ValueError(msg)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(encoded))
            image.load()
    except Exception as error:
        msg = f"does not decode: {first_line(error)}"
        raise ValueError(msg) from error
    num_frames = getattr(image, "n_frames", 1)
    if num_frames > 1:
        msg = f"has {num_frames} frames"
        raise ValueError(msg)
    too_high = max_height is not None and image.height > max_height
    is_upright = image.getexif().get(ORIENTATION_TAG, 1) == 1
    if (
        image.format in KEPT_FORMATS
        and image.mode in KEPT_MODES
        and is_upright
        and not too_high
    ):
        return encoded
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut instead of scale
        scaled = np.asarray(image).astype(np.uint32) >> 8
        upright = Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    else:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    if max_height is not None and upright.height > max_height:
        width = max(1, round(upright.width * max_height / upright.height))
        upright = upright.resize((width, max_height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    upright.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def plan_digest(records: Sequence[Record], *, seed: int, max_height: int | None) -> str:
    """Identify what `write_shards` is asked for: the records and how they are kept."""
    asked = hashlib.sha256(json.dumps([FORMAT_VERSION, seed, max_height]).encode())
    for record in records:
        asked.update(repr((record.key, record.pid, record.camid, record.num_bytes)).encode())
    return asked.hexdigest()


def _plan_shards(
    records: Sequence[Record], uri: str, *, seed: int, max_height: int | None
) -> list[ShardPlan]:
    """Spread the records of each split at random over shards of bounded size."""
    digest = plan_digest(records, seed=seed, max_height=max_height)
    by_split: dict[str, list[Record]] = {}
    for record in records:
        by_split.setdefault(record.split, []).append(record)
    plans = []
    for split, members in sorted(by_split.items()):
        order = np.random.default_rng(seed).permutation(len(members))
        total_bytes = sum(record.num_bytes for record in members)
        num_shards = max(
            math.ceil(total_bytes / SHARD_BYTES),
            min(NUM_SMALL_SHARDS, math.ceil(len(members) / SMALL_SHARD_IMAGES)),
        )
        for number, part in enumerate(np.array_split(order, num_shards)):
            plans.append(
                ShardPlan(
                    name=f"{split}-{number:05d}-of-{num_shards:05d}.parquet",
                    uri=uri,
                    digest=digest,
                    records=tuple(members[i] for i in part),
                    max_height=max_height,
                )
            )
    return plans


def _write_all(
    plans: Sequence[ShardPlan], on_progress: Callable[[int], None]
) -> tuple[list[Shard], list[Refused]]:
    """Write the shards in Ray Data tasks; return them and what was refused, in any order."""
    tasks = ray.data.from_items(
        [{"plan": pickle.dumps(plan)} for plan in plans], override_num_blocks=len(plans)
    )
    # These pickles are the ones of the line above, not anybody's files.
    results = tasks.map(lambda row: _write_planned(pickle.loads(row["plan"])))  # noqa: S301
    results.context.enable_progress_bars = False
    shards: list[Shard] = []
    refused: list[Refused] = []
    for row in results.iter_rows():
        left_out = [Refused(**entry) for entry in json.loads(row["refused"])]
        shards.append(Shard.model_validate_json(row["shard"]))
        refused += left_out
        on_progress(shards[-1].num_images + len(left_out))
    return shards, refused


def _write_planned(plan: ShardPlan) -> dict[str, str]:
    """Write one shard unless it is there; return it and what was refused, as JSON."""
    filesystem, path = open_folder(plan.uri)
    file = f"{path}/{plan.name}"
    refused = _refused_by(filesystem, file, plan)
    if refused is None:
        encoded, refused = _encode(plan)
        write_whole(filesystem, file, encoded)
    with filesystem.open_input_file(file) as stream:
        content = stream.read()
    shard = Shard(
        name=plan.name,
        split=plan.records[0].split,
        num_images=len(plan.records) - len(refused),
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    return {"shard": shard.model_dump_json(), "refused": json.dumps(refused)}


def _refused_by(
    filesystem: fs.FileSystem, file: str, plan: ShardPlan
) -> list[dict[str, str]] | None:
    """Return what the shard refused if this very plan wrote it already, else None."""
    if filesystem.get_file_info(file).type != fs.FileType.File:
        return None
    try:
        metadata = pq.read_schema(filesystem.open_input_file(file)).metadata or {}
    except (pa.ArrowException, OSError):
        return None
    if metadata.get(b"plan") != plan.digest.encode():
        return None
    refused: list[dict[str, str]] = json.loads(metadata[b"refused"])
    return refused


def _encode(plan: ShardPlan) -> tuple[bytes, list[dict[str, str]]]:
    """Return the Parquet file of a plan, and what was refused."""
    rows, refused = [], []
    for record in plan.records:
        try:
            record.key.encode()  # file names need not be text
            image = usable_image(record.read(), max_height=plan.max_height)
        except (ValueError, OSError) as error:
            key = record.key.encode(errors="backslashreplace").decode()
            refused.append({"key": key, "reason": first_line(error)})
            continue
        rows.append(
            {
                "key": record.key,
                "image": image,
                "pid": record.pid,
                "camid": record.camid,
                "split": record.split,
            }
        )
    metadata = {"plan": plan.digest, "refused": json.dumps(refused)}
    buffer = io.BytesIO()
    pq.write_table(
        pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(metadata)),
        buffer,
        row_group_size=ROW_GROUP_IMAGES,
        compression={
            "image": "none",
            "key": "zstd",
            "pid": "zstd",
            "camid": "zstd",
            "split": "zstd",
        },
    )
    return buffer.getvalue(), refused


def write_whole(filesystem: fs.FileSystem, file: str, content: bytes) -> None:
    """Write a file under another name first, so that it is never there in part."""
    with filesystem.open_output_stream(f"{file}.part") as stream:
        stream.write(content)
    filesystem.move(f"{file}.part", file)
