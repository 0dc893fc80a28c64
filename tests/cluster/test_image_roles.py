"""The services of `cluster/compose.yaml`, run from the image as docs/operations.md says."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import firewall
from tests.cluster.composition import Composition
from tests.cluster.image import Image
from tests.cluster.manifests import CLUSTER, ROOT, Tree, hook
from tests.cluster.network import Network
from tests.cluster.processes import ending
from tests.cluster.submission import Submission

pytestmark = pytest.mark.timeout(3600)

PEOPLE = {
    "data.synthetic.num_train_identities": "4",
    "data.synthetic.num_test_identities": "4",
    "data.synthetic.num_cameras": "2",
    "training.log_every_steps": "1",
    "scaling.num_workers": "1",
    "scaling.cpus_per_worker": "1",
}
# Of the preset demo, in seconds: 7 steps an epoch.
TINY = PEOPLE | {
    "data.synthetic.num_unlabeled_identities": "10",
    "model.queue_size": "32",
    "training.batch_size": "8",
    "training.group_size": "4",
}
FINETUNING = PEOPLE | {
    "data.synthetic.num_unlabeled_identities": "0",
    "training.epochs": "2",
    "training.num_persons": "4",
    "training.num_images": "2",
    "training.num_groups": "1",
}
# So long that much can happen. Each evaluation saves a checkpoint; others are between these.
EPOCHS, EVERY_EPOCHS = 40, 4
EVERY_STEPS = 7 * EVERY_EPOCHS
STORE = "postgresql+psycopg2://mlflow:$POSTGRES_PASSWORD@postgres:5432/mlflow"

# The pod that stands for each service; from outside, the one that submits a RayJob.
PODS = {
    "head": {"ray.io/cluster": "upreid"},
    "worker": {"ray.io/cluster": "upreid"},
    "mlflow": {"app": "mlflow"},
    "bucket": {"app": "mlflow"},
    "postgres": {"app": "postgres"},
    "s3": {"app": "s3"},
    "outside": {"ray.io/originated-from-crd": "RayJob"},
    "prometheus": {"app.kubernetes.io/name": "prometheus"},
    "gpu-worker": {},  # it is not started: nobody's pod
}
PORTS = {
    "head": (6379, 8080, 8265),
    "worker": (8080,),
    "mlflow": (5000,),
    "postgres": (5432,),
    "s3": (9000,),
}


@pytest.fixture(scope="module")
def services(image: Image, rendered: dict[str, list[Tree]]) -> Iterator[Composition]:
    """Start all services but the one for GPUs, behind the policies of Kubernetes."""
    folder = Path(tempfile.mkdtemp(prefix="upreid-services-"))
    shutil.copy(CLUSTER / "make_secrets.py", folder)
    (folder / "kubernetes/base").mkdir(parents=True)
    subprocess.run([sys.executable, str(folder / "make_secrets.py")], check=True)
    secrets = folder / "kubernetes/base/secrets"
    policies = [each for each in rendered["gpu"] if each["kind"] == "NetworkPolicy"]
    with Network() as network, Composition(image, network, folder, secrets) as composition:
        for name, text in firewall.rules(policies, PODS, composition.hosts).items():
            firewall.apply(composition.hosts[name], text)
        composition.up("worker")
        composition.wait_until_healthy("head")
        yield composition
    shutil.rmtree(folder)


def submit(services: Composition, job: str, *words: str, **settings: Any) -> Submission:
    """Submit a job of the image from outside."""
    command = ("ray", "job", "submit", "--address=http://head:8265", "--log-color=false", "--")
    flags = [f"--{name}={value}" for name, value in settings.items()]
    words = (f"/home/ray/upreid/jobs/{job}.py", *words, *flags)
    log = Path(tempfile.mkstemp(dir=services.folder, prefix=f"{job}-")[1])
    return Submission(services.command("outside", *command, "python", *words), log)


@pytest.fixture(scope="module")
def registered(services: Composition) -> str:
    """Pre-train; return the version."""
    settings = {"training.epochs": 2, "evaluation.every_epochs": 1, "checkpoint.every_steps": 4}
    job = submit(services, "pretrain", "demo", "--run.name=first", **TINY, **settings)
    version: str = job.result()["model_uri"]
    return version


def output(command: list[str], **given: Any) -> str:
    """Run a command to its end; return what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **given)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_submitted_pre_training_registers_a_backbone_that_a_worker_can_load(
    services, registered
):
    script = f"import upreid_ray; print(type(upreid_ray.load_backbone({registered!r})))"

    assert registered == "models:/upreid-resnet18/1"
    assert "ResNet" in python(services, script)


