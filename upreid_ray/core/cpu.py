"""What makes training and scoring faster on CPUs; no result depends on it.

The rest of the package calls `for_cpu` where a model starts to compute on a CPU, trains with
`ChannelsLastSGD`. Modules that are loaded, registered or exported stay plain modules of their
library.

Dimensions: B images, C channels, h x w pixels.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.sgd import sgd

# A convolution whose output has at most this many positions is no faster than a few products
# of matrices. OneDNN's bf16 kernels take up to twice as long for small maps. Those with a
# stride are wrong where the output is one column wide: on CPUs with AVX-512, output and weight
# gradient hold uninitialized memory (torch 2.15).
FEW_POSITIONS = 2
FEW_POSITIONS_BF16 = 4
FEW_POINTS_BF16 = 32  # for a 1x1 kernel, which is one product for all positions

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def for_cpu(model: ModuleT) -> ModuleT:
    """Make a model faster on a CPU, in place, and return it.

    Its 2D convolutions become `TrimmedConv2d`; the state dict and the results stay the same. A
    model that was changed computes on other devices too, but cannot be scripted or exported.
    """
    for module in model.modules():
        # Only what is exactly a Conv2d: a subclass may compute something else.
        if type(module) is nn.Conv2d and _can_be_trimmed(module):
            module.__class__ = TrimmedConv2d
    return model


class TrimmedConv2d(nn.Conv2d):
    """A convolution that skips the part of the kernel that sees nothing but padding.

    The last stages of a ResNet turn a patch into a map of one or four positions, where eight or
    five of the nine elements of a 3x3 kernel multiply zeros.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Convolve ``images [B, C, h, w]``."""
        rows, columns = (
            _overlaps(
                images.shape[2 + i], self.kernel_size[i], self.stride[i], int(self.padding[i])
            )
            for i in range(2)
        )
        num_positions = len(rows) * len(columns)
        # Channels last, as both are in memory; the weight's gradient comes out like that.
        pixels, kernel = (each.permute(0, 2, 3, 1) for each in (images, self.weight))
        is_bf16 = images.dtype == torch.bfloat16
        if is_bf16 and self.kernel_size == (1, 1) and num_positions <= FEW_POINTS_BF16:
            points = pixels[:, :: self.stride[0], :: self.stride[1]]
            product = F.linear(points.flatten(0, 2), kernel.flatten(1), self.bias)
            return product.view(*points.shape[:3], self.out_channels).permute(0, 3, 1, 2)
        is_wrong = is_bf16 and len(columns) == 1 and self.stride[0] > 1
        if is_wrong or num_positions <= (FEW_POSITIONS_BF16 if is_bf16 else FEW_POSITIONS):
            products = [
                F.linear(pixels[:, y, x].flatten(1), kernel[:, v, u].flatten(1), self.bias)
                for y, v in rows
                for x, u in columns
            ]
            positions = torch.stack(products, dim=1)
            return positions.view(-1, len(rows), len(columns), self.out_channels).permute(
                0, 3, 1, 2
            )
        return super().forward(images)


def _can_be_trimmed(convolution: nn.Conv2d) -> bool:
    """Tell whether `TrimmedConv2d` computes what this convolution does."""
    return (
        convolution.groups == 1
        and convolution.dilation == (1, 1)
        and convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
    )


def _overlaps(size: int, kernel: int, stride: int, padding: int) -> list[tuple[slice, slice]]:
    """Return, for each output position on an axis, which pixels and kernel elements overlap."""
    starts = range(-padding, size + padding - kernel + 1, stride)
    return [
        (slice(max(start, 0), start + kernel), slice(max(-start, 0), size - start))
        for start in starts
    ]


class ChannelsLastSGD(torch.optim.SGD):
    """SGD with momentum whose fused kernel sees tensors in the order of their memory.

    The results are those of PyTorch's own step, which on CPUs first copies every gradient of a
    3x3 kernel that is channels last: half of its time (torch 2.15). On GPUs it is as fast as
    PyTorch's fused step. The caller sets ``found_inf`` before each step.

    Attributes:
        found_inf: ``[]``, on the device of the parameters; 1 skips the step, 0 takes it.
    """

    found_inf: Tensor

    def __init__(
        self, parameters: list[nn.Parameter], *, lr: float, momentum: float, weight_decay: float
    ) -> None:
        """Start with a momentum of zero, so that the first step may be skipped too."""
        super().__init__(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
        for parameter in parameters:
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # nothing here evaluates a loss again
        """Update the parameters that have a gradient, and their momentum."""
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            sgd(
                [_in_memory_order(parameter) for parameter in trained],
                [_in_memory_order(parameter.grad) for parameter in trained],
                [_in_memory_order(self.state[each]["momentum_buffer"]) for each in trained],
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=False,
                maximize=False,
                fused=True,
                found_inf=self.found_inf,
            )


def _in_memory_order(tensor: Tensor) -> Tensor:
    """Return a view whose dimensions are ordered as in memory, if it is channels last."""
    return tensor.movedim(1, -1) if tensor.dim() > 1 else tensor
