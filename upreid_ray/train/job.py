"""A job that trains: from its settings, through Ray Train, to a registered version."""

import json
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

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
from ray.train.torch import TorchTrainer

from upreid_ray.config.downstream import DownstreamConfig
from upreid_ray.config.errors import InputError, RunFailed, first_line
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.core.checkpoint import export_backbone, read_position
from upreid_ray.data.shards.manifest import read_manifest
from upreid_ray.data.stream.labelled import EVALUATION_SPLITS, check_labels
from upreid_ray.data.stream.persons import ClusterImages, PersonImages
from upreid_ray.data.stream.training import TrainingImages
from upreid_ray.tracking import registry, run_log, runs
from upreid_ray.train.folder import RESULT_FILE, STOP_FILE, RunFolder
from upreid_ray.train.resources import check_resources, worker_needs
from upreid_ray.train.stop_signal import ListeningTorchConfig
from upreid_ray.train.worker import DELIVERY_SECONDS, WorkerSettings

logger = logging.getLogger(__name__)

# What each worker does with its settings; what it returns, the driver raises.
WorkerFunction = Callable[[dict[str, Any]], RunFailed | InputError | None]

# What a resumed run may change: the weights that come out differ by rounding at most.
FREE_SETTINGS = ("run.", "scaling.", "checkpoint.", "training.log_every_steps")

# Lets the C library of Linux keep what a step frees for the next one. By default it gives large
# blocks back, and each page comes anew, zeroed: a sixth of the time of a step on two cores.
# One arena, since others than the first give back what is larger than 64 MiB all the same.
KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),  # bytes
}


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves.

    Attributes:
        run_id: Of the MLflow run.
        model_uri: Of the registered version; None for a trial, which registers nothing.
        checkpoint: Folder or URI of the last checkpoint, which holds the best backbone.
        scores: Of the best backbone, 0..1 by name; empty without an evaluation set.
        scores_untrained: Of the backbone before training.
        images_per_second: Over all workers, without the start and without evaluations.
        result_dir: Folder of the run, with its checkpoints.
    """

    run_id: str
    model_uri: str | None
    checkpoint: str
    scores: dict[str, float]
    scores_untrained: dict[str, float]
    images_per_second: float
    result_dir: str


@dataclass(frozen=True)
class TrainJob:
    """A run that is about to begin, or to go on.

    Attributes:
        config: Of the run.
        folder: Of the run.
        run_id: Of the MLflow run that goes on, None if a new one begins.
        client: Of the tracking server.
        parent_run_id: Of the run of which this one is a trial, None if it is none.
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
        """Check what can be checked before anything is made.

        Raises:
            InputError: The run exists, or does not; MLflow does not answer; or the machine
                cannot hold the workers.
        """
        run_id = folder.recorded_run(config, FREE_SETTINGS) if resume else None
        if not resume and folder.exists():
            name = folder.name
            raise InputError(
                f"--run.name {name}: exists already; continue it with --resume {name}"
            )
        check_resources(config.scaling)
        return cls(config, folder, run_id, runs.connect(), parent_run_id)

    def run(
        self,
        worker: WorkerFunction,
        make_settings: Callable[..., WorkerSettings[Any]],
        *,
        shards: str,
        images: TrainingImages | PersonImages | ClusterImages,
        model_name: str,
        lineage: Mapping[str, str],
        callbacks: Sequence[UserCallback] = (),
    ) -> TrainResult:
        """Train, and register the best backbone unless this is a trial.

        Args:
            worker: What each worker does; what it returns is raised here.
            make_settings: Called with the fields of `WorkerSettings`.
            shards: URI of the training shards.
            images: What is trained on.
            model_name: Under which the backbone is registered.
            lineage: Tags of the run and of the version, beside those of every job.
            callbacks: Called by Ray Train.

        Raises:
            InputError: The evaluation set cannot be scored, or images cannot be clustered.
            RunStopped: The run was asked to stop (SIGTERM, or a file named ``stop``).
            RunFailed: Gradients were not finite, no checkpoint is whole, or the storage failed.
            ray.train.TrainingFailedError: Training failed more often than allowed.
        """
        config, folder, client = self.config, self.folder, self.client
        done = folder.read(RESULT_FILE)
        if self.run_id is not None and done is not None:
            logger.info("run %s is done already", folder.name)
            deliver_metrics(folder, self.run_id)
            return TrainResult(**json.loads(done))
        folder.remove(STOP_FILE)
        folder.remove_torn_snapshot()
        evaluation = evaluation_shards(config.evaluation.shards, shards)
        run_id = self._begun()
        tags = {
            "run": folder.name,
            "shards": shards,
            "manifest": read_manifest(shards).digest(),
            "evaluation": read_manifest(evaluation).digest(EVALUATION_SPLITS)
            if evaluation
            else "none",
            **lineage,
        }
        runs.set_tags(client, run_id, tags)
        logger.info(
            "run %s: %d images, %d steps; if it ends early, continue it with --resume %s",
            folder.name,
            images.num_images,
            images.steps_per_epoch * config.training.epochs,
            folder.name,
        )
        settings = make_settings(
            config=config,
            shards=shards,
            evaluation_shards=evaluation,
            run_id=run_id,
            tracking_uri=runs.tracking_uri(),
            folder=folder,
        )
        with runs.running(client, run_id), _stopped_by_sigterm(folder):
            trained = self._train(worker, settings, callbacks)
            deliver_metrics(folder, run_id)
            with trained.as_directory() as directory:
                position = read_position(Path(directory))
                model_uri = None
                if self.parent_run_id is None:
                    model_uri = register(
                        client, Path(directory), run_id=run_id, name=model_name, tags=tags
                    )
        result = TrainResult(
            run_id=run_id,
            model_uri=model_uri,
            checkpoint=f"{folder.uri}/{Path(trained.path).name}",
            scores=position.best_scores,
            scores_untrained=position.scores_untrained,
            images_per_second=position.images_per_second,
            result_dir=folder.uri,
        )
        folder.write(RESULT_FILE, json.dumps(asdict(result), indent=1))
        return result

    def _begun(self) -> str:
        """Return the MLflow run that goes on, or begin and record one."""
        if self.run_id is not None:
            return self.run_id
        run_id = runs.start_run(
            self.client,
            experiment=self.config.run.experiment,
            name=self.folder.name,
            config=self.config,
            parent_run_id=self.parent_run_id,
        )
        self.folder.record(self.config, run_id)
        return run_id

    def _train(
        self,
        worker: WorkerFunction,
        settings: WorkerSettings[Any],
        callbacks: Sequence[UserCallback],
    ) -> Checkpoint:
        """Train to the end, or say in one line that the storage failed."""
        try:
            return _train(worker, settings, self.folder, callbacks)
        except TrainingFailedError as error:
            cause = first_cause(error)
            # What a trial raises, Ray Tune tries again.
            if self.parent_run_id is None and isinstance(cause, OSError):
                raise RunFailed(
                    f"run {self.folder.name}: {first_line(cause)}; what is saved is kept: mend "
                    f"that, and continue with --resume {self.folder.name}"
                ) from error
            raise


