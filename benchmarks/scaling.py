"""What more workers bring: measured on one machine, and by calculation for many GPUs.

Measured: a step of UP-ReID on one and on two workers of one thread each, with the same batch
(strong scaling) and with a batch that grows with the workers (weak scaling); and the bytes that
a step sends, by the counter of the loopback interface and by calculation. Nothing else may use
the network meanwhile.

Calculated: from the time of a step on one GPU (`benchmarks/step.py`), for 1 to 256 GPUs with
one group each. A step sends four things; the queue's keys travel during the queries' forward
pass, gradients during backward:

    images         (N - 1) / N x bytes of the worker's images (shuffle-BN, all-to-all)
    keys           (N - 1) / N x bytes of the worker's keys (back from there, all-to-all)
    queue          (N - 1) x bytes of the keys of the worker's views (all-gather)
    gradients      2 (N - 1) / N x 4 bytes x parameters, from each worker (ring all-reduce)

    python -m benchmarks.scaling
    python -m benchmarks.scaling --step-ms 123.4 --gpu-hour 3
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from benchmarks.step import Case, provenance
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.core.model import UPReID
from upreid_ray.core.training import TrainState, train_step

CPU = Case("resnet18", 64, 32, 16)  # a group
GPU = Case("resnet50", 256, 128, 320)
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
GPUS_OF_A_NODE = 8
# Bytes/s that one GPU sends: three quarters of NVLink 4's 450 GB/s, and of 400 Gbit/s a GPU.
WITHIN_A_NODE, BETWEEN_NODES = 0.75 * 450e9, 0.75 * 50e9
# Of the step, during which the queue's keys and gradients travel (`benchmarks/step.py`).
FORWARD, BACKWARD = 0.22, 0.38


@dataclass(frozen=True)
class Volume:
    """Bytes that one worker sends in a step."""

    images: float
    keys: float
    queue: float
    gradients: float

    @classmethod
    def of(cls, config: PretrainConfig, num_workers: int) -> "Volume":
        """Calculate for a batch of ``config.num_groups`` groups, split evenly."""
        others = num_workers - 1
        num_parameters = sum(each.numel() for each in UPReID(config).query_encoder.parameters())
        num_own = config.training.batch_size / num_workers
        # A view, an original, and patches.
        num_keys = 2 + config.patches.rows * config.patches.columns
        key = 4 * config.model.embedding_dim
        return cls(
            images=others / num_workers * num_own * 3 * config.data.height * config.data.width,
            keys=others / num_workers * num_own * num_keys * key,
            queue=others * num_own * key,
            gradients=2 * others / num_workers * 4 * num_parameters,
        )

    def total(self) -> float:
        """Return all bytes."""
        return self.images + self.keys + self.queue + self.gradients


def config_of(case: Case, num_groups: int, num_workers: int) -> PretrainConfig:
    """Return LUPerson's recipe with a batch of this many groups."""
    return case.config("auto", {"model.queue_size": 65536}).override(
        {
            "training.batch_size": num_groups * case.batch_size,
            "scaling.num_workers": num_workers,
        }
    )


def loopback_bytes() -> int:
    """Return what the loopback interface has received since the machine started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    raise RuntimeError("no loopback interface")


def worker(rank: int, config: PretrainConfig, repeats: int, folder: str) -> None:
    """Take steps; rank 0 leaves their seconds and bytes in a file."""
    torch.set_num_threads(1)
    num_workers = config.scaling.num_workers
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_workers
    )
    state = TrainState(config, steps_per_epoch=1000, device=torch.device("cpu"))
    shape = (
        config.training.batch_size // num_workers,
        3,
        config.data.height,
        config.data.width,
    )
    images = torch.randint(256, shape, dtype=torch.uint8)
    for _ in range(2):
        train_step(state, images)
    seconds = []
    dist.barrier()
    before = loopback_bytes()
    for _ in range(repeats):
        started = time.perf_counter()
        train_step(state, images)
        seconds.append(time.perf_counter() - started)
    dist.barrier()
    if rank == 0:
        sent = (loopback_bytes() - before) / repeats
        Path(folder, "result.json").write_text(json.dumps([seconds, sent]))
    dist.destroy_process_group()


def measured(config: PretrainConfig, repeats: int) -> tuple[float, float]:
    """Return the median seconds of a step, and the bytes that all workers send in one."""
    with tempfile.TemporaryDirectory(prefix="upreid-bench-") as folder:
        mp.spawn(worker, (config, repeats, folder), nprocs=config.scaling.num_workers)
        seconds, sent = json.loads(Path(folder, "result.json").read_text())
    return statistics.median(seconds), sent


def measure(repeats: int) -> Table:
    """Measure on this machine."""
    table = Table(
        "workers", "batch", "s/step", "images/s", "efficiency",
        "MB sent, measured", "calculated", title=f"{CPU} a group",
    )  # fmt: skip
    speeds = {}
    for num_workers, num_groups in ((1, 1), (1, 2), (2, 2)):
        config = config_of(CPU, num_groups, num_workers)
        seconds, sent = measured(config, repeats)
        speeds[num_workers, num_groups] = speed = config.training.batch_size / seconds
        efficiency = ""
        if num_workers > 1:
            strong, weak = (
                speed / num_workers / speeds[1, groups] for groups in (num_workers, 1)
            )
            efficiency = f"strong {strong:.2f}, weak {weak:.2f}"
        calculated = num_workers * Volume.of(config, num_workers).total()
        table.add_row(
            str(num_workers),
            str(config.training.batch_size),
            f"{seconds:.2f}",
            f"{speed:.1f}",
            efficiency,
            f"{sent / 1e6:.1f}",
            f"{calculated / 1e6:.1f}",
        )
    return table


def model(step_seconds: float, dollars: float) -> Table:
    """Calculate for many GPUs."""
    table = Table(
        "GPUs", "batch", "MB a GPU sends", "ms waiting for it", "steps/s", "images/s",
        "efficiency", "$ per million images",
        title=f"{GPU} a GPU, {1000 * step_seconds:.1f} ms a step, ${dollars:g} a GPU hour",
    )  # fmt: skip
    for num_gpus in GPUS:
        config = config_of(GPU, num_gpus, num_gpus)
        volume = Volume.of(config, num_gpus)
        rate = WITHIN_A_NODE if num_gpus <= GPUS_OF_A_NODE else BETWEEN_NODES
        late = (
            max(0.0, volume.queue / rate - FORWARD * step_seconds),
            max(0.0, volume.gradients / rate - BACKWARD * step_seconds),
        )
        waiting = sum(late) + (volume.images + volume.keys) / rate
        steps = 1 / (step_seconds + waiting)
        speed = steps * config.training.batch_size
        table.add_row(
            str(num_gpus),
            str(config.training.batch_size),
            f"{volume.total() / 1e6:.0f}",
            f"{1000 * waiting:.2f}",
            f"{steps:.2f}",
            f"{speed:,.0f}",
            f"{steps * step_seconds:.3f}",
            f"{dollars * num_gpus / 3600 / speed * 1e6:.3f}",
        )
    return table


def main() -> None:
    """Measure, calculate, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=10, help="steps of each kind")
    parser.add_argument("--step-ms", type=float, default=123.4, help="of one GPU")
    parser.add_argument("--gpu-hour", type=float, default=3.0, help="dollars")
    options = parser.parse_args()
    console = Console(width=110)
    console.print(measure(options.repeats))
    console.print(model(options.step_ms / 1000, options.gpu_hour))
    console.print(provenance(torch.device("cpu")), f"{options.repeats} steps: median")


if __name__ == "__main__":
    main()
