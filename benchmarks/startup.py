"""A map of a start: which processes start when, what they cost, and what they wait for.

Starts a job in a folder whose shards are drawn already, ends it at its first useful work, and
samples all of its processes meanwhile. A table shows for each process when it began and when it
became what it is (an idle process of Ray becomes an actor), when it had imported torch, when it
died, and its CPU time; a picture shows when each of them was busy. The first start of a case
draws the people and reads the libraries from the disk; it is not counted.

    python -m benchmarks.startup --case pretrain --repeats 5 --out maps
    python -m benchmarks.startup --repeats 5 --beside ../older-checkout
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.step import provenance

ROOT = Path(__file__).parents[1]
INTERVAL_SECONDS = 0.2
LIMIT_SECONDS = 400.0
FEW = (
    "--data.synthetic.num_train_identities=60",
    "--data.synthetic.num_unlabeled_identities=60",
    "--model.queue_size=256",
)


@dataclass(frozen=True)
class Case:
    """A job, and the files that tell how far it is.

    Attributes:
        words: Words of the command line.
        marks: What is done once a file in ``runs/`` (whose name stands for ``NAME``) contains
            a text, in order. The last one ends the start. Without marks the job's end does.
        starts_at: The mark at which the clock starts; None for the command.
    """

    words: tuple[str, ...]
    marks: dict[str, tuple[str, str]] = field(default_factory=dict)
    starts_at: str | None = None


EACH_STEP = ("--training.log_every_steps=1", "--run.name=NAME")
TRAINING = {
    "run begun": ("NAME/run.json", ""),
    "untrained scored": ("NAME/metrics.jsonl", "eval/mAP"),
    "first step": ("NAME/metrics.jsonl", "train/loss"),
}
CASES = {
    "pretrain": Case(("pretrain", "demo", *EACH_STEP), TRAINING),
    "trial": Case(
        (
            *("sweep", "i2", "demo", "--num_trials=2", "--trial_epochs=1"),
            *("--scheduler=none", *FEW, *EACH_STEP),
        ),
        {
            "first trial ended": ("NAME/NAME-000/result.json", ""),
            "untrained scored": ("NAME/NAME-001/metrics.jsonl", "eval/mAP"),
            "first step": ("NAME/NAME-001/metrics.jsonl", "train/loss"),
        },
        starts_at="first trial ended",
    ),
    "finetune": Case(("finetune", "demo", "--init=random", *EACH_STEP), TRAINING),
    "evaluate": Case(
        (
            *("evaluate", "--init=random", "--backbone=resnet18", "--run.name=NAME"),
            *("--data.height=64", "--data.width=32", "--scaling.use_gpu=false"),
        ),
        {"run begun": ("NAME/run.json", ""), "scored": ("NAME/scores.json", "")},
    ),
    "help": Case(("pretrain", "--help")),
}


@dataclass
class Life:
    """What was seen of a process; times are seconds from the command.

    Attributes:
        began: When it was first seen.
        samples: Pairs of a time and the CPU seconds until then.
        kinds: What it was from when on: a program, or the class of an actor.
        torch_at: When it was first seen to have loaded torch; None if it never did.
    """

    began: float
    samples: list[tuple[float, float]] = field(default_factory=list)
    kinds: list[tuple[float, str]] = field(default_factory=list)
    torch_at: float | None = None

    def add(self, now: float, process: psutil.Process) -> None:
        """Add a sample."""
        words = process.cmdline()
        if not words:  # it begins or ends
            return
        kind = kind_of(words)
        times = process.cpu_times()
        self.samples.append((now, times.user + times.system))
        if not self.kinds or self.kinds[-1][1] != kind:
            self.kinds.append((now, kind))
        if self.torch_at is None:
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            self.torch_at = now if "libtorch_python" in maps else None

    def cpu_seconds(self, since: float = 0.0) -> float:
        """Return the CPU seconds from a time on."""
        before = [cpu for now, cpu in self.samples if now <= since]
        return self.samples[-1][1] - (before[-1] if before else 0.0)


@dataclass(frozen=True)
class Start:
    """One start: seconds of its marks from the command, its beginning, and its processes."""

    marks: dict[str, float]
    began: float
    lives: dict[int, Life]

    @property
    def seconds(self) -> float:
        """Seconds from the beginning to the last mark."""
        return max(self.marks.values()) - self.began

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of all processes in that time."""
        return sum(life.cpu_seconds(self.began) for life in self.lives.values())


def kind_of(words: list[str]) -> str:
    """Return what a process of the job is: the class of its actor, or its program."""
    first, *others = words
    if first.startswith("ray::"):
        return re.split(r"[.( ]", first)[0]
    if first.startswith("ray-dashboard"):
        return re.split(r" ", first)[0]
    scripts = [word for word in (first, *others) if word.endswith(".py")]
    return Path((scripts or [first])[0]).name


