"""Which worker computes which groups of a batch.

Imports no torch, because the tasks that decode images need it too.
"""

from itertools import pairwise


def groups_of_workers(num_groups: int, num_workers: int) -> list[range]:
    """Divide the groups of a batch among the workers, in order.

    Returns:
        The groups of each worker. Their numbers differ by one at most, and no worker has more
        than the first. No worker is without a group if there are enough groups.
    """
    bounds = [-(-num_groups * worker // num_workers) for worker in range(num_workers + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]
