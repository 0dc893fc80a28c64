"""SIGTERM to a worker, which all workers answer by saving a checkpoint and ending together.

Ray Train calls the training function in a thread, and Python handles signals in the main thread
only, where `process_group` calls `listen`.
"""

import signal
import threading

_arrived = threading.Event()


def has_arrived() -> bool:
    """Return whether this process has received SIGTERM."""
    return _arrived.is_set()


def listen() -> None:
    """Notice SIGTERM from now on. When Ray itself ends a worker, SIGKILL soon follows it."""
    signal.signal(signal.SIGTERM, lambda *_: _arrived.set())
