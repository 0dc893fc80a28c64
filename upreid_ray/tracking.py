"""MLflow: runs, metrics and the registry of backbones. No other module imports it."""

import json
import logging
import os
import platform
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow.artifacts
from mlflow.entities import Metric, Param, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID as PARENT_TAG
from PIL.Image import Image
from torch import nn

from upreid_ray.config import InputError, RunStopped, Section, first_line
from upreid_ray.core.checkpoint import read_exported

Client = MlflowClient
logger = logging.getLogger(__name__)
logging.getLogger("mlflow").setLevel(logging.WARNING)  # its import has set it to INFO

BACKBONE_FOLDER = "backbone"
CHALLENGER, CHAMPION = "challenger", "champion"
LIBRARIES = ("torch", "torchvision", "ray", "mlflow", "numpy", "pyarrow", "pillow")
# MLflow's own defaults retry an unreachable server for minutes.
HTTP_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
}
MODEL_URI = re.compile(r"^models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))$")
NUM_PARAMS_A_CALL = 100
MAX_METRICS_PER_BATCH = 1000  # MLflow's own limit
RETRY_SECONDS = 5.0


def tracking_uri() -> str:
    """Return ``MLFLOW_TRACKING_URI``, else the embedded store of the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"


def connect() -> MlflowClient:
    """Return a client of the tracking server.

    Raises:
        InputError: The server does not answer, or is none.
    """
    _limit_patience()
    uri = tracking_uri()
    try:
        mlflow.set_tracking_uri(uri)
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # MLflow raises what its stores and HTTP libraries raise
        msg = f"MLFLOW_TRACKING_URI={uri}: no MLflow server answers ({first_line(error)})"
        raise InputError(_without_password(msg, uri)) from None
    return client


def _without_password(text: str, uri: str) -> str:
    """Hide the password of a URI, if it has one, wherever the text shows it."""
    password = urlsplit(uri).password
    return text.replace(password, "***") if password else text


def _limit_patience() -> None:
    """Let calls to a server that is down fail soon; the user's own settings count more."""
    for name, value in HTTP_DEFAULTS.items():
        os.environ.setdefault(name, value)


def start_run(
    client: MlflowClient,
    *,
    experiment: str,
    name: str,
    config: Section,
    parent_run_id: str | None = None,
) -> str:
    """Make a run and log its settings; return its id.

    Parameters are the dotted paths of the settings; tags say which code and libraries ran.

    Args:
        client: From `connect`.
        experiment: Made if it does not exist.
        name: Of the run.
        config: Its settings.
        parent_run_id: Run under which MLflow shows this one; None for a run of its own.
    """
    if client.get_experiment_by_name(experiment) is None:
        embedded = tracking_uri().startswith("sqlite:")
        location = Path("mlartifacts").absolute().as_uri() if embedded else None
        with _unless_it_exists():
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
    """Mark a run whose process cannot do so itself as ended."""
    client.set_terminated(run_id, status)


def log_files(client: MlflowClient, run_id: str, folder: Path) -> None:
    """Log the files of a folder as artifacts."""
    client.log_artifacts(run_id, str(folder))


def log_metrics(client: MlflowClient, run_id: str, values: Mapping[str, float]) -> None:
    """Log the results of a run that has no steps."""
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
    """Mark a run as running inside, and then as finished, failed, or killed if stopped."""
    client.update_run(run_id, status="RUNNING")
    try:
        yield
    except BaseException as error:
        status = "KILLED" if isinstance(error, RunStopped) else "FAILED"
        with suppress(Exception):  # a server that is down too must not hide the first error
            client.set_terminated(run_id, status)
        raise
    client.set_terminated(run_id, "FINISHED")


def environment() -> dict[str, str]:
    """Return the commit and the versions of what runs, as tags."""
    return {
        "mlflow.source.git.commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{f"version.{library}": version(library) for library in LIBRARIES},
    }


