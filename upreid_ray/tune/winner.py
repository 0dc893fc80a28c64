"""The backbone that a sweep registers: that of the best trial, or of its point retrained."""

from dataclasses import dataclass
from pathlib import Path

from ray.train import Checkpoint

from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.core.outcome import read_outcome
from upreid_ray.data.shards.manifest import EVALUATION_SPLITS
from upreid_ray.tracking import runs
from upreid_ray.train.folder import RunFolder
from upreid_ray.train.job import register
from upreid_ray.train.pretrain import fit
from upreid_ray.tune.trial_record import TrialRecord, TrialSettings

RETRAINED = "-best"
"""Suffix of the name of the retrained run."""


@dataclass(frozen=True)
class Winner:
    """A registered backbone, its scores, and the speed of the run that trained it."""

    model_uri: str | None
    scores: dict[str, float]
    images_per_second: float


def register_trial(
    settings: TrialSettings, client: runs.Client, record: TrialRecord, model_name: str
) -> Winner:
    """Register the best backbone of a trial, which has a checkpoint."""
    folder = settings.folder(record.candidate.number)
    run_id, _ = folder.recorded()
    tags = {
        "run": folder.name,
        "sweep": settings.run_id,
        "shards": settings.shards.uri,
        "manifest": settings.shards.manifest.digest(),
        "evaluation": settings.evaluation.manifest.digest(EVALUATION_SPLITS),
    }
    # Its path alone does not say in which filesystem it is.
    place = folder.location / Path(str(record.checkpoint)).name
    with Checkpoint(place.path, place.filesystem).as_directory() as directory:
        outcome = read_outcome(Path(directory))
        model_uri = register(client, Path(directory), run_id=run_id, name=model_name, tags=tags)
    return Winner(model_uri, outcome.best_scores, outcome.images_per_second)


def retrain(settings: TrialSettings, client: runs.Client, config: PretrainConfig) -> Winner:
    """Train the best settings at full length, which registers the backbone.

    A sweep that is resumed continues this run too.
    """
    named = config.override({"run.name": settings.sweep.name + RETRAINED})
    begun = RunFolder.of(named.run, named.model.backbone).exists()
    result = fit(named, resume=begun)
    runs.set_tags(client, result.run_id, {"sweep": settings.run_id})
    return Winner(result.model_uri, result.scores, result.images_per_second)
