"""Fine-tuning: the step with labelled images, and the strong baseline of Luo et al. 2019.

The baseline (https://arxiv.org/abs/1903.07071) has a last stride of 1, a BNNeck, and the sum of
an identity loss and a batch-hard triplet loss. A batch consists of groups of persons, as in
`core.training`: batch normalization and triplets stay within a group, so that the result does
not depend on the number of workers.

Dimensions: B images of the whole batch, b images of this worker, F features, C persons.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upreid_ray.config.downstream import DownstreamConfig, FinetuneConfig
from upreid_ray.config.pretrain import AugmentationConfig
from upreid_ray.core import backbones
from upreid_ray.core.augment import (
    ViewParameters,
    draw_view_parameters,
    render_view,
    step_generator,
)
from upreid_ray.core.backbone import Description, NeckedBackbone
from upreid_ray.core.encoder import StatisticsCopy, running_statistics
from upreid_ray.core.losses import batch_hard_triplet
from upreid_ray.core.precision import autocast
from upreid_ray.core.schedule import stepped_learning_rate
from upreid_ray.core.training import Group, State

CLASSIFIER_DEVIATION = 0.001


class PersonClassifier(nn.Module):
    """A backbone with a BNNeck, and a classifier of persons."""

    def __init__(self, backbone: nn.Module, num_persons: int, *, precision: str) -> None:
        super().__init__()
        self.precision = precision
        self.extractor = NeckedBackbone(backbone)
        size = self.extractor.neck.num_features
        self.classifier = nn.Linear(size, num_persons, bias=False)
        nn.init.normal_(self.classifier.weight, std=CLASSIFIER_DEVIATION)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features before the neck ``[B, F]`` and logits ``[B, C]``, in fp32."""
        with autocast(images, self.precision):
            features = self.extractor.backbone(images)
        features = features.float()
        return features, self.classifier(self.extractor.neck(features))


class DownstreamState(State):
    """State of a run that learns to tell persons apart: a `NeckedBackbone`, trained by Adam."""

    config: DownstreamConfig

    def __init__(
        self,
        config: DownstreamConfig,
        make_model: Callable[[], nn.Module],
        images: Description,
        *,
        steps_per_epoch: int,
        device: torch.device,
    ) -> None:
        """Make the model and its optimizer.

        ``make_model`` returns the model, from random numbers of the run's seed. The model's
        ``extractor`` is a `NeckedBackbone` with the last stride of the settings.
        """
        self._images = images
        self.augmentation = AugmentationConfig(
            mean=images.mean,
            std=images.std,
            flip_probability=config.augmentation.flip_probability,
            grayscale_probability=0,
            blur_probability=0,
            erase_probability=config.augmentation.erase_probability,
            erase_area=config.augmentation.erase_area,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = make_model()
        model = model.to(device).to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=config.optimizer.lr,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        super().__init__(
            config, model, optimizer, steps_per_epoch=steps_per_epoch, device=device
        )

    @property
    def description(self) -> Description:
        """Description of backbone and neck, for those who load them."""
        update: dict[str, Any] = {"has_neck": True}
        if backbones.find(self._images.backbone).has_last_stride:
            update["last_stride"] = self.config.training.last_stride
        return self._images.model_copy(update=update)

    @property
    def extractor(self) -> nn.Module:
        """The backbone with its neck."""
        return self.model.extractor


class FinetuneState(DownstreamState):
    """State of a supervised run: backbone, neck and classifier, trained by Adam."""

    config: FinetuneConfig

    def __init__(
        self,
        config: FinetuneConfig,
        backbone: nn.Module,
        images: Description,
        *,
        num_persons: int,
        steps_per_epoch: int,
        device: torch.device,
    ) -> None:
        """Add a neck and a classifier of C persons to a backbone, which is changed in place."""
        super().__init__(
            config,
            lambda: PersonClassifier(
                backbone, num_persons, precision=config.training.precision
            ),
            images,
            steps_per_epoch=steps_per_epoch,
            device=device,
        )


@dataclass(frozen=True)
class PersonBatch:
    """This worker's part of a batch, one group after the other.

    Attributes:
        images: ``[b, 3, H, W]``, uint8.
        labels: ``[b]``, int64, the person on each image, counted from 0.
    """

    images: Tensor
    labels: Tensor


def finetune_step(state: FinetuneState, batch: PersonBatch) -> dict[str, Tensor]:
    """Take one step of the strong baseline; arguments and result are those of `person_step`."""
    training = state.config.training

    def objective(outputs: tuple[Tensor, Tensor], labels: Tensor) -> dict[str, Tensor]:
        features, logits = outputs
        identity = F.cross_entropy(logits, labels, label_smoothing=training.label_smoothing)
        triplet = batch_hard_triplet(features, labels, margin=training.margin)
        return {"loss": identity + triplet, "identity": identity, "triplet": triplet}

    return person_step(state, batch, objective)


def person_step(
    state: DownstreamState,
    batch: PersonBatch,
    objective: Callable[[Any, Tensor], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Take one step with a batch of persons; one that is not finite changes no tensor.

    Args:
        state: State of training, changed in place.
        batch: The images of this worker's groups.
        objective: Computes ``loss`` and its terms from what the model returns for a group, and
            the labels of the group.

    Returns:
        What `State.accumulate_gradients` and `State.update` return, on the device.
    """
    config = state.config
    images, labels = state.to_device(batch.images), state.to_device(batch.labels)
    statistics = StatisticsCopy(state.model)
    parameters = draw_shifted_views(config, images.shape[2:], state.augmentation, state.step)

    def compute_terms(group: Group) -> dict[str, Tensor]:
        drawn = parameters.rows(group.batch_rows).to(state.device)
        views = render_view(images[group.rows], drawn, state.augmentation, pads_with_black=True)
        views = views.contiguous(memory_format=torch.channels_last)
        with running_statistics(state.model, momentum=group.statistics_momentum):
            outputs = state.parallel_model(views)
        return objective(outputs, labels[group.rows])

    terms = state.accumulate_gradients(compute_terms)
    epochs = config.optimizer.milestones
    lr = stepped_learning_rate(
        state.step,
        peak=config.optimizer.lr,
        warmup_steps=round(config.optimizer.warmup_epochs * state.steps_per_epoch),
        milestones=[round(epoch * state.steps_per_epoch) for epoch in epochs],
    )
    terms |= state.update(lr=lr, clip_norm=config.optimizer.clip_norm)
    statistics.restore(where=state.is_skipped)
    state.step += 1
    return terms


def draw_shifted_views(
    config: DownstreamConfig, size: torch.Size, augmentation: AugmentationConfig, step: int
) -> ViewParameters:
    """Draw the views of a whole batch: shifted, flipped, and erased in part.

    ``config.augmentation.padding`` is the largest shift, in pixels. The draw is a function of
    the seed and of the step, which counts from 0.
    """
    generator = step_generator(seed=config.seed, step=step)
    batch_size, padding = config.training.batch_size, config.augmentation.padding
    height, width = size
    parameters = draw_view_parameters(batch_size, height, width, augmentation, generator)
    shift = torch.randint(-padding, padding + 1, (batch_size, 2), generator=generator)
    whole = torch.tensor([height, width]).expand(batch_size, 2)
    return dataclasses.replace(parameters, crop=torch.cat([shift, whole], dim=1).float())
