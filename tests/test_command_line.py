"""What the user types becomes a configuration, or one line that says what is wrong."""

import shlex
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray

from jobs import prepare as prepare_job
from jobs import sweep as sweep_job
from upreid_ray.command_line import (
    CONNECT_SECONDS,
    JobParser,
    add_finetune_settings,
    add_pretrain_settings,
    add_resume,
    add_settings,
    connect_to_ray,
    override,
    parse_recorded,
    read_pretrain_settings,
    recorded_settings,
)
from upreid_ray.config.downstream import ClusterContrastConfig, EvaluateConfig, FinetuneConfig
from upreid_ray.config.errors import InputError
from upreid_ray.config.presets import AUGMENTATIONS, METHOD_PRESETS, PRESETS
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.config.section import Section, absolute
from upreid_ray.data.shards.images import ImageRules
from upreid_ray.train.folder import RunFolder
from upreid_ray.tune.space import SweepPlan

ROOT = Path(__file__).parents[1]


def parser() -> JobParser:
    made = JobParser("A job.", "[PRESET] [--SETTING VALUE ...]")
    add_pretrain_settings(made)
    return made


def settings(*words: str) -> PretrainConfig:
    return read_pretrain_settings(parser().parse(words))


def sections(section: type[Section], title: str = "job") -> list[str]:
    """Return the title of a section and those of the sections in it."""
    found = [title]
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            path = name if title == "job" else f"{title}.{name}"
            found += sections(field.annotation, path)
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_named_by_the_first_word(name):
    config = settings(name, "--data.shards", "s3://bucket/shards")

    assert config == PRESETS[name].override({"data.shards": "s3://bucket/shards"})


def test_the_preset_of_many_gpus_does_not_draw_the_synthetic_set_unasked():
    with pytest.raises(InputError, match=r"^--data\.shards: required .* luperson$"):
        settings("luperson", "--seed", "1")

    assert settings("luperson", "--data.shards", "none") == PRESETS["luperson"]


def test_without_a_preset_the_demo_is_taken():
    assert settings() == PRESETS["demo"]


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["--optimizer.lr", "0.5"], "optimizer.lr", 0.5),
        (["--optimizer.lr=5e-1"], "optimizer.lr", 0.5),
        (["--training.batch_size", "256"], "training.batch_size", 256),
        (["--training.batch-size", "256"], "training.batch_size", 256),
        (["--training.batch-size=256"], "training.batch_size", 256),
        (["--data.shards", "s3://my-bucket/a_b"], "data.shards", "s3://my-bucket/a_b"),
        (["--data.shards=/my-images/x-y"], "data.shards", "/my-images/x-y"),
        (["--data.shards", "/sets/crops--v.a-b"], "data.shards", "/sets/crops--v.a-b"),
        (["--data.shards=/sets/crops--v.a-b"], "data.shards", "/sets/crops--v.a-b"),
        (["--data.shards", "None"], "data.shards", None),
        (["--augmentation.crop_area", "0.5,0.9"], "augmentation.crop_area", (0.5, 0.9)),
        (["--seed", "7"], "seed", 7),
        (["--data.synthetic.num-cameras", "3"], "data.synthetic.num_cameras", 3),
        (["--scaling.use_gpu", "false"], "scaling.use_gpu", False),
    ],
)
def test_a_flag_sets_its_setting_and_no_other(words, path, value):
    before = dict(PRESETS["laptop"].flatten())

    after = dict(settings("laptop", *words).flatten())

    assert after == {**before, path: value}


def test_of_a_flag_that_comes_twice_the_last_counts():
    assert settings("--seed", "1", "--seed", "2").seed == 2


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_named_augmentation_replaces_the_preset_s(name):
    expected = PRESETS["laptop"].override({"augmentation": AUGMENTATIONS[name]})

    assert settings("laptop", "--augmentation", name) == expected


