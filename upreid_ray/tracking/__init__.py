"""Everything that talks to MLflow: runs, the log of a run, the registry of backbones."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def load_backbone(uri: str) -> "nn.Module":
    """Return a registered backbone; see `upreid_ray.tracking.registry.load_backbone`.

    MLflow and torch are imported in the call, so that importing the package stays fast.
    """
    from upreid_ray.tracking import registry  # noqa: PLC0415

    return registry.load_backbone(uri)
