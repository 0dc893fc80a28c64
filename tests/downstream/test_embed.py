"""Features of any source: those of `evaluate`, in files that survive a kill."""

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from upreid_ray.config.downstream import EmbedConfig
from upreid_ray.config.errors import InputError
from upreid_ray.core.checkpoint import DESCRIPTION_FILE, WEIGHTS_FILE
from upreid_ray.core.retrieval import extract_features
from upreid_ray.data.shards.images import ImageRules
from upreid_ray.data.shards.manifest import Manifest
from upreid_ray.data.shards.preparation import ShardWriter, cut_into_shards
from upreid_ray.data.sources.source import source_records
from upreid_ray.data.stream.decode import decode_images
from upreid_ray.downstream import embed as embed_module
from upreid_ray.downstream.embed import embed
from upreid_ray.downstream.embed_images import NULL, SourceImages
from upreid_ray.downstream.feature_set import FeatureSet
from upreid_ray.storage import Location
from upreid_ray.train import initialization
from upreid_ray.train.initialization import Initialization

SIZE = {"height": 64, "width": 32}
NUM_PEOPLE = 9


@pytest.fixture(scope="module")
def init(tmp_path_factory) -> SimpleNamespace:
    """Make the folder of an exported backbone."""
    folder = tmp_path_factory.mktemp("backbone")
    random = initialization.random("resnet18", seed=0)
    description = random.description.model_copy(update=SIZE)
    save_file(random.weights, folder / WEIGHTS_FILE)
    (folder / DESCRIPTION_FILE).write_text(description.model_dump_json())
    return SimpleNamespace(uri=str(folder), loaded=initialization.resolve(str(folder)))


@pytest.fixture(scope="module")
def market(tmp_path_factory) -> Path:
    """Make a labelled set, one of whose images does not decode."""
    root = tmp_path_factory.mktemp("market")
    draw = np.random.default_rng(0)
    for pid in range(1, NUM_PEOPLE + 1):
        for part, camid in [("query", 1), ("bounding_box_test", 2), ("bounding_box_train", 1)]:
            (root / part).mkdir(exist_ok=True)
            pixels = draw.integers(0, 256, (80, 40, 3), dtype=np.uint8)
            name = f"{pid:04d}_c{camid}s1_{pid:06d}_00.jpg"
            Image.fromarray(pixels).save(root / part / name)
    (root / "query" / "0001_c1s1_000001_00.jpg").write_bytes(b"no image")
    return root


def expected_features(init: Initialization, encoded: list[bytes]) -> torch.Tensor:
    images = torch.from_numpy(decode_images(pa.array(encoded), **SIZE)["image"])
    return extract_features(init.extractor(), [images], init.description.normalization)


def test_the_images_of_a_source_are_read_with_labels_and_with_what_is_wrong(market):
    images = SourceImages.open(str(market))

    block = images.reader(**SIZE)(images.block(0, 100))

    assert images.num_images == 3 * NUM_PEOPLE == len(block["key"])
    assert block["image"].shape == (3 * NUM_PEOPLE, 3, 64, 32)
    wrong = np.flatnonzero(block["error"] != "")
    assert [Path(block["key"][row]).name for row in wrong] == ["0001_c1s1_000001_00.jpg"]
    good = block["error"] == ""
    assert set(block["width"][good]) == {40}
    assert set(block["camid"][good]) <= {0, 1, 2}
    assert NULL not in block["pid"][good]


def test_one_image_is_found_by_its_place(market):
    images = SourceImages.open(str(market))
    block = images.block(0, 100)

    encoded = images.encoded(5)

    expected = (market / block["key"][5].as_py()).read_bytes()
    assert encoded == expected


def test_flipped_images_are_added(init):
    extractor = init.loaded.extractor().eval()
    images = torch.randint(0, 256, (3, 3, 64, 32), dtype=torch.uint8)
    normalization = init.loaded.description.normalization

    both = extract_features(extractor, [images], normalization, flip=True)
    mirrored = extract_features(extractor, [images.flip(3)], normalization, flip=True)
    plain = extract_features(extractor, [images], normalization)

    torch.testing.assert_close(both, mirrored)
    expected = F.normalize(extractor(normalization.apply(images / 255)), dim=1)
    torch.testing.assert_close(plain, expected)
    assert not torch.allclose(plain, both)


CONFIG = EmbedConfig().override({"scaling.cpus_per_worker": 0.5, "precision": "fp32"})


@pytest.fixture
def without_ray(monkeypatch) -> None:
    """Compute small blocks in this process."""

    def compute(self, init, parts):
        extractor, images = init.extractor().eval(), init.description
        read = self._images.reader(*self._size)
        for part in parts:
            blocks = range(self._num_blocks)[part * 2 : part * 2 + 2]
            for number in blocks:
                block = read(self._images.block(number * 8, number * 8 + 8))
                pixels = torch.from_numpy(block.pop("image"))
                features = extract_features(extractor, [pixels], images.normalization)
                yield part, {**block, "features": features.numpy()}, number == blocks[-1]

    monkeypatch.setattr(embed_module, "BLOCK_IMAGES", 8)
    monkeypatch.setattr(embed_module, "PART_BLOCKS", 2)
    monkeypatch.setattr(embed_module._Writer, "_compute", compute)


