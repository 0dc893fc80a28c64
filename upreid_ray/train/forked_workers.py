"""Workers of a local Ray that are forked from one process, which has imported what they need.

Ray starts each worker as a new Python process. A run needs a dozen of them, and imports are
most of what a start costs. On Linux, a job therefore runs one server, and gives its Ray a small
program (`worker_program`) in place of Python, which asks the server to fork a worker. The
worker gets the arguments, the environment, the files and the limits of the program. It is
killed when the program, the server or the job ends. Where no worker can be forked, the program
becomes Python.

Ray on a cluster starts its workers itself.
"""

import atexit
import ctypes
import fcntl
import gc
import json
import multiprocessing.spawn  # noqa: F401, it keeps the Python that it finds
import os
import resource
import runpy
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from select import select
from typing import NoReturn, Self

from upreid_ray.train import worker_program

# The program that a local Ray runs in place of Python; a Python here turns forking off.
PROGRAM_VARIABLE = "UPREID_RAY_WORKER_PROGRAM"
# What takes long to import in actors, tasks and training workers.
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
)
# The same, of Ray, which reads variables when it is imported. Some of them differ between one
# Ray and the next. The first request of a Ray tells them, except the number of the job, which
# is always the same in a new Ray.
RAY_MODULES = (
    "ray",
    "ray.data",
    "ray.train.torch",
    "upreid_ray.train.pretrain_worker",
)
RAY_VARIABLES = ("RAY_AUTH_MODE", "RAY_JOB_ID", "RAY_RAYLET_PID")
FIRST_JOB = "01000000"
REQUEST_SECONDS = 30.0
# Libraries that have threads when they are loaded are not safe to fork.
WITHOUT_THREADS = {
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
# On machines with a GPU, forking is untried.
GPUS = ("nvidia*", "kfd", "dxg")
# The package may be on the path of this process alone.
MAIN = (
    f"import sys; sys.path.append({str(Path(__file__).parents[2])!r})\n"
    f"from {__name__} import main\nmain()"
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
        modules: What it imports at once.
        ray_modules: What it imports after the first request of a Ray. From then on, only
            workers of that Ray are forked.

    Attributes:
        folder: Folder of its own, which only this user can read.
        program: The program to run in place of Python.

    Raises:
        OSError: Programs in the folder of temporary files cannot be run.
    """

    def __init__(
        self, modules: Sequence[str] = MODULES, ray_modules: Sequence[str] = RAY_MODULES
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="upreid-workers-"))
        self.program = self.folder / "python"
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self._write_program()
            self._process = self._start(",".join(modules), ",".join(ray_modules))
            stack.pop_all()

    def _write_program(self) -> None:
        words = (sys.executable, "-IS", worker_program.__file__, str(self.folder / "socket"))
        self.program.write_bytes(
            os.fsencode(f'#!/bin/sh\nexec {shlex.join(words)} "$0" "$@"\n')
        )
        self.program.chmod(0o700)
        path = str(self.program)  # Ray hands it to a shell as it is.
        if not os.access(path, os.X_OK) or shlex.quote(path) != path:
            raise PermissionError(f"{path} cannot be run")

    def _start(self, *modules: str) -> subprocess.Popen[bytes]:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.folder / "socket"))
            listener.listen(64)
            file = fcntl.fcntl(listener, fcntl.F_DUPFD, 3)  # not one of the standard streams
            try:
                return subprocess.Popen(
                    # -P: modules in the working folder are not for the server.
                    [*(sys.executable, "-P", "-c", MAIN), str(file), self.folder, *modules],
                    stdin=subprocess.PIPE,  # Its end tells that this process has ended.
                    pass_fds=[file],
                    start_new_session=True,  # Ctrl-C is for the job alone.
                    env=os.environ | WITHOUT_THREADS,
                )
            finally:
                os.close(file)

    def close(self) -> None:
        """Kill the server and its workers, and remove its folder."""
        self._process.kill()
        self._process.communicate()
        shutil.rmtree(self.folder, ignore_errors=True)


# The server of the newest Ray of this process.
_newest = ExitStack()


@contextmanager
def forked_workers(modules: Sequence[str] = ()) -> Iterator[None]:
    """Let a local Ray that is started inside take the program for Python, if that is possible.

    The server of an earlier Ray of this process is ended.

    Args:
        modules: What workers of this job need besides what all do.
    """
    _newest.close()
    python = sys.executable
    program = os.environ.get(PROGRAM_VARIABLE) or None
    has_gpu = any(True for name in GPUS for _ in Path("/dev").glob(name))
    if program is None and sys.platform == "linux" and not has_gpu:
        with suppress(OSError):
            server = WorkerServer(ray_modules=(*RAY_MODULES, *modules))
            _newest.callback(server.close)
            program = str(server.program)
    sys.executable = program or python
    try:
        yield
    finally:
        sys.executable = python


@dataclass(frozen=True)
class Request:
    """What a program was started with.

    Attributes:
        connection: Connection to the program.
        pid: Its process.
        program: Its path.
        words: What Python would get.
        environment: Its variables.
        folder: Its working folder.
        files: Standard input, output and error, and the network namespace.
    """

    connection: socket.socket
    pid: int
    program: str
    words: list[str]
    environment: dict[str, str]
    folder: str
    files: list[int]

    @classmethod
    def read(cls, connection: socket.socket) -> Self:
        """Read what a program sends.

        Raises:
            OSError: The program has ended.
            ValueError: What it sent is incomplete.
        """
        connection.settimeout(REQUEST_SECONDS)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid = int(struct.unpack("3i", credentials)[0])
        size, files, _, _ = socket.recv_fds(connection, 4, 4)
        with ExitStack() as stack:
            for file in files:
                stack.callback(os.close, file)
            with connection.makefile("rb") as stream:
                text = stream.read(int.from_bytes(size))
            program, words, environment, folder = json.loads(text)
            stack.pop_all()
        return cls(connection, pid, program, words, environment, folder, files)

    def ray_variables(self) -> dict[str, str]:
        """Return the variables that differ from one Ray to the next."""
        return {name: self.environment.get(name, "") for name in RAY_VARIABLES}

    def answer(self, what: object) -> None:
        """Tell the program with which status to end, or what to become."""
        with suppress(OSError):  # It has ended.
            self.connection.sendall(json.dumps(what).encode())

    def become_python(self) -> None:
        """Let the program become Python, which then starts the worker."""
        self.answer([sys.executable, [sys.executable, *self.words], self.environment])


def serve(
    listener: socket.socket, folder: Path, modules: Iterable[str], ray_modules: Iterable[str]
) -> None:
    """Fork a worker for each program that connects, until standard input ends.

    Modules are imported while no program waits.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # No worker stays as a zombie.
    missing, server, is_safe = deque(modules), os.getpid(), True
    of_ray: dict[str, str] | None = None
    while True:
        ready, _, _ = select([listener, sys.stdin], [], [], 0 if missing else None)
        if not ready:
            with suppress(Exception):  # The worker that needs it tells what is wrong.
                _import(missing.popleft())
            # A fork copies one thread. Another one may hold a lock, which nobody would release.
            is_safe = is_safe and len(list(Path("/proc/self/task").iterdir())) == 1
            is_safe = is_safe and ("ray" not in sys.modules or _forks_draw_differently())
            gc.freeze()  # Workers share the memory of what is imported.
            continue
        if sys.stdin in ready:
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)  # Some libraries would complain about what is left.
        connection, _ = listener.accept()
        with connection:
            try:
                request = Request.read(connection)
            except (OSError, ValueError):
                continue
            if is_safe and ("ray" not in sys.modules or request.ray_variables() == of_ray):
                if os.fork() == 0:
                    listener.close()
                    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
                    if os.getppid() == server:
                        with suppress(OSError):  # for tests
                            (folder / str(request.pid)).write_text(str(os.getpid()))
                        _become_worker(request)
                    os._exit(1)
            else:
                request.become_python()
            for file in request.files:
                os.close(file)
            if of_ray is None and request.environment.get("RAY_RAYLET_PID"):
                of_ray = request.ray_variables() | {"RAY_JOB_ID": FIRST_JOB}
                os.environ.update(of_ray)
                missing.extend(ray_modules)


class _ClassID:
    """Draws the IDs of classes of actors; Ray's generator, once used, has equal copies."""

    @staticmethod
    def from_random() -> object:
        """Return a new ID."""
        kind = sys.modules["ray"].ActorClassID
        return kind(os.urandom(kind.size()))


def _import(name: str) -> None:
    """Import a module, without drawing from Ray's generator of random IDs."""
    import_module(name)
    if name == "ray":
        import_module("ray.actor").__dict__["ActorClassID"] = _ClassID


def _forks_draw_differently() -> bool:
    """Tell whether two processes that are forked draw different IDs from Ray's generator."""
    return _draw_in_a_fork() != _draw_in_a_fork()


def _draw_in_a_fork() -> bytes:
    """Return an ID that a forked process draws; nothing if it fails."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        with suppress(Exception):
            os.write(writing, sys.modules["ray"].UniqueID.from_random().binary())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        return stream.read()


def _become_worker(request: Request) -> None:
    """Take over what the program was started with, run what it was to run, and end."""
    try:
        _take_over(request)
    except Exception:
        request.become_python()
        os._exit(0)
    script = Path(request.words[0])
    more = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [str(script.parent), *filter(None, more)]
    sys.executable, sys.argv = request.program, request.words
    if script.name == worker_program.SHIM:
        os.execvp = partial(_become, request)
    status: object = 0
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
        status = 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    request.answer(status if isinstance(status, int) else int(status is not None))
    os._exit(0)


def _become(request: Request, file: str, args: list[str]) -> NoReturn:
    """Let the program become another one, in the place of this process."""
    request.answer([file, args, dict(os.environ)])
    os._exit(0)


def _take_over(request: Request) -> None:
    """Take what Ray has set of the process that it started."""
    os.setsid()  # Ray may signal the whole group of a worker.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *files, network = request.files
    if not os.path.samestat(os.fstat(network), Path("/proc/self/ns/net").stat()):
        ctypes.CDLL(None).setns(network, 0)  # A node of a cluster may be a host of its own.
    os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, request.pid))
    adjustment = Path(f"/proc/{request.pid}/oom_score_adj").read_text()
    Path("/proc/self/oom_score_adj").write_text(adjustment)
    files_limit = resource.prlimit(request.pid, resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, files_limit)
    os.chdir(request.folder)
    # The end of the program, which closes the connection, kills this process.
    request.connection.settimeout(None)
    fcntl.fcntl(request.connection, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(request.connection, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(request.connection, fcntl.F_SETFL, os.O_ASYNC)
    for number, file in enumerate(files):
        os.dup2(file, number)
    for file in request.files:
        os.close(file)
    os.environ.clear()
    os.environ.update(request.environment)
    _apply_malloc_variables()
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    if threads.isdecimal() and threads != "1":  # which the server has
        import_module("threadpoolctl").threadpool_limits(int(threads))
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # Python's own generator does so by itself.


def _apply_malloc_variables() -> None:
    """Do what the C library does with these variables when a process starts."""
    for name, parameter in MALLOC_PARAMETERS.items():
        value = os.environ.get(name, "")
        if value.isdecimal():
            fits = int(value) < 2**31
            ctypes.CDLL(None).mallopt(parameter, int(value) if fits else NO_LIMIT)


def main() -> None:
    """Run a server; its arguments are those that `WorkerServer` gives it."""
    number, folder, modules, ray_modules = sys.argv[1:]
    serve(
        socket.socket(fileno=int(number)),
        Path(folder),
        filter(None, modules.split(",")),
        filter(None, ray_modules.split(",")),
    )
