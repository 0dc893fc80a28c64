"""Training images of persons: which of them take part, and in which batches.

Nothing here imports torch: that would add seconds to the start of each task process.

Dimensions: N images, P persons of a batch, K images of a person in it, H x W pixels.
"""

from collections.abc import Iterator, Sequence
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
from upreid_ray.data.stream.decode import Columns, decode_images
from upreid_ray.data.stream.ray_data import MIN_BLOCK_IMAGES

Rows = NDArray[np.int64]


def subset(pids: Rows, *, persons: float, images: float, seed: int) -> Rows:
    """Choose images for an experiment with few labels; smaller shares are parts of larger ones.

    Args:
        pids: ``[N]``.
        persons: Share (0..1] of the persons; two at least.
        images: Share (0..1] of the images of each person; one at least.
        seed: Of both choices.

    Returns:
        Sorted rows of the images that take part.
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

    A round is a random order of the persons, cut into whole batches. A person with fewer than
    K images shows some of them repeatedly.

    Raises:
        ValueError: There are fewer than P persons.
    """

    def __init__(self, pids: Rows, *, num_persons: int, num_images: int, seed: int) -> None:
        order = np.argsort(pids, kind="stable")
        _, starts = np.unique(pids[order], return_index=True)
        self._rows_of_person = np.split(order, starts[1:])
        self._num_persons = num_persons
        self._num_images = num_images
        self._seed = seed
        self._batches_per_round = len(self._rows_of_person) // num_persons
        if self._batches_per_round == 0:
            raise ValueError(
                f"{num_persons} persons a batch, but there are {len(self._rows_of_person)}"
            )

    def rows(self, step: int) -> Rows:
        """Return the rows ``[P * K]`` of the batch of a step, those of a person together."""
        number, place = divmod(step, self._batches_per_round)
        order = np.random.default_rng((self._seed, number)).permutation(
            len(self._rows_of_person)
        )
        draw = np.random.default_rng((self._seed, number, place))
        persons = order[place * self._num_persons : (place + 1) * self._num_persons]
        return np.concatenate([self._draw(self._rows_of_person[p], draw) for p in persons])

    def _draw(self, rows: Rows, draw: np.random.Generator) -> Rows:
        """Draw K rows, each of them once before any of them twice."""
        num_times = -(-self._num_images // len(rows))
        drawn = np.concatenate([draw.permutation(rows) for _ in range(num_times)])
        return drawn[: self._num_images]


@dataclass(frozen=True)
class PersonBlock:
    """What one task decodes: the images of one group in some steps."""

    first_step: int
    num_steps: int
    group: int
    num_images: int

    def __len__(self) -> int:
        """Count the images."""
        return self.num_images


class PersonBatches:
    """The batches of a run, cut into blocks that tasks decode.

    Attributes:
        steps_per_block: Steps that a task decodes at once.
    """

    def __init__(
        self,
        labels: Rows,
        training: PersonTrainingConfig,
        *,
        size: tuple[int, int],
        seed: int,
    ) -> None:
        """Make batches of images that have a label.

        Args:
            labels: ``[N]``, persons from 0 on; who has -1 is in no batch. Where there are fewer
                persons than a batch has, it shows its images repeatedly.
            training: Says how many persons and images a batch has.
            size: H and W.
            seed: Of the order.
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

    def rows(self, step: int) -> Rows:
        """Return the rows ``[B]`` of the batch of a step."""
        return self._labelled[np.resize(self._sampler.rows(step), self._batch_size)]

    def rounds(
        self, start_step: int, stop_step: int, num_workers: int
    ) -> list[list[list[PersonBlock]]]:
        """Cut these steps into rounds; return of each the blocks of each worker."""
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
            encoded: The images that take part.
            block: From `rounds`.

        Returns:
            ``image``, uint8 ``[n, 3, H, W]``, and ``label`` ``[n]``.

        Raises:
            ValueError: An image does not decode.
        """
        group = slice(block.group * self._group_size, (block.group + 1) * self._group_size)
        rows = np.concatenate(
            [self.rows(block.first_step + i)[group] for i in range(block.num_steps)]
        )
        images = _decode_whole(encoded.take(pa.array(rows)), self._size)
        return {"image": images, "label": self._labels[rows]}

    def batches(
        self,
        start_step: int,
        stop_step: int,
        blocks: Iterator[Columns],
        *,
        rank: int = 0,
        num_workers: int = 1,
    ) -> Iterator[Columns]:
        """Yield one worker's ``image`` and ``label`` of each step, from its blocks in order."""
        groups, size = groups_of_workers(self._num_groups, num_workers)[rank], self._group_size
        for _, num_steps in self._cuts(start_step, stop_step):
            mine = [next(blocks) for _ in groups]
            for start in range(0, num_steps * size, size):
                yield {
                    name: np.concatenate([block[name][start : start + size] for block in mine])
                    for name in ("image", "label")
                }

    def _cuts(self, start_step: int, stop_step: int) -> Iterator[tuple[int, int]]:
        """Cut steps into parts that are worth a task."""
        for step in range(start_step, stop_step, self.steps_per_block):
            yield step, min(self.steps_per_block, stop_step - step)


class ChosenImages:
    """The training images of a set that take part in a run.

    Attributes:
        num_images: That take part.
        num_blocks: Of `read`.

    Raises:
        InputError: There are none, or persons are to be chosen who are unknown.
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
        self._groups = shards.row_groups(splits)
        if self._groups.num_images == 0:
            raise InputError(f"{shards.uri}: has no {' or '.join(splits)} images")
        column = self._groups.read_all(["pid"]).column("pid")
        share = config.subset
        if not column.null_count:
            pids = column.to_numpy().astype(np.int64)
            self._chosen = subset(
                pids, persons=share.persons, images=share.images, seed=config.seed
            )
            self._pids = pids[self._chosen]
        elif share.persons == share.images == 1:
            self._chosen = np.arange(len(column))
            self._pids = np.full(len(column), -1)
        else:
            raise InputError(
                f"--subset.persons {share.persons} --subset.images {share.images}: "
                f"{column.null_count} of the images of {shards.uri} have no person"
            )
        self.num_images = len(self._chosen)
        self.num_blocks = -(-self.num_images // MIN_BLOCK_IMAGES)

    def encoded(self) -> pa.Table:
        """Read the encoded images that take part, for `PersonBatches.read`."""
        table = self._groups.read_all(["image"])
        # Rows of more than 2 GiB cannot be taken from Arrow's small binary columns.
        return table.cast(pa.schema({"image": pa.large_binary()})).take(pa.array(self._chosen))

    def keys(self, rows: Rows) -> list[str]:
        """Return the names of some of the images that take part."""
        names = self._groups.read_all(["key"]).column("key")
        keys: list[str] = names.take(pa.array(self._chosen[rows])).to_pylist()
        return keys

    def read(self, number: int) -> Columns:
        """Read and decode block ``number`` of the images that take part, in their order.

        Returns:
            ``image``, uint8 ``[n, 3, H, W]``, and ``row`` ``[n]``, 0 to ``num_images - 1``.

        Raises:
            ValueError: An image does not decode.
        """
        first = number * MIN_BLOCK_IMAGES
        chosen = self._chosen[first : first + MIN_BLOCK_IMAGES]
        ranges = self._groups.ranges(chosen[0], chosen[-1] + 1)
        table = self._groups.read(ranges, ["image"])
        images = _decode_whole(table.take(pa.array(chosen - chosen[0])), self._size)
        return {"image": images, "row": np.arange(first, first + len(images))}


class PersonImages(ChosenImages):
    """The training images of a labelled set, in batches of persons.

    Attributes:
        num_persons: That take part.
        steps_per_epoch: After which as many images were seen as take part.
        batches: Of the whole run.

    Raises:
        InputError: There are none, some have no person, or there are fewer than a batch has.
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
    """The training images of a set whose persons are not looked at.

    These are the images of the split ``train``, or ``unlabeled`` where there are none.

    Attributes:
        steps_per_epoch: Between two clusterings.
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

    def batches(self, labels: Rows) -> PersonBatches:
        """Return the batches of pseudo-persons ``labels [N]``, -1 for outliers."""
        return PersonBatches(
            labels, self._config.training, size=self._size, seed=self._config.seed
        )


def _decode_whole(encoded: pa.Table, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Decode images all of which must be whole, ``[n, 3, H, W]``."""
    columns = decode_images(encoded.column("image"), *size)
    if not columns["decoded"].all():
        raise ValueError("an image that was whole when it was prepared does not decode")
    return columns["image"]
