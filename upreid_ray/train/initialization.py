"""Initial backbones: a registered version, a checkpoint, a file of weights, or random ones."""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from upreid_ray.config.downstream import DownstreamConfig, EvaluateConfig, ImagesConfig
from upreid_ray.config.errors import InputError
from upreid_ray.config.presets import IMAGENET
from upreid_ray.config.section import RANDOM
from upreid_ray.core import backbones
from upreid_ray.core.backbone import Description, build_backbone, check_size
from upreid_ray.core.backbones import DEFAULT_SIZE
from upreid_ray.core.checkpoint import read_exported, read_position
from upreid_ray.core.outcome import POSITION_FILE
from upreid_ray.core.weight_files import read_backbone

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Initialization:
    """A backbone to start from.

    Attributes:
        uri: Origin of the weights; for a registered model the version, never an alias.
        description: The architecture, and the images that it expects.
        weights: State dict of the backbone, on the CPU.
        neck: State dict of the neck; empty unless the backbone was fine-tuned.
        start: Weights that it was trained from; None if unknown.
    """

    uri: str
    description: Description
    weights: dict[str, Tensor]
    neck: dict[str, Tensor] = field(default_factory=dict)
    start: str | None = None

    def extractor(self) -> nn.Module:
        """Return the module that maps images ``[B, 3, H, W]`` to features ``[B, F]``."""
        return self.description.extractor(self.weights, self.neck)


def random(backbone: str, *, seed: int) -> Initialization:
    """Return a random initialization of an architecture."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            weights = build_backbone(backbone).state_dict()
        except InputError as error:
            raise InputError(f"--backbone {error}") from None
    return Initialization(RANDOM, _default_description(backbone), weights)


def resolve(init: str, *, backbone: str | None = None) -> Initialization:
    """Return the initialization that the user asks for.

    It is ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, a checkpoint folder, or a file of
    weights in a format of `read_backbone`, which may hold the named backbone if its tensors do
    not tell the architecture.

    Raises:
        InputError: The initialization does not exist, or lacks weights of the backbone.
    """
    if init.startswith("models:"):
        # Workers import this module for `Initialization`, and need no MLflow.
        from upreid_ray.tracking import connection, registry  # noqa: PLC0415

        client = connection.connect()
        version = registry.find_version(client, init)
        folder = registry.download(client, version)
        uri = f"models:/{version.name}/{version.version}"
        return Initialization(uri, *read_exported(folder), version.tags.get("init"))
    path = Path(init)
    if path.is_dir():
        return Initialization(init, *read_exported(path), _start_of_checkpoint(path))
    found = read_backbone(path, expected=backbone)
    logger.info("%s: %s", init, found)
    return Initialization(init, _default_description(found.name), found.weights)


def requested(config: DownstreamConfig | EvaluateConfig) -> Initialization:
    """Return the initialization of a run, with the run's image settings.

    Raises:
        InputError: The initialization does not exist, or lacks weights of the backbone.
    """
    if config.init == RANDOM:
        return for_images(random(config.backbone, seed=config.seed), config.data)
    return for_images(resolve(config.init, backbone=config.backbone), config.data)


def for_images(init: Initialization, data: ImagesConfig) -> Initialization:
    """Return the initialization with the image settings that the user gave.

    They take precedence over those of the pre-training.
    """
    names = ("height", "width", "mean", "std")
    given = {n: getattr(data, n) for n in names if getattr(data, n) is not None}
    old, new = init.description, init.description.model_copy(update=given)
    check_size(new.backbone, new.size)
    family = backbones.find(new.backbone)
    weights = family.fit(new.backbone, init.weights, new.size, old_size=old.size)
    return replace(init, description=new, weights=weights)


def _start_of_checkpoint(folder: Path) -> str | None:
    """Return what the run of a checkpoint started from; None if it is an exported backbone."""
    if not (folder / POSITION_FILE).is_file():
        return None
    settings = read_position(folder).config
    start: str | None = (
        settings["model"].get("pretrained") if "model" in settings else settings.get("init")
    )
    return start


def _default_description(backbone: str) -> Description:
    """Return the description of a backbone of which only the architecture is known."""
    height, width = DEFAULT_SIZE
    return Description(backbone=backbone, height=height, width=width, **IMAGENET)
