"""Pre-training on Ray Train: from the settings to a registered backbone.

This module runs on the driver; what the workers run is in `pretrain_worker`.
"""

import logging
from collections.abc import Sequence

from ray.train import UserCallback

from upreid_ray.config.presets import has_preset_shapes
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.data.shards.requested import training_shards
from upreid_ray.data.stream.training import TrainingImages
from upreid_ray.train.folder import RunFolder
from upreid_ray.train.job import Task, TrainJob, TrainResult

logger = logging.getLogger(__name__)

WORKER = "upreid_ray.train.pretrain_worker:pretrain_worker"
CONTINUED_FROM = "continued_from"  # tag of runs and versions


def check_shapes(config: PretrainConfig) -> None:
    """Check that backbone, images and patches fit each other.

    Raises:
        InputError: They do not.
    """
    if not has_preset_shapes(config):
        # Imported late: torch, which takes seconds, is needed for nothing else here.
        from upreid_ray.core.backbone import check_settings  # noqa: PLC0415

        check_settings(config)


def fit(
    config: PretrainConfig,
    *,
    resume: bool = False,
    parent_run_id: str | None = None,
    callbacks: Sequence[UserCallback] = (),
) -> TrainResult:
    """Pre-train, score and register a backbone on the connected Ray cluster.

    A run with the ID of a parent MLflow run is a trial, which registers nothing. The callbacks
    are those of Ray Train.

    Raises:
        InputError: A setting cannot be used; nothing was started.
        ray.train.TrainingFailedError: Training failed more often than allowed.
    """
    check_shapes(config)
    job = TrainJob.prepare(
        config,
        RunFolder.of(config.run, config.model.backbone),
        resume=resume,
        parent_run_id=parent_run_id,
    )
    if config.model.pretrained is not None and not resume:
        # Imported late, as torch is above.
        from upreid_ray.core.encoder import read_pretrained  # noqa: PLC0415

        # Refuse unusable weights before any worker starts.
        found = read_pretrained(config)
        logger.info("--model.pretrained %s: %s", config.model.pretrained, found)
    shards = training_shards(config.data, job.folder.storage)
    images = TrainingImages(shards, config)
    if config.model.queue_size > images.num_images / 2:
        logger.warning(
            "--model.queue_size %d: the queue holds most of the %d images, so that an image's "
            "own earlier keys are among its negatives; choose a shorter queue",
            config.model.queue_size,
            images.num_images,
        )
    start = None
    # Under the name of the tag that a fine-tuned version has.
    lineage = {} if config.model.pretrained is None else {"init": config.model.pretrained}
    if config.model.continue_from is not None:
        # Imported late, as above.
        from upreid_ray.train.continuation import find_start  # noqa: PLC0415

        begun = job.folder.recorded_lineage() if resume else {}
        start = begun.get(CONTINUED_FROM) or find_start(config)
        lineage[CONTINUED_FROM] = start
    task = Task(WORKER, shards, images, config.model_name, {"start": start}, lineage)
    return job.run(task, callbacks)
