"""What all jobs share: settings from the command line, errors as one line, one JSON line."""

import argparse
import difflib
import json
import logging
import os
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import ray

from upreid_ray.config.downstream import DownstreamConfig
from upreid_ray.config.errors import InputError, RunFailed, RunStopped
from upreid_ray.config.presets import AUGMENTATIONS, METHODS, PRESETS
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.config.section import Section

logger = logging.getLogger("upreid_ray")

ConfigT = TypeVar("ConfigT", bound=Section)


class JobParser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the nearest flag where one is unknown."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse the words of a command line; settings may have dashes for underscores.

        Raises:
            InputError: A word is unknown or malformed.
        """
        known = self._option_string_actions
        words = [_spelled(word, known) for word in words]
        for word in words:
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag not in known:
                near = difflib.get_close_matches(flag, known, n=1)
                hint = f"did you mean {near[0]}?" if near else "see --help"
                raise InputError(f"{flag}: unknown; {hint}")
        return self.parse_args(words)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print after its usage."""
        raise InputError(message.removeprefix("argument "))


def add_settings(
    parser: argparse.ArgumentParser, config: type[Section], *, without: Sequence[str] = ()
) -> None:
    """Add a flag for each setting of a configuration, under its dotted path."""
    _add_section(parser, "", config, without)


def add_finetune_settings(
    parser: argparse.ArgumentParser, words: Sequence[str], *, without: Sequence[str] = ()
) -> Mapping[str, DownstreamConfig]:
    """Add the method of a fine-tuning, its presets and its settings.

    Args:
        parser: Gets the flags of the method that the words name.
        words: Of the command line.
        without: Settings that have no flag.

    Returns:
        The presets of the method.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for each in (first, parser):
        each.add_argument(
            "--method",
            choices=METHODS,
            default="supervised",
            help="how it learns; settings and presets are those of the method",
        )
    try:
        presets = METHODS[first.parse_known_args(words)[0].method]
    except argparse.ArgumentError as error:
        raise InputError(str(error).removeprefix("argument ")) from None
    parser.add_argument(
        "preset",
        nargs="?",
        choices=presets,
        default=next(iter(presets)),
        help="named run to begin with (default: %(default)s)",
    )
    add_settings(parser, type(next(iter(presets.values()))), without=without)
    return presets


def require_init(arguments: argparse.Namespace) -> None:
    """Refuse a command line that does not say what to start from.

    Raises:
        InputError: There is no ``--init``.
    """
    if "init" not in arguments:
        raise InputError(
            "--init: required; models:/NAME@ALIAS, models:/NAME/VERSION, a checkpoint folder, "
            "a file of weights, or random"
        )


def override(config: ConfigT, arguments: argparse.Namespace) -> ConfigT:
    """Return the configuration with the settings that were given on the command line.

    Raises:
        InputError: A setting is refused.
    """
    paths = dict(config.flatten())
    return config.override({p: v for p, v in vars(arguments).items() if p in paths})


def add_pretrain_settings(parser: argparse.ArgumentParser) -> None:
    """Add where a pre-training configuration begins, and its settings."""
    parser.add_argument(
        "preset", nargs="?", choices=PRESETS, help="named run to begin with (default: demo)"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="JSON file of settings to begin with instead",
    )
    parser.add_argument(
        "--augmentation",
        choices=AUGMENTATIONS,
        help="named augmentation, instead of the preset's",
    )
    add_settings(parser, PretrainConfig)


def read_pretrain_settings(arguments: argparse.Namespace) -> PretrainConfig:
    """Return the configuration that the arguments of `add_pretrain_settings` describe.

    Raises:
        InputError: A file cannot be read, or a setting is refused.
    """
    if arguments.config is None:
        config = PRESETS[arguments.preset or "demo"]
        if arguments.preset == "luperson" and "data.shards" not in arguments:
            raise InputError("--data.shards: required with the preset luperson")
    elif arguments.preset is not None:
        raise InputError(f"--config {arguments.config}: give either a preset or a file")
    else:
        try:
            tree = json.loads(arguments.config.read_text())
        except (OSError, ValueError) as error:
            raise InputError(
                f"--config {arguments.config}: cannot be read ({error})"
            ) from error
        if not isinstance(tree, dict):
            raise InputError(f"--config {arguments.config}: is not an object of settings")
        config = PretrainConfig.parse(tree)
    if arguments.augmentation is not None:
        config = config.override({"augmentation": AUGMENTATIONS[arguments.augmentation]})
    return override(config, arguments)


def run_job(job: Callable[[], dict[str, Any]]) -> NoReturn:
    """Run a job and exit: 0 with its result as a JSON line, 1 if it failed, 2 if refused.

    3 is a run that was asked to stop and can be continued.

    Progress and logs go to standard error, the JSON line is the last of standard output.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for library in ("alembic", "mlflow", "ray"):
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        result = job()
    except InputError as error:
        logger.error("%s: %s", Path(sys.argv[0]).name, error)
        sys.exit(2)
    except RunFailed as error:
        logger.error("%s: %s", Path(sys.argv[0]).name, error)
        sys.exit(3 if isinstance(error, RunStopped) else 1)
    except Exception:
        logger.exception("%s: failed", Path(sys.argv[0]).name)
        sys.exit(1)
    finally:
        ray.shutdown()
    sys.stdout.write(json.dumps(result) + "\n")
    sys.exit(0)


def connect_to_ray(*, show_workers: bool = True) -> None:
    """Connect to the Ray cluster of ``RAY_ADDRESS``, or start a local one for this job.

    Ray itself would also look for a cluster that was once started on this machine, and wait for
    minutes if it is gone.

    Args:
        show_workers: Whether to show what workers log.
    """
    # They warn that a local cluster asks for a token, and that Ray Data draws no bars.
    for talkative in ("ray._private.authentication", "ray.data._internal.progress"):
        logging.getLogger(talkative).setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        # Nobody announces the end of the only node; the watcher costs a process.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    ray.init(address, logging_level=logging.WARNING, log_to_driver=show_workers)
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def _spelled(word: str, known: Container[str]) -> str:
    """Return a flag of a setting with the underscores that it has; other words as they are."""
    flag, equals, value = word.partition("=")
    underscored = f"--{flag[2:].replace('-', '_')}"
    return f"{underscored}{equals}{value}" if underscored in known else word


def _add_section(
    parser: argparse.ArgumentParser, prefix: str, section: type[Section], without: Sequence[str]
) -> None:
    """Add a flag for each setting of a section, and then its own sections."""
    group = parser.add_argument_group(prefix.rstrip(".") or "job", section.__doc__)
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            _add_section(parser, f"{path}.", field.annotation, without)
        elif path not in without:
            description = (field.description or "").replace("%", "%%")
            group.add_argument(
                f"--{path}",
                dest=path,
                default=argparse.SUPPRESS,
                metavar=_metavar(field.annotation),
                help=description,
            )


def _metavar(annotation: Any) -> str:  # noqa: ANN401, whatever annotates a setting
    """Return how the values of a setting look."""
    if get_origin(annotation) is Literal:
        return "{" + ",".join(get_args(annotation)) + "}"
    if get_origin(annotation) is tuple:
        return ",".join(_metavar(member) for member in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return "|".join(_metavar(member) for member in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _metavar(get_args(annotation)[0])
    if annotation is Ellipsis:
        return "..."
    return "none" if annotation is NoneType else str(annotation.__name__).upper()
