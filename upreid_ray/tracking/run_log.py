"""Metrics and files of a run that wait on disk until MLflow has them.

Workers import this module, but only rank 0 logs, and the process that started the run delivers
where it sees the folder: MLflow, which takes seconds to import, is imported in the thread that
delivers.
"""

import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

if TYPE_CHECKING:
    from upreid_ray.tracking.runs import Client

logger = logging.getLogger(__name__)
MAX_METRICS_PER_BATCH = 1000  # MLflow's own limit
RETRY_SECONDS = 5.0


class RunLog:
    """Metrics and files of a run, written to disk at once and delivered in the background.

    Every call appends a line to a file. A thread delivers the lines in order and records how
    many bytes it has delivered, so that the process that resumes the run delivers the rest.
    MLflow stores a line that is delivered twice only once, because its time stamp is the same.

    Args:
        run_id: ID of the MLflow run.
        uri: URI of the tracking server.
        folder: Local folder for what is not delivered yet.
        delivers: Whether this process delivers, or another one that sees the folder.
    """

    def __init__(self, run_id: str, uri: str, folder: Path, *, delivers: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._run_id = run_id
        self._uri = uri
        self._folder = folder
        self._lines = folder / "metrics.jsonl"
        self._delivered = folder / "metrics.delivered"
        self._wake = threading.Condition()
        self._closing = False
        self._newest = self._recover()
        self._thread: threading.Thread | None = None
        if delivers:
            self._thread = threading.Thread(target=self._deliver, daemon=True, name="mlflow")
            self._thread.start()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step under names of the form ``section/name``.

        Steps that were logged before are skipped, because a resumed run repeats the steps after
        its checkpoint.
        """
        new = {
            name: value for name, value in values.items() if step > self._newest.get(name, -1)
        }
        if new:
            self._newest |= dict.fromkeys(new, step)
            self._append({"step": step, "time": int(time.time() * 1000), "metrics": new})

    def picture(self, name: str, image: Image) -> None:
        """Log an image as the artifact ``name``."""
        image.save(self._folder / name)
        self._append({"file": name})

    def close(self, timeout_seconds: float) -> None:
        """Wait until all is delivered, if this process delivers, or the timeout has passed."""
        if self._thread is None:
            return
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_seconds)
        with suppress(OSError):  # If the storage is gone, the run fails and says so.
            if self._offset() < self._lines.stat().st_size:
                logger.warning(
                    "MLflow does not answer; undelivered metrics are in %s", self._lines
                )

    def _recover(self) -> dict[str, int]:
        """Complete the last line if a crash cut it off; return the last step of each metric."""
        newest: dict[str, int] = {}
        with self._lines.open("a+") as stream:
            stream.seek(0)
            text = stream.read()
            if text and not text.endswith("\n"):
                stream.write("\n")
        for line in text.splitlines():
            entry = _parse(line)
            newest |= dict.fromkeys(entry.get("metrics", {}), entry.get("step", -1))
        return newest

    def _append(self, entry: dict[str, Any]) -> None:
        with self._wake:
            with self._lines.open("a") as stream:
                stream.write(json.dumps(entry) + "\n")
            self._wake.notify()

    def _deliver(self) -> None:
        client: Client | None = None
        offset = self._offset()
        while True:
            closing = self._closing
            try:
                lines = self._pending(offset)
                is_done = self._lines.stat().st_size == offset
            except OSError as error:  # The storage is gone, perhaps for a while.
                logger.debug("metrics: %s", error)
                lines, is_done = [], True
            if not lines:
                if closing and is_done:
                    return
                with self._wake:
                    if self._closing == closing:
                        self._wake.wait(RETRY_SECONDS)
                continue
            try:
                client = client or _connect(self._uri)
                self._send(client, [_parse(line) for line in lines])
                offset += sum(len(line.encode()) for line in lines)
                self._delivered.write_text(str(offset))
            except Exception as error:  # No fault of the server or the disk may stop training.
                logger.debug("MLflow: %s", error)
                time.sleep(RETRY_SECONDS)

    def _offset(self) -> int:
        """Return how many bytes are delivered; 0 if a crash cut off the record of it."""
        text = self._delivered.read_text() if self._delivered.exists() else ""
        return int(text) if text.isdigit() else 0

    def _pending(self, offset: int) -> list[str]:
        """Return the lines to deliver next: lines with metrics, or one line with a file.

        One call delivers many lines, so that a slow server keeps up.
        """
        lines: list[str] = []
        num_metrics = 0
        with self._lines.open() as stream:
            stream.seek(offset)
            for line in stream:
                entry = _parse(line)
                num_metrics += len(entry.get("metrics", {}))
                is_too_much = "file" in entry or num_metrics > MAX_METRICS_PER_BATCH
                if not line.endswith("\n") or (lines and is_too_much):
                    break
                lines.append(line)
                if "file" in entry:
                    break
        return lines

    def _send(self, client: "Client", entries: Sequence[dict[str, Any]]) -> None:
        if "file" in entries[0]:
            client.log_artifact(self._run_id, str(self._folder / entries[0]["file"]))
            return
        from mlflow.entities import Metric  # noqa: PLC0415, see the module's docstring

        metrics = [
            Metric(name, value, entry["time"], entry["step"])
            for entry in entries
            for name, value in entry.get("metrics", {}).items()
        ]
        client.log_batch(self._run_id, metrics=metrics)


def _connect(uri: str) -> "Client":
    from upreid_ray.tracking import connection  # noqa: PLC0415, see the module's docstring

    return connection.new_client(uri)  # Opens a database at once, which may fail.


def _parse(line: str) -> dict[str, Any]:
    """Return an entry of the log; an empty one if a crash cut the line off."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}
