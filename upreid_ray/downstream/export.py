"""Backbone weights as files that other tools load.

All of them keep torchvision's names; what differs is the container, and what they call the
classifier that they train themselves. Formats as of torchvision 0.29, timm 1.0, fast-reid
(JDAI-CV, 2023: ``MODEL.BACKBONE.PRETRAIN_PATH``) and torchreid (KaiyangZhou, 2022:
``load_pretrained_weights``).
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from upreid_ray.config.errors import InputError, first_line
from upreid_ray.core.backbone import build_backbone, read_backbone
from upreid_ray.train.initialization import Initialization


@dataclass(frozen=True)
class Consumer:
    """A tool that loads backbones.

    Attributes:
        head: What it calls its classifier.
        container: Key under which it looks for the state dict, if any.
        reads_safetensors: Whether it reads them too, or only what ``torch.save`` writes.
        usage: How to load ``{file}`` into a ``{backbone}``.
    """

    head: tuple[str, ...]
    container: str | None
    reads_safetensors: bool
    usage: str


CONSUMERS = {
    "torchvision": Consumer(
        ("fc.weight", "fc.bias"),
        container=None,
        reads_safetensors=True,
        usage="model.load_state_dict(torch.load('{file}'), strict=False)",
    ),
    "timm": Consumer(
        ("fc.weight", "fc.bias"),
        container=None,
        reads_safetensors=True,
        usage="timm.create_model('{backbone}', num_classes=0, checkpoint_path='{file}')",
    ),
    "fastreid": Consumer(
        (),
        container=None,
        reads_safetensors=False,
        usage="MODEL.BACKBONE.PRETRAIN True MODEL.BACKBONE.PRETRAIN_PATH {file}",
    ),
    "torchreid": Consumer(
        ("classifier.weight", "classifier.bias"),
        container="state_dict",
        reads_safetensors=False,
        usage="torchreid.utils.load_pretrained_weights(model, '{file}')",
    ),
}


@dataclass(frozen=True)
class ExportReport:
    """Which tensors the consumer will find.

    Attributes:
        matched: Names in the file and in the consumer's model.
        missing: Names of the consumer's model that are not in the file.
        unexpected: Names in the file that the consumer's model does not have.
        usage: How to load the file.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    usage: str


def export(init: Initialization, to: str, out: Path) -> ExportReport:
    """Write the weights for a consumer, and read them back.

    Args:
        init: Holds the weights.
        to: A key of `CONSUMERS`.
        out: The file; it is whole or not there.

    Raises:
        InputError: The file cannot be written, or its ending is not the consumer's.
        RuntimeError: The file does not hold every tensor of the backbone.
    """
    consumer = CONSUMERS[to]
    is_safetensors = out.suffix == ".safetensors"
    if is_safetensors and not consumer.reads_safetensors:
        raise InputError(f"--out {out}: {to} reads no safetensors; end the name in .pth")
    part = out.with_name(f"{out.name}.part{out.suffix}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _write(init.weights, part, consumer, is_safetensors=is_safetensors)
        _check(init.weights, part)
        part.replace(out)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise InputError(f"--out {out}: cannot be written ({first_line(error)})") from error
    expected = {*build_backbone(init.description.backbone).state_dict(), *consumer.head}
    return ExportReport(
        matched=tuple(sorted(init.weights.keys() & expected)),
        missing=tuple(sorted(expected - init.weights.keys())),
        unexpected=tuple(sorted(init.weights.keys() - expected)),
        usage=consumer.usage.format(file=out, backbone=init.description.backbone),
    )


def _write(
    weights: dict[str, Tensor], file: Path, consumer: Consumer, *, is_safetensors: bool
) -> None:
    if is_safetensors:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
        return
    content: Any = {consumer.container: weights} if consumer.container else weights
    torch.save(content, file)


def _check(weights: dict[str, Tensor], file: Path) -> None:
    """Compare the file with what it should hold."""
    _, written = read_backbone(file)
    differing = [name for name, tensor in weights.items() if not written[name].equal(tensor)]
    if differing:
        raise RuntimeError(
            f"{file} differs from the backbone in {len(differing)} tensors: {differing[:3]}"
        )
