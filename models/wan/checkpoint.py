"""Reading published transformers: format and sizes found, tensors mapped by name, the model filled strictly."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InferixError, UsageError, nearest
from ..files import WEIGHTS, fill, read_json, read_tensors
from ..text.umt5 import ORIGINAL_FILE, find_text
from .lora import check_lora, merged, read_lora
from .names import from_format
from .spec import FAMILY, MODELS, ModelSpec
from .transformer import WanTransformer
from .vae_checkpoint import ORIGINAL_VAES, TINY_DECODERS, find_vae


@dataclass(frozen=True)
class Format:
    """How a published checkpoint is laid out.

    names: the table of `names.TABLES`. weights: keys under which a training file has them, best first; none
    for a flat file. file: what it is called. lora: an adapter that belongs to it.
    """

    names: str
    file: str
    weights: tuple[str, ...] = ()
    lora: str | None = None


SHARD = "diffusion_pytorch_model.safetensors"
FORMATS: dict[str, Format] = {
    "original": Format("original", SHARD),
    "diffusers": Format("diffusers", SHARD),
    "self-forcing": Format("original", "self_forcing_dmd.pt", ("generator_ema", "generator")),
    "causvid": Format("original", "model.pt", ("generator",)),
    "longlive": Format("original", "longlive_base.pt", ("generator_ema", "generator", "model"), lora="lora.pt"),
    "krea": Format("original", "krea-realtime-video-14b.safetensors"),
    "rolling-forcing": Format("original", "rolling_forcing_dmd.pt", ("generator_ema", "generator")),
    "longlive2": Format("original", "model_bf16.pt", ("generator", "model")),
}
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
    lora: Path | None  # an adapter that is part of the checkpoint

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
    raw: dict[str, Any] = {}
    for file in files:
        raw |= read_tensors(file)
    found = form or detect_format(path, files[0].name, raw)
    layout = FORMATS[found]
    tensors: dict[str, Tensor] = {}
    for name, tensor in choose_weights(path, raw, layout, use_ema).items():
        bare = strip_wrappers(name)
        if not bare.startswith(LEFTOVERS):
            tensors |= {from_format(layout.names, part): value for part, value in unfused(bare, tensor).items()}
    refuse_quantised(path, tensors)
    lora = files[0].parent / layout.lora if layout.lora else None
    spec = read_spec(path, config, tensors)
    return Checkpoint(path, found, files, tensors, spec, lora if lora and lora.is_file() else None)


def choose_weights(path: Path, content: dict[str, Any], layout: Format, use_ema: bool) -> dict[str, Tensor]:
    """The tensors of a flat file, or those of a training file that are wanted: averaged ones first, if `use_ema`."""
    names = sorted(layout.weights, key=lambda name: name.endswith("_ema"), reverse=use_ema)
    for name in names:
        if isinstance(content.get(name), dict):
            return content[name]
    if not all(isinstance(tensor, Tensor) for tensor in content.values()):
        held, wanted = ", ".join(sorted(content)[:6]), " or ".join(layout.weights) or "tensors alone"
        raise UsageError(f"{str(path)!r} holds {held}; expected {wanted}, or another checkpoint_format")
    return content


def unfused(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Query, key and value of a tensor that has them one below the other; any other tensor alone."""
    if ".self_attn.to_qkv." not in name:
        return {name: tensor}
    return {name.replace("to_qkv", part): piece for part, piece in zip("qkv", tensor.chunk(3), strict=True)}


def refuse_quantised(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UsageError(f"{str(path)!r} has {name} in {kind}; quantised weights are not in this version, use the "
                             "bfloat16 file")


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
        known = f"{nearest(str(path), MODELS)}; names of models are {', '.join(MODELS)}"
        raise UsageError(f"no checkpoint {str(path)!r}: no such file or folder{known}")
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    config = read_json(folder / "config.json")
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if not files:
        others = {ORIGINAL_FILE, *ORIGINAL_VAES, *TINY_DECODERS, *(form.lora for form in FORMATS.values())}
        files = sorted(
            file for file in folder.iterdir()
            if file.suffix in WEIGHTS and file.name not in others
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


def detect_format(path: Path, file: str, content: Mapping[str, Any]) -> str:
    """The format a file is called after or, where it has a name of its own, whose names it holds."""
    names = {strip_wrappers(name) for name in content}
    held = {name for name, part in content.items() if isinstance(part, dict)}
    for form, layout in FORMATS.items():
        known = set(layout.weights) | {"critic", "critic_ema"}
        if layout.file == file != SHARD and held <= known:
            return form
    if held & set(FORMATS["longlive"].weights):
        return "longlive" if "model" in held else "self-forcing"
    if any(name.endswith(".self_attn.to_qkv.weight") for name in names):
        return "krea"
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
    action = tensors.get("action_embedding.linear_1.weight")
    action_dim = None if action is None else action.shape[1]
    placed = "position_embedding" in tensors
    for spec in MODELS.values():
        same = all(getattr(spec, key) == sizes[key] for key in SIZES)
        if same and (spec.image_dim, spec.action_dim, spec.grid is not None) == (image_dim, action_dim, placed):
            return spec
    if action_dim is not None:
        names = ", ".join(spec.name for spec in MODELS.values() if spec.actions)
        raise UsageError(f"{str(path)!r} follows {action_dim} actions, which have no names here; known are {names}")
    like = MODELS["wan-5b"] if sizes["out_channels"] == MODELS["wan-5b"].out_channels else MODELS["wan-1.3b"]
    return ModelSpec(
        name="custom", **sizes, freq_dim=freq_dim, text_len=config.get("text_len", FAMILY["text_len"]),
        patch=(patch.shape[3], patch.shape[4]), eps=config.get("eps", FAMILY["eps"]), image_dim=image_dim,
        image_tokens=image_tokens, vae_stride=like.vae_stride, fps=like.fps, default_size=like.default_size, grid=None,
        actions=(),
    )  # fmt: skip


def build_transformer(
    checkpoint: Checkpoint,
    precision: str,
    dtype: torch.dtype,
    device: Any,
    loras: Iterable[tuple[str | Path, float]] = (),
) -> WanTransformer:
    """The model of a checkpoint with its adapters merged in."""
    with torch.device("meta"):
        module = WanTransformer(checkpoint.spec, precision)
    return fill(module, checkpoint.tensors, dtype, device, checkpoint.path, merging(checkpoint, loras))


def merging(checkpoint: Checkpoint, loras: Iterable[tuple[str | Path, float]]) -> Callable[[str, Tensor], Tensor]:
    """What makes a weight of a checkpoint from the file's: the adapter that belongs to it, then `loras`.

    `loras` are (path, factor). Raises UsageError for adapters of another base model.
    """
    adapters = [*([(checkpoint.lora, 1.0)] if checkpoint.lora else []), *loras]
    updates = [(read_lora(path), factor) for path, factor in adapters]
    for (path, _), (update, _) in zip(adapters, updates, strict=True):
        check_lora(path, update, checkpoint.tensors)

    def change(name: str, tensor: Tensor) -> Tensor:
        for update, factor in updates:
            tensor = merged(name, tensor, update, factor)
        return tensor

    return change


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
