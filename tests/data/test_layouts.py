"""Folders and the synthetic set become records."""

import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from upreid_ray.config import InputError, SyntheticConfig
from upreid_ray.data.layouts import (
    KNOWN_SETS,
    Record,
    folder_records,
    label_warnings,
    synthetic_records,
)

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


def labels(records: list[Record]) -> set[tuple[str, int | None, int | None, str]]:
    return {(each.key, each.pid, each.camid, each.split) for each in records}


@pytest.mark.parametrize("folders", [("train", "test"), ("mask_train_v2", "mask_test_v2")])
def test_msmt17_takes_persons_from_its_lists_and_cameras_from_names(tmp_path, folders):
    train, test = folders
    lists = {
        "list_train.txt": "0000/0000_000_01_0303morning_0015_0.jpg 0",
        "list_val.txt": "0001/0001_015_14_0113noon_1056_1.jpg 1",
        "list_query.txt": "0000/0000_003_05_0303noon_0100_0.jpg 0",
        "list_gallery.txt": "0000/0000_004_12_0303noon_0207_1.jpg 0",
    }
    for name, line in lists.items():
        part = test if name in {"list_query.txt", "list_gallery.txt"} else train
        put(tmp_path, f"{part}/{line.split()[0]}")
        (tmp_path / name).write_text(line + "\n")

    # Person 0 is a person, and person 0 of the test part is another one.
    assert labels(folder_records(str(tmp_path))) == {
        (f"{train}/0000/0000_000_01_0303morning_0015_0.jpg", 0, 1, "train"),
        (f"{train}/0001/0001_015_14_0113noon_1056_1.jpg", 1, 14, "train"),
        (f"{test}/0000/0000_003_05_0303noon_0100_0.jpg", 2, 5, "query"),
        (f"{test}/0000/0000_004_12_0303noon_0207_1.jpg", 2, 12, "gallery"),
    }


def test_the_market_style_copy_of_msmt17_keeps_person_0(tmp_path):
    put(tmp_path, "bounding_box_train/0000_c15_0001.jpg", "bounding_box_test/0000_c2_0001.jpg")

    assert {(each.pid, each.camid) for each in folder_records(str(tmp_path))} == {
        (0, 15),
        (0, 2),
    }


def test_cuhk03_np_is_read_in_either_version(tmp_path):
    names = ["bounding_box_train/0003_c1_21.png", "query/0001_c2_402.png"]
    put(tmp_path / "labeled", *names, "bounding_box_test/0001_c1_401.png")
    put(tmp_path / "detected", *names)

    assert {
        (each.pid, each.camid, each.split) for each in folder_records(str(tmp_path / "labeled"))
    } == {(3, 1, "train"), (1, 2, "query"), (1, 1, "gallery")}
    with pytest.raises(InputError, match=r"several versions .* such as \S+/labeled$"):
        folder_records(str(tmp_path))


def test_personx_names_give_person_and_camera(tmp_path):
    put(
        tmp_path,
        "bounding_box_train/0005_c12_03.jpg",
        "query/0411_c3_01.jpg",
        "bounding_box_test/0411_c8_02.jpg",
    )

    found = {(each.pid, each.camid) for each in folder_records(str(tmp_path))}
    assert found == {(5, 12), (411, 3), (411, 8)}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0000/0000_000_01_morning.jpg", "not a line of MSMT17"),
        ("0000/portrait.jpg 0", "not a line of MSMT17"),
        ("0000/0000_000_01_0303morning_0015_0.jpg 0", "cannot be read"),
    ],
)
def test_lists_of_msmt17_that_lead_nowhere_are_refused(tmp_path, line, message):
    put(tmp_path, "train/0000/another.jpg", "test/another.jpg")
    (tmp_path / "list_train.txt").write_text(line)

    with pytest.raises(InputError, match=rf"^[^\n]*{message}[^\n]*$"):
        folder_records(str(tmp_path))


def test_lists_of_msmt17_without_its_folders_are_refused(tmp_path):
    (tmp_path / "list_query.txt").write_text("")

    with pytest.raises(InputError, match=r"neither train/ and test/ or mask_train_v2/"):
        folder_records(str(tmp_path))


@dataclass(frozen=True)
class Label:
    """A record of which only the labels count."""

    split: str
    pid: int
    camid: int
    key: str = ""
    num_bytes: int = 0

    def read(self) -> bytes:
        return b""


def records_of(name: str) -> list[Label]:
    """Make labels with the counts of a known set."""
    counts = KNOWN_SETS[name]
    sizes = {
        "train": counts.train_images,
        "query": counts.query_images,
        "gallery": counts.gallery_images,
    }
    return [
        Label(split, 1 + i % counts.train_persons + 10_000 * (split != "train"), camid)
        for split, size in sizes.items()
        for i in range(size)
        for camid in [i % counts.cameras]
    ]


@pytest.mark.parametrize("name", ["Market-1501", "CUHK03-NP labeled", "CUHK03-NP detected"])
def test_a_whole_known_set_brings_no_warning(name):
    assert label_warnings(records_of(name)) == []


def test_a_known_set_that_is_not_whole_is_named_with_its_counts():
    records = records_of("CUHK03-NP detected")[1:]

    assert label_warnings(records) == [
        "not the whole CUHK03-NP detected: 7364 train images instead of 7365"
    ]


def test_an_unknown_set_brings_no_warning():
    assert label_warnings([Label("train", 1, 1), Label("query", 2, 1)]) == []


def test_persons_in_train_and_test_are_counted():
    records = [Label("train", 7, 1), Label("query", 7, 1), Label("gallery", 7, 2)]

    assert label_warnings(records) == [
        "1 persons are in train and in query or gallery, such as 7"
    ]


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
