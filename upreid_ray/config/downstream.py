"""Settings of the jobs that use a pre-trained backbone."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

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
    JobConfig,
    RunConfig,
    ScalingConfig,
    SyntheticConfig,
)
from upreid_ray.config.section import (
    RANDOM,
    Color,
    Deviation,
    Init,
    PathOrUri,
    Pixels,
    Precision,
    Probability,
    Section,
    Seed,
    Share,
    ShareRange,
)


class ImagesConfig(Section):
    """The size and the normalization of images."""

    height: Pixels | None = None
    """Height of the resized images, in pixels. Default: the pre-training height, or 256."""
    width: Pixels | None = None
    """Width of the resized images, in pixels. Default: the pre-training width, or 128."""
    mean: Color | None = None
    """Mean of each colour channel (0..1). Default: that of the pre-training, or of ImageNet."""
    std: Deviation | None = None
    """Standard deviation of each channel. Default: that of the pre-training, or of ImageNet."""


class LabelledDataConfig(ImagesConfig):
    """Labelled images, their size and their normalization."""

    root: PathOrUri | None = None
    """Folder in a labelled layout, or folder or URI of shards. Default: the synthetic set."""
    synthetic: SyntheticConfig = SyntheticConfig()
    """Settings of the synthetic set, which is drawn if no root is given."""
    max_undecodable: Probability = 0.01
    """Largest fraction of images that cannot be decoded or lie in damaged shards; above it the
    job fails."""


class EmbedConfig(Section):
    """The computation of features."""

    tta: Literal["none", "flip"] = "none"
    """Test-time augmentation; flip adds the features of the mirrored image."""
    number_type: Literal["float32", "float16"] = "float32"
    """Type of the numbers of a feature in the files."""
    precision: Precision = "auto"
    """Precision of the forward passes; auto is bf16 if the device supports it, else fp32."""
    images: ImagesConfig = ImagesConfig()
    """Settings of the images."""
    scaling: ScalingConfig = ScalingConfig(num_workers=1, use_gpu=False)
    """Settings of the workers that compute features."""


class InitConfig(Section):
    """The backbone that a job starts from."""

    init: Init = RANDOM
    """Backbone to start from: models:/NAME@ALIAS, models:/NAME/VERSION, a checkpoint folder, a
    file of weights, or random."""
    backbone: BackboneName = "resnet50"
    """Architecture of the backbone if --init is random."""


class EvaluateConfig(InitConfig):
    """The evaluation of a frozen backbone."""

    seed: Seed = 0
    """Random seed of the weights if --init is random."""
    rerank: bool = False
    """Whether to score k-reciprocal re-ranking as well."""
    ignore_cameras: bool = False
    """Whether a match may be by the query's own camera, as in a set of one camera. The standard
    protocol ignores such images."""
    data: LabelledDataConfig = LabelledDataConfig()
    """Settings of the images."""
    scaling: ScalingConfig = ScalingConfig(num_workers=1, use_gpu=False)
    """Settings of the workers that compute features."""
    run: JobConfig = JobConfig()
    """Settings of storage and names."""


class SubsetConfig(Section):
    """A subset of the training images, for experiments with few labels."""

    persons: Share = 1.0
    """Fraction of the persons to train on; subsets are nested."""
    images: Share = 1.0
    """Fraction of each person's images to train on, at least one; subsets are nested."""


class FinetuneAugmentationConfig(Section):
    """The random augmentation of training images."""

    flip_probability: Probability = 0.5
    """Probability of a horizontal flip."""
    padding: NonNegativeInt = 10
    """Largest random shift of an image in each direction, in pixels, over black."""
    erase_probability: Probability = 0.5
    """Probability that a random rectangle is erased (set to the mean colour)."""
    erase_area: ShareRange = (0.02, 0.4)
    """Smallest and largest area of the erased rectangle, as a fraction of the image."""


class FinetuneOptimizerConfig(Section):
    """Adam, with a linear warm-up and steps of the learning rate."""

    lr: PositiveFloat = 3.5e-4
    """Peak learning rate of Adam, reached after the warm-up."""
    weight_decay: NonNegativeFloat = 5e-4
    """Weight decay (L2 penalty) of Adam."""
    warmup_epochs: NonNegativeFloat = 10.0
    """Number of epochs of linear warm-up, from a tenth of the peak learning rate."""
    milestones: tuple[PositiveFloat, ...] = (40.0, 90.0)
    """Epochs after which the learning rate is divided by ten."""
    clip_norm: PositiveFloat | None = None
    """Largest norm of the gradient; larger gradients are scaled down. Default: no clipping."""


class PersonTrainingConfig(Section):
    """Length of the training and composition of the batches."""

    epochs: PositiveInt = 120
    """Number of epochs; one epoch takes as many images as the training set has."""
    num_persons: Annotated[int, Field(ge=2)] = 16
    """Number of persons in a batch."""
    num_images: Annotated[int, Field(ge=2)] = 4
    """Number of images of each person in a batch."""
    num_groups: PositiveInt = 1
    """Number of groups of a batch; batch normalization and triplets stay within a group."""
    last_stride: Annotated[int, Field(ge=1, le=2)] = 1
    """Stride of the last stage of the backbone; 1 doubles the resolution of the feature map."""
    precision: Precision = "auto"
    """Precision of the forward passes; auto is bf16 if the device supports it, otherwise fp32.
    Weights are always fp32."""
    log_every_steps: PositiveInt = 20
    """Training steps between two log entries of the metrics."""

    @property
    def batch_size(self) -> int:
        """Number of images in a training step, over all workers."""
        return self.num_persons * self.num_images


