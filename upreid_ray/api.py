"""The jobs as functions, for scripts and notebooks.

Each uses the Ray cluster that the process is connected to. Without one it connects to that of
``RAY_ADDRESS``, or starts a local one, as the jobs do.
"""

import logging

from upreid_ray.command_line import connect_to_ray
from upreid_ray.config.downstream import DownstreamConfig, EvaluateConfig
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.downstream import evaluate as evaluation
from upreid_ray.downstream.evaluate import EvaluateResult
from upreid_ray.train import finetune as finetuning
from upreid_ray.train import pretrain as pretraining
from upreid_ray.train.job import TrainResult


def pretrain(config: PretrainConfig, *, resume: bool = False) -> TrainResult:
    """Pre-train, score and register a backbone.

    Args:
        config: Settings of the run, such as ``PRESETS["demo"]``.
        resume: Whether to continue the run that ``config.run.name`` names.

    Raises:
        InputError: A setting cannot be used; nothing was started.
        RunFailed: The run cannot go on; the message says what to do.
    """
    _begin()
    return pretraining.fit(config, resume=resume)


def finetune(config: DownstreamConfig, *, resume: bool = False) -> TrainResult:
    """Fine-tune, score and register a backbone.

    Args:
        config: Settings of the run, such as ``FINETUNE_PRESETS["demo"]`` with an ``init``. Its
            class is the method: `FinetuneConfig` or `ClusterContrastConfig`.
        resume: Whether to continue the run that ``config.run.name`` names.

    Raises:
        InputError: A setting cannot be used; nothing was started.
        RunFailed: The run cannot go on; the message says what to do.
    """
    _begin()
    return finetuning.finetune(config, resume=resume)


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Score a frozen backbone by retrieval on a labelled set.

    Args:
        config: What to score, and on which images.

    Raises:
        InputError: A setting cannot be used; nothing was started.
    """
    _begin()
    return evaluation.evaluate(config)


def _begin() -> None:
    """Connect to Ray, and show the progress of runs unless the process shows logs already."""
    logger = logging.getLogger("upreid_ray")
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False  # a handler that the program adds later would show it twice
    connect_to_ray()
