"""A set of features on disk: Parquet files, and a manifest that is written last.

Dimensions: N images, F features.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from upreid_ray.config.errors import InputError, first_line
from upreid_ray.data.shards.manifest import MADE_FROM, read_manifest, written_from
from upreid_ray.storage import Location

MANIFEST_FILE = "features.json"
REFUSED_FILE = "refused.jsonl"
FORMAT_VERSION = 1
LABELS = ("pid", "camid", "split")
UNKNOWN = -1
"""Number of an unknown person or camera, and of junk images, in `Rows`."""


class Part(BaseModel):
    """One Parquet file of a set of features."""

    model_config = ConfigDict(frozen=True)

    name: str
    num_images: int


class FeatureManifest(BaseModel):
    """Content of a set of features.

    Attributes:
        version: Version of the format.
        made_from: Digest of the images and the settings; "plan" in the file.
        init: Origin of the backbone, such as ``models:/NAME/VERSION``.
        backbone: Digest of the backbone's tensors and image settings, and of the augmentation.
        num_features: Number of features of an image, F.
        source: Folder, file or URI that the images came from.
        num_refused: Number of images without features; ``refused.jsonl`` lists them.
        parts: Files, in order.
        settings: Settings of the job.
    """

    model_config = ConfigDict(frozen=True, validate_by_name=True, serialize_by_alias=True)

    version: int
    made_from: str = Field(alias=MADE_FROM)
    init: str
    backbone: str
    num_features: int
    source: str
    num_refused: int
    parts: tuple[Part, ...]
    settings: dict[str, Any]

    @property
    def num_images(self) -> int:
        """Number of images that have features."""
        return sum(part.num_images for part in self.parts)


@dataclass(frozen=True)
class Rows:
    """Labels of N images of a set, in the order of the set.

    Attributes:
        rows: ``[N]``, numbers of the rows in the set, ascending.
        pids: ``[N]``, persons; `UNKNOWN` if they are unknown.
        camids: ``[N]``, cameras; as above.
    """

    rows: Tensor
    pids: Tensor
    camids: Tensor


@dataclass(frozen=True)
class FeatureSet:
    """A whole set of features."""

    folder: Location
    manifest: FeatureManifest

    @classmethod
    def open(cls, uri: str) -> Self:
        """Read the manifest of the set at a folder or URI.

        Raises:
            InputError: There is no manifest, or it cannot be read.
        """
        folder = Location(uri)
        remedy = f"compute features with jobs/embed.py INIT SOURCE --out {folder}"
        manifest = read_manifest(folder / MANIFEST_FILE, FeatureManifest, remedy=remedy)
        return cls(folder, manifest)

    @staticmethod
    def exists(uri: str) -> bool:
        """Return whether there is a whole set at a folder or URI."""
        return (Location(uri) / MANIFEST_FILE).is_file()

    def read(self, part: Part, columns: Sequence[str]) -> pa.Table:
        """Read some columns of a file.

        Raises:
            InputError: The file is missing or damaged.
        """
        file = self.folder / part.name
        try:
            # Local files are mapped, so that the system may drop what was read.
            place = file.path if file.is_local else file.open_input_file()
            table = pq.read_table(place, columns=list(columns), memory_map=file.is_local)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file}: is damaged ({first_line(error)})") from error
        if len(table) != part.num_images:
            raise InputError(f"{file}: is damaged ({len(table)} of {part.num_images} images)")
        return table

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of the first row of each file, and its features ``[n, F]``."""
        start = 0
        for part in self.manifest.parts:
            values = self.read(part, ["feature"]).column("feature").combine_chunks().values
            features = values.to_numpy().reshape(part.num_images, self.manifest.num_features)
            yield start, torch.from_numpy(features.copy())
            start += part.num_images

    def labels(self, split: str | None = None) -> Rows:
        """Return the labels of the images of a split, by default of all."""
        tables = [self.read(part, LABELS) for part in self.manifest.parts]
        table = pa.concat_tables(tables)
        rows = np.arange(len(table))
        if split is not None:
            rows = rows[pc.equal(table.column("split"), split).to_numpy()]
        pids, camids = (
            pc.fill_null(table.column(name), UNKNOWN).to_numpy()[rows]
            for name in ("pid", "camid")
        )
        return Rows(*(torch.from_numpy(each.astype(np.int64)) for each in (rows, pids, camids)))

    def splits(self) -> set[str]:
        """Return the splits that the images belong to."""
        return {
            split
            for part in self.manifest.parts
            for split in pc.unique(self.read(part, ["split"]).column("split")).to_pylist()
        }

    def records(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Return everything but the features of some rows, in their order."""
        wanted = np.asarray(rows, np.int64)
        starts = np.cumsum([0, *(part.num_images for part in self.manifest.parts)])
        of_part = np.searchsorted(starts, wanted, "right") - 1
        found: dict[int, dict[str, Any]] = {}
        for number in np.unique(of_part).tolist():
            names = ["place", "key", *LABELS]
            table = self.read(self.manifest.parts[number], names)
            mine = np.unique(wanted[of_part == number])
            taken = table.take(pa.array(mine - starts[number])).to_pylist()
            found |= dict(zip(mine.tolist(), taken, strict=True))
        return [found[row] for row in wanted.tolist()]

    def features(self, rows: Tensor) -> Tensor:
        """Return the features ``[n, F]``, float32, of some rows, which ascend."""
        taken = []
        for start, block in self.blocks():
            first, last = torch.searchsorted(rows, torch.tensor([start, start + len(block)]))
            taken.append(block[rows[first:last] - start].float())
        return torch.cat(taken) if taken else torch.empty(0, self.manifest.num_features)


def write_part(
    file: Location, table: pa.Table, made_from: str, refused: list[dict[str, str]]
) -> None:
    """Write a file of a set whole; its metadata hold its refused images, too."""
    buffer = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata({MADE_FROM: made_from, "refused": json.dumps(refused)}),
        buffer,
        # Features are noise to a compressor, and rarely repeat.
        compression={name: "zstd" for name in table.column_names if name != "feature"}
        | {"feature.list.element": "none"},
        use_dictionary=["pid", "camid", "split"],
        write_statistics=False,
    )
    file.write_whole(buffer.getvalue())


def written_part(file: Location, made_from: str) -> tuple[Part, list[dict[str, str]]] | None:
    """Return a file made from this, and its refused images; None if there is none."""
    found = written_from(file, made_from)
    if found is None:
        return None
    part = Part(name=file.name, num_images=found.num_rows)
    return part, json.loads(found.metadata[b"refused"])
