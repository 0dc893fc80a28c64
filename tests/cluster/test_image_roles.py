"""The services of `cluster/compose.yaml`, run from the image as docs/operations.md says."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import firewall
from tests.cluster.composition import Composition
from tests.cluster.image import Image
from tests.cluster.manifests import CLUSTER, ROOT, Tree
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


def documented(pod: str) -> list[list[str]]:
    """Return the commands that docs/operations.md runs in a pod, without their redirections."""
    text = (ROOT / "docs/operations.md").read_text().replace("\\\n", "")
    found = re.findall(rf"kubectl -n upreid exec (?:-i )?{pod} -- ([^<>\n]*)", text)
    return [shlex.split(words) for words in found]


def python(services: Composition, script: str, host: str = "worker", of: str = "head") -> str:
    """Run a script in the image; return what it prints."""
    return output(services.command(host, "python", "-c", script, of=of))


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
