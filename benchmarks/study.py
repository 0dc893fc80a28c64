"""Do the I2 terms make better backbones than MoCo v2 alone?

Each row of the study is a method and the settings in which it differs. A run pre-trains one row
with one seed, on images without labels, by the package's own step in one process with one
thread. Every hundred steps the frozen backbone is scored, and a line is appended to a file of
JSON lines. Rows with the same seed begin with the same weights and see the same images under
the same augmentation, so that differences between them are paired.

By default a run trains on four fifths of the train persons, and is scored on the others: one
query image for each person and camera, the rest is the gallery. `--test` trains on all train
persons and scores the official query and gallery, which is for the final table alone.

A step of UP-ReID costs about 2.25 times one of MoCo v2. For a comparison at equal time, add a
row of MoCo v2 with more epochs, and compare the seconds, which are those of the processor.

Finished runs are left out and broken ones go on, so the same command resumes a study.

    python -m benchmarks.study --data.root market1501 --out study
    python -m benchmarks.study --data.root market1501 --out study --seeds 0 1 2 \
        --rows "MoCo v2" "UP-ReID patches.alignment=body" "MoCo v2 training.epochs=9"
    python -m benchmarks.study --table
"""

import argparse
import json
import re
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy import stats
from torch import Tensor

from benchmarks.step import commit
from upreid_ray.config.presets import PRESETS
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.config.run import SyntheticConfig
from upreid_ray.core.checkpoint import BestBackbone, load_checkpoint, save_checkpoint
from upreid_ray.core.retrieval import Labels, cosine_distances, extract_features, score_rows
from upreid_ray.core.training import State, TrainState, train, train_step
from upreid_ray.data.sources.source import source_records, synthetic_records
from upreid_ray.data.stream.decode import decode_images

RESULTS = Path(__file__).parent / "results" / "i2_study.jsonl"
METHODS: dict[str, dict[str, Any]] = {
    "MoCo v2": {"loss.consistency_weight": 0, "loss.intrinsic_weight": 0},
    "+ consistency": {"loss.intrinsic_weight": 0},
    "+ intrinsic": {"loss.consistency_weight": 0},
    "UP-ReID": {},
}
BASELINE = "MoCo v2"
TRAIN_SHARE = 0.8  # of the train persons; 600 of the 751 of Market-1501
CONFIDENCE = 0.95
SCORING_BATCH_SIZE = 256
CPU = torch.device("cpu")

Line = dict[str, Any]


@dataclass(frozen=True)
class LabelledImages:
    """Images in memory and who is on them.

    Attributes:
        images: ``[N, 3, H, W]``, uint8.
        labels: Persons and cameras ``[N]``.
    """

    images: Tensor
    labels: Labels

    def at(self, rows: NDArray[Any]) -> Self:
        """Return the images at these rows, or where a mask is true."""
        index = torch.from_numpy(rows)
        labels = Labels(self.labels.pids[index], self.labels.camids[index])
        return type(self)(self.images[index], labels)


@dataclass(frozen=True)
class StudyData:
    """Images of a study.

    Attributes:
        train: ``[N, 3, H, W]``, uint8, the images to train on.
        query: Query images of the persons to score.
        gallery: Gallery images of the same persons.
    """

    train: Tensor
    query: LabelledImages
    gallery: LabelledImages


def read_images(root: str, split: str, height: int, width: int) -> LabelledImages:
    """Decode a split of a labelled set, or of the synthetic people, once.

    Args:
        root: Folder of images or of shards, or ``synthetic``.
        split: ``train``, ``query`` or ``gallery``.
        height: H.
        width: W.
    """
    records = (
        synthetic_records(SyntheticConfig())
        if root == "synthetic"
        else source_records(root, {})
    )
    table = records.table.filter(pc.equal(records.table.column("split"), split))
    images = np.empty((len(table), 3, height, width), np.uint8)
    rows = table.to_pylist()
    # Images of shards are read with the others of their row group.
    order = sorted(range(len(rows)), key=lambda row: rows[row].get("unit", 0))
    for row in track(order, f"decoding {split}", console=Console(stderr=True)):
        encoded = pa.array([records.read(rows[row])])
        images[row] = decode_images(encoded, height, width)["image"][0]
    labels = (torch.tensor(table.column(name).to_pylist()) for name in ("pid", "camid"))
    return LabelledImages(torch.from_numpy(images), Labels(*labels))


