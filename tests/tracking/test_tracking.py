"""MLflow gets every setting and metric, late if it must be, and keeps the backbones."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import mlflow
import pytest
import torch
import torchvision
from mlflow.tracking import MlflowClient
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.tracking.store import tracking_in
from upreid_ray.config.errors import InputError, RunStopped
from upreid_ray.config.presets import PRESETS
from upreid_ray.core.backbone import build_backbone
from upreid_ray.tracking import connection, load_backbone, run_log, runs
from upreid_ray.tracking.registry import promote, register_backbone
from upreid_ray.tracking.run_log import RunLog
from upreid_ray.tracking.runs import start_run

NOWHERE = "http://127.0.0.1:9"  # nothing answers there
DELIVERY_SECONDS = 60.0
SLOW_SECONDS = 2.0
CONFIG = PRESETS["demo"]


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory, new_database) -> Iterator[str]:
    """Let MLflow keep everything in a new folder; return the URI of its store."""
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch, tracking_in(folder, new_database) as uri:
        patch.setattr(run_log, "RETRY_SECONDS", 0.2)
        # It warns of each attempt to reach a server that is down on purpose.
        patch.setattr(logging.getLogger("urllib3.connectionpool"), "disabled", True)
        yield uri


@pytest.fixture(scope="module")
def client(store) -> MlflowClient:
    return connection.connect()


@pytest.fixture
def run_id(client) -> str:
    return start_run(client, experiment="tests", name="a-run", config=CONFIG)


def history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    """Return the steps and values of a metric in the order of their time."""
    values = client.get_metric_history(run_id, name)
    return [(each.step, each.value) for each in sorted(values, key=lambda each: each.step)]


def log(run_id: str, uri: str, folder: Path, steps: range, *, wait: float) -> None:
    """Log one metric at these steps as a process of its own would."""
    run_log = RunLog(run_id, uri, folder)
    for step in steps:
        run_log.metrics(step, {"train/loss": 10.0 - step})
    run_log.close(wait)


def values(steps: range) -> list[tuple[int, float]]:
    return [(step, 10.0 - step) for step in steps]


def test_a_run_has_every_setting_as_a_parameter(client, run_id):
    params = client.get_run(run_id).data.params

    assert params == {path: str(value) for path, value in CONFIG.flatten()}


def test_a_run_has_its_environment_as_tags(client, run_id):
    tags = client.get_run(run_id).data.tags

    assert {name: tags[name] for name in runs.environment()} == runs.environment()


def test_without_a_repository_the_commit_is_the_one_that_the_image_names(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # no git there
    monkeypatch.setenv("UPREID_RAY_COMMIT", "an-id")

    assert runs.environment()["mlflow.source.git.commit"] == "an-id"


def test_a_run_has_its_configuration_as_a_file(client, run_id, tmp_path):
    file = client.download_artifacts(run_id, "config.json", str(tmp_path))

    assert json.loads(Path(file).read_text()) == CONFIG.model_dump(mode="json")


def test_runs_of_one_experiment_share_it(client, run_id):
    other = start_run(client, experiment="tests", name="other", config=CONFIG)

    assert client.get_run(run_id).info.experiment_id == client.get_run(other).info.experiment_id


def test_a_run_is_running_inside_and_finished_after(client, run_id):
    with runs.running(client, run_id):
        inside = client.get_run(run_id).info.status

    assert (inside, client.get_run(run_id).info.status) == ("RUNNING", "FINISHED")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_run_that_raises_has_failed(client, run_id, error):
    with pytest.raises(error), runs.running(client, run_id):
        raise error

    assert client.get_run(run_id).info.status == "FAILED"


def test_metrics_arrive_with_their_steps(client, run_id, store, tmp_path):
    log(run_id, store, tmp_path, range(5), wait=DELIVERY_SECONDS)

    assert history(client, run_id, "train/loss") == values(range(5))


def test_metrics_are_delivered_in_the_order_of_their_time(client, run_id, store, tmp_path):
    log(run_id, store, tmp_path, range(5), wait=DELIVERY_SECONDS)

    stamps = [each.timestamp for each in client.get_metric_history(run_id, "train/loss")]
    assert stamps == sorted(stamps)


def test_a_picture_arrives_as_an_artifact(client, run_id, store, tmp_path):
    run_log = RunLog(run_id, store, tmp_path / "log")

    run_log.picture("views.png", Image.new("RGB", (4, 8), (1, 2, 3)))

    run_log.close(DELIVERY_SECONDS)
    with Image.open(client.download_artifacts(run_id, "views.png", str(tmp_path))) as image:
        assert (image.size, image.getpixel((0, 0))) == ((4, 8), (1, 2, 3))


def test_one_process_delivers_what_another_one_logs_meanwhile(client, run_id, store, tmp_path):
    deliverer = RunLog(run_id, store, tmp_path)
    run_log = RunLog(run_id, NOWHERE, tmp_path, delivers=False)
    for step in range(3):
        run_log.metrics(step, {"train/loss": 10.0 - step})
    run_log.close(0)

    deliverer.close(DELIVERY_SECONDS)

    assert history(client, run_id, "train/loss") == values(range(3))


def test_a_storage_that_is_gone_raises_nothing_and_one_that_is_back_is_delivered(
    client, run_id, store, tmp_path, monkeypatch
):
    monkeypatch.setattr(run_log, "RETRY_SECONDS", 0.05)
    folder, elsewhere = tmp_path / "log", tmp_path / "elsewhere"
    deliverer, lost = RunLog(run_id, store, folder), RunLog(run_id, store, folder)
    folder.rename(elsewhere)
    folder.write_text("no folder")
    begun = time.monotonic()

    lost.close(DELIVERY_SECONDS)

    assert time.monotonic() - begun < DELIVERY_SECONDS / 2
    folder.unlink()
    elsewhere.rename(folder)
    RunLog(run_id, NOWHERE, folder, delivers=False).metrics(0, {"train/loss": 10.0})
    deliverer.close(DELIVERY_SECONDS)
    assert history(client, run_id, "train/loss") == values(range(1))


def test_what_one_process_could_not_deliver_the_next_one_does(client, run_id, store, tmp_path):
    log(run_id, store, tmp_path, range(3), wait=DELIVERY_SECONDS)
    log(run_id, NOWHERE, tmp_path, range(3, 6), wait=0)

    log(run_id, store, tmp_path, range(6, 8), wait=DELIVERY_SECONDS)

    assert history(client, run_id, "train/loss") == values(range(8))


def test_what_was_delivered_is_not_delivered_again(client, run_id, store, tmp_path):
    log(run_id, store, tmp_path, range(3), wait=DELIVERY_SECONDS)
    other = start_run(client, experiment="tests", name="other", config=CONFIG)

    log(other, store, tmp_path, range(3, 5), wait=DELIVERY_SECONDS)

    assert history(client, other, "train/loss") == values(range(3, 5))


def test_a_step_that_is_repeated_is_logged_once(client, run_id, store, tmp_path):
    log(run_id, store, tmp_path, range(4), wait=DELIVERY_SECONDS)

    log(run_id, store, tmp_path, range(2, 6), wait=DELIVERY_SECONDS)

    assert history(client, run_id, "train/loss") == values(range(6))


def test_a_line_that_is_delivered_twice_counts_once(client, run_id, store, tmp_path):
    log(run_id, store, tmp_path, range(3), wait=DELIVERY_SECONDS)
    (tmp_path / "metrics.delivered").unlink()

    log(run_id, store, tmp_path, range(0), wait=DELIVERY_SECONDS)

    assert history(client, run_id, "train/loss") == values(range(3))


@pytest.mark.parametrize("left", ["", "\0\0"], ids=["full disk", "power cut"])
def test_a_torn_note_of_what_was_delivered_holds_nothing_up(
    client, run_id, store, tmp_path, left
):
    log(run_id, store, tmp_path, range(3), wait=DELIVERY_SECONDS)
    (tmp_path / "metrics.delivered").write_text(left)

    log(run_id, store, tmp_path, range(3, 5), wait=DELIVERY_SECONDS)

    assert history(client, run_id, "train/loss") == values(range(5))


@pytest.mark.parametrize("uri", [NOWHERE, "sqlite:////dev/null/mlflow.db"])
def test_what_is_not_delivered_is_said(run_id, tmp_path, caplog, uri):
    log(run_id, uri, tmp_path, range(3), wait=1)

    assert f"undelivered metrics are in {tmp_path}" in caplog.text


def test_a_database_that_comes_later_gets_everything(client, run_id, store, tmp_path):
    place = tmp_path / "disk"
    place.write_text("not mounted yet")
    run_log = RunLog(run_id, f"sqlite:///{place}/mlflow.db", tmp_path)
    run_log.metrics(0, {"train/loss": 10.0})
    time.sleep(1)
    place.unlink()
    place.symlink_to(Path(store.removeprefix("sqlite:///")).parent)

    run_log.close(DELIVERY_SECONDS)

    assert history(client, run_id, "train/loss") == values(range(1))


def test_a_line_cut_by_a_crash_does_not_hold_up_the_others(client, run_id, store, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "time": 17, "metr')

    log(run_id, store, tmp_path, range(1, 3), wait=5)

    assert history(client, run_id, "train/loss") == values(range(1, 3))


def test_closing_does_not_wait_longer_than_asked(run_id, tmp_path):
    run_log = RunLog(run_id, NOWHERE, tmp_path)
    run_log.metrics(1, {"train/loss": 1.0})
    begun = time.monotonic()

    run_log.close(0.5)

    assert 0.4 < time.monotonic() - begun < 5


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def mlflow_server(port: int, store: str, folder: Path) -> Iterator[None]:
    """Run an MLflow server."""
    words = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", store, "--artifacts-destination", str(folder)]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *words],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.fixture(scope="module")
def outage(client, store, tmp_path_factory) -> SimpleNamespace:
    """Log to a server that is down, and start it afterwards."""
    folder = tmp_path_factory.mktemp("outage")
    port = free_port()
    experiment = client.create_experiment("outage", artifact_location="mlflow-artifacts:/o")
    run_id = client.create_run(experiment).info.run_id
    begun = time.monotonic()
    run_log = RunLog(run_id, f"http://127.0.0.1:{port}", folder / "log")
    for step in range(20):
        run_log.metrics(step, {"train/loss": 10.0 - step})
    run_log.picture("views.png", Image.new("RGB", (4, 8)))
    seconds = time.monotonic() - begun
    with mlflow_server(port, store, folder / "artifacts"):
        run_log.close(2 * DELIVERY_SECONDS)
        slow_run_id = client.create_run(experiment).info.run_id
        with slowed(port) as (slow_port, calls):
            log(
                slow_run_id,
                f"http://127.0.0.1:{slow_port}",
                folder / "slow",
                range(20),
                wait=60,
            )
    return SimpleNamespace(
        run_id=run_id,
        seconds=seconds,
        artifacts=folder / "artifacts",
        slow_run_id=slow_run_id,
        calls=calls,
    )


@contextmanager
def slowed(port: int) -> Iterator[tuple[int, list[str]]]:
    """Stand before a server, and let each call wait; yield the port, and what was called."""
    calls = []

    class Slow(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            calls.append(self.path)
            time.sleep(SLOW_SECONDS)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked = urllib.request.Request(
                f"http://127.0.0.1:{port}{self.path}",
                data=body,
                headers={"Content-Type": self.headers["Content-Type"]},
            )
            with urllib.request.urlopen(asked) as answer:
                content = answer.read()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server.server_address[1], calls
        server.shutdown()


@pytest.mark.slow
def test_a_slow_server_gets_all_that_waits_at_once(client, outage):
    assert len(outage.calls) <= 3
    assert history(client, outage.slow_run_id, "train/loss") == values(range(20))


@pytest.mark.slow
def test_logging_does_not_wait_for_a_server_that_is_down(outage):
    assert outage.seconds < 0.9


@pytest.mark.slow
def test_metrics_arrive_when_the_server_is_up_again(client, outage):
    assert history(client, outage.run_id, "train/loss") == values(range(20))


@pytest.mark.slow
def test_pictures_arrive_when_the_server_is_up_again(outage):
    assert [path.name for path in outage.artifacts.rglob("*.png")] == ["views.png"]


@pytest.mark.parametrize("uri", [NOWHERE, "sqlite:////dev/null/mlflow.db", "tape://x"])
def test_a_server_that_is_none_is_refused_in_one_line(monkeypatch, uri):
    for name in connection.HTTP_DEFAULTS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    begun = time.monotonic()

    with pytest.raises(InputError, match=rf"^MLFLOW_TRACKING_URI={uri}: [^\n]+$"):
        connection.connect()

    assert time.monotonic() - begun < 30


def test_the_password_of_a_server_is_not_shown(monkeypatch):
    before = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:geheim@127.0.0.1:9")

    with pytest.raises(InputError, match=r"http://me:\*\*\*@127.0.0.1:9: ") as refusal:
        connection.connect()

    assert "geheim" not in str(refusal.value)
    assert mlflow.get_tracking_uri() == before
    assert refusal.value.__cause__ is None


@pytest.mark.parametrize(
    ("error", "status"),
    [(RunStopped("asked to"), "KILLED"), (ValueError("broken"), "FAILED"), (None, "FINISHED")],
)
def test_a_run_ends_in_mlflow_as_it_ended(client, error, status):
    run_id = start_run(client, experiment="ends", name="a-run", config=CONFIG)

    with suppress(RunStopped, ValueError), runs.running(client, run_id):
        if error is not None:
            raise error

    assert client.get_run(run_id).info.status == status


# The registry.


@pytest.fixture
def name() -> str:
    return f"upreid-{uuid4().hex[:8]}"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    """Make the folder of a backbone."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    save_file(build_backbone("resnet18").state_dict(), folder / "backbone.safetensors")
    images = {"height": 64, "width": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
    (folder / "backbone.json").write_text(json.dumps({"backbone": "resnet18", **images}))
    return folder


@pytest.fixture
def light(tmp_path) -> Path:
    """Make the folder of a backbone that nobody loads."""
    folder = tmp_path / "light"
    folder.mkdir()
    (folder / "backbone.json").write_text("{}")
    return folder


def register(
    client: MlflowClient, name: str, folder: Path, *, run_id: str | None = None, **tags: object
) -> str:
    """Register a folder as the backbone of a new run; return its version."""
    if run_id is None:
        experiment = client.get_experiment_by_name("tests") or SimpleNamespace(
            experiment_id=client.create_experiment("tests")
        )
        run_id = client.create_run(experiment.experiment_id).info.run_id
    named = {key.replace("_", "."): str(value) for key, value in tags.items()}
    uri = register_backbone(client, run_id=run_id, name=name, folder=folder, tags=named)
    model, _, version = uri.removeprefix("models:/").partition("/")
    assert model == name
    return version


def aliases(client: MlflowClient, name: str) -> dict[str, str]:
    found = client.get_registered_model(name).aliases
    return {alias: str(version) for alias, version in found.items()}


def test_the_first_version_is_challenger_and_champion(client, name, light):
    version = register(client, name, light)

    assert aliases(client, name) == {"challenger": version, "champion": version}


def test_a_version_carries_its_tags(client, name, light):
    version = register(client, name, light, evaluation="a", score_mAP=0.25)

    tags = client.get_model_version(name, version).tags
    assert tags == {"evaluation": "a", "score.mAP": "0.25"}


@pytest.mark.parametrize(
    ("tags", "becomes_champion"),
    [
        ({"evaluation": "a", "score_mAP": 0.6}, True),
        ({"evaluation": "a", "score_mAP": 0.5}, False),
        ({"evaluation": "a", "score_mAP": 0.4}, False),
        ({"evaluation": "a", "score_mAP": 1e-05}, False),
        ({"evaluation": "b", "score_mAP": 0.6}, False),
        ({"evaluation": "a"}, False),
        ({}, False),
    ],
    ids=["better", "equal", "worse", "tiny", "other set", "no score", "no evaluation"],
)
def test_the_champion_changes_only_for_a_better_score_on_the_same_set(
    client, name, light, tags, becomes_champion
):
    first = register(client, name, light, evaluation="a", score_mAP=0.5)

    second = register(client, name, light, **tags)

    champion = second if becomes_champion else first
    assert aliases(client, name) == {"challenger": second, "champion": champion}


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        (
            {"evaluation": "a", "score_mAP": 0.4},
            "its mAP is 0.4000, that of the champion 0.5000",
        ),
        ({"evaluation": "b", "score_mAP": 0.6}, "it was scored on another evaluation set"),
        ({"evaluation": "none"}, "it was not scored, without labelled images"),
    ],
    ids=["worse", "other set", "no score"],
)
def test_a_version_that_does_not_become_the_champion_says_why(
    client, name, light, caplog, tags, reason
):
    register(client, name, light, evaluation="a", score_mAP=0.5)

    with caplog.at_level(logging.INFO, "upreid_ray"):
        register(client, name, light, **tags)

    [line] = [each for each in caplog.messages if "champion" in each]
    assert (
        f"models:/{name}/2 does not become the champion, which stays version 1: {reason}"
        in line
    )
    assert f'jobs/promote.py models:/{name}/2 --reason "..."' in line


