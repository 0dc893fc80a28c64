"""Which groups of a batch each worker has; imports nothing, for tasks that decode."""

from itertools import pairwise


def shares(num_groups: int, num_workers: int) -> list[range]:
    """Cut the groups of a batch into a part for each worker, in order.

    Parts differ by one group at most, none is larger than the first, and none is empty where
    ``num_workers`` is not above ``num_groups``.
    """
    bounds = [-(-num_groups * worker // num_workers) for worker in range(num_workers + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]
