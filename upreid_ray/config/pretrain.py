"""Settings of a pre-training run."""

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from upreid_ray.config.run import (
    BackboneName,
    CheckpointConfig,
    EvaluationConfig,
    RunConfig,
    ScalingConfig,
    SyntheticConfig,
)
from upreid_ray.config.section import (
    Color,
    Deviation,
    Jitter,
    PathOrUri,
    Pixels,
    PositiveRange,
    Precision,
    Probability,
    Section,
    Seed,
    ShareRange,
)

SMALLEST_PATCH = 8  # pixels


class DataConfig(Section):
    """Training images and their size."""

    shards: PathOrUri | None = None
    """Folder or URI of shards made by jobs/prepare.py. Default: the synthetic set."""
    synthetic: SyntheticConfig = SyntheticConfig()
    """Settings of the synthetic set, which is drawn if no shards are given."""
    height: Pixels = 256
    """Height of the resized images, in pixels."""
    width: Pixels = 128
    """Width of the resized images, in pixels."""
    max_undecodable: Probability = 0.01
    """Largest fraction of images that cannot be decoded or lie in damaged shards; above it the
    run fails."""


class AugmentationConfig(Section):
    """The random augmentation of views, and the normalization of pixels."""

    mean: Color = (0.3525, 0.3106, 0.3140)
    """Mean of each colour channel (0..1), subtracted from the pixels."""
    std: Deviation = (0.2660, 0.2522, 0.2505)
    """Standard deviation of each colour channel, by which pixels are divided."""
    crop_area: ShareRange = (0.2, 1.0)
    """Smallest and largest area of the random crop, as a fraction of the image."""
    crop_ratio: PositiveRange = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio (width / height) of the random crop."""
    flip_probability: Probability = 0.5
    """Probability of a horizontal flip."""
    jitter_probability: Probability = 0.0
    """Probability of colour jitter."""
    jitter_brightness: Jitter = 0.4
    """Strength of brightness jitter: the factor is 1 plus or minus this."""
    jitter_contrast: Jitter = 0.4
    """Strength of contrast jitter: the factor is 1 plus or minus this."""
    jitter_saturation: Jitter = 0.2
    """Strength of saturation jitter: the factor is 1 plus or minus this."""
    jitter_hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Strength of hue jitter: the largest shift, as a fraction of the colour circle."""
    grayscale_probability: Probability = 0.2
    """Probability that a view is turned into grayscale."""
    blur_probability: Probability = 0.5
    """Probability of Gaussian blur."""
    blur_sigma: PositiveRange = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels."""
    erase_probability: Probability = 0.5
    """Probability that a random rectangle is erased (set to the mean colour)."""
    erase_area: ShareRange = (0.02, 0.6)
    """Smallest and largest area of the erased rectangle, as a fraction of the view."""
    erase_ratio: PositiveRange = (0.3, 3.33)
    """Smallest and largest aspect ratio (height / width) of the erased rectangle."""


class PatchesConfig(Section):
    """The grid of patches of the intrinsic contrastive loss."""

    rows: PositiveInt = 4
    """Number of rows of patches."""
    columns: PositiveInt = 2
    """Number of columns of patches."""
    alignment: Literal["view", "body"] = "body"
    """Where patches are cut: from the augmented view (view), or in rows at fixed heights of the
    original image (body)."""
    mining: Literal["symmetry", "none"] = "symmetry"
    """How pairs are chosen: the hardest positive of a row against other rows (symmetry), or the
    same cell against all others (none)."""
    key_encoder: Literal["momentum", "query"] = "momentum"
    """Encoder of the other view's patches: the key encoder, which follows by its momentum
    (momentum), or the query encoder without gradient (query)."""


class ModelConfig(Section):
    """The backbone, the momentum encoder and the queue of keys."""

    backbone: BackboneName = "resnet50"
    """Architecture of the backbone, such as resnet50; docs/guide.md lists all names."""
    pretrained: PathOrUri | None = None
    """File of weights to start from; docs/guide.md lists the tools whose files are read.
    Default: random weights."""
    continue_from: PathOrUri | None = None
    """Folder or URI of a run, or of a checkpoint, whose encoders, queue and optimizer this run
    takes over; the schedules begin anew. Default: a new beginning."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Largest probability with which stochastic depth leaves out a block of the query encoder.
    Default: 0.1 for Vision Transformers, otherwise 0."""
    freeze_patch_projection: bool = True
    """Whether the patch projection of a Vision Transformer without a convolutional stem keeps
    its initial weights."""
    embedding_dim: PositiveInt = 128
    """Number of dimensions of the projected embedding."""
    queue_size: PositiveInt = 65536
    """Number of past keys in the queue, which serve as negatives."""
    momentum: Probability = 0.999
    """Momentum of the key encoder at the first training step."""
    final_momentum: Probability = 0.999
    """Momentum of the key encoder at the last training step, reached along a cosine."""

    @model_validator(mode="after")
    def _begins_once(self) -> Self:
        if self.pretrained is not None and self.continue_from is not None:
            raise ValueError(
                f"--model.continue_from {self.continue_from}: holds the weights already; leave "
                "out --model.pretrained"
            )
        return self


class LossConfig(Section):
    """Weights and temperatures of the three loss terms; a term of weight 0 is not computed."""

    temperature: PositiveFloat = 0.1
    """Temperature of the InfoNCE loss."""
    consistency_weight: NonNegativeFloat = 1.0
    """Weight of the global consistency loss."""
    consistency_temperature: PositiveFloat = 0.1
    """Temperature of the softmax over the augmented view (the student)."""
    consistency_target_temperature: PositiveFloat = 0.04
    """Temperature of the softmax over the original image (the teacher)."""
    intrinsic_weight: NonNegativeFloat = 1.0
    """Weight of the intrinsic contrastive loss."""
    intrinsic_temperature: PositiveFloat = 0.2
    """Temperature of the intrinsic contrastive loss."""

    @property
    def needs_originals(self) -> bool:
        """Whether a term compares with the images without augmentation."""
        return self.consistency_weight > 0

    @property
    def needs_patches(self) -> bool:
        """Whether a term compares patches."""
        return self.intrinsic_weight > 0


class AdamWConfig(Section):
    """AdamW, with the schedule of SGD; norms, biases, tokens and positions do not decay."""

    lr: PositiveFloat = 1.5e-3
    """Peak learning rate; it does not depend on the batch size or the number of workers."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay of AdamW."""
    warmup_epochs: NonNegativeFloat = 20.0
    """Number of epochs of linear warm-up of the learning rate."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest norm of the gradient; larger gradients are scaled down. None: no clipping."""


