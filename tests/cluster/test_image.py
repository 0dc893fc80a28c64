"""The image of `cluster/Dockerfile`: built, measured, entered.

`make test-image` runs this and `test_image_roles.py`, and nothing else does: it takes minutes
and gigabytes. It skips with what is missing. `IMAGE_VARIANT=cuda` builds the variant for GPUs;
`IMAGE_STORE=FOLDER` keeps the image there for the next time.
"""

import csv
import os
import subprocess
import sys
from email.parser import HeaderParser

import pytest

from tests.cluster.image import DOCKERFILE, Image
from tests.cluster.manifests import locked

pytestmark = pytest.mark.timeout(3600)

VARIANT = os.environ.get("IMAGE_VARIANT", "cpu")
JOBS = ("prepare", "pretrain", "sweep", "finetune", "evaluate", "compare", "embed", "search")


def packages(image: Image) -> dict[tuple[str, str], int]:
    """Return the Python packages of an image: their names and versions, with their bytes."""
    found = {}
    (site,) = (image.root / "opt/venv/lib").glob("python3*/site-packages")
    for folder in site.glob("*.dist-info"):
        header = HeaderParser().parsestr((folder / "METADATA").read_text())
        name = header["Name"].lower().replace("_", "-").replace(".", "-")
        files = [row[0] for row in csv.reader((folder / "RECORD").read_text().splitlines())]
        size = sum((site / file).stat().st_size for file in files if (site / file).is_file())
        found[name, header["Version"]] = size
    return found


def test_its_size_is_known_by_layer_and_by_package(image, capsys):
    layers = [(layer.size, layer.instruction[:150]) for layer in image.layers]
    sizes = [size for size, _ in layers]
    parts = sorted(
        ((size, " ".join(name)) for name, size in packages(image).items()), reverse=True
    )
    lines = [f"{size / 1e6:8.1f} MB  {name}\n" for size, name in [*layers, *parts[:20]]]
    made = (
        f"base made in {image.base_seconds:.0f} s, image built in {image.build_seconds:.0f} s"
    )
    with capsys.disabled():
        sys.stdout.write(f"\n{VARIANT}: {sum(sizes) / 1e9:.2f} GB, {made}\n{''.join(lines)}")

    assert sum(sizes) < {"cpu": 5.5e9, "cuda": 8e9}[VARIANT]
    # Other code changes the layers after the requirements alone.
    assert sum(sizes[3:]) < 5e6


def test_every_package_is_the_locks(image):
    assert {name for name, _ in packages(image) if name == "upreid-ray"}
    assert {each for each in packages(image) if each[0] != "upreid-ray"} <= locked()


def test_its_python_is_that_of_the_dockerfiles_own_base(image):
    version = image.run("python", "-c", "import sys; print('%d.%d' % sys.version_info[:2])")
    assert f"\nARG BASE=python:{version.strip()}." in DOCKERFILE.read_text()


def test_it_runs_without_rights_and_writes_nothing_but_the_given_folders(image):
    status = image.run("cat", "/proc/self/status")
    for field in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert f"{field}:\t0000000000000000\n" in status
    assert "Uid:\t1000\t1000\t1000\t1000\n" in status
    script = "touch /tmp/a /dev/shm/a && ! touch /a /home/ray/a /opt/venv/a 2> /tmp/refused"
    image.run("bash", "-c", script)


def test_without_a_command_it_prints_the_help_of_pretrain(image):
    assert image.config["Cmd"] == ["python", "jobs/pretrain.py", "--help"]
    assert image.run(*image.config["Cmd"]).startswith("usage: pretrain.py")


@pytest.mark.parametrize("job", JOBS)
def test_each_job_prints_its_help(image, job):
    assert image.run("python", f"jobs/{job}.py", "--help").startswith(f"usage: {job}.py")


def test_what_its_roles_import_is_there(image):
    modules = (
        "torch, torchvision, timm, ray.train.torch, ray.data, ray.tune, mlflow, upreid_ray"
    )
    services = "boto3, psycopg2, mlflow.server, ray.dashboard.dashboard"
    script = f"import {modules}, {services}; print(torch.linalg.svd(torch.eye(3))[1].sum())"
    assert image.run("python", "-c", script) == "tensor(3.)\n"


def test_a_login_shell_and_probes_find_their_programs(image):
    """What `ray up` and KubeRay call."""
    assert image.run("bash", "-lc", "which python ray mlflow wget").splitlines() == [
        *(f"/opt/venv/bin/{name}" for name in ("python", "ray", "mlflow")),
        "/usr/bin/wget",
    ]


def test_another_variant_is_refused(image):
    (step,) = (each for each in image.layers if "compiler" in each.instruction)
    script = step.instruction.partition("/bin/sh -c ")[2]
    refused = image.enter("sh", "-c", script, environment={"VARIANT": "gpu"})
    done = subprocess.run(refused, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "VARIANT=gpu: must be cuda or cpu\n")


@pytest.mark.skipif(VARIANT != "cuda", reason="needs IMAGE_VARIANT=cuda")
def test_a_kernel_is_compiled_for_gpus_without_one(image):
    """What `torch.compile` needs: Triton's code for an H100, and the C++ compiler beside it."""
    script = """
from pathlib import Path
Path("/tmp/kernel.py").write_text('''
import triton, triton.language as tl
@triton.jit
def double(x, n: tl.constexpr):
    place = x + tl.arange(0, n)
    tl.store(place, tl.load(place) * 2)
''')
import sys
sys.path.append("/tmp")
import torch, triton
from kernel import double
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.build import compile_module_from_src

source = ASTSource(double, {"x": "*fp32", "n": "constexpr"}, {"n": 128})
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32))
assert kernel.asm["cubin"].startswith(b"\\x7fELF")
module = compile_module_from_src(
    '#include <Python.h>\\n'
    'static struct PyModuleDef d = {PyModuleDef_HEAD_INIT, "m", 0, -1, 0};\\n'
    'PyMODINIT_FUNC PyInit_m(void) { return PyModule_Create(&d); }', "m")
twice = torch.compile(lambda x: (x * 2).sin())
assert torch.allclose(twice(torch.ones(3)), (torch.ones(3) * 2).sin())
print(module.__name__, torch.version.cuda)
"""
    assert image.run("python", "-c", script).startswith("m 13.")
