"""The encoder: unit-length outputs, torchvision's backbone, running statistics."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from tests.core.tiny import TINY, tiny
from upreid_ray.config.errors import InputError
from upreid_ray.core.backbone import build_backbone
from upreid_ray.core.encoder import Encoder, group_momentum, running_statistics


def test_embeddings_have_unit_length():
    encoder = Encoder(TINY)

    embeddings = encoder(torch.randn(4, 3, 64, 32, generator=torch.Generator().manual_seed(0)))

    assert embeddings.shape == (4, 16)
    assert_close(embeddings.norm(dim=1), torch.ones(4))


def test_embeddings_are_fp32_under_autocast():
    encoder = Encoder(TINY)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = encoder(torch.ones(2, 3, 64, 32))

    assert embeddings.dtype == torch.float32


def test_an_encoder_starts_from_pretrained_weights(tmp_path):
    pretrained = build_backbone("resnet18")
    file = tmp_path / "weights.safetensors"
    save_file(pretrained.state_dict(), file)

    encoder = Encoder(tiny({"model.pretrained": str(file)}))

    for name, tensor in encoder.backbone.state_dict().items():
        assert torch.equal(tensor, pretrained.state_dict()[name]), name


def test_an_encoder_of_another_architecture_than_its_weights_is_refused(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file(build_backbone("resnet34").state_dict(), file)

    with pytest.raises(
        InputError, match=rf"^--model.backbone resnet18: .*{file} is a resnet34$"
    ):
        Encoder(tiny({"model.pretrained": str(file)}))


def test_without_momentum_running_statistics_stay_bit_for_bit():
    norm = nn.BatchNorm2d(3)
    images = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    norm(images)
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}

    with running_statistics(norm, momentum=0):
        norm(images + 1)

    for name, tensor in norm.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_without_momentum_normalization_is_still_by_batch():
    norm = nn.BatchNorm2d(3)
    images = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))

    with running_statistics(norm, momentum=0):
        normalized = norm(5 * images + 7)

    assert_close(normalized.mean((0, 2, 3)), torch.zeros(3))


def test_running_statistics_are_as_before_after_an_error():
    norm = nn.BatchNorm2d(3)
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}

    with (
        pytest.raises(ValueError, match="4D input"),
        running_statistics(norm, momentum=0),
    ):
        norm(torch.zeros(1))

    assert norm.momentum == 0.1
    assert all(torch.equal(after, before[name]) for name, after in norm.state_dict().items())


@pytest.mark.parametrize("num_groups", [1, 2, 5])
def test_groups_in_turn_leave_the_statistics_of_groups_at_once(num_groups):
    groups = torch.randn(
        num_groups, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    in_turn = nn.BatchNorm2d(3).double()
    in_turn(3 * groups[0] + 1)
    at_once = [nn.BatchNorm2d(3).double() for _ in groups]
    for norm, group in zip(at_once, groups, strict=True):
        norm.load_state_dict(in_turn.state_dict())
        norm(group)

    for index, group in enumerate(groups):
        momentum = group_momentum(index, num_groups)
        with running_statistics(in_turn, momentum=momentum):
            in_turn(group)

    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(norm, name) for norm in at_once]).mean(0)
        assert_close(getattr(in_turn, name), mean)


def test_an_encoder_gives_what_its_backbone_in_torchvision_gives():
    encoder = Encoder(TINY).eval()
    images = torch.randn(2, 3, 16, 32)
    plain = build_backbone("resnet18").eval()
    plain.load_state_dict(encoder.backbone.state_dict())

    assert_close(encoder.backbone(images), plain(images))
