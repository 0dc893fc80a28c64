"""Learning rate and key momentum, against values worked out by hand."""

import math

from torch.testing import assert_close

from upreid_ray.core.schedule import key_momentum, learning_rate, stepped_learning_rate

HALF_SQRT = math.sqrt(0.5)


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    rates = [learning_rate(s, peak=0.4, num_steps=6, warmup_steps=2) for s in range(7)]

    falling = [0.2 * (1 + HALF_SQRT), 0.2, 0.2 * (1 - HALF_SQRT), 0.0]
    assert_close(rates, [0.2, 0.4, 0.4, *falling])


def test_the_learning_rate_without_warm_up_begins_at_its_peak():
    rates = [learning_rate(s, peak=0.4, num_steps=4, warmup_steps=0) for s in range(5)]

    assert_close(rates, [0.4, 0.2 * (1 + HALF_SQRT), 0.2, 0.2 * (1 - HALF_SQRT), 0.0])


def test_a_run_may_consist_of_its_warm_up():
    rates = [learning_rate(s, peak=0.4, num_steps=4, warmup_steps=4) for s in range(4)]

    assert_close(rates, [0.1, 0.2, 0.3, 0.4])


def test_the_key_momentum_goes_from_its_start_to_its_end_as_a_cosine():
    momenta = [key_momentum(s, start=0.9, end=1.0, num_steps=4) for s in range(5)]

    middle = [1 - 0.05 * (1 + HALF_SQRT), 0.95, 1 - 0.05 * (1 - HALF_SQRT)]
    assert_close(momenta, [0.9, *middle, 1.0])


def test_the_key_momentum_is_constant_if_it_ends_where_it_starts():
    momenta = {key_momentum(s, start=0.99, end=0.99, num_steps=7) for s in range(8)}

    assert momenta == {0.99}


def test_the_stepped_learning_rate_rises_from_a_tenth_and_falls_at_its_milestones():
    rates = [
        stepped_learning_rate(step, peak=1.0, warmup_steps=4, milestones=[6, 8])
        for step in range(10)
    ]

    expected = [0.1, 0.325, 0.55, 0.775, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    assert_close(rates, expected)


def test_the_stepped_learning_rate_without_warm_up_begins_at_its_peak():
    assert stepped_learning_rate(0, peak=0.5, warmup_steps=0, milestones=[]) == 0.5
