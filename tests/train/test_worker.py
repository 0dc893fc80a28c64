"""What every worker of a run does."""

import subprocess
import sys

import pytest

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
