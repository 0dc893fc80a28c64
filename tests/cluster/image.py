"""The image of `cluster/Dockerfile`, built and entered without a container engine.

buildah builds it on a Debian that debootstrap makes, so that no registry of images is needed.
bubblewrap runs its programs as the manifests want it: a file system that is read-only but for
the given folders, user 1000, no capabilities.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.processes import ROOT

DOCKERFILE = ROOT / "cluster" / "Dockerfile"
PROGRAMS = {
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "bwrap": "bubblewrap",
    "dnsmasq": "dnsmasq-base",
    "ip": "iproute2",
    "nft": "nftables",
    "prometheus": "prometheus",
}
CERTIFICATES = Path("/etc/ssl/certs")
# What the official image of Python has.
BASE_PACKAGES = "python3,python3-venv,libpython3-dev,ca-certificates"


def inputs() -> str:
    """Return a digest of all that the image is made of but the packages."""
    digest = hashlib.sha256()
    names = (ROOT / ".dockerignore").read_text().split()
    kept = [ROOT / name.removeprefix("!") for name in names if name.startswith("!")]
    for path in (DOCKERFILE, *kept):
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        for file in files:
            digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def skip_unless_possible() -> None:
    """Skip with what is missing on this machine."""
    if os.getuid() != 0:
        pytest.skip("an image is built by root here")
    if missing := sorted(PROGRAMS[name] for name in PROGRAMS if not shutil.which(name)):
        pytest.skip(f"missing: apt-get install {' '.join(missing)}")


@dataclass(frozen=True)
class Layer:
    """A layer of an image: the instruction that made it, and its size in bytes."""

    instruction: str
    size: int


class Image:
    """An image that is built in a folder and mounted there.

    Args:
        folder: Of images; one that is there already, from the same files, is used again.
        variant: The variant of the Dockerfile, `cuda` or `cpu`.
    """

    def __init__(self, folder: Path, variant: str) -> None:
        self._folder = folder
        self._name = f"localhost/upreid-ray:{variant}-{inputs()}"
        self._temporary = folder / "tmp"
        self._temporary.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        base = self._base()
        self.base_seconds = time.monotonic() - began
        if not self._exists(self._name):
            self._build(base, variant)
        self.build_seconds = time.monotonic() - began - self.base_seconds
        self._container = self._buildah("from", "--pull-never", self._name).strip()
        self.root = Path(self._buildah("mount", self._container).strip())

    def close(self) -> None:
        """Unmount it; its layers stay."""
        self._buildah("rm", self._container)

    @cached_property
    def config(self) -> dict[str, Any]:
        """What the Dockerfile says about processes: `Env`, `User`, `WorkingDir`, `Cmd`."""
        return self._inspect["Docker"]["config"]

    @property
    def layers(self) -> list[Layer]:
        """The layers from the base on, with their sizes before compression."""
        instructions = [
            step["created_by"]
            for step in self._inspect["OCIv1"]["history"]
            if not step.get("empty_layer")
        ]
        sizes = [layer["size"] for layer in json.loads(self._inspect["Manifest"])["layers"]]
        return [Layer(*pair) for pair in zip(instructions, sizes, strict=True)]

    def enter(
        self,
        *command: str,
        environment: dict[str, str] | None = None,
        folders: tuple[str, ...] = ("--tmpfs", "/tmp", "--tmpfs", "/dev/shm"),
        writable: tuple[str, ...] = ("/tmp", "/dev/shm"),
        files: dict[str, Path] | None = None,
    ) -> list[str]:
        """Return the words that run a command in the image.

        Args:
            command: The command.
            environment: Variables beside those of the image.
            folders: bubblewrap's options that mount what can be written.
            writable: The folders that they mount, which everybody may write.
            files: Files of this machine that stand in the image, by their path there.
        """
        words = ["bwrap", "--ro-bind", str(self.root), "/", "--proc", "/proc", "--dev", "/dev"]
        words += ["--ro-bind", "/sys", "/sys", *folders]
        for folder in writable:
            words += ["--chmod", "1777", folder]
        for path, file in (files or {}).items():
            words += ["--ro-bind", str(file), path]
        words += ["--unshare-pid", "--unshare-ipc", "--die-with-parent", "--cap-drop", "ALL"]
        for capability in ("SETUID", "SETGID", "SETPCAP"):  # for setpriv, which drops them
            words += ["--cap-add", f"CAP_{capability}"]
        return [*words, *self._as_user(*command, environment=environment or {})]

    def enter_again(
        self, process: int, *command: str, environment: dict[str, str]
    ) -> list[str]:
        """Return the words that run a command beside one that was entered before.

        Args:
            process: The first process of the other command, on this machine.
            command: The command, which shares processes, files and network with it.
            environment: Variables beside those of the image.
        """
        (child, *_) = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        words = ["nsenter", f"--target={child}", "--mount", "--pid", "--ipc", "--net"]
        return [*words, *self._as_user(*command, environment=environment)]

    def _as_user(self, *command: str, environment: dict[str, str]) -> list[str]:
        user, _, group = self.config["User"].partition(":")
        words = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"]
        words += ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
        words += ["env", "--ignore-environment", f"--chdir={self.config['WorkingDir']}"]
        home = "HOME=/home/ray"
        given = [f"{name}={value}" for name, value in environment.items()]
        return [*words, *self.config["Env"], home, *given, *command]

    def run(self, *command: str) -> str:
        """Run a command in the image; return what it prints."""
        done = subprocess.run(self.enter(*command), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @cached_property
    def _inspect(self) -> dict[str, Any]:
        return json.loads(self._buildah("inspect", "--type=image", self._name))

    def _base(self) -> str:
        """Make a Debian with Python, of the release that the Dockerfile's own base has."""
        (suite,) = re.findall(
            r"^ARG BASE=\S+-slim-(\w+)$", DOCKERFILE.read_text(), re.MULTILINE
        )
        name, tree = f"localhost/base:{suite}", self._folder / "base"
        if self._exists(name):
            return name
        shutil.rmtree(tree, ignore_errors=True)
        include = f"--include={BASE_PACKAGES}"
        self._run("debootstrap", "--variant=minbase", include, suite, str(tree))
        shutil.rmtree(tree / "var/lib/apt/lists")
        container = self._buildah("from", "scratch").strip()
        self._buildah("copy", container, f"{tree}/", "/")
        self._buildah("commit", "--rm", container, name)
        shutil.rmtree(tree)
        return name

    def _exists(self, name: str) -> bool:
        return bool(self._buildah("images", "--quiet", "--filter", f"reference={name}"))

    def _build(self, base: str, variant: str) -> None:
        """Build it with the certificates and the package index of this machine."""
        pip, uv = self._folder / "pip.conf", self._folder / "uv.toml"
        index = os.environ.get("PIP_INDEX_URL")
        pip.write_text(
            f"[global]\ncert = {CERTIFICATES}/ca-certificates.crt\n"
            + (f"index-url = {index}\n" if index else "")
        )
        uv.write_text(
            "system-certs = true\n"
            + (f"[[index]]\nurl = '{index}'\ndefault = true\n" if index else "")
        )
        mounts = {CERTIFICATES: CERTIFICATES, pip: "/etc/pip.conf", uv: "/etc/uv/uv.toml"}
        self._buildah(
            *("bud", "--isolation=chroot", "--pull-never", "--network=host"),
            # Layers, but not those of before: older buildahs cannot mount a stage out of them.
            *("--layers", "--no-cache"),
            *("--format=docker", f"--file={DOCKERFILE}", f"--tag={self._name}"),
            *(f"--volume={source}:{target}:ro" for source, target in mounts.items()),
            *(f"--build-arg=BASE={base}", f"--build-arg=VARIANT={variant}"),
            *("--build-arg=COMMIT=tested", str(ROOT)),
        )

    def _buildah(self, *words: str) -> str:
        store = (f"--root={self._folder}/store", f"--runroot={self._folder}/run")
        return self._run("buildah", *store, *words)

    def _run(self, *words: str) -> str:
        done = subprocess.run(
            words,
            env=os.environ | {"TMPDIR": str(self._temporary)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
        return done.stdout
