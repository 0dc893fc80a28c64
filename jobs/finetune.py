"""Fine-tune a backbone on a labelled set, score it and register it.

Examples:
  python jobs/finetune.py --init models:/upreid-resnet50@champion --data.root market1501
  python jobs/finetune.py --init random --data.root market1501 --subset.persons 0.1
  python jobs/finetune.py demo --init models:/upreid-resnet18@champion
  python jobs/finetune.py --init ... --data.root market1501 --resume RUN_NAME
"""

import sys
from dataclasses import asdict
from typing import Any

from upreid_ray.command_line import (
    JobParser,
    add_settings,
    connect_to_ray,
    override,
    require_init,
    run_job,
)
from upreid_ray.config import FinetuneConfig
from upreid_ray.presets import FINETUNE_PRESETS


def main() -> dict[str, Any]:
    """Parse, fine-tune, and return what the JSON line says."""
    parser = JobParser(__doc__)
    parser.add_argument(
        "preset",
        nargs="?",
        default="bot",
        choices=FINETUNE_PRESETS,
        help="named run to begin with (default: bot)",
    )
    parser.add_argument(
        "--resume", metavar="RUN_NAME", help="continue this run; give the same settings again"
    )
    add_settings(parser, FinetuneConfig)
    arguments = parser.parse(sys.argv[1:])
    require_init(arguments)
    config = override(FINETUNE_PRESETS[arguments.preset], arguments)
    if arguments.resume is not None:
        config = config.override({"run.name": arguments.resume})
    # After the arguments: it takes seconds, which a mistake or --help should not cost.
    from upreid_ray.finetune import finetune  # noqa: PLC0415

    connect_to_ray()
    return asdict(finetune(config, resume=arguments.resume is not None))


if __name__ == "__main__":
    run_job(main)
