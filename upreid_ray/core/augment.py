"""Batched augmentation on the training device: uint8 images -> normalized views.

Each image has its own parameters, drawn on the CPU from a seeded generator; rendering is a pure
function of images and parameters. Crop, flip and blur are linear along each axis, so they
combine into one small matrix for each image and axis, and a batch takes two matrix products.

Distributions are torchvision's (RandomResizedCrop, ColorJitter, RandomGrayscale, GaussianBlur,
RandomErasing), with three differences: color jitter has a fixed order, colours change before
the crop instead of after it, and the blur is not truncated.

Dimensions: B images, H x W pixels of an image, and of its view.
"""

import dataclasses
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Generator, Tensor

from upreid_ray.config.pretrain import AugmentationConfig

NUM_ATTEMPTS = 10  # a box that does not fit is drawn again, as often as torchvision does
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as torchvision and PIL weigh the channels


@dataclass(frozen=True)
class Normalization:
    """Statistics of the pixels that a backbone was trained on.

    Attributes:
        mean: Mean of each colour channel, 0..1.
        std: Standard deviation of each colour channel.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def apply(self, pixels: Tensor) -> Tensor:
        """Subtract the mean and divide by the deviation; ``pixels [..., 3, H, W]``, 0..1."""
        return (pixels - _by_channel(self.mean, pixels.device)) / _by_channel(
            self.std, pixels.device
        )

    def undo(self, normalized: Tensor) -> Tensor:
        """Return the pixels ``[..., 3, H, W]``, 0..1, that `apply` has normalized."""
        std, mean = (_by_channel(each, normalized.device) for each in (self.std, self.mean))
        return (normalized * std + mean).clamp(0, 1)


@dataclass(frozen=True)
class ViewParameters:
    """Parameters of one view of each of B images.

    Attributes:
        crop: ``[B, 4]``, top, left, height and width in pixels of the image.
        flip: ``[B]``, bool.
        jitter: ``[B, 4]``, factors of brightness, contrast and saturation (1 changes nothing)
            and the turn of the hue in -0.5..0.5 (0 changes nothing).
        gray: ``[B]``, bool.
        blur_sigma: ``[B]``, in pixels of the view; 0 for no blur.
        erased: ``[B, 4]``, top, left, height and width in pixels of the view; 0 for none.
    """

    crop: Tensor
    flip: Tensor
    jitter: Tensor
    gray: Tensor
    blur_sigma: Tensor
    erased: Tensor

    def rows(self, index: Tensor | slice) -> Self:
        """Return the parameters of the images at ``index``."""
        return type(self)(**{name: field[index] for name, field in self._fields().items()})

    def to(self, device: torch.device) -> Self:
        """Copy to ``device`` without waiting for the copy."""
        fields = self._fields().items()
        return type(self)(
            **{name: field.to(device, non_blocking=True) for name, field in fields}
        )

    def at_full_height(self, height: int) -> Self:
        """Return a copy whose crops extend over all ``height`` rows of the image."""
        crop = self.crop.clone()
        crop[:, 0] = 0
        crop[:, 2] = height
        return dataclasses.replace(self, crop=crop)

    def _fields(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def step_generator(*, seed: int, step: int) -> Generator:
    """Return the generator of everything that is random in one step of a run."""
    return torch.Generator().manual_seed(hash_seeds(seed, step))


def hash_seeds(*numbers: int) -> int:
    """Return a seed that depends on all of these numbers."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(state[0])


