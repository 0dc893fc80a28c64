"""Duplicates are found among many images as by comparing all of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from upreid_ray.data.shards.duplicates import equal_originals, near_originals


def compared(fingerprints: list[int], max_distance: int) -> list[int]:
    """Keep each unless a kept one before it is near: every pair is looked at."""
    kept: list[int] = []
    originals = []
    for place, bits in enumerate(fingerprints):
        near = [k for k in kept if (fingerprints[k] ^ bits).bit_count() <= max_distance]
        originals.append(near[0] if near else place)
        if not near:
            kept.append(place)
    return originals


def prints(seed: int, num_clusters: int) -> list[int]:
    """Draw fingerprints, most of them a few bits from another one."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, 2**63, num_clusters).tolist()
    for _ in range(3 * num_clusters):
        flips = sum({1 << int(bit) for bit in rng.integers(0, 63, rng.integers(0, 5))})
        drawn.append(drawn[rng.integers(len(drawn))] ^ flips)
    return [drawn[i] for i in rng.permutation(len(drawn))]


@given(
    seed=st.integers(0, 10**6), num_clusters=st.integers(1, 12), max_distance=st.integers(0, 6)
)
def test_near_duplicates_are_those_of_comparing_all_pairs(seed, num_clusters, max_distance):
    drawn = prints(seed, num_clusters)

    originals = near_originals(np.array(drawn, np.int64), max_distance=max_distance)

    is_original = [original == place for place, original in enumerate(originals.tolist())]
    expected = [
        original == place for place, original in enumerate(compared(drawn, max_distance))
    ]
    assert is_original == expected
    for place, original in enumerate(originals.tolist()):
        assert (drawn[place] ^ drawn[original]).bit_count() <= max_distance
        assert is_original[original]


@given(seed=st.integers(0, 10**6), max_distance=st.integers(0, 3), data=st.data())
def test_leaving_out_some_duplicates_changes_nothing_about_the_others(seed, max_distance, data):
    drawn = np.array(prints(seed, 8), np.int64)
    originals = near_originals(drawn, max_distance=max_distance)
    repeats = np.flatnonzero(originals != np.arange(len(drawn)))
    gone = data.draw(st.lists(st.sampled_from(repeats.tolist()))) if len(repeats) else []
    stays = np.setdiff1d(np.arange(len(drawn)), gone)

    again = near_originals(drawn[stays], max_distance=max_distance)

    is_original = (again == np.arange(len(stays))).tolist()
    assert is_original == (originals[stays] == stays).tolist()


def test_the_first_of_equal_digests_is_the_original():
    digests = np.frombuffer(b"bb\x00\x00aabb\x00\x00", dtype="V2")

    assert equal_originals(digests).tolist() == [0, 1, 2, 0, 1]


@pytest.mark.timeout(60)
def test_a_hundred_thousand_equal_images_are_no_work():
    fingerprints = np.zeros(100_000, np.int64)

    assert not near_originals(fingerprints, max_distance=3).any()
