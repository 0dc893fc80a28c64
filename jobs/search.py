"""Find the images that show the same person.

The gallery is a folder that embed wrote. A query is an image file, a folder or any source that
prepare reads, or features that embed wrote with the same backbone; of a labelled set, the
query images are searched for among the gallery images. Without a gallery, two image files give
their similarity.

The page shows each query with its nearest images; where persons are known, the right ones are
framed in green and the wrong ones in red. --out has one line of JSON for each query.

Examples:
  python jobs/search.py --gallery features --query one.jpg other.jpg --html page.html
  python jobs/search.py --gallery features --query features --top 20 --rerank --out hits.jsonl
  python jobs/search.py --query one.jpg other.jpg --init models:/upreid-resnet50@champion
  python jobs/search.py --query one.jpg other.jpg --pairs features
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from upreid_ray.command_line import JobParser, at_least, existing_init, path_or_uri, run_job
from upreid_ray.config.errors import InputError, first_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from upreid_ray.downstream.search import Ranking

NUM_IN_TABLE = 20
NUM_IN_RESULT = 100
NUM_OF_A_PAIR = 2


def main() -> dict[str, Any]:
    """Run the job; return the content of its JSON line."""
    arguments = _parser().parse(sys.argv[1:])
    if arguments.gallery is None:
        return _compare_two(arguments)
    for flag in ("init", "pairs"):
        if getattr(arguments, flag) is not None:
            raise InputError(
                f"--{flag}: only without --gallery, for the similarity of two files"
            )
    return _search(arguments)


def _parser() -> JobParser:
    parser = JobParser(
        __doc__,
        "--gallery DIR --query FILE|SOURCE|DIR [...] [--FLAG VALUE ...]\n"
        "       %(prog)s --query FILE FILE [--init INIT] [--pairs DIR]",
    )
    add = parser.add_argument
    add("--gallery", type=path_or_uri, metavar="DIR", help="features to search")
    add(
        "--query",
        required=True,
        nargs="+",
        type=path_or_uri,
        metavar="PLACE",
        help="images to search for: image files, sources of images, or features",
    )
    add("--top", type=at_least(1), default=10, help="images of each query (default: 10)")
    add(
        "--rerank",
        action="store_true",
        help="sort by k-reciprocal re-ranking, for up to 100,000 gallery images",
    )
    add("--html", type=path_or_uri, metavar="FILE", help="page of ranked pictures to write")
    add("--out", type=path_or_uri, metavar="FILE", help="file of JSON lines to write")
    add("--init", type=existing_init, help="backbone for the similarity of two image files")
    add(
        "--pairs",
        type=path_or_uri,
        metavar="DIR",
        help="features of labelled images, among whose pairs two files are placed",
    )
    return parser


def _search(arguments: argparse.Namespace) -> dict[str, Any]:
    for flag, file in (("--out", arguments.out), ("--html", arguments.html)):
        if file is not None and Path(file).is_dir():
            raise InputError(f"{flag} {file}: is a folder; name a file in it")
    # Imported late: it takes seconds, which a mistake or --help should not cost.
    from upreid_ray.downstream import search
    from upreid_ray.downstream.feature_set import FeatureSet
    from upreid_ray.downstream.ranking_page import search_page

    gallery = FeatureSet.open(arguments.gallery)
    of_sets = [place for place in arguments.query if FeatureSet.exists(place)]
    of_images = [place for place in arguments.query if place not in of_sets]
    parts = [search.queries_of_set(FeatureSet.open(place), gallery) for place in of_sets]
    if of_images:
        parts.append(search.QueryEmbedder.of(gallery).queries(of_images))
    rankings = search.search(
        gallery, search.Queries.joined(parts), top=arguments.top, rerank=arguments.rerank
    )
    Console(stderr=True).print(_table(rankings))
    lines = [_line(ranking) for ranking in rankings]
    if arguments.out is not None:
        _write("--out", arguments.out, "".join(json.dumps(line) + "\n" for line in lines))
    if arguments.html is not None:
        _write("--html", arguments.html, search_page(rankings, gallery.manifest.source))
    return {
        "init": gallery.manifest.init,
        "gallery": arguments.gallery,
        "result_dir": arguments.gallery,
        "num_queries": len(rankings),
        "out": arguments.out,
        "html": arguments.html,
        "results": lines[:NUM_IN_RESULT],
    }


def _compare_two(arguments: argparse.Namespace) -> dict[str, Any]:
    if len(arguments.query) != NUM_OF_A_PAIR:
        raise InputError("--gallery: required, except for the similarity of two image files")
    if (arguments.init is None) == (arguments.pairs is None):
        raise InputError("--init: give either a backbone or, with --pairs, labelled features")
    from upreid_ray.downstream import search
    from upreid_ray.downstream.feature_set import FeatureSet
    from upreid_ray.train.initialization import resolve

    pairs = None
    if arguments.pairs is not None:
        pairs = FeatureSet.open(arguments.pairs)
        embedder = search.QueryEmbedder.of(pairs)
    else:
        embedder = search.QueryEmbedder(resolve(arguments.init), flip=False, precision="auto")
    two = embedder.queries(arguments.query)
    if len(two.keys) != NUM_OF_A_PAIR:
        raise InputError("--query: give two image files, or a --gallery to search")
    found = search.similarity(two, pairs)
    console = Console(stderr=True)
    console.print(f"cosine similarity {found.cosine:.3f} (-1..1)")
    if found.genuine_below is not None and found.impostor_above is not None:
        console.print(
            f"{100 * found.genuine_below:.1f} % of the pairs of one person are less similar; "
            f"{100 * found.impostor_above:.2f} % of the pairs of two persons are at least that"
        )
    return {"query": arguments.query, **asdict(found)}


def _table(rankings: "Sequence[Ranking]") -> Table:
    """Return a table of the nearest images of the first queries."""
    table = Table()
    for name in ("query", "rank", "distance", "gallery image", "same person"):
        table.add_column(name, overflow="fold")
    for ranking in rankings[:NUM_IN_TABLE]:
        for number, hit in enumerate(ranking.hits):
            table.add_row(
                ranking.query if number == 0 else "",
                "junk" if hit.rank is None else str(hit.rank),
                f"{hit.distance:.4f}",
                hit.key,
                "?" if hit.is_match is None else "yes" if hit.is_match else "no",
            )
    if len(rankings) > NUM_IN_TABLE:
        table.caption = f"{len(rankings) - NUM_IN_TABLE} more queries: see --out and --html"
    return table


def _line(ranking: "Ranking") -> dict[str, Any]:
    names = ("rank", "key", "distance", "pid", "camid", "is_match")
    hits = [{name: getattr(hit, name) for name in names} for hit in ranking.hits]
    return {"query": ranking.query, "hits": hits}


def _write(flag: str, file: str, text: str) -> None:
    """Write a file whole; refuse one that cannot be written."""
    from upreid_ray.storage import Location

    try:
        if "://" not in file:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
        Location(file).write_whole(text.encode())
    except OSError as error:
        raise InputError(f"{flag} {file}: cannot be written ({first_line(error)})") from error


if __name__ == "__main__":
    run_job(main)
