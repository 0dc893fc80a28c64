"""Query and gallery images of a set, in blocks."""

import logging

import numpy as np
import pyarrow.compute as pc

from upreid_ray.config.errors import InputError
from upreid_ray.data.shards.manifest import Manifest
from upreid_ray.data.stream.rows import Columns, RowGroups, decode, read_rows
from upreid_ray.data.stream.training import MIN_BLOCK_IMAGES

logger = logging.getLogger(__name__)

EVALUATION_SPLITS = ("query", "gallery")


class LabelledImages:
    """The query and gallery images of a set of shards, in the manifest's order."""

    def __init__(self, uri: str, manifest: Manifest, *, height: int, width: int) -> None:
        self._uri = uri
        self._size = (height, width)
        self._groups = RowGroups(manifest, EVALUATION_SPLITS)
        self.num_blocks = -(-self._groups.num_images // MIN_BLOCK_IMAGES)

    def read(self, number: int) -> Columns:
        """Read and decode block ``number``; what does not decode is left out.

        Returns:
            ``image``, uint8 ``[n, 3, H, W]``, and of each image ``pid``, ``camid`` and
            ``is_query``.
        """
        order = np.arange(len(self._groups))
        start = number * MIN_BLOCK_IMAGES
        ranges = self._groups.ranges(order, start, start + MIN_BLOCK_IMAGES)
        table = read_rows(self._uri, ranges, ["image", "pid", "camid", "split"])
        columns = decode(table.column("image"), *self._size)
        decoded = columns.pop("decoded")
        columns["pid"] = table.column("pid").to_numpy()
        columns["camid"] = table.column("camid").to_numpy()
        columns["is_query"] = pc.equal(table.column("split"), "query").to_numpy()
        return {name: column[decoded] for name, column in columns.items()}


def check_labels(uri: str, manifest: Manifest) -> None:
    """Refuse a set whose query and gallery images cannot be scored.

    Raises:
        InputError: There are none, persons or cameras are unknown, or no query has a match.
    """
    cameras: dict[str, dict[int, set[int]]] = {split: {} for split in EVALUATION_SPLITS}
    for split, of_person in cameras.items():
        groups = RowGroups(manifest, (split,))
        if groups.num_images == 0:
            raise InputError(f"{uri}: has no {split} images")
        ranges = groups.ranges(np.arange(len(groups)), 0, groups.num_images)
        labels = read_rows(uri, ranges, ["pid", "camid"])
        for name, meaning in (("pid", "person"), ("camid", "camera")):
            if labels.column(name).null_count:
                raise InputError(
                    f"{uri}: {labels.column(name).null_count} {split} images have no {meaning}"
                )
        for pid, camid in zip(*(column.to_pylist() for column in labels), strict=True):
            of_person.setdefault(pid, set()).add(camid)
    if not any(
        cameras["gallery"].get(pid, set()) - {camid}
        for pid, camids in cameras["query"].items()
        for camid in camids
    ):
        raise InputError(
            f"{uri}: no query image has a match in the gallery under another camera"
        )
