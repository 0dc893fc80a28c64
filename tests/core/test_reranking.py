"""Re-ranking: by plain loops, whatever the parts, and on clusters."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests import reference
from upreid_ray.core import retrieval
from upreid_ray.core.reranking import jaccard_distances, reciprocal_encoding, reranked_distances


def random_features(seed: int, num_images: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Few dimensions, so that neighbours are often reciprocal.
    return F.normalize(torch.randn(num_images, 3, generator=generator, dtype=torch.float64))


def reranked(query: Tensor, gallery: Tensor, **settings: float) -> Tensor:
    return torch.cat([rows for _, rows in reranked_distances(query, gallery, **settings)])


@given(
    seed=st.integers(0, 2**32 - 1),
    num_images=st.integers(3, 30),
    k1=st.integers(1, 12),
    k2=st.integers(1, 6),
    weight=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_reranking_is_that_of_plain_loops(seed, num_images, k1, k2, weight):
    features = random_features(seed, num_images)
    num_queries = num_images // 3

    ours = reranked(
        features[:num_queries], features[num_queries:], k1=k1, k2=k2, distance_weight=weight
    )

    squared = (2 - 2 * features @ features.T).clamp(min=0)
    squared.fill_diagonal_(0)
    theirs = reference.reranked(squared.tolist(), num_queries, k1, k2, weight)
    assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=0, atol=1e-5)


def test_reranking_in_parts_is_reranking_at_once(monkeypatch):
    features = random_features(0, 40)
    at_once = reranked(features[:10], features[10:])

    monkeypatch.setattr(retrieval, "PART_ELEMENTS", 64)

    assert_close(reranked(features[:10], features[10:]), at_once)


def test_images_that_are_all_equal_have_no_distance():
    features = torch.ones(9, 3) / 3**0.5

    distances = torch.cat([part for _, part in reranked_distances(features[:4], features[4:])])

    assert_close(distances, torch.zeros(4, 5), rtol=0, atol=0.1)


def test_encodings_sum_to_one():
    encoding, _ = reciprocal_encoding(random_features(0, 40), k1=8, k2=3)

    assert encoding.sum(axis=1) == pytest.approx(1)


def test_an_image_has_no_jaccard_distance_to_itself():
    encoding, _ = reciprocal_encoding(random_features(0, 40), k1=8, k2=3)

    distances = jaccard_distances(encoding, encoding.tocsc())

    assert distances.diagonal() == pytest.approx(0, abs=1e-6)
    assert distances == pytest.approx(distances.T, abs=1e-6)


def test_clusters_that_share_no_neighbour_are_at_distance_1():
    directions = torch.eye(3).repeat_interleave(10, dim=0)
    noise = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    features = F.normalize(directions + 0.05 * noise)

    encoding, _ = reciprocal_encoding(features, k1=9, k2=3)

    distances = jaccard_distances(encoding, encoding.tocsc())
    same = torch.block_diag(*[torch.ones(10, 10)] * 3).bool().numpy()
    assert distances[same].max() < 1
    assert distances[~same].min() == 1
