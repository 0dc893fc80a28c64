"""Folders, local or behind any URI that pyarrow knows."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from upreid_ray.config.errors import InputError, first_line


def open_folder(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the filesystem and the path of a folder, a file or a URI of one.

    Raises:
        InputError: The URI has an unknown scheme or cannot be opened.
    """
    try:
        if "://" in uri:
            filesystem, path = fs.FileSystem.from_uri(uri)
        else:
            filesystem, path = fs.LocalFileSystem(), str(Path(uri).absolute())
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{uri}: cannot be opened ({first_line(error)})") from error
    return filesystem, path


opened_folder = lru_cache(maxsize=64)(open_folder)
"""`open_folder` for readers: a connection for each URI and process, not for each image."""


def is_local(filesystem: fs.FileSystem) -> bool:
    """Tell whether files are those of this machine, where reading waits for no network."""
    return isinstance(filesystem, fs.LocalFileSystem)


def is_file(filesystem: fs.FileSystem, path: str) -> bool:
    """Tell whether there is a file."""
    return filesystem.get_file_info(path).type == fs.FileType.File


def is_folder(filesystem: fs.FileSystem, path: str) -> bool:
    """Tell whether there is a folder."""
    return filesystem.get_file_info(path).type == fs.FileType.Directory


def read_file(filesystem: fs.FileSystem, path: str) -> bytes:
    """Return the bytes of a file."""
    with filesystem.open_input_stream(path) as stream:
        content: bytes = stream.read()
    return content


def write_whole(filesystem: fs.FileSystem, path: str, content: bytes) -> None:
    """Write a file under another name first, so that it is never there in part."""
    with filesystem.open_output_stream(f"{path}.part") as stream:
        stream.write(content)
    filesystem.move(f"{path}.part", path)


def names_in(filesystem: fs.FileSystem, path: str) -> list[str]:
    """Return the names of what is in a folder, not deeper."""
    if is_local(filesystem):
        return sorted(os.listdir(path))  # noqa: PTH208, millions of names, no paths
    return sorted(each.base_name for each in filesystem.get_file_info(fs.FileSelector(path)))


def files_below(filesystem: fs.FileSystem, path: str) -> Iterator[tuple[str, int]]:
    """Yield the path below a folder, and the size in bytes, of every file at any depth.

    Local folders are walked by hand: pyarrow follows links to folders, in circles too, and
    stops at names that are not text.
    """
    if not is_local(filesystem):
        for each in filesystem.get_file_info(fs.FileSelector(path, recursive=True)):
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


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Turn what a filesystem raises into one line that names the source.

    Raises:
        InputError: Something inside could not be read.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        name = getattr(error, "filename", None) or source
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{name}: cannot be read ({reason})") from error
