"""The registry of backbones in MLflow: logged models, versions, aliases and lineage.

Registered model, version and alias are MLflow's words. The alias ``challenger`` is the newest
version, ``champion`` the one with the best score.
"""

import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path

import mlflow.artifacts
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from upreid_ray.config.errors import InputError, first_line
from upreid_ray.tracking.connection import shown_uri
from upreid_ray.tracking.runs import (
    EVALUATION_DATASET,
    MAX_DIGEST,
    check_not_deleted,
    ignore_existing,
)

logger = logging.getLogger(__name__)

LOGGED_MODEL = "backbone"
SCORE = "score."
CHALLENGER, CHAMPION = "challenger", "champion"
MODEL_URI = re.compile(r"^models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))$")


def register_backbone(
    client: MlflowClient,
    *,
    run_id: str,
    name: str,
    folder: Path,
    tags: Mapping[str, str],
    description: str = "",
) -> str:
    """Register the backbone in ``folder`` as the newest version of model ``name``.

    The version becomes the challenger. It also becomes the champion if there is none, or if
    its mAP (tag ``score.mAP``) is better on the same evaluation set (tag ``evaluation``); if it
    does not, the log says why. A run registers one version: another call returns the same one,
    and completes what a killed call left undone.

    The folder, usually from `upreid_ray.tracking.model.write_model`, holds
    ``backbone.safetensors`` and ``backbone.json``. It becomes a logged model, an output of the
    run. In the description (Markdown), ``{uri}`` stands for the version.

    Returns:
        The URI of the version, ``models:/NAME/VERSION``.

    Raises:
        InputError: The run was deleted.
    """
    check_not_deleted(client, run_id)
    if not client.search_registered_models(f"name = '{name}'"):
        with ignore_existing():
            client.create_registered_model(name)
    versions = client.search_model_versions(f"name = '{name}'")
    new = next((version for version in versions if version.run_id == run_id), None)
    if new is None:
        model_id = _log_model(client, run_id, folder, tags)
        source = f"models:/{model_id}"
        new = client.create_model_version(
            name, source, run_id, tags=dict(tags), model_id=model_id
        )
    uri = f"models:/{name}/{new.version}"
    if description and not new.description:
        client.update_model_version(name, new.version, description.replace("{uri}", uri))
    if all(int(version.version) <= int(new.version) for version in versions):
        _set_alias(client, CHALLENGER, new)
    champion = _version_by_alias(client, name, CHAMPION)
    reason = None if champion is None else _why_not_champion(new, champion)
    if champion is None or reason is None:
        _set_alias(client, CHAMPION, new)
    elif champion.version != new.version:
        logger.info(
            "%s does not become the champion, which stays version %s: %s; move the alias with "
            'jobs/promote.py %s --reason "..."',
            uri,
            champion.version,
            reason,
            uri,
        )
    return uri


def promote(client: MlflowClient, uri: str, reason: str) -> tuple[str, str | None]:
    """Make a version the champion of its model, whatever its scores are.

    Tags of the version record the reason, the time and the champion before it.

    Returns:
        The URIs of the version and of the champion before it, None if there was none.

    Raises:
        InputError: The version does not exist or its files are gone, or it is the champion.
    """
    new = find_version(client, uri)
    champion = _version_by_alias(client, new.name, CHAMPION)
    before = champion and f"models:/{champion.name}/{champion.version}"
    new_uri = f"models:/{new.name}/{new.version}"
    if before == new_uri:
        raise InputError(f"{uri}: version {new.version} is the champion already")
    download(client, new)
    tags = {
        "promotion.reason": reason,
        "promotion.time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "promotion.before": before or "none",
    }
    for key, value in tags.items():
        client.set_model_version_tag(new.name, new.version, key, value)
    _set_alias(client, CHAMPION, new)
    return new_uri, before


