"""The storage of a run is full or read-only: what is saved stays, and the run goes on later."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.testing import assert_close

from tests.test_pretrain import TINY, weights
from upreid_ray.config import InputError, PretrainConfig, RunFailed
from upreid_ray.pretrain import fit

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

# A checkpoint has 181 MB: a second one does not fit beside the first one.
SMALL, LARGE = "300m", "2g"
SHORT = TINY.override({"training.epochs": 1, "run.max_failures": 0})


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, folder) -> SimpleNamespace:
    config = SHORT.override({"run.storage_path": str(folder / "runs"), "run.name": "calm"})
    return SimpleNamespace(weights=weights(fit(config).model_uri))


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """Mount a disk that has room for one checkpoint."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", place]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("only root may mount")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def on(disk: Path) -> PretrainConfig:
    return SHORT.override({"run.storage_path": str(disk), "run.name": "hindered"})


def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(undisturbed, disk):
    with pytest.raises(RunFailed, match=r"^run hindered: .*No space left.*--resume hindered$"):
        fit(on(disk))
    left = [each.name for each in (disk / "hindered").glob("step-*")]

    remount(disk, f"size={LARGE}")
    result = fit(on(disk), resume=True)

    assert "step-00000004" in left
    assert_close(weights(result.model_uri), undisturbed.weights, rtol=0, atol=0)


def test_a_read_only_storage_is_refused_before_anything_is_made(ray_cluster, folder, disk):
    remount(disk, "ro")

    with pytest.raises(InputError, match=rf"^--run.storage_path {disk}: cannot be written \("):
        fit(on(disk))
