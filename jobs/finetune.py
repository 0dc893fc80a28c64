"""Fine-tune a backbone on images of persons, score it and register it.

Methods:
  supervised        with labels: identity and triplet loss (presets bot, demo)
  cluster-contrast  without labels: contrast between clusters of images (presets paper, demo)

Examples:
  python jobs/finetune.py --init models:/upreid-resnet50@champion --data.root market1501
  python jobs/finetune.py --init random --data.root market1501 --subset.persons 0.1
  python jobs/finetune.py --init ... --data.root market1501 --method cluster-contrast
  python jobs/finetune.py demo --init models:/upreid-resnet18@champion
  python jobs/finetune.py --init ... --data.root market1501 --resume RUN_NAME
  python jobs/finetune.py --method cluster-contrast --help
"""

import sys
from dataclasses import asdict
from typing import Any

from upreid_ray.command_line import (
    JobParser,
    add_finetune_settings,
    connect_to_ray,
    override,
    run_job,
)


def main() -> dict[str, Any]:
    """Run the job; return the content of its JSON line."""
    parser = JobParser(__doc__, "[PRESET] --init INIT [--method METHOD] [--SETTING VALUE ...]")
    parser.add_argument(
        "--resume", metavar="RUN_NAME", help="continue this run; repeat its settings"
    )
    presets = add_finetune_settings(parser, sys.argv[1:])
    arguments = parser.parse(sys.argv[1:])
    config = override(presets[arguments.preset], arguments)
    if arguments.resume is not None:
        config = config.override({"run.name": arguments.resume})
    # Imported late: it takes seconds, which a mistake or --help should not cost.
    from upreid_ray.train.finetune import finetune  # noqa: PLC0415

    connect_to_ray()
    return asdict(finetune(config, resume=arguments.resume is not None))


if __name__ == "__main__":
    run_job(main)
