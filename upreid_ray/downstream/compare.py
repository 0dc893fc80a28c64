"""Initializations side by side: frozen and fine-tuned, on parts of the labels, seed by seed.

Every run is a trial of the comparison: nested in MLflow, registering nothing. What a run scores
is written into the folder of the comparison when it ends, and a comparison that is continued
runs what has no score yet.

The runs of a column differ in nothing but the initialization: seed k gives all rows the same
persons, order and augmentation. By default every split is trained for the epochs of the recipe,
so that a tenth of the persons gets a tenth of the steps; where that is too few to learn
anything, ``min_steps`` multiplies the epochs of the whole schedule.
"""

import io
import json
import os
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Self

import ray
from matplotlib.figure import Figure
from ray.exceptions import RayError
from rich.console import Console
from rich.progress import Progress

from upreid_ray.config.downstream import CompareConfig, DownstreamConfig, EvaluateConfig
from upreid_ray.config.errors import InputError, first_line
from upreid_ray.config.run import JobConfig, ScalingConfig
from upreid_ray.config.section import RANDOM, absolute_init
from upreid_ray.core.backbone import Description
from upreid_ray.data.shards.manifest import Manifest, read_manifest
from upreid_ray.data.shards.on_demand import labelled_shards
from upreid_ray.data.stream.labelled import check_labels
from upreid_ray.downstream.evaluate import evaluate
from upreid_ray.tracking import runs
from upreid_ray.train.finetune import IMAGES, finetune
from upreid_ray.train.folder import RunFolder
from upreid_ray.train.initialization import resolve
from upreid_ray.train.job import FREE_SETTINGS
from upreid_ray.train.resources import Resources, check_resources, living_nodes, num_runs

COMPARISON_FILE = "comparison.json"
PLOT_FILE = "comparison.png"
FROZEN = "frozen"

Scores = dict[str, float]


@dataclass(frozen=True)
class Row:
    """Initializations that are averaged, such as those of several pre-training seeds.

    Attributes:
        label: Name of the row.
        inits: Seed k starts from the k-th, and from the first again after the last.
    """

    label: str
    inits: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``INIT`` or ``LABEL=INIT[,INIT...]``.

        Raises:
            InputError: A part is empty.
        """
        label, equals, inits = text.partition("=")
        if not equals or re.search(r"[/:]", label):  # a path or URI may have = in it
            return cls(text, (absolute_init(text),))
        parts = inits.split(",")
        if not label or not all(parts):
            raise InputError(f"--init {text}: not of the form LABEL=INIT[,INIT...]")
        return cls(label, tuple(map(absolute_init, parts)))

    def __str__(self) -> str:
        return f"{self.label}={','.join(self.inits)}"


@dataclass(frozen=True)
class Trial:
    """One run of the comparison.

    Attributes:
        name: Of the run, and of the file with its scores.
        label: Of its row.
        column: `FROZEN`, or the split as text.
        run: Called with the MLflow run of the comparison; returns the scores.
    """

    name: str
    label: str
    column: str
    run: Callable[[str], Scores]


@dataclass(frozen=True)
class Spread:
    """A score over several runs.

    Attributes:
        mean: Of the runs.
        std: Sample standard deviation; None of a single run.
        values: Of each run.
    """

    mean: float
    std: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Summarize one value or more."""
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, tuple(values))

    def __str__(self) -> str:
        deviation = "" if self.std is None else f" +- {100 * self.std:.1f}"
        return f"{100 * self.mean:.1f}{deviation}"


@dataclass(frozen=True)
class CompareResult:
    """What a comparison finds.

    Attributes:
        run_id: Of the MLflow run.
        scores: By label, column (``frozen``, and each split) and name.
        failed: Why runs have no score, by label and column.
        result_dir: Folder of the comparison, with ``comparison.json`` and ``comparison.png``.
    """

    run_id: str
    scores: dict[str, dict[str, dict[str, Spread]]]
    failed: dict[str, dict[str, list[str]]]
    result_dir: str

    def cell(self, label: str, column: str, score: str) -> str:
        """Return a score in percent, with the number of runs that failed."""
        spreads = self.scores.get(label, {}).get(column)
        failed = len(self.failed.get(label, {}).get(column, []))
        texts = [str(spreads[score])] if spreads else []
        return " ".join([*texts, f"({failed} failed)"] if failed else texts)


