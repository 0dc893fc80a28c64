"""Compute the features of images, for search and for other programs.

INIT is models:/NAME@ALIAS, models:/NAME/VERSION, a checkpoint folder, or a file of weights.
SOURCE is a set of shards, or anything that prepare reads: a folder, an LMDB, tar or Parquet
files, a list of paths, a labelled set.

DIR gets Parquet files with one row for each image: key, pid, camid, split, width, height and
feature (unit length, so that a product of two features is their cosine similarity). It also
gets features.json, which names the backbone and the source, and refused.jsonl, which lists the
images that do not decode. After a kill, the same command continues.

Examples:
  python jobs/embed.py models:/upreid-resnet50@champion CROPS --out features
  python jobs/embed.py upreid.pth shards --out s3://bucket/features --number_type float16
  python jobs/embed.py models:/upreid-resnet50/3 market1501 --out features --tta flip
"""

import logging
import sys
from dataclasses import asdict
from typing import Any

from upreid_ray.command_line import (
    JobParser,
    add_settings,
    check_source,
    connect_to_ray,
    existing_init,
    override,
    path_or_uri,
    run_job,
)
from upreid_ray.config.downstream import EmbedConfig

logger = logging.getLogger("upreid_ray")


def main() -> dict[str, Any]:
    """Run the job; return the content of its JSON line."""
    parser = JobParser(__doc__, "INIT SOURCE --out DIR [--SETTING VALUE ...]")
    parser.add_argument(
        "init", type=existing_init, metavar="INIT", help="backbone that computes the features"
    )
    parser.add_argument("source", type=path_or_uri, metavar="SOURCE", help="images to read")
    parser.add_argument(
        "--out",
        required=True,
        type=path_or_uri,
        metavar="DIR",
        help="folder or URI to write the features to",
    )
    add_settings(parser, EmbedConfig)
    arguments = parser.parse(sys.argv[1:])
    config = override(EmbedConfig(), arguments)
    check_source("SOURCE", arguments.source)
    connect_to_ray(meanwhile="upreid_ray.downstream.embed")
    # Imported late: it takes seconds, which a mistake or --help should not cost.
    from upreid_ray.downstream.embed import embed

    result = embed(arguments.init, arguments.source, arguments.out, config)
    logger.info(
        "%d images, %d refused, %.0f images/s; search them with jobs/search.py --gallery %s",
        result.num_images,
        result.num_refused,
        result.images_per_second,
        result.result_dir,
    )
    return asdict(result)


if __name__ == "__main__":
    run_job(main)
