"""Folders of images -> records.

Layouts of labelled sets (Market-1501, Zheng et al. 2015; MSMT17, Wei et al. 2018,
https://arxiv.org/abs/1711.08565; CUHK03-NP, Zhong et al. 2017,
https://arxiv.org/abs/1701.08398; PersonX, Sun and Zheng 2019,
https://arxiv.org/abs/1812.02162; MARS, Zheng et al. 2016) are told apart by their folders.
"""

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from upreid_ray.config.errors import InputError
from upreid_ray.data.sources.listings import text_lines
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

# Folders of each split; the first one that is there is read. `train_all`, `train` and `gallery`
# are those of copies that were sorted for other programs.
MARKET_FOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("bounding_box_train", "train_all", "train"),
    "query": ("query",),
    "gallery": ("bounding_box_test", "gallery", "test"),
}
MARKET_NAME = re.compile(r"(-?[0-9]{1,9})_c(-?[0-9]{1,9})(?![0-9])")
MARKET_EXAMPLE = "0002_c1s1_000451_03.jpg"
MARS_NAME = re.compile(r"([0-9]{4})C([0-9]{1,9})T[0-9]+F[0-9]+")
MARS_EXAMPLE = "0001C1T0001F001.jpg"
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
MSMT17_LINE = re.compile(r"(.*[^\s])\s+([0-9]{1,9})")
MSMT17_NAME = re.compile(r"[^_]*_[^_]*_([0-9]{1,9})(_.*)?")  # the third part is the camera
# Names by which a labelled set shows in a tree, in any letter case. A folder called `train` or
# `test` alone may be anything.
SURE_NAMES = {
    "bounding_box_train",
    "bounding_box_test",
    "query",
    "gallery",
    "bbox_train",
    "bbox_test",
    "mask_test_v2",
    *MSMT17_LISTS,
}
LAYOUT_NAMES = SURE_NAMES | {"train_all", "train", "test", "mask_train_v2"}
MACOS_PREFIX = "._"  # of files in which macOS keeps attributes of the file of the other name


@dataclass(frozen=True)
class ImageFile:
    """An image file, with the labels that its layout gives."""

    key: str
    split: Split
    pid: int | None
    camid: int | None
    num_bytes: int


Layout = Callable[[Location, Mapping[str, str]], Iterator[ImageFile | Refused]]


@dataclass(frozen=True)
class FileReader:
    """Function that reads image files, whose keys are paths below a folder."""

    folder: Location

    def __call__(self, record: Record) -> bytes:
        """Return the content of a file."""
        return (self.folder / record["key"]).read_bytes()


def folder_records(source: str) -> Records:
    """Return the records of a folder: a labelled layout if it has one, else a plain tree.

    - ``bounding_box_train`` or ``bounding_box_test``: Market-1501's layout, in which PersonX,
      CUHK03-NP and copies of MSMT17 come too. Junk (pid -1) is left out, distractors (pid 0)
      stay. A folder ``query`` or ``gallery`` beside ``train`` is this layout, too.
    - ``list_query.txt`` or ``list_train.txt``: MSMT17, both versions. The validation images
      belong to the train split, as in its paper's counts; test persons, whose numbers begin at
      0 again, follow the train persons.
    - ``bbox_train``: MARS, the tracklets of persons. Its test part is left out: which of it is
      query and which is gallery stands in a file of Matlab's.
    - Anything else: a plain tree of any depth, in which all images are unlabeled. Tracklets in
      folders of their own stay recognizable in the keys, which are paths.

    The letter case of these names does not matter. An image whose name does not fit the layout
    is refused alone, unless most names of its folder do not fit. If all images of a tree are in
    one labelled set, that set is read; otherwise a labelled set in a tree is refused, since its
    test images must not become training images.

    Raises:
        InputError: The folder cannot be read, has no images, or breaks the rules of its layout.
    """
    folder = Location(source)
    with reading(source):
        if not folder.is_folder():
            kind = "is not a folder" if folder.is_file() else "missing"
            raise InputError(f"{source}: {kind}; give a folder of images or 'synthetic'")
        layout = _layout(folder)
        return _labelled(folder, *layout) if layout else _tree(folder)


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


