"""The T5 v1.1 encoder of MAGI-1 through `transformers`, with the cleaning of its prompts.

Source: MAGI-1 (arXiv 2505.13211); T5 (arXiv 1910.10683); the cleaning of prompts of DeepFloyd IF.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import torch
from torch import Tensor

from ...errors import CheckpointError, UsageError, quoted
from ..files import read_json, reason
from ..text.umt5 import TextEncoder
from ..text.umt5_checkpoint import read_tokenizer, without_progress_bars

NAME = "t5-v1_1-xxl"
FOLDERS = (f"t5/{NAME}", NAME, "text_encoder", "")
ENDINGS = "(?:png|jpe?g|bmp|webp|eps|pdf|apk|mp4)"
DASHES = (
    "-\\u00ad\\u058a\\u05be\\u1400\\u1806\\u2010-\\u2015\\u2e17\\u2e1a\\u2e3a\\u2e3b\\u2e40\\u301c\\u3030\\u30a0"
    "\\ufe31\\ufe32\\ufe58\\ufe63\\uff0d"
)
BEFORE_REPAIR: tuple[tuple[str, str], ...] = (  # (pattern, replacement), in order
    (r"@\w+\b", ""),  # names of accounts
    ("[\\u31c0-\\u9fff]", ""),  # Chinese and Japanese signs
    (f"[{DASHES}]+", "-"),
    ("[`\\u00b4\\u00ab\\u00bb\\u201c\\u201d\\u00a8]", '"'),
    ("[\\u2018\\u2019]", "'"),
    (r"&quot;?|&amp", ""),
    (r"(?:\d{1,3}\.){3}\d{1,3}", " "),  # addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#(?:\d{1,3}|\d{5,})\b|\b\d{6,}\b", ""),  # numbers of articles
    (rf"\S+\.{ENDINGS}", ""),  # names of files
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    ("[#\\u00ae\\u2022\\u00a9\\u2122&@\\u00b7\\u00ba\\u00bd\\u00be\\u00bf\\u00a1\\u00a7~)(\\]\\[}{|\\\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
AFTER_REPAIR: tuple[tuple[str, str], ...] = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b|\b[a-zA-Z]+\d+[a-zA-Z]+\b|\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b{ENDINGS}(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    ("\\b\\d+\\.?\\d*[x\\u0445\\u00d7]\\d+\\.?\\d*\\b", ""),  # sizes
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
)
EDGES: tuple[tuple[str, str], ...] = (
    (r"^[\"']([\w\W]+)[\"']$", r"\1"), (r"^['_,\-:;]", ""), (r"['_,\-:+]$", ""), (r"^\.\S+$", ""),
)  # fmt: skip
LINKS = (
    r"\b(?:https?:(?:/{1,3}|[a-zA-Z0-9%])|www\.|[a-zA-Z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it))"
    r"[\w/\-.?=&%#]*/?(?!@)"
)


class PlainText(HTMLParser):
    """The text of a page without its marks."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.feed(page)
        self.close()

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def replaced(text: str, table: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in table:
        text = re.sub(pattern, replacement, text)
    return text


def cleaned(prompt: str) -> str:
    """Clean a prompt once, as captions were for training."""
    import ftfy

    text = unquote_plus(prompt).strip().lower().replace("<person>", "person")
    text = "".join(PlainText(re.sub(LINKS, "", text)).parts)
    text = replaced(text, BEFORE_REPAIR)
    if len(re.findall(r"[-_]", text)) > 3:
        text = re.sub(r"[-_]", " ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    text = replaced(text, AFTER_REPAIR).strip()
    return replaced(text, EDGES).strip()


class T5Encoder(TextEncoder):
    """A T5 encoder; prompts are cleaned twice, and its rows after the end are zero, so that they are not seen.

    load: reads the weights, when the first caption of a fitting length comes.
    """

    def __init__(self, tokenizer: Any, load: Callable[[], Any], text_len: int) -> None:
        self.tokenizer, self.load, self.text_len = tokenizer, load, text_len

    @cached_property
    def model(self) -> Any:
        return self.load()

    def encode(self, prompt: str) -> Tensor:
        """Encode a prompt to rows [text_len, d]. UsageError, before weights are read, for more tokens than rows."""
        self.check(prompt)
        return super().encode(prompt)

    def check(self, prompt: str) -> None:
        """UsageError for a prompt of more tokens than rows."""
        if (length := self.count_tokens(self.clean(prompt))) > self.text_len:
            raise UsageError(
                f"the prompt {quoted(prompt)} has {length} tokens, and captions of this model have up to "
                f"{self.text_len}; make it shorter"
            )

    def clean(self, prompt: str) -> str:
        return cleaned(cleaned(prompt))


def find_text(places: Sequence[Path]) -> Path | None:
    """Find the folder of an encoder, with its tokenizer, in the first of `places` that has one."""
    for place in places:
        for name in FOLDERS:
            config = place / name / "config.json"
            if config.is_file() and (read_json(config) or {}).get("model_type") == "t5":
                return place / name
    return None


def load_text(folder: Path, text_len: int, dtype: torch.dtype, device: Any) -> T5Encoder:
    """Load a tokenizer, and its encoder at the first prompt, in float32 or better.

    CheckpointError for a folder that cannot be read.
    """
    tokens = read_tokenizer(folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder)
    return T5Encoder(tokens, partial(load_model, folder, torch.promote_types(dtype, torch.float32), device), text_len)


def load_model(folder: Path, dtype: torch.dtype, device: Any) -> Any:
    """Read the weights of an encoder."""
    from transformers import T5EncoderModel

    try:
        with without_progress_bars():
            model = T5EncoderModel.from_pretrained(folder, local_files_only=True, dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot read the text encoder in {quoted(folder)}: {reason(error)}; fetch it again"
        ) from error
    return model.eval().to(device).requires_grad_(False)


def check_folder(path: str) -> Path:
    """The folder of an encoder at a path; UsageError if it has none."""
    if folder := find_text([Path(path)]):
        return folder
    raise UsageError(f"text_encoder is {quoted(path)}, which has no T5 encoder; expected a folder such as {NAME}")


def write_tiny_text(folder: Path, dim: int, seed: int, dtype: torch.dtype) -> None:
    """Write a small random encoder with a byte-level tokenizer to a folder."""
    from transformers import T5Config, T5EncoderModel

    from ..text.spec import tiny_text
    from ..text.tiny import byte_tokenizer

    spec, generator = tiny_text(dim), torch.Generator().manual_seed(seed)
    model = T5EncoderModel(
        T5Config(
            vocab_size=spec.vocabulary, d_model=dim, d_kv=spec.head_dim, d_ff=spec.ffn_dim, num_layers=spec.num_layers,
            num_heads=spec.num_heads, dropout_rate=0.0, feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip
    for name, tensor in sorted(model.named_parameters()):
        noise: Tensor = torch.randn(tensor.shape, generator=generator) * 0.3
        tensor.data.copy_(noise + 1.0 if "norm" in name else noise)
    for tensor in model.parameters():
        tensor.data = tensor.data.to(dtype)
    with without_progress_bars():
        model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
