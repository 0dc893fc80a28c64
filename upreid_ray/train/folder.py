"""The folder of a run: its settings, checkpoints and result."""

import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from filelock import FileLock

from upreid_ray.config.errors import InputError
from upreid_ray.config.run import JobConfig
from upreid_ray.config.section import Section, absolute
from upreid_ray.storage import Location

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
LOCK_FILE = "begin.lock"
RESULT_FILE = "result.json"
STOP_FILE = "stop"  # while it is there, the run ends at its next log entry
NOT_FINITE_FILE = "not_finite.json"
SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"  # Ray Train's list of the checkpoints
CHECKPOINT = "step-"  # how the name of a checkpoint begins; digits follow, so that names sort


@dataclass(frozen=True)
class RunFolder:
    """The folder ``storage/name`` of a run, which holds Ray Train's checkpoints too."""

    storage: str
    name: str

    @classmethod
    def of(cls, run: JobConfig, kind: str) -> Self:
        """Return the folder of ``run``; if it has no name, one that begins with ``kind``.

        Raises:
            InputError: A submitted job was not told where its runs are.
        """
        try:
            storage = absolute(
                run.storage_path or os.environ.get("UPREID_RAY_STORAGE") or "runs"
            )
        except InputError as error:
            raise InputError(f"--run.storage_path: {error}") from None
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        return cls(storage, run.name or f"{kind.replace('/', '-')}-{stamp}")

    @property
    def location(self) -> Location:
        """Location of this folder."""
        return Location(self.storage) / self.name

    @property
    def uri(self) -> str:
        """Folder or URI of this run."""
        return self.location.uri

    def exists(self) -> bool:
        """Return whether a run of this name was started."""
        return (self.location / RUN_FILE).is_file()

    def require_new(self) -> None:
        """Check that no run of this name was started.

        Raises:
            InputError: A run was started.
        """
        if self.exists():
            raise InputError(
                f"--run.name {self.name}: exists already; choose another name, or continue a "
                f"run, sweep or comparison with --resume {self.name}"
            )

    def remove(self, file: str) -> None:
        """Remove a file from this folder, if it is there."""
        if (self.location / file).is_file():
            (self.location / file).delete_file()

    @contextmanager
    def begin(self) -> Iterator[None]:
        """Let one job at a time begin a run here; refuse it if another one has begun.

        Behind a URI there are no locks: two jobs that begin at the same moment both begin.

        Raises:
            InputError: A run was started.
        """
        if "://" in self.storage:
            self.require_new()
            yield
            return
        self.location.make_folder()
        with FileLock(self.local_path() / LOCK_FILE):
            self.require_new()
            yield

    def record(
        self, config: Section, run_id: str, lineage: Mapping[str, str] | None = None
    ) -> None:
        """Write the settings, the ID of the MLflow run and what it starts from."""
        record = {
            "run_id": run_id,
            "config": config.model_dump(mode="json"),
            "lineage": dict(lineage or {}),
        }
        self.write(RUN_FILE, json.dumps(record, indent=1))

    def recorded_lineage(self) -> dict[str, str]:
        """Return what the run that was started here starts from; empty if nothing is known.

        The version in it stays the same when an alias of the settings moves to another one.
        """
        lineage: dict[str, str] = json.loads(self.read(RUN_FILE) or "{}").get("lineage", {})
        return lineage

    def write(self, file: str, content: str | bytes) -> None:
        """Write a file in this folder; a reader sees the whole file or none.

        Raises:
            InputError: The storage cannot be written.
        """
        try:
            self.location.make_folder()
            encoded = content.encode() if isinstance(content, str) else content
            (self.location / file).write_whole(encoded)
        except OSError as error:
            raise InputError(
                f"--run.storage_path {self.storage}: cannot be written ({error})"
            ) from error

    def folders(self) -> list[str]:
        """Return the names of the folders in this one."""
        return self.location.folder_names()

    def read(self, file: str) -> str | None:
        """Return the text of a file in this folder, None if there is no file."""
        place = self.location / file
        return place.read_bytes().decode() if place.is_file() else None

    def checkpoints(self) -> list[str]:
        """Return the names of the checkpoints, intact or damaged, the oldest first."""
        return sorted(name for name in self.folders() if name.startswith(CHECKPOINT))

    def remove_torn_snapshot(self) -> None:
        """Remove Ray Train's list of checkpoints if it is not valid JSON.

        Ray Train writes the list in place, so that a kill may leave it torn. Ray Train cannot
        start with a torn list. Without a list it can: then workers read the checkpoints.
        """
        text = self.read(SNAPSHOT_FILE)
        if text is None:
            return
        try:
            json.loads(text)
        except ValueError:
            logger.warning("%s/%s is damaged: looking at checkpoints", self.uri, SNAPSHOT_FILE)
            self.remove(SNAPSHOT_FILE)

    def recorded_run(self, config: Section, free: Sequence[str]) -> str:
        """Return the ID of the MLflow run that was started here with the same settings.

        Settings with a free prefix do not change the weights, and may differ.

        Raises:
            InputError: No run was started here, or a setting that is not free differs.
        """
        further = {"training.epochs": self._how_to_train_further(config)}
        run_id, recorded = self.recorded()
        before = dict(type(config).parse(recorded).flatten())
        for setting, value in config.flatten():
            if not setting.startswith(tuple(free)) and value != before[setting]:
                raise InputError(
                    f"--{setting} {value}: run {self.name} was started with {before[setting]}"
                    f"{further.get(setting, '')}"
                )
        return run_id

    def _how_to_train_further(self, config: Section) -> str:
        """Return the end of a sentence on how a finished run is trained for more epochs."""
        checkpoints = self.checkpoints()
        if not checkpoints:
            return ""
        is_pretraining = "model.continue_from" in dict(config.flatten())
        start = (
            f"--model.continue_from {self.uri}"
            if is_pretraining
            else f"--init {self.uri}/{checkpoints[-1]}"
        )
        return f"; to train further, begin a new run with {start}"

    def recorded(self) -> tuple[str, dict[str, Any]]:
        """Return the ID of the MLflow run that was started here, and its settings.

        Raises:
            InputError: No run was started here, or its record is damaged.
        """
        text = self.read(RUN_FILE)
        if text is None:
            raise InputError(f"--resume {self.name}: no such run in {self.storage}")
        try:
            record = json.loads(text)
            return record["run_id"], record["config"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--resume {self.name}: {self.uri}/{RUN_FILE} is damaged"
            ) from error

    def local_path(self) -> Path:
        """Return a local folder for files that are not in the storage yet."""
        if "://" in self.storage:
            return Path(tempfile.gettempdir(), "upreid_ray", self.name)
        return Path(self.uri)
