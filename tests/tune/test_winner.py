"""The backbone that a sweep registers."""

from pathlib import Path
from types import SimpleNamespace

from pyarrow import fs

from upreid_ray import storage
from upreid_ray.train.folder import RunFolder
from upreid_ray.tune import winner
from upreid_ray.tune.trial_record import Candidate, TrialRecord


def test_the_best_trial_is_registered_from_the_storage_that_is_behind_a_uri(
    tmp_path, monkeypatch
):
    """Ray Train names a checkpoint by its path in the filesystem, `bucket/...`, without one."""
    remote = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(storage, "connect", lambda _: (remote, "bucket/runs/swept"))
    checkpoint = "bucket/runs/swept/swept-000/step-00000007"
    (tmp_path / checkpoint).mkdir(parents=True)
    (tmp_path / checkpoint / "backbone").write_text("weights")
    outcome = SimpleNamespace(best_scores={"mAP": 0.5}, images_per_second=1.0)
    monkeypatch.setattr(winner, "read_outcome", lambda _: outcome)
    monkeypatch.setattr(RunFolder, "recorded", lambda _: ("an-id", {}))
    digest = SimpleNamespace(digest=lambda *_: "a-digest")
    shards = SimpleNamespace(uri="shards", manifest=digest)
    settings = SimpleNamespace(
        folder=lambda _: RunFolder("s3://bucket/runs/swept", "swept-000"),
        shards=shards,
        evaluation=shards,
        run_id="another-id",
    )
    record = TrialRecord(candidate=Candidate(number=0, point={}, seed=0), checkpoint=checkpoint)
    registered = {}

    def register(_, directory: Path, *, name: str, **__: object) -> str:
        registered[name] = (directory / "backbone").read_text()
        return "models:/a-name/1"

    monkeypatch.setattr(winner, "register", register)

    found = winner.register_trial(settings, None, record, "a-name")

    assert found == winner.Winner("models:/a-name/1", {"mAP": 0.5}, 1.0)
    assert registered == {"a-name": "weights"}