def test_a_flag_changes_a_named_augmentation():
    config = settings("--augmentation", "dino", "--augmentation.flip_probability", "0")

    assert config.augmentation == AUGMENTATIONS["dino"].override({"flip_probability": 0})


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_survives_a_file(tmp_path, name):
    (tmp_path / "config.json").write_text(PRESETS[name].model_dump_json())

    assert settings("--config", str(tmp_path / "config.json")) == PRESETS[name]


def test_a_flag_changes_a_configuration_from_a_file(tmp_path):
    (tmp_path / "config.json").write_text(PRESETS["laptop"].model_dump_json())

    config = settings("--config", str(tmp_path / "config.json"), "--optimizer.lr", "0.01")

    assert config == PRESETS["laptop"].override({"optimizer.lr": 0.01})


def test_a_file_that_names_few_settings_leaves_the_others_at_their_defaults(tmp_path):
    (tmp_path / "config.json").write_text('{"optimizer": {"lr": 0.25}}')

    config = settings("--config", str(tmp_path / "config.json"))

    assert config == PretrainConfig().override({"optimizer.lr": 0.25})


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--optimiser.lr", "--optimizer.lr"),
        ("--training.batchsize", "--training.batch_size"),
        ("--training.epoch", "--training.epochs"),
        ("--augmentations", "--augmentation"),
        ("--model.queue-sise", "--model.queue_size"),
    ],
)
@pytest.mark.parametrize("preset", [["demo"], []], ids=["with preset", "without preset"])
def test_an_unknown_flag_is_answered_with_the_nearest(typed, meant, preset):
    with pytest.raises(InputError, match=rf"^--[^\n]*: unknown; did you mean {meant}\?$"):
        settings(*preset, typed, "1")


@pytest.mark.parametrize(
    "words",
    [
        ["demoo"],
        ["demo", "laptop"],
        ["--wholly-different", "1"],
        ["demo", "--config", "config.json"],
        ["--config", "missing.json"],
        ["--augmentation", "strong"],
        ["--seed", "-1"],
        ["--seed", "1.5"],
        ["--seed"],
        ["--optimizer.lr", "fast"],
        ["--optimizer.lr", "nan"],
        ["--optimizer.lr", "0"],
        ["--training.batch_size", "none"],
        ["--training.batch_size", "100"],
        ["--training.precision", "fp8"],
        ["--augmentation.crop_area", "0.9,0.2"],
        ["--augmentation.crop_area", "0.9"],
        ["--patches.rows", "1"],
        ["--patches.rows", "64"],
        ["--scaling.num_workers", "500"],
        ["--run.name", "../elsewhere"],
        ["--data.synthetic.num_cameras", "1"],
        ["luperson-vit-small"],
        ["--model.backbone", "resnet51"],
        ["--model.backbone", "timm/convnet_tiny"],
        ["--model.backbone", "vit_tiny_patch16", "--data.height", "60"],
        ["--model.backbone", "vit_tiny_patch16", "--optimizer.lr", "0.1"],
        ["--optimizer.adamw.lr", "0.1"],
        ["--model.drop_path", "0.1"],
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line_that_names_it(words):
    with pytest.raises(InputError) as refusal:
        settings(*words)

    message = str(refusal.value)
    named = [word for word in [*words, "preset"] if word in message]
    assert (message.count("\n"), bool(named)) == (0, True)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b'"text"', b"\xff\xd8\xff\xe0", b'{"optimizer": {"lrr": 1}}'],
    ids=["empty", "cut", "list", "text", "jpeg", "unknown"],
)
def test_a_file_that_is_no_configuration_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)

    with pytest.raises(InputError, match=r"^--[a-z.]+[^\n]*: [^\n]+$"):
        settings("--config", str(tmp_path / "config.json"))


