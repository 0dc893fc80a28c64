"""What a user names is recognized, lists of paths among it."""

import io
import pickle
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.sources.test_archives import PEOPLE, Runs, make_lmdb, make_tar, read_all
from upreid_ray.config.errors import InputError
from upreid_ray.config.run import SyntheticConfig
from upreid_ray.data.sources.source import source_records, synthetic_records

DRAWN = SyntheticConfig(
    num_train_identities=1, num_test_identities=1, num_unlabeled_identities=1, height=64
)


ODD_LINES = st.lists(
    st.sampled_from(
        ["a.jpg", "0_0_1_.jpg", " ", "\t", "7", "\u00b2", "\\", "/", "\r\n", "\n", "\0", "://"]
    ),
    max_size=12,
).map("".join)


def put(root: Path, *names: str) -> Path:
    """Write a file of its own content for each name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode(errors="surrogateescape"))
    return root


def is_read_or_refused_in_one_line(source: str) -> bool:
    try:
        return len(source_records(source, {})) > 0
    except InputError as error:
        return "\n" not in str(error)


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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_a_list_that_an_editor_of_windows_saved_is_read(tmp_path, encoding):
    put(tmp_path, "in/a.jpg", "\u00fc b.jpg")
    bom = "\ufeff" if encoding == "utf-16-le" else ""
    text = bom + "in\\a.jpg\r\n\r\n\u00fc b.jpg\r\n"
    (tmp_path / "list.txt").write_bytes(text.encode(encoding))

    read = read_all(source_records(str(tmp_path / "list.txt"), {}))

    assert read == {"in/a.jpg": b"in/a.jpg", "\u00fc b.jpg": "\u00fc b.jpg".encode()}


@pytest.mark.parametrize("label", [" 7", "\t12", "  3 1", ",5", " ; person a", "\tc1s1\t7"])
def test_labels_in_a_list_are_ignored_and_the_log_says_so(tmp_path, caplog, label):
    put(tmp_path, "a.jpg", "b 2.JPG", "c.jpg 3.jpg")
    (tmp_path / "list.txt").write_text(f"a.jpg{label}\nb 2.JPG{label}\nc.jpg 3.jpg\n")

    records = source_records(str(tmp_path / "list.txt"), {})

    assert list(read_all(records)) == ["a.jpg", "b 2.JPG", "c.jpg 3.jpg"]
    assert records.table.column("pid").null_count == len(records)
    (said,) = [line for line in caplog.messages if "labels" in line]
    assert "on 2 of 3 lines" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"C:\\people\\a.jpg\n", r"holds paths of Windows \('C:"),
        (b"\\\\server\\a.jpg\n", "holds paths of Windows"),
        ("a.jpg\n".encode("utf-32"), "is no text file"),
        ("a.jpg\n".encode("utf-16-le"), "is no text file"),
        (b"\xff\xfea\0.", "is no text file"),
        (b"\x89PNG\r\n\x1a\n\0\0", "is no text file"),
    ],
)
def test_a_file_that_is_no_list_of_paths_is_refused_for_what_it_is(tmp_path, content, message):
    (tmp_path / "list.txt").write_bytes(content)

    with pytest.raises(InputError, match=rf"^\S+/list\.txt: {message}[^\n]*$"):
        source_records(str(tmp_path / "list.txt"), {})


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=40) | ODD_LINES.map(lambda text: text.encode()))
@example(content=b"\xff\xfe\x00\xd8")
def test_no_content_of_a_list_ends_in_a_traceback(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)

    assert is_read_or_refused_in_one_line(str(tmp_path / "list.txt"))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(
        st.tuples(
            st.sampled_from(
                ["bounding_box_train", "Query", "gallery", "bbox_train", "train", "x"]
            ),
            st.text(st.sampled_from("-019c_CTF. \\\u00b2\u0663\udce9"), max_size=24),
        ),
        max_size=6,
    ),
    lists=st.lists(st.tuples(st.sampled_from(["list_train.txt", "list_query.txt"]), ODD_LINES)),
)
def test_no_names_in_a_folder_end_in_a_traceback(names, lists):
    with tempfile.TemporaryDirectory() as folder:
        put(Path(folder), *(f"{part}/{name}.jpg" for part, name in names))
        for name, text in lists:
            (Path(folder) / name).write_bytes(text.encode())
        assert is_read_or_refused_in_one_line(folder)


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
