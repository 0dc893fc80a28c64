"""Views: drawn as torchvision draws them, rendered as torchvision renders them."""

import dataclasses
import math

import pytest
import torch
import torchvision.transforms.v2 as transforms
import torchvision.transforms.v2.functional as tvf
from torch import Generator, Tensor
from torch.testing import assert_close
from torchvision import tv_tensors

from upreid_ray.config.presets import AUGMENTATIONS
from upreid_ray.config.pretrain import AugmentationConfig
from upreid_ray.core.augment import (
    Normalization,
    ViewParameters,
    draw_view_parameters,
    render_view,
    step_generator,
)

HEIGHT, WIDTH = 64, 32
NUM_DRAWS = 20_000  # ours, which are cheap
NUM_LOOPS = 3_000  # torchvision's, one by one
NUM_ERRORS = 4  # standard errors by which a share may be off: once in 16,000 draws of a test
KS_AT_0_001 = 1.949  # Kolmogorov's distribution: sqrt(-log(0.001 / 2) / 2)
PLAIN = AugmentationConfig(mean=(0, 0, 0), std=(1, 1, 1), jitter_probability=1)
MIXED = AugmentationConfig(jitter_probability=0.8)


def drawn(config: AugmentationConfig, size: int = NUM_DRAWS, seed: int = 0) -> ViewParameters:
    generator = Generator().manual_seed(seed)
    return draw_view_parameters(size, HEIGHT, WIDTH, config, generator)


def unchanged(size: int) -> ViewParameters:
    """Return the parameters of views that are their images."""
    return ViewParameters(
        crop=torch.tensor([[0.0, 0, HEIGHT, WIDTH]]).repeat(size, 1),
        flip=torch.zeros(size, dtype=torch.bool),
        jitter=torch.tensor([[1.0, 1, 1, 0]]).repeat(size, 1),
        gray=torch.zeros(size, dtype=torch.bool),
        blur_sigma=torch.zeros(size),
        erased=torch.zeros(size, 4),
    )


def changed(size: int, **fields: Tensor) -> ViewParameters:
    return dataclasses.replace(unchanged(size), **fields)