def test_a_wrong_setting_of_a_file_is_refused_with_the_name_of_the_file(tmp_path):
    file = tmp_path / "best.json"
    file.write_text('{"optimizer": {"lr": -1}}')

    with pytest.raises(InputError, match=f"^--config {file}: --optimizer.lr: .*got -1"):
        settings("--config", str(file))


def test_the_help_shows_every_section_and_setting():
    text = parser().format_help()

    missing = [title for title in sections(PretrainConfig) if f"\n{title}:\n" not in text]
    missing += [path for path, _ in PretrainConfig().flatten() if f"--{path} " not in text]
    assert missing == []


@pytest.mark.parametrize("config", [EvaluateConfig, FinetuneConfig, ClusterContrastConfig])
def test_jobs_that_follow_show_and_take_every_setting(config):
    made = JobParser("A job.", "[PRESET] [--SETTING VALUE ...]")
    add_settings(made, config)
    text = made.format_help()

    assert [path for path, _ in config().flatten() if f"--{path} " not in text] == []
    words = ["--init", "random", "--data.height", "96", "--data.mean", "0.1,0.2,0.3"]
    arguments = made.parse(words)
    assert override(config(), arguments).data.height == 96
    assert override(config(), arguments).data.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("method", METHOD_PRESETS)
def test_a_method_has_presets_and_settings_of_its_own(method):
    made = JobParser("A job.", "[PRESET] [--SETTING VALUE ...]")
    words = ["demo", "--init", "random", "--method", method, "--training.epochs", "3"]

    presets = add_finetune_settings(made, words)

    arguments = made.parse(words)
    expected = METHOD_PRESETS[method]["demo"].override({"training.epochs": 3})
    assert override(presets[arguments.preset], arguments) == expected


def test_settings_of_another_method_are_refused():
    made = JobParser("A job.", "[PRESET] [--SETTING VALUE ...]")
    add_finetune_settings(made, [])

    with pytest.raises(InputError, match=r"--clustering\.eps: unknown"):
        made.parse(["--clustering.eps", "0.5"])


@pytest.mark.parametrize("name", ["noseed", "re-seed", "xxseed"])
def test_only_words_that_begin_with_dashes_are_flags(name):
    assert settings("demo", "--run.name", name).run.name == name


def test_a_value_that_looks_like_a_flag_of_prepare_is_none():
    arguments = prepare_job._parser().parse(["recheck", "--out", "x"])

    assert (arguments.source, arguments.check) == (absolute("recheck"), None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "--out="], "--out: a path must not be empty"),
        (["\udc80", "--out", "x"], "SOURCE: a path must be text (UTF-8), but it is '\\udc80'"),
    ],
)
def test_a_path_that_is_none_is_refused_with_the_reason(words, message):
    with pytest.raises(InputError) as refused:
        prepare_job._parser().parse(words)

    assert str(refused.value) == message


def test_prepare_names_the_default_distance_of_near_duplicates():
    assert f"(default: {ImageRules.max_distance};" in prepare_job._parser().format_help()


def test_flags_are_not_abbreviated():
    with pytest.raises(InputError, match="--aug: unknown"):
        settings("demo", "--aug", "dino")


def test_words_of_a_job_are_parsed_beside_the_settings():
    job = parser()
    job.add_argument("--resume")

    arguments = job.parse(["laptop", "--resume", "a-run", "--seed", "3"])

    assert (arguments.resume, read_pretrain_settings(arguments).seed) == ("a-run", 3)


# Runs that are resumed.


@pytest.fixture
def record(tmp_path):
    """Return what records settings as those of a run, and returns what resumes it."""

    def write(config: Section) -> list[str]:
        RunFolder(str(tmp_path), "begun").record(config, "0")
        return ["--resume", "begun", "--run.storage-path", str(tmp_path)]

    return write


def resumed_pretrain(words: list[str]) -> PretrainConfig:
    made = parser()
    add_resume(made)
    recorded = parse_recorded(PretrainConfig, recorded_settings(words), words)
    return read_pretrain_settings(made.parse(words), recorded)


