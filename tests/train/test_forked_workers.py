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
TASK = """\
import os, ray, sys
from upreid_ray.command_line import connect_to_ray
connect_to_ray(in_workers=["mlflow.tracking"])
@ray.remote(num_cpus=0.1, max_calls=1)
def about():
    is_whole = "mlflow" in sys.modules and "ray.train.torch" in sys.modules
    return sys.executable, is_whole, os.nice(0)
for _ in range(100):
    said = ray.get(about.remote())
    if said[1]:
        break
print(*said, sys.executable)
"""
OWNER = """\
import time
from upreid_ray.train.forked_workers import WorkerServer
print(WorkerServer([], []).program, flush=True)
time.sleep(100)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[WorkerServer]:
    server = WorkerServer(["colorsys", "numpy"], [])
    yield server
    server.close()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """Write a script with the name of Ray's, and a module beside it."""
    file = tmp_path / "scripts/default_worker.py"
    file.parent.mkdir()
    (file.parent / "beside.py").touch()
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

        assert program.wait(30) == 1


def test_a_worker_ends_as_python_does(server: WorkerServer, script: Path):
    script.write_text(
        "import atexit, sys, threading, time\n"
        "atexit.register(print, 'at exit')\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\n"
        "sys.exit(7)"
    )
    done = subprocess.run(
        [server.program, script], check=False, capture_output=True, text=True, timeout=60
    )

    assert (done.returncode, done.stdout) == (7, "thread\nat exit\n")


def test_a_worker_that_fails_tells_why(server: WorkerServer, script: Path):
    script.write_text("raise RuntimeError('the reason')")
    done = subprocess.run(
        [server.program, script], check=False, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 1
    assert "RuntimeError: the reason" in done.stderr


def test_a_worker_may_open_as_many_files_as_the_program(server: WorkerServer, script: Path):
    script.write_text("import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])")

    said = output("bash", "-c", 'ulimit -n 200; exec "$0" "$1"', server.program, script)

    assert said == "200\n"


@pytest.mark.parametrize("number", [1, 2])
def test_libraries_have_the_threads_that_the_variable_says(script: Path, number: int):
    server = WorkerServer(["numpy"], [])
    script.write_text(
        "import numpy, threadpoolctl\n"
        "print(*{each['num_threads'] for each in threadpoolctl.threadpool_info()})"
    )
    variables = os.environ | {"OMP_NUM_THREADS": str(number)}

    wait_for(lambda: output(server.program, script, env=variables) == f"{number}\n")
    server.close()


def test_a_worker_finds_all_that_python_finds(script: Path, monkeypatch: pytest.MonkeyPatch):
    root = str(Path(module.__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, root, "", root, *sys.path]))
    server = WorkerServer([], [])
    script.write_text("import colorsys, PIL.Image, upreid_ray; print('found')")

    assert output(server.program, script) == "found\n"
    server.close()


def test_the_server_imports_nothing_of_the_working_folder(
    script: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    (tmp_path / "colorsys.py").write_text("raise SystemExit('this is not the library')")
    monkeypatch.chdir(tmp_path)
    server = WorkerServer(["colorsys"], [])

    wait_for(lambda: json.loads(output(server.program, script))["preloaded"])
    server.close()


def test_a_server_needs_no_standard_input(script: Path):
    code = (
        "import os, subprocess, sys; os.close(0)\n"
        "from upreid_ray.train.forked_workers import WorkerServer\n"
        "server = WorkerServer([], [])\n"
        "print(subprocess.run([server.program, sys.argv[1]], stdin=subprocess.DEVNULL,"
        " capture_output=True, text=True).stdout)\n"
        "server.close()"
    )

    said = json.loads(output(sys.executable, "-c", code, script))

    assert said["executable"].endswith("/python")
    assert not Path(said["executable"]).exists()


def test_server_and_workers_end_with_their_owner_and_leave_nothing(script: Path):
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE) as owner:
        program = Path(owner.stdout.readline().decode().strip())
        with subprocess.Popen([program, script, "100"], stdout=subprocess.PIPE) as started:
            worker = json.loads(started.stdout.readline())["pid"]

            owner.kill()

            wait_for(lambda: has_ended(worker))
            wait_for(lambda: not program.parent.exists())


