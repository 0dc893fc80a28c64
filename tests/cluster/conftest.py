"""What the tests of the cluster's files share, and which run only when they are asked for."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster.image import Image, skip_unless_possible
from tests.cluster.manifests import CLUSTER, OVERLAYS, Tree, kustomize


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the image, which takes minutes and gigabytes, unless its file is named."""
    if not collection_path.name.startswith("test_image"):
        return None
    return None if any(collection_path.name in word for word in config.args) else True


@pytest.fixture(scope="session")
def image() -> Iterator[Image]:
    """Build the image; the store keeps it where `IMAGE_STORE` says so."""
    skip_unless_possible()
    kept = os.environ.get("IMAGE_STORE")
    folder = Path(kept or tempfile.mkdtemp(prefix="upreid-image-"))
    built = Image(folder, os.environ.get("IMAGE_VARIANT", "cpu"))
    yield built
    built.close()
    if not kept:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Tree]]:
    """Render each overlay from a copy with passwords of its own."""
    folder = tmp_path_factory.mktemp("cluster")
    shutil.copytree(CLUSTER / "kubernetes", folder / "kubernetes")
    shutil.rmtree(folder / "kubernetes" / "base" / "secrets", ignore_errors=True)
    shutil.copy(CLUSTER / "make_secrets.py", folder)
    subprocess.run([sys.executable, str(folder / "make_secrets.py")], check=True)
    resources = {}
    for overlay in OVERLAYS:
        done = kustomize(folder / "kubernetes" / "overlays" / overlay)
        assert done.returncode == 0, done.stderr
        resources[overlay] = list(yaml.safe_load_all(done.stdout))
    return resources
