"""Sections: frozen groups of settings, which nest into one tree for each job.

One setting has one name: ``optimizer.lr`` is the flag ``--optimizer.lr``, the key in a sweep,
the MLflow parameter and the path in a checkpoint's ``config.json``.
"""

import difflib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Self, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from upreid_ray.config.errors import InputError

CONFIDENTIAL = "confidential"  # type of an error about a value that must not be shown


def _ascending(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError("the first of the two bounds must not exceed the second")
    return bounds


def _plain(value: Any, annotation: Any) -> Any:  # noqa: ANN401, any setting
    """Return a value as pydantic reads it: text such as ``none`` or ``1,2`` is parsed."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    if not isinstance(value, str):
        return value
    if NoneType in get_args(annotation):
        if value.lower() == "none":
            return None
        annotation = get_args(annotation)[0]
    return value.split(",") if get_origin(annotation) is tuple else value


def _without_secret(uri: str) -> str:
    if "@" in urlsplit(uri).netloc:
        raise PydanticCustomError(
            CONFIDENTIAL,
            "no user or password in a URI, which is logged; give them in the environment",
        )
    return uri


def absolute(place: str) -> str:
    """Return a path as an absolute path, and a URI as it is.

    Only the process of the user knows the folder that a relative path starts at: the other
    processes of a cluster have other working folders. A submitted job stands in a copy of the
    user's folder, which lacks the images, and which Ray deletes later.

    Raises:
        InputError: The path is empty, or no text, or relative and not in the copy in which a
            submitted job stands.
    """
    if not place:
        raise InputError("a path must not be empty")
    try:
        place.encode()
    except UnicodeEncodeError:
        raise InputError(f"a path must be text (UTF-8), but it is {place!a}") from None
    if "://" in place:
        return place
    path = Path(place)
    is_submitted = Path.cwd().name.startswith(UPLOADED)
    if is_submitted and not path.is_absolute() and not path.exists():
        raise InputError(
            f"{place} is not in the uploaded copy of your folder, in which a submitted job "
            "stands; give an absolute path or a URI"
        )
    return str(path.absolute())


def absolute_init(init: str) -> str:
    """Return an initialization; if it is a path, an absolute one."""
    is_path = init != RANDOM and not init.startswith("models:")
    return absolute(init) if is_path else init


UPLOADED = "_ray_pkg_"
"""How the name of the folder begins into which Ray unpacks the folder of a submitted job."""
RANDOM = "random"
"""The initialization that is no file and no registered version."""
Init = Annotated[str, AfterValidator(absolute_init)]
PathOrUri = Annotated[str, AfterValidator(_without_secret), AfterValidator(absolute)]
Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what a tensor of PyTorch can hold
ShareRange = Annotated[tuple[Share, Share], AfterValidator(_ascending)]
PositiveRange = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_ascending)]
Color = tuple[Probability, Probability, Probability]
Deviation = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
Jitter = Annotated[float, Field(ge=0, lt=1)]
Pixels = Annotated[int, Field(ge=32, le=1024)]
Precision = Literal["auto", "fp32", "bf16"]
MAX_NAME = 100
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=MAX_NAME)]


def value_form(annotation: Any) -> str:  # noqa: ANN401, whatever annotates a setting
    """Return how the values of a setting are typed, such as ``INT|none`` or ``FLOAT,FLOAT``."""
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return "{" + ",".join(parts) + "}"
    if get_origin(annotation) is tuple:
        return ",".join("..." if part is Ellipsis else value_form(part) for part in parts)
    if get_origin(annotation) is Annotated:
        return value_form(parts[0])
    if parts:
        return "|".join(map(value_form, parts))
    return "none" if annotation is NoneType else str(annotation.__name__).upper()


class Section(BaseModel):
    """A frozen group of settings that refuses unknown names."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    def flatten(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Yield ``(dotted path, value)`` of every setting, depth first."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Section):
                yield from value.flatten(f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    @classmethod
    def describe(cls, prefix: str = "") -> Iterator[tuple[str, str, dict[str, FieldInfo]]]:
        """Yield path, description and settings by path of this and of each inner section."""
        inner: dict[str, type[Section]] = {}
        settings: dict[str, FieldInfo] = {}
        for name, field in cls.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                inner[f"{prefix}{name}"] = field.annotation
            else:
                settings[f"{prefix}{name}"] = field
        yield prefix.rstrip("."), inspect.getdoc(cls) or "", settings
        for path, section in inner.items():
            yield from section.describe(f"{path}.")

    def override(self, values: Mapping[str, Any]) -> Self:
        """Return a copy with the settings or sections at these dotted paths replaced.

        Args:
            values: New values by dotted path. Text is parsed as the type of the setting:
                ``none`` is None, and commas separate the members of a tuple.

        Raises:
            InputError: A path is unknown, a value is refused, or two settings contradict each
                other.
        """
        tree = self.model_dump()
        for path, value in values.items():
            *parents, name = path.split(".")
            node: Any = tree
            section: Any = self
            for parent in parents:
                node = node.get(parent) if isinstance(node, dict) else None
                section = getattr(section, parent, None)
            if not isinstance(node, dict) or name not in node:
                near = difflib.get_close_matches(path, dict(self.flatten()), n=1)
                hint = f"; did you mean --{near[0]}?" if near else "; see --help"
                raise InputError(f"--{path}: no such setting{hint}")
            node[name] = _plain(value, type(section).model_fields[name].annotation)
        return self.parse(tree)

    @classmethod
    def parse(cls, tree: Mapping[str, Any]) -> Self:
        """Validate a nested mapping, such as the parsed JSON of ``model_dump_json``.

        Raises:
            InputError: A setting is refused; the message names its flag and its value.
        """
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join(str(part) for part in first["loc"] if isinstance(part, str))
            message = first["msg"].removeprefix("Value error, ")
            if not path or message.startswith("--"):  # a combination names its settings
                raise InputError(message) from None
            got = "" if first["type"] == CONFIDENTIAL else f" (got {first['input']!r})"
            raise InputError(f"--{path}: {message[0].lower()}{message[1:]}{got}") from None
