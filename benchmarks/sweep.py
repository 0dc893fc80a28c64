"""What a sweep saves and costs, on the synthetic people.

First the full grid and ASHA over the same points and seeds: the share of the training steps
that ASHA takes, and whether both choose the same point. Then the time of a sweep without early
stopping beside that of the same runs by hand, one `jobs/pretrain.py` after the other.

    python benchmarks/sweep.py
    python benchmarks/sweep.py --weights 0,0.1 --other_weights 0 --epochs 2 --people 8
"""

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import ray
from rich.console import Console
from rich.table import Table

from upreid_ray.command_line import connect_to_ray
from upreid_ray.config.presets import PRESETS
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.config.sweep import SearchConfig
from upreid_ray.tracking.runs import environment
from upreid_ray.train.folder import RunFolder
from upreid_ray.tune import sweep
from upreid_ray.tune.report import PointOutcome, best_first
from upreid_ray.tune.space import SweepPlan, format_value
from upreid_ray.tune.trial_record import TrialRecord

ROOT = Path(__file__).parents[1]


def swept(
    base: PretrainConfig, name: str, space: dict[str, str], search: SearchConfig
) -> float:
    """Sweep; return the seconds that a user waits, Ray's own start included."""
    started = time.perf_counter()
    connect_to_ray(show_workers=False)
    try:
        plan = SweepPlan(base=base, search=search, space=space)
        sweep.start(plan, RunFolder(str(base.run.storage_path), name))
    finally:
        ray.shutdown()
    return time.perf_counter() - started


def by_hand(base: PretrainConfig, records: list[TrialRecord], folder: Path) -> float:
    """Run the trials of a sweep by hand, one after the other; return the seconds."""
    started = time.perf_counter()
    for record in records:
        candidate = record.candidate
        config = base.override({**candidate.point, "seed": candidate.seed})
        file = folder / f"hand-{candidate.number}.json"
        file.write_text(config.model_dump_json())
        subprocess.run(
            [sys.executable, ROOT / "jobs/pretrain.py", "--config", file],
            cwd=folder,
            check=True,
            capture_output=True,
        )
    return time.perf_counter() - started


def records(base: PretrainConfig, name: str) -> list[TrialRecord]:
    """Return what the folders of a sweep say of its trials."""
    files = sorted(Path(str(base.run.storage_path), name).glob("*/trial.json"))
    return [TrialRecord.model_validate_json(file.read_text()) for file in files]


def num_steps(trials: list[TrialRecord]) -> float:
    """Count epochs, which have the same number of steps in all trials."""
    return sum(trial.epochs for trial in trials)


def describe(outcome: PointOutcome) -> str:
    """Return a point with its score."""
    values = ", ".join(format_value(value) for value in outcome.point.values())
    spread = "" if outcome.spread is None else f" +- {outcome.spread:.4f}"
    return f"{values}: {outcome.mean:.4f}{spread}"


def _arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="0,0.1,1", help="of the intrinsic term")
    parser.add_argument("--other_weights", default="0,0.1", help="of the consistency term")
    parser.add_argument("--seeds", type=int, default=1, help="trials of each point")
    parser.add_argument("--epochs", type=int, default=9, help="of each trial")
    parser.add_argument("--people", type=int, default=48, help="to train on, 8 images each")
    parser.add_argument("--by_hand", type=int, default=3, help="runs by hand")
    return parser.parse_args()


def main() -> None:
    """Measure, and print a table."""
    arguments = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for library in ("alembic", "mlflow", "ray"):
        logging.getLogger(library).setLevel(logging.WARNING)
    space = {
        "loss.intrinsic_weight": f"grid({arguments.weights})",
        "loss.consistency_weight": f"grid({arguments.other_weights})",
    }
    search = SearchConfig(num_seeds=arguments.seeds, scheduler="none")
    with tempfile.TemporaryDirectory(prefix="upreid-bench-") as name:
        folder = Path(name)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        os.environ["RAY_ADDRESS"] = "local"  # whatever else runs on the machine
        base = _base(arguments.people, arguments.epochs, folder)
        grid_seconds = swept(base, "grid", space, search)
        asha_seconds = swept(base, "asha", space, search.override({"scheduler": "asha"}))
        grid, asha = records(base, "grid"), records(base, "asha")
        chosen = grid[:: max(1, len(grid) // arguments.by_hand)][: arguments.by_hand]
        hand_seconds = by_hand(base, chosen, folder) / len(chosen) * len(grid)
    best_of_grid, best_of_asha = best_first(grid)[0], best_first(asha)[0]
    # What the grid says of ASHA's choice: its score with all seeds at full length.
    same = next(each for each in best_first(grid) if each.point == best_of_asha.point)
    table = Table("", "trials", "epochs trained", "seconds", "best point: mAP")
    table.add_row(
        "full grid",
        str(len(grid)),
        f"{num_steps(grid):g}",
        f"{grid_seconds:.0f}",
        describe(best_of_grid),
    )
    table.add_row(
        "ASHA",
        str(len(asha)),
        f"{num_steps(asha):g}",
        f"{asha_seconds:.0f}",
        f"{describe(best_of_asha)}, by the grid {same.mean:.4f}",
    )
    table.add_row(
        f"by hand ({len(chosen)} runs, scaled)",
        str(len(grid)),
        f"{num_steps(grid):g}",
        f"{hand_seconds:.0f}",
        "",
    )
    console = Console(width=110)
    console.print(table)
    tags = environment()
    console.print(
        f"steps of ASHA / grid {num_steps(asha) / num_steps(grid):.2f}; same winner: "
        f"{best_of_grid.point == best_of_asha.point}; sweep / by hand "
        f"{grid_seconds / hand_seconds:.3f}; {grid_seconds / len(grid):.1f} s a trial\n"
        f"{datetime.now(UTC):%Y-%m-%d}, commit {tags['mlflow.source.git.commit'][:10]}, "
        f"{os.cpu_count()} cores, torch {tags['version.torch']}, ray {tags['version.ray']}"
    )


def _base(num_people: int, num_epochs: int, folder: Path) -> PretrainConfig:
    """Return the demo on fewer people with smaller batches, scored after each epoch."""
    return PRESETS["demo"].override(
        {
            "data.synthetic.num_train_identities": max(1, num_people // 3),
            "data.synthetic.num_test_identities": 30,
            "data.synthetic.num_unlabeled_identities": num_people - max(1, num_people // 3),
            "model.queue_size": 64,
            "training.epochs": num_epochs,
            "training.batch_size": 32,
            "training.group_size": 16,
            "evaluation.every_epochs": 1,
            "run.storage_path": str(folder / "runs"),
        }
    )


if __name__ == "__main__":
    main()
