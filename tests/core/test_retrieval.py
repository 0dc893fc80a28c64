"""Retrieval scores: by hand, by plain loops, and what the protocol leaves out."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests import reference
from upreid_ray.core import retrieval
from upreid_ray.core.augment import Normalization
from upreid_ray.core.backbone import build_backbone
from upreid_ray.core.retrieval import (
    Labels,
    RetrievalScores,
    cosine_distances,
    extract_features,
    retrieval_scores,
    score_features,
    score_rows,
)

SEEDS = st.integers(0, 2**32 - 1)
STATISTICS = Normalization(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))

Ids = list[tuple[int, int]]


def scores(distances: list[list[float]], query: Ids, gallery: Ids) -> RetrievalScores:
    """Score queries and gallery images that are pairs of pid and camid."""
    return retrieval_scores(
        torch.tensor(distances, dtype=torch.float64),
        *torch.tensor(query).unbind(1),
        *torch.tensor(gallery).unbind(1),
        max_rank=3,
    )


def five_images() -> RetrievalScores:
    """Rank, from the nearest on: same camera, other person, hit, junk, hit."""
    return scores(
        [[0.5, 0.2, 0.4, 0.1, 0.3]], [(1, 1)], [(1, 3), (2, 2), (-1, 2), (1, 1), (1, 2)]
    )


def random_case(seed: int, num_queries: int, num_images: int) -> tuple[Tensor, ...]:
    """Draw distances without ties, and ids with several matches, junk and shared cameras."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int, size: int) -> Tensor:
        return torch.randint(low, high, (size,), generator=generator)

    distances = torch.stack(
        [torch.randperm(num_images, generator=generator) for _ in range(num_queries)]
    )
    return (
        distances.double(),
        ids(0, 4, num_queries),
        ids(0, 3, num_queries),
        ids(-1, 4, num_images),
        ids(0, 3, num_images),
    )


@pytest.fixture
def case() -> tuple[Tensor, ...]:
    return random_case(0, 6, 30)


def as_lists(result: RetrievalScores) -> tuple[float, list[float], float, int]:
    return (
        result.mean_average_precision,
        result.cmc.tolist(),
        result.mean_inverse_negative_penalty,
        result.num_valid_queries,
    )


def test_map_of_five_images_is_the_one_worked_by_hand():
    assert_close(five_images().mean_average_precision, (1 / 2 + 2 / 3) / 2)


def test_cmc_of_five_images_is_the_one_worked_by_hand():
    assert five_images().cmc.tolist() == [0, 1, 1]


def test_minp_of_five_images_is_the_one_worked_by_hand():
    assert_close(five_images().mean_inverse_negative_penalty, 2 / 3)


def test_images_of_the_person_by_the_same_camera_are_left_out():
    result = scores([[0.1, 0.2, 0.3]], [(1, 1)], [(1, 1), (2, 2), (1, 2)])

    assert result.mean_average_precision == 0.5


def test_images_of_others_by_the_same_camera_count():
    result = scores([[0.1, 0.2]], [(1, 1)], [(2, 1), (1, 2)])

    assert result.mean_average_precision == 0.5


def test_junk_is_left_out():
    result = scores([[0.1, 0.2]], [(1, 1)], [(-1, 2), (1, 2)])

    assert result.mean_average_precision == 1.0


def test_distractors_with_pid_0_stay():
    result = scores([[0.1, 0.2]], [(1, 1)], [(0, 2), (1, 2)])

    assert result.mean_average_precision == 0.5


def test_pid_0_may_be_a_person():
    result = scores([[0.1, 0.2]], [(0, 1)], [(0, 2), (1, 2)])

    assert result.mean_average_precision == 1.0


def test_queries_without_a_match_are_not_counted():
    result = scores([[0.1, 0.2], [0.1, 0.2]], [(1, 1), (9, 1)], [(1, 2), (2, 2)])

    assert result.mean_average_precision == 1.0
    assert result.cmc.tolist() == [1, 1, 1]
    assert (result.num_valid_queries, result.num_queries_without_match) == (1, 1)


def test_the_log_says_how_many_queries_have_no_match(caplog):
    pids, camids = torch.tensor([1, 2, 3, 1, 2]), torch.tensor([1, 1, 1, 2, 1])
    is_query = torch.tensor([True, True, True, False, False])

    result = score_features(torch.eye(5), pids, camids, is_query)
    result.warn_if_incomplete()

    assert result.num_queries_without_match == 2
    assert "2 of 3 query images have no match in the gallery" in caplog.text


@pytest.mark.parametrize("pid", [1, 9, -1])
def test_no_query_with_a_match_is_an_error(pid):
    with pytest.raises(ValueError, match="no query has a match"):
        scores([[0.1, 0.2, 0.3]], [(pid, 1)], [(1, 1), (2, 2), (-1, 2)])


def test_equal_distances_rank_in_gallery_order():
    gallery = [(2, 2), (1, 2), (3, 2), (1, 3)]

    assert scores([[0.5] * 4], [(1, 1)], gallery).mean_average_precision == 0.5


def test_an_image_whose_distance_is_no_number_ranks_last():
    result = scores([[float("nan"), 0.5]], [(1, 1)], [(1, 2), (2, 2)])

    assert result.mean_average_precision == 0.5


def test_cmc_is_constant_beyond_the_gallery():
    result = retrieval_scores(
        torch.tensor([[0.1, 0.2], [0.2, 0.1]]), [1, 1], [1, 1], [1, 2], [2, 2], max_rank=6
    )

    assert result.cmc.tolist() == [0.5, 1, 1, 1, 1, 1]


