"""The local services, started once on free ports; the tests run in the order of this file."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.cluster.processes import ROOT, free_ports, run, tree

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

LOOPBACK = {"0100007F", "0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F"}
LISTENING = "0A"

JOB = """
import json, os, sys
import mlflow, ray

def seen():
    names = ("MLFLOW_TRACKING_URI", "UPREID_RAY_STORAGE")
    return [sys.executable, *(os.environ.get(name) for name in names)]

ray.init()
with mlflow.start_run() as run:
    mlflow.log_metric("answer", 42)
    mlflow.log_text("hello", "hello.txt")
task = ray.get(ray.remote(num_cpus=0.1)(seen).remote())
print("SEEN", json.dumps({"entrypoint": seen(), "task": task, "run": run.info.run_id}))
"""


def local(
    command: str, *words: str | Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the script under test."""
    return run(sys.executable, "cluster/local.py", command, *words, env=env)


def listening(pids: set[int]) -> set[tuple[str, int]]:
    """Return the hexadecimal address and the port of each socket that processes listen on."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):
                inodes.add(str(link.readlink()))
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path("/proc/net", table).read_text().splitlines()[1:]
    ]
    return {
        (row[1].split(":")[0], int(row[1].split(":")[1], 16))
        for row in rows
        if row[3] == LISTENING and f"socket:[{row[9]}]" in inodes
    }


@dataclass(frozen=True)
class Up:
    """What the one start of this module gave."""

    storage: Path
    home: Path
    dashboard: int
    mlflow: int
    output: str

    @property
    def database(self) -> str:
        """The database of jobs that are started without the server."""
        return f"sqlite:///{self.home}/mlflow.db"

    @property
    def env(self) -> dict[str, str]:
        """The environment of a user: where the token is, and that it is to be sent."""
        return {
            "HOME": str(self.home),
            "RAY_AUTH_MODE": "token",
            "MLFLOW_TRACKING_URI": self.database,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }

    def local(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run the script for this storage folder."""
        return local(command, "--storage", self.storage, env=self.env)

    def pids(self) -> dict[str, int]:
        """The recorded first process of each service."""
        record = json.loads((self.storage / "local" / "state.json").read_text())
        return {name: int(record[name]["pid"]) for name in ("ray", "mlflow")}

    def submit(
        self, folder: Path, script: str, *options: str
    ) -> subprocess.CompletedProcess[str]:
        """Submit a script with Ray's own command."""
        folder.mkdir(exist_ok=True)
        (folder / "job.py").write_text(script)
        target = [f"--address=http://127.0.0.1:{self.dashboard}", f"--working-dir={folder}"]
        words = ["ray", "job", "submit", *options, *target, "--", "python", "job.py"]
        return run("/usr/bin/env", *words, env=self.env)

    def get(self, path: str, token: str | None) -> int:
        """Ask the dashboard for a path and return the HTTP status."""
        connection = HTTPConnection("127.0.0.1", self.dashboard, timeout=20)
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        connection.request("GET", path, headers=headers)
        status = connection.getresponse().status
        connection.close()
        return status


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Start the services once, with a home of their own for the token."""
    storage, home = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("home")
    dashboard, gcs, mlflow = free_ports(3)
    ports = {"dashboard": dashboard, "gcs": gcs, "mlflow": mlflow}
    words = [f"--{name}-port={port}" for name, port in ports.items()]
    env = {"HOME": str(home), "MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db"}
    done = local("up", "--storage", storage, *words, env=env)
    assert done.returncode == 0, done.stderr
    started = Up(storage, home, dashboard, mlflow, done.stdout)
    yield started
    assert started.local("down").returncode == 0
    for line in done.stdout.splitlines():
        if line.startswith("Ray logs"):
            shutil.rmtree(Path(line.split()[-1]).parents[2])


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["sideways"],
        ["up", "--gcs-port", "many"],
        ["up", "--gcs-port", "80"],
        ["up", "--gcs-port", "7001", "--mlflow-port", "7001"],
        ["status", "--storage", "/dev/null"],
    ],
    ids=lambda words: " ".join(words) or "nothing",
)
def test_bad_input_is_one_line_and_exit_status_2(words: list[str], tmp_path: Path) -> None:
    """No usage, no traceback."""
    storage = [] if "--storage" in words else ["--storage", str(tmp_path)]
    done = run(sys.executable, "cluster/local.py", *words, *storage)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr


@pytest.mark.parametrize("flag", ["dashboard", "gcs", "mlflow"])
def test_a_taken_port_is_refused_before_anything_is_started(flag: str, tmp_path: Path) -> None:
    """One line names the flag, and nothing is left behind: no process, record or token."""
    ports = dict(zip(("dashboard", "gcs", "mlflow"), free_ports(3), strict=True))
    words = [f"--{name}-port={port}" for name, port in ports.items()]
    with socket.create_server(("127.0.0.1", ports[flag])):
        done = local("up", "--storage", tmp_path, *words, env={"HOME": str(tmp_path)})
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"--{flag}-port" in done.stderr
    assert list(tmp_path.rglob("*")) == []


def test_an_environment_in_a_folder_with_a_blank_is_refused(tmp_path: Path) -> None:
    """Ray's services would end, or wait forever for workers that cannot start."""
    environment = tmp_path / "an environment"
    environment.symlink_to(sys.prefix)
    python, storage = str(environment / "bin/python"), tmp_path / "storage"
    done = run(python, "cluster/local.py", "up", "--storage", str(storage))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "make up VENV=" in done.stderr
    assert not (storage / "local").exists()


