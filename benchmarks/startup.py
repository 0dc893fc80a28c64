"""What passes from the command line to the first step: when, and in which process.

Starts `jobs/pretrain.py demo` on shards that are there, with a step logged each step, and ends
it after the first one. The time is split by what the job says meanwhile, and the CPU time by
process. The first run, which reads all libraries from the disk, is told apart.

    python -m benchmarks.startup --repeats 3
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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.step import provenance

ROOT = Path(__file__).parents[1]
# What the job has done when it says something: the pattern of a line, in order.
MARKS = {
    "imports, a local Ray, shards, MLflow's run": r"if it ends early, continue it",
    "workers, the untrained scores": r"step 0/\d+  retrieval",
    "the first batch and its step": r"step 1/\d+  loss",
}
# Of the first part, by themselves.
ALONE = {
    "imports for --help": "import upreid_ray.command_line",
    "all imports of the job": "import upreid_ray.train.pretrain",
    "a local Ray, with its import": "import ray; ray.init('local', logging_level='ERROR')",
}


@dataclass(frozen=True)
class Start:
    """One start.

    Attributes:
        seconds: Of each part.
        cpu_seconds: Of the processes that are alive at its end, by what they are.
        number: How many there are of each.
    """

    seconds: dict[str, float]
    cpu_seconds: Counter[str]
    number: Counter[str]


def name_of(process: psutil.Process) -> str:
    """Return what a process of the job is: the class of its actor, or its program."""
    first, *others = process.cmdline()
    if first.startswith("ray::"):
        return re.split(r"[.( ]", first)[0]
    if first.startswith("ray-dashboard"):
        return "ray-dashboard-..."
    scripts = [word for word in (first, *others) if word.endswith(".py")]
    return Path((scripts or [first])[0]).name


def start(folder: Path, name: str) -> Start:
    """Start once, up to the first step."""
    command = [
        *(sys.executable, str(ROOT / "jobs/pretrain.py"), "demo"),
        *("--run.name", name, "--training.log_every_steps", "1"),
    ]
    environment = {
        **os.environ,
        "RAY_ADDRESS": "local",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
    }
    seconds = {}
    cpu_seconds: Counter[str] = Counter()
    number: Counter[str] = Counter()
    began = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as job:
        assert job.stderr is not None
        marks = iter(MARKS.items())
        part, pattern = next(marks)
        for line in job.stderr:
            if re.search(pattern, line):
                seconds[part] = time.perf_counter() - began
                began += seconds[part]
                part, pattern = next(marks, ("", ""))
                if not part:
                    break
        # The whole of its Ray, and no other one.
        driver = psutil.Process(job.pid)
        for process in [*driver.children(recursive=True), driver]:
            with suppress(psutil.NoSuchProcess):
                times, kind = process.cpu_times(), name_of(process)
                process.kill()
                cpu_seconds[kind] += times.user + times.system
                number[kind] += 1
    return Start(seconds, cpu_seconds, number)


def alone(code: str) -> float:
    """Return the seconds of a Python process that does only this."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)
    return time.perf_counter() - began


def main() -> None:
    """Start several times, and print where the time went."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="starts after the first one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="upreid-bench-") as folder:
        # The first start draws the people too.
        starts = [
            start(Path(folder), f"start-{number}")
            for number in track(range(options.repeats + 1), console=Console(stderr=True))
        ]
    table = Table("until", "first start, s", "later, s: median (least-most)")
    for part in MARKS:
        later = [each.seconds[part] for each in starts[1:]]
        spread = f"{statistics.median(later):.1f} ({min(later):.1f}-{max(later):.1f})"
        table.add_row(part, f"{starts[0].seconds[part]:.1f}", spread)
    totals = [sum(each.seconds.values()) for each in starts]
    table.add_row("all", f"{totals[0]:.1f}", f"{statistics.median(totals[1:]):.1f}")
    for part, code in ALONE.items():
        times = [alone(code) for _ in range(options.repeats + 1)][1:]
        spread = f"{statistics.median(times):.1f} ({min(times):.1f}-{max(times):.1f})"
        table.add_row(f"alone: {part}", "", spread)
    processes = Table("process", "number", "CPU s", title="of the last start")
    last = starts[-1]
    for kind, seconds in last.cpu_seconds.most_common():
        processes.add_row(kind, str(last.number[kind]), f"{seconds:.1f}")
    cores = len(os.sched_getaffinity(0))
    rest = cores * totals[-1] - last.cpu_seconds.total()
    processes.add_row(f"{cores} cores, idle or of others", "", f"{rest:.1f}")
    console = Console(width=100)
    console.print(table)
    console.print(processes)
    console.print(provenance(torch.device("cpu")))


if __name__ == "__main__":
    main()
