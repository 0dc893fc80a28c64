"""Relative paths reach every process of a job: what a user types, in a folder of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.pictures import noise

ROOT = Path(__file__).parents[1]
JOB_SECONDS = 600
IMAGES = "gro\u00dfe Bilder"
# 16 images, so one step an epoch.
TINY = {
    "data.height": 64,
    "data.width": 32,
    "model.queue_size": 8,
    "optimizer.warmup_epochs": 0,
    "training.epochs": 2,
    "training.batch_size": 16,
    "training.group_size": 8,
    "evaluation.every_epochs": 2,
    "checkpoint.every_steps": 1,
    "scaling.cpus_per_worker": 0.5,
}

pytestmark = [pytest.mark.ray, pytest.mark.timeout(3 * JOB_SECONDS)]


@pytest.fixture
def home(tmp_path) -> Path:
    """Make a folder with a labelled set in it; both names are hard to spell."""
    home = tmp_path / "Ordner f\u00fcr L\u00e4ufe"
    cameras = {"bounding_box_train": (1, 2), "query": (1,), "bounding_box_test": (2,)}
    for split, numbers in cameras.items():
        folder = home / IMAGES / split
        folder.mkdir(parents=True)
        first = 1 if split == "bounding_box_train" else 101
        for person in range(first, first + 8):
            for camera in numbers:
                name = f"{person:04}_c{camera}s1_000001_00.jpg"
                (folder / name).write_bytes(noise())
    return home


def finish(home: Path, job: str, *words: str) -> dict[str, Any]:
    """Run a job in a folder, with the Python of an environment there; return its JSON line."""
    environment = home / "meine Umgebung"
    if not environment.exists():
        environment.symlink_to(sys.prefix)
    done = subprocess.run(
        [str(environment / "bin/python"), str(ROOT / "jobs" / f"{job}.py"), *words],
        cwd=home,
        env={
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            "UPREID_RAY_STORAGE": "meine L\u00e4ufe",
            "MLFLOW_TRACKING_URI": "",
        },
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_relative_paths_work_in_every_job(home):
    prepared = finish(home, "prepare", IMAGES, "--out", "die shards")
    places = ("--data.shards", "die shards", "--evaluation.shards", "die shards")
    tiny = [f"--{path}={value}" for path, value in TINY.items()]
    trained = finish(home, "pretrain", "laptop", *places, "--run.name", "a", *tiny)
    checkpoint = Path(trained["checkpoint"]).relative_to(home)
    scored = finish(home, "evaluate", "--init", str(checkpoint), "--data.root", IMAGES)

    assert prepared["result_dir"] == str(home / "die shards")
    assert trained["result_dir"] == str(home / "meine L\u00e4ufe/a")
    assert scored["init"] == trained["checkpoint"]
    recorded = json.loads((home / "meine L\u00e4ufe/a/run.json").read_text())["config"]
    assert recorded["data"]["shards"] == str(home / "die shards")
