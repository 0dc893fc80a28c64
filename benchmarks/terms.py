"""How large is each term of the objective, and which gradient does it give the backbone?

A few batches pass the training step without an update, with the weights of a checkpoint or with
those that a run begins with. For each term a table shows

- its value, beside its value for the same embeddings without information (each image has the
  keys of another image, and its patches are in random order) and its least possible value;
- the length of its gradient at the query encoder's backbone, the weight with which it is as
  long as that of info_nce (weights in this unit mean the same for any grid, queue or
  temperature), and the cosine between its gradients for two batches: what is steady adds up
  over steps, the rest is noise;
- the cosines between the gradients. Below 0, one term undoes what another one does.

A row is a list of settings that differ from those of the run. The column "same row" is the
share of patches whose middle lies in the same row of the other view: so many positives of the
intrinsic term show the same part of the body. `--crops` shows this share alone, for each named
augmentation and several numbers of rows.

    python -m benchmarks.terms --crops
    python -m benchmarks.terms --data.root market1501
    python -m benchmarks.terms --data.root market1501 --checkpoint study/RUN/483 \
        --rows "" patches.alignment=body "patches.alignment=body patches.mining=none"
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Mapping
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.step import provenance
from benchmarks.study import batches, parse_settings, study_data
from upreid_ray.config.presets import AUGMENTATIONS, PRESETS
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.core.augment import ViewParameters
from upreid_ray.core.checkpoint import load_checkpoint, read_position
from upreid_ray.core.model import Keys
from upreid_ray.core.training import StepDraw, TrainState, encode_shuffled_keys

TERMS = ("info_nce", "global_consistency", "intrinsic_contrastive")
NUM_ROWS = (2, 3, 4, 8)
NUM_CROPS = 8192
SHOWN = ("value", "without information", "floor", "gradient", "equal weight", "steadiness")
# All terms are computed, whatever the run does; their gradients are those of a weight of 1.
ALL_TERMS = {"loss.consistency_weight": 1, "loss.intrinsic_weight": 1}


def without_information(keys: Tensor, config: PretrainConfig) -> Tensor:
    """Give each image the keys of another one, and put its own patches in random order.

    Args:
        keys: ``[B, 2 + P, D]``: view, original, patches.
        config: Settings of the run.
    """
    num_patches = config.patches.rows * config.patches.columns
    order = (
        torch.rand(len(keys), num_patches)
        .argsort(dim=1)[..., None]
        .expand(-1, -1, keys.shape[2])
    )
    wholes, patches = keys[:, :-num_patches], keys[:, -num_patches:]
    return torch.cat([wholes.roll(1, dims=0), patches.gather(1, order)], dim=1)


def floors(config: PretrainConfig) -> dict[str, float]:
    """Return the least value of each term.

    The positive is equal to the query. Keys of the queue are at right angles to it, as many
    directions are in many dimensions; rows of patches point away from each other as far as
    they can, which is a cosine of ``-1 / (rows - 1)`` (our formula).
    """
    loss, patches = config.loss, config.patches
    num_kinds, num_negatives = patches.rows, (patches.rows - 1) * patches.columns
    if patches.mining == "none":
        num_kinds = patches.rows * patches.columns
        num_negatives = num_kinds - 1
    apart = 1 + 1 / (num_kinds - 1)
    return {
        "info_nce": math.log1p(config.model.queue_size * math.exp(-1 / loss.temperature)),
        "global_consistency": 0.0,
        "intrinsic_contrastive": math.log1p(
            num_negatives * math.exp(-apart / loss.intrinsic_temperature)
        ),
    }


def share_in_same_row(draw: StepDraw, config: PretrainConfig) -> float:
    """Return how often the middle of a row of one view lies in the same row of the other."""
    query, key = draw.query, draw.key
    if config.patches.alignment == "body":
        query, key = (each.at_full_height(config.data.height) for each in (query, key))
    rows = torch.arange(config.patches.rows)
    place = (rows + 0.5) / config.patches.rows

    def top_and_height(view: ViewParameters) -> tuple[Tensor, Tensor]:
        return view.crop[:, 0, None], view.crop[:, 2, None]

    (query_top, query_height), (key_top, key_height) = map(top_and_height, (query, key))
    seen = (query_top + place * query_height - key_top) / key_height * config.patches.rows
    return float((seen.floor() == rows).float().mean())


def crop_table() -> Table:
    """Return the share in the same row of each augmentation, for view alignment."""
    table = Table("same row, by rows of the grid", *map(str, NUM_ROWS))
    for name, augmentation in AUGMENTATIONS.items():
        configs = (
            PRESETS["luperson"].override(
                {
                    "augmentation": augmentation,
                    "patches.rows": num_rows,
                    "patches.alignment": "view",
                    "training.batch_size": NUM_CROPS,
                    "training.group_size": NUM_CROPS,
                    "scaling.num_workers": 1,
                }
            )
            for num_rows in NUM_ROWS
        )
        shares = (share_in_same_row(StepDraw.at(each, 0), each) for each in configs)
        table.add_row(name, *(f"{share:.2f}" for share in shares))
    return table


def gradient(state: TrainState, term: Tensor) -> Tensor:
    """Return the gradient at the backbone of the query encoder as one vector."""
    parts = torch.autograd.grad(term, list(state.extractor.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


def measure(
    state: TrainState, images: Tensor, step: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Measure one batch as the step after ``step`` steps sees it; change no weight.

    Returns:
        What the tables show, and the gradient of each term. Both are those of the first group
        of the batch.
    """
    config, size = state.config, state.config.training.group_size
    draw = StepDraw.at(config, step)
    keys = encode_shuffled_keys(state, images, draw).rows(slice(0, size))
    views = state.render_views(images[:size], draw.query.rows(slice(0, size)))
    terms = state.model(views, keys, statistics_momentum=0)
    with torch.no_grad():
        empty = Keys.unpack(without_information(keys.pack(), config), config.loss)
        blind = state.model(views, empty, statistics_momentum=0)
    gradients = {name: gradient(state, terms[name]) for name in TERMS}
    values = {
        **{f"{name} value": float(terms[name].detach()) for name in TERMS},
        **{f"{name} without information": float(blind[name]) for name in TERMS},
        **{f"{name} gradient": float(gradients[name].norm()) for name in TERMS},
        **{
            f"cosine {first} {second}": cosine(gradients[first], gradients[second])
            for first, second in combinations(TERMS, 2)
        },
        "same row": share_in_same_row(draw, config),
    }
    return values, gradients


