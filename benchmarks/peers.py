"""The step beside the same work done as others do it, and as one would write it first.

MoCo v2 beside that of lightly (as its example has it, and with every switch as here), UP-ReID
beside a plain implementation (PIL, one view after the other, each patch resized to a view), and
augmentation beside kornia and torchvision. Rounds alternate. The peers are installed apart:

    make bench-peers
    python -m benchmarks.peers --device cuda --case resnet50:256x128:320
"""

import argparse
import copy
import dataclasses
import os
import statistics
from collections.abc import Callable
from functools import partial
from itertools import islice, pairwise

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.moco_transform import MoCoV2Transform
from lightly.utils.scheduler import cosine_schedule
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.step import METHODS, Case, clock, new_state, provenance, spread
from upreid_ray.config.pretrain import AugmentationConfig, PretrainConfig
from upreid_ray.core.augment import draw_view_parameters, render_view
from upreid_ray.core.backbone import build_backbone
from upreid_ray.core.cpu import for_cpu
from upreid_ray.core.losses import global_consistency, info_nce, intrinsic_contrastive
from upreid_ray.core.patches import cut_patches
from upreid_ray.core.precision import autocast, multiplies_bf16
from upreid_ray.core.training import StepDraw, TrainState, train_step

# Lightly's MoCoV2Transform as settings of ours.
LIGHTLY_VIEWS = {
    "augmentation.jitter_probability": 0.8,
    "augmentation.jitter_saturation": 0.4,
    "augmentation.erase_probability": 0,
}


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """Decoded images in memory, each of which gives two views; without end."""

    def __init__(self, images: list[Image.Image], size: tuple[int, int]) -> None:
        self._images = images
        self._transform = MoCoV2Transform(input_size=size)

    def __len__(self) -> int:
        """Count enough images for any run."""
        return 1_000_000

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Augment one image twice."""
        query, key = self._transform(self._images[index % len(self._images)])
        return query, key


class LightlyMoCo(nn.Module):
    """Lightly's example of MoCo v2."""

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection_head = MoCoProjectionHead(width, width, 128)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def forward(self, images: Tensor) -> Tensor:
        """Encode queries."""
        return self.projection_head(self.backbone(images).flatten(start_dim=1))

    def forward_momentum(self, images: Tensor) -> Tensor:
        """Encode keys."""
        features = self.backbone_momentum(images).flatten(start_dim=1)
        return self.projection_head_momentum(features).detach()


class Lightly:
    """Training steps of lightly's MoCo v2."""

    def __init__(
        self, config: PretrainConfig, device: torch.device, *, tuned: bool, precision: str
    ) -> None:
        backbone = build_backbone(config.model.backbone)
        self.model = LightlyMoCo(backbone, backbone.num_features).to(device)
        if tuned:
            self.model.to(memory_format=torch.channels_last)
            if device.type == "cpu":
                for_cpu(self.model)
            else:
                for module in (self.model.backbone, self.model.backbone_momentum):
                    module.compile(dynamic=False)
        self.criterion = NTXentLoss(
            temperature=0.1, memory_bank_size=(config.model.queue_size, 128)
        ).to(device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.06, fused=True if tuned else None
        )
        self.precision = precision

    def step(self, query_views: Tensor, key_views: Tensor) -> None:
        """Take one step, as the example does."""
        momentum = cosine_schedule(1, 10, 0.996, 1)
        update_momentum(self.model.backbone, self.model.backbone_momentum, m=momentum)
        update_momentum(
            self.model.projection_head, self.model.projection_head_momentum, m=momentum
        )
        with autocast(query_views, self.precision):
            query = self.model(query_views)
            key = self.model.forward_momentum(key_views)
        loss = self.criterion(query.float(), key.float())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def lightly_as_written(
    config: PretrainConfig,
    images: Tensor,
    device: torch.device,
    num_steps: int,
    *,
    precision: str = "fp32",
) -> list[float]:
    """Return the seconds of steps whose views come from a DataLoader, one after the other.

    The example trains in fp32; another precision is what it would be with autocast.

    The loader has as many processes as the machine has cores, 8 at most as in the example. They
    work all the time, so that nothing else may be measured meanwhile.
    """
    peer = Lightly(config, device, tuned=False, precision=precision)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    num_workers = min(8, os.cpu_count() or 1)
    num_ahead = 2 * num_workers  # batches that are there when the first step begins
    loader = DataLoader(
        Pictures(pictures, (config.data.height, config.data.width)),
        batch_size=len(images),
        num_workers=num_workers,
        shuffle=True,
        drop_last=True,
    )
    ends = []
    for query, key in islice(loader, num_ahead + num_steps):
        peer.step(query.to(device), key.to(device))
        ends.append(clock(device))
    return [end - start for start, end in pairwise(ends[num_ahead - 1 :])]


