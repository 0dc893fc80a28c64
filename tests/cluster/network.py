"""Hosts with an address each, on this machine: network namespaces joined by a bridge."""

import os
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import ray.util


@dataclass(frozen=True)
class Host:
    """Where a node runs.

    Attributes:
        address: By which other nodes reach it.
        service_address: What services for people are bound to.
        interface: Of that address.
        prefix: Words that begin a command which is to run there.
    """

    address: str
    service_address: str
    interface: str
    prefix: tuple[str, ...] = ()


def this_machine() -> Host:
    """Return this machine itself, whose services are bound to loopback."""
    return Host(ray.util.get_node_ip_address(), "127.0.0.1", "lo")


class Network:
    """Hosts that reach each other and nothing else; all of them end on exit.

    The bridge has a namespace of its own, so the network of this machine stays as it is.
    """

    _SUBNET = "10.0.0"

    def __init__(self) -> None:
        self._name = f"upreid-{os.getpid()}"
        self._bridge = f"{self._name}-bridge"
        self._namespaces: list[str] = []

    @classmethod
    def is_allowed(cls) -> bool:
        """Tell whether this user may make namespaces."""
        try:
            with cls() as network:
                network.add()
        except (OSError, subprocess.CalledProcessError):
            return False
        return True

    def __enter__(self) -> Self:
        """Make the bridge."""
        self._make(self._bridge)
        self._ip("-n", self._bridge, "link", "add", "bridge", "type", "bridge")
        self._ip("-n", self._bridge, "link", "set", "bridge", "up")
        return self

    def __exit__(self, *_: object) -> None:
        """End all namespaces, and with them what connects them."""
        for namespace in self._namespaces:
            with suppress(subprocess.CalledProcessError):
                self._ip("netns", "delete", namespace)

    def add(self) -> Host:
        """Return a new host."""
        number = len(self._namespaces) + 1
        name, port = f"{self._name}-{number}", f"port{number}"
        address = f"{self._SUBNET}.{number}"
        self._make(name)
        veth = ("type", "veth", "peer", "name", "eth0", "netns", name)
        self._ip("-n", self._bridge, "link", "add", port, *veth)
        self._ip("-n", self._bridge, "link", "set", port, "master", "bridge", "up")
        self._ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            self._ip("-n", name, "link", "set", interface, "up")
        # Nothing answers there; but a host without it believes that it has no network.
        self._ip("-n", name, "route", "add", "default", "via", f"{self._SUBNET}.1")
        return Host(address, address, "eth0", ("ip", "netns", "exec", name))

    def _make(self, namespace: str) -> None:
        self._ip("netns", "add", namespace)
        self._namespaces.append(namespace)

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)
