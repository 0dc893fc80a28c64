"""The precision of forward passes."""

from functools import cache

import torch
from torch import Tensor


def autocast(images: Tensor, precision: str) -> torch.autocast:
    """Return the context for a forward pass over ``images``.

    Args:
        images: ``[B, 3, h, w]``.
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 if the device can multiply it.
    """
    device = images.device
    bf16 = precision == "bf16" or (precision == "auto" and multiplies_bf16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


@cache
def multiplies_bf16(device: torch.device) -> bool:
    """Tell whether the device has instructions for bf16; without them, fp32 is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
