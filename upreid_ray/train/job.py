"""A run of Ray Train on the driver: begin, train, register.

`pretrain.fit` and `finetune.finetune` say what to train (`Task`); all else is the same.
"""

import json
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Self, TypeVar

import ray
from ray import cloudpickle
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    ControllerError,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    TrainingFailedError,
    UserCallback,
    WorkerGroupError,
)
from ray.train import ScalingConfig as RayScalingConfig
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from upreid_ray.config.downstream import DownstreamConfig
from upreid_ray.config.errors import InputError, RunFailed, first_line
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.core.memory import KEEP_FREED_MEMORY
from upreid_ray.core.outcome import read_outcome
from upreid_ray.data.shards.manifest import EVALUATION_SPLITS
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.data.stream.persons import ClusterImages, PersonImages
from upreid_ray.data.stream.training import TrainingImages
from upreid_ray.tracking import connection, registry, run_log, runs
from upreid_ray.train.display import training_line
from upreid_ray.train.folder import RESULT_FILE, STOP_FILE, RunFolder
from upreid_ray.train.process_group import ProcessGroupConfig
from upreid_ray.train.resources import check_resources, living_nodes, worker_needs
from upreid_ray.train.worker_settings import DELIVERY_SECONDS, WorkerSettings

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

# Settings that may change when a run is resumed: they change its weights by rounding at most.
FREE_SETTINGS = (
    *("run.", "scaling.", "checkpoint."),
    *("training.log_every_steps", "data.max_undecodable"),
)


@dataclass(frozen=True)
class TrainResult:
    """Result of a run.

    Attributes:
        run_id: ID of the MLflow run.
        model_uri: URI of the registered version; None for a trial, which registers nothing.
        checkpoint: Folder or URI of the last checkpoint, which holds the best backbone.
        scores: Scores of the best backbone, 0..1 by name; empty without an evaluation set.
        scores_untrained: Scores of the backbone before training.
        images_per_second: Speed of all workers together, without start-up and evaluations.
        result_dir: Folder of the run, with its checkpoints.
        num_queries_without_match: Query images that the scores leave out, because the gallery
            does not show their person under another camera.
    """

    run_id: str
    model_uri: str | None
    checkpoint: str
    scores: dict[str, float]
    scores_untrained: dict[str, float]
    images_per_second: float
    result_dir: str
    num_queries_without_match: int = 0  # Results of older runs do not have it.


