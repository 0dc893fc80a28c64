"""Schedules, as pure functions of the step."""

import math
from collections.abc import Sequence


def learning_rate(step: int, *, peak: float, num_steps: int, warmup_steps: int) -> float:
    """Return the learning rate of linear warm-up and cosine decay from ``peak`` to zero.

    Args:
        step: Step, 0 for the first one; the rate would be zero at ``num_steps``.
        peak: Rate at the end of the warm-up.
        num_steps: Steps of the whole run.
        warmup_steps: Steps of the warm-up, which starts at ``peak / warmup_steps``.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def stepped_learning_rate(
    step: int, *, peak: float, warmup_steps: int, milestones: Sequence[int]
) -> float:
    """Return the learning rate of linear warm-up and a division by ten at each milestone.

    Luo et al. 2019, https://arxiv.org/abs/1903.07071.

    Args:
        step: Step, 0 for the first one.
        peak: Rate at the end of the warm-up.
        warmup_steps: Steps of the warm-up, which starts at ``peak / 10``.
        milestones: Steps at which the rate falls.
    """
    warmup = 1.0 if step >= warmup_steps else 0.1 + 0.9 * step / warmup_steps
    return peak * warmup * 0.1 ** sum(step >= milestone for milestone in milestones)


def key_momentum(step: int, *, start: float, end: float, num_steps: int) -> float:
    """Return the momentum of the key encoder: a cosine from ``start`` to ``end``, as in BYOL.

    Grill et al. 2020, https://arxiv.org/abs/2006.07733. With ``start == end`` it is constant,
    as in MoCo.

    Args:
        step: Step, 0 for the first one.
        start: Momentum at step 0.
        end: Momentum at ``num_steps``.
        num_steps: Steps of the whole run.
    """
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
