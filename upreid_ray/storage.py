"""Files and folders, local or behind any URI that pyarrow knows.

Ray Data, Ray Train and Parquet read through pyarrow's filesystems. Therefore this module does
too: another library, such as universal_pathlib, would need a second driver and a second set of
credentials for each kind of storage.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

import pyarrow as pa
from pyarrow import fs

from upreid_ray.config.errors import InputError, first_line
from upreid_ray.config.section import absolute


@dataclass(frozen=True)
class Location:
    """A file or folder, local or behind a URI; used like a ``pathlib.Path``.

    It is absolute from the beginning, and holds text only: it can be pickled to any process,
    which connects when it first reads or writes, once for each root.

    Attributes:
        root: Absolute path or URI that was named.
        below: Path below the root. It is no part of the URI, thus not unquoted: a file may be
            called ``50%25.jpg``.
    """

    root: str
    below: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", absolute(self.root))

    def __truediv__(self, name: str) -> Self:
        """Return the location of a file or folder in this folder, at any depth."""
        return replace(self, below=f"{self.below}/{name}" if self.below else name)

    def __str__(self) -> str:
        return self.uri

    @property
    def uri(self) -> str:
        """Absolute path, or URI."""
        if not self.below:
            return self.root
        root, mark, query = (
            self.root.partition("?") if "://" in self.root else (self.root, "", "")
        )
        return f"{root.rstrip('/')}/{self.below}{mark}{query}"

    @property
    def path(self) -> str:
        """Path in the filesystem."""
        _, path = connect(self.root)
        if not self.below:
            return path
        return f"{path.rstrip('/')}/{self.below}" if path else self.below

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def filesystem(self) -> fs.FileSystem:
        """Filesystem, to which this process is connected.

        Raises:
            InputError: The URI has an unknown scheme or cannot be opened.
        """
        return connect(self.root)[0]

    @property
    def is_local(self) -> bool:
        """Whether this is on a disk of this machine, where reading waits for no network."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def is_file(self) -> bool:
        """Return whether there is a file."""
        return self.filesystem.get_file_info(self.path).type == fs.FileType.File

    def is_folder(self) -> bool:
        """Return whether there is a folder."""
        return self.filesystem.get_file_info(self.path).type == fs.FileType.Directory

    def num_bytes(self) -> int | None:
        """Return the size of a file, None if there is no file."""
        info = self.filesystem.get_file_info(self.path)
        return info.size if info.type == fs.FileType.File else None

    def open_input_file(self) -> pa.NativeFile:
        """Open a file for reading at any place."""
        return self.filesystem.open_input_file(self.path)

    def read_bytes(self) -> bytes:
        """Return the content of a file."""
        with self.filesystem.open_input_stream(self.path) as stream:
            content: bytes = stream.read()
        return content

    def write_whole(self, content: bytes) -> None:
        """Write a file under another name first, so that it is never there in part."""
        filesystem, path = self.filesystem, self.path
        with filesystem.open_output_stream(f"{path}.part") as stream:
            stream.write(content)
        filesystem.move(f"{path}.part", path)

    def delete_file(self) -> None:
        """Delete a file."""
        self.filesystem.delete_file(self.path)

    def make_folder(self) -> None:
        """Make a folder, and those above it, unless it is there."""
        self.filesystem.create_dir(self.path, recursive=True)

    def names(self) -> list[str]:
        """Return the sorted names of the files and folders in a folder."""
        if self.is_local:
            return sorted(os.listdir(self.path))  # noqa: PTH208, millions of names, no paths
        found = self.filesystem.get_file_info(fs.FileSelector(self.path))
        return sorted(each.base_name for each in found)

    def folder_names(self) -> list[str]:
        """Return the sorted names of the folders in a folder; none if it does not exist."""
        selector = fs.FileSelector(self.path, allow_not_found=True)
        found = self.filesystem.get_file_info(selector)
        return sorted(each.base_name for each in found if each.type == fs.FileType.Directory)

    def files_below(self) -> Iterator[tuple[str, int]]:
        """Yield the path below a folder, and the size in bytes, of every file at any depth.

        Local folders are walked by hand: pyarrow follows links to folders, in circles too, and
        stops at names that are not text.
        """
        path = self.path
        if not self.is_local:
            for each in self.filesystem.get_file_info(fs.FileSelector(path, recursive=True)):
                if each.type == fs.FileType.File:
                    yield each.path[len(path.rstrip("/")) + 1 :], each.size
            return
        folders = [""]
        while folders:
            below = folders.pop()
            with os.scandir(os.path.join(path, below)) as entries:  # noqa: PTH118, for speed
                for entry in entries:
                    name = f"{below}/{entry.name}" if below else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(name)
                    elif entry.is_file():
                        yield name, entry.stat().st_size


@lru_cache(maxsize=64)
def connect(root: str) -> tuple[fs.FileSystem, str]:
    """Return the filesystem of an absolute path or URI, and the path in it.

    Each process has one connection for each root, not one for each file.

    Raises:
        InputError: The URI has an unknown scheme or cannot be opened.
    """
    try:
        if "://" in root:
            filesystem, path = fs.FileSystem.from_uri(root)
        else:
            filesystem, path = fs.LocalFileSystem(), root
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{root}: cannot be opened ({first_line(error)})") from error
    return filesystem, path


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Turn the error of a filesystem into one line that names the source.

    Raises:
        InputError: Something could not be read in this block.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        name = getattr(error, "filename", None) or source
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{name}: cannot be read ({reason})") from error