def lightly_alike(
    config: PretrainConfig, images: Tensor, device: torch.device, like: TrainState
) -> Callable[[], None]:
    """Return a step of lightly's with our views, memory format, precision and compilation."""
    peer = Lightly(config, device, tuned=True, precision=config.training.precision)

    def step() -> None:
        batch = like.to_device(images)
        draw = StepDraw.at(config, 0)
        query, key = (
            like.render_views(batch, parameters).view for parameters in (draw.query, draw.key)
        )
        peer.step(query, key)

    return step


def torchvision_transform(config: AugmentationConfig, size: tuple[int, int]) -> v2.Compose:
    """Return the augmentation of one PIL image."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=config.crop_area, ratio=config.crop_ratio),
            v2.RandomHorizontalFlip(config.flip_probability),
            v2.RandomGrayscale(config.grayscale_probability),
            v2.RandomApply([v2.GaussianBlur(9, config.blur_sigma)], p=config.blur_probability),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(config.mean, config.std),
            v2.RandomErasing(config.erase_probability, config.erase_area, config.erase_ratio),
        ]
    )


def kornia_transform(config: AugmentationConfig, size: tuple[int, int]) -> nn.Module:
    """Return the augmentation of a batch on a device."""
    return K.AugmentationSequential(
        K.RandomResizedCrop(size, scale=config.crop_area, ratio=config.crop_ratio),
        K.RandomHorizontalFlip(p=config.flip_probability),
        K.RandomGrayscale(p=config.grayscale_probability),
        K.RandomGaussianBlur((9, 9), config.blur_sigma, p=config.blur_probability),
        K.Normalize(config.mean, config.std),
        K.RandomErasing(config.erase_area, config.erase_ratio, p=config.erase_probability),
    )


def plain_upreid(
    config: PretrainConfig, images: Tensor, device: torch.device
) -> Callable[[], None]:
    """Return a step of UP-ReID as one would write it first."""
    model = new_state(config, device).model
    optimizer = torch.optim.SGD(model.query_encoder.parameters(), lr=0.3, momentum=0.9)
    size = (config.data.height, config.data.width)
    transform = torchvision_transform(config.augmentation, size)
    normalize = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(config.augmentation.mean, config.augmentation.std),
        ]
    )
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    rows, columns = config.patches.rows, config.patches.columns

    def patches_of(encoder: nn.Module, views: Tensor) -> Tensor:
        patches = cut_patches(views, rows=rows, columns=columns).unbind(1)
        resized = (F.interpolate(patch, size, mode="bilinear") for patch in patches)
        return torch.stack([encoder(patch) for patch in resized], dim=1)

    def step() -> None:
        query_views, key_views, originals = (
            torch.stack([each(picture) for picture in pictures]).to(device)
            for each in (transform, transform, normalize)
        )
        with torch.no_grad():
            key = model.key_encoder(key_views)
            original = model.key_encoder(originals)
            key_patches = patches_of(model.key_encoder, key_views)
        query = model.query_encoder(query_views)
        queue, loss = model.queue.keys, config.loss
        total = info_nce(query, key, queue, temperature=loss.temperature)
        total = total + loss.consistency_weight * global_consistency(
            query,
            original,
            queue,
            temperature=loss.consistency_temperature,
            target_temperature=loss.consistency_target_temperature,
        )
        total = total + loss.intrinsic_weight * intrinsic_contrastive(
            patches_of(model.query_encoder, query_views),
            key_patches,
            rows=rows,
            columns=columns,
            temperature=loss.intrinsic_temperature,
            mining="symmetry",
        )
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        pairs = zip(
            model.key_encoder.parameters(), model.query_encoder.parameters(), strict=True
        )
        for slow, fast in pairs:
            slow.data = slow.data * 0.999 + fast.data * 0.001
        model.queue.enqueue(key)

    return step


def augmentations(
    config: PretrainConfig, images: Tensor, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Return what makes one view of each image of a batch, ours first."""
    size = (config.data.height, config.data.width)
    batch = images.to(device)
    transform = torchvision_transform(config.augmentation, size)
    batched = kornia_transform(config.augmentation, size)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    generator = torch.Generator().manual_seed(0)
    render = torch.compile(render_view, dynamic=False) if device.type == "cuda" else render_view

    def ours() -> object:
        drawn = draw_view_parameters(len(images), *size, config.augmentation, generator)
        return render(batch, drawn.to(device), config.augmentation)

    return {
        "view of each image: here": ours,
        "kornia, batched": lambda: batched(batch.float() / 255),
        "torchvision, PIL, one by one": lambda: [transform(each) for each in pictures],
    }


