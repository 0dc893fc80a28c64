"""Search for the best settings of pre-training: many short runs, compared by retrieval scores.

SPACE names the settings to sweep: i2 (weights and temperatures of the two I2 terms), patches
(the grid of patches), all (both), or own (only those of --space). A preset and settings follow,
as for pretrain. --space.SETTING AXIS sweeps one more setting, or changes its range; AXIS is
  uniform(a,b)  loguniform(a,b)  loguniform(a,b,zero)  choice(a,b,...)  grid(a,b,...)
The sweep writes the best settings to runs/NAME/best.json, for pretrain --config, and a report
to runs/NAME/report.html. It registers the best backbone.

Examples:
  python jobs/sweep.py i2 demo --num_trials 8
  python jobs/sweep.py all laptop --data.shards DIR --searcher tpe --num_seeds 2
  python jobs/sweep.py patches laptop --data.shards DIR --trial_epochs 6 --retrain true
  python jobs/sweep.py own demo --space.optimizer.lr "loguniform(1e-3,1)"
  python jobs/sweep.py --resume SWEEP_NAME
"""

import argparse
import sys
from dataclasses import asdict
from typing import Any

from upreid_ray.command_line import (
    JobParser,
    add_pretrain_settings,
    add_settings,
    check_shards,
    connect_to_ray,
    override,
    parse_recorded,
    read_pretrain_settings,
    recorded_settings,
    run_job,
)
from upreid_ray.config.errors import InputError
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.config.run import JobConfig
from upreid_ray.config.sweep import SearchConfig
from upreid_ray.tune.space import SPACES, SweepPlan, check_plan

AXIS = "space."


def main() -> dict[str, Any]:
    """Run the job; return the content of its JSON line."""
    words = sys.argv[1:]
    arguments = _parser().parse(words)
    plan = None if arguments.resume is not None else _plan(arguments)
    run = _run(arguments)
    recorded = recorded_settings(words)
    if recorded is not None:
        parse_recorded(SweepPlan, recorded, words)  # refuses the run of another job
    if plan is not None:
        check_shards(plan.base)
    connect_to_ray(
        meanwhile="upreid_ray.tune.sweep",
        in_workers=("mlflow.tracking", "upreid_ray.tracking.runs"),  # of trials
        show_workers=False,
    )
    # Imported late: it takes seconds, which a mistake or --help should not cost.
    from upreid_ray.train.folder import RunFolder
    from upreid_ray.tune import sweep

    folder = RunFolder.of(run, "sweep")
    return asdict(sweep.resume(folder) if plan is None else sweep.start(plan, folder))


def _parser() -> JobParser:
    parser = JobParser(
        __doc__, "SPACE [PRESET] [--SETTING VALUE ...] [--space.SETTING AXIS ...]"
    )
    parser.add_argument(
        "space",
        nargs="?",
        choices=SPACES,
        metavar="SPACE",
        help="settings to sweep: %(choices)s",
    )
    parser.add_argument(
        "--resume", metavar="SWEEP_NAME", help="continue this sweep with its own settings"
    )
    add_settings(parser, SearchConfig)
    add_pretrain_settings(parser)
    for path, _ in PretrainConfig().flatten():
        parser.add_argument(
            f"--{AXIS}{path}", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return parser


def _plan(arguments: argparse.Namespace) -> SweepPlan:
    """Return the plan of the sweep.

    Raises:
        InputError: A setting or an axis is refused.
    """
    if arguments.space is None:
        raise InputError(f"SPACE: required; one of {', '.join(SPACES)}")
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    space = {path: str(axis) for path, axis in SPACES[arguments.space].items()} | {
        name.removeprefix(AXIS): text for name, text in given.items() if name.startswith(AXIS)
    }
    for path in space.keys() & given.keys():
        raise InputError(f"--{path} {given[path]}: is swept; --{AXIS}{path} says how")
    plan = SweepPlan(
        # The name belongs to the sweep, not to its runs.
        base=read_pretrain_settings(arguments).override({"run.name": None}),
        search=override(SearchConfig(), arguments),
        space=space,
    )
    check_plan(plan)
    return plan


def _run(arguments: argparse.Namespace) -> JobConfig:
    """Return the settings of the folder of the sweep.

    Raises:
        InputError: There are settings beside --resume.
    """
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    if arguments.resume is not None:
        others = sorted(given.keys() - {"resume", "run.storage_path"})
        if others:
            raise InputError(
                f"--resume {arguments.resume}: continues with its own settings; leave out "
                f"{others[0]} {given[others[0]]}"
            )
        given["run.name"] = arguments.resume
    names = [f"run.{name}" for name in JobConfig.model_fields]
    return JobConfig.parse({n.removeprefix("run."): given[n] for n in names if n in given})


if __name__ == "__main__":
    run_job(main)
