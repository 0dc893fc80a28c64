"""The process group of a run's workers, as a backend of Ray Train.

It does for these workers what Ray's own backend for torch does. That one imports torch, which
takes seconds, where the run is started and in Ray Train's controller; neither computes.
"""

import logging
import os
import socket
from collections.abc import Callable, Sized
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.train.backend import Backend, BackendConfig

from upreid_ray.train import stop_signal

logger = logging.getLogger(__name__)

# How long a collective operation waits for all workers, and the group's end for each of them.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
LEAVE_SECONDS = 30.0


class _WorkerGroup(Sized, Protocol):
    """What Ray Train hands to a backend; functions are called in the workers' main threads."""

    def execute(self, function: Callable[..., Any]) -> list[Any]:
        """Call a function in every worker."""

    def execute_async(self, function: Callable[..., Any]) -> "list[ray.ObjectRef]":
        """Start to call a function in every worker."""

    def execute_single(self, rank: int, function: Callable[..., Any]) -> Any:  # noqa: ANN401
        """Call a function in one worker."""

    def execute_single_async(
        self,
        rank: int,
        function: Callable[..., Any],
        **arguments: Any,  # noqa: ANN401
    ) -> "ray.ObjectRef":
        """Start to call a function in one worker."""


class _ProcessGroup(Backend):
    """Joins the workers when they start, and parts them when they end."""

    # NCCL copies between the GPUs of a node directly if each worker sees all of them.
    share_cuda_visible_devices = True

    def on_start(
        self, worker_group: _WorkerGroup, backend_config: "ProcessGroupConfig"
    ) -> None:
        """Make all workers members of one group."""
        joining = {
            "url": worker_group.execute_single(0, _free_url),
            "backend": "nccl" if backend_config.use_gpu else "gloo",
            "world_size": len(worker_group),
        }
        ranks = range(len(worker_group))
        ray.get(
            [
                worker_group.execute_single_async(r, _join, world_rank=r, **joining)
                for r in ranks
            ]
        )

    def on_training_start(
        self,
        worker_group: _WorkerGroup,
        backend_config: "ProcessGroupConfig",  # noqa: ARG002, Ray passes it
    ) -> None:
        """Let all workers notice SIGTERM."""
        worker_group.execute(stop_signal.listen)

    def on_shutdown(
        self,
        worker_group: _WorkerGroup,
        backend_config: "ProcessGroupConfig",  # noqa: ARG002, Ray passes it
    ) -> None:
        """Part the workers; one alone has nothing to part from."""
        if len(worker_group) > 1:
            try:
                ray.get(worker_group.execute_async(_leave), timeout=LEAVE_SECONDS)
            except GetTimeoutError:
                logger.warning("the process group did not end within %g s", LEAVE_SECONDS)
            except RayActorError:
                pass  # A worker was lost. Ray Train would print a traceback, and goes on.


@dataclass
class ProcessGroupConfig(BackendConfig):
    """The process group of a run.

    Attributes:
        use_gpu: Whether the workers train on GPUs, and talk through NCCL; otherwise Gloo.
    """

    use_gpu: bool

    @property
    def backend_cls(self) -> type[_ProcessGroup]:
        """Class with which Ray Train prepares the workers."""
        return _ProcessGroup


def _free_url() -> str:
    """Return the address of this worker, with a port that is free."""
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as free:
        free.bind((address, 0))
        port = free.getsockname()[1]
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def _join(*, url: str, backend: str, world_rank: int, world_size: int) -> None:
    """Make this worker a member of the process group."""
    # Imported late: see the module's docstring.
    import torch.distributed as dist  # noqa: PLC0415

    if backend == "nccl":  # a worker whose exchange fails or hangs ends, and Ray starts again
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    dist.init_process_group(
        backend=backend,
        init_method=url,
        rank=world_rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )


def _leave() -> None:
    """End the membership of this worker."""
    import torch.distributed as dist  # noqa: PLC0415, see the module's docstring

    if dist.is_initialized():
        dist.destroy_process_group()
