"""The runs of a comparison: which backbones are compared, and the settings of each run.

The runs of a column differ in the initialization alone: seed k gives every variant the same
persons, order and augmentation. By default a run on a share of the persons trains for the
epochs of the recipe, so that a tenth of the persons takes a tenth of the steps. ``min_steps``
multiplies the epochs of the whole schedule where that is too few steps to learn anything.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from upreid_ray.config.downstream import CompareConfig, DownstreamConfig, EvaluateConfig
from upreid_ray.config.errors import InputError
from upreid_ray.config.run import JobConfig
from upreid_ray.config.section import RANDOM, absolute_init
from upreid_ray.core.backbone import Description
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.data.stream.persons import IMAGES
from upreid_ray.train.initialization import resolve

logger = logging.getLogger(__name__)

FROZEN = "frozen"


@dataclass(frozen=True)
class Variant:
    """Initializations whose scores are averaged, such as those of several pre-training seeds.

    Attributes:
        label: Name of the variant, the first cell of its row in the table.
        inits: Seed k starts from the k-th; after the last one the first one follows again.
    """

    label: str
    inits: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``INIT`` or ``LABEL=INIT[,INIT...]``.

        A path may contain ``=``. So a label that contains ``/`` or ``:``, as that of an
        initialization without another name does, ends where an absolute path or a URI follows.

        Raises:
            InputError: The label or an initialization is empty.
        """
        named = re.match(r"([^/:=]*)=(.*)|(.+?)=((?:/|[a-z0-9]+:/).*)", text)
        if named is None:
            return cls(text, (absolute_init(text),))
        label, inits = (part for part in named.groups() if part is not None)
        parts = inits.split(",")
        if not label or not all(parts):
            raise InputError(f"--init {text}: not of the form LABEL=INIT[,INIT...]")
        return cls(label, tuple(map(absolute_init, parts)))

    def __str__(self) -> str:
        return f"{self.label}={','.join(self.inits)}"

    @property
    def slug(self) -> str:
        """The label as a part of file names."""
        return re.sub(r"[^A-Za-z0-9]+", "-", self.label).strip("-")[-40:].lower()

    def starts(self, num_seeds: int) -> list[tuple[int, str]]:
        """Return the number of each seed with the initialization that it starts from."""
        return [(k, self.inits[k % len(self.inits)]) for k in range(num_seeds)]

    def frozen_starts(self, num_seeds: int) -> list[tuple[int, str]]:
        """Return the starts whose frozen features differ; only random ones depend on a seed."""
        starts = [(k if init == RANDOM else 0, init) for k, init in self.starts(num_seeds)]
        return list(dict.fromkeys(starts))


@dataclass(frozen=True)
class ComparisonRun:
    """A run whose scores go into one cell of the table.

    Attributes:
        name: Name of the run, and of the file with its scores.
        label: Label of the variant.
        column: `FROZEN`, or the share of the persons as text.
        config: Settings of the run; their class says whether it evaluates or fine-tunes.
    """

    name: str
    label: str
    column: str
    config: EvaluateConfig | DownstreamConfig

    def __str__(self) -> str:
        return f"{self.label}, {heading(self.column)}, seed {self.config.seed}"


def heading(column: str) -> str:
    """Return what stands above a column of the table."""
    return column if column == FROZEN else f"{100 * float(column):g}% of the persons"


def resolve_variants(
    variants: Sequence[Variant],
) -> tuple[list[Variant], dict[str, Description]]:
    """Look up every initialization, so that nothing starts if one of them is missing.

    The weights that a backbone was trained from are a variant, too: without their row, nobody
    can tell what the training was worth.

    Returns:
        The variants with versions in place of aliases, the random variant first; and a
        description of each initialization that is not random.

    Raises:
        InputError: An initialization does not exist or lacks a part of the backbone, or two
            variants have the same label.
    """
    if not any(set(variant.inits) == {RANDOM} for variant in variants):
        variants = [Variant(RANDOM, (RANDOM,)), *variants]
    labels = [variant.label for variant in variants]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"--init {label}: names two rows; tell them apart with LABEL=INIT")
    given = {init for variant in variants for init in variant.inits} - {RANDOM}
    found = {init: resolve(init) for init in sorted(given)}
    resolved = [
        Variant(label, tuple(found[i].uri if i in found else i for i in variant.inits))
        for label, variant in zip(labels, variants, strict=True)
    ]
    shown = {init for variant in resolved for init in variant.inits}
    starts = {each.start for each in found.values() if each.start is not None}
    for start in sorted(starts - shown - {RANDOM}):
        try:
            found[start] = resolve(start)
        except InputError as error:
            logger.warning("without a row for the start of a backbone: %s", error)
            continue
        resolved.append(Variant(start, (found[start].uri,)))
    return resolved, {each.uri: each.description for each in found.values()}


