"""What Ray costs: images/s of the whole job beside the same loop under plain torch.distributed.

Both train the demo preset on the same shards, with the same blocks, threads and steps. The
plain loop decodes in a torch DataLoader process; it has no Ray, no MLflow and no checkpoints.
Runs alternate, so that a slow minute of the machine hits both. The first quarter of the steps
of each run, with the start of the data stream, is left out of both.

    python benchmarks/ray_overhead.py --repeats 3
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import patch

import ray
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from upreid_ray.config.presets import PRESETS
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.core.memory import KEEP_FREED_MEMORY
from upreid_ray.core.training import TrainState, train, train_step
from upreid_ray.data.shards.images import ImageRules
from upreid_ray.data.shards.preparation import write_shards
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.data.sources.source import synthetic_records
from upreid_ray.data.stream.decode import Columns
from upreid_ray.data.stream.training import Block, TrainingImages
from upreid_ray.tracking.runs import environment
from upreid_ray.train.pretrain import fit

# Workers and threads of each: one core is left to all else, or none is.
ROWS = ((1, 1), (1, 2), (2, 1))


class Blocks(Dataset[Columns]):
    """The blocks of one worker as a map-style dataset."""

    def __init__(self, images: TrainingImages, blocks: list[Block]) -> None:
        self._images = images
        self._blocks = blocks

    def __len__(self) -> int:
        """Count the blocks."""
        return len(self._blocks)

    def __getitem__(self, index: int) -> Columns:
        """Read and decode one block."""
        return self._images.read(self._blocks[index])


def _keep(columns: Columns) -> Columns:
    return columns


def plain_worker(
    rank: int, num_workers: int, config: PretrainConfig, shards: str, rendezvous: str
) -> None:
    """Train under plain torch.distributed; rank 0 leaves its images/s in a file."""
    if num_workers > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_workers
        )
    torch.set_num_threads(config.scaling.threads_per_worker or 1)
    images = TrainingImages(ShardSet.open(shards), config)
    state = TrainState(
        config, steps_per_epoch=images.steps_per_epoch, device=torch.device("cpu")
    )
    rounds = list(images.rounds(0, state.num_steps))
    blocks = [block for each in rounds for block in each.by_worker(num_workers)[rank]]
    loader = DataLoader(
        Blocks(images, blocks),
        batch_size=None,
        num_workers=1,
        collate_fn=_keep,
    )
    batches = images.batches(rounds, iter(loader), rank=rank, num_workers=num_workers)
    skipped = state.num_steps // 4
    started = 0.0
    tensors = (torch.from_numpy(batch["image"]) for batch in batches)
    for report in train(state, tensors, train_step):
        if report.step % config.training.log_every_steps == 0:
            report.terms["loss"].item()
        if report.step == skipped:
            started = time.perf_counter()
    seconds = time.perf_counter() - started
    if rank == 0:
        speed = (state.num_steps - skipped) * config.training.batch_size / seconds
        Path(f"{rendezvous}.speed").write_text(str(speed))
    if num_workers > 1:
        dist.destroy_process_group()


def plain(config: PretrainConfig, shards: str, folder: Path) -> float:
    """Return images/s of the plain loop."""
    num_workers = config.scaling.num_workers
    rendezvous = str(folder / f"rendezvous-{time.monotonic_ns()}")
    with patch.dict(os.environ, KEEP_FREED_MEMORY):  # as the workers on Ray
        mp.spawn(plain_worker, (num_workers, config, shards, rendezvous), nprocs=num_workers)
    return float(Path(f"{rendezvous}.speed").read_text())


def on_ray(config: PretrainConfig) -> float:
    """Return images/s of the whole job."""
    ray.init("local", logging_level=logging.ERROR, log_to_driver=False)
    try:
        return fit(config).images_per_second
    finally:
        ray.shutdown()


def main() -> None:
    """Measure, and print a table of medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of each run")
    repeats, epochs = vars(parser.parse_args()).values()
    logging.basicConfig(level=logging.WARNING)
    console = Console(width=110)
    table = Table("workers", "threads each", "plain images/s", "on Ray images/s", "Ray / plain")
    with tempfile.TemporaryDirectory(prefix="upreid-bench-") as name:
        folder = Path(name)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        shards = _shards(folder)
        for num_workers, num_threads in ROWS:
            config = _config(num_workers, num_threads, epochs, shards, folder)
            speeds: dict[str, list[float]] = {"plain": [], "ray": []}
            for _ in range(repeats):
                speeds["plain"].append(plain(config, shards, folder))
                speeds["ray"].append(on_ray(config))
                console.print(num_workers, num_threads, speeds)
            medians = {kind: statistics.median(values) for kind, values in speeds.items()}
            table.add_row(
                str(num_workers),
                str(num_threads),
                *(
                    f"{medians[kind]:.1f} ({min(values):.1f}-{max(values):.1f})"
                    for kind, values in speeds.items()
                ),
                f"{medians['ray'] / medians['plain']:.3f}",
            )
    console.print(table)
    tags = environment()
    console.print(
        f"{datetime.now(UTC):%Y-%m-%d}, commit {tags['mlflow.source.git.commit'][:10]}, "
        f"{os.cpu_count()} cores, torch {tags['version.torch']}, ray {tags['version.ray']}, "
        f"{repeats} runs of each kind: median (least-most)"
    )


def _shards(folder: Path) -> str:
    """Draw the synthetic set of the demo."""
    synthetic = PRESETS["demo"].data.synthetic
    ray.init("local", logging_level=logging.ERROR, log_to_driver=False)
    write_shards(
        synthetic_records(synthetic),
        str(folder / "shards"),
        source="synthetic",
        seed=0,
        rules=ImageRules(),
        on_progress=lambda _: None,
    )
    ray.shutdown()
    return str(folder / "shards")


def _config(
    num_workers: int, num_threads: int, epochs: int, shards: str, folder: Path
) -> PretrainConfig:
    """Return the demo with groups for this many workers, and no evaluation in between."""
    demo = PRESETS["demo"]
    config = demo.override(
        {
            "data.shards": shards,
            "training.epochs": epochs,
            "training.group_size": demo.training.batch_size // 2,
            "evaluation.every_epochs": epochs,
            "scaling.num_workers": num_workers,
            "scaling.cpus_per_worker": 1 / num_workers,
            "scaling.threads_per_worker": num_threads,
            "run.storage_path": str(folder / "runs"),
        }
    )
    images = TrainingImages(ShardSet.open(shards), config)
    num_steps = images.steps_per_epoch * epochs
    return config.override(
        {"training.log_every_steps": num_steps // 4, "checkpoint.every_steps": num_steps // 2}
    )


if __name__ == "__main__":
    main()
