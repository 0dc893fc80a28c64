"""Workers of a local Ray that are forked from one process, which has imported what they need.

Ray starts each worker as a new Python process. A run needs a dozen of them, and imports are
most of what a start costs. On Linux, a job therefore runs one server, and gives its Ray a small
program (`worker_program`) in place of Python, which asks the server to fork a worker. The
worker gets the arguments, the environment and the files of the program; from there on it is as
if Python had started it. It ends with the program, with the server, and with the job.

Ray on a cluster starts its workers itself.
"""

import atexit
import ctypes
import fcntl
import functools
import gc
import json
import os
import runpy
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from select import select

from upreid_ray.train import worker_program

# The program that a local Ray runs in place of Python; a Python here turns forking off.
PROGRAM_VARIABLE = "UPREID_RAY_WORKER_PROGRAM"
# What takes long to import in actors, tasks, training workers and, at the end, in trials. Not
# Ray, which reads the environment of the worker when it is imported.
MODULES = (
    "aiohttp",
    "fsspec",
    "google.protobuf.message",
    "grpc",
    "jsonschema",
    "opentelemetry.sdk.metrics",
    "pandas",
    "pyarrow.dataset",
    "requests",
    "torch._dynamo",
    "torchvision",
    "upreid_ray.core.checkpoint",
    "upreid_ray.core.cluster_contrast",
    "mlflow.tracking",
    "upreid_ray.tracking.runs",
)
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
# The C library reads these when a process starts; `mallopt(3)` sets them later.
MALLOC_PARAMETERS = {
    "MALLOC_ARENA_MAX": -8,
    "MALLOC_MMAP_MAX_": -4,
    "MALLOC_TRIM_THRESHOLD_": -1,
}
NO_LIMIT = -1  # for a threshold that is no C int


class WorkerServer:
    """A process that forks workers; it ends with this process.

    Args:
        modules: What it imports.

    Attributes:
        folder: Folder of its own, which only this user can read.
        program: The program to run in place of Python.

    Raises:
        OSError: Programs in the folder of temporary files cannot be run.
    """

    def __init__(self, modules: Iterable[str] = MODULES) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="upreid-workers-"))
        address, self.program = self.folder / "socket", self.folder / "python"
        words = (sys.executable, "-IS", worker_program.__file__, str(address))
        self.program.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$0" "$@"\n')
        self.program.chmod(0o700)
        # Ray hands the path to a shell as it is.
        if not os.access(self.program, os.X_OK) or shlex.quote(str(self.program)) != str(
            self.program
        ):
            shutil.rmtree(self.folder)
            raise PermissionError(f"{self.program} cannot be run")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(address))
            listener.listen(64)
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", __name__, str(listener.fileno())),
                    *(str(self.folder), *modules),
                ],
                stdin=subprocess.PIPE,  # Its end tells the server that this process has ended.
                pass_fds=[listener.fileno()],
                start_new_session=True,  # Ctrl-C is for the job alone.
                # A process with threads, as of Arrow and OpenBLAS, is not safe to fork.
                env=os.environ
                | {"JE_ARROW_MALLOC_CONF": "background_thread:false", "OMP_NUM_THREADS": "1"},
            )

    def close(self) -> None:
        """End the server and its workers, and remove its folder."""
        self._process.communicate()


@functools.cache
def _program() -> str:
    """Return the program of the server of this process, which starts at the first call.

    Where workers cannot be forked, or where that is untried, it is Python itself.
    """
    if sys.platform != "linux" or any(Path("/dev").glob("nvidia*")):
        return sys.executable
    try:
        server = WorkerServer()
    except OSError:
        return sys.executable
    atexit.register(server.close)
    return str(server.program)


@contextmanager
def forked_workers() -> Iterator[None]:
    """Let a local Ray that is started inside take the program for Python, if there is one."""
    python = sys.executable
    sys.executable = os.environ.get(PROGRAM_VARIABLE) or _program()
    try:
        yield
    finally:
        sys.executable = python


def serve(listener: socket.socket, folder: Path, modules: Iterable[str]) -> None:
    """Fork a worker for each program that connects, until standard input ends.

    Modules are imported while no program waits.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # No worker stays as a zombie.
    missing = list(reversed(list(modules)))
    server = os.getpid()
    while True:
        ready, _, _ = select([listener, sys.stdin], [], [], 0 if missing else None)
        if not ready:
            import_module(missing.pop())
            num_threads = len(list(Path("/proc/self/task").iterdir()))
            if num_threads > 1:
                raise RuntimeError(f"a process of {num_threads} threads is not safe to fork")
            gc.freeze()  # Workers share the memory of what is imported.
        elif sys.stdin in ready:
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)  # Some libraries would complain about what is left.
        else:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
                if os.getppid() == server:
                    (folder / str(_peer(connection))).write_text(str(os.getpid()))
                    _become_worker(connection)
                os._exit(1)
            connection.close()


def _peer(connection: socket.socket) -> int:
    """Return the process at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("3i", credentials)[0])


def _become_worker(connection: socket.socket) -> None:
    """Take over what the program was started with, and run what it was to run."""
    os.setsid()  # Ray may signal the whole group of a worker.
    stand_in = _peer(connection)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, (*files, network), _, _ = socket.recv_fds(connection, 4, 4)
    with connection.makefile("rb") as stream:
        program, words, environment, folder = json.loads(stream.read(int.from_bytes(size)))
    if not os.path.samestat(os.fstat(network), Path("/proc/self/ns/net").stat()):
        ctypes.CDLL(None).setns(network, 0)  # A node of a cluster may be a host of its own.
    os.close(network)
    # Ray has set these of the process that it started.
    os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, stand_in))
    adjustment = Path(f"/proc/{stand_in}/oom_score_adj").read_text()
    Path("/proc/self/oom_score_adj").write_text(adjustment)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    _apply_malloc_variables()
    os.chdir(folder)
    # The end of the program, which closes the connection, kills this process.
    fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(connection, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(connection, fcntl.F_SETFL, os.O_ASYNC)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # Python's own generator does so by itself.
    sys.executable, sys.argv = program, words
    more = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = [str(Path(words[0]).parent), *filter(None, more)]

    def replace_program(file: str, args: list[str]) -> None:
        connection.sendall(json.dumps([file, args, dict(os.environ)]).encode())
        connection.close()
        os._exit(0)

    os.execvp = replace_program  # type: ignore[assignment]
    try:
        runpy.run_path(words[0], run_name="__main__")
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.close()
        os._exit(0)


def _apply_malloc_variables() -> None:
    """Do what the C library does with these variables when a process starts."""
    for name, parameter in MALLOC_PARAMETERS.items():
        value = os.environ.get(name, "")
        if value.isdecimal():
            fits = int(value) < 2**31
            ctypes.CDLL(None).mallopt(parameter, int(value) if fits else NO_LIMIT)


if __name__ == "__main__":
    file, own_folder, *names = sys.argv[1:]
    serve(socket.socket(fileno=int(file)), Path(own_folder), names)
