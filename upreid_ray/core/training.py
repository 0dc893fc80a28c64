"""The training step of UP-ReID, and the loop over any iterable of batches.

A batch consists of groups: images that batch normalization sees together. A worker computes
its groups one after the other and accumulates their gradients. The result therefore does not
depend on the number of workers, apart from the order of floating-point sums, and a worker needs
the memory of a single group. Everything random is a function of (seed, step).

Dimensions: B images of the whole batch, b images of this worker, G images of a group.
"""

import dataclasses
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from upreid_ray.config.downstream import DownstreamConfig
from upreid_ray.config.pretrain import AdamWConfig, OptimizerConfig, PretrainConfig
from upreid_ray.core import distributed
from upreid_ray.core.augment import (
    Normalization,
    ViewParameters,
    draw_view_parameters,
    hash_seeds,
    render_view,
    step_generator,
)
from upreid_ray.core.backbone import Description, choose_optimizer
from upreid_ray.core.cpu import ChannelsLastSGD, for_cpu
from upreid_ray.core.encoder import STATISTICS, Encoder, StatisticsCopy, group_momentum
from upreid_ray.core.model import Keys, UPReID, Views
from upreid_ray.core.patches import cut_patches
from upreid_ray.core.precision import autocast
from upreid_ray.core.schedule import key_momentum, learning_rate

BatchT = TypeVar("BatchT")
StateT = TypeVar("StateT", bound="State")


@dataclass(frozen=True)
class Group:
    """One of the groups of a batch that this worker computes.

    Attributes:
        rows: Rows of the group among the images of this worker.
        batch_rows: Rows of the group in the whole batch.
        statistics_momentum: Momentum with which the group updates running statistics.
        is_last: Whether it is the last group of this worker.
    """

    rows: slice
    batch_rows: slice
    statistics_momentum: float
    is_last: bool


