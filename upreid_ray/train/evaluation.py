"""Retrieval scores of the backbone during a run, computed by all workers together.

Dimensions: N images, n of them on this worker, F features.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from upreid_ray.core import distributed
from upreid_ray.core.retrieval import RetrievalScores, extract_features, score_features
from upreid_ray.core.training import State
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.data.stream.decode import Columns
from upreid_ray.data.stream.labelled import LabelledImages

NUM_THREADS = 4


class DecodedImages(Protocol):
    """Images that are read in blocks, such as `LabelledImages`."""

    num_blocks: int

    def read(self, number: int) -> Columns:
        """Return ``image``, uint8 ``[n, 3, H, W]``, and other columns of ``n`` rows."""


class Evaluation:
    """The scores of a run's backbone on query and gallery images.

    Args:
        shards: Shards with query and gallery images; None if nothing is scored.
        state: State of training, whose extractor is scored.

    Attributes:
        scores_untrained: Scores before training at rank 0; empty until they are set.
        num_queries_without_match: Query images that the latest scores leave out, at rank 0.
    """

    def __init__(self, shards: ShardSet | None, state: State) -> None:
        self._state = state
        self._images: LabelledImages | None = None
        if shards is not None:
            self._images = LabelledImages(
                shards, height=state.description.height, width=state.description.width
            )
        self.scores_untrained: dict[str, float] = {}
        self.num_queries_without_match = 0

    def score(self) -> dict[str, float]:
        """Return the scores by name at rank 0; an empty dictionary elsewhere.

        Every worker must call this. Without evaluation images it is empty at rank 0 too.
        """
        if self._images is None:
            return {}
        gathered = distributed.gather_at_first(features_of_share(self._state, self._images))
        if gathered is None:
            return {}
        scores = _scores(gathered)
        if not self.num_queries_without_match:  # the same in each evaluation of a run
            scores.warn_if_incomplete()
        self.num_queries_without_match = scores.num_queries_without_match
        return scores.summary()


def features_of_share(state: State, images: DecodedImages) -> tuple[Tensor, list[Columns]]:
    """Compute the features of this worker's share of some images.

    Returns:
        The features ``[n, F]``, unit length, on the CPU; and the other columns of each block.
    """
    others: list[Columns] = []

    def batches() -> Iterator[Tensor]:
        for block in _decode_share(images):
            yield torch.from_numpy(block.pop("image"))
            others.append(block)

    normalization = state.description.normalization
    return extract_features(state.extractor, batches(), normalization).cpu(), others


def _decode_share(images: DecodedImages) -> Iterator[Columns]:
    """Yield this worker's blocks of some images, decoded a few blocks ahead."""
    mine = range(distributed.rank(), images.num_blocks, distributed.world_size())
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        ahead: deque[Future[Columns]] = deque()
        for block in mine:
            ahead.append(pool.submit(images.read, block))
            if len(ahead) > NUM_THREADS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _scores(gathered: list[tuple[Tensor, list[Columns]]]) -> RetrievalScores:
    """Return the retrieval scores of the features and labels of all workers."""
    features = torch.cat([features for features, _ in gathered])
    blocks = [block for _, labels in gathered for block in labels]
    pids, camids, is_query = (
        torch.cat([torch.from_numpy(block[name]) for block in blocks])
        for name in ("pid", "camid", "is_query")
    )
    return score_features(features, pids, camids, is_query)
