"""Sweeps on Ray Tune: from a search space to the best point, judged by retrieval.

A trial is `pretrain.fit` of one point with one seed, on Ray Train workers of its own. It
reports the mAP of the frozen backbone at each rung, and what is behind there is stopped
(ASHA). The training loss is never looked at: it changes with the weights that are swept.
"""

import logging
import os
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ray import tune
from ray.train import Checkpoint
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from rich.console import Console
from rich.table import Table

from upreid_ray.config.errors import InputError, RunFailed, RunStopped
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.config.section import MAX_NAME
from upreid_ray.core.checkpoint import read_position
from upreid_ray.data.shards.manifest import EVALUATION_SPLITS
from upreid_ray.data.shards.on_demand import training_shards
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.data.stream.training import TrainingImages
from upreid_ray.tracking import runs
from upreid_ray.train import resources
from upreid_ray.train.folder import RunFolder
from upreid_ray.train.job import deliver_metrics, evaluation_shards, register
from upreid_ray.train.pretrain import fit
from upreid_ray.tune.points import PointSearch, candidates, draw_points
from upreid_ray.tune.progress import SweepProgress, mark_run
from upreid_ray.tune.report import page, pictures, point_table, rank, trial_table
from upreid_ray.tune.space import Point, SweepPlan, check_plan
from upreid_ray.tune.trial import run_trial
from upreid_ray.tune.trial_record import CANDIDATE, METRIC, TIME, TrialRecord, TrialSettings

logger = logging.getLogger(__name__)

BEST_FILE = "best.json"
REPORT_FILE = "report.html"
RETRAINED = "-best"  # what the name of the retrained run ends with
TUNE_FOLDER = "tune"
LOG_WIDTH = 160
# A trial's own process only waits for Ray Train. A part of a CPU, if it took one, would be
# missing to the tasks that decode, and on two cores all would wait for each other for ever.
TRIAL_RESOURCES = {"CPU": 0, "memory": 1}
TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow has it all
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints even where it is told not to
}


@dataclass(frozen=True)
class SweepResult:
    """What a sweep leaves.

    Attributes:
        run_id: Of the MLflow run, whose children are the trials.
        model_uri: Of the registered version, which is the best trial's or the retrained one.
        scores: Of that backbone, 0..1 by name.
        images_per_second: Of the run that it comes from.
        best: The best point, by dotted path.
        trials: How many ended how.
        result_dir: Folder of the sweep.
    """

    run_id: str
    model_uri: str | None
    scores: dict[str, float]
    images_per_second: float
    best: Point
    trials: dict[str, int]
    result_dir: str


def start(plan: SweepPlan, folder: RunFolder) -> SweepResult:
    """Sweep on the connected Ray cluster.

    Args:
        plan: What is tried.
        folder: Of the sweep, a new one.

    Raises:
        InputError: Something that the user gave cannot be used; nothing was started.
        RunFailed: No trial has a score.
        RunStopped: Ray Tune was interrupted.
    """
    check_plan(plan)
    if folder.exists():
        raise InputError(
            f"--run.name {folder.name}: exists already; continue it with --resume {folder.name}"
        )
    if len(folder.name) > MAX_NAME - len(RETRAINED):
        raise InputError(
            f"--run.name {folder.name}: must be shorter than {MAX_NAME + 1 - len(RETRAINED)} "
            "characters, for runs of trials are named after it"
        )
    num_concurrent(plan)
    draw_points(plan)
    client = runs.connect()
    shards, evaluation = _shards(plan, folder)
    run_id = runs.start_run(
        client, experiment=plan.base.run.experiment, name=folder.name, config=plan
    )
    folder.record(plan, run_id)
    return _run(TrialSettings(plan, folder, shards, evaluation, run_id), client)


