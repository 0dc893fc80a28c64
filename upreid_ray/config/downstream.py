"""Settings of what is done with a pre-trained backbone."""

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
    Probability,
    Section,
    Share,
    ShareRange,
)


class LabelledDataConfig(Section):
    """A set of persons and cameras, and the form in which a backbone sees its images."""

    root: PathOrUri | None = None
    """Folder in a labelled layout, or folder or URI of shards; none draws the synthetic set."""
    synthetic: SyntheticConfig = SyntheticConfig()
    """The synthetic set that is drawn where no root is given."""
    height: Pixels | None = None
    """Height to which images are resized; none takes that of the pre-training, else 256."""
    width: Pixels | None = None
    """Width to which images are resized; none takes that of the pre-training, else 128."""
    mean: Color | None = None
    """Mean of each colour channel; none takes that of the pre-training, else ImageNet's."""
    std: Deviation | None = None
    """Deviation of each channel; none takes that of the pre-training, else ImageNet's."""


class EvaluateConfig(Section):
    """A frozen backbone scored by retrieval."""

    init: Init = RANDOM
    """models:/NAME@ALIAS or /VERSION, a checkpoint folder, a file of weights, or random."""
    backbone: BackboneName = "resnet50"
    """Architecture of a random initialisation."""
    seed: NonNegativeInt = 0
    """Of a random initialisation."""
    rerank: bool = False
    """Score k-reciprocal re-ranking too."""
    data: LabelledDataConfig = LabelledDataConfig()
    """Images."""
    scaling: ScalingConfig = ScalingConfig(num_workers=1, use_gpu=False)
    """Actors that compute features."""
    run: JobConfig = JobConfig()
    """Storage and names."""


class SubsetConfig(Section):
    """A part of the training images, for experiments with few labels."""

    persons: Share = 1.0
    """Share of the persons; a smaller share is a part of each larger one."""
    images: Share = 1.0
    """Share of the images of each person, one at least; nested like persons."""


class FinetuneAugmentationConfig(Section):
    """How a view is drawn from an image."""

    flip_probability: Probability = 0.5
    """Probability of a left-right flip."""
    padding: NonNegativeInt = 10
    """Pixels by which the image is shifted at most, over black."""
    erase_probability: Probability = 0.5
    """Probability that a rectangle is set to the mean colour."""
    erase_area: ShareRange = (0.02, 0.4)
    """Area of the rectangle, as a share of the view."""


class FinetuneOptimizerConfig(Section):
    """Adam with warm-up and steps."""

    lr: PositiveFloat = 3.5e-4
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 5e-4
    """Weight decay of Adam."""
    warmup_epochs: NonNegativeFloat = 10.0
    """Epochs of linear warm-up from a tenth of the peak."""
    milestones: tuple[PositiveFloat, ...] = (40.0, 90.0)
    """Epochs after which the learning rate falls to a tenth."""
    clip_norm: PositiveFloat | None = None
    """A gradient of a greater norm is scaled down to it; none leaves gradients as they are."""


class PersonTrainingConfig(Section):
    """How long and how large."""

    epochs: PositiveInt = 120
    """Passes over the data, counted in images."""
    num_persons: Annotated[int, Field(ge=2)] = 16
    """Persons of a batch."""
    num_images: Annotated[int, Field(ge=2)] = 4
    """Images of each person of a batch."""
    num_groups: PositiveInt = 1
    """Groups of a batch, each with batch normalization and triplets of its own."""
    last_stride: Annotated[int, Field(ge=1, le=2)] = 1
    """Of the last stage of the backbone; 1 keeps the resolution."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the forward passes; auto is bf16 where the device multiplies it. Weights stay fp32."""
    log_every_steps: PositiveInt = 20
    """Steps between two entries of the training metrics."""

    @property
    def batch_size(self) -> int:
        """Images of one step, over all workers."""
        return self.num_persons * self.num_images


