"""The command line of all jobs: settings from flags, errors of one line, results as JSON."""

import argparse
import ast
import atexit
import difflib
import errno
import json
import logging
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from importlib import import_module, metadata
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

from upreid_ray.config.downstream import DownstreamConfig
from upreid_ray.config.errors import InputError, RunFailed, RunStopped
from upreid_ray.config.presets import (
    AUGMENTATIONS,
    METHOD_PRESETS,
    PRESETS,
    has_preset_shapes,
)
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.config.run import JobConfig
from upreid_ray.config.section import RANDOM, Section, absolute, value_form

logger = logging.getLogger("upreid_ray")

# Settings of Ray and MLflow that leave the lines of workers as they are, hide lines that their
# users can do nothing about, and send nothing to the libraries' authors. The libraries read
# them when they are imported. Those that the user has set take precedence.
QUIET_LIBRARIES = {
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
    "RAY_COLOR_PREFIX": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "|".join(
        [
            "Progress bars disabled",
            "Dataset \\S+ execution finished",
            "has constructor arguments in the object store",
        ]
    ),
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

CONNECT_SECONDS = 10

# Errors of files that only the user can mend; their texts name the file.
USERS_ERRORS = {
    errno.EACCES,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}

SectionT = TypeVar("SectionT", bound=Section)
NumberT = TypeVar("NumberT", int, float)


class JobParser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the nearest flag where one is unknown."""

    def __init__(self, description: str | None, usage: str, *, add_help: bool = True) -> None:
        """Make a parser without flags of a job.

        ``usage`` is what the usage line shows behind the name of the job; argparse itself would
        list every flag there.
        """
        super().__init__(
            usage=f"%(prog)s {usage}",
            description=description,
            add_help=add_help,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse the words of a command line; settings may have dashes for underscores.

        Raises:
            InputError: A word is unknown or malformed.
        """
        known = self._option_string_actions
        spelled = list(words)
        for number, word in enumerate(words):
            if not word.startswith("--"):
                continue
            typed, *value = word.split("=", 1)
            flag = typed if typed in known else f"--{typed[2:].replace('-', '_')}"
            if flag not in known:
                near = difflib.get_close_matches(typed, known, n=1)
                hint = f"did you mean {near[0]}?" if near else "see --help"
                raise InputError(f"{typed}: unknown; {hint}")
            spelled[number] = "=".join([flag, *value])
        return self.parse_args(spelled)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print after its usage."""
        raise InputError(message.removeprefix("argument "))


def add_resume(parser: argparse.ArgumentParser) -> None:
    """Add the flag that continues a run."""
    parser.add_argument(
        "--resume",
        metavar="RUN_NAME",
        help="continue this run with its recorded settings; others may be given only if they "
        "do not change the weights (--run, --scaling, --checkpoint, --data.max_undecodable)",
    )


def recorded_settings(words: Sequence[str]) -> dict[str, Any] | None:
    """Return the recorded settings of the run that ``--resume`` names; None without the flag.

    Raises:
        InputError: There is no such run.
    """
    known = _resumed(words)
    if known["resume"] is None:
        return None
    # Imported late: no other command line needs it.
    from upreid_ray.train.folder import RunFolder  # noqa: PLC0415

    run = JobConfig.parse({"name": known["resume"], "storage_path": known["storage_path"]})
    _, recorded = RunFolder.of(run, "").recorded()
    return recorded


def _resumed(words: Sequence[str]) -> dict[str, Any]:
    """Return the values of ``--resume`` and ``--run.storage_path``, None where they are not."""
    first = JobParser(None, "", add_help=False)
    first.add_argument("--resume")
    first.add_argument("--run.storage_path", "--run.storage-path", dest="storage_path")
    return vars(first.parse_known_args(words)[0])


def parse_recorded(
    config: type[SectionT], recorded: Mapping[str, Any], words: Sequence[str]
) -> SectionT:
    """Return recorded settings as those of this job.

    Raises:
        InputError: Another job recorded them.
    """
    if recorded.keys() - config.model_fields.keys():
        name = _resumed(words)["resume"]
        raise InputError(f"--resume {name}: was started by another job")
    return config.parse(recorded)


def add_settings(
    parser: argparse.ArgumentParser,
    config: type[Section],
    *,
    without: Sequence[str] = (),
    is_resumed: bool = False,
) -> None:
    """Add a flag for each setting of a configuration, under its dotted path.

    ``--init`` is required, except for a resumed run, which has recorded it: its default,
    random weights, is for tests and comparisons.
    """
    for section, description, settings in config.describe():
        group = parser.add_argument_group(section or "job", description)
        for path, field in settings.items():
            if path not in without:
                is_init = path == "init"
                group.add_argument(
                    f"--{path}",
                    dest=path,
                    default=argparse.SUPPRESS,
                    required=is_init and not is_resumed,
                    type=existing_init if is_init else str,
                    metavar=value_form(field.annotation),
                    help=(field.description or "").replace("%", "%%"),
                )


def add_finetune_settings(
    parser: argparse.ArgumentParser,
    words: Sequence[str],
    recorded: Mapping[str, Any] | None = None,
    *,
    without: Sequence[str] = (),
) -> Mapping[str, DownstreamConfig]:
    """Add the flags of a fine-tuning: its method, a preset and every setting.

    Args:
        parser: Parser to which flags are added.
        words: Words of the command line; the flags are those of the method that they name.
        recorded: Recorded settings of the run that is resumed, which decide the method; None
            for a new run.
        without: Settings that get no flag.

    Returns:
        The presets of the method.
    """
    first = JobParser(None, "", add_help=False)
    for each in (first, parser):
        each.add_argument(
            "--method",
            choices=METHOD_PRESETS,
            default="cluster-contrast" if "clustering" in (recorded or {}) else "supervised",
            help="how the backbone is trained (default: %(default)s); presets and settings "
            "depend on it",
        )
    presets = METHOD_PRESETS[first.parse_known_args(words)[0].method]
    parser.add_argument(
        "preset",
        nargs="?",
        choices=presets,
        help=f"settings to start from (default: {next(iter(presets))})",
    )
    add_settings(
        parser,
        type(next(iter(presets.values()))),
        without=without,
        is_resumed=recorded is not None,
    )
    return presets


def path_or_uri(text: str) -> str:
    """Return a path as an absolute path, and a URI as it is.

    Raises:
        argparse.ArgumentTypeError: It is empty, or no text.
    """
    try:
        return absolute(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def at_least(least: NumberT) -> Callable[[str], NumberT]:
    """Return a parser of numbers that have the type of ``least`` and are not smaller."""

    def read(text: str) -> NumberT:
        number = type(least)(text)
        if not number >= least:
            raise argparse.ArgumentTypeError(f"must be at least {least} (got {number})")
        return number

    return read


def existing_init(text: str) -> str:
    """Return an initialization as it was typed.

    Raises:
        argparse.ArgumentTypeError: It is empty, no text, a URI, or the path of nothing.
    """
    is_path = text != RANDOM and not text.startswith("models:")
    init = path_or_uri(text) if is_path else text
    if is_path and "://" in init:
        raise argparse.ArgumentTypeError(
            f"{text}: weights are not downloaded; give a local file or folder, or "
            "models:/NAME@ALIAS"
        )
    places = (init, init.rpartition("#")[0])  # FILE#PREFIX chooses a network of a file
    if init.startswith("/") and not any(place and Path(place).exists() for place in places):
        raise argparse.ArgumentTypeError(f"{text}: no such file or folder")
    return init


def override(config: SectionT, arguments: argparse.Namespace) -> SectionT:
    """Return a configuration with the settings of the command line.

    Raises:
        InputError: A setting is refused.
    """
    paths = dict(config.flatten())
    return config.override({p: v for p, v in vars(arguments).items() if p in paths})


def add_pretrain_settings(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a pre-training: a preset or a file to start from, and every setting."""
    parser.add_argument(
        "preset", nargs="?", choices=PRESETS, help="settings to start from (default: demo)"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="JSON file of settings to start from, instead of a preset",
    )
    parser.add_argument(
        "--augmentation",
        choices=AUGMENTATIONS,
        help="named augmentation that replaces the preset's",
    )
    add_settings(parser, PretrainConfig)


def read_pretrain_settings(
    arguments: argparse.Namespace, recorded: PretrainConfig | None = None
) -> PretrainConfig:
    """Return the configuration that the arguments of `add_pretrain_settings` describe.

    If neither a preset nor a file is given, it starts from the recorded settings of the run
    that is resumed.

    Raises:
        InputError: A file cannot be read, or a setting is refused.
    """
    if arguments.config is None:
        new = PRESETS[arguments.preset or "demo"]
        config = new if arguments.preset or recorded is None else recorded
        if (arguments.preset or "").startswith("luperson") and "data.shards" not in arguments:
            raise InputError(f"--data.shards: required with the preset {arguments.preset}")
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
        try:
            config = PretrainConfig.parse(tree)
        except InputError as error:
            raise InputError(f"--config {arguments.config}: {error}") from None
    if arguments.augmentation is not None:
        config = config.override({"augmentation": AUGMENTATIONS[arguments.augmentation]})
    config = override(config, arguments)
    has_own_optimizer = any(path.startswith("optimizer.") for path in vars(arguments))
    if has_preset_shapes(config) and not has_own_optimizer:
        return config
    # Imported late: it brings PyTorch, which --help and other mistakes should not cost.
    from upreid_ray.core.backbone import check_optimizer, check_settings  # noqa: PLC0415

    check_settings(config)
    check_optimizer(config, vars(arguments))
    return config


def run_job(job: Callable[[], dict[str, Any]]) -> NoReturn:
    """Run a job, write its result as a JSON line, and end this process.

    The exit status is 0 for success, 1 for a failure, 2 for input that was refused, 3 for a run
    that was asked to stop and can be continued, and 130 for another job that was interrupted.
    Progress and logs go to standard error; the JSON line is the last line of standard output.
    """
    quiet_libraries()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[StderrHandler()])
    for library in ("alembic", "mlflow", "ray"):
        logging.getLogger(library).setLevel(logging.WARNING)
    # It warns of each font that its cache, which may be stale, does not list.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    status = [1]
    # What is registered first is called last.
    atexit.register(end_process, status)
    status[0] = _run(job)
    sys.exit(status[0])


