"""How many workers and runs the nodes of a Ray cluster hold.

Every count is in ten-thousandths of a CPU or GPU, the unit in which Ray counts, and a worker
must fit on one node. A run also needs one CPU for the tasks that decode its images.
"""

import os
from collections.abc import Mapping, Sequence

import ray

from upreid_ray.config.errors import InputError
from upreid_ray.config.run import ScalingConfig

UNITS = 10_000
DECODING_CPUS = 1.0
Resources = Mapping[str, float]


def living_nodes() -> list[Resources]:
    """Return the resources of each living node of the connected cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def total(nodes: Sequence[Resources]) -> Resources:
    """Return the CPUs and GPUs of all nodes together."""
    return {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}


def num_fitting(needs: Resources, nodes: Sequence[Resources]) -> int:
    """Return how many times these needs fit, each time on one node."""
    return sum(
        min(
            round(node.get(name, 0.0) * UNITS) // max(1, round(amount * UNITS))
            for name, amount in needs.items()
        )
        for node in nodes
    )


def worker_needs(scaling: ScalingConfig) -> dict[str, float]:
    """Return what each worker reserves, by Ray's names."""
    gpus = {"GPU": scaling.gpus_per_worker} if scaling.use_gpu else {}
    return {"CPU": scaling.cpus_per_worker, **gpus}


def run_cpus(scaling: ScalingConfig, num_workers: int) -> float:
    """Return the CPUs of a run: those of its workers, and one for decoding."""
    return num_workers * scaling.cpus_per_worker + DECODING_CPUS


def num_runs(scaling: ScalingConfig, nodes: Sequence[Resources]) -> int:
    """Return how many runs of ``scaling.num_workers`` workers fit at a time; 0 if none does."""
    num_workers = num_fitting(worker_needs(scaling), nodes)
    cpus = {"CPU": run_cpus(scaling, scaling.num_workers)}
    return min(num_workers // scaling.num_workers, num_fitting(cpus, [total(nodes)]))


def check_resources(scaling: ScalingConfig) -> None:
    """Refuse a run that a single machine cannot hold.

    A cluster may grow, so there Ray waits for the missing resources.

    Raises:
        InputError: The machine has too few GPUs or CPUs.
    """
    if len(ray.nodes()) > 1 or (os.environ.get("RAY_ADDRESS") or "local") != "local":
        return
    machine = total(living_nodes())
    least, most = scaling.bounds
    if scaling.use_gpu:
        fitting = num_fitting({"GPU": scaling.gpus_per_worker}, [machine])
        if fitting < least:
            flag = "min_workers" if scaling.min_workers else "num_workers"
            raise InputError(
                f"--scaling.{flag} {least}: this machine has {machine['GPU']:g} GPUs; "
                "--scaling.use_gpu false trains on CPUs"
            )
        most = min(most, fitting)
    # Ray starts as many workers as fit. If they left less than a whole CPU, the tasks that
    # decode images would wait forever.
    cpus = run_cpus(scaling, most)
    if not num_fitting({"CPU": cpus}, [machine]):
        raise InputError(
            f"--scaling.cpus_per_worker {scaling.cpus_per_worker:g}: {most} workers and one "
            f"task that decodes need {cpus:g} CPUs, this machine has {machine['CPU']:g}"
        )
