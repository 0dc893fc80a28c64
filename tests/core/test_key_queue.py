"""The queue holds the newest keys, whatever the sizes of the batches."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from upreid_ray.core.key_queue import KeyQueue


def numbered_queue(size: int) -> KeyQueue:
    """Make a queue whose first keys are numbered -size..-1 from the oldest on."""
    queue = KeyQueue(size, 1)
    queue.keys.copy_(torch.arange(-size, 0)[:, None])
    return queue


def from_the_oldest(queue: KeyQueue) -> list[int]:
    return queue.keys.roll(-int(queue.oldest), 0).flatten().int().tolist()


@given(size=st.integers(1, 8), batch_sizes=st.lists(st.integers(0, 20), max_size=8))
def test_the_queue_holds_the_last_keys_in_order(size, batch_sizes):
    queue = numbered_queue(size)
    enqueued = 0

    for batch_size in batch_sizes:
        queue.enqueue(torch.arange(enqueued, enqueued + batch_size)[:, None].float())
        enqueued += batch_size

    assert from_the_oldest(queue) == list(range(enqueued - size, enqueued))


def test_the_first_keys_have_unit_length():
    queue = KeyQueue(32, 16)

    assert_close(queue.keys.norm(dim=1), torch.ones(32))


def test_the_first_keys_differ():
    queue = KeyQueue(32, 16)

    similarity = queue.keys @ queue.keys.T - 2 * torch.eye(32)
    assert similarity.max() < 0.99


def test_keys_keep_the_precision_of_the_queue():
    queue = KeyQueue(4, 2)

    queue.enqueue(torch.ones(2, 2, dtype=torch.bfloat16))

    assert queue.keys.dtype == torch.float32


def test_enqueued_keys_carry_no_gradient():
    queue = KeyQueue(4, 2)

    queue.enqueue(torch.ones(2, 2, requires_grad=True))

    assert not queue.keys.requires_grad


def test_a_restored_queue_goes_on_where_the_saved_one_was():
    saved, restored = numbered_queue(5), KeyQueue(5, 1)
    saved.enqueue(torch.arange(3)[:, None].float())

    restored.load_state_dict(saved.state_dict())
    restored.enqueue(torch.arange(3, 6)[:, None].float())

    assert from_the_oldest(restored) == [1, 2, 3, 4, 5]
