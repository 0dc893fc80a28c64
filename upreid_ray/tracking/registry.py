"""The registry of backbones in MLflow: versions, aliases and lineage.

Registered model, version and alias are MLflow's words. The alias ``challenger`` is the newest
version, ``champion`` the one with the best score.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import mlflow.artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from torch import nn

from upreid_ray.config.errors import InputError, first_line
from upreid_ray.core.checkpoint import read_exported
from upreid_ray.tracking.connection import connect, shown_uri
from upreid_ray.tracking.runs import check_not_deleted, ignore_existing

BACKBONE_FOLDER = "backbone"
CHALLENGER, CHAMPION = "challenger", "champion"
MODEL_URI = re.compile(r"^models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))$")


def register_backbone(
    client: MlflowClient, *, run_id: str, name: str, folder: Path, tags: Mapping[str, str]
) -> str:
    """Register the backbone in ``folder`` as the newest version of model ``name``.

    The version becomes the challenger. It also becomes the champion if there is none, or if
    its mAP (tag ``score.mAP``) is better on the same evaluation set (tag ``evaluation``). A run
    registers one version: another call returns the same one.

    Args:
        client: Client from `connect`.
        run_id: ID of the run, which gets the folder as an artifact.
        name: Name of the registered model.
        folder: Folder with ``backbone.safetensors`` and ``backbone.json``.
        tags: Lineage of the version.

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
        client.log_artifacts(run_id, str(folder), BACKBONE_FOLDER)
        source = f"runs:/{run_id}/{BACKBONE_FOLDER}"
        new = client.create_model_version(name, source, run_id, tags=dict(tags))
    if all(int(version.version) <= int(new.version) for version in versions):
        _set_alias(client, CHALLENGER, new)
    if _is_better(new, _version_by_alias(client, name, CHAMPION)):
        _set_alias(client, CHAMPION, new)
    return f"models:/{name}/{new.version}"


def link_descendant(client: MlflowClient, *, ancestor: str, descendant: str) -> None:
    """Add a tag to a version that names a version trained from it.

    Args:
        client: Client from `connect`.
        ancestor: URI of the version; any other initialization is ignored.
        descendant: URI of the version trained from it.
    """
    match = MODEL_URI.match(ancestor)
    if match is not None:
        name, _, version = descendant.removeprefix("models:/").rpartition("/")
        key = f"descendant.{name}.{version}"
        client.set_model_version_tag(match["name"], match["version"], key, descendant)


def load_backbone(uri: str) -> nn.Module:
    """Return the backbone of a version, such as ``models:/upreid-resnet50@champion``.

    Returns:
        A torchvision ResNet in eval mode, followed by its neck if it was fine-tuned. It maps
        images ``[B, 3, H, W]`` to features ``[B, F]``.

    Raises:
        InputError: The version does not exist, or its files are not those of a backbone.
    """
    client = connect()
    folder = download(client, find_version(client, uri))
    description, weights, neck = read_exported(folder)
    return description.extractor(weights, neck).eval()


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
    place = client.get_run(version.run_id).info.artifact_uri
    raise InputError(
        f"{uri}: its files cannot be read from {place} ({reason}); if their folder was moved, "
        "move or link it back there; if they were deleted with their run, train again"
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


def _is_better(new: ModelVersion, champion: ModelVersion | None) -> bool:
    if champion is None:
        return True
    same_set = new.tags.get("evaluation") == champion.tags.get("evaluation")
    if not same_set or "score.mAP" not in new.tags or "score.mAP" not in champion.tags:
        return False
    return float(new.tags["score.mAP"]) > float(champion.tags["score.mAP"])