class RunLog:
    """Metrics and files of a run: on disk at once, with MLflow when it answers.

    Training writes lines to a file; a thread delivers them in order and notes how far it came,
    so that a process that continues the run delivers the rest. A line that is delivered twice
    has the same time stamp and counts once.
    """

    def __init__(self, run_id: str, uri: str, folder: Path) -> None:
        _limit_patience()
        folder.mkdir(parents=True, exist_ok=True)
        self._run_id = run_id
        self._uri = uri
        self._folder = folder
        self._lines = folder / "metrics.jsonl"
        self._delivered = folder / "metrics.delivered"
        self._wake = threading.Condition()
        self._closing = False
        self._newest = self._recover()
        self._thread = threading.Thread(target=self._deliver, daemon=True, name="mlflow")
        self._thread.start()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log values of this step under names of the form ``section/name``.

        A step that was logged before is left out: a resumed run repeats the steps after its
        checkpoint.
        """
        new = {
            name: value for name, value in values.items() if step > self._newest.get(name, -1)
        }
        if new:
            self._newest |= dict.fromkeys(new, step)
            self._append({"step": step, "time": int(time.time() * 1000), "metrics": new})

    def picture(self, name: str, image: Image) -> None:
        """Log an image as the artifact ``name``."""
        image.save(self._folder / name)
        self._append({"file": name})

    def close(self, timeout_seconds: float) -> None:
        """Wait until all is delivered, but no longer than this."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_seconds)
        if self._offset() < self._lines.stat().st_size:
            logger.warning("MLflow does not answer; undelivered metrics are in %s", self._lines)

    def _recover(self) -> dict[str, int]:
        """End a line that a crash cut off; return the newest step of each metric there is."""
        newest: dict[str, int] = {}
        with self._lines.open("a+") as stream:
            stream.seek(0)
            text = stream.read()
            if text and not text.endswith("\n"):
                stream.write("\n")
        for line in text.splitlines():
            entry = _parse(line)
            newest |= dict.fromkeys(entry.get("metrics", {}), entry.get("step", -1))
        return newest

    def _append(self, entry: dict[str, Any]) -> None:
        with self._wake:
            with self._lines.open("a") as stream:
                stream.write(json.dumps(entry) + "\n")
            self._wake.notify()

    def _deliver(self) -> None:
        client: MlflowClient | None = None
        offset = self._offset()
        while True:
            lines = self._pending(offset)
            if not lines:
                with self._wake:
                    if self._closing and self._lines.stat().st_size == offset:
                        return
                    self._wake.wait(RETRY_SECONDS)
                continue
            try:
                client = client or MlflowClient(self._uri)  # a database is asked at once
                self._send(client, [_parse(line) for line in lines])
                offset += sum(len(line.encode()) for line in lines)
                self._delivered.write_text(str(offset))
            except Exception as error:  # whatever server and disk do must not stop training
                logger.debug("MLflow: %s", error)
                time.sleep(RETRY_SECONDS)

    def _offset(self) -> int:
        """Return up to where lines are delivered: 0 if the note of it was cut off."""
        text = self._delivered.read_text() if self._delivered.exists() else ""
        return int(text) if text.isdigit() else 0

    def _pending(self, offset: int) -> list[str]:
        """Return what is to be delivered next: lines of metrics, or one that names a file.

        Many lines at once, so that a slow server keeps up.
        """
        lines: list[str] = []
        num_metrics = 0
        with self._lines.open() as stream:
            stream.seek(offset)
            for line in stream:
                entry = _parse(line)
                num_metrics += len(entry.get("metrics", {}))
                is_too_much = "file" in entry or num_metrics > MAX_METRICS_PER_BATCH
                if not line.endswith("\n") or (lines and is_too_much):
                    break
                lines.append(line)
                if "file" in entry:
                    break
        return lines

    def _send(self, client: MlflowClient, entries: Sequence[dict[str, Any]]) -> None:
        if "file" in entries[0]:
            client.log_artifact(self._run_id, str(self._folder / entries[0]["file"]))
            return
        metrics = [
            Metric(name, value, entry["time"], entry["step"])
            for entry in entries
            for name, value in entry.get("metrics", {}).items()
        ]
        client.log_batch(self._run_id, metrics=metrics)