def check(out: str, init: SimpleNamespace, market: Path) -> None:
    """Compare a set of features with those of one process."""
    features = FeatureSet.open(out)
    rows = features.records(range(features.manifest.num_images))
    encoded = [(market / row["key"]).read_bytes() for row in rows]
    found = features.features(torch.arange(len(rows)))
    torch.testing.assert_close(
        found, expected_features(init.loaded, encoded), rtol=0, atol=1e-5
    )
    assert len(rows) == 3 * NUM_PEOPLE - 1
    assert {row["split"] for row in rows} == {"query", "gallery", "train"}
    refused = json.loads((Path(out) / "refused.jsonl").read_text())
    assert refused["key"].endswith("0001_c1s1_000001_00.jpg")
    schema = pq.read_schema(sorted(Path(out).glob("*.parquet"))[0])
    assert schema.field("feature").type.list_size == 512


@pytest.mark.ray
def test_ray_computes_the_features_of_one_process(
    ray_cluster, init, market, tmp_path, monkeypatch
):
    monkeypatch.setattr(embed_module, "BLOCK_IMAGES", 8)
    monkeypatch.setattr(embed_module, "PART_BLOCKS", 2)
    out = str(tmp_path / "features")

    result = embed(init.uri, str(market), out, CONFIG)

    assert (result.num_images, result.num_refused) == (3 * NUM_PEOPLE - 1, 1)
    assert result.images_per_second > 0
    check(out, init, market)


def test_a_killed_call_is_continued(without_ray, init, market, tmp_path, monkeypatch):
    out = str(tmp_path / "features")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embed_module._Writer, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            embed(init.uri, str(market), out, CONFIG)
    torn, kept = sorted(Path(out).glob("*.parquet"))
    before = kept.stat().st_mtime_ns
    torn.write_bytes(torn.read_bytes()[:100])
    assert not FeatureSet.exists(out)

    embed(init.uri, str(market), out, CONFIG)

    assert kept.stat().st_mtime_ns == before
    check(out, init, market)


def test_a_whole_set_stays_and_other_settings_are_refused(without_ray, init, market, tmp_path):
    out = str(tmp_path / "features")
    half = CONFIG.override({"number_type": "float16"})
    first = embed(init.uri, str(market), out, half)

    again = embed(init.uri, str(market), out, half)

    assert (again.num_images, again.images_per_second) == (first.num_images, 0)
    schema = pq.read_schema(sorted(Path(out).glob("*.parquet"))[0])
    assert str(schema.field("feature").type.value_type) == "halffloat"
    with pytest.raises(InputError, match="holds other features"):
        embed(init.uri, str(market), out, half.override({"tta": "flip"}))


def test_shards_have_the_features_of_their_images(without_ray, init, market, tmp_path):
    records = source_records(str(market), {})
    folder = Location(str(tmp_path / "shards"))
    folder.make_folder()
    writer = ShardWriter(folder, "digest", ImageRules(), records.read, 1)
    shards = [writer.write(part).shard for part in cut_into_shards(records.table, seed=0)]
    manifest = Manifest(
        version=2, source="a", made_from="digest", row_group_images=64, shards=tuple(shards)
    )
    (folder / "manifest.json").write_whole(manifest.model_dump_json().encode())
    (folder / shards[0].name).write_whole(b"damaged")

    embed(init.uri, folder.uri, str(tmp_path / "features"), CONFIG)

    features = FeatureSet.open(str(tmp_path / "features"))
    rows = features.records(range(features.manifest.num_images))
    splits = {shard.split for shard in shards[1:]}
    assert {row["split"] for row in rows} == splits
    assert len(rows) == sum(shard.num_images for shard in shards[1:])
    assert features.manifest.num_refused == shards[0].num_images
    found = features.features(torch.arange(len(rows)))
    encoded = [(market / row["key"]).read_bytes() for row in rows]
    torch.testing.assert_close(
        found, expected_features(init.loaded, encoded), rtol=0, atol=1e-5
    )
    place = features.records([0])[0]["place"]
    assert SourceImages.open(folder.uri).encoded(place) == encoded[0]


def test_a_set_without_any_readable_image_is_tried_again_once_it_is_mended(
    without_ray, init, market, tmp_path
):
    crops, out = tmp_path / "crops", str(tmp_path / "features")
    crops.mkdir()
    whole = {image.name: image.read_bytes() for image in market.rglob("*.jpg")}
    for name, encoded in whole.items():
        (crops / name).write_bytes(b"x" * len(encoded))
    with pytest.raises(InputError, match="can be used"):
        embed(init.uri, str(crops), out, CONFIG)

    for name, encoded in whole.items():
        (crops / name).write_bytes(encoded)
    embed(init.uri, str(crops), out, CONFIG)

    manifest = FeatureSet.open(out).manifest
    assert manifest.num_images == len(whole) - manifest.num_refused > 0


def test_a_source_without_images_is_refused(init, tmp_path):
    (tmp_path / "empty").mkdir()

    with pytest.raises(InputError, match="no images found"):
        embed(init.uri, str(tmp_path / "empty"), str(tmp_path / "out"), EmbedConfig())

    assert not (tmp_path / "out").exists()


def test_the_digest_of_a_backbone_depends_on_weights_and_images(init):
    digest = embed_module.backbone_digest(init.loaded, "none")
    taller = init.loaded.description.model_copy(update={"height": 128})
    other = replace(init.loaded, description=taller)
    assert len({digest, embed_module.backbone_digest(other, "none")}) == 2
    assert embed_module.backbone_digest(init.loaded, "flip") != digest


def test_encoded_images_keep_their_bytes(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 40), (9, 9, 9)).save(buffer, "JPEG")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())

    assert SourceImages.open(str(tmp_path)).encoded(0) == buffer.getvalue()
