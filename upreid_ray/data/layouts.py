"""Where images come from: folder layouts and the synthetic set -> records.

A record says what an image is, without its pixels; `read` brings the encoded bytes.

Layouts of labelled sets (Market-1501, Zheng et al. 2015; MSMT17, Wei et al. 2018,
https://arxiv.org/abs/1711.08565; CUHK03-NP, Zhong et al. 2017,
https://arxiv.org/abs/1701.08398; PersonX, Sun and Zheng 2019,
https://arxiv.org/abs/1812.02162) are told apart by their folders.
"""

import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from PIL import Image

from upreid_ray.config import InputError, SyntheticConfig
from upreid_ray.data import synthetic

Split = Literal["train", "query", "gallery", "unlabeled"]

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
MARKET_FOLDERS: dict[str, Split] = {
    "bounding_box_train": "train",
    "query": "query",
    "bounding_box_test": "gallery",
}
MARKET_NAME = re.compile(r"(-?\d+)_c(-?\d+)")
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


class Record(Protocol):
    """One image of a source."""

    @property
    def key(self) -> str:
        """Name of the image, unique in its source."""

    @property
    def pid(self) -> int | None:
        """Person, where known."""

    @property
    def camid(self) -> int | None:
        """Camera, where known."""

    @property
    def split(self) -> str:
        """Part of the data set."""

    @property
    def num_bytes(self) -> int:
        """Size of the encoded image; may be an estimate."""

    def read(self) -> bytes:
        """Return the encoded image."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image that is a file."""

    path: Path
    key: str
    split: Split
    pid: int | None
    camid: int | None
    num_bytes: int

    def read(self) -> bytes:
        """Return the bytes of the file."""
        return self.path.read_bytes()


@dataclass(frozen=True, slots=True)
class Drawing:
    """An image that is drawn when it is read."""

    portrait: synthetic.Portrait
    seed: int
    height: int
    width: int

    @property
    def key(self) -> str:
        """Name of the portrait."""
        return self.portrait.key

    @property
    def pid(self) -> int | None:
        """Person, None if unlabeled."""
        return self.portrait.pid

    @property
    def camid(self) -> int | None:
        """Camera, None if unlabeled."""
        return self.portrait.camid

    @property
    def split(self) -> str:
        """Part of the synthetic set."""
        return self.portrait.split

    @property
    def num_bytes(self) -> int:
        """An estimate: about 3 bits a pixel."""
        return self.height * self.width * 3 // 8

    def read(self) -> bytes:
        """Draw the image and return it as JPEG."""
        pixels = synthetic.draw(
            self.portrait, seed=self.seed, height=self.height, width=self.width
        )
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        return buffer.getvalue()


def synthetic_records(config: SyntheticConfig) -> list[Record]:
    """Return the records of the synthetic people that ``config`` describes."""
    portraits = synthetic.portraits(
        num_train_identities=config.num_train_identities,
        num_test_identities=config.num_test_identities,
        num_unlabeled_identities=config.num_unlabeled_identities,
        num_cameras=config.num_cameras,
        images_per_camera=config.images_per_camera,
    )
    return [Drawing(p, config.seed, config.height, config.width) for p in portraits]


def folder_records(source: str) -> list[Record]:
    """Return the records of a folder: a labelled layout if it has one, else a plain tree.

    - ``bounding_box_train`` or ``bounding_box_test``: Market-1501's layout, in which PersonX,
      CUHK03-NP and copies of MSMT17 come too. Junk (pid -1) is left out, distractors (pid 0)
      stay.
    - ``list_query.txt`` or ``list_train.txt``: MSMT17, both versions. The validation images
      belong to the train split, as in its paper's counts; test persons, whose numbers begin at
      0 again, follow the train persons.
    - Anything else: a plain tree of any depth, in which all images are unlabeled.

    Raises:
        InputError: The folder cannot be read, has no images, or breaks the rules of its layout.
    """
    root = Path(source)
    if not root.is_dir():
        kind = "is not a folder" if root.exists() else "does not exist"
        msg = f"{source}: {kind}; give a folder of images or 'synthetic'"
        raise InputError(msg)
    versions = [root / name for name in VERSIONS if _layout(root / name) is not _tree_files]
    if versions:
        msg = f"{source}: holds several versions of a set; give one, such as {versions[0]}"
        raise InputError(msg)
    try:
        records = list(_layout(root)(root))
    except OSError as error:
        msg = f"{error.filename}: cannot be read ({error.strerror})"
        raise InputError(msg) from error
    if not records:
        endings = " ".join(sorted(IMAGE_SUFFIXES))
        msg = f"{source}: no images found (files that end in {endings})"
        raise InputError(msg)
    return sorted(records, key=lambda record: record.key)


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