def end_process(status: Sequence[int]) -> None:
    """End this process with a status, without taking all modules apart as Python would.

    That would last a second or two.
    """
    with suppress(OSError):  # Nobody reads it any more.
        sys.stdout.flush()
    os._exit(*status)


def _run(job: Callable[[], dict[str, Any]]) -> int:
    """Run a job, and write its result or what is wrong; return the exit status."""
    try:
        result = job()
    except KeyboardInterrupt:
        logger.error("%s: interrupted", _program())
        return 128 + signal.SIGINT
    except SystemExit as shown:  # a help text or the version
        return int(shown.code or 0)
    except Exception as error:
        return _report(error)
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


def _report(error: Exception) -> int:
    """Say what went wrong, in one line where somebody foresaw it; return the exit status."""
    is_users = isinstance(error, OSError) and error.errno in USERS_ERRORS
    if not is_users and not isinstance(error, InputError | RunFailed):
        logger.error("%s: failed", _program(), exc_info=error)
        return 1
    logger.error("%s: %s", _program(), error)
    if isinstance(error, RunFailed):
        return 3 if isinstance(error, RunStopped) else 1
    return 2


def _program() -> str:
    """Return how the job is called: ``pretrain.py``, or ``upreid pretrain``."""
    return Path(sys.argv[0]).name


