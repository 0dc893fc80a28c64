"""Checkpoints of training, and the exported weights that others load.

A checkpoint is a folder of five files, none of which can carry code:
``model.safetensors`` (encoders and queue), ``optimizer.pt`` (tensors only),
``best_backbone.safetensors`` (the backbone with the best score so far, its library's names),
``state.json`` (configuration, position, scores, description of the backbone) and
``sha256.json`` (hashes of the others, which tell a damaged one).
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from upreid_ray.config.errors import InputError, first_line
from upreid_ray.core.backbone import Description
from upreid_ray.core.outcome import POSITION_FILE, Outcome
from upreid_ray.core.training import State
from upreid_ray.core.weight_files import check_finite, not_finite, read_backbone

logger = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
BEST_FILE = "best_backbone.safetensors"
HASHES_FILE = "sha256.json"
WEIGHTS_FILE = "backbone.safetensors"
NECK_FILE = "neck.safetensors"
DESCRIPTION_FILE = "backbone.json"
NECK = "neck."


@dataclass
class BestBackbone:
    """The backbone to register: the one with the best mAP, or the newest without scores.

    Attributes:
        weights: State dict of the extractor, on the CPU.
        step: Number of steps after which it was kept.
        scores: Its retrieval scores, 0..1 by name.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    scores: dict[str, float] = field(default_factory=dict)

    def update(self, state: State, scores: dict[str, float]) -> None:
        """Keep the extractor of ``state``, unless the current one has at least its mAP.

        An extractor with values that are not finite is never kept; the log says so.
        """
        if self.scores and scores.get("mAP", 0.0) <= self.scores["mAP"]:
            return
        weights = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
            for name, tensor in state.extractor.state_dict().items()
        }
        names = not_finite(weights)
        if names:
            logger.warning(
                "step %d: the backbone is not taken as the best one, because %d of its tensors "
                "hold values that are not finite, such as %s",
                state.step,
                len(names),
                names[0],
            )
            return
        self.weights, self.step, self.scores = weights, state.step, scores


class Position(Outcome):
    """Everything in a checkpoint that is not a tensor (``state.json``).

    Attributes:
        step: Number of steps taken.
        num_skipped: How many of the latest steps in a row were skipped.
        best_step: Number of steps after which the best backbone was kept.
        undecodable: Images of this epoch that do not decode so far, by shard.
        description: Description of the best backbone.
        config: Settings of the run.
    """

    step: int
    num_skipped: int = 0  # Older checkpoints do not have it.
    best_step: int
    undecodable: dict[str, int] = Field(default_factory=dict)  # Older ones have none.
    description: Description
    config: dict[str, Any]


def save_checkpoint(
    folder: Path,
    state: State,
    best: BestBackbone,
    *,
    scores_untrained: dict[str, float],
    images_per_second: float,
    num_queries_without_match: int = 0,
    undecodable: Mapping[str, int] | None = None,
) -> None:
    """Write the state into an existing, empty ``folder``."""
    model = {name: tensor.contiguous() for name, tensor in state.model.state_dict().items()}
    save_file(model, folder / MODEL_FILE)
    torch.save(state.optimizer.state_dict(), folder / OPTIMIZER_FILE)
    save_file(best.weights, folder / BEST_FILE)
    position = Position(
        step=state.step,
        num_skipped=int(state.num_skipped),
        best_step=best.step,
        best_scores=best.scores,
        scores_untrained=scores_untrained,
        num_queries_without_match=num_queries_without_match,
        undecodable=dict(undecodable or {}),
        images_per_second=images_per_second,
        description=state.description,
        config=state.config.model_dump(mode="json"),
    )
    (folder / POSITION_FILE).write_text(position.model_dump_json(indent=1))
    hashes = {file.name: _hash(file) for file in sorted(folder.iterdir())}
    (folder / HASHES_FILE).write_text(json.dumps(hashes, indent=1))


