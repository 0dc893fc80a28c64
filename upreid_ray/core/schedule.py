"""What changes with the step, as pure functions of it."""

import math
from collections.abc import Sequence


def learning_rate(step: int, *, peak: float, num_steps: int, warmup_steps: int) -> float:
    """Linear warm-up, then cosine from ``peak`` to zero.

    Args:
        step: 0 for the first update; ``num_steps`` would be exactly zero.
        peak: Reached after the warm-up.
        num_steps: Updates of the whole run.
        warmup_steps: Updates of the warm-up, the first at ``peak / warmup_steps``.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def stepped_learning_rate(
    step: int, *, peak: float, warmup_steps: int, milestones: Sequence[int]
) -> float:
    """Linear warm-up from a tenth, then a tenth of the rate at each milestone.

    Luo et al. 2019, https://arxiv.org/abs/1903.07071.

    Args:
        step: 0 for the first update.
        peak: Reached after the warm-up.
        warmup_steps: Updates of the warm-up, the first at ``peak / 10``.
        milestones: Updates at which the rate falls.
    """
    warmup = 1.0 if step >= warmup_steps else 0.1 + 0.9 * step / warmup_steps
    return peak * warmup * 0.1 ** sum(step >= milestone for milestone in milestones)


def key_momentum(step: int, *, start: float, end: float, num_steps: int) -> float:
    """Cosine from ``start`` at step 0 to ``end`` at ``num_steps``, as in BYOL.

    Grill et al. 2020, https://arxiv.org/abs/2006.07733; with ``start == end`` it is MoCo's
    constant.
    """
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
