"""Data sets as shards: those that a run names, and those that it makes first."""

import logging
from collections.abc import Sequence
from pathlib import Path

from pyarrow import fs
from rich.console import Console
from rich.progress import Progress

from upreid_ray.config import LabelledDataConfig, SyntheticConfig
from upreid_ray.data.layouts import Record, folder_records, label_warnings, synthetic_records
from upreid_ray.data.shards import MANIFEST_FILE, open_folder, plan_digest, write_shards

logger = logging.getLogger(__name__)


def synthetic_shards(synthetic: SyntheticConfig, storage: str) -> str:
    """Draw the synthetic set unless it is there; return its folder."""
    records = synthetic_records(synthetic)
    source = f"synthetic {synthetic.model_dump_json()}"
    return _shards(records, storage, "synthetic", source, seed=synthetic.seed)


def labelled_shards(data: LabelledDataConfig, storage: str) -> str:
    """Return the shards of a labelled set, made first if they are not there.

    Raises:
        InputError: The folder cannot be used.
    """
    if data.root is None:
        return synthetic_shards(data.synthetic, storage)
    filesystem, path = open_folder(data.root)
    if filesystem.get_file_info(f"{path}/{MANIFEST_FILE}").type == fs.FileType.File:
        return data.root
    records = folder_records(data.root)
    for warning in label_warnings(records):
        logger.warning("%s: %s", data.root, warning)
    return _shards(records, storage, Path(data.root).absolute().name, data.root, seed=0)


def _shards(
    records: Sequence[Record], storage: str, name: str, source: str, *, seed: int
) -> str:
    """Write the records once, to a folder that their digest names."""
    digest = plan_digest(records, seed=seed, max_height=None)
    uri = f"{storage}/data/{name}-{digest[:12]}"
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(f"preparing {name}", total=len(records))
        write_shards(
            records,
            uri,
            source=source,
            seed=seed,
            max_height=None,
            on_progress=lambda done: progress.advance(task, done),
        )
    return uri
