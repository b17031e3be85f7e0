"""All ops of the package by name: one line each. Importing this registers them with torch."""

from __future__ import annotations

from ..errors import UsageError, nearest, quoted
from ..plugins import installed
from .adaln import SPEC as ADALN
from .attention_parts import SPEC as ATTENTION_PARTS
from .block_attention import SPEC as BLOCK_ATTENTION
from .collectives import ALL_GATHER_SPEC, ALL_TO_ALL_SPEC, HAND_OVER_SPEC
from .conv_epilogue import SPEC as CONV_EPILOGUE
from .denoise_step import SPEC as DENOISE_STEP
from .dense_attention import SPEC as DENSE_ATTENTION
from .frame_noise import SPEC as FRAME_NOISE
from .gated_norm import SPEC as GATED_NORM
from .join_phases import SPEC as JOIN_PHASES
from .kv_pages import SPEC as KV_PAGES
from .linear_gelu import SPEC as LINEAR_GELU
from .linear_lowp import SPEC as LINEAR_LOWP
from .linear_wide import SPEC as LINEAR_WIDE
from .merge_parts import SPEC as MERGE_PARTS
from .qk_norm_rope_append import SPEC as QK_NORM_ROPE_APPEND
from .quantise_rows import SPEC as QUANTISE_ROWS
from .rms_norm import SPEC as RMS_NORM
from .rms_silu import SPEC as RMS_SILU
from .rope_append import SPEC as ROPE_APPEND
from .spec import KernelSpec, OpSpec
from .swiglu import SPEC as SWIGLU

SPECS: dict[str, KernelSpec] = {  # ops with kernels of their own
    spec.name: spec
    for spec in (
        BLOCK_ATTENTION, ATTENTION_PARTS, MERGE_PARTS, DENSE_ATTENTION, QK_NORM_ROPE_APPEND, ADALN, DENOISE_STEP,
        FRAME_NOISE, LINEAR_LOWP, QUANTISE_ROWS, KV_PAGES, RMS_NORM, RMS_SILU, CONV_EPILOGUE, JOIN_PHASES, ROPE_APPEND,
        GATED_NORM, SWIGLU,
    )
}  # fmt: skip
PLAIN: dict[str, OpSpec] = {
    spec.name: spec for spec in (LINEAR_GELU, LINEAR_WIDE, ALL_TO_ALL_SPEC, ALL_GATHER_SPEC, HAND_OVER_SPEC)
}  # torch's own ops


def op_spec(name: str) -> OpSpec | None:
    """The spec of `inferix::<name>`; None for an op that is not in the catalog."""
    return SPECS.get(name) or PLAIN.get(name)


def kernel_spec(name: str) -> KernelSpec:
    """The spec of an op with kernels of its own; UsageError for a name that is none."""
    if name not in SPECS:
        raise UsageError(f"no op {quoted(name)}{nearest(name, SPECS)}; expected one of {', '.join(SPECS)}")
    return SPECS[name]


def register_installed() -> None:
    """Add the ops of installed packages. UsageError for a name that is taken."""
    for name, spec in installed("inferix.ops", KernelSpec):
        if op_spec(spec.name) is not None:
            raise UsageError(f"entry point {quoted(name)} has op {quoted(spec.name)}, which there is; rename the op")
        SPECS[spec.name] = spec


register_installed()
