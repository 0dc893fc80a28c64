"""Images -> features: the code of a registered version, which MLflow runs without this package.

MLflow executes the copy of this file in the folder of the version (models from code). The job
`evaluate` decodes, resizes and normalizes images in the same way.

Dimensions: N images, H x W pixels, F features.
"""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow.models
import mlflow.pyfunc
import mlflow.pytorch
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

FOLDER = Path(__file__).parent
COLUMN = "image"
# Other formats are not tried: some of them start other programs.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")
NUM_IMAGES_A_BATCH = 64
NUM_CHANNELS = 3


class ImagesToFeatures(mlflow.pyfunc.PythonModel):
    """A backbone that decodes, resizes and normalizes its images itself."""

    def load_context(self, context: Any) -> None:  # noqa: ANN401, ARG002, given by MLflow
        """Load the backbone to the GPU if there is one."""
        description = json.loads((FOLDER / "backbone.json").read_text())
        self._size = (description["width"], description["height"])
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._mean, self._std = (
            torch.tensor(description[name], device=self._device).view(1, NUM_CHANNELS, 1, 1)
            for name in ("mean", "std")
        )
        # MLflow refuses a program that contains a pickle.
        self._backbone = mlflow.pytorch.load_model(str(FOLDER)).to(self._device)

    @torch.no_grad()
    def predict(
        self,
        context: Any,  # noqa: ANN401, ARG002, given by MLflow
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,  # noqa: ARG002, given by MLflow
    ) -> NDArray[np.float32]:
        """Return the features ``[N, F]`` of images, float32, unit length.

        Args:
            context: MLflow's context.
            model_input: Encoded images as bytes or base64 text, or uint8 arrays ``[H, W, 3]``
                of any sizes. They are in the column ``image`` of a DataFrame or dictionary, in
                a list, or one array ``[N, H, W, 3]``.
            params: None; there are no parameters.

        Raises:
            ValueError: The input holds no images, or one that cannot be read.
        """
        features = [
            torch.nn.functional.normalize(self._backbone(self._normalized(batch)), dim=1)
            for batch in self._batches(_items(model_input))
        ]
        return torch.cat(features).cpu().numpy()

    def _batches(self, items: list[Any]) -> Iterator[NDArray[np.uint8]]:
        """Yield decoded and resized images ``[n, 3, H, W]``, a few at a time."""
        for start in range(0, len(items), NUM_IMAGES_A_BATCH):
            part = enumerate(items[start : start + NUM_IMAGES_A_BATCH], start)
            images = [self._resized(item, number) for number, item in part]
            yield np.stack(images).transpose(0, 3, 1, 2)

    def _resized(self, item: Any, number: int) -> NDArray[np.uint8]:  # noqa: ANN401
        try:
            image = _picture(item, self._size).convert("RGB")
        except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as e:
            raise ValueError(f"image {number} cannot be read: {e}") from e
        return np.asarray(image.resize(self._size, Image.Resampling.BILINEAR))

    def _normalized(self, batch: NDArray[np.uint8]) -> torch.Tensor:
        images = torch.from_numpy(batch).to(self._device).float() / 255
        return (images - self._mean) / self._std


def _items(model_input: Any) -> list[Any]:  # noqa: ANN401
    """Return the images of an input of `ImagesToFeatures.predict`, one at least."""
    if isinstance(model_input, pd.DataFrame | dict):
        if COLUMN not in model_input:
            raise ValueError(f"the images must be in a column named {COLUMN!r}")
        model_input = model_input[COLUMN]
    if isinstance(model_input, bytes | str):
        model_input = [model_input]
    items = [each[COLUMN] if isinstance(each, dict) else each for each in model_input]
    if not items:
        raise ValueError("there are no images")
    return items


def _picture(item: Any, size: tuple[int, int]) -> Image.Image:  # noqa: ANN401
    """Return an image that is bytes, base64 text, or an array ``[H, W, 3]``, upright."""
    if isinstance(item, str):
        item = base64.b64decode(item, validate=True)
    if isinstance(item, bytes | bytearray | memoryview):
        picture = Image.open(io.BytesIO(item), formats=FORMATS)
        picture.draft("RGB", size)  # JPEG decodes at half the size for less
        return ImageOps.exif_transpose(picture)
    pixels = np.asarray(item)
    if pixels.ndim != NUM_CHANNELS or pixels.shape[2] != NUM_CHANNELS:
        raise ValueError(f"its shape is {pixels.shape}, not [H, W, 3]")
    if pixels.dtype != np.uint8:
        if pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() > 255:  # noqa: PLR2004
            raise ValueError("its values are not integers from 0 to 255")
        pixels = pixels.astype(np.uint8)
    return Image.fromarray(pixels)


mlflow.models.set_model(ImagesToFeatures())
