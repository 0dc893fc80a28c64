"""Fine-tuning on a real Ray, from a registered version to its descendant."""

from types import SimpleNamespace

import pytest

from tests.core.tiny import TINY as PRETRAINING
from tests.core.tiny import fresh_state
from upreid_ray.config.downstream import ClusterContrastConfig, EvaluateConfig, FinetuneConfig
from upreid_ray.config.errors import InputError
from upreid_ray.config.presets import CLUSTER_CONTRAST_PRESETS, FINETUNE_PRESETS
from upreid_ray.core.checkpoint import BestBackbone, export_backbone, save_checkpoint
from upreid_ray.downstream.evaluate import evaluate
from upreid_ray.tracking import connection, registry, runs
from upreid_ray.train.finetune import finetune
from upreid_ray.train.initialization import resolve

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def ancestor(folder) -> str:
    """Register a backbone that was not trained; return its version."""
    checkpoint, exported = folder / "checkpoint", folder / "exported"
    checkpoint.mkdir()
    exported.mkdir()
    state, best = fresh_state(PRETRAINING), BestBackbone()
    best.update(state, {})
    save_checkpoint(checkpoint, state, best, scores_untrained={}, images_per_second=0.0)
    export_backbone(checkpoint, exported)
    client = connection.connect()
    run = runs.start_run(client, experiment="tests", name="a-run", config=PRETRAINING)
    return registry.register_backbone(
        client, run_id=run, name="upreid-tiny", folder=exported, tags={}
    )


@pytest.fixture(scope="module")
def config(folder, ancestor) -> FinetuneConfig:
    # 8 persons with 4 images, so 2 steps an epoch.
    return FINETUNE_PRESETS["demo"].override(
        {
            "init": "models:/upreid-tiny@champion",
            "data.synthetic.num_train_identities": 8,
            "data.synthetic.num_test_identities": 4,
            "data.synthetic.num_unlabeled_identities": 0,
            "data.synthetic.num_cameras": 2,
            "data.synthetic.height": 64,
            "data.synthetic.width": 32,
            "training.epochs": 4,
            "training.num_persons": 8,
            "training.num_images": 2,
            "training.num_groups": 2,
            "training.precision": "fp32",
            "training.log_every_steps": 2,
            "evaluation.every_epochs": 2,
            "checkpoint.every_steps": 3,
            "scaling.num_workers": 2,
            "scaling.cpus_per_worker": 0.5,
            "scaling.threads_per_worker": 1,
            "run.name": "tiny",
            "run.storage_path": str(folder / "runs"),
        }
    )


@pytest.fixture(scope="module")
def finished(ray_cluster, config) -> SimpleNamespace:
    result = finetune(config)
    client = connection.connect()
    return SimpleNamespace(
        result=result,
        client=client,
        run=client.get_run(result.run_id),
        version=registry.find_version(client, result.model_uri),
    )


def test_the_model_is_registered_under_a_name_of_its_own(finished):
    assert finished.result.model_uri == "models:/upreid-resnet18-finetuned/1"


def test_run_and_version_name_where_they_began(finished, ancestor):
    assert finished.run.data.tags["init"] == ancestor == "models:/upreid-tiny/1"
    assert finished.version.tags["init"] == ancestor


def test_the_ancestor_lists_its_descendants(finished, ancestor):
    tags = registry.find_version(finished.client, ancestor).tags

    assert tags["descendant.upreid-resnet18-finetuned.1"] == finished.result.model_uri


def test_the_run_is_scored_before_during_and_after(finished):
    history = finished.client.get_metric_history(finished.result.run_id, "eval/mAP")

    assert [point.step for point in history] == [0, 4, 8]
    assert finished.result.scores["mAP"] == max(point.value for point in history[1:])


def test_images_are_those_of_the_pretraining(finished):
    description = resolve(finished.result.model_uri).description

    assert description.mean == PRETRAINING.augmentation.mean
    assert (description.height, description.width) == (64, 32)


def test_scoring_the_registered_model_gives_the_scores_of_its_run(finished, config):
    result = evaluate(
        EvaluateConfig(data=config.data).override(
            {
                "init": finished.result.model_uri,
                "scaling.cpus_per_worker": 0.5,
                "run.storage_path": config.run.storage_path,
            }
        )
    )

    assert result.scores["mAP"] == pytest.approx(finished.result.scores["mAP"], abs=1e-3)


def refusal(config: FinetuneConfig, settings: dict[str, object]) -> str:
    with pytest.raises(InputError) as refused:
        finetune(config.override({"run.name": None, **settings}))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_more_persons_than_take_part_are_refused(ray_cluster, config):
    message = refusal(config, {"subset.persons": 0.5})

    assert message.startswith("--training.num_persons 8: exceeds the 4 persons of ")


def test_a_run_of_the_same_name_is_refused(finished, config):
    assert "exists already" in refusal(config, {"run.name": "tiny"})


def test_resuming_a_run_that_is_done_gives_its_result(finished, config):
    result = finetune(config, resume=True)

    assert result == finished.result


# Without labels.


@pytest.fixture(scope="module")
def unlabelled(config) -> ClusterContrastConfig:
    # What the two methods have in common is that of above.
    common = dict(config.flatten())
    own = CLUSTER_CONTRAST_PRESETS["demo"].override(
        {
            "training.steps_per_epoch": 3,
            "training.epochs": 2,
            "clustering.k1": 4,
            "clustering.k2": 2,
            "clustering.min_samples": 2,
            "evaluation.every_epochs": 1,
            "checkpoint.every_steps": 2,
        }
    )
    kept = ("training.epochs", "evaluation.", "checkpoint.", "optimizer.", "run.name")
    shared = {
        path: value
        for path, value in common.items()
        if path in dict(own.flatten()) and not path.startswith(kept)
    }
    return own.override({**shared, "run.name": "clusters"})


@pytest.fixture(scope="module")
def clustered(ray_cluster, unlabelled) -> SimpleNamespace:
    result = finetune(unlabelled)
    client = connection.connect()
    return SimpleNamespace(result=result, client=client, run=client.get_run(result.run_id))


def test_every_epoch_begins_with_clusters(clustered):
    history = clustered.client.get_metric_history(clustered.result.run_id, "clusters/number")

    assert [point.step for point in history] == [0, 3]
    assert all(point.value >= 2 for point in history)


def test_a_run_without_labels_is_scored_registered_and_linked(clustered, ancestor):
    history = clustered.client.get_metric_history(clustered.result.run_id, "eval/mAP")
    version = registry.find_version(clustered.client, clustered.result.model_uri)

    assert [point.step for point in history] == [0, 3, 6]
    assert version.tags["init"] == ancestor


def test_where_nothing_can_be_clustered_eps_is_named(clustered, unlabelled):
    with pytest.raises(InputError, match=r"^--clustering\.eps 0\.0001: finds no cluster among"):
        finetune(
            unlabelled.override(
                {
                    "run.name": "outliers",
                    "clustering.eps": 0.0001,
                    "clustering.min_samples": 30,
                    "evaluation.every_epochs": 9,
                    "scaling.num_workers": 1,
                }
            )
        )

    last = clustered.client.search_runs(
        [clustered.run.info.experiment_id], "attributes.run_name = 'outliers'"
    )
    assert [run.info.status for run in last] == ["FAILED"]
