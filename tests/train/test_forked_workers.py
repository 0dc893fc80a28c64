"""Forked workers are as if Python had started them, and end with those they belong to."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from upreid_ray.core.memory import KEEP_FREED_MEMORY
from upreid_ray.train import forked_workers as module
from upreid_ray.train.forked_workers import WorkerServer, forked_workers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only"),
]

# A worker that says what it is, and waits if it is told to.
SAYS = """\
import json, os, random, sys, time
import beside, numpy
about = {
    "words": sys.argv[1:], "executable": sys.executable, "folder": os.getcwd(),
    "variables": dict(os.environ), "module": beside.__file__, "pid": os.getpid(),
    "preloaded": "colorsys" in sys.modules, "nice": os.nice(0),
    "random": [random.random(), numpy.random.rand()],
}
print(json.dumps(about), flush=True)
time.sleep(float(sys.argv[1]) if sys.argv[1:] else 0)
"""
# A worker that counts the pages that the kernel gives it while it takes memory again and again.
FAULTS = """\
import resource
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(2**25)
before = faults()
for _ in range(20):
    bytearray(2**25)
print(faults() - before)
"""
OWNER = """\
import time
from upreid_ray.train.forked_workers import WorkerServer
print(WorkerServer([]).program, flush=True)
time.sleep(100)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[WorkerServer]:
    server = WorkerServer(["colorsys", "numpy"])
    yield server
    server.close()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """Write a script with the name of Ray's, and a module beside it."""
    (tmp_path / "beside.py").touch()
    file = tmp_path / "default_worker.py"
    file.write_text(SAYS)
    return file


def output(*words: object, **options: object) -> str:
    done = subprocess.run(
        [*map(str, words)], capture_output=True, text=True, timeout=60, check=True, **options
    )
    assert done.stderr == ""
    return done.stdout


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_ended(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def test_a_worker_gets_the_words_the_folder_and_the_variables_of_the_program(
    server: WorkerServer, script: Path
):
    variables = {**os.environ, "ONE": "a b\n", "PYTHONPATH": "/some/folder", "PWD": "/usr"}

    about = json.loads(output(server.program, script, "0", "x y", env=variables, cwd="/usr"))

    assert about["words"] == ["0", "x y"]
    assert about["folder"] == "/usr"
    assert about["variables"] == variables
    assert about["module"] == str(script.parent / "beside.py")
    assert about["executable"] == str(server.program)


def test_workers_have_what_the_server_imports_meanwhile(server: WorkerServer, script: Path):
    wait_for(lambda: json.loads(output(server.program, script))["preloaded"])


def test_workers_draw_different_random_numbers(server: WorkerServer, script: Path):
    drawn = [json.loads(output(server.program, script))["random"] for _ in range(3)]

    assert len({number for numbers in drawn for number in numbers}) == 6


def test_a_worker_has_the_priority_of_the_program(server: WorkerServer, script: Path):
    assert json.loads(output("nice", "-n", "7", server.program, script))["nice"] == 7


def test_a_worker_becomes_what_it_wants_to_become(server: WorkerServer, script: Path):
    shim = script.with_name("setup_worker.py")
    shim.write_text(
        "import os, sys\nos.environ['TWO'] = '2'\n"
        "os.execvp('bash', args=['bash', '-c', 'exec \"$0\" \"$1\"', sys.executable, "
        f"{str(script)!r}])"
    )

    about = json.loads(output(server.program, shim))

    assert about["variables"]["TWO"] == "2"
    assert about["executable"] == str(server.program)


def test_what_is_no_worker_is_run_by_python(server: WorkerServer):
    assert output(server.program, "-c", "import sys; print(sys.executable, sys.argv)") == (
        f"{sys.executable} ['-c']\n"
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_worker_treats_memory_as_the_variables_say(server: WorkerServer, script: Path):
    script.write_text(FAULTS)

    default, kept = (
        int(output(server.program, script, env=os.environ | variables))
        for variables in ({"MALLOC_MMAP_MAX_": "65536"}, KEEP_FREED_MEMORY)
    )

    assert default > 10 * max(kept, 1)


def test_a_worker_ends_with_the_program(server: WorkerServer, script: Path):
    with subprocess.Popen([server.program, script, "100"], stdout=subprocess.PIPE) as program:
        worker = json.loads(program.stdout.readline())["pid"]
        assert worker != program.pid
        assert not has_ended(worker)

        program.kill()

        wait_for(lambda: has_ended(worker))


def test_the_program_ends_with_the_worker(server: WorkerServer, script: Path):
    with subprocess.Popen([server.program, script, "100"], stdout=subprocess.PIPE) as program:
        psutil.Process(json.loads(program.stdout.readline())["pid"]).kill()

        assert program.wait(30) == 0


def test_server_and_workers_end_with_their_owner_and_leave_nothing(script: Path):
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE) as owner:
        program = Path(owner.stdout.readline().decode().strip())
        with subprocess.Popen([program, script, "100"], stdout=subprocess.PIPE) as started:
            worker = json.loads(started.stdout.readline())["pid"]

            owner.kill()

            wait_for(lambda: has_ended(worker))
            wait_for(lambda: not program.parent.exists())


def test_without_its_server_the_program_is_python(script: Path, tmp_path: Path):
    server = WorkerServer([])
    program = tmp_path / "copy"
    program.write_text(server.program.read_text())
    program.chmod(0o700)
    server.close()

    about = json.loads(output(program, script, "0"))

    assert (about["words"], about["executable"]) == (["0"], sys.executable)


def test_where_programs_cannot_be_run_ray_gets_python(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    (tmp_path / "with a blank").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "with a blank"))
    monkeypatch.delenv(module.PROGRAM_VARIABLE, raising=False)
    monkeypatch.setattr(module, "_program", module._program.__wrapped__)
    python = sys.executable

    with forked_workers():
        assert sys.executable == python

    assert list((tmp_path / "with a blank").iterdir()) == []


def test_a_program_that_the_user_names_is_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(module.PROGRAM_VARIABLE, "/some/python")
    python = sys.executable

    with forked_workers():
        assert sys.executable == "/some/python"

    assert sys.executable == python
