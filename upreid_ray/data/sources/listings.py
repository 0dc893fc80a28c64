"""Lists of paths -> records."""

import codecs
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from upreid_ray.config.errors import InputError
from upreid_ray.data.sources.pickles import read_pickle
from upreid_ray.data.sources.records import (
    IMAGE_SUFFIXES,
    Record,
    Records,
    is_image_name,
    make_records,
    not_text,
    num_readers,
)
from upreid_ray.storage import Location, reading

logger = logging.getLogger(__name__)

# Number of files whose sizes are looked up; the others get the average size.
NUM_SIZES = 256
# A path that ends as images do, and what follows it on its line, such as a label.
LABELLED_LINE = re.compile(
    rf"(.+(?:{'|'.join(map(re.escape, IMAGE_SUFFIXES))}))(?:\s+|\s*[,;]\s*)\S.*", re.IGNORECASE
)
WINDOWS_DRIVE = re.compile(r"[A-Za-z]:\\|\\\\")


def listed_paths(source: str) -> list[str]:
    """Return the entries of a list: a line each, or a pickled list or tuple.

    On a line, what follows the path of an image, such as a label, is ignored: nothing tells
    whether it is a person, a class or a camera. Backslashes of paths without slashes, as
    Windows writes them, are read as slashes.

    Raises:
        InputError: It cannot be read, or holds something else.
    """
    location = Location(source)
    with reading(source):
        content = location.read_bytes()
    if location.path.endswith((".pkl", ".pickle")):
        entries = read_pickle(content, source)
        if not isinstance(entries, list | tuple) or not all(
            isinstance(entry, str | bytes) for entry in entries
        ):
            raise InputError(f"{source}: holds no list of paths")
        return [
            e if isinstance(e, str) else e.decode(errors="surrogateescape") for e in entries
        ]
    return _paths_of_lines(text_lines(content, source), source)


def _paths_of_lines(lines: Sequence[str], source: str) -> list[str]:
    paths = []
    num_labelled = 0
    for line in lines:
        labelled = None if is_image_name(line) else LABELLED_LINE.fullmatch(line)
        num_labelled += labelled is not None
        path = labelled[1] if labelled else line
        if WINDOWS_DRIVE.match(path):
            raise InputError(
                f"{source}: holds paths of Windows ({path[:80]!r}); write paths from the "
                "folder of the list"
            )
        paths.append(path if "/" in path else path.replace("\\", "/"))
    if num_labelled:
        logger.warning(
            "%s: what follows the path on %d of %d lines, such as labels, is ignored",
            source,
            num_labelled,
            len(lines),
        )
    return paths


def text_lines(content: bytes, source: str) -> list[str]:
    """Return the lines of a text file, without blank ones and blanks around them.

    It is UTF-8, or UTF-16 with a byte order mark, as editors on Windows write it. Bytes that
    are not UTF-8 become surrogates.

    Raises:
        InputError: It is no text.
    """
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        if is_utf16:
            text = content.decode("utf-16")
        else:
            text = content.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(f"{source}: is no text file; save the list as UTF-8, a path on a line")
    return [line.strip() for line in re.split("[\r\n]+", text) if line.strip()]


def listed_records(source: str, paths: Sequence[str]) -> Records:
    """Return the images in a list; a missing file is refused when it is read.

    A path is absolute, relative to the folder of the list, or a URI. It is the key.

    Raises:
        InputError: The list is empty.
    """
    keys = [path for path in paths if not_text(path) is None]
    reader = ListedReader(
        Location(source.rpartition("/")[0] or ("/" if source[:1] == "/" else "."))
    )
    locations = [reader.location(key) for key in keys[:: -(-len(keys) // NUM_SIZES) or 1]]
    sizes = [location.num_bytes() for location in locations]
    known = [size for size in sizes if size is not None]
    mean_size = sum(known) // max(1, len(known))
    return make_records(
        source,
        {"key": paths, "num_bytes": np.full(len(paths), mean_size)},
        reader,
        num_readers=num_readers(locations),
    )


@dataclass(frozen=True)
class ListedReader:
    """Function that reads files, whose keys are paths (maybe below a folder) or URIs."""

    folder: Location

    def location(self, key: str) -> Location:
        """Return where an image is."""
        if PurePosixPath(key).is_absolute() or "://" in key:
            return Location(key)
        return self.folder / key

    def __call__(self, record: Record) -> bytes:
        """Return the bytes of a file."""
        return self.location(record["key"]).read_bytes()
