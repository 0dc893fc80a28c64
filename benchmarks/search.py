"""What a search among millions of images costs: seconds and memory.

The features are random, and lie in Parquet files as `jobs/embed.py` writes them. They are made
once; a later call with the same numbers searches the same files. The search runs in a process
of its own. Its peak memory has two parts: what the process itself holds, and the pages of the
mapped files, which the system drops when it needs the memory.

    python -m benchmarks.search --num_images 10000000 --num_features 512 --out features
"""

import argparse
import multiprocessing
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.retrieval import peak_gib
from benchmarks.step import provenance
from upreid_ray.config.downstream import EmbedConfig
from upreid_ray.downstream.feature_set import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    FeatureManifest,
    FeatureSet,
    Part,
    write_part,
)
from upreid_ray.downstream.search import Queries, search
from upreid_ray.storage import Location

PART_IMAGES = 2**13
TOP = 10


def write_features(out: str, num_images: int, num_features: int) -> None:
    """Write random features, float16, if they are not there yet."""
    plan = f"random {num_images} {num_features}"
    if FeatureSet.exists(out) and FeatureSet.open(out).manifest.plan == plan:
        return
    folder = Location(out)
    folder.make_folder()
    random = np.random.default_rng(0)
    parts = []
    for start in track(range(0, num_images, PART_IMAGES), "writing features"):
        number = min(PART_IMAGES, num_images - start)
        feature = random.standard_normal((number, num_features), np.float32)
        feature /= np.linalg.norm(feature, axis=1, keepdims=True)
        place = np.arange(start, start + number)
        table = pa.table(
            {
                "key": pa.array([f"image-{each:09}.jpg" for each in place], pa.string()),
                "pid": pa.array(place // 20, pa.int32()),
                "camid": pa.array(place % 8, pa.int32()),
                "split": pa.array(["gallery"] * number, pa.string()),
                "feature": pa.FixedSizeListArray.from_arrays(
                    pa.array(feature.astype(np.float16).ravel()), num_features
                ),
                "place": pa.array(place, pa.int64()),
            }
        )
        name = f"features-{start // PART_IMAGES:05}.parquet"
        write_part(folder / name, table, plan, [])
        parts.append(Part(name=name, num_images=number))
    manifest = FeatureManifest(
        version=FORMAT_VERSION,
        plan=plan,
        init="random",
        backbone="random",
        num_features=num_features,
        source="random",
        num_refused=0,
        parts=tuple(parts),
        settings=EmbedConfig().model_dump(mode="json"),
    )
    (folder / MANIFEST_FILE).write_whole(manifest.model_dump_json().encode())


def own_gib() -> float:
    """Return the memory of this process without the pages of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**20


def measure(out: str, num_queries: int) -> tuple[float, float, float, float]:
    """Search; return seconds, processor seconds, peak of own memory and of all, in GiB."""
    gallery = FeatureSet.open(out)
    features = torch.randn(num_queries, gallery.manifest.num_features)
    unknown = torch.full((num_queries,), -1)
    queries = Queries(
        keys=[f"query-{number}" for number in range(num_queries)],
        features=F.normalize(features, dim=1),
        pids=unknown,
        camids=unknown,
        images=[("random", number) for number in range(num_queries)],
    )
    peaks, ended = [own_gib()], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            peaks.append(own_gib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, used = time.perf_counter(), time.process_time()
    rankings = search(gallery, queries, top=TOP, rerank=False)
    seconds, processor = time.perf_counter() - began, time.process_time() - used
    ended.set()
    watcher.join()
    if any(len(ranking.hits) != TOP for ranking in rankings):
        raise RuntimeError("A query has too few neighbours")
    return seconds, processor, max(peaks), peak_gib()


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_images", type=int, default=10_000_000)
    parser.add_argument("--num_features", type=int, default=512)
    parser.add_argument("--num_queries", type=int, nargs="+", default=[1, 100, 1000])
    parser.add_argument("--out", required=True, help="folder for the features")
    args = parser.parse_args()
    write_features(args.out, args.num_images, args.num_features)
    table = Table("queries", "seconds", "processor s", "own GiB", "with mapped files, GiB")
    context = multiprocessing.get_context("spawn")
    for num_queries in args.num_queries:
        with context.Pool(1) as pool:
            measured = pool.apply(measure, (args.out, num_queries))
        seconds, processor, own, peak = measured
        table.add_row(
            f"{num_queries:,}",
            f"{seconds:.1f}",
            f"{processor:.1f}",
            f"{own:.2f}",
            f"{peak:.2f}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"{args.num_images:,} images, {args.num_features} features each (float16); "
        f"{provenance(torch.device('cpu'))}"
    )


if __name__ == "__main__":
    main()