def draw_view_parameters(
    batch_size: int, height: int, width: int, config: AugmentationConfig, generator: Generator
) -> ViewParameters:
    """Draw the parameters of one view of each of ``batch_size`` images of H x W pixels."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch_size, generator=generator)

    def happens(probability: float) -> Tensor:
        return torch.rand(batch_size, generator=generator) < probability

    crop = _draw_boxes(
        batch_size,
        (height, width),
        (height, width),
        config.crop_area,
        config.crop_ratio,
        generator,
    )
    central = _central_box(height, width, config.crop_ratio)
    # A rectangle as high or as wide as the view is not erased; its ratio is height by width.
    low, high = config.erase_ratio
    erased = _draw_boxes(
        batch_size,
        (height, width),
        (height - 1, width - 1),
        config.erase_area,
        (1 / high, 1 / low),
        generator,
    )
    spreads = (config.jitter_brightness, config.jitter_contrast, config.jitter_saturation)
    factors = [uniform(1 - spread, 1 + spread) for spread in spreads]
    turn = uniform(-config.jitter_hue, config.jitter_hue)
    jittered = happens(config.jitter_probability)[:, None]
    return ViewParameters(
        crop=torch.where(crop[:, 2:3] > 0, crop, central),
        flip=happens(config.flip_probability),
        jitter=torch.where(
            jittered, torch.stack([*factors, turn], dim=1), torch.tensor([1.0, 1.0, 1.0, 0.0])
        ),
        gray=happens(config.grayscale_probability),
        blur_sigma=uniform(*config.blur_sigma) * happens(config.blur_probability),
        erased=erased * happens(config.erase_probability)[:, None],
    )


def render_view(
    images: Tensor,
    parameters: ViewParameters,
    config: AugmentationConfig,
    *,
    pads_with_black: bool = False,
) -> Tensor:
    """Draw one view of each image.

    Args:
        images: ``[B, 3, H, W]``, uint8.
        parameters: Parameters of the B views, on the device of the images.
        config: Ranges that the parameters were drawn from.
        pads_with_black: Whether crops may extend beyond the image, where they are black.

    Returns:
        ``[B, 3, H, W]``, normalized, in fp32 or the precision of autocast; erased pixels are 0,
        the mean colour.
    """
    height, width = images.shape[2:]
    top, left, crop_height, crop_width = parameters.crop.unbind(1)
    down = _resampling(top, crop_height, height, parameters.blur_sigma)
    across = _resampling(left, crop_width, width, parameters.blur_sigma)
    across = torch.where(parameters.flip[:, None, None], across.flip(1), across)

    pixels = images.float() / 255
    if config.jitter_probability > 0:
        # The mean of the crop, which contrast needs: resampling is linear, so are its means.
        weights = down.mean(1)[:, None, :, None] * across.mean(1)[:, None, None, :]
        pixels = _jitter(pixels, weights, *parameters.jitter.unbind(1))
    pixels = torch.where(parameters.gray[:, None, None, None], _luma(pixels), pixels)
    normalization = Normalization(config.mean, config.std)
    view = down[:, None] @ (normalization.apply(pixels) @ across.mT[:, None])
    if pads_with_black:
        # Pixels outside of the image have no weight, so that they are 0 until here.
        inside = down.sum(2)[:, None, :, None] * across.sum(2)[:, None, None, :]
        black = normalization.apply(view.new_zeros(3, 1, 1))
        view = (view + (1 - inside) * black).to(view.dtype)

    top, left, erased_height, erased_width = parameters.erased.unbind(1)
    erased = (
        _between(height, top, top + erased_height)[:, None, :, None]
        & _between(width, left, left + erased_width)[:, None, None, :]
    )
    return view.masked_fill_(erased, 0)


def _draw_boxes(
    batch_size: int,
    frame: tuple[int, int],
    largest: tuple[int, int],
    area: tuple[float, float],
    ratio: tuple[float, float],
    generator: Generator,
) -> Tensor:
    """Draw boxes ``[B, 4]`` in whole pixels, uniform in area and in log(width / height).

    Of several attempts, the first box that is no larger than ``largest`` is taken; if there is
    none, the box is all zero.
    """
    height, width = frame
    shape = (batch_size, NUM_ATTEMPTS)
    areas = torch.rand(shape, generator=generator) * (area[1] - area[0]) + area[0]
    low, high = torch.tensor(ratio).log()
    ratios = (torch.rand(shape, generator=generator) * (high - low) + low).exp()
    heights = (areas * height * width / ratios).sqrt().round()
    widths = (areas * height * width * ratios).sqrt().round()
    fits = (heights >= 1) & (widths >= 1) & (heights <= largest[0]) & (widths <= largest[1])
    first = fits.int().argmax(1, keepdim=True)
    box_height = heights.gather(1, first).squeeze(1)
    box_width = widths.gather(1, first).squeeze(1)
    place = torch.rand(2, batch_size, generator=generator)
    top = (place[0] * (height - box_height + 1)).floor()
    left = (place[1] * (width - box_width + 1)).floor()
    return torch.stack([top, left, box_height, box_width], dim=1) * fits.any(1, keepdim=True)


def _central_box(height: int, width: int, ratio: tuple[float, float]) -> Tensor:
    """Return the largest central box ``[4]`` whose width by height is within ``ratio``."""
    box_height = min(height, round(width / ratio[0]))
    box_width = min(width, round(height * ratio[1]))
    return torch.tensor(
        [(height - box_height) // 2, (width - box_width) // 2, box_height, box_width]
    ).float()


def _resampling(start: Tensor, length: Tensor, size: int, blur_sigma: Tensor) -> Tensor:
    """Return ``[B, size, size]``: pixels of the view from pixels of the image, along one axis.

    The ``length`` pixels from ``start`` on are interpolated bilinearly, then blurred. Pixels
    outside of the crop have no weight. A crop is never larger than the view, so no antialiasing
    is needed.
    """
    pixel = torch.arange(size, device=start.device)
    center = (pixel + 0.5) * (length / size)[:, None] - 0.5
    center = start[:, None] + center.clamp(min=0).minimum(length[:, None] - 1)
    interpolation = (1 - (center[:, :, None] - pixel).abs()).clamp(min=0)
    # Once for each distance: exp is slow where it underflows, as it does for most of them.
    of_distance = (-0.5 * (pixel / blur_sigma.clamp(min=1e-3)[:, None]) ** 2).exp()
    distances = torch.arange(1 - size, size, device=start.device).abs()
    # Each pixel of the view takes a window of the distances, the last pixel first.
    blur = of_distance[:, distances].unfold(1, size, 1).flip(1)
    return blur / blur.sum(2, keepdim=True) @ interpolation


def _between(size: int, start: Tensor, stop: Tensor) -> Tensor:
    """Return ``[B, size]``: whether each pixel is in ``start <= pixel < stop``."""
    pixel = torch.arange(size, device=start.device)
    return (pixel >= start[:, None]) & (pixel < stop[:, None])


def _luma(pixels: Tensor) -> Tensor:
    """Return the brightness ``[B, 1, H, W]`` of colours ``[B, 3, H, W]``."""
    return (pixels * _by_channel(LUMA, pixels.device)).sum(1, keepdim=True)


def _by_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return ``[3, 1, 1]``, made on the CPU: on a GPU this would wait for queued work."""
    return torch.tensor(values)[:, None, None].to(device, non_blocking=True)


