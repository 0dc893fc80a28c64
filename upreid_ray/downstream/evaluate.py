"""Retrieval with a frozen backbone: Ray Data computes features, `core.retrieval` ranks.

Dimensions: N images, Q query images, G gallery images, F features.
"""

import json
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import ray.data
import torch
from torch import Tensor

from upreid_ray.config.downstream import EvaluateConfig
from upreid_ray.config.run import ScalingConfig
from upreid_ray.core.reranking import reranked_distances
from upreid_ray.core.retrieval import (
    DistanceRows,
    RetrievalScores,
    cosine_distances,
    score_features,
)
from upreid_ray.data.shards.manifest import EVALUATION_SPLITS
from upreid_ray.data.shards.page import thumbnail
from upreid_ray.data.shards.progress import image_progress
from upreid_ray.data.shards.requested import labelled_shards
from upreid_ray.data.stream.damage import without_undecodable
from upreid_ray.data.stream.decode import Columns
from upreid_ray.data.stream.labelled import LabelledImages
from upreid_ray.downstream.extractor import extract_blocks
from upreid_ray.downstream.ranking_page import (
    LEGEND,
    curve_of_ranks,
    histogram_of_pairs,
    pair_histograms,
)
from upreid_ray.page import Mark, PageFigure, PageSection, render_page
from upreid_ray.tracking import connection, runs
from upreid_ray.train.folder import RunFolder
from upreid_ray.train.initialization import Initialization, requested

SCORES_FILE = "scores.json"
PAGE_FILE = "rankings.html"
NUM_SHOWN_QUERIES = 10
NUM_SHOWN_RANKS = 10


@dataclass(frozen=True)
class EvaluateResult:
    """Result of an evaluation.

    Attributes:
        run_id: ID of the MLflow run.
        init: Initialization that was scored; a version in place of an alias.
        scores: Scores, 0..1 by name; names of scores after re-ranking end in ``_reranked``.
        num_queries_without_match: Query images that the scores leave out, because the gallery
            does not show their person under another camera.
        num_undecodable: Images that the scores leave out, because they do not decode.
        images_per_second: Speed of computing the features.
        result_dir: Folder of the run, with ``scores.json``.
    """

    run_id: str
    init: str
    scores: dict[str, float]
    num_queries_without_match: int
    num_undecodable: int
    images_per_second: float
    result_dir: str


def evaluate(config: EvaluateConfig, *, parent_run_id: str | None = None) -> EvaluateResult:
    """Score a frozen backbone on the connected Ray cluster.

    The MLflow run is nested in that of ``parent_run_id`` if it is given.

    Raises:
        InputError: A setting cannot be used; nothing was started.
        RunFailed: Too many images do not decode.
    """
    client = connection.connect()
    init = requested(config)
    folder = RunFolder.of(config.run, f"evaluate-{init.description.backbone}")
    if parent_run_id is None:  # a comparison repeats what was interrupted
        folder.require_new()
    shards = labelled_shards(
        config.data, folder.storage, scored=True, ignore_cameras=config.ignore_cameras
    )
    shards.check_labels(ignore_cameras=config.ignore_cameras)
    size = {"height": init.description.height, "width": init.description.width}
    images = LabelledImages(shards, **size)

    run_id = _begin(client, config, folder, parent_run_id)
    with runs.running(client, run_id):
        features = compute_features(
            images, init, config.scaling, max_undecodable=config.data.max_undecodable
        )
        if config.ignore_cameras:
            # No query image is by the camera of a gallery image then.
            features = replace(features, camids=features.is_query.long())
        found, scores = _score(features, rerank=config.rerank)
        counts = {
            "num_queries_without_match": found.num_queries_without_match,
            "num_undecodable": features.num_undecodable,
        }
        metrics = {f"eval/{name}": value for name, value in (scores | counts).items()}
        runs.log_metrics(client, run_id, metrics)
        lineage = {
            "init": init.uri,
            "shards": shards.uri,
            "evaluation": shards.manifest.digest(EVALUATION_SPLITS),
        }
        runs.set_tags(client, run_id, lineage)
        result = EvaluateResult(
            run_id=run_id,
            init=init.uri,
            scores=scores,
            **counts,
            images_per_second=features.images_per_second,
            result_dir=folder.uri,
        )
        folder.write(SCORES_FILE, json.dumps({**lineage, "scores": scores, **counts}, indent=1))
        if parent_run_id is None:
            page = features.page(images, found, f"{init.uri} on {shards.uri}").encode()
            folder.write(PAGE_FILE, page)
            runs.log_file(client, run_id, PAGE_FILE, page)
    return result


def _begin(
    client: runs.Client, config: EvaluateConfig, folder: RunFolder, parent_run_id: str | None
) -> str:
    """Make the folder and the MLflow run; return the ID of the run."""
    with nullcontext() if parent_run_id else folder.begin():
        run_id = runs.start_run(
            client,
            experiment=config.run.experiment,
            name=folder.name,
            config=config,
            parent_run_id=parent_run_id,
        )
        folder.record(config, run_id)
    return run_id


