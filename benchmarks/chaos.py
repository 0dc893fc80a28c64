"""Kill whatever runs, again and again: does a run end with the weights of an undisturbed one?

A job trains on a Ray cluster of several nodes. At random moments, drawn with a seed, one of its
processes is killed: a worker that trains, a task that decodes, the executor of the stream, Ray
Train's controller, the driver, a node with all that runs on it, or the whole cluster. Lost
nodes are replaced; a job that ended is submitted again with --resume. At the end every tensor
of the last checkpoints is compared with those of the same job left alone.

    python -m benchmarks.chaos
    python -m benchmarks.chaos --backbone vit_tiny_patch16 --kills 5
    python -m benchmarks.chaos --job finetune --kills 5 --epochs 60
    python -m benchmarks.chaos --job sweep --kills 5 --epochs 6
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from tests.cluster.nodes import Nodes
from upreid_ray.config.presets import PRESETS
from upreid_ray.core.checkpoint import BEST_FILE, MODEL_FILE, OPTIMIZER_FILE
from upreid_ray.tracking.runs import environment

ROOT = Path(__file__).parents[1]
NUM_NODES = 2
NODE = ("--num-cpus=2",)
MAX_CALM_SECONDS = 6.0
SECONDS = 600.0  # without progress, after which the campaign has failed
RESUMES = 20  # in a row without progress
TITLES = {
    "worker": "ray::RayTrainWorker",
    "decoding task": "ray::ReadRange",
    "executor of the stream": "ray::SplitCoordinator",
    "controller": "ray::TrainController",
    "trial": "ray::ImplicitFunc",
}
DRIVER, A_NODE, CLUSTER = "driver", "node", "whole cluster"

PEOPLE = {
    "data.synthetic.num_train_identities": 8,
    "data.synthetic.num_test_identities": 4,
    "data.synthetic.num_unlabeled_identities": 20,
    "data.synthetic.num_cameras": 2,
    "data.synthetic.height": 64,
    "data.synthetic.width": 32,
}
SMALL = {
    **PEOPLE,
    "training.precision": "fp32",
    "training.log_every_steps": 1,
    "checkpoint.every_steps": 5,
    "scaling.num_workers": 2,
    "scaling.cpus_per_worker": 0.5,
    "scaling.threads_per_worker": 1,
    "scaling.use_gpu": False,
    "run.max_failures": 1000,
}
PRETRAINING = PRESETS["demo"].override(
    {
        **SMALL,
        "model.queue_size": 32,
        "optimizer.warmup_epochs": 0,
        "training.batch_size": 8,
        "training.group_size": 4,
        "evaluation.every_epochs": 10,
    }
)
FINETUNING = {
    **SMALL,
    "training.num_persons": 8,
    "training.num_groups": 2,
    "evaluation.every_epochs": 10,
}


class Job:
    """A job that is started again as often as it has to be.

    Args:
        kind: Of `COMMANDS`.
        epochs: Of a run; of each trial.
        backbone: Name of the backbone.
        folder: Of everything.
    """

    def __init__(self, kind: str, epochs: int, backbone: str, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self._kind = kind
        changes: dict[str, Any] = {"training.epochs": epochs}
        changes["backbone" if kind == "finetune" else "model.backbone"] = backbone
        if kind == "finetune":  # whose settings no file can give
            changes |= FINETUNING
        if kind == "sweep":
            changes |= {"evaluation.every_epochs": max(1, epochs // 2)}
        self._flags = [f"--{name}={value}" for name, value in changes.items()]
        self._file = folder / "config.json"
        self._file.write_text(PRETRAINING.model_dump_json())
        self._environment: dict[str, str] = {}
        self.num_starts = 0
        self.process: subprocess.Popen[str] | None = None

    def start(self, nodes: Nodes) -> None:
        """Begin, or go on."""
        words = {
            "pretrain": ["jobs/pretrain.py", "--config", str(self._file), *self._flags],
            "finetune": ["jobs/finetune.py", "demo", "--init", "random", *self._flags],
            "sweep": [
                *("jobs/sweep.py", "own", "--config", str(self._file), *self._flags),
                *("--scheduler", "none", "--max_concurrent", "1"),
                *("--space.loss.intrinsic_weight", "grid(0,0.1)"),
            ],
        }[self._kind]
        begun = (self.folder / "runs/chaos/run.json").exists()
        if begun and self._kind == "sweep":
            words = ["jobs/sweep.py", "--resume", "chaos"]
        elif begun:
            words += ["--resume", "chaos"]
        else:
            words += ["--run.name", "chaos"]
        with (self.folder / f"job-{self.num_starts:03d}.log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, ROOT / words[0], *words[1:]],
                cwd=self.folder,
                env={
                    **nodes.environment,
                    "RAY_ADDRESS": nodes.address,
                    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
                    "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder}/mlflow.db",
                    "UPREID_RAY_STORAGE": str(self.folder / "runs"),
                },
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        self.num_starts += 1

    def has_ended(self) -> bool:
        """Tell whether its process is gone."""
        return self.process is None or self.process.poll() is not None

    def is_done(self) -> bool:
        """Tell whether it has come to its end."""
        return self.process is not None and self.process.poll() == 0

    def kill(self) -> None:
        """Kill its process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def steps(self) -> int:
        """Count the steps that its runs have logged, those that were taken again once."""
        return sum(
            max((json.loads(line).get("step", 0) for line in _whole_lines(file)), default=0)
            for file in (self.folder / "runs").glob("**/metrics.jsonl")
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors of the last checkpoint of each run."""
        found: dict[str, torch.Tensor] = {}
        for run in sorted((self.folder / "runs").glob("**/metrics.jsonl")):
            newest = max(run.parent.glob("step-*"))
            for file in (MODEL_FILE, BEST_FILE):
                for name, tensor in load_file(newest / file).items():
                    found[f"{run.parent.name}/{file}/{name}"] = tensor
            optimizer = torch.load(newest / OPTIMIZER_FILE, weights_only=True)
            for number, state in optimizer["state"].items():
                for name, value in state.items():
                    key = f"{run.parent.name}/{OPTIMIZER_FILE}/{number}/{name}"
                    found[key] = torch.as_tensor(value)
        return found


def _whole_lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


class Campaign:
    """Kills, one after the other, and what each of them cost."""

    def __init__(self, job: Job, seed: int, console: Console) -> None:
        self._job = job
        self._random = random.Random(seed)
        self._console = console
        self.lost: dict[str, list[float]] = defaultdict(list)

    def run(self, num_kills: int) -> None:
        """Kill until it was often enough, and let the job come to its end.

        Raises:
            RuntimeError: The job makes no progress any more.
        """
        self._open()
        try:
            self._job.start(self._cluster)
            while not self._job.is_done():
                if sum(map(len, self.lost.values())) < num_kills:
                    self._strike()
                else:
                    self._keep_alive_until(self._job.is_done)
        finally:
            self._job.kill()
            self._close()

    def _open(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
        self._cluster = Nodes(self._root).__enter__()
        self._nodes = [self._cluster.add(*NODE) for _ in range(NUM_NODES)]

    def _close(self) -> None:
        self._cluster.__exit__()
        shutil.rmtree(self._root, ignore_errors=True)

    def _strike(self) -> None:
        """Wait for a while, kill something, and wait until what was lost is made good."""
        calm = time.monotonic() + self._random.uniform(0, MAX_CALM_SECONDS)
        self._keep_alive_until(lambda: time.monotonic() > calm or self._job.is_done())
        if self._job.is_done():
            return
        processes = self._processes()
        victim = self._random.choice(sorted(processes) + [DRIVER, A_NODE] * 2 + [CLUSTER])
        before, began = self._job.steps(), time.monotonic()
        if victim == DRIVER:
            self._job.kill()
        elif victim == A_NODE:
            number = self._random.randrange(NUM_NODES)
            self._cluster.lose(self._nodes[number])
            self._nodes[number] = self._cluster.add(*NODE)
        elif victim == CLUSTER:
            self._job.kill()
            self._close()
            self._open()
        else:
            self._random.choice(processes[victim]).kill()
        self._keep_alive_until(lambda: self._job.steps() > before or self._job.is_done())
        self.lost[victim].append(time.monotonic() - began)
        self._console.print(
            f"{sum(map(len, self.lost.values())):3d}  {victim} at step {before}: "
            f"{self.lost[victim][-1]:.0f} s"
        )

    def _processes(self) -> dict[str, list[psutil.Process]]:
        """Return the processes of the job on all nodes, by what they do."""
        found = defaultdict(list)
        for node in self._nodes:
            for process in psutil.Process(node.pid).children(recursive=True):
                try:
                    title = " ".join(process.cmdline())
                except psutil.Error:  # it has just ended
                    continue
                for kind, beginning in TITLES.items():
                    if title.startswith(beginning):
                        found[kind].append(process)
        return found

    def _keep_alive_until(self, condition: Callable[[], bool]) -> None:
        """Wait for something; a job that ends meanwhile is started again."""
        steps, since, starts = self._job.steps(), time.monotonic(), 0
        while not condition():
            if self._job.has_ended() and not self._job.is_done():
                self._job.start(self._cluster)
                starts += 1
            now = self._job.steps()
            if now > steps:
                steps, since, starts = now, time.monotonic(), 0
            if time.monotonic() - since > SECONDS or starts > RESUMES:
                raise RuntimeError(f"no progress after step {steps}; see {self._job.folder}")
            time.sleep(0.1)


def differences(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of the tensors that are not in both, or not equal bit for bit."""
    return sorted(
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
    )


def main() -> int:
    """Run a job undisturbed and disturbed, print a table, and compare the tensors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", default="pretrain", choices=("pretrain", "finetune", "sweep"))
    parser.add_argument("--backbone", default="resnet18", help="as of --model.backbone")
    parser.add_argument("--kills", type=int, default=50, help="of the campaign")
    parser.add_argument("--epochs", type=int, default=25, help="of a run; of each trial")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--out", type=Path, help="folder for logs and runs, a new one")
    arguments = parser.parse_args()
    console = Console(width=110)
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="upreid-chaos-"))
    folder.mkdir(exist_ok=True)
    kind = (arguments.job, arguments.epochs, arguments.backbone)
    calm = Job(*kind, folder.resolve() / "undisturbed")
    began = time.monotonic()
    Campaign(calm, 0, console).run(0)
    undisturbed = time.monotonic() - began
    console.print(f"undisturbed: {calm.steps()} steps in {undisturbed:.0f} s")
    job = Job(*kind, folder.resolve() / "disturbed")
    campaign = Campaign(job, arguments.seed, console)
    began = time.monotonic()
    campaign.run(arguments.kills)
    disturbed = time.monotonic() - began
    table = Table("killed", "times", "seconds until a new step: median (least-most)")
    for kind, lost in sorted(campaign.lost.items()):
        spread = f"{statistics.median(lost):.0f} ({min(lost):.0f}-{max(lost):.0f})"
        table.add_row(kind, str(len(lost)), spread)
    console.print(table)
    expected, tensors = calm.tensors(), job.tensors()
    wrong = differences(expected, tensors)
    num_kills = sum(map(len, campaign.lost.values()))
    console.print(
        f"{arguments.job}, {arguments.backbone}: {num_kills} kills, {job.num_starts} starts of "
        f"the job; {len(wrong)} of {len(expected)} tensors differ; {calm.steps()} steps, "
        f"{undisturbed:.0f} s undisturbed, {disturbed:.0f} s disturbed"
    )
    for name in wrong[:5]:
        console.print(f"differs: {name}")
    if num_kills < arguments.kills:
        console.print(f"--kills {arguments.kills}: the job was done before; raise --epochs")
    tags = environment()
    console.print(
        f"{datetime.now(UTC):%Y-%m-%d}, commit {tags['mlflow.source.git.commit'][:10]}, "
        f"{os.cpu_count()} cores, torch {tags['version.torch']}, ray {tags['version.ray']}, "
        f"seed {arguments.seed}"
    )
    return 1 if wrong or num_kills < arguments.kills or not expected else 0


if __name__ == "__main__":
    sys.exit(main())
