"""Training images of persons: the images that a run uses, and their batches.

This module does not import torch, which would add seconds to the start of each task process.

Dimensions: N images, P persons in a batch, K images of a person in a batch, B = P * K images
in a batch, n images in a block, H x W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from upreid_ray.config.downstream import (
    ClusterContrastConfig,
    DownstreamConfig,
    FinetuneConfig,
    PersonTrainingConfig,
)
from upreid_ray.config.errors import InputError
from upreid_ray.core.groups import groups_of_workers
from upreid_ray.data.shards.manifest import TRAIN_SPLITS
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.data.stream.decode import Columns, decode_images, replacements
from upreid_ray.data.stream.ray_data import MIN_BLOCK_IMAGES, join_groups

Indices = NDArray[np.int64]


def subset(pids: Indices, *, persons: float, images: float, seed: int) -> Indices:
    """Choose images for an experiment with few labels.

    Subsets are nested: the images of a smaller fraction are among those of a larger one.

    Args:
        pids: Person of each image, ``[N]``.
        persons: Fraction (0..1] of the persons; at least two persons are chosen.
        images: Fraction (0..1] of the images of each person; at least one is chosen.
        seed: Seed of both choices.

    Returns:
        Sorted indices of the chosen images.
    """
    draw = np.random.default_rng(seed)
    everyone = draw.permutation(np.unique(pids))
    chosen = everyone[: max(2, round(persons * len(everyone)))]
    order = draw.permutation(len(pids))
    rows = []
    for pid in chosen:
        of_person = order[pids[order] == pid]
        rows.append(of_person[: max(1, round(images * len(of_person)))])
    return np.sort(np.concatenate(rows))


class PersonSampler:
    """Batches of P persons with K images each, as a pure function of the step.

    A pass is a random order of the persons, cut into whole batches. Some images of a person
    with fewer than K images are repeated.

    Raises:
        ValueError: There are fewer than P persons.
    """

    def __init__(self, pids: Indices, *, num_persons: int, num_images: int, seed: int) -> None:
        order = np.argsort(pids, kind="stable")
        _, starts = np.unique(pids[order], return_index=True)
        self._images_of_person = np.split(order, starts[1:])
        self._num_persons = num_persons
        self._num_images = num_images
        self._seed = seed
        self._batches_per_pass = len(self._images_of_person) // num_persons
        if self._batches_per_pass == 0:
            raise ValueError(
                f"{num_persons} persons a batch, but there are {len(self._images_of_person)}"
            )

    def indices(self, step: int) -> Indices:
        """Return the image indices ``[B]`` of a step's batch, those of a person together."""
        number, place = divmod(step, self._batches_per_pass)
        order = np.random.default_rng((self._seed, number)).permutation(
            len(self._images_of_person)
        )
        draw = np.random.default_rng((self._seed, number, place))
        persons = order[place * self._num_persons : (place + 1) * self._num_persons]
        return np.concatenate([self._draw(self._images_of_person[p], draw) for p in persons])

    def _draw(self, images: Indices, draw: np.random.Generator) -> Indices:
        """Draw K indices, each of them once before any of them twice."""
        num_times = -(-self._num_images // len(images))
        drawn = np.concatenate([draw.permutation(images) for _ in range(num_times)])
        return drawn[: self._num_images]


@dataclass(frozen=True)
class PersonBlock:
    """Images that one task decodes: those of one group in some steps."""

    first_step: int
    num_steps: int
    group: int
    num_images: int

    def __len__(self) -> int:
        """Return the number of images."""
        return self.num_images


class PersonBatches:
    """The batches of a run, cut into blocks that tasks decode.

    Attributes:
        steps_per_block: Number of steps whose images a task decodes at once.
    """

    def __init__(
        self,
        labels: Indices,
        training: PersonTrainingConfig,
        *,
        size: tuple[int, int],
        seed: int,
    ) -> None:
        """Make batches of images that have a label.

        Args:
            labels: Person of each image, ``[N]``, counted from 0; images with -1 are in no
                batch. If there are fewer than P persons, a batch repeats images.
            training: Settings with P, K and the number of groups of a batch.
            size: Height H and width W.
            seed: Seed of the order.
        """
        self._labels, self._size = labels, size
        self._labelled = np.flatnonzero(labels >= 0)
        self._sampler = PersonSampler(
            labels[self._labelled],
            num_persons=min(training.num_persons, int(labels.max()) + 1),
            num_images=training.num_images,
            seed=seed,
        )
        self._batch_size, self._num_groups = training.batch_size, training.num_groups
        self._group_size = training.batch_size // training.num_groups
        self.steps_per_block = -(-MIN_BLOCK_IMAGES // self._group_size)

    def indices(self, step: int) -> Indices:
        """Return the image indices ``[B]`` of a step's batch."""
        return self._labelled[np.resize(self._sampler.indices(step), self._batch_size)]

    def rounds(
        self, start_step: int, stop_step: int, num_workers: int
    ) -> list[list[list[PersonBlock]]]:
        """Cut these steps into rounds; return the blocks of each worker for each round."""
        return [
            [
                [PersonBlock(step, num_steps, g, num_steps * self._group_size) for g in part]
                for part in groups_of_workers(self._num_groups, num_workers)
            ]
            for step, num_steps in self._cuts(start_step, stop_step)
        ]

    def read(self, encoded: pa.Table, block: PersonBlock) -> Columns:
        """Decode a block.

        Args:
            encoded: Encoded images that the run uses, from `ChosenImages.encoded`.
            block: Block, from `rounds`.

        Returns:
            ``image``, uint8 ``[n, 3, H, W]``, ``label`` ``[n]``, ``decoded``, bool ``[n]``, and
            ``shard`` ``[n]``, the place of the shard in the manifest. An image that does not
            decode is replaced, with its label, by another one of the block.
        """
        group = slice(block.group * self._group_size, (block.group + 1) * self._group_size)
        rows = np.concatenate(
            [self.indices(block.first_step + i)[group] for i in range(block.num_steps)]
        )
        chosen = encoded.take(pa.array(rows))
        columns = decode_images(chosen.column("image"), *self._size)
        columns["label"] = self._labels[rows][replacements(columns["decoded"])]
        columns["shard"] = chosen.column("shard").to_numpy()
        return columns

    def batches(
        self,
        start_step: int,
        stop_step: int,
        blocks: Iterator[Columns],
        *,
        rank: int = 0,
        num_workers: int = 1,
    ) -> Iterator[Columns]:
        """Yield the columns that `read` returns, of one worker's part of each step's batch."""
        groups = groups_of_workers(self._num_groups, num_workers)[rank]
        for _, num_steps in self._cuts(start_step, stop_step):
            mine = [next(blocks) for _ in groups]
            yield from join_groups(mine, num_steps, self._group_size)

    def _cuts(self, start_step: int, stop_step: int) -> Iterator[tuple[int, int]]:
        """Yield first step and number of steps of each part that is large enough for a task."""
        for step in range(start_step, stop_step, self.steps_per_block):
            yield step, min(self.steps_per_block, stop_step - step)


class ChosenImages:
    """The training images of a set that a run uses.

    Attributes:
        row_groups: Row groups of all training images.
        num_images: Number of these images.
        num_blocks: Number of blocks that `read` can return.

    Raises:
        InputError: There are no images, or persons are unknown and only some are wanted.
    """

    def __init__(
        self,
        shards: ShardSet,
        config: DownstreamConfig,
        *,
        splits: Sequence[str],
        height: int,
        width: int,
    ) -> None:
        self._size = (height, width)
        self.row_groups = shards.row_groups(splits)
        if self.row_groups.num_images == 0:
            raise InputError(f"{shards.uri}: has no {' or '.join(splits)} images")
        column = self.row_groups.read_all(["pid"]).column("pid")
        fractions = config.subset
        if not column.null_count:
            pids = column.to_numpy().astype(np.int64)
            self._chosen = subset(
                pids, persons=fractions.persons, images=fractions.images, seed=config.seed
            )
            self._pids = pids[self._chosen]
        elif fractions.persons == fractions.images == 1:
            self._chosen = np.arange(len(column))
            self._pids = np.full(len(column), -1)
        else:
            raise InputError(
                f"--subset.persons {fractions.persons} --subset.images {fractions.images}: "
                f"{column.null_count} of the images of {shards.uri} have no person"
            )
        self.num_images = len(self._chosen)
        self.num_blocks = -(-self.num_images // MIN_BLOCK_IMAGES)

    def encoded(self) -> pa.Table:
        """Read the encoded images and the places of their shards, for `PersonBatches.read`."""
        ranges = self.row_groups.ranges(0, self.row_groups.num_images)
        table, shards = self.row_groups.read_intact(ranges, ["image"])
        # Rows of more than 2 GiB cannot be taken from Arrow's small binary columns.
        table = table.cast(pa.schema({"image": pa.large_binary()}))
        return table.append_column("shard", pa.array(shards)).take(pa.array(self._chosen))

    def keys(self, images: Indices) -> list[str]:
        """Return the keys of the images with these indices."""
        names = self.row_groups.read_all(["key"]).column("key")
        keys: list[str] = names.take(pa.array(self._chosen[images])).to_pylist()
        return keys

    def read(self, number: int) -> Columns:
        """Read and decode block ``number`` of the images, in their order.

        Returns:
            ``image``, uint8 ``[n, 3, H, W]``; ``row`` ``[n]``, 0 to ``num_images - 1``;
            ``decoded``, bool ``[n]``; and ``shard`` ``[n]``, the place of the shard in the
            manifest. An image that does not decode is replaced by another one of the block.
        """
        first = number * MIN_BLOCK_IMAGES
        chosen = self._chosen[first : first + MIN_BLOCK_IMAGES]
        ranges = self.row_groups.ranges(chosen[0], chosen[-1] + 1)
        table, shards = self.row_groups.read_intact(ranges, ["image"])
        rows = chosen - chosen[0]
        columns = decode_images(table.column("image").take(pa.array(rows)), *self._size)
        columns["row"] = np.arange(first, first + len(rows))
        columns["shard"] = shards[rows]
        return columns


class PersonImages(ChosenImages):
    """The training images of a labelled set, in batches of persons.

    Attributes:
        num_persons: Number of persons.
        steps_per_epoch: Number of steps that take as many images as the run uses.
        batches: Batches of the whole run.

    Raises:
        InputError: There are no images, some have no person, or there are fewer than P persons.
    """

    def __init__(
        self, shards: ShardSet, config: FinetuneConfig, *, height: int, width: int
    ) -> None:
        super().__init__(shards, config, splits=("train",), height=height, width=width)
        if self._pids.min() < 0:
            raise InputError(f"{shards.uri}: has train images without a person")
        persons, labels = np.unique(self._pids, return_inverse=True)
        self.num_persons = len(persons)
        training = config.training
        if self.num_persons < training.num_persons:
            raise InputError(
                f"--training.num_persons {training.num_persons}: exceeds the "
                f"{self.num_persons} persons of {shards.uri} that take part"
            )
        self.steps_per_epoch = max(1, self.num_images // training.batch_size)
        self.batches = PersonBatches(labels, training, size=self._size, seed=config.seed)


class ClusterImages(ChosenImages):
    """The training images of a set whose labels are not used.

    They are the images of the split ``train``, or of ``unlabeled`` if ``train`` has none.

    Attributes:
        steps_per_epoch: Number of steps between two clusterings.
    """

    def __init__(
        self,
        shards: ShardSet,
        config: ClusterContrastConfig,
        *,
        height: int,
        width: int,
    ) -> None:
        counts = shards.manifest.counts()
        split = next((s for s in TRAIN_SPLITS if counts.get(s)), TRAIN_SPLITS[0])
        super().__init__(shards, config, splits=(split,), height=height, width=width)
        self._config = config
        self.steps_per_epoch = config.training.steps_per_epoch

    def batches(self, labels: Indices) -> PersonBatches:
        """Return the batches of pseudo-persons ``labels [N]``, -1 for outliers."""
        return PersonBatches(
            labels, self._config.training, size=self._size, seed=self._config.seed
        )


# The class of the settings decides the method, and with it the images.
IMAGES: dict[type[DownstreamConfig], Callable[..., PersonImages | ClusterImages]] = {
    FinetuneConfig: PersonImages,
    ClusterContrastConfig: ClusterImages,
}
