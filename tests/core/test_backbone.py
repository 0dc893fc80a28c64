"""Backbones have torchvision's names; files of every format load wholly, or are refused."""

import os
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from tests.core.tiny import tiny
from upreid_ray.config.errors import InputError
from upreid_ray.config.presets import PRESETS, has_preset_shapes
from upreid_ray.core.backbone import Description, build_backbone, check_settings
from upreid_ray.core.model import UPReID
from upreid_ray.core.weight_files import read_backbone

NAMES = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
Weights = dict[str, Tensor]


class Intruder:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("name", PRESETS)
def test_the_shapes_of_a_preset_fit_and_are_known_without_a_look(name):
    check_settings(PRESETS[name])

    assert has_preset_shapes(PRESETS[name])
    assert has_preset_shapes(PRESETS[name].override({"loss.intrinsic_weight": 0.0}))


@pytest.mark.parametrize(
    "other", [{"model.backbone": "resnet101"}, {"data.height": 96}, {"patches.rows": 2}]
)
def test_other_shapes_are_looked_at(other):
    assert not has_preset_shapes(PRESETS["demo"].override(other))


def save(content: object, file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file(content, file)
    else:
        torch.save(content, file)
    return file


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


def refusal(file: Path) -> str:
    """Return why a file is refused, after checking that it says so in one line."""
    with pytest.raises(InputError) as refused:
        read_backbone(file)
    message = str(refused.value)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    return message


def assert_holds(file: Path, weights: Weights, architecture: str = "resnet18") -> None:
    found = read_backbone(file)
    assert found.name == architecture
    assert found.weights.keys() == weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(found.weights[key], tensor), key


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


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:FutureWarning")
@pytest.mark.parametrize("has_neck", [False, True])
@pytest.mark.parametrize("last_stride", [1, 2])
@pytest.mark.slow
def test_an_extractor_is_plain_torchvision_and_can_be_scripted_and_traced(
    backbone, last_stride, has_neck
):
    description = Description(
        backbone="resnet18",
        height=128,
        width=64,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        last_stride=last_stride,
        has_neck=has_neck,
    )
    neck = nn.BatchNorm1d(512).state_dict() if has_neck else {}

    extractor = description.extractor(backbone, neck).eval()

    kinds = {type(each) for each in extractor.modules() if isinstance(each, nn.Conv2d)}
    assert kinds == {nn.Conv2d}
    scripted = torch.jit.script(extractor)
    traced = torch.jit.trace(extractor, torch.randn(1, 3, 32, 16))
    for size in ((32, 16), (128, 64)):
        images = torch.randn(2, 3, *size)
        expected = extractor(images)
        assert_close(scripted(images), expected)
        assert_close(traced(images), expected)


@pytest.mark.parametrize(("name", "size"), [("resnet18", 512), ("resnet50", 2048)])
def test_backbones_give_features(name, size):
    assert build_backbone(name)(torch.zeros(2, 3, 32, 32)).shape == (2, size)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_torchvisions_files_are_told_apart_and_lose_their_classifier(tmp_path, name, suffix):
    theirs = getattr(torchvision.models, name)(weights=None).state_dict()

    file = save(theirs, tmp_path / f"weights{suffix}")

    assert_holds(file, {n: w for n, w in theirs.items() if not n.startswith("fc.")}, name)


def moco(weights: Weights) -> dict[str, object]:
    """Make a checkpoint as MoCo v2's training script saves it."""
    head = {"fc.0.weight": torch.zeros(4, 4), "fc.2.bias": torch.zeros(4)}
    other = {name: tensor + 1 for name, tensor in weights.items()}
    return {
        "epoch": 200,
        "arch": "resnet18",
        "state_dict": {
            **prefixed("module.encoder_q.", weights | head),
            **prefixed("module.encoder_k.", other | head),
            "module.queue": torch.zeros(4, 8),
            "module.queue_ptr": torch.zeros(1, dtype=torch.long),
        },
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.3, "params": [0, 1]}]},
    }


def fast_reid(weights: Weights) -> dict[str, object]:
    """Make a checkpoint as fast-reid's trainer saves it."""
    heads = {"heads.bottleneck.0.weight": torch.zeros(4), "heads.weight": torch.zeros(7, 4)}
    pixels = {"pixel_mean": torch.zeros(1, 3, 1, 1), "pixel_std": torch.ones(1, 3, 1, 1)}
    return {"model": {**prefixed("backbone.", weights), **heads, **pixels}, "iteration": 5}


