"""Subsets are nested, and batches of persons are a function of the step."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.stream.test_stream import BROKEN, damage, flat, numbers, write_set
from upreid_ray.config.downstream import (
    ClusterContrastConfig,
    FinetuneConfig,
    PersonTrainingConfig,
)
from upreid_ray.data.stream.damage import count_undecodable
from upreid_ray.data.stream.persons import (
    ClusterImages,
    PersonBatches,
    PersonImages,
    PersonSampler,
    subset,
)

PIDS = st.lists(st.integers(0, 9), min_size=2, max_size=60).filter(lambda p: len(set(p)) > 1)
SEEDS = st.integers(0, 2**32 - 1)


@given(pids=PIDS, seed=SEEDS, shares=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)))
def test_smaller_shares_are_parts_of_larger_ones(pids, seed, shares):
    pids, (small, large) = np.array(pids), sorted(shares)

    for name in ("persons", "images"):
        few, many = (
            set(subset(pids, **{"persons": 1.0, "images": 1.0, name: share}, seed=seed))
            for share in (small, large)
        )
        assert few <= many


@given(pids=PIDS, seed=SEEDS)
def test_the_whole_share_is_the_whole_set(pids, seed):
    rows = subset(np.array(pids), persons=1.0, images=1.0, seed=seed)

    assert rows.tolist() == list(range(len(pids)))


def test_a_share_of_persons_takes_all_their_images():
    pids = np.repeat(np.arange(10), 4)

    rows = subset(pids, persons=0.3, images=1.0, seed=0)

    assert np.unique(pids[rows], return_counts=True)[1].tolist() == [4, 4, 4]


def test_a_share_of_images_takes_one_of_each_person_at_least():
    pids = np.array([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 2])

    rows = subset(pids, persons=1.0, images=0.2, seed=0)

    assert np.unique(pids[rows], return_counts=True)[1].tolist() == [2, 1, 1]


def test_another_seed_chooses_others():
    pids = np.repeat(np.arange(50), 2)

    chosen = {tuple(subset(pids, persons=0.1, images=1.0, seed=seed)) for seed in range(5)}

    assert len(chosen) == 5


@given(
    sizes=st.lists(st.integers(1, 7), min_size=2, max_size=12),
    num_images=st.integers(2, 5),
    step=st.integers(0, 10**6),
    seed=SEEDS,
    data=st.data(),
)
def test_a_batch_has_p_persons_with_k_images_each(sizes, num_images, step, seed, data):
    num_persons = data.draw(st.integers(2, len(sizes)))
    pids = np.repeat(np.arange(len(sizes)) + 100, sizes)
    pids = np.random.default_rng(seed).permutation(pids)
    sampler = PersonSampler(pids, num_persons=num_persons, num_images=num_images, seed=seed)

    batch = sampler.indices(step).reshape(num_persons, num_images)

    persons = pids[batch]
    assert (persons == persons[:, :1]).all()
    assert len(set(persons[:, 0])) == num_persons
    for row, pid in zip(batch, persons[:, 0], strict=True):
        # Nobody's image shows twice while another one has not been shown.
        assert len(set(row)) == min(num_images, sizes[pid - 100])


def test_a_person_with_one_image_shows_it_repeatedly():
    sampler = PersonSampler(np.array([5, 6]), num_persons=2, num_images=3, seed=0)

    assert sorted(sampler.indices(0)) == [0, 0, 0, 1, 1, 1]


def test_a_round_shows_every_person_once():
    sampler = PersonSampler(np.arange(12), num_persons=4, num_images=2, seed=0)

    seen = np.concatenate([sampler.indices(step) for step in range(3)])

    assert sorted(set(seen)) == list(range(12))


def test_rounds_differ_and_repeat_with_the_seed():
    def rows(seed: int, step: int) -> list[int]:
        sampler = PersonSampler(np.arange(40), num_persons=20, num_images=2, seed=seed)
        return sampler.indices(step).tolist()

    assert rows(0, 0) == rows(0, 0)
    assert len({tuple(rows(seed, step)) for seed in (0, 1) for step in range(6)}) == 12


def test_fewer_persons_than_a_batch_has_are_refused():
    with pytest.raises(ValueError, match="4 persons a batch, but there are 3"):
        PersonSampler(np.array([1, 2, 3]), num_persons=4, num_images=2, seed=0)


def batches(labels: list[int], num_persons: int) -> PersonBatches:
    training = PersonTrainingConfig(num_persons=num_persons, num_images=2)
    return PersonBatches(np.array(labels), training, size=(64, 32), seed=0)


def test_images_without_a_label_are_in_no_batch():
    made = batches([-1, 0, 1, -1, 1, 2, 0], num_persons=2)

    seen = np.concatenate([made.indices(step) for step in range(20)])

    assert set(seen) == {1, 2, 4, 5, 6}


def test_where_persons_are_too_few_a_batch_shows_them_repeatedly():
    rows = batches([0, 1, 1], num_persons=5).indices(0)

    assert len(rows) == 10
    assert set(rows) == {0, 1, 2}


def test_encoded_images_may_have_more_than_two_gib_together(tmp_path):
    images = [flat(number) for number in range(12)]
    shards = write_set(tmp_path, {"unlabeled": images})
    chosen = ClusterImages(shards, ClusterContrastConfig(), height=32, width=32)

    column = chosen.encoded().column("image")

    assert (column.type, column.to_pylist()) == (pa.large_binary(), images)


def test_a_person_image_that_does_not_decode_is_replaced_with_its_label_and_counted(tmp_path):
    """The images are their persons: person 3 has a broken one."""
    train = [BROKEN if i == 3 else flat(i) for i in range(12)]
    config = FinetuneConfig().override({"training.num_persons": 4, "training.num_images": 2})
    images = PersonImages(write_set(tmp_path, {"train": train}), config, height=32, width=32)

    (((block,),),) = images.batches.rounds(0, 3, num_workers=1)
    columns = images.batches.read(images.encoded(), block)

    assert columns["label"].tolist() == numbers(columns["image"])
    counts = count_undecodable(columns, images.row_groups)
    assert counts == {str(tmp_path / "train-0.parquet"): 2}


def test_images_of_a_damaged_shard_are_counted_before_they_are_clustered(tmp_path):
    shards = write_set(tmp_path, {"unlabeled": [flat(i) for i in range(12)]})
    name = damage(tmp_path, "one bit")
    images = ClusterImages(shards, ClusterContrastConfig(), height=32, width=32)

    columns = images.read(0)

    decoded = columns["decoded"]
    assert columns["row"][decoded].tolist() == numbers(columns["image"][decoded])
    assert set(count_undecodable(columns, images.row_groups)) == {str(tmp_path / name)}
