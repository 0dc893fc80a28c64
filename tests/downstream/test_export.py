"""Exported files load wholly into those who read them."""

import io
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow as pa
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file

from upreid_ray.config.errors import InputError
from upreid_ray.data.stream.decode import decode_images
from upreid_ray.downstream.consumers import MODULE_FORMATS
from upreid_ray.downstream.export import export
from upreid_ray.downstream.export_module import export_module
from upreid_ray.train import initialization
from upreid_ray.train.initialization import Initialization

ROOT = Path(__file__).parents[2]


@pytest.fixture(
    scope="module", params=["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)]
)
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


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "timm/test_efficientnet"])
def test_timm_loads_its_own_models_again(tmp_path, name):
    init = initialization.random(name, seed=0)

    report = export(init, "timm", tmp_path / "weights.safetensors")

    libraries = {"timm": timm}
    exec(report.usage, libraries)
    theirs, ours = libraries["model"].eval(), init.extractor().eval()
    images = torch.randn(2, 3, 64, 32)
    assert (report.missing, report.unexpected) == ((), ())
    torch.testing.assert_close(theirs(images), ours(images))


def test_fastreid_is_told_of_instance_normalization(tmp_path):
    init = initialization.random("resnet18_ibn_a", seed=0)

    report = export(init, "fastreid", tmp_path / "weights.pth")

    assert "MODEL.BACKBONE.DEPTH 18x MODEL.BACKBONE.WITH_IBN True" in report.usage


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


@pytest.mark.parametrize("to", ["torchvision", "timm", "fastreid", "torchreid"])
def test_a_place_that_cannot_be_written_is_refused_in_one_line(tmp_path, init, to):
    (tmp_path / "file").touch()

    with pytest.raises(InputError, match=r"^--out [^\n]+: cannot be written [^\n]+$"):
        export(init, to, tmp_path / "file" / "weights.pth")


def test_a_tool_that_has_no_such_backbone_is_refused_with_those_that_have_it(tmp_path, init):
    with pytest.raises(InputError, match=r"^--to ibn-net: cannot load a resnet\d+; .* timm, "):
        export(init, "ibn-net", tmp_path / "weights.pth")


def test_nothing_is_left_beside_the_file(tmp_path, init):
    export(init, "timm", tmp_path / "weights.pth")

    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("to", ["torchvision", "timm"])
def test_the_usage_is_one_line_that_loads_the_file(tmp_path, init, to, suffix):
    report = export(init, to, tmp_path / f"it's a file{suffix}")
    libraries = {
        "timm": timm,
        "torch": torch,
        "torchvision": torchvision,
        "safetensors": safetensors,
    }

    exec(report.usage, libraries)

    loaded = libraries["model"].state_dict()
    assert "\n" not in report.usage
    assert all(loaded[name].equal(tensor) for name, tensor in init.weights.items())


def test_the_usage_of_fastreid_describes_backbone_and_images(tmp_path, init):
    report = export(init, "fastreid", tmp_path / "weights.pth")

    words = shlex.split(report.usage)
    settings = dict(zip(words[::2], words[1::2], strict=True))
    depth = init.description.backbone.removeprefix("resnet")
    assert settings == {
        "MODEL.BACKBONE.DEPTH": f"{depth}x",
        "MODEL.BACKBONE.FEAT_DIM": {"18": "512", "50": "2048"}[depth],
        "MODEL.BACKBONE.LAST_STRIDE": "2",
        "MODEL.BACKBONE.PRETRAIN": "True",
        "MODEL.BACKBONE.PRETRAIN_PATH": str(tmp_path / "weights.pth"),
        "MODEL.PIXEL_MEAN": "[123.675, 116.28, 103.53]",
        "MODEL.PIXEL_STD": "[58.395, 57.12, 57.375]",
        "INPUT.SIZE_TRAIN": "[256, 128]",
        "INPUT.SIZE_TEST": "[256, 128]",
    }


@pytest.mark.slow
def test_the_job_prints_the_usage_in_one_line(tmp_path, init):
    weights = tmp_path / "weights.safetensors"
    save_file(init.weights, weights)
    out = tmp_path / f"{'long-' * 30}.pth"

    job = subprocess.run(
        [sys.executable, ROOT / "jobs/export.py", weights, "--to", "fastreid", "--out", out],
        capture_output=True,
        text=True,
        check=True,
    )

    assert export(init, "fastreid", out).usage in job.stderr.splitlines()


