"""Tools that load exported backbones, and how each of them loads a file.

Formats as of torchvision 0.29, timm 1.0, IBN-Net (XingangPan, 2021), fast-reid (JDAI-CV, 2023)
and torchreid (KaiyangZhou, 2022). This module imports no torch, so that `--help` is quick.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Consumer:
    """A tool that loads backbones.

    Attributes:
        container: Key under which it looks for the state dict; None if it takes the file as it
            is.
        usage: One line that loads a file that `torch.save` wrote. Fields in braces are those
            of `upreid_ray.downstream.export.usage`; ``constructor`` is what the family of the
            backbone says.
        safetensors_usage: The same for a safetensors file; None if it reads none.
    """

    container: str | None
    usage: str
    safetensors_usage: str | None = None


TIMM_USAGE = "model = timm.create_model({constructor}, checkpoint_path={file!r})"
_PLAIN = Consumer(
    container=None,
    usage="model = {constructor}; model.load_state_dict(torch.load({file!r}), strict=False)",
    safetensors_usage="model = {constructor}; "
    "model.load_state_dict(safetensors.torch.load_file({file!r}), strict=False)",
)
CONSUMERS = {
    "torchvision": _PLAIN,
    "ibn-net": _PLAIN,
    "timm": Consumer(container=None, usage=TIMM_USAGE, safetensors_usage=TIMM_USAGE),
    "fastreid": Consumer(
        container=None,
        # Words for the command line of tools/train_net.py. After its first convolution,
        # fast-reid pools 3x3 with stride 2 in ceil mode and without padding: its features
        # differ from torchvision's until that pooling is exchanged.
        usage="{constructor} MODEL.BACKBONE.FEAT_DIM {num_features} "
        "MODEL.BACKBONE.LAST_STRIDE {last_stride} MODEL.BACKBONE.PRETRAIN True "
        "MODEL.BACKBONE.PRETRAIN_PATH {quoted_file} MODEL.PIXEL_MEAN '{mean_255}' "
        "MODEL.PIXEL_STD '{std_255}' INPUT.SIZE_TRAIN '[{height}, {width}]' "
        "INPUT.SIZE_TEST '[{height}, {width}]'",
    ),
    "torchreid": Consumer(
        container="state_dict",
        usage="torchreid.utils.load_pretrained_weights(model, {file!r})",
    ),
}
# Files that compute features: one line that runs a file, and the end of its name.
MODULE_FORMATS = {
    "onnx": (
        "features = onnxruntime.InferenceSession({file!r}).run(None, {{'images': images}})[0]",
        ".onnx",
    ),
    "torch": ("model = torch.export.load({file!r}).module()", ".pt2"),
}
