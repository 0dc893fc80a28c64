"""Search for the same person: exact nearest neighbours among features on disk.

Dimensions: Q query images, N gallery images, F features, K neighbours of a query.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from upreid_ray.config.downstream import EmbedConfig
from upreid_ray.config.errors import InputError
from upreid_ray.core.cpu import for_cpu
from upreid_ray.core.reranking import reranked_distances
from upreid_ray.core.retrieval import extract_features
from upreid_ray.data.stream.decode import Columns
from upreid_ray.downstream.embed import backbone_digest
from upreid_ray.downstream.embed_images import NULL, SourceImages
from upreid_ray.downstream.feature_set import UNKNOWN, FeatureSet, Rows
from upreid_ray.train.initialization import Initialization, for_images, resolve

MAX_QUERIES = 1024  # that are compared with a file of the gallery at once
MAX_RERANKED = 100_000
NUM_IMAGES_A_BATCH = 64
MAX_PAIRS = 2**22


@dataclass(frozen=True)
class Queries:
    """The images that are searched for.

    Attributes:
        keys: Key or path of each image.
        features: ``[Q, F]``, float32, unit length.
        pids: ``[Q]``, persons; `UNKNOWN` where nobody knows.
        camids: ``[Q]``, cameras.
        images: Source of each image, and its place in the source.
    """

    keys: list[str]
    features: Tensor
    pids: Tensor
    camids: Tensor
    images: list[tuple[str, int]]

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Return the images of several sources together."""
        return cls(
            keys=[key for part in parts for key in part.keys],
            features=torch.cat([part.features for part in parts]),
            pids=torch.cat([part.pids for part in parts]),
            camids=torch.cat([part.camids for part in parts]),
            images=[image for part in parts for image in part.images],
        )


@dataclass(frozen=True)
class Hit:
    """A gallery image in the ranking of a query.

    Attributes:
        rank: Rank from 1 on; None for junk, which the protocol leaves out.
        key: Key of the image.
        distance: One minus the cosine similarity, 0..2; after re-ranking 0..1.
        pid: Person; None if unknown.
        camid: Camera; None if unknown.
        is_match: Whether it shows the person of the query; None if that is unknown.
        place: Place of the image in the source of the gallery.
    """

    rank: int | None
    key: str
    distance: float
    pid: int | None
    camid: int | None
    is_match: bool | None
    place: int

    @property
    def is_junk(self) -> bool:
        """Whether it shows the person of the query under the same camera."""
        return self.rank is None


@dataclass(frozen=True)
class Ranking:
    """The nearest gallery images of a query, the nearest first.

    Attributes:
        query: Key or path of the query image.
        image: Source of the query image, and its place in the source.
        hits: Gallery images.
    """

    query: str
    image: tuple[str, int]
    hits: tuple[Hit, ...]


@dataclass(frozen=True)
class Similarity:
    """The similarity of two images.

    Attributes:
        cosine: Cosine similarity of the features, -1..1.
        genuine_below: Share (0..1) of the genuine pairs of a labelled set that are less
            similar; None without such a set.
        impostor_above: Share of the impostor pairs that are at least as similar.
    """

    cosine: float
    genuine_below: float | None = None
    impostor_above: float | None = None


def search(gallery: FeatureSet, queries: Queries, *, top: int, rerank: bool) -> list[Ranking]:
    """Return the nearest gallery images of each query, up to ``top`` of them with a rank.

    If the gallery has images of the split ``gallery``, only these are searched. Images of the
    query's person under the query's camera are junk: they are shown, and have no rank. The
    k-reciprocal re-ranking needs all features in memory.

    Raises:
        InputError: The gallery is too large to be re-ranked.
    """
    split = "gallery" if "gallery" in gallery.splits() else None
    labels = gallery.labels(split)
    if rerank and len(labels.rows) > MAX_RERANKED:
        raise InputError(
            f"--rerank: {len(labels.rows):,} gallery images are too many; the limit is "
            f"{MAX_RERANKED:,}"
        )
    junk = _num_junk(queries, labels)
    num_kept = min(top + junk, len(labels.rows))
    if rerank:
        distances, places = _reranked(gallery, queries, labels, num_kept)
    else:
        distances, places = nearest(gallery, queries.features, labels.rows, num_kept)
    rows = labels.rows[places]
    shown = torch.unique(rows).tolist()
    found = dict(zip(shown, gallery.records(shown), strict=True))
    return [
        _ranking(queries, number, distances[number], rows[number], found, top)
        for number in range(len(queries.keys))
    ]


