"""Find the best settings of pre-training: many short runs, judged by retrieval.

SPACE names what is swept: i2 (weights and temperatures of the two I2 terms), patches (the
grid), all (both), or own (only what --space adds). After it come a preset and settings, as in
pretrain.py. --space.SETTING sweeps one more setting, or another range of it:
  uniform(a,b)  loguniform(a,b)  loguniform(a,b,zero)  choice(a,b,...)  grid(a,b,...)
The best settings are in runs/NAME/best.json, for pretrain.py --config; the best backbone is
registered; runs/NAME/report.html shows all.

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
    connect_to_ray,
    override,
    read_pretrain_settings,
    run_job,
)
from upreid_ray.config.errors import InputError
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.config.run import JobConfig
from upreid_ray.config.sweep import SearchConfig
from upreid_ray.tune.space import SPACES, SweepPlan, check_plan

AXIS = "space."


def main() -> dict[str, Any]:
    """Parse, sweep, and return what the JSON line says."""
    arguments = _parser().parse(sys.argv[1:])
    plan = None if arguments.resume is not None else _plan(arguments)
    run = _run(arguments)
    # After the arguments: it takes seconds, which a mistake or --help should not cost.
    from upreid_ray.train.folder import RunFolder  # noqa: PLC0415
    from upreid_ray.tune import sweep  # noqa: PLC0415

    folder = RunFolder.of(run, "sweep")
    connect_to_ray(show_workers=False)
    return asdict(sweep.resume(folder) if plan is None else sweep.start(plan, folder))


def _parser() -> JobParser:
    parser = JobParser(
        __doc__, "SPACE [PRESET] [--SETTING VALUE ...] [--space.SETTING AXIS ...]"
    )
    parser.add_argument(
        "space", nargs="?", choices=SPACES, metavar="SPACE", help="what is swept"
    )
    parser.add_argument(
        "--resume", metavar="SWEEP_NAME", help="continue this sweep, with its own settings"
    )
    add_settings(parser, SearchConfig)
    add_pretrain_settings(parser)
    for path, _ in PretrainConfig().flatten():
        parser.add_argument(
            f"--{AXIS}{path}", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return parser


def _plan(arguments: argparse.Namespace) -> SweepPlan:
    """Return what is to be swept.

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
        # The name is that of the sweep, not of its runs.
        base=read_pretrain_settings(arguments).override({"run.name": None}),
        search=override(SearchConfig(), arguments),
        space=space,
    )
    check_plan(plan)
    return plan


def _run(arguments: argparse.Namespace) -> JobConfig:
    """Return where the sweep lives.

    Raises:
        InputError: A sweep that is continued is given settings.
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
