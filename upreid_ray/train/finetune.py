"""Fine-tuning on Ray Train: from an initialization to a registered, scored model.

This module runs on the driver; what the workers run is in `finetune_worker`.
"""

from upreid_ray.config.downstream import DownstreamConfig
from upreid_ray.data.shards.requested import labelled_shards
from upreid_ray.data.stream.persons import IMAGES
from upreid_ray.tracking import registry
from upreid_ray.train.folder import RunFolder
from upreid_ray.train.initialization import requested
from upreid_ray.train.job import Task, TrainJob, TrainResult

WORKER = "upreid_ray.train.finetune_worker:finetune_worker"


def finetune(
    config: DownstreamConfig, *, resume: bool = False, parent_run_id: str | None = None
) -> TrainResult:
    """Fine-tune, score and register a backbone on the connected Ray cluster.

    The class of the settings decides the method. A run with the ID of a parent MLflow run is a
    trial, which registers nothing. The tag ``init`` of the registered version names the version
    from which it was trained, and that one lists its descendants in tags
    ``descendant.NAME.VERSION``.

    Raises:
        InputError: A setting cannot be used; nothing was started. Or images cannot be
            clustered, which shows only in the run.
        ray.train.TrainingFailedError: Training failed more often than allowed.
    """
    begun = RunFolder.of(config.run, "finetune").recorded_lineage() if resume else {}
    init = requested(config.override({"init": begun.get("init", config.init)}))
    backbone = init.description.backbone
    folder = RunFolder.of(config.run, f"finetune-{backbone}")
    job = TrainJob.prepare(config, folder, resume=resume, parent_run_id=parent_run_id)
    shards = labelled_shards(config.data, folder.storage, scored=False)
    size = {"height": init.description.height, "width": init.description.width}
    task = Task(
        worker=WORKER,
        arguments={"init": init},
        shards=shards,
        images=IMAGES[type(config)](shards, config, **size),
        model_name=config.run.register_as or f"upreid-{backbone.replace('/', '-')}-finetuned",
        lineage={"init": init.uri},
    )
    result = job.run(task)
    if result.model_uri is not None:
        registry.link_descendant(job.client, ancestor=init.uri, descendant=result.model_uri)
    return result
