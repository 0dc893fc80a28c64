"""SIGTERM to a worker, which all workers answer by saving a checkpoint and ending together.

Ray Train calls the training function in a thread, and Python handles signals in the main thread
only. Code of a backend is what Ray Train runs in the main thread of a worker.
"""

import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ray.train.torch import TorchConfig

_arrived = threading.Event()
_TorchBackend: Any = TorchConfig().backend_cls  # Ray gives this class no public name.


class _WorkerGroup(Protocol):
    def execute(self, function: Callable[[], None]) -> object:
        """Call a function in the main thread of every worker."""


def has_arrived() -> bool:
    """Return whether this process has received SIGTERM."""
    return _arrived.is_set()


def _listen() -> None:
    # When Ray itself ends a worker, it sends SIGKILL a tenth of a second after SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: _arrived.set())


class _ListeningBackend(_TorchBackend):
    def on_training_start(
        self, worker_group: _WorkerGroup, backend_config: TorchConfig
    ) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(_listen)


@dataclass
class ListeningTorchConfig(TorchConfig):
    """A process group of torch whose workers notice SIGTERM."""

    @property
    def backend_cls(self) -> type[_ListeningBackend]:
        """Class with which Ray Train prepares the workers."""
        return _ListeningBackend
