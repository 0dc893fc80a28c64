"""One trial of a sweep: a pre-training run that reports its rungs to Ray Tune."""

import os
from typing import Any

from ray import tune
from ray.train import TrainingFailedError

from upreid_ray.config.errors import InputError, RunFailed, RunStopped, first_line
from upreid_ray.train.folder import NOT_FINITE_FILE
from upreid_ray.train.job import first_cause
from upreid_ray.train.pretrain import fit
from upreid_ray.tune.trial_record import (
    CANDIDATE,
    METRIC,
    TIME,
    Candidate,
    RungReport,
    TrialSettings,
    TrialState,
)


def run_trial(config: dict[str, Any], settings: TrialSettings, tracking_uri: str) -> None:
    """Train one candidate, from its newest checkpoint if it has one.

    A failure that would occur again ends the trial and is recorded. Any other failure is
    raised, and Ray Tune starts the trial again. The tracking URI is no part of the settings,
    which Ray Tune writes to a file, since it may hold a password.
    """
    os.environ["MLFLOW_TRACKING_URI"] = tracking_uri
    # Interval at which Ray Train checks whether its workers have started, reported or ended.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    candidate = Candidate.parse(config[CANDIDATE])
    record = settings.read(candidate)
    settings.write(record)
    for epoch, score in record.rungs.items():
        tune.report({TIME: epoch, METRIC: score})
    if record.state != "running":
        return
    state: TrialState = "finished"
    reason = None
    try:
        fit(
            settings.config(candidate),
            resume=settings.folder(candidate.number).exists(),
            parent_run_id=settings.run_id,
            callbacks=[RungReport(settings, candidate)],
        )
    except TrainingFailedError as error:
        settings.note(candidate, "running", first_line(first_cause(error)))
        raise
    except InputError as error:
        state, reason = "refused", first_line(error)
    except RunStopped as error:
        state, reason = "stopped", first_line(error)
    except RunFailed as error:
        diverged = settings.folder(candidate.number).read(NOT_FINITE_FILE) is not None
        state, reason = "diverged" if diverged else "failed", first_line(error)
    record = settings.note(candidate, state, reason)
    if state != "finished":
        # The searcher should learn that this was a bad point.
        tune.report({TIME: record.epochs, METRIC: 0.0})
