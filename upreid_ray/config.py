"""Every setting of a run, in one frozen tree.

One setting has one name: ``optimizer.lr`` is the flag ``--optimizer.lr``, the key in a sweep,
the MLflow parameter and the path in a checkpoint's ``config.json``.
"""

import difflib
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Annotated, Any, Literal, Self, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

SMALLEST_PATCH = 8  # pixels
CONFIDENTIAL = "confidential"  # type of an error about a value that must not be shown


class InputError(ValueError):
    """What the user gave cannot be used; the message, one line, names the flag or file."""


class RunFailed(RuntimeError):  # noqa: N818, what the user reads is not an error of ours
    """A run cannot go on; the message, one line, says why and what to do next."""


class RunStopped(RunFailed):
    """A run was asked to stop before its end; it can be continued."""


def first_line(error: BaseException) -> str:
    """Return what an error says, as a part of one line."""
    return (str(error).strip() or repr(error)).splitlines()[0][:200]


def _ascending(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        msg = "the first of the two bounds must not exceed the second"
        raise ValueError(msg)
    return bounds


def _plain(value: Any, annotation: Any) -> Any:  # noqa: ANN401, any setting
    """Return a value as pydantic reads it; text may say ``none`` or ``first,second``."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    if not isinstance(value, str):
        return value
    if NoneType in get_args(annotation):
        if value.lower() == "none":
            return None
        annotation = get_args(annotation)[0]
    return value.split(",") if get_origin(annotation) is tuple else value


def _without_secret(uri: str) -> str:
    if "@" in urlsplit(uri).netloc:
        raise PydanticCustomError(
            CONFIDENTIAL,
            "no user or password in a URI, which is logged; give them in the environment",
        )
    return uri


Uri = Annotated[str, AfterValidator(_without_secret)]
Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
ShareRange = Annotated[tuple[Share, Share], AfterValidator(_ascending)]
PositiveRange = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_ascending)]
Color = tuple[Probability, Probability, Probability]
Deviation = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
Jitter = Annotated[float, Field(ge=0, lt=1)]
Pixels = Annotated[int, Field(ge=32, le=1024)]
BackboneName = Literal["resnet18", "resnet34", "resnet50"]
MAX_NAME = 100
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=MAX_NAME)]


class Section(BaseModel):
    """A frozen group of settings that refuses unknown names."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    def flatten(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Yield ``(dotted path, value)`` of every setting, depth first."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Section):
                yield from value.flatten(f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    def override(self, values: Mapping[str, Any]) -> Self:
        """Return a copy with the settings or sections at these dotted paths replaced.

        Args:
            values: Dotted path to new value. Text is read as the setting's type: ``none`` is
                None, and commas separate the members of a tuple.

        Raises:
            InputError: A path is unknown, a value is refused, or the whole is inconsistent.
        """
        tree = self.model_dump()
        for path, value in values.items():
            *parents, name = path.split(".")
            node: Any = tree
            section: Any = self
            for parent in parents:
                node = node.get(parent) if isinstance(node, dict) else None
                section = getattr(section, parent, None)
            if not isinstance(node, dict) or name not in node:
                near = difflib.get_close_matches(path, dict(self.flatten()), n=1)
                hint = f"; did you mean --{near[0]}?" if near else "; see --help"
                msg = f"--{path}: no such setting{hint}"
                raise InputError(msg)
            node[name] = _plain(value, type(section).model_fields[name].annotation)
        return self.parse(tree)

    @classmethod
    def parse(cls, tree: Mapping[str, Any]) -> Self:
        """Validate a nested mapping, such as the parsed JSON of ``model_dump_json``.

        Raises:
            InputError: With the first refused setting, its flag and its value.
        """
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join(str(part) for part in first["loc"] if isinstance(part, str))
            message = first["msg"].removeprefix("Value error, ")
            if not path:
                raise InputError(message) from None
            got = "" if first["type"] == CONFIDENTIAL else f" (got {first['input']!r})"
            msg = f"--{path}: {message[0].lower()}{message[1:]}{got}"
            raise InputError(msg) from None


class SyntheticConfig(Section):
    """The procedurally drawn people that stand in where no data is given."""

    seed: NonNegativeInt = 0
    """Another seed draws other people."""
    num_train_identities: PositiveInt = 200
    """Labelled people of the train split."""
    num_test_identities: PositiveInt = 60
    """Labelled people of the query and gallery splits."""
    num_unlabeled_identities: NonNegativeInt = 600
    """People of the unlabeled split."""
    num_cameras: Annotated[int, Field(ge=2, le=64)] = 4
    """Cameras, which differ in light, colour cast, blur, background and crop."""
    images_per_camera: Annotated[int, Field(ge=2)] = 2
    """Images of one person by one camera."""
    height: Annotated[int, Field(ge=64, le=1024)] = 128
    """Height of the drawings, in pixels."""
    width: Pixels = 64
    """Width of the drawings, in pixels."""


class DataConfig(Section):
    """Which images are read, and at which size."""

    shards: Uri | None = None
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
    pretrained: str | None = None
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


class EvaluationConfig(Section):
    """Retrieval on query and gallery images, which picks the best checkpoint."""

    shards: Uri | None = None
    """Folder or URI with query and gallery splits; none takes those of the training set."""
    every_epochs: PositiveInt = 10
    """Epochs between two evaluations; the untrained and the final backbone are scored too."""


class CheckpointConfig(Section):
    """When the state of training is saved."""

    every_steps: PositiveInt = 1000
    """Steps between two checkpoints."""
    num_to_keep: PositiveInt = 2
    """Newest checkpoints kept; each holds the best backbone so far too."""


class ScalingConfig(Section):
    """The processes that compute."""

    num_workers: PositiveInt = 8
    """Processes; to train, at most the groups of a batch (batch_size / group_size)."""
    min_workers: PositiveInt | None = None
    """Training goes on with this many where a node is lost; none waits for num_workers."""
    max_workers: PositiveInt | None = None
    """Training takes this many where nodes are there; none takes num_workers at most. On CPUs
    it must leave one free: where workers take all, none decodes images and the run hangs."""
    resize_seconds: PositiveFloat = 60.0
    """How often a run of fewer than max_workers looks whether more of them fit."""
    use_gpu: bool = True
    """Processes compute on GPUs (and NCCL); false computes on CPUs (with Gloo)."""
    gpus_per_worker: Share = 1.0
    """GPUs that each process reserves; with a part, several trials of a sweep share one."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs that each process reserves; what it leaves free decodes images."""
    threads_per_worker: PositiveInt | None = None
    """Threads of each process on CPUs; none shares the cores of a machine among them."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        least, most = self.bounds
        if not least <= self.num_workers <= most:
            msg = (
                f"--scaling.num_workers {self.num_workers} must be from --scaling.min_workers "
                f"{least} to --scaling.max_workers {most}"
            )
            raise ValueError(msg)
        return self

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the greatest number of processes that train."""
        return self.min_workers or self.num_workers, self.max_workers or self.num_workers

    def check_workers(self, num_groups: int, source: str) -> None:
        """Refuse more processes than the groups of a batch, which ``source`` decides.

        Raises:
            ValueError: Of one line.
        """
        flag = "max" if self.max_workers else "num"
        if self.bounds[1] > num_groups:
            msg = (
                f"--scaling.{flag}_workers {self.bounds[1]} exceeds the {num_groups} groups of "
                f"a batch ({source})"
            )
            raise ValueError(msg)


class JobConfig(Section):
    """Where a job keeps what it makes."""

    name: Name | None = None
    """Name of the run and of its folder; none makes one from the backbone and the time."""
    storage_path: Uri | None = None
    """Folder or URI of all runs; none takes $UPREID_RAY_STORAGE, else ./runs."""
    experiment: str = "upreid"
    """MLflow experiment."""


class RunConfig(JobConfig):
    """Where the run lives."""

    max_failures: NonNegativeInt = 3
    """Times that training starts again from its last checkpoint after a worker was lost."""
    max_skipped_steps: NonNegativeInt = 10
    """Steps in a row without a finite gradient, which change nothing, that a run survives."""
    register_as: Name | None = None
    """Name of the registered model; none makes it from the backbone (upreid-resnet50)."""


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
            msg = (
                f"--training.group_size {group_size} must divide --training.batch_size "
                f"{batch_size}"
            )
            raise ValueError(msg)
        self.scaling.check_workers(
            self.num_groups,
            f"--training.batch_size {batch_size} / --training.group_size {group_size}",
        )
        return self

    @model_validator(mode="after")
    def _workers_have_gpus_of_their_own(self) -> Self:
        if self.scaling.num_workers > 1 and self.scaling.gpus_per_worker < 1:
            msg = (
                f"--scaling.gpus_per_worker {self.scaling.gpus_per_worker:g}: the "
                f"{self.scaling.num_workers} workers of a run cannot share a GPU, only "
                "runs with --scaling.num_workers 1 can"
            )
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _patches_can_be_cut(self) -> Self:
        if self.loss.intrinsic_weight == 0:
            return self
        rows, columns = self.patches.rows, self.patches.columns
        if rows * columns == 1 or (self.patches.mining == "symmetry" and rows == 1):
            msg = (
                f"--patches.rows {rows} --patches.columns {columns} leaves no negatives for "
                f"--patches.mining {self.patches.mining}"
            )
            raise ValueError(msg)
        if min(self.data.height // rows, self.data.width // columns) < SMALLEST_PATCH:
            msg = (
                f"--patches.rows {rows} --patches.columns {columns} makes patches of less than "
                f"{SMALLEST_PATCH} pixels from images of {self.data.height}x{self.data.width}"
            )
            raise ValueError(msg)
        return self


class SearchConfig(Section):
    """How a sweep looks for the best settings."""

    num_trials: PositiveInt = 16
    """Points to try; the values of grid(...) come on top, each with every point."""
    num_seeds: PositiveInt = 1
    """Trials of each point, with the seeds --seed, --seed + 1, ..."""
    searcher: Literal["random", "tpe"] = "random"
    """Draw points at random, or near good ones (Optuna's TPE)."""
    scheduler: Literal["asha", "none"] = "asha"
    """Stop trials that are behind at a rung (ASHA), or none."""
    grace_epochs: PositiveInt | None = None
    """Epochs before a trial may be stopped; none takes --evaluation.every_epochs."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """One trial of this many goes on at a rung; the next rung is this many times as far."""
    trial_epochs: PositiveInt | None = None
    """Length of a trial, its schedules included; none takes --training.epochs."""
    max_concurrent: PositiveInt | None = None
    """Trials at a time; none takes as many as the cluster holds."""
    retrain: bool = False
    """Train the best point again, for --training.epochs, and register that."""


class LabelledDataConfig(Section):
    """A set of persons and cameras, and the form in which a backbone sees its images."""

    root: Uri | None = None
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

    init: str = "random"
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

    init: str = "random"
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
            msg = (
                f"--training.num_groups {groups} must cut the --training.num_persons "
                f"{persons} into equal groups of two or more"
            )
            raise ValueError(msg)
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