def resume(folder: RunFolder) -> SweepResult:
    """Continue a sweep: finished trials are kept, others go on from their checkpoints.

    All trials are handed to Ray Tune again. Those that ended say from their records what they
    reached, so that searcher and scheduler know what they knew; a state of Ray Tune's own,
    which may be older than the records, is not needed.

    Raises:
        InputError: There is no such sweep.
        RunFailed: No trial has a score.
    """
    run_id, recorded = folder.recorded()
    plan = SweepPlan.parse(recorded)
    client = runs.connect()
    shards, evaluation = _shards(plan, folder)
    return _run(TrialSettings(plan, folder, shards, evaluation, run_id), client)


def _run(settings: TrialSettings, client: runs.Client) -> SweepResult:
    """Run the trials that are left, and say what came of all."""
    plan, folder = settings.plan, settings.sweep
    with runs.running(client, settings.run_id):
        _run_trials(settings)
        records = settings.records()
        for record in records:
            mark_run(client, settings, record)
            if record.state == "stopped":
                stopped = settings.folder(record.candidate.number)
                if stopped.exists():
                    deliver_metrics(stopped, stopped.recorded()[0])
        states = dict(Counter(str(record.state) for record in records))
        ranked = rank(records)
        # A log has no width of its own; a row of the table should stay one line.
        console = Console(stderr=True, width=None if sys.stderr.isatty() else LOG_WIDTH)
        if not ranked:
            console.print(trial_table(records, plan.num_epochs))
            reasons = [record.reason for record in records if record.reason]
            raise RunFailed(
                f"no trial of {folder.name} has a score; {reasons[0] if reasons else ''}"
            )
        best = ranked[0]
        winner = plan.base.override(best.point)
        points = point_table(ranked, plan.num_epochs)
        console.print(points)
        _write_report(settings, client, records, points, winner, states)
        runs.set_tags(
            client,
            settings.run_id,
            {f"best.{path}": str(value) for path, value in best.point.items()},
        )
        runs.log_metrics(
            client,
            settings.run_id,
            {
                f"best/{METRIC}": best.mean,
                **({"best/spread": best.spread} if best.spread is not None else {}),
                **{f"trials/{state}": float(number) for state, number in states.items()},
            },
        )
        model_uri, scores, speed = (
            _retrain(settings, client, winner)
            if plan.search.retrain
            else _register(settings, client, best.best, winner)
        )
    return SweepResult(
        run_id=settings.run_id,
        model_uri=model_uri,
        scores=scores,
        images_per_second=speed,
        best=best.point,
        trials=states,
        result_dir=folder.uri,
    )


def _write_report(
    settings: TrialSettings,
    client: runs.Client,
    records: list[TrialRecord],
    points: Table,
    winner: PretrainConfig,
    states: dict[str, int],
) -> None:
    """Write what came of the sweep, to its folder and to MLflow."""
    plan, folder = settings.plan, settings.sweep
    drawn = pictures(plan, records)
    files = {BEST_FILE: winner.model_dump_json(indent=1)}
    files[REPORT_FILE] = page(
        f"Sweep {folder.name}",
        f"{len(records)} trials of {plan.num_epochs} epochs: "
        + ", ".join(f"{number} {state}" for state, number in states.items()),
        points=points,
        trials=trial_table(records, plan.num_epochs),
        drawn=drawn,
        best=files[BEST_FILE],
    )
    with tempfile.TemporaryDirectory() as name:
        for file, text in files.items():
            folder.write(file, text)
            Path(name, file).write_text(text)
        for file, content in drawn.items():
            Path(name, file).write_bytes(content)
        runs.log_files(client, settings.run_id, Path(name))


