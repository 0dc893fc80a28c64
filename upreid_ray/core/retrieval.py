"""Retrieval scores: the protocol of person re-identification.

Rank the gallery for each query; leave out gallery images with the query's pid and camid; skip
queries without a remaining match (Zheng et al. 2015, Market-1501).

Dimensions: Q query images, G gallery images, F features.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upreid_ray.core.augment import Normalization
from upreid_ray.core.precision import autocast

# Takes the features of queries and gallery images; yields which queries, and their distances.
DistanceRows = Callable[[Tensor, Tensor], Iterator[tuple[slice, Tensor]]]

logger = logging.getLogger(__name__)

JUNK_PID = -1
PART_ELEMENTS = 2**24  # of a distance matrix at once; ranking them takes some 250 MB


@dataclass(frozen=True)
class Labels:
    """Persons and cameras of N images, ``[N]`` each."""

    pids: Tensor
    camids: Tensor

    def to(self, device: torch.device) -> Self:
        """Copy to ``device``."""
        return type(self)(self.pids.to(device), self.camids.to(device))


@dataclass(frozen=True)
class RetrievalScores:
    """Means over the valid queries.

    Attributes:
        mean_average_precision: 0..1; the mean of the precisions at each hit.
        cmc: ``[max_rank]``, 0..1; entry ``k - 1`` is the share of queries with a hit among the
            first k.
        mean_inverse_negative_penalty: 0..1; the mean share of hits among the images up to the
            last hit (Ye et al. 2021, https://arxiv.org/abs/2001.04193).
        num_valid_queries: Queries with at least one match to be found.
        num_queries_without_match: Queries that are left out because they have none.
        average_precisions: ``[Q]``, 0..1; NaN for queries that are left out.
    """

    mean_average_precision: float
    cmc: Tensor
    mean_inverse_negative_penalty: float
    num_valid_queries: int
    num_queries_without_match: int
    average_precisions: Tensor

    def warn_if_incomplete(self) -> None:
        """Log how many queries have no match, if there are any."""
        if self.num_queries_without_match:
            logger.warning(
                "%d of %d query images have no match in the gallery under another camera; the "
                "scores leave them out",
                self.num_queries_without_match,
                self.num_queries_without_match + self.num_valid_queries,
            )

    def summary(self) -> dict[str, float]:
        """Return mAP, rank-1, rank-5, rank-10 and mINP by their usual names."""
        ranks = {f"rank{k}": float(self.cmc[k - 1]) for k in (1, 5, 10) if k <= len(self.cmc)}
        return {
            "mAP": self.mean_average_precision,
            **ranks,
            "mINP": self.mean_inverse_negative_penalty,
        }


def retrieval_scores(
    distances: Tensor,
    query_pids: Tensor,
    query_camids: Tensor,
    gallery_pids: Tensor,
    gallery_camids: Tensor,
    *,
    max_rank: int = 50,
) -> RetrievalScores:
    """Score the ranking that distances give; equal distances rank in gallery order.

    Args:
        distances: ``[Q, G]``, any number type; smaller is more alike, NaN ranks last.
        query_pids: ``[Q]``, persons.
        query_camids: ``[Q]``, cameras.
        gallery_pids: ``[G]``; -1 marks junk, which is left out.
        gallery_camids: ``[G]``.
        max_rank: Length of ``cmc``; beyond the end of the gallery it stays constant.

    Raises:
        ValueError: No query has a match to be found.
    """
    device = distances.device
    query, gallery = (
        Labels(torch.as_tensor(pids, device=device), torch.as_tensor(camids, device=device))
        for pids, camids in ((query_pids, query_camids), (gallery_pids, gallery_camids))
    )
    parts = row_parts(*distances.shape)
    rows = ((part, distances[part].detach().double()) for part in parts)
    return score_rows(rows, query, gallery, max_rank=max_rank)


def score_rows(
    rows: Iterable[tuple[slice, Tensor]],
    query: Labels,
    gallery: Labels,
    *,
    max_rank: int = 50,
) -> RetrievalScores:
    """Score distances that come a few rows at a time; ``[Q, G]`` need not exist at once.

    Args:
        rows: Yields which queries, and their distances ``[n, G]``, float32 or float64.
        query: Labels of the Q query images, on the device of the distances.
        gallery: Labels of the G gallery images; pid -1 marks junk, which is left out.
        max_rank: Length of ``cmc``.

    Raises:
        ValueError: No query has a match to be found.
    """
    parts = [
        _score_queries(distances, Labels(query.pids[part], query.camids[part]), gallery)
        for part, distances in rows
    ]
    average_precision, first_rank, inverse_negative_penalty, valid = (
        torch.cat(column) for column in zip(*parts, strict=True)
    )
    if len(average_precision) == 0:
        raise ValueError("no query has a match in the gallery under another camera")
    ranks = torch.arange(1, max_rank + 1, device=first_rank.device)
    of_all = average_precision.new_full((len(valid),), torch.nan)
    of_all[valid] = average_precision
    return RetrievalScores(
        mean_average_precision=float(average_precision.mean()),
        cmc=(first_rank[:, None] <= ranks).double().mean(dim=0).cpu(),
        mean_inverse_negative_penalty=float(inverse_negative_penalty.mean()),
        num_valid_queries=len(average_precision),
        num_queries_without_match=len(query.pids) - len(average_precision),
        average_precisions=of_all.cpu(),
    )


def cosine_distances(query: Tensor, gallery: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the distances of unit-length features ``[Q, F]`` and ``[G, F]``, for `score_rows`.

    One minus the cosine similarity, 0..2, which ranks like Euclidean distance.
    """
    for part in row_parts(len(query), len(gallery)):
        yield part, (query[part] @ gallery.T).neg_().add_(1)


def score_features(
    features: Tensor,
    pids: Tensor,
    camids: Tensor,
    is_query: Tensor,
    *,
    distances: DistanceRows = cosine_distances,
) -> RetrievalScores:
    """Score the ranking of gallery images by the features of query images.

    The ``[Q, G]`` distances never exist at once.

    Args:
        features: ``[N, F]``, features of query and gallery images, unit length.
        pids: ``[N]``, persons; -1 marks junk, which is left out.
        camids: ``[N]``, cameras.
        is_query: ``[N]``, bool; all other images are the gallery.
        distances: Computes the distances; default: cosine distances.

    Raises:
        ValueError: No query has a match to be found.
    """
    query, gallery = (
        Labels(pids[part], camids[part]).to(features.device) for part in (is_query, ~is_query)
    )
    rows = distances(features[is_query], features[~is_query])
    return score_rows(rows, query, gallery)


def row_parts(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Cut the rows of a matrix so that a part has at most `PART_ELEMENTS` elements."""
    size = max(1, PART_ELEMENTS // max(1, num_columns))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def _score_queries(
    distances: Tensor, query: Labels, gallery: Labels
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return average precision, rank of the first hit and INP of the valid queries.

    The last tensor, bool ``[n]``, tells which queries are valid.
    """
    same_pid = gallery.pids == query.pids[:, None]
    same_camera = gallery.camids == query.camids[:, None]
    kept = ~(same_pid & same_camera) & (gallery.pids != JUNK_PID)
    ranks, num_hits = _ranks_of_hits(distances, same_pid & kept, kept)
    valid = num_hits > 0
    ranks, num_hits = ranks[valid], num_hits[valid]

    # The k-th column is the k-th hit; queries with fewer hits have nothing there.
    number = torch.arange(1, ranks.shape[1] + 1, device=ranks.device)
    precision = torch.where(number <= num_hits[:, None], number.double() / ranks, 0)
    last_rank = ranks.gather(1, num_hits[:, None] - 1).squeeze(1)
    penalty = num_hits / last_rank.double()
    return precision.sum(dim=1) / num_hits, ranks[:, 0], penalty, valid


def _ranks_of_hits(distances: Tensor, hit: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Find where the hits are in the ranking of the images that are kept.

    Hits are few: sorted distances, without their images, are enough for that.

    Args:
        distances: ``[n, G]``.
        hit: bool ``[n, G]``; hits are kept.
        kept: bool ``[n, G]``.

    Returns:
        ``[n, most hits of a row]``, ranks from 1 on, ascending; rows with fewer hits are padded
        at the end with numbers that are no smaller than their last hit. And ``[n]``, the number
        of hits.
    """
    num_rows, num_columns = distances.shape
    distances = distances.masked_fill(distances.isnan(), torch.inf)
    row, column = hit.nonzero(as_tuple=True)
    num_hits = row.bincount(minlength=num_rows)  # a sum over bools would copy them as int64
    place = torch.arange(len(row), device=row.device) - (num_hits.cumsum(0) - num_hits)[row]
    of_hits = distances.new_full((num_rows, max([1, *num_hits.tolist()])), torch.inf)
    of_hits[row, place] = distances[row, column]
    ordered = _sorted(distances.masked_fill(~kept, torch.inf))
    ranks = torch.searchsorted(ordered, of_hits) + 1
    # Among equal distances the order of the gallery decides.
    num_equal = torch.searchsorted(ordered, of_hits, right=True) + 1 - ranks
    tied = num_equal[row, place] > 1
    row, column, place = row[tied], column[tied], place[tied]
    index = torch.arange(num_columns, device=distances.device)
    for part in row_parts(len(row), num_columns):
        rows = distances[row[part]]
        same = rows == rows.gather(1, column[part, None])
        before = same & kept[row[part]] & (index < column[part, None])
        ranks[row[part], place[part]] += before.nonzero()[:, 0].bincount(minlength=len(rows))
    return ranks.sort(dim=1).values, num_hits


def _sorted(rows: Tensor) -> Tensor:
    """Return each row in ascending order; NumPy's sort is several times as fast on CPUs."""
    if rows.device.type == "cpu":
        return torch.from_numpy(np.sort(rows.numpy(), axis=1))
    return rows.sort(dim=1).values


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    batches: Iterable[Tensor],
    normalization: Normalization,
    *,
    flip: bool = False,
    precision: str = "fp32",
) -> Tensor:
    """Return the unit-length features ``[N, F]`` of images, ``[0]`` if there are none.

    Args:
        backbone: Module that computes features; its mode is restored afterwards.
        batches: Batches of images, uint8 ``[n, 3, H, W]``, N images in all.
        normalization: Normalization that the backbone expects.
        flip: Whether to add the features of the mirrored images.
        precision: As in `upreid_ray.core.precision.autocast`.
    """
    device = next(backbone.parameters()).device
    was_training = backbone.training
    backbone.eval()
    features = []
    try:
        for images in batches:
            normalized = normalization.apply(images.to(device).float() / 255)
            with autocast(normalized, precision):
                batch = backbone(normalized).float()
                if flip:
                    batch = batch + backbone(normalized.flip(3)).float()
            features.append(F.normalize(batch, dim=1))
    finally:
        backbone.train(was_training)
    return torch.cat(features) if features else torch.empty(0)
