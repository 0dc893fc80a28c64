"""The query encoder, the key encoder that follows it, the queue, and the objective.

Which parts of an image the terms need is decided by `LossConfig`: what no term needs is None in
`Views` and in `Keys`, and is neither drawn nor encoded.

Dimensions: B images, P patches of an image, E embeddings of an image, D embedding size.
"""

import copy
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from upreid_ray.config.pretrain import LossConfig, PretrainConfig
from upreid_ray.core import backbones
from upreid_ray.core.encoder import (
    Encoder,
    checkpoint_activations,
    has_batch_statistics,
    has_stochastic_depth,
    running_statistics,
    without_stochastic_depth,
)
from upreid_ray.core.key_queue import KeyQueue
from upreid_ray.core.losses import global_consistency, info_nce, intrinsic_contrastive
from upreid_ray.core.precision import autocast


@dataclass(frozen=True)
class Views:
    """Images as one encoder sees them.

    Attributes:
        view: ``[B, 3, H, W]``, augmented and normalized.
        patches: ``[B, P, 3, h, w]``, cut from the augmented view, or None.
        original: ``[B, 3, H, W]``, normalized only, or None. Only the key encoder sees it.
    """

    view: Tensor
    patches: Tensor | None = None
    original: Tensor | None = None


@dataclass(frozen=True)
class Keys:
    """Embeddings of images by the key encoder, of unit length.

    Attributes:
        view: ``[B, D]``, embeddings of the augmented views.
        original: ``[B, D]``, embeddings of the images without augmentation, or None.
        patches: ``[B, P, D]``, embeddings of the patches, or None; by the query encoder if
            ``patches.key_encoder`` says so.
    """

    view: Tensor
    original: Tensor | None = None
    patches: Tensor | None = None

    def pack(self) -> Tensor:
        """Return all embeddings in one tensor ``[B, E, D]``, to be sent at once."""
        parts = [self.view[:, None]]
        if self.original is not None:
            parts.append(self.original[:, None])
        if self.patches is not None:
            parts.append(self.patches)
        return torch.cat(parts, dim=1)

    @classmethod
    def unpack(cls, packed: Tensor, loss: LossConfig) -> Self:
        """Return what `pack` has packed; the fields share the memory of ``packed``."""
        first_patch = 2 if loss.needs_originals else 1
        return cls(
            view=packed[:, 0],
            original=packed[:, 1] if loss.needs_originals else None,
            patches=packed[:, first_patch:] if loss.needs_patches else None,
        )

    def rows(self, index: slice) -> Self:
        """Return the embeddings of the images at ``index``."""
        return type(self)(
            self.view[index],
            None if self.original is None else self.original[index],
            None if self.patches is None else self.patches[index],
        )


class UPReID(nn.Module):
    """Pre-training by instance contrast and intra-identity regularization.

    UP-ReID (Yang et al. 2022, https://arxiv.org/abs/2112.00317), which extends MoCo v2 (Chen et
    al. 2020, https://arxiv.org/abs/2003.04297). Calling the module returns the losses of the
    query encoder. The key encoder never receives a gradient; `update_key_encoder` moves it.
    """

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        self.loss = config.loss
        self.patches = config.patches
        self.precision = config.training.precision
        self.query_encoder = Encoder(config)
        self.key_encoder = without_stochastic_depth(
            copy.deepcopy(self.query_encoder).requires_grad_(False)
        )
        self.has_batch_statistics = has_batch_statistics(self.query_encoder)
        self.has_stochastic_depth = has_stochastic_depth(self.query_encoder)
        if config.training.activation_checkpointing:
            family = backbones.find(config.model.backbone)
            checkpoint_activations(family.blocks(self.query_encoder.backbone))
        self.queue = KeyQueue(config.model.queue_size, config.model.embedding_dim)

    def forward(
        self, views: Views, keys: Keys, *, statistics_momentum: float
    ) -> dict[str, Tensor]:
        """Encode one group of images as queries, and compare them with their keys.

        Args:
            views: The query encoder's views of the B images of the group.
            keys: Keys of the same images, in the same order.
            statistics_momentum: Momentum of the update of the running statistics.

        Returns:
            ``loss``, the weighted sum, and each of its terms by name; all 0-dimensional.
        """
        terms = {}
        with autocast(views.view, self.precision):
            with running_statistics(self.query_encoder, momentum=statistics_momentum):
                query = self.query_encoder(views.view)
            terms["info_nce"] = info_nce(
                query, keys.view, self.queue.keys, temperature=self.loss.temperature
            )
            if keys.original is not None:
                terms["global_consistency"] = global_consistency(
                    query,
                    keys.original,
                    self.queue.keys,
                    temperature=self.loss.consistency_temperature,
                    target_temperature=self.loss.consistency_target_temperature,
                )
            if views.patches is not None:
                query_patches = _encode_patches(self.query_encoder, views.patches)
        if views.patches is not None and keys.patches is not None:
            # In fp32: patches may be very alike, and the least similar one is looked for.
            terms["intrinsic_contrastive"] = intrinsic_contrastive(
                query_patches,
                keys.patches,
                rows=self.patches.rows,
                columns=self.patches.columns,
                temperature=self.loss.intrinsic_temperature,
                mining=self.patches.mining,
            )
        loss = terms["info_nce"]
        if "global_consistency" in terms:
            loss = loss + self.loss.consistency_weight * terms["global_consistency"]
        if "intrinsic_contrastive" in terms:
            loss = loss + self.loss.intrinsic_weight * terms["intrinsic_contrastive"]
        return {"loss": loss, **terms}

    @torch.no_grad()
    def encode_keys(self, views: Views, *, statistics_momentum: float) -> Keys:
        """Encode one group of images as keys.

        The key encoder lags behind: in a run of a few hundred steps its weights stay mostly
        random, and patches that it encodes carry little information. Patches need no queue of
        consistent keys, so the query encoder may encode them too (``patches.key_encoder``; the
        choice is ours).

        Args:
            views: The key encoder's views of the images of the group.
            statistics_momentum: Momentum of the update of the running statistics.
        """
        original = patches = None
        with autocast(views.view, self.precision):
            with running_statistics(self.key_encoder, momentum=statistics_momentum):
                view = self.key_encoder(views.view)
            if views.original is not None:
                with running_statistics(self.key_encoder, momentum=0):
                    original = self.key_encoder(views.original)
            if views.patches is not None:
                by_query = self.patches.key_encoder == "query"
                encoder = self.query_encoder if by_query else self.key_encoder
                patches = _encode_patches(encoder, views.patches)
        return Keys(view, original, patches)

    @torch.no_grad()
    def update_key_encoder(self, *, momentum: float, is_skipped: Tensor | bool = False) -> None:
        """Set the key encoder's weights to ``momentum * key + (1 - momentum) * query``.

        With ``is_skipped []`` (bool), on the device of the encoders, nothing changes.
        """
        weights: dict[torch.dtype, Tensor] = {}
        for key, query in zip(
            self.key_encoder.parameters(), self.query_encoder.parameters(), strict=True
        ):
            if key.dtype not in weights:
                is_taken = ~torch.as_tensor(is_skipped, device=key.device)
                weights[key.dtype] = (is_taken.double() * (1 - momentum)).to(key.dtype)
            key.lerp_(query, weights[key.dtype])


def _encode_patches(encoder: Encoder, patches: Tensor) -> Tensor:
    """Return the embeddings ``[B, P, D]`` of ``patches [B, P, 3, h, w]`` at their own size."""
    with running_statistics(encoder, momentum=0):
        return encoder(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
