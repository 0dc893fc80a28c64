"""A new pre-training that continues from a checkpoint of another one.

Workers import this module, so it must not import what only the driver needs, such as `job`.
"""

from pathlib import Path

from ray.train import Checkpoint

from upreid_ray.config.errors import InputError, RunFailed, first_line
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.core.checkpoint import load_tensors, read_position
from upreid_ray.core.outcome import POSITION_FILE
from upreid_ray.core.training import TrainState
from upreid_ray.storage import Location, reading
from upreid_ray.train.folder import CHECKPOINT
from upreid_ray.train.worker import newest_intact

# Settings that decide the shapes of the encoders and the queue, and the optimizer.
KEPT = ("model.backbone", "model.embedding_dim", "model.queue_size", "optimizer.algorithm")


def find_start(config: PretrainConfig) -> str:
    """Return the folder or URI of the checkpoint that ``model.continue_from`` names.

    It is the newest intact one if a run is named.

    Raises:
        InputError: There is no intact checkpoint, or it has another architecture, queue or
            optimizer.
    """
    named = f"--model.continue_from {config.model.continue_from}"
    location = Location(str(config.model.continue_from))
    with reading(named):
        places = [location]
        if not (location / POSITION_FILE).is_file():
            names = location.folder_names()
            places = [location / name for name in names if name.startswith(CHECKPOINT)]
        checkpoints = [Checkpoint(place.path, place.filesystem) for place in places]
        newest = newest_intact(checkpoints)
        if newest is None:
            raise InputError(f"{named}: no intact checkpoint of a pre-training; name a run")
        with checkpoints[newest].as_directory() as folder:
            recorded = read_position(Path(folder)).config
    if "loss" not in recorded:
        raise InputError(f"{named}: is a fine-tuning; continue from it with jobs/finetune.py")
    before = dict(PretrainConfig.parse(recorded).flatten())
    for name, value in config.flatten():
        if name in KEPT and value != before[name]:
            raise InputError(f"--{name} {value}: {places[newest]} has {before[name]}")
    return places[newest].uri


def begin_from(start: str, state: TrainState) -> None:
    """Take over the encoders, the queue and the momenta of the optimizer from a checkpoint.

    Raises:
        RunFailed: Its tensors have other shapes, such as those of a ViT for another size.
    """
    location = Location(start)
    with Checkpoint(location.path, location.filesystem).as_directory() as folder:
        try:
            load_tensors(Path(folder), state)
        except (RuntimeError, ValueError) as error:
            raise RunFailed(
                f"{start}: does not fit the settings ({first_line(error)})"
            ) from error
