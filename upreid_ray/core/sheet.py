"""The views and patches of a batch as one picture, for people to look at."""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.core.augment import Normalization
from upreid_ray.core.model import Views
from upreid_ray.core.training import StepDraw, render_views

WHITE = 1.0


def view_sheet(
    images: Tensor, draw: StepDraw, config: PretrainConfig, *, num_images: int = 8
) -> Image.Image:
    """Show what the encoders see of the first images of a batch, a row for each image.

    A row shows the image, the query view and its patches, then the key view and its patches.
    Patches are left out if no term of the loss needs them.

    Args:
        images: uint8 ``[b, 3, H, W]``, the first images of the batch of that step.
        draw: Random draw of the step.
        config: Settings of the run.
        num_images: Largest number of rows.
    """
    images = images[:num_images].cpu()
    seen = [
        render_views(images, parameters.rows(slice(len(images))), config)
        for parameters in (draw.query, draw.key)
    ]
    rows = []
    for i, image in enumerate(images):
        panels = [image.float() / 255]
        for views in seen:
            panels += _panels(views, i, config)
        height = max(panel.shape[1] for panel in panels)
        padded = [F.pad(p, (2, 2, 2, 2 + height - p.shape[1]), value=WHITE) for p in panels]
        rows.append(torch.cat(padded, dim=2))
    pixels = (torch.cat(rows, dim=1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _panels(views: Views, i: int, config: PretrainConfig) -> list[Tensor]:
    """Return the pictures ``[3, h, w]`` of image ``i``: its view, and its patches if any."""
    normalization = Normalization(config.augmentation.mean, config.augmentation.std)
    panels = [normalization.undo(views.view[i])]
    if views.patches is not None:
        patches = normalization.undo(views.patches[i])
        panels.append(make_grid(patches, nrow=config.patches.columns, pad_value=WHITE))
    return panels
