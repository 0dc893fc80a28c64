"""Supervised fine-tuning on Ray Train: from an initialization to a registered, scored model."""

from functools import partial

from upreid_ray import tracking
from upreid_ray.config import FinetuneConfig
from upreid_ray.data.persons import PersonImages
from upreid_ray.data.shards import read_manifest
from upreid_ray.data.sources import labelled_shards, synthetic_shards
from upreid_ray.finetune_worker import FinetuneWorkerSettings, finetune_worker
from upreid_ray.initialization import for_images, random, resolve
from upreid_ray.run_folder import RunFolder
from upreid_ray.train_job import TrainJob, TrainResult


def finetune(
    config: FinetuneConfig, *, resume: bool = False, parent_run_id: str | None = None
) -> TrainResult:
    """Fine-tune, score and register a backbone on the connected Ray cluster.

    The registered version names the one that it began with (tag ``init``), and that one lists
    its descendants (tags ``descendant.NAME.VERSION``).

    Args:
        config: Of the run.
        resume: Continue the run that ``config.run.name`` names.
        parent_run_id: MLflow run of which this one is a trial; a trial registers nothing.

    Raises:
        InputError: Something that the user gave cannot be used; nothing was started.
        ray.train.TrainingFailedError: Training failed more often than allowed.
    """
    init = (
        random(config.backbone, seed=config.seed)
        if config.init == "random"
        else resolve(config.init)
    )
    init = for_images(init, config.data)
    backbone = init.description.backbone
    folder = RunFolder.of(config.run, f"finetune-{backbone}")
    job = TrainJob.prepare(config, folder, resume=resume, parent_run_id=parent_run_id)
    shards = (
        labelled_shards(config.data.root, folder.storage)
        if config.data.root is not None
        else synthetic_shards(config.data.synthetic, folder.storage)
    )
    size = {"height": init.description.height, "width": init.description.width}
    result = job.run(
        finetune_worker,
        partial(FinetuneWorkerSettings, init=init),
        shards=shards,
        images=PersonImages(shards, read_manifest(shards), config, **size),
        model_name=config.run.register_as or f"upreid-{backbone}-finetuned",
        lineage={"init": init.uri},
    )
    if result.model_uri is not None:
        tracking.link_descendant(job.client, ancestor=init.uri, descendant=result.model_uri)
    return result
