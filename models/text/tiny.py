"""A small random UMT5 encoder with a byte-level tokenizer, in the original's or diffusers' layout.

It replaces the 11 GB encoder in tests, demos and random checkpoints: same class and files, smaller sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..files import save_pickle
from .spec import tiny_text
from .umt5_checkpoint import ORIGINAL_FILE, ORIGINAL_TOKENIZER, TIED, to_original, without_progress_bars


def write_tiny_text_encoder(folder: Path, layout: str, dim: int, seed: int, dtype: torch.dtype) -> None:
    """Write encoder and tokenizer below `folder` in the layout `diffusers` or `original`."""
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = byte_tokenizer()
    spec = tiny_text(dim)
    assert len(tokenizer) == spec.vocabulary
    config = UMT5Config(
        vocab_size=spec.vocabulary, d_model=dim, d_kv=spec.head_dim, d_ff=spec.ffn_dim, num_layers=spec.num_layers,
        num_heads=spec.num_heads, dropout_rate=0.0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, empty in sorted(model.state_dict().items()):
        if name != TIED:
            noise = torch.randn(empty.shape, generator=generator) * 0.3
            state[name] = (noise + 1.0 if "norm" in name else noise).to(dtype)
    if layout == "diffusers":
        model.load_state_dict(state | {TIED: state["shared.weight"]}, assign=True)
        model.tie_weights()
        with without_progress_bars():
            model.save_pretrained(folder / "text_encoder")
        tokenizer.save_pretrained(folder / "tokenizer")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        save_pickle({to_original(name): tensor for name, tensor in state.items()}, folder / ORIGINAL_FILE)
        tokenizer.save_pretrained(folder / ORIGINAL_TOKENIZER)


def byte_tokenizer() -> Any:
    """Make a tokenizer with one token per byte, an end token after the text, and padding 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(special + alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
