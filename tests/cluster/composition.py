"""The services of `cluster/compose.yaml`, started from the file without a container engine.

Each service is a host with an address of its own and runs in the image as the file says:
command, environment, what it can write, whom it waits for, when it is healthy. Two things are
not the file's: PostgreSQL and the S3 store come from Python packages, since the images that it
names cannot be had without a registry; and limits of memory are not enforced.
"""

import os
import re
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from tests.cluster.image import Image
from tests.cluster.manifests import compose
from tests.cluster.network import Host, Network
from tests.cluster.postgres import postgres
from tests.cluster.processes import ending

SECONDS = 180.0
S3_PORT = 9000
# Hosts beside the services: of who submits jobs, and of who watches.
OTHERS = ("outside", "prometheus")


def interpolated(value: Any) -> Any:
    """Return a part of the file with its variables replaced, as Docker Compose does it."""
    if isinstance(value, dict):
        return {name: interpolated(part) for name, part in value.items()}
    if isinstance(value, list):
        return [interpolated(part) for part in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        return "$" if name is None else os.environ.get(name, default)

    return re.sub(r"\$(?:\$|\{(?P<name>\w+):-(?P<default>[^}]*)\})", replace, value)


def size(text: str) -> str:
    """Return a size of the file in bytes."""
    number, unit = re.fullmatch(r"(\d+)([gm])b?", text).groups()
    return str(int(number) * {"g": 2**30, "m": 2**20}[unit])


class Composition:
    """The services of the file, each on a host; all end on exit.

    Args:
        image: What our own services run in.
        network: Where each service becomes a host.
        folder: For logs.
        secrets: The folder of the files of passwords that the file names.
    """

    def __init__(self, image: Image, network: Network, folder: Path, secrets: Path) -> None:
        self._image = image
        self.folder = folder
        self._secrets = secrets
        self._services: dict[str, Any] = interpolated(compose()["services"])
        self._stack = ExitStack()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._programs: Path | None = None
        self._files: dict[str, Path] = {}
        self._name_server = network.add()
        self.hosts: dict[str, Host] = {
            name: network.add() for name in (*self._services, *OTHERS)
        }

    def __enter__(self) -> Self:
        """Start the name server, as a container engine has one."""
        hosts, names = self.folder / "hosts", self.folder / "names"
        hosts.write_text("127.0.0.1 localhost\n")
        lines = [f"{host.address} {name}\n" for name, host in self.hosts.items()]
        names.write_text("".join(lines))
        resolver = self.folder / "resolv.conf"
        resolver.write_text(f"nameserver {self._name_server.address}\noptions ndots:0\n")
        self._files = {"/etc/hosts": hosts, "/etc/resolv.conf": resolver}
        words = ("--no-daemon", "--no-resolv", "--no-hosts", "--user=root", "--local=/#/")
        command = [*self._name_server.prefix, "dnsmasq", *words, f"--addn-hosts={names}"]
        server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self._stack.enter_context(ending(server))
        return self

    def __exit__(self, *_: object) -> None:
        """End all services, those last that others need."""
        for name in reversed(list(self._processes)):
            self.lose(name)
        self._stack.close()

    def up(self, name: str) -> None:
        """Start a service after those that it depends on, each as the file wants it."""
        if name in self._processes or (name == "postgres" and self._programs):
            return
        waits = self._services[name].get("depends_on", {})
        for needed in waits:
            self.up(needed)
            conditions = waits[needed] if isinstance(waits, dict) else {}
            self._wait(needed, conditions.get("condition", "service_started"))
        self._start(name)

    def wait_until_healthy(self, name: str) -> None:
        """Wait until the service's own check succeeds."""
        self._wait(name, "service_healthy")

    def lose(self, name: str) -> None:
        """Kill all processes of a service at once."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def wait_until_restarted(self, name: str) -> None:
        """Wait until a service has ended by itself, and start it again as the file wants it."""
        assert self._services[name]["restart"] == "unless-stopped"
        self._processes.pop(name).wait(SECONDS)
        self.up(name)

    def log(self, name: str) -> str:
        """Return what a service has printed."""
        return (self.folder / f"{name}.log").read_text()

    def command(self, name: str, *words: str, of: str = "head") -> list[str]:
        """Return the words that run a command on a host, with the variables of a service."""
        service = self._services[of]
        folders, writable = [], []
        for entry in service["tmpfs"]:
            target, _, options = entry.partition(":size=")
            folders += ["--size", size(options), "--tmpfs", target]
            writable.append(target)
        folders += ["--size", size(service["shm_size"]), "--tmpfs", "/dev/shm"]
        # What bubblewrap does in any case, the file has to ask for.
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        entered = self._image.enter(
            *words,
            environment=self._environment(of),
            folders=tuple(folders),
            writable=(*writable, "/dev/shm"),
            files=self._files,
        )
        return [*self.hosts[name].prefix, *entered]

    def run(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command on a host; return its status and what it prints."""
        command = self.command(name, *words)
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def execute(self, name: str, *words: str) -> list[str]:
        """Return the words that run a command among the processes of a running service."""
        process, given = self._processes[name], self._environment(name)
        return self._image.enter_again(process.pid, *words, environment=given)

    def postgres(self, *words: str, given: bytes = b"") -> bytes:
        """Run a program of PostgreSQL on its host; return what it prints."""
        assert self._programs is not None
        password = self._environment("postgres")["POSTGRES_PASSWORD"]
        program, *options = words
        return subprocess.run(
            [
                *(*self.hosts["postgres"].prefix, str(self._programs / program)),
                *("--host=127.0.0.1", *options),
            ],
            env=os.environ | {"PGPASSWORD": password},
            input=given,
            capture_output=True,
            check=True,
        ).stdout

    def _environment(self, name: str) -> dict[str, str]:
        service = self._services[name]
        given: dict[str, str] = {}
        for file in service["env_file"]:
            lines = (self._secrets / Path(file).name).read_text().splitlines()
            given |= dict(line.split("=", 1) for line in lines)
        return given | service.get("environment", {})

    def _start(self, name: str) -> None:
        host, given = self.hosts[name], self._environment(name)
        if name == "postgres":
            password, everywhere = given["POSTGRES_PASSWORD"], "0.0.0.0"
            assert (given["POSTGRES_USER"], given["POSTGRES_DB"]) == ("mlflow", "mlflow")
            server = postgres(5432, password, address=everywhere, prefix=host.prefix)
            self._programs = self._stack.enter_context(server)
            self.postgres("createdb", "-U", "mlflow", "mlflow")
            return
        if name == "s3":
            options = ("-H", "0.0.0.0", "-p", str(S3_PORT))
            command = [*host.prefix, sys.executable, "-m", "moto.server", *options]
        else:
            command = self.command(name, *self._services[name]["command"], of=name)
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def _wait(self, name: str, condition: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not self._is(name, condition):
            assert time.monotonic() < deadline, self.log(name)
            time.sleep(0.5)

    def _is(self, name: str, condition: str) -> bool:
        if name == "postgres":
            return self._programs is not None
        ended = self._processes[name].poll()
        if condition == "service_completed_successfully":
            if ended:  # `restart: on-failure`
                assert self._services[name]["restart"] == "on-failure", self.log(name)
                self._start(name)
            return ended == 0
        assert ended is None, self.log(name)
        if condition == "service_started":
            return True
        kind, *words = self._services[name]["healthcheck"]["test"]
        assert kind == "CMD"
        return self.run(name, *words).returncode == 0
