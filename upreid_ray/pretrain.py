"""Pre-training on Ray Train: from a configuration to a registered backbone."""

import hashlib
import json
import logging
import os
import secrets
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import ray
from pyarrow import fs
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.torch import TorchTrainer
from rich.console import Console
from rich.progress import Progress

from upreid_ray import tracking
from upreid_ray.config import InputError, PretrainConfig
from upreid_ray.core.checkpoint import export_backbone, read_position
from upreid_ray.data.layouts import synthetic_records
from upreid_ray.data.shards import open_folder, read_manifest, write_shards
from upreid_ray.data.stream import EVALUATION_SPLITS, TrainingImages
from upreid_ray.pretrain_worker import WorkerSettings, train_worker

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
# What a resumed run may change: none of it changes the weights that come out.
FREE_SETTINGS = ("run.", "scaling.", "checkpoint.", "training.log_every_steps")


@dataclass(frozen=True)
class PretrainResult:
    """What a run leaves.

    Attributes:
        run_id: Of the MLflow run.
        model_uri: Of the registered version.
        scores: Of the registered backbone, 0..1 by name; empty without an evaluation set.
        scores_untrained: Of the backbone before training.
        images_per_second: Over all workers, without the start and without evaluations.
        result_dir: Folder of the run, with its checkpoints.
    """

    run_id: str
    model_uri: str
    scores: dict[str, float]
    scores_untrained: dict[str, float]
    images_per_second: float
    result_dir: str


def fit(config: PretrainConfig, *, resume: bool = False) -> PretrainResult:
    """Pre-train, score and register a backbone on the connected Ray cluster.

    Args:
        config: Of the run.
        resume: Continue the run that ``config.run.name`` names.

    Raises:
        InputError: Something that the user gave cannot be used; nothing was started.
        ray.train.TrainingFailedError: Training failed more often than allowed.
    """
    folder = RunFolder.of(config)
    run_id = folder.recorded_run(config) if resume else None
    if not resume and folder.exists():
        msg = (
            f"--run.name {folder.name}: exists already; continue it with --resume {folder.name}"
        )
        raise InputError(msg)
    _check_resources(config)
    client = tracking.connect()
    shards = config.data.shards or _synthetic_shards(config, folder.storage)
    manifest = read_manifest(shards)
    images = TrainingImages(shards, manifest, config)
    evaluation = _evaluation_shards(config, shards)

    if run_id is None:
        run_id = tracking.start_run(
            client, experiment=config.run.experiment, name=folder.name, config=config
        )
        folder.record(config, run_id)
    lineage = {
        "run": folder.name,
        "shards": shards,
        "manifest": manifest.digest(),
        "evaluation": read_manifest(evaluation).digest(EVALUATION_SPLITS)
        if evaluation
        else "none",
    }
    tracking.set_tags(client, run_id, lineage)
    logger.info(
        "run %s: %d images, %d steps; if it ends early, continue it with --resume %s",
        folder.name,
        images.num_images,
        images.steps_per_epoch * config.training.epochs,
        folder.name,
    )
    settings = WorkerSettings(
        config, shards, evaluation, run_id, tracking.tracking_uri(), folder.local_path()
    )
    with tracking.running(client, run_id):
        trained = _train(settings, folder)
        return _register(trained, settings, folder, lineage)


@dataclass(frozen=True)
class RunFolder:
    """Where the state of a run lives: ``storage/name``, with Ray Train's checkpoints.

    Attributes:
        storage: Folder (absolute) or URI of all runs.
        name: Of the run.
    """

    storage: str
    name: str

    @classmethod
    def of(cls, config: PretrainConfig) -> "RunFolder":
        """Return the folder that ``config.run`` names; the name is new if it names none."""
        storage = config.run.storage_path or os.environ.get("UPREID_RAY_STORAGE") or "runs"
        if "://" not in storage:
            storage = str(Path(storage).absolute())
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        return cls(storage, config.run.name or f"{config.model.backbone}-{stamp}")

    @property
    def uri(self) -> str:
        """Folder or URI of this run."""
        return f"{self.storage}/{self.name}"

    def exists(self) -> bool:
        """Tell whether a run of this name was started."""
        filesystem, path = open_folder(self.uri)
        return bool(filesystem.get_file_info(f"{path}/{RUN_FILE}").type == fs.FileType.File)

    def record(self, config: PretrainConfig, run_id: str) -> None:
        """Note the settings and the MLflow run, which `recorded_run` finds again."""
        filesystem, path = open_folder(self.uri)
        record = {"run_id": run_id, "config": config.model_dump(mode="json")}
        try:
            filesystem.create_dir(path, recursive=True)
            with filesystem.open_output_stream(f"{path}/{RUN_FILE}") as stream:
                stream.write(json.dumps(record, indent=1).encode())
        except OSError as error:
            msg = f"--run.storage_path {self.storage}: cannot be written ({error})"
            raise InputError(msg) from error

    def recorded_run(self, config: PretrainConfig) -> str:
        """Return the id of the MLflow run that was started here with the same settings.

        Raises:
            InputError: There is none, or a setting differs that would change the weights.
        """
        if not self.exists():
            msg = f"--resume {self.name}: no such run in {self.storage}"
            raise InputError(msg)
        filesystem, path = open_folder(self.uri)
        with filesystem.open_input_stream(f"{path}/{RUN_FILE}") as stream:
            record = json.loads(stream.read())
        before = dict(PretrainConfig.parse(record["config"]).flatten())
        for setting, value in config.flatten():
            if not setting.startswith(FREE_SETTINGS) and value != before[setting]:
                msg = f"--{setting} {value}: run {self.name} was started with {before[setting]}"
                raise InputError(msg)
        run_id: str = record["run_id"]
        return run_id

    def local_path(self) -> Path:
        """Return a local folder for what is not in the storage yet."""
        if "://" in self.storage:
            return Path(tempfile.gettempdir(), "upreid_ray", self.name)
        return Path(self.uri)


