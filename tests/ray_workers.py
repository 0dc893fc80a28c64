"""A Python whose Ray forks its workers from the server that all tests share."""

import shlex
import shutil
import sys
from pathlib import Path

from upreid_ray.train.forked_workers import WorkerServer

# What is no worker is run by Python, which takes this program's folder for its environment, so
# that its Ray starts its workers with the program too.
PROGRAM = """\
#!/bin/bash
case $1 in *_worker.py) exec {program} "$@" ;; esac
exec -a "$0" {python} "$@"
"""


def make_python(folder: Path, server: WorkerServer) -> Path:
    """Write the program into a new folder."""
    program = folder / "bin/python"
    program.parent.mkdir()
    shutil.copy(Path(sys.prefix, "pyvenv.cfg"), folder)
    (folder / "lib").symlink_to(Path(sys.prefix, "lib"))
    (folder / "server").symlink_to(server.folder)
    program.write_text(
        PROGRAM.format(program=server.program, python=shlex.quote(sys.executable))
    )
    program.chmod(0o755)
    return program


def worker_of(program: str, pid: int) -> int | None:
    """Return the worker that this process of the program waits for, None if it is none."""
    try:
        return int(Path(program).parents[1].joinpath("server", str(pid)).read_text())
    except (OSError, ValueError):
        return None
