"""Read published UMT5 encoders: one file with the original's or HF's names, or a folder in transformers' layout.

Sizes come from the tensors' shapes, and a config beside them must agree. Containers and prefixes are handled as for a
transformer (`models/state_dicts.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, UsageError, quoted
from ..files import check_file, finite, read_json, reason
from ..scaled_weights import unscaled
from ..state_dicts import (
    WeightFiles,
    check_names_one_file,
    choose_state_dict,
    find_weight_files,
    read_weight_files,
)
from .umt5 import TextEncoder

ORIGINAL_NAMES = {  # HF module: original module, * is the layer
    "shared": "token_embedding",
    "encoder.block.*.layer.0.layer_norm": "blocks.*.norm1",
    "encoder.block.*.layer.0.SelfAttention.q": "blocks.*.attn.q",
    "encoder.block.*.layer.0.SelfAttention.k": "blocks.*.attn.k",
    "encoder.block.*.layer.0.SelfAttention.v": "blocks.*.attn.v",
    "encoder.block.*.layer.0.SelfAttention.o": "blocks.*.attn.o",
    "encoder.block.*.layer.0.SelfAttention.relative_attention_bias": "blocks.*.pos_embedding.embedding",
    "encoder.block.*.layer.1.layer_norm": "blocks.*.norm2",
    "encoder.block.*.layer.1.DenseReluDense.wi_0": "blocks.*.ffn.gate.0",
    "encoder.block.*.layer.1.DenseReluDense.wi_1": "blocks.*.ffn.fc1",
    "encoder.block.*.layer.1.DenseReluDense.wo": "blocks.*.ffn.fc2",
    "encoder.final_layer_norm": "norm",
}
ORIGINAL_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
ORIGINAL_TOKENIZER = "google/umt5-xxl"
TEXT_FILES = (  # as published: the original, then single files of other tools
    ORIGINAL_FILE, "models_t5_umt5-xxl-enc-bf16.safetensors", "umt5-xxl-enc-bf16.safetensors",
    "umt5_xxl_fp16.safetensors", "umt5_xxl_bf16.safetensors",
)  # fmt: skip
FOLDERS = ("", "text_encoders", "text_encoder", "clip")  # searched for these files
TOKENIZERS = (ORIGINAL_TOKENIZER, "tokenizer")
TIED = "encoder.embed_tokens.weight"  # the same tensor as shared.weight
TOKENIZER_TENSOR = "spiece_model"  # bytes of a tokenizer, in some files of weights
CONSTANTS: dict[str, Any] = {  # settings of every UMT5 encoder that no tensor shows
    "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6, "feed_forward_proj": "gated-gelu",
}  # fmt: skip


def find_text(places: Iterable[Path], tokenizers: Iterable[Path] = ()) -> tuple[Path, Path] | None:
    """Find (encoder, tokenizer) in the first of `places` that has an encoder; a place is a file or a folder.

    The tokenizer is searched beside the encoder, then in `places`, then in `tokenizers`.
    """
    places = list(places)
    for place in places:
        if encoder := find_encoder(place):
            near = [encoder.parent, place, *places, *tokenizers]
            folders = [folder / name for folder in near for name in TOKENIZERS]
            missing = place / ("tokenizer" if encoder.is_dir() else ORIGINAL_TOKENIZER)
            return encoder, next((folder for folder in folders if folder.is_dir()), missing)
    return None


def find_encoder(place: Path) -> Path | None:
    """Find an encoder's file, or its folder in the layout of transformers."""
    if not place.is_dir():
        return place if place.exists() else None
    files = [place / folder / name for folder in FOLDERS for name in TEXT_FILES]
    if file := next((path for path in files if path.exists()), None):
        return file
    for folder in (place / "text_encoder", place):
        kind = (read_json(folder / "config.json") or {}).get("model_type")
        if (folder / "config.json").exists() and (folder.name == "text_encoder" or kind == "umt5"):
            return folder
    return None


def load_text(paths: tuple[Path, Path], text_len: int, dtype: torch.dtype, device: Any) -> TextEncoder:
    """Load the encoder and tokenizer at `paths`. Raises UsageError for other files, CheckpointError for broken ones."""
    from transformers import UMT5Config, UMT5EncoderModel

    encoder, tokenizer = paths
    tokens = read_tokenizer(tokenizer)
    source, config = encoder_files(encoder)
    _, tensors = choose_state_dict(encoder, without_tokenizer(read_weight_files(source)), "UMT5 encoder", is_encoder)
    state = hf_names(encoder, tensors)
    sizes = encoder_sizes(encoder, state)
    check_config(encoder, config, sizes)
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**sizes, **CONSTANTS, dropout_rate=0.0))
    empty = {name: tensor for name, tensor in model.state_dict().items() if name != TIED}
    refuse_misfits(
        encoder,
        missing=empty.keys() - state.keys(),
        unexpected=state.keys() - empty.keys(),
        misshaped=(
            f"{name} {list(state[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in empty.items()
            if name in state and state[name].shape != tensor.shape
        ),
    )
    weights = {
        name: nn.Parameter(finite(encoder, name, unscaled(state[name]).to(device, dtype)), False) for name in empty
    }
    weights[TIED] = weights["shared.weight"]  # one Parameter under both names keeps them tied
    model.load_state_dict(weights, strict=True, assign=True)
    return TextEncoder(tokens, model.eval().to(device), text_len)


