"""The documents: their links, and the paths, commands and code that they show."""

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

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
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
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
            language = match["language"] if kind is FENCE else SPAN_LANGUAGE
            line = line_of(text, match.start("text"))
            found.append(Code(relative(document), line, language, match["text"]))
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
