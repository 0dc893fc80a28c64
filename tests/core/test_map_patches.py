"""Patches that are cells of a feature map instead of parts of the image."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.core.test_model import TERMS, model_of, passes, terms_of, views_of
from tests.core.test_training import (
    assert_equal,
    save,
    steps_of_this_process,
    take_steps,
    without_statistics,
)
from tests.core.tiny import fresh_state, tiny
from upreid_ray.config.errors import InputError
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.core.backbone import check_settings
from upreid_ray.core.checkpoint import load_checkpoint
from upreid_ray.core.model import UPReID

MAP = {"patches.source": "map", "patches.alignment": "view"}


def map_config(settings: dict[str, object] | None = None) -> PretrainConfig:
    return tiny(MAP | (settings or {}))


@pytest.fixture(scope="module")
def original() -> UPReID:
    return model_of(map_config())


@pytest.fixture
def model(original: UPReID) -> UPReID:
    return copy.deepcopy(original)


def map_of(encoder: nn.Module, images: Tensor) -> Tensor:
    """Return the output of the third stage."""
    maps: list[Tensor] = []
    hook = encoder.backbone.layer3.register_forward_hook(lambda *each: maps.append(each[2]))
    with torch.no_grad():
        encoder.backbone(images)
    hook.remove()
    return maps[0]


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (4, 1), (3, 2)])
def test_a_patch_is_the_mean_of_its_part_of_the_map(rows, columns):
    config = map_config({"patches.rows": rows, "patches.columns": columns})
    model = model_of(config).double()
    view = views_of(config, for_keys=True).view.double()
    maps = map_of(model.key_encoder, view)
    height, width = maps.shape[2:]

    _, patches = model.key_encoder(view, grid=(rows, columns))

    for image in range(len(view)):
        for row in range(rows):
            # As PyTorch's adaptive pooling, whose parts overlap where they do not fit.
            top, bottom = row * height // rows, -(-(row + 1) * height // rows)
            for column in range(columns):
                left, right = column * width // columns, -(-(column + 1) * width // columns)
                cell = maps[image, :, top:bottom, left:right].mean(dim=(1, 2))
                expected = model.key_encoder.cell_head(cell)
                found = patches[image, row * columns + column]
                assert_close(found, (expected / expected.norm()).float())


def test_the_embedding_of_the_image_is_that_without_patches(model):
    view = views_of(map_config(), for_keys=False).view

    with_patches, _ = model.query_encoder(view, grid=(2, 2))

    assert torch.equal(with_patches, model.query_encoder(view))


def test_keys_of_patches_are_those_of_the_key_encoder(model):
    for weight in model.query_encoder.parameters():
        weight.data.add_(1)
    views = views_of(map_config(), for_keys=True)

    keys = model.encode_keys(views, statistics_momentum=0.1)

    assert views.patches is None
    with torch.no_grad():
        view, patches = model.key_encoder(views.view, grid=(2, 2))
    assert torch.equal(keys.view, view)
    assert torch.equal(keys.patches, patches)


def test_the_intrinsic_term_moves_what_the_map_depends_on_and_nothing_else(model):
    terms_of(model, map_config())["intrinsic_contrastive"].backward()

    behind = ("backbone.layer4", "projection_head")
    for name, weight in model.query_encoder.named_parameters():
        assert (weight.grad is None) == name.startswith(behind), name
        assert weight.grad is None or weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("term", TERMS)
def test_no_term_has_a_gradient_for_the_key_encoder(model, term):
    terms_of(model, map_config())[term].backward()

    assert all(weight.grad is None for weight in model.key_encoder.parameters())


def test_cells_cost_no_pass():
    counts, terms = passes(map_config())

    assert counts == {"query": 2, "key": 2 * 2}
    assert terms.keys() >= set(TERMS)


def test_without_the_intrinsic_term_there_is_no_head_for_cells():
    config = map_config({"loss.intrinsic_weight": 0})

    names = [name for name, _ in model_of(config).named_parameters()]

    assert not [name for name in names if "cell_head" in name]


def test_checkpointed_activations_change_no_gradient(original):
    gradients = []
    for checkpointing in (False, True):
        model = model_of(map_config({"training.activation_checkpointing": checkpointing}))
        terms_of(model, map_config())["loss"].backward()
        gradients.append([weight.grad for weight in model.query_encoder.parameters()])

    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_a_resumed_run_ends_as_one_that_went_on(tmp_path):
    straight, stopped, resumed = (fresh_state(map_config()) for _ in range(3))
    take_steps(straight, 2)
    take_steps(stopped, 1)
    save(stopped, tmp_path)

    load_checkpoint(tmp_path, resumed)
    take_steps(resumed, 1)

    assert_equal(straight.model.state_dict(), resumed.model.state_dict())


@pytest.mark.slow
def test_two_processes_equal_one(run_in_pool):
    pair = run_in_pool(steps_of_this_process, MAP, 2)

    expected = steps_of_this_process(MAP, 2)[2]
    for process in pair:
        assert_close(without_statistics(process[2]), without_statistics(expected))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patches.alignment": "body"}, "--patches.alignment body: "),
        ({"patches.key_encoder": "query"}, "--patches.key_encoder query: "),
        ({"patches.rows": 5}, "--patches.rows 5 --patches.columns 2: .* only 4x2 cells"),
        ({"patches.columns": 3}, "--patches.rows 2 --patches.columns 3: .* only 4x2 cells"),
        (
            {"model.backbone": "vit_tiny_patch16"},
            "--patches.source map: needs a ResNet; vit_tiny_patch16 ",
        ),
    ],
    ids=["body", "query encoder", "too many rows", "too many columns", "no map"],
)
def test_what_a_map_cannot_give_is_refused_by_its_flag(settings, message):
    with pytest.raises(InputError, match=f"^{message}"):
        check_settings(map_config(settings))
