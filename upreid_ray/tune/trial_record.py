"""The records of the trials of a sweep: what each one trains, and what it has reached.

The record of a trial is ``trial.json`` in its folder. It is written before Ray Tune gets the
same report, so that a trial that starts again, after a crash or in a resumed sweep, can repeat
its reports.

This module imports neither torch nor MLflow, so that Ray Train's controller, which loads it,
starts sooner.
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

TrialState = Literal["running", "finished", "stopped", "diverged", "refused", "failed"]


class Candidate(Section):
    """A point with a seed: what one trial trains."""

    number: NonNegativeInt
    """Number of the trial, from 0 on."""
    point: Point
    """Value of each swept setting."""
    seed: NonNegativeInt
    """Seed of the run."""


class TrialRecord(Section):
    """The state of a trial, and its scores so far."""

    candidate: Candidate
    """Point and seed that it trains."""
    state: TrialState = "running"
    """How it ended, unless it is still running."""
    rungs: Mapping[float, float] = Field(default_factory=dict)
    """mAP by epoch."""
    checkpoint: str | None = None
    """Path of the newest checkpoint, which also holds the best backbone."""
    reason: str | None = None
    """Why it did not finish; None if it did."""

    @property
    def best(self) -> float | None:
        """Best mAP, that of the best backbone in the checkpoint; None without rungs."""
        return max(self.rungs.values(), default=None)

    @property
    def epochs(self) -> float:
        """Number of epochs at the last rung."""
        return max(self.rungs, default=0.0)


@dataclass(frozen=True)
class TrialSettings:
    """What all trials of a sweep share, and access to their records.

    The folder of the sweep contains those of the trials; the run ID is that of the sweep.
    """

    plan: SweepPlan
    sweep: RunFolder
    shards: ShardSet
    evaluation: ShardSet
    run_id: str

    def config(self, candidate: Candidate) -> PretrainConfig:
        """Return the settings of a trial.

        Raises:
            InputError: Settings of the point contradict each other.
        """
        return self.plan.base.override(
            {
                **candidate.point,
                "seed": candidate.seed,
                "training.epochs": self.plan.num_epochs,
                "data.shards": self.shards.uri,
                "run.name": self.folder(candidate.number).name,
                "run.storage_path": self.sweep.uri,
                # Ray Tune starts a trial again, but not one that failed for good.
                "run.max_failures": 0,
            }
        )

    def folder(self, number: int) -> RunFolder:
        """Return the folder of a trial."""
        return RunFolder(self.sweep.uri, f"{self.sweep.name}-{number:03d}")

    def records(self) -> list[TrialRecord]:
        """Return the records of all trials that have begun, by number."""
        names = [
            name for name in self.sweep.folders() if name.startswith(f"{self.sweep.name}-")
        ]
        texts = (RunFolder(self.sweep.uri, name).read(TRIAL_FILE) for name in names)
        records = [TrialRecord.model_validate_json(text) for text in texts if text]
        return sorted(records, key=lambda record: record.candidate.number)

    def read(self, candidate: Candidate) -> TrialRecord:
        """Return the record of a trial; a new one if it has not begun."""
        text = self.folder(candidate.number).read(TRIAL_FILE)
        return (
            TrialRecord.model_validate_json(text) if text else TrialRecord(candidate=candidate)
        )

    def note(self, candidate: Candidate, state: TrialState, reason: str | None) -> TrialRecord:
        """Record how a trial ended, or why it starts again; return its record."""
        update = {"state": state, "reason": reason}
        record = self.read(candidate).model_copy(update=update)
        self.write(record)
        return record

    def write(self, record: TrialRecord) -> None:
        """Write the record of a trial."""
        self.folder(record.candidate.number).write(TRIAL_FILE, record.model_dump_json(indent=1))


class RungReport(TuneReportCallback):
    """A callback of Ray Train's controller: records each mAP, and reports it to Ray Tune."""

    def __init__(self, settings: TrialSettings, candidate: Candidate) -> None:
        super().__init__()
        self._settings = settings
        self._candidate = candidate

    def after_report(
        self,
        run_context: Any,  # noqa: ANN401, its class is private to Ray
        metrics: list[dict[str, Any]],
        checkpoint: Checkpoint | None,
    ) -> None:
        """Record and report a checkpoint that has scores; others are no rungs."""
        if METRIC not in metrics[0] or checkpoint is None:
            return
        record = self._settings.read(self._candidate)
        rungs = {**record.rungs, metrics[0][TIME]: metrics[0][METRIC]}
        self._settings.write(
            record.model_copy(update={"rungs": rungs, "checkpoint": checkpoint.path})
        )
        super().after_report(run_context, metrics, checkpoint)
