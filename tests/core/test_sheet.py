"""The picture of views and patches."""

import numpy as np
import pytest

from tests.core.tiny import TINY, people, tiny
from upreid_ray.core.sheet import view_sheet
from upreid_ray.core.training import StepDraw

BORDER = 2  # pixels, around each panel, and around each patch of a grid
VIEW = 32 + 2 * BORDER  # width of the panel of a view of 64x32
PATCHES = (2 * 16 + 3 * BORDER) + 2 * BORDER  # of 2 columns of 16 pixels
HEIGHT = (2 * 32 + 3 * BORDER) + 2 * BORDER  # of the grid of 2 rows, higher than the view


def test_a_sheet_has_the_image_and_both_views_with_their_patches():
    sheet = view_sheet(people(3), StepDraw.at(TINY, 0), TINY)

    assert sheet.size == (VIEW + 2 * (VIEW + PATCHES), 3 * HEIGHT)


def test_a_sheet_without_patches_has_the_image_and_both_views():
    config = tiny({"loss.intrinsic_weight": 0})

    sheet = view_sheet(people(3), StepDraw.at(config, 0), config)

    assert sheet.size == (3 * VIEW, 3 * (64 + 2 * BORDER))


@pytest.mark.parametrize("num_images", [1, 2, 8])
def test_a_sheet_has_no_more_rows_than_asked_for_or_given(num_images):
    sheet = view_sheet(people(4), StepDraw.at(TINY, 0), TINY, num_images=num_images)

    assert sheet.height == min(num_images, 4) * HEIGHT


def test_a_sheet_begins_with_the_image_itself():
    images = people(1)

    sheet = np.asarray(view_sheet(images, StepDraw.at(TINY, 0), TINY))

    shown = sheet[BORDER : BORDER + 64, BORDER : BORDER + 32]
    assert np.array_equal(shown, images[0].permute(1, 2, 0).numpy())


def test_another_draw_changes_the_views_but_not_the_image():
    sheets = [
        np.asarray(view_sheet(people(1), StepDraw.at(TINY, step), TINY)) for step in (0, 1)
    ]

    differs = (sheets[0] != sheets[1]).any(axis=(0, 2))
    assert not differs[:VIEW].any()
    assert differs[VIEW : 2 * VIEW].any()
    assert differs[2 * VIEW + PATCHES :].any()