class FinetuneTrainingConfig(PersonTrainingConfig):
    """Length of the training, composition of the batches and loss."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Label smoothing of the identity loss."""
    margin: PositiveFloat = 0.3
    """Margin of the triplet loss."""


class ClusterTrainingConfig(PersonTrainingConfig):
    """Length of the training, composition of the batches and loss."""

    epochs: PositiveInt = 50
    """Number of epochs; each begins with a new clustering."""
    steps_per_epoch: PositiveInt = 200
    """Number of training steps in an epoch, between two clusterings."""
    num_persons: Annotated[int, Field(ge=2)] = 16
    """Number of clusters in a batch; clusters repeat if there are fewer."""
    num_images: Annotated[int, Field(ge=2)] = 16
    """Number of images of each cluster in a batch."""
    temperature: PositiveFloat = 0.05
    """Temperature of the contrastive loss against the cluster centroids."""
    memory_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Momentum of the centroids in memory when an image's feature updates them."""


class ClusteringConfig(Section):
    """DBSCAN clustering on the k-reciprocal Jaccard distance."""

    eps: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Largest distance (0..1) between neighbours; larger values make larger clusters."""
    min_samples: PositiveInt = 4
    """Least number of neighbours of a core point of a cluster, the point itself included."""
    k1: PositiveInt = 30
    """Number of nearest neighbours among which reciprocal ones are searched (k1)."""
    k2: PositiveInt = 6
    """Number of nearest neighbours whose encodings are averaged (k2)."""


class DownstreamConfig(InitConfig):
    """A fine-tuning run."""

    seed: Seed = 0
    """Random seed of the image order, the augmentation, new weights and subsets."""
    data: LabelledDataConfig = LabelledDataConfig()
    """Settings of the images."""
    subset: SubsetConfig = SubsetConfig()
    """Settings of the subset of the training images."""
    augmentation: FinetuneAugmentationConfig = FinetuneAugmentationConfig()
    """Settings of the augmentation."""
    optimizer: FinetuneOptimizerConfig = FinetuneOptimizerConfig()
    """Settings of the optimizer."""
    training: PersonTrainingConfig = PersonTrainingConfig()
    """Settings of the training."""
    evaluation: EvaluationConfig = EvaluationConfig(every_epochs=20)
    """Settings of the evaluation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Settings of the checkpoints."""
    scaling: ScalingConfig = ScalingConfig(num_workers=1)
    """Settings of the workers."""
    run: RunConfig = RunConfig()
    """Settings of storage and names."""

    @property
    def num_groups(self) -> int:
        """Number of groups in a training step, over all workers."""
        return self.training.num_groups

    @model_validator(mode="after")
    def _groups_fill_the_batch(self) -> Self:
        persons, groups = self.training.num_persons, self.training.num_groups
        if persons % groups or persons == groups:
            raise ValueError(
                f"--training.num_groups {groups} must cut the --training.num_persons "
                f"{persons} into equal groups of two or more"
            )
        self.scaling.check_workers(groups, "--training.num_groups")
        return self


class FinetuneConfig(DownstreamConfig):
    """A supervised fine-tuning run."""

    training: FinetuneTrainingConfig = FinetuneTrainingConfig()
    """Settings of the training."""


class ClusterContrastConfig(DownstreamConfig):
    """An unsupervised fine-tuning run."""

    optimizer: FinetuneOptimizerConfig = FinetuneOptimizerConfig(
        warmup_epochs=0, milestones=(20.0, 40.0)
    )
    """Settings of the optimizer."""
    training: ClusterTrainingConfig = ClusterTrainingConfig()
    """Settings of the training."""
    clustering: ClusteringConfig = ClusteringConfig()
    """Settings of the clustering."""


class CompareConfig(Section):
    """A comparison of initializations, frozen and fine-tuned."""

    init: Annotated[tuple[str, ...], Field(min_length=1)]
    """Rows of the comparison: INIT or LABEL=INIT[,INIT...]; the seeds of a row take its
    initializations in turn."""
    splits: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.1, 0.3, 1.0)
    """Fractions of the persons to train on, one column each."""
    seeds: PositiveInt = 3
    """Number of runs for each row and split, which differ in their random seed."""
    min_steps: NonNegativeInt = 0
    """Least number of training steps; the epochs of a split with fewer are multiplied."""
    finetune: FinetuneConfig | ClusterContrastConfig = FinetuneConfig()
    """Settings that all runs share."""

    def flatten(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Yield ``(flag, value)`` of the settings that do not differ between the runs."""
        for path, value in super().flatten(prefix):
            if path not in ("finetune.init", "finetune.subset.persons"):
                yield path.removeprefix("finetune."), value
