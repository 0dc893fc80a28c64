"""Weights of the field's tools load by their rules; what is refused is named for what it is."""

import argparse
import string
import warnings

import numpy as np
import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.core.test_backbone import assert_holds, prefixed, refusal, save
from upreid_ray.config.errors import InputError
from upreid_ray.core.backbone import build_backbone
from upreid_ray.core.weight_files import read_backbone

Weights = dict[str, Tensor]


def other(weights: Weights) -> Weights:
    """Return the weights of the network that is not meant."""
    return {name: tensor + 1 for name, tensor in weights.items()}


def sequential(weights: Weights) -> Weights:
    """Name the weights as torch.nn.Sequential(*resnet.children()) does."""
    parts = [name for name, _ in torchvision.models.resnet18().named_children()]
    return {
        f"{parts.index(name.split('.')[0])}.{name.partition('.')[2]}": tensor
        for name, tensor in weights.items()
    }


FORMATS = {
    "torchreid, with a numpy scalar": lambda weights: {
        "state_dict": prefixed("module.", weights),
        "epoch": 60,
        "rank1": np.float32(0.9),
        "optimizer": {},
    },
    "CION": lambda weights: {"teacher": prefixed("module.backbone.", weights)},
    "DINO": lambda weights: {
        "student": prefixed("module.backbone.", other(weights)),
        "teacher": prefixed("backbone.", weights),
        "args": argparse.Namespace(arch="resnet18", lr=0.1),
        "epoch": 3,
    },
    "solo-learn": lambda weights: {
        "state_dict": prefixed("backbone.", weights)
        | prefixed("momentum_backbone.", other(weights))
        | {"projector.0.weight": torch.zeros(2)}
    },
    "lightly": lambda weights: (
        prefixed("backbone.", sequential(weights))
        | prefixed("backbone_momentum.", sequential(other(weights)))
    ),
    "MoCo v3": lambda weights: {
        "state_dict": prefixed(
            "module.base_encoder.", weights | {"fc.0.weight": torch.zeros(2)}
        )
        | prefixed("module.momentum_encoder.", other(weights)),
        "arch": "resnet18",
    },
    "BYOL": lambda weights: (
        prefixed("online_encoder.net.", weights)
        | prefixed("target_encoder.net.", other(weights))
    ),
    "VISSL": lambda weights: {
        "classy_state_dict": {
            "base_model": {
                "model": {"trunk": prefixed("_feature_blocks.", weights), "heads": {}}
            }
        },
        "loss": 1.0,
    },
    "MMPretrain": lambda weights: {
        "meta": {"epoch": 3},
        "state_dict": prefixed("backbone.", weights) | {"head.fc.weight": torch.zeros(2)},
    },
    **{
        container: lambda weights, container=container: {container: weights}
        for container in ("student", "net", "network", "weights", "model_state_dict")
    },
}


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS.keys())
def test_checkpoints_of_the_fields_tools_are_read(tmp_path, backbone, make):
    assert_holds(save(make(backbone), tmp_path / "checkpoint.pth"), backbone)


def test_a_prefix_chooses_among_several_networks(tmp_path, backbone):
    both = prefixed("module.encoder_q.", other(backbone)) | prefixed(
        "module.encoder_k.", backbone
    )
    file = save({"state_dict": both}, tmp_path / "moco.pth.tar")

    assert_holds(f"{file}#encoder_k", backbone)
    assert_holds(f"{file}#module.encoder_q", other(backbone))


def test_a_prefix_that_no_network_has_is_refused_with_those_there_are(tmp_path, backbone):
    both = prefixed("a.", backbone) | prefixed("b.", backbone)
    file = save(both, tmp_path / "weights.pth")

    with pytest.raises(InputError, match=r"choose with .*weights.pth#PREFIX: a, b$"):
        read_backbone(f"{file}#c")


def test_a_file_whose_own_name_has_a_number_sign_is_read(tmp_path, backbone):
    assert_holds(save(backbone, tmp_path / "weights#1.pth"), backbone)


def test_safetensors_are_known_by_their_content(tmp_path, backbone):
    file = save(backbone, tmp_path / "weights.safetensors").rename(tmp_path / "weights.bin")

    assert_holds(file, backbone)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"", "the file is empty"),
        (b"\x08\x07\x12\x07pytorch", "no PyTorch or safetensors file"),
    ],
)
def test_a_file_that_is_no_weights_is_called_what_it_is(tmp_path, content, what):
    file = tmp_path / "weights.pth"
    file.write_bytes(content)

    assert what in refusal(file)


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:FutureWarning")
def test_torchscript_is_called_what_it_is(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "weights.pth"))

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        message = refusal(tmp_path / "weights.pth")

    assert "it is a TorchScript module" in message
    assert not shown


