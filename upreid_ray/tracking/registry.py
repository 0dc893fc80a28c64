"""The registry of backbones: versions, aliases, lineage."""

import logging
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
from upreid_ray.tracking.runs import _unless_it_exists, connect

logger = logging.getLogger(__name__)
logging.getLogger("mlflow").setLevel(logging.WARNING)  # its import has set it to INFO

BACKBONE_FOLDER = "backbone"
CHALLENGER, CHAMPION = "challenger", "champion"
MODEL_URI = re.compile(r"^models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))$")


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
        raise InputError(f"{uri}: not of the form models:/NAME@ALIAS or models:/NAME/VERSION")
    try:
        if match["alias"] is not None:
            return client.get_model_version_by_alias(match["name"], match["alias"])
        return client.get_model_version(match["name"], match["version"])
    except MlflowException as error:
        raise InputError(f"{uri}: not in the registry ({first_line(error)})") from error


def download(client: MlflowClient, version: ModelVersion) -> Path:
    """Bring the folder of a version here.

    Raises:
        InputError: It cannot be had.
    """
    uri = f"models:/{version.name}/{version.version}"
    try:
        folder: str = mlflow.artifacts.download_artifacts(uri, tracking_uri=client.tracking_uri)
    except (MlflowException, OSError) as error:
        raise InputError(f"{uri}: its files cannot be had ({first_line(error)})") from error
    return Path(folder)


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
