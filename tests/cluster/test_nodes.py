"""Jobs submitted from outside to a cluster of several nodes, one of which is lost."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.cluster.network import Network
from tests.cluster.nodes import Nodes
from tests.cluster.processes import ROOT, tree
from tests.cluster.submission import STEP, Submission
from tests.ray_workers import worker_of
from tests.train.test_pretrain import TINY, newest_checkpoint
from upreid_ray.tune.trial_record import TrialRecord

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

# Each worker fills a node for training, so that tasks that decode run on the other one.
TRAIN_NODE, DATA_NODE = "--num-cpus=2", "--num-cpus=1"
CONFIG = TINY.override(
    {
        # Of twice as many images, or a node would come after the run's end.
        "data.synthetic.num_train_identities": 8,
        "data.synthetic.num_unlabeled_identities": 20,
        "training.batch_size": 16,
        "training.group_size": 8,
        "training.log_every_steps": 1,
        "evaluation.every_epochs": 1,
        "scaling.cpus_per_worker": 2,
        "scaling.threads_per_worker": 1,
        "run.name": None,
    }
)
# So many that a node can come while the run trains on without it.
NUM_EPOCHS = 12
STEPS_PER_EPOCH = 7


@dataclass
class Cluster:
    """Nodes with separate duties, and the folder of all that they leave."""

    nodes: Nodes
    folder: Path
    train_nodes: list[subprocess.Popen[bytes]]
    data_node: subprocess.Popen[bytes]
    python: str


def submit(cluster: Cluster, *words: str, **environment: str) -> Submission:
    """Submit a job from a folder of its own."""
    nodes, work = cluster.nodes, Path(tempfile.mkdtemp(dir=cluster.folder))
    for part in ("upreid_ray", "jobs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, work / part, ignore=ignore)
    (work / "config.json").write_text(CONFIG.model_dump_json())
    address = (f"--address={nodes.dashboard}", f"--working-dir={work}")
    job = ("--", "python", *words, "--config=config.json")
    return Submission(
        [*nodes.outside.prefix, "ray", "job", "submit", *address, *job],
        cluster.folder / f"{work.name}.log",
        {**nodes.environment, **environment},
    )


def processes(cluster: Cluster, node: subprocess.Popen[bytes], title: str) -> set[int]:
    """Return the processes of a node whose title begins like this."""
    found = set()
    for program in tree(node.pid):
        pid = worker_of(cluster.python, program) or program
        with suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title.encode()):
                found.add(pid)
    return found


@pytest.fixture(scope="module")
def cluster(python: str) -> Iterator[Cluster]:
    # Sockets need a short path, which pytest's folders do not have.
    folder = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp"))
    settings = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "UPREID_RAY_STORAGE": str(folder / "runs"),
        # How soon Ray sees that a worker has ended, that a node will end or has ended,
        # and that a worker finds no place.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
        "RAY_health_check_period_ms": "1000",
    }
    try:
        with ExitStack() as stack:
            network = stack.enter_context(Network()) if Network.is_allowed() else None
            nodes = stack.enter_context(Nodes(folder, settings, network, python))
            train_nodes = [nodes.add(TRAIN_NODE) for _ in range(2)]
            yield Cluster(nodes, folder, train_nodes, nodes.add(DATA_NODE), python)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def resized(cluster: Cluster) -> SimpleNamespace:
    """Submit an elastic run, take a node away that had said so, and bring another one."""
    words = ("jobs/pretrain.py", "--run.name=resized", f"--training.epochs={NUM_EPOCHS}")
    elastic = ("--scaling.min_workers=1", "--scaling.resize_seconds=2")
    # So that the checkpoint can only be the one that the end of a node brings about.
    seldom = (f"--evaluation.every_epochs={NUM_EPOCHS}", "--checkpoint.every_steps=1000")
    job = submit(cluster, *words, *elastic, *seldom)
    run = cluster.folder / "runs/resized"

    def workers() -> list[int]:
        return [
            len(processes(cluster, node, "ray::RayTrainWorker")) for node in cluster.train_nodes
        ]

    job.wait_for(lambda: job.newest_step() > 2)
    numbers = [workers()]
    cluster.nodes.drain(cluster.train_nodes[-1], seconds=100)
    job.wait_for(lambda: newest_checkpoint(run) > 0)
    saved = [int(each.name.removeprefix("step-")) for each in run.glob("step-*")]
    before = job.newest_step()
    decoding = processes(cluster, cluster.data_node, "ray::")
    cluster.nodes.lose(cluster.train_nodes.pop())
    job.wait_for(lambda: job.newest_step() > before + 2)
    numbers.append(workers())
    cluster.train_nodes.append(cluster.nodes.add(TRAIN_NODE))
    job.wait_for(lambda: workers() == [1, 1])
    return SimpleNamespace(
        result=job.result(), log=job.log, numbers=numbers, decoding=decoding, saved=saved
    )


@pytest.mark.parametrize("token", [None, "0" * 64], ids=["none", "another"])
def test_a_job_without_the_token_is_refused(cluster, token):
    other = cluster.folder / "other"
    if token is not None:
        other.write_text(token)
    environment = (
        {"RAY_AUTH_TOKEN_PATH": str(other)} if token else {"RAY_AUTH_MODE": "disabled"}
    )
    job = submit(cluster, "jobs/pretrain.py", **environment)

    assert job.wait() != 0
    assert "auth" in job.log.lower()
    assert "submitted successfully" not in job.log


def test_each_node_has_the_work_that_is_meant_for_it(resized):
    assert resized.numbers[0] == [1, 1]
    assert resized.decoding


def test_each_node_is_a_host_of_its_own(cluster, resized):
    if cluster.nodes.outside.prefix == ():
        pytest.skip("this user may not make network namespaces")
    addresses = "len({node['NodeManagerAddress'] for node in ray.nodes() if node['Alive']})"
    assert cluster.nodes.ask(addresses) == "4"


def test_a_checkpoint_is_saved_when_the_end_of_a_node_is_announced(resized):
    assert len(resized.saved) == 1
    assert 2 < resized.saved[0] < NUM_EPOCHS * STEPS_PER_EPOCH


def test_an_elastic_run_goes_on_from_that_checkpoint_when_a_node_is_lost(resized):
    (saved,) = resized.saved
    before = [step for step, _ in re.findall(STEP, resized.log) if int(step) <= saved]

    assert resized.numbers[1] == [1]
    assert len(before) == len(set(before)), "a step before the checkpoint was taken again"


def test_an_elastic_run_takes_a_node_that_comes_and_trains_to_its_end(resized):
    steps, totals = zip(*re.findall(STEP, resized.log), strict=True)

    assert steps[-1] == totals[-1]
    assert len(steps) > len(set(steps)), "no step was taken again"
    assert resized.result["model_uri"] == "models:/upreid-resnet18/1"


@pytest.fixture(scope="module")
def swept(cluster: Cluster, resized: SimpleNamespace) -> SimpleNamespace:
    """Submit a sweep of three trials, one after the other, of which the first is the best."""
    words = ("jobs/sweep.py", "own", "--run.name=swept", "--max_concurrent=1")
    halving = ("--scheduler=asha", "--grace_epochs=1", "--reduction_factor=2")
    trials = ("--training.epochs=2", "--scaling.num_workers=1")
    axis = "--space.optimizer.lr=grid(1e-9,0.02,0.03)"
    job = submit(cluster, *words, *halving, *trials, axis)
    result = job.result()
    files = sorted((cluster.folder / "runs/swept").glob("*/trial.json"))
    records = [TrialRecord.model_validate_json(file.read_text()) for file in files]
    return SimpleNamespace(result=result, records=records)


def test_a_submitted_sweep_registers_its_best_backbone(swept):
    assert swept.result["best"] == {"optimizer.lr": 1e-9}
    assert swept.result["model_uri"] == "models:/upreid-resnet18/2"


def test_a_trial_that_is_behind_at_its_rung_is_stopped_there_and_the_next_begins(swept):
    first, second, third = (record.rungs[1] for record in swept.records)
    # What the processor rounds decides whether the third is better than the second; ASHA stops
    # what is below the median of the trials before it.
    goes_on = third >= (first + second) / 2
    states = ["finished", "stopped", "finished" if goes_on else "stopped"]
    rungs = [[1, 2], [1], [1, 2] if goes_on else [1]]

    assert [record.state for record in swept.records] == states
    assert [list(record.rungs) for record in swept.records] == rungs
