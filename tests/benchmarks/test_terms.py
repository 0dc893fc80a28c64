import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks.terms import ALL_TERMS, floors, measure, share_in_same_row, without_information
from tests.core.tiny import fresh_state, people, tiny
from upreid_ray.core.losses import info_nce, intrinsic_contrastive
from upreid_ray.core.training import StepDraw


def simplex(number: int) -> torch.Tensor:
    """Make unit vectors that point away from each other as far as they can."""
    return F.normalize(torch.eye(number).double() - 1 / number, dim=1)


def test_floor_of_info_nce_is_reached_by_keys_at_right_angles() -> None:
    config = tiny({"model.queue_size": 5})
    one, *others = torch.eye(6).double()[:, None]
    value = info_nce(one, one, torch.cat(others), temperature=config.loss.temperature)
    assert floors(config)["info_nce"] == pytest.approx(float(value))


@pytest.mark.parametrize("mining", ["symmetry", "none"])
def test_floor_of_the_intrinsic_term_is_reached_by_kinds_that_are_far_apart(
    mining: str,
) -> None:
    config = tiny({"patches.rows": 3, "patches.columns": 2, "patches.mining": mining})
    patches = simplex(3).repeat_interleave(2, dim=0) if mining == "symmetry" else simplex(6)
    value = intrinsic_contrastive(
        patches[None],
        patches[None],
        rows=3,
        columns=2,
        temperature=config.loss.intrinsic_temperature,
        mining=mining,
    )
    assert floors(config)["intrinsic_contrastive"] == pytest.approx(float(value))


def test_keys_without_information_are_those_of_another_image_and_patches_are_out_of_order() -> (
    None
):
    config = tiny({"patches.rows": 4, "patches.columns": 2})
    image, embedding = torch.meshgrid(torch.arange(50.0), torch.arange(10.0), indexing="ij")
    keys = torch.stack([image, embedding], dim=2)
    blind = without_information(keys, config)
    assert (blind[:, :2, 0] != keys[:, :2, 0]).all()
    assert (blind[:, 2:, 0] == keys[:, 2:, 0]).all()
    assert (blind[:, :, 1].sort(dim=1).values == keys[:, :, 1]).all()
    assert 0.05 < (blind[:, 2:, 1] == keys[:, 2:, 1]).float().mean() < 0.25


def test_rows_of_equal_crops_and_rows_at_the_body_are_the_same_rows() -> None:
    view = {"patches.alignment": "view"}
    equal = {"augmentation.crop_area": (1, 1), "augmentation.crop_ratio": (0.5, 0.5)}
    for settings, expected in (
        (view | equal, 1.0),
        ({"patches.alignment": "body"}, 1.0),
        (view, None),
    ):
        config = tiny(settings)
        share = share_in_same_row(StepDraw.at(config, 0), config)
        assert share == expected if expected is not None else share < 1


def test_measuring_tells_terms_with_information_and_changes_no_weight() -> None:
    config = tiny({**ALL_TERMS, "patches.alignment": "body"})
    state = fresh_state(config)
    before = [parameter.clone() for parameter in state.model.parameters()]
    values, gradients = measure(state, people(8), 0)
    assert all(map(math.isfinite, values.values()))
    assert values["info_nce value"] < values["info_nce without information"]
    for name, each in gradients.items():
        assert values[f"{name} gradient"] == pytest.approx(float(each.norm()))
    assert all(map(torch.equal, before, state.model.parameters()))
