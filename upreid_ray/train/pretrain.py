"""Pre-training on Ray Train: from a configuration to a registered backbone."""

import logging
from collections.abc import Sequence

from ray.train import UserCallback

from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.core.encoder import Encoder
from upreid_ray.data.shards.manifest import read_manifest
from upreid_ray.data.shards.on_demand import synthetic_shards
from upreid_ray.data.stream.training import TrainingImages
from upreid_ray.train.folder import RunFolder
from upreid_ray.train.job import TrainJob, TrainResult
from upreid_ray.train.pretrain_worker import pretrain_worker
from upreid_ray.train.worker import WorkerSettings

logger = logging.getLogger(__name__)


def fit(
    config: PretrainConfig,
    *,
    resume: bool = False,
    parent_run_id: str | None = None,
    callbacks: Sequence[UserCallback] = (),
) -> TrainResult:
    """Pre-train, score and register a backbone on the connected Ray cluster.

    Args:
        config: Of the run.
        resume: Continue the run that ``config.run.name`` names.
        parent_run_id: MLflow run of which this one is a trial; a trial registers nothing.
        callbacks: Called by Ray Train.

    Raises:
        InputError: Something that the user gave cannot be used; nothing was started.
        ray.train.TrainingFailedError: Training failed more often than allowed.
    """
    job = TrainJob.prepare(
        config,
        RunFolder.of(config.run, config.model.backbone),
        resume=resume,
        parent_run_id=parent_run_id,
    )
    if config.model.pretrained is not None and not resume:
        Encoder(config.model)  # here a wrong file costs seconds
    shards = config.data.shards or synthetic_shards(config.data.synthetic, job.folder.storage)
    images = TrainingImages(shards, read_manifest(shards), config)
    if config.model.queue_size > images.num_images / 2:
        logger.warning(
            "--model.queue_size %d: most of the %d images are in the queue, so that an image "
            "meets its own past keys as negatives; take a shorter one",
            config.model.queue_size,
            images.num_images,
        )
    return job.run(
        pretrain_worker,
        WorkerSettings,
        shards=shards,
        images=images,
        model_name=config.model_name,
        lineage={},
        callbacks=callbacks,
    )