def test_a_promoted_version_is_the_champion_with_a_reason(client, name, light):
    register(client, name, light, evaluation="a", score_mAP=0.5)
    register(client, name, light, evaluation="a", score_mAP=0.4)

    promoted = promote(client, f"models:/{name}@challenger", "It is faster.")

    assert promoted == (f"models:/{name}/2", f"models:/{name}/1")
    assert aliases(client, name) == {"challenger": "2", "champion": "2"}
    tags = client.get_model_version(name, "2").tags
    assert tags["promotion.reason"] == "It is faster."
    assert tags["promotion.before"] == f"models:/{name}/1"
    with pytest.raises(InputError, match="version 2 is the champion already"):
        promote(client, f"models:/{name}/2", "Again.")


def test_a_version_that_does_not_exist_is_not_promoted(client, name, light):
    register(client, name, light)

    with pytest.raises(InputError, match=rf"^models:/{name}/9: not in the registry"):
        promote(client, f"models:/{name}/9", "Why not.")

    assert aliases(client, name)["champion"] == "1"


def test_a_run_registers_once(client, run_id, name, light):
    first = register(client, name, light, run_id=run_id)

    assert register(client, name, light, run_id=run_id) == first


def test_registering_a_run_again_leaves_the_newest_the_challenger(client, run_id, name, light):
    register(client, name, light, run_id=run_id)
    newest = register(client, name, light)

    register(client, name, light, run_id=run_id)

    assert aliases(client, name)["challenger"] == newest