def _layout(folder: Location) -> tuple[Layout, dict[str, str]] | None:
    """Return the layout of a labelled set and its entries; None if the folder has no layout.

    The entries are the names in the folder by their lower-case names.
    """
    entries: dict[str, str] = {}
    if not_text(folder.below):
        return None
    for name in folder.names():
        lower = name.lower()
        if lower not in LAYOUT_NAMES or (folder / name).is_folder() == (lower in MSMT17_LISTS):
            continue
        if lower in entries:
            raise InputError(f"{folder}: holds both {entries[lower]} and {name}; keep one")
        entries[lower] = name
    if entries.keys() & {"bounding_box_train", "bounding_box_test"}:
        return _market_files, entries
    if entries.keys() & {"list_train.txt", "list_query.txt"}:
        return _msmt17_files, entries
    if "bbox_train" in entries:
        return _mars_files, entries
    if entries.keys() & {"query", "gallery"}:
        return _market_files, entries
    return None


def _market_files(
    folder: Location, entries: Mapping[str, str]
) -> Iterator[ImageFile | Refused]:
    for split, names in MARKET_FOLDERS.items():
        name = next((entries[name] for name in names if name in entries), None)
        if name is not None:
            yield from _named_files(folder, name, split, MARKET_NAME, MARKET_EXAMPLE)


def _named_files(
    folder: Location, name: str, split: Split, pattern: re.Pattern[str], example: str
) -> Iterator[ImageFile | Refused]:
    """Yield the images of a part of a set whose names have person and camera, without junk.

    Raises:
        InputError: Most names do not fit the pattern.
    """
    num_fitting = 0
    misnamed = []
    for key, num_bytes in _images(folder, name):
        file_name = key.rpartition("/")[2]
        match = pattern.match(file_name)
        if match is not None:
            num_fitting += 1
            if int(match[1]) != JUNK_PID:
                yield ImageFile(key, split, int(match[1]), int(match[2]), num_bytes)
            continue
        reason = f"no person and camera in its name, such as {example}"
        yield Refused(key, "misnamed", reason)
        if not file_name.startswith(MACOS_PREFIX):
            misnamed.append(key)
    num_named = num_fitting + len(misnamed)
    if len(misnamed) > num_fitting:
        raise InputError(
            f"{folder}/{misnamed[0]}: no person and camera in its name, such as {example}; the "
            f"same holds for {len(misnamed)} of {num_named} images in {name}; to read "
            "unlabeled images, give their folder"
        )
    if misnamed:
        logger.warning(
            "%s/%s: %d images without person and camera in their names are left out, such as "
            "%s",
            folder,
            name,
            len(misnamed),
            misnamed[0],
        )


def _msmt17_files(
    folder: Location, entries: Mapping[str, str]
) -> Iterator[ImageFile | Refused]:
    folders = [pair for pair in MSMT17_FOLDERS if pair[0] in entries]
    if not folders:
        expected = " or ".join(f"{train}/ and {test}/" for train, test in MSMT17_FOLDERS)
        raise InputError(f"{folder}: has lists of MSMT17 but neither {expected}")
    train_folder, test_folder = (entries.get(name, name) for name in folders[0])
    num_train_persons = 0
    for lower, split in MSMT17_LISTS.items():
        if lower not in entries:
            continue
        name = entries[lower]
        part = train_folder if split == "train" else test_folder
        sizes = dict(_images(folder, part))
        for line in text_lines((folder / name).read_bytes(), f"{folder}/{name}"):
            fields = MSMT17_LINE.fullmatch(line)
            image = fields[1].replace("\\", "/") if fields else ""
            labels = MSMT17_NAME.fullmatch(image.rpartition("/")[2])
            if fields is None or labels is None:
                raise InputError(f"{folder}/{name}: not a line of MSMT17: {line[:80]!r}")
            key = f"{part}/{image}"
            if key not in sizes:
                raise InputError(
                    f"{folder}/{key}: cannot be read (it is in {name} but not there)"
                )
            pid = int(fields[2])
            if split == "train":
                num_train_persons = max(num_train_persons, pid + 1)
            else:
                pid += num_train_persons
            yield ImageFile(key, split, pid, int(labels[1]), sizes[key])


