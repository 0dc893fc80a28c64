"""The sets of shards that settings ask for, made first if they are not there."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from upreid_ray.config.downstream import LabelledDataConfig
from upreid_ray.config.pretrain import DataConfig
from upreid_ray.config.run import SyntheticConfig
from upreid_ray.data.shards.images import ImageRules
from upreid_ray.data.shards.preparation import write_shards
from upreid_ray.data.shards.progress import image_progress
from upreid_ray.data.shards.shard_set import ShardSet, check_labels
from upreid_ray.data.sources.records import Records
from upreid_ray.data.sources.source import source_records, synthetic_records

logger = logging.getLogger(__name__)


def synthetic_shards(config: SyntheticConfig, storage: str) -> ShardSet:
    """Return the synthetic set, drawn first if it is not there."""
    source = f"synthetic {config.model_dump_json()}"
    return _shards(synthetic_records(config), storage, "synthetic", source, seed=config.seed)


def training_shards(data: DataConfig, storage: str) -> ShardSet:
    """Return the shards to pre-train on: those that the user names, or the synthetic set.

    Raises:
        InputError: The shards cannot be read.
    """
    return (
        ShardSet.open(data.shards) if data.shards else synthetic_shards(data.synthetic, storage)
    )


def labelled_shards(
    data: LabelledDataConfig, storage: str, *, scored: bool, ignore_cameras: bool = False
) -> ShardSet:
    """Return the shards of a labelled set, made first in ``storage`` if they are not there.

    If ``scored``, the set must have query and gallery images that can be scored, which is
    checked before shards are made; see `check_labels`.

    Raises:
        InputError: The source cannot be used.
    """
    if data.root is None:
        return synthetic_shards(data.synthetic, storage)
    if ShardSet.exists(data.root):
        return ShardSet.open(data.root)
    records = source_records(data.root, {})
    if scored:
        check_labels(data.root, records.table, ignore_cameras=ignore_cameras)
    return _shards(records, storage, Path(data.root).absolute().name, data.root, seed=0)


def _shards(records: Records, storage: str, name: str, source: str, *, seed: int) -> ShardSet:
    """Write the records once, to a folder whose name has their digest."""
    rules = ImageRules()
    uri = f"{storage}/data/{name}-{records.digest(seed, rules)[:12]}"
    if ShardSet.exists(uri):  # there is no progress to show
        showing: AbstractContextManager[Callable[[int], None]] = nullcontext(lambda _: None)
    else:
        showing = image_progress(f"preparing {name}", len(records))
    with showing as advance:
        return write_shards(
            records, uri, source=source, seed=seed, rules=rules, on_progress=advance
        )
