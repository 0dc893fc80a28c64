"""Files of weights in the formats of the field's tools -> the backbone that they hold.

Only tensors and harmless values are read from a pickle (`torch.load` with ``weights_only``).
Nested dictionaries are flattened to dotted names, and a backbone is found by the landmarks of
its family, wherever it stands: that covers containers (``state_dict``, ``model``, ``teacher``,
...) and prefixes (``module.``, ``backbone.``, ...) of any depth.

The layouts were read from the loaders and savers of these tools: torchvision and timm (plain),
torchreid, fast-reid, MoCo v1 to v3, LUPerson, CION, DINO, solo-learn, lightly, BYOL, VISSL and
MMPretrain.
"""

import argparse
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from upreid_ray.config.errors import InputError
from upreid_ray.core import backbones
from upreid_ray.core.backbone import build_backbone
from upreid_ray.core.backbones import DEFAULT_SIZE, Family, Size

# The second network of methods that train one and let another follow; the first is taken. Of
# DINO's two it is the teacher that is taken, as its authors do.
COMPANIONS = {
    "encoder_k",  # MoCo
    "key_encoder",  # this package
    "momentum_encoder",  # MoCo v3, MMPretrain
    "momentum_backbone",  # solo-learn
    "backbone_momentum",  # lightly
    "target_encoder",  # BYOL
    "target_network",
    "student",  # DINO
    "state_dict_ema",  # timm
    "model_ema",
}
# Harmless values that tools keep beside the weights: torchreid a numpy scalar, DINO and MoCo v3
# the parsed command line. Calling or filling any of them runs no code of the file.
SAFE_GLOBALS = [
    argparse.Namespace,
    np._core.multiarray.scalar,  # type: ignore[attr-defined] # how pickles name it
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
    np.dtype,
    *(
        type(np.dtype(kind))
        for kind in ("bool", "int32", "int64", "uint8", "float16", "float32", "float64")
    ),
]