def run_exported(file: Path, images: torch.Tensor) -> torch.Tensor:
    """Run a file as the program that gets it would."""
    if file.suffix == ".pt2":
        return torch.export.load(file).module()(images).detach()
    session = onnxruntime.InferenceSession(file)
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.fixture(scope="module")
def small() -> Initialization:
    """Make a fine-tuned ResNet-18 with a neck, for images of 64x32."""
    init = initialization.random("resnet18", seed=0)
    neck = torch.nn.BatchNorm1d(512)
    neck.running_mean.uniform_(-1, 1)
    images = {"height": 64, "width": 32, "last_stride": 1, "has_neck": True}
    return replace(
        init,
        description=init.description.model_copy(update=images),
        neck=neck.state_dict(),
    )


@pytest.mark.parametrize("to", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
def test_an_exported_module_computes_the_same_for_all_sizes(tmp_path, small, to):
    file = tmp_path / f"it's a file{MODULE_FORMATS[to][1]}"

    usage, compared = export_module(small, to, file, with_preprocessing=False)

    assert compared == ["1x3x64x32", "1x3x128x64", "3x3x64x32", "3x3x128x64"]
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    images = torch.randn(2, 3, 96, 48)
    expected = small.extractor().eval()(images).detach()
    torch.testing.assert_close(run_exported(file, images), expected, rtol=1e-4, atol=1e-4)
    names = {"onnxruntime": onnxruntime, "torch": torch, "images": images.numpy()}
    exec(usage, names)
    loaded = torch.from_numpy(names["features"]) if to == "onnx" else names["model"](images)
    torch.testing.assert_close(loaded.detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet18_ibn_a"])
def test_an_onnx_file_takes_images_of_two_sizes_though_the_map_is_one_column_wide(
    tmp_path, name
):
    init = initialization.random(name, seed=0)
    size = {"height": 64, "width": 32}
    init = replace(init, description=init.description.model_copy(update=size))

    _, compared = export_module(init, "onnx", tmp_path / "a.onnx", with_preprocessing=False)

    assert compared == ["1x3x64x32", "1x3x128x64", "3x3x64x32", "3x3x128x64"]


@pytest.mark.parametrize("to", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
def test_preprocessing_in_the_file_is_that_of_the_jobs(tmp_path, small, to):
    file = tmp_path / f"file{MODULE_FORMATS[to][1]}"
    draw = np.random.default_rng(0)
    rough = draw.integers(0, 256, (8, 4, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(rough).resize((70, 150)))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    decoded = decode_images(pa.array([buffer.getvalue()]), 64, 32)["image"]
    normalized = small.description.normalization.apply(torch.from_numpy(decoded).float() / 255)

    export_module(small, to, file, with_preprocessing=True)

    found = run_exported(file, torch.from_numpy(pixels.copy())[None])
    expected = small.extractor().eval()(normalized).detach()
    similarity = torch.nn.functional.cosine_similarity(found, expected)
    assert similarity.item() == pytest.approx(1, abs=1e-3)  # Pillow rounds


def test_missing_packages_are_named(tmp_path, small, monkeypatch):
    monkeypatch.setattr("upreid_ray.downstream.export_module.find_spec", lambda _: None)

    with pytest.raises(InputError, match=r"pip install onnx onnxruntime onnxscript$"):
        export_module(small, "onnx", tmp_path / "file.onnx", with_preprocessing=False)

    assert list(tmp_path.iterdir()) == []


def test_a_file_that_computes_something_else_is_not_left(tmp_path, small, monkeypatch):
    def wrong(*_: object) -> object:
        return lambda images: torch.zeros(len(images), 512)

    monkeypatch.setattr("upreid_ray.downstream.export_module._write", wrong)

    with pytest.raises(RuntimeError, match="computes features that differ"):
        export_module(small, "torch", tmp_path / "file.pt2", with_preprocessing=False)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("to", "name"), [("onnx", "a.pth"), ("torch", "a.onnx")])
def test_the_name_of_an_exported_module_has_its_ending(tmp_path, small, to, name):
    with pytest.raises(InputError, match=rf"^--out [^\n]+{name}: end the name in "):
        export_module(small, to, tmp_path / name, with_preprocessing=False)
