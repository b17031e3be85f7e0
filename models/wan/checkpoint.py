"""Reading published transformers: format and sizes found, tensors mapped by name, the model filled strictly."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InferixError, UsageError, nearest
from ..files import WEIGHTS, fill, read_json, read_tensors
from ..text.umt5 import ORIGINAL_FILE, find_text
from .names import from_format
from .spec import FAMILY, MODELS, ModelSpec
from .transformer import WanTransformer
from .vae_checkpoint import ORIGINAL_VAE, find_vae

FORMATS = ("original", "diffusers", "self-forcing")
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module.")
LEFTOVERS = ("_cls_pred_branch.", "_register_tokens", "_gan_ca_blocks.")  # training's critic, not the generator
HEAD_DIM = 128  # of every published model; used where there is no config to read it from
SIZES = ("dim", "ffn_dim", "num_heads", "num_layers", "in_channels", "out_channels", "text_dim")


@dataclass(frozen=True)
class Checkpoint:
    """A transformer's tensors in our names, and what is known about them. Tensors are mapped, not read."""

    path: Path
    form: str
    files: tuple[Path, ...]
    tensors: Mapping[str, Tensor]
    spec: ModelSpec

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the transformer's files, in order."""
        found = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                while chunk := file.read(1 << 24):
                    found.update(chunk)
        return found.hexdigest()


def read_checkpoint(path: str | Path, form: str | None = None, use_ema: bool = True) -> Checkpoint:
    """Map a checkpoint file or folder. UsageError for what is none; InferixError for a broken file."""
    path = Path(path)
    if form is not None and form not in FORMATS:
        raise UsageError(f"no checkpoint format {form!r}{nearest(form, FORMATS)}; there are {', '.join(FORMATS)}")
    files, config = transformer_files(path)
    raw: dict[str, Tensor] = {}
    wrapped = False
    for file in files:
        content = read_tensors(file)
        if any(key in content for key in ("generator", "generator_ema")):
            wrapped = True
            content = content[choose_weights(content, use_ema)]
        raw |= content
    found = form or ("self-forcing" if wrapped else detect_names(path, raw))
    table = "diffusers" if found == "diffusers" else "original"
    tensors = {}
    for name, tensor in raw.items():
        bare = strip_wrappers(name)
        if not bare.startswith(LEFTOVERS):
            tensors[from_format(table, bare)] = tensor
    return Checkpoint(path, found, files, tensors, read_spec(path, config, tensors))


def choose_weights(content: Mapping[str, Any], use_ema: bool) -> str:
    """Which weights of a training file: the averaged ones if wanted and there, as the authors use them."""
    names = ("generator_ema", "generator") if use_ema else ("generator", "generator_ema")
    return next(name for name in names if name in content)


