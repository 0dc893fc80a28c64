"""Images/s through to a ready batch: this package's stream beside torch's DataLoader.

All of them deliver the same synthetic people, decoded and resized, as uint8 batches, with the
same cores. The time to the first batch is apart: the speed is that of all later ones.

- ``decode``: the decoding alone, in as many processes as cores, without delivering anything.
- ``folder``: a DataLoader over the image files, an image at a time.
- ``shards``: a DataLoader over the same blocks of the same shards as the stream.
- ``stream``: the stream, on a running Ray.

    python benchmarks/data.py --repeats 3
"""

import argparse
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from upreid_ray.config.presets import PRESETS
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.config.run import SyntheticConfig
from upreid_ray.data.shards.images import ImageRules
from upreid_ray.data.shards.manifest import Manifest, Shard
from upreid_ray.data.shards.preparation import write_shards
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.data.sources.layouts import folder_records
from upreid_ray.data.sources.source import synthetic_records
from upreid_ray.data.stream.decode import Columns, decode_images
from upreid_ray.data.stream.ray_data import read_stream, stream_blocks
from upreid_ray.data.stream.training import Block, TrainingImages
from upreid_ray.storage import Location
from upreid_ray.tracking.runs import environment

KINDS = ("decode", "folder", "shards", "stream")


class Files(Dataset[NDArray[np.uint8]]):
    """Images that are files."""

    def __init__(self, files: list[Path], config: PretrainConfig) -> None:
        self._files = files
        self._size = (config.data.height, config.data.width)

    def __len__(self) -> int:
        """Count the images."""
        return len(self._files)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        """Read and decode one image."""
        encoded = pa.chunked_array([[self._files[index].read_bytes()]])
        return decode_images(encoded, *self._size)["image"][0]


class Blocks(Dataset[Columns]):
    """Blocks of shards."""

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


def measure(batches: Callable[[], Iterator[NDArray[np.uint8]]]) -> tuple[float, float]:
    """Return the seconds to the first batch, and images/s after it."""
    began = time.perf_counter()
    each = batches()
    next(each)
    first = time.perf_counter() - began
    began = time.perf_counter()
    num_images = sum(len(batch) for batch in each)
    return first, num_images / (time.perf_counter() - began)


def decoding(files: list[Path], config: PretrainConfig, num_cores: int) -> tuple[float, float]:
    """Return the seconds of the first process to begin, and images/s of decoding alone."""
    context = multiprocessing.get_context("fork")
    with context.Pool(num_cores) as pool:
        work = partial(_decode_files, config=config)
        parts = [files[rank::num_cores] for rank in range(num_cores)]
        pool.map(work, [part[:32] for part in parts])
        began = time.perf_counter()
        pool.map(work, parts, chunksize=1)
        return 0.0, len(files) / (time.perf_counter() - began)


def _decode_files(files: list[Path], config: PretrainConfig) -> None:
    for start in range(0, len(files), 256):
        encoded = [file.read_bytes() for file in files[start : start + 256]]
        decode_images(pa.chunked_array([encoded]), config.data.height, config.data.width)


def from_folder(
    files: list[Path], config: PretrainConfig, num_cores: int
) -> Iterator[NDArray[np.uint8]]:
    """Yield batches of a DataLoader over files in a random order."""
    order = np.random.default_rng(0).permutation(len(files))
    loader = DataLoader(
        Files([files[i] for i in order], config),
        batch_size=config.training.batch_size,
        num_workers=num_cores,
        drop_last=True,
    )
    yield from loader


def from_shards(
    images: TrainingImages, num_steps: int, num_cores: int
) -> Iterator[NDArray[np.uint8]]:
    """Yield batches of a DataLoader over blocks of shards."""
    rounds = list(images.rounds(0, num_steps))
    blocks = [block for each in rounds for block in each.blocks]
    loader = DataLoader(
        Blocks(images, blocks), batch_size=None, num_workers=num_cores, collate_fn=_keep
    )
    for columns in islice(images.batches(rounds, iter(loader)), num_steps):
        yield columns["image"]