def test_ray_keeps_its_objects_in_shared_memory(services):
    assert "instead of /dev/shm" not in services.log("head") + services.log("worker")


def reached(services: Composition) -> dict[str, list[str]]:
    """Return the ports that can be connected to, by the host from which it was tried."""
    script = """
import socket, sys
for word in sys.argv[1:]:
    host, port = word.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
        print(word)
    except OSError:
        pass
"""
    names = {
        f"{services.hosts[name].address}:{port}": f"{name}:{port}"
        for name, ports in PORTS.items()
        for port in ports
    }
    found = {}
    for name in ("outside", "prometheus", "worker", "mlflow", "s3", "gpu-worker"):
        lines = output(services.command(name, "python", "-c", script, *names)).split()
        found[name] = [names[line] for line in lines]
    return found


def test_policies_let_through_what_is_needed_and_nothing_else(services):
    rays = ["head:6379", "head:8080", "head:8265", "worker:8080"]
    assert reached(services) == {
        "outside": ["head:8265"],
        "prometheus": ["head:8080", "worker:8080"],
        "worker": [*rays, "mlflow:5000", "s3:9000"],
        "mlflow": ["mlflow:5000", "postgres:5432", "s3:9000"],
        "s3": ["s3:9000"],
        "gpu-worker": [],
    }


def test_a_submitted_sweep_registers_its_best_backbone(services, registered):
    search = ("--num_trials=2", "--trial_epochs=1", "--scheduler=none")
    settings = TINY | {"evaluation.every_epochs": 1, "optimizer.warmup_epochs": 0}
    job = submit(services, "sweep", "i2", "demo", "--run.name=swept", *search, **settings)

    assert job.result()["model_uri"] == "models:/upreid-resnet18/2"


def test_a_submitted_fine_tuning_registers_its_descendant_of_that_backbone(
    services, registered
):
    job = submit(services, "finetune", "demo", f"--init={registered}", **FINETUNING)

    assert job.result()["model_uri"] == "models:/upreid-resnet18-finetuned/1"


def test_the_model_server_answers_a_request(services, registered):
    words = ("-m", registered, "--env-manager", "local", "--host", "127.0.0.1", "-p", "5001")
    served = services.command("worker", "mlflow", "models", "serve", *words)
    script = """
import base64, io, json, time, urllib.error, urllib.request
from PIL import Image
file = io.BytesIO()
Image.new("RGB", (50, 100), "red").save(file, "JPEG")
body = json.dumps({"inputs": [base64.b64encode(file.getvalue()).decode()]}).encode()
request = urllib.request.Request("http://127.0.0.1:5001/invocations", body,
                                 {"Content-Type": "application/json"})
for _ in range(120):
    try:
        print(urllib.request.urlopen(request).read().decode())
        break
    except urllib.error.URLError as error:
        if isinstance(error, urllib.error.HTTPError):
            raise
        time.sleep(1)
"""
    with ending(subprocess.Popen(served, stdout=subprocess.DEVNULL)):
        answer = python(services, script)
    (features,) = json.loads(answer)["predictions"]

    assert len(features) == 512
    assert sum(each**2 for each in features) == pytest.approx(1, abs=1e-4)


