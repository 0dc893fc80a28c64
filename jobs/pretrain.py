"""Pre-train a person re-identification backbone without labels, score it and register it.

Examples:
  python jobs/pretrain.py demo
  python jobs/pretrain.py laptop --data.shards DIR
  python jobs/pretrain.py luperson --data.shards s3://bucket/shards --optimizer.lr 0.1
  python jobs/pretrain.py demo --resume RUN_NAME
"""

import sys
from dataclasses import asdict
from typing import Any

from upreid_ray.command_line import (
    JobParser,
    add_pretrain_settings,
    connect_to_ray,
    read_pretrain_settings,
    run_job,
)


def main() -> dict[str, Any]:
    """Run the job; return the content of its JSON line."""
    parser = JobParser(__doc__, "[PRESET] [--SETTING VALUE ...]")
    parser.add_argument(
        "--resume", metavar="RUN_NAME", help="continue this run; repeat its settings"
    )
    add_pretrain_settings(parser)
    arguments = parser.parse(sys.argv[1:])
    config = read_pretrain_settings(arguments)
    if arguments.resume is not None:
        config = config.override({"run.name": arguments.resume})
    # Imported late: it takes seconds, which a mistake or --help should not cost.
    from upreid_ray.train.pretrain import fit  # noqa: PLC0415

    connect_to_ray()
    return asdict(fit(config, resume=arguments.resume is not None))


if __name__ == "__main__":
    run_job(main)
