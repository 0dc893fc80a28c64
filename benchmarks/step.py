"""How near a step is to what its encoders alone would take, and where the rest goes.

The floor of a step is the time that its bare encoders would take over as many whole views.
UP-ReID passes 2 forward and backward (the view and its patches, which cover one view), and 3
forward alone (the other view, its patches, the original); MoCo v2 passes 1 and 1. Precision,
memory format, batch and compilation are those of the step. Rounds alternate between all that is
compared. The parts of a step are timed afterwards, with the device idle around each of them.

    python -m benchmarks.step --repeats 5
    python -m benchmarks.step --device cuda --cases resnet50:256x128:320
"""

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from subprocess import run
from typing import Any, Self
from unittest.mock import patch

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.core import model, training
from upreid_ray.core.encoder import running_statistics
from upreid_ray.core.key_queue import KeyQueue
from upreid_ray.core.model import UPReID
from upreid_ray.core.precision import autocast, multiplies_bf16
from upreid_ray.core.training import State, TrainState, train_step

# Settings of a method, and the views that it passes forward and backward, and forward alone.
METHODS: dict[str, tuple[dict[str, Any], int, int]] = {
    "UP-ReID": ({}, 2, 3),
    "MoCo v2": ({"loss.consistency_weight": 0, "loss.intrinsic_weight": 0}, 1, 1),
}
# What is called within a step, and the part of the step that it is.
PARTS = (
    (training, "draw_view_parameters", "augmentation"),
    (UPReID, "encode_keys", "keys, forward"),
    (UPReID, "forward", "queries, forward"),
    (Tensor, "backward", "queries, backward"),
    (model, "info_nce", "losses, forward"),
    (model, "global_consistency", "losses, forward"),
    (model, "intrinsic_contrastive", "losses, forward"),
    (State, "update", "optimizer"),
    (UPReID, "update_key_encoder", "key encoder follows"),
    (KeyQueue, "enqueue", "queue"),
)


@dataclass(frozen=True)
class Case:
    """A backbone, the size of its images, and how many are in a batch of one group."""

    backbone: str
    height: int
    width: int
    batch_size: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read text such as ``resnet50:256x128:320``."""
        backbone, size, batch_size = text.split(":")
        height, width = size.split("x")
        return cls(backbone, int(height), int(width), int(batch_size))

    def __str__(self) -> str:
        """Say what it is, for people."""
        return f"{self.backbone}, {self.height}x{self.width}, {self.batch_size} images"

    def config(self, precision: str, settings: dict[str, Any]) -> PretrainConfig:
        """Return LUPerson's recipe for this case."""
        return PretrainConfig().override(
            {
                "model.backbone": self.backbone,
                "data.height": self.height,
                "data.width": self.width,
                "training.batch_size": self.batch_size,
                "training.group_size": self.batch_size,
                "training.precision": precision,
                "scaling.num_workers": 1,
                **settings,
            }
        )

    def images(self, device: torch.device) -> Tensor:
        """Return uint8 noise."""
        shape = (self.batch_size, 3, self.height, self.width)
        return torch.randint(256, shape, dtype=torch.uint8, device=device)