class Prometheus:
    """A server that scrapes Ray's nodes each second, as it does by the pods' annotations."""

    def __init__(self, services: Composition, rendered: list[Tree]) -> None:
        (ray,) = (each["spec"] for each in rendered if each["kind"] == "RayCluster")
        note = ray["headGroupSpec"]["template"]["metadata"]["annotations"]
        nodes = [services.hosts[name].address for name in ("head", "worker")]
        targets = [f"{node}:{note['prometheus.io/port']}" for node in nodes]
        scrape = {"job_name": "ray", "static_configs": [{"targets": targets}]}
        config = services.folder / "prometheus.yml"
        every = {"scrape_interval": "1s", "scrape_timeout": "1s"}
        config.write_text(json.dumps({"global": every, "scrape_configs": [scrape]}))
        self._services, prefix = services, services.hosts["prometheus"].prefix
        options = (f"--config.file={config}", f"--storage.tsdb.path={services.folder}/tsdb")
        self.command = [*prefix, "prometheus", *options, "--log.level=error"]

    def ask(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer."""
        uri = f"http://127.0.0.1:9090/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        return json.loads(
            output(self._services.command("prometheus", "wget", "-q", "-O-", uri))
        )["data"]


def queries(rendered: list[Tree]) -> dict[str, str]:
    """Return the dashboard's queries that a machine without GPUs can answer, by their panel."""
    (board,) = (each for each in rendered if each["metadata"]["name"] == "upreid-dashboard")
    return {
        f"{panel['title']} {number}": target["expr"].replace("$run", "second")
        for panel in json.loads(board["data"]["dashboard.json"])["panels"]
        for number, target in enumerate(panel["targets"])
        if "GPU" not in panel["title"]
    }


def documented(pod: str) -> list[list[str]]:
    """Return the commands that docs/operations.md runs in a pod, without their redirections."""
    text = (ROOT / "docs/operations.md").read_text().replace("\\\n", "")
    found = re.findall(rf"kubectl -n upreid exec (?:-i )?{pod} -- ([^<>\n]*)", text)
    return [shlex.split(words) for words in found]


def python(services: Composition, script: str, host: str = "worker", of: str = "head") -> str:
    """Run a script in the image; return what it prints."""
    return output(services.command(host, "python", "-c", script, of=of))


def checkpoints(services: Composition, run: str) -> list[int]:
    """Return the steps of a run's checkpoints in the bucket."""
    script = f"""
import boto3
pages = boto3.client("s3").get_paginator("list_objects_v2")
for page in pages.paginate(Bucket="upreid", Prefix="runs/{run}/step-", Delimiter="/"):
    for each in page.get("CommonPrefixes", []):
        print(int(each["Prefix"].rstrip("/").rpartition("-")[2]))
"""
    return sorted(map(int, python(services, script).split()))


def move(services: Composition, source: str, target: str) -> None:
    """Move all that is in a folder of the bucket."""
    script = f"""
import boto3
s3 = boto3.resource("s3")
files = list(s3.Bucket("upreid").objects.filter(Prefix="{source}/"))
assert files
for file in files:
    name = file.key.replace("{source}", "{target}", 1)
    s3.Object("upreid", name).copy({{"Bucket": "upreid", "Key": file.key}})
    file.delete()
"""
    python(services, script, "mlflow", of="bucket")


def aliases(services: Composition) -> dict[str, str]:
    """Return the version of each alias of the pre-trained model."""
    script = """
import json, mlflow
print(json.dumps(mlflow.MlflowClient().get_registered_model("upreid-resnet18").aliases))
"""
    found: dict[str, str] = json.loads(python(services, script))
    return found


def resume(services: Composition, run: str) -> Submission:
    """Resume a run; check that it goes on from a checkpoint."""
    saved = checkpoints(services, run)
    job = submit(services, "pretrain", f"--resume={run}")
    job.wait_for(lambda: len(job.steps()) > 0)
    assert job.steps()[0] - 1 in saved
    return job


def newest_checkpoint(services: Composition, run: str) -> int:
    """Return the step of the newest checkpoint that Ray Train knows of, 0 if of none."""
    script = f"""
import boto3, json
name = "runs/{run}/checkpoint_manager_snapshot.json"
try:
    known = json.load(boto3.client("s3").get_object(Bucket="upreid", Key=name)["Body"])
    print(known["latest_checkpoint_result"]["metrics"]["step"])
except Exception:  # none yet
    print(0)
"""
    return int(python(services, script))


def lose_the_node(services: Composition, job: Submission, command: list[str]) -> None:
    """Let a run's node say that it ends, and end; check that it has a checkpoint of then."""
    with ending(subprocess.Popen(services.execute("worker", *command))):
        job.wait_for(lambda: newest_checkpoint(services, "second") % EVERY_STEPS > 0)
        services.lose("worker")
    saved = newest_checkpoint(services, "second")
    services.up("worker")
    before = len(job.steps())
    job.wait_for(lambda: len(job.steps()) > before + 2)
    kept = [step for step in job.steps() if step <= saved]
    assert len(kept) == len(set(kept)), "a step before the checkpoint was taken again"


def lose_the_head(services: Composition, job: Submission) -> None:
    """Let the head end and start again, as its container does; its jobs end with it."""
    services.lose("head")
    services.up("head")
    assert job.wait() != 0
    services.wait_until_restarted("worker")
    services.wait_until_healthy("head")


def stop(services: Composition, job: Submission) -> None:
    """Stop a job; check that its run is told."""
    (name,) = set(re.findall(r"raysubmit_\w+", job.log))
    words = ("ray", "job", "stop", "--address=http://head:8265", name)
    output(services.command("outside", *words))
    job.wait()  # with status 0: Ray calls such a job stopped, not failed
    assert "stopping at the next log entry" in job.log


def upgrade(services: Composition) -> None:
    """Back MLflow up, end all of our services, lose MLflow's stores, restore and start anew."""
    dump, restore = documented("postgres-0")
    content = services.postgres(*dump)
    for service in ("worker", "head", "mlflow"):
        services.lose(service)
    move(services, "mlflow", "backup/mlflow")
    services.postgres("dropdb", "--username=mlflow", "--force", "mlflow")
    services.postgres("createdb", "--username=mlflow", "mlflow")
    move(services, "backup/mlflow", "mlflow")
    services.postgres(*restore, given=content)
    tables = f"mlflow db upgrade {STORE}"
    output(services.command("mlflow", "sh", "-c", tables, of="mlflow"))
    services.up("worker")
    services.wait_until_healthy("head")


def kill_the_training(services: Composition, job: Submission) -> None:
    """Kill the process that trains; the run starts another one."""
    script = """
import os
from pathlib import Path
for file in Path("/proc").glob("[0-9]*/cmdline"):
    if file.read_bytes().startswith(b"ray::RayTrainWorker"):
        os.kill(int(file.parent.name), 9)
        print("killed")
"""
    before = len(job.steps())
    assert output(services.execute("worker", "python", "-c", script)) == "killed\n"
    job.wait_for(lambda: len(job.steps()) > before + 2)


def test_an_operators_hour(services, registered, rendered):
    """A run loses its node, its head and a process, and is stopped; MLflow is restored."""
    prometheus = Prometheus(services, rendered["gpu"])
    with ending(subprocess.Popen(prometheus.command)):
        began = time.time()
        settings = TINY | {"training.epochs": EPOCHS, "evaluation.every_epochs": EVERY_EPOCHS}
        seldom = "--checkpoint.every_steps=1000"
        job = submit(services, "pretrain", "demo", "--run.name=second", seldom, **settings)
        job.wait_for(lambda: job.newest_step() > EVERY_STEPS + 2)
        lose_the_node(services, job, hook(rendered["gpu"]))
        lose_the_head(services, job)
        job = resume(services, "second")
        kill_the_training(services, job)
        stop(services, job)
        before = aliases(services)
        upgrade(services)
        assert aliases(services) == before
        version = resume(services, "second").result()["model_uri"]

        model = version.rpartition("/")[0]
        champion = aliases(services)["champion"]
        numbers = [uri.rpartition("/")[2] for uri in (registered, version)]
        other = next(number for number in numbers if number != champion)
        for number in (other, champion):  # promoted, and back
            words = ("python", "jobs/promote.py", f"{model}/{number}", "--reason=A test.")
            output(services.command("head", *words))
            assert aliases(services)["champion"] == number

        # All of this is on the dashboard.
        span = {"start": str(began), "end": str(time.time()), "step": "1"}
        assert "second" in prometheus.ask("label/run/values")
        shown = {
            panel: prometheus.ask("query_range", query=query, **span)["result"]
            for panel, query in queries(rendered["gpu"]).items()
        }
        assert len(shown) > 8
        assert [panel for panel, series in shown.items() if not series] == []


def test_a_deleted_run_is_collected_and_its_version_stays(services, registered):
    (collect,) = documented("deploy/mlflow")
    script = """
import mlflow
client = mlflow.MlflowClient()
version = client.get_model_version("upreid-resnet18", "1")
client.delete_run(version.run_id)
print(version.run_id)
"""
    run_id = python(services, script).strip()
    words = shlex.join(collect).replace("90d", "0d")
    command = f"export MLFLOW_BACKEND_STORE_URI={STORE}; {words}"
    output(services.execute("mlflow", "sh", "-c", command))
    script = f"""
import mlflow, upreid_ray
try:
    mlflow.get_run({run_id!r})
except mlflow.MlflowException as error:
    print(error.error_code)
print(type(upreid_ray.load_backbone({registered!r})))
"""
    error, kind = python(services, script).splitlines()

    assert error == "RESOURCE_DOES_NOT_EXIST"
    assert "ResNet" in kind
