"""A step: a function of seed and step, the same for any number of processes, resumable."""

import copy
import itertools
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from tests.core.tiny import TINY, float64_state, fresh_state, people, tiny
from upreid_ray.config.errors import InputError
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.core import distributed
from upreid_ray.core.checkpoint import (
    BestBackbone,
    export_backbone,
    find_damage,
    load_checkpoint,
    load_tensors,
    read_exported,
    read_position,
    save_checkpoint,
)
from upreid_ray.core.training import (
    StepDraw,
    TrainState,
    encode_shuffled_keys,
    render_views,
    train,
    train_step,
)

STILL = {
    "augmentation.crop_area": (1.0, 1.0),
    "augmentation.crop_ratio": (0.5, 0.5),
    "augmentation.flip_probability": 0,
    "augmentation.grayscale_probability": 0,
    "augmentation.blur_probability": 0,
    "augmentation.erase_probability": 0,
}


def batch(step: int, config: PretrainConfig = TINY) -> Tensor:
    return people(config.training.batch_size, seed=step, config=config)


def take_steps(state: TrainState, number: int) -> list[dict[str, Tensor]]:
    return [train_step(state, batch(state.step, state.config)) for _ in range(number)]


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    momenta = state.optimizer.state_dict()["state"]
    return {
        **state.model.state_dict(),
        **{f"momentum {i}": slot["momentum_buffer"] for i, slot in momenta.items()},
    }


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def save(state: TrainState, folder: Path, best: BestBackbone | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_checkpoint(
        folder, state, best or BestBackbone(), scores_untrained={}, images_per_second=1.0
    )
    return folder


# Learning ------------------------------------------------------------------------------------


def test_the_loss_falls_on_a_fixed_batch():
    images, others = people(8), people(8, seed=1)
    images[:, :, 32:] = others[:, :, 32:]  # rows that can be told apart
    weights = {"loss.consistency_weight": 0, "loss.intrinsic_weight": 4}
    state = fresh_state(tiny({**STILL, **weights, "optimizer.lr": 0.01}))

    losses = [float(train_step(state, images)["loss"]) for _ in range(9)]

    assert losses[-1] < 0.7 * losses[0]


# Determinism ---------------------------------------------------------------------------------


def test_a_run_is_a_function_of_its_seed():
    first, second = fresh_state(), fresh_state()

    losses = [take_steps(state, 2) for state in (first, second)]

    for a, b in zip(*losses, strict=True):
        assert_equal(a, b)
    assert_equal(tensors_of(first), tensors_of(second))


def test_a_run_does_not_depend_on_the_global_seed():
    torch.manual_seed(1)
    first = take_steps(fresh_state(), 1)
    torch.manual_seed(2)
    second = take_steps(fresh_state(), 1)

    assert_equal(first[0], second[0])


def test_a_fresh_state_leaves_the_global_random_state():
    before = torch.random.get_rng_state()

    fresh_state()

    assert torch.equal(torch.random.get_rng_state(), before)


def test_another_seed_starts_from_other_weights():
    first, second = (fresh_state(tiny({"seed": seed})).model for seed in (0, 1))

    name = "query_encoder.backbone.conv1.weight"
    assert not torch.equal(first.state_dict()[name], second.state_dict()[name])


@pytest.mark.parametrize("changed", [{"seed": 1}, {"step": 1}])
def test_another_seed_or_step_draws_other_views_and_another_shuffle(changed):
    seed, step = changed.get("seed", 0), changed.get("step", 0)

    first, other = StepDraw.at(TINY, 0), StepDraw.at(tiny({"seed": seed}), step)

    assert not torch.equal(first.query.crop, other.query.crop)
    assert not torch.equal(first.key.crop, other.key.crop)
    assert not torch.equal(first.shuffle, other.shuffle)


def test_both_views_of_a_step_are_drawn_apart():
    draw = StepDraw.at(TINY, 0)

    assert not torch.equal(draw.query.crop, draw.key.crop)


def test_the_shuffle_is_a_permutation_of_the_batch():
    assert StepDraw.at(TINY, 0).shuffle.sort().values.tolist() == list(range(8))


def test_training_takes_the_steps_that_are_left():
    state = fresh_state(num_steps=3)
    state.step = 1

    reports = list(train(state, iter(batch(step) for step in range(1, 9)), train_step))

    assert [report.step for report in reports] == [2, 3]


def test_the_schedules_are_applied_at_each_step():
    state = fresh_state(tiny({"optimizer.lr": 0.4, "training.epochs": 2}), num_steps=2)

    rates = []
    for _ in range(4):
        take_steps(state, 1)
        rates.append(state.optimizer.param_groups[0]["lr"])

    half_sqrt = 0.5**0.5
    assert_close(rates, [0.4, 0.2 * (1 + half_sqrt), 0.2, 0.2 * (1 - half_sqrt)])


# Keys ----------------------------------------------------------------------------------------


def test_the_keys_of_a_step_enter_the_queue_in_the_order_of_the_batch():
    state = fresh_state()
    keys = encode_shuffled_keys(fresh_state(), batch(0), StepDraw.at(TINY, 0))

    take_steps(state, 1)

    assert_close(state.model.queue.keys[:8], keys.view)


def test_keys_are_of_their_images_whatever_the_shuffle():
    config = tiny({"training.group_size": 8})
    state, draw = float64_state(config), StepDraw.at(config, 0)
    unshuffled = StepDraw(draw.query, draw.key, torch.arange(8))

    shuffled_keys = encode_shuffled_keys(state, batch(0), draw).pack()

    # With one group, normalization is among the same images in either order.
    assert_close(shuffled_keys, encode_shuffled_keys(state, batch(0), unshuffled).pack())


def test_the_shuffle_changes_the_company_of_an_image():
    state, draw = fresh_state(), StepDraw.at(TINY, 0)
    unshuffled = StepDraw(draw.query, draw.key, torch.arange(8))

    shuffled_keys = encode_shuffled_keys(state, batch(0), draw).view

    plain_keys = encode_shuffled_keys(state, batch(0), unshuffled).view
    assert (shuffled_keys - plain_keys).abs().max() > 1e-3


# Patches -------------------------------------------------------------------------------------


def patches_of_striped_images(alignment: str) -> list[Tensor]:
    """Render both views of images whose brightness is the height in the image."""
    config = tiny(
        {
            **STILL,
            "augmentation.crop_area": (0.3, 0.8),
            "augmentation.crop_ratio": (0.4, 0.6),
            "augmentation.flip_probability": 0.5,
            "patches.alignment": alignment,
        }
    )
    images = (torch.arange(64, dtype=torch.uint8) * 4)[:, None].expand(8, 3, 64, 32)
    draw = StepDraw.at(config, 0)
    return [render_views(images, view, config).patches for view in (draw.query, draw.key)]


def test_patches_aligned_to_the_body_show_the_same_rows_in_both_views():
    assert_close(*patches_of_striped_images("body"))


def test_patches_aligned_to_the_view_show_other_rows_in_each_view():
    query, key = patches_of_striped_images("view")

    means = [patches.mean((2, 3, 4)) for patches in (query, key)]
    assert (means[0] - means[1]).abs().amin() > 0.01


def test_patches_aligned_to_the_view_are_cut_from_it():
    config = tiny({"patches.alignment": "view"})
    views = render_views(batch(0), StepDraw.at(config, 0).query, config)

    assert_close(views.patches[:, 0], views.view[:, :, :32, :16])
    assert_close(views.patches[:, 3], views.view[:, :, 32:, 16:])


# Checkpoints ---------------------------------------------------------------------------------


def test_four_steps_are_two_saved_restored_and_two_more(tmp_path):
    straight, resumed = fresh_state(), fresh_state()
    stopped = fresh_state()
    straight_losses = take_steps(straight, 4)
    take_steps(stopped, 2)
    save(stopped, tmp_path)

    load_checkpoint(tmp_path, resumed)
    resumed_losses = take_steps(resumed, 2)

    for a, b in zip(straight_losses[2:], resumed_losses, strict=True):
        assert_equal(a, b)
    assert_equal(tensors_of(straight), tensors_of(resumed))


def test_loading_replaces_everything_of_another_state(tmp_path):
    saved, other = fresh_state(), fresh_state(tiny({"seed": 5}))
    take_steps(saved, 1)
    save(saved, tmp_path)

    load_checkpoint(tmp_path, other)

    assert other.step == 1
    assert_equal(tensors_of(saved), tensors_of(other))


def test_a_new_run_takes_over_tensors_but_neither_position_nor_settings(tmp_path):
    saved, new = fresh_state(), fresh_state(tiny({"optimizer.weight_decay": 0.5}))
    take_steps(saved, 1)
    save(saved, tmp_path)

    load_tensors(tmp_path, new)

    assert new.step == 0
    assert new.optimizer.param_groups[0]["weight_decay"] == 0.5
    assert_equal(tensors_of(saved), tensors_of(new))


def test_a_checkpoint_keeps_what_it_says_beside_its_tensors(tmp_path):
    state = fresh_state()
    best = BestBackbone()
    best.update(state, {"mAP": 0.5})
    save_checkpoint(
        tmp_path, state, best, scores_untrained={"mAP": 0.25}, images_per_second=3.5
    )

    loaded, position = load_checkpoint(tmp_path, fresh_state())

    assert position == read_position(tmp_path)
    assert PretrainConfig.parse(position.config) == TINY
    assert position.scores_untrained == {"mAP": 0.25}
    assert position.images_per_second == 3.5
    assert (loaded.step, loaded.scores) == (0, {"mAP": 0.5})
    assert_equal(loaded.weights, best.weights)


def test_the_best_backbone_is_the_one_with_the_best_map():
    state, best, taken = fresh_state(), BestBackbone(), []

    for step, score in enumerate([0.2, 0.4, 0.4, 0.3, 0.5]):
        state.step = step
        best.update(state, {"mAP": score})
        taken.append(best.step)

    assert taken == [0, 1, 1, 1, 4]


def test_a_backbone_that_is_not_finite_is_never_the_best(caplog):
    state, best = fresh_state(), BestBackbone()
    best.update(state, {"mAP": 0.2})
    before = copy.copy(best)
    state.step = 7
    state.extractor.layer1[0].bn1.running_var[3] = math.inf

    best.update(state, {"mAP": 0.9})

    assert best == before
    assert "step 7: the backbone is not taken as the best one" in caplog.text
    assert "layer1.0.bn1.running_var" in caplog.text


def test_the_best_backbone_without_scores_is_the_newest():
    state, best = fresh_state(), BestBackbone()

    for state.step in (0, 1, 2):
        best.update(state, {})

    assert best.step == 2


def test_the_best_backbone_does_not_follow_the_training():
    state, best = fresh_state(), BestBackbone()
    best.update(state, {"mAP": 0.5})
    before = {name: tensor.clone() for name, tensor in best.weights.items()}

    take_steps(state, 1)

    assert_equal(best.weights, before)


def test_torchvision_loads_an_exported_backbone(tmp_path):
    state, best = fresh_state(), BestBackbone()
    best.update(state, {})
    save(state, tmp_path, best)
    out = tmp_path / "out"
    out.mkdir()

    export_backbone(tmp_path, out)

    theirs = torchvision.models.resnet18(weights=None)
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(load_file(out / "backbone.safetensors"), strict=True)
    assert_equal(theirs.state_dict(), state.model.query_encoder.backbone.state_dict())


# Numerics ------------------------------------------------------------------------------------


def update_with(state: TrainState, gradient: float, **settings: Any) -> dict[str, Tensor]:
    """Take an update whose gradient is this number everywhere."""
    for parameter in state.model.query_encoder.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    return state.update(**{"lr": 0.1, "clip_norm": None, **settings})


@pytest.mark.parametrize("gradient", [float("nan"), float("inf")])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_gradient_that_is_not_finite_changes_nothing(gradient, is_first):
    state = fresh_state()
    if not is_first:
        update_with(state, 0.5)
    before = copy.deepcopy(tensors_of(state))

    update_with(state, gradient)

    assert_equal(tensors_of(state), before)


# Part of a model, which of its calls in a step is disturbed, and the factor of its output.
DISTURBANCES = {
    "query": ("query_encoder.backbone.layer1", 0, math.inf),
    "patches of the last group": ("query_encoder.backbone.layer1", 3, math.nan),
    "key": ("key_encoder.backbone.layer1", 0, math.inf),
    "keys of patches": ("key_encoder.projection_head", 2, math.inf),
    # The variance overflows, by which batch normalization divides: its output is 0.
    "query statistics": ("query_encoder.backbone.layer2.0.conv1", 0, 1e25),
    "key statistics": ("key_encoder.backbone.layer2.0.conv1", 0, 1e25),
}


@contextmanager
def disturbed(state: TrainState, disturbance: str) -> Iterator[None]:
    name, number, factor = DISTURBANCES[disturbance]
    calls = itertools.count()
    hook = state.model.get_submodule(name).register_forward_hook(
        lambda _, __, output: output * factor if next(calls) == number else output
    )
    yield
    hook.remove()
    assert next(calls) > number


def step_of_this_process(state: TrainState, step: int) -> dict[str, Tensor]:
    config = state.config
    size = config.training.group_size
    groups = distributed.groups_of_this_worker(config.num_groups)
    return train_step(state, batch(step, config)[groups.start * size : groups.stop * size])


def effects_of_a_disturbance(disturbance: str, rank: int) -> tuple[list[str], float, list[str]]:
    """Take a step that is disturbed at one process, and then another step.

    Returns:
        Tensors that the disturbed step has changed; how many steps it says were skipped; and
        tensors that the next step leaves other than without the disturbed one.
    """
    config = tiny({"scaling.num_workers": distributed.world_size()})
    state, undisturbed = fresh_state(config), fresh_state(config)
    for each in (state, undisturbed):
        step_of_this_process(each, 0)
    before = copy.deepcopy(tensors_of(state))
    with disturbed(state, disturbance) if rank == distributed.rank() else nullcontext():
        skipped = float(step_of_this_process(state, 1)["skipped"])
    changed = differing(tensors_of(state), before)
    undisturbed.step = 2
    for each in (state, undisturbed):
        step_of_this_process(each, 2)
    return changed, skipped, differing(tensors_of(state), tensors_of(undisturbed))


def differing(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    return [name for name in left if not torch.equal(left[name], right[name])]


@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_a_step_that_is_not_finite_changes_nothing(disturbance):
    assert effects_of_a_disturbance(disturbance, 0) == ([], 1, [])


@pytest.mark.parametrize("disturbance", ["query", "keys of patches", "key statistics"])
@pytest.mark.slow
def test_a_step_that_is_not_finite_at_one_process_changes_nothing_at_any(
    run_in_pool, disturbance
):
    effects = run_in_pool(effects_of_a_disturbance, disturbance, 1)

    assert effects == [([], 1, [])] * 2


def test_the_count_of_skipped_steps_survives_a_resume(tmp_path):
    state, resumed = fresh_state(), fresh_state()
    for _ in range(2):
        update_with(state, float("nan"))
    save(state, tmp_path)

    load_checkpoint(tmp_path, resumed)

    assert int(update_with(resumed, float("nan"))["skipped"]) == 3


def test_a_checkpoint_without_the_count_of_skipped_steps_can_be_loaded(tmp_path):
    state = fresh_state()
    save(state, tmp_path)
    position = json.loads((tmp_path / "state.json").read_text())
    del position["num_skipped"]
    (tmp_path / "state.json").write_text(json.dumps(position))

    load_checkpoint(tmp_path, state)

    assert int(state.num_skipped) == 0


def test_training_goes_on_after_a_skipped_step_as_if_it_had_not_been():
    skipping, undisturbed = fresh_state(), fresh_state()

    update_with(skipping, float("nan"))
    for state in (skipping, undisturbed):
        update_with(state, 0.5)

    assert_equal(tensors_of(skipping), tensors_of(undisturbed))


def test_skipped_steps_are_counted_in_a_row():
    state = fresh_state()
    gradients = [1.0, float("nan"), float("inf"), 1.0, float("nan")]

    counts = [int(update_with(state, gradient)["skipped"]) for gradient in gradients]

    assert counts == [0, 1, 2, 0, 1]


def test_the_norm_of_the_gradient_is_that_of_all_parameters():
    state = fresh_state()
    numbers = sum(p.numel() for p in state.model.query_encoder.parameters())

    norm = update_with(state, 0.5)["grad_norm"]

    assert_close(norm, torch.tensor(0.5 * numbers**0.5))


def test_a_gradient_is_clipped_to_the_norm():
    clipped, scaled = fresh_state(), fresh_state()
    norm = float(update_with(fresh_state(), 0.5)["grad_norm"])

    update_with(clipped, 0.5, clip_norm=norm / 4)
    update_with(scaled, 0.5 / 4)

    left, right = tensors_of(clipped), tensors_of(scaled)
    for name, tensor in left.items():
        assert_close(tensor, right[name])


def test_a_gradient_below_the_norm_is_left_as_it_is():
    clipped, free = fresh_state(), fresh_state()
    norm = float(update_with(fresh_state(), 0.5)["grad_norm"])

    update_with(clipped, 0.5, clip_norm=2 * norm)
    update_with(free, 0.5)

    assert_equal(tensors_of(clipped), tensors_of(free))


# Damage --------------------------------------------------------------------------------------


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    state, best = fresh_state(), BestBackbone()
    best.update(state, {})
    return save(state, tmp_path_factory.mktemp("whole"), best)


def test_a_checkpoint_as_it_was_written_is_whole(whole):
    assert find_damage(whole) is None


@pytest.mark.parametrize("harm", [flip_a_bit, cut_in_half, Path.unlink])
@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "optimizer.pt",
        "best_backbone.safetensors",
        "state.json",
        "sha256.json",
    ],
)
def test_a_damaged_checkpoint_is_told_with_its_file(whole, tmp_path, harm, name):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    harm(folder / name)

    said = str(find_damage(folder))
    # A wrong hash looks like a wrong file.
    assert said.split(maxsplit=1)[0] == name or (
        name == "sha256.json" and "not what was" in said
    )


