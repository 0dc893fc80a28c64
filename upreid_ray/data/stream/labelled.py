"""Query and gallery images of a set, in blocks.

Dimensions: n images of a block, H x W pixels.
"""

import numpy as np
import pyarrow.compute as pc

from upreid_ray.data.shards.manifest import EVALUATION_SPLITS
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.data.stream.decode import Columns, decode_images
from upreid_ray.data.stream.ray_data import MIN_BLOCK_IMAGES


class LabelledImages:
    """The query and gallery images of a set of shards, in the manifest's order.

    Attributes:
        row_groups: Row groups of the images.
        num_images: Number of images.
        num_blocks: Number of blocks that `read` can return.
    """

    def __init__(self, shards: ShardSet, *, height: int, width: int) -> None:
        self._size = (height, width)
        self.row_groups = shards.row_groups(EVALUATION_SPLITS)
        self.num_images = self.row_groups.num_images
        self.num_blocks = -(-self.num_images // MIN_BLOCK_IMAGES)

    def read(self, number: int) -> Columns:
        """Read and decode block ``number``.

        Returns:
            ``image``, uint8 ``[n, 3, H, W]``; ``decoded``, bool ``[n]``; ``shard`` ``[n]``, the
            place of the shard in the manifest; ``place`` ``[n]``, the number of each image in
            the order of the set; and ``pid``, ``camid`` and ``is_query`` ``[n]``, which mean
            nothing where an image could not be read.
        """
        start = number * MIN_BLOCK_IMAGES
        ranges = self.row_groups.ranges(start, start + MIN_BLOCK_IMAGES)
        names = ["image", "pid", "camid", "split"]
        table, shards = self.row_groups.read_intact(ranges, names)
        columns = decode_images(table.column("image"), *self._size)
        columns["shard"] = shards
        for name in ("pid", "camid"):
            columns[name] = pc.fill_null(table.column(name), -1).to_numpy()
        is_query = pc.equal(table.column("split"), "query")
        columns["is_query"] = pc.fill_null(is_query, fill_value=False).to_numpy()
        columns["place"] = np.arange(start, start + len(table))
        return columns

    def encoded(self, place: int) -> bytes:
        """Return one image as it is stored."""
        table = self.row_groups.read(self.row_groups.ranges(place, place + 1), ["image"])
        content: bytes = table.column("image")[0].as_py()
        return content
