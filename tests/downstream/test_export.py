"""Exported files load wholly into those who read them."""

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file

from upreid_ray.config.errors import InputError
from upreid_ray.downstream.export import CONSUMERS, export
from upreid_ray.train import initialization
from upreid_ray.train.initialization import Initialization


@pytest.fixture(scope="module", params=["resnet18", "resnet50"])
def init(request) -> Initialization:
    return initialization.random(request.param, seed=0)


def read(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torchvision_misses_only_its_classifier(tmp_path, init, suffix):
    file = tmp_path / f"weights{suffix}"
    model = getattr(torchvision.models, init.description.backbone)(weights=None)

    report = export(init, "torchvision", file)

    keys = model.load_state_dict(read(file), strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    assert set(report.missing) == {"fc.weight", "fc.bias"}
    assert set(report.matched) == set(init.weights)
    assert report.unexpected == ()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm_loads_every_tensor_and_computes_the_same(tmp_path, init, suffix):
    file = tmp_path / f"weights{suffix}"

    export(init, "timm", file)

    theirs = timm.create_model(
        init.description.backbone, num_classes=0, checkpoint_path=str(file)
    ).eval()
    ours = init.extractor().eval()
    # In double precision, where it does not matter who adds what first.
    images = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    assert theirs.state_dict().keys() == init.weights.keys()
    torch.testing.assert_close(theirs.double()(images), ours.double()(images))


def test_fastreid_finds_a_plain_state_dict(tmp_path, init):
    report = export(init, "fastreid", tmp_path / "weights.pth")

    assert read(tmp_path / "weights.pth").keys() == init.weights.keys()
    assert (report.missing, report.unexpected) == ((), ())


def test_torchreid_finds_a_state_dict_in_its_container(tmp_path, init):
    report = export(init, "torchreid", tmp_path / "weights.pth.tar")

    assert read(tmp_path / "weights.pth.tar")["state_dict"].keys() == init.weights.keys()
    assert report.missing == ("classifier.bias", "classifier.weight")


@pytest.mark.parametrize("to", ["fastreid", "torchreid"])
def test_who_reads_no_safetensors_gets_none(tmp_path, init, to):
    with pytest.raises(InputError, match=rf"{to} reads no safetensors; end the name in .pth$"):
        export(init, to, tmp_path / "weights.safetensors")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", CONSUMERS)
def test_a_place_that_cannot_be_written_is_refused_in_one_line(tmp_path, init, to):
    (tmp_path / "file").touch()

    with pytest.raises(InputError, match=r"^--out [^\n]+: cannot be written [^\n]+$"):
        export(init, to, tmp_path / "file" / "weights.pth")


def test_nothing_is_left_beside_the_file(tmp_path, init):
    export(init, "timm", tmp_path / "weights.pth")

    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]
