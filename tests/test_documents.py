"""The documents: their links, and the paths, commands and code that they show.

Every block of commands is run as it stands, in a fresh copy of the files, on tiny images and
with tiny presets. A block that is not run has a comment above it in the document's source,
either ``<!-- not run: REASON -->`` or ``<!-- run by: TEST -->``; what it shows is parsed.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pathspec
import pytest
import torch
from PIL import Image

from tests.ray_workers import JOB_MODULES, write_program
from upreid_ray.core.backbone import build_backbone
from upreid_ray.train.forked_workers import WorkerServer

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("cluster/*.md"),
    ]
)
JOBS = sorted(file.stem for file in ROOT.glob("jobs/[!_]*.py"))
MAX_README_WORDS = 1000
FOLDERS = ("upreid_ray", "jobs", "tests", "docs", "benchmarks", "cluster")
SECRETS = "cluster/kubernetes/base/secrets"  # made by `make secrets`
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>not run|run by): (?P<why>[^>]+) -->\n)?"
    r"^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
SPAN = re.compile(r"`(?P<text>[^`]+)`")
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
SPAN_LANGUAGE = "a few words in a sentence"
PROGRAMS = ("make ", "python ", "ray ", "upreid ")  # how a span begins that is a command
OPERATORS = frozenset("();<>|&")
SETTING = re.compile(r"--[a-z_]+\.[a-z_.]*[a-z_]")


@dataclass(frozen=True)
class Code:
    """Code in a document: a fenced block, or a span in a sentence."""

    document: str
    line: int
    language: str
    text: str
    mark: str = ""
    why: str = ""

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    def commands(self) -> Iterator[list[str]]:
        """Yield the words of each shell command, without comments and variables."""
        if not (self.language == "bash" or self.text.startswith(PROGRAMS)):
            return
        text = self.text.replace("\\\n", " ")
        for line in text.splitlines() if self.language == "bash" else [" ".join(text.split())]:
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if OPERATORS.issuperset(word):
                    if words:
                        yield words
                    words = []
                elif words or not re.match(r"\w+=", word):
                    words.append(word)

    def calls(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the job (``pretrain``) and the words behind it of each call of a job."""
        for words in self.commands():
            for place, word in enumerate(words):
                match = re.fullmatch(r"jobs/(\w+)\.py", word)
                if match and words[place - 1].endswith("python"):
                    yield match[1], words[place + 1 :]
            if words[0] == "upreid":
                yield words[1], words[2:]


def relative(document: Path) -> str:
    return str(document.relative_to(ROOT))


def line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def read_code(document: Path) -> tuple[list[Code], str]:
    """Return the code of a document, and its prose with each piece of code blanked out."""
    text, found = document.read_text(), []
    for kind in (FENCE, SPAN):
        for match in kind.finditer(text):
            line = line_of(text, match.start("text"))
            groups = {"language": SPAN_LANGUAGE, **match.groupdict("")}
            found.append(Code(relative(document), line, **groups))
        text = kind.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    return found, text


CODE = [code for document in DOCUMENTS for code in read_code(document)[0]]
CALLS = [(str(code), job, words) for code in CODE for job, words in code.calls()]


def anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings of a document."""
    text = FENCE.sub("", document.read_text())
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@cache
def help_of(job: str, *words: str) -> str:
    """Return what a job prints for ``--help`` behind these words; it must accept them."""
    script = ROOT / "jobs" / f"{job}.py"
    assert script.exists(), f"jobs/{job}.py does not exist"
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *words, "--help"])
        patch.setattr(sys.stdout, "write", lines.append)
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(f"jobs.{job}").main()
    assert ended.value.code == 0
    return "".join(lines)


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_every_link_leads_to_a_file_and_to_a_heading_in_it(document):
    text = read_code(document)[1]
    broken = []
    for match in LINK.finditer(text):
        path, _, anchor = match["target"].partition("#")
        if path.startswith(("http://", "https://")):
            continue
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"line {line_of(text, match.start())}: {match['target']}")
    assert broken == []


def test_every_path_in_code_exists_and_every_test_that_is_named():
    missing = []
    for code in CODE:
        for word in re.findall(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./:-]*", code.text):
            path, _, name = word.rstrip(".:").partition("::")
            if not (path.startswith(SECRETS) or (ROOT / path).exists()):
                missing.append(f"{code}: {path}")
            elif name and f"def {name}(" not in (ROOT / path).read_text():
                missing.append(f"{code}: {path}::{name}")
    assert missing == []


def test_every_module_that_a_command_runs_exists():
    modules = {
        words[place + 1]: str(code)
        for code in CODE
        for words in code.commands()
        for place, word in enumerate(words[:-1])
        if word == "-m" and words[place - 1].endswith("python")
    }
    ours = {name: place for name, place in modules.items() if name.split(".")[0] in FOLDERS}
    missing = {
        name: place
        for name, place in ours.items()
        if not (ROOT / name.replace(".", "/")).with_suffix(".py").exists()
    }
    assert missing == {}


def test_every_verb_of_make_exists():
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    missing = [
        f"{code}: make {word}"
        for code in CODE
        for words in code.commands()
        if words[0] == "make"
        for word in words[1:]
        if "=" not in word and word not in verbs
    ]
    assert missing == []


def test_calls_of_jobs_are_found():
    assert {job for _, job, _ in CALLS} == set(JOBS)


@pytest.mark.parametrize(
    ("job", "words"),
    [(job, words) for _, job, words in CALLS],
    ids=[f"{place}-{job}" for place, job, _ in CALLS],
)
def test_every_call_of_a_job_is_one_that_its_parser_accepts(job, words):
    help_of(job, *words)


def test_every_setting_that_a_sentence_names_is_a_flag_of_a_job():
    texts = [help_of(job) for job in JOBS]
    texts.append(help_of("finetune", "--method", "cluster-contrast"))
    known = {flag for text in texts for flag in SETTING.findall(text)}
    unknown = [
        f"{code}: {flag}"
        for code in CODE
        for flag in SETTING.findall(code.text)
        if not flag.startswith("--space.") and flag not in known
    ]
    # As in `--scaling.*`: all settings of a section.
    sections = {f"{flag.rpartition('.')[0]}" for flag in known}
    assert [each for each in unknown if each.rpartition(" ")[2] not in sections] == []


@pytest.mark.parametrize("code", [code for code in CODE if code.language == "python"], ids=str)
def test_python_code_compiles(code):
    compile(code.text, str(code), "exec")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= MAX_README_WORDS


def test_git_and_so_ray_leave_out_what_the_commands_write(tmp_path):
    """What `.gitignore` names is not packed by `ray job submit --working-dir .` either."""
    outputs = {
        words[words.index("--out") + 1] for _, _, words in CALLS if "--out" in words[:-1]
    }
    local = [name if "." in name else f"{name}/" for name in outputs if "://" not in name]
    written = sorted([*local, "runs/", "mlflow.db", "mlartifacts/"])
    code = ["upreid_ray/data/shards/manifest.py", "docs/guide.md"]
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)

    ignored = subprocess.run(
        ["git", "-C", tmp_path, "check-ignore", *written, *code],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()

    assert "shards/" in written
    assert ignored == written


def test_ray_packs_code_and_settings_but_no_images():
    lines = (ROOT / ".rayignore").read_text().splitlines()
    ignored = pathspec.PathSpec.from_lines("gitignore", lines)

    code = ["jobs/pretrain.py", "upreid_ray/core/losses.py", "best.json", "own_job.py"]
    images = ["CROPS/a.jpg", "my crops/1/a.jpg", "market1501/query/0001_c1s1_000001_00.jpg"]
    assert not any(ignored.match_file(name) for name in [".", *code])
    assert all(ignored.match_file(name) for name in [*images, ".git/config"])


# The commands, run.

COPIED = (
    *("upreid_ray", "jobs", "cluster"),
    *("Makefile", "pyproject.toml", ".gitignore", ".rayignore"),
)
COMMAND_SECONDS = 600
OWN_RAY = ("make pretrain",)  # What starts a Ray, as all does for a user; the rest share one.
# What stands for something of the user's, or for a long run.
PLACEHOLDERS = {
    "upreid-resnet50@champion": "upreid-resnet18@champion",
    "runs/SWEEP_NAME/": "$(ls -td runs/sweep-*/ | head -1)",
    "RUN_NAME": "$(basename $(ls -td runs/resnet18-* | head -1))",
    "--num_trials 32": "--num_trials 2",
    "--training.epochs 5": "--training.epochs 1",
    "resnet50_ibn_a": "resnet18_ibn_a",
}
# What is appended to the presets of the copied files: the same jobs, in seconds.
TINY_PRESETS = """
_TINY = {
    "data.height": 64,
    "data.width": 32,
    "training.epochs": 1,
    "evaluation.every_epochs": 1,
    "scaling.num_workers": 1,
    "scaling.use_gpu": False,
    "scaling.cpus_per_worker": 0.5,
    "scaling.threads_per_worker": 1,  # two would mostly wait for each other
}
_TINY_BATCHES = {
    "training.epochs": 2,  # a sweep may stop its trials after the first
    "optimizer.warmup_epochs": 0,
    "model.backbone": "resnet18",
    "model.queue_size": 8,
    "training.batch_size": 16,
    "training.group_size": 8,
}
_TINY_PERSONS = {"training.num_persons": 4, "training.num_images": 2}
_TINY_CLUSTERS = {
    "training.steps_per_epoch": 2,
    "clustering.k1": 4,
    "clustering.k2": 2,
    "clustering.min_samples": 2,
}
for _presets, _settings in (
    (PRESETS, _TINY_BATCHES),
    (FINETUNE_PRESETS, _TINY_PERSONS),
    (CLUSTER_CONTRAST_PRESETS, _TINY_PERSONS | _TINY_CLUSTERS),
):
    for _name, _preset in _presets.items():
        _presets[_name] = _preset.override(_TINY | _settings)
