"""Data sets that a job makes into shards before it begins."""

import logging
from pathlib import Path

from upreid_ray.config.downstream import LabelledDataConfig
from upreid_ray.config.run import SyntheticConfig
from upreid_ray.data.shards.images import ImageRules
from upreid_ray.data.shards.manifest import MANIFEST_FILE
from upreid_ray.data.shards.preparation import write_shards
from upreid_ray.data.shards.progress import image_progress
from upreid_ray.data.sources.records import Records
from upreid_ray.data.sources.source import source_records, synthetic_records
from upreid_ray.storage import is_file, open_folder

logger = logging.getLogger(__name__)


def synthetic_shards(config: SyntheticConfig, storage: str) -> str:
    """Draw the synthetic set unless it is there; return its folder."""
    source = f"synthetic {config.model_dump_json()}"
    return _shards(synthetic_records(config), storage, "synthetic", source, seed=config.seed)


def labelled_shards(data: LabelledDataConfig, storage: str) -> str:
    """Return the shards of a labelled set, made first if they are not there.

    Raises:
        InputError: The source cannot be used.
    """
    if data.root is None:
        return synthetic_shards(data.synthetic, storage)
    filesystem, path = open_folder(data.root)
    if is_file(filesystem, f"{path}/{MANIFEST_FILE}"):
        return data.root
    records = source_records(data.root, {})
    return _shards(records, storage, Path(data.root).absolute().name, data.root, seed=0)


def _shards(records: Records, storage: str, name: str, source: str, *, seed: int) -> str:
    """Write the records once, to a folder that their digest names."""
    rules = ImageRules()
    uri = f"{storage}/data/{name}-{records.digest(seed, rules)[:12]}"
    with image_progress(f"preparing {name}", len(records)) as advance:
        write_shards(records, uri, source=source, seed=seed, rules=rules, on_progress=advance)
    return uri
