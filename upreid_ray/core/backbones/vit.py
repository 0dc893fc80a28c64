"""Vision Transformers of timm (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929).

Dimensions: B images, F features, N positions of tokens.
"""

import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed
from torch import Tensor, nn

from upreid_ray.core.backbones import HEADS, Backbone, Constructor, Family, Size
from upreid_ray.core.backbones.resnet_ibn import IBN
from upreid_ray.core.backbones.timm_models import PREFIX, is_vision_transformer

STEM = "_ics"
PARTS = "_pass"
NUM_PARTS = 3
STEM_WIDTH = 64
# Height / width of the grids of positions in public files: 224x224, 256x128 and 384x128 pixels.
RATIOS = (1, 2, 3)


class ConvolutionalEmbedding(PatchEmbed):
    """Convolutions with IBN before the projection of patches, at half of the resolution.

    This is the stem "ICS" of TransReID-SSL (Luo et al. 2021, https://arxiv.org/abs/2111.12084),
    with the tensor names of its code.
    """

    def __init__(self, *, embed_dim: int, **options: Any) -> None:  # noqa: ANN401, timm's
        super().__init__(embed_dim=embed_dim, **options)
        self.conv = nn.Sequential(
            nn.Conv2d(3, STEM_WIDTH, 7, stride=2, padding=3, bias=False),
            IBN(STEM_WIDTH),
            nn.ReLU(inplace=True),
            nn.Conv2d(STEM_WIDTH, STEM_WIDTH, 3, padding=1, bias=False),
            IBN(STEM_WIDTH),
            nn.ReLU(inplace=True),
            nn.Conv2d(STEM_WIDTH, STEM_WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(STEM_WIDTH),
            nn.ReLU(inplace=True),
        )
        self.proj = nn.Conv2d(STEM_WIDTH, embed_dim, 8, stride=8)

    def forward(self, images: Tensor) -> Tensor:
        """Return the tokens of ``images [B, 3, H, W]``: ``[B, H / 16, W / 16, F]``."""
        maps = self.proj(self.conv(images))
        return maps.permute(0, 2, 3, 1)


class VisionTransformers(Family):
    """Timm's Vision Transformers, and the variants with a stem and with tokens of body parts.

    The feature is what timm pools, which is the class token of the named ones. An image of
    another size than that of the training gets the positions of the training, interpolated; so
    do the patches of the intrinsic contrastive loss.
    """

    names = tuple(
        f"vit_{width}_patch16{variant}"
        for variant in ("", STEM, PARTS)
        for width in ("tiny", "small", "base")
    )

    drop_path = 0.1

    def has(self, name: str) -> bool:
        """Return whether this is one of the names, or a Vision Transformer of timm."""
        return name in self.names or (
            name.startswith(PREFIX) and is_vision_transformer(name.removeprefix(PREFIX))
        )

    def build(self, name: str, *, size: Size, last_stride: int, drop_path: float) -> Backbone:
        """Return a Vision Transformer, which pads images to whole tokens."""
        variant: dict[str, Any] = {}
        if name.endswith(STEM):
            variant = {"embed_layer": ConvolutionalEmbedding}
        if name.endswith(PARTS):
            variant = {"reg_tokens": NUM_PARTS, "no_embed_class": True}
        return timm.create_model(
            _name_in_timm(name),
            img_size=size,
            dynamic_img_size=True,
            dynamic_img_pad=True,
            num_classes=0,
            drop_path_rate=drop_path,
            **variant,
        )

    def blocks(self, backbone: Backbone) -> Iterator[nn.Module]:
        """Yield the blocks of attention and MLP."""
        yield from backbone.blocks

    def frozen(self, backbone: Backbone) -> Iterator[nn.Parameter]:
        """Yield the projection of patches, unless a stem is before it.

        It is left as it is, as in MoCo v3 (Chen et al. 2021, https://arxiv.org/abs/2104.02057),
        which makes training stable.
        """
        if not isinstance(backbone.patch_embed, ConvolutionalEmbedding):
            yield from backbone.patch_embed.parameters()

    def check_size(self, name: str, size: Size, *, of_patches: bool = False) -> None:
        """Check that tokens fill the image, or that a patch has a token at least."""
        height, width = size
        token, _ = _layout(name)
        if of_patches and min(size) < token:
            raise ValueError(f"takes patches of at least {token} pixels, not {height}x{width}")
        if not of_patches and (height % token or width % token):
            raise ValueError(
                f"takes images whose height and width are multiples of {token}, not "
                f"{height}x{width}"
            )

    def landmarks(self, name: str | None = None) -> tuple[str, ...]:
        """Return the embedding of patches and the first attention."""
        return ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight")

    def heads(self, name: str) -> tuple[str, ...]:
        """Return the usual heads, and the token of masked patches (iBOT, PersonViT, DINOv2)."""
        return (*HEADS, "mask_token")

    def translate(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the chunked blocks of DINOv2 and the tokens of PASS as timm names them.

        PASS (Zhu et al. 2022, https://arxiv.org/abs/2203.03931) adds positions to the tokens of
        class and parts too. Here these tokens hold the sums.
        """
        chunked = r"((?:^|\.)blocks\.)\d+\.(\d+\.)"
        tensors = {re.sub(chunked, r"\1\2", name): each for name, each in tensors.items()}
        for last in [name for name in tensors if f".{name}".endswith(f".part{NUM_PARTS}_pos")]:
            prefix = last.removesuffix(f"part{NUM_PARTS}_pos")
            tokens = [(f"{prefix}cls_token", f"{prefix}cls_pos")] + [
                (f"{prefix}part_token{part}", f"{prefix}part{part}_pos")
                for part in range(1, NUM_PARTS + 1)
            ]
            if all(name in tensors for pair in tokens for name in pair):
                sums = [tensors.pop(token) + tensors.pop(place) for token, place in tokens]
                tensors[f"{prefix}cls_token"] = sums[0]
                tensors[f"{prefix}reg_token"] = torch.cat(sums[1:], dim=1)
        return tensors

    def fit(
        self, name: str, weights: dict[str, Tensor], size: Size, *, old_size: Size | None = None
    ) -> dict[str, Tensor]:
        """Interpolate the positions to the size of the images.

        Without ``old_size``, the grid of the positions is as wide as it is high, or else twice
        or three times as high, as in the public files.
        """
        positions = weights.get("pos_embed")
        if positions is None or positions.ndim != len("1NF"):
            return weights
        token, num_others = _layout(name)
        grid = (size[0] // token, size[1] // token)
        if old_size is None:
            old = _grid(positions.shape[1] - num_others, grid)
        else:
            old = (old_size[0] // token, old_size[1] // token)
        if old is None or old == grid:
            return weights
        resized = resample_abs_pos_embed(
            positions, list(grid), old_size=list(old), num_prefix_tokens=num_others
        )
        return weights | {"pos_embed": resized}

    def constructors(self, name: str, size: Size) -> Mapping[str, Constructor]:
        """Return the constructor of timm, which has no such stem."""
        if name.endswith(STEM):
            return {}
        parts = f", reg_tokens={NUM_PARTS}, no_embed_class=True" if name.endswith(PARTS) else ""
        text = f"{_name_in_timm(name)!r}, num_classes=0, img_size={size}, dynamic_img_size=True"
        return {"timm": Constructor(f"{text}{parts}")}


def _name_in_timm(name: str) -> str:
    if name.startswith(PREFIX):
        return name.removeprefix(PREFIX)
    return f"{name.removesuffix(STEM).removesuffix(PARTS)}_224"


@cache
def _layout(name: str) -> tuple[int, int]:
    """Return the width of a token in pixels, and the number of positions of other tokens."""
    with torch.device("meta"):
        model = FAMILY.build(name, size=(224, 224), last_stride=2, drop_path=0)
    return model.patch_embed.patch_size[0], model.pos_embed.shape[
        1
    ] - model.patch_embed.num_patches


def _grid(num_tokens: int, grid: Size) -> Size | None:
    """Return rows and columns of a grid of positions; None if they cannot be told."""
    if num_tokens == math.prod(grid):
        return grid
    for ratio in RATIOS:
        columns = math.isqrt(max(num_tokens, 0) // ratio)
        if columns and ratio * columns**2 == num_tokens:
            return ratio * columns, columns
    return None


FAMILY = VisionTransformers()
