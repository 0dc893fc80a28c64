"""Comparison of initializations, frozen and fine-tuned on shares of the labels.

Every run is nested in the MLflow run of the comparison and registers nothing. Its scores are
written into the folder of the comparison when it ends. A comparison that is resumed executes
the runs that have no scores yet.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence

import ray
import ray.data
from ray.exceptions import RayError
from rich.console import Console
from rich.progress import Progress

from upreid_ray.config.downstream import CompareConfig, EvaluateConfig
from upreid_ray.config.errors import InputError, RunStopped, first_line
from upreid_ray.config.run import ScalingConfig
from upreid_ray.data.shards.requested import labelled_shards
from upreid_ray.downstream.comparison_result import CompareResult, Scores, publish, summarize
from upreid_ray.downstream.comparison_runs import (
    ComparisonRun,
    Variant,
    list_runs,
    resolve_variants,
)
from upreid_ray.downstream.evaluate import evaluate
from upreid_ray.tracking import connection, runs
from upreid_ray.train.finetune import finetune
from upreid_ray.train.folder import RunFolder
from upreid_ray.train.job import FREE_SETTINGS
from upreid_ray.train.resources import Resources, check_resources, living_nodes, num_runs


def compare(config: CompareConfig, *, resume: bool = False) -> CompareResult:
    """Score initializations frozen and fine-tuned on the connected Ray cluster.

    Random weights are always compared too. As many runs are side by side as the cluster holds.
    On one machine without GPUs, set ``scaling.threads_per_worker``, otherwise each run takes
    all cores. A run that fails stops no other, and a resumed comparison repeats it.

    Raises:
        InputError: A setting cannot be used; nothing was started.
        RunStopped: The comparison was interrupted.
        RuntimeError: Every run failed.
    """
    common = config.finetune
    folder = RunFolder.of(common.run, "compare")
    client = connection.connect()
    if not resume:
        folder.require_new()
    check_resources(common.scaling)
    variants, descriptions = resolve_variants(_variants(config))
    config = config.override({"init": tuple(str(variant) for variant in variants)})
    run_id = folder.recorded_run(config, FREE_SETTINGS) if resume else None
    scored = common.evaluation.shards is None
    shards = labelled_shards(common.data, folder.storage, scored=scored)
    planned = list_runs(config, variants, descriptions, shards=shards, storage=folder.uri)
    if run_id is None:
        with folder.begin():
            run_id = runs.start_run(
                client, experiment=common.run.experiment, name=folder.name, config=config
            )
            folder.record(config, run_id)
    with runs.running(client, run_id):
        try:
            scores, failures = _score(planned, folder, common.scaling, run_id)
        except KeyboardInterrupt:
            raise RunStopped(
                f"comparison {folder.name} was stopped; continue it with --resume {folder.name}"
            ) from None
        result = summarize(planned, scores, failures, run_id=run_id, result_dir=folder.uri)
        publish(result, folder, client)
    return result


def num_side_by_side(scaling: ScalingConfig, nodes: Sequence[Resources]) -> int:
    """Return how many runs are started at a time: at least one, for the cluster may grow."""
    return max(1, num_runs(scaling, nodes))


def _variants(config: CompareConfig) -> list[Variant]:
    """Return the variants that the user wants to compare; refuse one with too few seeds."""
    variants = [Variant.parse(text) for text in config.init]
    for variant in variants:
        if len(variant.inits) > config.seeds:
            raise InputError(
                f"--seeds {config.seeds}: fewer than the initializations of row {variant.label}"
            )
    return variants


def _score(
    planned: Sequence[ComparisonRun], folder: RunFolder, scaling: ScalingConfig, run_id: str
) -> tuple[dict[str, Scores], dict[str, str]]:
    """Execute the runs that have no scores yet.

    Returns:
        Scores of all runs that ended, and reasons of those that failed, by the run's name.

    Raises:
        RuntimeError: No run has scores.
    """
    texts = {each.name: folder.read(f"{each.name}.json") for each in planned}
    scores: dict[str, Scores] = {name: json.loads(text) for name, text in texts.items() if text}
    failures: dict[str, str] = {}
    missing = [each for each in planned if each.name not in scores]
    for name, outcome in _side_by_side(missing, scaling, run_id):
        if isinstance(outcome, str):
            failures[name] = outcome
        else:
            scores[name] = outcome
            folder.write(f"{name}.json", json.dumps(outcome))
    if not scores:
        raise RuntimeError(
            f"every run failed; the first reason: {next(iter(failures.values()))}"
        )
    return scores, failures


def _side_by_side(
    planned: Sequence[ComparisonRun], scaling: ScalingConfig, parent_run_id: str
) -> Iterator[tuple[str, Scores | str]]:
    """Execute runs as Ray tasks, as many at a time as the cluster holds.

    Yields:
        The name of a run that ended, and its scores or the reason why it failed.
    """
    waiting = list(reversed(planned))
    started: dict[ray.ObjectRef, ComparisonRun] = {}
    task = ray.remote(num_cpus=0, max_retries=0)(_run)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("comparing", total=len(planned))
        while waiting or started:
            while waiting and len(started) < num_side_by_side(scaling, living_nodes()):
                next_run = waiting.pop()
                reference = task.remote(next_run, connection.tracking_uri(), parent_run_id)
                started[reference] = next_run
            (done,), _ = ray.wait(list(started))
            ended = started.pop(done)
            try:
                outcome = ray.get(done)
            except RayError as error:  # the process of the run was lost
                outcome = first_line(error)
            progress.advance(bar)
            failed = isinstance(outcome, str)
            text = f"failed: {outcome}" if failed else f"mAP {outcome['mAP']:.3f}"
            progress.console.print(f"{ended}: {text}", markup=False)
            yield ended.name, outcome


def _run(planned: ComparisonRun, tracking_uri: str, parent_run_id: str) -> Scores | str:
    """Return the scores of a run, or why it failed."""
    os.environ["MLFLOW_TRACKING_URI"] = tracking_uri
    # Ray Data announces each execution in the process that starts it.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    config = planned.config
    try:
        if isinstance(config, EvaluateConfig):
            return evaluate(config, parent_run_id=parent_run_id).scores
        begun = RunFolder.of(config.run, "finetune").exists()
        return finetune(config, resume=begun, parent_run_id=parent_run_id).scores
    except Exception as error:  # no error of a run may stop the others
        return first_line(error)
