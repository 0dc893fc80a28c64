"""The backbone that maps images to features, alone or with a neck, and its description."""

import warnings
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict
from torch import Tensor, nn

from upreid_ray.config.errors import InputError
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.core import backbones
from upreid_ray.core.augment import Normalization
from upreid_ray.core.backbones import DEFAULT_SIZE, Backbone, Size


def build_backbone(
    name: str, *, size: Size = DEFAULT_SIZE, last_stride: int = 2, drop_path: float = 0.0
) -> Backbone:
    """Return a randomly initialized backbone that outputs features ``[B, num_features]``.

    Its state dict has the names of the library that makes it, without the classifier.

    Args:
        name: Name of the backbone.
        size: Size of the images that it is trained on.
        last_stride: With 1, the last stage of a ResNet keeps the resolution of the one before.
        drop_path: Largest probability with which stochastic depth leaves out a block.

    Raises:
        InputError: There is no such backbone.
    """
    family = backbones.find(name)
    return family.build(name, size=size, last_stride=last_stride, drop_path=drop_path)


def check_settings(config: PretrainConfig) -> None:
    """Check that there is such a backbone, and that it takes the images and the patches.

    Raises:
        InputError: One of them is refused.
    """
    name, data, patches = config.model.backbone, config.data, config.patches
    try:
        backbones.find(name)
    except InputError as error:
        raise InputError(f"--model.backbone {error}") from None
    check_size(name, (data.height, data.width))
    if config.model.drop_path is not None:
        with torch.device("meta"):
            build_for_training(config)  # refuses it where a backbone has no stochastic depth
    if config.loss.needs_patches:
        size = (data.height // patches.rows, data.width // patches.columns)
        grid = f"--patches.rows {patches.rows} --patches.columns {patches.columns}"
        check_size(name, size, patches=f"{grid} of images of {data.height}x{data.width}")


def build_for_training(config: PretrainConfig) -> Backbone:
    """Return the randomly initialized backbone of the query encoder.

    Raises:
        InputError: There is no such backbone, or it has no stochastic depth.
    """
    model, family = config.model, backbones.find(config.model.backbone)
    backbone = build_backbone(
        model.backbone,
        size=(config.data.height, config.data.width),
        drop_path=family.drop_path if model.drop_path is None else model.drop_path,
    )
    if model.freeze_patch_projection:
        for parameter in family.frozen(backbone):
            parameter.requires_grad_(False)
    return backbone


def choose_optimizer(config: PretrainConfig) -> Literal["sgd", "adamw"]:
    """Return the optimizer of a pre-training: the user's choice, or that of the family."""
    algorithm = config.optimizer.algorithm
    return backbones.find(config.model.backbone).optimizer if algorithm == "auto" else algorithm


def check_optimizer(config: PretrainConfig, paths: Iterable[str], flag: str = "--") -> None:
    """Refuse settings of the optimizer that does not train the backbone.

    Args:
        config: Decides which optimizer does.
        paths: Dotted paths of settings that the user gave, of all sections.
        flag: What stands before a path on the command line.

    Raises:
        InputError: One of the settings has no effect.
    """
    chosen = choose_optimizer(config)
    of_other = "optimizer.adamw." if chosen == "sgd" else "optimizer."
    for path in paths:
        section, _, name = path.rpartition(".")
        if f"{section}." == of_other and name != "algorithm":
            raise InputError(
                f"{flag}{path}: has no effect, because {config.model.backbone} is trained by "
                f"{chosen}; see --optimizer.algorithm"
            )


def check_size(name: str, size: Size, *, patches: str | None = None) -> None:
    """Check that a backbone takes images of this size, or patches of them.

    ``patches`` names the flags that decide the size of patches; None stands for whole images.

    Raises:
        InputError: It does not.
    """
    flags = patches or f"--data.height {size[0]} --data.width {size[1]}"
    try:
        backbones.find(name).check_size(name, size, of_patches=patches is not None)
    except ValueError as error:
        raise InputError(f"{flags}: {name} {error}") from error


def export_program(
    module: nn.Module, images: Tensor, sizes: dict[int, Any]
) -> torch.export.ExportedProgram:
    """Return a module in eval mode as a program.

    ``sizes`` has a `torch.export.Dim` for each dimension of the images that may vary.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch.export
        return torch.export.export(module, (images,), dynamic_shapes=(sizes,))


class NeckedBackbone(nn.Module):
    """A backbone followed by a batch normalization of its features.

    This is the BNNeck of Luo et al. 2019, https://arxiv.org/abs/1903.07071.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = nn.BatchNorm1d(backbone.num_features)
        self.neck.bias.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the normalized features ``[B, F]`` of images ``[B, 3, H, W]``."""
        return self.neck(self.backbone(images))


def _known(name: str) -> str:
    backbones.find(name)
    return name


class Description(BaseModel):
    """Description of a backbone for those who load it (``backbone.json``).

    Attributes:
        backbone: Name of the architecture.
        height: Height of the images that it was trained on, in pixels.
        width: Width of the images that it was trained on, in pixels.
        mean: Mean of each colour channel (0..1), which is subtracted first.
        std: Standard deviation of each colour channel, which divides the result.
        last_stride: Stride of the last stage; 1 if fine-tuning kept its resolution.
        has_neck: Whether a batch normalization follows (``neck.safetensors``).
    """

    model_config = ConfigDict(frozen=True)

    backbone: Annotated[str, AfterValidator(_known)]
    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    last_stride: Literal[1, 2] = 2
    has_neck: bool = False

    @property
    def size(self) -> Size:
        """Height and width of the images."""
        return self.height, self.width

    @property
    def normalization(self) -> Normalization:
        """Normalization of the images that the backbone expects."""
        return Normalization(self.mean, self.std)

    def extractor(self, weights: dict[str, Tensor], neck: dict[str, Tensor]) -> nn.Module:
        """Return the module that computes features ``[B, F]`` of images ``[B, 3, H, W]``.

        ``weights`` and ``neck`` are the state dicts of the backbone and of its neck, the latter
        empty if there is none.
        """
        backbone = build_backbone(self.backbone, size=self.size, last_stride=self.last_stride)
        backbone.load_state_dict(weights)
        if not self.has_neck:
            return backbone
        necked = NeckedBackbone(backbone)
        necked.neck.load_state_dict(neck)
        return necked
