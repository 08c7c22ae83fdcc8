"""What arithmetic the processor is fast at."""

from __future__ import annotations

import torch


def has_fast_bf16() -> bool:
    """Return whether this processor multiplies bf16 matrices in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