def deliver_metrics(folder: RunFolder, run_id: str) -> None:
    """Deliver what workers of this machine could not deliver to MLflow before they ended."""
    if folder.local_path().exists():
        log = run_log.RunLog(run_id, runs.tracking_uri(), folder.local_path())
        log.close(DELIVERY_SECONDS)


@contextmanager
def _stopped_by_sigterm(folder: RunFolder) -> Iterator[None]:
    """Let a first SIGTERM inside end the run with a checkpoint, and a second one at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return

    def stop(number: int, _: object) -> None:
        signal.signal(number, before)
        logger.warning("stopping at the next log entry; a second SIGTERM stops at once")
        folder.write(STOP_FILE, "")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def evaluation_shards(chosen: str | None, shards: str) -> str | None:
    """Return the shards with query and gallery images; None if there are none to take."""
    uri = chosen or shards
    manifest = read_manifest(uri)
    if chosen is None and not manifest.counts().keys() & EVALUATION_SPLITS:
        logger.info("%s has no query and gallery images: nothing is scored", uri)
        return None
    check_labels(uri, manifest)
    return uri


def _train(
    worker: WorkerFunction,
    settings: WorkerSettings[Any],
    folder: RunFolder,
    callbacks: Sequence[UserCallback],
) -> Checkpoint:
    """Train on Ray Train to the end; return the last checkpoint."""
    config = settings.config
    least, most = config.scaling.bounds
    if least < most:
        # Ray counts a node that was just lost, waits a minute for it, and then counts anew.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
    packed = cloudpickle.dumps((worker, settings))

    def run(_: dict[str, Any]) -> RunFailed | InputError | None:
        started, told = cloudpickle.loads(packed)
        return started({"settings": told})

    trainer = TorchTrainer(
        # Ray's controller holds this too: packed, it does not import what only workers need.
        run,
        train_loop_config={},
        torch_config=ListeningTorchConfig(),
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
            # Read when a process starts: the worker itself could not change it any more.
            worker_runtime_env={
                "env_vars": {} if config.scaling.use_gpu else KEEP_FREED_MEMORY
            },
        ),
    )
    result = trainer.fit()
    if result.return_value is not None:
        raise result.return_value
    return result.checkpoint


def first_cause(error: TrainingFailedError) -> BaseException:
    """Return what went wrong in the first worker that failed, or else in the controller."""
    if isinstance(error, ControllerError):
        return error.controller_failure
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    first = next(iter(failures), error)
    return getattr(first, "_base_exc", first)  # Ray keeps the traceback beside it


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
        client: Of the tracking server.
        checkpoint: Folder of the checkpoint.
        run_id: Of the MLflow run that made it.
        name: Under which it is registered.
        tags: Its lineage; scores, step and configuration are added.
    """
    position = read_position(checkpoint)
    with tempfile.TemporaryDirectory() as exported:
        export_backbone(checkpoint, Path(exported))
        return registry.register_backbone(
            client,
            run_id=run_id,
            name=name,
            folder=Path(exported),
            tags={
                **runs.environment(),
                **tags,
                **{f"score.{name}": str(score) for name, score in position.best_scores.items()},
                "step": str(position.best_step),
                "config": json.dumps(position.config),
            },
        )