class State(ABC):
    """Everything that changes during training.

    Attributes:
        config: Settings of the run.
        device: Device of the model.
        steps_per_epoch: Steps of one pass over the data.
        num_steps: Steps of the whole run.
        model: The module with everything that a checkpoint keeps beside the optimizer.
        parallel_model: The same module; its backward pass averages gradients over the workers.
        optimizer: Optimizer of the trained parameters.
        step: Number of steps taken.
        num_skipped: ``[]``, on the device; how many of the latest steps in a row were skipped
            because they were not finite.
    """

    config: PretrainConfig | DownstreamConfig

    def __init__(
        self,
        config: PretrainConfig | DownstreamConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        steps_per_epoch: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.device = device
        self.steps_per_epoch = steps_per_epoch
        self.num_steps = steps_per_epoch * config.training.epochs
        self.model: Any = for_cpu(model) if device.type == "cpu" else model
        self.parallel_model = distributed.data_parallel(model)
        self.optimizer = optimizer
        self.step = 0
        self.num_skipped = torch.zeros((), device=device)

    @property
    @abstractmethod
    def description(self) -> Description:
        """Description of the extractor, for those who load it."""

    @property
    @abstractmethod
    def extractor(self) -> nn.Module:
        """Module that computes the features which are scored and exported."""

    def average_running_statistics(self) -> None:
        """Average the batch-norm statistics over the workers, before they are used."""
        distributed.average_(
            (
                buffer
                for name, buffer in self.model.named_buffers()
                if name.endswith(("running_mean", "running_var"))
            ),
            weight=len(self.groups) / self.num_groups_per_worker,
        )

    @property
    def groups(self) -> list[Group]:
        """The groups of a batch that this worker computes, in the order of its images."""
        config = self.config
        size = config.training.batch_size // config.num_groups
        numbers = distributed.groups_of_this_worker(config.num_groups)
        return [
            Group(
                rows=slice(index * size, (index + 1) * size),
                batch_rows=slice(number * size, (number + 1) * size),
                statistics_momentum=group_momentum(index, len(numbers)),
                is_last=number == numbers[-1],
            )
            for index, number in enumerate(numbers)
        ]

    @property
    def num_groups_per_worker(self) -> float:
        """Groups of a batch divided by workers; not whole if some workers have one group more.

        The loss of each group is divided by this number. The sum over the groups of a worker,
        averaged over the workers, is then the mean over all groups.
        """
        return self.config.num_groups / distributed.world_size()

    def accumulate_gradients(
        self, compute_terms: Callable[[Group], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Compute the gradient of the batch, one group of this worker after the other.

        The backward pass of the last group averages gradients over the workers.

        Args:
            compute_terms: Calls `parallel_model` for a group; returns ``loss`` and its terms.

        Returns:
            ``loss`` and its terms, whose means over the workers are those over the batch.
        """
        means: dict[str, Tensor] = {}
        for group in self.groups:
            with nullcontext() if group.is_last else self._local_gradients():
                terms = compute_terms(group)
                for name, term in terms.items():
                    share = term.detach() / self.num_groups_per_worker
                    means[name] = means.get(name, 0) + share
                loss = terms["loss"] / self.num_groups_per_worker
                if group.is_last:
                    loss = loss * self._one_if_finite(means["loss"])
                loss.backward()  # type: ignore[no-untyped-call]
        return means

    def _one_if_finite(self, loss: Tensor) -> Tensor:
        """Return 1 if this worker's loss and running statistics are finite, otherwise NaN.

        As a factor of the loss it reaches the gradient, and so every worker. Keys need no look
        of their own: the loss of the worker that has their images depends on each of them.
        """
        statistics = [
            buffer for name, buffer in self.model.named_buffers() if name.endswith(STATISTICS)
        ]
        largest = nn.utils.get_total_norm(
            [each for each in statistics if each.is_floating_point()], math.inf
        )
        is_finite = loss.isfinite() & largest.isfinite()
        # `torch.where` would copy numbers to the device, and wait for it.
        return torch.ones_like(loss).masked_fill_(~is_finite, torch.nan)

    def update(self, *, lr: float, clip_norm: float | None) -> dict[str, Tensor]:
        """Take a step of the optimizer unless the gradient is not finite; clear gradients.

        A skipped step leaves parameters and optimizer as they were; `is_skipped` tells those
        who changed anything else. The device decides, so that the CPU need not wait for it; all
        workers decide alike, because gradients are averaged.

        Args:
            lr: Learning rate of the step.
            clip_norm: Norm to which a larger gradient is scaled down, or None.

        Returns:
            ``grad_norm``, before clipping, and ``skipped``, the number of steps in a row that
            were skipped; 0 if this one was taken.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        is_skipped = (~norm.isfinite()).float()
        # PyTorch's fused optimizers skip a step by this, as for gradient scaling.
        self.optimizer.found_inf = is_skipped  # type: ignore[attr-defined]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_skipped = (self.num_skipped + 1) * is_skipped
        return {"grad_norm": norm, "skipped": self.num_skipped}

    @property
    def is_skipped(self) -> Tensor:
        """Whether the latest step was skipped: ``[]``, bool, on the device."""
        return self.num_skipped > 0

    def to_device(self, batch: Tensor) -> Tensor:
        """Copy a batch to the device without waiting for the work that is queued there."""
        if self.device.type == "cuda" and batch.device.type == "cpu":
            batch = batch.pin_memory()  # a copy from pageable memory would wait
        return batch.to(self.device, non_blocking=True)

    def _local_gradients(self) -> AbstractContextManager[None]:
        """Return a context in which backward does not average gradients over the workers."""
        if isinstance(self.parallel_model, DistributedDataParallel):
            return self.parallel_model.no_sync()
        return nullcontext()


class TrainState(State):
    """The state of a pre-training run: encoders, queue and optimizer.

    Attributes:
        schedule: Settings of the optimizer in use.
    """

    config: PretrainConfig
    schedule: OptimizerConfig | AdamWConfig

    def __init__(
        self, config: PretrainConfig, *, steps_per_epoch: int, device: torch.device
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = UPReID(config)
        model = model.to(device).to(memory_format=torch.channels_last)
        is_sgd = choose_optimizer(config) == "sgd"
        self.schedule = config.optimizer if is_sgd else config.optimizer.adamw
        optimizer = (_sgd if is_sgd else _adamw)(model.query_encoder, config.optimizer)
        super().__init__(
            config, model, optimizer, steps_per_epoch=steps_per_epoch, device=device
        )
        self._render_views = render_views
        if config.training.compile and device.type == "cuda":
            self._compile()

    def _compile(self) -> None:
        """Compile encoders and augmentation in the first steps; run what fails uncompiled."""
        torch._dynamo.config.suppress_errors = True
        self._render_views = torch.compile(render_views, dynamic=False)
        self.model.key_encoder.compile(dynamic=False)
        if not self.config.training.activation_checkpointing:
            self.model.query_encoder.compile(dynamic=False)

    @property
    def description(self) -> Description:
        """Description of the backbone, for those who load it."""
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
        """Call `render_views`, compiled if it is, with images on the device.

        The views are in the precision of the encoder, which would round them to it anyway.
        """
        with autocast(images, self.config.training.precision):
            return self._render_views(
                images, parameters.to(self.device), self.config, for_keys=for_keys
            )


@dataclass(frozen=True)
class StepReport:
    """Report of one step.

    Attributes:
        step: Number of steps taken, including this one.
        terms: What the step returned; tensors on the device.
        data_seconds: Seconds spent waiting for the batch.
    """

    step: int
    terms: dict[str, Tensor]
    data_seconds: float


@dataclass(frozen=True)
class StepDraw:
    """Everything that is random in one step, for all B images of the batch.

    Attributes:
        query: Parameters of the query encoder's views.
        key: Parameters of the key encoder's views.
        shuffle: ``[B]``, int64; row ``i`` of the key encoder's batch is image ``shuffle[i]``.
    """

    query: ViewParameters
    key: ViewParameters
    shuffle: Tensor

    @classmethod
    def at(cls, config: PretrainConfig, step: int) -> Self:
        """Return the draw of a step, counted from 0; a function of (seed, step)."""
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
    """Take one step with each batch and report it, until the run has all its steps.

    Args:
        state: State of training, changed in place.
        batches: This worker's batches, starting with that of step ``state.step``.
        take_step: Takes one step with one batch, as `train_step` does; returns ``loss`` and its
            terms.
        stop_step: Number of steps after which to stop; default: those of the run.
    """
    iterator = iter(batches)
    while state.step < (state.num_steps if stop_step is None else stop_step):
        started = time.perf_counter()
        batch = next(iterator)
        data_seconds = time.perf_counter() - started
        terms = take_step(state, batch)
        yield StepReport(state.step, terms, data_seconds)


def train_step(state: TrainState, images: Tensor) -> dict[str, Tensor]:
    """Take one step of UP-ReID; one that is not finite changes nothing but the step's number.

    Args:
        state: State of training, changed in place.
        images: uint8 ``[b, 3, H, W]``, the images of this worker's groups.

    Returns:
        What `State.accumulate_gradients` and `State.update` return, on the device.
    """
    images = state.to_device(images)
    config = state.config
    draw = StepDraw.at(config, state.step)
    statistics = StatisticsCopy(state.model)

    keys = encode_shuffled_keys(state, images, draw)
    # Only the next step needs the keys of other workers, so they travel during this one.
    new_keys = distributed.gather_rows(keys.view, num_groups=config.num_groups)

    def compute_terms(group: Group) -> dict[str, Tensor]:
        views = state.render_views(images[group.rows], draw.query.rows(group.batch_rows))
        with _stochastic_depth(state, group):
            return state.parallel_model(
                views, keys.rows(group.rows), statistics_momentum=group.statistics_momentum
            )

    terms = state.accumulate_gradients(compute_terms)
    lr = learning_rate(
        state.step,
        peak=state.schedule.lr,
        num_steps=state.num_steps,
        warmup_steps=round(state.schedule.warmup_epochs * state.steps_per_epoch),
    )
    terms |= state.update(lr=lr, clip_norm=state.schedule.clip_norm)
    statistics.restore(where=state.is_skipped)
    state.model.update_key_encoder(
        momentum=key_momentum(
            state.step,
            start=config.model.momentum,
            end=config.model.final_momentum,
            num_steps=state.num_steps,
        ),
        is_skipped=state.is_skipped,
    )
    state.model.queue.enqueue(new_keys(), is_skipped=state.is_skipped)
    state.step += 1
    return terms


def encode_shuffled_keys(state: TrainState, images: Tensor, draw: StepDraw) -> Keys:
    """Return the keys of this worker's images, encoded in a shuffled batch.

    The images of the batch are first shuffled over all groups of all workers (shuffle-BN, He et
    al. 2020, https://arxiv.org/abs/1911.05722). If an image were normalized together with the
    same other images as query and as key, the batch statistics would give the match away.
    Encoders without batch statistics encode the images in their own order.
    """
    num_groups = state.config.num_groups
    if not state.model.has_batch_statistics:
        draw = dataclasses.replace(draw, shuffle=torch.arange(len(draw.shuffle)))
    shuffled = distributed.permute_rows(images, draw.shuffle, num_groups=num_groups)
    packed = []
    for group in state.groups:
        parameters = draw.key.rows(draw.shuffle[group.batch_rows])
        views = state.render_views(shuffled[group.rows], parameters, for_keys=True)
        momentum = group.statistics_momentum
        with _stochastic_depth(state, group):  # if the query encoder encodes patches
            keys = state.model.encode_keys(views, statistics_momentum=momentum)
        packed.append(keys.pack())
    back = draw.shuffle.argsort()
    rows = distributed.permute_rows(torch.cat(packed), back, num_groups=num_groups)
    return Keys.unpack(rows, state.config.loss)


@contextmanager
def _stochastic_depth(state: TrainState, group: Group) -> Iterator[None]:
    """Let stochastic depth draw what is a function of seed, step and group in this block."""
    if not state.model.has_stochastic_depth:
        yield
        return
    devices = [state.device] if state.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        first = group.batch_rows.start
        torch.manual_seed(hash_seeds(state.config.seed, state.step, first))
        yield


def _sgd(encoder: Encoder, config: OptimizerConfig) -> ChannelsLastSGD:
    """Return SGD for the parameters that train."""
    return ChannelsLastSGD(
        [parameter for parameter in encoder.parameters() if parameter.requires_grad],
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


def _adamw(encoder: Encoder, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW for the parameters that train; only matrices and kernels decay."""
    # Tokens and positions, in the names of timm.
    excepted: set[str] = getattr(encoder.backbone, "no_weight_decay", set)()
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            is_vector = parameter.ndim <= 1 or name.removeprefix("backbone.") in excepted
            (others if is_vector else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.adamw.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.adamw.lr, fused=True)


def render_views(
    images: Tensor,
    parameters: ViewParameters,
    config: PretrainConfig,
    *,
    for_keys: bool = False,
) -> Views:
    """Return what an encoder sees of a group of images, channels last.

    Args:
        images: uint8 ``[G, 3, H, W]``.
        parameters: Parameters of the G views, on the same device.
        config: Settings of the run, which decide whether patches and originals are needed.
        for_keys: Whether the views are for the key encoder, which alone sees originals.
    """
    view = render_view(images, parameters, config.augmentation)
    patches = original = None
    if config.loss.needs_patches:
        whole = view
        if config.patches.alignment == "body":
            at_body = parameters.at_full_height(config.data.height)
            whole = render_view(images, at_body, config.augmentation)
        grid = cut_patches(whole, rows=config.patches.rows, columns=config.patches.columns)
        patches = _channels_last(grid.flatten(0, 1)).view(grid.shape)
    if for_keys and config.loss.needs_originals:
        normalization = Normalization(config.augmentation.mean, config.augmentation.std)
        pixels = normalization.apply(images.float() / 255)
        original = _channels_last(pixels.to(view.dtype))
    return Views(_channels_last(view), patches, original)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)
