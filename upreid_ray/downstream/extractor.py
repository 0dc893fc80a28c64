"""The features of blocks of images on Ray Data, computed by actors."""

from collections.abc import Iterator

import numpy as np
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy
from ray.exceptions import ActorDiedError

from upreid_ray.config.errors import RunFailed
from upreid_ray.config.run import ScalingConfig
from upreid_ray.core.cpu import for_cpu
from upreid_ray.core.retrieval import extract_features
from upreid_ray.data.stream.decode import Columns
from upreid_ray.train.initialization import Initialization
from upreid_ray.train.worker import set_num_threads


class Extractor:
    """An actor that holds a backbone on its device."""

    def __init__(
        self,
        init: "ray.ObjectRef[Initialization]",
        scaling: ScalingConfig,
        *,
        flip: bool = False,
        precision: str = "fp32",
    ) -> None:
        self.device = torch.device("cuda" if scaling.use_gpu else "cpu")
        start: Initialization = ray.get(init)
        extractor = start.extractor().to(memory_format=torch.channels_last)
        if not scaling.use_gpu:
            set_num_threads(scaling, scaling.num_workers)
            extractor = for_cpu(extractor)
        self.extractor = extractor.to(self.device)
        self._normalization = start.description.normalization
        self._flip, self._precision = flip, precision

    def __call__(self, block: Columns) -> Columns:
        """Replace the images of a block by their features."""
        # PyTorch warns of arrays that cannot be written, as those of Ray are.
        images = np.require(block.pop("image"), requirements="W")
        features = extract_features(
            self.extractor,
            [torch.from_numpy(images)],
            self._normalization,
            flip=self._flip,
            precision=self._precision,
        )
        return {**block, "features": features.cpu().numpy()}


def extract_blocks(
    blocks: ray.data.Dataset,
    num_blocks: int,
    init: Initialization,
    scaling: ScalingConfig,
    *,
    in_order: bool = False,
    flip: bool = False,
    precision: str = "fp32",
) -> Iterator[Columns]:
    """Yield decoded blocks as they are done, with features in the place of the images.

    In order, a block waits for those before it, so that the time between two says nothing.

    Raises:
        RunFailed: The process that hands out the blocks died. Actors are replaced.
    """
    extracted = blocks.map_batches(
        Extractor,
        fn_constructor_args=(ray.put(init), scaling),
        fn_constructor_kwargs={"flip": flip, "precision": precision},
        batch_size=None,
        # An actor computes one block while the next one arrives.
        compute=ActorPoolStrategy(
            size=min(scaling.num_workers, num_blocks), max_tasks_in_flight_per_actor=2
        ),
        num_cpus=scaling.cpus_per_worker,
        num_gpus=scaling.gpus_per_worker if scaling.use_gpu else 0,
    )
    extracted.context.enable_progress_bars = False
    extracted.context.print_on_execution_start = False
    extracted.context.execution_options.preserve_order = in_order
    # A pool's creator says that its actors may not restart (ray-project/ray#57733). Split, the
    # creator is another process, whose line is hidden (`QUIET_LIBRARIES` of the command line).
    (only,) = extracted.streaming_split(1)
    try:
        yield from only.iter_batches(batch_size=None)
    except ActorDiedError as error:
        raise RunFailed(
            "the process of Ray Data that hands out the images died; run the same command again"
        ) from error
