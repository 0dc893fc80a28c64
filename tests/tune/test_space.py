"""What can be swept, and the points that a sweep tries."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.samplers import RandomSampler

from upreid_ray.config.errors import InputError
from upreid_ray.config.presets import PRESETS
from upreid_ray.config.section import absolute
from upreid_ray.config.sweep import SearchConfig
from upreid_ray.tune.points import PointSearch, candidates, draw_points, from_optuna, to_optuna
from upreid_ray.tune.report import best_first, draw_figures, report_page
from upreid_ray.tune.space import (
    SPACES,
    Choice,
    Grid,
    LogUniform,
    SweepPlan,
    Uniform,
    check_plan,
    read_axis,
)
from upreid_ray.tune.trial_record import Candidate, TrialRecord

DEMO = PRESETS["demo"]
LR = "optimizer.lr"


def plan(space: dict[str, str], base=DEMO, **search) -> SweepPlan:
    return SweepPlan(base=base, search=SearchConfig(**search), space=space)


def named(name: str, base=DEMO, **search) -> SweepPlan:
    return plan({path: str(axis) for path, axis in SPACES[name].items()}, base, **search)


@pytest.mark.parametrize(
    ("path", "text", "axis"),
    [
        (LR, "uniform(0.1, 1)", Uniform(0.1, 1.0)),
        (LR, "loguniform(1e-3,1)", LogUniform(0.001, 1.0)),
        ("loss.intrinsic_weight", "loguniform(0.01,1,zero)", LogUniform(0.01, 1.0, zero=True)),
        ("patches.rows", "uniform(2,8)", Uniform(2, 8)),
        ("patches.rows", "choice(2,4)", Choice((2, 4))),
        ("patches.mining", "grid(none, symmetry)", Grid(("none", "symmetry"))),
        ("model.pretrained", "choice(none,moco.pth)", Choice((None, absolute("moco.pth")))),
    ],
)
def test_an_axis_is_read_with_the_types_of_its_setting(path, text, axis):
    # The text tells 2 from 2.0.
    assert repr(read_axis(DEMO, path, text)) == repr(axis)


@pytest.mark.parametrize("name", SPACES)
def test_a_named_space_survives_text(name):
    assert named(name).axes() == SPACES[name]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("optimizer.lrr", "choice(1)"),
        ("optimizer", "choice(1)"),
        ("lr", "choice(1)"),
        ("", "choice(1)"),
        ("seed", "choice(1,2)"),
        ("run.name", "choice(a,b)"),
        ("training.epochs", "choice(1,2)"),
        ("evaluation.shards", "choice(a,b)"),
        (LR, "choice()"),
        (LR, "choice(,)"),
        (LR, "choice(0.1,0.1)"),
        (LR, "choice(fast)"),
        (LR, "choice(0)"),
        (LR, "normal(0,1)"),
        (LR, "0.1"),
        (LR, "uniform(0,1)"),
        (LR, "uniform(1)"),
        (LR, "uniform(1,2,3)"),
        (LR, "uniform(2,1)"),
        (LR, "uniform(1,1)"),
        (LR, "uniform(1,inf)"),
        (LR, "loguniform(0,1)"),
        (LR, "loguniform(0.1,1,zero)"),
        ("loss.intrinsic_weight", "loguniform(0,1)"),
        ("loss.intrinsic_weight", "loguniform(-1,1)"),
        ("patches.rows", "uniform(2,2.5)"),
        ("patches.mining", "uniform(1,2)"),
        ("model.pretrained", "uniform(1,2)"),
        ("scaling.use_gpu", "choice(true)"),
        ("augmentation.crop_area", "choice(0.1)"),
    ],
)
def test_an_axis_that_cannot_be_is_refused_in_one_line_that_names_it(path, text):
    with pytest.raises(InputError) as refusal:
        read_axis(DEMO, path, text)

    said = str(refusal.value)
    assert (said.count("\n"), path in said) == (0, True), said


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (plan({}), "--space.SETTING: "),
        (plan({LR: "grid(1,2)"}, searcher="tpe"), f"--space.{LR} grid"),
        (plan({LR: "choice(1,2)"}, grace_epochs=3), "--grace_epochs 3: "),
        (plan({LR: "choice(1,2)"}, trial_epochs=1), "--grace_epochs 1: "),
        (
            plan(
                {LR: "choice(1)"}, DEMO.override({"evaluation.every_epochs": 2}), grace_epochs=1
            ),
            "--grace_epochs 1: ",
        ),
        (plan({"optimizer.adamw.lr": "choice(1,2)"}), "--space.optimizer.adamw.lr: has no "),
        (
            plan({LR: "choice(1,2)"}, DEMO.override({"optimizer.algorithm": "adamw"})),
            f"--space.{LR}: has no effect",
        ),
    ],
    ids=[
        *("nothing", "grid for tpe", "grace of a trial", "short trials"),
        *("grace without scores", "rate of AdamW for a ResNet", "rate of SGD for AdamW"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(made, message):
    with pytest.raises(InputError) as refusal:
        check_plan(made)

    assert str(refusal.value).startswith(message)


def test_rates_of_both_optimizers_may_be_swept_with_the_optimizer():
    choices = {LR: "choice(0.1)", "optimizer.adamw.lr": "choice(0.1)"}

    check_plan(plan({**choices, "optimizer.algorithm": "choice(sgd,adamw)"}))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["i2", "patches", "all"])
def test_every_point_of_a_named_space_fits_every_preset(preset, name):
    search = PointSearch(named(name, PRESETS[preset], num_trials=30), {})
    suggested = [search.suggest(str(number)) for number in range(30)]

    assert len(search.study.trials) == len(suggested)


def test_points_that_are_inconsistent_are_left_out():
    made = plan({"patches.rows": "grid(4,16)", "patches.columns": "grid(2,8)"})

    assert draw_points(made) == [{"patches.rows": 4, "patches.columns": 2}]


def test_backbones_are_an_axis_and_unknown_ones_are_left_out():
    made = plan({"model.backbone": "grid(resnet18,resnet18_ibn_a,resnet51)"})

    names = [point["model.backbone"] for point in draw_points(made)]
    assert names == ["resnet18", "resnet18_ibn_a"]


def test_a_space_without_a_consistent_point_is_refused():
    with pytest.raises(InputError, match=r"^--space: [^\n]*--patches.rows (16|32) "):
        draw_points(plan({"patches.rows": "choice(16,32)"}))


def test_grids_are_crossed_with_each_other_and_with_each_draw():
    made = plan(
        {
            "patches.rows": "grid(2,4)",
            "patches.mining": "grid(none,symmetry)",
            LR: "uniform(1,2)",
        },
        num_trials=3,
    )
    points = draw_points(made)

    assert (len(points), len({point[LR] for point in points})) == (12, 3)


def test_points_are_drawn_once_each():
    points = draw_points(named("patches", num_trials=100))

    assert len(points) == len({tuple(point.values()) for point in points}) == 40


def test_points_are_a_function_of_the_seed():
    other = DEMO.override({"seed": 1})

    drawn = [draw_points(named("i2", base)) for base in (DEMO, DEMO, other)]
    assert (drawn[0] == drawn[1], drawn[0] == drawn[2]) == (True, False)


def test_whole_settings_get_whole_numbers_and_both_bounds():
    points = draw_points(plan({"patches.rows": "uniform(2,4)"}, num_trials=9))

    assert sorted(point["patches.rows"] for point in points) == [2, 3, 4]


def test_a_log_uniform_axis_with_zero_gives_zero_in_a_fifth_of_the_draws():
    search = PointSearch(plan({"loss.intrinsic_weight": "loguniform(0.01,1,zero)"}), {})
    search.study.sampler = RandomSampler(0)
    weights = [
        search.suggest(str(number))["candidate"]["point"]["loss.intrinsic_weight"]
        for number in range(500)
    ]

    others = [weight for weight in weights if weight]
    assert 0.15 < weights.count(0) / len(weights) < 0.25
    assert (min(others) >= 0.01, max(others) <= 1) == (True, True)
    # As many in each of the two orders of magnitude.
    assert 0.4 < sum(weight < 0.1 for weight in others) / len(others) < 0.6


@given(st.sampled_from([0.0, 0.1, 0.3, 5.0]), st.sampled_from([2, 8]))
def test_a_point_survives_optuna(weight, rows):
    axes = {**SPACES["i2"], **SPACES["patches"]}
    point = {path: getattr(axis, "high", None) or axis.values[0] for path, axis in axes.items()}
    point |= {"loss.intrinsic_weight": weight, "patches.rows": rows}

    assert from_optuna(axes, to_optuna(axes, point)) == point


def test_each_point_gets_each_seed():
    made = plan({LR: "grid(0.1,0.2)"}, DEMO.override({"seed": 5}), num_seeds=2)

    found = [
        (each.number, each.point[LR], each.seed) for each in candidates(made, draw_points(made))
    ]
    assert found == [(0, 0.1, 5), (1, 0.1, 6), (2, 0.2, 5), (3, 0.2, 6)]


def test_tpe_proposes_consistent_points_and_each_with_each_seed():
    made = plan(
        {"patches.rows": "choice(4,16)", LR: "uniform(1,2)"}, num_seeds=2, searcher="tpe"
    )
    search = PointSearch(made, {})
    suggested = [Candidate.parse(search.suggest(str(n))["candidate"]) for n in range(20)]

    assert {each.point["patches.rows"] for each in suggested} == {4}
    assert [each.seed for each in suggested] == [0, 1] * 10
    assert [each.point for each in suggested[::2]] == [each.point for each in suggested[1::2]]
    assert len({each.point[LR] for each in suggested}) == 10


def test_tpe_proposes_again_what_an_earlier_process_tried():
    made = plan({LR: "uniform(1,2)"}, num_seeds=2, searcher="tpe")
    point = {LR: 1.2345}
    earlier = {number: Candidate(number=number, point=point, seed=number) for number in (0, 1)}
    search = PointSearch(made, earlier)
    suggested = [Candidate.parse(search.suggest(str(n))["candidate"]) for n in range(4)]

    assert suggested[:2] == list(earlier.values())
    assert suggested[2].point == suggested[3].point != point


def test_tpe_comes_near_the_best_point():
    search = PointSearch(plan({LR: "loguniform(1e-4,1)"}, searcher="tpe"), {})
    distances = []
    for number in range(60):
        rate = search.suggest(str(number))["candidate"]["point"][LR]
        distances.append(abs(math.log10(rate) + 2))
        search.on_trial_complete(str(number), {"mAP": 1 - distances[-1]})

    assert sum(distances[-20:]) < sum(distances[:20]) / 2


def test_tpe_learns_nothing_from_a_trial_that_failed_and_may_hear_of_its_end_twice():
    search = PointSearch(plan({LR: "uniform(1,2)"}, searcher="tpe"), {})
    for number in range(2):
        search.suggest(str(number))
    search.on_trial_complete("0", {"mAP": 0.5})
    search.on_trial_complete("1", error=True)
    search.on_trial_complete("1", {"mAP": 0.9})

    assert [trial.value for trial in search.study.trials] == [0.5, None]


def record(number: int, value: float, rungs: dict[float, float], state="finished", seed=0):
    candidate = Candidate(number=number, point={LR: value}, seed=seed)
    return TrialRecord(candidate=candidate, rungs=rungs, state=state)


RECORDS = [
    record(0, 0.1, {1.0: 0.3, 3.0: 0.4}),
    record(1, 0.1, {1.0: 0.3, 3.0: 0.2}, seed=1),
    record(2, 0.2, {1.0: 0.6}, "stopped"),
    record(3, 0.2, {1.0: 0.6}, "stopped", seed=1),
    record(4, 0.3, {1.0: 0.3, 3.0: 0.5}),
    record(5, 0.3, {}, "failed", seed=1),
    record(6, 0.4, {1.0: 0.9, 3.0: 0.9}),
    record(7, 0.4, {1.0: 0.9}, "diverged", seed=1),
    record(8, 0.5, {}, "diverged"),
]


def test_points_rank_by_how_far_they_came_and_then_by_their_mean():
    ranked = best_first(RECORDS)

    assert [outcome.point[LR] for outcome in ranked] == [0.3, 0.1, 0.2, 0.4]


def test_the_score_of_a_trial_is_that_of_its_best_backbone():
    outcome = next(each for each in best_first(RECORDS) if each.point[LR] == 0.1)

    assert outcome.scores == [0.4, 0.3]
    assert (outcome.mean, outcome.spread) == (
        pytest.approx(0.35),
        pytest.approx(0.0707, abs=1e-4),
    )
    assert outcome.best.candidate.number == 0


@pytest.mark.slow
def test_the_report_is_one_page_with_its_pictures():
    made = plan({LR: "choice(0.1,0.2,0.3,0.4,0.5)"})
    drawn = draw_figures(made, RECORDS)
    ranked = best_first(RECORDS)
    text = report_page("<s>", made, RECORDS, ranked, figures=drawn, best="{}")

    assert set(drawn) == {"rungs.png", "parallel.png", "importance.png"}
    assert all(content.startswith(b"\x89PNG") for content in drawn.values())
    assert (text.count("data:image/png;base64,"), "<s>" in text, "http" in text) == (
        3,
        False,
        False,
    )
    assert text.count("<tr>") == 1 + 4 + 1 + 9
    summary = (
        f"9 trials of {made.num_epochs} epochs: 4 finished, 2 stopped, 1 failed, 2 diverged"
    )
    assert summary in text
