"""Pre-train a person re-identification backbone without labels, score it and register it.

Examples:
  python jobs/pretrain.py demo
  python jobs/pretrain.py laptop --data.shards DIR
  python jobs/pretrain.py luperson --data.shards s3://bucket/shards --optimizer.lr 0.1
  python jobs/pretrain.py --resume RUN_NAME
"""

import sys
from dataclasses import asdict
from typing import Any

from upreid_ray.command_line import (
    JobParser,
    add_pretrain_settings,
    add_resume,
    check_shards,
    connect_to_ray,
    parse_recorded,
    read_pretrain_settings,
    recorded_settings,
    run_job,
)
from upreid_ray.config.pretrain import PretrainConfig


def main() -> dict[str, Any]:
    """Run the job; return the content of its JSON line."""
    parser = JobParser(__doc__, "[PRESET] [--SETTING VALUE ...]")
    words = sys.argv[1:]
    add_resume(parser)
    add_pretrain_settings(parser)
    arguments = parser.parse(words)
    recorded = recorded_settings(words)
    resumed = None if recorded is None else parse_recorded(PretrainConfig, recorded, words)
    config = read_pretrain_settings(arguments, resumed)
    if arguments.resume is not None:
        config = config.override({"run.name": arguments.resume})
    else:
        check_shards(config)
    connect_to_ray(meanwhile="upreid_ray.train.pretrain")
    # Imported late: it takes seconds, which a mistake or --help should not cost.
    from upreid_ray.train.pretrain import fit

    return asdict(fit(config, resume=arguments.resume is not None))


if __name__ == "__main__":
    run_job(main)