def test_a_resumed_run_needs_no_setting_again(record):
    begun = PRESETS["laptop"].override({"optimizer.lr": 0.5, "data.shards": "/shards"})

    resumed = resumed_pretrain(record(begun))

    assert resumed.override({"run": begun.run.model_dump()}) == begun


def test_what_is_given_beside_a_resumed_run_takes_precedence(record):
    words = [*record(PRESETS["laptop"]), "--scaling.num_workers", "2"]

    assert resumed_pretrain(words).scaling.num_workers == 2
    assert resumed_pretrain(["demo", *words]).data == PRESETS["demo"].data


def test_a_resumed_fine_tuning_knows_its_method_and_init(record):
    begun = METHOD_PRESETS["cluster-contrast"]["demo"].override({"init": "models:/a/1"})
    words = record(begun)
    recorded = recorded_settings(words)
    made = JobParser("A job.", "")
    add_resume(made)

    presets = add_finetune_settings(made, words, recorded)

    assert presets == METHOD_PRESETS["cluster-contrast"]
    assert "init" not in vars(made.parse(words))
    assert parse_recorded(ClusterContrastConfig, recorded, words) == begun


@pytest.mark.parametrize("is_joined", [False, True])
def test_a_run_of_another_job_is_not_resumed(record, is_joined):
    words = record(METHOD_PRESETS["supervised"]["demo"])
    if is_joined:
        words = ["=".join(words[:2]), *words[2:]]

    with pytest.raises(InputError, match=r"^--resume begun: was started by another job$"):
        resumed_pretrain(words)


def test_a_run_of_another_job_is_not_resumed_as_a_sweep(record):
    words = record(PRESETS["demo"])
    recorded = recorded_settings(words)

    with pytest.raises(InputError, match=r"^--resume begun: was started by another job$"):
        parse_recorded(SweepPlan, recorded, words)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"run_id": "0", "conf'])
def test_a_run_whose_record_is_damaged_is_not_resumed(record, tmp_path, text):
    words = record(PRESETS["demo"])
    (tmp_path / "begun" / "run.json").write_text(text)

    with pytest.raises(InputError, match=r"^--resume begun: \S+/run\.json is damaged$"):
        recorded_settings(words)


def test_a_run_that_was_never_started_is_not_resumed(tmp_path):
    words = ["--resume", "nothing", "--run.storage_path", str(tmp_path)]

    with pytest.raises(InputError, match=f"^--resume nothing: no such run in {tmp_path}$"):
        recorded_settings(words)


def test_a_new_run_has_nothing_recorded():
    assert recorded_settings(["demo", "--seed", "3"]) is None


@pytest.mark.parametrize("number", range(4))
def test_the_examples_of_a_sweep_are_plans(number):
    lines = [
        line
        for line in str(sweep_job.__doc__).splitlines()
        if "sweep.py" in line and "--resume" not in line
    ]
    words = shlex.split(lines[number])[2:]

    assert sweep_job._plan(sweep_job._parser().parse(words)).axes()


# Whole processes: what they print, and how they exit.

