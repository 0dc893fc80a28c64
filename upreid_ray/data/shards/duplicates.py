"""Search for duplicates among the images of a set.

Dimensions: N images.
"""

from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_BITS = 64
# A greater distance would need many more tables with shorter keys.
MAX_DISTANCE = 6
# Number of blocks of bits that are equal in any two near duplicates. More blocks make longer
# keys, fewer candidates for each image, and more tables.
NUM_EQUAL_BLOCKS = 3

Originals = NDArray[np.int64]


def equal_originals(digests: NDArray[Any]) -> Originals:
    """Return the index of the first equal digest for each of ``[N]`` digests, ``[N]``."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    return first[inverse]


def near_originals(fingerprints: NDArray[np.int64], *, max_distance: int) -> Originals:
    """Return the index of the original for each of ``[N]`` fingerprints, ``[N]``.

    In their order, an image is its own original unless an original before it differs in at
    most ``max_distance`` bits. Therefore a set without its duplicates has no duplicates.

    The candidates are found in tables, as in Manku et al. 2007
    (https://doi.org/10.1145/1242572.1242592): the bits are cut into ``max_distance + 3``
    blocks. Two near fingerprints agree in at least three blocks, and thus have the same key in
    the table of these blocks. Time and memory grow with N and with the number of such pairs.
    """
    originals = equal_originals(fingerprints)
    distinct = np.unique(originals)
    pairs = _near_pairs(fingerprints[distinct], max_distance)
    original_of = np.arange(len(distinct))
    # Pairs are sorted by the later image: whether the earlier one is kept is known by then.
    for earlier, later in pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))].tolist():
        if original_of[later] == later and original_of[earlier] == earlier:
            original_of[later] = earlier
    place = np.zeros(len(fingerprints), np.int64)
    place[distinct] = distinct[original_of]
    return place[originals]


def _near_pairs(fingerprints: NDArray[np.int64], max_distance: int) -> NDArray[np.int64]:
    """Return the pairs ``[P, 2]`` of distinct fingerprints that are near, the earlier first."""
    bits = fingerprints.view(np.uint64)
    blocks = np.array_split(np.arange(NUM_BITS), max_distance + NUM_EQUAL_BLOCKS)
    masks = [sum(1 << int(bit) for bit in block) for block in blocks]
    found = [np.zeros((0, 2), np.int64)]
    for chosen in combinations(masks, NUM_EQUAL_BLOCKS):
        keys = bits & np.uint64(sum(chosen))
        order = np.argsort(keys, kind="stable")
        in_order = keys[order]
        # Fingerprints with the same key stand side by side: compare each with the next, then
        # with the one after, until no two of the same key are that far apart.
        left = np.arange(len(order))
        for distance in range(1, len(order)):
            left = left[left + distance < len(order)]
            left = left[in_order[left] == in_order[left + distance]]
            if len(left) == 0:
                break
            pair = np.stack([order[left], order[left + distance]], axis=1)
            differing = np.bitwise_count(bits[pair[:, 0]] ^ bits[pair[:, 1]])
            found.append(pair[differing <= max_distance])
    return np.unique(np.concatenate(found), axis=0)
