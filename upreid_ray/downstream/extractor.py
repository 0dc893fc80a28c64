"""The actor that computes features on its device."""

import numpy as np
import ray
import torch

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
    ) -> None:
        self.device = torch.device("cuda" if scaling.use_gpu else "cpu")
        start: Initialization = ray.get(init)
        extractor = start.extractor().to(memory_format=torch.channels_last)
        if not scaling.use_gpu:
            set_num_threads(scaling, scaling.num_workers)
            extractor = for_cpu(extractor)
        self.extractor = extractor.to(self.device)
        self.normalization = start.description.normalization

    def __call__(self, block: Columns) -> Columns:
        """Replace the images of a block by their features."""
        # PyTorch warns of arrays that cannot be written, as those of Ray are.
        images = np.require(block.pop("image"), requirements="W")
        features = extract_features(
            self.extractor, [torch.from_numpy(images)], self.normalization
        )
        return {**block, "features": features.cpu().numpy()}
