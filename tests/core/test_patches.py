"""Patches are equal, row-major, and in the middle of the image."""

import pytest
import torch
from torch.testing import assert_close

from upreid_ray.core.patches import cut_patches


def coordinates(height: int, width: int) -> torch.Tensor:
    """Make one image whose two channels hold the row and the column of each pixel."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([row, column])[None]


def corners(patches: torch.Tensor) -> list[list[int]]:
    """Return the row and the column of the first pixel of each patch of the first image."""
    return patches[0, :, :, 0, 0].tolist()


def test_patches_are_in_row_major_order():
    patches = cut_patches(coordinates(6, 4), rows=3, columns=2)

    assert corners(patches) == [[0, 0], [0, 2], [2, 0], [2, 2], [4, 0], [4, 2]]


@pytest.mark.parametrize(
    ("rows", "columns", "height", "width"), [(4, 2, 64, 64), (2, 2, 128, 64)]
)
def test_patches_of_a_grid_that_divides_the_image_cover_it(rows, columns, height, width):
    images = torch.arange(2 * 3 * 256 * 128).reshape(2, 3, 256, 128)

    patches = cut_patches(images, rows=rows, columns=columns)

    assert patches.shape == (2, rows * columns, 3, height, width)
    strips = [
        torch.cat([patches[:, row * columns + c] for c in range(columns)], dim=3)
        for row in range(rows)
    ]
    assert_close(torch.cat(strips, dim=2), images)


@pytest.mark.parametrize(
    ("rows", "columns", "size", "first", "last"),
    [(3, 2, (2, 2), [1, 0], [5, 2]), (2, 3, (4, 1), [0, 1], [4, 3])],
)
def test_patches_of_other_grids_are_centred(rows, columns, size, first, last):
    patches = cut_patches(coordinates(8, 5), rows=rows, columns=columns)

    assert patches.shape[3:] == size
    assert corners(patches)[0] == first
    assert corners(patches)[-1] == last


def test_pixels_within_a_patch_are_neighbours():
    patch = cut_patches(coordinates(6, 4), rows=3, columns=2)[0, 3]

    assert patch.tolist() == [[[2, 2], [3, 3]], [[2, 3], [2, 3]]]
