"""Every family of backbones trains by the same method; a family of one's own takes one file."""

import textwrap
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from tests.core.test_training import (
    assert_equal,
    batch,
    save,
    statistics,
    steps_of_this_process,
    take_steps,
    without_statistics,
)
from tests.core.tiny import fresh_state, tiny
from upreid_ray.config.errors import InputError
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.core import backbones
from upreid_ray.core.backbone import build_backbone, check_settings
from upreid_ray.core.backbones.resnet_ibn import IBN
from upreid_ray.core.checkpoint import load_checkpoint
from upreid_ray.core.encoder import STATISTICS, has_stochastic_depth
from upreid_ray.core.losses import intrinsic_contrastive
from upreid_ray.core.training import StepDraw, TrainState, encode_shuffled_keys
from upreid_ray.core.weight_files import read_backbone

TERMS = ("consistency", "intrinsic")

TOY = """
    from torch import nn

    from upreid_ray.core.backbones import Family


    class Toys(Family):
        names = ("toy",)

        def build(self, name, *, size, last_stride, drop_path):
            toy = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            toy.num_features = 8
            return toy

        def blocks(self, backbone):
            yield backbone[0]

        def landmarks(self, name=None):
            return ("0.weight", "0.bias")


    FAMILY = Toys()
"""


def test_a_family_of_ones_own_takes_one_file(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(textwrap.dedent(TOY))
    monkeypatch.setattr(backbones, "__path__", [*backbones.__path__, str(tmp_path)])
    toy = build_backbone("toy")
    torch.save(toy.state_dict(), tmp_path / "toy.pth")

    check_settings(tiny({"model.backbone": "toy"}))

    assert toy(torch.zeros(2, 3, 16, 16)).shape == (2, 8)
    assert read_backbone(tmp_path / "toy.pth").name == "toy"


def test_a_name_that_no_family_has_is_refused_with_the_names_there_are():
    with pytest.raises(InputError, match=r"^--model.backbone resnet51: .* resnet18, [^\n]*$"):
        check_settings(tiny({"model.backbone": "resnet51"}))


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        (
            {"model.backbone": "vit_tiny_patch16", "data.height": 60},
            "--data.height 60 --data.width 32: vit_tiny_patch16 takes images whose height and "
            "width are multiples of 16, not 60x32",
        ),
        (
            {"model.backbone": "vit_tiny_patch16", "patches.rows": 8},
            "--patches.rows 8 --patches.columns 2 of images of 64x32: vit_tiny_patch16 takes "
            "patches of at least 16 pixels, not 8x16",
        ),
        (
            {"model.backbone": "timm/convnet_tiny"},
            "--model.backbone timm/convnet_tiny: timm has no such model; did you mean "
            "timm/convnext_tiny?",
        ),
        (
            {"model.backbone": "timm/swin_tiny_patch4_window7_224"},
            "--data.height 64 --data.width 32: timm/swin_tiny_patch4_window7_224 cannot take "
            "images of 64x32 (Input height (64) doesn't match model (224).)",
        ),
        (
            {"model.backbone": "timm/test_convnext"},
            "--patches.rows 2 --patches.columns 2 of images of 64x32: timm/test_convnext "
            "cannot take images of 32x16 (Calculated padded input size per channel: (2 x 1). "
            "Kernel size: (2 x 2). Kernel size can't be greater than actual input size)",
        ),
    ],
)
def test_what_a_backbone_does_not_take_is_refused_in_one_line(settings, refusal):
    with pytest.raises(InputError) as refused:
        check_settings(tiny(settings))

    assert str(refused.value) == refusal


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "vit_tiny_patch16_ics"])
def test_patches_that_are_no_multiple_of_a_token_are_encoded(name):
    config = tiny({"model.backbone": name, "data.height": 128, "patches.rows": 3})
    check_settings(config)
    backbone = build_backbone(name, size=(128, 32)).eval()

    assert backbone(torch.randn(2, 3, 42, 16)).isfinite().all()