"""
# What is changed in the copied files: synthetic people, and the runs of a comparison.
TINY_DEFAULTS = {
    "upreid_ray/config/run.py": {
        "num_train_identities: PositiveInt = 200": "num_train_identities: PositiveInt = 8",
        "num_test_identities: PositiveInt = 60": "num_test_identities: PositiveInt = 4",
        "identities: NonNegativeInt = 600": "identities: NonNegativeInt = 0",
        "Field(ge=2, le=64)] = 4": "Field(ge=2, le=64)] = 2",
        "Field(ge=64, le=1024)] = 128": "Field(ge=64, le=1024)] = 64",
        "width: Pixels = 64": "width: Pixels = 32",
    },
    "upreid_ray/config/downstream.py": {
        "= (0.1, 0.3, 1.0)": "= (1.0,)",
        "seeds: PositiveInt = 3": "seeds: PositiveInt = 1",
    },
}


def write_persons(folder: Path) -> None:
    """Write a set in Market-1501's layout: noise in the colour of each person."""
    random = np.random.default_rng(0)
    cameras = {"bounding_box_train": (1, 2), "query": (1,), "bounding_box_test": (2,)}
    for split, numbers in cameras.items():
        (folder / split).mkdir(parents=True)
        first = 1 if split == "bounding_box_train" else 101
        for person in range(first, first + 8):
            color = np.random.default_rng(person).integers(0, 256, 3)
            for camera, frame in product(numbers, (1, 2)):
                pixels = (color + random.integers(0, 256, (96, 48, 3))) // 2
                name = f"{person:04}_c{camera}s1_{frame:06}_00.jpg"
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name)


