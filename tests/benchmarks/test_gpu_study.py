import subprocess
import sys

import pytest

from benchmarks.gpu_study import BASELINE, LONGEST, ROWS, plan_epochs


def test_all_rows_fit_into_the_budget_and_the_baseline_has_the_longest_time() -> None:
    seconds = dict(zip(ROWS, (0.1, 0.125, 0.2, 0.25), strict=True))

    epochs, longer = plan_epochs(seconds, budget=360, steps_per_epoch=10, num_seeds=3)

    whole = 3 * 10 * (epochs * sum(seconds.values()) + longer * seconds[BASELINE])
    assert 0.9 * 360 < whole <= 360
    assert longer * seconds[BASELINE] == pytest.approx(epochs * seconds[LONGEST], rel=0.05)


def test_too_little_time_gives_one_epoch() -> None:
    seconds = dict.fromkeys(ROWS, 10.0)

    assert plan_epochs(seconds, budget=1, steps_per_epoch=10, num_seeds=3) == (1, 2)


def test_the_study_of_a_gpu_needs_neither_ray_nor_mlflow() -> None:
    code = "import benchmarks.gpu_study, sys; print(sys.modules.keys() & {'ray', 'mlflow'})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "set()"
