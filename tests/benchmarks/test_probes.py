from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.probes import (
    ATTRIBUTES,
    AUGMENTATIONS,
    People,
    draw_people,
    drifts,
    parse_init,
    probe,
    retrieval,
)
from upreid_ray.core.retrieval import extract_features
from upreid_ray.train import initialization


class Mean(nn.Module):
    """The mean colour of an image: it sees no flip, and its colours change in grayscale."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


@pytest.fixture(scope="module")
def people() -> People:
    return draw_people(24, 64, 32)


def test_a_probe_finds_what_is_there_and_nothing_in_noise() -> None:
    draw = np.random.default_rng(0)
    values = draw.integers(-1, 4, size=800)
    noise = torch.from_numpy(draw.normal(size=(800, 8)))
    known = torch.cat([noise, F.one_hot(torch.from_numpy(values) + 1)], dim=1)
    is_train = np.arange(800) < 500
    assert probe(known, values, is_train) == 1
    assert probe(noise, values, is_train) == pytest.approx(1 / 4, abs=0.08)


def test_values_of_attributes_are_those_of_the_person(people: People) -> None:
    pids = people.labels.pids.numpy()
    for name in ATTRIBUTES:
        values = people.values(name)
        for pid in people.appearances:
            assert len(set(values[pids == pid])) == 1
    without_side = [who.bag in ("none", "backpack") for who in people.appearances.values()]
    sides = people.values("bag, side")
    assert [sides[pids == pid][0] == -1 for pid in people.appearances] == without_side


def test_only_people_in_the_outfit_of_the_query_compete(people: People) -> None:
    # Features that tell outfits apart, and nothing else: within an outfit they say nothing.
    features = F.one_hot(people.outfits).double()
    everyone = retrieval(features, people, within_outfit=False)
    assert retrieval(features, people, within_outfit=True) == pytest.approx(everyone)
    # Features that tell people apart, but outfits are mixed up by one strong common direction.
    pids = F.one_hot(people.labels.pids).double()
    assert retrieval(pids, people, within_outfit=True) == 1
    noise = torch.randn(
        len(pids), 4, dtype=torch.double, generator=torch.Generator().manual_seed(0)
    )
    noise = F.normalize(noise, dim=1)
    within = retrieval(noise, people, within_outfit=True)
    assert within > retrieval(noise, people, within_outfit=False)


def test_drift_is_that_of_what_a_backbone_sees(
    people: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = initialization.random("resnet18", seed=0)
    init = replace(
        init, description=init.description.model_copy(update={"height": 64, "width": 32})
    )
    monkeypatch.setattr(type(init), "extractor", lambda _: Mean())
    features = extract_features(Mean(), [people.images], init.description.normalization)
    found = drifts(init, people.images, features)
    assert found.keys() == AUGMENTATIONS.keys()
    assert found["flip"] == pytest.approx(0, abs=1e-5)
    assert found["grayscale"] > found["blur"] > -1e-5


def test_an_initialization_may_have_a_label() -> None:
    assert parse_init("moco=runs/a=1/480") == ("moco", "runs/a=1/480")
    assert parse_init("random") == ("random", "random")
