"""What the process that starts a run tells its workers.

This module does not import torch, which that process does not need.
"""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from upreid_ray.config.downstream import DownstreamConfig
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.train.folder import RunFolder

DELIVERY_SECONDS = 60.0


ConfigT = TypeVar("ConfigT", bound=PretrainConfig | DownstreamConfig)


@dataclass(frozen=True)
class WorkerSettings(Generic[ConfigT]):
    """What every worker is told.

    Attributes:
        config: Settings of the run.
        shards: Training shards.
        evaluation_shards: Shards with query and gallery images; None if nothing is scored.
        run_id: ID of the MLflow run.
        tracking_uri: URI of the MLflow server.
        folder: Folder of the run.
        delivering_node: ID of the node on which the process that started the run delivers
            metrics to MLflow, so that a worker there need not; None if each worker delivers.
    """

    config: ConfigT
    shards: ShardSet
    evaluation_shards: ShardSet | None
    run_id: str
    tracking_uri: str = field(repr=False)  # It may hold a password.
    folder: RunFolder
    delivering_node: str | None = None
