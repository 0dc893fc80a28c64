"""What scoring costs: seconds and memory for sets of the size of Market-1501 and MSMT17.

Features are random, 2048 of each image. Each row is scored in a process of its own, whose peak
memory is given beside what it has with the features alone.

    python benchmarks/retrieval.py
"""

import argparse
import multiprocessing
import os
import resource
import time
from datetime import UTC, datetime

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from upreid_ray.core.reranking import reranked_distances
from upreid_ray.core.retrieval import Labels, cosine_distances, score_rows
from upreid_ray.tracking.runs import environment

NUM_FEATURES = 2048
# Query images, gallery images, persons, cameras.
SETS = {"Market-1501": (3_368, 15_913, 750, 6), "MSMT17": (11_659, 82_161, 3_060, 15)}
ROWS = (("Market-1501", False), ("Market-1501", True), ("MSMT17", False))


def peak_gib() -> float:
    """Return the greatest memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def score(name: str, *, rerank: bool) -> tuple[float, float, float]:
    """Score random features; return seconds, peak memory and that of before, in GiB."""
    num_query, num_gallery, num_persons, num_cameras = SETS[name]
    generator = torch.Generator().manual_seed(0)

    def labels(number: int) -> Labels:
        return Labels(
            torch.randint(num_persons, (number,), generator=generator),
            torch.randint(num_cameras, (number,), generator=generator),
        )

    def features(number: int) -> torch.Tensor:
        return F.normalize(torch.randn(number, NUM_FEATURES, generator=generator), dim=1)

    query, gallery = features(num_query), features(num_gallery)
    of_query, of_gallery = labels(num_query), labels(num_gallery)
    before = peak_gib()
    started = time.perf_counter()
    distances = reranked_distances if rerank else cosine_distances
    score_rows(distances(query, gallery), of_query, of_gallery)
    return time.perf_counter() - started, peak_gib(), before


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    sets = parser.parse_args().sets
    console = Console(width=110)
    table = Table(
        "size of", "query x gallery", "re-ranked", "seconds", "peak GiB", "features GiB"
    )
    context = multiprocessing.get_context("spawn")
    for name, rerank in (row for row in ROWS if row[0] in sets):
        with context.Pool(1) as pool:
            seconds, peak, before = pool.apply(score, (name,), {"rerank": rerank})
        num_query, num_gallery = SETS[name][:2]
        cells = f"{seconds:.1f}", f"{peak:.2f}", f"{before:.2f}"
        sizes = f"{num_query:,} x {num_gallery:,}"
        table.add_row(name, sizes, "yes" if rerank else "no", *cells)
        console.print(name, rerank, *cells)
    console.print(table)
    tags = environment()
    console.print(
        f"{datetime.now(UTC):%Y-%m-%d}, commit {tags['mlflow.source.git.commit'][:10]}, "
        f"{os.cpu_count()} cores ({torch.backends.cpu.get_cpu_capability()}), "
        f"torch {tags['version.torch']}, one run a row"
    )


if __name__ == "__main__":
    main()
