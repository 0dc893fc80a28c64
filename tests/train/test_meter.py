"""The speed of training, and the time that is left."""

import time

import pytest
import torch

from upreid_ray.core.training import StepReport
from upreid_ray.train.meter import Meter

STEP, START = 0.02, 0.3  # seconds


def report(step: int, waited: float = 0.0) -> StepReport:
    terms = {name: torch.tensor(0.0) for name in ("loss", "skipped")}
    return StepReport(step=step, terms=terms, data_seconds=waited)


def steps(meter: Meter, first: int, last: int) -> None:
    for step in range(first, last + 1):
        time.sleep(STEP)
        meter.add(report(step))


@pytest.mark.parametrize("num_steps", [1, 4])
def test_the_time_left_does_not_count_the_start_of_the_stream(num_steps):
    meter = Meter(batch_size=8)
    meter.start()
    time.sleep(START + STEP)
    meter.add(report(1, waited=START))
    steps(meter, 2, num_steps)

    speed = meter.read()["train/images_per_second"]

    assert STEP <= meter.seconds_per_step < START / 2
    assert speed < 8 * num_steps / START  # the metric does count it


def test_the_time_left_follows_the_last_reading_and_leaves_pauses_out():
    meter = Meter(batch_size=8)
    meter.start()
    steps(meter, 1, 2)
    meter.read()
    with meter.paused():
        time.sleep(START)
    steps(meter, 3, 4)

    meter.read()

    assert STEP <= meter.seconds_per_step < START / 2