@dataclass(frozen=True)
class Home:
    """The folder of a new user: a copy of the files, an environment, and images.

    Attributes:
        folder: Folder, whose name is hard to spell.
        address: Address of a Ray that runs.
    """

    folder: Path
    address: str

    def run(self, command: str, *, own_ray: bool = False) -> str:
        """Run a command in bash; return its output."""
        without = (
            *("MLFLOW_TRACKING_URI", "UPREID_RAY_STORAGE", "RAY_ADDRESS"),
            "UPREID_RAY_WORKER_PROGRAM",
        )
        environment = {name: value for name, value in os.environ.items() if name not in without}
        environment |= {"PYTHONPATH": str(self.folder)}
        if not own_ray:
            # The only node is never preempted, as in a local Ray.
            watcher = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
            environment |= {"RAY_ADDRESS": self.address} | watcher
        done = subprocess.run(
            ["bash", "-ec", f"source .venv/bin/activate\n{command}"],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        # Neither an error that did not end the command, nor Ray talking to its developers.
        for noise in ("Traceback", "Starting execution of Dataset", "core_worker.cc"):
            assert noise not in done.stderr, done.stderr[-4000:]
        return done.stdout


def make_environment(folder: Path, server: WorkerServer) -> None:
    """Make an environment that is the present one, in another folder, and forks its jobs."""
    (folder / "bin").mkdir(parents=True)
    for name in ("lib", "pyvenv.cfg"):
        (folder / name).symlink_to(Path(sys.prefix) / name)
    for program in (Path(sys.prefix) / "bin").iterdir():
        if program.name not in ("activate", "python"):
            (folder / "bin" / program.name).symlink_to(program)
    write_program(folder / "bin/python", server)
    (folder / "bin/activate").write_text('export PATH="$PWD/.venv/bin:$PATH"\n')
    (folder / "ready").touch()


def make_home(folder: Path, server: WorkerServer) -> None:
    """Make the folder of a new user, whose jobs a server forks."""
    folder.mkdir()
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    with (folder / "upreid_ray/config/presets.py").open("a") as presets:
        presets.write(TINY_PRESETS)
    for file, changes in TINY_DEFAULTS.items():
        text = (folder / file).read_text()
        for long, short in changes.items():
            assert text.count(long) == 1, long
            text = text.replace(long, short)
        (folder / file).write_text(text)
    for name in ("CROPS", "market1501"):
        write_persons(folder / name)
    for name in ("person.jpg", "one.jpg", "other.jpg"):
        shutil.copy(next((folder / "CROPS/query").iterdir()), folder / name)
    weights = {
        f"module.encoder_q.{k}": v for k, v in build_backbone("resnet18").state_dict().items()
    }
    torch.save({"state_dict": weights}, folder / "moco.pth")
    (folder / "requirements.lock").touch()
    make_environment(folder / ".venv", server)


@pytest.fixture(scope="module")
def home(ray_cluster, tmp_path_factory) -> Iterator[Home]:
    folder = tmp_path_factory.mktemp("home") / "Ordner f\u00fcr L\u00e4ufe"
    server = WorkerServer(JOB_MODULES, ray_modules=())
    make_home(folder, server)
    yield Home(folder, ray_cluster)
    server.close()


def lines_to_run() -> Iterator[tuple[str, str]]:
    """Yield document and text of each command that is run, once if it is shown again."""
    seen = set()
    for code in CODE:
        if code.language == "bash" and not code.mark:
            for line in code.text.replace("\\\n", " ").splitlines():
                command = " ".join(line.partition(" #")[0].split())
                for shown, real in PLACEHOLDERS.items():
                    command = command.replace(shown, real)
                if command and command not in seen:
                    seen.add(command)
                    yield code.document, command


@pytest.mark.ray
@pytest.mark.timeout(2 * COMMAND_SECONDS)
@pytest.mark.parametrize(
    "command", [pytest.param(line, id=f"{place} {line}") for place, line in lines_to_run()]
)
def test_every_command_of_the_documents_runs(home, command):
    output = home.run(command, own_ray=command in OWN_RAY)

    if command.startswith("python"):
        assert json.loads(output.splitlines()[-1])


@pytest.mark.ray
def test_every_path_is_recorded_as_an_absolute_one(home):
    """The tests above have made these runs."""
    records = [json.loads(file.read_text()) for file in home.folder.glob("runs/*/run.json")]

    shards = {record["config"].get("data", {}).get("shards") for record in records}
    assert shards - {None} == {str(home.folder / "shards")}


PYTHON = {
    document: "\n".join(code.text for code in CODE if (code.document, code.language) == key)
    for document in sorted({code.document for code in CODE if code.language == "python"})
    for key in [(document, "python")]
}
IMPORTS = "import mlflow, safetensors.torch, torch, torchvision, upreid_ray\n"
# What looks at the variables that a document's code leaves behind, and what it prints.
AFTER = {
    "README.md": ("print(*model.eval()(torch.zeros(2, 3, 64, 32)).shape)", "2 512"),
    "docs/guide.md": ("print(*features.shape, model.training)", "1 512 False"),
    "docs/operations.md": (
        "print(client.search_registered_models()[0].name)",
        "upreid-resnet18",
    ),
    "docs/python-api.md": (
        "import ray\nprint(features.num_images, len(ray.nodes()), backbone.training)",
        "64 1 False",
    ),
}


@pytest.mark.ray
@pytest.mark.timeout(2 * COMMAND_SECONDS)
@pytest.mark.parametrize("document", PYTHON)
def test_the_python_code_of_the_documents_runs(home, document):
    """The README leaves the imports out; what the commands made is in the page's way."""
    shutil.rmtree(home.folder / "features", ignore_errors=True)
    after, expected = AFTER[document]
    script = home.folder / "page.py"
    script.write_text("\n".join([IMPORTS, PYTHON[document], after]))

    lines = home.run("python page.py 2> page.log || { cat page.log >&2; false; }").splitlines()

    assert lines[-1] == expected
    if document == "docs/python-api.md":
        folders = [re.escape(str(home.folder / name)) for name in ("runs/first", "features")]
        assert re.fullmatch(rf"models:/upreid-resnet18/\d+ [0-9.]+ {folders[0]}", lines[0])
        assert re.fullmatch(rf"64 {folders[1]}", lines[1])
        assert 0 <= float(lines[-2]) <= 1
        told = (home.folder / "page.log").read_text()
        assert len(re.findall(r"^run first: ", told, re.MULTILINE)) == 1, told


def test_the_python_page_names_only_what_is_there():
    page = (ROOT / "docs/python-api.md").read_text()

    names = set(re.findall(r"upreid_ray\.(\w+)", page)) - {"config"}
    assert names <= set(importlib.import_module("upreid_ray").__all__)


def test_every_block_is_run_as_what_it_is():
    """A block of commands under another name would escape the tests above."""
    languages = {code.language for code in CODE} - {SPAN_LANGUAGE}
    assert languages == {"bash", "python", "text"}
    text = [code for code in CODE if code.language == "text"]
    assert not [
        code for code in text if re.search(r"^(\$ |python |make )", code.text, re.MULTILINE)
    ]
    blocks = sum(
        len(re.findall("^ *```", file.read_text(), re.MULTILINE)) for file in DOCUMENTS
    )
    assert blocks == 2 * sum(code.language != SPAN_LANGUAGE for code in CODE)


def test_a_block_that_is_not_run_says_why_or_names_its_test():
    marked = [code for code in CODE if code.mark]
    missing = []
    for code in marked:
        path, _, name = code.why.partition("::")
        if code.mark == "run by" and f"def {name}(" not in (ROOT / path).read_text():
            missing.append(f"{code}: {code.why}")
    assert missing == []
    assert all(code.language == "bash" for code in marked)