def _parse(line: str) -> dict[str, Any]:
    """Return an entry of the log; a line that a crash cut off is an empty one."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def register_backbone(
    client: MlflowClient, *, run_id: str, name: str, folder: Path, tags: Mapping[str, str]
) -> str:
    """Register the backbone in ``folder`` as the newest version of model ``name``.

    The version becomes the challenger. It becomes the champion too if there is none, or if it
    has a better mAP (tag ``score.mAP``) on the same evaluation set (tag ``evaluation``). A run
    registers once: calling it again returns the version there is.

    Args:
        client: From `connect`.
        run_id: Whose artifact the folder becomes.
        name: Of the registered model.
        folder: Holds ``backbone.safetensors`` and ``backbone.json``.
        tags: The lineage of the version.

    Returns:
        The URI ``models:/name/version``.
    """
    if not client.search_registered_models(f"name = '{name}'"):
        with _unless_it_exists():
            client.create_registered_model(name)
    versions = client.search_model_versions(f"name = '{name}'")
    new = next((version for version in versions if version.run_id == run_id), None)
    if new is None:
        client.log_artifacts(run_id, str(folder), BACKBONE_FOLDER)
        source = f"runs:/{run_id}/{BACKBONE_FOLDER}"
        new = client.create_model_version(name, source, run_id, tags=dict(tags))
    if all(int(version.version) <= int(new.version) for version in versions):
        _set_alias(client, CHALLENGER, new)
    if _is_better(new, _version_by_alias(client, name, CHAMPION)):
        _set_alias(client, CHAMPION, new)
    return f"models:/{name}/{new.version}"


def link_descendant(client: MlflowClient, *, ancestor: str, descendant: str) -> None:
    """Note on a version which one began with it; what is no version has no place for a note."""
    match = MODEL_URI.match(ancestor)
    if match is not None:
        name, _, version = descendant.removeprefix("models:/").rpartition("/")
        key = f"descendant.{name}.{version}"
        client.set_model_version_tag(match["name"], match["version"], key, descendant)


def load_backbone(uri: str) -> nn.Module:
    """Return the backbone of a version such as ``models:/upreid-resnet50@champion``.

    Returns:
        A torchvision ResNet, with a neck if it was fine-tuned: images ``[B, 3, H, W]`` to
        features ``[B, F]``, in eval mode.

    Raises:
        InputError: There is no such version, or its files do not make a backbone.
    """
    client = connect()
    folder = download(client, find_version(client, uri))
    description, weights, neck = read_exported(folder)
    return description.extractor(weights, neck).eval()


def find_version(client: MlflowClient, uri: str) -> ModelVersion:
    """Return the version that ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION`` names.

    Raises:
        InputError: There is no such version.
    """
    match = MODEL_URI.match(uri)
    if match is None:
        msg = f"{uri}: not of the form models:/NAME@ALIAS or models:/NAME/VERSION"
        raise InputError(msg)
    try:
        if match["alias"] is not None:
            return client.get_model_version_by_alias(match["name"], match["alias"])
        return client.get_model_version(match["name"], match["version"])
    except MlflowException as error:
        msg = f"{uri}: not in the registry ({first_line(error)})"
        raise InputError(msg) from error


def download(client: MlflowClient, version: ModelVersion) -> Path:
    """Bring the folder of a version here.

    Raises:
        InputError: It cannot be had.
    """
    uri = f"models:/{version.name}/{version.version}"
    try:
        folder: str = mlflow.artifacts.download_artifacts(uri, tracking_uri=client.tracking_uri)
    except (MlflowException, OSError) as error:
        msg = f"{uri}: its files cannot be had ({first_line(error)})"
        raise InputError(msg) from error
    return Path(folder)


@contextmanager
def _unless_it_exists() -> Iterator[None]:
    """Let pass that another job has just made the same."""
    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _set_alias(client: MlflowClient, alias: str, version: ModelVersion) -> None:
    try:
        client.set_registered_model_alias(version.name, alias, version.version)
    except MlflowException:  # so it is when another job makes the same alias at this moment
        client.set_registered_model_alias(version.name, alias, version.version)


def _version_by_alias(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    model = client.get_registered_model(name)
    if alias not in model.aliases:
        return None
    return client.get_model_version(name, model.aliases[alias])


def _is_better(new: ModelVersion, champion: ModelVersion | None) -> bool:
    if champion is None:
        return True
    same_set = new.tags.get("evaluation") == champion.tags.get("evaluation")
    if not same_set or "score.mAP" not in new.tags or "score.mAP" not in champion.tags:
        return False
    return float(new.tags["score.mAP"]) > float(champion.tags["score.mAP"])


def _commit() -> str:
    """Return the commit of this code, with ``-dirty`` if it was changed, or ``unknown``.

    An image has no repository: it is built with its commit in ``UPREID_RAY_COMMIT``.
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
        # A fixed command line, but for the place of this file.
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("UPREID_RAY_COMMIT", "unknown")
    return done.stdout.strip()
