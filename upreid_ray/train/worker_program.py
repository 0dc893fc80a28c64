"""Ask a server to fork a worker of Ray; Ray runs this file in place of Python.

It imports next to nothing, because it runs once for each worker. Words: the socket of the
server, this program as Ray knows it, and what Python would get.
"""

import json
import os
import socket
import sys

WORKER_SCRIPTS = ("default_worker.py", "setup_worker.py")


def main(address: str, program: str, *words: str) -> None:
    """Wait until the worker has ended, since Ray takes this process for it until it registers.

    Become Python itself for what is no worker, or if the server has ended.
    """
    if not words or os.path.basename(words[0]) not in WORKER_SCRIPTS:
        os.execv(sys.executable, [sys.executable, *words])
    message = json.dumps([program, words, dict(os.environ), os.getcwd()]).encode()
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(address)
        except OSError:
            os.execv(sys.executable, [sys.executable, *words])
        with open("/proc/self/ns/net") as network:
            files = [0, 1, 2, network.fileno()]
            socket.send_fds(server, [len(message).to_bytes(4)], files)
        server.sendall(message)
        with server.makefile("rb") as stream:
            answer = stream.read()
    if answer:  # The worker wants to become another program.
        file, args, environment = json.loads(answer)
        os.execvpe(file, args, environment)


if __name__ == "__main__":
    main(*sys.argv[1:])
