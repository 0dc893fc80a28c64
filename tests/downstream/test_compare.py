"""Comparing initializations: rows and statistics, and a whole comparison on a real Ray."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from safetensors.torch import save_file

from upreid_ray.config.downstream import CompareConfig, EvaluateConfig, FinetuneConfig
from upreid_ray.config.errors import InputError, RunStopped
from upreid_ray.config.presets import FINETUNE_PRESETS, IMAGENET
from upreid_ray.config.run import ScalingConfig
from upreid_ray.config.section import RANDOM, absolute
from upreid_ray.core.backbone import Description, build_backbone
from upreid_ray.downstream import comparison_runs
from upreid_ray.downstream.compare import compare, num_side_by_side
from upreid_ray.downstream.comparison_result import CompareResult, Spread, plot, summarize
from upreid_ray.downstream.comparison_runs import (
    FROZEN,
    ComparisonRun,
    Variant,
    resolve_variants,
)
from upreid_ray.tracking import connection
from upreid_ray.train.initialization import Initialization


def planned(label: str, column: str, seed: int) -> ComparisonRun:
    return ComparisonRun(f"{label}-{column}-{seed}", label, column, EvaluateConfig())


def drawn(values: dict[str, list[float]]) -> Axes:
    """Return the axes of the picture of one label with these scores by column."""
    runs = [planned("a", column, k) for column in values for k in range(len(values[column]))]
    scores = {run.name: {"mAP": values[run.column][int(run.name[-1])]} for run in runs}
    (axes,) = plot(summarize(runs, scores, {}, run_id="r", result_dir="d"), "mAP").axes
    return axes


def weights(file: Path) -> str:
    """Write the weights of a backbone that was not trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        save_file(build_backbone("resnet18").state_dict(), file)
    return str(file)


@pytest.mark.parametrize(
    ("text", "variant"),
    [
        ("random", Variant("random", ("random",))),
        ("models:/a@champion", Variant("models:/a@champion", ("models:/a@champion",))),
        ("moco=a.pth", Variant("moco", (absolute("a.pth"),))),
        ("up=models:/a/1,models:/a/2", Variant("up", ("models:/a/1", "models:/a/2"))),
        (
            "runs/lr=0.1/step-1",
            Variant("runs/lr=0.1/step-1", (absolute("runs/lr=0.1/step-1"),)),
        ),
    ],
)
def test_a_variant_has_a_label_and_initializations(text, variant):
    assert Variant.parse(text) == variant


@pytest.mark.parametrize(
    "text", ["random", "a.pth", "moco=a.pth,b.pth", "models:/a@champion", "runs/lr=0.1/step-1"]
)
def test_a_recorded_variant_is_read_as_it_was(text):
    variant = Variant.parse(text)
    resolved = replace(variant, inits=("models:/a/3", "/there/lr=0.1/b.pth"))

    assert Variant.parse(str(variant)) == variant
    assert Variant.parse(str(resolved)) == resolved


@pytest.mark.parametrize("text", ["=a.pth", "moco=", "moco=a.pth,,b.pth"])
def test_a_variant_of_which_a_part_is_empty_is_refused(text):
    with pytest.raises(InputError, match=f"^--init {text}: not of the form"):
        Variant.parse(text)


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "has", "number"),
    [
        (1, 1.0, 0, {"CPU": 2}, 1),
        (2, 0.5, 0, {"CPU": 9}, 4),
        (1, 1.0, 1.0, {"CPU": 64, "GPU": 4}, 4),
        (1, 1.0, 0.25, {"CPU": 64, "GPU": 1}, 4),
        (1, 1.0, 0.25, {"CPU": 4, "GPU": 1}, 2),
        (8, 1.0, 1.0, {"CPU": 64, "GPU": 4}, 1),
    ],
)
def test_as_many_runs_are_side_by_side_as_fit(workers, cpus, gpus, has, number):
    scaling = ScalingConfig(
        num_workers=workers,
        cpus_per_worker=cpus,
        use_gpu=gpus > 0,
        gpus_per_worker=gpus or 1.0,
    )

    assert num_side_by_side(scaling, [has]) == number


def test_random_is_always_a_variant_and_paths_are_whole(tmp_path, monkeypatch):
    weights(tmp_path / "a.safetensors")
    monkeypatch.chdir(tmp_path)

    variants, descriptions = resolve_variants(
        [Variant.parse("a=a.safetensors"), Variant.parse("a.safetensors")]
    )

    whole = str(tmp_path / "a.safetensors")
    assert variants == [
        Variant(RANDOM, (RANDOM,)),
        Variant("a", (whole,)),
        Variant("a.safetensors", (whole,)),
    ]
    assert descriptions[whole].backbone == "resnet18"


