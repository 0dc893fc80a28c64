"""Images that do not decode: they are left out and counted, up to a limit.

This module does not import torch, which would add seconds to the start of each task process.

Dimensions: n images.
"""

import logging
from collections import Counter

from upreid_ray.config.errors import RunFailed
from upreid_ray.data.shards.row_groups import RowGroups
from upreid_ray.data.stream.decode import Columns

logger = logging.getLogger(__name__)


def count_undecodable(columns: Columns, groups: RowGroups) -> Counter[str]:
    """Count the images that do not decode, by the path or URI of their shard.

    Args:
        columns: ``decoded``, bool ``[n]``, and ``shard`` ``[n]``, the place of each image's
            shard in the manifest.
        groups: Row groups from which the images were read.
    """
    places = columns["shard"][~columns["decoded"]].tolist()
    return Counter(str(groups.folder / groups.shard_names[place]) for place in places)


def check_undecodable(counts: Counter[str], num_images: int, limit: float) -> str:
    """Check that few enough images fail to decode.

    Args:
        counts: Number of such images in each shard.
        num_images: Number of all images.
        limit: Largest fraction that may fail to decode, ``--data.max_undecodable``.

    Returns:
        A part of a sentence that says how many images do not decode, and where most of them
        lie; empty if all images decode.

    Raises:
        RunFailed: More images fail to decode, or all of them.
    """
    if not counts:
        return ""
    ((shard, count),) = counts.most_common(1)
    told = f"{counts.total()} of {num_images} images do not decode, {count} of them in {shard}"
    if counts.total() > min(limit * num_images, num_images - 1):
        raise RunFailed(
            f"{told}; --data.max_undecodable {limit:g} allows fewer: restore the shard, make "
            "the set again with jobs/prepare.py, or allow more"
        )
    return told


def without_undecodable(columns: Columns, groups: RowGroups, limit: float) -> Columns:
    """Return the rows of the images that decode; the log says how many do not.

    Raises:
        RunFailed: Too many images fail to decode.
    """
    decoded = columns["decoded"]
    told = check_undecodable(count_undecodable(columns, groups), len(decoded), limit)
    if told:
        logger.warning("left out: %s", told)
    return {name: column[decoded] for name, column in columns.items()}
