"""The UMT5 encoder of `transformers`, with the prompt cleaning and zero rows that Wan was trained with.

A prompt becomes exactly `text_len` rows. Rows after its end are zero, and the transformer attends to them.
Source: Wan 2.1 (arXiv 2503.20314); UMT5 (arXiv 2304.09151).
"""

from __future__ import annotations

import html
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import UsageError, quoted
from ..files import check_file, reason
from ..scaled_weights import FLOATS

LONGEST_PROMPT = 20_000  # characters; far beyond what 512 tokens hold


def clean_prompt(prompt: str, empty: bool = False) -> str:
    """Clean a prompt as in the encoder's training: ftfy, HTML entities, white space.

    Raises UsageError if it is no text, longer than `LONGEST_PROMPT`, or empty after cleaning, unless `empty`.
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


class TextEncoder:
    """A tokenizer and an encoder; `encode` returns the rows of one prompt."""

    def __init__(self, tokenizer: Any, model: Any, text_len: int) -> None:
        self.tokenizer, self.model, self.text_len = tokenizer, model, text_len

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """Encode a prompt, which may be empty, to rows [text_len, d], zero after its end. Warns of a truncated one."""
        text = self.clean(prompt)
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

    def clean(self, prompt: str) -> str:
        return clean_prompt(prompt, empty=True)

    def count_tokens(self, text: str) -> int:
        """Count the tokens of a cleaned prompt, its end token included, without truncation."""
        return len(self.tokenizer(text, truncation=False, add_special_tokens=True, verbose=False).input_ids)


def load_prompt_embeds(
    source: Tensor | str | Path, text_len: int, text_dim: int, mask: Tensor | None = None
) -> Tensor:
    """Pad prompt embeddings [L, text_dim] or [1, L, text_dim] with zero rows to [text_len, text_dim].

    source: a tensor, or a safetensors file with a tensor `prompt_embeds`. mask: [L], or [1, L], not 0 for the rows of
    the prompt; the others become zero, as rows after the end of a prompt are. Raises UsageError for other shapes,
    values that are not finite, or an unreadable file.
    """
    where = "prompt_embeds" if isinstance(source, Tensor) else quoted(source)
    rows = source if isinstance(source, Tensor) else read_embeds(Path(source))
    if rows.ndim == 3 and len(rows) == 1:
        rows = rows[0]
    if rows.ndim != 2 or rows.shape[1] != text_dim or not 1 <= len(rows) <= text_len:
        raise UsageError(f"{where} is {list(rows.shape)}; expected [1..{text_len}, {text_dim}]")
    if rows.dtype not in FLOATS or not rows.isfinite().all():
        kind = str(rows.dtype).removeprefix("torch.")
        raise UsageError(f"{where} has {kind}, or values that are not finite; expected finite floating-point numbers")
    if mask is not None:
        if mask.numel() != len(rows) or mask.is_complex():
            raise UsageError(f"prompt_mask is {list(mask.shape)}; expected [{len(rows)}], a number for each row")
        rows = rows.masked_fill(mask.reshape(-1, 1).to(rows.device) == 0, 0)
    return torch.cat((rows, rows.new_zeros(text_len - len(rows), text_dim)))


def read_embeds(path: Path) -> Tensor:
    check_file(path, "prompt_embeds")
    try:
        with safe_open(path, "pt") as file:
            if "prompt_embeds" not in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                names = quoted(list(file.keys()))
                raise UsageError(f"{quoted(path)} holds {names}; expected a tensor 'prompt_embeds'")
            return file.get_tensor("prompt_embeds")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"cannot read {quoted(path)}: {reason(error)}; expected a safetensors file") from error
