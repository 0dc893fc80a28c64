"""The optimizer, against PyTorch's own."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

from upreid_ray.core.sgd import ChannelsLastSGD

SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
SHAPES = [(8, 4, 3, 3), (8, 4, 1, 1), (8, 5), (8,)]


def weights_and_momenta(
    kind: type[SGD], memory_format: torch.memory_format
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    weights = []
    for shape in SHAPES:
        drawn = torch.randn(shape, generator=generator)
        if len(shape) == 4:
            drawn = drawn.to(memory_format=memory_format)
        weights.append(nn.Parameter(drawn))
    optimizer = kind(weights, **SETTINGS)
    for weight in weights:
        optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    for step in range(4):
        for weight in weights:
            drawn = torch.randn(weight.shape, generator=generator)
            weight.grad = torch.empty_like(weight).copy_(drawn)
        # As the gradient of a 1x1 kernel comes: other strides, the same memory.
        weights[1].grad = weights[1].grad.contiguous()
        if kind is ChannelsLastSGD:
            optimizer.found_inf = torch.tensor(float(step == 2))
            optimizer.step()
        elif step != 2:
            optimizer.step()
    return [*weights, *(optimizer.state[weight]["momentum_buffer"] for weight in weights)]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_steps_are_those_of_sgd_and_one_with_found_inf_changes_nothing(memory_format):
    ours = weights_and_momenta(ChannelsLastSGD, memory_format)

    theirs = weights_and_momenta(SGD, memory_format)
    for a, b in zip(ours, theirs, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b)


def test_a_weight_without_a_gradient_stays_as_it_is():
    weight = nn.Parameter(torch.ones(2))
    optimizer = ChannelsLastSGD([weight], **SETTINGS)
    optimizer.found_inf = torch.zeros(())

    optimizer.step()

    assert weight.tolist() == [1.0, 1.0]
