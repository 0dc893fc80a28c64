"""Pages of ranked pictures: the results of a search, and of an evaluation.

Dimensions: N images, Q query images, G gallery images, F features, K images of a ranking.
"""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from upreid_ray.core.retrieval import row_parts
from upreid_ray.data.shards.page import thumbnail
from upreid_ray.downstream.embed_images import SourceImages
from upreid_ray.downstream.search import Hit, Ranking
from upreid_ray.page import Mark, PageSection, png, render_page

MAX_SHOWN_QUERIES = 200
LEGEND = (
    "The query is framed in blue. Green: the same person; red: another one; no frame: unknown. "
    "Pale: the same person under the same camera, which the protocol leaves out."
)


def search_page(rankings: Sequence[Ranking], gallery: str) -> str:
    """Return a page with the nearest images of each query.

    Args:
        rankings: Rankings; the first `MAX_SHOWN_QUERIES` are shown.
        gallery: Source of the gallery images.

    Raises:
        InputError: A source cannot be read any more.
    """
    sources: dict[str, SourceImages] = {}

    def read(source: str, place: int) -> bytes | None:
        if source not in sources:
            sources[source] = SourceImages.open(source)
        return sources[source].encoded(place)

    sections = [PageSection(text=f"Queries in {gallery}: {len(rankings)}. {LEGEND}")]
    for ranking in rankings[:MAX_SHOWN_QUERIES]:
        figures = [thumbnail(read(*ranking.image), ranking.query, "asked")]
        figures += [
            thumbnail(read(gallery, hit.place), _caption(hit), _mark(hit))
            for hit in ranking.hits
        ]
        sections.append(PageSection(ranking.query, thumbnails=figures))
    return render_page("Ranked pictures", sections)


def _caption(hit: Hit) -> str:
    rank = "junk" if hit.rank is None else f"#{hit.rank}"
    return f"{rank}, distance {hit.distance:.4f}: {hit.key}"


def _mark(hit: Hit) -> Mark:
    if hit.is_junk:
        return "junk"
    if hit.is_match is None:
        return ""
    return "right" if hit.is_match else "wrong"


def curve_of_ranks(cmc: Tensor) -> bytes:
    """Return the CMC curve as a PNG picture."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(1, len(cmc) + 1), 100 * cmc)
    axes.set(xlabel="rank", ylabel="queries with a match, %", xlim=(1, len(cmc)))
    axes.set_ylim(top=100)
    return png(figure)


def histogram_of_pairs(genuine: Tensor, impostor: Tensor) -> bytes:
    """Return the distances of genuine and impostor pairs as a PNG picture.

    Args:
        genuine: Number of pairs in each of equal bins of the distances 0..2.
        impostor: The same of pairs of two persons.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    edges = torch.linspace(0, 2, len(genuine) + 1)
    for counts, label in ((genuine, "one person"), (impostor, "two persons")):
        axes.stairs(
            100 * counts / counts.sum().clamp(min=1), edges, label=label, fill=True, alpha=0.5
        )
    axes.set(xlabel="cosine distance of query and gallery image", ylabel="pairs, %")
    axes.legend()
    return png(figure)


def pair_histograms(
    features: Tensor, pids: Tensor, camids: Tensor, is_query: Tensor, *, num_bins: int = 100
) -> tuple[Tensor, Tensor]:
    """Count the genuine and impostor pairs of query and gallery images by distance.

    Args:
        features: ``[N, F]``, unit length.
        pids: ``[N]``, persons; -1 marks junk.
        camids: ``[N]``, cameras.
        is_query: ``[N]``, bool.
        num_bins: Number of equal bins of the distances 0..2.

    Returns:
        The number of genuine and of impostor pairs in each bin.
    """
    gallery = ~is_query
    counts = [torch.zeros(num_bins), torch.zeros(num_bins)]
    query = is_query.nonzero()[:, 0]
    known = pids[gallery] != -1
    for part in row_parts(len(query), int(gallery.sum())):
        rows = query[part]
        distances = 1 - features[rows] @ features[gallery].T
        same = pids[rows, None] == pids[gallery]
        junk = same & (camids[rows, None] == camids[gallery])
        for number, chosen in enumerate((same & ~junk & known, ~same & known)):
            counts[number] += torch.histc(distances[chosen], num_bins, 0, 2)
    return counts[0], counts[1]
