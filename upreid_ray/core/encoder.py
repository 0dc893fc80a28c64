"""The encoder: a backbone and a projection head.

Dimensions: B images, F features of the backbone, D embedding size.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from upreid_ray.config.errors import InputError
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.core.backbone import build_for_training
from upreid_ray.core.weight_files import FoundBackbone, read_backbone

ModuleT = TypeVar("ModuleT", bound=nn.Module)

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# Ends of the names of BatchNorm's buffers.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Encoder(nn.Module):
    """Module that computes unit-length embeddings ``[B, D]`` of images ``[B, 3, h, w]``.

    The projection head has two layers, as in MoCo v2 (Chen et al. 2020,
    https://arxiv.org/abs/2003.04297).
    """

    def __init__(self, config: PretrainConfig) -> None:
        """Make the query encoder with its initial weights."""
        super().__init__()
        model = config.model
        self.backbone = build_for_training(config)
        if (found := read_pretrained(config)) is not None:
            self.backbone.load_state_dict(found.weights)
        width = self.backbone.num_features
        self.projection_head = nn.Sequential(
            nn.Linear(width, width),
            nn.ReLU(inplace=True),
            nn.Linear(width, model.embedding_dim),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings of normalized images, in fp32 even under autocast."""
        return F.normalize(self.projection_head(self.backbone(images)).float(), dim=1)


def read_pretrained(config: PretrainConfig) -> FoundBackbone | None:
    """Read the weights of ``--model.pretrained``; return None without it.

    Raises:
        InputError: They cannot be read, or are of another architecture.
    """
    model, size = config.model, (config.data.height, config.data.width)
    if model.pretrained is None:
        return None
    found = read_backbone(model.pretrained, expected=model.backbone, size=size)
    if found.name != model.backbone:
        raise InputError(
            f"--model.backbone {model.backbone}: --model.pretrained {model.pretrained} "
            f"is a {found.name}"
        )
    return found


@contextmanager
def running_statistics(encoder: nn.Module, *, momentum: float) -> Iterator[None]:
    """Use ``momentum`` for BatchNorm's running statistics during the one forward pass inside.

    Normalization is by the statistics of the batch either way. With ``momentum=0`` the running
    statistics stay as they are, as patches and originals need it: their statistics differ from
    those of whole augmented images, which are exported.
    """
    norms: list[Any] = [each for each in encoder.modules() if isinstance(each, BATCH_NORMS)]
    momenta = [norm.momentum for norm in norms]
    running = [(norm.running_mean, norm.running_var) for norm in norms]
    counts = [norm.num_batches_tracked for norm in norms]
    for norm in norms:
        # The pass writes its own statistics to other tensors, and they are averaged afterwards.
        # If the pass did that, an encoder would be compiled again for each momentum.
        norm.momentum, norm.num_batches_tracked = 1.0, None
        norm.running_mean = torch.zeros_like(norm.running_mean)
        norm.running_var = torch.zeros_like(norm.running_var)
    try:
        yield
        if momentum > 0 and norms:
            seen = [each for norm in norms for each in (norm.running_mean, norm.running_var)]
            average = get_ema_multi_avg_fn(1 - momentum)  # type: ignore[no-untyped-call]
            average([each for pair in running for each in pair], seen, None)
            for count in counts:
                count.add_(1)
    finally:
        for norm, past, pair, count in zip(norms, momenta, running, counts, strict=True):
            norm.momentum, norm.num_batches_tracked = past, count
            norm.running_mean, norm.running_var = pair


class StatisticsCopy:
    """A copy of BatchNorm's running statistics, with which a step can be taken back."""

    def __init__(self, module: nn.Module) -> None:
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for name, buffer in module.named_buffers():
            if name.endswith(STATISTICS):
                by_type.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = list(by_type.values())
        self._copies = [_flatten(buffers) for buffers in self._buffers]

    def restore(self, *, where: Tensor) -> None:
        """Restore the statistics if ``where []`` (bool) is true; the device decides.

        Values that are not finite are replaced as well, which no arithmetic would do.
        """
        for buffers, copy in zip(self._buffers, self._copies, strict=True):
            chosen = torch.where(where, copy, _flatten(buffers))
            parts = torch.split(chosen, [buffer.numel() for buffer in buffers])
            for buffer, part in zip(buffers, parts, strict=True):
                buffer.copy_(part.view_as(buffer))


def _flatten(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def checkpoint_activations(blocks: Iterable[nn.Module]) -> None:
    """Let blocks of a backbone keep only their input, and compute the rest again in backward.

    The result is the same (Chen et al. 2016, https://arxiv.org/abs/1604.06174).
    """
    for block in blocks:
        block.forward = partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            preserve_rng_state=has_stochastic_depth(block),
            context_fn=partial(_contexts, block),
        )


def has_stochastic_depth(module: nn.Module) -> bool:
    """Return whether a forward pass leaves out blocks at random."""
    return any(getattr(each, "drop_prob", 0) for each in module.modules())


def without_stochastic_depth(module: ModuleT) -> ModuleT:
    """Let a module keep all its blocks, and return it."""
    each: Any
    for each in module.modules():
        if hasattr(each, "drop_prob"):
            each.drop_prob = 0.0
    return module


def has_batch_statistics(module: nn.Module) -> bool:
    """Return whether the result for an image depends on the others of its batch."""
    return any(isinstance(each, BATCH_NORMS) for each in module.modules())


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], ...]:
    """Return the contexts of both forward passes; only the first one updates statistics."""
    return nullcontext(), running_statistics(block, momentum=0)


def group_momentum(index: int, num_groups: int, *, momentum: float = 0.1) -> float:
    """Return the momentum with which group ``index`` updates the running statistics.

    With it, groups that one process computes one after the other leave the same running
    statistics as groups that as many processes compute at once and average: each group has a
    weight of ``momentum / num_groups``, the past one of ``1 - momentum``. The formula is ours.

    Args:
        index: Position of the group among those of this process, from 0 on.
        num_groups: Number of groups of this process.
        momentum: Momentum of the whole batch.
    """
    return momentum / (num_groups - momentum * (num_groups - 1 - index))