def compare(config: CompareConfig, *, resume: bool = False) -> CompareResult:
    """Score initializations frozen and fine-tuned on the connected Ray cluster.

    As many runs are side by side as the cluster holds; on one machine without GPUs, give them
    ``scaling.threads_per_worker``, else each takes all cores. A run that fails is noted and
    ends no other; a comparison that is continued runs it again.

    Args:
        config: Of the comparison; a row of random initializations is added to it.
        resume: Continue the comparison that ``config.finetune.run.name`` names.

    Raises:
        InputError: Something that the user gave cannot be used; nothing was started.
        RuntimeError: Every run failed.
    """
    common = config.finetune
    folder = RunFolder.of(common.run, "compare")
    client = runs.connect()
    if not resume and folder.exists():
        raise InputError(
            f"--run.name {folder.name}: exists already; continue it with --resume {folder.name}"
        )
    check_resources(common.scaling)
    rows = [Row.parse(text) for text in config.init]
    for row in rows:
        if len(row.inits) > config.seeds:
            raise InputError(
                f"--seeds {config.seeds}: fewer than the initializations of row {row.label}"
            )
    rows, descriptions = resolve_rows(rows)
    config = config.override({"init": tuple(str(row) for row in rows)})
    run_id = folder.recorded_run(config, FREE_SETTINGS) if resume else None
    shards = labelled_shards(common.data, folder.storage)
    trials = plan(config, rows, descriptions, shards, folder)
    if run_id is None:
        run_id = runs.start_run(
            client, experiment=common.run.experiment, name=folder.name, config=config
        )
        folder.record(config, run_id)
    with runs.running(client, run_id):
        outcomes = dict(_finished(trials, folder))
        errors: dict[Trial, str] = {}
        for trial, outcome in _side_by_side(
            [trial for trial in trials if trial not in outcomes], common.scaling, run_id
        ):
            if isinstance(outcome, str):
                errors[trial] = outcome
            else:
                outcomes[trial] = outcome
                folder.write(f"{trial.name}.json", json.dumps(outcome))
        if not outcomes:
            raise RuntimeError(
                f"every run failed, the first with: {next(iter(errors.values()))}"
            )
        result = summarize(trials, outcomes, errors, run_id=run_id, result_dir=folder.uri)
        _publish(result, folder, client)
    return result


def resolve_rows(rows: Sequence[Row]) -> tuple[list[Row], dict[str, Description]]:
    """Find what every initialization is, so that nothing starts if one cannot be had.

    Args:
        rows: As the user gave them.

    Returns:
        The rows with versions for aliases and whole paths, behind a row of random ones; and a
        description of each initialization that is not random.

    Raises:
        InputError: One does not exist or is not a whole backbone, or two rows share a label.
    """
    if not any(set(row.inits) == {RANDOM} for row in rows):
        rows = [Row(RANDOM, (RANDOM,)), *rows]
    labels = [row.label for row in rows]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"--init {label}: names two rows; tell them apart with LABEL=INIT")
    descriptions: dict[str, Description] = {}
    found = {RANDOM: RANDOM}
    for init in dict.fromkeys(init for row in rows for init in row.inits if init != RANDOM):
        resolved = resolve(init)
        found[init] = resolved.uri
        descriptions[found[init]] = resolved.description
    return [
        Row(row.label, tuple(found[init] for init in row.inits)) for row in rows
    ], descriptions


