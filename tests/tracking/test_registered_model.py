"""A registered version is an MLflow model, which loads where this package is not installed."""

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pyarrow as pa
import pytest
import torch
from mlflow.models import Model
from PIL import Image
from safetensors.torch import save_file

from tests.tracking.store import tracking_in
from upreid_ray.config.presets import FINETUNE_PRESETS, PRESETS
from upreid_ray.core.backbone import Description, build_backbone
from upreid_ray.core.checkpoint import Position, read_exported
from upreid_ray.core.retrieval import extract_features
from upreid_ray.data.stream.decode import decode_images
from upreid_ray.tracking import connection, load_backbone, runs
from upreid_ray.tracking.model import write_model
from upreid_ray.tracking.model_card import model_card
from upreid_ray.tracking.registry import register_backbone

HEIGHT, WIDTH = 64, 32
# Python runs a module of this name at its start.
NO_PACKAGE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("upreid_ray", "torchvision", "timm"):
            raise ModuleNotFoundError(f"{name} is not installed here")

sys.meta_path.insert(0, Refuse())
"""
ELSEWHERE = """
import sys, json, base64, mlflow, numpy, pandas, torch
uri, folder = sys.argv[1:]
try:
    import upreid_ray
    raise SystemExit("upreid_ray is installed")
except ModuleNotFoundError:
    pass
encoded = [base64.b64decode(each) for each in json.load(open(f"{folder}/images.json"))]
arrays = numpy.load(f"{folder}/arrays.npy")
model = mlflow.pyfunc.load_model(uri)
found = {
    "bytes": model.predict(pandas.DataFrame({"image": encoded})),
    "text": model.predict(
        pandas.DataFrame({"image": [base64.b64encode(each).decode() for each in encoded]})
    ),
    "list": model.predict(encoded),
    "array": model.predict(arrays),
    "sizes": model.predict([arrays[0], arrays[1][:40]]),
}
module = mlflow.pytorch.load_model(uri)
found["module"] = module(torch.load(f"{folder}/tensor.pt")).detach().numpy()
for wrong in (pandas.DataFrame({"picture": encoded}), [b"no image"], [], arrays[0]):
    try:
        model.predict(wrong)
        raise SystemExit("accepted")
    except ValueError as error:
        assert "\\n" not in str(error)
