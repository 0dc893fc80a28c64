"""What a registered version holds: an MLflow model around the files of a backbone.

The files of the backbone (``backbone.safetensors``, ``backbone.json``) stay at the root. The
backbone is also there as an exported program, which needs neither this package nor the library
of its architecture; both flavors of MLflow, ``python_function`` and ``pytorch``, load it.
"""

import base64
import io
import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema, TensorSpec
from PIL import Image

from upreid_ray.core.backbone import Description, export_program
from upreid_ray.core.checkpoint import read_exported

CODE_FILE = Path(__file__).with_name("predict.py")
CONFIG_FILE = "config.json"
EXAMPLE_FILE, REQUEST_FILE = "input_example.json", "serving_input_example.json"
PROGRAM_FOLDER, PROGRAM_FILE = "data", "model.pt2"
MODEL_FILE = "MLmodel"
REQUIREMENTS_FILE, ENVIRONMENT_FILE = "requirements.txt", "python_env.yaml"
ENVIRONMENT = """\
python: {python}
build_dependencies:
- pip
dependencies:
- -r requirements.txt
"""
REQUIREMENTS = ("mlflow", "pillow", "torch")


def write_model(exported: Path, out: Path, *, config: dict[str, Any]) -> None:
    """Write the folder of a version, which does not exist, from that of `export_backbone`.

    The settings are those of the run that trained the backbone.
    """
    description, weights, neck = read_exported(exported)
    extractor = description.extractor(weights, neck).eval().requires_grad_(False)
    images = torch.zeros(2, 3, description.height, description.width)
    program = export_program(extractor, images, {0: torch.export.Dim("batch")})
    shutil.copytree(exported, out)
    shutil.copy(CODE_FILE, out)
    (out / PROGRAM_FOLDER).mkdir()
    torch.export.save(program, out / PROGRAM_FOLDER / PROGRAM_FILE)
    (out / REQUIREMENTS_FILE).write_text("".join(f"{each}\n" for each in _requirements()))
    (out / ENVIRONMENT_FILE).write_text(ENVIRONMENT.format(python=platform.python_version()))
    num_features = extractor(images).shape[1]
    signature = ModelSignature(
        Schema([ColSpec(DataType.binary, "image")]),
        Schema([TensorSpec(np.dtype("float32"), (-1, num_features))]),
    )
    # The code checks its input itself. MLflow's own check would refuse arrays.
    fields = Model(signature=signature).to_dict() | {"is_signature_from_type_hint": True}
    model = Model.from_dict(fields)
    model.saved_input_example_info = _write_example(out, description)
    # Importing mlflow.pyfunc, which has a function for this, takes seconds.
    model.add_flavor(
        "python_function",
        loader_module="mlflow.pyfunc.loaders.code_model",
        model_code_path=CODE_FILE.name,
        env={"virtualenv": ENVIRONMENT_FILE},
        python_version=platform.python_version(),
    )
    model.add_flavor(
        "pytorch", model_data=PROGRAM_FOLDER, pytorch_version=str(torch.__version__)
    )
    model.save(out / MODEL_FILE)
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=1))


def _requirements() -> list[str]:
    """Return the packages that `predict.py` needs, at the versions of this environment."""
    return [f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS]


def _write_example(out: Path, description: Description) -> dict[str, str]:
    """Write a grey image as the example of an input; return the entry in ``MLmodel``."""
    grey = Image.new("RGB", (description.width, description.height), (128, 128, 128))
    buffer = io.BytesIO()
    grey.save(buffer, "PNG")
    example = [base64.b64encode(buffer.getvalue()).decode()]
    (out / EXAMPLE_FILE).write_text(json.dumps(example))
    (out / REQUEST_FILE).write_text(json.dumps({"inputs": example}))
    return {
        "artifact_path": EXAMPLE_FILE,
        "serving_input_path": REQUEST_FILE,
        "type": "json_object",
    }
