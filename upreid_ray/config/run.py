"""Settings that all jobs share: synthetic data, workers, checkpoints, storage."""

from typing import Annotated, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from upreid_ray.config.section import Name, PathOrUri, Pixels, Section, Seed, Share

# Which names there are is known in `core.backbones`, which needs PyTorch.
BackboneName = Annotated[str, Field(pattern=r"^(timm/)?[a-z0-9][A-Za-z0-9._]*$", max_length=80)]


class SyntheticConfig(Section):
    """The synthetic set: drawn people, used when no images are given."""

    seed: Seed = 0
    """Seed of the drawings; each seed draws other people."""
    num_train_identities: PositiveInt = 200
    """Number of people in the train split."""
    num_test_identities: PositiveInt = 60
    """Number of people in the query and gallery splits."""
    num_unlabeled_identities: NonNegativeInt = 600
    """Number of people in the unlabeled split."""
    num_cameras: Annotated[int, Field(ge=2, le=64)] = 4
    """Number of cameras; they differ in light, colour cast, blur, background and crop."""
    images_per_camera: Annotated[int, Field(ge=2)] = 2
    """Number of images that each camera takes of each person."""
    height: Annotated[int, Field(ge=64, le=1024)] = 128
    """Height of the drawn images, in pixels."""
    width: Pixels = 64
    """Width of the drawn images, in pixels."""


class EvaluationConfig(Section):
    """Retrieval scores during training, which decide which backbone is the best."""

    shards: PathOrUri | None = None
    """Folder or URI of shards with query and gallery splits. Default: the training shards."""
    every_epochs: PositiveInt = 10
    """Epochs between two evaluations; the first and the last backbone are always scored."""


class CheckpointConfig(Section):
    """How often the state of training is saved, and how many checkpoints are kept."""

    every_steps: PositiveInt = 1000
    """Training steps between two checkpoints."""
    num_to_keep: PositiveInt = 2
    """Number of checkpoints to keep; each also holds the best backbone so far."""


class ScalingConfig(Section):
    """The worker processes of Ray and the hardware that each reserves."""

    num_workers: PositiveInt = 8
    """Number of worker processes; training uses at most one for each group of a batch."""
    min_workers: PositiveInt | None = None
    """Least number of workers with which training continues after a node is lost. Default:
    num_workers, so that training waits for a replacement."""
    max_workers: PositiveInt | None = None
    """Greatest number of workers, used if the cluster has room. Default: num_workers. On CPUs,
    one CPU must stay free to decode images, or the run hangs."""
    resize_seconds: PositiveFloat = 60.0
    """Seconds between two checks whether more workers fit, up to max_workers."""
    use_gpu: bool = True
    """Whether workers compute on GPUs (with NCCL) or on CPUs (with Gloo)."""
    gpus_per_worker: Share = 1.0
    """Number of GPUs for each worker; a fraction lets several sweep trials share one GPU."""
    cpus_per_worker: PositiveFloat = 1.0
    """Number of CPUs that each worker reserves; the CPUs that are left decode images."""
    threads_per_worker: PositiveInt | None = None
    """Number of threads of each worker on CPUs. Default: an equal share of the cores."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        least, most = self.bounds
        if not least <= self.num_workers <= most:
            raise ValueError(
                f"--scaling.num_workers {self.num_workers} must be from --scaling.min_workers "
                f"{least} to --scaling.max_workers {most}"
            )
        return self

    @property
    def bounds(self) -> tuple[int, int]:
        """Least and greatest number of workers."""
        return self.min_workers or self.num_workers, self.max_workers or self.num_workers

    def check_workers(self, num_groups: int, source: str) -> None:
        """Raise ValueError if there are more workers than groups of a batch.

        The message names ``source``, the flags that decide the number of groups.
        """
        flag = "max" if self.max_workers else "num"
        if self.bounds[1] > num_groups:
            raise ValueError(
                f"--scaling.{flag}_workers {self.bounds[1]} exceeds the {num_groups} groups of "
                f"a batch ({source})"
            )


class JobConfig(Section):
    """Where a job stores its results."""

    name: Name | None = None
    """Name of the run and of its folder. Default: made from the kind of job and the time."""
    storage_path: PathOrUri | None = None
    """Folder or URI that holds all runs. Default: $UPREID_RAY_STORAGE, or ./runs without it."""
    experiment: str = "upreid"
    """Name of the MLflow experiment."""


class RunConfig(JobConfig):
    """Where a run stores its results, and which failures it survives."""

    max_failures: NonNegativeInt = 3
    """Number of times that training restarts from a checkpoint after a worker is lost."""
    max_skipped_steps: NonNegativeInt = 10
    """Number of consecutive steps whose gradient is not finite before the run fails; such steps
    change nothing."""
    register_as: Name | None = None
    """Name of the registered model. Default: made from the name of the backbone."""