def _jitter(
    pixels: Tensor,
    weights: Tensor,
    brightness: Tensor,
    contrast: Tensor,
    saturation: Tensor,
    turn: Tensor,
) -> Tensor:
    """Change colours in this order, clamped to 0..1 after each change.

    Args:
        pixels: ``[B, 3, H, W]``, 0..1.
        weights: ``[B, 1, H, W]``, sum 1, weights of the mean that a change of contrast keeps.
        brightness: ``[B]``, factors.
        contrast: ``[B]``, factors.
        saturation: ``[B]``, factors.
        turn: ``[B]``, added to the hue, where 1 is the whole circle.
    """

    def blend(other: Tensor | float, factor: Tensor) -> Tensor:
        share = factor[:, None, None, None]
        return (share * pixels + (1 - share) * other).clamp(0, 1)

    pixels = blend(0.0, brightness)
    pixels = blend((_luma(pixels) * weights).sum((2, 3), keepdim=True), contrast)
    pixels = blend(_luma(pixels), saturation)
    return _turn_hue(pixels, turn)


def _turn_hue(pixels: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of ``[B, 3, H, W]`` in HSV space (Smith 1978) by ``turn [B]`` circles."""
    value, largest = pixels.max(dim=1, keepdim=True)
    chroma = value - pixels.amin(dim=1, keepdim=True)
    # In units of 60 degrees: the place of the largest channel, and the others' difference.
    following = pixels.gather(1, (largest + 1) % 3) - pixels.gather(1, (largest + 2) % 3)
    hue = following / chroma.clamp(min=1e-8) + 2 * largest + 6 * turn[:, None, None, None]
    offset = _by_channel((5.0, 3.0, 1.0), pixels.device)
    k = (offset + hue) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)
