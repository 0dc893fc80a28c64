"""Tar files, LMDBs and Parquet files become records."""

import io
import pickle
import tarfile
from pathlib import Path

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from upreid_ray.config.errors import InputError
from upreid_ray.data.sources.archives import lmdb_records, parquet_records, tar_records
from upreid_ray.data.sources.records import Records
from upreid_ray.data.sources.source import source_records


def read_all(records: Records) -> dict[str, bytes]:
    """Return the bytes of each image by its key, read as a task does it."""
    read = pickle.loads(pickle.dumps(records.read))
    return {row["key"]: read(row) for row in records.table.to_pylist()}


def make_tar(file: Path, members: dict[str, bytes], *odd: tarfile.TarInfo) -> str:
    """Write a tar file; odd members have no content."""
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in odd:
            tar.addfile(member)
    return str(file)


def link(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return member


def test_a_tar_file_gives_its_images_and_nothing_else(tmp_path):
    images = {"0001.jpg": b"one", "deep/er/0002.PNG": b"second", "x" * 200 + ".jpg": b"long"}
    file = make_tar(tmp_path / "a.tar", {**images, "0001.json": b"{}", "0001.cls": b"7"})

    records = tar_records(file, [file])

    assert read_all(records) == images
    assert records.table.column("num_bytes").to_pylist() == [3, 6, 4]


def test_keys_of_several_tar_files_begin_with_the_file(tmp_path):
    files = [
        make_tar(tmp_path / f"{name}.tar", {"0001.jpg": name.encode()}) for name in ("a", "b")
    ]

    assert read_all(tar_records(str(tmp_path), files)) == {
        "a.tar/0001.jpg": b"a",
        "b.tar/0001.jpg": b"b",
    }


def test_names_that_lead_out_of_a_tar_file_are_keys_and_no_paths(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    names = {"../outside.jpg": b"1", "/absolute.jpg": b"2"}
    file = make_tar(inside / "a.tar", names)

    assert set(read_all(tar_records(file, [file])).values()) == {b"1", b"2"}
    assert [path.name for path in tmp_path.rglob("*.jpg")] == []


def test_links_in_a_tar_file_are_refused_and_not_followed(tmp_path):
    file = make_tar(tmp_path / "a.tar", {"a.jpg": b"1"}, link("b.jpg"))

    records = tar_records(file, [file])

    assert list(read_all(records)) == ["a.jpg"]
    assert [(one.key, one.kind) for one in records.refused] == [("b.jpg", "unreadable")]


def test_a_tar_file_that_is_cut_gives_what_is_before_the_cut(tmp_path):
    file = make_tar(tmp_path / "a.tar", {f"{i}.jpg": bytes([i]) * 2000 for i in range(9)})
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[:6000])

    records = tar_records(file, [file])

    assert list(read_all(records))[:2] == ["0.jpg", "1.jpg"]
    assert [one.key for one in records.refused] == [file]


def test_what_is_no_tar_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar file" * 100)

    with pytest.raises(InputError, match=r"^\S+/a\.tar: ends early: [^\n]+$"):
        tar_records("a.tar", [str(tmp_path / "a.tar")])


def make_lmdb(folder: Path, images: dict[str, bytes], *, subdir: bool = True) -> str:
    env = lmdb.open(str(folder), map_size=2**20, subdir=subdir)
    with env.begin(write=True) as transaction:
        for key, image in images.items():
            transaction.put(key.encode(), image)
    env.close()
    return str(folder)


PEOPLE = {"00_00_0000_00000000": b"first", "00_00_0000_00000001": b"second"}


@pytest.mark.parametrize(
    "content",
    [list(PEOPLE), {"keys": list(PEOPLE)}, [key.encode() for key in PEOPLE]],
    ids=["list", "dictionary", "bytes"],
)
@pytest.mark.parametrize("place", ["lup/keys.pkl", "keys.pkl"])
def test_an_lmdb_is_read_by_its_list_of_keys(tmp_path, content, place):
    source = make_lmdb(tmp_path / "lup", {**PEOPLE, "not listed": b"x"})
    (tmp_path / place).write_bytes(pickle.dumps(content))

    assert read_all(lmdb_records(source)) == PEOPLE


def test_an_lmdb_that_is_one_file_is_read(tmp_path):
    source = make_lmdb(tmp_path / "lup.mdb", PEOPLE, subdir=False)

    assert read_all(lmdb_records(source)) == PEOPLE


def test_a_key_that_an_lmdb_does_not_have_fails_when_it_is_read(tmp_path):
    source = make_lmdb(tmp_path / "lup", PEOPLE)
    (tmp_path / "keys.pkl").write_bytes(pickle.dumps(["missing"]))
    records = lmdb_records(source)

    with pytest.raises(ValueError, match="no such key"):
        read_all(records)


def test_an_lmdb_is_found_in_the_only_folder_of_a_folder(tmp_path):
    make_lmdb(tmp_path / "lmdb", PEOPLE)
    (tmp_path / "keys.pkl").write_bytes(pickle.dumps({"keys": list(PEOPLE)[:1]}))

    assert list(read_all(source_records(str(tmp_path), {}))) == list(PEOPLE)[:1]


@pytest.mark.parametrize("beside", ["crops", "a.jpg"])
def test_an_lmdb_in_a_folder_beside_other_images_is_refused(tmp_path, beside):
    make_lmdb(tmp_path / "lmdb", PEOPLE)
    (tmp_path / beside).mkdir()

    with pytest.raises(InputError, match=rf"^[^\n]+: holds {beside} beside the LMDB [^\n]+$"):
        source_records(str(tmp_path), {})


@pytest.mark.parametrize("with_list", [False, True])
def test_entries_of_an_lmdb_that_are_no_images_are_skipped(tmp_path, with_list):
    entries = {**PEOPLE, "__keys__": b"keys", "__len__": b"2"}
    source = make_lmdb(tmp_path / "lup", entries)
    if with_list:
        (tmp_path / "keys.pkl").write_bytes(pickle.dumps(list(entries)))

    assert read_all(lmdb_records(source)) == PEOPLE


def test_persons_of_a_list_of_keys_are_kept_and_their_images_stay_unlabeled(tmp_path):
    source = make_lmdb(tmp_path / "lup", {**PEOPLE, "__len__": b"2"})
    content = {"keys": ["__len__", *reversed(PEOPLE)], "pids": [0, 7, 3]}
    (tmp_path / "keys.pkl").write_bytes(pickle.dumps(content))

    labels = lmdb_records(source).table.select(["key", "pid", "split"]).to_pylist()

    first, second = PEOPLE
    assert labels == [
        {"key": first, "pid": 3, "split": "unlabeled"},
        {"key": second, "pid": 7, "split": "unlabeled"},
    ]


@pytest.mark.parametrize("pids", [[1], ["a", "b"], 7, [1.5, 2], []])
def test_persons_that_do_not_fit_the_keys_are_refused(tmp_path, pids):
    source = make_lmdb(tmp_path / "lup", PEOPLE)
    (tmp_path / "keys.pkl").write_bytes(pickle.dumps({"keys": list(PEOPLE), "pids": pids}))

    with pytest.raises(InputError, match=r"^\S+/keys\.pkl: its pids are not [^\n]+$"):
        lmdb_records(source)


class Runs:
    """A pickle that would make a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("content", [[1, 2], {"names": []}, "text"])
def test_keys_that_are_no_list_are_refused(tmp_path, content):
    source = make_lmdb(tmp_path / "lup", PEOPLE)
    (tmp_path / "keys.pkl").write_bytes(pickle.dumps(content))

    with pytest.raises(InputError, match=r"^\S+/keys\.pkl: holds neither [^\n]+$"):
        lmdb_records(source)


def test_a_list_of_keys_that_would_run_code_is_refused_and_does_not(tmp_path):
    source = make_lmdb(tmp_path / "lup", PEOPLE)
    (tmp_path / "keys.pkl").write_bytes(pickle.dumps([Runs(tmp_path / "made")]))

    with pytest.raises(InputError, match=r"^\S+/keys\.pkl: cannot be read [^\n]+touch[^\n]*$"):
        lmdb_records(source)

    assert not (tmp_path / "made").exists()


def test_what_is_no_lmdb_is_refused_in_one_line(tmp_path):
    (tmp_path / "data.mdb").write_bytes(b"no lmdb" * 2000)

    with pytest.raises(InputError, match=r"^\S+: cannot be read as LMDB [^\n]+$"):
        lmdb_records(str(tmp_path))


def test_parquet_files_with_our_names_need_no_columns(tmp_path):
    table = pa.table(
        {
            "key": ["a", "b"],
            "image": [b"1", b"2"],
            "pid": [7, None],
            "camid": [1, None],
            "split": ["train", "unlabeled"],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")

    records = parquet_records("", [str(tmp_path / "a.parquet")], {})

    assert read_all(records) == {"a": b"1", "b": b"2"}
    labels = records.table.select(["pid", "camid", "split"]).to_pydict()
    assert labels == {"pid": [7, None], "camid": [1, None], "split": ["train", "unlabeled"]}


def test_columns_of_parquet_files_may_have_other_names_and_lie_in_structures(tmp_path):
    images = [{"bytes": bytes([i]), "path": f"{i}.jpg"} for i in range(5)]
    table = pa.table({"picture": images, "who": [str(i) for i in range(5)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    columns = {"image": "picture.bytes", "key": "picture.path", "pid": "who"}

    records = parquet_records("", [str(tmp_path / "a.parquet")], columns)

    assert read_all(records) == {f"{i}.jpg": bytes([i]) for i in range(5)}
    assert records.table.column("pid").to_pylist() == list(range(5))
    assert records.table.column("unit").to_pylist() == [0, 0, 1, 1, 2]


def test_images_without_keys_are_called_after_file_and_row(tmp_path):
    for name in ("a", "b"):
        pq.write_table(pa.table({"image": [name.encode()] * 2}), tmp_path / f"{name}.parquet")

    records = parquet_records(
        "", [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")], {}
    )

    assert read_all(records) == {
        "a.parquet/00000000": b"a",
        "a.parquet/00000001": b"a",
        "b.parquet/00000000": b"b",
        "b.parquet/00000001": b"b",
    }


@pytest.mark.parametrize(
    ("table", "columns", "message"),
    [
        (
            {"jpg": [b"1"]},
            {},
            r"has no column image; name it with --columns image=NAME \(.*jpg",
        ),
        ({"image": [b"1"]}, {"pid": "who"}, "has no column who"),
        ({"image": [b"1"], "split": ["dev"]}, {}, "split 'dev' is none of"),
        ({"image": [b"1"], "pid": ["anna"]}, {}, "column pid cannot be used"),
        ({"image": [b"1"], "pid": [2**40]}, {}, "column pid cannot be used"),
    ],
)
def test_columns_that_do_not_fit_are_refused_in_one_line(tmp_path, table, columns, message):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")

    with pytest.raises(InputError, match=rf"^[^\n]*{message}[^\n]*$"):
        parquet_records("source", [str(tmp_path / "a.parquet")], columns)


def test_what_is_no_parquet_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet" * 9)

    with pytest.raises(InputError, match=r"^\S+/a\.parquet: cannot be read [^\n]+$"):
        parquet_records("", [str(tmp_path / "a.parquet")], {})


def test_an_image_of_a_parquet_file_that_is_none_fails_when_it_is_read(tmp_path):
    pq.write_table(pa.table({"image": pa.array([None], pa.binary())}), tmp_path / "a.parquet")
    records = parquet_records("", [str(tmp_path / "a.parquet")], {})

    with pytest.raises(ValueError, match="has no bytes"):
        read_all(records)


def test_second_mentions_of_a_key_are_refused(tmp_path):
    table = pa.table({"key": ["b", "a", "b"], "image": [b"1", b"2", b"3"]})
    pq.write_table(table, tmp_path / "a.parquet")

    records = parquet_records("", [str(tmp_path / "a.parquet")], {})

    assert read_all(records) == {"a": b"2", "b": b"1"}
    assert [(one.key, one.kind) for one in records.refused] == [("b", "repeated")]


def test_the_digest_tells_records_apart(tmp_path):
    def digest(**columns: list) -> str:
        table = {"key": ["a", "b"], "image": [b"1", b"2"], **columns}
        pq.write_table(pa.table(table), tmp_path / "a.parquet")
        return parquet_records("", [str(tmp_path / "a.parquet")], {}).digest(0)

    digests = [
        digest(),
        digest(key=["ab", ""]),
        digest(pid=[1, 2]),
        digest(pid=[1, None]),
        digest(camid=[1, 2]),
        digest(image=[b"1", bytes(np.random.default_rng(0).bytes(99))]),
    ]

    assert (len(set(digests)), digest()) == (len(digests), digests[0])
