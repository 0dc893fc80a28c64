"""The form of a set: Parquet shards, and the manifest that says what they hold.

A shard is a Parquet file with a row an image; the images of a shard are a random part of their
split. The ``manifest.json`` beside the shards is written last: where it is, the set is whole.
"""

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

MANIFEST_FILE = "manifest.json"
REFUSED_FILE = "refused.jsonl"
FORMAT_VERSION = 2
TRAIN_SPLITS = ("train", "unlabeled")
EVALUATION_SPLITS = ("query", "gallery")

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),  # encoded
        pa.field("pid", pa.int32()),
        pa.field("camid", pa.int32()),
        pa.field("split", pa.string(), nullable=False),
        # What is measured of an image, see `images.Measures`; version 1 has none of it.
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
    """What a set of shards holds.

    Attributes:
        version: Of the format.
        source: Where the images came from.
        plan: Digest of what was asked for: the records and all that decides how they are kept.
        rules: What was asked of the images.
        row_group_images: Images of each row group of a shard, the last one excepted.
        shards: In order.
        num_refused: What did not go in, counted by kind; `ShardSet.refused` lists it.
        mean: Of each colour channel (0..1) over the training images, each of which counts the
            same; None in version 1.
        std: Of each colour channel over their pixels.
    """

    model_config = ConfigDict(frozen=True)

    version: int
    source: str
    plan: str
    rules: Mapping[str, Any] = {}
    row_group_images: int
    shards: tuple[Shard, ...]
    num_refused: Mapping[str, int] = {}
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None

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
