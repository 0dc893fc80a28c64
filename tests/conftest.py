"""Fixtures that several tests share."""

import logging
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import mlflow
import pytest
import ray

from tests.core.pool import RunInPool, gloo_pool
from upreid_ray.tracking import connection

# How long an example takes depends on what else runs on the machine.
hypothesis.settings.register_profile("project", deadline=None, max_examples=50)
hypothesis.settings.load_profile("project")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make a folder for runs and MLflow, and let all processes of the tests use it."""
    root = tmp_path_factory.mktemp("work")
    before = mlflow.get_tracking_uri()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
        # How often Ray Train looks whether its workers have begun, reported or ended.
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        for name, value in connection.HTTP_DEFAULTS.items():
            patch.setenv(name, value)
        yield root
        mlflow.set_tracking_uri(before)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Start a Ray cluster of this process, whatever else runs on the machine."""
    ray.init(
        address="local",
        num_cpus=4,
        # Without its own dashboard, Ray Train asks another cluster's on the usual port, which
        # does not know the run, takes it for dead and removes its workers.
        include_dashboard=True,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def run_in_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunInPool]:
    """Call a module's function in two processes joined by Gloo; a list of the results."""
    with gloo_pool(tmp_path_factory.mktemp("gloo")) as run:
        yield run
