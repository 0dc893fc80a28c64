"""A cluster of several nodes: a head without CPUs, a node for data, and nodes that train.

The nodes are raylets on loopback with resources of their own, as pods of Kubernetes are.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.cluster.processes import ending, free_ports, run, tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.ray, pytest.mark.timeout(420)]

BIN = Path(sys.executable).parent
# A training worker takes a whole training node, and only the data node has CPUs left to decode.
CPUS = {"data": 2, "train": 3}
SETTINGS = {
    "data.synthetic.num_train_identities": 8,
    "data.synthetic.num_test_identities": 4,
    "data.synthetic.num_unlabeled_identities": 0,
    "training.batch_size": 16,
    "training.group_size": 8,
    "training.epochs": 100,
    "training.log_every_steps": 2,
    # Nothing but the end of a node makes a checkpoint before the last step.
    "evaluation.every_epochs": 1000,
    "checkpoint.every_steps": 100000,
    "scaling.num_workers": 2,
    "scaling.cpus_per_worker": 3,
    "run.name": "pretrain",
}


@dataclass
class Nodes:
    """The nodes of one cluster, started and ended one by one."""

    folder: Path
    stack: ExitStack
    gcs: int
    dashboard: int
    token: str = "0123456789abcdef" * 4
    started: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, int] = field(default_factory=dict)

    def environment(self, token: str | None) -> dict[str, str]:
        """Return the environment of a node or a user, with a token or without."""
        usual = {name: os.environ[name] for name in ("LANG", "TMPDIR") if name in os.environ}
        return usual | {
            **({"RAY_AUTH_TOKEN": token} if token else {}),
            "RAY_AUTH_MODE": "token",
            "HOME": str(self.folder),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder}/mlflow.db",
            "UPREID_RAY_STORAGE": str(self.folder / "runs"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_metrics_report_interval_ms": "1000",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def start(self, name: str, *words: str) -> None:
        """Start a node."""
        (self.metrics[name],) = free_ports(1)
        command = [
            *(str(BIN / "ray"), "start", "--block", "--node-ip-address=127.0.0.1"),
            *("--dashboard-agent-listen-port=0", f"--metrics-export-port={self.metrics[name]}"),
            *("--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=200000000"),
            *words,
        ]
        log = self.folder / f"{name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                env=self.environment(self.token),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.stack.enter_context(ending(process))
        self.started[name] = process.pid

    def wait_for(self, *names: str) -> None:
        """Wait until nodes say that they run."""
        for name in names:
            log = self.folder / f"{name}.log"
            wait(
                f"{name} to start",
                lambda log=log: "Ray runtime started" in log.read_text(),
                120,
            )

    def join(self, name: str) -> None:
        """Start a node of the cluster: `data`, or `train` with a number."""
        kind = name.partition("-")[0]
        cpus, resources = f"--num-cpus={CPUS[kind]}", f'--resources={{"{name}": 1}}'
        self.start(name, f"--address=127.0.0.1:{self.gcs}", cpus, resources)

    def lose(self, name: str) -> None:
        """Kill a node as a machine that loses its power."""
        for pid in tree(self.started[name]):
            os.kill(pid, signal.SIGKILL)

    def ray(self, *words: str, token: str | None) -> subprocess.CompletedProcess[str]:
        """Run Ray's command as a user from outside."""
        return run("/usr/bin/env", "-i", *variables(self.environment(token)), "ray", *words)

    def job(self, verb: str, *words: str) -> str:
        """Ask for a job with the token and return what is printed."""
        done = self.ray("job", verb, *self.address, *words, token=self.token)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    @property
    def address(self) -> list[str]:
        """Where jobs are submitted."""
        return [f"--address=http://127.0.0.1:{self.dashboard}"]

    def node_id(self, name: str) -> str:
        """Return Ray's id of a node."""
        words = ["list", "nodes", "--format=json", *self.address]
        found = json.loads(self.ray(*words, token=self.token).stdout)
        (node,) = [node for node in found if name in node["resources_total"]]
        return str(node["node_id"])

    def scrape(self) -> str:
        """Return what Prometheus would read from the training nodes."""
        ports = [port for name, port in self.metrics.items() if name.startswith("train")]
        text = ""
        for port in ports:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
                text += page.read().decode()
        return text