def label_warnings(records: Sequence[Record]) -> list[str]:
    """Return what is odd about the labels of a set, a line each.

    A set that has some counts of a known one, but not all, is incomplete or changed. A person
    in both train and test makes scores too good.
    """
    warnings = []
    of_split = {
        split: [record for record in records if record.split == split]
        for split in ("train", "query", "gallery")
    }
    persons = {
        split: {record.pid for record in members if record.pid is not None}
        for split, members in of_split.items()
    }
    counts = SetCounts(
        train_persons=len(persons["train"]),
        train_images=len(of_split["train"]),
        query_images=len(of_split["query"]),
        gallery_images=len(of_split["gallery"]),
        cameras=len({record.camid for record in records if record.camid is not None}),
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


def _layout(root: Path) -> Callable[[Path], Iterator[ImageFile]]:
    """Return what reads a folder."""
    if any((root / name).is_dir() for name in ("bounding_box_train", "bounding_box_test")):
        return _market_files
    if any((root / name).is_file() for name in ("list_train.txt", "list_query.txt")):
        return _msmt17_files
    return _tree_files


def _market_files(root: Path) -> Iterator[ImageFile]:
    for folder, split in MARKET_FOLDERS.items():
        if not (root / folder).is_dir():
            continue
        for path in _images(root / folder):
            match = MARKET_NAME.match(path.name)
            if match is None:
                msg = (
                    f"{path}: no person and camera in its name, such as 0002_c1s1_000451_03.jpg"
                )
                raise InputError(msg)
            pid, camid = int(match[1]), int(match[2])
            if pid != JUNK_PID:
                yield _image_file(path, root, split, pid, camid)


def _msmt17_files(root: Path) -> Iterator[ImageFile]:
    folders = [pair for pair in MSMT17_FOLDERS if (root / pair[0]).is_dir()]
    if not folders:
        expected = " or ".join(f"{train}/ and {test}/" for train, test in MSMT17_FOLDERS)
        msg = f"{root}: has lists of MSMT17 but neither {expected}"
        raise InputError(msg)
    train_folder, test_folder = folders[0]
    num_train_persons = 0
    for name, split in MSMT17_LISTS.items():
        if not (root / name).is_file():
            continue
        folder = root / (train_folder if split == "train" else test_folder)
        for line in (root / name).read_text().splitlines():
            image, _, number = line.strip().rpartition(" ")
            parts = Path(image).name.split("_")
            if (
                not number.isdigit()
                or len(parts) <= MSMT17_CAMERA
                or not parts[MSMT17_CAMERA].isdigit()
            ):
                msg = f"{root / name}: not a line of MSMT17: {line[:80]!r}"
                raise InputError(msg)
            pid = int(number)
            if split == "train":
                num_train_persons = max(num_train_persons, pid + 1)
            else:
                pid += num_train_persons
            yield _image_file(folder / image, root, split, pid, int(parts[MSMT17_CAMERA]))


def _tree_files(root: Path) -> Iterator[ImageFile]:
    for path in _images(root):
        yield _image_file(path, root, "unlabeled", None, None)


def _images(root: Path) -> Iterator[Path]:
    def stop(error: OSError) -> None:
        raise error

    for folder, _, names in os.walk(root, onerror=stop):
        for name in names:
            if Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(folder, name)


def _image_file(
    path: Path, root: Path, split: Split, pid: int | None, camid: int | None
) -> ImageFile:
    key = path.relative_to(root).as_posix()
    return ImageFile(path, key, split, pid, camid, path.stat().st_size)
