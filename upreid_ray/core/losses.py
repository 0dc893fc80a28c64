"""The terms of the objectives, each a pure function of its inputs.

The paper (Yang et al. 2022, https://arxiv.org/abs/2112.00317) asks for the two I2 terms in
words; the formulas of `global_consistency` and `intrinsic_contrastive` are ours.

Dimensions: B images, D embedding size, Q keys in the queue, R rows x C columns of patches,
P = R * C patches of an image in row-major order. All embeddings have unit length.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(query: Tensor, key: Tensor, queue: Tensor, *, temperature: float) -> Tensor:
    """Contrast each query with its own key against every key in the queue.

    Equation 1 of He et al. 2020, https://arxiv.org/abs/1911.05722: cross-entropy over
    ``1 + Q`` cosine similarities, the positive first.

    Args:
        query: ``[B, D]``, carries the gradient.
        key: ``[B, D]``, row ``i`` is the other view of ``query[i]``.
        queue: ``[Q, D]``, keys of other images.
        temperature: Divides the similarities.

    Returns:
        The mean over B in nats; ``log(1 + Q)`` if all similarities are equal.
    """
    positive = (query * key).sum(dim=1, keepdim=True) / temperature
    logits = torch.cat([positive, _logits(query, queue, temperature)], dim=1)
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


def global_consistency(
    augmented: Tensor,
    original: Tensor,
    queue: Tensor,
    *,
    temperature: float,
    target_temperature: float,
) -> Tensor:
    """Make an augmented view as similar to the queue as its original image is.

    The paper asks that the distance between the similarities of augmented and of original
    images be narrowed in distribution (abstract); the formula is ours: the KL divergence of
    two softmax distributions over the queue, as ReSSL (https://arxiv.org/abs/2107.09282) and
    CO2 (https://arxiv.org/abs/2010.02217) use between two augmented views.

    Args:
        augmented: ``[B, D]``, carries the gradient.
        original: ``[B, D]``, embeddings of the images without augmentation; the target.
        queue: ``[Q, D]``.
        temperature: Temperature of the augmented view's softmax (the prediction).
        target_temperature: Temperature of the original's softmax (the target); a lower one is
            sharper.

    Returns:
        The mean over B of ``KL(target || prediction)`` in nats; 0 if both distributions agree.
    """
    target = F.log_softmax(_logits(original.detach(), queue, target_temperature), dim=1)
    prediction = F.log_softmax(_logits(augmented, queue, temperature), dim=1)
    return F.kl_div(prediction, target, reduction="batchmean", log_target=True)


def intrinsic_contrastive(
    query_patches: Tensor,
    key_patches: Tensor,
    *,
    rows: int,
    columns: int,
    temperature: float,
    mining: Literal["symmetry", "none"],
) -> Tensor:
    """Contrast the patches of two views of the same image.

    The paper asks for a contrast among the patches of one image whose hard examples are mined
    from the left-right symmetry of the body (abstract); the formula is ours. With
    ``mining="symmetry"`` the positive of a query patch is the *least similar* key patch of its
    row, its own cell included, and the negatives are the key patches of all other rows; a
    flip of either view leaves the loss unchanged. With ``mining="none"`` the positive is the
    key patch of the same cell, and all other cells are negatives.

    Args:
        query_patches: ``[B, P, D]``, carry the gradient.
        key_patches: ``[B, P, D]``, patches of the other view.
        rows: R.
        columns: C.
        temperature: Divides the similarities.
        mining: How positive and negatives are chosen.

    Returns:
        The mean over B and P of the cross-entropy in nats; ``log(1 + number of negatives)``
        if all similarities are equal.

    Raises:
        ValueError: The grid does not match P, or leaves no negatives.
    """
    num_patches = query_patches.shape[1]
    if rows * columns != num_patches:
        raise ValueError(f"a grid of {rows}x{columns} does not have {num_patches} patches")
    num_alike = 1 if mining == "none" else columns
    if num_alike == num_patches:
        raise ValueError(f"a grid of {rows}x{columns} has no negatives for mining={mining!r}")
    kind = torch.arange(num_patches, device=query_patches.device) // num_alike
    positive = kind[:, None] == kind[None, :]  # [P, P], query patch by key patch

    similarity = query_patches @ key_patches.transpose(1, 2) / temperature  # [B, P, P]
    hardest = similarity.masked_fill(~positive, torch.inf).amin(dim=2, keepdim=True)
    negatives = similarity.masked_fill(positive, -torch.inf)
    logits = torch.cat([hardest, negatives], dim=2)
    return (logits.logsumexp(dim=2) - hardest.squeeze(2)).mean()


def batch_hard_triplet(features: Tensor, pids: Tensor, *, margin: float) -> Tensor:
    """Contrast each image with the farthest one of its person and the nearest one of another.

    Hermans et al. 2017, https://arxiv.org/abs/1703.07737, with a hard margin.

    Args:
        features: ``[B, F]``, any length.
        pids: ``[B]``, at least two persons.
        margin: Margin of the Euclidean distances.

    Returns:
        The mean over B; 0 if every positive is nearer than every negative by the margin.
    """
    squared = features.square().sum(dim=1)
    distances = squared[:, None] + squared - 2 * features @ features.T
    distances = distances.clamp(min=1e-12).sqrt()
    same = pids[:, None] == pids
    farthest = distances.masked_fill(~same, 0).amax(dim=1)
    nearest = distances.masked_fill(same, torch.inf).amin(dim=1)
    return F.relu(farthest - nearest + margin).mean()


def _logits(embeddings: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Return the similarity of embeddings and keys divided by the temperature, ``[B, Q]``.

    The result has the type of the embeddings, even if autocast multiplies in another. The
    embeddings are divided because they are fewer numbers than the result.
    """
    return (embeddings / temperature @ queue.T).to(embeddings.dtype)