def variables(environment: dict[str, str]) -> list[str]:
    """Return an environment as words of `env`."""
    return [f"{name}={value}" for name, value in environment.items()]


def wait(what: str, happened: Callable[[], bool], seconds: float) -> None:
    """Wait for something to happen."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Start a head, a data node and two training nodes."""
    gcs, dashboard = free_ports(2)
    with ExitStack() as stack:
        nodes = Nodes(tmp_path_factory.mktemp("nodes"), stack, gcs, dashboard)
        words = ["--head", "--num-cpus=0", f"--port={gcs}", f"--dashboard-port={dashboard}"]
        client, *_ = free_ports(1)
        nodes.start("head", *words, f"--ray-client-server-port={client}")
        nodes.wait_for("head")
        for name in ("data", "train-1", "train-2"):
            nodes.join(name)
        nodes.wait_for("data", "train-1", "train-2")
        yield nodes


def test_training_survives_the_loss_of_an_announced_node(nodes: Nodes) -> None:
    """Refused without the token; else a checkpoint before the loss, and on from there."""
    words = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
    target = [*nodes.address, "--working-dir=.", "--submission-id=pretrain", "--no-wait"]
    submission = ["job", "submit", *target, "--", "python", "jobs/pretrain.py", "demo", *words]
    refused = nodes.ray(*submission, token=None)
    assert refused.returncode != 0
    assert "Ray couldn't find an authentication token" in refused.stdout + refused.stderr
    wrong = nodes.ray(*submission, token="0" * 64)
    assert wrong.returncode != 0
    assert "Authentication failed" in wrong.stdout + wrong.stderr

    assert nodes.ray(*submission, token=nodes.token).returncode == 0
    speed = re.compile(r'^ray_upreid_train_images_per_second\{.*run="pretrain".*\} ', re.M)
    wait("training to log", lambda: bool(speed.search(nodes.scrape())), 150)
    assert "ray::RayTrainWorker" in titles(nodes.started["train-2"])

    notice = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=it ends"]
    notice += [f"--node-id={nodes.node_id('train-2')}", "--deadline-remaining-seconds=60"]
    gcs = f"--address=127.0.0.1:{nodes.gcs}"
    drained = nodes.ray("drain-node", gcs, *notice, token=nodes.token)
    assert drained.returncode == 0, drained.stdout + drained.stderr
    run_folder = nodes.folder / "runs" / "pretrain"
    snapshot = run_folder / "checkpoint_manager_snapshot.json"
    wait("a checkpoint", lambda: snapshot.exists() and "step-" in snapshot.read_text(), 60)
    nodes.lose("train-2")
    saved = min(int(step) for step in re.findall(r"step-(\d+)", snapshot.read_text()))
    nodes.join("train-3")
    wait("the end", lambda: "SUCCEEDED" in nodes.job("status", "pretrain"), 200)
    log = nodes.job("logs", "pretrain")
    steps = [int(step) for step in re.findall(r"step (\d+)/\d+  loss", log)]
    kept = [step for step in steps if step <= saved]
    assert len(kept) == len(set(kept)), f"checkpoint of step {saved} was not used: {steps}"
    assert steps[-1] > saved
    result = json.loads(re.findall(r'^\{.*"run_id".*\}$', log, re.M)[-1])
    assert result["model_uri"] == "models:/upreid-resnet18/1"
    assert result["result_dir"] == str(run_folder)


def titles(pid: int) -> str:
    """Return the titles of a node's processes."""
    found = ""
    for each in tree(pid):
        found += Path(f"/proc/{each}/cmdline").read_text(errors="replace")
    return found