def test_a_registration_that_was_killed_is_completed(client, run_id, name, light):
    client.create_registered_model(name)
    version = client.create_model_version(name, f"runs:/{run_id}/backbone", run_id).version

    register(client, name, light, run_id=run_id)

    assert aliases(client, name) == {"challenger": str(version), "champion": str(version)}


@pytest.fixture(scope="module")
def registered(client, backbone) -> str:
    register(client, "upreid-loaded", backbone)
    return "upreid-loaded"


@pytest.mark.parametrize("place", ["/1", "@champion", "@challenger"])
def test_a_backbone_is_loaded_by_version_and_by_alias(registered, backbone, place):
    loaded = load_backbone(f"models:/{registered}{place}")

    torch.testing.assert_close(
        dict(loaded.state_dict()),
        load_file(backbone / "backbone.safetensors"),
        rtol=0,
        atol=0,
    )


def test_a_loaded_backbone_turns_images_into_features(registered):
    loaded = load_backbone(f"models:/{registered}@champion")

    assert loaded(torch.zeros(2, 3, 64, 32)).shape == (2, 512)


def test_a_loaded_backbone_is_in_eval_mode(registered):
    loaded = load_backbone(f"models:/{registered}@champion")

    assert not any(module.training for module in loaded.modules())


def test_a_backbone_loads_without_this_package(registered):
    folder = mlflow.artifacts.download_artifacts(f"models:/{registered}@champion")
    backbone = torchvision.models.resnet18()
    backbone.fc = torch.nn.Identity()

    keys = backbone.load_state_dict(load_file(f"{folder}/backbone.safetensors"), strict=True)

    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])


