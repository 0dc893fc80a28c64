"""One image: whether it can be used, and its measurements.

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

# Other formats are not tried: some of them start other programs. A camera's MPO opens as JPEG.
READ_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")
# Files of these formats and modes are kept as they are if they are upright.
KEPT_FORMATS = {"JPEG", "PNG"}
KEPT_MODES = {"RGB", "L"}
ORIENTATION_TAG = 0x0112
JPEG_QUALITY = 95
# Bits a pixel that the levels of an image of more than 8 bits may use.
DEPTHS = (8, 10, 12, 14, 16, 24, 32)
# Where the bits of a channel stand: place in a PNG file, tag of a TIFF file.
PNG_DEPTH, TIFF_DEPTH = 24, 258
# Least brightest level of a colour image of 16 bits; one that uses 14 bits or fewer is darker.
MIN_BRIGHTEST = 64
# About a hundred times the size of a person crop.
MAX_IMAGE_BYTES = 64 * 2**20
# Sharpness is measured at one size, or it would depend on the resolution.
SHARPNESS_WIDTH, SHARPNESS_HEIGHT = 64, 128


class RefusedImageError(ValueError):
    """An image that cannot be used.

    Attributes:
        kind: One word, by which refused images are counted; the message is the reason.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class ImageRules:
    """Rules for the images of a set.

    The bounds apply to training images only: query and gallery stay complete, since published
    scores count all of their images.

    Attributes:
        max_height: Height in pixels to which higher images are shrunk.
        min_width: Least width in pixels, after shrinking.
        min_height: Least height in pixels, after shrinking.
        min_aspect: Least ratio of height to width.
        max_aspect: Greatest ratio of height to width.
        min_sharpness: Least sharpness, see `Measures`.
        duplicates: Which images of the training splits are kept once: none of them, those
            with equal pixels, or also those whose fingerprints differ in a few bits.
        max_distance: Number of the 64 bits in which near duplicates may differ.
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
    """An image that decodes to upright RGB: its JPEG or PNG file, and the decoded picture."""

    encoded: bytes
    picture: Image.Image


@dataclass(frozen=True)
class Measures:
    """Measurements of an image.

    Attributes:
        width: Width in pixels.
        height: Height in pixels.
        sharpness: Variance of the Laplacian of the grey levels (0..255) at 64x128 pixels, in
            squared levels.
        digest: Digest of size and pixels.
        fingerprint: 64-bit difference hash (dHash), in which similar images differ in few
            bits: whether the grey level rises from one cell to the next in a grid of 8 rows
            and 9 columns.
        mean: Mean of each channel, 0..1.
        mean_square: Mean square of each channel, 0..1.
    """

    width: int
    height: int
    sharpness: float
    digest: bytes
    fingerprint: int
    mean: tuple[float, ...]
    mean_square: tuple[float, ...]


def usable_image(encoded: bytes, *, max_height: int | None) -> UsableImage:
    """Return an image that decodes to upright RGB, re-encoded only if necessary.

    A camera's MPO file holds several views of one scene; the first one is used. Animations are
    refused. Grey images of more than 8 bits are scaled by the range that they use.

    Args:
        encoded: Content of an image file.
        max_height: Height in pixels to which a higher image is shrunk.

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
        # Pillow's message has an address in memory, by which equal sets would differ.
        reason = "does not decode: is no JPEG, PNG or other known image"
        raise RefusedImageError("undecodable", reason) from error
    except Exception as error:
        raise RefusedImageError(
            "undecodable", f"does not decode: {first_line(error)}"
        ) from error
    if num_frames > 1 and image.format != "MPO":
        raise RefusedImageError("animated", f"has {num_frames} frames")
    is_deep = image.mode.startswith(("I", "F"))
    if not is_deep and _depth(image, encoded) > 8:  # noqa: PLR2004
        brightest = np.asarray(image.convert("RGB")).max()
        if brightest < MIN_BRIGHTEST:
            raise RefusedImageError("range", "is too dark to use its 16 bits for each colour")
    too_high = max_height is not None and image.height > max_height
    is_upright = image.getexif().get(ORIENTATION_TAG, 1) == 1
    if (
        image.format in KEPT_FORMATS
        and image.mode in KEPT_MODES
        and is_upright
        and not too_high
    ):
        return UsableImage(encoded, image.convert("RGB"))
    if is_deep:  # Pillow would cut these instead of scaling them
        image = _in_eight_bits(image)
    upright = ImageOps.exif_transpose(image).convert("RGB")
    if max_height is not None and upright.height > max_height:
        width = max(1, round(upright.width * max_height / upright.height))
        upright = upright.resize((width, max_height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    upright.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return UsableImage(buffer.getvalue(), upright)


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Return a grey image of more than 8 bits a pixel, scaled by the range that it uses.

    Whole numbers are divided by the least depth of a sensor (`DEPTHS`) that holds the largest
    one. Other numbers must reach from 0 to 1, or to between 128 and 255.

    Raises:
        RefusedImageError: The range is another one.
    """
    levels = np.asarray(image).astype(np.float64)
    least, most = float(levels.min()), float(levels.max())
    if image.mode == "F":
        limits = [255.0] if 128 <= most <= 255 else [1.0]  # noqa: PLR2004
    else:
        limits = [2.0**depth - 1 for depth in DEPTHS]
    limit = next((limit for limit in limits if most <= limit), None)
    if limit is None or not least >= 0:
        raise RefusedImageError("range", f"its levels reach from {least:g} to {most:g}")
    return Image.fromarray(np.rint(levels * (255 / limit)).astype(np.uint8))


def _depth(image: Image.Image, encoded: bytes) -> int:
    """Return the bits of a channel in the file; Pillow reads at most 8 of those of a colour."""
    if image.format == "PNG":
        return encoded[PNG_DEPTH]
    tags = getattr(image, "tag_v2", None) or {}
    return int(max(tags.get(TIFF_DEPTH, (8,))))


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
    """Check an image against the bounds.

    Raises:
        RefusedImageError: The image is outside of the bounds.
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
