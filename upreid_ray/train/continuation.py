"""A new pre-training that continues from a checkpoint of another one.

Workers import this module, so it must not import what only the driver needs, such as `job`.
"""

from pathlib import Path

from ray.train import Checkpoint

from upreid_ray.config.errors import InputError
from upreid_ray.config.pretrain import ModelConfig
from upreid_ray.core.checkpoint import POSITION_FILE, load_tensors, read_position
from upreid_ray.core.training import TrainState
from upreid_ray.storage import Location, reading
from upreid_ray.train.folder import CHECKPOINT
from upreid_ray.train.worker import newest_intact

# Settings that decide the shapes of the encoders and the queue.
SHAPES = ("backbone", "embedding_dim", "queue_size")


def find_start(model: ModelConfig) -> str:
    """Return the folder or URI of the checkpoint from which ``model.continue_from`` continues.

    It is the newest intact one if a run is named.

    Raises:
        InputError: There is no intact checkpoint, or its encoders or queue have other shapes.
    """
    named = f"--model.continue_from {model.continue_from}"
    location = Location(str(model.continue_from))
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
            before = read_position(Path(folder)).config.get("model", {})
    for name in SHAPES:
        value, needed = getattr(model, name), before.get(name)
        if value != needed:
            raise InputError(f"--model.{name} {value}: {places[newest]} has {needed}")
    return places[newest].uri


def begin_from(start: str, state: TrainState) -> None:
    """Take over the encoders, the queue and the momenta of the optimizer from a checkpoint."""
    location = Location(start)
    with Checkpoint(location.path, location.filesystem).as_directory() as folder:
        load_tensors(Path(folder), state)