def _register(
    settings: TrialSettings,
    client: runs.Client,
    record: TrialRecord,
    winner: PretrainConfig,
) -> tuple[str, dict[str, float], float]:
    """Register the best backbone of a trial; return its URI, its scores and the speed."""
    run_id, _ = settings.folder(record.candidate.number).recorded()
    with Checkpoint(record.checkpoint).as_directory() as directory:
        position = read_position(Path(directory))
        model_uri = register(
            client,
            Path(directory),
            run_id=run_id,
            name=winner.model_name,
            tags={
                "run": settings.folder(record.candidate.number).name,
                "sweep": settings.run_id,
                "shards": settings.shards.uri,
                "manifest": settings.shards.manifest.digest(),
                "evaluation": settings.evaluation.manifest.digest(EVALUATION_SPLITS),
            },
        )
    return model_uri, position.best_scores, position.images_per_second


def _retrain(
    settings: TrialSettings, client: runs.Client, winner: PretrainConfig
) -> tuple[str | None, dict[str, float], float]:
    """Train the best point at full length; return its URI, its scores and the speed."""
    config = winner.override({"run.name": settings.sweep.name + RETRAINED})
    folder = RunFolder.of(config.run, config.model.backbone)
    result = fit(config, resume=folder.exists())
    runs.set_tags(client, result.run_id, {"sweep": settings.run_id})
    return result.model_uri, result.scores, result.images_per_second


def _shards(plan: SweepPlan, folder: RunFolder) -> tuple[ShardSet, ShardSet]:
    """Return the training shards, made once for all trials, and those that trials score.

    Raises:
        InputError: They cannot be read or scored.
    """
    base = plan.base
    shards = training_shards(base.data, folder.storage)
    TrainingImages(shards, base)
    evaluation = evaluation_shards(base.evaluation.shards, shards)
    if evaluation is None:
        raise InputError(
            f"--evaluation.shards none: {shards.uri} has no query and gallery images, by which "
            "trials are judged"
        )
    return shards, evaluation


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
    """Return what stops trials at their rungs."""
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


def _run_trials(settings: TrialSettings) -> None:
    """Let Ray Tune run the trials to their ends."""
    plan, folder = settings.plan, settings.sweep
    at_a_time = num_concurrent(plan)
    is_random = plan.search.searcher == "random"
    trials = [each.model_dump() for each in candidates(plan, draw_points(plan))]
    num_trials = len(trials) if is_random else plan.search.num_trials * plan.search.num_seeds
    earlier = {record.candidate.number: record.candidate for record in settings.records()}
    logger.info(
        "sweep %s: %d trials of %d epochs, %d at a time; if it ends early, continue it with "
        "--resume %s",
        folder.name,
        num_trials,
        plan.num_epochs,
        at_a_time,
        folder.name,
    )
    _set_up_tune()
    tune.Tuner(
        tune.with_resources(
            tune.with_parameters(
                run_trial, settings=settings, tracking_uri=runs.tracking_uri()
            ),
            TRIAL_RESOURCES,
        ),
        param_space={CANDIDATE: tune.grid_search(trials)} if is_random else {},
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="max",
            search_alg=None if is_random else PointSearch(plan, earlier),
            scheduler=_scheduler(plan),
            num_samples=1 if is_random else num_trials,
            max_concurrent_trials=at_a_time,
            # Else a trial that ASHA stops trains on to its end, and no other one begins.
            reuse_actors=False,
            trial_dirname_creator=_short_name,
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=folder.uri,
            callbacks=[SweepProgress(settings)],
            failure_config=tune.FailureConfig(max_failures=plan.base.run.max_failures),
            verbose=0,
        ),
    ).fit()
    records = settings.records()
    if len(records) < num_trials or any(record.state == "running" for record in records):
        raise RunStopped(
            f"sweep {folder.name} was stopped; continue it with --resume {folder.name}"
        )


def _set_up_tune() -> None:
    """Let Ray Tune print and write no more than is read; the user's own settings count more."""
    for name, value in TUNE_SETTINGS.items():
        os.environ.setdefault(name, value)
    # Of failed trials, what happened is in their records and in Ray Tune's folder.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)


def _short_name(trial: Trial) -> str:
    """Name the folder of a trial in Ray Tune's."""
    return f"trial-{trial.config[CANDIDATE]['number']:03d}"