class FinetuneTrainingConfig(PersonTrainingConfig):
    """How long, how large, and against what."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of the identity loss."""
    margin: PositiveFloat = 0.3
    """Of the triplet loss."""


class ClusterTrainingConfig(PersonTrainingConfig):
    """How long, how large, and against what."""

    epochs: PositiveInt = 50
    """Rounds of clustering and training."""
    steps_per_epoch: PositiveInt = 200
    """Steps between two clusterings."""
    num_persons: Annotated[int, Field(ge=2)] = 16
    """Clusters of a batch; where there are fewer, they come repeatedly."""
    num_images: Annotated[int, Field(ge=2)] = 16
    """Images of each cluster of a batch."""
    temperature: PositiveFloat = 0.05
    """Of the contrast with the clusters."""
    memory_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share that a cluster in memory keeps when it takes in the feature of an image."""


class ClusteringConfig(Section):
    """DBSCAN on the k-reciprocal Jaccard distance."""

    eps: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Distance (0..1) up to which two images are neighbours; larger makes larger clusters."""
    min_samples: PositiveInt = 4
    """Neighbours, the image itself included, from which on an image founds a cluster."""
    k1: PositiveInt = 30
    """Neighbours among which reciprocal ones are looked for."""
    k2: PositiveInt = 6
    """Nearest images whose descriptions are averaged."""


class DownstreamConfig(Section):
    """A run that starts from an initialization and learns persons."""

    init: Init = RANDOM
    """models:/NAME@ALIAS or /VERSION, a checkpoint folder, a file of weights, or random."""
    backbone: BackboneName = "resnet50"
    """Architecture of a random initialisation."""
    seed: NonNegativeInt = 0
    """Of the order of images, augmentation, new weights and subsets."""
    data: LabelledDataConfig = LabelledDataConfig()
    """Images."""
    subset: SubsetConfig = SubsetConfig()
    """Part of the training images."""
    augmentation: FinetuneAugmentationConfig = FinetuneAugmentationConfig()
    """Views."""
    optimizer: FinetuneOptimizerConfig = FinetuneOptimizerConfig()
    """Optimizer."""
    training: PersonTrainingConfig = PersonTrainingConfig()
    """Length and batch."""
    evaluation: EvaluationConfig = EvaluationConfig(every_epochs=20)
    """Retrieval."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    scaling: ScalingConfig = ScalingConfig(num_workers=1)
    """Workers."""
    run: RunConfig = RunConfig()
    """Storage and names."""

    @property
    def num_groups(self) -> int:
        """Groups of one step, over all workers."""
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
    """Length, batch and objective."""


class ClusterContrastConfig(DownstreamConfig):
    """An unsupervised fine-tuning run."""

    optimizer: FinetuneOptimizerConfig = FinetuneOptimizerConfig(
        warmup_epochs=0, milestones=(20.0, 40.0)
    )
    """Optimizer."""
    training: ClusterTrainingConfig = ClusterTrainingConfig()
    """Length, batch and objective."""
    clustering: ClusteringConfig = ClusteringConfig()
    """Pseudo-persons."""


class CompareConfig(Section):
    """A comparison of initializations."""

    init: Annotated[tuple[str, ...], Field(min_length=1)]
    """Rows: INIT, or LABEL=INIT[,INIT...] where seed k starts from the k-th init in turn."""
    splits: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.1, 0.3, 1.0)
    """Shares of the persons whose images are trained on."""
    seeds: PositiveInt = 3
    """Runs of each row and split; they differ in order, augmentation and persons."""
    min_steps: NonNegativeInt = 0
    """Splits of fewer steps than this have all their epochs multiplied until they reach it."""
    finetune: FinetuneConfig | ClusterContrastConfig = FinetuneConfig()
    """What the runs have in common."""

    def flatten(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Yield the settings under the names of their flags; those of each run are left out."""
        for path, value in super().flatten(prefix):
            if path not in ("finetune.init", "finetune.subset.persons"):
                yield path.removeprefix("finetune."), value