def test_ibn_is_instance_normalization_beside_batch_normalization():
    maps = torch.randn(4, 6, 3, 2, generator=torch.Generator().manual_seed(0)) * 2 + 1
    ibn = IBN(6)
    nn.init.uniform_(ibn.IN.weight)
    nn.init.uniform_(ibn.IN.bias)

    expected = torch.cat(
        [ibn.IN(maps[:, :3]), F.batch_norm(maps[:, 3:], None, None, training=True)], 1
    )

    assert_close(ibn(maps), expected)


def test_instance_normalization_of_one_pixel_is_its_bias():
    ibn = IBN(4).double()
    nn.init.uniform_(ibn.IN.bias)

    normalized = ibn(torch.randn(3, 4, 1, 1, dtype=torch.float64))

    assert_close(normalized[:, :2, 0, 0], ibn.IN.bias.expand(3, 2))


@pytest.mark.parametrize("depth", [18, 50])
def test_a_resnet_ibn_has_the_names_of_the_authors_files(depth):
    # Read from ibnnet/resnet_ibn.py and modules.py of https://github.com/XingangPan/IBN-Net:
    # `bn1` of each block of the first three stages holds `IN` and `BN`.
    plain = build_backbone(f"resnet{depth}").state_dict()
    expected = set()
    for name in plain:
        before, found, after = name.partition(".bn1.")
        if not found or name.startswith("layer4"):
            expected.add(name)
        else:
            expected.add(f"{before}.bn1.BN.{after}")
            expected |= {f"{before}.bn1.IN.{after}"} if after in ("weight", "bias") else set()

    ibn = build_backbone(f"resnet{depth}_ibn_a").state_dict()

    assert set(ibn) == expected
    assert ibn["layer1.0.bn1.IN.weight"].shape == ibn["layer1.0.bn1.BN.weight"].shape == (32,)


# Training -----------------------------------------------------------------------------------

# The smallest members; those of timm are made for tests. All other tests train ResNets.
FAMILIES = {
    "resnet18_ibn_a": {},
    "vit_tiny_patch16": {},
    "vit_tiny_patch16_ics": {},
    "timm/test_efficientnet": {},
    # It halves images five times, and takes none that vanish.
    "timm/test_convnext": {"data.height": 128, "data.width": 64},
}
WITHOUT_BATCH_STATISTICS = {"vit_tiny_patch16", "timm/test_convnext"}


def settings_of(name: str) -> dict[str, Any]:
    return {
        **FAMILIES[name],
        "model.backbone": name,
        "optimizer.adamw.warmup_epochs": 0,
        "training.batch_size": 4,
        "training.group_size": 2,
    }


@pytest.fixture(scope="module", params=FAMILIES)
def config(request) -> PretrainConfig:
    return tiny(settings_of(request.param))


@pytest.fixture(scope="module")
def straight(config) -> tuple[TrainState, list[dict[str, Tensor]]]:
    """Take two steps."""
    state = fresh_state(config)
    return state, take_steps(state, 2)


def test_a_resumed_run_ends_as_one_that_went_on(tmp_path, config, straight):
    stopped, resumed = fresh_state(config), fresh_state(config)
    take_steps(stopped, 1)
    save(stopped, tmp_path)

    load_checkpoint(tmp_path, resumed)
    losses = take_steps(resumed, 1)

    assert_equal(straight[1][1], losses[0])
    assert_equal(straight[0].model.state_dict(), resumed.model.state_dict())


def test_every_parameter_that_trains_has_moved(config, straight):
    before = dict(fresh_state(config).model.query_encoder.named_parameters())
    after = straight[0].model.query_encoder.named_parameters()

    still = {name for name, parameter in after if torch.equal(parameter, before[name])}

    is_vit = config.model.backbone == "vit_tiny_patch16"
    frozen = {f"backbone.patch_embed.proj.{end}" for end in ("weight", "bias")}
    assert still == (frozen if is_vit else set())


def test_patches_and_originals_leave_the_statistics_as_they_are(config):
    with_all, alone = (
        fresh_state(config.override({f"loss.{term}_weight": weight for term in TERMS}))
        for weight in (0.1, 0)
    )

    for state in (with_all, alone):
        state.optimizer.step = lambda: None  # the weights stay
        take_steps(state, 1)

    expected = {
        name: buffer
        for name, buffer in alone.model.query_encoder.named_buffers()
        if name.endswith(STATISTICS)
    }
    assert bool(expected) == (config.model.backbone not in WITHOUT_BATCH_STATISTICS)
    for name, buffer in with_all.model.query_encoder.named_buffers():
        if name in expected:
            assert torch.equal(buffer, expected[name]), name