class OptimizerConfig(Section):
    """SGD, with a linear warm-up and a cosine decay of the learning rate to zero."""

    algorithm: Literal["auto", "sgd", "adamw"] = "auto"
    """Optimizer; auto is SGD for ResNets and AdamW for all other backbones. AdamW has settings
    of its own (optimizer.adamw); the others of this section are those of SGD."""
    lr: PositiveFloat = 0.3
    """Peak learning rate; it does not depend on the batch size or the number of workers."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay of SGD."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Number of epochs of linear warm-up of the learning rate."""
    clip_norm: PositiveFloat | None = None
    """Largest norm of the gradient; larger gradients are scaled down. Default: no clipping."""
    adamw: AdamWConfig = AdamWConfig()
    """Settings of AdamW."""


class TrainingConfig(Section):
    """Length, batch size and precision of the training."""

    epochs: PositiveInt = 200
    """Number of passes over the training images."""
    batch_size: PositiveInt = 2560
    """Number of images in a training step, over all workers."""
    group_size: Annotated[int, Field(ge=2)] = 320
    """Number of images in a group: batch normalization sees one group at a time."""
    precision: Precision = "auto"
    """Precision of the forward passes; auto is bf16 if the device supports it, otherwise fp32.
    Weights are always fp32."""
    compile: bool = True
    """Whether to compile encoders and augmentation on GPUs, which takes minutes at first."""
    activation_checkpointing: bool = False
    """Whether to recompute activations in the backward pass: less memory, more time."""
    log_every_steps: PositiveInt = 20
    """Training steps between two log entries of the metrics."""


class PretrainConfig(Section):
    """A pre-training run."""

    seed: Seed = 0
    """Random seed of the initial weights, the image order and the augmentation."""
    data: DataConfig = DataConfig()
    """Settings of the images."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """Settings of the augmentation."""
    patches: PatchesConfig = PatchesConfig()
    """Settings of the patches."""
    model: ModelConfig = ModelConfig()
    """Settings of the model."""
    loss: LossConfig = LossConfig()
    """Settings of the loss."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Settings of the optimizer."""
    training: TrainingConfig = TrainingConfig()
    """Settings of the training."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Settings of the evaluation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Settings of the checkpoints."""
    scaling: ScalingConfig = ScalingConfig()
    """Settings of the workers."""
    run: RunConfig = RunConfig()
    """Settings of storage and names."""

    @property
    def num_groups(self) -> int:
        """Number of groups in a training step, over all workers."""
        return self.training.batch_size // self.training.group_size

    @property
    def model_name(self) -> str:
        """Name under which the backbone is registered."""
        return self.run.register_as or f"upreid-{self.model.backbone.replace('/', '-')}"

    @model_validator(mode="after")
    def _groups_fill_the_batch(self) -> Self:
        batch_size, group_size = self.training.batch_size, self.training.group_size
        if batch_size % group_size:
            raise ValueError(
                f"--training.group_size {group_size} must divide --training.batch_size "
                f"{batch_size}"
            )
        self.scaling.check_workers(
            self.num_groups,
            f"--training.batch_size {batch_size} / --training.group_size {group_size}",
        )
        return self

    @model_validator(mode="after")
    def _workers_have_gpus_of_their_own(self) -> Self:
        if self.scaling.num_workers > 1 and self.scaling.gpus_per_worker < 1:
            raise ValueError(
                f"--scaling.gpus_per_worker {self.scaling.gpus_per_worker:g}: the "
                f"{self.scaling.num_workers} workers of a run cannot share a GPU, only "
                "runs with --scaling.num_workers 1 can"
            )
        return self

    @model_validator(mode="after")
    def _patches_can_be_cut(self) -> Self:
        if not self.loss.needs_patches:
            return self
        rows, columns = self.patches.rows, self.patches.columns
        if rows * columns == 1 or (self.patches.mining == "symmetry" and rows == 1):
            raise ValueError(
                f"--patches.rows {rows} --patches.columns {columns} leaves no negatives for "
                f"--patches.mining {self.patches.mining}"
            )
        if min(self.data.height // rows, self.data.width // columns) < SMALLEST_PATCH:
            raise ValueError(
                f"--patches.rows {rows} --patches.columns {columns} makes patches of less than "
                f"{SMALLEST_PATCH} pixels from images of {self.data.height}x{self.data.width}"
            )
        return self
