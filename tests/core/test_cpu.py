"""What is faster on a CPU gives what PyTorch gives, and is used where a CPU computes."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD
from torch.testing import assert_close

from tests.core.tiny import fresh_state
from upreid_ray.core.cpu import ChannelsLastSGD, TrimmedConv2d, for_cpu
from upreid_ray.core.memory import KEEP_FREED_MEMORY

SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
SHAPES = [(8, 4, 3, 3), (8, 4, 1, 1), (8, 5), (8,)]

sizes = st.integers(1, 6)
kernels = st.sampled_from([1, 3, 7])
strides = st.integers(1, 2)


def results_of(convolution: nn.Conv2d, images: Tensor) -> list[Tensor]:
    """Return outputs and all gradients."""
    images = images.detach().requires_grad_()
    outputs = convolution(images)
    weights = torch.arange(outputs.numel(), dtype=outputs.dtype).view_as(outputs) % 3
    (outputs * weights).sum().backward()
    return [outputs, images.grad, convolution.weight.grad, convolution.bias.grad]


@given(
    height=sizes, width=sizes, kernel=kernels, stride=strides, seed=st.integers(0, 2**32 - 1)
)
def test_trimmed_convolution_is_the_convolution(height, width, kernel, stride, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)
    whole = nn.Conv2d(3, 5, kernel, stride, kernel // 2, dtype=torch.float64)
    trimmed = TrimmedConv2d(3, 5, kernel, stride, kernel // 2, dtype=torch.float64)
    trimmed.load_state_dict(whole.state_dict())

    assert_close(results_of(trimmed, images), results_of(whole, images))


@given(
    height=sizes, width=sizes, kernel=kernels, stride=strides, seed=st.integers(0, 2**32 - 1)
)
def test_trimmed_convolution_is_the_convolution_in_bf16(height, width, kernel, stride, seed):
    # Small whole numbers, whose sums bf16 holds exactly.
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 1, height, width), (2, 1, kernel, kernel), (2,)
    images, weight, bias = (
        torch.randint(-1, 2, shape, generator=generator).float() for shape in shapes
    )
    whole = nn.Conv2d(1, 2, kernel, stride, kernel // 2)
    trimmed = TrimmedConv2d(1, 2, kernel, stride, kernel // 2)
    for convolution in (whole, trimmed):
        convolution.load_state_dict({"weight": weight, "bias": bias})

    exact = results_of(whole, images)
    rounded = results_of(trimmed.bfloat16(), images.bfloat16())

    assert all(each.equal(other.float()) for each, other in zip(exact, rounded, strict=True))


@pytest.mark.parametrize("height", [3, 9, 16])
@pytest.mark.parametrize("width", [1, 2])
def test_a_strided_convolution_to_one_column_is_right_in_bf16(height, width):
    # oneDNN's own output is not, on some CPUs.
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 64, height, width, generator=generator).bfloat16()
    convolution = nn.Conv2d(64, 128, 3, 2, 1).bfloat16()
    exact = copy.deepcopy(convolution).float()
    images, convolution = (
        each.to(memory_format=torch.channels_last) for each in (images, for_cpu(convolution))
    )

    expected = exact(images.float())

    assert_close(convolution(images).float(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.LazyConv2d(4, 3),
    ],
    ids=["groups", "dilation", "padding mode", "named padding", "subclass"],
)
def test_a_convolution_of_another_kind_stays_as_it_is(convolution):
    kind = type(convolution)

    assert type(for_cpu(convolution)) is kind


def test_a_model_that_trains_on_a_cpu_has_trimmed_convolutions():
    state = fresh_state()

    for encoder in (state.model.query_encoder, state.model.key_encoder):
        kinds = {type(each) for each in encoder.modules() if isinstance(each, nn.Conv2d)}
        assert kinds == {TrimmedConv2d}


def test_the_makefile_keeps_freed_memory_as_workers_do():
    lines = (Path(__file__).parents[2] / "Makefile").read_text().splitlines()
    settings = next(line for line in lines if line.startswith("KEEP_MEMORY := "))

    assert settings.removeprefix("KEEP_MEMORY := ").split() == [
        f"{name}={value}" for name, value in KEEP_FREED_MEMORY.items()
    ]


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