def test_the_summary_has_the_usual_names():
    result = retrieval_scores(
        torch.tensor([[0.1, 0.2], [0.2, 0.1]]), [1, 1], [1, 1], [1, 2], [2, 2]
    )

    expected = {"mAP": 0.75, "rank1": 0.5, "rank5": 1.0, "rank10": 1.0, "mINP": 0.75}
    assert result.summary() == expected


@given(
    num_queries=st.integers(1, 5),
    num_images=st.integers(1, 12),
    num_equal=st.sampled_from([1, 3, 12]),
    seed=SEEDS,
)
def test_scores_are_those_of_plain_loops(num_queries, num_images, num_equal, seed):
    distances, *ids = random_case(seed, num_queries, num_images)
    distances = distances // num_equal
    query_pids, query_camids, pids, camids = (each.tolist() for each in ids)
    expected = reference.retrieval(
        distances.tolist(),
        list(zip(query_pids, query_camids, strict=True)),
        list(zip(pids, camids, strict=True)),
        max_rank=7,
    )

    if expected is None:
        with pytest.raises(ValueError, match="no query has a match"):
            retrieval_scores(distances, *ids, max_rank=7)
    else:
        assert_close(as_lists(retrieval_scores(distances, *ids, max_rank=7)), expected)


@pytest.mark.parametrize("transform", [torch.exp, lambda d: 3 * d - 40, lambda d: d**3])
def test_scores_depend_on_the_order_of_distances_only(case, transform):
    distances, *ids = case

    transformed = retrieval_scores(transform(distances), *ids)

    assert_close(as_lists(transformed), as_lists(retrieval_scores(distances, *ids)))


@pytest.mark.parametrize("kind", [torch.int64, torch.bfloat16, torch.float16, torch.float32])
def test_distances_may_be_of_any_number_type(case, kind):
    distances, *ids = case
    distances = distances.float().requires_grad_() if kind.is_floating_point else distances

    assert as_lists(retrieval_scores(distances.to(kind), *ids)) == as_lists(
        retrieval_scores(distances.double(), *ids)
    )


@given(seed=SEEDS)
def test_scores_ignore_the_order_of_the_gallery(seed):
    distances, query_pids, query_camids, pids, camids = random_case(0, 6, 30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))

    shuffled = retrieval_scores(
        distances[:, order], query_pids, query_camids, pids[order], camids[order]
    )

    plain = retrieval_scores(distances, query_pids, query_camids, pids, camids)
    assert_close(as_lists(shuffled), as_lists(plain))


@pytest.mark.parametrize("part_elements", [1, 30, 90, 10**6])
def test_scores_in_parts_are_scores_at_once(monkeypatch, case, part_elements):
    at_once = as_lists(retrieval_scores(*case))

    monkeypatch.setattr(retrieval, "PART_ELEMENTS", part_elements)

    assert_close(as_lists(retrieval_scores(*case)), at_once)


def test_features_score_like_their_distances(case):
    _, query_pids, query_camids, pids, camids = case
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(36, 4, generator=generator, dtype=torch.float64))
    query, gallery = features[:6], features[6:]

    scored = score_rows(
        cosine_distances(query, gallery),
        Labels(query_pids, query_camids),
        Labels(pids, camids),
    )

    distances = torch.cdist(query, gallery)  # Euclidean
    at_once = retrieval_scores(distances, query_pids, query_camids, pids, camids)
    assert_close(as_lists(scored), as_lists(at_once))


def test_features_are_scored_a_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(retrieval, "PART_ELEMENTS", 40)
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(30, 4, generator=generator), dim=1)
    pids, camids = torch.randint(4, (2, 30), generator=generator)
    is_query = torch.rand(30, generator=generator) < 0.4
    sizes = []

    def distances(query: Tensor, gallery: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for part, rows in cosine_distances(query, gallery):
            sizes.append(rows.numel())
            yield part, rows

    scored = score_features(features, pids, camids, is_query, distances=distances)

    assert len(sizes) > 1
    assert max(sizes) <= 40
    at_once = retrieval_scores(
        1 - features[is_query] @ features[~is_query].T,
        pids[is_query],
        camids[is_query],
        pids[~is_query],
        camids[~is_query],
    )
    assert_close(as_lists(scored), as_lists(at_once))


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (5, 3, 32, 32), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def backbone() -> torch.nn.Module:
    return build_backbone("resnet18")


@pytest.mark.parametrize("training", [True, False])
def test_extracting_features_restores_the_mode_of_the_backbone(backbone, images, training):
    backbone.train(training)

    extract_features(backbone, [images], STATISTICS)

    assert all(module.training == training for module in backbone.modules())


def test_the_mode_of_the_backbone_is_restored_after_an_error(backbone):
    backbone.train()

    with pytest.raises(RuntimeError):
        extract_features(backbone, [torch.zeros(1, 2, 32, 32)], STATISTICS)

    assert backbone.training


def test_extracting_features_changes_no_weight_or_statistic(backbone, images):
    backbone.train()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}

    extract_features(backbone, [images], STATISTICS)

    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_features_are_those_of_the_normalized_image_at_unit_length(backbone, images):
    mean, std = torch.tensor([STATISTICS.mean, STATISTICS.std])[:, :, None, None]

    features = extract_features(backbone, [images], STATISTICS)

    with torch.no_grad():
        expected = F.normalize(backbone.eval()((images / 255 - mean) / std), dim=1)
    assert_close(features, expected)


def test_features_do_not_depend_on_the_batches(backbone, images):
    together = extract_features(backbone, [images], STATISTICS)

    apart = extract_features(backbone, images.split(2), STATISTICS)

    assert_close(apart, together)
