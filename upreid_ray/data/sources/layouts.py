"""Folders of images -> records.

Layouts of labelled sets (Market-1501, Zheng et al. 2015; MSMT17, Wei et al. 2018,
https://arxiv.org/abs/1711.08565; CUHK03-NP, Zhong et al. 2017,
https://arxiv.org/abs/1701.08398; PersonX, Sun and Zheng 2019,
https://arxiv.org/abs/1812.02162; MARS, Zheng et al. 2016) are told apart by their folders.
"""

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from upreid_ray.config.errors import InputError
from upreid_ray.data.sources.records import (
    Records,
    Refused,
    Row,
    Split,
    is_image_name,
    make_records,
    not_text,
)
from upreid_ray.storage import (
    files_below,
    is_file,
    is_folder,
    is_local,
    open_folder,
    opened_folder,
    read_file,
    reading,
)

logger = logging.getLogger(__name__)

# Requests that a process has on their way where files are not local.
NUM_REMOTE_READERS = 16
MARKET_FOLDERS: dict[str, Split] = {
    "bounding_box_train": "train",
    "query": "query",
    "bounding_box_test": "gallery",
}
MARKET_NAME = re.compile(r"(-?\d+)_c(-?\d+)")
MARS_NAME = re.compile(r"(\d{4})C(\d+)T(\d+)F(\d+)")
JUNK_PID = -1
DISTRACTOR_PID = 0
# First and second version of MSMT17: folder of training images, folder of test images.
MSMT17_FOLDERS = (("train", "test"), ("mask_train_v2", "mask_test_v2"))
MSMT17_LISTS: dict[str, Split] = {
    "list_train.txt": "train",
    "list_val.txt": "train",
    "list_query.txt": "query",
    "list_gallery.txt": "gallery",
}
MSMT17_CAMERA = 2  # place of the camera among the parts of a file name
# Folders of downloads that hold two versions of one set, side by side.
VERSIONS = ("labeled", "detected", "MSMT17_V1", "MSMT17_V2")


@dataclass(frozen=True)
class ImageFile:
    """An image that is a file, and what its layout says of it."""

    key: str
    split: Split
    pid: int | None
    camid: int | None
    num_bytes: int


@dataclass(frozen=True)
class FileReader:
    """Reads images that are files; their keys are paths below a folder."""

    uri: str

    def __call__(self, row: Row) -> bytes:
        """Return the bytes of a file."""
        filesystem, path = opened_folder(self.uri)
        return read_file(filesystem, f"{path}/{row['key']}")


