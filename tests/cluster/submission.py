"""A job that was submitted to a cluster, and what it has said."""

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 600.0
STEP = r"step (\d+)/(\d+) +loss"


class Submission:
    """A command that submits a job and follows its log.

    Args:
        command: The command.
        log: The file for what it prints.
        environment: Its environment variables, those of this process if None.
    """

    def __init__(
        self, command: list[str], log: Path, environment: dict[str, str] | None = None
    ) -> None:
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait(self) -> int:
        """Wait for its end; return the exit status."""
        try:
            return self._process.wait(SECONDS)
        finally:
            self._process.kill()
            self._process.wait()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so while it runs."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert self._process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.1)

    def steps(self) -> list[int]:
        """Return the steps that were logged, in order."""
        return [int(step) for step, _ in re.findall(STEP, self.log)]

    def newest_step(self) -> int:
        """Return the step that was logged last, 0 if none was."""
        return (self.steps() or [0])[-1]

    def result(self) -> dict[str, Any]:
        """Wait for its end; return what its last line says."""
        assert self.wait() == 0, self.log
        line = next(line for line in self.log.splitlines() if line.startswith('{"run_id"'))
        found: dict[str, Any] = json.loads(line)
        return found