def test_a_pickled_module_names_the_class_that_is_not_loaded(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "weights.pth")

    message = refusal(tmp_path / "weights.pth")

    assert "it holds an object of torch.nn.modules.linear.Linear" in message
    assert "torch.save(model.state_dict(), FILE)" in message


@pytest.mark.parametrize("kind", ["a", "b"])
def test_a_resnet_of_another_kind_names_what_differs(tmp_path, backbone, kind):
    # IBN-b has an instance normalization at the end of a stage.
    weights = dict(backbone)
    if kind == "a":
        del weights["layer1.0.bn1.weight"]
        weights["layer1.0.bn1.IN.weight"] = torch.ones(32)
    else:
        weights["layer1.1.IN.weight"] = torch.ones(64)

    message = refusal(save(weights, tmp_path / "w.pth"))

    assert ("resnet18_ibn_a" if kind == "a" else "such as layer1.1.IN.weight") in message


@pytest.fixture(scope="module")
def vit() -> Weights:
    return build_backbone("vit_tiny_patch16", size=(64, 32)).state_dict()


def in_chunks(weights: Weights) -> Weights:
    """Name blocks as a chunked DINOv2 does: all of them in the first chunk."""
    return {name.replace("blocks.", "blocks.0."): tensor for name, tensor in weights.items()}


# Containers and prefixes of the tools' own savers and loaders: main_dino.py of TransReID-SSL,
# PersonViT and CION, whose vit_pytorch.py reads "teacher"; main_moco.py of MoCo v3; the
# checkpointer of DINOv2; vit_pytorch.py of TransReID; solo-learn's Trainer.
VIT_FORMATS = {
    "timm": lambda weights: (
        weights | {"head.weight": torch.zeros(2), "head.bias": torch.zeros(2)}
    ),
    "TransReID-SSL, DINO": lambda weights: {
        "student": prefixed("module.backbone.", other(weights)),
        "teacher": prefixed("backbone.", weights) | {"head.mlp.0.weight": torch.zeros(2)},
        "args": argparse.Namespace(arch="vit_small"),
    },
    "PersonViT, CION": lambda weights: {
        "teacher": prefixed("module.backbone.", weights | {"mask_token": torch.zeros(1, 192)})
    },
    "MoCo v3": lambda weights: {
        "state_dict": prefixed(
            "module.base_encoder.", weights | {"head.0.weight": torch.zeros(2)}
        )
        | prefixed("module.momentum_encoder.", other(weights))
    },
    "DINOv2": lambda weights: {
        "teacher": prefixed(
            "backbone.", in_chunks(weights | {"mask_token": torch.zeros(1, 192)})
        )
        | {"dino_head.mlp.0.weight": torch.zeros(2)}
    },
    "TransReID": lambda weights: (
        prefixed("base.", weights)
        | {"classifier.weight": torch.zeros(2), "bottleneck.weight": torch.zeros(2)}
    ),
    "solo-learn": lambda weights: {
        "state_dict": prefixed("backbone.", weights)
        | prefixed("momentum_backbone.", other(weights))
    },
}


@pytest.mark.parametrize("make", VIT_FORMATS.values(), ids=VIT_FORMATS.keys())
def test_vision_transformers_of_the_fields_tools_are_read(tmp_path, vit, make):
    found = read_backbone(save(make(vit), tmp_path / "vit.pth"), size=(64, 32))

    assert found.name == "vit_tiny_patch16"
    assert found.weights.keys() == vit.keys()
    assert all(torch.equal(found.weights[key], tensor) for key, tensor in vit.items())


def test_a_vision_transformer_with_a_part_missing_is_refused_with_its_name(tmp_path, vit):
    weights = {name: tensor for name, tensor in vit.items() if name != "blocks.3.norm1.bias"}

    message = refusal(save(weights, tmp_path / "w.pth"))

    assert message.endswith(
        "is most like a vit_tiny_patch16, but 1 of its tensors are missing or different, "
        "such as blocks.3.norm1.bias"
    )


