import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import study
from benchmarks.study import (
    LabelledImages,
    Run,
    StudyData,
    paired_difference,
    parse_row,
    read_lines,
    split_persons,
    tables,
)
from tests.core.tiny import people, tiny
from upreid_ray.core.retrieval import Labels

CONFIG = tiny({"training.epochs": 2, "checkpoint.every_steps": 2})


def data() -> StudyData:
    def labelled(number: int, seed: int) -> LabelledImages:
        pids = torch.arange(number) % 3
        return LabelledImages(people(number, seed), Labels(pids, torch.full_like(pids, seed)))

    return StudyData(people(24), labelled(3, 1), labelled(6, 2))


def of_runs(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in ("seconds", "date")} for line in lines]


def test_persons_are_split_and_each_other_person_is_asked_for_once_a_camera() -> None:
    draw = np.random.default_rng(0)
    pids, camids = draw.integers(50, size=1000), draw.integers(4, size=1000)
    train, query, gallery = split_persons(pids, camids)
    assert (train.astype(int) + query + gallery == 1).all()
    assert not set(pids[train]) & set(pids[~train])
    assert len(set(pids[train])) == 40
    others = set(zip(pids[~train], camids[~train], strict=True))
    assert sorted(others) == sorted(zip(pids[query], camids[query], strict=True))


def test_a_row_is_a_method_and_its_settings() -> None:
    assert parse_row("+ intrinsic patches.alignment=body loss.intrinsic_weight=1") == {
        "loss.consistency_weight": 0,
        "patches.alignment": "body",
        "loss.intrinsic_weight": "1",
    }
    assert parse_row("UP-ReID") == {}


def test_differences_are_those_of_equal_seeds() -> None:
    mean, half = paired_difference({0: 3.0, 1: 5.0, 2: 9.0}, {2: 6.0, 1: 4.0, 0: 1.0, 7: 0.0})
    assert mean == 2
    assert half == pytest.approx(4.302653 / 3**0.5)  # t of 2 degrees of freedom at 97.5 %
    assert paired_difference({0: 3.0}, {0: 1.0}) == (2, float("inf"))


@pytest.mark.slow
def test_a_resumed_run_equals_an_unbroken_one(tmp_path: Path) -> None:
    whole = list(Run(CONFIG, data(), tmp_path / "whole").lines())
    assert [line["step"] for line in whole] == [0, 2, 4, 6]
    # Stops after the checkpoint of step 2, in the middle of what follows.
    broken = list(islice(Run(CONFIG, data(), tmp_path / "broken").lines(), 3))
    resumed = list(Run(CONFIG, data(), tmp_path / "broken").lines())
    assert of_runs(broken[:2] + resumed) == of_runs(whole)
    # Stops in the middle of the first steps.
    list(islice(Run(CONFIG, data(), tmp_path / "early").lines(), 2))
    early = list(Run(CONFIG, data(), tmp_path / "early").lines())
    assert of_runs(early) == of_runs(whole[1:])


@pytest.mark.slow
def test_a_study_appends_what_is_missing_and_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(study.PRESETS, "tiny", CONFIG)
    results = tmp_path / "lines.jsonl"

    def run(rows: list[str]) -> list[str]:
        study.study(
            data(),
            {"checkpoint.every_steps": "2", "training.epochs": "1"},
            rows,
            [0, 1],
            preset="tiny",
            about={"set": "people", "split": "validation"},
            out=tmp_path / "out",
            results=results,
        )
        return results.read_text().splitlines()

    lines = run(["MoCo v2"])
    assert run(["MoCo v2"]) == lines
    more = run(["MoCo v2", "UP-ReID patches.alignment=body"])
    assert more[: len(lines)] == lines
    assert len(more) == 2 * len(lines) == 12
    assert json.loads(more[-1])["seed"] == 1
    (table,) = tables(read_lines(results))
    assert list(table.columns[0].cells) == [
        "random",
        "MoCo v2",
        "UP-ReID patches.alignment=body",
    ]
    assert list(table.columns[1].cells) == ["2", "2", "2"]