numpy.savez(f"{folder}/found.npz", **found)
"""


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory, new_database) -> Iterator[Path]:
    """Let MLflow keep everything in a new folder."""
    folder = tmp_path_factory.mktemp("mlflow")
    with tracking_in(folder, new_database):
        yield folder


@pytest.fixture(scope="module")
def version(store) -> SimpleNamespace:
    """Register a fine-tuned backbone."""
    exported, folder = store / "exported", store / "model"
    exported.mkdir()
    torch.manual_seed(0)
    description = Description(
        backbone="resnet18",
        height=HEIGHT,
        width=WIDTH,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.25, 0.3),
        last_stride=1,
        has_neck=True,
    )
    (exported / "backbone.json").write_text(description.model_dump_json())
    weights = build_backbone("resnet18").state_dict()
    neck = {f"neck.{k}": v for k, v in torch.nn.BatchNorm1d(512).state_dict().items()}
    neck["neck.running_mean"].uniform_(-1, 1)
    save_file(weights, exported / "backbone.safetensors")
    save_file(neck, exported / "neck.safetensors")
    write_model(exported, folder, config={"seed": 7})
    client = connection.connect()
    run_id = runs.start_run(client, experiment="tests", name="a", config=PRESETS["demo"])
    tags = {"evaluation": "e" * 64, "score.mAP": "0.5", "step": "12"}
    uri = register_backbone(
        client, run_id=run_id, name="served", folder=folder, tags=tags, description="From {uri}"
    )
    return SimpleNamespace(
        client=client, run_id=run_id, uri=uri, exported=exported, folder=folder, tags=tags
    )


@pytest.fixture(scope="module")
def encoded() -> list[bytes]:
    """Make JPEG images of different sizes, one larger than twice the backbone's."""
    draw = np.random.default_rng(0)
    images = []
    for height, width in ((200, 90), (64, 32), (130, 64)):
        rough = draw.integers(0, 256, (8, 4, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(rough).resize((width, height)).save(buffer, "JPEG")
        images.append(buffer.getvalue())
    return images


def features_of_job(exported: Path, encoded: list[bytes]) -> np.ndarray:
    """Compute features as `evaluate` does."""
    description, weights, neck = read_exported(exported)
    images = torch.from_numpy(decode_images(pa.array(encoded), HEIGHT, WIDTH)["image"])
    extractor = description.extractor(weights, neck)
    return extract_features(extractor, [images], description.normalization).numpy()


@pytest.fixture(scope="module")
def environment(store) -> dict[str, str]:
    """Make an environment of processes in which this package cannot be imported."""
    folder = store / "blocked"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(NO_PACKAGE)
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # uvicorn
    return {**os.environ, "PYTHONPATH": str(folder), "PATH": programs}


@pytest.fixture(scope="module")
def elsewhere(version, encoded, environment, tmp_path_factory) -> SimpleNamespace:
    """Load the version in a process without this package, with both flavors."""
    folder = tmp_path_factory.mktemp("elsewhere")
    arrays = np.random.default_rng(1).integers(0, 256, (2, 90, 40, 3), dtype=np.uint8)
    tensor = torch.randn(5, 3, HEIGHT, WIDTH)
    texts = [base64.b64encode(each).decode() for each in encoded]
    (folder / "images.json").write_text(json.dumps(texts))
    np.save(folder / "arrays.npy", arrays)
    torch.save(tensor, folder / "tensor.pt")
    subprocess.run(
        [sys.executable, "-c", ELSEWHERE, version.uri, str(folder)],
        env=environment,
        cwd=folder,
        check=True,
    )
    return SimpleNamespace(found=np.load(folder / "found.npz"), arrays=arrays, tensor=tensor)


@pytest.mark.parametrize("form", ["bytes", "text", "list"])
def test_encoded_images_have_the_features_of_the_job(version, encoded, elsewhere, form):
    expected = features_of_job(version.exported, encoded)

    np.testing.assert_allclose(elsewhere.found[form], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["array", "sizes"])
def test_arrays_of_any_sizes_have_the_features_of_the_job(version, elsewhere, form):
    arrays = [elsewhere.arrays[0], elsewhere.arrays[1]]
    if form == "sizes":
        arrays[1] = arrays[1][:40]
    lossless = []
    for array in arrays:
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        lossless.append(buffer.getvalue())
    expected = features_of_job(version.exported, lossless)

    np.testing.assert_allclose(elsewhere.found[form], expected, rtol=0, atol=1e-5)


def test_the_pytorch_flavor_is_the_backbone_for_any_number_of_images(version, elsewhere):
    with torch.no_grad():
        expected = load_backbone(version.uri)(elsewhere.tensor)

    np.testing.assert_allclose(elsewhere.found["module"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_served_version_answers_over_http(version, encoded, environment, store):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    words = ["-m", "models:/served@champion", "--env-manager", "local", "-p", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "models", "serve", *words, "--host", "127.0.0.1"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    texts = [base64.b64encode(each).decode() for each in encoded]
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        data=json.dumps({"inputs": texts}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        answer = json.loads(first_answer(request, server))
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)

    expected = features_of_job(version.exported, encoded)
    np.testing.assert_allclose(answer["predictions"], expected, rtol=0, atol=1e-5)


def first_answer(request: urllib.request.Request, server: subprocess.Popen[bytes]) -> bytes:
    """Ask until a server answers, for at most five minutes."""
    deadline = time.monotonic() + 300
    while True:
        assert server.poll() is None
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.read()
        except urllib.error.URLError as error:
            if isinstance(error, urllib.error.HTTPError) or time.monotonic() > deadline:
                raise
            time.sleep(1)


def test_a_version_has_a_signature_an_example_and_few_requirements(version):
    model = Model.load(str(version.folder))

    assert model.get_input_schema().input_names() == ["image"]
    assert model.get_output_schema().inputs[0].shape == (-1, 512)
    assert len(model.load_input_example(str(version.folder))) == 1
    names = [line.partition("==")[0] for line in model_file(version, "requirements.txt")]
    assert names == ["mlflow", "pillow", "torch"]


def model_file(version: SimpleNamespace, name: str) -> list[str]:
    folder = Path(mlflow.artifacts.download_artifacts(version.uri))
    return (folder / name).read_text().splitlines()


def test_a_version_holds_no_pickle(version):
    folder = Path(mlflow.artifacts.download_artifacts(version.uri))

    assert not [*folder.rglob("*.pkl"), *folder.rglob("*.pth")]
    assert json.loads("".join(model_file(version, "config.json"))) == {"seed": 7}


def test_the_logged_model_is_linked_with_its_run_its_scores_and_its_version(version):
    name = version.uri.split("/")[1]
    found = version.client.get_model_version_by_alias(name, "champion")
    model = version.client.get_logged_model(found.source.removeprefix("models:/"))
    outputs = version.client.get_run(version.run_id).outputs.model_outputs

    assert (model.source_run_id, model.status.value) == (version.run_id, "READY")
    assert [(each.model_id, each.step) for each in outputs] == [(model.model_id, 12)]
    metric = model.metrics[0]
    assert (metric.key, metric.value, metric.step) == ("model/mAP", 0.5, 12)
    assert metric.dataset_digest == "e" * 36
    assert found.description == f"From {version.uri}"


@pytest.mark.parametrize(
    "killed_in", ["log_model_artifacts", "log_outputs", "create_model_version"]
)
def test_a_killed_registration_is_completed_and_nothing_is_logged_twice(
    version, tmp_path, monkeypatch, killed_in
):
    client = connection.connect()
    run_id = runs.start_run(client, experiment="tests", name="b", config=PRESETS["demo"])
    (tmp_path / "backbone.json").write_text("{}")
    arguments = {"run_id": run_id, "name": killed_in, "folder": tmp_path, "tags": version.tags}

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(client, killed_in, killed)
        with pytest.raises(KeyboardInterrupt):
            register_backbone(client, **arguments)

    for _ in range(2):
        assert register_backbone(client, **arguments) == f"models:/{killed_in}/1"
    experiment = client.get_experiment_by_name("tests").experiment_id
    models = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    outputs = client.get_run(run_id).outputs.model_outputs
    assert [each.model_id for each in outputs] == [each.model_id for each in models]
    assert [each.status.value for each in models] == ["READY"]
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{killed_in}/1"))
    assert [file.name for file in folder.iterdir()] == ["backbone.json"]


@pytest.mark.slow
def test_a_version_outlives_its_run(version, tmp_path):
    client = connection.connect()
    run_id = runs.start_run(client, experiment="tests", name="c", config=PRESETS["demo"])
    (tmp_path / "backbone.json").write_text("{}")
    uri = register_backbone(client, run_id=run_id, name="kept", folder=tmp_path, tags={})
    client.delete_run(run_id)
    command = ["gc", "--backend-store-uri", os.environ["MLFLOW_TRACKING_URI"]]
    subprocess.run([sys.executable, "-m", "mlflow", *command], check=True)

    folder = Path(mlflow.artifacts.download_artifacts(uri))

    assert (folder / "backbone.json").is_file()


def test_a_new_experiment_is_one_of_model_development(version):
    tags = version.client.get_experiment_by_name("tests").tags

    assert tags["mlflow.experimentKind"] == "custom_model_development"


def test_an_experiment_of_an_earlier_release_becomes_one_of_model_development(version, store):
    location = (store / "mlartifacts").as_uri()
    version.client.create_experiment("earlier", artifact_location=location)

    runs.start_run(version.client, experiment="earlier", name="a", config=PRESETS["demo"])

    tags = version.client.get_experiment_by_name("earlier").tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_data_set_is_an_input_of_its_run_once(version):
    digest = "0123456789abcdef" * 4
    for _ in range(2):
        runs.log_dataset(
            version.client, version.run_id, "training", uri="/shards", digest=digest
        )

    inputs = version.client.get_run(version.run_id).inputs.dataset_inputs
    assert [(each.dataset.name, each.dataset.digest) for each in inputs] == [
        ("training", digest[:36])
    ]
    assert json.loads(inputs[0].dataset.source) == {"uri": "/shards", "manifest": digest}
    assert [(tag.key, tag.value) for tag in inputs[0].tags] == [
        ("mlflow.data.context", "training")
    ]


def position(config: dict[str, object], **scores: float) -> Position:
    images = {"height": 64, "width": 32, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    return Position(
        step=20,
        best_step=10,
        best_scores=scores,
        scores_untrained={name: score / 2 for name, score in scores.items()},
        images_per_second=1.0,
        description=Description.model_validate({"backbone": "resnet18", **images}),
        config=config,
    )


def test_the_card_names_what_differs_from_the_nearest_preset():
    config = PRESETS["laptop"].override({"loss.temperature": 0.25, "run.name": "a"})

    card = model_card("m", position(config.model_dump(mode="json"), mAP=0.5), {})

    assert "the preset `laptop`: `loss.temperature` 0.25." in card
    assert "| before training | 0.250 |" in card
    assert "| this version | 0.500 |" in card
    assert card.count("{uri}") == 3
    # A paragraph of two lines would be shown with a break in it.
    prose = card.split("```")[::2]
    assert not re.search(r"[^|\n]\n[^|\n#]", "".join(prose))


def test_the_card_of_a_fine_tuned_version_names_its_origin():
    config = FINETUNE_PRESETS["demo"].model_dump(mode="json")

    card = model_card("m", position(config), {"init": "models:/before/3"})

    assert "fine-tuned with labels" in card
    assert "It was trained from `models:/before/3`." in card
    assert "It was not scored" in card
