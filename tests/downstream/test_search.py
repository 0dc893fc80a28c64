"""Exact search among features on disk, and its page."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from upreid_ray.config.errors import InputError
from upreid_ray.core.checkpoint import DESCRIPTION_FILE, WEIGHTS_FILE
from upreid_ray.core.reranking import reranked_distances
from upreid_ray.core.retrieval import Labels
from upreid_ray.downstream import feature_set, search
from upreid_ray.downstream.embed import backbone_digest
from upreid_ray.downstream.feature_set import FeatureManifest, FeatureSet, write_part
from upreid_ray.downstream.ranking_page import pair_histograms, search_page
from upreid_ray.downstream.search import Queries, QueryEmbedder, nearest
from upreid_ray.storage import Location
from upreid_ray.train import initialization

ROOT = Path(__file__).parents[2]
NUM_FEATURES = 512


def write_set(
    folder: Path,
    features: torch.Tensor,
    *,
    init: str = "backbone",
    backbone: str = "digest",
    source: str = "nowhere",
    keys: list[str] | None = None,
    pids: list[int | None] | None = None,
    camids: list[int | None] | None = None,
    splits: list[str] | None = None,
    part_size: int = 7,
) -> FeatureSet:
    """Write features as `embed` does."""
    folder.mkdir(exist_ok=True)
    size = len(features)
    table = pa.table(
        {
            "key": keys or [f"image-{row}" for row in range(size)],
            "pid": pa.array(pids or [None] * size, pa.int32()),
            "camid": pa.array(camids or [None] * size, pa.int32()),
            "split": splits or ["unlabeled"] * size,
            "feature": pa.FixedSizeListArray.from_arrays(
                pa.array(features.numpy().ravel()), features.shape[1]
            ),
            "place": pa.array(range(size), pa.int64()),
        }
    )
    parts = []
    for start in range(0, size, part_size):
        part = table.slice(start, part_size)
        name = f"features-{start:05d}.parquet"
        write_part(Location(str(folder)) / name, part, "plan", [])
        parts.append({"name": name, "num_images": len(part)})
    manifest = FeatureManifest.model_validate(
        {
            "version": 1,
            "plan": "plan",
            "init": init,
            "backbone": backbone,
            "num_features": features.shape[1],
            "source": source,
            "num_refused": 0,
            "parts": parts,
            "settings": {},
        }
    )
    (folder / feature_set.MANIFEST_FILE).write_text(manifest.model_dump_json())
    return FeatureSet.open(str(folder))


def random_features(size: int, num_features: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(size, num_features, generator=generator), dim=1)


def unlabelled(features: torch.Tensor) -> Queries:
    size = len(features)
    unknown = torch.full((size,), feature_set.UNKNOWN)
    keys = [f"query-{row}" for row in range(size)]
    return Queries(keys, features, unknown, unknown, [("nowhere", row) for row in range(size)])


@pytest.mark.parametrize("number_type", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_kept", [1, 5, 20])
def test_the_nearest_images_are_those_of_a_full_sort(
    tmp_path, number_type, num_kept, monkeypatch
):
    monkeypatch.setattr(search, "MAX_QUERIES", 2)
    stored = random_features(20).to(number_type)
    gallery = write_set(tmp_path / "gallery", stored)
    queries = random_features(5, seed=1)

    distances, places = nearest(gallery, queries, torch.arange(20), num_kept)

    full = 1 - queries @ stored.float().T
    expected, order = full.sort(dim=1)
    torch.testing.assert_close(distances, expected[:, :num_kept])
    torch.testing.assert_close(places, order[:, :num_kept])


def test_only_the_gallery_of_a_labelled_set_is_searched_and_junk_has_no_rank(tmp_path):
    same = random_features(1).repeat(4, 1)
    same[2] = F.normalize(same[2] + 0.1, dim=0)
    other = random_features(2, seed=2)
    labels = {
        "splits": ["query", "gallery", "gallery", "train", "gallery", "gallery"],
        "pids": [1, 1, 1, 1, 2, 3],
        "camids": [1, 1, 2, 3, 1, 1],
    }
    features = write_set(tmp_path / "set", torch.cat([same, other]), **labels)

    [ranking] = search.search(
        features, search.queries_of_set(features, features), top=2, rerank=False
    )

    found = [(hit.rank, hit.key, hit.is_match) for hit in ranking.hits]
    assert found[:2] == [(None, "image-1", True), (1, "image-2", True)]
    assert (found[2][0], found[2][2], len(found)) == (2, False, 3)


def test_without_labels_nothing_is_right_or_wrong(tmp_path):
    gallery = write_set(tmp_path / "gallery", random_features(9))

    rankings = search.search(gallery, unlabelled(random_features(2)), top=3, rerank=False)

    assert [hit.rank for hit in rankings[0].hits] == [1, 2, 3]
    assert rankings[0].hits[0].key == "image-0"
    assert {hit.is_match for ranking in rankings for hit in ranking.hits} == {None}


def test_re_ranking_sorts_by_its_own_distances(tmp_path):
    stored, asked = random_features(30), random_features(4, seed=3)
    gallery = write_set(tmp_path / "gallery", stored)

    rankings = search.search(gallery, unlabelled(asked), top=30, rerank=True)

    [(_, expected)] = reranked_distances(asked, stored)
    for ranking, row in zip(rankings, expected, strict=True):
        order = row.argsort(stable=True).tolist()
        assert [hit.key for hit in ranking.hits] == [f"image-{place}" for place in order]


def test_a_gallery_too_large_for_re_ranking_is_refused(tmp_path, monkeypatch):
    gallery = write_set(tmp_path / "gallery", random_features(9))
    monkeypatch.setattr(search, "MAX_RERANKED", 8)

    with pytest.raises(InputError, match=r"^--rerank: 9 gallery images are too many"):
        search.search(gallery, unlabelled(random_features(1)), top=1, rerank=True)


@pytest.mark.parametrize("other", [{"backbone": "another"}, {"num_features": 8}])
def test_features_of_another_backbone_are_refused_in_one_line(tmp_path, other):
    gallery = write_set(tmp_path / "gallery", random_features(9))
    size = other.pop("num_features", 16)
    queries = write_set(tmp_path / "queries", random_features(3, size), **other)

    with pytest.raises(InputError, match=r"^--query [^\n]+compute both with one backbone"):
        search.queries_of_set(queries, gallery)


def test_a_damaged_file_is_named(tmp_path):
    gallery = write_set(tmp_path / "gallery", random_features(9))
    file = tmp_path / "gallery" / "features-00000.parquet"
    file.write_bytes(file.read_bytes()[:50])

    with pytest.raises(InputError, match=rf"^{file}: is damaged"):
        gallery.labels()


def test_a_folder_without_features_says_how_to_make_them(tmp_path):
    with pytest.raises(InputError, match=r"no features.json; compute features with jobs/embed"):
        FeatureSet.open(str(tmp_path))


def test_pairs_are_genuine_under_different_cameras_or_impostor(tmp_path):
    features = random_features(5)
    labelled = write_set(
        tmp_path / "set", features, pids=[1, 1, 1, 2, None], camids=[1, 1, 2, 1, 1]
    )

    genuine, impostor = search.pair_similarities(labelled)

    similar = features @ features.T
    assert genuine.tolist() == pytest.approx(similar[[0, 1], [2, 2]].tolist())
    assert impostor.tolist() == pytest.approx(similar[[0, 1, 2], [3, 3, 3]].tolist())


def test_a_set_without_pairs_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no pairs"):
        search.pair_similarities(write_set(tmp_path / "set", random_features(3)))


def test_histograms_count_each_pair_of_query_and_gallery_once():
    features = random_features(6)
    labels = Labels(torch.tensor([1, 2, 1, 1, 2, -1]), torch.tensor([1, 1, 1, 2, 2, 1]))
    is_query = torch.tensor([True, True, False, False, False, False])

    genuine, impostor = pair_histograms(features, labels.pids, labels.camids, is_query)

    assert (genuine.sum(), impostor.sum()) == (2, 3)


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("crops")
    draw = np.random.default_rng(0)
    for number in range(6):
        rough = draw.integers(0, 256, (8, 4, 3), dtype=np.uint8)
        Image.fromarray(rough).resize((40, 80)).save(folder / f"{number}.jpg")
    return folder


@pytest.fixture(scope="module")
def init(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("backbone")
    random = initialization.random("resnet18", seed=0)
    description = random.description.model_copy(update={"height": 64, "width": 32})
    save_file(random.weights, folder / WEIGHTS_FILE)
    (folder / DESCRIPTION_FILE).write_text(description.model_dump_json())
    return str(folder)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory, crops, init) -> FeatureSet:
    """Make the features of the crops in this process."""
    loaded = initialization.resolve(init)
    embedder = QueryEmbedder(loaded, flip=False, precision="auto")
    found = embedder.queries([str(crops)])
    return write_set(
        tmp_path_factory.mktemp("gallery") / "features",
        found.features,
        init=init,
        backbone=backbone_digest(loaded, "none"),
        source=str(crops),
        keys=found.keys,
        pids=[1, 1, 2, 2, 3, 3],
        camids=[1, 2, 1, 2, 1, 2],
    )


def test_the_job_finds_the_query_itself_and_writes_lines_and_a_page(gallery, crops, tmp_path):
    words = ["--gallery", gallery.folder.uri, "--top", "3", "--html", "page.html"]
    words += ["--out", "hits.jsonl", "--query", str(crops / "4.jpg"), str(crops / "1.jpg")]

    done = subprocess.run(
        [sys.executable, ROOT / "jobs/search.py", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert [each["hits"][0]["key"] for each in result["results"]] == ["4.jpg", "1.jpg"]
    assert result["results"][0]["hits"][0]["distance"] == pytest.approx(0, abs=1e-5)
    lines = (tmp_path / "hits.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result["results"]
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/jpeg") == 2 * (1 + 3)
    assert page.count('<figure class="asked">') == 2
    assert "4.jpg" in done.stderr


def test_the_page_frames_what_is_right_and_what_is_wrong(gallery):
    queries = search.queries_of_set(gallery, gallery)

    rankings = search.search(gallery, queries, top=2, rerank=False)
    page = search_page(rankings[:1], gallery.manifest.source)

    marks = re.findall(r'<figure class="(\w+)">', page)
    expected = {None: "junk", True: "right", False: "wrong"}
    hits = rankings[0].hits
    assert marks == [
        "asked",
        *(expected[None if hit.is_junk else hit.is_match] for hit in hits),
    ]
    assert "junk" in marks  # the query itself


def test_a_gallery_whose_backbone_has_changed_is_refused(gallery, tmp_path):
    changed = write_set(tmp_path / "set", random_features(3), init=gallery.manifest.init)

    with pytest.raises(InputError, match="is no longer the backbone of"):
        QueryEmbedder.of(changed)


def test_a_query_that_does_not_decode_is_refused_in_one_line(gallery, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")

    with pytest.raises(InputError, match=r"^--query [^\n]*bad.jpg: does not decode[^\n]*$"):
        QueryEmbedder.of(gallery).queries([str(tmp_path / "bad.jpg")])


def test_two_images_are_placed_among_the_pairs_of_a_labelled_set(gallery, crops):
    embedder = QueryEmbedder.of(gallery)
    twice = embedder.queries([str(crops / "0.jpg")] * 2)

    found = search.similarity(twice, gallery)

    assert found.cosine == pytest.approx(1)
    assert (found.genuine_below, found.impostor_above) == (1, 0)
