"""Sets of shards are opened, or refused in one line; processes get them without files."""

import json
import pickle

import pytest

from tests.data.stream.test_stream import SIZE, flat, write_set
from upreid_ray.config.downstream import LabelledDataConfig
from upreid_ray.config.errors import InputError
from upreid_ray.config.presets import PRESETS
from upreid_ray.data.shards.manifest import MANIFEST_FILE, Shard
from upreid_ray.data.shards.preparation import Written
from upreid_ray.data.shards.requested import labelled_shards
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.data.sources.records import Refused
from upreid_ray.data.stream.labelled import LabelledImages
from upreid_ray.data.stream.training import TrainingImages


def test_a_folder_without_manifest_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match=rf"^{tmp_path}: no manifest\.json; [^\n]+$"):
        ShardSet.open(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{}", "[1, 2", '{"version": 1}'])
def test_a_broken_manifest_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)

    with pytest.raises(InputError, match=rf"^{tmp_path}/manifest\.json: [^\n]+$"):
        ShardSet.open(str(tmp_path))


def test_an_unknown_scheme_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"^nowhere://bucket/x: [^\n]+$"):
        ShardSet.open("nowhere://bucket/x")


def test_a_process_that_gets_a_set_does_not_read_the_manifest_again(tmp_path):
    written = write_set(tmp_path, {"query": [flat(i) for i in range(9)]})
    (tmp_path / MANIFEST_FILE).write_text(written.manifest.model_dump_json())
    sent = pickle.dumps(ShardSet.open(str(tmp_path)))

    (tmp_path / MANIFEST_FILE).unlink()

    assert len(LabelledImages(pickle.loads(sent), **SIZE).read(0)["image"]) == 9


def test_a_task_that_reads_blocks_gets_arrays_instead_of_the_manifest(tmp_path):
    shards = write_set(tmp_path, {"unlabeled": [flat(0)] * 8})

    images = TrainingImages(
        shards, PRESETS["demo"].override({"training.batch_size": 8, "training.group_size": 8})
    )

    assert b"Manifest" not in pickle.dumps(images)


def test_a_set_of_one_camera_is_refused_before_its_shards_are_written(tmp_path):
    source = tmp_path / "one camera"
    for part in ("bounding_box_train", "query", "bounding_box_test"):
        (source / part).mkdir(parents=True)
        (source / part / "0001_c1s1_000001_00.jpg").write_bytes(b"any")
    config = LabelledDataConfig(root=str(source))

    with pytest.raises(InputError, match=r"^\S+ camera: no query image has a match [^\n]+$"):
        labelled_shards(config, str(tmp_path / "runs"), scored=True)

    assert not (tmp_path / "runs").exists()


def test_a_set_knows_whether_it_has_images_to_score(tmp_path):
    for split, expected in (("train", False), ("query", True), ("gallery", True)):
        shards = write_set(tmp_path / split, {split: [flat(0)]}, num_shards=1)
        assert shards.has_evaluation_images() is expected


def test_manifests_on_disk_keep_the_names_of_the_first_versions(tmp_path):
    written = write_set(tmp_path, {"query": [flat(0)]}).manifest
    content = written.model_copy(update={"made_from": "a digest"}).model_dump_json()

    assert json.loads(content)["plan"] == "a digest"
    assert type(written).model_validate_json(content).made_from == "a digest"


def test_what_a_task_has_written_survives_the_way_to_the_driver():
    shard = Shard(name="a", split="train", num_images=1, num_bytes=2, sha256="b")
    refused = (Refused("c", "small", "is 1x1 pixels"),)
    written = Written(shard=shard, refused=refused, mean=(0.1, 1 / 3, 0), mean_square=(0, 0, 1))

    assert Written.model_validate_json(written.model_dump_json()) == written
