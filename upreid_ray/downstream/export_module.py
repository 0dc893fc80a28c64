"""A backbone as a file that computes its features: ONNX, or an exported program of PyTorch.

Dimensions: B images of H x W pixels, F features.
"""

import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upreid_ray.config.errors import InputError, first_line
from upreid_ray.core.augment import Normalization
from upreid_ray.core.backbone import export_program
from upreid_ray.downstream.consumers import MODULE_FORMATS
from upreid_ray.train.initialization import Initialization

logger = logging.getLogger(__name__)

OPSET = 20
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
INPUT, OUTPUT = "images", "features"
# torch.export fixes a side whose feature map may be a single row: one of 32 pixels in a ResNet.
MIN_SIZES = (32, 33)
MAX_SIZE = 4096
TOLERANCE = 1e-4


class Preprocessed(nn.Module):
    """A backbone that resizes and normalizes its images itself."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, extractor: nn.Module, height: int, width: int, normalization: Normalization
    ) -> None:
        super().__init__()
        self.extractor = extractor
        self.size = (height, width)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(normalization, name)).view(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features ``[B, F]`` of images of any size, uint8 ``[B, h, w, 3]``."""
        pixels = images.permute(0, 3, 1, 2).float()
        # As Pillow does it, a smaller image takes in all pixels of a larger one.
        resized = F.interpolate(pixels, self.size, mode="bilinear", antialias=True)
        # Not rounded to whole levels: another program may round the other way.
        return self.extractor((resized / 255 - self.mean) / self.std)


def export_module(
    init: Initialization, to: str, out: Path, *, with_preprocessing: bool
) -> tuple[str, list[str]]:
    """Write a backbone as a file, and compare what the file computes with the backbone.

    Args:
        init: Backbone to write.
        to: ``onnx`` or ``torch``.
        out: File to write; it never exists in part.
        with_preprocessing: Whether the file takes uint8 images ``[B, h, w, 3]`` of any size and
            resizes and normalizes them, instead of normalized images ``[B, 3, H, W]``.

    Returns:
        One line that loads the file, and the shapes of the images that were compared.

    Raises:
        InputError: The file cannot be written, or packages are missing.
        RuntimeError: The file computes other features.
    """
    usage, suffix = MODULE_FORMATS[to]
    if out.suffix != suffix:
        raise InputError(f"--out {out}: end the name in {suffix}")
    if to == "onnx" and not all(map(find_spec, ONNX_PACKAGES)):
        packages = " ".join(ONNX_PACKAGES)
        raise InputError(f"--to onnx: needs more packages; run pip install {packages}")
    images = init.description
    module = init.extractor().eval().requires_grad_(False)
    if with_preprocessing:
        size = (images.height, images.width)
        module = Preprocessed(module, *size, images.normalization).eval()
    shapes = [
        _shape(number, images.height * factor, images.width * factor, with_preprocessing)
        for number in (1, 3)
        for factor in (1, 2)
    ]
    # ONNX files have no lower limit; other programs must take the backbone's own size.
    smallest = MAX_SIZE if to == "onnx" else min(images.height, images.width)
    program = _program_of_any_size(module, _images(shapes[3]), smallest, with_preprocessing)
    if program is None:
        logger.info("this file takes images of %dx%d only", images.height, images.width)
        shapes = shapes[::2]
        program = export_program(module, _images(shapes[1]), {0: torch.export.Dim("batch")})
    part = out.with_name(f"{out.name}.part{suffix}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        run = _write(program, to, part)
        for shape in shapes:
            _compare(module, run, _images(shape), out)
        part.replace(out)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({first_line(error)})") from error
    finally:
        with suppress(OSError):
            part.unlink()
    return usage.format(file=str(out)), ["x".join(map(str, shape)) for shape in shapes]


def _shape(number: int, height: int, width: int, with_preprocessing: bool) -> tuple[int, ...]:
    return (number, height, width, 3) if with_preprocessing else (number, 3, height, width)


def _images(shape: tuple[int, ...]) -> Tensor:
    """Return random images; uint8 if their channels come last."""
    generator = torch.Generator().manual_seed(0)
    if shape[-1] == 3:  # noqa: PLR2004, colours
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return torch.randn(shape, generator=generator)


def _program_of_any_size(
    module: nn.Module, images: Tensor, smallest: int, with_preprocessing: bool
) -> torch.export.ExportedProgram | None:
    """Return a module as a program for images of any size; None if it does not take them.

    Sides as small as ``smallest`` pixels are taken.
    """
    first = 1 if with_preprocessing else 2
    for least in MIN_SIZES:
        if least > smallest:
            break
        height, width = (
            torch.export.Dim(name, min=least, max=MAX_SIZE) for name in ("height", "width")
        )
        sizes: dict[int, Any] = {
            0: torch.export.Dim("batch"),
            first: height,
            first + 1: width,
        }
        try:
            return export_program(module, images, sizes)
        except Exception as error:  # torch.export raises whatever an operator raises
            logger.debug("images of any size from %d on: %s", least, first_line(error))
    return None


def _write(
    program: torch.export.ExportedProgram, to: str, file: Path
) -> Callable[[Tensor], Tensor]:
    """Write a program; return a function that runs the file."""
    if to == "torch":
        torch.export.save(program, file)
        loaded = torch.export.load(file).module()
        return lambda images: loaded(images).detach()
    import onnxruntime  # noqa: PLC0415, an optional package

    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")  # deprecations inside PyTorch
        found = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
    assert found is not None  # noqa: S101, torch's exporter with dynamo returns a program
    found.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


def _compare(
    module: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor, out: Path
) -> None:
    """Raise RuntimeError if the file does not compute what the module computes."""
    expected, found = module(images), run(images)
    if not torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE):
        worst = float((found - expected).abs().max())
        raise RuntimeError(f"{out}: computes features that differ by up to {worst:g}")
