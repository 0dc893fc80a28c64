"""The connection to MLflow: a server, or the SQLite store of a folder.

MLflow creates and migrates the tables of a database with the first call of a client, and two
processes that do so at once break it: here one process does it at a time.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import mlflow
from filelock import FileLock
from mlflow.tracking import MlflowClient

from upreid_ray.config.errors import InputError, first_line

logging.getLogger("mlflow").setLevel(logging.WARNING)  # Importing MLflow has set it to INFO.

SQLITE = "sqlite:///"
ARTIFACTS_FOLDER = "mlartifacts"
# MLflow's defaults retry an unreachable server for minutes, and draw a bar for each download.
HTTP_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def tracking_uri() -> str:
    """Return ``MLFLOW_TRACKING_URI``, or else the SQLite store of the working folder.

    A store of the working folder stays the same one for processes that stand elsewhere.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    database = database_file(uri)
    return uri if database is None else f"{SQLITE}{database}"


def connect() -> MlflowClient:
    """Return a client of the tracking server.

    Raises:
        InputError: No MLflow server answers at ``MLFLOW_TRACKING_URI``, or its database cannot
            be used.
    """
    uri = tracking_uri()
    database = database_file(uri)
    try:
        if database is not None:
            _check_place(database)
        with _alone_with(database):
            client = new_client(uri)
            client.search_experiments(max_results=1)
        mlflow.set_tracking_uri(uri)  # MLflow reads the files of a version by it
    except Exception as error:  # MLflow raises what its stores and HTTP libraries raise
        message = f"MLFLOW_TRACKING_URI={uri}: {_explain(uri, error)}"
        raise InputError(_hide_password(message, uri)) from None
    return client


def new_client(uri: str) -> MlflowClient:
    """Return a client whose calls to a server that is down fail soon.

    The HTTP timeouts are shorter than MLflow's own; environment variables take precedence.
    """
    for name, value in HTTP_DEFAULTS.items():
        os.environ.setdefault(name, value)
    return MlflowClient(uri)


def artifacts_folder() -> Path | None:
    """Return where new experiments keep artifacts: beside the database, None for a server."""
    database = database_file(tracking_uri())
    return None if database is None else database.parent / ARTIFACTS_FOLDER


def database_file(uri: str) -> Path | None:
    """Return the absolute path of a SQLite store, None for any other one."""
    is_file = uri.startswith(SQLITE) and uri != SQLITE
    return Path(unquote(uri.removeprefix(SQLITE))).absolute() if is_file else None


def local_path(uri: str) -> Path | None:
    """Return the path of a ``file:`` URI or of a path; None for any other URI."""
    parts = urlsplit(uri)
    return Path(url2pathname(parts.path)) if parts.scheme in ("", "file") else None


def shown_uri() -> str:
    """Return the tracking URI as a message may show it."""
    return _hide_password(tracking_uri(), tracking_uri())


def _check_place(database: Path) -> None:
    """Check that there is a database or that one can be made: MLflow tries for minutes.

    Raises:
        IsADirectoryError: It is a folder.
        PermissionError: There is none, and its folder cannot be written.
    """
    if database.is_dir():
        raise IsADirectoryError("it is a folder; name a file in it")
    if not database.exists() and not _can_be_written(database.parent):
        raise PermissionError(str(database.parent))


@contextmanager
def _alone_with(database: Path | None) -> Iterator[None]:
    """Let one process at a time run the block, if the database can be written."""
    if database is None or not _can_be_written(database.parent):
        yield
        return
    with FileLock(f"{database}.lock"):
        yield


def _can_be_written(folder: Path) -> bool:
    """Create a folder if it does not exist, and tell whether files can be created in it."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder.is_dir() and os.access(folder, os.W_OK)


def _explain(uri: str, error: Exception) -> str:
    """Say in a part of a line why a store cannot be used, and what to do."""
    text = str(error)
    database = database_file(uri)
    if "filesystem tracking backend" in text:
        return (
            "MLflow no longer supports file stores; use sqlite:///mlflow.db, and convert the "
            "old store with mlflow migrate-filestore"
        )
    if "database schema" in text:
        return (
            "the database was written by another version of MLflow; back it up and run "
            f"mlflow db upgrade {uri}, or install the version that wrote it"
        )
    if database is None:
        return f"no MLflow server answers ({first_line(error)})"
    if not _can_be_written(database.parent):
        return (
            f"{database.parent} cannot be written; name a database elsewhere with "
            "MLFLOW_TRACKING_URI=sqlite:////FOLDER/mlflow.db"
        )
    return f"the database cannot be used ({first_line(error)})"


def _hide_password(text: str, uri: str) -> str:
    """Replace the password of a URI, if it has one, by asterisks wherever a text shows it."""
    try:
        password = urlsplit(uri).password
    except ValueError:  # no URI; the client will say so
        return text
    return text.replace(password, "***") if password else text
