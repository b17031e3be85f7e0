"""All ops with a `KernelSpec`, by name."""

from __future__ import annotations

from .adaln import SPEC as ADALN
from .block_attention import SPEC as BLOCK_ATTENTION
from .denoise_step import SPEC as DENOISE_STEP
from .kv_pages import SPEC as KV_PAGES
from .linear_lowp import SPEC as LINEAR_LOWP
from .qk_norm_rope_append import SPEC as QK_NORM_ROPE_APPEND
from .rms_norm import SPEC as RMS_NORM
from .rms_silu import SPEC as RMS_SILU
from .spec import KernelSpec

SPECS: dict[str, KernelSpec] = {
    spec.name: spec
    for spec in (BLOCK_ATTENTION, QK_NORM_ROPE_APPEND, ADALN, DENOISE_STEP, LINEAR_LOWP, KV_PAGES, RMS_NORM, RMS_SILU)
}
