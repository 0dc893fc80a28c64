"""One process of a run: what every Ray Train worker does, whatever it trains.

Workers import this module, so it must not import what only the driver needs, such as `job`.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import pyarrow as pa
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointUploadMode

from upreid_ray.config.downstream import DownstreamConfig
from upreid_ray.config.errors import InputError, RunFailed, RunStopped, first_line
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.config.run import ScalingConfig
from upreid_ray.core import distributed
from upreid_ray.core.checkpoint import (
    BestBackbone,
    find_damage,
    load_checkpoint,
    save_checkpoint,
)
from upreid_ray.core.training import State, StepReport
from upreid_ray.data.stream.damage import check_undecodable, count_undecodable
from upreid_ray.data.stream.decode import Columns
from upreid_ray.data.stream.persons import ClusterImages, PersonImages
from upreid_ray.data.stream.ray_data import read_stream, stream_blocks
from upreid_ray.data.stream.training import TrainingImages
from upreid_ray.tracking.run_log import RunLog
from upreid_ray.train import stop_signal
from upreid_ray.train.evaluation import Evaluation
from upreid_ray.train.folder import CHECKPOINT, NOT_FINITE_FILE, STOP_FILE, RunFolder
from upreid_ray.train.meter import Gauges, Meter
from upreid_ray.train.worker_settings import DELIVERY_SECONDS, WorkerSettings

logger = logging.getLogger(__name__)

BlockT = TypeVar("BlockT", bound=Sized)


def prepare_process(scaling: ScalingConfig) -> torch.device:
    """Configure logging and the number of torch threads of this worker.

    Returns:
        The device on which this worker trains.
    """
    ours = logging.getLogger("upreid_ray")  # Ray forwards its output to the driver.
    ours.setLevel(logging.INFO)
    ours.addHandler(logging.StreamHandler())
    ours.propagate = False
    # Other loggers only warn. No setting of Ray Train silences its line about each checkpoint,
    # because the name of that logger is the name of a file.
    logging.getLogger().setLevel(logging.WARNING)
    device: torch.device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu":
        set_num_threads(scaling, ray.train.get_context().get_local_world_size())
    return device


def set_num_threads(scaling: ScalingConfig, num_local: int) -> None:
    """Set the number of torch threads of this process.

    Ray sets it to the CPUs that the process reserves. The default is a larger one, an equal
    share of the machine, because the CPUs that are left for decoding idle most of the time.

    Args:
        scaling: Settings of the processes; ``threads_per_worker`` takes precedence.
        num_local: Number of processes on this machine.
    """
    share = max(1, len(os.sched_getaffinity(0)) // num_local)
    torch.set_num_threads(scaling.threads_per_worker or share)


@dataclass(frozen=True)
class Due:
    """What is due after a step.

    Attributes:
        log: Metrics are logged, and the run may be stopped.
        scores: The backbone is scored.
        checkpoint: The state is saved; always so with scores, which pick the best backbone.
    """

    log: bool
    scores: bool
    checkpoint: bool

    @classmethod
    def after(cls, state: State, config: PretrainConfig | DownstreamConfig) -> Self:
        """Return what is due after the step that ``state`` has just taken."""
        epoch, step_of_epoch = divmod(state.step, state.steps_per_epoch)
        is_last = state.step == state.num_steps
        ends_epoch = step_of_epoch == 0 and epoch % config.evaluation.every_epochs == 0
        scores = is_last or ends_epoch
        return cls(
            log=is_last or state.step % config.training.log_every_steps == 0,
            scores=scores,
            checkpoint=scores or state.step % config.checkpoint.every_steps == 0,
        )


class Worker(ABC):
    """One process of a run: the state of training, and the bookkeeping around each step."""

    config: PretrainConfig | DownstreamConfig
    state: State
    images: TrainingImages | PersonImages | ClusterImages

    def __init__(
        self,
        settings: WorkerSettings[Any],
        state: State,
        images: TrainingImages | PersonImages | ClusterImages,
    ) -> None:
        self.config = settings.config
        self.folder = settings.folder
        self.state = state
        self.images = images
        self.evaluation = Evaluation(settings.evaluation_shards, state)
        self.best = BestBackbone()
        # Images of this epoch that do not decode, by shard: those of this worker since the last
        # sum over the workers, and the sums at rank 0.
        self.new_undecodable: Counter[str] = Counter()
        self.undecodable: Counter[str] = Counter()
        self.known_checkpoints: set[str] = set()
        self.is_preempted = False
        self.meter = Meter(self.config.training.batch_size)
        self.gauges = Gauges(ray.train.get_context().get_experiment_name())
        self.log: RunLog | None = None
        if distributed.rank() == 0:
            self.log = RunLog(
                settings.run_id,
                settings.tracking_uri,
                settings.folder.local_path(),
                delivers=settings.delivering_node != ray.get_runtime_context().get_node_id(),
            )

    @abstractmethod
    def steps(self) -> Iterator[StepReport]:
        """Train from ``state.step`` to the end, and report each step."""

    @abstractmethod
    def keys(self, step: int) -> list[str]:
        """Return the names of the images of the batch that step ``step`` (from 0 on) takes."""

    def begin(self) -> dict[str, float]:
        """Begin a new run; return the scores of the backbone before training."""
        if self.evaluation.is_scored and distributed.rank() == 0:
            logger.info("scoring the untrained backbone")
        return self._evaluate()

    def train(self) -> RunFailed | InputError | None:
        """Train from the newest intact checkpoint, if there is one, to the end.

        Returns:
            The reason if training ended early. Any other fault, such as the loss of a worker,
            is raised, so that Ray Train starts again from the last checkpoint.
        """
        failure: RunFailed | InputError | None
        if distributed.rank() == 0:
            remove_local_checkpoints(self.folder)
        try:
            failure = self._restore() or self._train()
        except (RunFailed, InputError) as error:  # every worker raised it
            failure = error
        if self.log is not None:
            self.log.close(DELIVERY_SECONDS)
        return failure

    def _restore(self) -> RunFailed | None:
        """Load the newest intact checkpoint; without any, score the untrained backbone."""
        reported = [each.checkpoint for each in ray.train.get_all_reported_checkpoints()]
        known = reported or self._unlisted_checkpoints()
        self.known_checkpoints = {Path(checkpoint.path).name for checkpoint in known}
        if self._load_newest(known):
            return None
        if reported:
            return RunFailed(f"{self.folder.uri}: every checkpoint is damaged; begin a new run")
        self.evaluation.scores_untrained = self.begin()
        return None

    def _train(self) -> RunFailed | None:
        """Take the remaining steps; return the reason if training ended early."""
        if distributed.rank() == 0:
            logger.info("waiting for the first images")
        self.meter.start()
        for report in self.steps():
            self.meter.add(report)
            due = Due.after(self.state, self.config)
            save = due.checkpoint
            stopped: RunStopped | None = None
            if due.log or due.checkpoint or self._has_ended_epoch():
                self._check_undecodable()
            if due.log:
                # If the run ends here, it resumes with the same statistics as if it had not.
                self.state.average_running_statistics()
                self._log_progress()
                if self._has_skipped_too_many():
                    return self._fail_on_skipped_steps()
                stopped = self._stop_request()
                save |= self._is_newly_preempted() or stopped is not None
            if save:
                with self.meter.paused():
                    self.state.average_running_statistics()
                    self._save_checkpoint(self._evaluate() if due.scores else {})
            if stopped is not None:
                return stopped
        return None

    def _unlisted_checkpoints(self) -> list[Checkpoint]:
        """Return the checkpoints in the run's folder; Ray Train's own list may be lost."""
        folder = self.folder.location
        names = distributed.share_from_first(
            self.folder.checkpoints() if distributed.rank() == 0 else []
        )
        return [Checkpoint((folder / name).path, folder.filesystem) for name in names]

    def _load_newest(self, checkpoints: Sequence[Checkpoint]) -> bool:
        """Load the newest intact checkpoint; return whether there is one."""
        found = distributed.share_from_first(
            newest_intact(checkpoints) if distributed.rank() == 0 else None
        )
        if found is None:
            return False
        with checkpoints[found].as_directory() as folder:
            self.best, position = load_checkpoint(Path(folder), self.state)
        self.evaluation.scores_untrained = position.scores_untrained
        self.evaluation.num_queries_without_match = position.num_queries_without_match
        self.undecodable = Counter(position.undecodable)
        if distributed.rank() == 0:
            logger.info("continuing after step %d", self.state.step)
        return True

    def _stop_request(self) -> RunStopped | None:
        """Return, on every worker alike, why the run is to end before its last step."""
        if self.state.step == self.state.num_steps:
            return None
        signals = distributed.gather_at_first(stop_signal.has_arrived())
        is_asked = distributed.share_from_first(
            signals is not None and (any(signals) or self.folder.read(STOP_FILE) is not None)
        )
        name = self.folder.name
        stopped = RunStopped(f"run {name} was stopped; continue it with --resume {name}")
        return stopped if is_asked else None

    def _is_newly_preempted(self) -> bool:
        """Return, on every worker alike, whether Ray has just announced the loss of a node."""
        before = self.is_preempted
        self.is_preempted = ray.train.get_preemption_info() is not None
        return self.is_preempted and not before

    def count_undecodable(self, columns: Columns) -> None:
        """Count the images of this worker's next batch that do not decode."""
        self.new_undecodable += count_undecodable(columns, self.images.row_groups)

    def _has_ended_epoch(self) -> bool:
        return self.state.step % self.state.steps_per_epoch == 0

    def _check_undecodable(self) -> None:
        """Add up the images of this epoch that do not decode. Every worker must call this.

        Raises:
            RunFailed: There are too many; every worker raises it.
        """
        gathered = distributed.gather_at_first(self.new_undecodable)
        self.new_undecodable = Counter()
        num_images = self.state.steps_per_epoch * self.config.training.batch_size

        def check() -> None:
            self.undecodable += sum(gathered or [], Counter())
            limit = self.config.data.max_undecodable
            told = check_undecodable(self.undecodable, num_images, limit)
            if told and self._has_ended_epoch():
                logger.warning("left out of the last epoch: %s", told)
                self.undecodable.clear()

        distributed.run_at_first(check)

    def _has_skipped_too_many(self) -> bool:
        """Return whether too many steps in a row, or the last step, had no finite gradient."""
        skipped_last = self.state.num_steps in self.meter.skipped_steps
        return skipped_last or self.meter.most_skipped > self.config.run.max_skipped_steps

    def _fail_on_skipped_steps(self) -> RunFailed:
        """Write the names of the images in the skipped steps to a file of the run's folder."""
        if distributed.rank() == 0:
            steps = {step: self.keys(step - 1) for step in self.meter.skipped_steps}
            self.folder.write(NOT_FINITE_FILE, json.dumps(steps, indent=1))
        return RunFailed(
            f"run {self.folder.name}: {self.meter.most_skipped} steps in a row had no finite "
            f"gradient (--run.max_skipped_steps {self.config.run.max_skipped_steps}); "
            f"{self.folder.uri}/{NOT_FINITE_FILE} names their images; try a lower "
            "--optimizer.lr, or --optimizer.clip_norm"
        )

    def _log_progress(self) -> None:
        """Log the means since the last call. Every worker must call this."""
        state = self.state
        metrics = self.meter.read()
        if distributed.rank() > 0:
            return
        metrics["train/epoch"] = state.step / state.steps_per_epoch
        metrics["train/lr"] = state.optimizer.param_groups[0]["lr"]
        # The mean over no steps is NaN, if every step was skipped.
        self.log_metrics({k: value for k, value in metrics.items() if math.isfinite(value)})
        seconds_left = (state.num_steps - state.step) * self.meter.seconds_per_step
        logger.info(
            "step %d/%d  %s  %.0f images/s  waiting for data %.1f%%  %d:%02d left",
            state.step,
            state.num_steps,
            "  ".join(f"{name} {metrics[f'train/{name}']:.3f}" for name in self.meter.terms),
            metrics["train/images_per_second"],
            100 * metrics["train/data_wait"],
            *divmod(round(seconds_left), 60),
        )

    def log_metrics(self, values: Mapping[str, float]) -> None:
        """Log values of the current step to MLflow and Prometheus, at rank 0 only."""
        if self.log is not None:
            self.log.metrics(self.state.step, values)
            self.gauges.set(values)

    def _evaluate(self) -> dict[str, float]:
        """Score the backbone and log the scores; rank 0 gets them. All workers must call it."""
        scores = self.evaluation.score()
        if scores:
            counts = {"num_queries_without_match": self.evaluation.num_queries_without_match}
            values = scores | counts
            self.log_metrics({f"eval/{name}": value for name, value in values.items()})
            logger.info(
                "step %d/%d  retrieval  mAP %.4f  rank-1 %.4f",
                self.state.step,
                self.state.num_steps,
                scores["mAP"],
                scores["rank1"],
            )
        return scores

    def _save_checkpoint(self, scores: dict[str, float]) -> None:
        """Hand the state to Ray Train, which uploads it while training continues."""
        checkpoint = None
        if distributed.rank() == 0:
            if scores or not self.best.scores:
                self.best.update(self.state, scores)
            folder = Path(tempfile.mkdtemp(prefix=local_checkpoint_prefix(self.folder)))
            save_checkpoint(
                folder,
                self.state,
                self.best,
                scores_untrained=self.evaluation.scores_untrained,
                images_per_second=self.meter.mean_images_per_second,
                num_queries_without_match=self.evaluation.num_queries_without_match,
                undecodable=self.undecodable,
            )
            checkpoint = Checkpoint.from_directory(folder)
        name = f"{CHECKPOINT}{self.state.step:08d}"
        # Ray Train deletes a damaged checkpoint later, and would delete a new one of that name.
        while name in self.known_checkpoints:
            name += "-again"
        ray.train.report(
            {
                "step": self.state.step,
                "epoch": self.state.step / self.state.steps_per_epoch,
                **scores,
            },
            checkpoint=checkpoint,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )


