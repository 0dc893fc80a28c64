"""One epoch of a large set: is each image seen once, and does memory stay flat?

Some synthetic people are prepared and repeated under other keys until the set is as large as
asked for. Workers take their blocks from the stream as a run does, as fast as they come or at a
given speed, and stand still once in the middle; the memory of every process is looked at
meanwhile.

    python benchmarks/epoch.py
    python benchmarks/epoch.py --images 100000 --speed 1000
"""

import argparse
import logging
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import DataIterator
from rich.console import Console
from rich.table import Table

from upreid_ray.config.presets import PRESETS
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.data.shards.images import ImageRules
from upreid_ray.data.shards.manifest import MANIFEST_FILE, Manifest
from upreid_ray.data.shards.preparation import write_shards
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.data.sources.source import synthetic_records
from upreid_ray.data.stream.decode import Columns
from upreid_ray.data.stream.ray_data import MAX_DATASET_BLOCKS, read_stream, stream_blocks
from upreid_ray.data.stream.training import Block, Round, TrainingImages
from upreid_ray.tracking.runs import environment

NUM_WORKERS = 2
PAUSE_SECONDS = 20.0
SAMPLE_SECONDS = 2.0
MB = 1e6


@dataclass(frozen=True)
class Reader:
    """Reads a block with the keys of its images, and counts the blocks that were read.

    Attributes:
        images: Images of the set.
        counter: File that grows by one byte for each block.
    """

    images: TrainingImages
    counter: Path

    def __call__(self, block: Block) -> Columns:
        """Read and decode a block."""
        columns = self.images.read(block)
        ranges, order = self.images.rows(block)
        names = self.images.row_groups.read(ranges, ["key"]).column("key")
        with self.counter.open("ab") as file:
            file.write(b".")
        return {**columns, "key": np.array(names.take(pa.array(order)).to_pylist())}

    def num_read(self) -> int:
        """Count the blocks that were read, whoever read them."""
        return self.counter.stat().st_size


@ray.remote(num_cpus=0, max_concurrency=2)
class Consumer:
    """A worker that trains nothing."""

    def __init__(self, images: TrainingImages, rank: int, speed: float | None) -> None:
        self._images, self._rank, self._speed = images, rank, speed
        self._seen: list[np.ndarray[Any, Any]] = []
        self._num_blocks = 0
        self._stands_still = False
        self._stood = 0.0

    def consume(self, iterator: DataIterator, rounds: list[Round]) -> float:
        """Take the batches of some rounds; return the seconds spent waiting for them."""
        blocks = read_stream(iterator, rank=self._rank, num_workers=NUM_WORKERS)
        waited = 0.0
        batches = self._images.batches(
            rounds, self._noted(blocks), rank=self._rank, num_workers=NUM_WORKERS
        )
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - began - self._stood
            self._stood = 0.0
            if batch is None:
                return waited
            if self._speed is not None:
                time.sleep(len(batch["image"]) / self._speed)

    def _noted(self, blocks: Iterator[Columns]) -> Iterator[Columns]:
        for block in blocks:
            self._seen.append(block.pop("key"))
            self._num_blocks += 1
            began = time.perf_counter()
            while self._stands_still:
                time.sleep(0.1)
            self._stood += time.perf_counter() - began
            yield block

    def stand_still(self, yes: bool) -> None:
        """Take nothing for a while."""
        self._stands_still = yes

    def num_taken(self) -> int:
        """Count the blocks that were taken."""
        return self._num_blocks

    def seen(self) -> np.ndarray[Any, Any]:
        """Return the keys of all images that were seen."""
        return np.concatenate(self._seen)


