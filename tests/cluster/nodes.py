"""A Ray cluster of several nodes on this machine, any of which can be lost."""

import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from tests.cluster.network import Host, Network, this_machine
from tests.cluster.processes import free_ports, tree

START_SECONDS = 90.0


class Nodes:
    """A head without CPUs, and the nodes that joined it; ends them all on exit.

    Args:
        folder: For logs, the token and Ray's own files; its path must be short, for sockets.
        settings: Environment variables of all processes of the cluster.
        network: Where every node becomes a host; all run on this machine's own if None.
        python: The program that Ray runs its processes with.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, str] | None = None,
        network: Network | None = None,
        python: str = sys.executable,
    ) -> None:
        self._folder = folder
        self._ray = (python, "-m", "ray.scripts.scripts")
        self._network = network
        self.outside = self._new_host()
        self._head_host = self._new_host()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._names: dict[int, str] = {}
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self._port, self._dashboard_port, self._client_port = free_ports(3)
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            "PATH": os.pathsep.join(
                [str(Path(python).parent), str(Path(sys.executable).parent), os.environ["PATH"]]
            ),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "GLOO_SOCKET_IFNAME": self._head_host.interface,
            # No name server answers there, for which Gloo would wait six seconds.
            "RES_OPTIONS": "timeout:1 attempts:1",
            "PYTHONUNBUFFERED": "1",  # for the logs
            **(settings or {}),
        }
        self._head = self._start(
            self._head_host,
            "head",
            "--head",
            f"--port={self._port}",
            f"--dashboard-host={self._head_host.service_address}",
            f"--dashboard-port={self._dashboard_port}",
            f"--ray-client-server-port={self._client_port}",
            "--num-cpus=0",
        )

    def __enter__(self) -> Self:
        """Wait until the head has started."""
        deadline = time.monotonic() + START_SECONDS
        log = self._folder / "head.log"
        while "Ray runtime started" not in log.read_text():
            if self._head.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(log.read_text())
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        """End all nodes."""
        for node in self._processes:
            self.lose(node)

    @property
    def address(self) -> str:
        """What ``RAY_ADDRESS`` has to be for a driver."""
        return f"{self._head_host.address}:{self._port}"

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted."""
        return f"http://{self._head_host.service_address}:{self._dashboard_port}"

    def add(self, *options: str) -> subprocess.Popen[bytes]:
        """Let a node join, without waiting for it; return its first process."""
        name = f"node-{len(self._processes)}"
        return self._start(self._new_host(), name, f"--address={self.address}", *options)

    def lose(self, node: subprocess.Popen[bytes]) -> None:
        """Kill all processes of a node at once."""
        for pid in tree(node.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.wait()

    def drain(self, node: subprocess.Popen[bytes], seconds: int) -> None:
        """Announce that a node ends, as the preStop hook of a pod does."""
        name = self._names[node.pid]
        node_id = self.ask(
            f"next(n['NodeID'] for n in ray.nodes() if n['NodeName'] == {name!r})"
        )
        subprocess.run(
            [
                *self._head_host.prefix,
                *(
                    *self._ray,
                    "drain-node",
                    f"--address={self.address}",
                    f"--node-id={node_id}",
                ),
                *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"),
                f"--deadline-remaining-seconds={seconds}",
            ],
            env=self.environment,
            capture_output=True,
            check=True,
            timeout=START_SECONDS,
        )

    def ask(self, expression: str) -> str | None:
        """Return what an expression is in a driver of this cluster, None if it has no value."""
        script = (
            "import ray; ray.init('auto', logging_level='ERROR', log_to_driver=False);"
            f"print({expression})"
        )
        done = subprocess.run(
            [*self._head_host.prefix, sys.executable, "-c", script],
            env={**self.environment, "RAY_ADDRESS": self.address},
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )
        return done.stdout.split()[-1] if done.returncode == 0 else None

    def _new_host(self) -> Host:
        return self._network.add() if self._network else this_machine()

    def _start(self, host: Host, name: str, *options: str) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.log").open("wb") as log:
            node = subprocess.Popen(
                [
                    *(*host.prefix, *self._ray, "start", "--block", "--log-color=false"),
                    f"--node-ip-address={host.address}",
                    *("--min-worker-port=0", "--max-worker-port=0"),
                    *("--dashboard-agent-listen-port=0", "--object-store-memory=300000000"),
                    # Of its own, or nodes would unpack the code of a job over each other.
                    f"--temp-dir={self._folder / name}",
                    f"--node-name={name}",
                    *options,
                ],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(node)
        self._names[node.pid] = name
        return node
