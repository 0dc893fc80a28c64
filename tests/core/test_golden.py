"""The first losses of a small run, which a change of structure may not change.

A change of numbers writes them anew, in a commit of its own that says why:
``python -m tests.core.test_golden``.
"""

from pathlib import Path

import pytest
import torch

from tests.core.tiny import fresh_state, people, tiny
from upreid_ray.core.training import train, train_step

GOLDEN = Path(__file__).parents[1] / "golden" / "demo_losses.txt"
NUM_STEPS = 20
HEADER = """\
# Losses of the first 20 steps of the run in tests/core/test_golden.py, fp32 on one CPU thread.
# Written by: python -m tests.core.test_golden
"""


def losses() -> list[float]:
    # Weights off by 1e-7 change these losses by 3e-5 at most, but by 1e-2 at a learning rate
    # of 1e-3, because batch norm over few pixels amplifies; ten times this rate changes them
    # by 1e-3 and more.
    config = tiny(
        {
            "training.group_size": 8,
            "optimizer.lr": 1e-6,
            "augmentation.jitter_probability": 0.8,
        }
    )
    batches = (people(8, seed=step) for step in range(NUM_STEPS))
    reports = train(fresh_state(config, NUM_STEPS), batches, train_step)
    return [float(report.terms["loss"]) for report in reports]


def test_the_first_losses_are_those_of_the_golden_run():
    expected = [float(line) for line in GOLDEN.read_text().splitlines() if line[0] != "#"]

    # Another CPU adds in another order, and each step hands its rounding to the next.
    assert losses() == pytest.approx(expected, rel=1e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.write_text(HEADER + "".join(f"{loss!r}\n" for loss in losses()))
