"""Export a backbone as a file for another tool, and check the file.

INIT is models:/NAME@ALIAS, models:/NAME/VERSION, a checkpoint folder, or a file of weights.

Files for torchvision, timm, fastreid and torchreid hold weights: the job lists which tensors
the tool will load. Files for onnx (opset 20) and torch (an exported program) compute features:
the job runs them, and compares the features with those of the backbone.

Examples:
  python jobs/export.py models:/upreid-resnet50@champion --to fastreid --out upreid.pth
  python jobs/export.py runs/NAME/step-00000222 --to timm --out upreid.safetensors
  python jobs/export.py models:/upreid-resnet50@champion --to onnx --out upreid.onnx
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from upreid_ray.command_line import JobParser, existing_init, path_or_uri, run_job
from upreid_ray.config.errors import InputError
from upreid_ray.downstream.consumers import CONSUMERS, MODULE_FORMATS

if TYPE_CHECKING:
    from upreid_ray.train.initialization import Initialization

FASTREID_POOLING = (
    "fast-reid pools without padding (3x3, stride 2, ceil mode) after the first convolution: "
    "its features differ, unless model.backbone.maxpool = torch.nn.MaxPool2d(3, 2, 1)"
)


def main() -> dict[str, Any]:
    """Run the job; return the content of its JSON line."""
    parser = JobParser(__doc__, "INIT --to CONSUMER --out FILE")
    parser.add_argument("init", type=existing_init, metavar="INIT", help="backbone to export")
    parser.add_argument(
        "--to",
        required=True,
        choices=(*CONSUMERS, *MODULE_FORMATS),
        help="tool that loads the file",
    )
    parser.add_argument(
        "--with_preprocessing",
        choices=("true", "false"),
        default="false",
        help="whether a file for onnx or torch takes uint8 images [B, h, w, 3] of any size "
        "and resizes and normalizes them (default: %(default)s)",
    )
    parser.add_argument(
        "--out", required=True, type=path_or_uri, metavar="FILE", help="file to write"
    )
    arguments = parser.parse(sys.argv[1:])
    if arguments.with_preprocessing == "true" and arguments.to not in MODULE_FORMATS:
        raise InputError(
            f"--with_preprocessing: not for --to {arguments.to}, which gets weights"
        )
    check_out(arguments.out, arguments.init)
    # Imported late: it takes seconds, which a mistake or --help should not cost.
    from upreid_ray.train.initialization import resolve

    init = resolve(arguments.init)
    export = _export_module if arguments.to in MODULE_FORMATS else _export_weights
    lines, result = export(init, arguments)
    for line in lines:
        # Not wrapped, so that the line can be copied.
        Console(stderr=True).print(line, soft_wrap=True, markup=False, highlight=False)
    folder = str(Path(arguments.out).parent)
    return {"init": init.uri, "result_dir": folder, "file": arguments.out, **result}


def check_out(out: str, init: str) -> None:
    """Check that a file can be written without harm.

    Raises:
        InputError: It is behind a URI, is that of the weights, or cannot be written.
    """
    if "://" in out:
        raise InputError(f"--out {out}: is a URI; give a local file")
    file, weights = Path(out), Path(init.partition("#")[0])
    if file.exists() and weights.exists() and file.samefile(weights):
        raise InputError(f"--out {out}: is the file of INIT, which it would replace")
    folder = next(each for each in file.absolute().parents if each.exists())
    if not os.access(folder, os.W_OK):
        raise InputError(f"--out {out}: {folder} cannot be written")


def _export_weights(
    init: "Initialization", arguments: argparse.Namespace
) -> tuple[list[str], dict[str, Any]]:
    """Write weights; return what to print, and what belongs into the JSON line."""
    from upreid_ray.downstream.export import export

    report = export(init, arguments.to, Path(arguments.out))
    table = Table("tensors", "number", "first")
    for kind in ("matched", "missing", "unexpected"):
        names = getattr(report, kind)
        table.add_row(kind, str(len(names)), ", ".join(names[:3]))
    Console(stderr=True).print(table)
    images = init.description
    lines = [
        f"images: {images.height}x{images.width}, mean {images.mean}, std {images.std}",
        *([FASTREID_POOLING] if arguments.to == "fastreid" else []),
        "load the file with:",
        report.usage,
    ]
    return lines, {
        "matched": len(report.matched),
        "missing": report.missing,
        "unexpected": report.unexpected,
    }


def _export_module(
    init: "Initialization", arguments: argparse.Namespace
) -> tuple[list[str], dict[str, Any]]:
    """Write a file that computes features; return what `_export_weights` does."""
    from upreid_ray.downstream.export_module import OPSET, export_module

    images = init.description
    is_raw = arguments.with_preprocessing == "true"
    usage, compared = export_module(
        init, arguments.to, Path(arguments.out), with_preprocessing=is_raw
    )
    takes = (
        "uint8 images [B, h, w, 3], RGB, of any size"
        if is_raw
        else f"float32 images [B, 3, h, w], trained on {images.height}x{images.width}, as "
        f"(RGB / 255 - {images.mean}) / {images.std}"
    )
    lines = [
        f"takes {takes}; returns features that are not normalized",
        *([f"opset {OPSET}"] if arguments.to == "onnx" else []),
        f"same features as the backbone for images of {', '.join(compared)}",
        "run the file with:",
        usage,
    ]
    return lines, {"compared": compared}


if __name__ == "__main__":
    run_job(main)
