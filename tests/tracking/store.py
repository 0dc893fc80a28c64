"""A store of MLflow for tests."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pytest

from upreid_ray.tracking import connection


def make_database(file: Path) -> None:
    """Make a database with MLflow's tables, which takes seconds."""
    before = mlflow.get_tracking_uri()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
        connection.connect()
    mlflow.set_tracking_uri(before)


@contextmanager
def tracking_in(folder: Path, database: Path) -> Iterator[str]:
    """Stand in a new folder and log to a copy of a database there; yield its URI."""
    uri = f"sqlite:///{shutil.copy(database, folder / 'mlflow.db')}"
    before = mlflow.get_tracking_uri()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        for name, value in connection.HTTP_DEFAULTS.items():
            patch.setenv(name, value)
        yield uri
        mlflow.set_tracking_uri(before)
