"""The format of a set: Parquet shards, and a manifest that lists them.

A shard is a Parquet file with one row for each image. It holds a random part of a split. The
``manifest.json`` beside the shards is written last: if it is there, the set is complete.
"""

import hashlib
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from upreid_ray.config.errors import InputError, first_line
from upreid_ray.storage import Location

MANIFEST_FILE = "manifest.json"
REFUSED_FILE = "refused.jsonl"
FORMAT_VERSION = 2
MADE_FROM = "plan"  # its name in manifests and in the metadata of Parquet files
TRAIN_SPLITS = ("train", "unlabeled")
EVALUATION_SPLITS = ("query", "gallery")

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),  # encoded
        pa.field("pid", pa.int32()),
        pa.field("camid", pa.int32()),
        pa.field("split", pa.string(), nullable=False),
        # Measurements of an image, see `images.Measures`; version 1 has none of them.
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("sharpness", pa.float32()),
        pa.field("digest", pa.binary(16)),
        pa.field("fingerprint", pa.int64()),
        pa.field("mean", pa.list_(pa.float32(), 3)),
        pa.field("mean_square", pa.list_(pa.float32(), 3)),
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


class Manifest(BaseModel):
    """Content of a set of shards.

    Attributes:
        version: Version of the format.
        source: Folder, file or name that the images came from.
        made_from: Digest of the records, the seed and the rules; "plan" in the file.
        rules: Rules that the images met, see `images.ImageRules`.
        row_group_images: Number of images in each row group of a shard, except the last one.
        shards: Shards, in order.
        num_refused: Number of refused images of each kind; `ShardSet.refused` lists them.
        mean: Mean of each colour channel (0..1) over the training images, each weighted
            equally; None in version 1.
        std: Standard deviation of each colour channel over the pixels of these images.
    """

    model_config = ConfigDict(frozen=True, validate_by_name=True, serialize_by_alias=True)

    version: int
    source: str
    made_from: str = Field(alias=MADE_FROM)
    rules: Mapping[str, Any] = {}
    row_group_images: int
    shards: tuple[Shard, ...]
    num_refused: Mapping[str, int] = {}
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None

    def digest(self, splits: Collection[str] | None = None) -> str:
        """Return a digest of the content of these splits, by default of all splits."""
        hashes = [
            shard.sha256 for shard in self.shards if splits is None or shard.split in splits
        ]
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def counts(self) -> dict[str, int]:
        """Return the number of images in each split."""
        counts: dict[str, int] = {}
        for shard in self.shards:
            counts[shard.split] = counts.get(shard.split, 0) + shard.num_images
        return counts


ManifestT = TypeVar("ManifestT", bound=BaseModel)


def read_manifest(file: Location, model: type[ManifestT], *, remedy: str) -> ManifestT:
    """Read the manifest of a set of files.

    Args:
        file: Manifest, which is written last, so that the set is complete.
        model: Class of its content.
        remedy: What to do if there is no such set, for the message.

    Raises:
        InputError: There is no manifest, or it cannot be read.
    """
    try:
        return model.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        folder, _, name = file.uri.rpartition("/")
        raise InputError(f"{folder}: no {name}; {remedy}") from None
    except (pa.ArrowException, OSError, ValidationError) as error:
        raise InputError(f"{file}: cannot be read ({first_line(error)})") from error


def written_from(file: Location, made_from: str) -> pq.FileMetaData | None:
    """Return the metadata of a Parquet file; None unless it is whole and made from this."""
    if not file.is_file():
        return None
    try:
        with file.open_input_file() as stream:
            found = pq.read_metadata(stream)
    except (pa.ArrowException, OSError):
        return None
    return (
        found if (found.metadata or {}).get(MADE_FROM.encode()) == made_from.encode() else None
    )
