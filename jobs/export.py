"""Export a backbone as a file for another tool, and check which tensors that tool will load.

INIT is models:/NAME@ALIAS, models:/NAME/VERSION, a checkpoint folder, or a file of weights.

Examples:
  python jobs/export.py models:/upreid-resnet50@champion --to fastreid --out upreid.pth
  python jobs/export.py runs/NAME/step-00000222 --to timm --out upreid.safetensors
"""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from upreid_ray.command_line import JobParser, existing_init, path_or_uri, run_job
from upreid_ray.downstream.consumers import CONSUMERS


def main() -> dict[str, Any]:
    """Run the job; return the content of its JSON line."""
    parser = JobParser(__doc__, "INIT --to CONSUMER --out FILE")
    parser.add_argument("init", type=existing_init, metavar="INIT", help="backbone to export")
    parser.add_argument(
        "--to", required=True, choices=CONSUMERS, help="tool that loads the file"
    )
    parser.add_argument(
        "--out", required=True, type=path_or_uri, metavar="FILE", help="file to write"
    )
    arguments = parser.parse(sys.argv[1:])
    # Imported late: it takes seconds, which a mistake or --help should not cost.
    from upreid_ray.downstream.export import export  # noqa: PLC0415
    from upreid_ray.train.initialization import resolve  # noqa: PLC0415

    init = resolve(arguments.init)
    report = export(init, arguments.to, Path(arguments.out))
    table = Table("tensors", "number", "first")
    for kind in ("matched", "missing", "unexpected"):
        names = getattr(report, kind)
        table.add_row(kind, str(len(names)), ", ".join(names[:3]))
    console = Console(stderr=True)
    console.print(table)
    images = init.description
    for line in (
        f"images: {images.height}x{images.width}, mean {images.mean}, std {images.std}",
        "load the file with:",
        report.usage,
    ):
        # Not wrapped, so that the line can be copied.
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    return {
        "init": init.uri,
        "result_dir": str(Path(arguments.out).parent),
        "file": arguments.out,
        "matched": len(report.matched),
        "missing": report.missing,
        "unexpected": report.unexpected,
    }


if __name__ == "__main__":
    run_job(main)
