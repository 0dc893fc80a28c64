"""The training step, and the loop over any iterable of batches.

A batch is made of groups: images that batch normalization sees together. Groups are the unit
of work, whoever computes them: a worker takes its groups one after the other and accumulates
gradients. So the result does not depend on the number of workers, apart from the order of
floating-point sums, and one worker needs the memory of one group. Everything random is a
function of (seed, step).

Dimensions: B images of the whole batch, b images of this worker, G images of a group,
E embeddings of an image by the key encoder, D embedding size.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from upreid_ray.config.downstream import DownstreamConfig
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.core import distributed
from upreid_ray.core.augment import (
    Normalization,
    ViewParameters,
    draw_view_parameters,
    render_view,
    step_generator,
)
from upreid_ray.core.backbone import Description
from upreid_ray.core.cpu import ChannelsLastSGD, for_cpu
from upreid_ray.core.encoder import group_momentum
from upreid_ray.core.model import UPReID, Views
from upreid_ray.core.patches import cut_patches
from upreid_ray.core.precision import autocast
from upreid_ray.core.schedule import key_momentum, learning_rate

BatchT = TypeVar("BatchT")
StateT = TypeVar("StateT", bound="State")


class State(ABC):
    """All that changes while training.

    Attributes:
        device: Where the model is.
        steps_per_epoch: Steps of one pass over the data.
        num_steps: Steps of the whole run.
        model: What is trained, and what follows it.
        parallel_model: The model, whose backward averages gradients over the workers.
        optimizer: Of the trained parameters.
        step: Steps taken.
        num_skipped: ``[]``, on the device; steps in a row, up to now, that were skipped because
            the gradient was not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        steps_per_epoch: int,
        epochs: int,
        device: torch.device,
    ) -> None:
        self.device = device
        self.steps_per_epoch = steps_per_epoch
        self.num_steps = steps_per_epoch * epochs
        self.model: Any = for_cpu(model) if device.type == "cpu" else model
        self.parallel_model = distributed.data_parallel(model)
        self.optimizer = optimizer
        self.step = 0
        self.num_skipped = torch.zeros((), device=device)

    @property
    @abstractmethod
    def config(self) -> PretrainConfig | DownstreamConfig:
        """Settings of the run."""

    @property
    @abstractmethod
    def description(self) -> Description:
        """Of what computes the features."""

    @property
    @abstractmethod
    def extractor(self) -> nn.Module:
        """What computes the features that are scored and exported."""

    def average_running_statistics(self) -> None:
        """Make the batch-norm statistics of all workers equal, as export and scoring need."""
        distributed.average_(
            (
                buffer
                for name, buffer in self.model.named_buffers()
                if name.endswith(("running_mean", "running_var"))
            ),
            weight=len(distributed.own_groups(self.config.num_groups)) / self.mean_groups,
        )

    @property
    def mean_groups(self) -> float:
        """Groups of a batch that a worker has in the mean.

        Gradients and terms are averaged over the workers: a group counts one by this number.
        """
        return self.config.num_groups / distributed.world_size()

    def update(self, *, lr: float, clip_norm: float | None) -> dict[str, Tensor]:
        """Let the optimizer take a step unless the gradient is not finite; clear gradients.

        A step that is skipped leaves parameters and optimizer as they were; nothing waits for
        the device to know. Every worker decides alike, since gradients are averaged.

        Args:
            lr: Learning rate of the step.
            clip_norm: Norm to which a greater gradient is scaled down, or None.

        Returns:
            ``grad_norm``, before it is clipped, and ``skipped``, how many steps in a row were
            skipped, 0 if this one was taken.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        is_skipped = (~norm.isfinite()).float()
        # What gradient scaling tells PyTorch's fused optimizers too.
        self.optimizer.found_inf = is_skipped  # type: ignore[attr-defined]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_skipped = (self.num_skipped + 1) * is_skipped
        return {"grad_norm": norm, "skipped": self.num_skipped}

    def to_device(self, batch: Tensor) -> Tensor:
        """Copy to the device, behind all that it has still to do, without waiting for that."""
        if self.device.type == "cuda":
            batch = batch.pin_memory()  # from pageable memory, the copy would wait
        return batch.to(self.device, non_blocking=True)

    def local_gradients(self, *, unless: bool) -> AbstractContextManager[None]:
        """Let backward inside leave gradients to this worker, ``unless`` it is the last one."""
        if unless or not isinstance(self.parallel_model, DistributedDataParallel):
            return nullcontext()
        return self.parallel_model.no_sync()


class TrainState(State):
    """The state of a pre-training run: encoders, queue and SGD."""

    def __init__(
        self, config: PretrainConfig, *, steps_per_epoch: int, device: torch.device
    ) -> None:
        self._config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = UPReID(config)
        model = model.to(device).to(memory_format=torch.channels_last)
        optimizer = ChannelsLastSGD(
            list(model.query_encoder.parameters()),
            lr=config.optimizer.lr,
            momentum=config.optimizer.momentum,
            weight_decay=config.optimizer.weight_decay,
        )
        super().__init__(
            model,
            optimizer,
            steps_per_epoch=steps_per_epoch,
            epochs=config.training.epochs,
            device=device,
        )
        self._render_views = render_views
        if config.training.compile and device.type == "cuda":
            self._compile()

    def _compile(self) -> None:
        """Let the first steps compile what every step calls, or leave it if that fails."""
        torch._dynamo.config.suppress_errors = True
        self._render_views = torch.compile(render_views, dynamic=False)
        self.model.key_encoder.compile(dynamic=False)
        if not self.config.training.activation_checkpointing:
            self.model.query_encoder.compile(dynamic=False)

    @property
    def config(self) -> PretrainConfig:
        """Settings of the run."""
        return self._config

    @property
    def description(self) -> Description:
        """Of the backbone."""
        return Description(
            backbone=self.config.model.backbone,
            height=self.config.data.height,
            width=self.config.data.width,
            mean=self.config.augmentation.mean,
            std=self.config.augmentation.std,
        )

    @property
    def extractor(self) -> nn.Module:
        """The backbone of the query encoder."""
        return self.model.query_encoder.backbone

    def render_views(
        self, images: Tensor, parameters: ViewParameters, *, for_keys: bool = False
    ) -> Views:
        """Draw what an encoder sees of images on the device, as `render_views` does.

        In the precision of the encoder: it would round its input to that anyway.
        """
        with autocast(images, self.config.training.precision):
            return self._render_views(
                images, parameters.to(self.device), self.config, for_keys=for_keys
            )


@dataclass(frozen=True)
class StepReport:
    """One step, as the loop saw it.

    Attributes:
        step: Steps taken, this one included.
        terms: What the step returned, still on the device.
        data_seconds: Time spent waiting for the batch.
    """

    step: int
    terms: dict[str, Tensor]
    data_seconds: float


@dataclass(frozen=True)
class StepDraw:
    """What is random in one step, for all B images; a function of (seed, step).

    Attributes:
        query: Parameters of the views that the query encoder sees.
        key: Parameters of the views that the key encoder sees.
        shuffle: ``[B]``, int64; row ``i`` of the key encoder's batch is image ``shuffle[i]``.
    """

    query: ViewParameters
    key: ViewParameters
    shuffle: Tensor

    @classmethod
    def of(cls, config: PretrainConfig, step: int) -> Self:
        """Draw for the step after ``step`` steps."""
        generator = step_generator(seed=config.seed, step=step)
        size = config.training.batch_size
        height, width = config.data.height, config.data.width
        return cls(
            query=draw_view_parameters(size, height, width, config.augmentation, generator),
            key=draw_view_parameters(size, height, width, config.augmentation, generator),
            shuffle=torch.randperm(size, generator=generator),
        )


def train(
    state: StateT,
    batches: Iterable[BatchT],
    take_step: Callable[[StateT, BatchT], dict[str, Tensor]],
    *,
    stop_step: int | None = None,
) -> Iterator[StepReport]:
    """Take one step for each batch and report it, until the run has all its steps.

    Args:
        state: Changed in place.
        batches: Of this worker, the first for step ``state.step``.
        take_step: Takes one step with one batch, such as `train_step`; returns ``loss`` and its
            terms.
        stop_step: Ends before this step instead.
    """
    iterator = iter(batches)
    while state.step < (state.num_steps if stop_step is None else stop_step):
        started = time.perf_counter()
        batch = next(iterator)
        data_seconds = time.perf_counter() - started
        yield StepReport(state.step + 1, take_step(state, batch), data_seconds)


def train_step(state: TrainState, images: Tensor) -> dict[str, Tensor]:
    """Take one step of UP-ReID.

    Args:
        state: Changed in place.
        images: uint8 ``[b, 3, H, W]``, of this worker's groups, in the order of the batch.

    Returns:
        ``loss`` and its terms, whose means over the workers are those over the batch, and what
        `State.update` returns, all on the device.
    """
    images = state.to_device(images)
    config, size = state.config, state.config.training.group_size
    draw = StepDraw.of(config, state.step)
    groups = distributed.own_groups(config.num_groups)

    keys = encode_shuffled_keys(state, images, draw)
    # Only the next step needs those of others: they travel meanwhile.
    new_keys = distributed.gather_rows(keys[:, 0], num_groups=config.num_groups)
    means: dict[str, Tensor] = {}
    for number, group in enumerate(groups):
        of_batch = slice(group * size, (group + 1) * size)
        own = slice(number * size, (number + 1) * size)
        views = state.render_views(images[own], draw.query.rows(of_batch))
        with state.local_gradients(unless=group == groups[-1]):
            terms = state.parallel_model(
                views,
                keys[own],
                statistics_momentum=group_momentum(number, len(groups)),
            )
            (terms["loss"] / state.mean_groups).backward()
        for name, term in terms.items():
            means[name] = means.get(name, 0) + term.detach() / state.mean_groups

    lr = learning_rate(
        state.step,
        peak=config.optimizer.lr,
        num_steps=state.num_steps,
        warmup_steps=round(config.optimizer.warmup_epochs * state.steps_per_epoch),
    )
    means |= state.update(lr=lr, clip_norm=config.optimizer.clip_norm)
    state.model.update_key_encoder(
        momentum=key_momentum(
            state.step,
            start=config.model.momentum,
            end=config.model.final_momentum,
            num_steps=state.num_steps,
        )
    )
    state.model.queue.enqueue(new_keys())
    state.step += 1
    return means


def encode_shuffled_keys(state: TrainState, images: Tensor, draw: StepDraw) -> Tensor:
    """Encode the keys of this worker's images, each by the worker where the shuffle puts it.

    The images of the batch are shuffled over all groups of all workers first (shuffle-BN, He
    et al. 2020, https://arxiv.org/abs/1911.05722): were an image normalized among the same
    others as query and as key, these statistics would give the match away.

    Returns:
        ``[b, E, D]``, in the order of the images.
    """
    config = state.config
    size, num_groups = config.training.group_size, config.num_groups
    shuffled = distributed.permute_rows(images, draw.shuffle, num_groups=num_groups)
    groups = distributed.own_groups(num_groups)
    keys = []
    for number, group in enumerate(groups):
        own = shuffled[number * size : (number + 1) * size]
        sources = draw.shuffle[group * size : (group + 1) * size]
        views = state.render_views(own, draw.key.rows(sources), for_keys=True)
        momentum = group_momentum(number, len(groups))
        keys.append(state.model.encode_keys(views, statistics_momentum=momentum))
    back = draw.shuffle.argsort()
    return distributed.permute_rows(torch.cat(keys), back, num_groups=num_groups)


def render_views(
    images: Tensor,
    parameters: ViewParameters,
    config: PretrainConfig,
    *,
    for_keys: bool = False,
) -> Views:
    """Draw what an encoder sees of the uint8 ``images [G, 3, H, W]``, channels last.

    Patches are drawn only if the intrinsic loss has a weight, and originals only for the key
    encoder if the consistency loss has one.
    """
    view = render_view(images, parameters, config.augmentation)
    patches = original = None
    if config.loss.intrinsic_weight > 0:
        whole = view
        if config.patches.alignment == "body":
            at_body = parameters.at_full_height(config.data.height)
            whole = render_view(images, at_body, config.augmentation)
        grid = cut_patches(whole, rows=config.patches.rows, columns=config.patches.columns)
        patches = _channels_last(grid.flatten(0, 1)).view(grid.shape)
    if for_keys and config.loss.consistency_weight > 0:
        normalization = Normalization(config.augmentation.mean, config.augmentation.std)
        pixels = normalization.apply(images.float() / 255)
        original = _channels_last(pixels.to(view.dtype))
    return Views(_channels_last(view), patches, original)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)
