"""MLflow runs: the connection to the tracking server, and what a run records.

Only the driver imports this module at once; `run_log` imports it in a thread of its own.
"""

import logging
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import mlflow.artifacts
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID as PARENT_TAG

from upreid_ray.config.errors import InputError, RunStopped, first_line
from upreid_ray.config.section import Section

Client = MlflowClient
logging.getLogger("mlflow").setLevel(logging.WARNING)  # Importing MLflow has set it to INFO.
LIBRARIES = ("torch", "torchvision", "ray", "mlflow", "numpy", "pyarrow", "pillow")
# MLflow's own defaults retry an unreachable server for minutes.
HTTP_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
}
NUM_PARAMS_A_CALL = 100


def tracking_uri() -> str:
    """Return ``MLFLOW_TRACKING_URI``, or else the embedded store in the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"


def connect() -> MlflowClient:
    """Return a client of the tracking server.

    Raises:
        InputError: No MLflow server answers at ``MLFLOW_TRACKING_URI``.
    """
    uri = tracking_uri()
    try:
        mlflow.set_tracking_uri(uri)
        client = new_client(uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # MLflow raises what its stores and HTTP libraries raise
        msg = f"MLFLOW_TRACKING_URI={uri}: no MLflow server answers ({first_line(error)})"
        raise InputError(_hide_password(msg, uri)) from None
    return client


def new_client(uri: str) -> MlflowClient:
    """Return a client whose calls to a server that is down fail soon.

    The HTTP timeouts are shorter than MLflow's own; environment variables take precedence.
    """
    for name, value in HTTP_DEFAULTS.items():
        os.environ.setdefault(name, value)
    return MlflowClient(uri)


def _hide_password(text: str, uri: str) -> str:
    """Replace the password of a URI, if it has one, by asterisks wherever a text shows it."""
    password = urlsplit(uri).password
    return text.replace(password, "***") if password else text


def start_run(
    client: MlflowClient,
    *,
    experiment: str,
    name: str,
    config: Section,
    parent_run_id: str | None = None,
) -> str:
    """Create a run and log its settings; return its ID.

    The names of the parameters are the dotted paths of the settings. Tags record the commit
    and the versions of the libraries.

    Args:
        client: Client from `connect`.
        experiment: Name of the experiment, which is created if it does not exist.
        name: Name of the run.
        config: Settings of the run.
        parent_run_id: ID of the run under which MLflow shows this one, or None.
    """
    if client.get_experiment_by_name(experiment) is None:
        embedded = tracking_uri().startswith("sqlite:")
        location = Path("mlartifacts").absolute().as_uri() if embedded else None
        with ignore_existing():
            client.create_experiment(experiment, artifact_location=location)
    experiment_id = client.get_experiment_by_name(experiment).experiment_id
    tags = environment() | ({PARENT_TAG: parent_run_id} if parent_run_id else {})
    run = client.create_run(experiment_id, run_name=name, tags=tags)
    run_id: str = run.info.run_id
    params = [Param(path, str(value)) for path, value in config.flatten()]
    for start in range(0, len(params), NUM_PARAMS_A_CALL):
        client.log_batch(run_id, params=params[start : start + NUM_PARAMS_A_CALL])
    client.log_text(run_id, config.model_dump_json(indent=1), "config.json")
    return run_id


def set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    """Add tags to a run."""
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def end_run(client: MlflowClient, run_id: str, status: str) -> None:
    """Set the final status of a run whose own process cannot do so."""
    client.set_terminated(run_id, status)


def log_files(client: MlflowClient, run_id: str, folder: Path) -> None:
    """Log the files of a folder as artifacts."""
    client.log_artifacts(run_id, str(folder))


def log_metrics(client: MlflowClient, run_id: str, values: Mapping[str, float]) -> None:
    """Log the metrics of a run that has no steps."""
    now = int(time.time() * 1000)
    client.log_batch(run_id, metrics=[Metric(k, v, now, 0) for k, v in values.items()])


def log_file(client: MlflowClient, run_id: str, name: str, content: bytes) -> None:
    """Log a file as the artifact ``name`` of a run."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, name)
        file.write_bytes(content)
        client.log_artifact(run_id, str(file))


@contextmanager
def running(client: MlflowClient, run_id: str) -> Iterator[None]:
    """Set the status of a run: running inside the block, then finished, failed or killed.

    A run that raises `RunStopped` is killed.
    """
    client.update_run(run_id, status="RUNNING")
    try:
        yield
    except BaseException as error:
        status = "KILLED" if isinstance(error, RunStopped) else "FAILED"
        with suppress(Exception):  # If the server is down too, the first error matters more.
            client.set_terminated(run_id, status)
        raise
    client.set_terminated(run_id, "FINISHED")


def environment() -> dict[str, str]:
    """Return the commit, the platform and the versions of the libraries as tags."""
    return {
        "mlflow.source.git.commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{f"version.{library}": version(library) for library in LIBRARIES},
    }


@contextmanager
def ignore_existing() -> Iterator[None]:
    """Ignore MLflow's error if another job has just created the same object."""
    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _commit() -> str:
    """Return the commit of this code, with ``-dirty`` if files were changed.

    Without a repository, as in a container image, it is ``UPREID_RAY_COMMIT``, or ``unknown``.
    """
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty",
    ]
    try:
        # Only the path of this file varies in the command line.
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("UPREID_RAY_COMMIT", "unknown")
    return done.stdout.strip()
