"""A set of shards: where it lies, and what it holds."""

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Self

import pyarrow as pa
import pyarrow.compute as pc

from upreid_ray.config.errors import InputError
from upreid_ray.data.shards.manifest import (
    EVALUATION_SPLITS,
    MANIFEST_FILE,
    REFUSED_FILE,
    Manifest,
    read_manifest,
)
from upreid_ray.data.shards.row_groups import RowGroups
from upreid_ray.data.sources.records import Refused
from upreid_ray.storage import Location


@dataclass(frozen=True)
class ShardSet:
    """A whole set of shards.

    The manifest is read once, by the process that opens the set, and travels with it: it has a
    line for each shard of about 128 MB, thus about 400 lines for ten million images. Pickling
    carries no connection.
    """

    folder: Location
    manifest: Manifest = field(repr=False)

    @classmethod
    def open(cls, uri: str) -> Self:
        """Read the manifest of the set at a folder or URI.

        Raises:
            InputError: There is no manifest, or it cannot be read.
        """
        folder = Location(uri)
        remedy = f"make shards with jobs/prepare.py SOURCE --out {folder}"
        return cls(folder, read_manifest(folder / MANIFEST_FILE, Manifest, remedy=remedy))

    @staticmethod
    def exists(uri: str) -> bool:
        """Return whether there is a whole set at a folder or URI."""
        return (Location(uri) / MANIFEST_FILE).is_file()

    @property
    def uri(self) -> str:
        """Absolute path or URI of the folder."""
        return self.folder.uri

    def row_groups(self, splits: Collection[str]) -> RowGroups:
        """Return the row groups of some splits, which read their rows."""
        return RowGroups(self.folder, self.manifest, splits)

    def refused(self) -> list[Refused]:
        """Read what did not go into the set, sorted by key."""
        file = self.folder / REFUSED_FILE
        if not file.is_file():
            return []
        lines = file.read_bytes().decode().splitlines()
        return [Refused(**json.loads(line)) for line in lines]

    def has_evaluation_images(self) -> bool:
        """Return whether there are query or gallery images."""
        return not self.manifest.counts().keys().isdisjoint(EVALUATION_SPLITS)

    def check_labels(self, *, ignore_cameras: bool = False) -> None:
        """Check that the query and gallery images can be scored; see `check_labels`."""
        groups = self.row_groups(EVALUATION_SPLITS)
        if groups.num_images == 0:
            raise InputError(f"{self.uri}: has no query images")
        labels = groups.read_all(["split", "pid", "camid"])
        check_labels(self.uri, labels, ignore_cameras=ignore_cameras)


def check_labels(name: str, table: pa.Table, *, ignore_cameras: bool = False) -> None:
    """Check that the query and gallery images of a set can be scored.

    The table has ``split``, ``pid`` and ``camid`` of each image; errors name the set.
    If cameras are ignored, a match may be by the query's own camera.

    Raises:
        InputError: There are none, persons or cameras are unknown, or no query has a match.
    """
    meanings = {"pid": "person"} if ignore_cameras else {"pid": "person", "camid": "camera"}
    cameras: dict[str, dict[int, set[int | None]]] = {split: {} for split in EVALUATION_SPLITS}
    for split, cameras_of_person in cameras.items():
        members = table.filter(pc.equal(table.column("split"), split))
        if not len(members):
            raise InputError(f"{name}: has no {split} images")
        labels = members.select(["pid", "camid"])
        for column, meaning in meanings.items():
            missing = labels.column(column).null_count
            if missing:
                raise InputError(f"{name}: {missing} {split} images have no {meaning}")
        for pid, camid in zip(*(column.to_pylist() for column in labels), strict=True):
            cameras_of_person.setdefault(pid, set()).add(camid)
    if not any(
        cameras["gallery"].get(pid, set()) - (set() if ignore_cameras else {camid})
        for pid, camids in cameras["query"].items()
        for camid in camids
    ):
        where = (
            ""
            if ignore_cameras
            else " under another camera; jobs/evaluate.py scores it with --ignore_cameras true"
        )
        raise InputError(f"{name}: no query image has a match in the gallery{where}")
