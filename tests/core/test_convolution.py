"""Convolutions of small maps give what torch's convolution gives."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from upreid_ray.core.convolution import TrimmedConv2d

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
