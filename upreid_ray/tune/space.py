"""The search space of a sweep: an axis for each setting; a point has a value on each axis.

An axis is a Python value in ``SPACES`` and text on the command line, such as
``--space.optimizer.lr "loguniform(1e-3,1)"``.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from upreid_ray.config.errors import InputError
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.config.section import Section
from upreid_ray.config.sweep import SearchConfig

SPEC = re.compile(r"^(?P<kind>uniform|loguniform|choice|grid)\((?P<members>.*)\)$")
ZERO = "zero"
# Share of zeros among the draws of a log-uniform axis with zero.
ZERO_SHARE = 0.2
# Settings that cannot be swept, with the reason. A name that ends in "." is a section.
FIXED = {
    "run.": "it names folders",
    "scaling.": "it changes no weights",
    "checkpoint.": "it changes no weights",
    "training.log_every_steps": "it changes no weights",
    "training.epochs": "it is the same for all trials; see --trial_epochs",
    "evaluation.": "trials are compared by it",
    "data.shards": "it is the same for all trials",
    "data.synthetic.": "it is the same for all trials",
    "seed": "see --num_seeds",
}

Point = dict[str, Any]


class _Spec:
    """Base class that writes an axis as the text that `read_axis` reads."""

    def __str__(self) -> str:
        members: list[str] = []
        for field in fields(self):  # type: ignore[arg-type] # all of them are dataclasses
            value = getattr(self, field.name)
            if field.name == ZERO:
                members += [ZERO] if value else []
            else:
                members += map(_text, value if isinstance(value, tuple) else [value])
        return f"{type(self).__name__.lower()}({','.join(members)})"


@dataclass(frozen=True)
class Uniform(_Spec):
    """Uniform between ``low`` and ``high``, both included; integers for integer settings."""

    low: float
    high: float

    @property
    def floor(self) -> float:
        """Smallest value that a searcher draws."""
        return self.low


@dataclass(frozen=True)
class LogUniform(_Spec):
    """Log-uniform between ``low`` and ``high``: each order of magnitude is equally likely.

    With ``zero``, the axis extends below ``low``, and every value there stands for 0. So a
    searcher sees one axis without a gap, on which 0 lies next to the smallest weights.
    """

    low: float
    high: float
    zero: bool = False

    @property
    def floor(self) -> float:
        """Smallest value that a searcher draws."""
        if not self.zero:
            return self.low
        return self.low * (self.low / self.high) ** (ZERO_SHARE / (1 - ZERO_SHARE))


@dataclass(frozen=True)
class Choice(_Spec):
    """A choice of one of the values."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Grid(_Spec):
    """Every one of the values, combined with every value of the other grids."""

    values: tuple[Any, ...]


Axis = Uniform | LogUniform | Choice | Grid
Space = Mapping[str, Axis]