def test_up_again_says_so_and_prints_the_same(up: Up) -> None:
    """Nothing is started a second time."""
    before = up.pids()
    again = up.local("up")
    assert again.returncode == 0
    assert "up already" in again.stdout
    assert f"http://127.0.0.1:{up.dashboard}" in again.stdout
    assert again.stdout.splitlines()[1:] == up.output.splitlines()[2:]
    assert up.pids() == before


def test_a_request_without_the_token_is_refused(up: Up) -> None:
    """Neither without a token nor with another one."""
    token = (up.home / ".ray" / "auth_token").read_text()
    answers = [up.get("/api/jobs/", candidate) for candidate in (None, "0" * 64, token)]
    assert answers == [401, 403, 200]


def test_only_the_owner_can_read_the_token_and_it_is_never_printed(up: Up) -> None:
    """Its path is printed instead."""
    path = up.home / ".ray" / "auth_token"
    assert path.stat().st_mode & 0o777 == 0o600
    written = [up.output, *(f.read_text() for f in (up.storage / "local").glob("*.*"))]
    assert str(path) in up.output
    assert not [text for text in written if path.read_text() in text]


def test_a_dead_mlflow_is_reported_by_status_and_repaired_by_up(up: Up) -> None:
    """Ray goes on running meanwhile."""
    before = up.pids()
    os.kill(before["mlflow"], signal.SIGKILL)
    assert up.local("status").returncode == 1
    assert up.local("up").returncode == 0
    assert up.local("status").returncode == 0
    after = up.pids()
    assert after["ray"] == before["ray"]
    assert after["mlflow"] != before["mlflow"]


def test_a_submitted_job_finds_python_mlflow_and_the_storage(up: Up, tmp_path: Path) -> None:
    """The entrypoint and a task see the same, and what the entrypoint logs arrives."""
    done = up.submit(tmp_path / "work", JOB)
    lines = [line for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    assert (done.returncode, len(lines)) == (0, 1), done.stdout + done.stderr
    seen = json.loads(lines[0].removeprefix("SEEN "))
    expected = [sys.executable, f"http://127.0.0.1:{up.mlflow}", str(up.storage)]
    assert seen["entrypoint"] == seen["task"] == expected
    artifacts = up.home / "mlartifacts"
    assert (artifacts / "0" / seen["run"] / "artifacts" / "hello.txt").read_text() == "hello"


def test_a_submitted_pre_training_registers_a_backbone_with_the_submitted_code(
    up: Up, tmp_path: Path
) -> None:
    """The job runs from the folder that was submitted, and its log shows the progress."""
    work = tmp_path / "work"
    for folder in ("upreid_ray", "jobs"):
        shutil.copytree(
            ROOT / folder, work / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    code = work / "upreid_ray" / "train" / "job.py"
    code.write_text(code.read_text().replace("if it ends early", "submitted code"))
    settings = {
        "data.synthetic.num_train_identities": 8,
        "data.synthetic.num_test_identities": 4,
        "data.synthetic.num_unlabeled_identities": 0,
        "training.batch_size": 16,
        "training.group_size": 8,
        "training.epochs": 1,
        "training.log_every_steps": 1,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    target = [f"--address=http://127.0.0.1:{up.dashboard}", f"--working-dir={work}"]
    job = ["python", "jobs/pretrain.py", "demo", *words]
    done = run("/usr/bin/env", "ray", "job", "submit", *target, "--", *job, env=up.env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "submitted code" in done.stdout
    assert "images/s" in done.stdout
    result = json.loads(next(line for line in done.stdout.splitlines() if '"run_id"' in line))
    assert result["model_uri"] == "models:/upreid-resnet18/1"
    assert result["result_dir"].startswith(f"{up.storage}/")
    models = up.home / "mlartifacts" / "1" / "models"
    [weights] = models.glob("*/artifacts/backbone.safetensors")
    assert weights.stat().st_size > 0


def test_a_model_is_found_with_and_without_the_server(up: Up) -> None:
    """One machine, one folder, one registry: the job before has registered it."""
    find = "from upreid_ray import load_backbone; load_backbone('models:/upreid-resnet18/1')"
    uris = (f"http://127.0.0.1:{up.mlflow}", up.database)
    done = [run(sys.executable, "-c", find, env={"MLFLOW_TRACKING_URI": uri}) for uri in uris]
    assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr


def test_all_sockets_are_on_loopback_and_down_ends_all_and_nothing_else(
    up: Up, tmp_path: Path
) -> None:
    """Seen while a job runs that has started a process in a session of its own."""
    mark = tmp_path / "child"
    script = (
        "import pathlib, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        f"pathlib.Path({str(mark)!r}).write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    assert up.submit(tmp_path / "work", script, "--no-wait").returncode == 0
    deadline = time.monotonic() + 60
    while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
        time.sleep(0.2)
    pids = up.pids()
    ours = tree(pids["ray"]) | tree(pids["mlflow"])
    assert int(mark.read_text()) in ours
    sockets = listening(ours)
    assert {up.dashboard, up.mlflow} <= {port for _, port in sockets}
    assert {address for address, _ in sockets} <= LOOPBACK, sockets

    bystander = subprocess.Popen(["/usr/bin/env", "sleep", "600"])
    try:
        done = up.local("down")
        assert done.returncode == 0, done.stderr
        assert not [pid for pid in ours if tree(pid)]
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    assert "Nothing was up" in up.local("down").stdout
    assert up.local("status").returncode == 1