def test_a_damaged_checkpoint_is_no_initialization(whole, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    flip_a_bit(folder / "best_backbone.safetensors")

    with pytest.raises(InputError, match=r"a damaged checkpoint \(best_backbone.safetensors"):
        read_exported(folder)


# Two processes -------------------------------------------------------------------------------

# Four groups, or three, of which the first process has two.
PAIRS = [
    {"training.batch_size": 8, "training.group_size": 2},
    {"training.batch_size": 6, "training.group_size": 2},
]


def thinned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy a thousand values of each tensor, which travel faster than millions."""
    return {
        name: tensor.flatten()[:: -(-tensor.numel() // 1000)].clone()
        for name, tensor in tensors.items()
    }


def steps_of_this_process(settings: dict[str, Any], number: int) -> tuple[list, dict, dict]:
    """Train on this process's rows of the batches.

    Returns:
        The losses, and values of all tensors before and after the averaging of statistics.
    """
    config = tiny({**settings, "scaling.num_workers": distributed.world_size()})
    state = float64_state(config)
    size, groups = (
        config.training.group_size,
        distributed.groups_of_this_worker(config.num_groups),
    )
    own = slice(groups.start * size, groups.stop * size)
    losses = [train_step(state, batch(step, config)[own]) for step in range(number)]
    before = thinned(tensors_of(state))
    state.average_running_statistics()
    return losses, before, thinned(tensors_of(state))


@pytest.fixture(scope="module", params=PAIRS, ids=["equal parts", "unequal parts"])
def settings_of_both(request) -> dict[str, Any]:
    return request.param


@pytest.fixture(scope="module")
def alone(settings_of_both) -> tuple[list, dict, dict]:
    return steps_of_this_process(settings_of_both, 2)


@pytest.fixture(scope="module")
def pair(run_in_pool, settings_of_both) -> list[tuple[list, dict, dict]]:
    return run_in_pool(steps_of_this_process, settings_of_both, 2)


def without_statistics(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return {name: t for name, t in tensors.items() if not name.endswith(statistics)}


def statistics(tensors: dict[str, Tensor], encoder: str) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith(encoder) and name.endswith(("running_mean", "running_var"))
    }


@pytest.mark.slow
def test_the_mean_losses_of_two_processes_are_those_of_one(alone, pair):
    for expected, first, second in zip(alone[0], pair[0][0], pair[1][0], strict=True):
        assert_close({name: (first[name] + second[name]) / 2 for name in expected}, expected)


@pytest.mark.slow
def test_the_queue_of_two_processes_is_that_of_one(alone, pair):
    for process in pair:
        assert_close(process[2]["queue.keys"], alone[2]["queue.keys"])


@pytest.mark.slow
def test_the_weights_of_two_processes_are_those_of_one(alone, pair):
    for process in pair:
        assert_close(without_statistics(process[2]), without_statistics(alone[2]))


@pytest.mark.slow
def test_two_processes_have_equal_weights_and_queues(pair):
    first, second = (without_statistics(process[1]) for process in pair)

    assert_equal(first, second)


@pytest.mark.parametrize("encoder", ["query_encoder", "key_encoder"])
@pytest.mark.slow
def test_averaged_running_statistics_of_two_processes_are_those_of_one(alone, pair, encoder):
    for process in pair:
        assert_close(statistics(process[2], encoder), statistics(alone[2], encoder))


@pytest.mark.slow
def test_running_statistics_differ_before_they_are_averaged(pair):
    first, second = (statistics(process[1], "query_encoder") for process in pair)

    assert not any(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_two_processes_train_with_the_first_term_alone(run_in_pool):
    settings = {**PAIRS[0], "loss.consistency_weight": 0, "loss.intrinsic_weight": 0}

    pair = run_in_pool(steps_of_this_process, settings, 1)

    alone = steps_of_this_process(settings, 1)
    assert_close(without_statistics(pair[0][2]), without_statistics(alone[2]))
