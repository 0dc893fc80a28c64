"""Convert images into shards: checked, shuffled Parquet files with a manifest.

SOURCE is a folder or file, or a URI of one (s3://, gs://, hdfs://, file://):
  a folder of images of any depth, or of tracklets; their paths become the keys
  a labelled set as it is distributed: Market-1501, MSMT17, CUHK03-NP, PersonX, MARS; also in
    folders train, query and gallery, in other letter case, or as the only folder of SOURCE
  an LMDB such as LUPerson's, with its keys.pkl in or beside it, or the folder around both;
    pids in keys.pkl are kept, and the images stay unlabeled
  tar files or a folder of them, such as WebDataset's shards
  Parquet files or a folder of them
  a list of paths (.txt, or a pickled list .pkl) of images, of tar or of Parquet files; what
    follows the path of an image on its line, such as a label, is ignored
  the word synthetic, which draws the synthetic set

DIR/refused.jsonl lists each image that was left out and the reason; DIR/samples.html shows
samples of both kinds. After a kill, the same command continues. Limits and duplicates apply to
training images only: query and gallery images stay as the protocol of their set has them.

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
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from upreid_ray.command_line import JobParser, at_least, connect_to_ray, path_or_uri, run_job
from upreid_ray.config.errors import InputError, RunFailed
from upreid_ray.config.run import SyntheticConfig

if TYPE_CHECKING:
    from upreid_ray.data.shards.manifest import Manifest

logger = logging.getLogger("upreid_ray")

SYNTHETIC = "synthetic"
NUM_NAMED = 10
# Flag, least value, unit, description.
BOUNDS: tuple[tuple[str, float, str, str], ...] = (
    ("--max-height", 1, "PIXELS", "shrink images that are taller than this"),
    ("--min-width", 1, "PIXELS", "leave out images that are narrower than this"),
    ("--min-height", 1, "PIXELS", "leave out images that are shorter than this"),
    ("--min-aspect", 0.0, "RATIO", "leave out images of a smaller height / width"),
    ("--max-aspect", 0.0, "RATIO", "leave out images of a larger height / width"),
    (
        "--min-sharpness",
        0.0,
        "VARIANCE",
        "leave out blurred images: the variance of their Laplacian (grey levels 0..255, 64x128 "
        "pixels) is less than this; samples.html shows the values of some images",
    ),
)


def main() -> dict[str, Any]:
    """Run the job; return the content of its JSON line."""
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
    add("source", type=_source, metavar="SOURCE", nargs="?", help="images to read, see above")
    add("--out", type=path_or_uri, metavar="DIR", help="folder or URI to write the shards to")
    add(
        "--seed",
        type=at_least(0),
        default=0,
        help="random seed of the order of the images (default: 0)",
    )
    add(
        "--columns",
        type=_columns,
        default={},
        metavar="OURS=THEIRS,...",
        help="names in the Parquet files for the columns image, key, pid, camid and split",
    )
    bounds = parser.add_argument_group("images")
    for flag, least, unit, meaning in BOUNDS:
        bounds.add_argument(flag, type=at_least(least), metavar=unit, help=meaning)
    add = bounds.add_argument
    add(
        "--duplicates",
        choices=("keep", "exact", "near"),
        default="keep",
        help="keep duplicates, or drop exact ones (equal pixels) or near ones (64-bit "
        "difference hashes that differ in few bits; default: %(default)s)",
    )
    add(
        "--max-distance",
        type=at_least(0),
        default=argparse.SUPPRESS,
        metavar="BITS",
        help="bits in which the hashes of near duplicates may differ (default: 2; at most 6)",
    )
    check = parser.add_argument_group("check")
    check.add_argument(
        "--check",
        type=path_or_uri,
        metavar="DIR",
        help="verify existing shards against their manifest; exit with 1 if one is damaged",
    )
    check.add_argument(
        "--decode", action="store_true", help="with --check, also decode every image"
    )
    return parser


def _prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    # Imported late: it takes seconds, which a mistake or --help should not cost.
    from upreid_ray.data.shards.duplicates import MAX_DISTANCE
    from upreid_ray.data.shards.images import ImageRules
    from upreid_ray.data.shards.page import write_page
    from upreid_ray.data.shards.preparation import write_shards
    from upreid_ray.data.shards.progress import image_progress
    from upreid_ray.data.sources.source import source_records, synthetic_records

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
    from upreid_ray.data.shards.audit import audit
    from upreid_ray.data.shards.progress import image_progress
    from upreid_ray.data.shards.shard_set import ShardSet

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


def _source(text: str) -> str:
    return text if text == SYNTHETIC else path_or_uri(text)


def _columns(text: str) -> dict[str, str]:
    """Read ``ours=theirs,...``."""
    from upreid_ray.data.sources.archives import PARQUET_COLUMNS

    pairs = [pair.partition("=") for pair in text.split(",")]
    unknown = [ours for ours, _, theirs in pairs if ours not in PARQUET_COLUMNS or not theirs]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{unknown[0]!r} must be one of {', '.join(PARQUET_COLUMNS)} followed by =NAME"
        )
    return {ours: theirs for ours, _, theirs in pairs}


def _table(manifest: "Manifest") -> Table:
    """Return a table of the images of each split and of those left out."""
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
