"""What every worker of a run does."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from upreid_ray.config.presets import PRESETS
from upreid_ray.train.worker import Due

# Imports a module, then prints those of the modules that it must not have imported.
IMPORTED = """
import sys, importlib
importlib.import_module(sys.argv[1])
print(*sorted(sys.modules.keys() & set(sys.argv[2:])))
"""


@pytest.mark.parametrize("name", ["pretrain_worker", "finetune_worker"])
def test_a_worker_imports_nothing_that_only_the_driver_needs(name):
    unwanted = ["mlflow", "upreid_ray.train.job", "upreid_ray.train.resources"]

    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, f"upreid_ray.train.{name}", *unwanted],
        capture_output=True,
        check=True,
        text=True,
    )

    assert done.stdout == "\n"


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, Due(log=False, scores=False, checkpoint=False)),
        (4, Due(log=False, scores=False, checkpoint=True)),
        (6, Due(log=True, scores=False, checkpoint=False)),
        (7, Due(log=False, scores=False, checkpoint=False)),
        (14, Due(log=False, scores=True, checkpoint=True)),
        (12, Due(log=True, scores=False, checkpoint=True)),
        (35, Due(log=True, scores=True, checkpoint=True)),
    ],
    ids=["nothing", "checkpoint", "log", "odd epoch", "even epoch", "log and save", "last"],
)
def test_what_is_due_depends_on_the_step(step, expected):
    state = SimpleNamespace(step=step, steps_per_epoch=7, num_steps=35)
    config = PRESETS["demo"].override(
        {
            "training.log_every_steps": 3,
            "evaluation.every_epochs": 2,
            "checkpoint.every_steps": 4,
        }
    )

    assert Due.after(state, config) == expected
