"""Everything that a GPU should tell us, in one command of a few minutes.

It needs torch, pyarrow, pydantic, rich, safetensors and scipy, but neither Ray nor MLflow. In
this order:

1. the tests of CUDA (tests/core/test_cuda.py);
2. step / floor of `benchmarks.step`;
3. the step of lightly beside ours, if it is installed (`benchmarks.peers`);
4. the study: MoCo v2, each term alone, UP-ReID, and MoCo v2 for as long as UP-ReID takes, with
   several seeds, scored as `benchmarks.study` does. The number of epochs is what fits into the
   rest of the time.

What is finished is printed at once and appended to files in `--out`, so that a machine that is
taken away early loses one run. The same command goes on with what is missing.

    python -m benchmarks.gpu_study --data.root shards --out gpu_study --minutes 8
    python -m benchmarks.gpu_study --data.root synthetic --out rehearsal --device cpu \
        --case resnet18:64x32:64 --seeds 1 --minutes 3
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import step
from benchmarks.step import Case, provenance
from benchmarks.study import (
    BASELINE,
    METHODS,
    Run,
    StudyData,
    clock,
    parse_row,
    read_lines,
    study,
    study_data,
    tables,
)
from upreid_ray.config.presets import PRESETS
from upreid_ray.core.precision import multiplies_bf16
from upreid_ray.core.training import train_step

PRESET = "laptop"
ROWS = tuple(METHODS)
LONGEST = ROWS[-1]
LR_PER_IMAGE = 0.3 / 2560  # LUPerson's
NUM_PILOT_STEPS = 5
STUDY_SHARE = 0.85  # of the time that is left; the rest is for scoring and for surprises
LIMITS = {"tests": 120, "peers": 90}  # seconds


def common_settings(case: Case, device: torch.device) -> dict[str, Any]:
    """Return the settings of all rows."""
    return {
        "model.backbone": case.backbone,
        "model.queue_size": 4096,
        "data.height": case.height,
        "data.width": case.width,
        "training.batch_size": case.batch_size,
        "training.group_size": case.batch_size,
        "training.precision": "bf16" if multiplies_bf16(device) else "fp32",
        "training.compile": False,  # takes longer than it would save in a minute
        "optimizer.lr": round(LR_PER_IMAGE * case.batch_size, 4),
        "checkpoint.every_steps": 10**6,
    }


def seconds_per_step(
    settings: Mapping[str, Any], data: StudyData, device: torch.device
) -> float:
    """Return the seconds that a step of these settings takes."""
    config = PRESETS[PRESET].override(dict(settings))
    state = Run(config, data, Path(), device).state
    images = data.train[: config.training.batch_size]
    for _ in range(2):
        train_step(state, images)
    began = clock(device)
    for _ in range(NUM_PILOT_STEPS):
        train_step(state, images)
    return (clock(device) - began) / NUM_PILOT_STEPS


def plan_epochs(
    seconds: Mapping[str, float], *, budget: float, steps_per_epoch: int, num_seeds: int
) -> tuple[int, int]:
    """Return the epochs of all rows, and those of MoCo v2 at the time of the longest row.

    Args:
        seconds: Seconds of a step by row; has `BASELINE` and `LONGEST`.
        budget: Seconds for all runs.
        steps_per_epoch: Steps of one pass over the data.
        num_seeds: Seeds of each row.
    """
    per_epoch = steps_per_epoch * (sum(seconds.values()) + seconds[LONGEST])
    epochs = max(1, int(budget / (num_seeds * per_epoch)))
    return epochs, max(epochs + 1, round(epochs * seconds[LONGEST] / seconds[BASELINE]))


def show_tests(console: Console) -> None:
    """Run the tests of CUDA."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/core/test_cuda.py"]
    show_output(console, "tests", command)


def show_peers(console: Console, case: Case, device: torch.device) -> None:
    """Show lightly's step beside ours, if it is installed."""
    if any(importlib.util.find_spec(each) is None for each in ("lightly", "kornia")):
        console.print("lightly or kornia is not installed: `make bench-peers` shows which")
        return
    place = [
        "--device",
        device.type,
        "--case",
        f"{case.backbone}:{case.height}x{case.width}:64",
    ]
    show_output(console, "peers", [sys.executable, "-m", "benchmarks.peers", *place])


def show_output(console: Console, name: str, command: Sequence[str]) -> None:
    """Run a command for a limited time and print the end of what it prints."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMITS[name], check=False
        )
        console.print("\n".join((done.stdout + done.stderr).splitlines()[-30:]), markup=False)
    except subprocess.TimeoutExpired:
        console.print(f"{name}: not finished within {LIMITS[name]} seconds")


def show_steps(console: Console, case: Case, device: torch.device) -> None:
    """Show step / floor."""
    precision = "bf16" if multiplies_bf16(device) else "fp32"
    for table in step.tables(step.Measurement(case, precision, {}, device), repeats=3):
        console.print(table)


def run_study(
    console: Console, options: argparse.Namespace, data: StudyData, deadline: float
) -> None:
    """Run the rows of all seeds until the deadline, and show the table after each seed."""
    device, results = options.device, options.out / "lines.jsonl"
    common = common_settings(options.case, device)
    seconds = {row: seconds_per_step(common | parse_row(row), data, device) for row in ROWS}
    console.print({row: f"{1000 * each:.0f} ms a step" for row, each in seconds.items()})
    plan = options.out / "plan.json"
    if not plan.exists():  # a study that goes on keeps its lengths
        lengths = plan_epochs(
            seconds,
            budget=STUDY_SHARE * (deadline - time.perf_counter()),
            steps_per_epoch=len(data.train) // options.case.batch_size,
            num_seeds=options.seeds,
        )
        plan.write_text(json.dumps(lengths))
    epochs, longer = json.loads(plan.read_text())
    common |= {"training.epochs": epochs}
    for seed in range(options.seeds):
        for row in (*ROWS, f"{BASELINE} training.epochs={longer}"):
            if time.perf_counter() > deadline:
                console.print("no time is left; the same command goes on")
                return
            study(
                data,
                common,
                [row],
                [seed],
                preset=PRESET,
                about={"set": Path(options.root).absolute().name, "split": "validation"},
                out=options.out,
                results=results,
                device=device,
            )
        for table in tables(read_lines(results)):
            console.print(table)


def main() -> None:
    """Run all parts, and print."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--data.root", dest="root", required=True, help="labelled images, shards or 'synthetic'"
    )
    add("--out", type=Path, required=True, help="folder of results and checkpoints")
    add("--device", type=torch.device, default=torch.device("cuda"))
    add("--case", type=Case.parse, default=Case.parse("resnet50:256x128:256"))
    add("--seeds", type=int, default=3)
    add("--minutes", type=float, default=8)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = started + 60 * options.minutes
    with (options.out / "report.txt").open("a") as report:
        for console in (Console(width=130), Console(file=report, width=130)):
            console.print(provenance(options.device))
        console = Console(width=130, record=True)
        data = study_data(options.root, options.case.height, options.case.width, test=False)
        data = replace(data, train=data.train.to(options.device))
        parts = [
            partial(show_tests, console),
            partial(show_steps, console, options.case, options.device),
            partial(show_peers, console, options.case, options.device),
            partial(run_study, console, options, data, deadline),
        ]
        for part in parts:
            part()
            console.print(f"after {time.perf_counter() - started:.0f} s")
            report.write(console.export_text(clear=True))
            report.flush()


if __name__ == "__main__":
    main()
