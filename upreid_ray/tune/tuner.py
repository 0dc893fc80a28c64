"""Ray Tune runs the trials of a sweep: how many at a time, and which of them it stops."""

import logging
import os
from contextlib import suppress
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from upreid_ray.config.errors import InputError, RunStopped
from upreid_ray.tracking import connection
from upreid_ray.train import resources
from upreid_ray.tune.points import PointSearch, candidates, draw_points
from upreid_ray.tune.progress import SweepProgress
from upreid_ray.tune.space import SweepPlan
from upreid_ray.tune.trial import run_trial
from upreid_ray.tune.trial_record import CANDIDATE, METRIC, TIME, TrialSettings

logger = logging.getLogger(__name__)

TUNE_FOLDER = "tune"
# The process of a trial only waits for Ray Train. If it reserved a part of a CPU, that part
# would be missing to the tasks that decode, and on two cores all would wait for each other.
TRIAL_RESOURCES = {"CPU": 0, "memory": 1}
# Environment variables of Ray Tune; those that the user has set take precedence.
TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow has all of it
    "RAY_AIR_NEW_OUTPUT": "0",  # it would print in spite of verbose=0
}


def run_trials(settings: TrialSettings) -> None:
    """Run the trials of a sweep to their ends.

    Trials that have ended report from their records what they reached, and train no further.

    Raises:
        InputError: The cluster does not hold one trial.
        RunStopped: Ray Tune was interrupted.
    """
    plan, folder = settings.plan, settings.sweep
    trials_at_a_time = num_concurrent(plan)
    num_trials, param_space, search = _candidates(settings)
    logger.info(
        "sweep %s: %d trials of %d epochs, %d at a time; if it ends early, continue it with "
        "--resume %s",
        folder.name,
        num_trials,
        plan.num_epochs,
        trials_at_a_time,
        folder.name,
    )
    _quiet_tune()
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(
                run_trial, settings=settings, tracking_uri=connection.tracking_uri()
            ),
            TRIAL_RESOURCES,
        ),
        param_space=param_space,
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="max",
            scheduler=_scheduler(plan),
            max_concurrent_trials=trials_at_a_time,
            # Otherwise a trial that ASHA stops trains on to its end, and no other one begins.
            reuse_actors=False,
            trial_dirname_creator=_folder_name,
            **search,
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=folder.uri,
            callbacks=[SweepProgress(settings)],
            failure_config=tune.FailureConfig(max_failures=plan.base.run.max_failures),
            verbose=0,
        ),
    )
    with suppress(KeyboardInterrupt):  # by SIGTERM; Ray Tune itself notices Ctrl-C
        tuner.fit()
    _check_all_ended(settings, num_trials)


def _candidates(settings: TrialSettings) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Return the number of trials, Ray Tune's space of parameters, and how it searches that.

    A random search lists all candidates in advance. TPE proposes them one by one.
    """
    plan = settings.plan
    if plan.search.searcher == "random":
        listed = [each.model_dump() for each in candidates(plan, draw_points(plan))]
        return len(listed), {CANDIDATE: tune.grid_search(listed)}, {"num_samples": 1}
    earlier = {each.candidate.number: each.candidate for each in settings.records()}
    num_trials = plan.search.num_trials * plan.search.num_seeds
    searcher = PointSearch(plan, earlier)
    return num_trials, {}, {"num_samples": num_trials, "search_alg": searcher}


def _check_all_ended(settings: TrialSettings, num_trials: int) -> None:
    """Raise RunStopped if a trial has not ended, because Ray Tune was interrupted."""
    name, records = settings.sweep.name, settings.records()
    if len(records) < num_trials or any(record.state == "running" for record in records):
        raise RunStopped(f"sweep {name} was stopped; continue it with --resume {name}")


def num_concurrent(plan: SweepPlan) -> int:
    """Return how many trials run at a time.

    Raises:
        InputError: The cluster does not hold one.
    """
    scaling = plan.base.scaling
    nodes = resources.living_nodes()
    fitting = resources.num_runs(scaling, nodes)
    if not fitting:
        needs, has = resources.worker_needs(scaling), resources.total(nodes)
        raise InputError(
            f"--scaling.num_workers {scaling.num_workers}: a trial needs "
            f"{scaling.num_workers} times {needs['CPU']:g} CPUs and {needs.get('GPU', 0):g} "
            f"GPUs, and a CPU that decodes; the cluster has {has['CPU']:g} CPUs and "
            f"{has['GPU']:g} GPUs"
        )
    return min(fitting, plan.search.max_concurrent or fitting)


def _scheduler(plan: SweepPlan) -> TrialScheduler:
    """Return the scheduler, which stops trials that are behind at their rungs."""
    if plan.search.scheduler == "none":
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr=TIME,
        # Less than the length of a trial: at its end there is nothing left to stop.
        max_t=plan.num_epochs - 0.5,
        grace_period=plan.grace_epochs,
        reduction_factor=plan.search.reduction_factor,
        stop_last_trials=False,
    )


def _quiet_tune() -> None:
    """Turn off what Ray Tune prints and writes and nobody reads."""
    for name, value in TUNE_SETTINGS.items():
        os.environ.setdefault(name, value)
    # The records and Ray Tune's folder say why a trial failed.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)


def _folder_name(trial: Trial) -> str:
    """Return the name of a trial's folder inside the folder of Ray Tune."""
    return f"trial-{trial.config[CANDIDATE]['number']:03d}"