class SweepPlan(Section):
    """All settings of a sweep, enough to resume it."""

    base: PretrainConfig
    """Settings that all trials share; the run has no name."""
    search: SearchConfig
    """How points are drawn and trials are stopped."""
    space: dict[str, str]
    """Axis of each swept setting, as text."""

    def flatten(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Yield the settings under the names of their flags."""
        yield from self.base.flatten(prefix)
        yield from self.search.flatten(prefix)
        for path, axis in self.space.items():
            yield f"{prefix}space.{path}", axis

    def axes(self) -> dict[str, Axis]:
        """Return the axes by path, validated against the settings.

        Raises:
            InputError: A setting does not exist, may not be swept or refuses a value.
        """
        return {path: read_axis(self.base, path, text) for path, text in self.space.items()}

    @property
    def num_epochs(self) -> int:
        """Length of a trial, in epochs."""
        return self.search.trial_epochs or self.base.training.epochs

    @property
    def grace_epochs(self) -> int:
        """Number of epochs before a trial may be stopped."""
        return self.search.grace_epochs or self.base.evaluation.every_epochs


def check_plan(plan: SweepPlan) -> None:
    """Check a plan before anything starts.

    Raises:
        InputError: There is no axis, an axis is invalid or has no effect, or the rungs do not
            fit the trials.
    """
    if not plan.space:
        raise InputError("--space.SETTING: nothing is swept; name a space or give an axis")
    axes = plan.axes()
    grids = [path for path, axis in axes.items() if isinstance(axis, Grid)]
    if grids and plan.search.searcher == "tpe":
        raise InputError(
            f"--space.{grids[0]} {axes[grids[0]]}: --searcher tpe draws points one by one; "
            "use choice(...)"
        )
    of_optimizer = any(path.startswith("optimizer.") for path in axes)
    if of_optimizer and not axes.keys() & {"model.backbone", "optimizer.algorithm"}:
        # Imported late: it brings PyTorch, which other mistakes should not cost.
        from upreid_ray.core.backbone import check_optimizer  # noqa: PLC0415

        check_optimizer(plan.base, axes, "--space.")
    every = plan.base.evaluation.every_epochs
    if plan.search.scheduler == "asha" and plan.grace_epochs % every:
        raise InputError(
            f"--grace_epochs {plan.grace_epochs}: must be a multiple of "
            f"--evaluation.every_epochs {every}, the interval at which trials are scored"
        )
    if plan.search.scheduler == "asha" and plan.grace_epochs >= plan.num_epochs:
        raise InputError(
            f"--grace_epochs {plan.grace_epochs}: a trial of {plan.num_epochs} epochs ends "
            "before it may be stopped; --scheduler none lets all go to the end"
        )


def read_axis(base: PretrainConfig, path: str, text: str) -> Axis:
    """Return the axis of the setting at a dotted path.

    The text is ``uniform(a,b)``, ``loguniform(a,b)``, ``loguniform(a,b,zero)``,
    ``choice(a,b,...)`` or ``grid(a,b,...)``.

    Raises:
        InputError: The setting does not exist or may not be swept, the text has another form,
            or the setting refuses a value.
    """
    flag = f"--space.{path} {text}"
    for fixed, reason in FIXED.items():
        if path == fixed or (fixed.endswith(".") and path.startswith(fixed)):
            raise InputError(f"{flag}: {path} cannot be swept: {reason}")
    match = SPEC.match(text.strip())
    if match is None:
        raise InputError(
            f"{flag}: must be uniform(a,b), loguniform(a,b), loguniform(a,b,zero), "
            "choice(a,b,...) or grid(a,b,...)"
        )
    members = [member.strip() for member in match["members"].split(",") if member.strip()]
    if match["kind"] == "choice":
        return Choice(_read_values(base, path, members, flag))
    if match["kind"] == "grid":
        return Grid(_read_values(base, path, members, flag))
    is_log = match["kind"] == "loguniform"
    zero = is_log and members[2:] == [ZERO]
    low, high = _read_range(base, path, members[:2] if zero else members, flag, is_log=is_log)
    if zero:
        _read(base, path, "0", flag)
    return LogUniform(low, high, zero) if is_log else Uniform(low, high)


def _read_values(
    base: PretrainConfig, path: str, members: Sequence[str], flag: str
) -> tuple[Any, ...]:
    """Return the values of a choice or a grid.

    Raises:
        InputError: There is none, one of them occurs twice, or the setting refuses one.
    """
    values = tuple(_read(base, path, member, flag) for member in members)
    if not values or len(set(values)) < len(values):
        raise InputError(f"{flag}: must have values, each of them once")
    return values


def _read_range(
    base: PretrainConfig, path: str, members: Sequence[str], flag: str, *, is_log: bool
) -> tuple[float, float]:
    """Return the bounds of a range.

    Raises:
        InputError: There are not two numbers in ascending order, or the setting refuses one.
    """
    bounds = [_read(base, path, member, flag) for member in members]
    if [type(bound) in (int, float) for bound in bounds] != [True, True]:
        raise InputError(f"{flag}: must have two numbers, the least and the greatest")
    low, high = bounds
    if low >= high or (is_log and low <= 0):
        above = " and above 0" if is_log else ""
        raise InputError(f"{flag}: the first number must be less than the second{above}")
    return low, high


def format_value(value: Any) -> str:  # noqa: ANN401, the value of a setting
    """Return a value as text, a float with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else _text(value)


def _read(base: PretrainConfig, path: str, text: str, flag: str) -> Any:  # noqa: ANN401
    """Return the value of one setting; it need not agree with other settings."""
    *parents, name = path.split(".")
    section: Any = base
    for parent in parents:
        section = getattr(section, parent, None)
    if not isinstance(section, Section) or name not in type(section).model_fields:
        base.override({path: text})  # raises an error that says what is wrong with the path
    try:
        value = getattr(section.override({name: text}), name)
    except InputError as error:
        raise InputError(f"{flag}: {str(error).removeprefix(f'--{name}: ')}") from error
    if not isinstance(value, int | float | str | None):
        raise InputError(f"{flag}: {path} is not one value")
    return value


def _text(value: Any) -> str:  # noqa: ANN401, the value of a setting
    return "none" if value is None else str(value)


_I2: Space = {
    "loss.consistency_weight": LogUniform(0.1, 5.0, zero=True),
    "loss.intrinsic_weight": LogUniform(0.1, 5.0, zero=True),
    "loss.consistency_temperature": LogUniform(0.05, 0.5),
    "loss.intrinsic_temperature": LogUniform(0.05, 1.0),
}
_PATCHES: Space = {
    "patches.rows": Choice((2, 3, 4, 6, 8)),
    "patches.columns": Choice((1, 2)),
    "patches.alignment": Choice(("view", "body")),
    "patches.mining": Choice(("symmetry", "none")),
}

SPACES: dict[str, Space] = {
    # Weights and temperatures of the two terms that UP-ReID adds to MoCo v2.
    "i2": _I2,
    # Grid of the patches, and how patches are cut and compared.
    "patches": _PATCHES,
    "all": {**_I2, **_PATCHES},
    # Only the axes that the command line adds.
    "own": {},
}
