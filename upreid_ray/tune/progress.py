"""Progress of a sweep: a table on a terminal, or a line for each event in a log."""

import logging

from ray.tune import Callback
from ray.tune.experiment import Trial
from rich.console import Console
from rich.live import Live

from upreid_ray.config.errors import first_line
from upreid_ray.tracking import connection, runs
from upreid_ray.tune.report import trial_table
from upreid_ray.tune.space import format_value
from upreid_ray.tune.trial_record import CANDIDATE, Candidate, TrialRecord, TrialSettings

logger = logging.getLogger(__name__)


class SweepProgress(Callback):
    """A callback of Ray Tune: shows each trial, and records how it ended.

    Ray Tune pickles it, so what cannot be pickled is created in `setup`.
    """

    def __init__(self, settings: TrialSettings) -> None:
        self._settings = settings

    def setup(self, **_: object) -> None:
        """Start the display."""
        self._client = connection.connect()
        self._records: dict[int, TrialRecord] = {}
        console = Console(stderr=True)
        self._live = Live(console=console) if console.is_terminal else None
        if self._live is not None:
            self._live.start()

    def on_trial_start(self, *, trial: Trial, **_: object) -> None:
        """Show that a trial starts, or starts again."""
        record = self._read(trial)
        if record.state != "running":  # it only repeats its reports
            return
        point = "  ".join(
            f"{path} {format_value(value)}" for path, value in record.candidate.point.items()
        )
        begins = f"goes on at epoch {record.epochs:g}" if record.rungs else "begins"
        self._show(record, f"{begins}: seed {record.candidate.seed}  {point}")

    def on_trial_result(self, *, trial: Trial, **_: object) -> None:
        """Show a rung."""
        record = self._read(trial)
        if record.state == "running" and record.rungs:
            self._show(
                record, f"epoch {record.epochs:g}  mAP {record.rungs[record.epochs]:.4f}"
            )

    def on_trial_complete(self, *, trial: Trial, **_: object) -> None:
        """Record how a trial ended; if it recorded no end itself, it was stopped at a rung."""
        record = self._read(trial)
        if record.state == "running":
            record = self._settings.note(record.candidate, "stopped", None)
        self._end(record)

    def on_trial_error(self, *, trial: Trial, **_: object) -> None:
        """Record that a trial failed more often than allowed."""
        record = self._read(trial)
        reason = record.reason or "its process was lost"
        self._end(self._settings.note(record.candidate, "failed", reason))

    def on_experiment_end(self, **_: object) -> None:
        """Stop the display."""
        if self._live is not None:
            self._live.stop()

    def _read(self, trial: Trial) -> TrialRecord:
        return self._settings.read(Candidate.parse(trial.config[CANDIDATE]))

    def _end(self, record: TrialRecord) -> None:
        self._show(record, record.state + (f": {record.reason}" if record.reason else ""))
        try:
            mark_run(self._client, self._settings, record)
        except Exception as error:  # no error of the server may stop a sweep
            logger.warning("MLflow: %s", first_line(error))

    def _show(self, record: TrialRecord, event: str) -> None:
        self._records[record.candidate.number] = record
        if self._live is None:
            logger.info("trial %d  %s", record.candidate.number, event)
        else:
            records = [self._records[number] for number in sorted(self._records)]
            self._live.update(trial_table(records, self._settings.plan.num_epochs))


def mark_run(client: runs.Client, settings: TrialSettings, record: TrialRecord) -> None:
    """Mark the MLflow run of a trial with its number and its final state."""
    folder = settings.folder(record.candidate.number)
    if folder.exists():
        run_id, _ = folder.recorded()
        tags = {"trial": str(record.candidate.number), "trial.state": record.state}
        runs.set_tags(client, run_id, tags)
        if record.state == "stopped":  # its process was killed before it could tell MLflow
            client.set_terminated(run_id, "KILLED")