@pytest.fixture
def started(monkeypatch):
    """Let two versions come from the files ``/start.pth`` and ``/lost.pth``, now lost."""
    starts = {"models:/a/1": "/start.pth", "models:/b/1": "/lost.pth", "/start.pth": None}

    def resolved(init: str) -> Initialization:
        if init not in starts:
            raise InputError(f"{init}: there is no such file")
        description = Description(backbone="resnet18", height=8, width=4, **IMAGENET)
        return Initialization(init, description, {}, start=starts[init])

    monkeypatch.setattr(comparison_runs, "resolve", resolved)


def test_what_a_backbone_was_trained_from_has_a_row(started):
    start = Variant("/start.pth", ("/start.pth",))

    variants, descriptions = resolve_variants([Variant("a", ("models:/a/1",))])
    assert variants[2:] == [start]
    assert "/start.pth" in descriptions
    # A comparison that is resumed has that row already.
    assert resolve_variants(variants)[0] == variants


def test_a_comparison_does_without_the_row_of_a_start_that_is_gone(started, caplog):
    variants, _ = resolve_variants([Variant("b", ("models:/b/1",))])

    assert [variant.label for variant in variants] == [RANDOM, "b"]
    assert caplog.messages == [
        "without a row for the start of a backbone: /lost.pth: there is no such file"
    ]


def test_a_random_variant_of_the_user_is_the_only_one():
    assert resolve_variants([Variant("chance", (RANDOM,))]) == (
        [Variant("chance", (RANDOM,))],
        {},
    )


def test_variants_of_the_same_label_are_refused():
    with pytest.raises(InputError, match=r"^--init a: names two rows"):
        resolve_variants([Variant("a", ("x.pth",)), Variant("a", ("y.pth",))])


def test_a_spread_has_the_sample_deviation():
    spread = Spread.of([0.1, 0.2, 0.6])

    assert spread.mean == pytest.approx(0.3)
    assert spread.std == pytest.approx((0.07) ** 0.5)
    assert str(spread) == "30.0 +- 26.5"
    assert str(Spread.of([0.25])) == "25.0"


def test_a_cell_has_the_runs_that_ended_and_names_those_that_failed():
    runs = [planned("a", "0.1", seed) for seed in range(3)] + [planned("b", "0.1", 0)]
    scores = {runs[0].name: {"mAP": 0.2}, runs[2].name: {"mAP": 0.4}}
    failures = {runs[1].name: "out of memory", runs[3].name: "no loss"}

    result = summarize(runs, scores, failures, run_id="r", result_dir="d")

    assert result.scores["a"]["0.1"]["mAP"].values == (0.2, 0.4)
    assert result.failed == {"a": {"0.1": ["out of memory"]}, "b": {"0.1": ["no loss"]}}
    assert result.cell("a", "0.1", "mAP") == "30.0 +- 14.1 (1 failed)"
    assert result.cell("b", "0.1", "mAP") == "(1 failed)"


@pytest.mark.parametrize(
    ("column", "said"), [(FROZEN, "frozen"), ("0.125", "12.5% of the persons")]
)
def test_a_run_is_called_by_its_row_its_column_and_its_seed(column, said):
    run = ComparisonRun("2-a-b-7", "a b", column, EvaluateConfig(seed=7))

    assert str(run) == f"a b, {said}, seed 7"


def test_the_table_has_a_row_for_each_label_and_a_column_for_each_split():
    spread = Spread.of([0.25])
    cell = {"mAP": spread, "rank1": spread}
    result = CompareResult("r", {"a": {FROZEN: cell, "0.1": cell}, "b": {"0.1": cell}}, {}, "d")

    table = result.table()

    assert [column.header for column in table.columns] == [
        "mAP / rank-1, %",
        "frozen",
        "10% of the persons",
    ]
    assert [list(column.cells) for column in table.columns] == [
        ["a", "b"],
        ["25.0 / 25.0", " / "],
        ["25.0 / 25.0", "25.0 / 25.0"],
    ]


def test_the_ticks_of_the_picture_are_percent():
    axes = drawn({FROZEN: [0.4], "0.1": [0.5], "1": [0.6]})
    axes.figure.canvas.draw()

    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["10 %", "100 %"]
    assert axes.get_xticklabels(minor=True) == []
    assert all(tick.get_text().endswith(" %") for tick in axes.get_yticklabels())


@pytest.mark.parametrize(
    ("values", "num_bars"),
    [
        ({"0.1": [0.5], "1": [0.6]}, 0),
        ({"0.1": [0.5, 0.6], "1": [0.6, 0.7]}, 2),
        ({"0.1": [0.5], "1": [0.6, 0.7]}, 1),
    ],
)
def test_only_several_runs_have_an_error_bar(values, num_bars):
    axes = drawn(values)

    ends = [bar for each in axes.collections for bar in each.get_segments()]
    assert sum(bool(np.isfinite(bar).all()) for bar in ends if len(bar)) == num_bars


