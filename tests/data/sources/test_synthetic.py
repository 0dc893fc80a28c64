"""Tests of the procedural people: repeatable, well split, and told apart by details only."""

import hashlib
import itertools
import os
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from upreid_ray.data.sources.synthetic import (
    Appearance,
    Camera,
    Portrait,
    draw,
    portraits,
    render,
)

SIZES = st.tuples(st.integers(64, 200), st.integers(32, 100))


def people(
    *, train: int = 0, test: int = 0, unlabeled: int = 0, cameras: int = 4, images: int = 3
) -> list[Portrait]:
    return portraits(
        num_train_identities=train,
        num_test_identities=test,
        num_unlabeled_identities=unlabeled,
        num_cameras=cameras,
        images_per_camera=images,
    )


def dressed(number: int) -> list[Appearance]:
    return [Appearance.sample(np.random.default_rng((0, who))) for who in range(number)]


def outfit(who: Appearance) -> tuple[object, object]:
    return who.shirt, who.trousers


def hsv_stripes(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Concatenated 8x4x4 HSV histograms of 6 horizontal stripes, each of sum 1."""
    hsv = np.asarray(Image.fromarray(image).convert("HSV")).astype(int)
    bins = hsv[..., 0] // 32 * 16 + hsv[..., 1] // 64 * 4 + hsv[..., 2] // 64
    stripes = np.array_split(bins, 6, axis=0)
    return np.concatenate([np.bincount(s.ravel(), minlength=128) / s.size for s in stripes])


def mean_average_precision(
    queries: list[tuple[Portrait, NDArray[np.float64]]],
    gallery: list[tuple[Portrait, NDArray[np.float64]]],
) -> float:
    """Market-1501: what shows the query's person in the query's camera does not count."""
    average_precisions = []
    for query, wanted in queries:
        ranking = []
        for candidate, offered in gallery:
            if candidate.pid != query.pid or candidate.camid != query.camid:
                distance = float(np.abs(wanted - offered).sum())
                ranking.append((distance, candidate.pid == query.pid))
        precisions: list[float] = []
        for rank, (_, is_hit) in enumerate(sorted(ranking), start=1):
            if is_hit:
                precisions.append((len(precisions) + 1) / rank)
        average_precisions.append(sum(precisions) / len(precisions))
    return sum(average_precisions) / len(average_precisions)


def test_the_same_portrait_is_drawn_the_same_in_every_process() -> None:
    program = (
        "import hashlib; from upreid_ray.data.sources.synthetic import Portrait, draw;"
        "image = draw(Portrait('train/a', 5, 2, 1, 'train'), seed=3, height=128, width=64);"
        "print(hashlib.sha256(image.tobytes()).hexdigest())"
    )
    here = draw(Portrait("train/a", 5, 2, 1, "train"), seed=3, height=128, width=64)

    elsewhere = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )

    assert elsewhere.stdout.strip() == hashlib.sha256(here.tobytes()).hexdigest()


def test_drawing_does_not_depend_on_what_was_drawn_before() -> None:
    first, *others = people(train=3)
    alone = draw(first, seed=0, height=64, width=32)

    for other in others:
        draw(other, seed=0, height=64, width=32)

    np.testing.assert_array_equal(draw(first, seed=0, height=64, width=32), alone)


def test_the_name_of_an_image_does_not_change_its_pixels() -> None:
    portrait = people(train=1)[0]

    renamed = replace(portrait, key="elsewhere")

    np.testing.assert_array_equal(
        draw(renamed, seed=0, height=64, width=32), draw(portrait, seed=0, height=64, width=32)
    )


@pytest.mark.parametrize(
    "change", [{"identity": 2}, {"camera": 2}, {"index": 1}, {"split": "query"}], ids=str
)
def test_every_part_of_a_portrait_changes_the_pixels(change: dict[str, Any]) -> None:
    portrait = Portrait("train/a", 1, 1, 0, "train")

    changed = replace(portrait, **change)

    before = draw(portrait, seed=0, height=64, width=32)
    after = draw(changed, seed=0, height=64, width=32)
    assert np.mean(before != after) > 0.5


def test_the_seed_changes_the_pixels() -> None:
    portrait = people(train=1)[0]

    one, other = (draw(portrait, seed=seed, height=64, width=32) for seed in (0, 1))

    assert np.mean(one != other) > 0.5


@given(
    size=SIZES, identity=st.integers(1, 10**6), camera=st.integers(1, 99), index=st.integers(0)
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_size_from_64x32_up_is_filled_with_an_image(
    size: tuple[int, int], identity: int, camera: int, index: int
) -> None:
    height, width = size

    image = draw(
        Portrait("a", identity, camera, index, "train"), seed=0, height=height, width=width
    )

    assert image.shape == (height, width, 3)
    assert image.dtype == np.uint8


def test_images_are_neither_black_nor_white() -> None:
    images = [draw(p, seed=0, height=64, width=32) for p in people(train=20)]

    assert all(30 < image.mean() < 225 and image.std() > 15 for image in images)


@pytest.mark.parametrize(("height", "width"), [(63, 32), (64, 31), (0, 0)])
def test_too_small_images_are_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match="at least 64x32"):
        draw(people(train=1)[0], seed=0, height=height, width=width)


@pytest.mark.parametrize(
    ("numbers", "complaint"),
    [
        ({"train": -1}, "must not be negative"),
        ({"test": -1}, "must not be negative"),
        ({"unlabeled": -1}, "must not be negative"),
        ({"cameras": 1}, "num_cameras >= 2"),
        ({"images": 1}, "images_per_camera >= 2"),
    ],
)
def test_impossible_data_sets_are_refused(numbers: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        people(**numbers)


def test_every_image_has_a_key_of_its_own_that_names_its_split() -> None:
    everything = people(train=20, test=20, unlabeled=20)

    keys = Counter(p.key for p in everything)

    assert max(keys.values()) == 1
    assert all(p.key.startswith(f"{p.split}/") for p in everything)


def test_train_test_and_unlabeled_identities_are_disjoint() -> None:
    identities = defaultdict(set)

    for p in people(train=7, test=5, unlabeled=3):
        part = "test" if p.split in ("query", "gallery") else p.split
        identities[part].add(p.identity)

    assert {part: len(who) for part, who in identities.items()} == {
        "train": 7,
        "test": 5,
        "unlabeled": 3,
    }
    assert len(set().union(*identities.values())) == 15


def test_exactly_the_unlabeled_images_hide_their_labels() -> None:
    everything = people(train=3, test=3, unlabeled=3)

    hidden = [p.split for p in everything if p.pid is None and p.camid is None]
    shown = [p for p in everything if (p.pid, p.camid) == (p.identity, p.camera)]

    assert set(hidden) == {"unlabeled"}
    assert len(hidden) + len(shown) == len(everything)


@given(cameras=st.integers(2, 9), images=st.integers(2, 4), identities=st.integers(1, 20))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_every_identity_is_seen_equally_often_by_at_least_two_of_the_cameras(
    cameras: int, images: int, identities: int
) -> None:
    everything = people(
        train=identities, test=identities, unlabeled=identities, cameras=cameras, images=images
    )

    sightings: dict[int, Counter[int]] = defaultdict(Counter)
    for p in everything:
        sightings[p.identity][p.camera] += 1

    for seen in sightings.values():
        assert 2 <= len(seen) <= cameras
        assert set(seen) <= set(range(1, cameras + 1))
        assert set(seen.values()) == {images}


def test_each_camera_of_a_test_identity_gives_one_query_and_the_rest_to_the_gallery() -> None:
    seen: dict[tuple[int, int], Counter[str]] = defaultdict(Counter)

    for p in people(test=30, images=3):
        seen[p.identity, p.camera][p.split] += 1

    assert all(splits == {"query": 1, "gallery": 2} for splits in seen.values())


def test_every_query_has_a_match_from_another_camera() -> None:
    everything = people(test=30, images=2)

    gallery = {(p.pid, p.camid) for p in everything if p.split == "gallery"}

    for query in (p for p in everything if p.split == "query"):
        assert any(pid == query.pid and camid != query.camid for pid, camid in gallery)


def test_tens_of_identities_share_each_outfit() -> None:
    outfits = Counter(outfit(who) for who in dressed(400))

    assert min(outfits.values()) >= 10


def test_identities_in_the_same_outfit_differ_in_several_details() -> None:
    crowd = dressed(400)
    details = [f.name for f in fields(Appearance) if f.name not in ("build", "pattern_height")]

    differences = [
        sum(getattr(one, name) != getattr(other, name) for name in details)
        for one, other in itertools.combinations(crowd, 2)
        if outfit(one) == outfit(other)
    ]

    assert min(differences) >= 1
    assert np.median(differences) >= 6


@pytest.mark.parametrize(
    ("name", "bare", "worn", "least_pixels"),
    [
        ("bag", "none", "backpack", 25),
        ("bag", "none", "satchel", 25),
        ("bag", "none", "handbag", 12),
        ("pattern", "plain", "band", 12),
        ("pattern", "plain", "bands", 12),
        ("pattern", "plain", "column", 12),
        ("pattern", "plain", "square", 8),
        ("pattern", "plain", "disc", 8),
        ("legwear", "trousers", "shorts", 12),
        ("legwear", "trousers", "skirt", 12),
        ("hat", None, (214, 44, 48), 8),
        ("scarf", None, (214, 44, 48), 8),
        ("side_stripe", None, (214, 44, 48), 8),
        ("shoes", (24, 24, 26), (238, 238, 236), 5),
        ("hair", (28, 24, 24), (206, 172, 104), 5),
        ("long_sleeves", True, False, 5),
    ],
)
def test_each_detail_shows_in_most_of_the_smallest_images(
    name: str, bare: object, worn: object, least_pixels: int
) -> None:
    red, yellow, gray, black = (214, 44, 48), (240, 200, 40), (122, 124, 128), (44, 44, 50)
    nothing: dict[str, Any] = {"bag": "none", "pattern": "plain", "legwear": "trousers"}
    nothing |= {"hat": None, "scarf": None, "side_stripe": None, "long_sleeves": True}
    nothing |= {"bag_colour": red, "pattern_colour": yellow, "shirt": gray, "trousers": black}
    looks = [replace(dressed(1)[0], **(nothing | {name: value})) for value in (bare, worn)]
    changed_pixels = []

    for moment in range(60):
        camera = Camera.sample(np.random.default_rng((1, moment % 4)))
        without, with_detail = (
            render(who, camera, np.random.default_rng((2, moment)), height=64, width=32)
            for who in looks
        )
        change = np.abs(with_detail.astype(int) - without.astype(int)).max(axis=2)
        changed_pixels.append(int((change > 30).sum()))

    assert np.mean(np.array(changed_pixels) >= least_pixels) > 0.75


def test_cameras_differ_by_more_than_the_chance_of_their_images() -> None:
    views = [
        [Portrait("a", 1, camera, i, "train") for i in range(40)] for camera in range(1, 9)
    ]

    colours = np.array(
        [
            [draw(p, seed=0, height=64, width=32).mean(axis=(0, 1)) for p in images]
            for images in views
        ]
    )

    chance = colours.std(axis=1).mean(axis=0) / np.sqrt(40)
    assert (colours.mean(axis=1).std(axis=0) > 2 * chance).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_whole_body_colour_does_not_find_people_again(seed: int) -> None:
    described = [
        (p, hsv_stripes(draw(p, seed=seed, height=128, width=64))) for p in people(test=60)
    ]

    score = mean_average_precision(
        [entry for entry in described if entry[0].split == "query"],
        [entry for entry in described if entry[0].split == "gallery"],
    )

    assert 0.03 < score < 0.35
