"""Writing checkpoints in published formats: small random ones today, for tests and for a first look.

Each format is written with all its parts (transformer, VAE, text encoder, tokenizer), in a folder that appears
only when it is complete.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..errors import InferixError, UsageError, nearest
from ..models.text.tiny import write_tiny_text_encoder
from ..models.wan.checkpoint import FORMATS
from ..models.wan.names import to_format
from ..models.wan.random import random_transformer_state, random_vae_state, vae_for
from ..models.wan.spec import MODELS, ModelSpec
from ..models.wan.vae import VaeSpec
from ..models.wan.vae_checkpoint import ORIGINAL_VAE
from ..models.wan.vae_names import to_original

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SELF_FORCING_FILE = "self_forcing_dmd.pt"


def write_random(
    spec_name: str, form: str, destination: str | Path, seed: int = 0, dtype: str = "float32"
) -> Path:
    """Write random weights of a named model as a folder in a format; UsageError for unknown names."""
    for what, name, known in (("model", spec_name, MODELS), ("format", form, FORMATS), ("dtype", dtype, DTYPES)):
        if name not in known:
            raise UsageError(f"no {what} {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    destination = Path(destination)
    if destination.exists() and (destination.is_file() or any(destination.iterdir())):
        raise UsageError(f"{str(destination)!r} is there already; name a new folder")
    part = destination.with_name(f"{destination.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write_parts(MODELS[spec_name], form, part, seed, DTYPES[dtype])
        if destination.exists():
            destination.rmdir()
        part.rename(destination)
    except OSError as error:
        raise InferixError(f"cannot write {destination}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return destination


def write_parts(spec: ModelSpec, form: str, folder: Path, seed: int, dtype: torch.dtype) -> None:
    """Transformer, VAE, tokenizer and a small text encoder; parts of one seed are the same in every format."""
    transformer = random_transformer_state(spec, seed, dtype)
    vae_spec = vae_for(spec)
    vae = random_vae_state(vae_spec, seed + 1, dtype)
    layout = "diffusers" if form == "diffusers" else "original"
    named = {to_format(layout, name): tensor for name, tensor in transformer.items()}
    if form == "diffusers":
        write_json(folder / "model_index.json", {"_class_name": "WanPipeline"})
        write_json(folder / "transformer" / "config.json", diffusers_config(spec))
        write_json(folder / "vae" / "config.json", diffusers_vae_config(vae_spec))
        save_file(named, folder / "transformer" / "diffusion_pytorch_model.safetensors")
        save_file(vae, folder / "vae" / "diffusion_pytorch_model.safetensors")
    else:
        torch.save({to_original(name, vae_spec): tensor for name, tensor in vae.items()}, folder / ORIGINAL_VAE)
        if form == "original":
            write_json(folder / "config.json", original_config(spec))
            save_file(named, folder / "diffusion_pytorch_model.safetensors")
        else:
            other = random_transformer_state(spec, seed + 2, dtype)  # so that choosing the wrong one shows
            training = {f"model.{to_format(layout, name)}": tensor for name, tensor in other.items()}
            averaged = {f"model.{name}": tensor for name, tensor in named.items()}
            torch.save({"generator": training, "generator_ema": averaged}, folder / SELF_FORCING_FILE)
    write_tiny_text_encoder(folder, layout, spec.text_dim, seed + 3, dtype)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def original_config(spec: ModelSpec) -> dict[str, Any]:
    return {
        "_class_name": "WanModel", "model_type": "i2v" if spec.image_dim else "t2v", "dim": spec.dim,
        "ffn_dim": spec.ffn_dim, "freq_dim": spec.freq_dim, "num_heads": spec.num_heads,
        "num_layers": spec.num_layers, "in_dim": spec.in_channels, "out_dim": spec.out_channels,
        "text_len": spec.text_len, "eps": spec.eps,
    }  # fmt: skip


def diffusers_config(spec: ModelSpec) -> dict[str, Any]:
    return {
        "_class_name": "WanTransformer3DModel", "patch_size": [1, *spec.patch],
        "num_attention_heads": spec.num_heads, "attention_head_dim": spec.head_dim,
        "in_channels": spec.in_channels, "out_channels": spec.out_channels, "text_dim": spec.text_dim,
        "freq_dim": spec.freq_dim, "ffn_dim": spec.ffn_dim, "num_layers": spec.num_layers, "eps": spec.eps,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "image_dim": spec.image_dim,
        "added_kv_proj_dim": spec.dim if spec.image_dim else None, "rope_max_seq_len": 1024,
    }  # fmt: skip


def diffusers_vae_config(spec: VaeSpec) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKLWan", "base_dim": spec.base_channels, "z_dim": spec.z_dim,
        "dim_mult": list(spec.multipliers), "num_res_blocks": spec.num_res_blocks, "attn_scales": [],
        "temperal_downsample": list(spec.temporal_down), "latents_mean": list(spec.mean),
        "latents_std": list(spec.std),
    }  # fmt: skip
