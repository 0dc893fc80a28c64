"""Encoded images -> uint8 arrays.

Dimensions: n images, H x W pixels.
"""

import io
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

STORED_FORMATS = ("JPEG", "PNG")
# What Pillow's decoders raise. A flipped bit in a size makes an image a decompression bomb.
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
Columns = dict[str, NDArray[Any]]


def decode_images(encoded: pa.Array | pa.ChunkedArray, height: int, width: int) -> Columns:
    """Decode and resize images.

    Returns:
        ``image``, uint8 ``[n, 3, H, W]``, and ``decoded``, bool ``[n]``. An image that does not
        decode is a copy of the nearest decoded image before it, or of the first one; all are
        black if none decodes.
    """
    images = np.zeros((len(encoded), 3, height, width), np.uint8)
    decoded = np.zeros(len(encoded), bool)
    for row, content in enumerate(encoded):
        try:
            image = Image.open(io.BytesIO(content.as_buffer()), formats=STORED_FORMATS)
            image.draft("RGB", (width, height))  # JPEG decodes at half the size for less
            pixels = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        except DECODING_ERRORS:
            continue
        else:
            images[row] = np.asarray(pixels).transpose(2, 0, 1)
            decoded[row] = True
    images[~decoded] = images[replacements(decoded)[~decoded]]
    return {"image": images, "decoded": decoded}


def replacements(decoded: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return for each image the decoded one that takes its place, itself if it is decoded.

    That is the nearest one before, or the first one where there is none before.
    """
    source = np.maximum.accumulate(np.where(decoded, np.arange(len(decoded)), -1))
    return np.where(source < 0, decoded.argmax(), source)
