"""SIGTERM to a worker: noticed there, so that all workers can save and end together.

Ray Train calls the function that trains in a thread, which gets no signals; only what a backend
runs on a worker runs in the main thread.
"""

import signal
import threading
from dataclasses import dataclass

from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

_arrived = threading.Event()


def has_arrived() -> bool:
    """Tell whether this process was asked to end."""
    return _arrived.is_set()


def _listen() -> None:
    # Where Ray itself ends a worker, SIGKILL follows a tenth of a second later.
    signal.signal(signal.SIGTERM, lambda *_: _arrived.set())


class _ListeningBackend(_TorchBackend):
    def on_training_start(
        self, worker_group: BaseWorkerGroup, backend_config: TorchConfig
    ) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(_listen)


@dataclass
class ListeningTorchConfig(TorchConfig):
    """A process group of torch whose workers notice SIGTERM."""

    @property
    def backend_cls(self) -> type[_ListeningBackend]:
        """What Ray Train prepares the workers with."""
        return _ListeningBackend