def _mars_files(folder: Location, entries: Mapping[str, str]) -> Iterator[ImageFile | Refused]:
    if "bbox_test" in entries:
        logger.warning("%s: bbox_test is left out, only bbox_train is read", folder)
    return _named_files(folder, entries["bbox_train"], "train", MARS_NAME, MARS_EXAMPLE)


def _labelled(folder: Location, layout: Layout, entries: Mapping[str, str]) -> Records:
    rows: list[ImageFile] = []
    refused: list[Refused] = []
    for each in layout(folder, entries):
        if isinstance(each, Refused):
            refused.append(each)
        else:
            rows.append(each)
    names = ("key", "split", "pid", "camid", "num_bytes")
    columns = {name: [getattr(each, name) for each in rows] for name in names}
    return make_records(
        folder.uri,
        columns,
        FileReader(folder),
        num_readers=num_readers([folder]),
        refused=refused,
    )


def _tree(folder: Location) -> Records:
    keys: list[str] = []
    sizes: list[int] = []
    places: set[str] = set()
    for key, num_bytes in folder.files_below():
        place, _, name = key.rpartition("/")
        if name.lower() in MSMT17_LISTS:
            places.add(key)
        if not is_image_name(name):
            continue
        if not name.startswith(MACOS_PREFIX):
            places.add(place)
        keys.append(key)
        sizes.append(num_bytes)
    inner = _set_in_tree(folder, places)
    if inner is not None:
        logger.info("%s: reading the labelled set in %s", folder, inner[0])
        return _labelled(*inner)
    return make_records(
        folder.uri,
        {"key": keys, "num_bytes": np.array(sizes, np.int64)},
        FileReader(folder),
        num_readers=num_readers([folder]),
    )


def _set_in_tree(
    folder: Location, places: Collection[str]
) -> tuple[Location, Layout, dict[str, str]] | None:
    """Return the labelled set that has all images of a tree; None if there is no such set.

    ``places`` are the paths of the folders of images, and of lists of MSMT17.

    Raises:
        InputError: There are several sets, other images beside a set, or test images without
            a known layout.
    """
    parts_of: dict[str, dict[str, str]] = {}
    for place in places:
        parts = place.split("/")
        for depth, part in enumerate(parts):
            if part.lower() in LAYOUT_NAMES:
                parts_of.setdefault("/".join(parts[:depth]), {})[part.lower()] = part
    sets = {
        below: parts
        for below, parts in parts_of.items()
        if parts.keys() & SURE_NAMES or parts.keys() >= {"train", "test"}
    }
    outer = [
        below
        for below in sets
        if not any(_is_in(below, other) for other in sets.keys() - {below})
    ]
    if not outer:
        return None
    if len(outer) > 1:
        raise InputError(
            f"{folder}: holds several versions of a set, or several sets; give one, such as "
            f"{folder / max(outer)}"
        )
    (below,) = outer
    root = folder / below if below else folder
    layout = _layout(root) if below else None
    if layout is None:
        inside = sets[below].items()
        train = next((f"{root / part}" for name, part in inside if "train" in name), "")
        other = next((part for name, part in inside if "train" not in name), "")
        raise InputError(
            f"{root}: holds {other or train} like a labelled set, but its layout is not known; "
            f"give {train or 'a folder of training images'}, or a list of images"
        )
    if not all(_is_in(place, below) for place in places):
        raise InputError(
            f"{folder}: holds the labelled set {root} beside other images; give one of them"
        )
    return root, *layout


def _is_in(path: str, folder: str) -> bool:
    """Return whether a path in a tree is that of a folder or below it."""
    return not folder or path == folder or path.startswith(f"{folder}/")


def _images(folder: Location, below: str = "") -> Iterator[tuple[str, int]]:
    """Yield key and size in bytes of every image in a part of a folder, at any depth."""
    part = folder / below if below else folder
    for name, num_bytes in part.files_below():
        if is_image_name(name):
            yield f"{below}/{name}" if below else name, num_bytes
