"""In which precision forward passes compute."""

from functools import cache

import torch
from torch import Tensor

SMALLEST_CPU_BF16 = 16


def autocast(images: Tensor, precision: str) -> torch.autocast:
    """Return the context for a forward pass over ``images``.

    Args:
        images: ``[B, 3, h, w]``.
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 where the device multiplies it.
    """
    device = images.device
    bf16 = precision == "bf16" or (precision == "auto" and multiplies_bf16(device))
    # oneDNN's bf16 weight gradient of a strided convolution over a single pixel holds
    # uninitialized memory (torch 2.15, CPU): images of 16 pixels and less reach that.
    is_safe = device.type != "cpu" or min(images.shape[-2:]) > SMALLEST_CPU_BF16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16 and is_safe)


@cache
def multiplies_bf16(device: torch.device) -> bool:
    """Tell whether the device has instructions for bf16; without, it is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
