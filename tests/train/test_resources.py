"""How many workers and runs fit on the nodes of a cluster."""

import pytest

from upreid_ray.config.run import ScalingConfig
from upreid_ray.train.resources import num_fitting, num_runs


def scaling(num_workers: int, cpus: float, gpus: float = 0.0) -> ScalingConfig:
    return ScalingConfig(
        num_workers=num_workers,
        cpus_per_worker=cpus,
        use_gpu=gpus > 0,
        gpus_per_worker=gpus or 1.0,
    )


@pytest.mark.parametrize(
    ("needs", "nodes", "expected"),
    [
        ({"CPU": 0.1}, [{"CPU": 0.3}], 3),  # 0.3 / 0.1 is less than 3
        ({"CPU": 3}, [{"CPU": 4}, {"CPU": 4}], 2),
        ({"CPU": 1, "GPU": 0.5}, [{"CPU": 8, "GPU": 1}, {"CPU": 8}], 2),
        ({"CPU": 1}, [], 0),
    ],
    ids=["tenths", "not across nodes", "scarcest resource", "no nodes"],
)
def test_needs_fit_on_single_nodes_in_the_units_of_ray(needs, nodes, expected):
    assert num_fitting(needs, nodes) == expected


@pytest.mark.parametrize(
    ("asked", "nodes", "expected"),
    [
        (scaling(2, 1.0), [{"CPU": 2}, {"CPU": 2}], 1),
        (scaling(2, 1.0), [{"CPU": 1}, {"CPU": 1}], 0),
        (scaling(1, 3.0), [{"CPU": 2}, {"CPU": 2}], 0),
        (scaling(4, 1.0, 1.0), [{"CPU": 16, "GPU": 2}] * 4, 2),
        (scaling(4, 1.0, 1.0), [{"CPU": 16, "GPU": 3}], 0),
    ],
    ids=["across nodes", "no CPU for decoding", "worker too large", "GPUs", "too few GPUs"],
)
def test_a_run_needs_room_for_each_worker_and_a_cpu_for_decoding(asked, nodes, expected):
    assert num_runs(asked, nodes) == expected
