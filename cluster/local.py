"""Start, show and end the local services: a Ray head with its dashboard, and MLflow.

Both listen on the loopback interface only, and Ray asks for a token. MLflow serves the
database that jobs use without it, `mlflow.db` of the working folder, so that there is one
registry. What was started is
recorded in `<storage>/local/state.json`. Every process of a service carries a tag of its own
in its environment, which its children inherit: `down` ends all of them wherever they moved
and nothing else, even after a process id has been used again. Needs Linux (`/proc`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import suppress
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import NamedTuple, NoReturn

from rich.console import Console
from rich.table import Table

HOST = "127.0.0.1"
PORTS = {"dashboard": 8265, "gcs": 6379, "mlflow": 5000}
USER_PORTS = range(1024, 65536)  # those below need privilege
SERVICES = {"ray": ("dashboard", "gcs"), "mlflow": ("mlflow",)}
SQLITE = "sqlite:///"
TAG = "UPREID_RAY_SERVICE"
BIN = Path(sys.executable).parent
TOKEN_FILE = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
START_SECONDS = 90.0


class Service(NamedTuple):
    """A started service: its first process, and the tag that all of its processes carry."""

    pid: int
    tag: str

    def processes(self) -> set[int]:
        """Return the ids of the service's living processes."""
        mark, found = f"{TAG}={self.tag}".encode(), set()
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it has just ended, or belongs to another user
                if mark in environ.read_bytes().split(b"\0"):
                    found.add(int(environ.parent.name))
        return found

    def stop(self) -> None:
        """End the first process, which ends the others in order, and then what is left."""
        self.send(signal.SIGTERM, self.processes() & {self.pid}, seconds=20.0)
        self.send(signal.SIGTERM, self.processes(), seconds=5.0)
        self.send(signal.SIGKILL, self.processes(), seconds=5.0)
        if left := self.processes():
            fail(f"could not end the processes {sorted(left)}", 1)

    def send(self, sent: signal.Signals, targets: set[int], seconds: float) -> None:
        """Send processes a signal and wait for them to end."""
        for pid in targets:
            with suppress(ProcessLookupError):
                os.kill(pid, sent)
        deadline = time.monotonic() + seconds
        while targets & self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)


