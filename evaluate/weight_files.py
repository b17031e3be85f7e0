"""Manifest of the weights that learned scorers read: names, sizes, hashes and where they are published.

Nothing is downloaded. A file whose size or hash is not the published one is refused, so that two results with the same
metric come from the same weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError, quoted

HUB = "https://huggingface.co"


@dataclass(frozen=True)
class WeightFile:
    """A published file. path: its place below the folder of weights. bytes, sha256: None where they are not known."""

    path: str
    url: str
    bytes: int | None = None
    sha256: str | None = None

    @property
    def source(self) -> str:
        """Where the file is published, with its size and hash."""
        size = "size not known" if self.bytes is None else f"{self.bytes} bytes"
        digest = "SHA-256 not known" if self.sha256 is None else f"SHA-256 {self.sha256}"
        return f"{self.url} ({size}, {digest})"


CLIP_L14 = (
    WeightFile(
        "clip-vit-large-patch14/config.json", f"{HUB}/openai/clip-vit-large-patch14",
        sha256="8a09b467700c58138c29d53c605b34ebc69beaadd13274a8a2af8ad2c2f4032a",
    ),
    WeightFile(
        "clip-vit-large-patch14/model.safetensors", f"{HUB}/openai/clip-vit-large-patch14", 1_710_540_580,
        "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
    ),
)  # fmt: skip
AESTHETIC_HEAD = WeightFile(
    "sa_0_4_vit_l_14_linear.pth", "https://github.com/LAION-AI/aesthetic-predictor", 4071,
    "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
)  # fmt: skip
CLIP_B32 = (
    WeightFile("clip-vit-base-patch32/config.json", f"{HUB}/openai/clip-vit-base-patch32"),
    WeightFile(
        "clip-vit-base-patch32/pytorch_model.bin", f"{HUB}/openai/clip-vit-base-patch32",
        sha256="a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f",
    ),
)  # fmt: skip
DINO_B16 = (
    WeightFile("dino-vitb16/config.json", f"{HUB}/facebook/dino-vitb16"),
    WeightFile(
        "dino-vitb16/pytorch_model.bin", f"{HUB}/facebook/dino-vitb16",
        sha256="a064e36c67289caaa5c949c0b3f7f31a0fcbcba5721f5fa12419933ec1f4fe6e",
    ),
)  # fmt: skip
MUSIQ_SPAQ = WeightFile(
    "musiq_spaq_ckpt-358bb6af.pth", "https://github.com/chaofengc/IQA-PyTorch/releases/tag/v0.1-weights",
    sha256="358bb6af275e28ea56821d44fb55c6cb83645db11f394d3ad65b2d149965ab50",
)  # fmt: skip
RAFT_THINGS = WeightFile(
    "raft-things.pth", "https://github.com/princeton-vl/RAFT (models.zip of its download_models.sh)", 21_108_000,
    "fcfa4125d6418f4de95d84aec20a3c5f4e205101715a79f193243c186ac9a7e1",
)  # fmt: skip
AMT_S = WeightFile(
    "amt-s.pth", f"{HUB}/lalala125/AMT", 12_038_359,
    "07e7e03405c213fe4405678db9b42d05671e48c56faf6a441b99bb0047d3cf77",
)  # fmt: skip


def missing_file(folder: Path, files: Sequence[WeightFile]) -> WeightFile | None:
    """Return the first of `files` that the folder does not have."""
    return next((file for file in files if not (folder / file.path).is_file()), None)


def checked_digest(folder: Path, files: Sequence[WeightFile], metric: str) -> str:
    """Check files against the manifest and return one SHA-256: of the only weights, or of the hashes of several.

    Files of configuration (`.json`) are checked and do not count. Raises UsageError for a file that is missing, or that
    has another size or hash than the published one; the message has its source.
    """
    if missing := missing_file(folder, files):
        name, url = missing.path, missing.source
        raise UsageError(
            f"metrics has {quoted(metric)}, and weights {quoted(folder)} has no {name}; download it from "
            f"{url} and put it there"
        )
    digests = []
    for file in files:
        path, url = folder / file.path, file.source
        found = path.stat().st_size
        if file.bytes is not None and found != file.bytes:
            raise UsageError(f"weights {quoted(path)} has {found} bytes; expected the file of {url}")
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if file.sha256 is not None and digest != file.sha256:
            raise UsageError(f"weights {quoted(path)} has SHA-256 {digest}; expected the file of {url}")
        if path.suffix != ".json":
            digests.append(digest)
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
