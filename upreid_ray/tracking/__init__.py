"""Everything that talks to MLflow: runs, the log of a run, the registry of backbones."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def load_backbone(uri: str) -> "nn.Module":
    """Return the backbone of a version, such as ``models:/upreid-resnet50@champion``.

    Returns:
        The module of torchvision or timm in eval mode, followed by its neck if it was
        fine-tuned. It maps images ``[B, 3, H, W]`` to features ``[B, F]``.

    Raises:
        InputError: The version does not exist, or its files are not those of a backbone.
    """
    # Imported late: MLflow and torch take seconds, and importing the package must not.
    from upreid_ray.core.checkpoint import read_exported  # noqa: PLC0415
    from upreid_ray.tracking import connection, registry  # noqa: PLC0415

    client = connection.connect()
    folder = registry.download(client, registry.find_version(client, uri))
    description, weights, neck = read_exported(folder)
    return description.extractor(weights, neck).eval()