def pictures(size: int, seed: int = 0) -> Tensor:
    generator = Generator().manual_seed(seed)
    return torch.randint(256, (size, 3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Return the two-sample Kolmogorov-Smirnov statistic, 1 where its p-value is 0.001."""
    ours, theirs = ours.double().sort().values, theirs.double().sort().values
    at = torch.cat([ours, theirs])
    shares = [
        torch.searchsorted(sample, at, right=True).double() / len(sample)
        for sample in (ours, theirs)
    ]
    largest = float((shares[0] - shares[1]).abs().max())
    n, m = len(ours), len(theirs)
    return largest / (KS_AT_0_001 * math.sqrt((n + m) / (n * m)))


def loops_of(transform: transforms.Transform) -> list[dict]:
    image = tv_tensors.Image(torch.zeros(3, HEIGHT, WIDTH))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [transform.make_params([image]) for _ in range(NUM_LOOPS)]


def column(draws: list[dict], name: str) -> Tensor:
    return torch.tensor([draw[name] for draw in draws])


def assert_same_boxes(ours: Tensor, theirs: Tensor) -> None:
    """Compare top, left, height, width, area, shape and the free room below of [N, 4]."""

    def features(boxes: Tensor) -> dict[str, Tensor]:
        top, left, height, width = boxes.double().unbind(1)
        return {
            "top": top,
            "left": left,
            "height": height,
            "width": width,
            "area": height * width,
            "ratio": width / height,
            "bottom": top + height,
            "right": left + width,
        }

    for (name, a), b in zip(features(ours).items(), features(theirs).values(), strict=True):
        assert distance(a, b) < 1, name


@pytest.mark.parametrize("name", ["luperson", "dino"])
def test_crops_are_distributed_as_torchvisions(name):
    config = AUGMENTATIONS[name]
    theirs = loops_of(
        transforms.RandomResizedCrop((HEIGHT, WIDTH), config.crop_area, config.crop_ratio)
    )

    ours = drawn(config).crop

    fields = ("top", "left", "height", "width")
    assert_same_boxes(ours, torch.stack([column(theirs, f) for f in fields], dim=1))


def test_erased_boxes_are_distributed_as_torchvisions():
    config = AugmentationConfig(erase_probability=1)
    theirs = loops_of(transforms.RandomErasing(1, config.erase_area, config.erase_ratio))
    theirs = [draw for draw in theirs if draw["v"] is not None]

    ours = drawn(config).erased

    ours = ours[ours[:, 2] > 0]
    assert_same_boxes(ours, torch.stack([column(theirs, f) for f in "ijhw"], dim=1))


def test_boxes_that_do_not_fit_are_not_erased_as_often_as_torchvision_gives_up():
    config = AugmentationConfig(erase_probability=1, erase_area=(0.5, 0.9), erase_ratio=(1, 9))
    theirs = loops_of(transforms.RandomErasing(1, config.erase_area, config.erase_ratio))
    share = sum(draw["v"] is None for draw in theirs) / NUM_LOOPS

    ours = drawn(config).erased

    error = math.sqrt(share * (1 - share) * (1 / NUM_LOOPS + 1 / NUM_DRAWS))
    assert 0.01 < share < 0.99
    assert abs(float((ours[:, 2] == 0).double().mean()) - share) < NUM_ERRORS * error


@pytest.mark.parametrize("ratio", [(3.0, 3.0), (0.1, 0.1), (0.5, 0.5)])
def test_crops_that_do_not_fit_are_torchvisions_central_crop(ratio):
    config = AugmentationConfig(crop_area=(1, 1), crop_ratio=ratio)
    theirs = loops_of(transforms.RandomResizedCrop((HEIGHT, WIDTH), (1, 1), ratio))[0]

    ours = drawn(config, 8).crop

    expected = [float(theirs[name]) for name in ("top", "left", "height", "width")]
    assert ours.tolist() == [expected] * 8


@pytest.mark.parametrize("name", ["luperson", "dino"])
def test_crops_lie_within_the_image(name):
    top, left, height, width = drawn(AUGMENTATIONS[name]).crop.unbind(1)

    assert min(top.min(), left.min()) >= 0
    assert min(height.min(), width.min()) >= 1
    assert (top + height).max() <= HEIGHT
    assert (left + width).max() <= WIDTH


def test_boxes_are_whole_pixels():
    parameters = drawn(AugmentationConfig())

    boxes = torch.cat([parameters.crop, parameters.erased])
    assert torch.equal(boxes, boxes.round())


def test_crops_have_areas_and_shapes_within_their_ranges():
    _top, _left, height, width = drawn(AugmentationConfig(crop_ratio=(0.4, 0.6))).crop.unbind(1)

    # Rounding moves each side by up to half a pixel.
    assert ((height + 0.5) * (width + 0.5)).min() >= 0.2 * HEIGHT * WIDTH
    assert ((width + 0.5) / (height - 0.5)).min() >= 0.4
    assert ((width - 0.5) / (height + 0.5)).max() <= 0.6


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_each_change_happens_as_often_as_configured(probability):
    names = ("flip", "grayscale", "blur", "erase", "jitter")
    config = AugmentationConfig(**{f"{name}_probability": probability for name in names})

    parameters = drawn(config)

    happened = {
        "flip": parameters.flip,
        "grayscale": parameters.gray,
        "blur": parameters.blur_sigma > 0,
        "erase": parameters.erased[:, 2] > 0,
        "jitter": (parameters.jitter != torch.tensor([1.0, 1, 1, 0])).any(1),
    }
    error = math.sqrt(probability * (1 - probability) / NUM_DRAWS)
    for name, happens in happened.items():
        share = float(happens.double().mean())
        assert abs(share - probability) <= NUM_ERRORS * error, name


def test_the_changes_of_an_image_are_independent_of_one_another():
    parameters = drawn(AugmentationConfig(jitter_probability=0.5))

    happened = torch.stack(
        [
            parameters.flip,
            parameters.gray,
            parameters.blur_sigma > 0,
            parameters.erased[:, 2] > 0,
            parameters.jitter[:, 0] != 1,
            parameters.crop[:, 0] > parameters.crop[:, 0].median(),
        ]
    )
    correlation = happened.double().corrcoef() - torch.eye(len(happened))
    assert correlation.abs().max() < NUM_ERRORS / math.sqrt(NUM_DRAWS)


def test_the_blur_is_distributed_as_torchvisions():
    config = AugmentationConfig(blur_probability=1)
    theirs = loops_of(transforms.GaussianBlur(23, config.blur_sigma))

    ours = drawn(config).blur_sigma

    assert distance(ours, torch.tensor([draw["sigma"][0] for draw in theirs])) < 1


@pytest.mark.parametrize(
    ("field", "name"), [(0, "brightness"), (1, "contrast"), (2, "saturation"), (3, "hue")]
)
def test_color_jitter_is_distributed_as_torchvisions(field, name):
    config = AugmentationConfig(jitter_probability=1)
    theirs = loops_of(transforms.ColorJitter(0.4, 0.4, 0.2, 0.1))

    ours = drawn(config).jitter[:, field]

    assert distance(ours, column(theirs, f"{name}_factor")) < 1


def test_draws_are_a_function_of_the_seed():
    first, again = drawn(MIXED, 16), drawn(MIXED, 16)

    for field in dataclasses.fields(first):
        assert torch.equal(getattr(first, field.name), getattr(again, field.name))


def test_another_seed_draws_other_views():
    images = pictures(16)

    views = [render_view(images, drawn(MIXED, 16, seed), MIXED) for seed in (0, 1)]

    assert not any(torch.equal(a, b) for a, b in zip(*views, strict=True))


def test_rendering_is_a_pure_function():
    images, parameters = pictures(16), drawn(MIXED, 16)

    views = [render_view(images, parameters, MIXED) for _ in range(2)]

    assert torch.equal(*views)
    assert torch.equal(images, pictures(16))


def test_an_unchanged_view_is_the_normalized_image():
    images = pictures(4)

    view = render_view(images, unchanged(4), AugmentationConfig(mean=(0.1, 0.2, 0.3)))

    expected = tvf.normalize(images / 255, [0.1, 0.2, 0.3], [0.2660, 0.2522, 0.2505])
    assert_close(view, expected)


def test_a_crop_is_torchvisions_resized_crop():
    images, crop = pictures(32), drawn(AugmentationConfig(), 32).crop

    view = render_view(images, changed(32, crop=crop), PLAIN)

    for i, box in enumerate(crop.int().tolist()):
        expected = tvf.resized_crop(images[i] / 255, *box, [HEIGHT, WIDTH], antialias=True)
        assert_close(view[i], expected)


def test_flip_mirrors_the_crop():
    images, crop = pictures(8), drawn(AugmentationConfig(), 8).crop
    flip = torch.ones(8, dtype=torch.bool)

    view = render_view(images, changed(8, crop=crop, flip=flip), PLAIN)

    assert_close(view, render_view(images, changed(8, crop=crop), PLAIN).flip(3))


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_torchvisions_away_from_the_borders(sigma):
    images, reach = pictures(4), 12  # six of the largest sigma

    view = render_view(images, changed(4, blur_sigma=torch.full((4,), sigma)), PLAIN)

    expected = tvf.gaussian_blur(images / 255, [2 * reach + 1] * 2, [sigma, sigma])
    inside = (slice(None), slice(None), slice(reach, -reach), slice(reach, -reach))
    assert_close(view[inside], expected[inside])


def test_blur_keeps_a_plain_image_up_to_its_borders():
    images = torch.full((1, 3, HEIGHT, WIDTH), 51, dtype=torch.uint8)

    view = render_view(images, changed(1, blur_sigma=torch.tensor([2.0])), PLAIN)

    assert_close(view, torch.full((1, 3, HEIGHT, WIDTH), 0.2))


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_brightness_is_torchvisions(factor):
    images = pictures(4)

    view = render_view(images, changed(4, jitter=jitter(4, 0, factor)), PLAIN)

    assert_close(view, tvf.adjust_brightness(images / 255, factor))


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.07, 0.1, 0.5])
def test_hue_is_torchvisions(turn):
    images = torch.cat([pictures(4), pictures(4) // 128 * 255])  # with equal channels too

    view = render_view(images, changed(8, jitter=jitter(8, 3, turn)), PLAIN)

    assert_close(view, tvf.adjust_hue(images / 255, turn))


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
@pytest.mark.parametrize("name", ["contrast", "saturation"])
def test_contrast_and_saturation_are_torchvisions(name, factor):
    images = pictures(4)
    images[:, 0] = 0  # it weighs red by 0.2989 instead of BT.601's 0.299
    place = {"contrast": 1, "saturation": 2}[name]

    view = render_view(images, changed(4, jitter=jitter(4, place, factor)), PLAIN)

    assert_close(view, getattr(tvf, f"adjust_{name}")(images / 255, factor))


def test_contrast_keeps_the_mean_of_the_crop_alone():
    images = pictures(1)
    images[:, :, HEIGHT // 2 :] = 255
    parameters = changed(
        1, crop=torch.tensor([[0.0, 0, HEIGHT // 2, WIDTH]]), jitter=jitter(1, 1, 0.6)
    )

    view = render_view(images, parameters, PLAIN)

    upper = images.clone()
    upper[:, :, HEIGHT // 2 :] = 0
    assert_close(view, render_view(upper, parameters, PLAIN))


def test_gray_is_the_luma_of_bt_601():
    images = pictures(4)
    red, green, blue = (images / 255).unbind(1)

    view = render_view(images, changed(4, gray=torch.ones(4, dtype=torch.bool)), PLAIN)

    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    assert_close(view, luma[:, None].expand(-1, 3, -1, -1))


def test_jitter_changes_nothing_where_its_probability_is_zero():
    without = PLAIN.override({"jitter_probability": 0})

    view = render_view(pictures(4), changed(4, jitter=jitter(4, 0, 0.6)), without)

    assert_close(view, pictures(4) / 255)


def test_what_is_erased_is_exactly_zero():
    images, erased = pictures(16), drawn(AugmentationConfig(erase_probability=1), 16).erased

    view = render_view(images, changed(16, erased=erased), AugmentationConfig())

    for i, (top, left, height, width) in enumerate(erased.int().tolist()):
        assert (view[i, :, top : top + height, left : left + width] == 0).all()


def test_nothing_but_the_box_is_erased():
    images, erased = pictures(16), drawn(AugmentationConfig(erase_probability=1), 16).erased
    whole = render_view(images, unchanged(16), AugmentationConfig())

    view = render_view(images, changed(16, erased=erased), AugmentationConfig())

    for i, (top, left, height, width) in enumerate(erased.int().tolist()):
        whole[i, :, top : top + height, left : left + width] = 0
    assert torch.equal(view, whole)


def test_a_view_does_not_depend_on_the_rest_of_the_batch():
    images, parameters = pictures(12), drawn(MIXED, 12)

    together = render_view(images, parameters, PLAIN)

    for i in range(12):
        row = slice(i, i + 1)
        assert_close(render_view(images[row], parameters.rows(row), PLAIN), together[row])


def test_rows_selects_the_parameters_of_images():
    parameters, order = drawn(MIXED, 4), torch.tensor([2, 0])

    selected = parameters.rows(order)

    for field in dataclasses.fields(parameters):
        expected = getattr(parameters, field.name)[order]
        assert torch.equal(getattr(selected, field.name), expected)


def test_a_view_at_full_height_changes_the_rows_of_the_crop_alone():
    parameters = drawn(MIXED, 16)
    before = parameters.crop.clone()

    whole = parameters.at_full_height(HEIGHT)

    top, left, height, width = whole.crop.unbind(1)
    assert (top == 0).all()
    assert (height == HEIGHT).all()
    assert torch.equal(torch.stack([left, width], dim=1), before[:, [1, 3]])
    assert torch.equal(parameters.crop, before)
    for name in ("flip", "jitter", "gray", "blur_sigma", "erased"):
        assert torch.equal(getattr(whole, name), getattr(parameters, name))


def test_normalization_subtracts_the_mean_and_divides_by_the_deviation():
    normalization = Normalization(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2))

    pixels = normalization.apply(torch.full((1, 3, 1, 1), 0.6))

    assert_close(pixels.flatten(), torch.tensor([1.0, 1.6, 0.15]))


def test_undoing_a_normalization_returns_the_pixels():
    normalization = Normalization(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2))
    pixels = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))

    assert_close(normalization.undo(normalization.apply(pixels)), pixels)


def test_each_step_of_each_seed_has_a_generator_of_its_own():
    draws = {
        (seed, step): torch.rand((), generator=step_generator(seed=seed, step=step)).item()
        for seed in range(3)
        for step in range(3)
    }

    assert len(set(draws.values())) == len(draws)
    again = torch.rand((), generator=step_generator(seed=2, step=1)).item()
    assert again == draws[2, 1]


def jitter(size: int, place: int, value: float) -> Tensor:
    parameters = unchanged(size).jitter
    parameters[:, place] = value
    return parameters