@dataclass
class Memory:
    """Memory of the processes of this Ray over time.

    Attributes:
        samples: Kind of process -> seconds since the start and megabytes of the largest one.
    """

    samples: dict[str, list[tuple[float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    began: float = field(default_factory=time.perf_counter)

    def sample(self) -> None:
        """Look at all processes; what they share, such as the object store, counts in none."""
        largest: dict[str, float] = {}
        for process in psutil.Process().children(recursive=True):
            try:
                kind = _kind(process)
                used = _own(process)
            except psutil.Error:  # it has just ended
                continue
            if kind is not None:
                largest[kind] = max(used, largest.get(kind, 0.0))
        largest["driver"] = _own(psutil.Process())
        free = ray.available_resources().get("object_store_memory", 0.0)
        held = ray.cluster_resources()["object_store_memory"] - free
        largest["object store"] = held / MB
        for kind, used in largest.items():
            self.samples[kind].append((time.perf_counter() - self.began, used))

    def table(self) -> Table:
        """Return the memory of each kind in the second, third and last quarter."""
        table = Table("MB of the largest process", "2nd quarter", "3rd", "last", "peak")
        for kind, samples in sorted(self.samples.items()):
            end = samples[-1][0]
            quarters = [
                [used for at, used in samples if number / 4 <= at / end <= (number + 1) / 4]
                for number in (1, 2, 3)
            ]
            peak = max(used for _, used in samples)
            table.add_row(
                kind,
                *(f"{np.median(part):.0f}" if part else "" for part in quarters),
                f"{peak:.0f}",
            )
        return table


def _own(process: psutil.Process) -> float:
    """Return the megabytes that a process does not share, as it does the object store."""
    memory = process.memory_info()
    return (memory.rss - memory.shared) / MB


def _kind(process: psutil.Process) -> str | None:
    """Name what a process of Ray does; None for what is not looked at."""
    command = " ".join(process.cmdline())
    for mark, kind in (
        ("ray::Consumer", "worker"),
        ("ray::SplitCoordinator", "executor of the stream"),
        ("ray::", "task that decodes"),
        ("/raylet/raylet", "raylet"),
        ("gcs_server", "GCS"),
    ):
        if mark in command:
            return kind
    return None


def repeated(folder: Path, config: PretrainConfig, num_images: int) -> str:
    """Prepare some people, and repeat them under other keys; return the set's URI."""
    drawn = config.data.synthetic.override({"num_unlabeled_identities": 150})
    few = write_shards(
        synthetic_records(drawn),
        str(folder / "few"),
        source="synthetic",
        seed=0,
        rules=ImageRules(),
        on_progress=lambda _: None,
    )
    manifest = few.manifest
    shard = next(each for each in manifest.shards if each.split == "unlabeled")
    table = pq.read_table(folder / "few" / shard.name)
    many = folder / "many"
    many.mkdir()
    shards = []
    copies_a_shard = max(1, 12_800 // len(table))
    keys = table.column("key").to_pylist()
    for number in range(-(-num_images // (len(table) * copies_a_shard))):
        renamed = [
            table.set_column(0, "key", [[f"{number}-{copy}-{key}" for key in keys]])
            for copy in range(copies_a_shard)
        ]
        whole = pa.concat_tables(renamed)
        whole = whole.slice(0, num_images - number * len(whole))
        name = f"{number:04d}.parquet"
        pq.write_table(
            whole,
            many / name,
            row_group_size=manifest.row_group_images,
            compression="none",
            use_dictionary=False,
            write_page_checksum=True,
        )
        size = (many / name).stat().st_size
        update = {"name": name, "num_images": len(whole), "num_bytes": size}
        shards.append(shard.model_copy(update=update))
    set_of_all: Manifest = manifest.model_copy(update={"shards": tuple(shards)})
    (many / MANIFEST_FILE).write_text(set_of_all.model_dump_json())
    return str(many)


def run_epoch(
    reader: Reader, consumers: list[Any], memory: Memory, console: Console
) -> tuple[float, float]:
    """Let the consumers take one epoch; return the seconds that they took and waited."""
    images = reader.images
    rounds = list(images.rounds(0, images.steps_per_epoch))
    num_rounds = MAX_DATASET_BLOCKS // len(rounds[0].blocks)  # as a run does
    began = time.perf_counter()
    waited = seconds_paused = 0.0
    for first in range(0, len(rounds), num_rounds):
        part = rounds[first : first + num_rounds]
        iterators = stream_blocks(reader, [each.by_worker(NUM_WORKERS) for each in part])
        running = [
            consumer.consume.remote(iterator, part)
            for consumer, iterator in zip(consumers, iterators, strict=True)
        ]
        while ray.wait(running, num_returns=NUM_WORKERS, timeout=SAMPLE_SECONDS)[1]:
            memory.sample()
            if not seconds_paused and _taken(consumers) > len(part) * len(part[0].blocks) / 2:
                seconds_paused = _pause(reader, consumers, memory, console)
        waited += sum(ray.get(running)) / NUM_WORKERS
    return time.perf_counter() - began - seconds_paused, waited


def _taken(consumers: list[Any]) -> int:
    """Count the blocks that all consumers have taken."""
    return sum(ray.get([consumer.num_taken.remote() for consumer in consumers]))


def _pause(reader: Reader, consumers: list[Any], memory: Memory, console: Console) -> float:
    """Let the consumers stand still, and say how much is decoded ahead of them."""
    began = time.perf_counter()
    ray.get([consumer.stand_still.remote(True) for consumer in consumers])
    while time.perf_counter() - began < PAUSE_SECONDS:
        time.sleep(SAMPLE_SECONDS)
        memory.sample()
        taken = _taken(consumers)
        console.print(
            f"standing still for {time.perf_counter() - began:3.0f} s: {taken} blocks taken, "
            f"{reader.num_read() - taken} decoded ahead, object store "
            f"{memory.samples['object store'][-1][1]:.0f} MB"
        )
    ray.get([consumer.stand_still.remote(False) for consumer in consumers])
    return time.perf_counter() - began


def main() -> None:
    """Measure, and print what was seen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=500_000, help="of the set")
    parser.add_argument("--preset", default="laptop", choices=PRESETS, help="size and batch")
    parser.add_argument("--speed", type=float, help="images/s that each worker takes at most")
    arguments = parser.parse_args()
    console = Console(width=110)
    config = PRESETS[arguments.preset]
    with tempfile.TemporaryDirectory(prefix="upreid-bench-") as name:
        ray.init(address="local", logging_level=logging.ERROR, log_to_driver=False)
        uri = repeated(Path(name), config, arguments.images)
        images = TrainingImages(ShardSet.open(uri), config)
        reader = Reader(images, Path(name, "blocks"))
        reader.counter.touch()
        memory = Memory()
        consumers = [
            Consumer.remote(images, rank, arguments.speed) for rank in range(NUM_WORKERS)
        ]
        seconds, waited = run_epoch(reader, consumers, memory, console)
        seen = np.concatenate(ray.get([consumer.seen.remote() for consumer in consumers]))
        ray.shutdown()
    console.print(memory.table())
    expected = images.steps_per_epoch * config.training.batch_size
    console.print(
        f"{len(seen)} images seen of {images.num_images}, {len(np.unique(seen))} different; "
        f"whole batches are {expected}\n"
        f"{len(seen) / seconds:.0f} images/s; each of {NUM_WORKERS} workers waited "
        f"{100 * waited / seconds:.1f}% of the time"
    )
    tags = environment()
    console.print(
        f"{datetime.now(UTC):%Y-%m-%d}, commit {tags['mlflow.source.git.commit'][:10]}, "
        f"{os.cpu_count()} cores, ray {tags['version.ray']}, preset {arguments.preset}"
    )


if __name__ == "__main__":
    main()
