"""ResNets of torchvision (He et al. 2016, https://arxiv.org/abs/1512.03385)."""

import re
from collections.abc import Iterator, Mapping
from typing import Literal

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from upreid_ray.config.errors import InputError
from upreid_ray.core.backbones import Backbone, Constructor, Family, Size

# Names of a ResNet's parts where it was made a torch.nn.Sequential, as lightly's examples do.
SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3"} | {
    "7": "layer4"
}


class ResNets(Family):
    """Torchvision's ResNets, whose state dicts have torchvision's names without ``fc``."""

    names: tuple[str, ...] = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
    optimizer: Literal["sgd", "adamw"] = "sgd"
    has_last_stride = True

    def build(self, name: str, *, size: Size, last_stride: int, drop_path: float) -> Backbone:
        """Return a ResNet; it takes images of any size."""
        if drop_path:
            raise InputError(f"--model.drop_path {drop_path:g}: {name} has no stochastic depth")
        backbone = getattr(torchvision.models, name)(weights=None)
        backbone.num_features = backbone.fc.in_features
        backbone.fc = nn.Identity()
        if last_stride == 1:
            for module in backbone.layer4.modules():
                if isinstance(module, nn.Conv2d):
                    module.stride = (1, 1)
        return backbone

    def blocks(self, backbone: Backbone) -> Iterator[Backbone]:
        """Yield the residual blocks."""
        for module in backbone.modules():
            if isinstance(module, (BasicBlock, Bottleneck)):
                yield module

    def landmarks(self, name: str | None = None) -> tuple[str, ...]:
        """Return a tensor of the stem and one of the first block."""
        return ("conv1.weight", "layer1.0.bn1.weight")

    def translate(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Name the parts of ResNets that were built as a ``torch.nn.Sequential``."""
        first, block = "0.weight", "4.0.conv1.weight"
        prefixes = [
            name.removesuffix(block)
            for name in tensors
            if re.search(rf"(^|\.){re.escape(block)}$", name)
            and name.removesuffix(block) + first in tensors
        ]
        for prefix in prefixes:
            named = {}
            for name, tensor in tensors.items():
                number, _, rest = name.removeprefix(prefix).partition(".")
                is_part = name.startswith(prefix) and number in SEQUENTIAL
                named[f"{prefix}{SEQUENTIAL[number]}.{rest}" if is_part else name] = tensor
            tensors = named
        return tensors

    def constructors(self, name: str, size: Size) -> Mapping[str, Constructor]:
        """Return the constructors of torchvision, timm, fast-reid and torchreid."""
        head = ("fc.weight", "fc.bias")
        return {
            "torchvision": Constructor(f"torchvision.models.{name}()", head),
            "timm": Constructor(f"{name!r}, num_classes=0", head),
            "fastreid": Constructor(f"MODEL.BACKBONE.DEPTH {name.removeprefix('resnet')}x"),
            "torchreid": Constructor(name, ("classifier.weight", "classifier.bias")),
        }


FAMILY = ResNets()
