"""Reading published checkpoints: format and sizes found, tensors mapped by name, models filled once and strictly.

Files are memory-mapped and models are built on the meta device, so a checkpoint is in memory once. Pickles are
read with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...errors import InferixError, UsageError, nearest
from ..text.umt5 import ORIGINAL_FILE, ORIGINAL_TOKENIZER, TextEncoder
from .names import from_format
from .spec import FAMILY, MODELS, ModelSpec
from .transformer import WanTransformer
from .vae import CausalVae, VaeSpec
from .vae_names import to_original, vae_spec_from_shapes

FORMATS = ("original", "diffusers", "self-forcing")
ORIGINAL_VAE = "Wan2.1_VAE.pth"
WEIGHTS = (".safetensors", ".pt", ".pth")
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module.")
LEFTOVERS = ("_cls_pred_branch.", "_register_tokens", "_gan_ca_blocks.")  # training's critic, not the generator
HEAD_DIM = 128  # of every published model; used where there is no config to read it from
SIZES = ("dim", "ffn_dim", "num_heads", "num_layers", "in_channels", "out_channels", "text_dim")

Model = TypeVar("Model", bound=nn.Module)


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


@dataclass(frozen=True)
class Components:
    """A model ready to run. `text` loads the encoder when it is first called; None where there is none."""

    transformer: WanTransformer
    vae: CausalVae
    text: Callable[[], TextEncoder] | None
    source: str
    form: str
    digest: Callable[[], str | None]


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


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None if there is no such file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InferixError(f"cannot read {path}: {error}; download it again") from error
    if not isinstance(content, dict):
        raise InferixError(f"{path} holds no JSON object; download it again")
    return content


def read_tensors(path: Path) -> dict[str, Any]:
    """Names to mapped tensors of one file; a training file's names are its dicts of tensors."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InferixError(f"cannot read {path}: {said}; the file is damaged or no checkpoint") from error
    if not isinstance(content, dict):
        raise InferixError(f"{path} holds a {type(content).__name__}; expected a dict of tensors")
    return content


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


def fill(module: Model, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: Any, source: object) -> Model:
    """Give a meta-device module its tensors; InferixError lists every missing, unexpected or mis-shaped one."""
    wanted = module.state_dict()
    wrong = [f"{name} {list(empty.shape)}: missing" for name, empty in wanted.items() if name not in tensors]
    wrong += [f"{name} {list(tensors[name].shape)}: unexpected" for name in tensors if name not in wanted]
    wrong += [
        f"{name}: {list(tensors[name].shape)}, expected {list(empty.shape)}"
        for name, empty in wanted.items()
        if name in tensors and tensors[name].shape != empty.shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 12} more" if len(wrong) > 12 else ""
        raise InferixError(f"{source} does not fit the model: {'; '.join(wrong[:12])}{more}")
    state = {name: tensors[name].to(device=device, dtype=dtype) for name in wanted}
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def build_transformer(
    spec: ModelSpec, tensors: Mapping[str, Tensor], precision: str, dtype: torch.dtype, device: Any, source: object
) -> WanTransformer:
    with torch.device("meta"):
        module = WanTransformer(spec, precision)
    return fill(module, tensors, dtype, device, source)


def build_vae(
    spec: VaeSpec, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: Any, source: object
) -> CausalVae:
    with torch.device("meta"):
        module = CausalVae(spec)
    return fill(module, tensors, dtype, device, source)


def find_vae(places: Iterable[Path]) -> Path | None:
    """The VAE's file in the first place that has one: a file, or a folder of either format."""
    for place in places:
        for path in (place, place / ORIGINAL_VAE, place / "vae", place / "diffusion_pytorch_model.safetensors"):
            if path.is_file():
                return path
            if path.name == "vae" and (path / "diffusion_pytorch_model.safetensors").is_file():
                return path / "diffusion_pytorch_model.safetensors"
    return None


def load_vae(path: Path, dtype: torch.dtype, device: Any) -> CausalVae:
    """A VAE from the original `.pth` or from diffusers' file; sizes are read off the shapes."""
    tensors = read_tensors(path)
    names = "original" if "conv2.weight" in tensors else "diffusers"
    try:
        spec = vae_spec_from_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, names)
    except KeyError as error:
        raise InferixError(f"{path} is no Wan 2.1 VAE: it has no {error}") from error
    if names == "original":
        with torch.device("meta"):
            ours = CausalVae(spec).state_dict()
        back = {to_original(name, spec): name for name in ours}
        tensors = {back.get(name, name): tensor for name, tensor in tensors.items()}
    return build_vae(spec, tensors, dtype, device, path)


def find_text(places: Iterable[Path]) -> tuple[Path, Path] | None:
    """(encoder, tokenizer) of the first place that has them: folders of diffusers, or the original file."""
    for place in places:
        if (place / ORIGINAL_FILE).is_file():
            return place / ORIGINAL_FILE, place / ORIGINAL_TOKENIZER
        if (place / "text_encoder").is_dir():
            return place / "text_encoder", place / "tokenizer"
    return None


def load_text(found: tuple[Path, Path], text_len: int, dtype: torch.dtype, device: Any) -> TextEncoder:
    read = TextEncoder.from_original if found[0].is_file() else TextEncoder.from_directory
    return read(*found, text_len, dtype, device)


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
