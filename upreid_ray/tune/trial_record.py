"""What is known of the trials of a sweep, and of how they are told to Ray Tune.

It is in ``trial.json`` of a trial's folder, written before Ray Tune hears of it. A trial that
starts again, after a crash or in a resumed sweep, tells it from there.

Nothing here imports torch or MLflow: Ray Train's controller needs it, and begins sooner.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, NonNegativeInt
from ray.train import Checkpoint
from ray.tune.integration.ray_train import TuneReportCallback

from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.config.section import Section
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.train.folder import RunFolder
from upreid_ray.tune.space import Point, SweepPlan

METRIC, TIME = "mAP", "epoch"
CANDIDATE = "candidate"
TRIAL_FILE = "trial.json"

State = Literal["running", "finished", "stopped", "diverged", "refused", "failed"]


class Candidate(Section):
    """A point with a seed: what one trial trains."""

    number: NonNegativeInt
    """Of the trial, from 0 on."""
    point: Point
    """Value of each swept setting."""
    seed: NonNegativeInt
    """Of the run."""


class TrialRecord(Section):
    """What is known of a trial."""

    candidate: Candidate
    """What it trains."""
    state: State = "running"
    """How it ended."""
    rungs: Mapping[float, float] = Field(default_factory=dict)
    """Epoch to the mAP there."""
    checkpoint: str | None = None
    """Newest checkpoint, which holds the best backbone."""
    reason: str | None = None
    """Why it did not finish."""

    @property
    def best(self) -> float | None:
        """The best mAP, which is that of the backbone in the checkpoint; None without rungs."""
        return max(self.rungs.values(), default=None)

    @property
    def epochs(self) -> float:
        """How far it came."""
        return max(self.rungs, default=0.0)


@dataclass(frozen=True)
class TrialSettings:
    """What is the same for all trials of a sweep.

    Attributes:
        plan: Of the sweep.
        sweep: Folder of the sweep, in which trials have theirs.
        shards: Training shards.
        evaluation: Shards with query and gallery images.
        run_id: Of the MLflow run of the sweep.
    """

    plan: SweepPlan
    sweep: RunFolder
    shards: ShardSet
    evaluation: ShardSet
    run_id: str

    def config(self, candidate: Candidate) -> PretrainConfig:
        """Return the settings of a trial.

        Raises:
            InputError: The point is inconsistent.
        """
        return self.plan.base.override(
            {
                **candidate.point,
                "seed": candidate.seed,
                "training.epochs": self.plan.num_epochs,
                "data.shards": self.shards.uri,
                "run.name": self.folder(candidate.number).name,
                "run.storage_path": self.sweep.uri,
                # Ray Tune starts a trial again, and knows when there is no use in it.
                "run.max_failures": 0,
            }
        )

    def folder(self, number: int) -> RunFolder:
        """Return the folder of a trial."""
        return RunFolder(self.sweep.uri, f"{self.sweep.name}-{number:03d}")

    def records(self) -> list[TrialRecord]:
        """Return what is known of all trials that have begun, in their order."""
        names = [
            name for name in self.sweep.folders() if name.startswith(f"{self.sweep.name}-")
        ]
        texts = (RunFolder(self.sweep.uri, name).read(TRIAL_FILE) for name in names)
        records = [TrialRecord.model_validate_json(text) for text in texts if text]
        return sorted(records, key=lambda record: record.candidate.number)

    def read(self, candidate: Candidate) -> TrialRecord:
        """Return what is known of a trial."""
        text = self.folder(candidate.number).read(TRIAL_FILE)
        return (
            TrialRecord.model_validate_json(text) if text else TrialRecord(candidate=candidate)
        )

    def note(self, candidate: Candidate, state: State, reason: str | None) -> TrialRecord:
        """Note how a trial ended, or why it has to begin again; return its record."""
        update = {"state": state, "reason": reason}
        record = self.read(candidate).model_copy(update=update)
        self.write(record)
        return record

    def write(self, record: TrialRecord) -> None:
        """Note what is known of a trial."""
        self.folder(record.candidate.number).write(TRIAL_FILE, record.model_dump_json(indent=1))


class RungReport(TuneReportCallback):
    """Notes the mAP of each evaluation, and tells Ray Tune; lives in Ray Train's controller."""

    def __init__(self, settings: TrialSettings, candidate: Candidate) -> None:
        super().__init__()
        self._settings = settings
        self._candidate = candidate

    def after_report(
        self,
        run_context: Any,  # noqa: ANN401, of a class that Ray keeps to itself
        metrics: list[dict[str, Any]],
        checkpoint: Checkpoint | None,
    ) -> None:
        """Pass on what has scores; other checkpoints are no rungs."""
        if METRIC not in metrics[0] or checkpoint is None:
            return
        record = self._settings.read(self._candidate)
        rungs = {**record.rungs, metrics[0][TIME]: metrics[0][METRIC]}
        self._settings.write(
            record.model_copy(update={"rungs": rungs, "checkpoint": checkpoint.path})
        )
        super().after_report(run_context, metrics, checkpoint)