@pytest.mark.parametrize("old", [(224, 224), (256, 128), (384, 128)])
def test_positions_are_interpolated_to_the_size_of_the_images(tmp_path, vit, old):
    # A plane of positions stays a plane under bicubic interpolation, but for its margins.
    rows, columns = old[0] // 16, old[1] // 16
    height = (torch.arange(rows) + 0.5) / rows
    plane = height[:, None, None].expand(rows, columns, 192).reshape(1, -1, 192)
    weights = vit | {"pos_embed": torch.cat([torch.full((1, 1, 192), 7.0), plane], dim=1)}

    found = read_backbone(save(weights, tmp_path / "w.pth"), size=(128, 64))

    positions = found.weights["pos_embed"]
    assert torch.equal(positions[:, 0], torch.full((1, 192), 7.0))
    grid = positions[0, 1:].view(8, 4, 192)
    assert torch.allclose(grid, grid[:, :1, :1].expand_as(grid), atol=1e-5)
    assert torch.allclose(grid[2:6, 0, 0], (torch.arange(2, 6) + 0.5) / 8, atol=0.01)


def test_the_parts_of_pass_become_tokens_that_hold_their_positions(tmp_path):
    ours = build_backbone("vit_tiny_patch16_pass", size=(64, 32)).eval()
    weights, generator = dict(ours.state_dict()), torch.Generator().manual_seed(0)
    whole = {"cls_token": weights["cls_token"]} | {
        f"part_token{part}": weights["reg_token"][:, part - 1 : part] for part in (1, 2, 3)
    }
    places = {name: torch.randn(1, 1, 192, generator=generator) for name in whole}
    del weights["reg_token"], weights["cls_token"]
    for name, place in places.items():
        weights[name] = whole[name] - place
        # Names of vit_pytorch.py of https://github.com/CASIA-IVA-Lab/PASS-reID.
        position = "cls_pos" if name == "cls_token" else f"part{name[-1]}_pos"
        weights[position] = place
    file = save({"teacher": prefixed("backbone.", weights)}, tmp_path / "pass.pth")

    found = read_backbone(file, size=(64, 32))

    assert found.name == "vit_tiny_patch16_pass"
    for key, tensor in ours.state_dict().items():
        torch.testing.assert_close(found.weights[key], tensor)


def test_a_model_of_timm_is_found_if_it_is_expected(tmp_path):
    model = timm.create_model("test_convnext")
    weights = model.state_dict()
    file = save({"state_dict": prefixed("module.", weights)}, tmp_path / "t.pth")

    found = read_backbone(file, expected="timm/test_convnext")

    model.reset_classifier(0)
    assert found.name == "timm/test_convnext"
    assert found.weights.keys() == model.state_dict().keys()
    assert "holds no known backbone" in refusal(file)


def test_what_was_found_interpolated_and_left_out_is_said(tmp_path, vit):
    tensors = prefixed("module.", vit) | {"module.head.bias": torch.zeros(3), "other": ONE}
    file = save({"model": tensors}, tmp_path / "vit.pth")

    assert str(read_backbone(file, expected="vit_tiny_patch16", size=(128, 64))) == (
        f"found all {len(vit)} tensors of vit_tiny_patch16 below model.module; pos_embed "
        "interpolated; 2 other tensors are left out, such as model.module.head.bias, "
        "model.other"
    )


ONE = torch.ones(1)
NAMES = st.sampled_from(
    (
        *("state_dict", "model", "module", "teacher", "student", "encoder_k", "epoch", ""),
        *("conv1.weight", "layer1.0.conv1.weight", "4.0.conv1.weight", "0.weight", "fc.weight"),
    )
) | st.text(string.ascii_lowercase + ".#0", max_size=8)
VALUES = st.one_of(
    st.none(),
    st.integers(),
    st.text(max_size=3),
    st.builds(torch.zeros, st.integers(0, 3)),
    st.builds(np.float32, st.floats(width=32)),
)
CONTENTS = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200)
@given(content=CONTENTS, prefix=st.sampled_from(["", "#", "#model", "#."]))
def test_whatever_a_checkpoint_holds_is_read_or_refused_in_one_line(
    tmp_path_factory, content, prefix
):
    file = tmp_path_factory.mktemp("weights") / "checkpoint.pth"
    torch.save(content, file)

    with pytest.raises(InputError) as refused:
        read_backbone(f"{file}{prefix}")

    assert "\n" not in str(refused.value)