def test_a_version_of_an_older_release_loads_and_stays_the_champion(client, name, backbone):
    run_id = start_run(client, experiment="tests", name="old", config=CONFIG)
    client.log_artifacts(run_id, str(backbone), "backbone")
    client.create_registered_model(name)
    tags = {"config": "x" * 2000, "evaluation": "a", "score.mAP": "0.5"}
    client.create_model_version(name, f"runs:/{run_id}/backbone", run_id, tags=tags)
    client.set_registered_model_alias(name, "champion", "1")

    register(client, name, backbone, evaluation="a", score_mAP=0.4)

    assert aliases(client, name) == {"challenger": "2", "champion": "1"}
    assert load_backbone(f"models:/{name}@champion")(torch.zeros(1, 3, 64, 32)).shape == (
        1,
        512,
    )


@pytest.mark.parametrize(
    "uri", ["models:/nobody/1", "models:/nobody@champion", "models:/", "nothing", "runs:/0/x"]
)
def test_a_version_that_does_not_exist_is_refused_in_one_line(uri):
    with pytest.raises(InputError, match=rf"^{uri}: [^\n]+$"):
        load_backbone(uri)


@pytest.mark.parametrize("file", ["backbone.json", "backbone.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_files_that_make_no_backbone_are_refused_in_one_line(
    client, name, backbone, tmp_path, file, content
):
    folder = tmp_path / "damaged"
    shutil.copytree(backbone, folder)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    version = register(client, name, folder)

    with pytest.raises(InputError, match=r"^/[^\n]+: [^\n]+$"):
        load_backbone(f"models:/{name}/{version}")
