"""What every worker of a run does."""

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from upreid_ray.config.errors import RunFailed
from upreid_ray.config.presets import PRESETS
from upreid_ray.train.folder import RunFolder
from upreid_ray.train.pretrain_worker import PretrainWorker
from upreid_ray.train.worker import Due, local_checkpoint_prefix, remove_local_checkpoints

# Imports a module, then prints those of the modules that it must not have imported.
IMPORTED = """
import sys, importlib
importlib.import_module(sys.argv[1])
print(*sorted(sys.modules.keys() & set(sys.argv[2:])))
"""


@pytest.mark.parametrize("name", ["pretrain_worker", "finetune_worker"])
@pytest.mark.slow
def test_a_worker_imports_nothing_that_only_the_driver_needs(name):
    unwanted = ["mlflow", "upreid_ray.train.job", "upreid_ray.train.resources"]

    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, f"upreid_ray.train.{name}", *unwanted],
        capture_output=True,
        check=True,
        text=True,
    )

    assert done.stdout == "\n"


def test_processes_that_do_not_compute_do_not_import_torch():
    modules = [
        "upreid_ray.data.stream.training",  # in tasks that decode
        "upreid_ray.data.stream.persons",
        "upreid_ray.train.process_group",  # in Ray Train's controller
        "upreid_ray.tune.trial_record",
        "upreid_ray.train.pretrain",  # starts a run
        "upreid_ray.tune.trial",
        "upreid_ray.tune.sweep",
    ]
    code = "\n".join(
        f"import {module}\nif 'torch' in sys.modules: print('{module}')" for module in modules
    )

    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}"],
        capture_output=True,
        check=True,
        text=True,
    )

    assert done.stdout == ""


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


def worker_at(step: int, undecodable: dict[str, int]) -> PretrainWorker:
    """Make a worker of a run of 10 steps an epoch, which has counted some images."""
    worker = PretrainWorker.__new__(PretrainWorker)
    worker.config = PRESETS["demo"].override(
        {"training.batch_size": 40, "training.group_size": 20, "data.max_undecodable": 0.01}
    )
    worker.state = SimpleNamespace(step=step, steps_per_epoch=10, num_steps=30)
    worker.undecodable, worker.new_undecodable = Counter(undecodable), Counter()
    return worker


def test_images_that_do_not_decode_add_up_over_an_epoch():
    worker = worker_at(12, {"a": 1})

    for _ in range(3):
        worker.new_undecodable["a"] += 1
        worker._check_undecodable()
    worker.new_undecodable["b"] += 1
    with pytest.raises(RunFailed, match=r"^5 of 400 images do not decode, 4 of them in a; "):
        worker._check_undecodable()


def test_at_the_end_of_an_epoch_the_log_says_what_was_left_out_and_the_count_begins_anew(
    caplog,
):
    worker = worker_at(20, {"a": 4})

    worker._check_undecodable()

    assert "left out of the last epoch: 4 of 400 images do not decode" in caplog.text
    assert not worker.undecodable


def test_only_what_a_killed_worker_of_the_same_run_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine, other = (RunFolder("/runs", name) for name in ("mine", "mine-2"))
    left = [
        Path(tempfile.mkdtemp(prefix=local_checkpoint_prefix(run))) for run in (mine, other)
    ]
    (left[0] / "model.safetensors").touch()

    remove_local_checkpoints(mine)

    assert list(tmp_path.iterdir()) == left[1:]
