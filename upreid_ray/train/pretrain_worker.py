"""The worker of a pre-training run.

Workers import this module, so it must not import what only the driver needs, such as `job`.
"""

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from upreid_ray.config.errors import InputError, RunFailed
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.core import distributed
from upreid_ray.core.sheet import view_sheet
from upreid_ray.core.training import StepDraw, StepReport, TrainState, train, train_step
from upreid_ray.data.stream.ray_data import MAX_DATASET_BLOCKS
from upreid_ray.data.stream.training import TrainingImages
from upreid_ray.train.continuation import begin_from
from upreid_ray.train.worker import Worker, prepare_process, stream
from upreid_ray.train.worker_settings import WorkerSettings


def pretrain_worker(
    settings: WorkerSettings[PretrainConfig], *, start: str | None = None
) -> RunFailed | InputError | None:
    """Train from the newest checkpoint, if any; return why training ended early.

    A new run continues from ``start``, a checkpoint of another run, if it is given.
    """
    device = prepare_process(settings.config.scaling)
    return PretrainWorker(settings, device, start=start).train()


class PretrainWorker(Worker):
    """One process of a pre-training run."""

    config: PretrainConfig
    state: TrainState
    images: TrainingImages

    def __init__(
        self,
        settings: WorkerSettings[PretrainConfig],
        device: torch.device,
        *,
        start: str | None,
    ) -> None:
        self.start = start
        images = TrainingImages(settings.shards, settings.config)
        steps_per_epoch = images.steps_per_epoch
        state = TrainState(settings.config, steps_per_epoch=steps_per_epoch, device=device)
        super().__init__(settings, state, images)

    def begin(self) -> dict[str, float]:
        """Begin a new run, from a checkpoint of another one if that was named."""
        if self.start is not None:
            begin_from(self.start, self.state)
        return super().begin()

    def steps(self) -> Iterator[StepReport]:
        """Train from ``state.step`` to the end, and report each step."""
        return train(self.state, self._batches(), train_step)

    def keys(self, step: int) -> list[str]:
        """Return the names of the images of the batch that step ``step`` (from 0 on) takes."""
        return self.images.keys(step)

    def _batches(self) -> Iterator[Tensor]:
        """Yield this worker's batches from the next step to the last."""
        rank, num_workers = distributed.rank(), distributed.world_size()
        num_rounds = max(1, MAX_DATASET_BLOCKS // self.config.num_groups)
        step = self.state.step
        while step < self.state.num_steps:
            rounds = list(islice(self.images.rounds(step, self.state.num_steps), num_rounds))
            step = rounds[-1].first_step + rounds[-1].num_steps
            blocks = [each.by_worker(num_workers) for each in rounds]
            decoded = stream(self.images.read, blocks)
            for columns in self.images.batches(
                rounds, decoded, rank=rank, num_workers=num_workers
            ):
                self.count_undecodable(columns)
                batch = torch.from_numpy(columns["image"])
                if self.state.step == 0:
                    self._log_views(batch)
                yield batch.pin_memory() if self.state.device.type == "cuda" else batch

    def _log_views(self, images: Tensor) -> None:
        """Log a picture of the views of the first batch."""
        if self.log is not None:
            sheet = view_sheet(images, StepDraw.at(self.config, 0), self.config)
            self.log.picture("views.png", sheet)
