"""Images/s of computing features: `jobs/embed.py` and `jobs/evaluate.py` beside a plain loop.

All compute the features of the same synthetic people with the same weights on the same cores.

- ``loop``: a DataLoader over the image files, and the backbone in the process that reads it.
- ``evaluate``: what `jobs/evaluate.py` does, from shards, on a running Ray.
- ``embed``: what `jobs/embed.py` does, from the same shards, with files of features as result.

The speed of the last two is that after the first block, which waits for the actors to start;
the seconds are those of the whole call.

    python -m benchmarks.embed --repeats 3
"""

import argparse
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ray
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from benchmarks.data import Files
from benchmarks.step import provenance
from upreid_ray.config.downstream import EmbedConfig
from upreid_ray.config.presets import PRESETS
from upreid_ray.core.backbone import build_backbone
from upreid_ray.core.cpu import for_cpu
from upreid_ray.core.retrieval import extract_features
from upreid_ray.data.shards.images import ImageRules
from upreid_ray.data.shards.preparation import write_shards
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.data.sources.source import synthetic_records
from upreid_ray.data.stream.labelled import LabelledImages
from upreid_ray.downstream.embed import embed
from upreid_ray.downstream.evaluate import compute_features
from upreid_ray.downstream.feature_set import FeatureSet
from upreid_ray.train.initialization import Initialization, for_images, resolve

BATCH_SIZE = 256


def write_people(folder: Path, num_people: int) -> tuple[list[Path], ShardSet]:
    """Draw labelled people; return the files of all images, and the same as shards."""
    drawn = PRESETS["demo"].data.synthetic.override(
        {
            "num_unlabeled_identities": 0,
            "num_train_identities": 1,
            "num_test_identities": num_people,
            "height": 256,
            "width": 128,
        }
    )
    records = synthetic_records(drawn)
    shards = write_shards(
        records,
        str(folder / "shards"),
        source="synthetic",
        seed=0,
        rules=ImageRules(),
        on_progress=lambda _: None,
    )
    files = []
    (folder / "files").mkdir()
    for number, row in enumerate(track(records.table.to_pylist(), "drawing people")):
        files.append(folder / "files" / f"{number}.jpg")
        files[-1].write_bytes(records.read(row))
    return files, shards


def loop(files: list[Path], init: Initialization, num_cores: int) -> tuple[float, float]:
    """Compute features in a loop over a DataLoader; return images/s and seconds."""
    began = time.perf_counter()
    images = init.description
    config = PRESETS["demo"].override(
        {"data.height": images.height, "data.width": images.width}
    )
    extractor = for_cpu(init.extractor().eval().to(memory_format=torch.channels_last))
    loader = DataLoader(Files(files, config), batch_size=BATCH_SIZE, num_workers=num_cores)
    started, num_images = began, 0
    for number, batch in enumerate(loader):
        extract_features(extractor, [batch], images.normalization)
        if number == 0:
            started = time.perf_counter()
        else:
            num_images += len(batch)
    ended = time.perf_counter()
    return num_images / (ended - started), ended - began


def evaluated(
    shards: ShardSet, init: Initialization, config: EmbedConfig
) -> tuple[float, float]:
    """Compute features as `evaluate` does; return images/s and seconds."""
    began = time.perf_counter()
    size = {"height": init.description.height, "width": init.description.width}
    images = LabelledImages(shards, **size)
    found = compute_features(images, init, config.scaling, max_undecodable=0)
    return found.images_per_second, time.perf_counter() - began


def embedded(shards: str, init: str, out: Path, config: EmbedConfig) -> tuple[float, float]:
    """Compute features as `embed` does; return images/s and seconds."""
    began = time.perf_counter()
    found = embed(init, shards, str(out), config)
    seconds = time.perf_counter() - began
    if FeatureSet.open(str(out)).manifest.num_images != found.num_images:
        raise RuntimeError("The set of features is not whole")
    shutil.rmtree(out)
    return found.images_per_second, seconds


def spread(values: list[float]) -> str:
    """Return the median and the range of some values."""
    return f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})"


def main() -> None:
    """Measure, and print a table of medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind")
    parser.add_argument("--people", type=int, default=300, help="synthetic people")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=64)
    arguments = parser.parse_args()
    num_cores = len(os.sched_getaffinity(0))
    config = EmbedConfig().override(
        {
            "images.height": arguments.height,
            "images.width": arguments.width,
            # Decoding needs a core beside that of the actor.
            "scaling.cpus_per_worker": max(1, num_cores - 1),
        }
    )
    console = Console(width=110)
    with tempfile.TemporaryDirectory(prefix="upreid-bench-") as name:
        folder = Path(name)
        ray.init(address="local", logging_level=logging.ERROR, log_to_driver=False)
        files, shards = write_people(folder, arguments.people)
        weights = build_backbone(arguments.backbone).state_dict()
        save_file(weights, folder / "weights.safetensors")
        init = for_images(resolve(str(folder / "weights.safetensors")), config.images)
        kinds: dict[str, Callable[[], tuple[float, float]]] = {
            "loop": lambda: loop(files, init, num_cores),
            "evaluate": lambda: evaluated(shards, init, config),
            "embed": lambda: embedded(shards.uri, init.uri, folder / "out", config),
        }
        results: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        for _ in range(arguments.repeats):
            for kind, measure in kinds.items():  # alternating: a slow minute hits all
                results[kind].append(measure())
                console.print(kind, results[kind][-1])
        ray.shutdown()
    table = Table("", "images/s", "of loop", "seconds")
    plain = np.median([speed for speed, _ in results["loop"]])
    for kind, measured in results.items():
        speeds, seconds = (list(each) for each in zip(*measured, strict=True))
        table.add_row(kind, spread(speeds), f"{np.median(speeds) / plain:.2f}", spread(seconds))
    console.print(table)
    console.print(
        f"{len(files)} images of 256x128 pixels, {arguments.backbone} at "
        f"{arguments.height}x{arguments.width}, {arguments.repeats} runs of each: median "
        f"(least-most); {provenance(torch.device('cpu'))}, ray {ray.__version__}"
    )


if __name__ == "__main__":
    main()