def list_runs(
    config: CompareConfig,
    variants: Sequence[Variant],
    descriptions: Mapping[str, Description],
    *,
    shards: ShardSet,
    storage: str,
) -> list[ComparisonRun]:
    """Return the runs of a comparison, those on frozen features first, for they are quickest.

    A frozen backbone is scored once, a random one with each seed. Random initializations have
    the architecture and the image size of the first description. Each run has its folder in
    ``storage``.

    Raises:
        InputError: The set cannot be scored, or a split has too few persons for a batch.
    """
    chosen = config.finetune.evaluation.shards
    evaluation = ShardSet.open(chosen) if chosen else shards
    evaluation.check_labels()
    common = config.finetune
    of_random = _settings_of_random(common, next(iter(descriptions.values()), None))

    def start(name: str, k: int, init: str) -> dict[str, Any]:
        """Return the settings that name a run and say what it starts from."""
        return {
            "run.name": name,
            "run.storage_path": storage,
            "init": init,
            "seed": common.seed + k,
            **(of_random if init == RANDOM else {}),
        }

    scoring = EvaluateConfig(
        backbone=common.backbone,
        data=common.data,
        scaling=common.scaling,
        run=JobConfig(experiment=common.run.experiment),
    ).override({"data.root": evaluation.uri})
    training = common.override({"data.root": shards.uri, "evaluation.shards": evaluation.uri})
    splits = {
        split: _settings_of_split(common, shards, split, config.min_steps)
        for split in config.splits
    }
    frozen: list[ComparisonRun] = []
    finetuned: list[ComparisonRun] = []
    for number, variant in enumerate(variants):
        prefix = f"{number}-{variant.slug}"
        for place, (k, init) in enumerate(variant.frozen_starts(config.seeds)):
            name = f"{prefix}-{FROZEN}-{place}"
            scored = scoring.override(start(name, k, init))
            frozen.append(ComparisonRun(name, variant.label, FROZEN, scored))
        for k, init in variant.starts(config.seeds):
            for split, of_split in splits.items():
                name = f"{prefix}-{split:g}-{k}"
                trained = training.override({**start(name, k, init), **of_split})
                finetuned.append(ComparisonRun(name, variant.label, f"{split:g}", trained))
    return frozen + finetuned


def _settings_of_random(common: DownstreamConfig, first: Description | None) -> dict[str, Any]:
    """Return the architecture and the image size of random initializations."""
    if first is None:
        return {}
    return {
        "backbone": first.backbone,
        "data.height": common.data.height or first.height,
        "data.width": common.data.width or first.width,
    }


def _settings_of_split(
    common: DownstreamConfig, shards: ShardSet, split: float, min_steps: int
) -> dict[str, Any]:
    """Return the settings of the runs that train on a share of the persons.

    Raises:
        InputError: The share has too few persons for a batch.
    """
    settings: dict[str, Any] = {"subset.persons": split}
    images_of = IMAGES[type(common)]
    try:
        images = images_of(shards, common.override(settings), height=256, width=128)
    except InputError as error:
        raise InputError(f"--splits {split:g}: {error}") from None
    num_steps = images.steps_per_epoch * common.training.epochs
    factor = -(-min_steps // num_steps)
    if factor <= 1:
        return settings
    schedule = common.optimizer
    return {
        **settings,
        "training.epochs": factor * common.training.epochs,
        "optimizer.warmup_epochs": factor * schedule.warmup_epochs,
        "optimizer.milestones": tuple(factor * epoch for epoch in schedule.milestones),
        "evaluation.every_epochs": factor * common.evaluation.every_epochs,
    }
