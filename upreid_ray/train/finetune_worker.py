"""The workers of a fine-tuning run, with and without labels.

Workers import this module, so it must not import what only the driver needs, such as `job`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from upreid_ray.config.downstream import ClusterContrastConfig, DownstreamConfig, FinetuneConfig
from upreid_ray.config.errors import InputError, RunFailed
from upreid_ray.core import distributed
from upreid_ray.core.backbone import build_backbone
from upreid_ray.core.cluster_contrast import (
    OUTLIER,
    ClusterContrastState,
    centroids,
    cluster_contrast_step,
    pseudo_labels,
)
from upreid_ray.core.finetuning import (
    DownstreamState,
    FinetuneState,
    PersonBatch,
    finetune_step,
)
from upreid_ray.core.training import StepReport, train
from upreid_ray.data.stream.decode import Columns
from upreid_ray.data.stream.persons import (
    IMAGES,
    ChosenImages,
    ClusterImages,
    PersonBatches,
    PersonBlock,
    PersonImages,
)
from upreid_ray.data.stream.ray_data import MAX_DATASET_BLOCKS
from upreid_ray.train.evaluation import decoded_features
from upreid_ray.train.initialization import Initialization
from upreid_ray.train.worker import Worker, logger, prepare_process, stream
from upreid_ray.train.worker_settings import WorkerSettings


def finetune_worker(
    settings: WorkerSettings[Any], *, init: Initialization
) -> RunFailed | InputError | None:
    """Train from the newest checkpoint, if any; return why training ended early."""
    config, description = settings.config, init.description
    device = prepare_process(config.scaling)
    size = {"height": description.height, "width": description.width}
    images = IMAGES[type(config)](settings.shards, config, **size)
    backbone = build_backbone(
        description.backbone, size=description.size, last_stride=config.training.last_stride
    )
    backbone.load_state_dict(init.weights)
    if isinstance(images, ClusterImages):
        state = ClusterContrastState(config, backbone, description, device=device)
        return ClusterContrastWorker(settings, state, images).train()
    return FinetuneWorker(
        settings,
        FinetuneState(
            config,
            backbone,
            description,
            num_persons=images.num_persons,
            steps_per_epoch=images.steps_per_epoch,
            device=device,
        ),
        images,
    ).train()


class PersonWorker(Worker):
    """One process of a run that trains on images of persons."""

    config: DownstreamConfig
    state: DownstreamState

    def person_batches(self, batches: Iterator[Columns]) -> Iterator[PersonBatch]:
        """Yield the batches as tensors, and count the images that do not decode."""
        for columns in batches:
            self.count_undecodable(columns)
            yield PersonBatch(
                torch.from_numpy(columns["image"]), torch.from_numpy(columns["label"])
            )


class FinetuneWorker(PersonWorker):
    """One process of a supervised fine-tuning run."""

    config: FinetuneConfig
    state: FinetuneState
    images: PersonImages

    def steps(self) -> Iterator[StepReport]:
        """Train from ``state.step`` to the end, and report each step."""
        encoded, stop = _put_encoded(self.images), self.state.num_steps
        columns = stream_batches(self.images.batches, encoded, self.state, stop)
        return train(self.state, self.person_batches(columns), finetune_step)

    def keys(self, step: int) -> list[str]:
        """Return the names of the images of the batch that step ``step`` (from 0 on) takes."""
        return self.images.keys(self.images.batches.indices(step))


class ClusterContrastWorker(PersonWorker):
    """One process of an unsupervised fine-tuning run."""

    config: ClusterContrastConfig
    state: ClusterContrastState
    images: ClusterImages

    def steps(self) -> Iterator[StepReport]:
        """Train from ``state.step`` to the end, clustering before each epoch."""
        state = self.state
        encoded = _put_encoded(self.images)
        while state.step < state.num_steps:
            step_of_epoch = state.step % state.steps_per_epoch
            if step_of_epoch == 0:
                with self.meter.paused():
                    self._cluster()
            stop = state.step - step_of_epoch + state.steps_per_epoch
            labels = state.model.memory.labels.cpu().numpy()
            columns = stream_batches(self.images.batches(labels), encoded, state, stop)
            batches = self.person_batches(columns)
            yield from train(state, batches, cluster_contrast_step, stop_step=stop)

    def keys(self, step: int) -> list[str]:
        """Return the names of the images of a step's batch; none after the step's epoch.

        The clusters that decided what was in the batch are gone by then.
        """
        last = self.state.step - 1
        if step // self.state.steps_per_epoch != last // self.state.steps_per_epoch:
            return []
        labels = self.state.model.memory.labels.cpu().numpy()
        return self.images.keys(self.images.batches(labels).indices(step))

    def _cluster(self) -> None:
        """Begin an epoch with new clusters, which rank 0 finds. Every worker must call this.

        Raises:
            InputError: There are too few clusters; every worker raises it.
            RunFailed: Too many images do not decode; every worker raises it.
        """
        state = self.state
        state.average_running_statistics()
        columns = decoded_features(state, self.images) or {}  # as it is at rank 0

        def find() -> tuple[Tensor, Tensor]:
            order = columns["row"].argsort()
            features = torch.from_numpy(columns["features"][order]).to(state.device)
            clusters = pseudo_labels(features, self.config.clustering)
            # Images that do not decode are in no cluster, and thus in no batch.
            labels = np.full(self.images.num_images, OUTLIER)
            labels[columns["row"][order]] = clusters
            self._log_clusters(labels)
            return torch.from_numpy(labels), centroids(features, clusters).cpu()

        # Other workers wait for rank 0 as long as torch's process group allows (30 minutes).
        found: Any = distributed.run_at_first(find)
        pids, clusters = distributed.share_from_first(found)
        state.model.memory.begin(pids, clusters.to(state.device))

    def _log_clusters(self, labels: NDArray[np.int64]) -> None:
        """Log how many clusters and outliers there are."""
        num_clusters, share = int(labels.max()) + 1, float((labels == OUTLIER).mean())
        self.log_metrics({"clusters/number": float(num_clusters), "clusters/outliers": share})
        logger.info(
            "step %d/%d  %d clusters  %.1f%% outliers",
            self.state.step,
            self.state.num_steps,
            num_clusters,
            100 * share,
        )


def _put_encoded(images: ChosenImages) -> "ray.ObjectRef | None":
    """Put the encoded images into the object store, at rank 0 for all workers."""
    return ray.put(images.encoded()) if distributed.rank() == 0 else None


def stream_batches(
    batches: PersonBatches,
    encoded: "ray.ObjectRef | None",
    state: DownstreamState,
    stop_step: int,
) -> Iterator[Columns]:
    """Yield this worker's batches from the next step to ``stop_step``, decoded on Ray Data.

    The encoded images are needed at rank 0 only.
    """
    rank, num_workers = distributed.rank(), distributed.world_size()
    num_steps = batches.steps_per_block * max(1, MAX_DATASET_BLOCKS // state.config.num_groups)

    def read(block: PersonBlock) -> Columns:
        return batches.read(ray.get(encoded), block)

    while state.step < stop_step:
        start = state.step
        stop = min(start + num_steps, stop_step)
        decoded = stream(read, batches.rounds(start, stop, num_workers))
        yield from batches.batches(start, stop, decoded, rank=rank, num_workers=num_workers)