# What every job with settings does before it imports what takes seconds.
PARSE = """
import sys
from upreid_ray import command_line
from upreid_ray.command_line import JobParser, run_job

def job():
    parser = JobParser("A job.", "[PRESET] [--SETTING VALUE ...]")
    command_line.add_pretrain_settings(parser)
    config = command_line.read_pretrain_settings(parser.parse(sys.argv[1:]))
    return config.model_dump(mode="json")

run_job(job)
"""
# A run that ends early, for the reason that is named.
ENDS = """
import sys
from upreid_ray.config import errors
from upreid_ray.command_line import run_job

def job():
    raise getattr(errors, sys.argv[1], KeyboardInterrupt)("because")

run_job(job)
"""
# A job whose libraries have something to do when it ends.
CLEANS_UP = """
import atexit, sys
from upreid_ray.command_line import run_job

def job():
    atexit.register(sys.stderr.write, "cleaned up")
    return {"score": 1}

run_job(job)
"""
EARLY = {
    "RunFailed": (1, "because"),
    "RunStopped": (3, "because"),
    "KeyboardInterrupt": (130, "interrupted"),
}
PRETRAIN, PREPARE, EVALUATE, FINETUNE, COMPARE, SWEEP, EXPORT = (
    str(ROOT / "jobs" / f"{job}.py")
    for job in ("pretrain", "prepare", "evaluate", "finetune", "compare", "sweep", "export")
)
EMBED, SEARCH, PROMOTE = (
    str(ROOT / "jobs" / f"{job}.py") for job in ("embed", "search", "promote")
)
REFUSED = {
    "unknown flag": (PRETRAIN, "demo", "--optimizer.lrr", "1"),
    "bad grid": ("-c", PARSE, "demo", "--patches.rows", "40"),
    "bad preset": ("-c", PARSE, "dmeo"),
    "no shards to train on": (PRETRAIN, "laptop", "--data.shards", "images"),
    "no shards to sweep on": (SWEEP, "i2", "laptop", "--data.shards", "images"),
    "empty folder": (PREPARE, "empty", "--out", "out"),
    "missing folder": (PREPARE, "missing", "--out", "out"),
    "no images": (PREPARE, "texts", "--out", "out"),
    "no init to score": (EVALUATE, "--data.root", "images"),
    "no init to fine-tune": (FINETUNE, "demo"),
    "no such file to score": (EVALUATE, "--init", "a file.pth"),
    "no such folder to fine-tune": (FINETUNE, "demo", "--init", "runs/none/step-1"),
    "no such file to export": (EXPORT, "a.pth", "--to", "timm", "--out", "b.pth"),
    "a name that is too long": (EXPORT, "a" * 300, "--to", "timm", "--out", "b.pth"),
    "export to a URI": (EXPORT, "images/a.jpg", "--to", "timm", "--out", "s3://b/c.pth"),
    "export over its own input": (
        EXPORT,
        "images/a.jpg",
        "--to",
        "timm",
        "--out",
        "images/a.jpg",
    ),
    "no such file to embed with": (EMBED, "a.pth", "images", "--out", "out"),
    "no gallery": (SEARCH, "--query", "images"),
    "page over a folder": (
        SEARCH,
        "--gallery",
        "a",
        "--query",
        "images/a.jpg",
        "--html",
        "texts",
    ),
    "no features": (SEARCH, "--gallery", "images", "--query", "images/a.jpg"),
    "no reason": (PROMOTE, "models:/upreid-resnet18/1"),
    "unknown method": (FINETUNE, "demo", "--init", "random", "--method", "guess"),
    "no images to fine-tune on": (
        FINETUNE,
        "demo",
        "--init",
        "random",
        "--data.root",
        "missing",
    ),
    "no images to compare on": (COMPARE, "demo", "--init", "random", "--data.root", "missing"),
    "no images to score": (EVALUATE, "--init", "random", "--data.root", "missing"),
    "no images to embed": (EMBED, "images/a.jpg", "missing", "--out", "out"),
    "no shards to score": (PRETRAIN, "demo", "--evaluation.shards", "images"),
    "init elsewhere": (FINETUNE, "demo", "--init", "https://example.org/a.pth"),
    "seed beyond 63 bits": (PRETRAIN, "demo", "--seed", str(2**63)),
    "no init to compare": (COMPARE, "demo", "--splits", "0.5"),
    "bad share": (COMPARE, "demo", "--init", "random", "--splits", "0.5", "3"),
    "bad groups": (FINETUNE, "demo", "--init", "random", "--training.num_groups", "3"),
    "unknown axis": (SWEEP, "i2", "--space.optimizer.lrr", "choice(1)"),
    "empty choice": (SWEEP, "i2", "--space.optimizer.lr", "choice()"),
    "swept and set": (SWEEP, "i2", "--loss.intrinsic-weight", "0.3"),
    "nothing swept": (SWEEP, "own", "demo"),
    "no space": (SWEEP, "--num-trials", "2"),
    "settings of a resumed sweep": (SWEEP, "--resume", "s", "--num-trials", "2"),
    "source but nowhere to go": (PREPARE, "images"),
    "nothing to check": (PREPARE, "--check", "images"),
    "unknown column": (PREPARE, "images", "--out", "out", "--columns", "person=pid"),
    "distance too far": (PREPARE, "images", "--out", "out", "--max-distance", "30"),
    "negative seed": (PREPARE, "synthetic", "--out", "out", "--seed", "-1"),
}


