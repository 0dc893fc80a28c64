"""The keys of past batches, which serve as negatives."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeyQueue(nn.Module):
    """The last ``size`` keys, first in first out, for batches of any size.

    It starts with random directions, as MoCo's queue does (He et al. 2020,
    https://arxiv.org/abs/1911.05722). ``keys`` is a ring buffer: the order of its rows has no
    meaning.

    Attributes:
        keys: ``[size, dim]``, unit length.
        oldest: ``[]``, int64, the row that the next key replaces.
    """

    keys: Tensor
    oldest: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, batch: Tensor, *, is_skipped: Tensor | bool = False) -> None:
        """Replace the oldest keys by ``batch [B, dim]``; if B > size, the last keys stay.

        With ``is_skipped []`` (bool), on the device of the queue, nothing changes.
        """
        size = len(self.keys)
        batch = batch[-size:]
        # The ring position stays on the device: reading it here would stall the step.
        rows = (self.oldest + torch.arange(len(batch), device=self.keys.device)) % size
        is_skipped = torch.as_tensor(is_skipped, device=self.keys.device)
        self.keys[rows] = torch.where(is_skipped, self.keys[rows], batch.to(self.keys.dtype))
        self.oldest.add_(len(batch) * ~is_skipped).remainder_(size)