def _log_model(client: MlflowClient, run_id: str, folder: Path, tags: Mapping[str, str]) -> str:
    """Log the files of a folder as a model of a run, with its scores; return the model's ID.

    A model whose upload was killed is uploaded again; one that is ready stays as it is.
    """
    experiment_id = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models(
        [experiment_id], f"source_run_id = '{run_id}' AND name = '{LOGGED_MODEL}'"
    )
    model: LoggedModel = (
        found[0]
        if found
        else client.create_logged_model(experiment_id, LOGGED_MODEL, source_run_id=run_id)
    )
    model_id: str = model.model_id
    if model.status == LoggedModelStatus.READY:
        return model_id
    client.log_model_artifacts(model_id, str(folder))
    now, step = int(time.time() * 1000), int(tags.get("step", 0))
    scores = [
        Metric(
            f"model/{key.removeprefix(SCORE)}",
            float(value),
            now,
            step,
            model_id=model_id,
            dataset_name=EVALUATION_DATASET,
            dataset_digest=tags.get("evaluation", "")[:MAX_DIGEST],
            run_id=run_id,
        )
        for key, value in tags.items()
        if key.startswith(SCORE)
    ]
    if scores:
        client.log_batch(run_id, metrics=scores)
    outputs = client.get_run(run_id).outputs
    if model_id not in {each.model_id for each in (outputs and outputs.model_outputs) or ()}:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])
    client.finalize_logged_model(model_id, LoggedModelStatus.READY)
    return model_id


def link_descendant(client: MlflowClient, *, ancestor: str, descendant: str) -> None:
    """Add a tag to a version that names a version trained from it.

    An ancestor that is no registered version is ignored.
    """
    match = MODEL_URI.match(ancestor)
    if match is not None:
        name, _, version = descendant.removeprefix("models:/").rpartition("/")
        key = f"descendant.{name}.{version}"
        client.set_model_version_tag(match["name"], match["version"], key, descendant)


def find_version(client: MlflowClient, uri: str) -> ModelVersion:
    """Return the version at ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.

    Raises:
        InputError: The version does not exist.
    """
    match = MODEL_URI.match(uri)
    if match is None:
        raise InputError(f"{uri}: not of the form models:/NAME@ALIAS or models:/NAME/VERSION")
    try:
        if match["alias"] is not None:
            return client.get_model_version_by_alias(match["name"], match["alias"])
        return client.get_model_version(match["name"], match["version"])
    except MlflowException as error:
        raise InputError(
            f"{uri}: not in the registry at {shown_uri()} ({first_line(error)})"
        ) from error


def download(client: MlflowClient, version: ModelVersion) -> Path:
    """Download the files of a version; return their folder.

    Raises:
        InputError: The files cannot be downloaded.
    """
    uri = f"models:/{version.name}/{version.version}"
    try:
        folder: str = mlflow.artifacts.download_artifacts(uri, tracking_uri=client.tracking_uri)
        found = any(Path(folder).iterdir())
    except (MlflowException, OSError) as error:
        reason = first_line(error)
    else:
        if found:
            return Path(folder)
        reason = "there are none"  # MLflow copies a folder that does not exist as an empty one
    place = client.get_model_version_download_uri(version.name, version.version)
    raise InputError(
        f"{uri}: its files cannot be read from {place} ({reason}); if their folder was moved, "
        "move or link it back there; if they were deleted, train again"
    )


def _set_alias(client: MlflowClient, alias: str, version: ModelVersion) -> None:
    try:
        client.set_registered_model_alias(version.name, alias, version.version)
    except MlflowException:  # Another job has just created the same alias: now it exists.
        client.set_registered_model_alias(version.name, alias, version.version)


def _version_by_alias(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    model = client.get_registered_model(name)
    if alias not in model.aliases:
        return None
    return client.get_model_version(name, model.aliases[alias])


def _why_not_champion(new: ModelVersion, champion: ModelVersion) -> str | None:
    """Return why a version does not replace the champion; None if it does."""
    mine, best = (version.tags.get(f"{SCORE}mAP") for version in (new, champion))
    if mine is None:
        return "it was not scored, without labelled images; compare both with jobs/compare.py"
    if new.tags.get("evaluation") != champion.tags.get("evaluation"):
        return "it was scored on another evaluation set; compare both with jobs/compare.py"
    if best is None:
        return "the champion was not scored; compare both with jobs/compare.py"
    if float(mine) > float(best):
        return None
    return f"its mAP is {float(mine):.4f}, that of the champion {float(best):.4f}"