def load_tensors(folder: Path, state: State) -> None:
    """Take over the model and the optimizer of a checkpoint, but not the position.

    The learning rate and other settings of the optimizer stay those of ``state``.
    """
    state.model.load_state_dict(load_file(folder / MODEL_FILE))
    saved = torch.load(folder / OPTIMIZER_FILE, map_location=state.device, weights_only=True)
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def load_checkpoint(folder: Path, state: State) -> tuple[BestBackbone, Position]:
    """Restore the state that the checkpoint was written from, in place."""
    position = read_position(folder)
    load_tensors(folder, state)
    state.step = position.step
    state.num_skipped = torch.full_like(state.num_skipped, position.num_skipped)
    weights = load_file(folder / BEST_FILE)
    return BestBackbone(weights, position.best_step, position.best_scores), position


def read_position(folder: Path) -> Position:
    """Read everything in the checkpoint in ``folder`` that is not a tensor."""
    return Position.model_validate_json((folder / POSITION_FILE).read_text())


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with the files of a checkpoint, or None if they are intact."""
    try:
        hashes = dict(json.loads((folder / HASHES_FILE).read_text()))
    except (OSError, TypeError, ValueError):
        return f"{HASHES_FILE} cannot be read"
    for name in (MODEL_FILE, OPTIMIZER_FILE, BEST_FILE, POSITION_FILE):
        try:
            if _hash(folder / name) != hashes.get(name):
                return f"{name} is not what was written"
        except OSError:
            return f"{name} cannot be read"
    return None


def export_backbone(folder: Path, out: Path) -> None:
    """Export the best backbone of the checkpoint in ``folder``.

    The files are ``backbone.safetensors`` (its library's names without the classifier),
    ``backbone.json`` and, if the backbone was fine-tuned, ``neck.safetensors``.

    Raises:
        InputError: The checkpoint has no best backbone, or one that is not finite.
    """
    if not load_file(folder / BEST_FILE):
        raise InputError(f"{folder}: none of the backbones up to this checkpoint was finite")
    description = read_position(folder).description
    (out / DESCRIPTION_FILE).write_text(description.model_dump_json(indent=1))
    best = read_backbone(
        folder / BEST_FILE, expected=description.backbone, size=description.size
    )
    save_file(best.weights, out / WEIGHTS_FILE)
    if description.has_neck:
        neck = _read_neck(folder / BEST_FILE)
        save_file({f"{NECK}{name}": tensor for name, tensor in neck.items()}, out / NECK_FILE)


def read_exported(folder: Path) -> tuple[Description, dict[str, Tensor], dict[str, Tensor]]:
    """Read an exported backbone, or the best backbone of a checkpoint.

    Returns:
        The description, the state dict of the backbone, and that of its neck, which is empty if
        there is none.

    Raises:
        InputError: The folder holds neither, or not a whole backbone, or one that is not
            finite.
    """
    try:
        if (folder / DESCRIPTION_FILE).is_file():
            file, neck_file = folder / WEIGHTS_FILE, folder / NECK_FILE
            text = (folder / DESCRIPTION_FILE).read_text()
            description = Description.model_validate_json(text)
        elif (folder / POSITION_FILE).is_file():
            file = neck_file = folder / BEST_FILE
            description = read_position(folder).description
            wrong = find_damage(folder)
            if wrong is not None:
                raise InputError(
                    f"{folder}: a damaged checkpoint ({wrong}); take another one of the run"
                )
        else:
            inside = sorted(path.parent for path in folder.glob(f"*/{POSITION_FILE}"))
            hint = f"; give a checkpoint in it, such as {inside[-1]}" if inside else ""
            raise InputError(
                f"{folder}: neither {DESCRIPTION_FILE} nor {POSITION_FILE} in it{hint}"
            )
        neck = _read_neck(neck_file) if description.has_neck else {}
    except InputError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"{folder}: its description cannot be read ({first_line(error)})"
        ) from error
    found = read_backbone(file, expected=description.backbone, size=description.size)
    if found.name != description.backbone:
        raise InputError(
            f"{folder}: describes a {description.backbone}, but holds a {found.name}"
        )
    return description, found.weights, neck


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_neck(file: Path) -> dict[str, Tensor]:
    """Return the state dict of the neck in a file of a checkpoint or of an export."""
    neck = {
        name.removeprefix(NECK): tensor
        for name, tensor in load_file(file).items()
        if name.startswith(NECK)
    }
    check_finite(file, neck)
    return neck
