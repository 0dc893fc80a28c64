"""Tools that load exported backbones, and how each of them loads a file.

Formats as of torchvision 0.29, timm 1.0, fast-reid (JDAI-CV, 2023) and torchreid
(KaiyangZhou, 2022). This module imports no torch, so that `--help` is quick.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Consumer:
    """A tool that loads backbones.

    Attributes:
        head: Names of the tensors of its classifier.
        container: Key under which it looks for the state dict; None if it takes the file as it
            is.
        usage: One line that loads a file that `torch.save` wrote. Fields in braces are those
            of `upreid_ray.downstream.export.usage`.
        safetensors_usage: The same for a safetensors file; None if it reads none.
    """

    head: tuple[str, ...]
    container: str | None
    usage: str
    safetensors_usage: str | None = None


TIMM_USAGE = "model = timm.create_model({backbone!r}, num_classes=0, checkpoint_path={file!r})"
CONSUMERS = {
    "torchvision": Consumer(
        ("fc.weight", "fc.bias"),
        container=None,
        usage="model = torchvision.models.{backbone}(); "
        "model.load_state_dict(torch.load({file!r}), strict=False)",
        safetensors_usage="model = torchvision.models.{backbone}(); "
        "model.load_state_dict(safetensors.torch.load_file({file!r}), strict=False)",
    ),
    "timm": Consumer(
        ("fc.weight", "fc.bias"),
        container=None,
        usage=TIMM_USAGE,
        safetensors_usage=TIMM_USAGE,
    ),
    "fastreid": Consumer(
        (),
        container=None,
        # Words for the command line of tools/train_net.py.
        usage="MODEL.BACKBONE.DEPTH {depth}x MODEL.BACKBONE.FEAT_DIM {num_features} "
        "MODEL.BACKBONE.LAST_STRIDE {last_stride} MODEL.BACKBONE.PRETRAIN True "
        "MODEL.BACKBONE.PRETRAIN_PATH {quoted_file} MODEL.PIXEL_MEAN '{mean_255}' "
        "MODEL.PIXEL_STD '{std_255}' INPUT.SIZE_TRAIN '[{height}, {width}]' "
        "INPUT.SIZE_TEST '[{height}, {width}]'",
    ),
    "torchreid": Consumer(
        ("classifier.weight", "classifier.bias"),
        container="state_dict",
        usage="torchreid.utils.load_pretrained_weights(model, {file!r})",
    ),
}
