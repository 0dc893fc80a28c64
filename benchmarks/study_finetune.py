"""Does a backbone of the study win with few labels too? Its supervised fine-tuning.

Takes the last checkpoints of runs of `benchmarks.study`, and fine-tunes each by the package's
own step on the labelled images of a part of the persons that the run was pre-trained on. The
persons to score are those of the study, whom neither training has seen; with `--test`, for runs
that were made with it, those of the official query and gallery. The row ``random`` starts from
the weights that the pre-training with the same seed started from. Fine-tunings with the same
seed see the same images under the same augmentation, so differences are paired.

Fine-tunings that have a line are left out, so the same command resumes; one that is broken off
starts again.

    python -m benchmarks.study_finetune --data.root market1501 --out study --persons 0.1 \
        --epochs 40 --rows random "MoCo v2" "UP-ReID patches.alignment=body"
    python -m benchmarks.study_finetune --table
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.step import commit
from benchmarks.study import (
    CPU,
    METHODS,
    Line,
    StudyData,
    clock,
    parse_settings,
    read_images,
    read_lines,
    run_folder,
    score,
    split_persons,
    tables,
)
from upreid_ray.config.downstream import FinetuneConfig
from upreid_ray.config.presets import FINETUNE_PRESETS, PRESETS
from upreid_ray.config.section import RANDOM
from upreid_ray.core.backbone import build_backbone
from upreid_ray.core.finetuning import FinetuneState, PersonBatch, finetune_step
from upreid_ray.core.training import train
from upreid_ray.data.stream.persons import PersonBatches, subset
from upreid_ray.train.initialization import Initialization, resolve

RESULTS = Path(__file__).parent / "results" / "i2_finetune.jsonl"
# As the strong baseline divides its 120 epochs: warm-up of 10, less rate from 40 and 90 on.
WARMUP, MILESTONES = 1 / 12, (1 / 3, 3 / 4)


def finetune_config(seed: int, *, persons: float, epochs: int) -> FinetuneConfig:
    """Return the settings of a fine-tuning: the strong baseline, shorter."""
    return FINETUNE_PRESETS["demo"].override(
        {
            "seed": seed,
            "subset.persons": persons,
            "training.epochs": epochs,
            "optimizer.warmup_epochs": epochs * WARMUP,
            "optimizer.milestones": tuple(epochs * each for each in MILESTONES),
        }
    )


def finetune(
    init: Initialization,
    config: FinetuneConfig,
    data: StudyData,
    pids: NDArray[Any],
    device: torch.device = CPU,
) -> Line:
    """Fine-tune a backbone and score it; return the entries of a line that depend on it.

    Args:
        init: Backbone to start from.
        config: Settings.
        data: Images; those to train on have labels here.
        pids: ``[N]``, persons on the images to train on.
        device: Device to train on.
    """
    subsets = config.subset
    chosen = subset(pids, persons=subsets.persons, images=subsets.images, seed=config.seed)
    persons, labels = np.unique(pids[chosen], return_inverse=True)
    images = data.train[torch.from_numpy(chosen)]
    about, training = init.description, config.training
    backbone = build_backbone(about.backbone, size=about.size, last_stride=training.last_stride)
    backbone.load_state_dict(init.weights)
    state = FinetuneState(
        config,
        backbone,
        about,
        num_persons=len(persons),
        steps_per_epoch=max(1, len(chosen) // training.batch_size),
        device=device,
    )
    order = PersonBatches(labels, training, size=about.size, seed=config.seed)

    def batches() -> Iterator[PersonBatch]:
        for step in range(state.num_steps):
            rows = torch.from_numpy(order.indices(step))
            yield PersonBatch(images[rows], torch.from_numpy(labels)[rows])

    began = clock(device)
    for _ in train(state, batches(), finetune_step):
        pass
    seconds = clock(device) - began
    state.average_running_statistics()
    scores = score(state, data)
    return {
        "persons": len(persons),
        "images": len(chosen),
        "step": state.num_steps,
        "steps": state.num_steps,
        "seconds": round(seconds, 1),
        **{name: round(scores[name], 5) for name in ("mAP", "rank1")},
    }


def newest(folder: Path) -> Path:
    """Return the last checkpoint of a run of the study."""
    return max(folder.iterdir(), key=lambda each: int(each.name))


def labelled_data(
    root: str, height: int, width: int, *, test: bool
) -> tuple[StudyData, NDArray[Any]]:
    """Return the images of the study, and the persons ``[N]`` on those to train on."""
    everyone = read_images(root, "train", height, width)
    pids, camids = everyone.labels.pids.numpy(), everyone.labels.camids.numpy()
    if test:
        query, gallery = (
            read_images(root, each, height, width) for each in ("query", "gallery")
        )
        return StudyData(everyone.images, query, gallery), pids
    train_rows, query_rows, gallery_rows = split_persons(pids, camids)
    images = everyone.at(train_rows).images
    return StudyData(images, everyone.at(query_rows), everyone.at(gallery_rows)), pids[
        train_rows
    ]


def run(
    data: StudyData,
    pids: NDArray[Any],
    about: Mapping[str, Any],
    config: FinetuneConfig,
    folder: Path,
    results: Path,
) -> None:
    """Fine-tune the backbone of a run and append a line.

    ``about`` says which row and seed it is; ``random`` takes the run's first checkpoint.
    """
    checkpoint = folder / "0" if about["row"] == RANDOM else newest(folder)
    line = finetune(resolve(str(checkpoint)), config, data, pids)
    when = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}", "commit": commit()}
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps({**about, **line, **when}) + "\n")


def missing_runs(
    options: argparse.Namespace, common: Mapping[str, Any]
) -> list[tuple[Line, Path]]:
    """Return what has no line yet: which row and seed it is, and the folder of the run."""
    about = {
        "set": Path(options.root).absolute().name,
        "split": f"{'test' if options.test else 'validation'}, "
        f"fine-tuned on {options.persons:.0%} of the persons, {options.epochs} epochs",
        "preset": options.preset,
        "common": common,
    }
    wanted = [
        about | {"row": row, "seed": seed} for seed in options.seeds for row in options.rows
    ]
    # All runs with a seed start from the same weights.
    start = next(row for row in options.rows if row != RANDOM)
    lines = read_lines(options.results)
    return [
        (each, run_folder(options.out, options.preset, common, row, each["seed"]))
        for each in wanted
        if not any(each.items() <= line.items() for line in lines)
        for row in [start if each["row"] == RANDOM else each["row"]]
    ]


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data.root", dest="root", help="folder of images or of shards")
    add("--out", type=Path, help="folder of the checkpoints of the study")
    add("--preset", default="demo", choices=PRESETS, help="preset of the study")
    add("--settings", nargs="+", default=[], metavar="NAME=VALUE", help="those of the study")
    add("--rows", nargs="+", default=[RANDOM, *METHODS], help="rows of the study, or random")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--persons", type=float, default=0.1, help="fraction of the persons with labels")
    add("--epochs", type=int, default=40, help="epochs of the fine-tuning")
    add("--test", action="store_true", help="score the official query and gallery")
    add("--results", type=Path, default=RESULTS, help="file of JSON lines")
    add("--table", action="store_true", help="only print the tables")
    options = parser.parse_args()
    if not options.table:
        if None in (options.root, options.out) or not set(options.rows) - {RANDOM}:
            parser.error(
                "--data.root, --out and a row of the study other than random are needed"
            )
        torch.set_num_threads(1)
        common = {"checkpoint.every_steps": "100"} | parse_settings(options.settings)
        missing = missing_runs(options, common)
        for _, folder in missing:
            if not folder.is_dir():
                parser.error(
                    f"--out {options.out}: has no run {folder.name!r}; python -m "
                    "benchmarks.study with these --settings makes it"
                )
        size = PRESETS[options.preset].override(common).data
        data, pids = labelled_data(options.root, size.height, size.width, test=options.test)
        for about, folder in missing:
            config = finetune_config(
                about["seed"], persons=options.persons, epochs=options.epochs
            )
            run(data, pids, about, config, folder, options.results)
    for table in tables(read_lines(options.results)):
        Console(width=130).print(table)


if __name__ == "__main__":
    main()
