"""Distributed pre-training of person re-identification backbones without labels.

The jobs are functions here, for scripts and notebooks. Each uses the Ray cluster that the
process is connected to; without one it connects to that of ``RAY_ADDRESS``, or starts a local
one, as the jobs do. PyTorch, Ray and MLflow are imported when a function is called.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upreid_ray.config.downstream import ClusterContrastConfig as ClusterContrastConfig
    from upreid_ray.config.downstream import DownstreamConfig
    from upreid_ray.config.downstream import EmbedConfig as EmbedConfig
    from upreid_ray.config.downstream import EvaluateConfig as EvaluateConfig
    from upreid_ray.config.downstream import FinetuneConfig as FinetuneConfig
    from upreid_ray.config.presets import AUGMENTATIONS as AUGMENTATIONS
    from upreid_ray.config.presets import CLUSTER_CONTRAST_PRESETS as CLUSTER_CONTRAST_PRESETS
    from upreid_ray.config.presets import FINETUNE_PRESETS as FINETUNE_PRESETS
    from upreid_ray.config.presets import PRESETS as PRESETS
    from upreid_ray.config.pretrain import PretrainConfig as PretrainConfig
    from upreid_ray.downstream.embed import EmbedResult
    from upreid_ray.downstream.evaluate import EvaluateResult
    from upreid_ray.tracking import load_backbone as load_backbone
    from upreid_ray.train.job import TrainResult

__version__ = "0.1.0"

_MODULE_OF = {
    "ClusterContrastConfig": "config.downstream",
    "EmbedConfig": "config.downstream",
    "EvaluateConfig": "config.downstream",
    "FinetuneConfig": "config.downstream",
    "AUGMENTATIONS": "config.presets",
    "CLUSTER_CONTRAST_PRESETS": "config.presets",
    "FINETUNE_PRESETS": "config.presets",
    "PRESETS": "config.presets",
    "PretrainConfig": "config.pretrain",
    "load_backbone": "tracking",
}
__all__ = list(_MODULE_OF) + ["embed", "evaluate", "finetune", "pretrain"]  # noqa: RUF005, see PLE0604


def pretrain(config: "PretrainConfig", *, resume: bool = False) -> "TrainResult":
    """Pre-train, score and register a backbone.

    Args:
        config: Settings of the run, such as ``PRESETS["demo"]``.
        resume: Whether to continue the run that ``config.run.name`` names.

    Raises:
        InputError: A setting cannot be used; nothing was started.
        RunFailed: The run cannot go on; the message says what to do.
    """
    _connect()
    from upreid_ray.train.pretrain import fit  # noqa: PLC0415

    return fit(config, resume=resume)


def finetune(config: "DownstreamConfig", *, resume: bool = False) -> "TrainResult":
    """Fine-tune, score and register a backbone.

    Args:
        config: Settings of the run, such as ``FINETUNE_PRESETS["demo"]`` with an ``init``. Its
            class is the method: `FinetuneConfig` or `ClusterContrastConfig`.
        resume: Whether to continue the run that ``config.run.name`` names.

    Raises:
        InputError: A setting cannot be used; nothing was started.
        RunFailed: The run cannot go on; the message says what to do.
    """
    _connect()
    from upreid_ray.train import finetune as downstream  # noqa: PLC0415

    return downstream.finetune(config, resume=resume)


def evaluate(config: "EvaluateConfig") -> "EvaluateResult":
    """Score a frozen backbone by retrieval on a labelled set.

    Args:
        config: What to score, and on which images.

    Raises:
        InputError: A setting cannot be used; nothing was started.
    """
    _connect()
    from upreid_ray.downstream import evaluate as downstream  # noqa: PLC0415

    return downstream.evaluate(config)


def embed(
    init: str, source: str, out: str, config: "EmbedConfig | None" = None
) -> "EmbedResult":
    """Compute the features of all images of a source, and write them to a folder.

    Args:
        init: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, a checkpoint folder, or a file
            of weights.
        source: Shards, or any source that `prepare` reads.
        out: Folder or URI for the features; a call that was killed is continued.
        config: Settings; by default those of ``EmbedConfig()``.

    Raises:
        InputError: An argument cannot be used.
    """
    from upreid_ray.config.downstream import EmbedConfig  # noqa: PLC0415
    from upreid_ray.config.section import absolute, absolute_init  # noqa: PLC0415
    from upreid_ray.downstream import embed as downstream  # noqa: PLC0415

    _connect()
    places = (absolute_init(init), absolute(source), absolute(out))
    return downstream.embed(*places, config or EmbedConfig())


def _connect() -> None:
    """Connect to Ray, and show the progress of runs unless the process shows logs already."""
    from upreid_ray.command_line import connect_to_ray, quiet_libraries  # noqa: PLC0415

    quiet_libraries()
    logger = logging.getLogger("upreid_ray")
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False  # a handler that the program adds later would show it twice
    connect_to_ray()


def __getattr__(name: str) -> Any:  # noqa: ANN401, whatever the name stands for
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
