"""Programs in place of Python that fork what they run: workers of Ray, and jobs."""

import shlex
import shutil
import sys
from pathlib import Path

from upreid_ray.train.forked_workers import MODULES, WorkerServer

# What jobs import that is not of this package.
JOB_MODULES = (
    *(name for name in MODULES if not name.startswith("upreid_ray")),
    *("matplotlib.pyplot", "mlflow.artifacts", "mlflow.tracking", "pydantic"),
    *("rich.progress", "scipy.sparse", "sklearn.cluster", "torch.export", "torch.onnx"),
)
# What a process runs that is forked for a job. Its name is that of a script of Ray's, which the
# server expects.
LAUNCHER_NAME = "default_worker.py"
LAUNCHER = """\
import atexit, runpy, sys
for name in [name for name in sys.modules if name.partition(".")[0] == "upreid_ray"]:
    del sys.modules[name]  # Those of the folder of the job take their place.
del sys.argv[0]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:  # The server ends the process.
    command_line = sys.modules.get("upreid_ray.command_line")
    atexit.unregister(getattr(command_line, "end_process", None))
"""
# What is neither a worker nor a job with a given Ray is run by Python. It takes the folder of
# this program for its environment, so that its Ray starts its workers with the program too.
PROGRAM = """\
#!/bin/bash
case "$RAY_ADDRESS $1" in
  *_worker.py) exec {program} "$@" ;;
  ?*" "*jobs/*.py | ?*" page.py") exec {program} {launcher} "$@" ;;
esac
exec -a "$0" {python} "$@"
"""


def write_program(file: Path, server: WorkerServer) -> None:
    """Write the program, which is in the folder ``bin`` of an environment."""
    launcher = file.parents[1] / LAUNCHER_NAME
    launcher.write_text(LAUNCHER)
    words = {"program": server.program, "launcher": launcher, "python": sys.executable}
    file.write_text(PROGRAM.format_map({k: shlex.quote(str(v)) for k, v in words.items()}))
    file.chmod(0o755)


def make_python(folder: Path, server: WorkerServer) -> Path:
    """Make an environment in a new folder; return its program."""
    program = folder / "bin/python"
    program.parent.mkdir()
    shutil.copy(Path(sys.prefix, "pyvenv.cfg"), folder)
    (folder / "lib").symlink_to(Path(sys.prefix, "lib"))
    (folder / "server").symlink_to(server.folder)
    write_program(program, server)
    return program


def worker_of(program: str, pid: int) -> int | None:
    """Return the forked process that this one of the program waits for, None if it is none."""
    try:
        return int(Path(program).parents[1].joinpath("server", str(pid)).read_text())
    except (OSError, ValueError):
        return None
