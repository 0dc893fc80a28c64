"""Settings: described, frozen, refused in one line that names the flag, and JSON both ways."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from upreid_ray.config.downstream import ClusterContrastConfig, EvaluateConfig
from upreid_ray.config.errors import InputError
from upreid_ray.config.presets import AUGMENTATIONS, PRESETS
from upreid_ray.config.pretrain import DataConfig, ModelConfig, PretrainConfig, TrainingConfig
from upreid_ray.config.run import ScalingConfig
from upreid_ray.config.section import UPLOADED, Section

BASE = PretrainConfig(
    data=DataConfig(height=64, width=32),
    model=ModelConfig(backbone="resnet18"),
    training=TrainingConfig(batch_size=128, group_size=64),
    scaling=ScalingConfig(num_workers=1, use_gpu=False),
)

any_preset = pytest.mark.parametrize("config", PRESETS.values(), ids=list(PRESETS))


def sections(section: type[Section] = PretrainConfig) -> list[type[Section]]:
    found = [section]
    for field in section.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found += sections(field.annotation)
    return found


def refusal(settings: dict[str, Any], config: PretrainConfig = BASE) -> str:
    """Return why settings are refused, after checking that it says so in one line."""
    with pytest.raises(InputError) as refused:
        config.override(settings)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("section", [*sections(), *sections(ClusterContrastConfig)])
def test_every_setting_and_section_is_described(section):
    assert section.__doc__
    for name, field in section.model_fields.items():
        assert field.description, name


def test_the_sections_are_all_found():
    assert len(sections()) == 14


@any_preset
def test_presets_survive_json(config):
    assert PretrainConfig.parse(json.loads(config.model_dump_json())) == config


@any_preset
def test_presets_survive_flattening(config):
    assert PretrainConfig().override(dict(config.flatten())) == config


@any_preset
def test_presets_survive_text(config):
    def text(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    as_text = {path: text(value) for path, value in config.flatten()}

    assert PretrainConfig().override(as_text) == config


def test_no_two_settings_share_a_path():
    paths = [path for path, _ in BASE.flatten()]

    assert len(paths) == len(set(paths))
    assert {"seed", "optimizer.lr", "data.synthetic.num_cameras"} <= set(paths)


def test_a_setting_is_overridden_by_its_path():
    config = BASE.override({"optimizer.lr": 0.5, "data.synthetic.seed": 7, "seed": 3})

    assert (config.optimizer.lr, config.data.synthetic.seed, config.seed) == (0.5, 7, 3)


def test_overriding_changes_nothing_else():
    changed = dict(BASE.override({"optimizer.lr": 0.5}).flatten())

    assert changed == {**dict(BASE.flatten()), "optimizer.lr": 0.5}


def test_overriding_leaves_the_config_it_began_with():
    before = BASE.model_dump_json()

    BASE.override({"optimizer.lr": 0.5})

    assert BASE.model_dump_json() == before


def test_a_whole_section_can_be_overridden():
    config = BASE.override({"augmentation": AUGMENTATIONS["dino"]})

    assert config.augmentation == AUGMENTATIONS["dino"]


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("optimizer.lr", "3e-2", 0.03),
        ("training.epochs", "7", 7),
        ("scaling.use_gpu", "true", True),
        ("patches.mining", "none", "none"),
        ("run.name", "none", None),
        ("data.shards", "None", None),
        ("run.name", "first-run", "first-run"),
        ("augmentation.blur_sigma", "0.1,0.2", (0.1, 0.2)),
        ("augmentation.crop_area", "0.5, 1", (0.5, 1.0)),
        ("augmentation.mean", "0,0.5,1", (0.0, 0.5, 1.0)),
    ],
)
def test_text_is_read_as_the_type_of_the_setting(path, text, value):
    settings = dict(BASE.override({path: text}).flatten())

    assert settings[path] == value
    assert type(settings[path]) is type(value)


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("optimizer.learning_rate", "--optimizer.lr"),
        ("training.epoch", "--training.epochs"),
        ("optimiser.lr", "--optimizer.lr"),
        ("loss.consistency_weigth", "--loss.consistency_weight"),
    ],
)
def test_an_unknown_path_suggests_the_near_one(path, near):
    message = refusal({path: 1})

    assert message == f"--{path}: no such setting; did you mean {near}?"


@pytest.mark.parametrize("path", ["zzz", "zzz.qqq.xxx", "seed.zzz.qqq.xxx"])
def test_a_path_unlike_any_points_to_the_help(path):
    assert refusal({path: 1}) == f"--{path}: no such setting; see --help"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("training.epochs", "many"),
        ("training.epochs", "1.5"),
        ("training.epochs", 0),
        ("training.epochs", "none"),
        ("training.group_size", 1),
        ("optimizer.lr", "fast"),
        ("optimizer.lr", -1.0),
        ("optimizer.lr", "inf"),
        ("optimizer.lr", "nan"),
        ("optimizer.momentum", 1.0),
        ("seed", -1),
        ("scaling.use_gpu", "perhaps"),
        ("patches.mining", "hard"),
        ("model.backbone", "res net"),
        ("model.momentum", 1.5),
        ("data.height", 16),
        ("data.synthetic.num_cameras", 1),
        ("run.name", "a/b"),
        ("run.name", ""),
        ("augmentation.crop_area", "0.1"),
        ("augmentation.crop_area", "0.1,0.2,0.3"),
        ("augmentation.crop_area", "0.9,0.1"),
        ("augmentation.crop_area", "0,1"),
        ("augmentation.crop_area", "a,b"),
        ("augmentation.flip_probability", 1.1),
        ("augmentation.std", "0.1,0.1,0"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_the_name_of_its_flag(path, value):
    assert refusal({path: value}).startswith(f"--{path}: ")


@pytest.mark.parametrize("path", ["data.shards", "evaluation.shards", "run.storage_path"])
def test_a_uri_with_a_password_is_refused_without_showing_it(path):
    with pytest.raises(InputError, match=f"^--{path}: no user or password") as refusal:
        PretrainConfig().override({path: "s3://me:geheim@bucket/people"})

    assert "geheim" not in str(refusal.value)


def test_a_uri_without_a_password_is_taken():
    config = PretrainConfig().override({"data.shards": "s3://bucket/a@b"})

    assert config.data.shards == "s3://bucket/a@b"


PATHS = {
    "data.shards": PretrainConfig(),
    "evaluation.shards": PretrainConfig(),
    "model.pretrained": PretrainConfig(),
    "run.storage_path": PretrainConfig(),
    "data.root": ClusterContrastConfig(),
    "init": ClusterContrastConfig(),
}
path_settings = pytest.mark.parametrize(("path", "config"), PATHS.items(), ids=list(PATHS))


@path_settings
@pytest.mark.parametrize("typed", ["a set", "./a set", "a set/", "a set/m\u00fcller.pth", "~x"])
def test_a_path_is_relative_to_where_the_user_stands(
    tmp_path, monkeypatch, path, config, typed
):
    monkeypatch.chdir(tmp_path)

    recorded = config.override({path: typed}).model_dump_json()

    monkeypatch.chdir("/")
    settings = dict(type(config).parse(json.loads(recorded)).flatten())
    assert settings[path] == str(tmp_path / typed)


@path_settings
@pytest.mark.parametrize("place", ["/set", "s3://bucket/a set", "file:///set"])
def test_an_absolute_path_and_a_uri_stay_as_they_are(path, config, place):
    assert dict(config.override({path: place}).flatten())[path] == place


@pytest.mark.parametrize("init", ["random", "models:/upreid@champion", "models:/upreid/3"])
def test_an_initialization_that_is_no_path_stays_as_it_is(init):
    assert EvaluateConfig(init=init).init == init


@path_settings
def test_a_submitted_job_refuses_a_path_that_was_not_uploaded(
    tmp_path, monkeypatch, path, config
):
    (tmp_path / f"{UPLOADED}1234" / "own").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / f"{UPLOADED}1234")

    assert dict(config.override({path: "own"}).flatten())[path] == str(Path("own").absolute())
    assert refusal({path: "shards"}, config).startswith(
        f"--{path}: shards is not in the uploaded copy of your folder"
    )


@path_settings
def test_an_empty_path_is_refused(path, config):
    assert refusal({path: ""}, config).startswith(f"--{path}: a path must not be empty")


def test_no_preset_knows_the_working_folder():
    values = [value for config in PRESETS.values() for _, value in config.flatten()]

    assert [value for value in values if isinstance(value, str) and "/" in value] == []


def test_a_refusal_says_what_was_given():
    assert refusal({"training.epochs": "many"}).endswith("(got 'many')")


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        (
            {"training.group_size": 48},
            ["--training.group_size 48", "--training.batch_size 128"],
        ),
        (
            {"scaling.num_workers": 200},
            ["--scaling.num_workers 200", "--training.batch_size 128"],
        ),
        ({"scaling.max_workers": 200}, ["--scaling.max_workers 200", "groups of a batch"]),
        ({"scaling.min_workers": 2}, ["--scaling.num_workers 1", "--scaling.min_workers 2"]),
        ({"patches.rows": 1}, ["--patches.rows 1", "--patches.mining symmetry"]),
        (
            {"patches.rows": 1, "patches.columns": 1, "patches.mining": "none"},
            ["--patches.rows 1", "--patches.columns 1", "--patches.mining none"],
        ),
        ({"patches.rows": 9}, ["--patches.rows 9", "--patches.columns 2", "64x32"]),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_their_flags(settings, flags):
    message = refusal(settings)

    for flag in flags:
        assert flag in message


def test_the_grid_is_of_no_concern_without_the_intrinsic_loss():
    config = BASE.override({"patches.rows": 1, "loss.intrinsic_weight": 0})

    assert config.patches.rows == 1


def test_same_cell_pairing_needs_no_second_row():
    config = BASE.override({"patches.rows": 1, "patches.mining": "none"})

    assert config.patches.rows == 1


def test_a_file_with_an_unknown_setting_is_refused_by_its_path():
    tree = json.loads(BASE.model_dump_json())
    tree["optimizer"]["speed"] = 1

    with pytest.raises(InputError, match=r"^--optimizer\.speed: "):
        PretrainConfig.parse(tree)


@pytest.mark.parametrize("section", [BASE, BASE.optimizer, BASE.data.synthetic])
def test_settings_are_frozen(section):
    name = next(iter(type(section).model_fields))

    with pytest.raises(ValidationError, match="frozen"):
        setattr(section, name, getattr(section, name))


def test_the_model_is_named_after_its_backbone_unless_it_has_a_name():
    named = BASE.override({"run.register_as": "mine"})

    assert (BASE.model_name, named.model_name) == ("upreid-resnet18", "mine")


def test_groups_are_those_of_the_whole_batch():
    assert BASE.num_groups == 2


def test_a_refused_combination_is_one_line_that_names_both_settings():
    chosen = {"model.pretrained": "/a.pth", "model.continue_from": "/b"}

    assert refusal(chosen) == (
        "--model.continue_from /b: holds the weights already; leave out --model.pretrained"
    )
