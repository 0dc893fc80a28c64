"""Folders and the synthetic set become records."""

import pickle
from pathlib import Path

import pytest
from PIL import Image

from upreid_ray.config import InputError, SyntheticConfig
from upreid_ray.data.layouts import folder_records, synthetic_records

PEOPLE = SyntheticConfig(
    num_train_identities=1, num_test_identities=1, num_unlabeled_identities=1, height=64
)


def put(root: Path, *names: str) -> Path:
    """Write a file of its own content for each name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def market(root: Path) -> Path:
    """Make a folder in Market-1501's layout."""
    return put(
        root,
        "bounding_box_train/0002_c1s1_000451_03.jpg",
        "bounding_box_train/0007_c3s1_000551_01.jpg",
        "query/0010_c2s1_000001_00.jpg",
        "bounding_box_test/-1_c1s1_000401_03.jpg",
        "bounding_box_test/0000_c4s6_014841_02.jpg",
        "bounding_box_test/0010_c6s1_000001_00.jpg",
        "bounding_box_test/Thumbs.db",
    )


def test_market_names_give_person_camera_and_split(tmp_path):
    records = {record.key: record for record in folder_records(str(market(tmp_path)))}

    train = records["bounding_box_train/0002_c1s1_000451_03.jpg"]
    query = records["query/0010_c2s1_000001_00.jpg"]
    gallery = records["bounding_box_test/0010_c6s1_000001_00.jpg"]
    labels = [(each.pid, each.camid, each.split) for each in (train, query, gallery)]
    assert labels == [(2, 1, "train"), (10, 2, "query"), (10, 6, "gallery")]


def test_market_junk_is_left_out_and_distractors_are_kept(tmp_path):
    records = folder_records(str(market(tmp_path)))

    gallery = [record.pid for record in records if record.split == "gallery"]
    assert gallery == [0, 10]


def test_market_needs_no_query(tmp_path):
    put(tmp_path, "bounding_box_train/0002_c1s1_000451_03.jpg")

    records = folder_records(str(tmp_path))

    assert [record.split for record in records] == ["train"]


def test_images_beside_the_folders_of_market_are_left_out(tmp_path):
    put(market(tmp_path), "gt_bbox/0001_c1s1_001051_00.jpg", "poster.png")

    keys = [record.key for record in folder_records(str(tmp_path))]

    assert not {key for key in keys if key.startswith(("gt_bbox", "poster"))}


@pytest.mark.parametrize("name", ["portrait.jpg", "0002c1s1.jpg", "c1_0002.jpg"])
def test_a_name_that_is_not_of_market_is_refused(tmp_path, name):
    put(market(tmp_path), f"query/{name}")

    with pytest.raises(InputError, match=rf"^\S+/query/{name}: [^\n]+$"):
        folder_records(str(tmp_path))


def test_a_plain_tree_gives_unlabeled_images_of_every_depth_and_case(tmp_path):
    put(tmp_path, "b.JPG", "a/c.Png", "a/deep/er/d.jpeg", "a/notes.txt", "a/jpg")

    records = folder_records(str(tmp_path))

    described = [(each.key, each.pid, each.camid, each.split) for each in records]
    assert described == [
        ("a/c.Png", None, None, "unlabeled"),
        ("a/deep/er/d.jpeg", None, None, "unlabeled"),
        ("b.JPG", None, None, "unlabeled"),
    ]


def test_a_record_reads_the_bytes_of_its_file(tmp_path):
    (record,) = folder_records(str(put(tmp_path, "a/b.jpg")))

    assert (record.read(), record.num_bytes) == (b"a/b.jpg", len(b"a/b.jpg"))


def test_the_order_of_records_is_that_of_their_keys(tmp_path):
    put(tmp_path, *(f"{name}/{name}.jpg" for name in "qwertyuiop"))

    keys = [record.key for record in folder_records(str(tmp_path))]

    assert keys == [f"{name}/{name}.jpg" for name in sorted("qwertyuiop")]


@pytest.mark.parametrize("make", ["empty", "no images", "missing", "file", "only junk"])
def test_a_source_without_images_is_refused_in_one_line_that_names_it(tmp_path, make):
    source = tmp_path / "crops"
    if make == "empty":
        source.mkdir()
    elif make == "no images":
        put(source, "a/readme.txt", "labels.csv")
    elif make == "file":
        source.write_bytes(b"a file")
    elif make == "only junk":
        put(source, "bounding_box_train/-1_c1s1_000401_03.jpg")

    with pytest.raises(InputError) as refusal:
        folder_records(str(source))

    message = str(refusal.value)
    assert (message.count("\n"), message.startswith(f"{source}: ")) == (0, True)


def test_records_of_files_survive_pickling(tmp_path):
    records = folder_records(str(market(tmp_path)))

    assert pickle.loads(pickle.dumps(records)) == records


def test_records_of_drawings_survive_pickling():
    records = synthetic_records(PEOPLE)

    assert pickle.loads(pickle.dumps(records)) == records


def test_the_synthetic_set_has_every_split():
    records = synthetic_records(PEOPLE)

    splits = {record.split for record in records}
    assert splits == {"train", "query", "gallery", "unlabeled"}


def test_a_drawing_reads_as_a_jpeg_of_the_size_asked_for(tmp_path):
    record = synthetic_records(PEOPLE)[0]
    (tmp_path / "drawing").write_bytes(record.read())

    with Image.open(tmp_path / "drawing") as image:
        assert (image.format, image.size) == ("JPEG", (64, 64))
