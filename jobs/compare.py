"""Compare initializations: score them frozen, and fine-tuned on fractions of the labels.

Random weights are always one row of the comparison. A row with a label may average several
initializations, such as those of several pre-training seeds. All settings of finetune apply
to every run.

Examples:
  python jobs/compare.py --init models:/upreid-resnet50@champion moco.pth --data.root market1501
  python jobs/compare.py --init up=models:/up/1,models:/up/2 --splits 0.1 1.0 --seeds 2 ...
  python jobs/compare.py demo --init models:/upreid-resnet18@champion --min_steps 100
  python jobs/compare.py --resume RUN_NAME
"""

import argparse
import sys
from dataclasses import asdict
from typing import Any

from rich.console import Console

from upreid_ray.command_line import (
    JobParser,
    add_finetune_settings,
    add_resume,
    add_settings,
    check_source,
    connect_to_ray,
    override,
    parse_recorded,
    recorded_settings,
    run_job,
)
from upreid_ray.config.downstream import CompareConfig


def main() -> dict[str, Any]:
    """Run the job; return the content of its JSON line."""
    parser = JobParser(__doc__, "[PRESET] --init INIT [INIT ...] [--SETTING VALUE ...]")
    words = sys.argv[1:]
    recorded = recorded_settings(words)
    add_resume(parser)
    lists = {"init": "INIT|LABEL=INIT[,INIT...]", "splits": "SHARE"}
    for name, metavar in lists.items():
        parser.add_argument(
            f"--{name}",
            nargs="+",
            required=name == "init" and recorded is None,
            metavar=metavar,
            default=argparse.SUPPRESS,
            help=CompareConfig.model_fields[name].description,
        )
    add_settings(parser, CompareConfig, without=(*lists, "finetune"))
    presets = add_finetune_settings(
        parser,
        words,
        recorded and recorded.get("finetune", {}),
        without=("init", "subset.persons"),
    )
    arguments = parser.parse(words)
    given = vars(arguments)
    own = {name: given.pop(name) for name in CompareConfig.model_fields if name in given}
    preset = presets[arguments.preset or next(iter(presets))]
    if recorded is not None and arguments.preset is None:
        resumed = parse_recorded(CompareConfig, recorded, words)
        own = {**resumed.model_dump(exclude={"finetune"}), **own}
        preset = resumed.finetune
    common = override(preset, arguments)
    if arguments.resume is not None:
        common = common.override({"run.name": arguments.resume})
    else:
        check_source("--data.root", common.data.root)
    config = CompareConfig.parse({**own, "finetune": common})
    connect_to_ray(
        meanwhile="upreid_ray.downstream.compare",
        in_workers=("upreid_ray.train.finetune_worker",),
    )
    # Imported late: it takes seconds, which a mistake or --help should not cost.
    from upreid_ray.downstream.compare import compare

    result = compare(config, resume=arguments.resume is not None)
    Console(stderr=True).print(result.table())
    return asdict(result)


if __name__ == "__main__":
    run_job(main)
