"""Convolutions of small maps, such as the last stages of a ResNet make of a patch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Positions of the output up to which products of matrices are no slower than a convolution.
# OneDNN's bf16 kernels take up to twice as long for small maps, and their weight gradient of a
# strided convolution over one pixel holds uninitialized memory (torch 2.15).
FEW_POSITIONS = 2
FEW_POSITIONS_BF16_CPU = 4
FEW_POINTS_BF16_CPU = 32  # of a 1x1 kernel, which is one product for all of them


class TrimmedConv2d(nn.Conv2d):
    """A convolution of one group that skips the taps that see nothing but padding.

    The last stages of a ResNet turn a patch into a map of one or four positions, where eight or
    five of the nine taps of a 3x3 kernel multiply zeros. The result is the same.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Convolve ``images [B, C, h, w]``."""
        rows, columns = (
            _meetings(
                images.shape[2 + i], self.kernel_size[i], self.stride[i], int(self.padding[i])
            )
            for i in range(2)
        )
        num_positions = len(rows) * len(columns)
        # Channels last, as both are in memory; the weight's gradient comes out like that.
        pixels, taps = (each.permute(0, 2, 3, 1) for each in (images, self.weight))
        is_bf16_cpu = images.device.type == "cpu" and images.dtype == torch.bfloat16
        if is_bf16_cpu and self.kernel_size == (1, 1) and num_positions <= FEW_POINTS_BF16_CPU:
            points = pixels[:, :: self.stride[0], :: self.stride[1]]
            product = F.linear(points.flatten(0, 2), taps.flatten(1), self.bias)
            return product.view(*points.shape[:3], self.out_channels).permute(0, 3, 1, 2)
        if num_positions <= (FEW_POSITIONS_BF16_CPU if is_bf16_cpu else FEW_POSITIONS):
            products = [
                F.linear(pixels[:, y, x].flatten(1), taps[:, v, u].flatten(1), self.bias)
                for y, v in rows
                for x, u in columns
            ]
            positions = torch.stack(products, dim=1)
            return positions.view(-1, len(rows), len(columns), self.out_channels).permute(
                0, 3, 1, 2
            )
        return super().forward(images)


def _meetings(size: int, kernel: int, stride: int, padding: int) -> list[tuple[slice, slice]]:
    """Return which pixels and taps meet along one axis, for each position of the output."""
    starts = range(-padding, size + padding - kernel + 1, stride)
    return [
        (slice(max(start, 0), start + kernel), slice(max(-start, 0), size - start))
        for start in starts
    ]