@dataclass(frozen=True)
class Features:
    """Features and labels of query and gallery.

    Attributes:
        values: ``[N, F]``, unit length.
        pids: ``[N]``, person of each image.
        camids: ``[N]``, camera of each image.
        is_query: ``[N]``, bool; the other images are the gallery.
        num_undecodable: Number of images that are left out, because they do not decode.
        places: ``[N]``, number of each image in the set.
        images_per_second: Speed of the computation, without the start of the actors.
    """

    values: Tensor
    pids: Tensor
    camids: Tensor
    is_query: Tensor
    num_undecodable: int
    places: Tensor
    images_per_second: float

    def score(self, distances: DistanceRows = cosine_distances) -> RetrievalScores:
        """Return the retrieval scores by these distances."""
        images = (self.values, self.pids, self.camids, self.is_query)
        return score_features(*images, distances=distances)

    def page(self, images: LabelledImages, found: RetrievalScores, title: str) -> str:
        """Return a page with the best and the worst queries, the CMC curve and histograms."""
        queries = self.is_query.nonzero()[:, 0]
        precisions = found.average_precisions
        valid = (~precisions.isnan()).nonzero()[:, 0]
        order = valid[precisions[valid].argsort(stable=True)]
        summary = found.summary()
        genuine, impostor = pair_histograms(self.values, self.pids, self.camids, self.is_query)
        sections = [
            PageSection(
                table=[list(summary), [f"{100 * score:.1f} %" for score in summary.values()]],
                text=LEGEND,
                figures=[
                    PageFigure("CMC curve", curve_of_ranks(found.cmc)),
                    PageFigure("Pairs by distance", histogram_of_pairs(genuine, impostor)),
                ],
            )
        ]
        chosen = {
            "Worst queries": order[:NUM_SHOWN_QUERIES],
            "Best queries": order[-NUM_SHOWN_QUERIES:].flip(0),
        }
        for heading, rows in chosen.items():
            sections.append(PageSection(heading))
            for row in rows.tolist():
                figures = self._ranking(images, int(queries[row]), float(precisions[row]))
                sections.append(PageSection(thumbnails=figures))
        return render_page(title, sections)

    def _ranking(
        self, images: LabelledImages, query: int, average_precision: float
    ) -> list[PageFigure]:
        """Return pictures of a query image and of the gallery images that are nearest to it."""

        def shown(image: int, caption: str, mark: Mark) -> PageFigure:
            return thumbnail(images.encoded(int(self.places[image])), caption, mark)

        distances = 1 - self.values @ self.values[query]
        gallery = (~self.is_query).nonzero()[:, 0]
        same = self.pids == self.pids[query]
        junk = (self.pids == -1) | (same & (self.camids == self.camids[query]))
        figures = [shown(query, f"average precision {average_precision:.3f}", "asked")]
        rank = 0
        for image in gallery[distances[gallery].argsort(stable=True)].tolist():
            rank += not junk[image]
            place = "junk" if junk[image] else f"#{rank}"
            mark: Mark = "junk" if junk[image] else "right" if same[image] else "wrong"
            figures.append(shown(image, f"{place}, distance {distances[image]:.4f}", mark))
            if rank == NUM_SHOWN_RANKS:
                break
        return figures


def _score(features: Features, *, rerank: bool) -> tuple[RetrievalScores, dict[str, float]]:
    """Return the scores by cosine distance, and all scores by name, re-ranked ones too."""
    found = features.score()
    found.warn_if_incomplete()
    by_name = found.summary()
    if rerank:
        reranked = features.score(reranked_distances).summary()
        by_name |= {f"{name}_reranked": value for name, value in reranked.items()}
    return found, by_name


def compute_features(
    images: LabelledImages,
    init: Initialization,
    scaling: ScalingConfig,
    *,
    max_undecodable: float,
) -> Features:
    """Compute the features of all images; tasks decode, and actors run the backbone.

    Raises:
        RunFailed: A larger fraction of the images than ``max_undecodable`` does not decode.
    """

    def read_one(ids: Columns) -> Columns:
        return images.read(int(ids["id"][0]))

    blocks = ray.data.range(images.num_blocks, override_num_blocks=images.num_blocks)
    decoded = blocks.map_batches(read_one, batch_size=None)
    arrived: list[Columns] = []
    started = time.perf_counter()
    with image_progress("computing features", images.num_images) as advance:
        for block in extract_blocks(decoded, images.num_blocks, init, scaling):
            if not arrived and images.num_blocks > 1:
                started = time.perf_counter()  # the first block waited for the actors to start
            arrived.append(block)
            advance(len(block["pid"]))
    seconds = time.perf_counter() - started
    columns = {name: np.concatenate([each[name] for each in arrived]) for name in arrived[0]}
    num_images = len(columns["pid"])
    num_timed = num_images - (len(arrived[0]["pid"]) if len(arrived) > 1 else 0)
    columns = without_undecodable(columns, images.row_groups, max_undecodable)
    return Features(
        values=torch.from_numpy(columns["features"]),
        pids=torch.from_numpy(columns["pid"]),
        camids=torch.from_numpy(columns["camid"]),
        is_query=torch.from_numpy(columns["is_query"]),
        num_undecodable=num_images - len(columns["pid"]),
        places=torch.from_numpy(columns["place"]),
        images_per_second=num_timed / seconds,
    )
