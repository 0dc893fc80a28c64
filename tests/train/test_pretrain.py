"""Runs on a real Ray, from the configuration to the registered backbone, and what ends them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cluster.processes import tree
from tests.ray_workers import worker_of
from upreid_ray.config.errors import InputError, RunFailed
from upreid_ray.config.presets import PRESETS
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.core.backbone import build_backbone
from upreid_ray.core.memory import KEEP_FREED_MEMORY
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.data.stream.training import TrainingImages
from upreid_ray.tracking import connection, load_backbone, runs
from upreid_ray.train.folder import RunFolder
from upreid_ray.train.pretrain import fit
from upreid_ray.train.worker import local_checkpoint_prefix

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
JOB_SECONDS = 300.0
# 56 images, so 7 steps an epoch; checkpoints are neither at the ends of epochs nor of rounds.
TINY = PRESETS["demo"].override(
    {
        "data.synthetic.num_train_identities": 4,
        "data.synthetic.num_test_identities": 4,
        "data.synthetic.num_unlabeled_identities": 10,
        "data.synthetic.num_cameras": 2,
        "data.synthetic.height": 64,
        "data.synthetic.width": 32,
        "data.height": 64,
        "data.width": 32,
        "model.backbone": "resnet18",
        "model.queue_size": 32,
        "optimizer.warmup_epochs": 0,
        "training.epochs": 3,
        "training.batch_size": 8,
        "training.group_size": 4,
        "training.precision": "fp32",
        "training.log_every_steps": 3,
        "evaluation.every_epochs": 2,
        "checkpoint.every_steps": 4,
        "scaling.num_workers": 2,
        "scaling.cpus_per_worker": 0.5,
        "scaling.threads_per_worker": 1,
        "scaling.use_gpu": False,
        "run.name": "tiny",
    }
)
NUM_STEPS = 21
SECOND_CHECKPOINT = 8
SIGNAL_SECONDS = 2.0  # from the line that says that a run begins until it listens to signals


@pytest.fixture(scope="module")
def tiny(folder) -> PretrainConfig:
    """Return the settings of a run that starts from a file of weights."""
    start = folder / "start.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        save_file(build_backbone("resnet18").state_dict(), start)
    return TINY.override(
        {"run.storage_path": str(folder / "runs"), "model.pretrained": str(start)}
    )


@pytest.fixture(scope="module")
def finished(ray_cluster, tiny) -> SimpleNamespace:
    """Run it once, undisturbed."""
    result = fit(tiny)
    client = connection.connect()
    version = client.get_model_version(*result.model_uri.removeprefix("models:/").split("/"))
    return SimpleNamespace(
        result=result,
        client=client,
        run=client.get_run(result.run_id),
        tags=version.tags,
        description=version.description,
        weights=weights(result.model_uri),
    )


def weights(model_uri: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a registered version."""
    found = mlflow.artifacts.download_artifacts(
        model_uri, tracking_uri=os.environ["MLFLOW_TRACKING_URI"]
    )
    return load_file(Path(found) / "backbone.safetensors")


def test_a_run_has_scores_of_the_trained_and_of_the_untrained_backbone(finished):
    result = finished.result

    both = [result.scores, result.scores_untrained]
    assert [set(scores) >= {"mAP", "rank1"} for scores in both] == [True, True]


def test_scores_are_shares(finished):
    scores = [*finished.result.scores.values(), *finished.result.scores_untrained.values()]

    assert all(0 <= score <= 1 for score in scores)


def test_a_run_measures_its_speed(finished):
    assert finished.result.images_per_second > 0


def test_a_run_ends_finished_in_mlflow(finished):
    assert finished.run.info.status == "FINISHED"


def test_the_version_carries_its_lineage(finished, tiny):
    shards = finished.tags["shards"]

    expected = {
        "run": "tiny",
        "init": tiny.model.pretrained,
        "manifest": ShardSet.open(shards).manifest.digest(),
        "evaluation": ShardSet.open(shards).manifest.digest(["query", "gallery"]),
        "mlflow.source.git.commit": runs.environment()["mlflow.source.git.commit"],
        "score.mAP": str(finished.result.scores["mAP"]),
    }
    assert {name: finished.tags.get(name) for name in expected} == expected