@dataclass(frozen=True)
class Task:
    """What a run trains, and under which name it is registered.

    Attributes:
        worker: Function that every worker calls with its settings, ``module:function``. It is
            imported in the workers only, since it imports torch.
        shards: Training shards.
        images: The training images in these shards.
        model_name: Name of the registered model.
        arguments: Further arguments of the function, by name.
        lineage: Tags of the run and of the version, in addition to those of every run.
    """

    worker: str
    shards: ShardSet
    images: TrainingImages | PersonImages | ClusterImages
    model_name: str
    arguments: Mapping[str, object] = field(default_factory=dict)
    lineage: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainJob:
    """A run that is about to begin or to continue.

    Attributes:
        config: Settings of the run.
        folder: Folder of the run.
        run_id: ID of the MLflow run to continue; None begins a new one.
        client: Client of the tracking server.
        parent_run_id: ID of the MLflow run of which this run is a trial; None if it is none.
    """

    config: PretrainConfig | DownstreamConfig
    folder: RunFolder
    run_id: str | None
    client: runs.Client
    parent_run_id: str | None

    @classmethod
    def prepare(
        cls,
        config: PretrainConfig | DownstreamConfig,
        folder: RunFolder,
        *,
        resume: bool,
        parent_run_id: str | None,
    ) -> Self:
        """Check everything that can be checked before anything is written.

        Raises:
            InputError: A new run exists already, a run to resume does not exist, MLflow does
                not answer, or the machine cannot hold the workers.
        """
        run_id = folder.recorded_run(config, FREE_SETTINGS) if resume else None
        if not resume:
            folder.require_new()
        check_resources(config.scaling)
        return cls(config, folder, run_id, connection.connect(), parent_run_id)

    def run(self, task: Task, callbacks: Sequence[UserCallback] = ()) -> TrainResult:
        """Train, and register the best backbone unless this run is a trial.

        Args:
            task: What to train.
            callbacks: Callbacks of Ray Train.

        Raises:
            InputError: The evaluation set cannot be scored, or images cannot be clustered.
            RunStopped: The run was asked to stop (SIGTERM, Ctrl-C, or a file named ``stop``).
            RunFailed: Gradients were not finite, no checkpoint is whole, or the storage failed.
            ray.train.TrainingFailedError: Training failed more often than allowed.
        """
        folder = self.folder
        done = folder.read(RESULT_FILE)
        if self.run_id is not None and done is not None:
            logger.info("run %s is done already", folder.name)
            deliver_metrics(folder, self.run_id)
            return TrainResult(**json.loads(done))
        folder.remove(STOP_FILE)
        folder.remove_torn_snapshot()
        evaluation = evaluation_shards(self.config.evaluation.shards, task.shards)
        tags = self._lineage(task, evaluation)
        run_id = self._begin(task, tags)
        self._log_datasets(task.shards, evaluation, run_id)
        settings = WorkerSettings(
            config=self.config,
            shards=task.shards,
            evaluation_shards=evaluation,
            run_id=run_id,
            tracking_uri=connection.tracking_uri(),
            folder=folder,
            delivering_node=_own_node() if len(living_nodes()) == 1 else None,
        )
        least, most = self.config.scaling.bounds
        number = f"{most}" if least == most else f"{least} to {most}"
        starting = f"starting {number} worker{'s' if most > 1 else ''}"
        with runs.running(self.client, run_id), _stopped_by_signals(folder):
            with _delivering_metrics(settings), training_line(starting):
                checkpoint = self._train(task, settings, callbacks)
            result = self._register(checkpoint, run_id, task.model_name, tags)
        folder.write(RESULT_FILE, json.dumps(asdict(result), indent=1))
        return result

    def _lineage(self, task: Task, evaluation: ShardSet | None) -> dict[str, str]:
        """Return the tags that say what the backbone was made from."""
        return {
            "run": self.folder.name,
            "shards": task.shards.uri,
            "manifest": task.shards.manifest.digest(),
            "evaluation": evaluation.manifest.digest(EVALUATION_SPLITS)
            if evaluation
            else "none",
            **task.lineage,
        }

    def _log_datasets(self, shards: ShardSet, evaluation: ShardSet | None, run_id: str) -> None:
        """Log the sets of images as inputs of the MLflow run."""
        inputs = [(runs.TRAINING_DATASET, shards, shards.manifest.digest())]
        if evaluation is not None:
            digest = evaluation.manifest.digest(EVALUATION_SPLITS)
            inputs.append((runs.EVALUATION_DATASET, evaluation, digest))
        for name, each, digest in inputs:
            runs.log_dataset(self.client, run_id, name, uri=each.uri, digest=digest)

    def _begin(self, task: Task, tags: Mapping[str, str]) -> str:
        """Begin and record an MLflow run, or continue the recorded one; return its ID."""
        config, name = self.config, self.folder.name
        run_id = self.run_id
        if run_id is None:
            with self.folder.begin():
                run_id = runs.start_run(
                    self.client,
                    experiment=config.run.experiment,
                    name=name,
                    config=config,
                    parent_run_id=self.parent_run_id,
                )
                self.folder.record(config, run_id, task.lineage)
        runs.set_tags(self.client, run_id, tags)
        logger.info(
            "run %s: %d images, %d steps; if it ends early, continue it with --resume %s",
            name,
            task.images.num_images,
            task.images.steps_per_epoch * config.training.epochs,
            name,
        )
        return run_id

    def _train(
        self,
        task: Task,
        settings: WorkerSettings[Any],
        callbacks: Sequence[UserCallback],
    ) -> Checkpoint:
        """Train to the end; return the last checkpoint.

        Raises:
            RunFailed: The storage failed.
        """
        try:
            return _run_workers(task, settings, callbacks)
        except TrainingFailedError as error:
            cause = first_cause(error)
            # Ray Tune retries a trial only if it raises Ray Train's error.
            if self.parent_run_id is None and isinstance(cause, OSError):
                raise RunFailed(
                    f"run {self.folder.name}: {first_line(cause)}; its checkpoints are kept: "
                    f"fix the storage, then continue with --resume {self.folder.name}"
                ) from error
            raise

    def _register(
        self, checkpoint: Checkpoint, run_id: str, model_name: str, tags: Mapping[str, str]
    ) -> TrainResult:
        """Register the best backbone of the last checkpoint, unless this run is a trial."""
        with checkpoint.as_directory() as directory:
            outcome = read_outcome(Path(directory))
            model_uri = None
            if self.parent_run_id is None:
                model_uri = register(
                    self.client, Path(directory), run_id=run_id, name=model_name, tags=tags
                )
        return TrainResult(
            run_id=run_id,
            model_uri=model_uri,
            checkpoint=f"{self.folder.uri}/{Path(checkpoint.path).name}",
            scores=outcome.best_scores,
            scores_untrained=outcome.scores_untrained,
            images_per_second=outcome.images_per_second,
            result_dir=self.folder.uri,
            num_queries_without_match=outcome.num_queries_without_match,
        )


