"""Other models of timm that pool their features (https://github.com/huggingface/pytorch-image-models)."""

import difflib
from collections.abc import Iterator, Mapping
from functools import cache

import timm
import torch
from torch import nn

from upreid_ray.config.errors import InputError, first_line
from upreid_ray.core.backbones import DEFAULT_SIZE, Backbone, Constructor, Family, Size

PREFIX = "timm/"


class TimmModels(Family):
    """The models of timm, named ``timm/NAME``, except for Vision Transformers."""

    names = ("timm/NAME",)

    def has(self, name: str) -> bool:
        """Return whether timm has such a model, without looking on the network.

        Raises:
            InputError: The name begins with ``timm/``, but timm has no such model.
        """
        if not name.startswith(PREFIX) or name in self.names:
            return False
        in_timm = name.removeprefix(PREFIX)
        if not timm.is_model(in_timm):
            near = difflib.get_close_matches(in_timm, timm.list_models(), n=1)
            hint = f"; did you mean {PREFIX}{near[0]}?" if near else ""
            raise InputError(f"{name}: timm has no such model{hint}")
        return not is_vision_transformer(in_timm)

    def build(self, name: str, *, size: Size, last_stride: int, drop_path: float) -> Backbone:
        """Return a model of timm, which may take some sizes of images only."""
        options = {"drop_path_rate": drop_path} if drop_path else {}
        try:
            backbone = timm.create_model(name.removeprefix(PREFIX), num_classes=0, **options)
        except TypeError as error:
            raise InputError(
                f"--model.drop_path {drop_path:g}: {name} has no stochastic depth "
                f"({first_line(error)})"
            ) from error
        backbone.num_features = backbone.head_hidden_size
        return backbone

    def blocks(self, backbone: Backbone) -> Iterator[nn.Module]:
        """Yield the parts of the stages, or whole stages where they are no plain sequence."""
        for part in backbone.children():
            if isinstance(part, nn.Sequential):
                yield from part
            elif sum(isinstance(each, nn.Conv2d) for each in part.modules()) > 1:
                yield part

    def check_size(self, name: str, size: Size, *, of_patches: bool = False) -> None:
        """Check that the model computes pooled features of such images; nothing is computed."""
        height, width = size
        try:
            shape = _shape_of_features(name, size)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"cannot take images of {height}x{width} ({first_line(error)})"
            ) from error
        if len(shape) != len("BF"):
            raise ValueError(f"pools no features: they have the shape {shape}")

    def landmarks(self, name: str | None = None) -> tuple[str, ...]:
        """Return the first and the last tensor of the model."""
        if name is None:
            return ()
        with torch.device("meta"):
            tensors = list(
                self.build(name, size=DEFAULT_SIZE, last_stride=2, drop_path=0).state_dict()
            )
        return tensors[0], tensors[-1]

    def heads(self, name: str) -> tuple[str, ...]:
        """Return the classifier of the model."""
        head = timm.get_pretrained_cfg_value(name.removeprefix(PREFIX), "classifier")
        return (head,) if isinstance(head, str) else tuple(head or ())

    def constructors(self, name: str, size: Size) -> Mapping[str, Constructor]:
        """Return the constructor of timm."""
        return {"timm": Constructor(f"{name.removeprefix(PREFIX)!r}, num_classes=0")}


def is_vision_transformer(name: str) -> bool:
    """Return whether timm has a Vision Transformer of this name."""
    return timm.models.is_model_in_modules(name, {"vision_transformer"})


@cache
def _shape_of_features(name: str, size: Size) -> tuple[int, ...]:
    with torch.device("meta"):
        model = FAMILY.build(name, size=size, last_stride=2, drop_path=0).eval()
        return tuple(model(torch.zeros(2, 3, *size)).shape)


FAMILY = TimmModels()
