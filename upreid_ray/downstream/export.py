"""Backbone weights as files that other tools load.

All of them use the same names of the tensors. They differ in the container of the state dict,
and in the names of the classifier that they train themselves.
"""

import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from upreid_ray.config.errors import InputError, first_line
from upreid_ray.core import backbones
from upreid_ray.core.backbone import Description, build_backbone
from upreid_ray.core.backbones import Constructor
from upreid_ray.core.weight_files import read_backbone
from upreid_ray.downstream.consumers import CONSUMERS, Consumer
from upreid_ray.train.initialization import Initialization


@dataclass(frozen=True)
class ExportReport:
    """Which tensors the consumer will find.

    Attributes:
        matched: Tensors both in the file and in the consumer's model.
        missing: Tensors of the consumer's model that are not in the file.
        unexpected: Tensors in the file that the consumer's model does not have.
        usage: One line that loads the file.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    usage: str


def export(init: Initialization, to: str, out: Path) -> ExportReport:
    """Write the weights for a consumer, a key of `CONSUMERS`, and read them back.

    The file never exists in part.

    Raises:
        InputError: The file cannot be written, or the consumer reads no safetensors, or has no
            such backbone.
        RuntimeError: The file lacks tensors of the backbone.
    """
    consumer, description = CONSUMERS[to], init.description
    constructors = backbones.find(description.backbone).constructors(
        description.backbone, description.size
    )
    if to not in constructors:
        raise InputError(
            f"--to {to}: cannot load a {description.backbone}; take one of "
            f"{', '.join(constructors)}"
        )
    constructor = constructors[to]
    is_safetensors = out.suffix == ".safetensors"
    if is_safetensors and consumer.safetensors_usage is None:
        raise InputError(f"--out {out}: {to} reads no safetensors; end the name in .pth")
    part = out.with_name(f"{out.name}.part{out.suffix}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _write(init.weights, part, consumer, is_safetensors=is_safetensors)
        _check(init, part)
        part.replace(out)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise InputError(f"--out {out}: cannot be written ({first_line(error)})") from error
    expected = {*init.weights, *constructor.head}
    return ExportReport(
        matched=tuple(sorted(init.weights.keys() & expected)),
        missing=tuple(sorted(expected - init.weights.keys())),
        unexpected=tuple(sorted(init.weights.keys() - expected)),
        usage=usage(description, consumer, constructor, out),
    )


def usage(
    description: Description, consumer: Consumer, constructor: Constructor, file: Path
) -> str:
    """Return one line with which a consumer loads the file of a backbone."""
    is_safetensors = file.suffix == ".safetensors"
    line = consumer.safetensors_usage if is_safetensors else consumer.usage
    assert line is not None  # noqa: S101, `export` refuses such a file
    return line.format(
        **description.model_dump(include={"height", "width", "last_stride"}),
        constructor=constructor.text,
        file=str(file),
        quoted_file=shlex.quote(str(file)),
        num_features=build_backbone(description.backbone).num_features,
        mean_255=[round(255 * value, 3) for value in description.mean],
        std_255=[round(255 * value, 3) for value in description.std],
    )


def _write(
    weights: dict[str, Tensor], file: Path, consumer: Consumer, *, is_safetensors: bool
) -> None:
    if is_safetensors:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
        return
    content: Any = {consumer.container: weights} if consumer.container else weights
    torch.save(content, file)


def _check(init: Initialization, file: Path) -> None:
    """Raise RuntimeError if the tensors of the file differ from those of the backbone."""
    images = init.description
    written = read_backbone(file, expected=images.backbone, size=images.size).weights
    differing = [n for n, tensor in init.weights.items() if not written[n].equal(tensor)]
    if differing:
        raise RuntimeError(
            f"{file} differs from the backbone in {len(differing)} tensors: {differing[:3]}"
        )
