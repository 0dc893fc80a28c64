"""Processes and ports of this machine, for tests that start services."""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(
    *words: str | Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command from the repository root and keep what it prints."""
    return subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env=dict(os.environ) | (env or {}),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def free_ports(count: int) -> list[int]:
    """Return distinct free ports."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(server.getsockname()[1]) for server in sockets]
    for server in sockets:
        server.close()
    return ports


def tree(root: int) -> set[int]:
    """Return a living process and all its living descendants."""
    children: dict[int, set[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_bytes().rpartition(b")")[2].split()
            if fields[0] != b"Z":
                pid = int(stat.parent.name)
                children.setdefault(int(fields[1]), set()).add(pid)
                children.setdefault(pid, set())
    found, new = set[int](), {root} & children.keys()
    while new:
        found |= new
        new = set[int]().union(*(children[pid] for pid in new)) - found
    return found


@contextmanager
def ending(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """End a process at the end, whatever happens."""
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)
