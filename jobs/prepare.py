"""Turn images into shards: checked, measured, shuffled Parquet files with a manifest.

SOURCE is a folder or file, or a URI of one (s3://, gs://, hdfs://, file://):
  a folder of images of any depth, or of tracklets; their paths become the keys
  a labelled set as it is distributed: Market-1501, MSMT17, CUHK03-NP, PersonX, MARS
  an LMDB such as LUPerson's, with its keys.pkl in or beside it
  tar files or a folder of them, such as WebDataset's shards
  Parquet files or a folder of them
  a list of paths (.txt, or a pickled list .pkl) of images, of tar or of Parquet files
  the word synthetic

Images that do not go in are listed with their reasons in DIR/refused.jsonl; DIR/samples.html
shows some of them and some of what is in. A killed run continues with the same command.
The bounds hold for training images; query and gallery images stay as their protocol has them.

Examples:
  python jobs/prepare.py CROPS --out shards
  python jobs/prepare.py lup_lmdb --out s3://bucket/luperson --max-height 384 --duplicates near
  python jobs/prepare.py CROPS --out shards --min-height 64 --min-aspect 1 --min-sharpness 50
  python jobs/prepare.py crops.parquet --columns image=jpg.bytes,key=path --out shards
  python jobs/prepare.py synthetic --out people
  python jobs/prepare.py --check shards --decode
"""

import argparse
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.table import Table

from upreid_ray.command_line import JobParser, connect_to_ray, run_job
from upreid_ray.config.errors import InputError, RunFailed
from upreid_ray.config.run import SyntheticConfig
from upreid_ray.config.section import absolute

if TYPE_CHECKING:
    from upreid_ray.data.shards.manifest import Manifest

logger = logging.getLogger("upreid_ray")

SYNTHETIC = "synthetic"
NUM_NAMED = 10
# Flag, least value, unit, meaning.
BOUNDS: tuple[tuple[str, float, str, str], ...] = (
    ("--max-height", 1, "PIXELS", "shrink higher images to this height"),
    ("--min-width", 1, "PIXELS", "refuse narrower images"),
    ("--min-height", 1, "PIXELS", "refuse lower images"),
    ("--min-aspect", 0.0, "RATIO", "refuse images whose height by width is less"),
    ("--max-aspect", 0.0, "RATIO", "refuse images whose height by width is more"),
    (
        "--min-sharpness",
        0.0,
        "VARIANCE",
        "refuse images whose Laplacian, of grey levels 0..255 at 64x128 pixels, varies less; "
        "samples.html shows the values of some images",
    ),
)

NumberT = TypeVar("NumberT", int, float)


def main() -> dict[str, Any]:
    """Parse, write or check the shards, and return what the JSON line says."""
    arguments = _parser().parse(sys.argv[1:])
    if arguments.check is not None:
        return _check(arguments)
    for name, value in (("SOURCE", arguments.source), ("--out", arguments.out)):
        if value is None:
            raise InputError(f"{name}: required; see --help")
    return _prepare(arguments)


def _parser() -> JobParser:
    parser = JobParser(
        __doc__, "SOURCE --out DIR [--FLAG VALUE ...]\n       %(prog)s --check DIR [--decode]"
    )
    add = parser.add_argument
    add("source", type=_source, metavar="SOURCE", nargs="?", help="what to read: see above")
    add("--out", type=absolute, metavar="DIR", help="folder or URI of the shards")
    add("--seed", type=_at_least(0), default=0, help="of the order of the images")
    add(
        "--columns",
        type=_columns,
        default={},
        metavar="OURS=THEIRS,...",
        help="columns of Parquet files for image, key, pid, camid and split",
    )
    bounds = parser.add_argument_group("images")
    for flag, least, unit, meaning in BOUNDS:
        bounds.add_argument(flag, type=_at_least(least), metavar=unit, help=meaning)
    add = bounds.add_argument
    add(
        "--duplicates",
        choices=("keep", "exact", "near"),
        default="keep",
        help="keep all; or once those with equal pixels; or once those that look the same "
        "(64 bits of rising and falling grey, of which few differ)",
    )
    add(
        "--max-distance",
        type=_at_least(0),
        default=argparse.SUPPRESS,
        metavar="BITS",
        help="bits in which the hashes of near duplicates may differ (default: 2; at most 6)",
    )
    check = parser.add_argument_group("check")
    check.add_argument(
        "--check",
        type=absolute,
        metavar="DIR",
        help="compare a set with its manifest instead; 1 if damaged",
    )
    check.add_argument("--decode", action="store_true", help="decode every image too")
    return parser