def plan(
    config: CompareConfig,
    rows: Sequence[Row],
    descriptions: Mapping[str, Description],
    shards: str,
    folder: RunFolder,
) -> list[Trial]:
    """Return the runs of a comparison; those that are quickest come first.

    A random initialization has the architecture and the size of images of the first other one.
    A frozen backbone is scored once, a random one with each seed.

    Raises:
        InputError: The set cannot be scored, or a split has too few persons for a batch.
    """
    common = config.finetune
    manifest = read_manifest(shards)
    evaluation = common.evaluation.shards or shards
    check_labels(evaluation, read_manifest(evaluation))
    first = next(iter(descriptions.values()), None)

    def of_run(name: str, k: int, init: str) -> dict[str, Any]:
        settings = {
            "run.name": name,
            "run.storage_path": folder.uri,
            "init": init,
            "seed": common.seed + k,
        }
        if init != RANDOM or first is None:
            return settings
        return {
            **settings,
            "backbone": first.backbone,
            "data.height": common.data.height or first.height,
            "data.width": common.data.width or first.width,
        }

    splits = {
        split: _of_split(common, manifest, shards, split, config.min_steps)
        for split in config.splits
    }

    frozen: list[Trial] = []
    finetuned: list[Trial] = []
    for number, row in enumerate(rows):
        slug = re.sub(r"[^A-Za-z0-9]+", "-", row.label).strip("-")[-40:].lower()
        starts = [(k, row.inits[k % len(row.inits)]) for k in range(config.seeds)]
        # What is not random is the same with every seed.
        once = dict.fromkeys((k if init == RANDOM else 0, init) for k, init in starts)
        for place, (k, init) in enumerate(once):
            name = f"{number}-{slug}-{FROZEN}-{place}"
            scored = EvaluateConfig(
                backbone=common.backbone,
                data=common.data,
                scaling=common.scaling,
                run=JobConfig(experiment=common.run.experiment),
            ).override({**of_run(name, k, init), "data.root": evaluation})
            run = partial(_frozen_scores, scored)
            frozen.append(Trial(name, row.label, FROZEN, run))
        for k, init in starts:
            for split, of_split in splits.items():
                name = f"{number}-{slug}-{split:g}-{k}"
                trained = common.override(
                    {
                        **of_run(name, k, init),
                        **of_split,
                        "data.root": shards,
                        "evaluation.shards": evaluation,
                    }
                )
                run = partial(_finetuned_scores, trained)
                finetuned.append(Trial(name, row.label, f"{split:g}", run))
    return frozen + finetuned


