"""A source that a user names -> records."""

import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
from PIL import Image

from upreid_ray.config.errors import InputError
from upreid_ray.config.run import SyntheticConfig
from upreid_ray.data.sources import synthetic
from upreid_ray.data.sources.archives import (
    LMDB_FILE,
    inner_lmdb,
    lmdb_records,
    parquet_records,
    tar_records,
)
from upreid_ray.data.sources.layouts import folder_records, label_warnings
from upreid_ray.data.sources.listings import listed_paths, listed_records
from upreid_ray.data.sources.records import Record, Records
from upreid_ray.storage import Location, reading

logger = logging.getLogger(__name__)

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
LIST_SUFFIXES = (".txt", ".lst", ".list", ".pkl", ".pickle")


def source_records(source: str, columns: Mapping[str, str]) -> Records:
    """Return the records of a source that a user names.

    - A folder: labelled or a plain tree (`folder_records`); with ``data.mdb``, or with
      a single folder that has it, an LMDB; with tar or Parquet files at its top, these.
    - A file: an LMDB (``.mdb``, ``.lmdb``), a tar file, a Parquet file, or a list of paths
      (``.txt``, ``.lst``, ``.list``, ``.pkl``) of images or of tar or Parquet files, whose
      columns may have other names (see `parquet_records`).

    Raises:
        InputError: The source cannot be used.
    """
    location = Location(source)
    with reading(source):
        if location.is_file():
            records = _file_records(source, columns)
        elif location.is_folder():
            records = _folder_records(source, columns)
        else:
            raise InputError(
                f"{source}: does not exist; give a folder or file of images or 'synthetic'"
            )
    if columns and not records.table.column_names.count("row_group"):
        raise InputError(f"--columns: {source} is not Parquet")
    for warning in label_warnings(records.table):
        logger.warning("%s: %s", source, warning)
    return records


def _file_records(source: str, columns: Mapping[str, str]) -> Records:
    name = source.lower()
    if name.endswith((".mdb", ".lmdb")):
        return lmdb_records(source)
    if name.endswith(LIST_SUFFIXES):
        paths = listed_paths(source)
        return _archives(source, paths, columns) or listed_records(source, paths)
    archives = _archives(source, [source], columns)
    if archives is None:
        raise InputError(
            f"{source}: is no source; give a folder, an LMDB, tar or Parquet files, or a list "
            f"of paths that ends in {' '.join(LIST_SUFFIXES)}"
        )
    return archives


def _folder_records(source: str, columns: Mapping[str, str]) -> Records:
    folder = Location(source)
    names = folder.names()
    if LMDB_FILE in names or inner_lmdb(folder) is not None:
        return lmdb_records(source)
    for suffixes in (TAR_SUFFIXES, (".parquet",)):
        found = [(folder / name).uri for name in names if name.endswith(suffixes)]
        archives = _archives(source, found, columns)
        if archives is not None:
            return archives
    return folder_records(source)


def _archives(source: str, files: list[str], columns: Mapping[str, str]) -> Records | None:
    """Return the records of tar or Parquet files, or None if the files are neither."""
    if files and all(file.endswith(".parquet") for file in files):
        return parquet_records(source, files, columns)
    if files and all(file.endswith(TAR_SUFFIXES) for file in files):
        packed = [file for file in files if not file.endswith(".tar")]
        if packed:
            raise InputError(
                f"{packed[0]}: is compressed; images in it cannot be found without unpacking"
            )
        return tar_records(source, files)
    return None


def synthetic_records(config: SyntheticConfig) -> Records:
    """Return the records of the synthetic people that ``config`` describes."""
    portraits = synthetic.portraits(
        num_train_identities=config.num_train_identities,
        num_test_identities=config.num_test_identities,
        num_unlabeled_identities=config.num_unlabeled_identities,
        num_cameras=config.num_cameras,
        images_per_camera=config.images_per_camera,
    )
    num_bytes = config.height * config.width * 3 // 8  # an estimate: about 3 bits a pixel
    table = pa.table(
        {
            "key": pa.array([p.key for p in portraits], pa.large_string()),
            "split": [p.split for p in portraits],
            "pid": pa.array([p.pid for p in portraits], pa.int32()),
            "camid": pa.array([p.camid for p in portraits], pa.int32()),
            "num_bytes": [num_bytes] * len(portraits),
            **{
                name: [getattr(p, name) for p in portraits]
                for name in ("identity", "camera", "index")
            },
        }
    )
    return Records(table, Drawings(config.seed, config.height, config.width), 1, ())


@dataclass(frozen=True)
class Drawings:
    """Function that draws the synthetic people when they are read."""

    seed: int
    height: int
    width: int

    def __call__(self, record: Record) -> bytes:
        """Draw an image and return it as JPEG."""
        portrait = synthetic.Portrait(
            record["key"],
            record["identity"],
            record["camera"],
            record["index"],
            record["split"],
        )
        pixels = synthetic.draw(portrait, seed=self.seed, height=self.height, width=self.width)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        return buffer.getvalue()
