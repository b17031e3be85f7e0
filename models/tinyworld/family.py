"""The small world as a family: a Wan transformer with an autoencoder and an encoder of words of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..family import Format, PromptEncoder
from ..spec import ModelSpec
from ..wan.family import WanFamily
from ..wan.vae_spec import VaeSpec
from .presets import PRESET
from .spec import SPEC, VAE
from .words import WORDS, WordEncoder, find_words


class TinyWorld(WanFamily):
    name = "tinyworld"
    models: Mapping[str, ModelSpec] = {SPEC.name: SPEC}
    presets = (PRESET,)
    formats: Mapping[str, Format] = {}  # Wan's reader finds it by its sizes
    demo = SPEC.name
    examples = (
        "a red robot in a snowy forest by day",
        "a blue fox in a green meadow at sunset",
        "a white ghost in an autumn wood at night",
        "a purple wizard in a sandy desert by day",
        "an orange fox in a snowy forest in fog",
        "a yellow robot in an autumn wood at sunset",
    )
    shipped: Mapping[str, Path] = {SPEC.name: Path(__file__).parent / "weights"}

    def decoder_spec(self, spec: ModelSpec) -> VaeSpec:
        return VAE

    def text_parameters(self, spec: ModelSpec) -> int:
        return len(WORDS) * spec.text_dim

    def load_text(
        self, path: str | None, folders: Sequence[Path], spec: ModelSpec, dtype: torch.dtype, device: Any
    ) -> Callable[[], PromptEncoder] | None:
        """Find the encoder of words, or else UMT5."""
        if words := find_words([Path(path)] if path else folders):
            return cache(lambda: WordEncoder.from_file(words, spec.text_len, dtype, device))
        return super().load_text(path, folders, spec, dtype, device)


TINYWORLD: TinyWorld = TinyWorld()
