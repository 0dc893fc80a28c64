"""Ask a server to fork a worker of Ray; Ray runs this file in place of Python.

It imports next to nothing, because it runs once for each worker. Arguments: the socket of the
server, this program as Ray knows it, and what Python would get.
"""

import json
import os
import socket
import sys

SHIM = "setup_worker.py"  # It makes the environment of a worker, then becomes the worker.
WORKER_SCRIPTS = ("default_worker.py", SHIM)


def ask(address: str, program: str, words: tuple[str, ...]) -> bytes:
    """Ask for a worker, and wait until it has ended; return what it leaves."""
    message = json.dumps([program, words, dict(os.environ), os.getcwd()]).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        with open("/proc/self/ns/net") as network:
            files = [0, 1, 2, network.fileno()]
            socket.send_fds(server, [len(message).to_bytes(4)], files)
        server.sendall(message)
        with server.makefile("rb") as stream:
            return stream.read()


def main(address: str, program: str, *words: str) -> None:
    """Stand in for a worker: until the worker registers, Ray takes this process for it.

    For any other script, or if the server has ended, become Python.
    """
    python = (sys.executable, [sys.executable, *words])
    if not words or os.path.basename(words[0]) not in WORKER_SCRIPTS:
        os.execv(*python)
    try:
        answer = json.loads(ask(address, program, words) or "1")
    except OSError:  # Nothing was started: the server reads all before it forks.
        os.execv(*python)
    if isinstance(answer, int):
        sys.exit(answer)
    file, args, environment = answer
    os.execvpe(file, args, environment)


if __name__ == "__main__":
    main(*sys.argv[1:])
