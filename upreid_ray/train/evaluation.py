"""Retrieval scores of the backbone during a run, computed by all workers together.

Dimensions: N images, n of them on this worker, F features.
"""

import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from upreid_ray.core import distributed
from upreid_ray.core.retrieval import extract_features, score_features
from upreid_ray.core.training import State
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.data.stream.damage import without_undecodable
from upreid_ray.data.stream.decode import Columns
from upreid_ray.data.stream.labelled import LabelledImages
from upreid_ray.data.stream.persons import ChosenImages

logger = logging.getLogger(__name__)

NUM_THREADS = 4


class Evaluation:
    """The scores of a run's backbone on query and gallery images, if there are any.

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

    @property
    def is_scored(self) -> bool:
        """Whether there are images to score."""
        return self._images is not None

    def score(self) -> dict[str, float]:
        """Return the scores by name at rank 0; an empty dictionary elsewhere.

        Every worker must call this. Without evaluation images it is empty at rank 0 too.

        Raises:
            RunFailed: Too many images do not decode; every worker raises it.
        """
        if self._images is None:
            return {}
        columns = decoded_features(self._state, self._images)
        if columns is None:
            return {}
        scores = score_features(
            *(torch.from_numpy(columns[n]) for n in ("features", "pid", "camid", "is_query"))
        )
        if not self.num_queries_without_match:  # the same in each evaluation of a run
            scores.warn_if_incomplete()
        self.num_queries_without_match = scores.num_queries_without_match
        return scores.summary()


def decoded_features(state: State, images: LabelledImages | ChosenImages) -> Columns | None:
    """Compute the features of images; those that do not decode are left out.

    Every worker must call this, and computes its share.

    Returns:
        At rank 0 ``features``, float32 ``[N, F]``, unit length, and the other columns of the
        images; None elsewhere.

    Raises:
        RunFailed: Too many images do not decode; every worker raises it.
    """
    shares: list[Columns] = []

    def batches() -> Iterator[Tensor]:
        for block in _decode_share(images):
            yield torch.from_numpy(block.pop("image"))
            shares.append(block)

    normalization = state.description.normalization
    features = extract_features(state.extractor, batches(), normalization).cpu().numpy()
    stops = np.cumsum([len(block["decoded"]) for block in shares])
    for block, part in zip(shares, np.split(features, stops[:-1]), strict=False):
        block["features"] = part
    gathered = distributed.gather_at_first(shares) or []

    def join() -> Columns:
        every = [block for share in gathered for block in share]
        columns = {name: np.concatenate([block[name] for block in every]) for name in every[0]}
        limit = state.config.data.max_undecodable
        return without_undecodable(columns, images.row_groups, limit)

    return distributed.run_at_first(join)


def _decode_share(images: LabelledImages | ChosenImages) -> Iterator[Columns]:
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