def from_stream(images: TrainingImages, num_steps: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the batches of this package."""
    rounds = list(images.rounds(0, num_steps))
    (iterator,) = stream_blocks(images.read, [each.by_worker(1) for each in rounds])
    decoded = read_stream(iterator, rank=0, num_workers=1)
    for columns in islice(images.batches(rounds, decoded), num_steps):
        yield columns["image"]


def companions(config: PretrainConfig, num_images: int) -> tuple[float, float]:
    """Compare the order of two epochs with uniform ones.

    Returns:
        Of the images that share a step with an image, how many do so in the next epoch again;
        and how many would if the orders were uniform.
    """
    shards = tuple(
        Shard(name=f"{n}", split="unlabeled", num_images=12_800, num_bytes=0, sha256="")
        for n in range(num_images // 12_800)
    )
    manifest = Manifest(version=2, source="", made_from="", row_group_images=64, shards=shards)
    images = TrainingImages(ShardSet(Location("/"), manifest), config)
    steps = [np.full(images.num_images, -1) for _ in range(2)]
    size = config.training.group_size
    for epoch, step_of in enumerate(steps):
        first = epoch * images.steps_per_epoch
        for each in images.rounds(first, first + images.steps_per_epoch):
            for block in each.blocks:
                ranges, order = images.rows(block)
                rows = np.concatenate(
                    [
                        r.shard * 12_800 + r.row_group * 64 + np.arange(r.start, r.stop)
                        for r in ranges
                    ]
                )[order]
                step_of[rows] = each.first_step + np.arange(len(rows)) // size
    both = (steps[0] >= 0) & (steps[1] >= 0)
    _, together = np.unique(np.stack(steps)[:, both], axis=1, return_counts=True)
    again = float((together * (together - 1)).sum() / both.sum())
    others = config.training.batch_size - 1
    return again, others * others / (images.num_images - 1)


def _arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the images")
    parser.add_argument("--people", type=int, default=300, help="synthetic people")
    parser.add_argument("--preset", default="laptop", choices=PRESETS, help="size and batch")
    parser.add_argument("--image-height", type=int, default=256, help="of the encoded images")
    return parser.parse_args()


def main() -> None:
    """Measure, and print a table of medians."""
    arguments = _arguments()
    console = Console(width=110)
    num_cores = len(os.sched_getaffinity(0))
    config = PRESETS[arguments.preset]
    drawn = config.data.synthetic.override(
        {
            "num_unlabeled_identities": arguments.people,
            "height": arguments.image_height,
            "width": arguments.image_height // 2,
        }
    )
    with tempfile.TemporaryDirectory(prefix="upreid-bench-") as name:
        ray.init(address="local", logging_level=logging.ERROR, log_to_driver=False)
        files, shards = _write(drawn, Path(name), console)
        num_images = len(files)
        files *= arguments.epochs
        images = TrainingImages(shards, config)
        num_steps = images.steps_per_epoch * arguments.epochs
        kinds: dict[str, Callable[[], tuple[float, float]]] = {
            "decode": partial(decoding, files, config, num_cores),
            "folder": lambda: measure(partial(from_folder, files, config, num_cores)),
            "shards": lambda: measure(partial(from_shards, images, num_steps, num_cores)),
            "stream": lambda: measure(partial(from_stream, images, num_steps)),
        }
        results: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
        for _ in range(arguments.repeats):
            for kind in KINDS:  # alternating, so that a slow minute hits all
                results[kind].append(kinds[kind]())
                console.print(kind, results[kind][-1])
        ray.shutdown()
    table = Table("", "images/s", "of decode", "first batch, s")
    speeds = {kind: [speed for _, speed in results[kind]] for kind in KINDS}
    limit = statistics.median(speeds["decode"])
    for kind in KINDS:
        firsts = [first for first, _ in results[kind]]
        table.add_row(
            kind,
            _spread(speeds[kind], 0),
            f"{statistics.median(speeds[kind]) / limit:.2f}",
            _spread(firsts, 2) if kind != "decode" else "",
        )
    console.print(table)
    again, uniform = companions(PRESETS["luperson"], 1_024_000)
    console.print(
        f"order of the preset luperson, a million images: of the 2559 images that share a step "
        f"with one, {again:.1f} do so again in the next epoch; in uniform orders {uniform:.1f}"
    )
    tags = environment()
    console.print(
        f"{datetime.now(UTC):%Y-%m-%d}, commit {tags['mlflow.source.git.commit'][:10]}, "
        f"{num_cores} cores, torch {tags['version.torch']}, ray {tags['version.ray']}, preset "
        f"{arguments.preset}, {arguments.epochs} epochs of {num_images} images of "
        f"{arguments.image_height}x{arguments.image_height // 2} pixels, "
        f"{arguments.repeats} runs of each kind: median (least-most)"
    )


def _spread(values: list[float], digits: int) -> str:
    median, least, most = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({least:.{digits}f}-{most:.{digits}f})"


def _write(
    drawn: SyntheticConfig, folder: Path, console: Console
) -> tuple[list[Path], ShardSet]:
    """Write the unlabeled people as files, and these as shards."""
    records = synthetic_records(drawn)
    unlabeled = pc.equal(records.table.column("split"), "unlabeled")
    files = []
    for row in track(records.table.filter(unlabeled).to_pylist(), "drawing", console=console):
        file = folder / "files" / f"{row['key']}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(records.read(row))
        files.append(file)
    shards = write_shards(
        folder_records(str(folder / "files")),
        str(folder / "shards"),
        source="synthetic",
        seed=0,
        rules=ImageRules(),
        on_progress=lambda _: None,
    )
    return files, shards


if __name__ == "__main__":
    main()
