"""Where images come from: folder layouts and the synthetic set -> records.

A record says what an image is, without its pixels; `read` brings the encoded bytes.
"""

import io
import os
import re
from collections.abc import Iterator
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
MARKET_NAME = re.compile(r"(-?\d+)_c(\d+)")
JUNK_PID = -1


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
    """Return the records of a folder: Market-1501's layout if it has it, else a plain tree.

    A folder with ``bounding_box_train`` has Market-1501's layout; junk (pid -1) is left out,
    distractors (pid 0) stay. In a plain tree of any depth all images are unlabeled.

    Raises:
        InputError: The folder cannot be read, or has no images.
    """
    root = Path(source)
    if not root.is_dir():
        kind = "is not a folder" if root.exists() else "does not exist"
        msg = f"{source}: {kind}; give a folder of images or 'synthetic'"
        raise InputError(msg)
    is_market = (root / "bounding_box_train").is_dir()
    try:
        records = list(_market_files(root) if is_market else _tree_files(root))
    except OSError as error:
        msg = f"{error.filename}: cannot be read ({error.strerror})"
        raise InputError(msg) from error
    if not records:
        endings = " ".join(sorted(IMAGE_SUFFIXES))
        msg = f"{source}: no images found (files that end in {endings})"
        raise InputError(msg)
    return sorted(records, key=lambda record: record.key)


def _market_files(root: Path) -> Iterator[ImageFile]:
    for folder, split in MARKET_FOLDERS.items():
        if not (root / folder).is_dir():
            continue
        for path in _images(root / folder):
            match = MARKET_NAME.match(path.name)
            if match is None:
                msg = f"{path}: not a Market-1501 file name, such as 0002_c1s1_000451_03.jpg"
                raise InputError(msg)
            pid, camid = int(match[1]), int(match[2])
            if pid != JUNK_PID:
                yield _image_file(path, root, split, pid, camid)


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