def local_checkpoint_prefix(folder: RunFolder) -> str:
    """Return how the names of a run's checkpoints begin that wait on this node for upload."""
    return f"upreid-checkpoint-{hashlib.sha256(folder.uri.encode()).hexdigest()[:16]}-"


def remove_local_checkpoints(folder: RunFolder) -> None:
    """Remove the checkpoints that a killed worker of the run did not upload from this node."""
    for each in Path(tempfile.gettempdir()).glob(f"{local_checkpoint_prefix(folder)}*"):
        shutil.rmtree(each, ignore_errors=True)


def stream(
    read: Callable[[BlockT], Columns], rounds: Iterable[Sequence[Sequence[BlockT]]]
) -> Iterator[Columns]:
    """Yield this worker's decoded blocks, as `stream_blocks` starts them at rank 0."""
    rank, num_workers = distributed.rank(), distributed.world_size()
    iterators = stream_blocks(read, rounds) if rank == 0 else []
    mine = distributed.share_from_first(iterators)[rank]
    return read_stream(mine, rank=rank, num_workers=num_workers)


def newest_intact(checkpoints: Sequence[Checkpoint]) -> int | None:
    """Return the index of the last checkpoint whose files match their hashes."""
    for index, checkpoint in reversed(list(enumerate(checkpoints))):
        try:
            with checkpoint.as_directory() as folder:
                wrong = find_damage(Path(folder))
        except (OSError, pa.ArrowException) as error:  # from the storage
            wrong = first_line(error)
        if wrong is None:
            return index
        logger.warning(
            "%s is damaged (%s); the checkpoint before it is taken", checkpoint.path, wrong
        )
    return None