def _own_node() -> str:
    """Return the ID of the node on which this process runs."""
    node: str = ray.get_runtime_context().get_node_id()
    return node


@contextmanager
def _delivering_metrics(settings: WorkerSettings[Any]) -> Iterator[None]:
    """Deliver the metrics of workers on this node to MLflow as they come, others at the end."""
    if settings.delivering_node is None:
        yield
        deliver_metrics(settings.folder, settings.run_id)
        return
    log = run_log.RunLog(settings.run_id, settings.tracking_uri, settings.folder.local_path())
    try:
        yield
    finally:
        log.close(DELIVERY_SECONDS)


def deliver_metrics(folder: RunFolder, run_id: str) -> None:
    """Deliver the metrics that workers on this machine could not deliver to MLflow."""
    if folder.local_path().exists():
        log = run_log.RunLog(run_id, connection.tracking_uri(), folder.local_path())
        log.close(DELIVERY_SECONDS)


@contextmanager
def _stopped_by_signals(folder: RunFolder) -> Iterator[None]:
    """Stop the run with a checkpoint at SIGTERM or Ctrl-C; a second signal ends the job."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread only.
        return

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(*_: object) -> None:
        restore()
        logger.warning("stopping at the next log entry; a second signal stops at once")
        folder.write(STOP_FILE, "")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        restore()


def _call_in_thread(function: Callable[[], Value]) -> Value:
    """Return what a function returns that is called in another thread.

    In the main thread, Ray Train would answer Ctrl-C itself: without a checkpoint, and with
    exit status 0. Nobody waits for the thread if a second signal ends the job.
    """
    outcome: Future[Value] = Future()

    def call() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # all of them are raised again in the main thread
            outcome.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return outcome.result()


def evaluation_shards(chosen: str | None, shards: ShardSet) -> ShardSet | None:
    """Return the shards with query and gallery images; None if there are none.

    Args:
        chosen: URI that the user gave; None takes the training shards if they have any.
        shards: Training shards.

    Raises:
        InputError: The set cannot be read or scored.
    """
    evaluation = ShardSet.open(chosen) if chosen else shards
    if chosen is None and not evaluation.has_evaluation_images():
        logger.info("%s has no query and gallery images: nothing is scored", shards.uri)
        return None
    evaluation.check_labels()
    return evaluation


def _run_workers(
    task: Task, settings: WorkerSettings[Any], callbacks: Sequence[UserCallback]
) -> Checkpoint:
    """Train with Ray Train to the end; return the last checkpoint."""
    config, folder = settings.config, settings.folder
    least, most = config.scaling.bounds
    if least < most:
        # Ray counts a node that was just lost, waits a minute for it, and then counts anew.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
    # Ray's controller unpickles the function too, and must not import what only workers need.
    packed = cloudpickle.dumps((settings, dict(task.arguments)))
    name = task.worker

    def call_worker() -> RunFailed | InputError | None:
        settings, arguments = cloudpickle.loads(packed)
        failure: RunFailed | InputError | None = resolve_name(name)(settings, **arguments)
        return failure

    trainer = DataParallelTrainer(
        call_worker,
        backend_config=ProcessGroupConfig(use_gpu=config.scaling.use_gpu),
        scaling_config=RayScalingConfig(
            num_workers=least if least == most else (least, most),
            elastic_resize_monitor_interval_s=config.scaling.resize_seconds,
            use_gpu=config.scaling.use_gpu,
            resources_per_worker=worker_needs(config.scaling),
        ),
        run_config=RunConfig(
            name=folder.name,
            storage_path=folder.storage,
            failure_config=FailureConfig(max_failures=config.run.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.num_to_keep),
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=list(callbacks),
            # A process reads these when it starts, so the worker itself cannot set them.
            worker_runtime_env={
                "env_vars": {} if config.scaling.use_gpu else KEEP_FREED_MEMORY
            },
        ),
    )
    with tell_ray_train_its_ray():
        result = _call_in_thread(trainer.fit)
    if result.return_value is not None:
        raise result.return_value
    return result.checkpoint


@contextmanager
def tell_ray_train_its_ray() -> Iterator[None]:
    """Tell the actors of Ray Train which Ray they belong to.

    One of them asks whether the run is alive, and removes its workers if it is not. Without an
    address it asks any Ray on this machine, which does not know the run.
    """
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = before


def first_cause(error: TrainingFailedError) -> BaseException:
    """Return the error of the first worker that failed, or that of the controller."""
    if isinstance(error, ControllerError):
        return error.controller_failure
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    return next(iter(failures), error)


def register(
    client: runs.Client,
    checkpoint: Path,
    *,
    run_id: str,
    name: str,
    tags: Mapping[str, str],
) -> str:
    """Register the best backbone of a checkpoint; return the URI of the version.

    Args:
        client: Client of the tracking server.
        checkpoint: Folder of the checkpoint.
        run_id: ID of the MLflow run that made it.
        name: Name of the registered model.
        tags: Lineage of the version; scores and step are added.

    Raises:
        RunFailed: The checkpoint has no best backbone that is finite.
    """
    # Imported late: torch, which takes seconds, is needed here at the end only.
    from upreid_ray.core.checkpoint import export_backbone, read_position  # noqa: PLC0415
    from upreid_ray.tracking.model import write_model  # noqa: PLC0415
    from upreid_ray.tracking.model_card import model_card  # noqa: PLC0415

    position = read_position(checkpoint)
    scores = {
        f"{registry.SCORE}{score}": str(value) for score, value in position.best_scores.items()
    }
    tags = {
        **runs.environment(),
        **tags,
        **scores,
        "num_queries_without_match": str(position.num_queries_without_match),
        "step": str(position.best_step),
    }
    with tempfile.TemporaryDirectory() as temporary:
        exported, model = Path(temporary, "exported"), Path(temporary, "model")
        exported.mkdir()
        try:
            export_backbone(checkpoint, exported)
        except InputError as error:
            raise RunFailed(f"nothing is registered: {error}") from error
        write_model(exported, model, config=position.config)
        return registry.register_backbone(
            client,
            run_id=run_id,
            name=name,
            folder=model,
            tags=tags,
            description=model_card(name, position, tags),
        )