def test_without_its_server_the_program_is_python(script: Path, tmp_path: Path):
    server = WorkerServer([], [])
    program = tmp_path / "copy"
    program.write_text(server.program.read_text())
    program.chmod(0o700)
    server.close()

    about = json.loads(output(program, script, "0"))

    assert (about["words"], about["executable"]) == (["0"], sys.executable)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder of modules that a server finds before all others."""
    (tmp_path / "modules").mkdir()
    monkeypatch.setenv(
        "PYTHONPATH", f"{tmp_path / 'modules'}:{Path(module.__file__).parents[2]}"
    )
    return tmp_path / "modules"


def test_ray_is_imported_with_the_variables_of_its_first_worker(script: Path, modules: Path):
    (modules / "ray").mkdir()
    (modules / "ray/__init__.py").write_text(
        "import os\nread = dict(os.environ)\n"
        "class UniqueID(bytes):\n"
        "    from_random = classmethod(lambda cls: cls(os.urandom(9)))\n"
        "    binary = bytes.__bytes__\n"
    )
    (modules / "ray/actor.py").touch()
    script.write_text(
        "import sys\nread = sys.modules['ray'].read if 'ray' in sys.modules else {}\n"
        "print(sys.executable, *(read.get(f'RAY_{name}') for name in ('JOB_ID', 'RAYLET_PID')))"
    )
    server = WorkerServer([], ["ray"])

    def worker(job: str, raylet: str) -> str:
        variables = {"RAY_JOB_ID": job, "RAY_RAYLET_PID": raylet}
        return output(server.program, script, env=os.environ | variables).strip()

    # Ray starts some workers before it knows their job.
    assert worker("ffffffff", "7") == f"{server.program} None None"
    wait_for(lambda: worker("01000000", "7") == f"{server.program} 01000000 7")
    # Another Ray, and another job.
    assert worker("01000000", "8") == f"{sys.executable} None None"
    assert worker("02000000", "7") == f"{sys.executable} None None"
    server.close()


@pytest.fixture
def draws(script: Path) -> Callable[[WorkerServer], tuple[str, str]]:
    """Return a function that lets a worker tell its program and draw an ID of Ray's."""
    script.write_text(
        "import sys\nwas_there = 'ray.data' in sys.modules\nimport ray\n"
        "print(was_there and sys.executable, ray.UniqueID.from_random().hex())"
    )

    def draw(server: WorkerServer) -> tuple[str, str]:
        program, drawn = output(server.program, script).split()
        return program, drawn

    return draw


def test_workers_draw_different_ids_of_ray(draws, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_RAYLET_PID", "7")
    monkeypatch.setenv("RAY_JOB_ID", module.FIRST_JOB)
    server = WorkerServer([], ["ray", "ray.data"])
    wait_for(lambda: draws(server)[0] == str(server.program))

    programs, drawn = zip(*(draws(server) for _ in range(4)), strict=True)

    assert set(programs) == {str(server.program)}
    assert len(set(drawn)) == 4
    server.close()


def test_a_server_in_which_an_id_was_drawn_forks_no_more(
    script: Path, modules: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAY_RAYLET_PID", "7")
    monkeypatch.setenv("RAY_JOB_ID", module.FIRST_JOB)
    (modules / "careless.py").write_text("import ray\nray.UniqueID.from_random()\n")
    script.write_text("import sys; print('careless' in sys.modules, sys.executable)")
    server = WorkerServer([], ["ray", "careless"])
    programs = [sys.executable, str(server.program)]

    assert output(server.program, script) == f"False {programs[1]}\n"
    wait_for(lambda: output(server.program, script) == f"False {programs[0]}\n")
    server.close()


def test_a_module_that_is_not_there_or_fails_does_no_harm(script: Path, modules: Path):
    (modules / "broken.py").write_text("raise RuntimeError")
    server = WorkerServer(["there_is_no_such_module", "broken", "colorsys"], [])

    wait_for(lambda: json.loads(output(server.program, script))["preloaded"])
    server.close()


def test_a_server_with_threads_forks_no_more(script: Path, modules: Path):
    (modules / "busy.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=[100], daemon=True).start()\n"
    )
    server = WorkerServer(["busy"], [])

    wait_for(lambda: json.loads(output(server.program, script))["executable"] == sys.executable)
    server.close()


def test_where_programs_cannot_be_run_ray_gets_python(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    (tmp_path / "with a blank").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "with a blank"))
    monkeypatch.delenv(module.PROGRAM_VARIABLE, raising=False)
    python = sys.executable

    with forked_workers():
        assert sys.executable == python

    assert list((tmp_path / "with a blank").iterdir()) == []


def test_each_ray_of_a_process_has_a_server_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(module.PROGRAM_VARIABLE, raising=False)
    monkeypatch.setattr(module, "GPUS", ())
    programs = []

    for _ in range(2):
        with forked_workers():
            programs.append(Path(sys.executable))

    assert [program.exists() for program in programs] == [False, True]
    monkeypatch.setenv(module.PROGRAM_VARIABLE, sys.executable)
    with forked_workers():
        assert not programs[1].exists()


@pytest.mark.ray
@pytest.mark.skipif(
    any(True for name in module.GPUS for _ in Path("/dev").glob(name)), reason="has a GPU"
)
def test_ray_forks_its_workers_and_all_is_gone_with_the_job():
    variables = os.environ | {"RAY_ADDRESS": "local", module.PROGRAM_VARIABLE: ""}
    del variables["RAY_worker_niceness"]  # which all other tests set
    done = subprocess.run(
        [sys.executable, "-c", TASK],
        env=variables, check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip

    program, is_whole, niceness, python = done.stdout.split()
    assert Path(program).parent.name.startswith("upreid-workers-")
    assert (is_whole, niceness, python) == ("True", "0", sys.executable)
    wait_for(lambda: not Path(program).exists())


def test_a_program_that_the_user_names_is_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(module.PROGRAM_VARIABLE, "/some/python")
    python = sys.executable

    with forked_workers():
        assert sys.executable == "/some/python"

    assert sys.executable == python