def encoder_files(path: Path) -> tuple[WeightFiles, dict[str, Any]]:
    """Find the files of an encoder, and read the config of a folder."""
    if not path.is_dir():
        check_file(path, "text encoder")
        check_names_one_file(path)
        return WeightFiles((path,)), {}
    config = read_json(path / "config.json")
    if config is None:
        raise UsageError(f"no config.json in {quoted(path)}; expected a text_encoder folder")
    source = find_weight_files(path, "model") or find_weight_files(path, "pytorch_model")
    if source is None:
        raise UsageError(f"no weights in {quoted(path)}; expected model.safetensors or its shards")
    return source, config


def is_encoder(tensors: Mapping[str, Tensor]) -> bool:
    """Return True for the names of a T5 encoder, the original's or HF's."""
    return any(name in tensors for name in ("token_embedding.weight", "shared.weight", TIED))


def without_tokenizer(content: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != TOKENIZER_TENSOR}


def hf_names(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors with the original's or HF's names to those of transformers; unknown names stay unchanged.

    The embedding is returned once. Raises UsageError for a tensor under two names with different values.
    """
    modules = {theirs: ours for ours, theirs in ORIGINAL_NAMES.items()}
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = re.match(r"blocks\.(\d+)\.", name)
        module, _, leaf = re.sub(r"^blocks\.\d+\.", "blocks.*.", name).rpartition(".")
        ours = f"{modules[module]}.{leaf}" if module in modules else name
        ours = ours.replace("*", layer[1]) if layer else ours
        ours = "shared.weight" if ours == TIED else ours
        if ours in state and not torch.equal(state[ours], tensor):
            raise UsageError(
                f"{quoted(path)} gives {quoted(ours)} twice, with different values; save the encoder again"
            )
        state[ours] = tensor
    return state


def to_original(name: str) -> str:
    """Convert an HF tensor name to the original's."""
    layer = re.search(r"block\.(\d+)\.", name)
    module, _, leaf = re.sub(r"block\.\d+\.", "block.*.", name).rpartition(".")
    renamed = f"{ORIGINAL_NAMES[module]}.{leaf}"
    return renamed.replace("*", layer[1]) if layer else renamed


def encoder_sizes(path: Path, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the sizes of an encoder from its tensors' shapes. Raises CheckpointError if they do not show them all."""
    block = "encoder.block.0.layer"
    try:
        vocabulary, dim = state["shared.weight"].shape
        buckets, heads = state[f"{block}.0.SelfAttention.relative_attention_bias.weight"].shape
        inner = state[f"{block}.0.SelfAttention.q.weight"].shape[0]
        ffn = state[f"{block}.1.DenseReluDense.wi_1.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{quoted(path)} is no UMT5 encoder: its sizes are not in it ({error})") from error
    layers = {layer[1] for name in state if (layer := re.match(r"encoder\.block\.(\d+)\.", name))}
    if missing := [number for number in range(len(layers)) if str(number) not in layers]:
        raise CheckpointError(
            f"{quoted(path)} has {len(layers)} layers, but none called {missing[0]}; it is not complete"
        )
    if 0 in (vocabulary, dim, buckets, heads, inner, ffn) or inner % heads:
        raise CheckpointError(f"{quoted(path)} is no UMT5 encoder: {inner} wide attention of {heads} heads")
    return {
        "vocab_size": vocabulary, "d_model": dim, "d_kv": inner // heads, "d_ff": ffn, "num_layers": len(layers),
        "num_heads": heads, "relative_attention_num_buckets": buckets,
    }  # fmt: skip


def check_config(path: Path, config: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a config of another kind of model, or one that contradicts the tensors."""
    expected = {"model_type": "umt5", **sizes, **CONSTANTS}
    wrong = [
        f"{key} is {quoted(config[key])}, expected {expected[key]}"
        for key in expected
        if key in config and config[key] != expected[key]
    ]
    if wrong:
        raise CheckpointError(
            f"config.json in {quoted(path)} is not of its weights: {'; '.join(wrong)}; fetch both again"
        )


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Silence the progress bars of `transformers`, which are on stderr among those of the command."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def read_tokenizer(path: Path) -> Any:
    """Read the tokenizer in a folder. Raises UsageError if there is no folder."""
    from transformers import AutoTokenizer

    if not path.is_dir():
        raise UsageError(
            f"no tokenizer folder {quoted(path)}; put {' or '.join(TOKENIZERS)} beside the text encoder, "
            "or give base, a folder that has it"
        )
    for file in path.iterdir():
        if not file.is_dir():
            check_file(file, "tokenizer file")
        if file.suffix == ".json":
            read_json(file)
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the tokenizers library raises Exception itself, so there is no kind to name
        raise CheckpointError(
            f"cannot read the tokenizer in {quoted(path)}: {reason(error)}; fetch it again"
        ) from error


def refuse_misfits(path: Path, **misfits: Iterable[str]) -> None:
    """Raise CheckpointError that names the missing, unexpected and misshaped tensors, if there are any."""
    listed = {kind: sorted(names) for kind, names in misfits.items()}
    problems = "; ".join(f"{kind}: {', '.join(names[:12])[:1000]}" for kind, names in listed.items() if names)
    if problems:
        raise CheckpointError(f"{quoted(path)} does not fit a UMT5 encoder ({problems}); use the one of a Wan model")
