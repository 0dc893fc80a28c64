"""The query encoder, the key encoder that follows it, the queue, and the objective.

Dimensions: B images of a group, P patches of an image, D embedding size.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.core.encoder import Encoder, checkpoint_activations, running_statistics
from upreid_ray.core.key_queue import KeyQueue
from upreid_ray.core.losses import global_consistency, info_nce, intrinsic_contrastive
from upreid_ray.core.precision import autocast


@dataclass(frozen=True)
class Views:
    """What one encoder sees of a group of images; terms of weight 0 leave their part out.

    Attributes:
        view: ``[B, 3, H, W]``, augmented and normalized.
        patches: ``[B, P, 3, h, w]``, cut from the augmented view, or None.
        original: ``[B, 3, H, W]``, normalized only, or None; for the key encoder alone.
    """

    view: Tensor
    patches: Tensor | None = None
    original: Tensor | None = None


class UPReID(nn.Module):
    """Pre-training with contrast and intra-identity regularization.

    Yang et al. 2022, https://arxiv.org/abs/2112.00317, on MoCo v2, Chen et al. 2020,
    https://arxiv.org/abs/2003.04297. Calling it gives the losses of the query encoder; the
    key encoder follows by `update_key_encoder` and never receives a gradient.
    """

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        self.loss = config.loss
        self.patches = config.patches
        self.precision = config.training.precision
        self.query_encoder = Encoder(config.model)
        self.key_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False)
        if config.training.activation_checkpointing:
            checkpoint_activations(self.query_encoder.backbone)
        self.queue = KeyQueue(config.model.queue_size, config.model.embedding_dim)

    def forward(
        self, views: Views, keys: Tensor, *, statistics_momentum: float
    ) -> dict[str, Tensor]:
        """Encode one group as queries and compare with its keys.

        Args:
            views: Of the B images of the group.
            keys: ``[B, E, D]`` from `encode_keys`, in the same order of images.
            statistics_momentum: With which the running statistics take in this group.

        Returns:
            ``loss``, the weighted sum, and each of its terms by name; all 0-dimensional.
        """
        terms = {}
        with autocast(views.view, self.precision):
            with running_statistics(self.query_encoder, momentum=statistics_momentum):
                query = self.query_encoder(views.view)
            terms["info_nce"] = info_nce(
                query, keys[:, 0], self.queue.keys, temperature=self.loss.temperature
            )
            if self.loss.consistency_weight > 0:
                terms["global_consistency"] = global_consistency(
                    query,
                    keys[:, 1],
                    self.queue.keys,
                    temperature=self.loss.consistency_temperature,
                    target_temperature=self.loss.consistency_target_temperature,
                )
            if views.patches is not None:
                query_patches = _encode_patches(self.query_encoder, views.patches)
        if views.patches is not None:
            # In fp32: patches may be very alike, and the least similar one is looked for.
            terms["intrinsic_contrastive"] = intrinsic_contrastive(
                query_patches,
                keys[:, -query_patches.shape[1] :],
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
    def encode_keys(self, views: Views, *, statistics_momentum: float) -> Tensor:
        """Encode one group with the key encoder, whose running statistics take it in too.

        Returns:
            ``[B, E, D]``: for each image the embeddings of its view, of its original if it has
            one, and of its P patches if it has them, in this order.
        """
        with autocast(views.view, self.precision):
            with running_statistics(self.key_encoder, momentum=statistics_momentum):
                parts = [self.key_encoder(views.view)[:, None]]
            if views.original is not None:
                with running_statistics(self.key_encoder, momentum=0):
                    parts.append(self.key_encoder(views.original)[:, None])
            if views.patches is not None:
                parts.append(_encode_patches(self.key_encoder, views.patches))
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def update_key_encoder(self, *, momentum: float) -> None:
        """Move the key encoder's weights to ``momentum * key + (1 - momentum) * query``."""
        average = get_ema_multi_avg_fn(momentum)  # type: ignore[no-untyped-call]
        average(
            list(self.key_encoder.parameters()), list(self.query_encoder.parameters()), None
        )


def _encode_patches(encoder: Encoder, patches: Tensor) -> Tensor:
    """Encode ``[B, P, 3, h, w]`` at native size as ``[B, P, D]``."""
    with running_statistics(encoder, momentum=0):
        return encoder(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
