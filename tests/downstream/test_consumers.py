"""torchreid and fast-reid load the exported files, in an environment of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from upreid_ray.downstream.export import export
from upreid_ray.train import initialization

CONSUMERS = Path(sys.prefix) / "consumers"
ROOT = Path(__file__).parents[2]
NAMES = ("resnet18", "resnet50")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not CONSUMERS.is_dir(),
        reason="torchreid and fast-reid are missing; run `make consumers`",
    ),
]

# Reads what to load from its standard input, and writes the features that each tool computes.
SCRIPT = """
import json, shlex, sys, numpy, torch, torchreid
from fastreid.config import get_cfg
from fastreid.modeling.backbones import build_backbone

folder = sys.argv[1]
images = torch.from_numpy(numpy.load(f"{folder}/images.npy"))
found = {}
for name, usages in json.load(sys.stdin).items():
    model = torchreid.models.build_model(name, num_classes=10, pretrained=False)
    exec(usages["torchreid"])
    cfg = get_cfg()
    cfg.merge_from_list(shlex.split(usages["fastreid"]))
    backbone = build_backbone(cfg).eval()
    with torch.no_grad():
        found[f"torchreid-{name}"] = model.eval()(images)
        found[f"fastreid-{name}"] = backbone(images).mean((2, 3))
        backbone.maxpool = torch.nn.MaxPool2d(3, 2, 1)
        found[f"fastreid-{name}-exchanged"] = backbone(images).mean((2, 3))
numpy.savez(f"{folder}/found.npz", **{name: each.numpy() for name, each in found.items()})
"""


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> dict[str, np.ndarray]:
    """Let both tools load exported files and compute features; add our own."""
    folder = tmp_path_factory.mktemp("consumers")
    images = torch.randn(2, 3, 128, 64)
    np.save(folder / "images.npy", images.numpy())
    usages: dict[str, dict[str, str]] = {}
    ours = {}
    for name in NAMES:
        init = initialization.random(name, seed=0)
        usages[name] = {
            to: export(init, to, folder / f"{to}-{name}.pth").usage
            for to in ("torchreid", "fastreid")
        }
        with torch.no_grad():
            ours[name] = init.extractor().eval()(images).numpy()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder)],
        input=json.dumps(usages),
        env={**os.environ, "PYTHONPATH": str(CONSUMERS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {**np.load(folder / "found.npz"), **ours}


@pytest.mark.parametrize("name", NAMES)
def test_torchreid_computes_the_features_of_the_backbone(features, name):
    np.testing.assert_allclose(features[f"torchreid-{name}"], features[name], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_fastreid_does_so_once_its_first_pooling_is_exchanged(features, name):
    np.testing.assert_allclose(
        features[f"fastreid-{name}-exchanged"], features[name], atol=1e-4
    )
    assert np.abs(features[f"fastreid-{name}"] - features[name]).max() > 1e-2


def test_the_job_says_that_the_pooling_of_fastreid_differs(tmp_path):
    weights = tmp_path / "weights.pth"
    export(initialization.random("resnet18", seed=0), "timm", weights)

    job = subprocess.run(
        [
            *(sys.executable, ROOT / "jobs/export.py", weights),
            *("--to", "fastreid", "--out", tmp_path / "out.pth"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )

    assert "model.backbone.maxpool = torch.nn.MaxPool2d(3, 2, 1)" in job.stderr
