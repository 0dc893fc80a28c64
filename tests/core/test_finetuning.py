"""Fine-tuning: its loss by plain loops, its step for any number of processes, resumable."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests import reference
from tests.core.tiny import people
from upreid_ray.config.downstream import (
    FinetuneConfig,
    FinetuneOptimizerConfig,
    FinetuneTrainingConfig,
)
from upreid_ray.config.run import ScalingConfig
from upreid_ray.core import distributed
from upreid_ray.core.backbone import Description, build_backbone
from upreid_ray.core.checkpoint import (
    BestBackbone,
    export_backbone,
    load_checkpoint,
    read_exported,
    save_checkpoint,
)
from upreid_ray.core.finetuning import (
    FinetuneState,
    PersonBatch,
    draw_shifted_views,
    finetune_step,
)
from upreid_ray.core.losses import batch_hard_triplet

IMAGES = Description(
    backbone="resnet18", height=64, width=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
)
TINY = FinetuneConfig(
    optimizer=FinetuneOptimizerConfig(lr=1e-3, warmup_epochs=0, milestones=()),
    training=FinetuneTrainingConfig(
        epochs=1, num_persons=4, num_images=2, num_groups=2, precision="fp32"
    ),
    scaling=ScalingConfig(num_workers=1, use_gpu=False),
)
NUM_PERSONS = 6
LABELS = torch.arange(4).repeat_interleave(2)


def fresh_state(config: FinetuneConfig = TINY) -> FinetuneState:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = build_backbone("resnet18", last_stride=config.training.last_stride)
    return FinetuneState(
        config,
        backbone,
        IMAGES,
        num_persons=NUM_PERSONS,
        steps_per_epoch=20,
        device=torch.device("cpu"),
    )


def batch(step: int = 0) -> PersonBatch:
    return PersonBatch(people(8, seed=step), (LABELS + step) % NUM_PERSONS)


def take_steps(state: FinetuneState, number: int) -> list[dict[str, Tensor]]:
    return [finetune_step(state, batch(state.step)) for _ in range(number)]


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@given(
    size=st.integers(2, 12),
    num_persons=st.integers(2, 4),
    margin=st.sampled_from([0.1, 0.3, 2.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_triplet_loss_is_its_formula(size, num_persons, margin, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    pids = torch.randint(num_persons, (size,), generator=generator)
    pids[:2] = torch.tensor([0, 1])

    loss = batch_hard_triplet(features, pids, margin=margin)

    expected = reference.batch_hard_triplet(features.tolist(), pids.tolist(), margin)
    assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)


def test_the_triplet_loss_of_equal_features_is_its_margin():
    loss = batch_hard_triplet(torch.ones(4, 8), torch.tensor([0, 0, 1, 1]), margin=0.3)

    assert float(loss) == pytest.approx(0.3)


def test_the_triplet_loss_of_equal_features_has_a_finite_gradient():
    features = torch.ones(4, 8, requires_grad=True)

    batch_hard_triplet(features, torch.tensor([0, 0, 1, 1]), margin=0.3).backward()

    assert features.grad.isfinite().all()


def test_persons_far_apart_have_no_triplet_loss():
    features = torch.tensor([[0.0], [0.1], [9.0], [9.1]])

    assert batch_hard_triplet(features, torch.tensor([0, 0, 1, 1]), margin=0.3) == 0


def test_the_loss_falls_on_a_fixed_batch():
    state = fresh_state(
        TINY.override(
            {
                "augmentation.padding": 0,
                "augmentation.flip_probability": 0,
                "augmentation.erase_probability": 0,
            }
        )
    )

    losses = [float(finetune_step(state, batch())["loss"]) for _ in range(8)]

    assert losses[-1] < 0.7 * losses[0]


def test_the_last_stage_keeps_the_resolution():
    shapes = {}
    for stride in (1, 2):
        backbone = build_backbone("resnet18", last_stride=stride)
        backbone.layer4.register_forward_hook(
            lambda _, __, maps, stride=stride: shapes.update({stride: maps.shape[2:]})
        )
        backbone(torch.zeros(2, 3, 64, 32))

    assert shapes == {1: (4, 2), 2: (2, 1)}


def test_every_weight_but_the_bias_of_the_neck_learns():
    state = fresh_state()
    before = {name: p.clone() for name, p in state.model.named_parameters()}

    take_steps(state, 1)

    still = [n for n, p in state.model.named_parameters() if torch.equal(p, before[n])]
    assert still == ["extractor.neck.bias"]


def test_views_are_shifted_within_the_padding():
    config = TINY.override({"augmentation.padding": 3})
    state = fresh_state(config)

    views = draw_shifted_views(config, torch.Size([64, 32]), state.augmentation, 0)

    assert views.crop[:, :2].abs().max() <= 3
    assert views.crop[:, :2].unique().numel() > 1
    assert views.crop[:, 2:].unique(dim=0).tolist() == [[64, 32]]
    assert not views.gray.any()
    assert not views.blur_sigma.any()


def test_a_shifted_view_shows_black_where_its_image_ends():
    settings = {"flip_probability": 0, "erase_probability": 0, "padding": 10}
    state = fresh_state(
        TINY.override({f"augmentation.{name}": value for name, value in settings.items()})
    )
    seen = []
    state.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    finetune_step(
        state, PersonBatch(torch.full((8, 3, 64, 32), 255, dtype=torch.uint8), LABELS)
    )

    views = torch.cat(seen)
    black, white = ((value - 0.5) / 0.25 for value in (0, 1))
    drawn = draw_shifted_views(state.config, views.shape[2:], state.augmentation, 0)
    for view, (top, left, _, _) in zip(views, drawn.crop.int().tolist(), strict=True):
        expected = torch.full((3, 64, 32), black)
        rows, columns = (
            slice(max(0, -start), size - max(0, start))
            for start, size in ((top, 64), (left, 32))
        )
        expected[:, rows, columns] = white
        assert_close(view, expected)


def test_what_is_erased_shows_the_mean_colour():
    settings = {"flip_probability": 0, "erase_probability": 1, "padding": 10}
    state = fresh_state(
        TINY.override({f"augmentation.{name}": value for name, value in settings.items()})
    )
    seen = []
    state.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    finetune_step(
        state, PersonBatch(torch.full((8, 3, 64, 32), 255, dtype=torch.uint8), LABELS)
    )

    assert torch.cat(seen).unique().tolist() == [-2, 0, 2]


def test_a_step_is_a_function_of_seed_and_step():
    first, second = fresh_state(), fresh_state()
    torch.manual_seed(1)
    take_steps(first, 2)
    torch.manual_seed(2)
    take_steps(second, 2)

    assert_equal(first.model.state_dict(), second.model.state_dict())


def test_a_step_that_is_not_finite_changes_nothing():
    state = fresh_state()
    take_steps(state, 1)
    before = copy.deepcopy((state.model.state_dict(), state.optimizer.state_dict()["state"]))
    hook = state.model.extractor.backbone.layer1.register_forward_hook(
        lambda _, __, output: output * math.inf
    )

    terms = take_steps(state, 1)[0]

    hook.remove()
    assert int(terms["skipped"]) == 1
    assert_equal(state.model.state_dict(), before[0])
    for index, tensors in state.optimizer.state_dict()["state"].items():
        assert_equal(tensors, before[1][index])
    assert int(take_steps(state, 1)[0]["skipped"]) == 0


def test_resuming_is_going_on(tmp_path):
    whole, begun, resumed = fresh_state(), fresh_state(), fresh_state()
    take_steps(whole, 4)
    take_steps(begun, 2)
    best = BestBackbone()
    best.update(begun, {})
    save_checkpoint(tmp_path, begun, best, scores_untrained={}, images_per_second=1.0)

    load_checkpoint(tmp_path, resumed)
    take_steps(resumed, 2)

    assert_equal(whole.model.state_dict(), resumed.model.state_dict())


def test_an_export_gives_backbone_and_neck_again(tmp_path):
    state = fresh_state()
    take_steps(state, 2)
    best = BestBackbone()
    best.update(state, {})
    save_checkpoint(tmp_path, state, best, scores_untrained={}, images_per_second=1.0)
    out = tmp_path / "out"
    out.mkdir()

    export_backbone(tmp_path, out)

    images, expected = torch.randn(2, 3, 64, 32), state.extractor.eval()
    for folder in (tmp_path, out):
        description, weights, neck = read_exported(folder)
        assert (description.last_stride, description.has_neck) == (1, True)
        extractor = description.extractor(weights, neck).eval()
        assert_close(extractor(images), expected(images))


def steps_of_this_process(settings: dict[str, Any]) -> tuple[list[dict], dict]:
    """Take two steps with this process's share of each batch, in float64."""
    config = TINY.override(settings)
    torch.set_default_dtype(torch.float64)
    try:
        state = fresh_state(config)
    finally:
        torch.set_default_dtype(torch.float32)
    state.model.extractor.neck.double()
    state.model.classifier.register_forward_pre_hook(lambda _, x: (x[0].double(),))
    state.model.extractor.neck.register_forward_pre_hook(lambda _, x: (x[0].double(),))
    state.model.extractor.backbone.register_forward_pre_hook(lambda _, x: (x[0].double(),))
    size = config.training.batch_size // distributed.world_size()
    mine = slice(distributed.rank() * size, (distributed.rank() + 1) * size)
    losses = []
    for step in range(2):
        images = batch(step)
        losses.append(
            finetune_step(state, PersonBatch(images.images[mine], images.labels[mine]))
        )
    state.average_running_statistics()
    return losses, state.model.state_dict()