@dataclass(frozen=True)
class FoundBackbone:
    """A whole backbone that was found in a file.

    Attributes:
        name: Name of the architecture.
        weights: Its state dict on the CPU with the names of `build_backbone`, floating-point
            tensors in fp32.
        prefix: What stands before these names in the file.
        resized: Tensors that were interpolated to the size of the images.
        left_out: Tensors of the file that are not of the backbone.
    """

    name: str
    weights: dict[str, Tensor]
    prefix: str
    resized: tuple[str, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        """Say what was found, and what was not used."""
        text = f"found all {len(self.weights)} tensors of {self.name}"
        if self.prefix:
            text += f" below {self.prefix.rstrip('.')}"
        if self.resized:
            text += f"; {', '.join(self.resized)} interpolated"
        if self.left_out:
            shown = ", ".join(self.left_out[:3])
            text += f"; {len(self.left_out)} other tensors are left out, such as {shown}"
        return text


def read_backbone(
    file: str | Path, *, expected: str | None = None, size: Size = DEFAULT_SIZE
) -> FoundBackbone:
    """Read the weights of a backbone from a file of any of the field's tools.

    Classifiers and everything outside the backbone are left out. Of several networks in one
    file the trained one is taken by the names in `COMPANIONS`; ``FILE#PREFIX`` chooses another,
    for example ``moco.pth.tar#encoder_k``.

    Args:
        file: A safetensors or PyTorch file, told apart by content, optionally with ``#PREFIX``.
        expected: Name of the backbone that the file is thought to hold; another one is found
            too if it can be told by its tensors.
        size: Size of the images that the weights shall be for.

    Raises:
        InputError: The file cannot be read, or what it holds is not a whole backbone, or not
            finite.
    """
    path, prefix = _split_prefix(str(file))
    tensors = dict(_flatten(_read(path)))
    family, tensors, found = _recognize(file, tensors, expected)
    chosen = _choose(file, found, prefix)
    weights = {
        name.removeprefix(chosen): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
        if name.startswith(chosen)
    }
    name, whole = _identify(file, family, weights, expected=expected, size=size)
    check_finite(file, whole)
    return FoundBackbone(
        name,
        whole,
        chosen,
        tuple(n for n in whole if n in weights and whole[n].shape != weights[n].shape),
        tuple(n for n in tensors if n not in {f"{chosen}{used}" for used in whole}),
    )


def check_finite(file: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Check that the weights in a file are finite numbers.

    Raises:
        InputError: Some of them are not.
    """
    names = not_finite(weights)
    if names:
        raise InputError(
            f"{file}: holds values that are not finite in {len(names)} of its tensors, such as "
            f"{', '.join(names[:3])}"
        )


def not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold values that are not finite."""
    return [name for name, tensor in weights.items() if not tensor.isfinite().all()]


def _split_prefix(file: str) -> tuple[Path, str]:
    """Split ``FILE#PREFIX``; a file whose own name has a ``#`` is taken as it is."""
    name, _, prefix = file.rpartition("#")
    return (Path(name), prefix) if name and not Path(file).exists() else (Path(file), "")


def _read(path: Path) -> Any:  # noqa: ANN401, whatever a tool has saved
    """Return what a file holds.

    Raises:
        InputError: It is no file of weights, or one that could run code.
    """
    try:
        if _is_safetensors(path):
            return load_file(path)
        # PyTorch warns of TorchScript, which the error below says in one line.
        with torch.serialization.safe_globals(SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises anything
        reason = _explain(path, error)
        raise InputError(f"{path}: cannot be read as weights ({reason})") from error


def _is_safetensors(path: Path) -> bool:
    """Tell a safetensors file, which begins with the length of a JSON header, from others."""
    with path.open("rb") as stream:
        begin = stream.read(9)
    return path.suffix == ".safetensors" or (begin[8:] == b"{" and begin[6:8] == b"\0\0")


def _explain(path: Path, error: Exception) -> str:
    """Say what a file is that cannot be read, if that can be told."""
    if not path.is_file():
        return "it is a folder" if path.is_dir() else "there is no such file"
    with path.open("rb") as stream:
        begin = stream.read(512).lstrip().lower()
    members = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
    causes = {
        "the file is empty": not begin,
        "it is a Git LFS pointer; fetch the file itself with git lfs pull": begin.startswith(
            b"version https://git-lfs"
        ),
        "it is an HTML page; download the file itself": begin.startswith(
            (b"<!doctype", b"<html", b"<?xml")
        ),
        "it is a TorchScript module; save its state_dict() with torch.save": any(
            name.endswith("/constants.pkl") for name in members
        ),
        "it is an exported program; save its state_dict() with torch.save": any(
            name.endswith("archive_format") for name in members
        ),
        f"it holds an object of {unsafe[1] if unsafe else ''}, and such pickles can run code; "
        "save the weights alone with torch.save(model.state_dict(), FILE)": unsafe is not None,
    }
    unknown = "it is no PyTorch or safetensors file, or is damaged"
    return next((cause for cause, is_so in causes.items() if is_so), unknown)


def _flatten(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:  # noqa: ANN401
    """Yield the tensors of nested dictionaries under dotted names."""
    if not isinstance(content, Mapping):
        return
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        else:
            yield from _flatten(value, f"{prefix}{name}.")


def _recognize(
    file: str | Path, tensors: dict[str, Tensor], expected: str | None
) -> tuple[Family, dict[str, Tensor], list[str]]:
    """Return the family of the backbones in a file, the tensors under its names, and prefixes.

    Raises:
        InputError: There are no backbones in it.
    """
    likely = [] if expected is None else [backbones.find(expected)]
    for family in chain(likely, backbones.families()):
        name = expected if expected is not None and family.has(expected) else None
        if not (landmarks := family.landmarks(name)):
            continue
        translated = family.translate(tensors)
        first, *others = landmarks
        found = [
            tensor.removesuffix(first)
            for tensor in translated
            if tensor == first or tensor.endswith(f".{first}")
        ]
        found = [
            prefix
            for prefix in found
            if all(f"{prefix}{other}" in translated for other in others)
        ]
        if found:
            return family, translated, found
    if not tensors:
        raise InputError(f"{file}: holds no named tensors")
    raise InputError(
        f"{file}: holds no known backbone; its first tensors are "
        f"{', '.join(sorted(tensors)[:3])}"
    )


def _choose(file: str | Path, found: list[str], wanted: str) -> str:
    """Return the prefix of the backbone that is meant.

    Raises:
        InputError: It is not clear which.
    """
    if wanted:
        chosen = [prefix for prefix in found if f".{wanted.strip('.')}." in f".{prefix}"]
    else:
        trained = [prefix for prefix in found if not COMPANIONS & set(prefix.split("."))]
        chosen = found if len(found) == 1 else trained
    if len(chosen) != 1:
        shown = ", ".join(sorted(prefix.rstrip(".") or "(no prefix)" for prefix in found))
        plain = str(file).removesuffix(f"#{wanted}")
        raise InputError(f"{file}: holds several networks; choose with {plain}#PREFIX: {shown}")
    return chosen[0]


def _identify(
    file: str | Path,
    family: Family,
    found: dict[str, Tensor],
    *,
    expected: str | None,
    size: Size,
) -> tuple[str, dict[str, Tensor]]:
    """Return the architecture that these tensors are, all of them.

    Raises:
        InputError: They are no member of the family.
    """
    names = [expected] if expected is not None and family.has(expected) else []
    names += [name for name in family.names if name not in names and family.has(name)]
    differing: dict[str, list[str]] = {}
    for architecture in names:
        with torch.device("meta"):
            wanted = build_backbone(architecture, size=size).state_dict()
        # Files of before PyTorch 0.4.1 have no counters, and nothing reads them.
        counters = {
            name: torch.tensor(0) for name in wanted if name.endswith("num_batches_tracked")
        }
        heads = family.heads(architecture)
        without_heads = {
            name: tensor
            for name, tensor in found.items()
            if not any(f"{name}.".startswith(f"{head}.") for head in heads)
        }
        whole = counters | family.fit(architecture, without_heads, size)
        differing[architecture] = sorted(
            name
            for name in whole.keys() | wanted.keys()
            if name not in whole
            or name not in wanted
            or whole[name].shape != wanted[name].shape
        )
        if not differing[architecture]:
            return architecture, whole
    nearest = min(differing, key=lambda name: len(differing[name]))
    different = differing[nearest]
    raise InputError(
        f"{file}: is most like a {nearest}, but {len(different)} of its tensors are missing or "
        f"different, such as {', '.join(different[:3])}"
    )
