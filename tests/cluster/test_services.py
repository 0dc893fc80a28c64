"""MLflow as `cluster/kubernetes` runs it: the manifest's own commands on real services.

PostgreSQL and an S3 server (moto) are started here, on loopback, from packages.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import mlflow
import psycopg2
import pytest
import yaml
from moto.server import ThreadedMotoServer

from tests.cluster.postgres import postgres
from tests.cluster.processes import ROOT, ending, free_ports
from upreid_ray.config.presets import PRESETS
from upreid_ray.config.run import RunConfig
from upreid_ray.tracking import connection, registry, runs
from upreid_ray.train.folder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MANIFEST = ROOT / "cluster" / "kubernetes" / "base" / "mlflow.yaml"
KEYS = {"AWS_ACCESS_KEY_ID": "an-id", "AWS_SECRET_ACCESS_KEY": "a-secret"}
PASSWORD = "a-password"
CONFIG = PRESETS["demo"]


def sql(port: int, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
    """Run a statement and return its rows."""
    uri = f"postgresql://mlflow:{PASSWORD}@127.0.0.1:{port}/{database}"
    with closing(psycopg2.connect(uri)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []


@dataclass(frozen=True)
class Services:
    """What runs: where MLflow answers, where PostgreSQL does, and with which programs."""

    mlflow: str
    postgres: int
    programs: Path


def request(uri: str, host: str | None = None) -> int:
    """Return the HTTP status of a request, made under the name of a host."""
    headers = {"Host": host} if host else {}
    asked = urllib.request.Request(uri, headers=headers)
    try:
        with urllib.request.urlopen(asked, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


@pytest.fixture(scope="module")
def services() -> Iterator[Services]:
    """Start PostgreSQL, an S3 server, the bucket's init container and MLflow's container."""
    pod = next(yaml.safe_load_all(MANIFEST.read_text()))["spec"]["template"]["spec"]
    (bucket,), (server,) = pod["initContainers"], pod["containers"]
    s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=free_ports(1)[0], verbose=False)
    s3.start()
    port = free_ports(1)[0]
    store = "http://{}:{}".format(*s3.get_host_and_port())
    database = free_ports(1)[0]
    with pytest.MonkeyPatch.context() as patch, postgres(database, PASSWORD) as programs:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", store)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        for name, value in connection.HTTP_DEFAULTS.items():
            patch.setenv(name, value)
        for _ in range(2):  # a pod that starts again finds its bucket there
            subprocess.run(bucket["command"], check=True)
        sql(database, "CREATE DATABASE mlflow")
        given = next(v for v in server["env"] if v["name"] == "MLFLOW_BACKEND_STORE_URI")
        uri = given["value"].replace("$(POSTGRES_PASSWORD)", PASSWORD)
        patch.setenv(given["name"], uri.replace("postgres:5432", f"127.0.0.1:{database}"))
        patch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
        here = {"--host=0.0.0.0": "--host=127.0.0.1", "--port=5000": f"--port={port}"}
        command = [here.get(word, word) for word in server["command"]]
        before = mlflow.get_tracking_uri()
        with ending(subprocess.Popen(command, stdout=subprocess.DEVNULL)) as process:
            wait(f"http://127.0.0.1:{port}/health", process)
            yield Services(f"http://127.0.0.1:{port}", database, programs)
            mlflow.set_tracking_uri(before)
    s3.stop()


def wait(uri: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError):
            if request(uri) == 200:
                return
        time.sleep(0.3)
    pytest.fail("MLflow does not answer")


def register(folder: Path, score: float) -> tuple[str, str]:
    """Do what a job does: start a run, log to it, register a version; return their names."""
    client = connection.connect()
    run_id = runs.start_run(client, experiment="upreid", name="a-run", config=CONFIG)
    runs.log_metrics(client, run_id, {"eval/mAP": score})
    tags = {"evaluation": "a", "score.mAP": str(score)}
    version = registry.register_backbone(
        client, run_id=run_id, name="upreid-resnet18", folder=folder, tags=tags
    )
    return run_id, version


def test_mlflow_answers_under_its_names_and_no_other(services: Services) -> None:
    """The service's, and what `kubectl port-forward` uses; others could be a browser's trap."""
    api = f"{services.mlflow}/api/2.0/mlflow/experiments/search?max_results=1"
    asked = ("mlflow:5000", "localhost:5001", "127.0.0.1:5000", "evil.example.com")
    assert [request(api, host) for host in asked] == [200, 200, 200, 403]
    assert request(f"{services.mlflow}/health", "10.0.0.7:5000") == 200  # the kubelet's


def test_jobs_that_begin_at_the_same_moment_share_experiment_and_registry(
    services: Services, tmp_path: Path
) -> None:
    """The first runs of a new server make both at once; then the best becomes the champion."""
    files = {"backbone.safetensors": b"weights", "backbone.json": b"{}"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    scores, gate = [0.1, 0.4, 0.3, 0.2], threading.Barrier(2)

    def job(score: float) -> tuple[str, str]:
        gate.wait(30)
        return register(tmp_path, score)

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(job, scores))

    client = connection.connect()
    (experiment,) = client.search_experiments(filter_string="name = 'upreid'")
    assert len(client.search_runs([experiment.experiment_id])) == len(scores)
    versions = {version for _, version in made}
    assert versions == {f"models:/upreid-resnet18/{number}" for number in range(1, 5)}
    for score in (0.5, 0.2):
        register(tmp_path, score)
    champion = client.get_model_version_by_alias("upreid-resnet18", "champion")
    assert champion.tags["score.mAP"] == "0.5"
    uri = "models:/upreid-resnet18@champion"
    folder = registry.download(client, registry.find_version(client, uri))
    assert (folder / "backbone.safetensors").read_bytes() == b"weights"
    keys = [o["Key"] for o in boto3.client("s3").list_objects_v2(Bucket="upreid")["Contents"]]
    assert any(key.startswith("mlflow/") and key.endswith("backbone.json") for key in keys)
    assert sql(services.postgres, "SELECT count(*) FROM runs", "mlflow") == [(6,)]


def test_a_run_folder_can_be_in_the_bucket(services: Services) -> None:
    """Where the cluster's `UPREID_RAY_STORAGE` points."""
    folder = RunFolder.of(RunConfig(name="a-run", storage_path="s3://upreid/runs"), "pretrain")
    assert not folder.exists()
    folder.record(CONFIG, "an-id")
    assert folder.exists()
    assert folder.recorded_run(CONFIG, free=()) == "an-id"


def test_a_dump_of_the_database_restores_the_registry(services: Services) -> None:
    """The commands of docs/operations.md, in the container's place."""
    environment = os.environ | {"PGPASSWORD": PASSWORD}
    target = ["-h", "127.0.0.1", "-p", str(services.postgres), "-U", "mlflow"]

    def run(program: str, *words: str, given: bytes = b"") -> bytes:
        command = [str(services.programs / program), *target, *words]
        return subprocess.run(
            command, env=environment, input=given, capture_output=True, check=True
        ).stdout

    dump = run("pg_dump", "--format=custom", "mlflow")
    sql(services.postgres, "CREATE DATABASE restored")
    run("pg_restore", "--clean", "--if-exists", "--dbname=restored", given=dump)

    aliases = "SELECT alias, version FROM registered_model_aliases ORDER BY alias"
    before = sql(services.postgres, aliases, "mlflow")
    assert [alias for alias, _ in before] == ["challenger", "champion"]
    assert sql(services.postgres, aliases, "restored") == before
