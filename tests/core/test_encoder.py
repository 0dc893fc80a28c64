"""The encoder has torchvision's names, unit-length outputs, and refuses wrong weights."""

import os
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from upreid_ray.config import InputError, ModelConfig
from upreid_ray.core.encoder import (
    Encoder,
    TrimmedConv2d,
    build_backbone,
    group_momentum,
    load_backbone_weights,
    running_statistics,
)

NAMES = ["resnet18", "resnet34", "resnet50"]


class Intruder:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    return build_backbone("resnet18")


@pytest.fixture(scope="module")
def pretrained() -> nn.Module:
    """Make a classifier of torchvision."""
    return torchvision.models.resnet18(weights=None)


def save(weights: dict[str, torch.Tensor], file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file(weights, file)
    else:
        torch.save(weights, file)
    return file


def refusal(backbone: nn.Module, file: Path) -> str:
    """Return why a file is refused, after checking that it says so in one line."""
    with pytest.raises(InputError) as refused:
        load_backbone_weights(backbone, file)
    message = str(refused.value)
    assert message.startswith(f"--model.pretrained {file}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", NAMES)
def test_backbones_have_torchvisions_names_without_the_classifier(name):
    theirs = getattr(torchvision.models, name)(weights=None).state_dict()

    ours = build_backbone(name).state_dict()

    assert list(ours) == [n for n in theirs if not n.startswith("fc.")]


@pytest.mark.parametrize("name", NAMES)
def test_torchvision_loads_the_weights_of_a_backbone(name):
    theirs = getattr(torchvision.models, name)(weights=None)
    theirs.fc = nn.Identity()

    theirs.load_state_dict(build_backbone(name).state_dict(), strict=True)


@pytest.mark.parametrize(("name", "size"), [("resnet18", 512), ("resnet50", 2048)])
def test_backbones_give_features(name, size):
    assert build_backbone(name)(torch.zeros(2, 3, 32, 32)).shape == (2, size)


def test_embeddings_have_unit_length():
    encoder = Encoder(ModelConfig(backbone="resnet18", embedding_dim=16))

    embeddings = encoder(torch.randn(4, 3, 64, 32, generator=torch.Generator().manual_seed(0)))

    assert embeddings.shape == (4, 16)
    assert_close(embeddings.norm(dim=1), torch.ones(4))


def test_embeddings_are_fp32_under_autocast():
    encoder = Encoder(ModelConfig(backbone="resnet18", embedding_dim=16))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = encoder(torch.ones(2, 3, 64, 32))

    assert embeddings.dtype == torch.float32


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_weights_are_loaded_without_their_classifier(tmp_path, backbone, pretrained, suffix):
    file = save(pretrained.state_dict(), tmp_path / f"weights{suffix}")

    load_backbone_weights(backbone, file)

    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, pretrained.state_dict()[name]), name


def test_an_encoder_starts_from_pretrained_weights(tmp_path, pretrained):
    file = save(pretrained.state_dict(), tmp_path / "weights.safetensors")

    encoder = Encoder(ModelConfig(backbone="resnet18", pretrained=str(file)))

    for name, tensor in encoder.backbone.state_dict().items():
        assert torch.equal(tensor, pretrained.state_dict()[name]), name


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_another_architecture_are_refused(tmp_path, backbone, suffix):
    weights = build_backbone("resnet34").state_dict()
    file = save(weights, tmp_path / f"weights{suffix}")

    assert "tensors do not match the backbone" in refusal(backbone, file)


def test_weights_with_prefixed_names_are_refused(tmp_path, backbone, pretrained):
    weights = {f"module.{name}": w for name, w in pretrained.state_dict().items()}

    assert "do not match" in refusal(backbone, save(weights, tmp_path / "weights.pth"))


def test_a_missing_tensor_is_named(tmp_path, backbone, pretrained):
    weights = {n: w for n, w in pretrained.state_dict().items() if n != "bn1.weight"}

    message = refusal(backbone, save(weights, tmp_path / "weights.pth"))

    assert message.endswith("1 tensors do not match the backbone, such as bn1.weight")


def test_a_tensor_of_another_shape_is_named(tmp_path, backbone, pretrained):
    weights = {**pretrained.state_dict(), "conv1.weight": torch.zeros(64, 3, 3, 3)}

    assert "conv1.weight" in refusal(backbone, save(weights, tmp_path / "weights.pth"))


def test_refused_weights_leave_the_backbone_as_it_was(tmp_path, backbone, pretrained):
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    weights = {name: w + 1 for name, w in pretrained.state_dict().items()}
    del weights["layer4.1.bn2.bias"]

    refusal(backbone, save(weights, tmp_path / "weights.pth"))

    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_file_that_holds_no_weights_is_refused(tmp_path, backbone, name):
    file = tmp_path / name
    file.write_bytes(b"these are\nno weights")

    assert "cannot be read as weights" in refusal(backbone, file)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_missing_file_is_refused(tmp_path, backbone, name):
    assert "cannot be read as weights" in refusal(backbone, tmp_path / name)


def test_a_file_that_carries_code_is_refused_and_the_code_not_run(tmp_path, backbone):
    intruded = tmp_path / "intruded"
    torch.save({"conv1.weight": Intruder(intruded)}, tmp_path / "weights.pth")

    assert "cannot be read as weights" in refusal(backbone, tmp_path / "weights.pth")
    assert not intruded.exists()


def test_a_whole_pickled_model_is_refused(tmp_path, backbone):
    torch.save(backbone, tmp_path / "weights.pth")

    assert "cannot be read as weights" in refusal(backbone, tmp_path / "weights.pth")


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [torch.zeros(3)], {0: torch.zeros(3)}], ids=type
)
def test_a_file_of_something_else_than_a_state_dict_is_refused(tmp_path, backbone, content):
    torch.save(content, tmp_path / "weights.pth")

    refusal(backbone, tmp_path / "weights.pth")


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


def test_the_momentum_of_running_statistics_is_restored_after_an_error():
    norm = nn.BatchNorm2d(3)

    with (
        pytest.raises(ValueError, match="4D input"),
        running_statistics(norm, momentum=0),
    ):
        norm(torch.zeros(1))

    assert (norm.momentum, norm.track_running_stats) == (0.1, True)


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


@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    kernel=st.sampled_from([1, 3, 7]),
    stride=st.integers(1, 2),
)
def test_trimmed_convolution_is_the_convolution(height, width, kernel, stride):
    generator = torch.Generator().manual_seed(height * 100 + width * 10 + kernel + stride)
    images = torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)
    whole = nn.Conv2d(3, 5, kernel, stride, kernel // 2, dtype=torch.float64)
    trimmed = TrimmedConv2d(3, 5, kernel, stride, kernel // 2, dtype=torch.float64)
    trimmed.load_state_dict(whole.state_dict())
    results = []

    for convolution in (whole, trimmed):
        images = images.detach().requires_grad_()
        outputs = convolution(images)
        (outputs * torch.linspace(1, 2, outputs.numel()).view_as(outputs)).sum().backward()
        results.append((outputs, images.grad, convolution.weight.grad, convolution.bias.grad))

    assert_close(results[1], results[0])


def test_an_encoder_gives_what_its_backbone_in_torchvision_gives():
    encoder = Encoder(ModelConfig(backbone="resnet18")).eval()
    images = torch.randn(2, 3, 16, 32)
    plain = build_backbone("resnet18").eval()
    plain.load_state_dict(encoder.backbone.state_dict())

    assert_close(encoder.backbone(images), plain(images))