def torchreid(weights: Weights) -> dict[str, object]:
    """Make a checkpoint as torchreid saves it."""
    classifier = {"classifier.weight": torch.zeros(7, 4), "classifier.bias": torch.zeros(7)}
    return {"state_dict": weights | classifier, "epoch": 60, "rank1": 0.9}


FORMATS = {
    "plain": lambda weights: weights,
    "data parallel": lambda weights: prefixed("module.", weights),
    "MoCo": moco,
    "MoCo, query encoder only": lambda weights: prefixed("encoder_q.", weights),
    "fast-reid": fast_reid,
    "fast-reid, data parallel": lambda weights: {
        "model": prefixed("module.", fast_reid(weights)["model"])
    },
    "torchreid": torchreid,
}


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS.keys())
def test_checkpoints_of_other_tools_are_read(tmp_path, backbone, make):
    assert_holds(save(make(backbone), tmp_path / "checkpoint.pth.tar"), backbone)


def test_checkpoints_of_this_package_give_the_query_encoder(tmp_path):
    model = UPReID(tiny({}))
    with torch.no_grad():
        model.key_encoder.backbone.conv1.weight.add_(1)

    file = save(model.state_dict(), tmp_path / "model.safetensors")

    assert_holds(file, model.query_encoder.backbone.state_dict())


def test_half_precision_becomes_fp32(tmp_path, backbone):
    halves = {n: t.half() if t.is_floating_point() else t for n, t in backbone.items()}

    found = read_backbone(save(halves, tmp_path / "weights.pth"))

    assert found.weights["conv1.weight"].dtype == torch.float32


def test_files_without_counters_of_batches_are_read(tmp_path, backbone):
    old = {n: t for n, t in backbone.items() if not n.endswith("num_batches_tracked")}

    found = read_backbone(save(old, tmp_path / "weights.pth"))

    assert found.name == "resnet18"
    assert found.weights.keys() == backbone.keys()


def test_a_missing_tensor_is_named(tmp_path, backbone):
    weights = {n: w for n, w in backbone.items() if n != "bn1.weight"}

    message = refusal(save(weights, tmp_path / "weights.pth"))

    assert message.endswith(
        "is most like a resnet18, but 1 of its tensors are missing or different, "
        "such as bn1.weight"
    )


def test_a_tensor_of_another_shape_is_named(tmp_path, backbone):
    weights = {**backbone, "conv1.weight": torch.zeros(64, 3, 3, 3)}

    assert "conv1.weight" in refusal(save(weights, tmp_path / "weights.pth"))


def test_tensors_that_the_architecture_does_not_have_are_named(tmp_path, backbone):
    # As in a ResNet with instance normalization, or with non-local blocks.
    weights = {**backbone, "NL_2.0.g.weight": torch.zeros(2)}

    assert refusal(save(weights, tmp_path / "w.pth")).endswith("such as NL_2.0.g.weight")


def test_weights_of_no_backbone_are_refused_with_their_first_names(tmp_path):
    file = save({"stem.weight": torch.zeros(2)}, tmp_path / "net.safetensors")

    assert refusal(file).endswith("holds no known backbone; its first tensors are stem.weight")


def test_several_networks_in_one_file_are_refused_with_their_prefixes(tmp_path, backbone):
    file = save(prefixed("a.", backbone) | prefixed("b.", backbone), tmp_path / "w.pth")

    assert refusal(file).endswith("#PREFIX: a, b")


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_file_that_holds_no_weights_is_refused(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(b"these are\nno weights")

    assert "cannot be read as weights" in refusal(file)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_missing_file_is_refused(tmp_path, name):
    assert "cannot be read as weights" in refusal(tmp_path / name)


def test_a_file_that_carries_code_is_refused_and_the_code_not_run(tmp_path):
    intruded = tmp_path / "intruded"
    torch.save({"conv1.weight": Intruder(intruded)}, tmp_path / "weights.pth")

    assert "cannot be read as weights" in refusal(tmp_path / "weights.pth")
    assert not intruded.exists()


def test_a_whole_pickled_model_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "weights.pth")

    assert "cannot be read as weights" in refusal(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [torch.zeros(3)], {0: torch.zeros(3)}], ids=type
)
def test_a_file_of_something_else_than_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")

    refusal(tmp_path / "weights.pth")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(backbone, tmp_path, value):
    weights = {name: tensor.clone() for name, tensor in backbone.items()}
    weights["layer2.0.bn1.running_var"][1] = value

    said = refusal(save(weights, tmp_path / "a.pth"))

    assert "1 of its tensors, such as layer2.0.bn1.running_var" in said
