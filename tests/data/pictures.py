"""Small pictures for tests of what reads and checks images."""

import io

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


def picture(
    mode: str = "RGB", size: tuple[int, int] = (8, 16), *, left: int = 40, right: int = 200
) -> Image.Image:
    """Return a picture whose left and right halves are flat."""
    width, height = size
    levels = np.full((height, width), left, np.uint8)
    levels[:, width // 2 :] = right
    return Image.fromarray(levels).convert(mode)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(encoded: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(encoded))
    image.load()
    return image


def noise(width: int = 32, height: int = 64) -> bytes:
    """Return a JPEG that does not compress well."""
    rng = np.random.default_rng(0)
    return encode(Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)), "JPEG")


def sixteen_bit() -> bytes:
    """Return a PNG of 16 bits a pixel in middle grey."""
    return encode(Image.fromarray(np.full((16, 8), 0x8000, np.uint16)), "PNG")


def turned() -> bytes:
    """Return a JPEG that is stored lying on its side: upright, its top is dark."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned by 90 degrees clockwise
    return encode(picture(size=(16, 8)), "JPEG", exif=exif)