def finish(folder: Path, words: tuple[str, ...]) -> tuple[int, str, str]:
    """Run Python in a folder; return status, output, errors."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Make a working folder with sources to prepare."""
    root = tmp_path_factory.mktemp("work")
    for name in ("empty", "texts", "images"):
        (root / name).mkdir()
    (root / "texts/readme.txt").write_text("no images here")
    (root / "images/a.jpg").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def finished(folder) -> dict[str, tuple[int, str, str]]:
    """Run the refused jobs and some that end in other ways, a few at once."""
    early = {reason: ("-c", ENDS, reason) for reason in EARLY}
    others = {"help": (PRETRAIN, "--help"), "cleans up": ("-c", CLEANS_UP)}
    jobs = {**REFUSED, **early, **others}
    with ThreadPoolExecutor(3) as pool:
        results = pool.map(lambda words: finish(folder, words), jobs.values())
        return dict(zip(jobs, results, strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_a_job_refuses_wrong_input_with_one_line_and_status_2(finished, name):
    status, output, errors = finished[name]

    assert (status, output, errors.count("\n")) == (2, "", 1), errors


@pytest.mark.parametrize("reason", EARLY)
def test_a_job_that_ends_early_says_why_in_one_line_and_by_its_status(finished, reason):
    status, said = EARLY[reason]
    assert finished[reason] == (status, "", f"-c: {said}\n")


def test_a_refused_job_writes_nothing(folder, finished):
    left = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))

    assert left == ["empty", "images", "images/a.jpg", "texts", "texts/readme.txt"]


def test_the_help_of_a_job_goes_to_standard_output_with_status_0(finished):
    status, output, errors = finished["help"]

    missing = [title for title in sections(PretrainConfig) if f"\n{title}:\n" not in output]
    assert (status, errors, missing) == (0, "", [])


def test_the_result_is_a_json_line_and_libraries_clean_up_behind_it(finished):
    assert finished["cleans up"] == (0, '{"score": 1}\n', "cleaned up")


def test_what_a_job_needs_next_is_imported_while_ray_starts(tmp_path, monkeypatch):
    (tmp_path / "needed_next.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)

    def start(*_, **__):
        deadline = time.monotonic() + 60
        while "needed_next" not in sys.modules:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    try:
        connect_to_ray(meanwhile="needed_next")
    finally:
        signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize(
    "address", ["cluster", "127.0.0.1:1", "127.0.0.1:99999", "http://127.0.0.1:1"]
)
def test_an_address_at_which_no_cluster_answers_is_refused_at_once(address, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    began = time.monotonic()

    with pytest.raises(InputError, match=f"^RAY_ADDRESS={address}: no Ray cluster answers"):
        connect_to_ray()

    assert time.monotonic() - began < CONNECT_SECONDS


def test_a_cluster_that_refuses_this_process_may_require_a_token(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("Failed to connect to Ray cluster at 127.0.0.1:6379")

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", refuse)

        with pytest.raises(InputError, match="RAY_AUTH_MODE=token"):
            connect_to_ray()