class StderrHandler(logging.StreamHandler[TextIO]):
    """A handler that writes to what is standard error at that moment, such as a live line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        self.stream = sys.stderr
        super().emit(record)


def quiet_libraries() -> None:
    """Set the environment variables that keep Ray and MLflow quiet once imported."""
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)


def check_shards(config: PretrainConfig) -> None:
    """Check that the shards exist: a wrong path should not cost the start of Ray.

    Raises:
        InputError: There is no manifest, or it cannot be read.
    """
    for shards in filter(None, (config.data.shards, config.evaluation.shards)):
        # Imported late: it brings pyarrow, which --help and other mistakes should not cost.
        from upreid_ray.data.shards.shard_set import ShardSet  # noqa: PLC0415

        ShardSet.open(shards)


def check_source(name: str, place: str | None) -> None:
    """Check that local images exist: a wrong path should not cost the start of Ray.

    Args:
        name: The flag or argument that names them.
        place: Path or URI; None for the synthetic set.

    Raises:
        InputError: There is no such file or folder.
    """
    if place is not None and "://" not in place and not Path(place).exists():
        raise InputError(f"{name} {place}: no such file or folder")


def connect_to_ray(
    *, meanwhile: str | None = None, in_workers: Sequence[str] = (), show_workers: bool = True
) -> None:
    """Connect to the Ray cluster of ``RAY_ADDRESS``, or start a local one for this process.

    A process that is connected stays as it is. Ray itself would also look for a cluster that
    was once started on this machine, and wait for minutes if it is gone.

    Args:
        meanwhile: A module to import while Ray starts; the job should need it next.
        in_workers: Modules that workers of a local Ray should have imported besides what all
            need (`train.forked_workers`).
        show_workers: Whether to show the logs of workers.

    Raises:
        InputError: No cluster answers at ``RAY_ADDRESS``, or it refuses this process.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return
    # Imported late: it takes a part of a second, which --help should not cost.
    from upreid_ray.train.display import stage  # noqa: PLC0415

    address = os.environ.get("RAY_ADDRESS") or "local"
    with stage("starting Ray" if address == "local" else "connecting to Ray"):
        check_answer(address)
        try:
            _connect(address, meanwhile, in_workers, show_workers=show_workers)
        except ConnectionError as error:
            raise InputError(
                f"RAY_ADDRESS={address}: cannot connect to a Ray cluster; it may be down, or "
                "require a token, which RAY_AUTH_MODE=token sends"
            ) from error


