"""ResNets with instance and batch normalization (Pan et al. 2018, arXiv 1807.09441)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from upreid_ray.core.backbones import Backbone, Constructor, Size
from upreid_ray.core.backbones.resnet import ResNets

SUFFIX = "_ibn_a"


class IBN(nn.Module):
    """Instance normalization of the first half of the channels, and batch norm of the rest."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        half = num_channels // 2
        self.IN = nn.InstanceNorm2d(half, affine=True)
        self.BN = nn.BatchNorm2d(half)

    def forward(self, maps: Tensor) -> Tensor:
        """Normalize ``maps [B, C, h, w]``."""
        instances, batch = maps.chunk(2, dim=1)
        # This is instance normalization. PyTorch's own refuses the one pixel that the third
        # stage makes of a small patch; its normalized value is zero.
        normalized = torch.group_norm(
            instances, self.IN.num_features, self.IN.weight, self.IN.bias, self.IN.eps
        )
        return torch.cat([normalized.to(maps.dtype), self.BN(batch)], dim=1)


class ResNetsIBN(ResNets):
    """ResNets of type IBN-a, with the tensor names of the authors' files.

    The first normalization of each block of the first three stages is an `IBN`. fast-reid and
    CION use the same names.
    """

    names = tuple(f"resnet{depth}{SUFFIX}" for depth in (18, 34, 50, 101, 152))

    def build(self, name: str, *, size: Size, last_stride: int, drop_path: float) -> Backbone:
        """Return a ResNet-IBN-a; it takes images of any size."""
        backbone = super().build(
            name.removesuffix(SUFFIX), size=size, last_stride=last_stride, drop_path=drop_path
        )
        for stage in (backbone.layer1, backbone.layer2, backbone.layer3):
            for block in self.blocks(stage):
                block.bn1 = IBN(block.bn1.num_features)
        return backbone

    def landmarks(self, name: str | None = None) -> tuple[str, ...]:
        """Return a tensor of the stem and one of the first block."""
        return ("conv1.weight", "layer1.0.bn1.IN.weight")

    def constructors(self, name: str, size: Size) -> Mapping[str, Constructor]:
        """Return the constructors of IBN-Net (by torch.hub) and fast-reid."""
        depth = name.removeprefix("resnet").removesuffix(SUFFIX)
        words = f"MODEL.BACKBONE.DEPTH {depth}x MODEL.BACKBONE.WITH_IBN True"
        hub = f"torch.hub.load('XingangPan/IBN-Net', {name!r})"
        return {
            "ibn-net": Constructor(hub, ("fc.weight", "fc.bias")),
            "fastreid": Constructor(words),
        }


FAMILY = ResNetsIBN()
