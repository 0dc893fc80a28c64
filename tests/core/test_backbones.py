"""Every family of backbones trains by the same method; a family of one's own takes one file."""

import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from tests.core.tiny import tiny
from upreid_ray.config.errors import InputError
from upreid_ray.core import backbones
from upreid_ray.core.backbone import build_backbone, check_settings
from upreid_ray.core.backbones.resnet_ibn import IBN
from upreid_ray.core.weight_files import read_backbone

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
    assert read_backbone(tmp_path / "toy.pth")[0] == "toy"


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
            "images whose height and width are multiples of 16, not 8x16",
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
    ],
)
def test_what_a_backbone_does_not_take_is_refused_in_one_line(settings, refusal):
    with pytest.raises(InputError) as refused:
        check_settings(tiny(settings))

    assert str(refused.value) == refusal


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
