"""A tiny random UMT5 encoder with a byte-level tokenizer, written in either published layout.

For trials and tests without the 11 GB encoder. Both layouts of one seed hold the same numbers: they are drawn
from their own generator, in the order of the names, so the global random state is left alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ...errors import UsageError, nearest
from .umt5 import fill, meta_encoder, original_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ORIGINAL_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
ORIGINAL_TOKENIZER = "google/umt5-xxl"


def write_tiny_text_encoder(
    dir: str | Path, layout: Literal["diffusers", "original"], dim: int = 64, seed: int = 0
) -> None:
    """Write a two-layer float32 encoder of width `dim` (4 heads of 16, vocabulary 384) and its tokenizer.

    `diffusers`: `text_encoder/` and `tokenizer/`. `original`: `models_t5_umt5-xxl-enc-bf16.pth` (the name is
    kept, the tensors are float32) and `google/umt5-xxl/`. Raises UsageError for another layout.
    """
    from transformers import UMT5Config

    folder = Path(dir)
    config = UMT5Config(vocab_size=384, d_model=dim, d_kv=16, d_ff=64, num_layers=2, num_heads=4)
    model = meta_encoder(config)
    tensors = _random_tensors(original_shapes(model), seed)
    if layout == "diffusers":
        fill(model, tensors)
        model.save_pretrained(folder / "text_encoder")
        _byte_tokenizer().save_pretrained(folder / "tokenizer")
    elif layout == "original":
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, folder / ORIGINAL_FILE)
        _byte_tokenizer().save_pretrained(folder / ORIGINAL_TOKENIZER)
    else:
        known = ("diffusers", "original")
        raise UsageError(f"no layout {layout!r}{nearest(layout, known)}; choose one of {', '.join(known)}")


def _random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Normal embeddings, linear weights of variance 1 / inputs, unit norms."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in sorted(shapes.items()):
        if len(shape) == 1:
            tensors[name] = torch.ones(shape)
        else:
            scale = 1.0 if "embedding" in name else shape[1] ** -0.5
            tensors[name] = torch.randn(shape, generator=generator) * scale
    return tensors


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte, `</s>` at the end; ids 0, 1, 2 are `<pad>`, `</s>`, `<unk>` as in UMT5."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
