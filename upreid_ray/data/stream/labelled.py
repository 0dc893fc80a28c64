"""Query and gallery images of a set, in blocks.

Dimensions: n images of a block, H x W pixels.
"""

import pyarrow.compute as pc

from upreid_ray.data.shards.manifest import EVALUATION_SPLITS
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.data.stream.decode import Columns, decode_images
from upreid_ray.data.stream.ray_data import MIN_BLOCK_IMAGES


class LabelledImages:
    """The query and gallery images of a set of shards, in the manifest's order.

    Attributes:
        num_blocks: Number of blocks that `read` can return.
    """

    def __init__(self, shards: ShardSet, *, height: int, width: int) -> None:
        self._size = (height, width)
        self._groups = shards.row_groups(EVALUATION_SPLITS)
        self.num_blocks = -(-self._groups.num_images // MIN_BLOCK_IMAGES)

    def read(self, number: int) -> Columns:
        """Read and decode block ``number``; images that do not decode are left out.

        Returns:
            ``image``, uint8 ``[n, 3, H, W]``, and ``pid``, ``camid`` and ``is_query`` ``[n]``.
        """
        start = number * MIN_BLOCK_IMAGES
        ranges = self._groups.ranges(start, start + MIN_BLOCK_IMAGES)
        table = self._groups.read(ranges, ["image", "pid", "camid", "split"])
        columns = decode_images(table.column("image"), *self._size)
        decoded = columns.pop("decoded")
        columns["pid"] = table.column("pid").to_numpy()
        columns["camid"] = table.column("camid").to_numpy()
        columns["is_query"] = pc.equal(table.column("split"), "query").to_numpy()
        return {name: column[decoded] for name, column in columns.items()}
