"""Is UP-ReID worth it? Random, MoCo v2 and UP-ReID backbones, frozen and fine-tuned.

Pre-trains the demo preset with and without the two constraints, with several seeds and equal
steps, on the synthetic people; then compares the backbones as jobs/compare.py does. What is
done already in the folder is not done again, so that a run that was ended goes on with the same
command.

    python benchmarks/initializations.py --out initializations
"""

import argparse
import logging
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
import torch
from rich.console import Console

from upreid_ray.config.downstream import CompareConfig, FinetuneConfig
from upreid_ray.config.presets import FINETUNE_PRESETS, PRESETS
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.downstream.compare import compare
from upreid_ray.downstream.comparison_result import CompareResult
from upreid_ray.tracking import connection, runs
from upreid_ray.train.folder import RunFolder
from upreid_ray.train.pretrain import fit

METHODS: dict[str, dict[str, Any]] = {
    "MoCo v2": {"loss.consistency_weight": 0, "loss.intrinsic_weight": 0},
    "UP-ReID": {},
}


def pretrained(method: str, seed: int, epochs: int, storage: str, parent_run_id: str) -> str:
    """Return the last checkpoint of a pre-training run, which is made if it is not there."""
    name = f"{method.lower().replace(' ', '-')}-{seed}"
    config = PRESETS["demo"].override(
        {
            **METHODS[method],
            "seed": seed,
            "training.epochs": epochs,
            "evaluation.every_epochs": epochs,
            "run.name": name,
            "run.storage_path": storage,
        }
    )
    begun = RunFolder(storage, name).exists()
    return fit(config, resume=begun, parent_run_id=parent_run_id).checkpoint


def parent(folder: RunFolder, config: PretrainConfig) -> str:
    """Return the MLflow run of all pre-training, which is made if it is not there."""
    if folder.exists():
        return folder.recorded_run(config, ("run.",))
    client = connection.connect()
    run_id = runs.start_run(
        client, experiment=config.run.experiment, name=folder.name, config=config
    )
    folder.record(config, run_id)
    return run_id


def markdown(result: CompareResult, columns: list[str]) -> str:
    """Return the table of mAP and rank-1 in percent."""
    lines = [
        "| mAP / rank-1, % | " + " | ".join(columns) + " |",
        "| --- " * (len(columns) + 1) + "|",
    ]
    for label in result.scores:
        cells = [
            " / ".join(result.cell(label, column, score) for score in ("mAP", "rank1"))
            for column in columns
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def finetuning(epochs: int, storage: str) -> FinetuneConfig:
    """Return what the fine-tuning runs have in common."""
    return FINETUNE_PRESETS["demo"].override(
        {
            "training.epochs": epochs,
            "evaluation.every_epochs": epochs,
            "run.name": "comparison",
            "run.storage_path": storage,
        }
    )


def main() -> None:
    """Pre-train, compare, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="initializations", help="folder of all runs")
    parser.add_argument("--seeds", type=int, default=3, help="of pre-training and fine-tuning")
    parser.add_argument("--epochs", type=int, default=3, help="of pre-training")
    parser.add_argument("--finetune-epochs", type=int, default=7, help="of fine-tuning")
    parser.add_argument("--min-steps", type=int, default=60, help="of each fine-tuning run")
    parser.add_argument("--splits", type=float, nargs="+", default=[0.1, 1.0])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("upreid_ray").setLevel(logging.INFO)
    storage = str(Path(arguments.out).absolute())
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{storage}/mlflow.db")
    Path(storage).mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    ray.init(address="local", logging_level=logging.WARNING)
    try:
        demo = PRESETS["demo"].override({"training.epochs": arguments.epochs})
        run_id = parent(RunFolder(storage, "pretraining"), demo)
        rows = [
            f"{method}="
            + ",".join(
                pretrained(method, seed, arguments.epochs, storage, run_id)
                for seed in range(arguments.seeds)
            )
            for method in METHODS
        ]
        config = CompareConfig(
            init=tuple(rows),
            splits=tuple(arguments.splits),
            seeds=arguments.seeds,
            min_steps=arguments.min_steps,
            finetune=finetuning(arguments.finetune_epochs, storage),
        )
        result = compare(config, resume=RunFolder(storage, "comparison").exists())
    finally:
        ray.shutdown()
    console = Console(width=110)
    columns = ["frozen", *(f"{split:g}" for split in arguments.splits)]
    console.print(markdown(result, columns), markup=False)
    tags = runs.environment()
    console.print(
        f"{datetime.now(UTC):%Y-%m-%d}, commit {tags['mlflow.source.git.commit'][:10]}, "
        f"{os.cpu_count()} cores ({torch.backends.cpu.get_cpu_capability()}), "
        f"torch {tags['version.torch']}, ray {tags['version.ray']}, "
        f"mlflow {tags['version.mlflow']}; {arguments.epochs} epochs of pre-training, "
        f"{arguments.seeds} runs of each cell: mean +- standard deviation; "
        f"{(time.perf_counter() - started) / 60:.0f} minutes"
    )


if __name__ == "__main__":
    main()
