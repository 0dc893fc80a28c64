"""What every Ray Train worker does around each step, whatever it trains."""

import json
import logging
import math
import os
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from torch import Tensor

from upreid_ray.config.downstream import DownstreamConfig
from upreid_ray.config.errors import RunFailed, RunStopped, first_line
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.config.run import ScalingConfig
from upreid_ray.core import distributed
from upreid_ray.core.checkpoint import (
    BestBackbone,
    find_damage,
    load_checkpoint,
    save_checkpoint,
)
from upreid_ray.core.retrieval import extract_features, retrieval_scores
from upreid_ray.core.training import State, StepReport
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.data.stream.decode import Columns
from upreid_ray.data.stream.labelled import LabelledImages
from upreid_ray.storage import open_folder
from upreid_ray.tracking.run_log import RunLog
from upreid_ray.train import stop_signal
from upreid_ray.train.folder import CHECKPOINT, NOT_FINITE_FILE, STOP_FILE, RunFolder
from upreid_ray.train.meter import Gauges, Meter

logger = logging.getLogger(__name__)

DELIVERY_SECONDS = 60.0
EVALUATION_THREADS = 4


ConfigT = TypeVar("ConfigT", bound=PretrainConfig | DownstreamConfig)


@dataclass(frozen=True)
class WorkerSettings(Generic[ConfigT]):
    """What the driver tells every worker.

    Attributes:
        config: Settings of the run.
        shards: Training shards.
        evaluation_shards: Shards with query and gallery images; None if nothing is scored.
        run_id: ID of the MLflow run.
        tracking_uri: URI of the MLflow server.
        folder: Folder of the run.
    """

    config: ConfigT
    shards: ShardSet
    evaluation_shards: ShardSet | None
    run_id: str
    tracking_uri: str = field(repr=False)  # may hold a password; Ray shows the settings
    folder: RunFolder


class DecodedImages(Protocol):
    """Images that can be read in blocks, such as `LabelledImages`."""

    num_blocks: int

    def read(self, number: int) -> Columns:
        """Return ``image``, uint8 ``[n, 3, H, W]``, and what else there is of each."""


def prepare_process(scaling: ScalingConfig) -> torch.device:
    """Let the progress of this worker through, and take the threads that are its share.

    Returns:
        Where this worker trains.
    """
    ours = logging.getLogger("upreid_ray")  # Ray forwards it to the driver
    ours.setLevel(logging.INFO)
    ours.addHandler(logging.StreamHandler())
    ours.propagate = False
    # Others only warn. Ray Train tells of each checkpoint under the name of a file, which no
    # setting of its own reaches.
    logging.getLogger().setLevel(logging.WARNING)
    device: torch.device = ray.train.torch.get_device()
    if device.type == "cpu":
        take_threads(scaling, ray.train.get_context().get_local_world_size())
    return device