def _prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    # After the arguments: it takes seconds, which a mistake or --help should not cost.
    from upreid_ray.data.shards.duplicates import MAX_DISTANCE  # noqa: PLC0415
    from upreid_ray.data.shards.images import ImageRules  # noqa: PLC0415
    from upreid_ray.data.shards.page import write_page  # noqa: PLC0415
    from upreid_ray.data.shards.preparation import write_shards  # noqa: PLC0415
    from upreid_ray.data.shards.progress import image_progress  # noqa: PLC0415
    from upreid_ray.data.sources.source import source_records, synthetic_records  # noqa: PLC0415

    given = vars(arguments)
    rules = ImageRules(**{name: given[name] for name in vars(ImageRules()) if name in given})
    if rules.max_distance > MAX_DISTANCE:
        raise InputError(
            f"--max-distance {rules.max_distance}: images that far apart are no duplicates"
        )
    if arguments.source == SYNTHETIC:
        records = synthetic_records(SyntheticConfig(seed=arguments.seed))
    else:
        records = source_records(arguments.source, arguments.columns)
    connect_to_ray()
    with image_progress("preparing", len(records)) as advance:
        shards = write_shards(
            records,
            arguments.out,
            source=arguments.source,
            seed=arguments.seed,
            rules=rules,
            on_progress=advance,
        )
    write_page(shards, records, seed=arguments.seed)
    manifest = shards.manifest
    Console(stderr=True).print(_table(manifest))
    mean, std = (",".join(map(str, each or ())) for each in (manifest.mean, manifest.std))
    logger.info("colours of this set: --augmentation.mean %s --augmentation.std %s", mean, std)
    return {
        "result_dir": arguments.out,
        "manifest": manifest.digest(),
        "images": manifest.counts(),
        "refused": dict(manifest.num_refused),
        "mean": manifest.mean,
        "std": manifest.std,
    }


def _check(arguments: argparse.Namespace) -> dict[str, Any]:
    from upreid_ray.data.shards.audit import audit  # noqa: PLC0415
    from upreid_ray.data.shards.progress import image_progress  # noqa: PLC0415
    from upreid_ray.data.shards.shard_set import ShardSet  # noqa: PLC0415

    shards = ShardSet.open(arguments.check)
    manifest = shards.manifest
    connect_to_ray()
    with image_progress("checking", sum(manifest.counts().values())) as advance:
        damaged = audit(shards, decode=arguments.decode, on_progress=advance)
    if damaged:
        for name, wrong in list(damaged.items())[:NUM_NAMED]:
            logger.error("%s/%s: %s", arguments.check, name, wrong)
        raise RunFailed(
            f"{arguments.check}: {len(damaged)} of {len(manifest.shards)} shards are damaged"
        )
    Console(stderr=True).print(_table(manifest))
    return {
        "result_dir": arguments.check,
        "manifest": manifest.digest(),
        "images": manifest.counts(),
    }


def _at_least(least: NumberT) -> Callable[[str], NumberT]:
    """Return what reads a number of the same type that is not less than this."""

    def read(text: str) -> NumberT:
        number = type(least)(text)
        if not number >= least:
            raise argparse.ArgumentTypeError(f"must be at least {least} (got {number})")
        return number

    return read


def _source(text: str) -> str:
    return text if text == SYNTHETIC else absolute(text)


def _columns(text: str) -> dict[str, str]:
    """Read ``ours=theirs,...``."""
    from upreid_ray.data.sources.archives import PARQUET_COLUMNS  # noqa: PLC0415

    pairs = [pair.partition("=") for pair in text.split(",")]
    unknown = [ours for ours, _, theirs in pairs if ours not in PARQUET_COLUMNS or not theirs]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{unknown[0]!r} must be one of {', '.join(PARQUET_COLUMNS)}, then =NAME"
        )
    return {ours: theirs for ours, _, theirs in pairs}


def _table(manifest: "Manifest") -> Table:
    """Show the images of each split, and what was refused."""
    table = Table("split", "images", "shards", "MB")
    for split, count in manifest.counts().items():
        shards = [shard for shard in manifest.shards if shard.split == split]
        megabytes = sum(shard.num_bytes for shard in shards) / 1e6
        table.add_row(split, f"{count:,}", str(len(shards)), f"{megabytes:.1f}")
    for kind, count in manifest.num_refused.items():
        table.add_row(f"refused: {kind}", f"{count:,}", "", "")
    return table


if __name__ == "__main__":
    run_job(main)