def test_the_version_is_a_described_model_with_its_settings(finished, tiny):
    folder = Path(mlflow.artifacts.download_artifacts(finished.result.model_uri))

    assert json.loads((folder / "config.json").read_text()) == tiny.model_dump(mode="json")
    assert (folder / "MLmodel").is_file()
    assert finished.description.startswith("# upreid-resnet18\n")
    assert finished.result.model_uri in finished.description


def test_the_sets_of_images_are_inputs_of_the_run(finished):
    inputs = [each.dataset for each in finished.run.inputs.dataset_inputs]

    assert {each.name: each.digest for each in inputs} == {
        "training": finished.tags["manifest"][:36],
        "evaluation": finished.tags["evaluation"][:36],
    }


def test_each_logged_step_is_in_mlflow_once(finished):
    history = finished.client.get_metric_history(finished.run.info.run_id, "train/loss")

    assert sorted(each.step for each in history) == list(range(3, NUM_STEPS + 1, 3))


def test_each_evaluation_is_in_mlflow(finished):
    history = finished.client.get_metric_history(finished.run.info.run_id, "eval/mAP")

    assert sorted(each.step for each in history) == [0, 14, 21]


def test_a_picture_of_the_views_is_in_mlflow(finished):
    files = finished.client.list_artifacts(finished.run.info.run_id)

    assert "views.png" in [file.path for file in files]


def test_the_registered_backbone_was_trained(finished):
    other = load_backbone(finished.result.model_uri)

    features = other(torch.rand(4, 3, 64, 32))
    assert (features.isfinite().all(), features.std() > 0) == (True, True)


def test_resuming_a_finished_run_registers_nothing_new(finished, tiny):
    again = fit(tiny, resume=True)

    versions = finished.client.search_model_versions("name = 'upreid-resnet18'")
    assert (again.model_uri, len(versions)) == (finished.result.model_uri, 1)


@pytest.mark.parametrize(
    ("changed", "resume", "message"),
    [
        ({}, False, "--run.name tiny: "),
        ({"run.name": "unknown"}, True, "--resume unknown: "),
        ({"optimizer.lr": 0.01}, True, "--optimizer.lr 0.01: "),
        ({"training.epochs": 4}, True, "--training.epochs 4: "),
        ({"run.name": "a", "data.shards": "/no/shards"}, False, "/no/shards: "),
        ({"run.name": "b", "evaluation.shards": "/no/shards"}, False, "/no/shards: "),
        ({"run.name": "c", "scaling.use_gpu": True}, False, "--scaling.num_workers 2: "),
        ({"run.name": "d", "scaling.cpus_per_worker": 9}, False, "--scaling.cpus_per_worker 9"),
        (
            {"run.name": "g", "scaling.max_workers": 99, "training.batch_size": 792},
            False,
            "--scaling.cpus_per_worker 0.5: 99 workers and one task that decodes need 50.5 ",
        ),
        (
            {"run.name": "e", "training.batch_size": 512},
            False,
            "--training.batch_size 512: exceeds the 56 ",
        ),
    ],
    ids=[
        "taken name",
        "unknown run",
        "other rate",
        "other length",
        "no shards",
        "no evaluation shards",
        "no gpu",
        "no cpus",
        "no cpus for the most",
        "few images",
    ],
)
def test_a_run_that_cannot_be_is_refused_in_one_line(finished, tiny, changed, resume, message):
    with pytest.raises(InputError) as refusal:
        fit(tiny.override(changed), resume=resume)

    said = str(refusal.value)
    assert (said.startswith(message), said.count("\n")) == (True, 0), said


def test_a_run_that_is_refused_leaves_no_run_in_mlflow(finished, tiny):
    experiment = finished.client.get_experiment_by_name("upreid").experiment_id
    before = len(finished.client.search_runs([experiment]))

    with pytest.raises(InputError):
        fit(tiny.override({"run.name": "f", "data.shards": "/no/shards"}))

    assert len(finished.client.search_runs([experiment])) == before