@contextmanager
def running(
    code: Path, folder: Path, case: Case, name: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run the job of a case inside the block, and kill all of its processes at its end."""
    job, *words = (word.replace("NAME", name) for word in case.words)
    environment = {
        **os.environ,
        "PYTHONPATH": str(code),
        "RAY_ADDRESS": "local",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
    }
    command = [sys.executable, str(code / f"jobs/{job}.py"), *words]
    with (
        (folder / f"{name}.log").open("wb") as log,
        subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=log
        ) as process,
    ):
        driver = psutil.Process(process.pid)
        try:
            yield process
        finally:
            with suppress(psutil.NoSuchProcess):
                for each in [*driver.children(recursive=True), driver]:
                    with suppress(psutil.NoSuchProcess):
                        each.kill()


def start(code: Path, folder: Path, case: Case, name: str) -> Start:
    """Start once, up to the last mark.

    Raises:
        RuntimeError: The job ended or took too long before that; its log is shown.
    """
    lives: dict[int, Life] = {}
    found: dict[str, float] = {}
    begins = time.perf_counter()
    with running(code, folder, case, name) as process:
        driver = psutil.Process(process.pid)
        while True:
            now = time.perf_counter() - begins
            with suppress(psutil.NoSuchProcess):
                for each in [driver, *driver.children(recursive=True)]:
                    with suppress(psutil.NoSuchProcess, OSError):
                        lives.setdefault(each.pid, Life(now)).add(now, each)
            for mark, (file, text) in case.marks.items():
                path = folder / "runs" / file.replace("NAME", name)
                if mark not in found and path.exists() and text in path.read_text():
                    found[mark] = now
            has_ended = process.poll() is not None
            if has_ended and not case.marks:
                found["end"] = now
            if found and len(found) == max(1, len(case.marks)):
                break
            if has_ended or now > LIMIT_SECONDS:
                raise RuntimeError((folder / f"{name}.log").read_text())
            time.sleep(max(0.0, INTERVAL_SECONDS - (time.perf_counter() - begins - now)))
    lives = {pid: life for pid, life in lives.items() if life.samples}
    return Start(found, found[case.starts_at] if case.starts_at else 0.0, lives)


def process_table(this: Start) -> Table:
    """Return a table of the processes of a start, in the order of their beginnings."""
    columns = ("process", "seen s", "became it s", "torch s", "died s", "CPU s")
    table = Table(*columns, title=f"processes; seconds from {this.began:.1f} s on")
    end = max(this.marks.values())

    def shown(seconds: float | None) -> str:
        return "" if seconds is None else f"{seconds - this.began:.1f}"

    for life in sorted(this.lives.values(), key=lambda each: each.began):
        died = life.samples[-1][0]
        cpu = life.cpu_seconds(this.began)
        if died <= this.began:
            continue
        table.add_row(
            life.kinds[-1][1],
            shown(life.began),
            shown(life.kinds[-1][0]) if len(life.kinds) > 1 else "",
            shown(life.torch_at),
            shown(died) if died < end - 2 * INTERVAL_SECONDS else "",
            f"{cpu:.1f}",
        )
    table.add_row("all", "", "", "", "", f"{this.cpu_seconds:.1f}")
    return table


def draw(this: Start, file: Path) -> None:
    """Draw when each process was busy: a row a process, dark where it used a whole core."""
    lives = sorted(this.lives.values(), key=lambda each: each.began)
    lives = [life for life in lives if life.samples[-1][0] > this.began]
    figure = Figure(figsize=(10, 1 + 0.22 * len(lives)), layout="constrained")
    axes = figure.subplots()
    for row, life in enumerate(lives):
        for (before, cpu), (now, more) in zip(life.samples, life.samples[1:], strict=False):
            share = min(1.0, (more - cpu) / (now - before))
            axes.barh(row, now - before, left=before, color=str(0.9 * (1 - share)), height=0.8)
    for mark, seconds in this.marks.items():
        axes.axvline(seconds, color="tab:red", linewidth=1)
        axes.text(seconds, -0.8, mark, color="tab:red", ha="right", fontsize=8)
    axes.set_yticks(range(len(lives)), [life.kinds[-1][1] for life in lives], fontsize=8)
    axes.set_ylim(len(lives) - 0.5, -1.5)
    axes.set_xlim(this.began, max(this.marks.values()) + 0.5)
    axes.set_xlabel("seconds from the command; a process is black while it uses a whole core")
    figure.savefig(file)


def spread(values: list[float]) -> str:
    """Return the median of some values, with the least and the most."""
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def main() -> None:
    """Start several times, and show where the time went."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, action="append", help="default: all of them")
    parser.add_argument("--repeats", type=int, default=5, help="starts after the first one")
    parser.add_argument("--beside", type=Path, help="another checkout, to alternate with")
    parser.add_argument("--out", type=Path, help="folder for the pictures")
    options = parser.parse_args()
    console = Console(width=100)
    codes = [code.resolve() for code in (options.beside, ROOT) if code is not None]
    for chosen in options.case or CASES:
        case = CASES[chosen]
        starts: dict[Path, list[Start]] = {code: [] for code in codes}
        with tempfile.TemporaryDirectory(prefix="upreid-bench-") as root:
            for number in range(options.repeats + 1):
                for code in codes:
                    folder = Path(root, str(codes.index(code)))
                    folder.mkdir(exist_ok=True)
                    starts[code].append(start(code, folder, case, f"s{number}"))
        columns = ("code", *case.marks, "seconds", "CPU seconds")
        table = Table(*columns, title=f"{chosen}: median (least-most) of {options.repeats}")
        for code in codes:
            later = starts[code][1:]
            marks = [
                spread([each.marks[mark] - each.began for each in later]) for mark in case.marks
            ]
            seconds = spread([each.seconds for each in later])
            table.add_row(
                code.name, *marks, seconds, spread([each.cpu_seconds for each in later])
            )
        console.print(table)
        for code in codes:
            last = starts[code][-1]
            number = Counter(life.kinds[-1][1] for life in last.lives.values())
            console.print(f"{code.name}: {number.total()} processes in its last start")
            console.print(process_table(last))
            if options.out is not None:
                options.out.mkdir(parents=True, exist_ok=True)
                draw(last, options.out / f"startup-{chosen}-{code.name}.svg")
    console.print(provenance(torch.device("cpu")))


if __name__ == "__main__":
    main()
