"""Rows, values and means over two processes, against the same on the joined rows."""

from itertools import chain

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from upreid_ray.core import distributed
from upreid_ray.core.groups import groups_of_workers

NUM_ROWS = 5  # of each process
SEEDS = range(6)


def joined_rows() -> Tensor:
    return torch.arange(2 * NUM_ROWS * 2 * 3).reshape(2 * NUM_ROWS, 2, 3)


def own_rows() -> Tensor:
    return joined_rows()[distributed.rank() * NUM_ROWS :][:NUM_ROWS]


def permutation(seed: int) -> Tensor:
    return torch.randperm(2 * NUM_ROWS, generator=torch.Generator().manual_seed(seed))


def permute_own_rows(seeds: list[int]) -> list[Tensor]:
    return [
        distributed.permute_rows(own_rows(), permutation(seed), num_groups=2) for seed in seeds
    ]


def exchange_halves() -> Tensor:
    order = torch.arange(2 * NUM_ROWS).roll(NUM_ROWS)
    return distributed.permute_rows(own_rows(), order, num_groups=2)


def keep_order() -> Tensor:
    return distributed.permute_rows(own_rows(), torch.arange(2 * NUM_ROWS), num_groups=2)


def gather_own_rows() -> Tensor:
    return distributed.gather_rows(own_rows(), num_groups=2)()


def gather_rows_of_a_transposed_tensor() -> Tensor:
    return distributed.gather_rows(own_rows().transpose(1, 2), num_groups=2)()


NUM_GROUPS = 5  # of two rows each: the first process has three


def own_part() -> Tensor:
    groups = distributed.groups_of_this_worker(NUM_GROUPS)
    return joined_rows()[2 * groups.start : 2 * groups.stop]


def permute_unequal_parts(seeds: list[int]) -> list[Tensor]:
    return [
        distributed.permute_rows(own_part(), permutation(seed), num_groups=NUM_GROUPS)
        for seed in seeds
    ]


def gather_unequal_parts() -> Tensor:
    return distributed.gather_rows(own_part(), num_groups=NUM_GROUPS)()


def gather_while_another_waits() -> Tensor:
    signal = torch.zeros(1)
    if distributed.rank() == 1:
        dist.recv(signal, src=0)
    gathered = distributed.gather_rows(own_rows(), num_groups=2)
    if distributed.rank() == 0:
        dist.send(signal, dst=1)
    return gathered()


def average_weighted_ranks() -> Tensor:
    rank = torch.tensor(float(distributed.rank()))
    distributed.average_([rank], weight=[0.8, 1.2][distributed.rank()])
    return rank


def average_own_rows() -> Tensor:
    rows = own_rows().double()
    distributed.average_([rows])
    return rows


def share_rank() -> str:
    return distributed.share_from_first(f"rank {distributed.rank()}")


def gather_ranks() -> list[str] | None:
    return distributed.gather_at_first(f"rank {distributed.rank()}")


def place() -> tuple[int, int]:
    return distributed.rank(), distributed.world_size()


def test_processes_know_their_place(run_in_pool):
    assert run_in_pool(place) == [(0, 2), (1, 2)]


def test_permuted_rows_are_the_joined_rows_in_that_order(run_in_pool):
    permuted = run_in_pool(permute_own_rows, list(SEEDS))

    for seed, first, second in zip(SEEDS, *permuted, strict=True):
        assert_close(torch.cat([first, second]), joined_rows()[permutation(seed)])


@pytest.mark.parametrize(("function", "shift"), [(exchange_halves, NUM_ROWS), (keep_order, 0)])
def test_rows_may_all_go_to_the_other_process_or_stay(run_in_pool, function, shift):
    permuted = run_in_pool(function)

    assert_close(torch.cat(permuted), joined_rows().roll(shift, 0))


def test_gathered_rows_are_the_joined_rows_everywhere(run_in_pool):
    for rows in run_in_pool(gather_own_rows):
        assert_close(rows, joined_rows())


def test_to_gather_rows_a_process_waits_only_where_it_needs_them(run_in_pool):
    # The second process takes part after the first one has gone on.
    for rows in run_in_pool(gather_while_another_waits):
        assert_close(rows, joined_rows())


def test_rows_of_any_memory_layout_can_be_gathered(run_in_pool):
    for rows in run_in_pool(gather_rows_of_a_transposed_tensor):
        assert_close(rows, joined_rows().transpose(1, 2))


def test_rows_of_unequal_parts_are_permuted(run_in_pool):
    permuted = run_in_pool(permute_unequal_parts, list(SEEDS))

    for seed, first, second in zip(SEEDS, *permuted, strict=True):
        assert (len(first), len(second)) == (6, 4)
        assert_close(torch.cat([first, second]), joined_rows()[permutation(seed)])


def test_rows_of_unequal_parts_are_gathered(run_in_pool):
    for rows in run_in_pool(gather_unequal_parts):
        assert_close(rows, joined_rows())


@given(num_groups=st.integers(1, 64), data=st.data())
def test_workers_share_all_groups_in_order_and_differ_by_one_at_most(num_groups, data):
    num_workers = data.draw(st.integers(1, num_groups))

    parts = groups_of_workers(num_groups, num_workers)

    sizes = [len(part) for part in parts]
    assert list(chain(*parts)) == list(range(num_groups))
    assert (min(sizes) > 0, max(sizes) - min(sizes) <= 1) == (True, True)
    assert sizes[0] == max(sizes)


def test_averages_can_be_weighted(run_in_pool):
    for rank in run_in_pool(average_weighted_ranks):
        assert_close(rank, torch.tensor(0.6))


def test_averages_are_the_means_over_the_processes(run_in_pool):
    halves = joined_rows().double().unflatten(0, (2, NUM_ROWS))

    for rows in run_in_pool(average_own_rows):
        assert_close(rows, halves.mean(0))


def test_every_process_learns_the_value_of_the_first(run_in_pool):
    assert run_in_pool(share_rank) == ["rank 0", "rank 0"]


def test_values_are_gathered_at_the_first_process_alone(run_in_pool):
    assert run_in_pool(gather_ranks) == [["rank 0", "rank 1"], None]


def test_a_process_alone_permutes_its_own_rows():
    rows = torch.arange(6)

    assert distributed.permute_rows(
        rows, torch.tensor([3, 1, 5, 0, 2, 4]), num_groups=2
    ).tolist() == [3, 1, 5, 0, 2, 4]


def test_a_process_alone_keeps_what_it_has():
    rows = torch.arange(6.0)

    distributed.average_([rows])

    assert distributed.gather_rows(rows, num_groups=2)().tolist() == [0, 1, 2, 3, 4, 5]
    assert distributed.share_from_first("a") == "a"
    assert distributed.gather_at_first("a") == ["a"]