def nearest(
    gallery: FeatureSet, queries: Tensor, rows: Tensor, num_kept: int
) -> tuple[Tensor, Tensor]:
    """Return the nearest of some rows of a set for each query, exactly.

    One file of the gallery is in memory at a time.

    Args:
        gallery: Features to search.
        queries: ``[Q, F]``, float32, unit length.
        rows: ``[N]``, rows of the set to search, ascending.
        num_kept: Number of neighbours, K, at most N.

    Returns:
        ``[Q, K]``, cosine distances, ascending; ``[Q, K]``, places of the neighbours in
        ``rows``.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = torch.split(queries.to(device), MAX_QUERIES)
    best: list[tuple[Tensor, Tensor] | None] = [None] * len(parts)
    for start, block in gallery.blocks():
        first, last = torch.searchsorted(
            rows, torch.tensor([start, start + len(block)])
        ).tolist()
        if first == last:
            continue
        is_whole = last - first == len(block)
        searched = block if is_whole else block[rows[first:last] - start]
        features = searched.to(device).float()
        for number, part in enumerate(parts):
            similar, place = (part @ features.T).topk(min(num_kept, len(features)), dim=1)
            place += first
            before = best[number]
            if before is not None:
                # The sort is stable, so that equal images keep the order of the gallery.
                similar = torch.cat([before[0], similar], dim=1)
                place = torch.cat([before[1], place], dim=1)
                similar, order = similar.sort(dim=1, descending=True, stable=True)
                similar, place = similar[:, :num_kept], place.gather(1, order[:, :num_kept])
            best[number] = (similar, place)
    found = [each for each in best if each is not None]
    similar, place = (torch.cat(column).cpu() for column in zip(*found, strict=True))
    return 1 - similar, place


def _reranked(
    gallery: FeatureSet, queries: Queries, labels: Rows, num_kept: int
) -> tuple[Tensor, Tensor]:
    """Return what `nearest` does, by re-ranked distances."""
    features = gallery.features(labels.rows)
    distances, places = [], []
    for _, rows in reranked_distances(queries.features, features):
        ordered, order = rows.sort(dim=1, stable=True)
        distances.append(ordered[:, :num_kept])
        places.append(order[:, :num_kept])
    return torch.cat(distances), torch.cat(places)


def _num_junk(queries: Queries, gallery: Rows) -> int:
    """Return the largest number of junk images of a query."""
    seen = set(zip(queries.pids.tolist(), queries.camids.tolist(), strict=True))
    seen = {(pid, camid) for pid, camid in seen if UNKNOWN not in (pid, camid)}
    if not seen:
        return 0
    keys = gallery.pids * 2**31 + gallery.camids
    wanted = torch.tensor([pid * 2**31 + camid for pid, camid in sorted(seen)])
    _, counts = torch.unique(keys[torch.isin(keys, wanted)], return_counts=True)
    return int(counts.max()) if len(counts) else 0


def _ranking(
    queries: Queries,
    number: int,
    distances: Tensor,
    rows: Tensor,
    found: dict[int, dict[str, Any]],
    top: int,
) -> Ranking:
    pid, camid = int(queries.pids[number]), int(queries.camids[number])
    hits: list[Hit] = []
    rank = 0
    for distance, row in zip(distances.tolist(), rows.tolist(), strict=True):
        record = found[row]
        known = UNKNOWN not in (pid, record["pid"]) and record["pid"] is not None
        is_match = record["pid"] == pid if known else None
        is_junk = bool(is_match) and camid != UNKNOWN and record["camid"] == camid
        rank += not is_junk
        hits.append(
            Hit(
                None if is_junk else rank,
                record["key"],
                distance,
                record["pid"],
                record["camid"],
                is_match,
                record["place"],
            )
        )
        if rank == top:
            break
    return Ranking(queries.keys[number], queries.images[number], tuple(hits))


def queries_of_set(features: FeatureSet, gallery: FeatureSet) -> Queries:
    """Return the query images of a set of features; all images if it has no split ``query``.

    Raises:
        InputError: The features are of another backbone than those of the gallery.
    """
    mine, theirs = features.manifest, gallery.manifest
    if (mine.num_features, mine.backbone) != (theirs.num_features, theirs.backbone):
        raise InputError(
            f"--query {features.folder}: has features of {mine.init} ({mine.num_features} "
            f"numbers), but the gallery has those of {theirs.init} ({theirs.num_features} "
            "numbers); compute both with one backbone and the same settings"
        )
    split = "query" if "query" in features.splits() else None
    labels = features.labels(split)
    records = features.records(labels.rows.tolist())
    return Queries(
        keys=[record["key"] for record in records],
        features=features.features(labels.rows),
        pids=labels.pids,
        camids=labels.camids,
        images=[(mine.source, record["place"]) for record in records],
    )


class QueryEmbedder:
    """A backbone that computes the features of a few images in this process."""

    def __init__(self, init: Initialization, *, flip: bool, precision: str) -> None:
        self._images = init.description
        self._flip, self._precision = flip, precision
        extractor = init.extractor()
        self._extractor = extractor.cuda() if torch.cuda.is_available() else for_cpu(extractor)

    @classmethod
    def of(cls, features: FeatureSet) -> "QueryEmbedder":
        """Return an embedder that computes features as those of a set were computed.

        Raises:
            InputError: The backbone of the set is gone, or has changed since.
        """
        manifest = features.manifest
        config = EmbedConfig.parse(manifest.settings)
        init = for_images(resolve(manifest.init), config.images)
        if backbone_digest(init, config.tta) != manifest.backbone:
            raise InputError(
                f"{manifest.init}: is no longer the backbone of {features.folder}; compute the "
                "features of the gallery again"
            )
        return cls(init, flip=config.tta == "flip", precision=config.precision)

    def queries(self, places: Sequence[str]) -> Queries:
        """Return the features of image files, or of all images of sources.

        Raises:
            InputError: A file or source cannot be read, or an image does not decode.
        """
        return Queries.joined([self._queries(place) for place in places])

    def _queries(self, place: str) -> Queries:
        images = SourceImages.open(place)
        blocks = [
            self._block(images, start)
            for start in range(0, images.num_images, NUM_IMAGES_A_BATCH)
        ]
        columns = {name: np.concatenate([each[name] for each in blocks]) for name in blocks[0]}
        wrong = np.flatnonzero(columns["error"] != "")
        if len(wrong):
            key, error = (columns[name][wrong[0]] for name in ("key", "error"))
            more = f" ({len(wrong)} images cannot be used)" if len(wrong) > 1 else ""
            raise InputError(f"--query {place}: {key}: {error}{more}")
        pids, camids = (
            torch.from_numpy(np.where(columns[name] == NULL, UNKNOWN, columns[name]))
            for name in ("pid", "camid")
        )
        return Queries(
            keys=columns["key"].tolist(),
            features=torch.from_numpy(columns["features"]),
            pids=pids,
            camids=camids,
            images=[(place, each) for each in columns["place"].tolist()],
        )

    def _block(self, images: SourceImages, start: int) -> Columns:
        """Return what is known of a few images, and their features."""
        read = images.reader(self._images.height, self._images.width)
        block = read(images.block(start, start + NUM_IMAGES_A_BATCH))
        features = extract_features(
            self._extractor,
            [torch.from_numpy(block.pop("image"))],
            self._images.normalization,
            flip=self._flip,
            precision=self._precision,
        )
        return {**block, "features": features.cpu().numpy()}


def similarity(two: Queries, pairs: FeatureSet | None) -> Similarity:
    """Return the similarity of two images, and where it lies among those of a labelled set.

    Raises:
        InputError: The set has no two images of one person, or only one person.
    """
    cosine = float(two.features[0] @ two.features[1])
    if pairs is None:
        return Similarity(cosine)
    genuine, impostor = pair_similarities(pairs)
    return Similarity(
        cosine,
        genuine_below=float((genuine < cosine).double().mean()),
        impostor_above=float((impostor >= cosine).double().mean()),
    )


def pair_similarities(features: FeatureSet) -> tuple[Tensor, Tensor]:
    """Return the similarities of pairs of images of one person, and of two persons.

    Pairs of one person are under different cameras, where cameras are known. Up to
    `MAX_PAIRS` pairs of a large set are looked at, those of images that are evenly spaced.

    Raises:
        InputError: There are no such pairs.
    """
    labels = features.labels()
    known = labels.pids != UNKNOWN
    rows, pids, camids = (each[known] for each in (labels.rows, labels.pids, labels.camids))
    if len(rows) > MAX_PAIRS**0.5:
        # Images of a person lie together in no order, so that whole persons are taken.
        persons = torch.unique(pids)
        share = int(MAX_PAIRS**0.5 / len(rows) * len(persons)) or 1
        taken = torch.isin(pids, persons[torch.linspace(0, len(persons) - 1, share + 1).long()])
        rows, pids, camids = rows[taken], pids[taken], camids[taken]
    values = features.features(rows)
    similar = values @ values.T
    upper = torch.ones_like(similar, dtype=torch.bool).triu(1)
    same = pids == pids[:, None]
    other_camera = (camids != camids[:, None]) | (camids == UNKNOWN)
    genuine, impostor = similar[upper & same & other_camera], similar[upper & ~same]
    if not len(genuine) or not len(impostor):
        raise InputError(
            f"{features.folder}: has no pairs of images of one person and of two persons"
        )
    return genuine, impostor