def split_persons(pids: NDArray[Any], camids: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """Split the train images by person into train, query and gallery images.

    Args:
        pids: ``[N]``.
        camids: ``[N]``.

    Returns:
        Masks ``[N]``: the images of `TRAIN_SHARE` of the persons; of the others, one query
        image for each person and camera; the rest.
    """
    persons = np.random.default_rng(0).permutation(np.unique(pids))
    train = np.isin(pids, persons[: int(TRAIN_SHARE * len(persons))])
    others = np.flatnonzero(~train)
    labels = np.stack([pids[others], camids[others]], axis=1)
    query = np.zeros(len(pids), bool)
    query[others[np.unique(labels, axis=0, return_index=True)[1]]] = True
    return train, query, ~train & ~query


def study_data(root: str, height: int, width: int, *, test: bool) -> StudyData:
    """Read the train split and divide it by person, or for ``test`` read all three splits."""
    everyone = read_images(root, "train", height, width)
    if test:
        query, gallery = (
            read_images(root, each, height, width) for each in ("query", "gallery")
        )
        return StudyData(everyone.images, query, gallery)
    pids, camids = everyone.labels.pids.numpy(), everyone.labels.camids.numpy()
    train, query, gallery = split_persons(pids, camids)
    return StudyData(everyone.at(train).images, everyone.at(query), everyone.at(gallery))


def parse_row(row: str) -> dict[str, Any]:
    """Read text such as ``UP-ReID patches.alignment=body`` as the settings of a row."""
    words = row.split()
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    return METHODS[" ".join(word for word in words if "=" not in word)] | settings


def batches(images: Tensor, state: TrainState) -> Iterator[Tensor]:
    """Yield the batches from the state's step on; their order depends on seed and epoch."""
    size = state.config.training.batch_size
    for step in range(state.step, state.num_steps):
        epoch, place = divmod(step, state.steps_per_epoch)
        order = np.random.default_rng((state.config.seed, epoch)).permutation(len(images))
        yield images[torch.from_numpy(order[place * size : (place + 1) * size])]


def score(state: State, data: StudyData) -> dict[str, float]:
    """Score the features of the state's backbone."""
    normalization = state.description.normalization
    query, gallery = (
        extract_features(state.extractor, each.images.split(SCORING_BATCH_SIZE), normalization)
        for each in (data.query, data.gallery)
    )
    labels = (each.labels.to(state.device) for each in (data.query, data.gallery))
    return score_rows(cosine_distances(query, gallery), *labels).summary()


def clock(device: torch.device) -> float:
    """Return processor seconds, or on a GPU seconds at which all its work is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Run:
    """One row with one seed; continues from the newest checkpoint in its folder.

    Attributes:
        state: State of training.
        seconds: Seconds of the training steps so far: of the processor, or of the GPU.
    """

    def __init__(
        self, config: PretrainConfig, data: StudyData, folder: Path, device: torch.device = CPU
    ) -> None:
        self._data, self._folder = data, folder
        self.state = TrainState(
            config,
            steps_per_epoch=len(data.train) // config.training.batch_size,
            device=device,
        )
        self.seconds = 0.0

    def lines(self) -> Iterator[Line]:
        """Train, and yield the scores at the beginning, at each checkpoint and at the end.

        The checkpoint of a line is written when the next line is asked for.
        """
        state = self.state
        newest = max(self._folder.glob("*"), key=lambda each: int(each.name), default=None)
        if newest is None:
            yield self._line({})
            self._save()
        else:
            _, position = load_checkpoint(newest, state)
            num_images = state.step * state.config.training.batch_size
            self.seconds = num_images / position.images_per_second if num_images else 0.0
        reports = train(state, batches(self._data.train, state), train_step)
        every_steps = state.config.checkpoint.every_steps
        while state.step < state.num_steps:
            began = clock(state.device)
            some = list(islice(reports, every_steps - state.step % every_steps))
            self.seconds += clock(state.device) - began
            yield self._line(
                {
                    name: statistics.fmean(float(each.terms[name]) for each in some)
                    for name in some[0].terms
                }
            )
            self._save()

    def _line(self, terms: dict[str, float]) -> Line:
        """Return the scores of now, and the means of the terms since the last line."""
        scores = score(self.state, self._data)
        return {
            "step": self.state.step,
            "seconds": round(self.seconds, 1),
            **{name: round(scores[name], 5) for name in ("mAP", "rank1")},
            "terms": {name: round(value, 5) for name, value in terms.items()},
        }

    def _save(self) -> None:
        """Write a checkpoint; keep the first one, one of the middle and the newest."""
        state, unfinished = self.state, self._folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        best = BestBackbone()
        best.update(state, {})
        num_images = state.step * state.config.training.batch_size
        save_checkpoint(
            unfinished,
            state,
            best,
            scores_untrained={},
            images_per_second=num_images / self.seconds if self.seconds else 0.0,
        )
        self._folder.mkdir(exist_ok=True)
        unfinished.rename(self._folder / str(state.step))
        steps = sorted(int(each.name) for each in self._folder.iterdir())
        middle = min(steps, key=lambda step: abs(step - state.num_steps / 2))
        for step in set(steps) - {0, middle, state.step}:
            shutil.rmtree(self._folder / str(step))


def read_lines(results: Path) -> list[Line]:
    """Read the lines of a study."""
    return (
        [json.loads(line) for line in results.read_text().splitlines()]
        if (results.is_file())
        else []
    )


def run_folder(out: Path, preset: str, common: Mapping[str, Any], row: str, seed: int) -> Path:
    """Return the folder of a run's checkpoints."""
    return out / re.sub(r"[^\w.=]+", "_", f"{preset} {dict(common)} {row} {seed}")


def study(
    data: StudyData,
    common: dict[str, Any],
    rows: Sequence[str],
    seeds: Iterable[int],
    *,
    preset: str,
    about: Mapping[str, Any],
    out: Path,
    results: Path,
    device: torch.device = CPU,
) -> None:
    """Run all rows with one seed, then all with the next; skip runs that have a final line.

    Args:
        data: Images to train on and to score.
        common: Settings of all rows.
        rows: Texts that `parse_row` reads.
        seeds: Seeds of the runs.
        preset: Name of the preset that the settings change.
        about: Further entries of each line.
        out: Folder of the checkpoints.
        results: File to which the lines are appended.
        device: Device to train on.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for row in rows:
            config = PRESETS[preset].override(common | parse_row(row) | {"seed": seed})
            run_about = {**about, "preset": preset, "common": common, "row": row, "seed": seed}
            run = Run(config, data, run_folder(out, preset, common, row, seed), device)
            num_steps = run.state.num_steps
            known = [each for each in read_lines(results) if run_about.items() <= each.items()]
            if any(each["step"] == num_steps for each in known):
                continue
            for line in run.lines():
                when = {
                    "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
                    "commit": commit(),
                }
                with results.open("a") as file:
                    file.write(
                        json.dumps(run_about | line | {"steps": num_steps} | when) + "\n"
                    )


def paired_difference(
    scores: Mapping[int, float], baseline: Mapping[int, float]
) -> tuple[float, float]:
    """Return the mean difference over the seeds of both, and half its confidence interval.

    By Student's t distribution; the half is infinite for fewer than two seeds.

    Args:
        scores: By seed.
        baseline: By seed; one at least is in both.
    """
    differences = [scores[seed] - baseline[seed] for seed in scores.keys() & baseline.keys()]
    number, mean = len(differences), statistics.fmean(differences)
    if number == 1:
        return mean, float("inf")
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, number - 1))
    return mean, quantile * statistics.stdev(differences) / number**0.5


def tables(lines: Iterable[Line]) -> Iterator[Table]:
    """Yield a table for each set, split and common settings: the final scores of each row."""
    studies: dict[str, dict[str, dict[int, dict[int, Line]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(dict))
    )
    for line in lines:
        kind = f"{line['set']}, {line['split']}, {line['preset']} {line['common']}"
        studies[kind][line["row"]][line["seed"]][line["step"]] = line
    for kind, rows in studies.items():
        finals = {
            row: {
                seed: by_step[max(by_step)]
                for seed, by_step in by_seed.items()
                if max(by_step) == by_step[max(by_step)]["steps"]
            }
            for row, by_seed in rows.items()
        }
        untrained = {
            seed: by_step[0]
            for by_seed in rows.values()
            for seed, by_step in by_seed.items()
            if 0 in by_step
        }
        table = Table(
            "row", "seeds", "steps", "CPU s", "mAP, %", "rank-1, %", "mAP - MoCo v2", title=kind
        )
        for row, final in {"random": untrained, **finals}.items():
            if not final:
                continue
            baseline = finals.get(BASELINE, {})
            difference = ""
            if row not in ("random", BASELINE) and final.keys() & baseline.keys():
                mean, half = paired_difference(
                    *({seed: 100 * each["mAP"] for seed, each in part.items()}
                      for part in (final, baseline))
                )  # fmt: skip
                difference = f"{mean:+.2f} +- {half:.2f}"
            first = next(iter(final.values()))
            table.add_row(
                row,
                str(len(final)),
                str(first["step"]),
                f"{statistics.fmean(each['seconds'] for each in final.values()):.0f}",
                *(mean_and_deviation([100 * each[name] for each in final.values()])
                  for name in ("mAP", "rank1")),
                difference,
            )  # fmt: skip
        yield table


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return both as text; one value has no deviation."""
    deviation = f" ({statistics.stdev(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def parse_settings(settings: Iterable[str]) -> dict[str, str]:
    """Read ``name=value`` pairs."""
    return dict(each.split("=", 1) for each in settings)


def main() -> None:
    """Run what is missing of the study, and print its tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data.root", dest="root", help="folder of images or of shards, or 'synthetic'")
    add("--out", type=Path, help="folder of the checkpoints")
    add("--preset", default="demo", choices=PRESETS)
    add("--settings", nargs="+", default=[], metavar="NAME=VALUE", help="settings of all rows")
    add(
        "--rows",
        nargs="+",
        default=list(METHODS),
        metavar="'METHOD NAME=VALUE ...'",
        help="rows of the table: %(default)s by default",
    )
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--test", action="store_true", help="score the official query and gallery")
    add("--results", type=Path, default=RESULTS, help="file of JSON lines")
    add("--table", action="store_true", help="only print the tables")
    options = parser.parse_args()
    if not options.table:
        torch.set_num_threads(1)
        common = {"checkpoint.every_steps": "100"} | parse_settings(options.settings)
        size = PRESETS[options.preset].override(common).data
        study(
            study_data(options.root, size.height, size.width, test=options.test),
            common,
            options.rows,
            options.seeds,
            preset=options.preset,
            about={
                "set": Path(options.root).absolute().name,
                "split": "test" if options.test else "validation",
            },
            out=options.out,
            results=options.results,
        )
    for table in tables(read_lines(options.results)):
        Console(width=130).print(table)


if __name__ == "__main__":
    main()
