"""Scoring a frozen backbone on a real Ray: the same scores as in one process, and refusals."""

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import ray
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from tests.data.stream.test_stream import BROKEN, flat, write_set
from upreid_ray.config.downstream import EvaluateConfig
from upreid_ray.config.errors import InputError, RunFailed
from upreid_ray.config.run import ScalingConfig
from upreid_ray.core.cpu import TrimmedConv2d
from upreid_ray.core.retrieval import extract_features, retrieval_scores
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.data.stream.labelled import LabelledImages
from upreid_ray.downstream.evaluate import evaluate
from upreid_ray.downstream.extractor import Extractor, extract_blocks
from upreid_ray.tracking import connection
from upreid_ray.train import initialization

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def person(seed: int, pid: int) -> Image.Image:
    """Make an image of noise in the colour of a person."""
    random = np.random.default_rng((seed, pid))
    color = np.random.default_rng(pid).integers(0, 256, 3)
    noise = random.integers(0, 256, (48, 24, 3))
    return Image.fromarray(((color + noise) // 2).astype(np.uint8))


@pytest.fixture(scope="module")
def market(folder) -> Path:
    """Make a set of two blocks, 100 persons and 2 cameras, in Market-1501's layout."""
    root = folder / "market"
    for pid in range(1, 101):
        for number, (part, camid) in enumerate(
            [("query", 1), ("bounding_box_test", 1), ("bounding_box_test", 2)]
        ):
            (root / part).mkdir(parents=True, exist_ok=True)
            person(number, pid).save(root / part / f"{pid:04d}_c{camid}s1_{number:06d}_00.jpg")
    return root


@pytest.fixture(scope="module")
def config(folder, market) -> EvaluateConfig:
    return EvaluateConfig().override(
        {
            "backbone": "resnet18",
            "data.root": str(market),
            "data.height": 64,
            "data.width": 32,
            "rerank": True,
            "scaling.cpus_per_worker": 0.5,
            "run.storage_path": str(folder / "runs"),
        }
    )


@pytest.fixture(scope="module")
def finished(ray_cluster, config) -> SimpleNamespace:
    result = evaluate(config)
    return SimpleNamespace(result=result, run=connection.connect().get_run(result.run_id))


def test_an_actor_without_a_gpu_trims_its_convolutions(ray_cluster):
    init = initialization.random("resnet18", seed=0)
    scaling = ScalingConfig(use_gpu=False, threads_per_worker=torch.get_num_threads())

    extractor = Extractor(ray.put(init), scaling).extractor

    kinds = {type(each) for each in extractor.modules() if isinstance(each, nn.Conv2d)}
    assert kinds == {TrimmedConv2d}


def test_the_death_of_the_process_that_hands_out_blocks_is_one_line(ray_cluster):
    def images(rows):
        time.sleep(0.5)
        return {"image": np.zeros((1, 3, 64, 32), np.uint8), **rows}

    blocks = ray.data.range(40, override_num_blocks=40).map_batches(images, batch_size=None)
    init = initialization.random("resnet18", seed=0)
    arriving = extract_blocks(blocks, 40, init, ScalingConfig(use_gpu=False))
    next(arriving)
    for process in psutil.process_iter(["cmdline"]):
        if "SplitCoordinator" in " ".join(process.info["cmdline"] or ()):
            process.kill()

    with pytest.raises(RunFailed, match="images died; run the same command again"):
        list(arriving)


def test_scores_are_those_of_one_process(finished, config):
    init = initialization.random("resnet18", seed=0)
    shards = finished.run.data.tags["shards"]
    images = LabelledImages(ShardSet.open(shards), height=64, width=32)
    blocks = [images.read(number) for number in range(images.num_blocks)]
    assert len(blocks) == 2
    block = {name: np.concatenate([each[name] for each in blocks]) for name in blocks[0]}

    features = extract_features(
        init.extractor(), [torch.from_numpy(block["image"])], init.description.normalization
    )

    pids, camids, is_query = (
        torch.from_numpy(block[name]) for name in ("pid", "camid", "is_query")
    )
    expected = retrieval_scores(
        torch.cdist(features[is_query], features[~is_query]),
        pids[is_query],
        camids[is_query],
        pids[~is_query],
        camids[~is_query],
    ).summary()
    found = {name: finished.result.scores[name] for name in expected}
    assert found == pytest.approx(expected, abs=1e-4)


def test_the_page_shows_the_worst_and_the_best_queries(finished):
    page = (Path(finished.result.result_dir) / "rankings.html").read_text()

    assert page.count('<figure class="asked">') == 20
    assert page.count("data:image/png") == 2
    assert {"right", "wrong", "junk"} <= set(re.findall(r'<figure class="(\w+)">', page))
    assert "no picture" not in page


def test_colours_are_found_again(finished):
    assert finished.result.scores["mAP"] > 0.5


def test_reranked_scores_stand_apart(finished):
    names = {name for name in finished.result.scores if name.endswith("_reranked")}

    assert names == {f"{n}_reranked" for n in ("mAP", "rank1", "rank5", "rank10", "mINP")}


def test_the_run_has_the_scores_and_says_what_was_scored(finished):
    assert finished.run.info.status == "FINISHED"
    assert finished.run.data.metrics["eval/mAP"] == finished.result.scores["mAP"]
    assert finished.run.data.tags["init"] == "random"
    assert len(finished.run.data.tags["evaluation"]) == 64


def test_the_folder_of_the_run_has_the_scores(finished):
    written = json.loads((Path(finished.result.result_dir) / "scores.json").read_text())

    assert written["scores"] == finished.result.scores


def test_the_set_is_prepared_once(finished, config):
    again = evaluate(config)

    assert again.scores == finished.result.scores
    assert len(list((Path(config.run.storage_path) / "data").iterdir())) == 1


def test_another_pool_and_a_file_of_the_same_weights_score_the_same(finished, config, tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file(initialization.random("resnet18", seed=0).weights, file)
    same = {"init": str(file), "scaling.num_workers": 2, "rerank": False}

    result = evaluate(config.override(same))

    assert result.scores["mAP"] == pytest.approx(finished.result.scores["mAP"], abs=1e-3)


def refusal(config: EvaluateConfig, settings: dict[str, object]) -> str:
    with pytest.raises(InputError) as refused:
        evaluate(config.override(settings))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_set_without_query_images_is_refused(ray_cluster, config, market, tmp_path):
    (tmp_path / "bounding_box_test").symlink_to(market / "bounding_box_test")

    assert "has no query images" in refusal(config, {"data.root": str(tmp_path)})


def test_a_set_without_labels_is_refused(ray_cluster, config, market):
    root = str(market / "query")

    assert "has no query images" in refusal(config, {"data.root": root})


def test_a_set_without_a_match_is_refused(ray_cluster, config, tmp_path):
    for part, camid in (("query", 1), ("bounding_box_test", 1)):
        (tmp_path / part).mkdir()
        person(0, 1).save(tmp_path / part / f"0001_c{camid}s1_000001_00.jpg")

    message = refusal(config, {"data.root": str(tmp_path)})
    assert message.endswith(
        "under another camera; jobs/evaluate.py scores it with --ignore_cameras true"
    )


def test_a_damaged_set_of_one_camera_is_scored_if_the_user_says_so(
    ray_cluster, config, tmp_path
):
    gallery = [flat(60 * number) for number in range(4)]
    shards = write_set(tmp_path, {"query": [*gallery[:2], BROKEN], "gallery": gallery})
    (tmp_path / "manifest.json").write_text(shards.manifest.model_dump_json())

    result = evaluate(
        config.override(
            {
                "data.root": shards.uri,
                "data.max_undecodable": 0.2,
                "ignore_cameras": True,
                "rerank": False,
            }
        )
    )

    assert (result.num_undecodable, result.num_queries_without_match) == (1, 0)
    assert result.scores["mAP"] == 1
    metrics = connection.connect().get_run(result.run_id).data.metrics
    assert metrics["eval/num_undecodable"] == 1


def test_a_root_that_does_not_exist_is_refused(ray_cluster, config, tmp_path):
    root = str(tmp_path / "nothing")

    assert refusal(config, {"data.root": root}).startswith(f"{root}: does not exist")


def test_an_initialization_that_does_not_exist_is_refused_before_a_run_begins(config):
    client = connection.connect()
    before = len(client.search_runs([e.experiment_id for e in client.search_experiments()]))

    assert refusal(config, {"init": "models:/nobody@champion"}).startswith("models:/nobody")

    after = len(client.search_runs([e.experiment_id for e in client.search_experiments()]))
    assert after == before
