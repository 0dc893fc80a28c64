"""What the driver does around training, without any."""

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import mlflow
import pytest
import ray
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.state.util import is_actor_alive

from tests.core.tiny import fresh_state
from upreid_ray.config.errors import RunFailed
from upreid_ray.config.presets import PRESETS
from upreid_ray.config.run import JobConfig
from upreid_ray.core.checkpoint import BestBackbone, save_checkpoint
from upreid_ray.core.memory import KEEP_FREED_MEMORY
from upreid_ray.tracking import connection, run_log, runs
from upreid_ray.train.folder import RUN_FILE, SNAPSHOT_FILE, STOP_FILE, RunFolder
from upreid_ray.train.initialization import resolve
from upreid_ray.train.job import (
    _stopped_by_signals,
    deliver_metrics,
    first_cause,
    register,
    tell_ray_train_its_ray,
)

NOWHERE = "http://127.0.0.1:9"  # nothing answers there
# Prints the page faults of a thread that makes and frees a tensor of 128 MiB, 20 times, once it
# has done so as often before: it takes about 9 until there is room that fits.
FAULTS = """
import resource, threading, torch

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**25)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

thread = threading.Thread(target=lambda: (faults(), print(faults())))
thread.start()
thread.join()
"""


@pytest.fixture
def run(folder) -> RunFolder:
    return RunFolder(str(folder), "a-run")


@pytest.mark.parametrize("has_a_best", [True, False])
def test_a_run_whose_best_backbone_is_not_finite_registers_nothing(tmp_path, has_a_best):
    state, best = fresh_state(), BestBackbone()
    if has_a_best:  # as versions wrote it that did not look at its values
        best.update(state, {})
        best.weights["conv1.weight"][0] = float("nan")
    save_checkpoint(tmp_path, state, best, scores_untrained={}, images_per_second=1.0)

    with pytest.raises(RunFailed, match=r"nothing is registered: .* finite"):
        register(MagicMock(spec=[]), tmp_path, run_id="an-id", name="a-model", tags={})


def test_the_best_backbone_is_registered_as_a_described_model(folder, tmp_path):
    state, best = fresh_state(), BestBackbone()
    best.update(state, {"mAP": 0.5})
    save_checkpoint(
        tmp_path, state, best, scores_untrained={"mAP": 0.25}, images_per_second=1.0
    )
    client = connection.connect()
    run_id = runs.start_run(client, experiment="tests", name="a", config=PRESETS["demo"])

    uri = register(client, tmp_path, run_id=run_id, name="described", tags={"run": "a"})

    version = client.get_model_version("described", "1")
    assert version.tags["score.mAP"] == "0.5"
    assert "config" not in version.tags
    assert version.description.startswith("# described\n")
    assert "| before training | 0.250 |" in version.description
    assert uri in version.description
    files = Path(mlflow.artifacts.download_artifacts(uri))
    assert json.loads((files / "config.json").read_text()) == state.config.model_dump(
        mode="json"
    )
    assert (files / "MLmodel").is_file()
    weights = resolve(uri).weights
    assert all(best.weights[name].equal(tensor) for name, tensor in weights.items())


def test_a_run_that_was_recorded_with_a_relative_path_can_be_continued(run):
    config = PRESETS["demo"].override({"data.shards": "a set"})
    recorded = config.model_dump(mode="json")
    recorded["data"]["shards"] = "a set"
    run.write(RUN_FILE, json.dumps({"run_id": "an-id", "config": recorded}))

    assert run.recorded_run(config, free=()) == "an-id"


def test_the_storage_of_the_environment_is_relative_to_the_working_folder(folder, monkeypatch):
    monkeypatch.setenv("UPREID_RAY_STORAGE", "my runs")

    assert RunFolder.of(JobConfig(name="a"), "run").uri == f"{folder}/my runs/a"


def test_metrics_that_a_worker_could_not_deliver_are_delivered_at_the_end(run):
    client = connection.connect()
    run_id = runs.start_run(client, experiment="late", name="a", config=PRESETS["demo"])
    worker = run_log.RunLog(run_id, NOWHERE, run.local_path())
    worker.metrics(3, {"train/loss": 4.5})
    worker.close(0.1)

    deliver_metrics(run, run_id)

    history = client.get_metric_history(run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(3, 4.5)]


def test_a_folder_that_was_on_another_machine_has_nothing_to_deliver(run):
    elsewhere = RunFolder(run.storage, "elsewhere")

    deliver_metrics(elsewhere, "no-run")

    assert not elsewhere.local_path().exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_the_run_to_stop_and_the_next_one_is_not_caught(run, number):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]

    with _stopped_by_signals(run):
        os.kill(os.getpid(), number)
        asked = run.read(STOP_FILE)
        then = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]

    assert (asked, then) == ("", before)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("text", ["", '{"checkpoint_results": [', "{}"])
def test_a_list_of_checkpoints_is_removed_if_it_is_torn(tmp_path, text):
    folder = RunFolder(str(tmp_path), "run")
    folder.write(SNAPSHOT_FILE, text)

    folder.remove_torn_snapshot()

    assert folder.read(SNAPSHOT_FILE) == (text if text == "{}" else None)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
@pytest.mark.slow
def test_a_worker_keeps_the_memory_that_a_step_frees(monkeypatch):
    for name in KEEP_FREED_MEMORY:
        monkeypatch.delenv(name, raising=False)
    faults = [
        int(
            subprocess.run(
                [sys.executable, "-c", FAULTS],
                env=os.environ | settings,
                capture_output=True,
                check=True,
                text=True,
            ).stdout
        )
        for settings in ({}, KEEP_FREED_MEMORY)
    ]

    assert faults[0] > 10 * faults[1]


def test_the_cause_of_a_failed_run_is_the_error_of_a_worker_or_of_the_controller():
    full, gone = OSError("no space left"), RuntimeError("gone")

    assert first_cause(WorkerGroupError("text", {1: full, 0: gone})) is full
    assert first_cause(ControllerError(gone)) is gone


@pytest.mark.ray
def test_ray_train_asks_its_own_ray_whether_a_run_is_alive(ray_cluster, tmp_path):
    """Another Ray may have been started on this machine, here one that cannot be reached."""
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("127.0.0.1:1")
    with tell_ray_train_its_ray():
        variables = {"RAY_TMPDIR": str(tmp_path), **get_env_vars_to_propagate()}

    @ray.remote(num_cpus=0, runtime_env={"env_vars": variables})
    class Asks:
        def whether_it_is_alive(self):
            return is_actor_alive(ray.get_runtime_context().get_actor_id(), timeout=10)

    assert ray.get(Asks.remote().whether_it_is_alive.remote())
    assert os.environ.get("RAY_ADDRESS") != ray_cluster
