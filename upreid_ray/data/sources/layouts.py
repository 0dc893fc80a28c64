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

from upreid_ray.config.errors import InputError
from upreid_ray.data.sources.records import (
    Record,
    Records,
    Refused,
    Split,
    is_image_name,
    make_records,
    not_text,
    num_readers,
)
from upreid_ray.storage import Location, reading

logger = logging.getLogger(__name__)

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
    """An image file, with the labels that its layout gives."""

    key: str
    split: Split
    pid: int | None
    camid: int | None
    num_bytes: int


@dataclass(frozen=True)
class FileReader:
    """Reads image files, whose keys are paths below a folder."""

    folder: Location

    def __call__(self, record: Record) -> bytes:
        """Return the content of a file."""
        return (self.folder / record["key"]).read_bytes()


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
    folder = Location(source)
    with reading(source):
        if not folder.is_folder():
            kind = "is not a folder" if folder.is_file() else "missing"
            raise InputError(f"{source}: {kind}; give a folder of images or 'synthetic'")
        versions = [name for name in VERSIONS if _layout(folder / name)]
        if versions:
            raise InputError(
                f"{source}: holds several versions of a set; give one, such as "
                f"{folder / versions[0]}"
            )
        layout = _layout(folder)
        return _labelled(folder, layout(folder)) if layout else _tree(folder)


@dataclass(frozen=True)
class SetCounts:
    """Counts of a labelled set, without junk and with distractors."""

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
NUM_COUNTS_TO_KNOW = 2  # number of equal counts by which a set is recognized


def label_warnings(table: pa.Table) -> list[str]:
    """Return a warning in one line for each oddity in the labels of a table of records.

    A set that shares some counts with a known set, but not all, is incomplete or changed. A
    person in both train and test makes scores too high.
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


def _layout(folder: Location) -> Callable[[Location], Iterator[ImageFile]] | None:
    """Return the reader of the layout of a labelled set, None if the folder has no layout."""
    if any((folder / name).is_folder() for name in ("bounding_box_train", "bounding_box_test")):
        return _market_files
    if any((folder / name).is_file() for name in ("list_train.txt", "list_query.txt")):
        return _msmt17_files
    if (folder / "bbox_train").is_folder():
        return _mars_files
    return None


def _market_files(folder: Location) -> Iterator[ImageFile]:
    for name, split in MARKET_FOLDERS.items():
        if not (folder / name).is_folder():
            continue
        for key, num_bytes in _images(folder, name):
            match = MARKET_NAME.match(key.rpartition("/")[2])
            if match is None:
                raise InputError(
                    f"{folder}/{key}: no person and camera in its name, such as "
                    "0002_c1s1_000451_03.jpg"
                )
            pid, camid = int(match[1]), int(match[2])
            if pid != JUNK_PID:
                yield ImageFile(key, split, pid, camid, num_bytes)


def _msmt17_files(folder: Location) -> Iterator[ImageFile]:
    folders = [pair for pair in MSMT17_FOLDERS if (folder / pair[0]).is_folder()]
    if not folders:
        expected = " or ".join(f"{train}/ and {test}/" for train, test in MSMT17_FOLDERS)
        raise InputError(f"{folder}: has lists of MSMT17 but neither {expected}")
    train_folder, test_folder = folders[0]
    num_train_persons = 0
    for name, split in MSMT17_LISTS.items():
        if not (folder / name).is_file():
            continue
        part = train_folder if split == "train" else test_folder
        sizes = dict(_images(folder, part))
        for line in (folder / name).read_bytes().decode().splitlines():
            image, _, number = line.strip().rpartition(" ")
            parts = image.rpartition("/")[2].split("_")
            if (
                not number.isdigit()
                or len(parts) <= MSMT17_CAMERA
                or not parts[MSMT17_CAMERA].isdigit()
            ):
                raise InputError(f"{folder}/{name}: not a line of MSMT17: {line[:80]!r}")
            key = f"{part}/{image}"
            if key not in sizes:
                raise InputError(
                    f"{folder}/{key}: cannot be read (it is in {name} but not there)"
                )
            pid = int(number)
            if split == "train":
                num_train_persons = max(num_train_persons, pid + 1)
            else:
                pid += num_train_persons
            yield ImageFile(key, split, pid, int(parts[MSMT17_CAMERA]), sizes[key])


def _mars_files(folder: Location) -> Iterator[ImageFile]:
    if (folder / "bbox_test").is_folder():
        logger.warning("%s: bbox_test is left out, only bbox_train is read", folder)
    for key, num_bytes in _images(folder, "bbox_train"):
        match = MARS_NAME.match(key.rpartition("/")[2])
        if match is None:
            raise InputError(
                f"{folder}/{key}: no person, camera and tracklet in its name, such as "
                "0001C1T0001F001.jpg"
            )
        yield ImageFile(key, "train", int(match[1]), int(match[2]), num_bytes)


def _labelled(folder: Location, files: Iterator[ImageFile]) -> Records:
    rows = list(files)
    names = ("key", "split", "pid", "camid", "num_bytes")
    columns = {name: [getattr(each, name) for each in rows] for name in names}
    return make_records(
        folder.uri,
        columns,
        FileReader(folder),
        num_readers=num_readers([folder]),
    )


def _tree(folder: Location) -> Records:
    keys: list[str] = []
    sizes: list[int] = []
    refused: list[Refused] = []
    for key, num_bytes in _images(folder):
        refusal = not_text(key)
        if refusal:
            refused.append(refusal)
        else:
            keys.append(key)
            sizes.append(num_bytes)
    return make_records(
        folder.uri,
        {"key": keys, "num_bytes": np.array(sizes, np.int64)},
        FileReader(folder),
        num_readers=num_readers([folder]),
        refused=refused,
    )


def _images(folder: Location, below: str = "") -> Iterator[tuple[str, int]]:
    """Yield key and size in bytes of every image in a part of a folder, at any depth."""
    part = folder / below if below else folder
    for name, num_bytes in part.files_below():
        if is_image_name(name):
            yield f"{below}/{name}" if below else name, num_bytes