class Stopwatch:
    """Seconds in the parts of a step; a part within a part counts once, as the inner one."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._open = ["all else"]
        self._turned = clock(device)

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Count what happens inside as a part."""
        self._turn()
        self._open.append(part)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        now = clock(self._device)
        self.seconds[self._open[-1]] += now - self._turned
        self._turned = now

    def watched(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """Return the function, whose calls count as a part."""

        def call(*args: object, **named: object) -> object:
            with self.during(part):
                return function(*args, **named)

        return call


def clock(device: torch.device) -> float:
    """Return the time when the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def new_state(config: PretrainConfig, device: torch.device) -> TrainState:
    """Make a state whose first step may be taken."""
    return TrainState(config, steps_per_epoch=1000, device=device)


def forward(state: TrainState, images: Tensor, *, backward: bool) -> None:
    """Let the bare query encoder see normalized images."""
    encoder = state.model.query_encoder
    with nullcontext() if backward else torch.no_grad():
        precision = state.config.training.precision
        with autocast(images, precision), running_statistics(encoder, momentum=0.1):
            embeddings = encoder(images)
        if backward:
            embeddings.sum().backward()
            encoder.zero_grad()


def parts_of_a_step(state: TrainState, images: Tensor) -> dict[str, float]:
    """Return the seconds of each part of one step."""
    watch = Stopwatch(state.device)
    with ExitStack() as stack:
        for owner, name, part in PARTS:
            watched = watch.watched(getattr(owner, name), part)
            stack.enter_context(patch.object(owner, name, watched))
        rendered = watch.watched(state.render_views, "augmentation")
        stack.enter_context(patch.object(state, "render_views", rendered))
        with watch.during("all else"):
            train_step(state, images)
    return watch.seconds


def spread(seconds: list[float]) -> str:
    """Return median, least and most, in milliseconds."""
    middle, least, most = statistics.median(seconds), min(seconds), max(seconds)
    return f"{1000 * middle:.1f} ({1000 * least:.1f}-{1000 * most:.1f})"


def matmul_rate() -> float:
    """Return the FLOP/s of the device at a large product of bf16 matrices."""
    left, right = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    seconds = []
    for _ in range(10):
        started = clock(left.device)
        left @ right
        seconds.append(clock(left.device) - started)
    return 2 * 8192**3 / statistics.median(seconds)


class Measurement:
    """What is known of one case and precision."""

    def __init__(
        self, case: Case, precision: str, settings: dict[str, Any], device: torch.device
    ) -> None:
        self.case, self.device = case, device
        self.title = f"{case}, {precision}"
        self._states = {
            name: new_state(case.config(precision, weights | settings), device)
            for name, (weights, _, _) in METHODS.items()
        }
        shape = (case.batch_size, 3, case.height, case.width)
        views = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        self._images = case.images(torch.device("cpu"))
        bare = self._states["MoCo v2"]
        self._work: dict[str, Callable[[], object]] = {
            "forward": partial(forward, bare, views, backward=False),
            "forward and backward": partial(forward, bare, views, backward=True),
            **{
                name: partial(train_step, state, self._images)
                for name, state in self._states.items()
            },
        }

    def times(self, repeats: int) -> dict[str, list[float]]:
        """Return seconds of each kind of work in each round, after some that do not count."""
        for function in self._work.values():
            for _ in range(3):
                function()
        # Several at once, so that a GPU does not stand still when this looks at the clock.
        at_once = 5 if self.device.type == "cuda" else 1
        seconds: dict[str, list[float]] = {name: [] for name in self._work}
        for _ in track(range(repeats), self.title, console=Console(stderr=True)):
            for name, function in self._work.items():
                started = clock(self.device)
                for _ in range(at_once):
                    function()
                seconds[name].append((clock(self.device) - started) / at_once)
        return seconds

    def parts(self, repeats: int) -> dict[str, dict[str, float]]:
        """Return the seconds of each part of each method's step: medians."""
        medians = {}
        for name, state in self._states.items():
            rounds = [parts_of_a_step(state, self._images) for _ in range(repeats)]
            medians[name] = {
                part: statistics.median(each[part] for each in rounds) for part in rounds[0]
            }
        return medians

    def bytes(self) -> dict[str, int]:
        """Return the GPU memory that a step of each method takes beyond its state."""
        peaks = {}
        for name in METHODS:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self._work[name]()
            peaks[name] = torch.cuda.max_memory_allocated() - before
        return peaks

    def forward_flops(self) -> int:
        """Return the floating-point operations of the bare encoder's forward pass."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self._states["MoCo v2"].extractor(self._images.to(self.device).float())
        return counter.get_total_flops()


def floor(method: str, medians: dict[str, float]) -> float:
    """Return the seconds that the encoders alone would take."""
    _, both, alone = METHODS[method]
    return both * medians["forward and backward"] + alone * medians["forward"]


def tables(measurement: Measurement, repeats: int) -> Iterator[Table]:
    """Measure one case, and yield its tables."""
    seconds = measurement.times(repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    num_images = measurement.case.batch_size
    table = Table("", "ms", "images/s", "floor, ms", "step / floor", title=measurement.title)
    for name in seconds:
        row = [name, spread(seconds[name]), f"{num_images / medians[name]:.0f}"]
        if name in METHODS:
            least = floor(name, medians)
            row += [f"{1000 * least:.1f}", f"{medians[name] / least:.3f}"]
        table.add_row(*row)
    yield table

    parts = measurement.parts(repeats)
    table = Table("part of a step, % of it", *METHODS)
    for part in parts["UP-ReID"]:
        shares = (100 * each.get(part, 0) / sum(each.values()) for each in parts.values())
        table.add_row(part, *(f"{share:.1f}" for share in shares))
    yield table

    if measurement.device.type == "cuda":
        flops, rate, memory = measurement.forward_flops(), matmul_rate(), measurement.bytes()
        table = Table("", "TFLOP/s", "of a bf16 matrix product's", "MB an image")
        for name, (_, both, alone) in METHODS.items():
            speed = (3 * both + alone) * flops / medians[name]
            table.add_row(
                name,
                f"{speed / 1e12:.0f}",
                f"{speed / rate:.2f} of {rate / 1e12:.0f}",
                f"{memory[name] / num_images / 1e6:.1f}",
            )
        yield table


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", type=Case.parse, metavar="BACKBONE:HEIGHTxWIDTH:IMAGES",
        default=[Case.parse("resnet18:128x64:64"), Case.parse("resnet50:256x128:16")],
    )  # fmt: skip
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"))
    parser.add_argument(
        "--settings", nargs="+", default=[], metavar="NAME=VALUE",
        help="of a run, such as training.compile=false",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each kind")
    options = parser.parse_args()
    device, console = options.device, Console(width=110)
    settings = dict(setting.split("=") for setting in options.settings)
    able = ["fp32", "bf16"] if multiplies_bf16(device) else ["fp32"]
    for case in options.cases:
        for precision in options.precisions or able:
            measurement = Measurement(case, precision, settings, device)
            for table in tables(measurement, options.repeats):
                console.print(table)
    console.print(
        provenance(device), *options.settings, f"{options.repeats} rounds: median (least-most)"
    )


def commit() -> str:
    """Return the commit of the code; without a repository it is ``UPREID_RAY_COMMIT``."""
    described = run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"],
        capture_output=True,
        check=False,
        text=True,
    ).stdout.strip()
    return described or os.environ.get("UPREID_RAY_COMMIT", "unknown")


def provenance(device: torch.device) -> str:
    """Return when, on what and from which commit something was measured."""
    hardware = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{os.cpu_count()} cores ({torch.backends.cpu.get_cpu_capability()})"
    )
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    return f"{today}, commit {commit()}, {hardware}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
