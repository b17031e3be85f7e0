"""Make the `config.json` of each checkpoint layout from our specs."""

from __future__ import annotations

from typing import Any

from ..spec import ModelSpec
from .vae_spec import VaeSpec


def original_config(spec: ModelSpec) -> dict[str, Any]:
    return {
        "_class_name": "WanModel", "model_type": "i2v" if spec.condition_channels else "t2v", "dim": spec.dim,
        "ffn_dim": spec.ffn_dim, "freq_dim": spec.freq_dim, "num_heads": spec.num_heads,
        "num_layers": spec.num_layers, "in_dim": spec.in_channels, "out_dim": spec.out_channels,
        "text_len": spec.text_len, "eps": spec.eps,
    }  # fmt: skip


def pipeline_class(spec: ModelSpec) -> str:
    """Return the class of a pipeline in the diffusers layout."""
    return "WanPipeline" if spec.camera_channels is None else "LingBotWorldCausalDMDPipeline"


def diffusers_config(spec: ModelSpec) -> dict[str, Any]:
    kind = "WanTransformer3DModel" if spec.camera_channels is None else "CausalLingBotWorldTransformer3DModel"
    return {
        "_class_name": kind, "patch_size": [1, *spec.patch],
        "num_attention_heads": spec.num_heads, "attention_head_dim": spec.head_dim,
        "in_channels": spec.in_channels, "out_channels": spec.out_channels, "text_dim": spec.text_dim,
        "freq_dim": spec.freq_dim, "ffn_dim": spec.ffn_dim, "num_layers": spec.num_layers, "eps": spec.eps,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "image_dim": spec.image_dim,
        "added_kv_proj_dim": spec.dim if spec.image_dim else None, "rope_max_seq_len": 1024,
        **({} if spec.action_dim is None else {"action_dim": spec.action_dim}),
    }  # fmt: skip


def diffusers_vae_config(spec: VaeSpec) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKLWan", "base_dim": spec.base_channels, "z_dim": spec.z_dim,
        "dim_mult": list(spec.multipliers), "num_res_blocks": spec.num_res_blocks, "attn_scales": [],
        "temperal_downsample": list(spec.temporal_down), "latents_mean": list(spec.mean),
        "latents_std": list(spec.std), "decoder_base_dim": spec.decoder_channels, "is_residual": spec.shortcuts,
        "in_channels": spec.picture_channels, "out_channels": spec.picture_channels,
        "patch_size": None if spec.patch == 1 else spec.patch, "scale_factor_spatial": spec.spatial_stride,
        "scale_factor_temporal": spec.temporal_stride,
    }  # fmt: skip
