"""The UMT5 encoder through `transformers`, with the prompt cleaning and zero rows that Wan was trained with.

Prompts become exactly `text_len` rows; those after the prompt are zero, and the transformer attends to them.
Source: Wan 2.1 (arXiv 2503.20314); UMT5 (arXiv 2304.09151).
"""

from __future__ import annotations

import html
import pickle
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...errors import InferixError, UsageError, quoted

LONGEST_PROMPT = 20_000  # characters; far beyond what 512 tokens hold
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
TIED = "encoder.embed_tokens.weight"  # the same tensor as shared.weight


def clean_prompt(prompt: str, empty: bool = False) -> str:
    """The prompt as the encoder was trained to read it.

    UsageError if it is no text or absurdly long, or if nothing is left of it, unless `empty`.
    """
    import ftfy

    if not isinstance(prompt, str):
        raise UsageError(f"the prompt is a {type(prompt).__name__}; expected text")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"the prompt is not valid UTF-8 text at character {error.start}; retype it") from error
    if len(prompt) > LONGEST_PROMPT:
        raise UsageError(
            f"the prompt has {len(prompt)} characters; expected at most {LONGEST_PROMPT}, of which about "
            "the first 2000 count"
        )
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    text = re.sub(r"\s+", " ", text).strip()
    if not text and not empty:
        raise UsageError("the prompt is empty; say what the video shows")
    return text


def to_original(name: str) -> str:
    """An HF tensor name as the original file has it."""
    layer = re.search(r"block\.(\d+)\.", name)
    module, _, leaf = re.sub(r"block\.\d+\.", "block.*.", name).rpartition(".")
    renamed = f"{ORIGINAL_NAMES[module]}.{leaf}"
    return renamed.replace("*", layer[1]) if layer else renamed


