"""Private names of libraries that this package uses, each with its reason.

A new version of a library may drop them without notice. Each row below fails then, and says
what depends on the name; a private name that has no row fails too.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import RAY_PKG_PREFIX
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from upreid_ray.command_line import QUIET_LIBRARIES
from upreid_ray.config.section import UPLOADED
from upreid_ray.train.folder import SNAPSHOT_FILE

ROOT = Path(__file__).parents[1]
LIBRARIES = ("argparse", "mlflow", "optuna", "ray", "torch", "torchvision")
PRIVATE = re.compile(r"_[a-zA-Z]\w*")
PRIVATE_MODULE = re.compile(rf"({'|'.join(LIBRARIES)})(\.\w+)*\._[a-z]\w*(\.\w+)*")


@dataclass(frozen=True)
class Private:
    """A private name of a library.

    Attributes:
        module: Module that holds it.
        attribute: Path from the module to the name; empty if the module itself is private.
        why: What it is needed for, and why nothing public will do.
        breaks: What no longer works without it.
    """

    module: str
    attribute: str
    why: str
    breaks: str

    @property
    def name(self) -> str:
        """Full name."""
        return f"{self.module}.{self.attribute}".rstrip(".")

    def covers(self, found: str) -> bool:
        """Tell whether this row is about a name that `private_names` yields."""
        return f".{found}." in f".{self.name}."


TABLE = [
    Private(
        "argparse",
        "_ActionsContainer._option_string_actions",
        why="The flags of a parser, to suggest the nearest one to a flag that does not exist.",
        breaks="No job starts.",
    ),
    Private(
        "torch",
        "_dynamo.config.suppress_errors",
        why="A step that cannot be compiled runs without; `torch.compile` has no such option.",
        breaks="--training.compile true fails on machines without a compiler.",
    ),
    Private(
        "ray._private.authentication",
        "",
        why="Name of the logger that warns of a missing token whenever a local cluster starts.",
        breaks="Each job begins with a warning that does not concern its user.",
    ),
    Private(
        "ray.data._internal.progress",
        "",
        why="Name of the logger that warns that progress bars are off.",
        breaks="Each job begins with a warning that does not concern its user.",
    ),
    Private(
        "ray.train.v2._internal.constants",
        "ENV_VARS_TO_PROPAGATE.add",
        why="Which variables the actors of Ray Train get, so that they ask their own Ray.",
        breaks="Beside another Ray on the same machine, a run's workers may be removed.",
    ),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_the_library_has_the_private_name(row):
    missing = f"{row.name} is gone. Why it is used: {row.why} What breaks: {row.breaks}"
    try:
        holder = importlib.import_module(row.module)
    except ImportError:
        pytest.fail(missing)
    for part in filter(None, row.attribute.split(".")):
        if inspect.isclass(holder) and not hasattr(holder, part):
            # An attribute of instances.
            assert f"self.{part} = " in inspect.getsource(holder), missing
            return
        assert hasattr(holder, part), missing
        holder = getattr(holder, part)


def test_every_private_name_in_the_code_has_a_row():
    for file, line, name in private_names():
        assert any(row.covers(name) for row in TABLE), (
            f"{file}:{line} uses the private name {name}; use a public one, or add a row to "
            "the table of this test that says why there is none"
        )


def test_every_row_is_used():
    names = {name for _, _, name in private_names()}

    for row in TABLE:
        assert any(row.covers(name) for name in names), (
            f"{row.name} is no longer used; delete its row"
        )


def test_ray_train_keeps_its_list_of_checkpoints_in_the_file_that_is_looked_at():
    assert CHECKPOINT_MANAGER_SNAPSHOT_FILENAME == SNAPSHOT_FILE, (
        "Ray Train has renamed its list of checkpoints, so that a run whose list was torn by a "
        f"crash can no longer be resumed: rename {SNAPSHOT_FILE} in train/folder.py too"
    )


def test_ray_unpacks_the_folder_of_a_submitted_job_where_its_name_tells():
    assert RAY_PKG_PREFIX == UPLOADED, (
        "Ray has renamed the folder of a submitted job, so that relative paths in it are no "
        "longer refused: rename UPLOADED in config/section.py too"
    )


def test_ray_and_mlflow_read_the_variables_that_keep_them_quiet():
    sources = "".join(
        inspect.getsource(importlib.import_module(module))
        for module in (
            "ray._private.ray_constants",
            "ray._private.worker",
            "ray._common.usage.usage_constants",
            "mlflow.environment_variables",
        )
    )

    assert [name for name in QUIET_LIBRARIES if f'"{name}"' not in sources] == []


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("from ray.train._internal.x import Y", "ray.train._internal.x.Y"),
        ("from torch.optim.swa_utils import _z", "torch.optim.swa_utils._z"),
        ("import torch._dynamo as d", "torch._dynamo"),
        ("import torch\ntorch._foreach_add_([], 1)", "torch._foreach_add_"),
        ("from torch import nn\nnn.init._calculate()", "torch.nn.init._calculate"),
        ("searcher._ot_study.tell()", "_ot_study"),
        ("getattr(error, '_base_exc', None)", "_base_exc"),
        ("logging.getLogger('ray._private.x')", "ray._private.x"),
    ],
)
def test_a_private_name_is_found(line, name):
    assert [found for _, found in foreign_names(ast.parse(line), own=set())] == [name]


@pytest.mark.parametrize(
    "line",
    ["from torch import nn\nnn.Linear(1, 1).__class__", "self._mine", "'ray.data'", "x.y_"],
)
def test_public_names_and_our_own_are_not_found(line):
    assert not list(foreign_names(ast.parse(line), own={"_mine"}))


def private_names() -> Iterator[tuple[Path, int, str]]:
    """Yield file, line and name wherever the code uses a private name of a library."""
    files = [path for room in ("upreid_ray", "jobs") for path in (ROOT / room).rglob("*.py")]
    trees = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in files}
    own = {name for tree in trees.values() for name in defined_names(tree)}
    for path, tree in trees.items():
        for line, name in foreign_names(tree, own):
            yield path, line, name


def defined_names(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a file gives to its functions, classes, variables and attributes."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name):
                yield name
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield name


def foreign_names(tree: ast.AST, own: set[str]) -> Iterator[tuple[int, str]]:
    """Yield line and name of what is private in a library and used in a file.

    An attribute of an object, whose class the syntax does not tell, is foreign unless the code
    itself defines an attribute of that name.
    """
    imported = dict(imports(tree))
    inner: set[int] = set()  # parts of longer dotted names
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found = [each.name for each in names]
            case ast.ImportFrom(module=module, names=names):
                found = [f"{module}.{each.name}" for each in names]
            case ast.Constant(value=str(text)) if PRIVATE_MODULE.fullmatch(text):
                found = [text]
            case ast.Call(func=ast.Name("getattr"), args=[_, ast.Constant(str(text)), *_]):
                found = [text]
            case ast.Attribute(value=value, attr=attribute):
                inner.add(id(value))
                name = dotted(node, imported)
                found = [] if name is not None and id(node) in inner else [name or attribute]
            case _:
                continue
        for name in found:
            is_private = any(map(PRIVATE.fullmatch, name.split(".")))
            if is_private and name not in own and ("." not in name or root(name) in LIBRARIES):
                yield node.lineno, name


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield each name that a file imports, and what it stands for."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for each in names:
                    yield (each.asname, each.name) if each.asname else (root(each.name),) * 2
            case ast.ImportFrom(module=module, names=names):
                for each in names:
                    yield each.asname or each.name, f"{module}.{each.name}"


def dotted(node: ast.expr, imported: dict[str, str]) -> str | None:
    """Return the full name of an attribute of a module, or None if it is of an object."""
    match node:
        case ast.Name(id=name) if name in imported:
            return imported[name]
        case ast.Attribute(value=value, attr=attribute):
            holder = dotted(value, imported)
            return None if holder is None else f"{holder}.{attribute}"
    return None


def root(name: str) -> str:
    """Return the first part of a dotted name."""
    return name.partition(".")[0]
