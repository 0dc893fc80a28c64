"""The smallest runs that still have all the parts: seconds on one core."""

from typing import Any

import torch
from torch import Tensor

from upreid_ray.config.pretrain import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PatchesConfig,
    PretrainConfig,
    TrainingConfig,
)
from upreid_ray.config.run import ScalingConfig
from upreid_ray.core.training import TrainState

TINY = PretrainConfig(
    data=DataConfig(height=64, width=32),
    patches=PatchesConfig(rows=2, columns=2),
    model=ModelConfig(backbone="resnet18", queue_size=32, embedding_dim=16, momentum=0.9),
    optimizer=OptimizerConfig(lr=0.05),
    training=TrainingConfig(epochs=1, batch_size=8, group_size=4, precision="fp32"),
    scaling=ScalingConfig(num_workers=1, use_gpu=False),
)


def tiny(settings: dict[str, Any]) -> PretrainConfig:
    return TINY.override(settings)


def fresh_state(config: PretrainConfig = TINY, num_steps: int = 20) -> TrainState:
    return TrainState(config, steps_per_epoch=num_steps, device=torch.device("cpu"))


def people(number: int, seed: int = 0, config: PretrainConfig = TINY) -> Tensor:
    """Make uint8 images of noise, each with a colour and a brightness of its own."""
    generator = torch.Generator().manual_seed(seed)
    shape = (number, 3, config.data.height, config.data.width)
    noise = torch.rand(shape, generator=generator)
    color = torch.rand((number, 3, 1, 1), generator=generator)
    return ((0.3 * noise + 0.7 * color) * 255).byte()


def float64_state(config: PretrainConfig = TINY) -> TrainState:
    """Make a state whose encoders compute in float64, so that the order of sums is no matter.

    Views, embeddings and losses stay in fp32, as `core` has them.
    """
    torch.set_default_dtype(torch.float64)
    try:
        state = fresh_state(config)
    finally:
        torch.set_default_dtype(torch.float32)
    state.model.queue.float()
    for encoder in (state.model.query_encoder, state.model.key_encoder):
        encoder.register_forward_pre_hook(lambda _, images: (images[0].double(),))
    return state
