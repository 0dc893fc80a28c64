"""Cutting images into grids of patches.

Dimensions: B images, C channels, H x W pixels, P = rows * columns patches in row-major order.
"""

from torch import Tensor


def cut_patches(images: Tensor, *, rows: int, columns: int) -> Tensor:
    """Cut each image into a grid of equal patches.

    If the grid does not divide the image, patches have ``H // rows`` x ``W // columns`` pixels,
    and the margins on opposite sides are equal, or differ by one pixel.

    Args:
        images: ``[B, C, H, W]``.
        rows: Number of patches from top to bottom.
        columns: Number of patches from left to right.

    Returns:
        ``[B, P, C, H // rows, W // columns]``; may share memory with ``images``.
    """
    batch, channels, height, width = images.shape
    patch_height, patch_width = height // rows, width // columns
    top, left = (height - rows * patch_height) // 2, (width - columns * patch_width) // 2
    grid = images[:, :, top : top + rows * patch_height, left : left + columns * patch_width]
    return (
        grid.reshape(batch, channels, rows, patch_height, columns, patch_width)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(batch, rows * columns, channels, patch_height, patch_width)
    )
