"""What every Ray Train worker of a fine-tuning run does."""

from collections.abc import Iterator
from dataclasses import dataclass

import ray
import torch
from ray.data import DataIterator

from upreid_ray.config import FinetuneConfig, RunFailed
from upreid_ray.core import distributed
from upreid_ray.core.backbone import build_backbone
from upreid_ray.core.finetuning import FinetuneState, PersonBatch, finetune_step
from upreid_ray.core.training import StepReport, train
from upreid_ray.data.persons import PersonBlock, PersonImages
from upreid_ray.data.shards import read_manifest
from upreid_ray.data.stream import MAX_DATASET_BLOCKS, Columns, read_stream, stream_blocks
from upreid_ray.initialization import Initialization
from upreid_ray.worker import Worker, WorkerSettings, prepare_process


@dataclass(frozen=True)
class FinetuneWorkerSettings(WorkerSettings[FinetuneConfig]):
    """What the driver tells the workers of a fine-tuning run.

    Attributes:
        init: Where the backbone begins; its description is that of the images of this run.
    """

    init: Initialization


def finetune_worker(settings: dict[str, FinetuneWorkerSettings]) -> RunFailed | None:
    """Train from the newest checkpoint, or from the beginning; return why it ended early."""
    device = prepare_process(settings["settings"].config.scaling)
    return FinetuneWorker(settings["settings"], device).train()


class FinetuneWorker(Worker):
    """One process of a fine-tuning run."""

    state: FinetuneState

    def __init__(self, settings: FinetuneWorkerSettings, device: torch.device) -> None:
        self.config = settings.config
        init = settings.init.description
        self.images = PersonImages(
            settings.shards,
            read_manifest(settings.shards),
            self.config,
            height=init.height,
            width=init.width,
        )
        backbone = build_backbone(init.backbone, last_stride=self.config.training.last_stride)
        backbone.load_state_dict(settings.init.weights)
        state = FinetuneState(
            self.config,
            backbone,
            init,
            num_persons=self.images.num_persons,
            steps_per_epoch=self.images.steps_per_epoch,
            device=device,
        )
        super().__init__(settings, state)

    def steps(self) -> Iterator[StepReport]:
        """Train from ``state.step`` to the end, and report each step."""
        return train(self.state, self._batches(), finetune_step)

    def keys(self, step: int) -> list[str]:
        """Return the names of the images of the batch that step ``step`` (from 0 on) takes."""
        return self.images.keys(step)

    def _batches(self) -> Iterator[PersonBatch]:
        """Yield this worker's batches from the next step to the last."""
        rank, num_workers = distributed.rank(), distributed.world_size()
        num_steps = self.images.steps_per_block * max(
            1, MAX_DATASET_BLOCKS // self.config.num_groups
        )
        images = self.images  # what the tasks get; all of this worker would be too much
        encoded = ray.put(images.encoded()) if rank == 0 else None

        def read(block: PersonBlock) -> Columns:
            return images.read(ray.get(encoded), block)

        while self.state.step < self.state.num_steps:
            start = self.state.step
            stop = min(start + num_steps, self.state.num_steps)
            iterators: list[DataIterator] = []
            if rank == 0:
                blocks = images.blocks(start, stop, num_workers)
                iterators = stream_blocks(read, blocks, num_workers=num_workers)
            mine = distributed.share_from_first(iterators)[rank]
            decoded = read_stream(mine, rank=rank, num_workers=num_workers)
            for columns in images.batches(start, stop, decoded, num_workers):
                yield PersonBatch(
                    torch.from_numpy(columns["image"]), torch.from_numpy(columns["label"])
                )
