"""A page that shows what went into a set, and what did not."""

import base64
import html
import io
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from upreid_ray.data.shards.images import RefusedImageError, usable_image
from upreid_ray.data.shards.manifest import Manifest, read_refused
from upreid_ray.data.sources.records import Records, Refused
from upreid_ray.storage import open_folder, write_whole

PAGE_FILE = "samples.html"
NUM_SAMPLES = 64
NUM_REFUSED_OF_KIND = 16
THUMBNAIL_HEIGHT = 160

STYLE = """
body { font: 14px sans-serif; margin: 2em; }
table { border-collapse: collapse; margin-bottom: 1em; }
td, th { border: 1px solid #ccc; padding: 2px 8px; text-align: left; }
figure { display: inline-block; width: 120px; margin: 4px; vertical-align: top; }
figure img { max-width: 120px; }
figcaption { font-size: 10px; overflow-wrap: anywhere; color: #444; }
"""


def write_page(uri: str, manifest: Manifest, records: Records, *, seed: int) -> None:
    """Write ``samples.html`` beside the manifest: counts, random images, what was refused."""
    filesystem, path = open_folder(uri)
    refused = read_refused(uri)
    counts = "".join(
        f"<tr><td>{split}</td><td>{count:,}</td></tr>"
        for split, count in [
            *manifest.counts().items(),
            *((f"refused: {kind}", count) for kind, count in manifest.num_refused.items()),
        ]
    )
    samples = "".join(
        _figure(
            row["image"],
            f"{row['key']}: {row['width']}x{row['height']}, sharpness {row['sharpness']:.0f}",
        )
        for row in _samples(uri, manifest, seed)
    )
    parts = [
        f"<h1>{html.escape(manifest.source)}</h1><table>{counts}</table>",
        f"<p>mean {manifest.mean}, std {manifest.std}</p>",
        f"<h2>Random images</h2>{samples}",
    ]
    for kind in Counter(one.kind for one in refused):
        shown = [one for one in refused if one.kind == kind][:NUM_REFUSED_OF_KIND]
        figures = "".join(
            _figure(_read(records, one), f"{one.key}: {one.reason}") for one in shown
        )
        parts.append(f"<h2>Refused: {kind}</h2>{figures}")
    page = (
        "<!doctype html><html><head><meta charset='utf-8'>"
        f"<title>{html.escape(manifest.source)}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>"
    )
    write_whole(filesystem, f"{path}/{PAGE_FILE}", page.encode())


def _samples(uri: str, manifest: Manifest, seed: int) -> list[dict[str, Any]]:
    """Return random images: rows of random row groups, since shards are shuffled."""
    filesystem, path = open_folder(uri)
    draw = np.random.default_rng(seed)
    sizes = np.array([shard.num_images for shard in manifest.shards], np.float64)
    drawn = Counter(draw.choice(len(sizes), NUM_SAMPLES, p=sizes / sizes.sum()).tolist())
    rows: list[dict[str, Any]] = []
    for number, count in sorted(drawn.items()):
        with filesystem.open_input_file(f"{path}/{manifest.shards[number].name}") as stream:
            file = pq.ParquetFile(stream)
            group = file.read_row_group(int(draw.integers(file.num_row_groups)))
        chosen = draw.permutation(len(group))[:count]
        rows += group.take(pa.array(chosen)).to_pylist()
    return rows


def _read(records: Records, refused: Refused) -> bytes:
    """Return the bytes of what was refused, as far as there are any."""
    found = records.table.filter(pc.equal(records.table.column("key"), refused.key))
    if not len(found):
        return b""
    try:
        return records.read(found.to_pylist()[0])
    except (OSError, ValueError):
        return b""


def _figure(encoded: bytes, caption: str) -> str:
    """Return an image, if it decodes, over its caption."""
    try:
        thumbnail = usable_image(encoded, max_height=THUMBNAIL_HEIGHT)
    except RefusedImageError:
        picture = "no picture"
    else:
        buffer = io.BytesIO()
        thumbnail.picture.save(buffer, "JPEG")
        data = base64.b64encode(buffer.getvalue()).decode()
        picture = f'<img src="data:image/jpeg;base64,{data}" alt="">'
    return f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>"
