"""Sweeps on Ray Tune: from a search space to the best point, judged by retrieval.

A trial is `pretrain.fit` of one point with one seed, on Ray Train workers of its own. It
reports the mAP of the frozen backbone at each rung, and ASHA stops the trials that are behind.
The training loss judges nothing, since it changes with the weights that are swept.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from upreid_ray.config.errors import InputError, RunFailed
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.config.section import MAX_NAME
from upreid_ray.data.shards.requested import training_shards
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.data.stream.training import TrainingImages
from upreid_ray.tracking import connection, runs
from upreid_ray.train.folder import RunFolder
from upreid_ray.train.job import deliver_metrics, evaluation_shards
from upreid_ray.tune.points import draw_points
from upreid_ray.tune.progress import mark_run
from upreid_ray.tune.report import (
    PointOutcome,
    best_first,
    draw_figures,
    point_table,
    report_page,
    trial_table,
)
from upreid_ray.tune.space import Point, SweepPlan, check_plan
from upreid_ray.tune.trial_record import METRIC, TrialRecord, TrialSettings
from upreid_ray.tune.tuner import num_concurrent, run_trials
from upreid_ray.tune.winner import RETRAINED, register_trial, retrain

BEST_FILE = "best.json"
REPORT_FILE = "report.html"
LOG_WIDTH = 160


@dataclass(frozen=True)
class SweepResult:
    """Result of a sweep.

    Attributes:
        run_id: ID of the MLflow run of the sweep, whose children are the trials.
        model_uri: URI of the registered version: the best trial's, or the retrained one.
        scores: Scores of that backbone, 0..1 by name.
        images_per_second: Speed of the run that trained it.
        best: The best point, by dotted path.
        trials: Number of trials by their final state.
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
    """Sweep on the connected Ray cluster, in a folder that does not exist yet.

    Raises:
        InputError: A setting cannot be used; nothing was started.
        RunFailed: No trial has a score.
        RunStopped: Ray Tune was interrupted.
    """
    check_plan(plan)
    folder.require_new()
    if len(folder.name) > MAX_NAME - len(RETRAINED):
        raise InputError(
            f"--run.name {folder.name}: must be shorter than {MAX_NAME + 1 - len(RETRAINED)} "
            "characters, for runs of trials are named after it"
        )
    num_concurrent(plan)
    draw_points(plan)
    client = connection.connect()
    shards, evaluation = _find_shards(plan, folder)
    with folder.begin():
        run_id = runs.start_run(
            client, experiment=plan.base.run.experiment, name=folder.name, config=plan
        )
        folder.record(plan, run_id)
    return _run(TrialSettings(plan, folder, shards, evaluation, run_id), client)


def resume(folder: RunFolder) -> SweepResult:
    """Continue a sweep: finished trials are kept, others go on from their checkpoints.

    All trials are given to Ray Tune again, and those that have ended report from their records
    what they reached. So searcher and scheduler learn what they knew before. Ray Tune's own
    state is not used, since it may be older than the records.

    Raises:
        InputError: There is no such sweep.
        RunFailed: No trial has a score.
        RunStopped: Ray Tune was interrupted.
    """
    run_id, recorded = folder.recorded()
    plan = SweepPlan.parse(recorded)
    client = connection.connect()
    shards, evaluation = _find_shards(plan, folder)
    return _run(TrialSettings(plan, folder, shards, evaluation, run_id), client)


def _find_shards(plan: SweepPlan, folder: RunFolder) -> tuple[ShardSet, ShardSet]:
    """Return the training shards, and the shards by which trials are scored.

    The synthetic set is drawn here, once for all trials.

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


def _run(settings: TrialSettings, client: runs.Client) -> SweepResult:
    """Run the trials that are left, rank all of them, and register the best backbone."""
    plan = settings.plan
    with runs.running(client, settings.run_id):
        run_trials(settings)
        records = settings.records()
        _close_runs(settings, client, records)
        ranked = best_first(records)
        _print_table(settings, records, ranked)
        if not ranked:
            reason = next((record.reason for record in records if record.reason), "")
            raise RunFailed(f"no trial of {settings.sweep.name} has a score; {reason}")
        best = ranked[0]
        config = plan.base.override(best.point)
        states = dict(Counter(str(record.state) for record in records))
        _write_report(settings, client, records, ranked, config)
        _log_best(settings, client, best, states)
        winner = (
            retrain(settings, client, config)
            if plan.search.retrain
            else register_trial(settings, client, best.best, config.model_name)
        )
    return SweepResult(
        run_id=settings.run_id,
        model_uri=winner.model_uri,
        scores=winner.scores,
        images_per_second=winner.images_per_second,
        best=best.point,
        trials=states,
        result_dir=settings.sweep.uri,
    )


def _close_runs(
    settings: TrialSettings, client: runs.Client, records: Sequence[TrialRecord]
) -> None:
    """Mark the MLflow runs of all trials, and deliver metrics of those that were stopped."""
    for record in records:
        mark_run(client, settings, record)
        folder = settings.folder(record.candidate.number)
        if record.state == "stopped" and folder.exists():
            run_id, _ = folder.recorded()
            deliver_metrics(folder, run_id)


def _print_table(
    settings: TrialSettings, records: Sequence[TrialRecord], ranked: Sequence[PointOutcome]
) -> None:
    """Print the ranked points, or the trials if no point has a score."""
    # A log has no width of its own, and a row of the table should stay on one line.
    console = Console(stderr=True, width=None if sys.stderr.isatty() else LOG_WIDTH)
    num_epochs = settings.plan.num_epochs
    table = point_table(ranked, num_epochs) if ranked else trial_table(records, num_epochs)
    console.print(table)


def _write_report(
    settings: TrialSettings,
    client: runs.Client,
    records: Sequence[TrialRecord],
    ranked: Sequence[PointOutcome],
    best: PretrainConfig,
) -> None:
    """Write the best settings, the report and its figures, to the folder and to MLflow."""
    plan, folder = settings.plan, settings.sweep
    figures = draw_figures(plan, records)
    best_json = best.model_dump_json(indent=1)
    page = report_page(folder.name, plan, records, ranked, figures=figures, best=best_json)
    texts = {BEST_FILE: best_json.encode(), REPORT_FILE: page.encode()}
    for file, text in texts.items():
        folder.write(file, text)
    for file, content in (texts | figures).items():
        runs.log_file(client, settings.run_id, file, content)


def _log_best(
    settings: TrialSettings, client: runs.Client, best: PointOutcome, states: dict[str, int]
) -> None:
    """Log the best point, its score and the states of the trials to the run of the sweep."""
    tags = {f"best.{path}": str(value) for path, value in best.point.items()}
    runs.set_tags(client, settings.run_id, tags)
    metrics = {
        f"best/{METRIC}": best.mean,
        **{f"trials/{state}": float(number) for state, number in states.items()},
    }
    if best.spread is not None:
        metrics["best/spread"] = best.spread
    runs.log_metrics(client, settings.run_id, metrics)
