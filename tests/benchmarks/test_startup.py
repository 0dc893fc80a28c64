"""The map of a start."""

from pathlib import Path

import pytest

from benchmarks.startup import Case, Life, Start, draw, kind_of, process_table, start

# Begins a run, starts a process that works for a while and imports nothing, and waits.
JOB = """
import pathlib, subprocess, sys, time
folder = pathlib.Path("runs", sys.argv[1])
folder.mkdir(parents=True)
(folder / "run.json").write_text("{}")
busy = "import time; t = time.process_time()\\nwhile time.process_time() < t + 1: pass"
subprocess.run([sys.executable, "-c", busy])
(folder / "metrics.jsonl").write_text("train/loss")
time.sleep(60)
"""


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Start:
    root = tmp_path_factory.mktemp("start")
    (root / "jobs").mkdir()
    (root / "jobs/wait.py").write_text(JOB)
    marks = {
        "begun": ("NAME/run.json", ""),
        "first step": ("NAME/metrics.jsonl", "train/loss"),
    }
    return start(root, root, Case(("wait", "NAME"), marks), "a")


def test_a_start_ends_at_its_last_mark_and_leaves_no_process(begun):
    assert list(begun.marks) == ["begun", "first step"]
    assert begun.marks["begun"] < begun.marks["first step"] == begun.seconds
    assert not any(Path(f"/proc/{pid}").exists() for pid in begun.lives)


def test_the_cpu_time_of_all_processes_counts_even_of_those_that_have_ended(begun):
    busy = max(begun.lives.values(), key=lambda life: life.cpu_seconds())

    assert 0.5 < busy.cpu_seconds() <= begun.cpu_seconds
    assert busy.torch_at is None


def test_a_map_shows_each_process(begun, tmp_path):
    draw(begun, tmp_path / "map.svg")

    assert "<svg" in (tmp_path / "map.svg").read_text()
    assert process_table(begun).row_count == len(begun.lives) + 1


def test_time_before_the_beginning_does_not_count():
    life = Life(0.0, samples=[(0.0, 0.0), (1.0, 0.8), (2.0, 1.0)], kinds=[(0.0, "job")])

    assert Start({"first": 1.0, "last": 2.0}, 1.0, {1: life}).cpu_seconds == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["ray::RayTrainWorker.run"], "ray::RayTrainWorker"),
        (["python", "-u", "/x/ray/dashboard/dashboard.py", "--host"], "dashboard.py"),
        (["ray-dashboard-JobHead-0 (python -c ...)"], "ray-dashboard-JobHead-0"),
        (["/x/gcs_server", "--log_dir=/tmp"], "gcs_server"),
    ],
)
def test_a_process_is_called_what_it_is(words, kind):
    assert kind_of(words) == kind
