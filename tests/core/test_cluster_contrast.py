"""Cluster Contrast: clusters, memory and loss by hand, its step for any number of processes."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests import reference
from tests.core.test_finetuning import IMAGES
from tests.core.tiny import people
from upreid_ray.config.downstream import (
    ClusterContrastConfig,
    ClusteringConfig,
    ClusterTrainingConfig,
    FinetuneOptimizerConfig,
)
from upreid_ray.config.errors import InputError
from upreid_ray.config.run import ScalingConfig
from upreid_ray.core import distributed
from upreid_ray.core.backbone import build_backbone
from upreid_ray.core.checkpoint import BestBackbone, load_checkpoint, save_checkpoint
from upreid_ray.core.cluster_contrast import (
    OUTLIER,
    ClusterContrastState,
    ClusterMemory,
    centroids,
    cluster_contrast,
    cluster_contrast_step,
    pseudo_labels,
)
from upreid_ray.core.finetuning import PersonBatch
from upreid_ray.core.retrieval import extract_features

TINY = ClusterContrastConfig(
    optimizer=FinetuneOptimizerConfig(lr=1e-3, warmup_epochs=0, milestones=()),
    training=ClusterTrainingConfig(
        epochs=2,
        steps_per_epoch=10,
        num_persons=4,
        num_images=2,
        num_groups=2,
        precision="fp32",
    ),
    clustering=ClusteringConfig(k1=5, k2=2),
    scaling=ScalingConfig(num_workers=1, use_gpu=False),
)
NUM_CLUSTERS, NUM_FEATURES = 5, 512


def directions(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return F.normalize(values, dim=-1)


def bundles(sizes: list[int], num_lonely: int) -> Tensor:
    """Make bundles of near-equal directions around the axes, and directions far from all."""
    axes = torch.eye(len(sizes) + num_lonely)
    near = torch.cat([axes[i].expand(size, -1) for i, size in enumerate(sizes)])
    noise = torch.randn(near.shape, generator=torch.Generator().manual_seed(0))
    return F.normalize(torch.cat([near + 0.01 * noise, axes[len(sizes) :]]), dim=1)


def fresh_state(config: ClusterContrastConfig = TINY) -> ClusterContrastState:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = build_backbone("resnet18", last_stride=config.training.last_stride)
    return ClusterContrastState(config, backbone, IMAGES, device=torch.device("cpu"))


def begun_state(config: ClusterContrastConfig = TINY) -> ClusterContrastState:
    state = fresh_state(config)
    clusters = directions(NUM_CLUSTERS, NUM_FEATURES, seed=1).float()
    state.model.memory.begin(torch.arange(NUM_CLUSTERS), clusters)
    return state


def batch(step: int = 0) -> PersonBatch:
    labels = torch.arange(4).repeat_interleave(2)
    return PersonBatch(people(8, seed=step), (labels + step) % NUM_CLUSTERS)


def take_steps(state: ClusterContrastState, number: int) -> None:
    for _ in range(number):
        cluster_contrast_step(state, batch(state.step))


def test_bundles_are_clusters_and_lonely_images_outliers():
    labels = pseudo_labels(bundles([6, 8, 7], num_lonely=2), ClusteringConfig(k1=5, k2=2))

    assert labels.tolist() == 6 * [0] + 8 * [1] + 7 * [2] + 2 * [OUTLIER]


def test_equal_images_are_in_one_cluster():
    features = torch.eye(2).repeat_interleave(5, dim=0)

    labels = pseudo_labels(features, ClusteringConfig(k1=4, k2=2))

    assert labels.tolist() == 5 * [0] + 5 * [1]


@pytest.mark.parametrize(
    ("sizes", "num_lonely", "found"),
    [([1, 1], 6, "no cluster among 8"), ([7], 1, "a single cluster among 8")],
)
def test_too_few_clusters_are_refused_in_a_line_that_names_eps(sizes, num_lonely, found):
    with pytest.raises(InputError) as refused:
        pseudo_labels(bundles(sizes, num_lonely), ClusteringConfig(k1=6, k2=1, eps=0.1))

    assert str(refused.value).startswith(f"--clustering.eps 0.1: finds {found} images")
    assert "\n" not in str(refused.value)


def test_a_centroid_is_the_mean_of_its_cluster_at_unit_length():
    features = directions(5, 3, seed=0)

    found = centroids(features, np.array([1, 0, OUTLIER, 1, 1]))

    mean = features[[0, 3, 4]].mean(dim=0)
    assert_close(found, torch.stack([features[1], mean / mean.norm()]))


@given(
    size=st.integers(1, 6),
    num_clusters=st.integers(2, 5),
    temperature=st.sampled_from([0.05, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_loss_is_its_formula(size, num_clusters, temperature, seed):
    features, memory = directions(size, 4, seed=seed), directions(num_clusters, 4, seed=~seed)
    labels = torch.arange(size) % num_clusters

    loss = cluster_contrast(features, labels, memory, temperature=temperature)

    expected = reference.cluster_contrast(
        features.tolist(), labels.tolist(), memory.tolist(), temperature
    )
    assert_close(loss, torch.tensor(expected, dtype=torch.float64))


def test_the_loss_of_equal_clusters_is_the_logarithm_of_their_number():
    memory = directions(1, 4, seed=0).expand(7, 4)

    loss = cluster_contrast(
        directions(3, 4, seed=1), torch.tensor([0, 3, 6]), memory, temperature=0.05
    )

    assert float(loss) == pytest.approx(math.log(7))


@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    momentum=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_memory_takes_in_one_image_after_the_other(labels, momentum, seed):
    images, clusters = directions(len(labels), 3, seed=seed), directions(4, 3, seed=~seed)
    memory = ClusterMemory()
    memory.begin(torch.arange(4), clusters.clone())

    memory.update(images, torch.tensor(labels), momentum=momentum)

    expected = reference.updated_memory(clusters.tolist(), images.tolist(), labels, momentum)
    assert_close(memory.features, torch.tensor(expected, dtype=torch.float64))


def test_a_step_contrasts_with_the_memory_of_before_and_then_updates_it():
    state = begun_state()
    before, seen = state.model.memory.features.clone(), []
    state.model.register_forward_hook(lambda _, __, features: seen.append(features.detach()))

    terms = cluster_contrast_step(state, batch())

    features, labels = torch.cat(seen), batch().labels
    assert_close(terms["loss"], cluster_contrast(features, labels, before, temperature=0.05))
    expected = reference.updated_memory(
        before.tolist(), features.tolist(), labels.tolist(), 0.1
    )
    assert_close(state.model.memory.features, torch.tensor(expected))


def test_every_weight_but_the_bias_of_the_neck_learns():
    state = begun_state()
    before = {name: p.clone() for name, p in state.model.named_parameters()}

    take_steps(state, 1)

    still = [n for n, p in state.model.named_parameters() if torch.equal(p, before[n])]
    assert still == ["extractor.neck.bias"]


def test_a_step_that_is_not_finite_changes_nothing():
    state = begun_state()
    take_steps(state, 1)
    before = copy.deepcopy(state.model.state_dict())
    hook = state.model.extractor.backbone.layer1.register_forward_hook(
        lambda _, __, output: output * math.inf
    )

    take_steps(state, 1)

    hook.remove()
    assert int(state.num_skipped) == 1
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_resuming_within_an_epoch_is_going_on(tmp_path):
    whole, begun, resumed = begun_state(), begun_state(), fresh_state()
    take_steps(whole, 4)
    take_steps(begun, 2)
    best = BestBackbone()
    best.update(begun, {})
    save_checkpoint(tmp_path, begun, best, scores_untrained={}, images_per_second=1.0)

    load_checkpoint(tmp_path, resumed)
    take_steps(resumed, 2)

    expected = whole.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def steps_of_this_process(settings: dict[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Take two steps with this process's share of each batch, in float64."""
    config = TINY.override(settings)
    torch.set_default_dtype(torch.float64)
    try:
        state = begun_state(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model = state.model.double()
    for module in (model.extractor.neck, model.extractor.backbone):
        module.register_forward_pre_hook(lambda _, x: (x[0].double(),))
    size = config.training.batch_size // distributed.world_size()
    mine = slice(distributed.rank() * size, (distributed.rank() + 1) * size)
    losses = []
    for step in range(2):
        whole = batch(step)
        part = PersonBatch(whole.images[mine], whole.labels[mine])
        losses.append(cluster_contrast_step(state, part)["loss"])
    state.average_running_statistics()
    return losses, model.state_dict()


@pytest.mark.slow
def test_two_processes_equal_one(run_in_pool):
    pair = run_in_pool(steps_of_this_process, {"scaling.num_workers": 2})

    losses, weights = steps_of_this_process({})
    for rank in range(2):
        found = {n: t for n, t in pair[rank][1].items() if "num_batches" not in n}
        expected = {n: t for n, t in weights.items() if "num_batches" not in n}
        assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(pair[0][1]["memory.features"], pair[1][1]["memory.features"])
    for step, expected in enumerate(losses):
        assert_close((pair[0][0][step] + pair[1][0][step]) / 2, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_clusters_of_persons_come_out_of_noise():
    persons = torch.arange(6).repeat_interleave(8)
    colors = people(6, seed=3).float().mean(dim=(2, 3), keepdim=True)[persons]
    images = (0.4 * colors + 0.6 * people(48, seed=4).float()).byte()
    state = fresh_state(TINY.override({"training.num_images": 4, "augmentation.padding": 0}))
    generator = torch.Generator().manual_seed(0)

    def margin() -> float:
        """Return by how much images of a person are more alike than those of two."""
        similarity = features() @ features().T
        same = persons[:, None] == persons
        return float(similarity[same].mean() - similarity[~same].mean())

    def features() -> Tensor:
        normalization = state.description.normalization
        return extract_features(state.extractor, [images], normalization)

    before = margin()
    for _ in range(2):
        labels = pseudo_labels(features(), state.config.clustering)
        state.model.memory.begin(torch.from_numpy(labels), centroids(features(), labels))
        for _ in range(8):
            chosen = torch.randint(int(labels.max()) + 1, (4,), generator=generator)
            rows = [
                torch.from_numpy(np.flatnonzero(labels == label))[
                    torch.randint(int((labels == label).sum()), (4,), generator=generator)
                ]
                for label in chosen.tolist()
            ]
            batch = PersonBatch(images[torch.cat(rows)], chosen.repeat_interleave(4))
            cluster_contrast_step(state, batch)

    # Seeds and changes in the sixth digit of the weights give 10 to 28 times as much.
    assert margin() > 5 * before