def test_keys_are_shuffled_only_where_there_are_batch_statistics(config):
    draw = StepDraw.at(config, 0)
    unshuffled = replace(draw, shuffle=torch.arange(4))

    keys, plain = (
        encode_shuffled_keys(fresh_state(config), batch(0, config), each).pack()
        for each in (draw, unshuffled)
    )

    assert torch.equal(keys, plain) == (config.model.backbone in WITHOUT_BATCH_STATISTICS)


def test_checkpointed_activations_change_no_gradient(config, straight):
    state = fresh_state(config.override({"training.activation_checkpointing": True}))

    terms = take_steps(state, 2)

    for mine, expected in zip(terms, straight[1], strict=True):
        assert_close(mine["loss"], expected["loss"], rtol=1e-5, atol=1e-5)
        assert_close(mine["grad_norm"], expected["grad_norm"], rtol=1e-3, atol=1e-5)


def test_two_processes_equal_one(run_in_pool, config):
    # AdamW would turn the rounding of a gradient of zero into a step.
    settings = {**settings_of(config.model.backbone), "optimizer.algorithm": "sgd"}

    pair = run_in_pool(steps_of_this_process, settings, 1)

    expected = steps_of_this_process(settings, 1)[2]
    for process in pair:
        assert_close(without_statistics(process[2]), without_statistics(expected))
        for encoder in ("query_encoder", "key_encoder"):
            assert_close(statistics(process[2], encoder), statistics(expected, encoder))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_flip_of_a_view_leaves_the_symmetric_loss(name):
    config = tiny(settings_of(name))
    height, width = config.data.height // 2, config.data.width // 2
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(3, 2, 2, 3, height, width, generator=generator)
    others = torch.randn(12, 3, height, width, generator=generator)
    encoder = fresh_state(config).model.key_encoder.eval()

    with torch.no_grad():
        query = encoder(others).view(3, 4, -1)
        keys, twins = (
            encoder(grid.flatten(0, 2)).view(3, 4, -1) for grid in (patches, patches.flip(2))
        )

    options = {"rows": 2, "columns": 2, "temperature": 0.2, "mining": "symmetry"}
    loss = intrinsic_contrastive(query, keys, **options)
    assert_close(intrinsic_contrastive(query, twins, **options), loss)


def test_stochastic_depth_is_a_function_of_seed_step_and_group():
    config = tiny({"model.backbone": "vit_tiny_patch16"})
    first, again, other = (
        take_steps(fresh_state(config.override({"model.drop_path": rate})), 1)[0]["loss"]
        for rate in (0.5, 0.5, 0.0)
    )

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_only_the_query_encoder_leaves_out_blocks():
    model = fresh_state(tiny({"model.backbone": "vit_tiny_patch16"})).model

    assert has_stochastic_depth(model.query_encoder)
    assert not has_stochastic_depth(model.key_encoder)


def test_norms_biases_tokens_and_positions_do_not_decay():
    state = fresh_state(tiny({"model.backbone": "vit_tiny_patch16"}))
    names = {id(p): name for name, p in state.model.query_encoder.named_parameters()}

    decayed, others = (
        {names[id(p)] for p in group["params"]} for group in state.optimizer.param_groups
    )

    assert [group["weight_decay"] for group in state.optimizer.param_groups] == [0.1, 0.0]
    assert "backbone.blocks.0.attn.qkv.weight" in decayed
    assert {"backbone.pos_embed", "backbone.cls_token", "backbone.norm.weight"} <= others
    assert not any(name.endswith("bias") or "norm" in name for name in decayed)


def test_stochastic_depth_where_there_is_none_is_refused():
    with pytest.raises(InputError, match=r"^--model.drop_path 0.1: resnet18 has no stochastic"):
        check_settings(tiny({"model.drop_path": 0.1}))