def _of_split(
    common: DownstreamConfig, manifest: Manifest, shards: str, split: float, min_steps: int
) -> dict[str, Any]:
    """Return the settings of the runs of a split.

    Raises:
        InputError: It has too few persons for a batch.
    """
    settings: dict[str, Any] = {"subset.persons": split}
    images_of = IMAGES[type(common)]
    try:
        images = images_of(shards, manifest, common.override(settings), height=256, width=128)
    except InputError as error:
        raise InputError(f"--splits {split:g}: {error}") from None
    num_steps = images.steps_per_epoch * common.training.epochs
    factor = -(-min_steps // num_steps)
    if factor > 1:
        schedule = common.optimizer
        settings |= {
            "training.epochs": factor * common.training.epochs,
            "optimizer.warmup_epochs": factor * schedule.warmup_epochs,
            "optimizer.milestones": tuple(factor * epoch for epoch in schedule.milestones),
            "evaluation.every_epochs": factor * common.evaluation.every_epochs,
        }
    return settings


def _frozen_scores(config: EvaluateConfig, parent_run_id: str) -> Scores:
    return evaluate(config, parent_run_id=parent_run_id).scores


def _finetuned_scores(config: DownstreamConfig, parent_run_id: str) -> Scores:
    begun = RunFolder.of(config.run, "finetune").exists()
    return finetune(config, resume=begun, parent_run_id=parent_run_id).scores


def _run(trial: Trial, tracking_uri: str, parent_run_id: str) -> Scores | str:
    """Return the scores of a run, or why it failed."""
    os.environ["MLFLOW_TRACKING_URI"] = tracking_uri
    try:
        return trial.run(parent_run_id)
    except Exception as error:  # whatever it is, the other runs go on
        return first_line(error)


def _side_by_side(
    trials: Sequence[Trial], scaling: ScalingConfig, parent_run_id: str
) -> Iterator[tuple[Trial, Scores | str]]:
    """Run trials as Ray tasks, as many at a time as the cluster holds; yield their outcomes."""
    waiting = list(reversed(trials))
    running: dict[ray.ObjectRef, Trial] = {}
    run = ray.remote(num_cpus=0, max_retries=0)(_run)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("comparing", total=len(trials))
        while waiting or running:
            while waiting and len(running) < num_side_by_side(scaling, living_nodes()):
                trial = waiting.pop()
                running[run.remote(trial, runs.tracking_uri(), parent_run_id)] = trial
            (done,), _ = ray.wait(list(running))
            trial = running.pop(done)
            try:
                outcome = ray.get(done)
            except RayError as error:  # its process was lost
                outcome = first_line(error)
            progress.advance(bar)
            text = f"failed: {outcome}" if isinstance(outcome, str) else f"{outcome['mAP']:.3f}"
            progress.console.print(f"{trial.name}: {text}", markup=False)
            yield trial, outcome


def num_side_by_side(scaling: ScalingConfig, nodes: Sequence[Resources]) -> int:
    """Return how many runs are started at a time: at least one, for the cluster may grow."""
    return max(1, num_runs(scaling, nodes))


def _finished(trials: Sequence[Trial], folder: RunFolder) -> Iterator[tuple[Trial, Scores]]:
    """Yield the runs that have scores already."""
    for trial in trials:
        text = folder.read(f"{trial.name}.json")
        if text is not None:
            yield trial, json.loads(text)


def summarize(
    trials: Sequence[Trial],
    outcomes: Mapping[Trial, Scores],
    errors: Mapping[Trial, str],
    *,
    run_id: str,
    result_dir: str,
) -> CompareResult:
    """Put the scores of the runs into a table."""
    scores: dict[str, dict[str, dict[str, Spread]]] = {}
    failed: dict[str, dict[str, list[str]]] = {}
    for label, column in dict.fromkeys((trial.label, trial.column) for trial in trials):
        of_cell = [trial for trial in trials if (trial.label, trial.column) == (label, column)]
        found = [outcomes[trial] for trial in of_cell if trial in outcomes]
        why = [errors[trial] for trial in of_cell if trial in errors]
        if found:
            names = found[0]
            spreads = {name: Spread.of([each[name] for each in found]) for name in names}
            scores.setdefault(label, {})[column] = spreads
        if why:
            failed.setdefault(label, {})[column] = why
    return CompareResult(run_id, scores, failed, result_dir)


def _publish(result: CompareResult, folder: RunFolder, client: runs.Client) -> None:
    """Write and log the table and the plot."""
    content = json.dumps(
        {"scores": asdict(result)["scores"], "failed": result.failed}, indent=1
    )
    picture = plot(result, "mAP")
    for file, written in ((COMPARISON_FILE, content.encode()), (PLOT_FILE, picture)):
        folder.write(file, written)
        runs.log_file(client, result.run_id, file, written)
    means = {
        f"{column}/{re.sub(r'[^A-Za-z0-9_. -]', '-', label)}/mAP": spreads["mAP"].mean
        for label, columns in result.scores.items()
        for column, spreads in columns.items()
    }
    runs.log_metrics(client, result.run_id, means)


def plot(result: CompareResult, score: str) -> bytes:
    """Draw a score over the share of the persons, a line for each row; return a PNG."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (label, columns) in enumerate(result.scores.items()):
        color = f"C{number}"
        splits = sorted(
            (float(name), c[score]) for name, c in columns.items() if name != FROZEN
        )
        axes.errorbar(
            [100 * split for split, _ in splits],
            [100 * spread.mean for _, spread in splits],
            [100 * (spread.std or 0) for _, spread in splits],
            color=color,
            marker="o",
            capsize=3,
            label=label,
        )
        if FROZEN in columns:
            axes.axhline(100 * columns[FROZEN][score].mean, color=color, linestyle=":")
    axes.set(
        xscale="log",
        xlabel="persons with labels, %",
        ylabel=f"{score}, %",
        title="fine-tuned (mean and standard deviation); dotted: frozen",
    )
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()
