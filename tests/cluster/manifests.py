"""The files of `cluster/`, read and rendered for the tests of what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from packaging.requirements import Requirement

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
BIN = Path(sys.executable).parent
OVERLAYS = ("local", "gpu")
JOBS = sorted((CLUSTER / "kubernetes" / "jobs").glob("*.yaml"))
Tree = dict[str, Any]


def kustomize(folder: Path) -> subprocess.CompletedProcess[str]:
    """Render a folder of manifests."""
    command = [str(BIN / "kubectl"), "kustomize", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield every value of a tree with its path."""
    yield path, tree
    if isinstance(tree, dict | list):
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from nodes(value, (*path, name))


def pods(resources: list[Tree]) -> Iterator[tuple[str, Tree]]:
    """Yield the specification of every pod with a name for it."""
    for resource in resources:
        for path, value in nodes(resource):
            if isinstance(value, dict) and "containers" in value:
                yield f"{resource['kind']} {resource['metadata'].get('name')} {path}", value


def containers(pod: Tree) -> list[Tree]:
    """Return the containers of a pod, those that run first included."""
    return [*pod.get("initContainers", []), *pod["containers"]]


def hook(resources: list[Tree]) -> list[str]:
    """Return what Kubernetes runs in the pod of a training worker before it ends the pod."""
    (cluster,) = (each for each in resources if each["kind"] == "RayCluster")
    groups = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    (worker,) = groups["train"]["template"]["spec"]["containers"]
    command: list[str] = worker["lifecycle"]["preStop"]["exec"]["command"]
    return command


def compose() -> Tree:
    """Read the compose file."""
    tree: Tree = yaml.safe_load((CLUSTER / "compose.yaml").read_text())
    return tree


def ray_up() -> Tree:
    """Read the file for machines without Kubernetes."""
    tree: Tree = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())
    return tree


def locked() -> set[tuple[str, str]]:
    """Return what the lock holds: names with versions, of which a name may have several."""
    lock = (ROOT / "requirements.lock").read_text()
    return set(re.findall(r"^([a-z0-9-]+)==([^\s;]+)", lock, re.MULTILINE))


def installed(requirements: list[str]) -> set[tuple[str, str]]:
    """Return the names and versions of what these requirements have brought in here."""
    found, seen, waiting = set(), set(), [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        if (key := (requirement.name, frozenset(requirement.extras))) in seen:
            continue
        seen.add(key)
        package = distribution(requirement.name)
        found.add((re.sub(r"[-_.]+", "-", requirement.name).lower(), package.version))
        for needed in map(Requirement, package.requires or []):
            extras = requirement.extras or {""}
            if not needed.marker or any(needed.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(needed)
    return found