def strip_wrappers(name: str) -> str:
    """A tensor's name without what training wrappers put before or into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("model.")


def transformer_files(path: Path) -> tuple[tuple[Path, ...], dict[str, Any] | None]:
    """The files that hold the transformer, and its config if there is one."""
    if path.is_file():
        return (path,), read_json(path.parent / "config.json")
    if not path.is_dir():
        known = f"{nearest(str(path), MODELS)}; names of random models are {', '.join(MODELS)}"
        raise UsageError(f"no checkpoint {str(path)!r}: no such file or folder{known}")
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    config = read_json(folder / "config.json")
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if not files:
        files = sorted(
            file for file in folder.iterdir()
            if file.suffix in WEIGHTS and file.name not in (ORIGINAL_VAE, ORIGINAL_FILE)
        )  # fmt: skip
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise UsageError(f"{str(path)!r} holds several checkpoints ({names}); name one of them")
    if not files:
        raise UsageError(f"{str(path)!r} holds no transformer; expected diffusion_pytorch_model*.safetensors or a .pt")
    check_shards(folder, files)
    return tuple(files), config


def check_shards(folder: Path, files: list[Path]) -> None:
    """InferixError naming the shards that an index lists and the folder lacks."""
    for index in folder.glob("*.safetensors.index.json"):
        listed = set((read_json(index) or {}).get("weight_map", {}).values())
        if missing := sorted(listed - {file.name for file in files}):
            raise InferixError(f"{folder} lacks shards {', '.join(missing)}; the download is not complete")


def detect_names(path: Path, tensors: Mapping[str, Any]) -> str:
    """The format whose names a file has."""
    names = {strip_wrappers(name) for name in tensors}
    for form, mark in (("original", "text_embedding.0.weight"), ("diffusers", "condition_embedder.time_proj.weight")):
        if mark in names:
            return form
    some = ", ".join(sorted(names)[:4]) or "nothing"
    raise UsageError(f"{str(path)!r} is no Wan transformer: it holds {some}; expected one of {', '.join(FORMATS)}")


def read_spec(path: Path, config: dict[str, Any] | None, tensors: Mapping[str, Tensor]) -> ModelSpec:
    """Sizes from the config where it has them, from shapes elsewhere; a known model's name if they match."""
    try:
        patch = tensors["patch_embedding.weight"]
        dim = patch.shape[0]
        layers = [int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))]
        sizes: dict[str, Any] = {
            "dim": dim,
            "ffn_dim": tensors["blocks.0.ffn.up.weight"].shape[0],
            "num_layers": max(layers) + 1,
            "in_channels": patch.shape[1],
            "out_channels": tensors["head.linear.weight"].shape[0] // (patch.shape[3] * patch.shape[4]),
            "text_dim": tensors["text_embedding.linear_1.weight"].shape[1],
        }
        freq_dim = tensors["time_embedding.linear_1.weight"].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        raise InferixError(f"{path} is no complete Wan transformer: no {error} in it") from error
    config = config or {}
    sizes["num_heads"] = config.get("num_heads") or config.get("num_attention_heads") or max(dim // HEAD_DIM, 1)
    image = tensors.get("image_embedding.norm_in.weight")
    position = tensors.get("image_embedding.position")
    image_dim = None if image is None else image.shape[0]
    image_tokens = None if position is None else position.shape[1]
    for spec in MODELS.values():
        if all(getattr(spec, key) == sizes[key] for key in SIZES) and spec.image_dim == image_dim:
            return spec
    like = MODELS["wan-5b"] if sizes["out_channels"] == MODELS["wan-5b"].out_channels else MODELS["wan-1.3b"]
    return ModelSpec(
        name="custom", **sizes, freq_dim=freq_dim, text_len=config.get("text_len", FAMILY["text_len"]),
        patch=(patch.shape[3], patch.shape[4]), eps=config.get("eps", FAMILY["eps"]), image_dim=image_dim,
        image_tokens=image_tokens, vae_stride=like.vae_stride, fps=like.fps, default_size=like.default_size,
    )  # fmt: skip


def build_transformer(
    spec: ModelSpec, tensors: Mapping[str, Tensor], precision: str, dtype: torch.dtype, device: Any, source: object
) -> WanTransformer:
    with torch.device("meta"):
        module = WanTransformer(spec, precision)
    return fill(module, tensors, dtype, device, source)


def inspect(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds, as plain values."""
    checkpoint = read_checkpoint(path)
    places = [checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent]
    vae, text = find_vae(places), find_text(places)
    spec = checkpoint.spec
    return {
        "path": str(path),
        "format": checkpoint.form,
        "model": spec.name,
        **{key: getattr(spec, key) for key in SIZES},
        "head_dim": spec.head_dim,
        "tensors": len(checkpoint.tensors),
        "parameters": sum(tensor.numel() for tensor in checkpoint.tensors.values()),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.tensors.values()}),
        "files": [str(file) for file in checkpoint.files],
        "vae": str(vae) if vae else "not beside it; give base",
        "text_encoder": str(text[0]) if text else "not beside it; give base, or prompt embeddings",
    }