def _check_resources(config: PretrainConfig) -> None:
    """Refuse what the machine cannot hold; a cluster may grow, so there Ray waits."""
    scaling = config.scaling
    if len(ray.nodes()) > 1 or "RAY_ADDRESS" in os.environ:
        return
    has = ray.cluster_resources()
    if scaling.use_gpu and has.get("GPU", 0) < scaling.num_workers:
        msg = (
            f"--scaling.num_workers {scaling.num_workers}: this machine has "
            f"{has.get('GPU', 0):g} GPUs; --scaling.use_gpu false trains on CPUs"
        )
        raise InputError(msg)
    # Less than a whole CPU left would keep the tasks that decode images waiting for ever.
    needed = scaling.num_workers * scaling.cpus_per_worker + 1
    if has.get("CPU", 0) < needed:
        msg = (
            f"--scaling.cpus_per_worker {scaling.cpus_per_worker:g}: {scaling.num_workers} "
            f"workers and one task that decodes need {needed:g} CPUs, this machine has "
            f"{has.get('CPU', 0):g}"
        )
        raise InputError(msg)


def _synthetic_shards(config: PretrainConfig, storage: str) -> str:
    """Draw the synthetic set unless it is there; return its folder."""
    synthetic = config.data.synthetic
    digest = hashlib.sha256(synthetic.model_dump_json().encode()).hexdigest()[:12]
    uri = f"{storage}/data/synthetic-{digest}"
    records = synthetic_records(synthetic)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("drawing people", total=len(records))
        write_shards(
            records,
            uri,
            source=f"synthetic {synthetic.model_dump_json()}",
            seed=synthetic.seed,
            max_height=None,
            on_progress=lambda done: progress.advance(task, done),
        )
    return uri


def _evaluation_shards(config: PretrainConfig, shards: str) -> str | None:
    """Return the shards with query and gallery images; None if there are none to take."""
    uri = config.evaluation.shards or shards
    if set(EVALUATION_SPLITS) <= read_manifest(uri).counts().keys():
        return uri
    if config.evaluation.shards is not None:
        msg = f"--evaluation.shards {uri}: has no query and gallery images"
        raise InputError(msg)
    logger.info("%s has no query and gallery images: nothing is scored", uri)
    return None


def _train(settings: WorkerSettings, folder: RunFolder) -> Checkpoint:
    """Train on Ray Train; return the last checkpoint."""
    config = settings.config
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"settings": settings},
        scaling_config=ScalingConfig(
            num_workers=config.scaling.num_workers,
            use_gpu=config.scaling.use_gpu,
            resources_per_worker={"CPU": config.scaling.cpus_per_worker}
            | ({"GPU": 1} if config.scaling.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=folder.name,
            storage_path=folder.storage,
            failure_config=FailureConfig(max_failures=config.run.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.num_to_keep),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    return trainer.fit().checkpoint


def _register(
    trained: Checkpoint, settings: WorkerSettings, folder: RunFolder, lineage: dict[str, str]
) -> PretrainResult:
    """Register the best backbone of the last checkpoint."""
    config = settings.config
    with trained.as_directory() as directory, tempfile.TemporaryDirectory() as exported:
        position = read_position(Path(directory))
        export_backbone(Path(directory), Path(exported), config)
        scores = {f"score.{name}": str(value) for name, value in position.best_scores.items()}
        model_uri = tracking.register_backbone(
            tracking.connect(),
            run_id=settings.run_id,
            name=config.model_name,
            folder=Path(exported),
            tags={
                **tracking.environment(),
                **lineage,
                **scores,
                "step": str(position.best_step),
                "config": config.model_dump_json(),
            },
        )
    return PretrainResult(
        run_id=settings.run_id,
        model_uri=model_uri,
        scores=position.best_scores,
        scores_untrained=position.scores_untrained,
        images_per_second=position.images_per_second,
        result_dir=folder.uri,
    )
