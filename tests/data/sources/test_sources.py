"""What a user names is recognized, lists of paths among it."""

import io
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.data.sources.test_archives import PEOPLE, Runs, make_lmdb, make_tar, read_all
from upreid_ray.config.errors import InputError
from upreid_ray.config.run import SyntheticConfig
from upreid_ray.data.sources.source import source_records, synthetic_records

DRAWN = SyntheticConfig(
    num_train_identities=1, num_test_identities=1, num_unlabeled_identities=1, height=64
)


def put(root: Path, *names: str) -> Path:
    """Write a file of its own content for each name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_each_kind_of_source_is_recognized(tmp_path, scheme):
    put(tmp_path, "tree/a.jpg")
    make_lmdb(tmp_path / "lmdb", PEOPLE)
    make_tar(put(tmp_path / "tars", "readme.txt") / "b.tar", {"b.jpg": b"b"})
    put(tmp_path / "table", "readme.txt")
    pq.write_table(pa.table({"key": ["c"], "image": [b"c"]}), tmp_path / "table/c.parquet")
    (tmp_path / "list.txt").write_text("tree/a.jpg\n")
    (tmp_path / "tars.txt").write_text(f"{tmp_path}/tars/b.tar\n")
    expected = {
        "tree": {"a.jpg"},
        "lmdb": set(PEOPLE),
        "lmdb/data.mdb": set(PEOPLE),
        "tars": {"b.jpg"},
        "tars/b.tar": {"b.jpg"},
        "tars.txt": {"b.jpg"},
        "table": {"c"},
        "table/c.parquet": {"c"},
        "list.txt": {"tree/a.jpg"},
    }

    found = {name: source_records(f"{scheme}{tmp_path}/{name}", {}) for name in expected}

    assert {name: set(read_all(records)) for name, records in found.items()} == expected


@pytest.mark.parametrize("kind", ["txt", "pkl"])
def test_paths_of_a_list_are_absolute_or_from_its_folder_or_uris(tmp_path, kind):
    put(tmp_path, "in/a.jpg", "b.jpg", "c.jpg")
    paths = ["a.jpg", str(tmp_path / "b.jpg"), f"file://{tmp_path}/c.jpg"]
    if kind == "txt":
        (tmp_path / "in/list.txt").write_text("\n".join(["", *paths, " "]))
    else:
        (tmp_path / "in/list.pkl").write_bytes(pickle.dumps(paths))

    read = read_all(source_records(f"{tmp_path}/in/list.{kind}", {}))

    assert read == dict(zip(paths, [b"in/a.jpg", b"b.jpg", b"c.jpg"], strict=True))


def test_a_list_in_the_working_folder_is_read(tmp_path, monkeypatch):
    put(tmp_path, "a.jpg", "list.txt")
    (tmp_path / "list.txt").write_text("a.jpg")
    monkeypatch.chdir(tmp_path)

    assert read_all(source_records("list.txt", {})) == {"a.jpg": b"a.jpg"}


def test_a_listed_file_that_is_missing_fails_only_when_it_is_read(tmp_path):
    (tmp_path / "list.txt").write_text("missing.jpg")

    records = source_records(str(tmp_path / "list.txt"), {})

    with pytest.raises(FileNotFoundError):
        read_all(records)


@pytest.mark.parametrize("content", [{"a": 1}, [1, 2], "text"])
def test_a_pickle_that_is_no_list_of_paths_is_refused(tmp_path, content):
    (tmp_path / "list.pkl").write_bytes(pickle.dumps(content))

    with pytest.raises(InputError, match=r"^\S+/list\.pkl: holds no list of paths$"):
        source_records(str(tmp_path / "list.pkl"), {})


def test_a_pickled_list_that_would_run_code_is_refused_and_does_not(tmp_path):
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([Runs(tmp_path / "made")]))

    with pytest.raises(InputError, match=r"^\S+/list\.pkl: cannot be read [^\n]+touch[^\n]*$"):
        source_records(str(tmp_path / "list.pkl"), {})

    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "does not exist"),
        ("a.jpg", "is no source; give"),
        ("a.tar.gz", "is compressed"),
        ("empty.txt", "no images found"),
    ],
)
def test_what_is_no_source_is_refused_in_one_line(tmp_path, name, message):
    put(tmp_path, "a.jpg", "a.tar.gz", "empty.txt")
    (tmp_path / "empty.txt").write_text("\n")

    with pytest.raises(InputError, match=rf"^{tmp_path}/{name}: {message}[^\n]*$"):
        source_records(str(tmp_path / name), {})


def test_columns_of_what_is_not_parquet_are_refused(tmp_path):
    put(tmp_path, "a.jpg")

    with pytest.raises(InputError, match=r"^--columns: \S+ is not Parquet$"):
        source_records(str(tmp_path), {"key": "path"})


def test_the_synthetic_set_has_every_split():
    splits = set(synthetic_records(DRAWN).table.column("split").to_pylist())

    assert splits == {"train", "query", "gallery", "unlabeled"}


def test_a_drawing_reads_as_a_jpeg_of_the_size_asked_for():
    drawn = read_all(synthetic_records(DRAWN))

    with Image.open(io.BytesIO(next(iter(drawn.values())))) as image:
        assert (image.format, image.size) == ("JPEG", (64, 64))