@pytest.mark.slow
def test_two_processes_equal_one(run_in_pool):
    pair = run_in_pool(steps_of_this_process, {"scaling.num_workers": 2})

    losses, weights = steps_of_this_process({})
    counters = "num_batches_tracked"
    for rank in range(2):
        found = {n: t for n, t in pair[rank][1].items() if not n.endswith(counters)}
        expected = {n: t for n, t in weights.items() if not n.endswith(counters)}
        assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for step, expected in enumerate(losses):
        means = {n: (pair[0][0][step][n] + pair[1][0][step][n]) / 2 for n in expected}
        assert_close(means, expected, rtol=1e-4, atol=1e-5)


def test_each_group_has_triplets_of_its_own():
    config = TINY.override({"augmentation.padding": 0})
    state = fresh_state(config)
    seen = []
    state.model.register_forward_hook(lambda _, __, outputs: seen.append(outputs[0].detach()))

    terms = finetune_step(state, batch())

    labels = batch().labels
    expected = [
        batch_hard_triplet(features, labels[rows], margin=0.3)
        for features, rows in zip(seen, (slice(0, 4), slice(4, 8)), strict=True)
    ]
    assert_close(terms["triplet"], sum(expected) / 2)


def test_the_identity_loss_is_smoothed():
    state = fresh_state()
    seen = []
    state.model.register_forward_hook(lambda _, __, outputs: seen.append(outputs[1].detach()))

    terms = finetune_step(state, batch())

    expected = F.cross_entropy(torch.cat(seen), batch().labels, label_smoothing=0.1)
    assert_close(terms["identity"], expected)
