"""Pre-training on Ray Train: from the settings to a registered backbone.

This module runs on the driver; what the workers run is in `pretrain_worker`.
"""

import logging
from collections.abc import Sequence
from functools import partial

from ray.train import UserCallback

from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.core.backbone import check_settings
from upreid_ray.core.encoder import Encoder
from upreid_ray.data.shards.requested import training_shards
from upreid_ray.data.stream.training import TrainingImages
from upreid_ray.train.continuation import find_start
from upreid_ray.train.folder import RunFolder
from upreid_ray.train.job import Task, TrainJob, TrainResult
from upreid_ray.train.pretrain_worker import pretrain_worker

logger = logging.getLogger(__name__)

CONTINUED_FROM = "continued_from"  # tag of runs and versions


def fit(
    config: PretrainConfig,
    *,
    resume: bool = False,
    parent_run_id: str | None = None,
    callbacks: Sequence[UserCallback] = (),
) -> TrainResult:
    """Pre-train, score and register a backbone on the connected Ray cluster.

    Args:
        config: Settings of the run.
        resume: Continue the run called ``config.run.name``.
        parent_run_id: ID of the MLflow run of which this run is a trial; a trial registers
            nothing.
        callbacks: Callbacks of Ray Train.

    Raises:
        InputError: A setting cannot be used; nothing was started.
        ray.train.TrainingFailedError: Training failed more often than allowed.
    """
    check_settings(config)
    job = TrainJob.prepare(
        config,
        RunFolder.of(config.run, config.model.backbone),
        resume=resume,
        parent_run_id=parent_run_id,
    )
    if config.model.pretrained is not None and not resume:
        Encoder(config)  # Refuse unusable weights before any worker starts.
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
        begun = job.folder.recorded_lineage() if resume else {}
        start = begun.get(CONTINUED_FROM) or find_start(config)
        lineage[CONTINUED_FROM] = start
    worker = partial(pretrain_worker, start=start)
    task = Task(worker, shards, images, config.model_name, lineage)
    return job.run(task, callbacks)
