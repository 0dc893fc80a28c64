"""Folders become records."""

import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from pyarrow import fs

from tests.data.sources.test_archives import read_all
from upreid_ray import storage
from upreid_ray.config.errors import InputError
from upreid_ray.data.sources.layouts import (
    KNOWN_SETS,
    folder_records,
    label_warnings,
)
from upreid_ray.data.sources.records import num_readers
from upreid_ray.storage import Location


def put(root: Path, *names: str) -> Path:
    """Write a file of its own content for each name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def rows(root: Path) -> list[SimpleNamespace]:
    """Return the records of a folder, each as an object."""
    return [SimpleNamespace(**row) for row in folder_records(str(root)).table.to_pylist()]


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
    records = {record.key: record for record in rows(market(tmp_path))}

    train = records["bounding_box_train/0002_c1s1_000451_03.jpg"]
    query = records["query/0010_c2s1_000001_00.jpg"]
    gallery = records["bounding_box_test/0010_c6s1_000001_00.jpg"]
    labels = [(each.pid, each.camid, each.split) for each in (train, query, gallery)]
    assert labels == [(2, 1, "train"), (10, 2, "query"), (10, 6, "gallery")]


def test_market_junk_is_left_out_and_distractors_are_kept(tmp_path):
    records = rows(market(tmp_path))

    gallery = [record.pid for record in records if record.split == "gallery"]
    assert gallery == [0, 10]


def test_market_needs_no_query(tmp_path):
    put(tmp_path, "bounding_box_train/0002_c1s1_000451_03.jpg")

    records = rows(tmp_path)

    assert [record.split for record in records] == ["train"]


def test_images_beside_the_folders_of_market_are_left_out(tmp_path):
    put(market(tmp_path), "gt_bbox/0001_c1s1_001051_00.jpg", "poster.png")

    keys = [record.key for record in rows(tmp_path)]

    assert not {key for key in keys if key.startswith(("gt_bbox", "poster"))}


@pytest.mark.parametrize(
    "name",
    [
        "query/portrait.jpg",
        "query/0002c1s1.jpg",
        "query/c1_0002.jpg",
        "bounding_box_train/cover.jpg",
        "bounding_box_train/._0001_c1s1_000001_00.jpg",
        "bounding_box_test/9999999999_c1s1_000001_00.jpg",
    ],
)
def test_an_image_whose_name_is_not_of_market_is_left_out_and_counted(tmp_path, name):
    whole = folder_records(str(market(tmp_path)))

    records = folder_records(str(put(tmp_path, name)))

    assert records.table == whole.table
    reasons = [(one.key, one.kind, one.reason) for one in records.refused]
    expected = "no person and camera in its name, such as 0002_c1s1_000451_03.jpg"
    assert reasons == [(name, "misnamed", expected)]


def test_attributes_of_macos_beside_every_image_do_not_stop_a_set(tmp_path):
    put(market(tmp_path), "query/._0010_c2s1_000001_00.jpg", "query/._1_c2_0.jpg")

    records = folder_records(str(tmp_path))

    assert (len(records), [one.kind for one in records.refused]) == (5, ["misnamed"] * 2)


@pytest.mark.parametrize("name", ["portrait.jpg", "0002c1s1.jpg", "c1_0002.jpg"])
def test_a_folder_in_which_most_names_are_not_of_market_is_refused(tmp_path, name):
    put(market(tmp_path), f"query/{name}", "query/another.jpg")

    with pytest.raises(
        InputError, match=r"^\S+/query/\S+: [^\n]+ 2 of 3 images in query[^\n]+$"
    ):
        folder_records(str(tmp_path))


def test_a_market_name_that_is_not_text_is_refused_and_the_others_are_not(tmp_path):
    market(tmp_path)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/query/0010_c3_\xe9.jpg")).write_bytes(b"1")

    records = folder_records(str(tmp_path))

    assert (len(records), [one.kind for one in records.refused]) == (5, ["unreadable"])


def test_the_letter_case_of_folders_does_not_matter(tmp_path):
    put(
        tmp_path,
        "Bounding_Box_Train/0002_c1s1_000451_03.jpg",
        "Query/0010_c2s1_000001_00.jpg",
        "bounding_box_TEST/0010_c6s1_000001_00.jpg",
    )

    assert labels(rows(tmp_path)) == {
        ("Bounding_Box_Train/0002_c1s1_000451_03.jpg", 2, 1, "train"),
        ("Query/0010_c2s1_000001_00.jpg", 10, 2, "query"),
        ("bounding_box_TEST/0010_c6s1_000001_00.jpg", 10, 6, "gallery"),
    }


def test_folders_that_differ_in_letter_case_only_are_refused(tmp_path):
    put(market(tmp_path), "Query/0010_c2s1_000001_00.jpg")

    with pytest.raises(InputError, match=r"^[^\n]+: holds both Query and query; keep one$"):
        folder_records(str(tmp_path))


@pytest.mark.parametrize("train", ["train", "train_all"])
def test_copies_in_folders_train_query_and_gallery_have_the_layout_of_market(tmp_path, train):
    put(
        tmp_path,
        f"{train}/0002/0002_c1s1_000451_03.jpg",
        "query/0010/0010_c2s1_000001_00.jpg",
        "gallery/0010/0010_c6s1_000001_00.jpg",
        "gallery/-1/-1_c6s1_000001_00.jpg",
    )

    assert {(each.pid, each.camid, each.split) for each in rows(tmp_path)} == {
        (2, 1, "train"),
        (10, 2, "query"),
        (10, 6, "gallery"),
    }


@pytest.mark.parametrize("outer", ["Market-1501-v15.09.15", "a/b", "test", "50%25 \u00fc"])
def test_a_set_that_is_all_of_a_folder_is_read_at_any_depth(tmp_path, outer):
    inner = market(tmp_path / outer)
    put(tmp_path, "._" + outer.partition("/")[0], "__MACOSX/query/._0010_c2.jpg", "read me.txt")

    records = folder_records(str(tmp_path))

    assert records.table == folder_records(str(inner)).table
    assert len(read_all(records)) == len(records)


def test_msmt17_is_read_from_the_folder_around_it(tmp_path):
    inner = tmp_path / "MSMT17_V1"
    put(inner, "train/0000/0000_000_01_0303morning_0015_0.jpg")
    put(inner, "test/0000/0000_003_05_0303noon_0100_0.jpg")
    (inner / "list_train.txt").write_text("0000/0000_000_01_0303morning_0015_0.jpg 0\n")
    (inner / "list_query.txt").write_text("0000/0000_003_05_0303noon_0100_0.jpg 0\n")

    assert sorted(each.split for each in rows(tmp_path)) == ["query", "train"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["m/query/0001_c1.jpg", "crops/a.jpg"], "the labelled set ROOT/m beside other images"),
        (["m/query/0001_c1.jpg", "n/gallery/0001_c1.jpg"], "several sets; give one, such as"),
        (["train/a.jpg", "test/b.jpg"], "holds test like .* give ROOT/train, or a list"),
        (["mask_test_v2/a.jpg"], "holds mask_test_v2 like .* give a folder of training images"),
        (["x/bbox_test/a.jpg"], "ROOT/x: holds bbox_test like .* give a folder of training"),
        (["a/b/Query/a.jpg"], "ROOT/a/b/Query/a.jpg: no person and camera in its name"),
    ],
)
def test_test_images_never_become_training_images(tmp_path, names, message):
    put(tmp_path, *names)

    with pytest.raises(InputError, match=message.replace("ROOT", str(tmp_path))) as refusal:
        folder_records(str(tmp_path))

    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("lonely", ["train", "test"])
def test_a_tree_with_only_one_folder_called_train_or_test_is_plain(tmp_path, lonely):
    put(tmp_path, f"{lonely}/a.jpg", "b.jpg")

    assert {each.split for each in rows(tmp_path)} == {"unlabeled"}


def labels(records: list[SimpleNamespace]) -> set[tuple[str, int | None, int | None, str]]:
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
    assert labels(rows(tmp_path)) == {
        (f"{train}/0000/0000_000_01_0303morning_0015_0.jpg", 0, 1, "train"),
        (f"{train}/0001/0001_015_14_0113noon_1056_1.jpg", 1, 14, "train"),
        (f"{test}/0000/0000_003_05_0303noon_0100_0.jpg", 2, 5, "query"),
        (f"{test}/0000/0000_004_12_0303noon_0207_1.jpg", 2, 12, "gallery"),
    }


def test_the_market_style_copy_of_msmt17_keeps_person_0(tmp_path):
    put(tmp_path, "bounding_box_train/0000_c15_0001.jpg", "bounding_box_test/0000_c2_0001.jpg")

    assert {(each.pid, each.camid) for each in rows(tmp_path)} == {
        (0, 15),
        (0, 2),
    }


def test_cuhk03_np_is_read_in_either_version(tmp_path):
    names = ["bounding_box_train/0003_c1_21.png", "query/0001_c2_402.png"]
    put(tmp_path / "labeled", *names, "bounding_box_test/0001_c1_401.png")
    put(tmp_path / "detected", *names)

    assert {(each.pid, each.camid, each.split) for each in rows(tmp_path / "labeled")} == {
        (3, 1, "train"),
        (1, 2, "query"),
        (1, 1, "gallery"),
    }
    with pytest.raises(InputError, match=r"several versions .* such as \S+/labeled$"):
        folder_records(str(tmp_path))


def test_personx_names_give_person_and_camera(tmp_path):
    put(
        tmp_path,
        "bounding_box_train/0005_c12_03.jpg",
        "query/0411_c3_01.jpg",
        "bounding_box_test/0411_c8_02.jpg",
    )

    found = {(each.pid, each.camid) for each in rows(tmp_path)}
    assert found == {(5, 12), (411, 3), (411, 8)}


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n \n"])
@pytest.mark.parametrize("blank", [" ", "\t", "  "])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_of_msmt17_that_an_editor_saved_are_read(tmp_path, ending, blank, encoding):
    names = ["0000/0000_000_01_0303morning_0015_0.jpg", "0001/0001_015_14_0113noon_1056_1.jpg"]
    put(tmp_path, *(f"train/{name}" for name in names))
    lines = [f"{name}{blank}{number}{ending}" for number, name in enumerate(names)]
    text = "".join(lines).replace("0000/", "0000\\")
    (tmp_path / "List_Train.txt").write_bytes(text.encode(encoding))

    assert labels(rows(tmp_path)) == {
        (f"train/{names[0]}", 0, 1, "train"),
        (f"train/{names[1]}", 1, 14, "train"),
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("\u00b2/0000_000_01_.jpg \u00b2", "not a line of MSMT17"),
        ("0000/0000_000_01_morning.jpg \0 0", "is no text file"),
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


def table(*labels: tuple[str, int, int]) -> pa.Table:
    """Make a table of split, person and camera."""
    splits, pids, camids = zip(*labels, strict=True)
    return pa.table({"split": splits, "pid": pids, "camid": camids})


def table_of(name: str) -> pa.Table:
    """Make labels with the counts of a known set."""
    counts = KNOWN_SETS[name]
    sizes = {
        "train": counts.train_images,
        "query": counts.query_images,
        "gallery": counts.gallery_images,
    }
    return table(
        *(
            (split, 1 + i % counts.train_persons + 10_000 * (split != "train"), camid)
            for split, size in sizes.items()
            for i in range(size)
            for camid in [i % counts.cameras]
        )
    )


@pytest.mark.parametrize("name", ["Market-1501", "CUHK03-NP labeled", "CUHK03-NP detected"])
def test_a_whole_known_set_brings_no_warning(name):
    assert label_warnings(table_of(name)) == []


def test_a_known_set_that_is_not_whole_is_named_with_its_counts():
    labels = table_of("CUHK03-NP detected")[1:]

    assert label_warnings(labels) == [
        "not the whole CUHK03-NP detected: 7364 train images instead of 7365"
    ]


def test_an_unknown_set_brings_no_warning():
    assert label_warnings(table(("train", 1, 1), ("query", 2, 1))) == []


def test_persons_in_train_and_test_are_counted():
    labels = table(("train", 7, 1), ("query", 7, 1), ("gallery", 7, 2))

    assert label_warnings(labels) == [
        "1 persons are in train and in query or gallery, such as 7"
    ]


def test_a_plain_tree_gives_unlabeled_images_of_every_depth_and_case(tmp_path):
    put(tmp_path, "b.JPG", "a/c.Png", "a/deep/er/d.jpeg", "a/notes.txt", "a/jpg")

    records = rows(tmp_path)

    described = [(each.key, each.pid, each.camid, each.split) for each in records]
    assert described == [
        ("a/c.Png", None, None, "unlabeled"),
        ("a/deep/er/d.jpeg", None, None, "unlabeled"),
        ("b.JPG", None, None, "unlabeled"),
    ]


def test_a_record_reads_the_bytes_of_its_file(tmp_path):
    records = folder_records(str(put(tmp_path, "a/b.jpg")))

    (row,) = records.table.to_pylist()
    assert (records.read(row), row["num_bytes"]) == (b"a/b.jpg", len(b"a/b.jpg"))


def test_the_order_of_records_is_that_of_their_keys(tmp_path):
    put(tmp_path, *(f"{name}/{name}.jpg" for name in "qwertyuiop"))

    keys = [record.key for record in rows(tmp_path)]

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


def test_readers_of_files_survive_pickling(tmp_path):
    records = folder_records(str(market(tmp_path)))

    read = pickle.loads(pickle.dumps(records.read))

    keys = records.table.column("key").to_pylist()
    assert [read(row) for row in records.table.to_pylist()] == [key.encode() for key in keys]


def test_folders_behind_links_are_not_walked_and_linked_files_are_images(tmp_path):
    put(tmp_path, "a/b.jpg")
    (tmp_path / "a/circle").symlink_to(tmp_path / "a")
    (tmp_path / "c.jpg").symlink_to(tmp_path / "a/b.jpg")

    assert [record.key for record in rows(tmp_path)] == ["a/b.jpg", "c.jpg"]


def test_a_name_that_is_not_text_is_refused_and_the_others_are_not(tmp_path):
    put(tmp_path, "a.jpg")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).write_bytes(b"1")

    records = folder_records(str(tmp_path))

    refused = [(one.key, one.kind) for one in records.refused]
    assert (len(records), refused) == (1, [("caf\\udce9.jpg", "unreadable")])


def test_mars_names_give_person_and_camera_and_its_test_part_is_left_out(tmp_path):
    put(
        tmp_path,
        "bbox_train/0001/0001C1T0001F001.jpg",
        "bbox_train/0003/0003C6T0012F100.jpg",
        "bbox_test/0002/0002C1T0001F001.jpg",
    )

    assert labels(rows(tmp_path)) == {
        ("bbox_train/0001/0001C1T0001F001.jpg", 1, 1, "train"),
        ("bbox_train/0003/0003C6T0012F100.jpg", 3, 6, "train"),
    }


def test_tracklets_of_a_plain_tree_are_unlabeled_and_in_the_keys(tmp_path):
    put(tmp_path, "12/tracklet3/0001.jpg", "12/tracklet4/0001.jpg")

    assert labels(rows(tmp_path)) == {
        ("12/tracklet3/0001.jpg", None, None, "unlabeled"),
        ("12/tracklet4/0001.jpg", None, None, "unlabeled"),
    }


@pytest.mark.parametrize("make", [market, lambda root: put(root, "x/y.jpg", "z.png")])
def test_a_folder_behind_a_uri_gives_the_records_of_the_local_one(tmp_path, make):
    make(tmp_path)

    behind = folder_records(f"file://{tmp_path}")

    assert behind.table == folder_records(str(tmp_path)).table
    assert [behind.read(row) for row in behind.table.to_pylist()] == [
        row["key"].encode() for row in behind.table.to_pylist()
    ]


def test_files_of_any_filesystem_are_read_many_at_a_time(tmp_path, monkeypatch):
    local = Location(str(tmp_path))
    assert num_readers([local]) == 1

    remote = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(storage, "connect", lambda _: (remote, ""))

    assert num_readers([local]) > 1
