"""The page that shows images of a set of shards, and images that were refused."""

import io
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from upreid_ray.data.shards.images import RefusedImageError, usable_image
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.data.sources.records import Records, Refused
from upreid_ray.page import Mark, PageFigure, PageSection, render_page

PAGE_FILE = "samples.html"
NUM_SAMPLES = 64
NUM_SHOWN_OF_KIND = 16
THUMBNAIL_HEIGHT = 160


def write_page(shards: ShardSet, records: Records, *, seed: int) -> None:
    """Write ``samples.html`` beside the manifest: counts, random images, refused images.

    The records are those that the shards were made of, from which refused images are read.
    """
    manifest, refused = shards.manifest, shards.refused()
    counts = {
        **manifest.counts(),
        **{f"refused: {kind}": count for kind, count in manifest.num_refused.items()},
    }
    samples = [
        thumbnail(
            row["image"],
            f"{row['key']}: {row['width']}x{row['height']}, sharpness {row['sharpness']:.0f}",
        )
        for row in _random_rows(shards, seed)
    ]
    sections = [
        PageSection(
            table=[
                ("split", "images"),
                *((split, f"{count:,}") for split, count in counts.items()),
            ],
            text=f"mean {manifest.mean}, std {manifest.std}",
        ),
        PageSection("Random images", thumbnails=samples),
    ]
    for kind in Counter(one.kind for one in refused):
        shown = [one for one in refused if one.kind == kind][:NUM_SHOWN_OF_KIND]
        figures = [thumbnail(_read(records, one), f"{one.key}: {one.reason}") for one in shown]
        sections.append(PageSection(f"Refused: {kind}", thumbnails=figures))
    page = render_page(manifest.source, sections)
    (shards.folder / PAGE_FILE).write_whole(page.encode())


def _random_rows(shards: ShardSet, seed: int) -> list[dict[str, Any]]:
    """Return rows of random row groups, which hold random images since shards are shuffled."""
    manifest = shards.manifest
    draw = np.random.default_rng(seed)
    sizes = np.array([shard.num_images for shard in manifest.shards], np.float64)
    drawn = Counter(draw.choice(len(sizes), NUM_SAMPLES, p=sizes / sizes.sum()).tolist())
    rows: list[dict[str, Any]] = []
    for number, count in sorted(drawn.items()):
        with (shards.folder / manifest.shards[number].name).open_input_file() as stream:
            file = pq.ParquetFile(stream)
            group = file.read_row_group(int(draw.integers(file.num_row_groups)))
        chosen = draw.permutation(len(group))[:count]
        rows += group.take(pa.array(chosen)).to_pylist()
    return rows


def _read(records: Records, refused: Refused) -> bytes:
    """Return the bytes of a refused image, empty if they cannot be read."""
    found = records.table.filter(pc.equal(records.table.column("key"), refused.key))
    if not len(found):
        return b""
    try:
        return records.read(found.to_pylist()[0])
    except (OSError, ValueError):
        return b""


def thumbnail(encoded: bytes | None, caption: str, mark: Mark = "") -> PageFigure:
    """Return a small copy of an image; without a picture if the image does not decode."""
    try:
        usable = usable_image(encoded or b"", max_height=THUMBNAIL_HEIGHT)
    except RefusedImageError:
        return PageFigure(caption, None, mark)
    buffer = io.BytesIO()
    usable.picture.save(buffer, "JPEG")
    return PageFigure(caption, buffer.getvalue(), mark)