def cosine(first: Tensor, second: Tensor) -> float:
    """Return the cosine of two vectors."""
    return float(F.cosine_similarity(first, second, dim=0))


def state_of(
    config: PretrainConfig, checkpoint: Path | None, steps_per_epoch: int
) -> TrainState:
    """Return a state with these settings and the weights of a checkpoint, if there is one."""
    state = TrainState(config, steps_per_epoch=steps_per_epoch, device=torch.device("cpu"))
    if checkpoint is not None:
        load_checkpoint(checkpoint, state)
    return state


def measure_row(
    images: Tensor, config: PretrainConfig, checkpoint: Path | None, num_batches: int
) -> dict[str, float]:
    """Return the means over some batches, beside the floors."""
    state = state_of(config, checkpoint, len(images) // config.training.batch_size)
    if checkpoint is None:
        fill_queue(state, images)
    state.num_steps = state.step + num_batches
    measured: list[dict[str, float]] = []
    steadiness: dict[str, list[float]] = {name: [] for name in TERMS}
    last: dict[str, Tensor] = {}
    for number, batch in enumerate(batches(images, state)):
        values, gradients = measure(state, batch, state.step + number)
        measured.append(values)
        for name, previous in last.items():
            steadiness[name].append(cosine(previous, gradients[name]))
        last = gradients
    means = {name: statistics.fmean(each[name] for each in measured) for name in measured[0]}
    for name in TERMS:
        means[f"{name} equal weight"] = means["info_nce gradient"] / means[f"{name} gradient"]
        means[f"{name} steadiness"] = statistics.fmean(steadiness[name] or [math.nan])
        means[f"{name} floor"] = floors(config)[name]
    return means


def fill_queue(state: TrainState, images: Tensor) -> None:
    """Replace the random directions of a new queue by keys, as the first steps do."""
    num_batches = -(-len(state.model.queue.keys) // state.config.training.batch_size)
    for step, batch in enumerate(islice(batches(images, state), num_batches)):
        keys = encode_shuffled_keys(state, batch, StepDraw.at(state.config, step))
        state.model.queue.enqueue(keys.view)


def tables(measured: Mapping[str, Mapping[str, float]]) -> Iterator[Table]:
    """Yield a table of each term, and one of the cosines."""
    for term in TERMS:
        table = Table(term, *SHOWN)
        for row, values in measured.items():
            cells = (f"{values[f'{term} {what}']:.3f}" for what in SHOWN)
            table.add_row(row or "as the run", *cells)
        yield table
    pairs = list(combinations(TERMS, 2))
    names = (f"{first}, {second}" for first, second in pairs)
    table = Table("cosine of the gradients of", *names, "same row")
    for row, values in measured.items():
        cells = (f"{values[f'cosine {first} {second}']:+.3f}" for first, second in pairs)
        table.add_row(row or "as the run", *cells, f"{values['same row']:.2f}")
    yield table


def main() -> None:
    """Measure each row, and print the tables and the lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data.root", dest="root", default="synthetic", help="as in benchmarks.study")
    add(
        "--preset", default="demo", choices=PRESETS, help="preset of a run without --checkpoint"
    )
    add(
        "--checkpoint",
        type=Path,
        help="folder of a checkpoint, whose settings are used instead of --preset",
    )
    add("--settings", nargs="+", default=[], metavar="NAME=VALUE", help="settings of all rows")
    add("--rows", nargs="+", default=[""], metavar="'NAME=VALUE ...'")
    add("--batches", type=int, default=4)
    add("--crops", action="store_true", help="only show how often crops agree in their rows")
    add("--results", type=Path, help="file to which a JSON line for each row is appended")
    options = parser.parse_args()
    if options.crops:
        Console().print(crop_table())
        return
    torch.set_num_threads(1)
    config = PRESETS[options.preset]
    if options.checkpoint is not None:
        config = PretrainConfig.parse(read_position(options.checkpoint).config)
    config = config.override(ALL_TERMS | parse_settings(options.settings))
    console = Console(width=120)
    measured: dict[str, dict[str, Any]] = {}
    images: dict[tuple[int, int], Tensor] = {}
    for row in options.rows:
        changed = config.override(parse_settings(row.split()))
        size = changed.data.height, changed.data.width
        if size not in images:
            images[size] = study_data(options.root, *size, test=False).train
        measured[row] = measure_row(images[size], changed, options.checkpoint, options.batches)
        if options.results is not None:
            about = {
                "checkpoint": str(options.checkpoint),
                "preset": options.preset,
                "row": row,
            }
            with options.results.open("a") as file:
                file.write(json.dumps(about | measured[row]) + "\n")
    for table in tables(measured):
        console.print(table)
    console.print(provenance(torch.device("cpu")), f"{options.batches} batches")


if __name__ == "__main__":
    main()
