"""Settings that every kind of run has: synthetic data, workers, checkpoints, storage."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from upreid_ray.config.section import Name, PathOrUri, Pixels, Section, Share

BackboneName = Literal["resnet18", "resnet34", "resnet50"]


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


class EvaluationConfig(Section):
    """Retrieval on query and gallery images, which picks the best checkpoint."""

    shards: PathOrUri | None = None
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
            raise ValueError(
                f"--scaling.num_workers {self.num_workers} must be from --scaling.min_workers "
                f"{least} to --scaling.max_workers {most}"
            )
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
            raise ValueError(
                f"--scaling.{flag}_workers {self.bounds[1]} exceeds the {num_groups} groups of "
                f"a batch ({source})"
            )


class JobConfig(Section):
    """Where a job keeps what it makes."""

    name: Name | None = None
    """Name of the run and of its folder; none makes one from the backbone and the time."""
    storage_path: PathOrUri | None = None
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
