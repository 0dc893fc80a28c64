"""Distributed pre-training of person re-identification backbones without labels.

The names of this module are imported when they are used: most need PyTorch, Ray and MLflow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upreid_ray.api import evaluate as evaluate
    from upreid_ray.api import finetune as finetune
    from upreid_ray.api import pretrain as pretrain
    from upreid_ray.config.downstream import ClusterContrastConfig as ClusterContrastConfig
    from upreid_ray.config.downstream import EvaluateConfig as EvaluateConfig
    from upreid_ray.config.downstream import FinetuneConfig as FinetuneConfig
    from upreid_ray.config.presets import AUGMENTATIONS as AUGMENTATIONS
    from upreid_ray.config.presets import CLUSTER_CONTRAST_PRESETS as CLUSTER_CONTRAST_PRESETS
    from upreid_ray.config.presets import FINETUNE_PRESETS as FINETUNE_PRESETS
    from upreid_ray.config.presets import PRESETS as PRESETS
    from upreid_ray.config.pretrain import PretrainConfig as PretrainConfig
    from upreid_ray.tracking import load_backbone as load_backbone

__version__ = "0.1.0"

_MODULE_OF = {
    "evaluate": "api",
    "finetune": "api",
    "pretrain": "api",
    "ClusterContrastConfig": "config.downstream",
    "EvaluateConfig": "config.downstream",
    "FinetuneConfig": "config.downstream",
    "AUGMENTATIONS": "config.presets",
    "CLUSTER_CONTRAST_PRESETS": "config.presets",
    "FINETUNE_PRESETS": "config.presets",
    "PRESETS": "config.presets",
    "PretrainConfig": "config.pretrain",
    "load_backbone": "tracking",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:  # noqa: ANN401, whatever the name stands for
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