# From here on jobs run in processes of their own: one with a Ray of its own, parts of which are
# killed, and others on the Ray of these tests.


def train_workers() -> list[int]:
    """Return the processes that train, on the Ray of a job or on that of these tests."""
    workers = []
    for pid in tree(os.getpid()):
        with suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
            workers += [pid] if title.startswith(b"ray::RayTrainWorker") else []
    return sorted(workers)


def environment_of(worker: int, python: str) -> list[str]:
    """Return the environment that Ray started a worker with."""
    (program,) = (pid for pid in tree(os.getpid()) if worker_of(python, pid) == worker)
    return Path(f"/proc/{program}/environ").read_text().split("\0")


def kill(pids: set[int] | list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def newest_checkpoint(run: Path) -> int:
    """Return the step of the newest checkpoint that Ray Train knows of, 0 if of none."""
    try:
        known = json.loads((run / "checkpoint_manager_snapshot.json").read_text())
        return known["latest_checkpoint_result"]["metrics"]["step"]
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or being written
        return 0


class Job:
    """A process of jobs/pretrain.py.

    Its Ray is its own, unless it gets the address of another one. With the Python of the tests
    it is forked.
    """

    def __init__(
        self,
        config: PretrainConfig,
        folder: Path,
        *words: str,
        python: str = sys.executable,
        ray_address: str = "local",
    ) -> None:
        self.run = Path(str(config.run.storage_path), str(config.run.name))
        file = folder / f"{self.run.name}.json"
        file.write_text(config.model_dump_json())
        self._errors = folder / f"{self.run.name}-{time.monotonic_ns()}.log"
        # A resumed run has recorded its settings.
        begin = ["--config", file]
        if "--resume" in words:
            begin = ["--run.storage_path", str(config.run.storage_path)]
        self._python = python
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                [python, ROOT / "jobs/pretrain.py", *begin, *words],
                cwd=folder,
                env={**os.environ, "RAY_ADDRESS": ray_address},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so while the job runs."""
        deadline = time.monotonic() + JOB_SECONDS
        while not condition():
            assert self.process.poll() is None, self.errors
            assert time.monotonic() < deadline, self.errors
            time.sleep(0.02)

    def newest_checkpoint(self) -> int:
        return newest_checkpoint(self.run)

    def is_beyond_checkpoint(self) -> bool:
        """Tell whether a step is logged that a resumed run takes again."""
        try:
            lines = (self.run / "metrics.jsonl").read_text().splitlines()
            newest = self.newest_checkpoint()
            return newest > 0 and any(
                json.loads(line).get("step", 0) > newest for line in lines
            )
        except ValueError:  # a line is being written
            return False

    def num_log_entries(self) -> int:
        """Count what the run has logged, the steps that were taken again too."""
        return len((self.run / "metrics.jsonl").read_text().splitlines())

    def result(self) -> dict[str, object]:
        """Wait for the end; return what the last line says."""
        output, _ = self.process.communicate(timeout=JOB_SECONDS)
        assert self.process.returncode == 0, self.errors
        return json.loads(output.splitlines()[-1])

    def end(self) -> None:
        """Kill whatever is left of the job, its Ray included."""
        pids = tree(self.process.pid)
        forked = worker_of(self._python, self.process.pid) if pids else None
        kill(pids | (tree(forked) if forked else set()))
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def hindered(finished, ray_cluster, python, folder, tiny) -> SimpleNamespace:
    """Kill a worker, then the job and its Ray, damage what is newest, stop it, let it end."""
    config = tiny.override({"run.name": "hindered"})
    job = Job(config, folder, python=python)
    try:
        job.wait_for(lambda: job.newest_checkpoint() > 0)
        before = train_workers()
        environment = environment_of(before[0], python)
        kill(before[:1])
        job.wait_for(lambda: bool(set(train_workers()) - set(before)))
        job.wait_for(lambda: job.newest_checkpoint() >= SECOND_CHECKPOINT)
        job.wait_for(job.is_beyond_checkpoint)
    finally:
        job.end()
    run_id = json.loads((job.run / "run.json").read_text())["run_id"]
    killed = finished.client.get_run(run_id).info.status
    damaged = damage_the_newest(job)
    left = leave_a_checkpoint(job)

    resume = ("--resume", "hindered")
    # It is not forked: the process that gets Ctrl-C is the job. A worker gets SIGTERM below.
    stopped = Job(config, folder, *resume, ray_address=ray_cluster)
    try:
        stopped.wait_for(lambda: "if it ends early" in stopped.errors)
        time.sleep(SIGNAL_SECONDS)
        stopped.process.send_signal(signal.SIGINT)
        stopped.process.wait(JOB_SECONDS)
    finally:
        stopped.end()
    stopped_at = job.newest_checkpoint()
    status = finished.client.get_run(run_id).info.status

    # This time a worker gets the signal, not the job.
    logged = job.num_log_entries()
    never = ("--run.max_failures", "0")
    again = Job(config, folder, *resume, *never, python=python, ray_address=ray_cluster)
    try:
        again.wait_for(lambda: job.num_log_entries() > logged)
        os.kill(train_workers()[-1], signal.SIGTERM)
        again.process.wait(JOB_SECONDS)
    finally:
        again.end()

    once = ("--run.max_failures", "1")
    resumed = Job(config, folder, *resume, *once, python=python, ray_address=ray_cluster)
    try:
        result = resumed.result()
    finally:
        resumed.end()
    jobs = (job, stopped, again, resumed)
    return SimpleNamespace(
        run_id=run_id,
        environment=environment,
        statuses=[killed, status],
        damaged=damaged,
        left=list(Path(tempfile.gettempdir()).glob(f"{left}*")),
        errors=[each.errors for each in jobs],
        exit_statuses=[each.process.returncode for each in jobs],
        stopped_at=stopped_at,
        result=result,
    )


def damage_the_newest(job: Job) -> str:
    """Damage the newest checkpoint, whose name is returned, and the list of them."""
    name = f"step-{job.newest_checkpoint():08d}"
    flip_a_bit(job.run / name / "model.safetensors")
    # As if the controller had been killed while it wrote, or the disk had been full.
    snapshot = job.run / "checkpoint_manager_snapshot.json"
    snapshot.write_text(snapshot.read_text()[:-9])
    return name


def leave_a_checkpoint(job: Job) -> str:
    """Leave what a worker does that is killed during an upload; return how its name begins."""
    prefix = local_checkpoint_prefix(RunFolder(str(job.run.parent), job.run.name))
    tempfile.mkdtemp(prefix=prefix)
    return prefix


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_job_that_lost_a_worker_was_killed_damaged_and_stopped_ends_as_if_it_had_not(
    finished, hindered
):
    torch.testing.assert_close(
        weights(hindered.result["model_uri"]), finished.weights, rtol=0, atol=0
    )


def test_no_checkpoint_is_left_in_the_folder_of_temporary_files(hindered):
    assert hindered.left == []


def test_workers_keep_the_memory_that_a_step_frees(hindered):
    settings = {f"{name}={value}" for name, value in KEEP_FREED_MEMORY.items()}

    assert settings <= set(hindered.environment)


def test_the_last_line_of_the_job_says_what_came_of_it(hindered):
    expected = {
        "run_id",
        "model_uri",
        "checkpoint",
        "scores",
        "scores_untrained",
        "num_queries_without_match",
        "images_per_second",
        "result_dir",
    }
    assert set(hindered.result) == expected
    assert hindered.result["num_queries_without_match"] == 0


@pytest.mark.parametrize(
    "said",
    [
        "PreemptionWatcher",
        "Reporting training result",
        "Starting execution of Dataset",
        "Graceful shutdown of backend failed",  # a worker was killed, and the run goes on
    ],
)
def test_a_job_leaves_out_what_ray_says_of_itself(hindered, said):
    assert not any(said in errors for errors in hindered.errors)


@pytest.mark.parametrize(
    "said", ["execution finished", "Progress bars disabled", "pid=", "\r", "\x1b["]
)
def test_a_log_is_plain(hindered, said):
    assert said not in hindered.errors[1]  # of the job that no fault hindered


def test_a_log_tells_what_the_job_waits_for(hindered):
    lines = hindered.errors[0].splitlines()

    told = ["starting Ray", "starting 2 workers", "scoring the untrained backbone"]
    told += ["waiting for the first images"]
    assert [line for line in lines if line in told][: len(told)] == told
    assert re.search(r"^step 3/21  loss .* left$", hindered.errors[0], re.MULTILINE)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(hindered):
    named = [line for line in hindered.errors[1].splitlines() if "is damaged" in line]

    assert len(named) == 2, hindered.errors[1]
    assert "checkpoint_manager_snapshot.json is damaged: looking at checkpoints" in named[0]
    assert f"{hindered.damaged} is damaged (model.safetensors is not what was" in named[1]


@pytest.mark.parametrize("number", [1, 2], ids=["job", "worker"])
def test_a_signal_to_it_saves_says_how_to_go_on_and_ends_the_job_with_3(hindered, number):
    said = "pretrain.py: run hindered was stopped; continue it with --resume hindered"

    assert hindered.exit_statuses[number] == 3
    assert said in hindered.errors[number].splitlines()


def test_a_job_that_gets_ctrl_c_saves_at_its_next_log_entry(hindered):
    # The one after the checkpoint before the damaged one.
    assert hindered.stopped_at == 6


def test_a_resumed_job_continues_from_the_newest_checkpoint_and_says_so(hindered):
    # A signal makes a job save at its next log entry. The last job has two such checkpoints to
    # choose from, those of the second and of the third one.
    logged = re.findall(r"^step (\d+)/21  loss", hindered.errors[2], re.MULTILINE)
    newest = [str(hindered.stopped_at), logged[-1]]

    for step, errors in zip(newest, hindered.errors[2:], strict=True):
        assert f"continuing after step {step}" in errors.splitlines()


def test_a_resumed_job_continues_its_run_in_mlflow(finished, hindered):
    run = finished.client.get_run(hindered.run_id)

    assert hindered.statuses == ["RUNNING", "KILLED"]
    assert (hindered.result["run_id"], run.info.status) == (hindered.run_id, "FINISHED")


def test_a_resumed_job_keeps_the_scores_before_training(finished, hindered):
    assert hindered.result["scores_untrained"] == finished.result.scores_untrained


def test_steps_that_a_resumed_job_repeats_are_in_mlflow_once(finished, hindered):
    history = finished.client.get_metric_history(hindered.run_id, "train/loss")

    assert sorted(each.step for each in history) == list(range(3, NUM_STEPS + 1, 3))


def test_a_run_without_finite_gradients_fails_once_and_names_the_images(finished, tiny):
    config = tiny.override(
        {"run.name": "diverging", "optimizer.lr": 1e20, "run.max_skipped_steps": 1}
    )

    with pytest.raises(RunFailed, match=r"--run.max_skipped_steps 1\); ") as failed:
        fit(config)

    noted = json.loads(
        (Path(str(tiny.run.storage_path)) / "diverging/not_finite.json").read_text()
    )
    images = TrainingImages(ShardSet.open(finished.tags["shards"]), config)
    assert "\n" not in str(failed.value)
    assert len(noted) >= 2
    assert all(keys == images.keys(int(step) - 1) for step, keys in noted.items())
    assert (
        finished.client.search_runs(
            [finished.run.info.experiment_id], "attributes.run_name = 'diverging'"
        )[0].info.status
        == "FAILED"
    )


def test_a_damaged_set_ends_the_run_at_once_with_one_line_that_names_the_shard(
    finished, tiny, tmp_path
):
    shards = tmp_path / "shards"
    shutil.copytree(finished.tags["shards"], shards)
    damaged = next(shards.glob("unlabeled-*.parquet"))
    content = bytearray(damaged.read_bytes())
    part = slice(len(content) // 4, len(content) // 2)
    content[part] = bytes(byte ^ 1 for byte in content[part])
    damaged.write_bytes(content)

    with pytest.raises(
        RunFailed, match=rf"do not decode, \d+ of them in {damaged}; "
    ) as failed:
        fit(tiny.override({"run.name": "damaged", "data.shards": str(shards)}))

    assert "\n" not in str(failed.value)


# Training further than planned.


def test_a_finished_run_says_how_to_train_further(finished, tiny):
    with pytest.raises(InputError) as refused:
        fit(tiny.override({"training.epochs": 4}), resume=True)

    assert str(refused.value) == (
        "--training.epochs 4: run tiny was started with 3; to train further, begin a new run "
        f"with --model.continue_from {finished.result.result_dir}"
    )


def test_a_run_with_another_queue_cannot_be_continued_from(finished, tiny):
    settings = {
        "model.continue_from": finished.result.result_dir,
        "model.pretrained": None,
        "model.queue_size": 64,
    }

    with pytest.raises(InputError, match=r"^--model.queue_size 64: \S+/tiny/step-\d+ has 32$"):
        fit(tiny.override({**settings, "run.name": "other-queue"}))


def test_a_new_run_continues_from_the_newest_checkpoint_of_another_one(finished, tiny):
    further = tiny.override(
        {
            "model.continue_from": finished.result.result_dir,
            "model.pretrained": None,
            "run.name": "further",
            "training.epochs": 1,
            "evaluation.shards": finished.tags["shards"],
        }
    )

    result = fit(further)

    run = finished.client.get_run(result.run_id)
    assert run.data.tags["continued_from"] == finished.result.checkpoint
    first = finished.client.get_metric_history(finished.run.info.run_id, "eval/mAP")[-1]
    assert result.scores_untrained["mAP"] == pytest.approx(first.value, abs=1e-6)


# The storage is full, or read-only.


@pytest.fixture
def disk() -> Iterator[Path]:
    """Mount a disk that has room for one checkpoint (181 MB), not for two."""
    # Not in pytest's folders, which it could not remove if this run were killed.
    with tempfile.TemporaryDirectory(prefix="disk-") as place:
        mount = ["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", place]
        if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
            pytest.skip("only root may mount")
        yield Path(place)
        subprocess.run(["umount", "--lazy", place], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def take_away(run: Path, after: Path) -> None:
    """Wait for a file; then put another one in the place of the folder of the run."""
    while not after.exists():
        time.sleep(0.05)
    run.rename(run.with_name("elsewhere"))
    run.write_text("no folder")


def test_a_run_whose_disk_is_full_and_then_gone_says_so_and_goes_on_when_all_is_well(
    finished, tiny, disk
):
    config = tiny.override({"run.storage_path": str(disk), "run.max_failures": 0})
    run = disk / "tiny"

    with pytest.raises(RunFailed, match=r"^run tiny: .*No space left.*--resume tiny$"):
        fit(config)
    left = {each.name for each in run.glob("step-*")}
    remount(disk, "size=2g")
    after = run / "step-00000012/sha256.json"
    loss = threading.Thread(target=take_away, args=(run, after), daemon=True)
    loss.start()
    with pytest.raises(RunFailed, match=r"^run tiny: .*Not a directory.*--resume tiny$"):
        fit(config, resume=True)
    loss.join()
    run.unlink()
    run.with_name("elsewhere").rename(run)
    result = fit(config, resume=True)

    assert "step-00000004" in left
    torch.testing.assert_close(weights(result.model_uri), finished.weights, rtol=0, atol=0)


def test_a_read_only_storage_is_refused_in_one_line(ray_cluster, folder, disk):
    remount(disk, "ro")

    with pytest.raises(InputError, match=rf"^{disk}/data/[^\n]+: cannot be written [^\n]+$"):
        fit(TINY.override({"run.storage_path": str(disk)}))
