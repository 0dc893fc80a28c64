"""What several files of tests of the method share."""

import pytest
from torch import Tensor

from upreid_ray.core.backbone import build_backbone


@pytest.fixture(scope="session")
def backbone() -> dict[str, Tensor]:
    """Return the weights of a ResNet-18 that was not trained."""
    return build_backbone("resnet18").state_dict()