class Local:
    """The services of one storage folder."""

    def __init__(self, storage: Path) -> None:
        """Read what was started, if anything was."""
        self.storage = storage.resolve()
        self.folder = self.storage / "local"
        self.record = self.folder / "state.json"
        self.ports = dict(PORTS)
        self.services: dict[str, Service] = {}
        # Ray's sockets need a short path. Ray opens its folder to every user of the machine,
        # so it gets one inside a private one.
        key = hashlib.sha256(f"{os.getuid()}:{self.storage}".encode()).hexdigest()[:8]
        self.private = Path("/tmp") / f"upreid-{key}"  # noqa: S108 - `start` checks its owner
        with suppress(FileNotFoundError):
            try:
                record = json.loads(self.record.read_text())
                self.ports = {name: int(record["ports"][name]) for name in PORTS}
                for name in SERVICES.keys() & record.keys():
                    self.services[name] = Service(int(record[name]["pid"]), record[name]["tag"])
            except (ValueError, KeyError, TypeError):
                fail(f"{self.record} is damaged; remove it")

    def save(self) -> None:
        """Write down what was started; nothing started leaves no record."""
        record = {name: service._asdict() for name, service in self.services.items()}
        if record:
            part = self.record.with_suffix(".part")  # so that the record is never torn
            part.write_text(json.dumps({"ports": self.ports, **record}, indent=2) + "\n")
            part.replace(self.record)
        else:
            self.record.unlink(missing_ok=True)

    def alive(self) -> set[str]:
        """Return the names of the services that run and answer."""
        return {
            name
            for name, service in self.services.items()
            if service.pid in service.processes() and self.answers(name)
        }

    def answers(self, name: str) -> bool:
        """Tell whether Ray's job interface answers to the token, or MLflow to anyone."""
        connection = HTTPConnection(HOST, self.ports[SERVICES[name][0]], timeout=5)
        path, headers = "/health", {}
        if name == "ray":
            path, headers = "/api/jobs/", {"Authorization": f"Bearer {read_token()}"}
        try:
            connection.request("GET", path, headers=headers)
            return connection.getresponse().status == HTTPStatus.OK
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()

    def url(self, name: str) -> str:
        """Return the address of a service."""
        return f"http://{HOST}:{self.ports[SERVICES[name][0]]}"

    def check_paths(self) -> None:
        """Refuse a Python whose path a shell would split, as Ray's own processes do."""
        if shlex.quote(str(BIN)) != str(BIN):
            fail(
                f"Ray's services cannot run from {BIN}; make the environment elsewhere, for "
                "example with make up VENV=$HOME/upreid-venv"
            )

    def check_ports(self, names: list[str]) -> None:
        """Refuse ports that cannot be had."""
        if len(set(self.ports.values())) < len(PORTS):
            fail(f"the ports must differ: {self.ports}")
        for name in names:
            if self.ports[name] not in USER_PORTS:
                fail(f"--{name}-port must be from 1024 to 65535")
            if not is_free(self.ports[name]):
                fail(f"port {self.ports[name]} is taken; choose another with --{name}-port")

    def command(self, name: str) -> list[str]:
        """Return the command line that starts a service."""
        if name == "mlflow":
            store = database()
            # Jobs read and write artifacts themselves, so that they find them without the
            # server too.
            return [
                *(str(BIN / "mlflow"), "server", "--no-serve-artifacts", "--workers=1"),
                *(f"--host={HOST}", f"--port={self.ports['mlflow']}"),
                f"--backend-store-uri={SQLITE}{store}",
                f"--default-artifact-root={(store.parent / 'mlartifacts').as_uri()}",
            ]
        # The Ray client server cannot be turned off; port 0 stands for any free port.
        client = (p for p in range(10001, 32768) if p not in self.ports.values() and is_free(p))
        return [
            *(str(BIN / "ray"), "start", "--head", "--block", "--log-color=false"),
            *(f"--node-ip-address={HOST}", f"--port={self.ports['gcs']}"),
            *(f"--dashboard-host={HOST}", f"--dashboard-port={self.ports['dashboard']}"),
            *(f"--ray-client-server-port={next(client)}", "--dashboard-agent-listen-port=0"),
            *("--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={self.private}/ray"),
        ]

    def environment(self, tag: str) -> dict[str, str]:
        """Return the environment of a service; Ray's jobs and workers inherit it."""
        outer = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        return outer | {
            TAG: tag,
            "SPT_NOENV": "1",  # or Ray's process titles overwrite the environment in /proc
            "PATH": f"{BIN}{os.pathsep}{outer.get('PATH', os.defpath)}",
            "MLFLOW_TRACKING_URI": self.url("mlflow"),
            "UPREID_RAY_STORAGE": str(self.storage),
            "RAY_AUTH_MODE": "token",
            # On any system: use loopback, where Ray would put the network's address instead.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # no other node to drain to
            "RAY_USAGE_STATS_ENABLED": "0",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def start(self, names: list[str]) -> None:
        """Start services and wait until they answer; if one does not, end them again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        database().parent.mkdir(parents=True, exist_ok=True)
        self.private.mkdir(mode=0o700, exist_ok=True)
        found = self.private.lstat()
        if (found.st_uid, found.st_mode) != (os.getuid(), stat.S_IFDIR | 0o700):
            fail(f"{self.private} is not a private folder of yours; remove it")
        started: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for name in names:
                tag = f"{name}-{secrets.token_hex(8)}"
                with (self.folder / f"{name}.log").open("wb") as log:
                    started[name] = subprocess.Popen(
                        self.command(name),
                        env=self.environment(tag),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                self.services[name] = Service(started[name].pid, tag)
                self.save()
            self.wait(started)
        except BaseException:
            for name in started.keys() & self.services.keys():
                self.services.pop(name).stop()
            self.save()
            raise

    def wait(self, started: dict[str, subprocess.Popen[bytes]]) -> None:
        """Wait until services answer, or tell with the end of its log that one does not."""
        deadline = time.monotonic() + START_SECONDS
        while waiting := [name for name in started if not self.answers(name)]:
            for name in waiting:
                ended = started[name].poll() is not None
                if ended or time.monotonic() > deadline:
                    log = self.folder / f"{name}.log"
                    what = "ended" if ended else f"gave no answer in {START_SECONDS:.0f} s"
                    tail = log.read_text(errors="replace").splitlines()[-12:]
                    fail("\n".join([f"{name} {what}; end of {log}:", *tail]), 1)
            time.sleep(0.3)

    def show(self, alive: set[str]) -> None:
        """Print the addresses, what is alive, and where the logs and the token are."""
        grid = Table.grid(padding=(0, 2))
        for name, title in {"ray": "Ray dashboard", "mlflow": "MLflow"}.items():
            state = "alive" if name in alive else "dead"
            grid.add_row(title, self.url(name), state)
        grid.add_row("Ray logs", f"{self.private}/ray/session_latest/logs")
        grid.add_row("Start logs", f"{self.folder}/ray.log, mlflow.log")
        grid.add_row("Ray token in", str(TOKEN_FILE))
        Console(width=240, highlight=False).print(grid)


def database() -> Path:
    """Return the database of jobs that are started here without a server."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    return Path(uri.removeprefix(SQLITE) if uri.startswith(SQLITE) else "mlflow.db").absolute()


def fail(message: str, status: int = 2) -> NoReturn:
    """Tell the user of a problem and exit."""
    sys.stderr.write(f"{message}\n")
    sys.exit(status)


def is_free(port: int) -> bool:
    """Tell whether nobody listens on a loopback port."""
    with suppress(OSError):
        socket.create_server((HOST, port)).close()
        return True
    return False


def read_token() -> str:
    """Return Ray's token, or nothing if there is none."""
    return TOKEN_FILE.read_text().strip() if TOKEN_FILE.exists() else ""


def ensure_token() -> None:
    """Let Ray make its token if there is none yet, and keep it readable for its owner only."""
    if "RAY_AUTH_TOKEN" in os.environ:
        fail(f"RAY_AUTH_TOKEN is set; unset it, the token belongs in {TOKEN_FILE}")
    if not read_token():
        command = [str(BIN / "ray"), "get-auth-token", "--generate"]
        subprocess.run(command, capture_output=True, umask=0o077, check=False)
        if not read_token():
            fail(f"Ray made no token in {TOKEN_FILE}")
    TOKEN_FILE.chmod(0o600)  # a token that Ray made by itself is open to every user


def up(local: Local, asked: dict[str, int]) -> int:
    """Start what does not run yet."""
    say = Console(highlight=False, soft_wrap=True).print
    alive = local.alive()
    for name, port in asked.items():
        if alive and port != local.ports[name]:
            fail(f"already up with --{name}-port {local.ports[name]}; `down` ends it")
    if missing := [name for name in SERVICES if name not in alive]:
        for name in local.services.keys() & missing:
            local.services.pop(name).stop()
        local.save()
        local.ports = (local.ports if alive else PORTS) | asked
        local.check_paths()
        local.check_ports([port for name in missing for port in SERVICES[name]])
        ensure_token()
        say(f"Starting {' and '.join(missing)}, which takes about 20 s ...")
        local.start(missing)
    say(f"The local services are {'up' if missing else 'up already'}.")
    local.show(set(SERVICES))
    url = local.url("ray")
    address = "" if url.endswith(f":{PORTS['dashboard']}") else f"--address {url} "
    say("Next:\n  export RAY_AUTH_MODE=token")
    say(f"  ray job submit {address}--working-dir . -- python jobs/pretrain.py demo")
    usual = local.storage == Path("runs").resolve()
    script = f"{sys.executable} {__file__} --storage {local.storage}"
    say(f"  {'make' if usual else script} down")
    return 0


def down(local: Local) -> int:
    """End everything that `up` started."""
    ended = [name for name, service in local.services.items() if service.processes()]
    for name in list(local.services):
        local.services[name].stop()
        del local.services[name]
        local.save()
    sys.stdout.write(f"Ended {' and '.join(ended)}.\n" if ended else "Nothing was up.\n")
    return 0


def status(local: Local) -> int:
    """Show what is alive."""
    alive = local.alive()
    local.show(alive)
    return 0 if alive == set(SERVICES) else 1


class Parser(argparse.ArgumentParser):
    """A parser that tells of bad input in one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit."""
        fail(f"{self.prog}: {message}")


def main() -> int:
    """Run the command line and return the exit status."""
    parser = Parser(description="Start, show and end the local Ray head and MLflow server.")
    what = "up: start what does not run; down: end it; status: show it, 1 unless all is alive"
    parser.add_argument("command", choices=("up", "down", "status"), help=what)
    parser.add_argument("--storage", type=Path, default=Path("runs"), help="[runs]")
    for name, port in PORTS.items():
        parser.add_argument(f"--{name}-port", type=int, metavar="PORT", help=f"for up [{port}]")
    arguments = vars(parser.parse_args())
    asked = {name: arguments[f"{name}_port"] for name in PORTS}
    try:
        local = Local(arguments["storage"])
        if arguments["command"] == "up":
            return up(local, {name: port for name, port in asked.items() if port is not None})
        return (down if arguments["command"] == "down" else status)(local)
    except OSError as error:
        fail(str(error))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
