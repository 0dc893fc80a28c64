"""One image: whether it can be used, and what is measured of it.

Dimensions: H x W pixels.
"""

import hashlib
import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from upreid_ray.config.errors import first_line

# No others are tried: some formats start other programs. A camera's MPO opens as JPEG.
READ_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")
# What JPEG or PNG files of this kind decode to is RGB and upright as it is.
KEPT_FORMATS = {"JPEG", "PNG"}
KEPT_MODES = {"RGB", "L"}
ORIENTATION_TAG = 0x0112
JPEG_QUALITY = 95
# A person crop has a hundredth of it.
MAX_IMAGE_BYTES = 64 * 2**20
# Sharpness is measured at one size, or it would depend on the resolution.
SHARPNESS_WIDTH, SHARPNESS_HEIGHT = 64, 128


class RefusedImageError(ValueError):
    """An image that cannot be used.

    Attributes:
        kind: One word, to be counted; the message is the reason.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class ImageRules:
    """What is asked of images, and what is done to them.

    The bounds hold for training images: query and gallery stay as their protocol counts them.

    Attributes:
        max_height: Higher images are shrunk to it, in pixels.
        min_width: In pixels, after that.
        min_height: In pixels, after that.
        min_aspect: Height by width.
        max_aspect: Height by width.
        min_sharpness: See `Measures`.
        duplicates: Which images of the training splits are kept once: none of them, those
            with equal pixels, or also those whose fingerprints differ in a few bits.
        max_distance: In how many of 64 bits near duplicates differ at most.
    """

    max_height: int | None = None
    min_width: int | None = None
    min_height: int | None = None
    min_aspect: float | None = None
    max_aspect: float | None = None
    min_sharpness: float | None = None
    duplicates: Literal["keep", "exact", "near"] = "keep"
    max_distance: int = 2


@dataclass(frozen=True)
class UsableImage:
    """An image that decodes to upright RGB.

    Attributes:
        encoded: JPEG or PNG.
        picture: Its pixels, RGB.
    """

    encoded: bytes
    picture: Image.Image


@dataclass(frozen=True)
class Measures:
    """What is measured of an image.

    Attributes:
        width: In pixels.
        height: In pixels.
        sharpness: Variance of the Laplacian of the grey levels (0..255) at 64x128 pixels, in
            squared levels.
        digest: Of size and pixels; equal for equal pixels.
        fingerprint: 64 bits of which similar images share most: whether the grey level rises
            from one cell to the next in a grid of 8 rows and 9 columns.
        mean: Of each channel, 0..1.
        mean_square: Of each channel, 0..1.
    """

    width: int
    height: int
    sharpness: float
    digest: bytes
    fingerprint: int
    mean: tuple[float, ...]
    mean_square: tuple[float, ...]


def usable_image(encoded: bytes, *, max_height: int | None) -> UsableImage:
    """Return an image that decodes to upright RGB, re-encoded only if it must be.

    Of several pictures in a file, those of a camera (MPO) are views of one scene and the first
    is taken; an animation is refused.

    Raises:
        RefusedImageError: The image cannot be used.
    """
    if not encoded:
        raise RefusedImageError("empty", "the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(encoded), formats=READ_FORMATS)
            image.load()
            num_frames = getattr(image, "n_frames", 1)
    except UnidentifiedImageError as error:
        # Its own words hold an address in memory: equal sets would differ by them.
        reason = "does not decode: is no JPEG, PNG or other known image"
        raise RefusedImageError("undecodable", reason) from error
    except Exception as error:
        raise RefusedImageError(
            "undecodable", f"does not decode: {first_line(error)}"
        ) from error
    if num_frames > 1 and image.format != "MPO":
        raise RefusedImageError("animated", f"has {num_frames} frames")
    too_high = max_height is not None and image.height > max_height
    is_upright = image.getexif().get(ORIENTATION_TAG, 1) == 1
    if (
        image.format in KEPT_FORMATS
        and image.mode in KEPT_MODES
        and is_upright
        and not too_high
    ):
        return UsableImage(encoded, image.convert("RGB"))
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut instead of scale
        scaled = np.asarray(image).astype(np.uint32) >> 8
        image = Image.fromarray(scaled.astype(np.uint8))
    upright = ImageOps.exif_transpose(image).convert("RGB")
    if max_height is not None and upright.height > max_height:
        width = max(1, round(upright.width * max_height / upright.height))
        upright = upright.resize((width, max_height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    upright.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return UsableImage(buffer.getvalue(), upright)


def measure(picture: Image.Image) -> Measures:
    """Measure an RGB picture."""
    grey = picture.convert("L")
    levels = np.array(picture.histogram(), np.float64).reshape(3, 256)
    levels /= picture.width * picture.height
    values = np.arange(256) / 255
    size = f"{picture.width}x{picture.height} ".encode()
    return Measures(
        width=picture.width,
        height=picture.height,
        sharpness=_sharpness(grey),
        digest=hashlib.blake2b(size + picture.tobytes(), digest_size=16).digest(),
        fingerprint=_fingerprint(grey),
        mean=tuple(levels @ values),
        mean_square=tuple(levels @ values**2),
    )


def check(measures: Measures, rules: ImageRules) -> None:
    """Hold an image to the bounds.

    Raises:
        RefusedImageError: It is outside of them.
    """
    width, height = measures.width, measures.height
    if width < (rules.min_width or 0) or height < (rules.min_height or 0):
        raise RefusedImageError("small", f"is {width}x{height} pixels")
    aspect = height / width
    if not (rules.min_aspect or 0) <= aspect <= (rules.max_aspect or np.inf):
        reason = f"is {width}x{height} pixels, {aspect:.2f} times as high as wide"
        raise RefusedImageError("shape", reason)
    if measures.sharpness < (rules.min_sharpness or 0):
        raise RefusedImageError("blurred", f"has a sharpness of {measures.sharpness:.1f}")


def _sharpness(grey: Image.Image) -> float:
    resized = grey.resize((SHARPNESS_WIDTH, SHARPNESS_HEIGHT), Image.Resampling.BILINEAR)
    levels: NDArray[np.int16] = np.asarray(resized).astype(np.int16)
    neighbours = levels[:-2, 1:-1] + levels[2:, 1:-1] + levels[1:-1, :-2] + levels[1:-1, 2:]
    return float((neighbours - 4 * levels[1:-1, 1:-1]).astype(np.float32).var())


def _fingerprint(grey: Image.Image) -> int:
    cells = np.asarray(grey.resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    rises = np.packbits(cells[:, 1:] > cells[:, :-1])
    return int(rises.view(np.int64)[0])
