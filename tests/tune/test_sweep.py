"""Sweeps on a real Ray, from the space to the registered backbone, and what ends them."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray import tune

from tests.train.test_pretrain import TINY, Job, kill, train_workers
from upreid_ray.command_line import JobParser, add_pretrain_settings, read_pretrain_settings
from upreid_ray.config.errors import InputError
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.config.sweep import SearchConfig
from upreid_ray.tracking import connection
from upreid_ray.train.folder import RunFolder
from upreid_ray.tune import sweep
from upreid_ray.tune.points import PointSearch
from upreid_ray.tune.space import SweepPlan
from upreid_ray.tune.trial_record import CANDIDATE, METRIC, TrialRecord
from upreid_ray.tune.tuner import TRIAL_RESOURCES, num_concurrent

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
WEIGHT = "loss.intrinsic_weight"
NUM_STEPS = 14


@pytest.fixture(scope="module")
def base(folder) -> PretrainConfig:
    return TINY.override(
        {
            "training.epochs": 2,
            "evaluation.every_epochs": 1,
            "scaling.num_workers": 1,
            "run.max_failures": 1,
            "run.storage_path": str(folder / "runs"),
            "run.name": None,
        }
    )


def start(base: PretrainConfig, name: str, space: dict[str, str], **search):
    plan = SweepPlan(base=base, search=SearchConfig(**search), space=space)
    return sweep.start(plan, RunFolder(str(base.run.storage_path), name))


def test_a_name_that_leaves_no_room_for_those_of_trials_is_refused(ray_cluster, base):
    with pytest.raises(InputError, match=r"^--run.name nnn.*: must be shorter than 96 "):
        start(base, "n" * 96, {WEIGHT: "choice(0.1)"})


def records(base: PretrainConfig, name: str) -> list[TrialRecord]:
    """Return what the folders of a sweep say of its trials."""
    files = sorted(Path(str(base.run.storage_path), name).glob("*/trial.json"))
    return [TrialRecord.model_validate_json(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def finished(ray_cluster, base) -> SimpleNamespace:
    """Sweep two points to the end, undisturbed."""
    result = start(base, "two", {WEIGHT: "grid(0,0.1)"}, scheduler="none")
    client = connection.connect()
    parent = client.get_run(result.run_id)
    children = client.search_runs(
        [parent.info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{result.run_id}'",
        order_by=["tags.trial"],
    )
    return SimpleNamespace(
        result=result,
        client=client,
        parent=parent,
        children=children,
        records=records(base, "two"),
    )


def test_both_trials_of_a_sweep_finish(finished):
    assert finished.result.trials == {"finished": 2}


def test_a_trial_trains_what_override_makes_of_its_point(finished, base):
    elsewhere = ("run.", "data.shards")
    for child, weight in zip(finished.children, (0.0, 0.1), strict=True):
        expected = base.override({WEIGHT: weight}).flatten()
        assert {
            path: child.data.params[path]
            for path, value in expected
            if not path.startswith(elsewhere) and child.data.params[path] != str(value)
        } == {}


def test_the_file_of_the_winner_is_what_pretrain_accepts(finished, base):
    parser = JobParser("A job.", "")
    add_pretrain_settings(parser)
    file = f"{finished.result.result_dir}/best.json"

    config = read_pretrain_settings(parser.parse(["--config", file]))

    assert config == base.override(finished.result.best)


def test_the_winner_is_the_point_with_the_best_score(finished):
    best = max(finished.records, key=lambda record: max(record.rungs.values()))

    assert finished.result.best == best.candidate.point
    assert finished.result.scores["mAP"] == max(best.rungs.values())


def test_each_trial_is_a_nested_run_with_its_rungs_and_its_state(finished):
    states = [(run.info.status, run.data.tags["trial.state"]) for run in finished.children]
    histories = [
        finished.client.get_metric_history(run.info.run_id, "eval/mAP")
        for run in finished.children
    ]

    assert states == [("FINISHED", "finished")] * 2
    assert [[each.step for each in history] for history in histories] == [[0, 7, NUM_STEPS]] * 2


def test_rungs_are_the_scores_in_mlflow(finished):
    for run, record in zip(finished.children, finished.records, strict=True):
        history = finished.client.get_metric_history(run.info.run_id, "eval/mAP")
        assert [each.value for each in history[1:]] == list(record.rungs.values())


def test_the_run_of_a_sweep_has_its_plan_its_result_and_its_report(finished):
    run = finished.parent
    files = {file.path for file in finished.client.list_artifacts(run.info.run_id)}

    assert run.info.status == "FINISHED"
    assert run.data.params[f"space.{WEIGHT}"] == "grid(0,0.1)"
    assert run.data.metrics["best/mAP"] == finished.result.scores["mAP"]
    assert files >= {"best.json", "report.html", "rungs.png", "parallel.png"}


def test_the_backbone_of_the_best_trial_is_registered(finished):
    name, number = finished.result.model_uri.removeprefix("models:/").split("/")
    version = finished.client.get_model_version(name, number)
    best = max(finished.records, key=lambda record: max(record.rungs.values()))
    trained = finished.children[best.candidate.number]

    assert len(finished.client.search_model_versions(f"name = '{name}'")) == 1
    assert (version.run_id, version.tags["sweep"]) == (
        trained.info.run_id,
        finished.result.run_id,
    )
    assert float(version.tags["score.mAP"]) == finished.result.scores["mAP"]


@pytest.mark.parametrize(
    ("changed", "space", "message"),
    [
        ({}, "choice(0.1)", "--run.name two: "),
        ({"scaling.cpus_per_worker": 9}, "choice(0.1)", "--scaling.num_workers 1: "),
        ({"scaling.use_gpu": True}, "choice(0.1)", "--scaling.num_workers 1: "),
        ({"training.batch_size": 512}, "choice(0.1)", "--training.batch_size 512: "),
        ({"evaluation.shards": "/no/shards"}, "choice(0.1)", "/no/shards: "),
        ({}, "choice(-1)", f"--space.{WEIGHT} choice(-1): "),
    ],
    ids=["taken name", "no cpus", "no gpu", "few images", "nothing to score", "bad axis"],
)
def test_a_sweep_that_cannot_be_is_refused_in_one_line(finished, base, changed, space, message):
    with pytest.raises(InputError) as refusal:
        start(base.override(changed), "other" if changed else "two", {WEIGHT: space})

    said = str(refusal.value)
    assert (said.startswith(message), said.count("\n")) == (True, 0), said


@pytest.mark.parametrize(
    ("scaling", "at_most", "expected"),
    [((1, 0.5), None, 2), ((1, 0.5), 1, 1), ((2, 0.5), None, 2), ((1, 3.0), None, 1)],
)
def test_as_many_trials_run_at_a_time_as_the_cluster_holds(
    ray_cluster, base, scaling, at_most, expected
):
    num_workers, cpus = scaling
    plan = SweepPlan(
        base=base.override(
            {"scaling.num_workers": num_workers, "scaling.cpus_per_worker": cpus}
        ),
        search=SearchConfig(max_concurrent=at_most),
        space={WEIGHT: "choice(0.1)"},
    )

    assert num_concurrent(plan) == expected


def test_ray_tune_trains_the_points_that_tpe_proposes(ray_cluster, base, folder):
    plan = SweepPlan(
        base=base,
        search=SearchConfig(searcher="tpe", num_trials=3),
        space={"optimizer.lr": "uniform(1,2)", "patches.rows": "choice(4,16)"},
    )
    search = PointSearch(plan, {})

    def train(config):
        if config[CANDIDATE]["number"] == 1:
            raise RuntimeError
        tune.report({METRIC: config[CANDIDATE]["point"]["optimizer.lr"]})

    tune.Tuner(
        tune.with_resources(train, TRIAL_RESOURCES),
        tune_config=tune.TuneConfig(
            metric=METRIC, mode="max", search_alg=search, num_samples=3, max_concurrent_trials=1
        ),
        run_config=tune.RunConfig(storage_path=str(folder / "tpe"), verbose=0),
    ).fit()

    trained = [trial for trial in search.study.trials if trial.params["patches.rows"] == 4]
    rates = [trial.params["optimizer.lr"] for trial in trained]
    assert [trial.value for trial in trained] == [rates[0], None, rates[2]]


@pytest.fixture(scope="module")
def troubled(ray_cluster, base) -> SimpleNamespace:
    """Sweep points that lose their numbers, do not fit in memory, or are good."""
    result = start(
        base.override(
            {"training.epochs": 3, "run.max_skipped_steps": 1, "run.max_failures": 0}
        ),
        "troubled",
        {"optimizer.lr": "grid(0.02,1e30)", "model.queue_size": "grid(32,1000000000000)"},
        scheduler="none",
        trial_epochs=1,
        retrain=True,
    )
    return SimpleNamespace(
        result=result, client=connection.connect(), records=records(base, "troubled")
    )


def test_a_sweep_goes_on_where_trials_diverge_or_fail(troubled):
    assert troubled.result.trials == {"finished": 1, "failed": 2, "diverged": 1}
    assert troubled.result.best == {"optimizer.lr": 0.02, "model.queue_size": 32}


def test_trials_that_did_not_finish_say_why(troubled):
    reasons = [record.reason or "" for record in troubled.records]

    assert reasons[0] == ""
    assert "no finite gradient" in reasons[2]
    assert "memory" in reasons[1]


def test_trials_that_did_not_finish_are_marked_in_mlflow(troubled):
    parent = troubled.client.get_run(troubled.result.run_id)
    runs = troubled.client.search_runs(
        [parent.info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{troubled.result.run_id}'",
        order_by=["tags.trial"],
    )

    assert [(run.info.status, run.data.tags["trial.state"]) for run in runs] == [
        ("FINISHED", "finished"),
        ("FAILED", "failed"),
        ("FAILED", "diverged"),
        ("FAILED", "failed"),
    ]


def test_the_winner_is_trained_again_at_full_length_and_registered(troubled):
    name, number = troubled.result.model_uri.removeprefix("models:/").split("/")
    version = troubled.client.get_model_version(name, number)
    run = troubled.client.get_run(version.run_id)

    assert (run.data.tags["sweep"], run.data.params["training.epochs"]) == (
        troubled.result.run_id,
        "3",
    )


# From here on the job runs in a process with a Ray of its own, parts of which are killed; it is
# resumed on the Ray of these tests.


class SweepJob(Job):
    """A process of jobs/sweep.py."""

    def __init__(
        self,
        base: PretrainConfig,
        folder: Path,
        *words: str,
        python: str = sys.executable,
        ray_address: str = "local",
    ) -> None:
        self.run = Path(str(base.run.storage_path), "killed")
        self._errors = folder / f"killed{len(words)}.log"
        self._python = python
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                [python, ROOT / "jobs/sweep.py", *words],
                cwd=folder,
                env={**os.environ, "RAY_ADDRESS": ray_address},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def trial(self, number: int) -> TrialRecord | None:
        """Return what is known of a trial."""
        try:
            text = (self.run / f"killed-{number:03d}/trial.json").read_text()
            return TrialRecord.model_validate_json(text)
        except (OSError, ValueError):  # there is none, or it is being written
            return None

    def has_rung(self, number: int) -> bool:
        known = self.trial(number)
        return known is not None and len(known.rungs) > 0

    def has_finished(self, number: int) -> bool:
        known = self.trial(number)
        return known is not None and known.state == "finished"


@pytest.fixture(scope="module")
def killed(finished, ray_cluster, python, base, folder) -> SimpleNamespace:
    """Kill a worker of the first trial, and all of the job in the second; resume it."""
    file = folder / "killed.json"
    file.write_text(base.model_dump_json())
    job = SweepJob(
        base,
        folder,
        *("own", "--config", str(file), "--run.name", "killed", "--scheduler", "none"),
        *("--max_concurrent", "1", f"--space.{WEIGHT}", "grid(0,0.1)"),
        python=python,
    )
    try:
        job.wait_for(lambda: job.has_rung(0))
        kill(train_workers())
        job.wait_for(lambda: job.has_finished(0))
        job.wait_for(lambda: job.has_rung(1))
    finally:
        job.end()
    log = (job.run / "killed-000/metrics.jsonl").read_text()
    storage = ("--run.storage_path", str(base.run.storage_path))
    words = ("--resume", "killed", *storage)
    resumed = SweepJob(base, folder, *words, python=python, ray_address=ray_cluster)
    try:
        result = resumed.result()
        return SimpleNamespace(
            first=job.errors,
            log_before=log,
            log_after=(job.run / "killed-000/metrics.jsonl").read_text(),
            result=result,
            errors=resumed.errors,
            records=records(base, "killed"),
        )
    finally:
        resumed.end()


def test_a_trial_whose_worker_is_killed_goes_on_from_its_checkpoint(killed):
    assert "trial 0  goes on at epoch 1" in killed.first


def test_a_resumed_sweep_repeats_no_finished_trial(killed):
    again = "trial 0  begins" in killed.errors or "trial 0  goes on" in killed.errors
    assert (killed.log_after, again) == (killed.log_before, False)


def test_a_resumed_sweep_continues_the_trial_that_ran(killed):
    assert "trial 1  goes on at epoch 1" in killed.errors


def test_a_sweep_that_is_killed_and_resumed_ends_as_if_it_had_not_been(finished, killed):
    assert [record.rungs for record in killed.records] == [
        record.rungs for record in finished.records
    ]
    assert killed.result["scores"] == finished.result.scores
    assert killed.result["best"] == finished.result.best


def test_the_last_line_of_a_sweep_says_what_came_of_it(killed):
    assert set(killed.result) == {
        "run_id",
        "model_uri",
        "scores",
        "images_per_second",
        "best",
        "trials",
        "result_dir",
    }