def take_threads(scaling: ScalingConfig, num_local: int) -> None:
    """Let torch use the threads that are this process's share of the machine.

    Ray gives a process the threads of the CPUs that it reserves; what is left free for
    decoding would idle most of the time.
    """
    share = max(1, len(os.sched_getaffinity(0)) // num_local)
    torch.set_num_threads(scaling.threads_per_worker or share)


class Worker(ABC):
    """One process of a run: the state of training, and the bookkeeping around each step.

    Args:
        settings: From the driver.
        state: At its beginning.
    """

    def __init__(self, settings: WorkerSettings[Any], state: State) -> None:
        self.run: PretrainConfig | DownstreamConfig = settings.config
        self.folder = settings.folder
        self.state = state
        self.labelled: LabelledImages | None = None
        if settings.evaluation_shards is not None:
            self.labelled = LabelledImages(
                settings.evaluation_shards,
                height=state.description.height,
                width=state.description.width,
            )
        self.best = BestBackbone()
        self.scores_untrained: dict[str, float] = {}
        self.known_checkpoints: set[str] = set()
        self.meter = Meter(self.run.training.batch_size)
        self.log: RunLog | None = None
        self.gauges = Gauges(ray.train.get_context().get_experiment_name())
        if distributed.rank() == 0:
            self.log = RunLog(
                settings.run_id, settings.tracking_uri, settings.folder.local_path()
            )

    @abstractmethod
    def steps(self) -> Iterator[StepReport]:
        """Train from ``state.step`` to the end, and report each step."""

    @abstractmethod
    def keys(self, step: int) -> list[str]:
        """Return the names of the images of the batch that step ``step`` (from 0 on) takes."""

    def train(self) -> RunFailed | None:
        """Train from where the newest whole checkpoint is.

        Returns:
            Why training ended early, if it did. What is raised instead, such as the loss of a
            worker, lets Ray Train start again from the last checkpoint.
        """
        state = self.state
        reported = [each.checkpoint for each in ray.train.get_all_reported_checkpoints()]
        known = reported or self._unlisted_checkpoints()
        self.known_checkpoints = {Path(checkpoint.path).name for checkpoint in known}
        if not self._load_newest(known):
            if reported:
                msg = f"{self.folder.uri}: every checkpoint is damaged; begin a new run"
                return RunFailed(msg)
            self.scores_untrained = self._evaluate()
        failure: RunFailed | None = None
        is_preempted = False

        self.meter.start()
        for report in self.steps():
            self.meter.add(report)
            epoch, step_of_epoch = divmod(state.step, state.steps_per_epoch)
            is_last = state.step == state.num_steps
            scores_due = is_last or (
                step_of_epoch == 0 and epoch % self.run.evaluation.every_epochs == 0
            )
            checkpoint_due = scores_due or state.step % self.run.checkpoint.every_steps == 0
            if is_last or state.step % self.run.training.log_every_steps == 0:
                # A run may end here, and goes on as if it had not.
                state.average_running_statistics()
                self._log_progress()
                if self.meter.most_skipped > self.run.run.max_skipped_steps or (
                    is_last and state.step in self.meter.skipped_steps
                ):
                    failure = self._without_gradients()
                    break
                if self._is_asked_to_stop() and not is_last:
                    name = self.folder.name
                    failure = RunStopped(
                        f"run {name} was stopped; continue it with --resume {name}"
                    )
                    checkpoint_due = True
                # A node that is about to be taken away: what is saved now is not lost.
                was_preempted, is_preempted = is_preempted, _is_preempted()
                checkpoint_due |= is_preempted and not was_preempted
            if checkpoint_due:
                with self.meter.paused():
                    state.average_running_statistics()
                    scores = self._evaluate() if scores_due else {}
                    self._save_checkpoint(scores)
            if failure is not None:
                break
        if self.log is not None:
            self.log.close(DELIVERY_SECONDS)
        return failure

    def _unlisted_checkpoints(self) -> list[Checkpoint]:
        """Return what lies in the folder of the run, of which Ray Train's list may be lost."""
        filesystem, path = open_folder(self.folder.uri)
        names = distributed.share_from_first(
            self.folder.checkpoints() if distributed.rank() == 0 else []
        )
        return [Checkpoint(f"{path}/{name}", filesystem) for name in names]

    def _load_newest(self, checkpoints: Sequence[Checkpoint]) -> bool:
        """Go to the newest checkpoint that is whole; tell whether there is one."""
        found = distributed.share_from_first(
            _newest_whole(checkpoints) if distributed.rank() == 0 else None
        )
        if found is None:
            return False
        with checkpoints[found].as_directory() as folder:
            self.best, position = load_checkpoint(Path(folder), self.state)
        self.scores_untrained = position.scores_untrained
        return True

    def _is_asked_to_stop(self) -> bool:
        """Tell, on every worker alike, whether this run shall end early."""
        signals = distributed.gather_at_first(stop_signal.has_arrived())
        return distributed.share_from_first(
            signals is not None and (any(signals) or self.folder.read(STOP_FILE) is not None)
        )

    def _without_gradients(self) -> RunFailed:
        """Write which images the skipped steps saw, so that they can be looked at."""
        if distributed.rank() == 0:
            steps = {step: self.keys(step - 1) for step in self.meter.skipped_steps}
            self.folder.write(NOT_FINITE_FILE, json.dumps(steps, indent=1))
        return RunFailed(
            f"run {self.folder.name}: {self.meter.most_skipped} steps in a row had no finite "
            f"gradient (--run.max_skipped_steps {self.run.run.max_skipped_steps}); "
            f"{self.folder.uri}/{NOT_FINITE_FILE} names their images; try a lower "
            "--optimizer.lr, or --optimizer.clip_norm"
        )

    def _log_progress(self) -> None:
        """Log the means since the last call; every worker takes part."""
        state = self.state
        metrics = self.meter.read()
        if self.log is None:
            return
        metrics["train/epoch"] = state.step / state.steps_per_epoch
        metrics["train/lr"] = state.optimizer.param_groups[0]["lr"]
        # Means are NaN where every step was skipped.
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self.log.metrics(state.step, finite)
        self.gauges.set(finite)
        speed = metrics["train/images_per_second"]
        seconds_left = (state.num_steps - state.step) * self.run.training.batch_size / speed
        logger.info(
            "step %d/%d  %s  %.0f images/s  waiting for data %.1f%%  %d:%02d left",
            state.step,
            state.num_steps,
            "  ".join(f"{name} {metrics[f'train/{name}']:.3f}" for name in self.meter.terms),
            speed,
            100 * metrics["train/data_wait"],
            *divmod(round(seconds_left), 60),
        )

    def _evaluate(self) -> dict[str, float]:
        """Score the extractor; every worker takes part, rank 0 gets the scores."""
        labelled = self.labelled
        if labelled is None:
            return {}
        features, labels = self.features(labelled)
        gathered = distributed.gather_at_first((features, labels))
        if gathered is None:
            return {}
        scores = _score(gathered)
        if self.log is not None:
            named = {f"eval/{name}": value for name, value in scores.items()}
            self.log.metrics(self.state.step, named)
            self.gauges.set(named)
        logger.info(
            "step %d/%d  retrieval  mAP %.4f  rank-1 %.4f",
            self.state.step,
            self.state.num_steps,
            scores["mAP"],
            scores["rank1"],
        )
        return scores

    def features(self, images: DecodedImages) -> tuple[Tensor, list[Columns]]:
        """Compute the features of this worker's share of some images.

        Returns:
            ``[n, F]``, unit length, on the CPU; and all else that there is of each block.
        """
        others: list[Columns] = []

        def batches() -> Iterator[Tensor]:
            for block in _decode_share(images):
                yield torch.from_numpy(block.pop("image"))
                others.append(block)

        normalization = self.state.description.normalization
        return extract_features(self.state.extractor, batches(), normalization).cpu(), others

    def _save_checkpoint(self, scores: dict[str, float]) -> None:
        """Hand the state to Ray Train, which uploads it while training goes on."""
        checkpoint = None
        if distributed.rank() == 0:
            if scores or not self.best.scores:
                self.best.update(self.state, scores)
            folder = Path(tempfile.mkdtemp(prefix="upreid-checkpoint-"))
            save_checkpoint(
                folder,
                self.state,
                self.best,
                scores_untrained=self.scores_untrained,
                images_per_second=self.meter.mean_images_per_second,
            )
            checkpoint = Checkpoint.from_directory(folder)
        name = f"{CHECKPOINT}{self.state.step:08d}"
        # A damaged one stays until Ray Train drops it, and would take its namesake along.
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


def _newest_whole(checkpoints: Sequence[Checkpoint]) -> int | None:
    """Return the index of the last checkpoint whose files are as they were written."""
    for index, checkpoint in reversed(list(enumerate(checkpoints))):
        try:
            with checkpoint.as_directory() as folder:
                wrong = find_damage(Path(folder))
        except (OSError, pa.ArrowException) as error:  # what the storage raises
            wrong = first_line(error)
        if wrong is None:
            return index
        logger.warning("%s is damaged (%s): taking the one before", checkpoint.path, wrong)
    return None


def _is_preempted() -> bool:
    """Tell, on every worker alike, whether a node of this run is about to be taken away."""
    return ray.train.get_preemption_info() is not None


def _decode_share(images: DecodedImages) -> Iterator[Columns]:
    """Decode this worker's share of some images, a few blocks ahead."""
    mine = range(distributed.rank(), images.num_blocks, distributed.world_size())
    with ThreadPoolExecutor(EVALUATION_THREADS) as pool:
        ahead: deque[Future[Columns]] = deque()
        for block in mine:
            ahead.append(pool.submit(images.read, block))
            if len(ahead) > EVALUATION_THREADS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _score(gathered: list[tuple[Tensor, list[Columns]]]) -> dict[str, float]:
    """Return the retrieval scores of the features and labels of all workers."""
    features = torch.cat([features for features, _ in gathered])
    blocks = [block for _, labels in gathered for block in labels]
    pids, camids, is_query = (
        torch.cat([torch.from_numpy(block[name]) for block in blocks])
        for name in ("pid", "camid", "is_query")
    )
    return retrieval_scores(
        1 - features[is_query] @ features[~is_query].T,
        pids[is_query],
        camids[is_query],
        pids[~is_query],
        camids[~is_query],
    ).summary()
