import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import study_finetune
from benchmarks.study import LabelledImages, Run, StudyData, read_lines, run_folder, tables
from tests.core.tiny import people, tiny
from upreid_ray.core.retrieval import Labels

COMMON = {"checkpoint.every_steps": 2}
CONFIG = tiny({"training.epochs": 1} | COMMON)


def test_a_run_is_fine_tuned_from_its_last_and_its_first_checkpoint(
    tmp_path: Path,
) -> None:
    def labelled(number: int, seed: int) -> LabelledImages:
        pids = torch.arange(number) % 3
        return LabelledImages(people(number, seed), Labels(pids, torch.full_like(pids, seed)))

    data = StudyData(people(24), labelled(3, 1), labelled(6, 2))
    pids = np.repeat([7, 3, 9, 5, 2, 8], 4)
    folder = run_folder(tmp_path, "tiny", COMMON, "MoCo v2", 0)
    list(Run(CONFIG, data, folder).lines())
    results = tmp_path / "lines.jsonl"
    config = study_finetune.finetune_config(0, persons=0.5, epochs=2).override(
        {"training.num_persons": 2, "training.num_images": 2}
    )

    for row in ("random", "MoCo v2"):
        about = {"set": "people", "split": "validation", "preset": "tiny"}
        about |= {"common": COMMON, "row": row, "seed": 0}
        study_finetune.run(data, pids, about, config, folder, results)

    first, last = map(json.loads, results.read_text().splitlines())
    assert (first["persons"], first["images"], first["step"]) == (3, 12, 6)
    assert first["mAP"] != last["mAP"]
    (table,) = tables(read_lines(results))
    assert list(table.columns[0].cells) == ["random", "MoCo v2"]


def test_a_run_that_the_study_lacks_is_named_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data.root=nothing", f"--out={tmp_path}", "--rows", "MoCo v2", "--seeds", "3"]
    monkeypatch.setattr(sys, "argv", ["study_finetune", *words])

    with pytest.raises(SystemExit) as ended:
        study_finetune.main()

    assert ended.value.code == 2
    assert "MoCo_v2_3'; python -m " in capsys.readouterr().err


def test_a_run_with_a_line_is_left_out_and_needs_no_folder(tmp_path: Path) -> None:
    results = tmp_path / "lines.jsonl"
    options = argparse.Namespace(
        root="people", out=tmp_path, preset="demo", rows=["random", "MoCo v2"], seeds=[0, 1],
        persons=0.1, epochs=40, test=False, results=results,
    )  # fmt: skip
    everything = study_finetune.missing_runs(options, COMMON)
    results.write_text(json.dumps(everything[1][0] | {"mAP": 0.2}) + "\n")

    assert [(each["row"], each["seed"]) for each, _ in everything] == [
        ("random", 0), ("MoCo v2", 0), ("random", 1), ("MoCo v2", 1),
    ]  # fmt: skip
    assert study_finetune.missing_runs(options, COMMON) == everything[:1] + everything[2:]
    assert everything[2][1] == run_folder(tmp_path, "demo", COMMON, "MoCo v2", 1)


def test_runs_that_are_scored_by_the_official_query_are_others(tmp_path: Path) -> None:
    results = tmp_path / "lines.jsonl"
    options = argparse.Namespace(
        root="people", out=tmp_path, preset="demo", rows=["MoCo v2"], seeds=[0],
        persons=0.1, epochs=40, test=False, results=results,
    )  # fmt: skip
    (validation,) = study_finetune.missing_runs(options, COMMON)
    results.write_text(json.dumps(validation[0]) + "\n")
    options.test = True

    ((about, _),) = study_finetune.missing_runs(options, COMMON)

    assert about["split"] == "test, fine-tuned on 10% of the persons, 40 epochs"


def test_with_test_all_train_persons_have_labels_and_the_official_images_are_scored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    splits = {"train": 20, "query": 3, "gallery": 6}

    def read_images(root: str, split: str, height: int, width: int) -> LabelledImages:
        number = splits[split]
        pids = torch.arange(number) // 2
        return LabelledImages(people(number, number), Labels(pids, torch.arange(number) % 2))

    monkeypatch.setattr(study_finetune, "read_images", read_images)

    (official, everyone), (inner, some) = (
        study_finetune.labelled_data("people", 64, 32, test=test) for test in (True, False)
    )

    assert everyone.tolist() == [row // 2 for row in range(20)]
    assert [len(each) for each in (official.train, official.query.images)] == [20, 3]
    assert len(official.gallery.images) == 6
    assert (len(inner.train), len(some)) == (16, 16)
    assert set(inner.query.labels.pids.tolist()).isdisjoint(some.tolist())
