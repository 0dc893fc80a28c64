"""Turn images into shards: checked, shuffled Parquet files with a manifest.

SOURCE is a folder of images of any depth, a labelled set as it is distributed (Market-1501,
MSMT17, CUHK03-NP, PersonX), or the word synthetic.

Examples:
  python jobs/prepare.py CROPS --out shards
  python jobs/prepare.py market1501 --out s3://bucket/market --max-height 384
  python jobs/prepare.py synthetic --out people
"""

import argparse
import logging
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from upreid_ray.command_line import JobParser, connect_to_ray, run_job
from upreid_ray.config import SyntheticConfig
from upreid_ray.data.layouts import folder_records, label_warnings, synthetic_records
from upreid_ray.data.shards import Manifest, write_shards

logger = logging.getLogger("upreid_ray")


def main() -> dict[str, Any]:
    """Parse, write the shards, and return what the JSON line says."""
    parser = JobParser(__doc__)
    parser.add_argument("source", metavar="SOURCE", help="folder of images, or synthetic")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder or URI of the shards"
    )
    parser.add_argument(
        "--seed", type=_at_least(0), default=0, help="of the order of the images"
    )
    parser.add_argument(
        "--max-height",
        type=_at_least(1),
        metavar="PIXELS",
        help="shrink higher images to this height",
    )
    arguments = parser.parse(sys.argv[1:])
    if arguments.source == "synthetic":
        records = synthetic_records(SyntheticConfig(seed=arguments.seed))
    else:
        records = folder_records(arguments.source)
        for warning in label_warnings(records):
            logger.warning("%s: %s", arguments.source, warning)
    connect_to_ray()
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        task = progress.add_task("preparing", total=len(records))
        manifest = write_shards(
            records,
            arguments.out,
            source=arguments.source,
            seed=arguments.seed,
            max_height=arguments.max_height,
            on_progress=lambda done: progress.advance(task, done),
        )
    console.print(_table(manifest))
    return {
        "result_dir": arguments.out,
        "manifest": manifest.digest(),
        "images": manifest.counts(),
        "refused": len(manifest.refused),
    }


def _at_least(least: int) -> Callable[[str], int]:
    """Return what reads a whole number that is not less than this."""

    def read(text: str) -> int:
        number = int(text)
        if number < least:
            msg = f"must be at least {least} (got {number})"
            raise argparse.ArgumentTypeError(msg)
        return number

    return read


def _table(manifest: Manifest) -> Table:
    """Show the images of each split, and the first of those that were refused."""
    table = Table("split", "images", "shards", "MB")
    for split, count in manifest.counts().items():
        shards = [shard for shard in manifest.shards if shard.split == split]
        megabytes = sum(shard.num_bytes for shard in shards) / 1e6
        table.add_row(split, f"{count:,}", str(len(shards)), f"{megabytes:.1f}")
    table.add_row("refused", f"{len(manifest.refused):,}", "", "")
    if manifest.refused:
        table.caption = "first refused: {0.key}: {0.reason}".format(manifest.refused[0])
    return table


if __name__ == "__main__":
    run_job(main)
