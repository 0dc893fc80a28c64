"""The process group that workers join; runs on Ray are in test_pretrain."""

import subprocess
import sys

from upreid_ray.train.process_group import ProcessGroupConfig, _free_url, _ProcessGroup

WORKER = """
import sys
import torch
import torch.distributed as dist
from upreid_ray.train.process_group import _join, _leave

rank = int(sys.argv[2])
_join(url=sys.argv[1], backend="gloo", world_rank=rank, world_size=2)
values = torch.tensor([1.0 + rank])
dist.all_reduce(values)
said = [dist.get_rank(), dist.get_world_size(), values.item()]
_leave()
_leave()  # as after a failure
print(*said, dist.is_initialized())
"""


def test_two_workers_join_at_a_free_address_and_part_again():
    words = [sys.executable, "-c", WORKER, _free_url()]
    workers = [
        subprocess.Popen([*words, str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]

    said = [worker.communicate(timeout=300)[0] for worker in workers]

    assert said == ["0 2 3.0 False\n", "1 2 3.0 False\n"]


def test_ray_train_gets_a_backend_whose_workers_see_the_gpus_of_their_node():
    backend = ProcessGroupConfig(use_gpu=True).backend_cls

    assert backend is _ProcessGroup
    assert backend.share_cuda_visible_devices
