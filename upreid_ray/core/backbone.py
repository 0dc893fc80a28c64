"""The backbone: a torchvision ResNet without its classifier, and files of its weights."""

from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torchvision
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file
from torch import Tensor, nn

from upreid_ray.config.errors import InputError, first_line
from upreid_ray.config.run import BackboneName
from upreid_ray.core.augment import Normalization
from upreid_ray.core.convolution import TrimmedConv2d

# Where tools keep the state dict in what they save: PyTorch's ImageNet example, MoCo and
# torchreid; fast-reid.
CONTAINERS = ("state_dict", "model")
# Every ResNet has these two, and no other part of a model of the field has both.
LANDMARKS = ("conv1.weight", "layer1.0.conv1.weight")
# Contrastive checkpoints hold the network twice; the query encoder is the one that is trained.
QUERY_ENCODERS = (".encoder_q.", ".query_encoder.")
# What stands behind the features, in torchvision, torchreid, fast-reid and BoT.
HEADS = ("fc", "classifier", "head", "heads", "bottleneck")


def build_backbone(name: str, *, last_stride: int = 2) -> nn.Module:
    """Return a randomly initialized torchvision ResNet whose output is its features ``[B, F]``.

    Its state dict has torchvision's names without the classifier (``fc``). With last stride 1
    the last stage keeps the resolution of the one before.
    """
    backbone = getattr(torchvision.models, name)(weights=None)
    backbone.fc = nn.Identity()
    for module in backbone.modules():
        if type(module) is nn.Conv2d:
            # Torchvision lets nobody choose its convolutions; weights and names stay.
            module.__class__ = TrimmedConv2d
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
    """A backbone whose features go through a batch normalization before they are compared.

    The BNNeck of Luo et al. 2019, https://arxiv.org/abs/1903.07071.
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
    """What the users of a backbone must know (``backbone.json``).

    Attributes:
        backbone: Torchvision's name of the architecture.
        height: Of the images it has seen, in pixels.
        width: Of the images it has seen, in pixels.
        mean: Subtracted from each colour channel (0..1).
        std: Divides each colour channel after that.
        last_stride: Of the last stage; 1 where fine-tuning kept its resolution.
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
        """Return what turns images ``[B, 3, H, W]`` into features ``[B, F]``.

        Args:
            weights: Of the backbone, torchvision's names.
            neck: Of the neck, empty if there is none.
        """
        backbone = build_backbone(self.backbone, last_stride=self.last_stride)
        backbone.load_state_dict(weights)
        if not self.has_neck:
            return backbone
        necked = NeckedBackbone(backbone)
        necked.neck.load_state_dict(neck)
        return necked


def read_backbone(file: str | Path) -> tuple[str, dict[str, Tensor]]:
    """Read the weights of a backbone in any of the field's formats.

    These are plain state dicts with torchvision's names (torchvision, timm, torchreid), and
    those inside a checkpoint or behind a prefix: of MoCo (``module.encoder_q.``), of fast-reid
    (``model``, ``backbone.``), of this package, of DataParallel (``module.``). Classifiers and
    everything outside the backbone are left out.

    Args:
        file: ``.safetensors``, or a PyTorch file, of which only tensors are read.

    Returns:
        Name of the architecture, and its whole state dict on the CPU, floating-point tensors
        in fp32.

    Raises:
        InputError: The file cannot be read, or what it holds is not a whole backbone.
    """
    state_dict = _read_state_dict(Path(file))
    prefixes = [
        name.removesuffix(LANDMARKS[1])
        for name in state_dict
        if name.endswith(LANDMARKS[1])
        and name.removesuffix(LANDMARKS[1]) + LANDMARKS[0] in state_dict
    ]
    of_query = [
        prefix for prefix in prefixes if any(name in f".{prefix}" for name in QUERY_ENCODERS)
    ]
    if not prefixes:
        first = ", ".join(sorted(state_dict)[:3])
        raise InputError(f"{file}: holds no ResNet; its first tensors are {first}")
    if len(prefixes) > 1 and len(of_query) != 1:
        raise InputError(f"{file}: holds several networks: {', '.join(sorted(prefixes))}")
    prefix = (of_query or prefixes)[0]
    weights = {
        name.removeprefix(prefix): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in state_dict.items()
        if name.startswith(prefix) and name.removeprefix(prefix).split(".")[0] not in HEADS
    }
    return _identify(file, weights)


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name."""
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path}: cannot be read as weights ({first_line(error)})") from error
    if isinstance(content, dict):
        for container in CONTAINERS:
            if isinstance(content.get(container), dict):
                content = content[container]
                break
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no state dict")
    return {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }


def _identify(file: str | Path, weights: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Return the architecture that these tensors are, all of them."""
    differing: dict[str, list[str]] = {}
    for architecture in get_args(BackboneName):
        with torch.device("meta"):
            expected = build_backbone(architecture).state_dict()
        # Files of before PyTorch 0.4.1 have no counters, and nothing reads them.
        counters = {
            name: torch.tensor(0) for name in expected if name.endswith("num_batches_tracked")
        }
        whole = counters | weights
        differing[architecture] = sorted(
            name
            for name in whole.keys() | expected.keys()
            if name not in whole
            or name not in expected
            or whole[name].shape != expected[name].shape
        )
        if not differing[architecture]:
            return architecture, whole
    nearest = min(differing, key=lambda name: len(differing[name]))
    names = differing[nearest]
    raise InputError(
        f"{file}: is most like a {nearest}, but {len(names)} of its tensors are missing or "
        f"different, such as {', '.join(names[:3])}"
    )
