"""The backbone: a torchvision ResNet without its classifier."""

from typing import Literal

import torchvision
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from upreid_ray.config.run import BackboneName
from upreid_ray.core.augment import Normalization


def build_backbone(name: str, *, last_stride: int = 2) -> nn.Module:
    """Return a randomly initialized torchvision ResNet that outputs its features ``[B, F]``.

    Its state dict has torchvision's names without the classifier (``fc``). With last stride 1
    the last stage keeps the resolution of the one before.
    """
    backbone = getattr(torchvision.models, name)(weights=None)
    backbone.fc = nn.Identity()
    if last_stride == 1:
        for module in backbone.layer4.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
    return backbone


def num_features(backbone: nn.Module) -> int:
    """Return the length F of a backbone's features."""
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    return norms[-1].num_features


class NeckedBackbone(nn.Module):
    """A backbone followed by a batch normalization of its features.

    This is the BNNeck of Luo et al. 2019, https://arxiv.org/abs/1903.07071.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = nn.BatchNorm1d(num_features(backbone))
        self.neck.bias.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the normalized features ``[B, F]`` of images ``[B, 3, H, W]``."""
        return self.neck(self.backbone(images))


class Description(BaseModel):
    """Description of a backbone for those who load it (``backbone.json``).

    Attributes:
        backbone: Torchvision's name of the architecture.
        height: Height of the images that it was trained on, in pixels.
        width: Width of the images that it was trained on, in pixels.
        mean: Mean of each colour channel (0..1), which is subtracted first.
        std: Standard deviation of each colour channel, which divides the result.
        last_stride: Stride of the last stage; 1 if fine-tuning kept its resolution.
        has_neck: Whether a batch normalization follows (``neck.safetensors``).
    """

    model_config = ConfigDict(frozen=True)

    backbone: BackboneName
    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    last_stride: Literal[1, 2] = 2
    has_neck: bool = False

    @property
    def normalization(self) -> Normalization:
        """Normalization of the images that the backbone expects."""
        return Normalization(self.mean, self.std)

    def extractor(self, weights: dict[str, Tensor], neck: dict[str, Tensor]) -> nn.Module:
        """Return the module that computes features ``[B, F]`` of images ``[B, 3, H, W]``.

        Args:
            weights: State dict of the backbone, with torchvision's names.
            neck: State dict of the neck; empty if there is none.
        """
        backbone = build_backbone(self.backbone, last_stride=self.last_stride)
        backbone.load_state_dict(weights)
        if not self.has_neck:
            return backbone
        necked = NeckedBackbone(backbone)
        necked.neck.load_state_dict(neck)
        return necked
