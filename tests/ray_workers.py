"""Worker processes of Ray that are forked from one process with all slow imports.

Ray starts each worker as a new Python process. A run needs some fifteen of them, and most of
its processor time goes into their imports. The Ray of these tests starts a small program in
Python's place, which asks the server of this module to fork a worker. The worker gets the
arguments, the environment and the files of the program, and from there on is as if Python had
started it, but for variables that are read before Python starts, such as those of malloc. It
ends with the program.

    python -m tests.ray_workers SOCKET

A job that tests start as a process shares this if it is on the Ray of the tests, or if the
program runs it. Else Python starts all workers of its own Ray.
"""

import ctypes
import fcntl
import gc
import json
import os
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

# What takes long to import in actors, tasks and training workers. Each worker imports Ray
# itself, which reads the environment then.
MODULES = (
    "aiohttp",
    "fsspec",
    "google.protobuf.message",
    "grpc",
    "jsonschema",
    "mlflow.tracking",
    "opentelemetry.sdk.metrics",
    "optuna",
    "pandas",
    "pyarrow.dataset",
    "requests",
    "torch._dynamo",
    "torchvision",
    "upreid_ray.core.checkpoint",
    "upreid_ray.core.cluster_contrast",
    "upreid_ray.tracking.runs",
)
SECONDS_TO_START = 120
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
# Waits until the worker has ended, since Ray takes this process for it until it registers, or
# becomes what the worker wants to become. What is no worker is run by Python, which believes to
# be this program, so that its Ray starts its workers with it too.
PROGRAM = """\
#!{python} -IS
import json, os, socket, sys
words = sys.argv[1:]
if not words[0].endswith("_worker.py"):
    os.execv({python!r}, [{program!r}, *words])
message = json.dumps([words, dict(os.environ), os.getcwd()]).encode()
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    with open("/proc/self/ns/net") as network:
        socket.send_fds(server, [len(message).to_bytes(4)], [0, 1, 2, network.fileno()])
    server.sendall(message)
    with server.makefile("rb") as stream:
        answer = stream.read()
if answer:
    file, args, environment = json.loads(answer)
    os.execvpe(file, args, environment)
"""


@contextmanager
def forked_workers(folder: Path) -> Iterator[str]:
    """Run the server; yield the path of the program, which takes the place of Python."""
    address, program = str(folder / "socket"), folder / "bin/python"
    # Python takes the folder of the program for its virtual environment.
    program.parent.mkdir()
    shutil.copy(Path(sys.prefix, "pyvenv.cfg"), folder)
    (folder / "lib").symlink_to(Path(sys.prefix, "lib"))
    program.write_text(
        PROGRAM.format(python=sys.executable, program=str(program), address=address)
    )
    program.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.ray_workers", address],
        cwd=Path(__file__).parents[1],
        start_new_session=True,
        # A process with threads, such as those of Arrow and OpenBLAS, is not safe to fork.
        env=os.environ
        | {"JE_ARROW_MALLOC_CONF": "background_thread:false", "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while not Path(address).exists():
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server of Ray's workers does not start")
            time.sleep(0.1)
        yield str(program)
    finally:
        server.kill()
        server.wait()


def worker_of(program: str, pid: int) -> int | None:
    """Return the worker that this process of the program waits for, None if it is none."""
    try:
        return int(_record(f"{Path(program).parents[1]}/socket", pid).read_text())
    except (OSError, ValueError):
        return None


def _record(address: str, pid: int) -> Path:
    """Return the file that says which worker this process of the program waits for."""
    return Path(f"{address}.{pid}")


def serve(address: str) -> None:
    """Fork a worker for each program that connects, until this process is killed."""
    for name in MODULES:
        import_module(name)
    num_threads = len(list(Path("/proc/self/task").iterdir()))
    if num_threads > 1:
        raise RuntimeError(f"a process of {num_threads} threads is not safe to fork")
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no worker stays as a zombie
    gc.freeze()  # workers share the memory of what is imported
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{address}.new")
    server.listen(64)
    Path(f"{address}.new").rename(address)
    while True:
        connection, _ = server.accept()
        if os.fork() == 0:
            server.close()
            _record(address, peer(connection)).write_text(str(os.getpid()))
            become_worker(connection)
        connection.close()


def peer(connection: socket.socket) -> int:
    """Return the process at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("3i", credentials)[0])


def become_worker(connection: socket.socket) -> None:
    """Take over what the program was started with, and run what it was to run."""
    os.setsid()  # Ray may signal the whole group of a worker
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, (*files, network), _, _ = socket.recv_fds(connection, 4, 4)
    with connection.makefile("rb") as stream:
        words, environment, folder = json.loads(stream.read(int.from_bytes(size)))
    if not os.path.samestat(os.fstat(network), Path("/proc/self/ns/net").stat()):
        ctypes.CDLL(None).setns(network, 0)  # a node of a cluster may be a host of its own
    os.close(network)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(connection, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(connection, fcntl.F_SETFL, os.O_ASYNC)
    sys.modules["numpy"].random.seed()  # Python's own generator does so by itself
    sys.argv = words
    more = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = [str(Path(words[0]).parent), *filter(None, more)]

    def replace_program(file: str, args: list[str]) -> None:
        connection.sendall(json.dumps([file, args, dict(os.environ)]).encode())
        connection.close()
        os._exit(0)

    os.execvp = replace_program
    try:
        runpy.run_path(words[0], run_name="__main__")
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.close()
        os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