class TextEncoder:
    """A tokenizer and an encoder; `encode` gives the rows of one prompt."""

    def __init__(self, tokenizer: Any, model: Any, text_len: int) -> None:
        self.tokenizer, self.model, self.text_len = tokenizer, model, text_len

    @classmethod
    def from_directory(
        cls, model_dir: Path, tokenizer_dir: Path, text_len: int, dtype: torch.dtype, device: torch.device | str
    ) -> TextEncoder:
        """From the folders of a diffusers checkpoint."""
        from transformers import UMT5EncoderModel
        from transformers.utils import logging

        if not (model_dir / "config.json").is_file():
            raise UsageError(f"no config.json in {str(model_dir)!r}; expected a text_encoder folder")
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # progress is the caller's to show
        read: Any = UMT5EncoderModel.from_pretrained
        try:
            model, loaded = read(
                model_dir, dtype=dtype, local_files_only=True, output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are listed below with the other misfits
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InferixError(f"cannot read the text encoder in {model_dir}: {error}; fetch it again") from error
        finally:
            if shown:
                logging.enable_progress_bar()
        refuse_misfits(
            model_dir,
            missing=loaded["missing_keys"],
            unexpected=loaded["unexpected_keys"],
            misshaped=(str(entry[0]) for entry in loaded["mismatched_keys"]),
        )
        return cls(read_tokenizer(tokenizer_dir), model.eval().to(device), text_len)

    @classmethod
    def from_original(
        cls, path: Path, tokenizer_dir: Path, text_len: int, dtype: torch.dtype, device: torch.device | str
    ) -> TextEncoder:
        """From `models_t5_umt5-xxl-enc-bf16.pth`; sizes are read off the tensors."""
        from transformers import UMT5EncoderModel

        tensors = read_pth(path)
        with torch.device("meta"):
            model = UMT5EncoderModel(config_from_shapes(path, tensors))
        wanted = {to_original(name): name for name in model.state_dict() if name != TIED}
        shapes = {name: model.state_dict()[ours].shape for name, ours in wanted.items()}
        refuse_misfits(
            path,
            missing=wanted.keys() - tensors.keys(),
            unexpected=tensors.keys() - wanted.keys(),
            misshaped=(
                f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
                for name, shape in shapes.items()
                if name in tensors and tensors[name].shape != shape
            ),
        )
        state = {ours: nn.Parameter(tensors[name].to(device, dtype), False) for name, ours in wanted.items()}
        state[TIED] = state["shared.weight"]  # one Parameter under both names keeps them tied
        model.load_state_dict(state, strict=True, assign=True)
        return cls(read_tokenizer(tokenizer_dir), model.eval().to(device), text_len)

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """Rows [text_len, d] of a prompt, which may be empty, zero from its end on; warns of one that is cut."""
        text = clean_prompt(prompt, empty=True)
        if (length := self.count_tokens(text)) > self.text_len:
            warnings.warn(
                f"the prompt has {length} tokens, of which only the first {self.text_len} count: "
                f"{quoted(prompt)} is cut; make it shorter",
                stacklevel=2,
            )
        tokens = self.tokenizer(
            text,
            max_length=self.text_len,
            padding="max_length",
            padding_side="right",
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        ).to(self.model.device)
        rows = self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return rows[0].masked_fill(tokens.attention_mask[0, :, None] == 0, 0)

    def count_tokens(self, text: str) -> int:
        """Tokens of a cleaned prompt, the one that ends it among them, however many."""
        return len(self.tokenizer(text, truncation=False, add_special_tokens=True, verbose=False).input_ids)


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


def read_tokenizer(path: Path) -> Any:
    """The tokenizer in a folder; UsageError where there is none."""
    from transformers import AutoTokenizer

    if not path.is_dir():
        raise UsageError(f"no tokenizer folder {str(path)!r}; expected the one that came with the text encoder")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InferixError(f"cannot read the tokenizer in {path}: {error}; fetch it again") from error


def read_pth(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, memory-mapped; nothing but tensors is unpickled."""
    if not path.is_file():
        raise UsageError(f"no file {str(path)!r}; expected the text encoder's .pth")
    try:
        content: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise InferixError(f"cannot read {path} as a file of tensors: {error}; fetch it again") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InferixError(f"{path} is no table of tensors; expected the state dict of a UMT5 encoder")
    return content


def refuse_misfits(path: Path, **misfits: Iterable[str]) -> None:
    """InferixError naming every tensor that is missing, unexpected or misshaped, if any is."""
    listed = {kind: ", ".join(sorted(names)) for kind, names in misfits.items()}
    found = "; ".join(f"{kind}: {names}" for kind, names in listed.items() if names)
    if found:
        raise InferixError(f"{path} does not fit a UMT5 encoder ({found}); use the one of a Wan model")


def config_from_shapes(path: Path, tensors: dict[str, Tensor]) -> Any:
    """The encoder's sizes; InferixError if the file is no UMT5 encoder."""
    from transformers import UMT5Config

    try:
        vocab, dim = tensors["token_embedding.weight"].shape
        buckets, heads = tensors["blocks.0.pos_embedding.embedding.weight"].shape
        inner, ffn = tensors["blocks.0.attn.q.weight"].shape[0], tensors["blocks.0.ffn.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise InferixError(f"{path} is no UMT5 encoder in the original format: {error}") from error
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    return UMT5Config(
        vocab_size=vocab, d_model=dim, d_kv=inner // heads, d_ff=ffn, num_layers=layers, num_heads=heads,
        relative_attention_num_buckets=buckets, relative_attention_max_distance=128, dropout_rate=0.0,
        layer_norm_epsilon=1e-6, feed_forward_proj="gated-gelu",
    )  # fmt: skip


def load_prompt_embeds(source: Tensor | str | Path, text_len: int, text_dim: int) -> Tensor:
    """Rows [text_len, text_dim] from [L, D] or [1, L, D], a tensor or `prompt_embeds` of a safetensors file."""
    where = "prompt_embeds" if isinstance(source, Tensor) else repr(str(source))
    rows = source if isinstance(source, Tensor) else read_embeds(Path(source))
    if rows.ndim == 3 and len(rows) == 1:
        rows = rows[0]
    if rows.ndim != 2 or rows.shape[1] != text_dim or not 1 <= len(rows) <= text_len:
        raise UsageError(f"{where} is {list(rows.shape)}; expected [1..{text_len}, {text_dim}]")
    if not rows.is_floating_point() or not rows.isfinite().all():
        raise UsageError(f"{where} has values that are not finite floating-point numbers; encode it again")
    return torch.cat((rows, rows.new_zeros(text_len - len(rows), text_dim)))


def read_embeds(path: Path) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            if "prompt_embeds" not in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                raise UsageError(f"{str(path)!r} holds {list(file.keys())}; expected a tensor 'prompt_embeds'")
            return file.get_tensor("prompt_embeds")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"cannot read {str(path)!r}: {error}; expected a safetensors file") from error
