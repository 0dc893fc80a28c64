"""What downstream work starts from: a registered version, a checkpoint, a file, or chance."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from upreid_ray import tracking
from upreid_ray.config import InputError, LabelledDataConfig, first_line
from upreid_ray.core.backbone import Description, build_backbone, read_backbone
from upreid_ray.core.checkpoint import (
    BEST_FILE,
    DESCRIPTION_FILE,
    NECK_FILE,
    POSITION_FILE,
    WEIGHTS_FILE,
    read_neck,
    read_position,
)

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
USUAL_SIZE = {"height": 256, "width": 128}


@dataclass(frozen=True)
class Initialization:
    """A backbone to start from.

    Attributes:
        uri: Where it came from; of a registered version the version itself, not an alias.
        description: Of the architecture, and of the images that it expects.
        weights: Its whole state dict, on the CPU.
        neck: State dict of the neck of a fine-tuned one, else empty.
        lineage: Tags of the registered version, empty for all else.
    """

    uri: str
    description: Description
    weights: dict[str, Tensor]
    neck: dict[str, Tensor] = field(default_factory=dict)
    lineage: dict[str, str] = field(default_factory=dict)

    def extractor(self) -> nn.Module:
        """Return what turns images ``[B, 3, H, W]`` into features ``[B, F]``."""
        return self.description.extractor(self.weights, self.neck)


def random(backbone: str, *, seed: int) -> Initialization:
    """Return a random initialization of an architecture."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = build_backbone(backbone).state_dict()
    return Initialization("random", _usual(backbone), weights)


def resolve(init: str) -> Initialization:
    """Return the initialization that a user names.

    Args:
        init: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, a checkpoint folder, or a file
            of weights in a format of `read_backbone`.

    Raises:
        InputError: It does not exist, or is not a whole backbone.
    """
    if init.startswith("models:"):
        client = tracking.connect()
        version = tracking.find_version(client, init)
        folder = tracking.download(client, version)
        uri = f"models:/{version.name}/{version.version}"
        return replace(_read_folder(folder, uri), lineage=dict(version.tags))
    path = Path(init)
    if path.is_dir():
        return _read_folder(path, init)
    name, weights = read_backbone(path)
    return Initialization(init, _usual(name), weights)


def for_images(init: Initialization, data: LabelledDataConfig) -> Initialization:
    """Let the user's settings of the images count more than those of the pre-training."""
    names = ("height", "width", "mean", "std")
    given = {n: getattr(data, n) for n in names if getattr(data, n) is not None}
    return replace(init, description=init.description.model_copy(update=given))


def _usual(backbone: str) -> Description:
    """Describe a backbone of which nothing is known but its architecture."""
    return Description.model_validate({"backbone": backbone, **USUAL_SIZE, **IMAGENET})


def _read_folder(folder: Path, uri: str) -> Initialization:
    """Read an exported backbone, or the best backbone of a checkpoint."""
    try:
        if (folder / DESCRIPTION_FILE).is_file():
            file, neck_file = folder / WEIGHTS_FILE, folder / NECK_FILE
            text = (folder / DESCRIPTION_FILE).read_text()
            description = Description.model_validate_json(text)
        elif (folder / POSITION_FILE).is_file():
            file = neck_file = folder / BEST_FILE
            description = read_position(folder).description
        else:
            inside = sorted(path.parent for path in folder.glob(f"*/{POSITION_FILE}"))
            hint = f"; give a checkpoint in it, such as {inside[-1]}" if inside else ""
            msg = f"{uri}: neither {DESCRIPTION_FILE} nor {POSITION_FILE} in this folder{hint}"
            raise InputError(msg)
    except (OSError, ValidationError) as error:
        msg = f"{uri}: its description cannot be read ({first_line(error)})"
        raise InputError(msg) from error
    name, weights = read_backbone(file)
    if name != description.backbone:
        msg = f"{uri}: describes a {description.backbone}, but holds a {name}"
        raise InputError(msg)
    neck = read_neck(neck_file) if description.has_neck else {}
    return Initialization(uri, description, weights, neck)