class Folder:
    """A folder that may have a layout."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.filesystem, self.path = open_folder(source)

    def has_folder(self, name: str) -> bool:
        """Tell whether there is a folder of this name."""
        return is_folder(self.filesystem, f"{self.path}/{name}")

    def has_file(self, name: str) -> bool:
        """Tell whether there is a file of this name."""
        return is_file(self.filesystem, f"{self.path}/{name}")

    def lines(self, name: str) -> list[str]:
        """Return the lines of a file."""
        return read_file(self.filesystem, f"{self.path}/{name}").decode().splitlines()

    def images(self, below: str = "") -> Iterator[tuple[str, int]]:
        """Yield key and size of every image at any depth."""
        for name, num_bytes in files_below(self.filesystem, f"{self.path}/{below}".rstrip("/")):
            if is_image_name(name):
                yield f"{below}/{name}" if below else name, num_bytes


def folder_records(source: str) -> Records:
    """Return the records of a folder: a labelled layout if it has one, else a plain tree.

    - ``bounding_box_train`` or ``bounding_box_test``: Market-1501's layout, in which PersonX,
      CUHK03-NP and copies of MSMT17 come too. Junk (pid -1) is left out, distractors (pid 0)
      stay.
    - ``list_query.txt`` or ``list_train.txt``: MSMT17, both versions. The validation images
      belong to the train split, as in its paper's counts; test persons, whose numbers begin at
      0 again, follow the train persons.
    - ``bbox_train``: MARS, the tracklets of persons. Its test part is left out: which of it is
      query and which is gallery stands in a file of Matlab's.
    - Anything else: a plain tree of any depth, in which all images are unlabeled. Tracklets in
      folders of their own stay recognizable in the keys, which are paths.

    Raises:
        InputError: The folder cannot be read, has no images, or breaks the rules of its layout.
    """
    folder = Folder(source)
    with reading(source):
        if not is_folder(folder.filesystem, folder.path):
            kind = "is not a folder" if is_file(folder.filesystem, folder.path) else "missing"
            raise InputError(f"{source}: {kind}; give a folder of images or 'synthetic'")
        versions = [name for name in VERSIONS if _layout(Folder(f"{source}/{name}"))]
        if versions:
            first = f"{source}/{versions[0]}"
            raise InputError(
                f"{source}: holds several versions of a set; give one, such as {first}"
            )
        layout = _layout(folder)
        return _labelled(folder, layout(folder)) if layout else _tree(folder)


@dataclass(frozen=True)
class SetCounts:
    """What is counted of a labelled set; without junk, with distractors."""

    train_persons: int
    train_images: int
    query_images: int
    gallery_images: int
    cameras: int


KNOWN_SETS = {
    "Market-1501": SetCounts(751, 12_936, 3_368, 15_913, 6),
    "MSMT17": SetCounts(1_041, 32_621, 11_659, 82_161, 15),
    "CUHK03-NP labeled": SetCounts(767, 7_368, 1_400, 5_328, 2),
    "CUHK03-NP detected": SetCounts(767, 7_365, 1_400, 5_332, 2),
    "PersonX": SetCounts(410, 9_840, 5_136, 30_816, 6),
}
NUM_COUNTS_TO_KNOW = 2  # equal counts that tell which set it is


def label_warnings(table: pa.Table) -> list[str]:
    """Return what is odd about the labels of a table of records, a line each.

    A set that has some counts of a known one, but not all, is incomplete or changed. A person
    in both train and test makes scores too good.
    """
    warnings = []
    of_split = {
        split: table.filter(pc.equal(table.column("split"), split))
        for split in ("train", "query", "gallery")
    }
    persons = {
        split: set(pc.unique(pc.drop_null(members.column("pid"))).to_pylist())
        for split, members in of_split.items()
    }
    counts = SetCounts(
        train_persons=len(persons["train"]),
        train_images=len(of_split["train"]),
        query_images=len(of_split["query"]),
        gallery_images=len(of_split["gallery"]),
        cameras=pc.count_distinct(table.column("camid")).as_py(),
    )
    differing = {
        name: [
            f"{getattr(counts, field)} {field.replace('_', ' ')} instead of {expected}"
            for field, expected in vars(known).items()
            if getattr(counts, field) != expected
        ]
        for name, known in KNOWN_SETS.items()
    }
    nearest = min(differing, key=lambda name: len(differing[name]))
    if 0 < len(differing[nearest]) <= len(vars(counts)) - NUM_COUNTS_TO_KNOW:
        warnings.append(f"not the whole {nearest}: {', '.join(differing[nearest])}")
    both = persons["train"] & (persons["query"] | persons["gallery"]) - {DISTRACTOR_PID}
    if both:
        warnings.append(
            f"{len(both)} persons are in train and in query or gallery, such as {min(both)}"
        )
    return warnings


def _layout(folder: Folder) -> Callable[[Folder], Iterator[ImageFile]] | None:
    """Return what reads a labelled set, or None if the folder is none."""
    if folder.has_folder("bounding_box_train") or folder.has_folder("bounding_box_test"):
        return _market_files
    if folder.has_file("list_train.txt") or folder.has_file("list_query.txt"):
        return _msmt17_files
    if folder.has_folder("bbox_train"):
        return _mars_files
    return None


def _market_files(folder: Folder) -> Iterator[ImageFile]:
    for name, split in MARKET_FOLDERS.items():
        if not folder.has_folder(name):
            continue
        for key, num_bytes in folder.images(name):
            match = MARKET_NAME.match(key.rpartition("/")[2])
            if match is None:
                raise InputError(
                    f"{folder.source}/{key}: no person and camera in its name, such as "
                    "0002_c1s1_000451_03.jpg"
                )
            pid, camid = int(match[1]), int(match[2])
            if pid != JUNK_PID:
                yield ImageFile(key, split, pid, camid, num_bytes)


def _msmt17_files(folder: Folder) -> Iterator[ImageFile]:
    folders = [pair for pair in MSMT17_FOLDERS if folder.has_folder(pair[0])]
    if not folders:
        expected = " or ".join(f"{train}/ and {test}/" for train, test in MSMT17_FOLDERS)
        raise InputError(f"{folder.source}: has lists of MSMT17 but neither {expected}")
    train_folder, test_folder = folders[0]
    num_train_persons = 0
    for name, split in MSMT17_LISTS.items():
        if not folder.has_file(name):
            continue
        part = train_folder if split == "train" else test_folder
        sizes = dict(folder.images(part))
        for line in folder.lines(name):
            image, _, number = line.strip().rpartition(" ")
            parts = image.rpartition("/")[2].split("_")
            if (
                not number.isdigit()
                or len(parts) <= MSMT17_CAMERA
                or not parts[MSMT17_CAMERA].isdigit()
            ):
                raise InputError(f"{folder.source}/{name}: not a line of MSMT17: {line[:80]!r}")
            key = f"{part}/{image}"
            if key not in sizes:
                raise InputError(
                    f"{folder.source}/{key}: cannot be read (it is in {name} but not there)"
                )
            pid = int(number)
            if split == "train":
                num_train_persons = max(num_train_persons, pid + 1)
            else:
                pid += num_train_persons
            yield ImageFile(key, split, pid, int(parts[MSMT17_CAMERA]), sizes[key])


def _mars_files(folder: Folder) -> Iterator[ImageFile]:
    if folder.has_folder("bbox_test"):
        logger.warning("%s: bbox_test is left out, only bbox_train is read", folder.source)
    for key, num_bytes in folder.images("bbox_train"):
        match = MARS_NAME.match(key.rpartition("/")[2])
        if match is None:
            raise InputError(
                f"{folder.source}/{key}: no person, camera and tracklet in its name, such as "
                "0001C1T0001F001.jpg"
            )
        yield ImageFile(key, "train", int(match[1]), int(match[2]), num_bytes)


def _labelled(folder: Folder, files: Iterator[ImageFile]) -> Records:
    rows = list(files)
    names = ("key", "split", "pid", "camid", "num_bytes")
    columns = {name: [getattr(each, name) for each in rows] for name in names}
    return make_records(
        folder.source,
        columns,
        FileReader(folder.source),
        num_readers=num_readers(folder.filesystem),
    )


def _tree(folder: Folder) -> Records:
    keys: list[str] = []
    sizes: list[int] = []
    refused: list[Refused] = []
    for key, num_bytes in folder.images():
        refusal = not_text(key)
        if refusal:
            refused.append(refusal)
        else:
            keys.append(key)
            sizes.append(num_bytes)
    return make_records(
        folder.source,
        {"key": keys, "num_bytes": np.array(sizes, np.int64)},
        FileReader(folder.source),
        num_readers=num_readers(folder.filesystem),
        refused=refused,
    )


def num_readers(filesystem: fs.FileSystem) -> int:
    """Return how many images of a filesystem a process reads at a time."""
    return 1 if is_local(filesystem) else NUM_REMOTE_READERS
