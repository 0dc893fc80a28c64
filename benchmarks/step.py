"""What a step costs: by precision, and with convolutions that do not skip padding.

Each row is the median time of some pre-training steps of a preset on this machine's CPU, after
one step that is not counted; rows alternate.

    python benchmarks/step.py --repeats 3
"""

import argparse
import os
import statistics
import time
from datetime import UTC, datetime

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from upreid_ray.core.encoder import TrimmedConv2d
from upreid_ray.core.training import TrainState, train_step
from upreid_ray.presets import PRESETS
from upreid_ray.tracking import environment

# Precision, and whether convolutions skip the taps that see only padding.
KINDS = (("fp32", True), ("fp32", False), ("bf16", True))


def make_state(preset: str, precision: str, *, trimmed: bool) -> TrainState:
    """Make a state of a preset, of which the first step may be taken."""
    config = PRESETS[preset].override({"training.precision": precision})
    state = TrainState(config, steps_per_epoch=100, device=torch.device("cpu"))
    for module in state.model.modules():
        if isinstance(module, TrimmedConv2d) and not trimmed:
            module.__class__ = nn.Conv2d
    return state


def noise(state: TrainState) -> Tensor:
    """Make a batch of the size that the state takes."""
    config = state.config
    shape = (config.training.batch_size, 3, config.data.height, config.data.width)
    return torch.randint(256, shape, dtype=torch.uint8)


def main() -> None:
    """Measure, and print a table of medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["demo", "laptop"], choices=PRESETS)
    parser.add_argument("--repeats", type=int, default=3, help="steps of each row")
    presets, repeats = vars(parser.parse_args()).values()
    console = Console(width=110)
    rows = [(preset, *kind) for preset in presets for kind in KINDS]
    states = [make_state(preset, precision, trimmed=t) for preset, precision, t in rows]
    times: list[list[float]] = [[] for _ in rows]
    for repeat in track(range(repeats + 1), "steps", console=Console(stderr=True)):
        for state, seconds in zip(states, times, strict=True):
            images = noise(state)
            started = time.perf_counter()
            train_step(state, images)
            if repeat > 0:
                seconds.append(time.perf_counter() - started)
    table = Table("preset", "precision", "convolutions", "seconds/step", "images/s")
    for (preset, precision, trimmed), seconds in zip(rows, times, strict=True):
        median = statistics.median(seconds)
        table.add_row(
            preset,
            precision,
            "trimmed" if trimmed else "all taps",
            f"{median:.2f} ({min(seconds):.2f}-{max(seconds):.2f})",
            f"{PRESETS[preset].training.batch_size / median:.1f}",
        )
    console.print(table)
    tags = environment()
    console.print(
        f"{datetime.now(UTC):%Y-%m-%d}, commit {tags['mlflow.source.git.commit'][:10]}, "
        f"{os.cpu_count()} cores ({torch.backends.cpu.get_cpu_capability()}), "
        f"torch {tags['version.torch']}, {repeats} steps a row: median (least-most)"
    )


if __name__ == "__main__":
    main()
