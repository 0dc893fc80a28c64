"""Comparison of a set on disk with its manifest."""

import hashlib
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from upreid_ray.config.errors import first_line
from upreid_ray.data.shards.images import RefusedImageError, usable_image
from upreid_ray.data.shards.manifest import Shard
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.storage import Location


def audit(
    shards: ShardSet, *, decode: bool, on_progress: Callable[[int], None]
) -> dict[str, str]:
    """Read every shard of a set in a Ray Data task, and compare it with the manifest.

    ``on_progress`` is called with the number of images checked since the last call.

    Returns:
        Damage of each damaged file, by its name.
    """
    members = shards.manifest.shards
    rows = [{"number": number} for number in range(len(members))]
    tasks = ray.data.from_items(rows, override_num_blocks=len(rows))

    def find_damage(row: dict[str, int]) -> dict[str, str]:
        shard = members[row["number"]]
        try:
            _check(shards.folder, shard, decode=decode)
        except (pa.ArrowException, OSError, ValueError) as error:
            return {"name": shard.name, "damage": first_line(error)}
        return {"name": shard.name, "damage": ""}

    results = tasks.map(find_damage)
    results.context.enable_progress_bars = False
    sizes = {shard.name: shard.num_images for shard in members}
    damaged = {}
    for row in results.iter_rows():
        on_progress(sizes[row["name"]])
        if row["damage"]:
            damaged[row["name"]] = row["damage"]
    return dict(sorted(damaged.items()))


def _check(folder: Location, shard: Shard, *, decode: bool) -> None:
    """Compare a shard with its entry in the manifest.

    Raises:
        ValueError: They differ, or an image does not decode.
    """
    with (folder / shard.name).open_input_file() as stream:
        content = stream.read_buffer()
    if len(content) != shard.num_bytes:
        raise ValueError(f"has {len(content)} bytes instead of {shard.num_bytes}")
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        raise ValueError("has another sha256 than when it was written")
    if not decode:
        return
    table = pq.read_table(pa.BufferReader(content), columns=["key", "image"])
    for key, image in zip(*(column.to_pylist() for column in table), strict=True):
        try:
            usable_image(image, max_height=None)
        except RefusedImageError as error:
            raise ValueError(f"image {key!r} {error}") from error
