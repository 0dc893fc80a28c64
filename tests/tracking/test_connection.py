"""A user's first contact with MLflow: jobs at once, moved folders, what was deleted."""

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from upreid_ray.config.errors import InputError
from upreid_ray.config.presets import PRESETS
from upreid_ray.tracking import connection, registry, runs

CONFIG = PRESETS["demo"]
FIRST_CONTACT = """
from upreid_ray.config.presets import PRESETS
from upreid_ray.tracking import connection, runs
client = connection.connect()
print(runs.start_run(client, experiment="first", name="a-run", config=PRESETS["demo"]))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """Stand in a new folder, without a server; return the folder."""
    before = mlflow.get_tracking_uri()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield tmp_path
    mlflow.set_tracking_uri(before)


@pytest.fixture
def store(folder, new_database) -> Path:
    """Stand in a folder with a database; return the folder."""
    shutil.copy(new_database, folder / "mlflow.db")
    return folder


def move(old: Path, new: Path, monkeypatch) -> None:
    """Move a folder and go there, as a user does who then starts another process."""
    shutil.copytree(old, new)  # this process keeps the old database open
    shutil.rmtree(old)
    monkeypatch.chdir(new)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # MLflow sets it for this process


def start() -> str:
    """Begin a run as a job does; return its ID."""
    return runs.start_run(connection.connect(), experiment="first", name="a", config=CONFIG)


def register(folder: Path) -> str:
    """Register a version of a new run; return the ID of the run."""
    run_id = start()
    folder.mkdir(exist_ok=True)
    folder.joinpath("backbone.json").write_text("{}")
    registry.register_backbone(
        connection.connect(), run_id=run_id, name="model", folder=folder, tags={}
    )
    return run_id


def refusal(action, *arguments) -> str:
    """Return why something is refused, in one line."""
    with pytest.raises(InputError) as refused:
        action(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.slow
def test_jobs_that_start_at_the_same_moment_share_a_new_database(folder):
    command = [sys.executable, "-c", FIRST_CONTACT]
    environment = {**os.environ, "PYTHONPATH": str(Path(runs.__file__).parents[2])}
    jobs = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]

    outputs = [job.communicate(timeout=300)[0] for job in jobs]

    assert [job.returncode for job in jobs] == [0, 0, 0]
    assert len({output.split()[-1] for output in outputs}) == 3
    assert len(connection.connect().search_runs(["1"])) == 3


def test_the_store_is_the_same_one_for_processes_that_stand_elsewhere(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///here.db")

    assert connection.tracking_uri() == f"sqlite:///{store}/here.db"


def test_artifacts_are_beside_the_database_wherever_the_job_stands(store, monkeypatch):
    store.joinpath("read here").mkdir()
    store.joinpath("state").mkdir()
    store.joinpath("mlflow.db").rename(store / "state/mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/state/mlflow.db")
    monkeypatch.chdir(store / "read here")

    run_id = start()

    assert [file.name for file in store.glob(f"state/mlartifacts/{run_id}/artifacts/*")]
    assert not list(Path().iterdir())


def test_a_folder_that_cannot_be_written_is_named(store, monkeypatch):
    store.joinpath("file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/file/mlflow.db")

    assert f"{store}/file cannot be written; name a database" in refusal(connection.connect)


def test_a_folder_is_no_database(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")

    assert "it is a folder; name a file in it" in refusal(connection.connect)
    assert not store.with_name(f"{store.name}.lock").exists()


def test_a_file_store_names_what_replaces_it(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:./mlruns")

    assert "use sqlite:///mlflow.db" in refusal(connection.connect)


@pytest.mark.slow
def test_a_database_of_another_version_names_the_upgrade(store):
    connection.connect()
    with sqlite3.connect("mlflow.db") as database:
        database.execute("update alembic_version set version_num = 'ffffffffffff'")
    database.close()
    command = [sys.executable, "-c", FIRST_CONTACT]
    environment = {**os.environ, "PYTHONPATH": str(Path(runs.__file__).parents[2])}

    job = subprocess.run(
        command, check=False, env=environment, capture_output=True, text=True, timeout=300
    )

    assert f"run mlflow db upgrade sqlite:///{store}/mlflow.db" in job.stderr


def test_a_deleted_experiment_names_how_to_restore_it(store):
    start()
    client = connection.connect()
    client.delete_experiment(client.get_experiment_by_name("first").experiment_id)

    assert "mlflow experiments restore --experiment-id 1" in refusal(start)


def test_a_moved_folder_says_where_its_artifacts_are_recorded(store, monkeypatch):
    old, new = store / "old", store / "new"
    old.mkdir()
    store.joinpath("mlflow.db").rename(old / "mlflow.db")
    monkeypatch.chdir(old)
    register(store / "backbone")
    move(old, new, monkeypatch)

    message = refusal(start)
    client = connection.connect()
    gone = refusal(registry.download, client, registry.find_version(client, "models:/model/1"))

    assert f"ln -s {new}/mlartifacts {old}/mlartifacts" in message
    assert f"cannot be read from file://{old}/mlartifacts" in gone
    assert not old.exists()


def test_a_moved_folder_takes_new_experiments(store, monkeypatch):
    store.joinpath("old").mkdir()
    store.joinpath("mlflow.db").rename(store / "old/mlflow.db")
    monkeypatch.chdir(store / "old")
    start()
    move(store / "old", store / "new", monkeypatch)

    run_id = runs.start_run(connection.connect(), experiment="other", name="a", config=CONFIG)

    assert store.joinpath("new", "mlartifacts", run_id).is_dir()


def test_a_deleted_run_is_neither_continued_nor_registered(store):
    run_id = start()
    client = connection.connect()
    client.delete_run(run_id)

    with (
        pytest.raises(InputError, match="mlflow runs restore --run-id"),
        runs.running(client, run_id),
    ):
        raise AssertionError
    with pytest.raises(InputError, match="was deleted"):
        registry.register_backbone(client, run_id=run_id, name="m", folder=store, tags={})
    assert not client.search_model_versions("name = 'm'")


def test_a_run_of_another_store_is_named_with_the_store_that_was_asked(store):
    client = connection.connect()

    with pytest.raises(InputError, match=r"0123.*does not exist at sqlite:///.*mlflow.db"):
        runs.check_not_deleted(client, "0123456789abcdef0123456789abcdef")


def test_a_version_that_does_not_exist_is_named_with_the_registry_that_was_asked(store):
    client = connection.connect()

    message = refusal(registry.find_version, client, "models:/nothing@champion")

    assert f"not in the registry at sqlite:///{store}/mlflow.db" in message


def test_the_files_of_a_version_whose_model_was_deleted_for_good_are_missed_in_one_line(store):
    register(store / "backbone")
    shutil.rmtree(store / "mlartifacts" / "models")  # as mlflow gc does
    client = connection.connect()

    message = refusal(
        registry.download, client, registry.find_version(client, "models:/model/1")
    )

    assert "if they were deleted, train again" in message