def measure(
    title: str, work: dict[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Return the seconds of each kind of work, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for function in work.values():
        for _ in range(3):
            function()
    for _ in track(range(repeats), title, console=Console(stderr=True)):
        for name, function in work.items():
            started = clock(device)
            function()
            seconds[name].append(clock(device) - started)
    return seconds


def comparison(title: str, seconds: dict[str, list[float]], num_images: int) -> Table:
    """Say how many times faster the first one is than each."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(medians.values()))
    table = Table("", "ms", "images/s", "the first is faster by", title=title)
    for name, values in seconds.items():
        speed = num_images / medians[name]
        table.add_row(name, spread(values), f"{speed:.0f}", f"{medians[name] / first:.2f}")
    return table


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", type=Case.parse, default=Case.parse("resnet18:128x64:64"))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each kind")
    options = parser.parse_args()
    case, device, repeats = options.case, options.device, options.repeats
    precision = "bf16" if multiplies_bf16(device) else "fp32"
    images = case.images(torch.device("cpu"))
    console = Console(width=110)
    title = (
        f"{case.backbone}, {case.height}x{case.width}, {case.batch_size} images, {precision}"
    )

    moco = case.config(precision, METHODS["MoCo v2"][0] | LIGHTLY_VIEWS)
    state = new_state(moco, device)
    work = {
        "MoCo v2 here": partial(train_step, state, images),
        "lightly, every switch alike": lightly_alike(moco, images, device, state),
    }
    seconds = measure(title, work, device, repeats)
    seconds["lightly's example as written"] = lightly_as_written(moco, images, device, repeats)
    if precision != "fp32":
        seconds[f"lightly's example, in {precision}"] = lightly_as_written(
            moco, images, device, repeats, precision=precision
        )
    console.print(comparison(title, seconds, case.batch_size))
    del work, state

    # The plain step cuts its patches from the views.
    view = {"patches.alignment": "view"}
    upreid = case.config(precision, view)
    augmenting = augmentations(upreid, images, device)
    seconds = measure(title, augmenting, device, repeats)
    console.print(comparison(title, seconds, case.batch_size))

    # The plain step keeps the activations of nine whole views of each image.
    few = dataclasses.replace(case, batch_size=case.batch_size // 4)
    upreid, images = few.config(precision, view), images[: few.batch_size]
    work = {
        "UP-ReID here": partial(train_step, new_state(upreid, device), images),
        "UP-ReID, plain": plain_upreid(upreid, images, device),
    }
    seconds = measure(str(few), work, device, repeats)
    console.print(comparison(f"{few}, {precision}", seconds, few.batch_size))
    console.print(provenance(device), f"{repeats} rounds: median (least-most)")


if __name__ == "__main__":
    main()
