"""What arithmetic a device is fast at."""

from __future__ import annotations

import torch


def has_fast_bf16(device: torch.device | None = None) -> bool:
    """Return whether the device, the processor by default, multiplies bf16 matrices in hardware."""
    if device is not None and device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
