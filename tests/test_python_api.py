"""The page on the Python API is run as it stands, in one process, on small images."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.pictures import encode, picture

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/python-api.md"
# What makes the page's settings small, and what looks at Ray after it.
BEFORE = """
import functools
import upreid_ray
from tests.train.test_pretrain import TINY

upreid_ray.PRESETS["demo"] = TINY.override({"training.epochs": 1, "scaling.num_workers": 1})
upreid_ray.FINETUNE_PRESETS["demo"] = upreid_ray.FINETUNE_PRESETS["demo"].override(
    {
        "data.synthetic": TINY.data.synthetic,
        "training.epochs": 1,
        "training.num_persons": 4,
        "evaluation.every_epochs": 1,
    }
)
upreid_ray.EvaluateConfig = functools.partial(
    upreid_ray.EvaluateConfig,
    data=upreid_ray.FINETUNE_PRESETS["demo"].data,
)
"""
AFTER = """
import ray

ids = {node["NodeID"] for node in ray.nodes()}
print(len(ids), backbone.training)
"""


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_code_of_the_page_runs_and_shows_each_run_once(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    folder = tmp_path / "CROPS"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(encode(picture(left=50 * number), "JPEG"))
    skip = ("RAY_ADDRESS", "UPREID_RAY_STORAGE", "MLFLOW_TRACKING_URI")

    done = subprocess.run(
        [sys.executable, "-c", "\n".join([BEFORE, *blocks, AFTER])],
        cwd=tmp_path,
        env={n: v for n, v in os.environ.items() if n not in skip} | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    uri = f"models:/upreid-resnet18/1 [0-9.]+ {re.escape(str(tmp_path / 'runs/first'))}"
    assert re.fullmatch(uri, lines[0])
    assert lines[1] == f"3 {tmp_path / 'features'}"
    assert 0 <= float(lines[-2]) <= 1
    assert lines[-1] == "1 False"
    assert len(re.findall(r"^run first: ", done.stderr, re.MULTILINE)) == 1, done.stderr


def test_the_page_names_only_what_is_there():
    import upreid_ray  # noqa: PLC0415

    names = set(re.findall(r"upreid_ray\.(\w+)", PAGE.read_text())) - {"config"}
    assert names <= set(upreid_ray.__all__)
