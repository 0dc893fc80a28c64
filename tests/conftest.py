"""Fixtures that several tests share.

PyTorch, Ray and MLflow are imported where they are needed, because that takes seconds.
"""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from tests.core.pool import RunInPool

# How long an example takes depends on what else runs on the machine.
hypothesis.settings.register_profile("project", deadline=None, max_examples=50)
hypothesis.settings.load_profile("project")

# Small batches are computed on one thread, in all processes: threads would mostly wait for each
# other, and use up the cores meanwhile. PyTorch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Ray's workers have a low priority otherwise, and would wait for all other tests.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(scope="session")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a new database of MLflow, of which tests use copies."""
    from tests.tracking.store import make_database

    file = tmp_path_factory.mktemp("database") / "mlflow.db"
    make_database(file)
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, new_database: Path) -> Iterator[Path]:
    """Make a folder for runs and MLflow, and let all processes of the tests use it."""
    from tests.tracking.store import tracking_in

    root = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch, tracking_in(root, new_database):
        # How often Ray Train looks whether its workers have begun, reported or ended.
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        # As for every local Ray: the only node is never preempted.
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        yield root


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return a Python whose Ray forks its workers from one server, as do all jobs of tests."""
    from tests.ray_workers import JOB_MODULES, make_python
    from upreid_ray.train.forked_workers import MODULES, PROGRAM_VARIABLE, WorkerServer

    # None of Ray's, which would be of one Ray.
    server = WorkerServer((*MODULES, *JOB_MODULES), ray_modules=())
    program = str(make_python(tmp_path_factory.mktemp("workers"), server))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PROGRAM_VARIABLE, program)
        yield program
    server.close()


@pytest.fixture(scope="session")
def ray_cluster(python: str) -> Iterator[str]:
    """Start a Ray cluster of this process, whatever else runs on the machine; its address."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        # What Ray starts its processes with.
        patch.setattr(sys, "executable", python)
        context = ray.init(
            address="local",
            num_cpus=4,
            # Without its own dashboard, Ray Train asks another cluster's on the usual port,
            # which does not know the run, takes it for dead and removes its workers.
            include_dashboard=True,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    yield context.address_info["address"]
    ray.shutdown()


@pytest.fixture(scope="session")
def run_in_pool(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[RunInPool]":
    """Call a module's function in two processes joined by Gloo; a list of the results."""
    from tests.core.pool import gloo_pool

    with gloo_pool(tmp_path_factory.mktemp("gloo")) as run:
        yield run
