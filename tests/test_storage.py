"""Files and folders are the same to read and write, local or behind a URI."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs

from upreid_ray import storage
from upreid_ray.config.errors import InputError
from upreid_ray.storage import Location


@pytest.fixture(params=["path", "file URI", "remote"])
def folder(request, tmp_path, monkeypatch) -> Iterator[Location]:
    """Return a temporary folder in one of the forms that a user may give."""
    if request.param == "remote":
        remote = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
        monkeypatch.setattr(storage, "connect", lambda _: (remote, ""))
        yield Location("s3://bucket")
    else:
        yield Location(f"file://{tmp_path}" if request.param == "file URI" else str(tmp_path))


def put(root: Path, *names: str) -> None:
    """Write a file of one byte for each name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"1")


def test_what_was_written_is_read(folder):
    (folder / "a/b").make_folder()
    (folder / "a/b" / "c 50%25?.txt").write_whole(b"text")

    assert (folder / "a/b/c 50%25?.txt").read_bytes() == b"text"
    assert (folder / "a/b").names() == ["c 50%25?.txt"]


def test_a_location_knows_what_is_there(folder, tmp_path):
    put(tmp_path, "crops/a.jpg")
    crops = folder / "crops"

    found = [
        (each.is_file(), each.is_folder()) for each in (crops, crops / "a.jpg", crops / "b")
    ]

    assert found == [(False, True), (True, False), (False, False)]
    assert [(crops / name).num_bytes() for name in ("a.jpg", "b")] == [1, None]
    assert (folder.folder_names(), (folder / "none").folder_names()) == (["crops"], [])


def test_files_at_any_depth_are_listed(folder, tmp_path):
    put(tmp_path, "crops/a/b.jpg", "crops/c.png", "others/d.jpg")

    assert sorted((folder / "crops").files_below()) == [("a/b.jpg", 1), ("c.png", 1)]


def test_a_relative_path_is_that_of_the_process_that_named_it(tmp_path, monkeypatch):
    put(tmp_path, "here/a.txt")
    monkeypatch.chdir(tmp_path)
    sent = pickle.dumps(Location("here"))

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    assert pickle.loads(sent).names() == ["a.txt"]


def test_a_location_that_was_used_is_sent_without_its_connection(tmp_path):
    used = Location(f"file://{tmp_path}")
    assert used.is_folder()

    assert b"pyarrow" not in pickle.dumps(used)


def test_a_process_connects_once_for_all_files_of_a_folder(tmp_path):
    put(tmp_path, "a.txt", "b.txt")
    folder = Location(f"file://{tmp_path}")

    assert (folder / "a.txt").filesystem is (folder / "b.txt").filesystem


def test_the_query_of_a_uri_stays_behind_the_path():
    folder = Location("s3://bucket/set?region=eu-west-1")

    assert (folder / "a/b").uri == "s3://bucket/set/a/b?region=eu-west-1"


def test_an_unknown_scheme_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"^nowhere://bucket/x: cannot be opened \([^\n]+\)$"):
        Location("nowhere://bucket/x").is_file()
