"""Labelled training images: which of them take part, and in which batches.

Nothing here imports torch: that would add seconds to the start of each task process.

Dimensions: N images, P persons of a batch, K images of a person in it, H x W pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from upreid_ray.config import FinetuneConfig, InputError
from upreid_ray.data.shards import Manifest
from upreid_ray.data.stream import MIN_BLOCK_IMAGES, Columns, RowGroups, decode, read_rows

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
            msg = f"{num_persons} persons a batch, but there are {len(self._rows_of_person)}"
            raise ValueError(msg)

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


class PersonImages:
    """The training images of a labelled set, in batches of persons.

    Attributes:
        num_images: That take part.
        num_persons: That take part.
        steps_per_epoch: After which as many images were seen as take part.
        steps_per_block: Steps that a task decodes at once.

    Raises:
        InputError: There are none, some have no person, or there are fewer than a batch has.
    """

    def __init__(
        self, uri: str, manifest: Manifest, config: FinetuneConfig, *, height: int, width: int
    ) -> None:
        self._uri = uri
        self._config = config
        self._size = (height, width)
        groups = RowGroups(manifest, ("train",))
        if groups.num_images == 0:
            msg = f"{uri}: has no train images with labels"
            raise InputError(msg)
        self._ranges = groups.ranges(np.arange(len(groups)), 0, groups.num_images)
        column = read_rows(uri, self._ranges, ["pid"]).column("pid")
        if column.null_count:
            msg = f"{uri}: {column.null_count} train images have no person"
            raise InputError(msg)
        pids = column.to_numpy().astype(np.int64)
        share = config.subset
        self._chosen = subset(
            pids, persons=share.persons, images=share.images, seed=config.seed
        )
        persons, self._labels = np.unique(pids[self._chosen], return_inverse=True)
        self.num_images, self.num_persons = len(self._chosen), len(persons)
        training = config.training
        if self.num_persons < training.num_persons:
            msg = (
                f"--training.num_persons {training.num_persons}: exceeds the "
                f"{self.num_persons} persons of {uri} that take part"
            )
            raise InputError(msg)
        self._sampler = PersonSampler(
            self._labels,
            num_persons=training.num_persons,
            num_images=training.num_images,
            seed=config.seed,
        )
        self.steps_per_epoch = max(1, self.num_images // training.batch_size)
        self._group_size = training.batch_size // training.num_groups
        self.steps_per_block = -(-MIN_BLOCK_IMAGES // self._group_size)

    def encoded(self) -> pa.Table:
        """Read the encoded images that take part, for `read`."""
        return read_rows(self._uri, self._ranges, ["image"]).take(pa.array(self._chosen))

    def keys(self, step: int) -> list[str]:
        """Return the names of the images of a step's batch, in order."""
        names = read_rows(self._uri, self._ranges, ["key"]).column("key")
        keys: list[str] = names.take(
            pa.array(self._chosen[self._sampler.rows(step)])
        ).to_pylist()
        return keys

    def blocks(self, start_step: int, stop_step: int, num_workers: int) -> list[PersonBlock]:
        """Return the blocks of these steps such that block ``i`` is of worker ``i % W``."""
        each = self._config.training.num_groups // num_workers
        return [
            PersonBlock(step, num_steps, worker * each + place)
            for step, num_steps in self._cuts(start_step, stop_step)
            for place in range(each)
            for worker in range(num_workers)
        ]

    def read(self, encoded: pa.Table, block: PersonBlock) -> Columns:
        """Decode a block.

        Returns:
            ``image``, uint8 ``[n, 3, H, W]``, and ``label`` ``[n]``, persons from 0 on.

        Raises:
            ValueError: An image does not decode.
        """
        group = slice(block.group * self._group_size, (block.group + 1) * self._group_size)
        rows = np.concatenate(
            [self._sampler.rows(block.first_step + i)[group] for i in range(block.num_steps)]
        )
        images = encoded.column("image").take(pa.array(rows))
        columns = decode(images, *self._size)
        if not columns.pop("decoded").all():
            msg = f"{self._uri}: an image that was whole when it was prepared does not decode"
            raise ValueError(msg)
        return {**columns, "label": self._labels[rows]}

    def batches(
        self, start_step: int, stop_step: int, blocks: Iterator[Columns], num_workers: int
    ) -> Iterator[Columns]:
        """Yield one worker's ``image`` and ``label`` of each step, from its blocks in order."""
        each, size = self._config.training.num_groups // num_workers, self._group_size
        for _, num_steps in self._cuts(start_step, stop_step):
            mine = [next(blocks) for _ in range(each)]
            for start in range(0, num_steps * size, size):
                yield {
                    name: np.concatenate([block[name][start : start + size] for block in mine])
                    for name in ("image", "label")
                }

    def _cuts(self, start_step: int, stop_step: int) -> Iterator[tuple[int, int]]:
        """Cut steps into parts that are worth a task."""
        for step in range(start_step, stop_step, self.steps_per_block):
            yield step, min(self.steps_per_block, stop_step - step)
