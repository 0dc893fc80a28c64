"""Fine-tune a backbone on images of persons, score it and register it.

Methods:
  supervised        with labels: identity and triplet loss (presets bot, demo)
  cluster-contrast  without labels: contrast between clusters of images (presets paper, demo)

Examples:
  python jobs/finetune.py --init models:/upreid-resnet50@champion --data.root market1501
  python jobs/finetune.py --init random --data.root market1501 --subset.persons 0.1
  python jobs/finetune.py --init ... --data.root market1501 --method cluster-contrast
  python jobs/finetune.py demo --init models:/upreid-resnet18@champion
  python jobs/finetune.py --resume RUN_NAME
  python jobs/finetune.py --method cluster-contrast --help
"""

import sys
from dataclasses import asdict
from typing import Any

from upreid_ray.command_line import (
    JobParser,
    add_finetune_settings,
    add_resume,
    check_source,
    connect_to_ray,
    override,
    parse_recorded,
    recorded_settings,
    run_job,
)


def main() -> dict[str, Any]:
    """Run the job; return the content of its JSON line."""
    parser = JobParser(__doc__, "[PRESET] --init INIT [--method METHOD] [--SETTING VALUE ...]")
    words = sys.argv[1:]
    recorded = recorded_settings(words)
    add_resume(parser)
    presets = add_finetune_settings(parser, words, recorded)
    arguments = parser.parse(words)
    preset = presets[arguments.preset or next(iter(presets))]
    if recorded is not None and arguments.preset is None:
        preset = parse_recorded(type(preset), recorded, words)
    config = override(preset, arguments)
    if arguments.resume is not None:
        config = config.override({"run.name": arguments.resume})
    else:
        check_source("--data.root", config.data.root)
    connect_to_ray(
        meanwhile="upreid_ray.train.finetune", in_workers=("upreid_ray.train.finetune_worker",)
    )
    # Imported late: it takes seconds, which a mistake or --help should not cost.
    from upreid_ray.train.finetune import finetune

    return asdict(finetune(config, resume=arguments.resume is not None))


if __name__ == "__main__":
    run_job(main)
