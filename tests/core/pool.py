"""Two processes joined by Gloo, which call what they are given."""

import pickle
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

RunInPool = Callable[..., list[Any]]

NUM_PROCESSES = 2
SECONDS_TO_ANSWER = 300


def serve(rank: int, connections: list[Connection], rendezvous: str) -> None:
    """Call what arrives in the process of this rank, until the other end is closed."""
    warnings.simplefilter("error")  # as pytest does in its own process
    torch.set_num_threads(1)
    for other, connection in enumerate(connections):
        if other != rank:
            connection.close()
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=len(connections)
    )
    with suppress(EOFError):
        while True:
            function, args = pickle.loads(connections[rank].recv_bytes())
            try:
                answer = (function(*args), None)
            except Exception:
                answer = (None, traceback.format_exc())
            connections[rank].send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()


@contextmanager
def gloo_pool(folder: Path) -> Iterator[RunInPool]:
    """Start the processes, which meet in ``folder``, and end them afterwards.

    What is yielded calls a function of an importable module with the same arguments in both
    processes and returns ``[result of rank 0, result of rank 1]``.
    """
    pipes = [multiprocessing.Pipe() for _ in range(NUM_PROCESSES)]
    pool = multiprocessing.spawn(
        serve,
        ([theirs for _, theirs in pipes], (folder / "rendezvous").as_uri()),
        nprocs=NUM_PROCESSES,
        join=False,
    )
    for _, theirs in pipes:
        theirs.close()

    def run(function: Callable[..., Any], *args: Any) -> list[Any]:
        for ours, _ in pipes:
            ours.send_bytes(pickle.dumps((function, args)))
        answers = []
        for rank, (ours, _) in enumerate(pipes):
            if not ours.poll(SECONDS_TO_ANSWER):
                raise TimeoutError(f"{function.__name__} does not return at rank {rank}")
            answers.append(pickle.loads(ours.recv_bytes()))
        for rank, (_, failure) in enumerate(answers):
            if failure is not None:
                raise RuntimeError(f"rank {rank}: {failure}")
        return [result for result, _ in answers]

    try:
        yield run
    finally:
        for ours, _ in pipes:
            ours.close()
        pool.join(timeout=30)
        for process in pool.processes:
            process.kill()