def check_answer(address: str) -> None:
    """Check that something listens at the address of a cluster; Ray would wait for minutes.

    Args:
        address: ``HOST:PORT``, or what Ray looks up itself: ``local``, ``auto``, ``ray://...``.

    Raises:
        InputError: Nothing listens there, or it is no address.
    """
    if address in {"local", "auto"} or address.startswith("ray://"):
        return
    host, _, port = address.rpartition(":")
    try:
        # IPv6 addresses are in brackets.
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"RAY_ADDRESS={address}: no Ray cluster answers at this HOST:PORT; without "
            "RAY_ADDRESS the job starts a Ray of its own"
        ) from error


def _connect(
    address: str, meanwhile: str | None, in_workers: Sequence[str], *, show_workers: bool
) -> None:
    """Connect to a cluster, or start a local one."""
    from upreid_ray.train.forked_workers import forked_workers  # noqa: PLC0415

    is_local, own = address == "local", sys.executable
    if is_local:
        # The only node is never preempted, and the watcher costs a process.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # Ray gives workers the priority 15. Beside a busy process, one of two threads may then
        # hardly run, and the other one waits for it: a step took fifty times as long. A busy
        # process of another session still slows two threads much, since they spin as they wait.
        os.environ.setdefault("RAY_worker_niceness", "0")
    with forked_workers(in_workers) if is_local else nullcontext():
        # Importing Ray Data configures its loggers, which are made quieter below.
        import ray.data  # noqa: PLC0415, see `connect_to_ray`

        # These loggers warn of the token of a local cluster and of disabled progress bars.
        for talkative in ("ray._private.authentication", "ray.data._internal.progress"):
            logging.getLogger(talkative).setLevel(logging.ERROR)
        # Ray hands this path to a shell as it is, where a blank would end it: every worker
        # would fail to start, and the job would wait forever.
        python = shlex.quote(sys.executable)
        if meanwhile is not None:
            # Ray's servers take seconds to start, for which this process would only wait.
            threading.Thread(target=import_module, args=(meanwhile,), daemon=True).start()
        ray.init(
            address,
            logging_level=logging.WARNING,
            log_to_driver=show_workers,
            runtime_env={"py_executable": python} if python != own else {},
        )
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler prints its stack and aborts. This one ends a job as Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def main() -> NoReturn:
    """Run ``upreid JOB ...``, which is ``python jobs/JOB.py ...`` for an installed package."""
    sources = {Path(file.name).stem: file for file in files("upreid_ray.jobs").iterdir()}
    jobs = sorted(name for name in sources if not name.startswith("_"))
    texts = [str(ast.get_docstring(ast.parse(sources[job].read_text()))) for job in jobs]
    lines = [
        f"  {job:<10}{text.splitlines()[0]}" for job, text in zip(jobs, texts, strict=True)
    ]
    parser = JobParser("\n".join(["Jobs:", *lines]), "JOB ...")
    parser.add_argument(
        "job", choices=jobs, metavar="JOB", help="JOB --help shows its settings"
    )
    version = f"upreid {metadata.version('upreid-ray')}"
    parser.add_argument("--version", action="version", version=version)

    def run() -> dict[str, Any]:
        job = parser.parse(sys.argv[1:2]).job
        sys.argv[:2] = [f"{parser.prog} {job}"]
        result: dict[str, Any] = import_module(f"upreid_ray.jobs.{job}").main()
        return result

    run_job(run)
