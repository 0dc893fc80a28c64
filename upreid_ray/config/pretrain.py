"""Settings of a pre-training run."""

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
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
    Probability,
    Section,
    ShareRange,
)

SMALLEST_PATCH = 8  # pixels


class DataConfig(Section):
    """Which images are read, and at which size."""

    shards: PathOrUri | None = None
    """Folder or URI with shards made by jobs/prepare.py; none draws the synthetic set."""
    synthetic: SyntheticConfig = SyntheticConfig()
    """The synthetic set that is drawn where no shards are given."""
    height: Pixels = 256
    """Height to which images are resized, in pixels."""
    width: Pixels = 128
    """Width to which images are resized, in pixels."""
    max_undecodable: Probability = 0.01
    """Share of images that may not decode, or lie in damaged shards, before the run stops."""


class AugmentationConfig(Section):
    """How a view is drawn from an image, and how pixels are normalized."""

    mean: Color = (0.3525, 0.3106, 0.3140)
    """Subtracted from each colour channel (0..1)."""
    std: Deviation = (0.2660, 0.2522, 0.2505)
    """Divides each colour channel after the mean is subtracted."""
    crop_area: ShareRange = (0.2, 1.0)
    """Area of the random crop, as a share of the image."""
    crop_ratio: PositiveRange = (3 / 4, 4 / 3)
    """Width by height of the random crop, in pixels."""
    flip_probability: Probability = 0.5
    """Probability of a left-right flip."""
    jitter_probability: Probability = 0.0
    """Probability of color jitter."""
    jitter_brightness: Jitter = 0.4
    """Brightness is multiplied by 1 +- this."""
    jitter_contrast: Jitter = 0.4
    """Contrast is multiplied by 1 +- this."""
    jitter_saturation: Jitter = 0.2
    """Saturation is multiplied by 1 +- this."""
    jitter_hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Hue is turned by +- this share of the colour circle."""
    grayscale_probability: Probability = 0.2
    """Probability of grayscale."""
    blur_probability: Probability = 0.5
    """Probability of Gaussian blur."""
    blur_sigma: PositiveRange = (0.1, 2.0)
    """Standard deviation of the blur, in pixels of the view."""
    erase_probability: Probability = 0.5
    """Probability that a rectangle is set to the mean colour."""
    erase_area: ShareRange = (0.02, 0.6)
    """Area of the rectangle, as a share of the view."""
    erase_ratio: PositiveRange = (0.3, 3.33)
    """Height by width of the rectangle."""


class PatchesConfig(Section):
    """The grid of patches that the intrinsic contrastive loss compares."""

    rows: PositiveInt = 4
    """Rows of the grid."""
    columns: PositiveInt = 2
    """Columns of the grid."""
    alignment: Literal["view", "body"] = "view"
    """Cut the augmented view, or rows at fixed heights of the original image."""
    mining: Literal["symmetry", "none"] = "symmetry"
    """Hardest positive of the row against other rows, or same cell against all others."""


class ModelConfig(Section):
    """The encoders and the queue of keys."""

    backbone: BackboneName = "resnet50"
    """Torchvision's ResNet."""
    pretrained: PathOrUri | None = None
    """File of weights to start from: torchvision's, or a checkpoint of MoCo or fast-reid."""
    embedding_dim: PositiveInt = 128
    """Size of the projected embedding."""
    queue_size: PositiveInt = 65536
    """Past keys that serve as negatives."""
    momentum: Probability = 0.999
    """Momentum of the key encoder at the first step."""
    final_momentum: Probability = 0.999
    """Momentum of the key encoder at the last step; cosine in between."""


class LossConfig(Section):
    """Weights and temperatures of the three terms; a weight of 0 is not computed."""

    temperature: PositiveFloat = 0.1
    """Of info_nce."""
    consistency_weight: NonNegativeFloat = 0.1
    """Weight of global_consistency."""
    consistency_temperature: PositiveFloat = 0.1
    """Of the prediction from the augmented view."""
    consistency_target_temperature: PositiveFloat = 0.04
    """Of the target from the original image."""
    intrinsic_weight: NonNegativeFloat = 0.1
    """Weight of intrinsic_contrastive."""
    intrinsic_temperature: PositiveFloat = 0.2
    """Of intrinsic_contrastive."""


class OptimizerConfig(Section):
    """SGD with warm-up and cosine decay to zero."""

    lr: PositiveFloat = 0.3
    """Peak learning rate for the whole batch; it is not scaled by anything."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay of SGD."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs of linear warm-up."""
    clip_norm: PositiveFloat | None = None
    """A gradient of a greater norm is scaled down to it; none leaves gradients as they are."""


class TrainingConfig(Section):
    """How long, how large and how precise."""

    epochs: PositiveInt = 200
    """Passes over the data."""
    batch_size: PositiveInt = 2560
    """Images of one step, over all workers."""
    group_size: Annotated[int, Field(ge=2)] = 320
    """Images that batch normalization sees together; a worker processes one group at a time."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the forward passes; auto is bf16 where the device multiplies it. Weights stay fp32."""
    compile: bool = True
    """On a GPU, compile encoders and augmentation in the first steps, which takes minutes."""
    activation_checkpointing: bool = False
    """Keep few activations and compute the others again: less memory, more time."""
    log_every_steps: PositiveInt = 20
    """Steps between two entries of the training metrics."""


class PretrainConfig(Section):
    """A pre-training run."""

    seed: NonNegativeInt = 0
    """Of initial weights, order of images and augmentation."""
    data: DataConfig = DataConfig()
    """Images."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """Views."""
    patches: PatchesConfig = PatchesConfig()
    """Patches."""
    model: ModelConfig = ModelConfig()
    """Encoders."""
    loss: LossConfig = LossConfig()
    """Objective."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer."""
    training: TrainingConfig = TrainingConfig()
    """Length and batch."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Frozen retrieval."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    scaling: ScalingConfig = ScalingConfig()
    """Workers."""
    run: RunConfig = RunConfig()
    """Storage and names."""

    @property
    def num_groups(self) -> int:
        """Groups of one step, over all workers."""
        return self.training.batch_size // self.training.group_size

    @property
    def model_name(self) -> str:
        """Name under which the backbone is registered."""
        return self.run.register_as or f"upreid-{self.model.backbone}"

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
        if self.loss.intrinsic_weight == 0:
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
