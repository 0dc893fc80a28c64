"""What --init may name, what it brings, and what is refused."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import save_file

from tests.core.tiny import TINY, fresh_state
from tests.tracking.store import tracking_in
from upreid_ray.config.downstream import LabelledDataConfig
from upreid_ray.config.errors import InputError
from upreid_ray.core.backbone import build_backbone
from upreid_ray.core.checkpoint import BestBackbone, export_backbone, save_checkpoint
from upreid_ray.tracking import connection, registry, runs
from upreid_ray.train import initialization
from upreid_ray.train.initialization import Initialization, for_images, resolve


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Make a checkpoint of a run that has just begun."""
    folder = tmp_path_factory.mktemp("run") / "step-00000000"
    folder.mkdir()
    state, best = fresh_state(TINY), BestBackbone()
    best.update(state, {})
    save_checkpoint(folder, state, best, scores_untrained={}, images_per_second=0.0)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory, checkpoint) -> Path:
    """Make the folder of a registered version."""
    folder = tmp_path_factory.mktemp("backbone")
    export_backbone(checkpoint, folder)
    return folder


@pytest.fixture(scope="module")
def client(tmp_path_factory, new_database):
    """Connect to an MLflow of these tests."""
    with tracking_in(tmp_path_factory.mktemp("mlflow"), new_database):
        yield connection.connect()


@pytest.fixture(scope="module")
def registered(client, exported) -> str:
    """Register the backbone; return its version."""
    run = runs.start_run(client, experiment="tests", name="a-run", config=TINY)
    tags = {"run": "a-run", "evaluation": "none", "init": "start.pth"}
    return registry.register_backbone(
        client, run_id=run, name="upreid-tiny", folder=exported, tags=tags
    )


def assert_is(init: Initialization, weights: dict[str, torch.Tensor]) -> None:
    assert init.weights.keys() == weights.keys()
    assert all(init.weights[name].equal(tensor) for name, tensor in weights.items())


def backbone_weights() -> dict[str, torch.Tensor]:
    return fresh_state(TINY).model.query_encoder.backbone.state_dict()


def test_a_checkpoint_brings_its_weights_and_what_its_images_were(checkpoint):
    init = resolve(str(checkpoint))

    assert_is(init, backbone_weights())
    assert (init.description.height, init.description.width) == (
        TINY.data.height,
        TINY.data.width,
    )
    assert init.description.mean == TINY.augmentation.mean


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"loss": {}, "model": {"pretrained": "/a.pth"}}, "/a.pth"),
        ({"loss": {}, "model": {}}, None),
        ({"init": "models:/a/1"}, "models:/a/1"),
    ],
)
def test_a_checkpoint_says_what_its_run_started_from(checkpoint, tmp_path, settings, start):
    folder = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    file, hashes = folder / "state.json", json.loads((folder / "sha256.json").read_text())
    file.write_text(json.dumps(json.loads(file.read_text()) | {"config": settings}))
    hashes["state.json"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "sha256.json").write_text(json.dumps(hashes))

    assert resolve(str(folder)).start == start


@pytest.mark.parametrize("place", ["/1", "@challenger", "@champion"])
def test_a_registered_version_brings_its_start_and_its_number(registered, place):
    init = resolve(f"models:/upreid-tiny{place}")

    assert init.uri == registered == "models:/upreid-tiny/1"
    assert init.start == "start.pth"
    assert_is(init, backbone_weights())


def test_a_file_of_weights_expects_what_imagenet_models_expect(tmp_path):
    weights = build_backbone("resnet34").state_dict()
    save_file(weights, tmp_path / "weights.safetensors")

    init = resolve(str(tmp_path / "weights.safetensors"))

    assert_is(init, weights)
    assert init.description.backbone == "resnet34"
    assert init.description.mean == (0.485, 0.456, 0.406)


def test_an_initialization_makes_its_backbone(checkpoint):
    init = resolve(str(checkpoint))

    assert_is(init, init.extractor().state_dict())


def test_a_random_initialization_is_that_of_its_seed():
    first, again, other = (initialization.random("resnet18", seed=s) for s in (0, 0, 1))

    assert_is(first, again.weights)
    assert not first.weights["conv1.weight"].equal(other.weights["conv1.weight"])


def test_a_random_initialization_leaves_the_callers_generator(checkpoint):
    torch.manual_seed(0)
    expected = torch.rand(1)

    torch.manual_seed(0)
    initialization.random("resnet18", seed=5)

    assert torch.rand(1).equal(expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (64, 32, (0.3525, 0.3106, 0.3140))),
        ({"height": 128, "width": 64}, (128, 64, (0.3525, 0.3106, 0.3140))),
        ({"mean": "0.5,0.5,0.5"}, (64, 32, (0.5, 0.5, 0.5))),
    ],
)
def test_settings_count_more_than_those_of_the_pretraining(checkpoint, settings, expected):
    data = LabelledDataConfig().override(settings)

    images = for_images(resolve(str(checkpoint)), data).description

    assert (images.height, images.width, images.mean) == expected


def refusal(init: str) -> str:
    with pytest.raises(InputError) as refused:
        resolve(init)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    "uri",
    [
        "models:/nobody@champion",
        "models:/upreid-tiny@nobody",
        "models:/upreid-tiny/99",
        "models:/upreid-tiny",
        "models:upreid-tiny",
    ],
)
def test_a_version_that_does_not_exist_is_refused(client: MlflowClient, registered, uri):
    assert refusal(uri).startswith(f"{uri}: ")


def test_a_registry_that_is_down_is_refused(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")

    assert refusal("models:/upreid-tiny@champion").startswith("MLFLOW_TRACKING_URI=")


def test_the_folder_of_a_run_names_its_checkpoints(checkpoint):
    assert refusal(str(checkpoint.parent)).endswith(f"such as {checkpoint}")


def test_a_folder_of_something_else_is_refused(tmp_path):
    assert "neither backbone.json nor state.json" in refusal(str(tmp_path))


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    assert refusal(str(tmp_path / "nothing")).startswith(str(tmp_path / "nothing"))


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"backbone": "transformer"})])
def test_a_description_that_describes_nothing_is_refused(tmp_path, exported, text):
    os.link(exported / "backbone.safetensors", tmp_path / "backbone.safetensors")
    (tmp_path / "backbone.json").write_text(text)

    assert "its description cannot be read" in refusal(str(tmp_path))


def test_weights_of_another_architecture_than_described_are_refused(tmp_path, exported):
    os.link(exported / "backbone.json", tmp_path / "backbone.json")
    save_file(build_backbone("resnet34").state_dict(), tmp_path / "backbone.safetensors")

    assert refusal(str(tmp_path)).endswith("describes a resnet18, but holds a resnet34")
