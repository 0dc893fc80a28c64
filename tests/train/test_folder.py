"""Folders of runs: one job begins a run, and its record says what it started from."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from upreid_ray.config.errors import InputError
from upreid_ray.config.presets import FINETUNE_PRESETS
from upreid_ray.config.section import UPLOADED
from upreid_ray.train.folder import RUN_FILE, RunFolder
from upreid_ray.train.job import FREE_SETTINGS

CONFIG = FINETUNE_PRESETS["demo"]


def test_of_jobs_that_begin_a_run_at_the_same_moment_one_wins(tmp_path):
    folder = RunFolder(str(tmp_path), "run")

    def begin(number: int) -> bool:
        try:
            with folder.begin():
                folder.record(CONFIG, str(number))
        except InputError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(begin, range(8)))

    assert sum(won) == 1
    with pytest.raises(InputError, match=r"^--run\.name run: exists already; "):
        folder.require_new()
    assert folder.recorded()[0] == str(won.index(True))


def test_a_submitted_job_without_a_storage_is_refused(tmp_path, monkeypatch):
    (tmp_path / f"{UPLOADED}1234").mkdir()
    monkeypatch.chdir(tmp_path / f"{UPLOADED}1234")
    monkeypatch.delenv("UPREID_RAY_STORAGE", raising=False)

    with pytest.raises(InputError, match=r"^--run\.storage_path: runs is not in the uploaded"):
        RunFolder.of(CONFIG.run, "finetune")


def test_a_run_that_could_not_begin_leaves_its_name_free(tmp_path):
    folder = RunFolder(str(tmp_path), "run")
    try:
        with folder.begin():
            raise OSError
    except OSError:
        pass

    with folder.begin():
        folder.record(CONFIG, "1")

    assert folder.recorded()[0] == "1"


def test_a_record_keeps_the_version_that_an_alias_stood_for(tmp_path):
    folder = RunFolder(str(tmp_path), "run")

    folder.record(CONFIG.override({"init": "models:/a@champion"}), "1", {"init": "models:/a/3"})

    assert folder.recorded()[1]["init"] == "models:/a@champion"
    assert folder.recorded_lineage() == {"init": "models:/a/3"}


def test_records_of_older_runs_say_nothing_of_their_lineage(tmp_path):
    folder = RunFolder(str(tmp_path), "run")
    folder.write(RUN_FILE, '{"run_id": "1", "config": {}}')

    assert folder.recorded_lineage() == {}


def test_a_run_is_continued_with_its_own_settings_alone(tmp_path):
    folder = RunFolder(str(tmp_path), "run")
    folder.record(CONFIG, "1")
    changed = CONFIG.override({"optimizer.lr": 1.5})

    with pytest.raises(InputError, match=r"^--optimizer\.lr 1\.5: run run was started with "):
        folder.recorded_run(changed, free=("run.",))

    assert folder.recorded_run(changed, free=("optimizer.lr",)) == "1"


def test_a_run_that_failed_on_damaged_images_is_continued_with_another_limit(tmp_path):
    folder = RunFolder(str(tmp_path), "run")
    folder.record(CONFIG, "1")

    allowed = CONFIG.override({"data.max_undecodable": 0.5})

    assert folder.recorded_run(allowed, FREE_SETTINGS) == "1"
