"""MLflow runs: what a run records, and its status.

Only the driver imports this module.
"""

import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    Metric,
    Param,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID as PARENT_TAG

from upreid_ray.config.errors import InputError, RunStopped
from upreid_ray.config.section import Section
from upreid_ray.tracking.connection import artifacts_folder, local_path, shown_uri

Client = MlflowClient
LIBRARIES = ("torch", "torchvision", "timm", "ray", "mlflow", "numpy", "pyarrow", "pillow")
NUM_PARAMS_A_CALL = 100
# MLflow's page shows an experiment of this kind as training runs, not as one of GenAI.
EXPERIMENT_KIND = {"mlflow.experimentKind": "custom_model_development"}
TRAINING_DATASET, EVALUATION_DATASET = "training", "evaluation"
MAX_DIGEST = 36  # characters that MLflow keeps of the digest of a data set


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
    and the versions of the libraries. An experiment that does not exist is created.

    Raises:
        InputError: The experiment was deleted, or its artifacts cannot be written.
    """
    experiment_id = _experiment(client, experiment)
    tags = environment() | ({PARENT_TAG: parent_run_id} if parent_run_id else {})
    run = client.create_run(experiment_id, run_name=name, tags=tags)
    run_id: str = run.info.run_id
    params = [Param(path, str(value)) for path, value in config.flatten()]
    for start in range(0, len(params), NUM_PARAMS_A_CALL):
        client.log_batch(run_id, params=params[start : start + NUM_PARAMS_A_CALL])
    client.log_text(run_id, config.model_dump_json(indent=1), "config.json")
    return run_id


def _experiment(client: MlflowClient, name: str) -> str:
    """Return the ID of an experiment, which is created if it does not exist.

    Raises:
        InputError: The experiment was deleted, or its artifacts cannot be written.
    """
    folder = artifacts_folder()
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        with ignore_existing():
            client.create_experiment(
                name,
                artifact_location=folder and folder.as_uri(),
                tags=EXPERIMENT_KIND,
            )
        experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage == "deleted":
        raise InputError(
            f"--run.experiment {name}: was deleted in MLflow; name another one, or restore it "
            f"with mlflow experiments restore --experiment-id {experiment.experiment_id}"
        )
    for key, value in EXPERIMENT_KIND.items():
        if key not in experiment.tags:  # an earlier version made the experiment
            client.set_experiment_tag(experiment.experiment_id, key, value)
    location = local_path(experiment.artifact_location)
    if folder is not None and location is not None:
        if location != folder and not location.exists():
            raise InputError(
                f"--run.experiment {name}: its artifacts are recorded at {location}, which is "
                f"gone; if the folder was moved, link it there (ln -s {folder} {location}), or "
                "name another experiment"
            )
        _check_writable(location, name)
    experiment_id: str = experiment.experiment_id
    return experiment_id


def _check_writable(folder: Path, experiment: str) -> None:
    """Raise InputError if a folder of artifacts cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"--run.experiment {experiment}: its artifacts cannot be written ({error})"
        ) from None


def set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    """Add tags to a run."""
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def log_dataset(client: MlflowClient, run_id: str, name: str, *, uri: str, digest: str) -> None:
    """Log a data set as an input of a run; a second call changes nothing.

    ``name`` says what the run does with the set (training or evaluation), ``digest`` is that of
    its manifest.
    """
    source = json.dumps({"uri": uri, "manifest": digest})
    dataset = Dataset(name, digest[:MAX_DIGEST], "local", source)
    tags = [InputTag(MLFLOW_DATASET_CONTEXT, name)]
    client.log_inputs(run_id, [DatasetInput(dataset, tags)])


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

    Raises:
        InputError: The run was deleted.
    """
    check_not_deleted(client, run_id)
    client.update_run(run_id, status="RUNNING")
    try:
        yield
    except BaseException as error:
        status = "KILLED" if isinstance(error, RunStopped) else "FAILED"
        with suppress(Exception):  # If the server is down too, the first error matters more.
            client.set_terminated(run_id, status)
        raise
    client.set_terminated(run_id, "FINISHED")


def check_not_deleted(client: MlflowClient, run_id: str) -> None:
    """Refuse a run that was deleted in MLflow, whose artifacts may be gone.

    Raises:
        InputError: It was deleted, or does not exist.
    """
    try:
        stage = client.get_run(run_id).info.lifecycle_stage
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise InputError(
            f"MLflow run {run_id}: does not exist at {shown_uri()}; set MLFLOW_TRACKING_URI to "
            "the store in which it was begun"
        ) from None
    if stage == "deleted":
        raise InputError(
            f"MLflow run {run_id}: was deleted; restore it with mlflow runs restore --run-id "
            f"{run_id}"
        )


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
    here = str(Path(__file__).parent)
    command = ["git", "-C", here, "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        # Only the path of this file varies in the command line.
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("UPREID_RAY_COMMIT", "unknown")
    return done.stdout.strip()
