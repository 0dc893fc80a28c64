"""Presets: named settings that a command line starts from."""

from collections.abc import Mapping

from upreid_ray.config.downstream import (
    ClusterContrastConfig,
    ClusterTrainingConfig,
    DownstreamConfig,
    FinetuneAugmentationConfig,
    FinetuneConfig,
    FinetuneOptimizerConfig,
    FinetuneTrainingConfig,
    LabelledDataConfig,
)
from upreid_ray.config.pretrain import (
    AdamWConfig,
    AugmentationConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TrainingConfig,
)
from upreid_ray.config.run import CheckpointConfig, EvaluationConfig, ScalingConfig

# Statistics of the training images of ImageNet, by which torchvision's weights normalize.
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

AUGMENTATIONS = {
    # The augmentation of LUPerson (Fu et al. 2021, https://arxiv.org/abs/2012.03753), without
    # colour jitter.
    "luperson": AugmentationConfig(),
    # The augmentation of DINO for ReID (TransReID-SSL, Luo et al. 2021,
    # https://arxiv.org/abs/2111.12084): colour jitter, upright crops, ImageNet's statistics.
    "dino": AugmentationConfig(
        mean=IMAGENET["mean"],
        std=IMAGENET["std"],
        crop_ratio=(0.4, 0.6),
        jitter_probability=0.8,
    ),
    # An augmentation for short runs on small images: upright crops, little blur and erasing.
    "mild": AugmentationConfig(
        crop_area=(0.5, 1.0),
        crop_ratio=(0.4, 0.6),
        jitter_probability=0.8,
        jitter_hue=0.05,
        grayscale_probability=0.05,
        blur_sigma=(0.1, 0.5),
        erase_area=(0.02, 0.2),
    ),
}

_ONE_MACHINE = ScalingConfig(num_workers=1, use_gpu=False, cpus_per_worker=1.0)
_SHORT_ADAMW = AdamWConfig(lr=5e-4, warmup_epochs=1)
# For thousands of images instead of millions: a shorter queue and a lower momentum.
_SMALL_MODEL = ModelConfig(
    backbone="resnet18", queue_size=1024, momentum=0.99, final_momentum=1.0
)

PRESETS = {
    # python jobs/pretrain.py demo: synthetic people on two cores, in minutes.
    "demo": PretrainConfig(
        data=DataConfig(height=64, width=32),
        augmentation=AUGMENTATIONS["mild"],
        # With a lower momentum, such a short run learns less or collapses (docs/benchmarks.md).
        model=_SMALL_MODEL.override({"momentum": 0.999}),
        optimizer=OptimizerConfig(lr=0.03, warmup_epochs=1, adamw=_SHORT_ADAMW),
        training=TrainingConfig(epochs=3, batch_size=64, group_size=32, log_every_steps=10),
        evaluation=EvaluationConfig(every_epochs=1),
        checkpoint=CheckpointConfig(every_steps=50),
        scaling=_ONE_MACHINE,
    ),
    # python jobs/pretrain.py laptop --data.shards DIR: real crops on one machine.
    "laptop": PretrainConfig(
        data=DataConfig(height=128, width=64),
        augmentation=AUGMENTATIONS["mild"],
        # The queue must not hold most of the images of a set, which may be a thousand.
        model=_SMALL_MODEL.override({"queue_size": 256}),
        optimizer=OptimizerConfig(lr=0.02, warmup_epochs=1, adamw=_SHORT_ADAMW),
        training=TrainingConfig(epochs=10, batch_size=64, group_size=32, log_every_steps=10),
        evaluation=EvaluationConfig(every_epochs=5),
        checkpoint=CheckpointConfig(every_steps=50),
        scaling=_ONE_MACHINE,
    ),
    # The recipe of LUPerson's MoCo v2 with the I2 terms, on 8 GPUs. The defaults are these.
    # The command line requires --data.shards with it and with the next one.
    "luperson": PretrainConfig(),
    # The same with ViT-S/16, trained as in MoCo v3 (Chen et al. 2021,
    # https://arxiv.org/abs/2104.02057): its temperature, key momentum and AdamW.
    "luperson-vit-small": PretrainConfig(
        model=ModelConfig(backbone="vit_small_patch16", momentum=0.99, final_momentum=1.0),
        loss=LossConfig(temperature=0.2),
    ),
}

# Settings for the small images of the synthetic people, on two cores.
_SMALL_IMAGES = {
    "backbone": "resnet18",
    "data": LabelledDataConfig(height=64, width=32),
    "augmentation": FinetuneAugmentationConfig(padding=3),
    "evaluation": EvaluationConfig(every_epochs=2),
    "checkpoint": CheckpointConfig(every_steps=50),
    "scaling": _ONE_MACHINE,
}

FINETUNE_PRESETS = {
    # The strong baseline of Luo et al. 2019 (https://arxiv.org/abs/1903.07071).
    "bot": FinetuneConfig(),
    # python jobs/finetune.py demo --init ...: synthetic people on two cores, in minutes.
    "demo": FinetuneConfig(
        optimizer=FinetuneOptimizerConfig(warmup_epochs=1, milestones=(4, 6)),
        training=FinetuneTrainingConfig(epochs=7, log_every_steps=10),
    ).override(_SMALL_IMAGES),
}

CLUSTER_CONTRAST_PRESETS = {
    # Cluster Contrast for Market-1501 (Dai et al. 2021, https://arxiv.org/abs/2103.11568).
    "paper": ClusterContrastConfig(),
    # python jobs/finetune.py demo --method cluster-contrast --init ...: as above.
    "demo": ClusterContrastConfig(
        optimizer=FinetuneOptimizerConfig(warmup_epochs=0, milestones=(4,)),
        training=ClusterTrainingConfig(
            epochs=5, steps_per_epoch=20, num_images=4, log_every_steps=10
        ),
    ).override(_SMALL_IMAGES),
}

# The presets of each `--method` of a fine-tuning; without a preset, the first one is taken.
METHOD_PRESETS: dict[str, Mapping[str, DownstreamConfig]] = {
    "supervised": FINETUNE_PRESETS,
    "cluster-contrast": CLUSTER_CONTRAST_PRESETS,
}


def has_preset_shapes(config: PretrainConfig) -> bool:
    """Return whether backbone, images and patches have the shapes of a preset.

    These fit each other, as tests check, so that a run of them need not import torch to check
    that.
    """

    def shapes(of: PretrainConfig) -> tuple[object, ...]:
        model, data, patches = of.model, of.data, of.patches
        built = (model.backbone, model.drop_path, model.freeze_patch_projection)
        return (*built, data.height, data.width, patches.rows, patches.columns)

    return any(
        shapes(config) == shapes(preset)
        for preset in PRESETS.values()
        if preset.loss.needs_patches
    )
