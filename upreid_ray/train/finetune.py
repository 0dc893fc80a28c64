"""Fine-tuning on Ray Train: from an initialization to a registered, scored model."""

from collections.abc import Callable
from functools import partial

from upreid_ray.config.downstream import ClusterContrastConfig, DownstreamConfig, FinetuneConfig
from upreid_ray.data.shards.manifest import read_manifest
from upreid_ray.data.shards.on_demand import labelled_shards
from upreid_ray.data.stream.persons import ClusterImages, PersonImages
from upreid_ray.tracking import registry
from upreid_ray.train.finetune_worker import (
    DownstreamWorkerSettings,
    cluster_contrast_worker,
    finetune_worker,
)
from upreid_ray.train.folder import RunFolder
from upreid_ray.train.initialization import requested
from upreid_ray.train.job import TrainJob, TrainResult, WorkerFunction

# What each worker does, and the images that it takes.
METHODS: dict[
    type[DownstreamConfig],
    tuple[WorkerFunction, Callable[..., PersonImages | ClusterImages]],
] = {
    FinetuneConfig: (finetune_worker, PersonImages),
    ClusterContrastConfig: (cluster_contrast_worker, ClusterImages),
}


def finetune(
    config: DownstreamConfig, *, resume: bool = False, parent_run_id: str | None = None
) -> TrainResult:
    """Fine-tune, score and register a backbone on the connected Ray cluster.

    The registered version names the one that it began with (tag ``init``), and that one lists
    its descendants (tags ``descendant.NAME.VERSION``).

    Args:
        config: Of the run; its class is the method.
        resume: Continue the run that ``config.run.name`` names.
        parent_run_id: MLflow run of which this one is a trial; a trial registers nothing.

    Raises:
        InputError: Something that the user gave cannot be used; nothing was started, unless it
            is that clusters cannot be found.
        ray.train.TrainingFailedError: Training failed more often than allowed.
    """
    worker, images_of = METHODS[type(config)]
    init = requested(config)
    backbone = init.description.backbone
    folder = RunFolder.of(config.run, f"finetune-{backbone}")
    job = TrainJob.prepare(config, folder, resume=resume, parent_run_id=parent_run_id)
    shards = labelled_shards(config.data, folder.storage)
    size = {"height": init.description.height, "width": init.description.width}
    result = job.run(
        worker,
        partial(DownstreamWorkerSettings, init=init),
        shards=shards,
        images=images_of(shards, read_manifest(shards), config, **size),
        model_name=config.run.register_as or f"upreid-{backbone}-finetuned",
        lineage={"init": init.uri},
    )
    if result.model_uri is not None:
        registry.link_descendant(job.client, ancestor=init.uri, descendant=result.model_uri)
    return result
