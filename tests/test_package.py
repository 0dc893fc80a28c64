"""The package as it is installed and imported: a wheel, a command, a light module."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import upreid_ray

ROOT = Path(__file__).parents[1]
MAX_HELP_SECONDS = 1.5  # of a processor, since others may be busy
JOBS = {file.stem for file in (ROOT / "jobs").glob("[!_]*.py")}


def finish(folder: Path, *words: str, path: Path = ROOT) -> SimpleNamespace:
    """Run Python in a folder, with one place to import from; measure its processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return SimpleNamespace(
        status=done.returncode,
        output=done.stdout,
        errors=done.stderr,
        seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Build a wheel from a copy of the sources; return the folder that it is installed in."""
    root = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    for name in ("upreid_ray", "jobs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    build = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "wheels", ".")
    assert finish(root, *pip, *build).status == 0
    (wheel,) = (root / "wheels").iterdir()
    for name in ("upreid_ray", "jobs", "build"):
        shutil.rmtree(root / name, ignore_errors=True)
    target = ("install", "--no-deps", "--target", "installed", str(wheel))
    assert finish(root, *pip, *target).status == 0
    return root / "installed"


def upreid(installed: Path, *words: str) -> SimpleNamespace:
    """Run the installed command in another folder."""
    return finish(installed.parent, str(installed / "bin/upreid"), *words, path=installed)


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package_and_the_jobs(installed):
    expected = {
        file.relative_to(ROOT)
        for file in (ROOT / "upreid_ray").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    expected |= {Path("upreid_ray/jobs", f"{job}.py") for job in JOBS}

    assert [file for file in sorted(expected) if not (installed / file).is_file()] == []
    assert not (installed / "jobs").exists()


@pytest.mark.slow
def test_the_command_lists_the_jobs_with_a_line_each(installed):
    shown = upreid(installed, "--help")

    lines = {line.split()[0] for line in shown.output.splitlines() if line.startswith("  ")}
    assert (shown.status, shown.errors) == (0, "")
    assert lines >= JOBS


@pytest.mark.slow
def test_the_command_knows_its_version(installed):
    assert upreid(installed, "--version").output == f"upreid {upreid_ray.__version__}\n"


@pytest.mark.slow
def test_the_help_of_an_installed_job_is_fast_and_begins_with_what_the_job_does(installed):
    shown = upreid(installed, "pretrain", "--help")

    lines = shown.output.splitlines()
    assert (shown.status, shown.errors) == (0, "")
    assert lines[0] == "usage: upreid pretrain [PRESET] [--SETTING VALUE ...]"
    assert lines[2].startswith("Pre-train a person re-identification backbone")
    assert shown.seconds < MAX_HELP_SECONDS


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["pretrain", "demo", "--optimizer.lrr", "1"], "upreid pretrain: --optimizer.lrr"),
        (["pretain"], "upreid: JOB: invalid choice: 'pretain'"),
        ([], "upreid: the following arguments are required: JOB"),
    ],
    ids=["flag", "job", "nothing"],
)
@pytest.mark.slow
def test_the_command_refuses_wrong_input_with_one_line_and_status_2(installed, words, refusal):
    shown = upreid(installed, *words)

    assert (shown.status, shown.output, shown.errors.count("\n")) == (2, "", 1)
    assert shown.errors.startswith(refusal)


@pytest.mark.parametrize("job", sorted(JOBS))
def test_the_help_of_a_job_is_fast_and_has_a_short_usage(tmp_path, job):
    shown = finish(tmp_path, str(ROOT / "jobs" / f"{job}.py"), "--help")

    usage = shown.output.partition("\n\n")[0]
    assert (shown.status, shown.errors) == (0, "")
    assert usage.count("\n") <= 1
    assert shown.seconds < MAX_HELP_SECONDS


@pytest.mark.slow
def test_the_import_is_light_and_the_names_are_there_when_they_are_asked_for(tmp_path):
    script = """
import sys, time
started = time.process_time()
import upreid_ray
upreid_ray.__version__, dir(upreid_ray)
seconds = time.process_time() - started
upreid_ray.PretrainConfig, upreid_ray.PRESETS["demo"], upreid_ray.load_backbone
heavy = {"torch", "ray", "mlflow"} & sys.modules.keys()
for name in upreid_ray.__all__:
    getattr(upreid_ray, name)
print(seconds < 0.5, sorted(heavy), callable(upreid_ray.pretrain))
"""
    shown = finish(tmp_path, "-c", script)

    assert (shown.output, shown.errors) == ("True [] True\n", "")


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'upreid_ray' has no attribute 'pretain'"):
        upreid_ray.pretain  # noqa: B018