def test_the_settings_of_the_runs_have_their_own_names():
    settings = dict(CompareConfig(init=("random",)).flatten())

    assert settings["training.epochs"] == FinetuneConfig().training.epochs
    assert (settings["init"], settings["seeds"]) == (("random",), 3)
    assert "subset.persons" not in settings


# From here on on a real Ray.


@pytest.fixture(scope="module")
def config(folder) -> CompareConfig:
    common = FINETUNE_PRESETS["demo"].override(
        {
            "data.synthetic.num_train_identities": 8,
            "data.synthetic.num_test_identities": 4,
            "data.synthetic.num_unlabeled_identities": 0,
            "data.synthetic.num_cameras": 2,
            "data.synthetic.height": 64,
            "data.synthetic.width": 32,
            "training.epochs": 1,
            "training.num_persons": 4,
            "training.num_images": 2,
            "training.precision": "fp32",
            "scaling.cpus_per_worker": 0.5,
            "scaling.threads_per_worker": 1,
            "run.name": "tiny",
            "run.storage_path": str(folder / "runs"),
        }
    )
    file = weights(folder / "a.safetensors")
    return CompareConfig(init=(f"a={file}",), splits=(0.5,), seeds=1, finetune=common)


@pytest.fixture(scope="module")
def finished(ray_cluster, config) -> SimpleNamespace:
    result = compare(config)
    client = connection.connect()
    experiment = client.get_experiment_by_name("upreid").experiment_id
    return SimpleNamespace(
        result=result, client=client, experiment=experiment, run=client.get_run(result.run_id)
    )


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_every_variant_is_scored_frozen_and_fine_tuned(finished):
    scores = finished.result.scores

    assert {label: set(columns) for label, columns in scores.items()} == {
        RANDOM: {FROZEN, "0.5"},
        "a": {FROZEN, "0.5"},
    }
    assert finished.result.failed == {}
    assert scores["a"][FROZEN]["mAP"] != scores[RANDOM][FROZEN]["mAP"]


@pytest.mark.ray
def test_runs_are_nested_and_register_nothing(finished):
    nested = finished.client.search_runs(
        [finished.experiment],
        f"tags.mlflow.parentRunId = '{finished.result.run_id}' AND status = 'FINISHED'",
    )

    assert len(nested) == 4
    assert finished.client.search_registered_models() == []


@pytest.mark.ray
def test_a_comparison_that_is_interrupted_says_how_to_go_on(finished, config, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("upreid_ray.downstream.compare._side_by_side", interrupt)
    stopped = config.finetune.override({"run.name": "stopped"})

    with pytest.raises(RunStopped, match="stopped was stopped; continue it with --resume stop"):
        compare(config.model_copy(update={"finetune": stopped}))


@pytest.mark.ray
def test_the_comparison_has_its_table_and_plot(finished):
    written = json.loads((Path(finished.result.result_dir) / "comparison.json").read_text())
    files = {f.path for f in finished.client.list_artifacts(finished.result.run_id)}

    means = finished.result.scores["a"]["0.5"]
    assert written["scores"]["a"]["0.5"]["mAP"]["mean"] == means["mAP"].mean
    assert files >= {"comparison.json", "comparison.png"}
    assert finished.run.data.metrics["0.5/a/mAP"] == means["mAP"].mean


@pytest.mark.ray
def test_a_finished_comparison_runs_nothing_again(finished, config):
    before = len(finished.client.search_runs([finished.experiment]))

    again = compare(config, resume=True)

    assert again == finished.result
    assert len(finished.client.search_runs([finished.experiment])) == before


@pytest.mark.ray
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": ("b=missing.pth",)}, "{here}/missing.pth: "),
        ({"init": ("b=random,random",)}, "--seeds 1: fewer than "),
        ({"splits": (0.1,)}, "--splits 0.1: --training.num_persons 4: exceeds the 2 persons "),
        ({"finetune.run.name": "tiny"}, "--run.name tiny: exists already"),
        ({"finetune.data.root": "nowhere"}, "{here}/nowhere: does not exist"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_starts(
    finished, config, settings, message
):
    before = len(finished.client.search_runs([finished.experiment]))

    with pytest.raises(InputError) as refused:
        compare(config.override({"finetune.run.name": None, **settings}))

    assert str(refused.value).startswith(message.format(here=Path.cwd()))
    assert "\n" not in str(refused.value)
    assert len(finished.client.search_runs([finished.experiment])) == before


@pytest.mark.ray
def test_a_comparison_is_continued_with_its_own_settings_alone(finished, config):
    with pytest.raises(InputError, match=r"^--training\.epochs 2: run tiny was started with 1"):
        compare(config.override({"finetune.training.epochs": 2}), resume=True)
