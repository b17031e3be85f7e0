"""Scorers with published weights: CLIP and DINO by `transformers`, from local files.

`transformers`' PIL processors prepare the pictures; its torchvision ones need another package. `--weights DIR` and
`drift(..., metrics=learned_scorers(folder))` name the folder; `weight_files.py` lists what it has to hold. LV-Bench's
dimensions are these features: aesthetic is `clip_l14_aesthetic`, background `clip_b32`, subject `dino_b16`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import CheckpointError, UsageError, quoted
from ..models.files import fill, read_json, read_tensors
from .external_scorers import AmtRebuild, MusiqSpaq, RaftMoving
from .measures import Better, cosine
from .scorers import Kind, Scorer, View
from .weight_files import (
    AESTHETIC_HEAD,
    AMT_S,
    CLIP_B32,
    CLIP_L14,
    DINO_B16,
    MUSIQ_SPAQ,
    RAFT_THINGS,
    WeightFile,
    checked_digest,
    missing_file,
)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class FeatureScorer:
    """A scorer by one network of `transformers`: features [n, D], or one score a frame.

    prepare: turns frames into the network's input [n, 3, h, w]. network: turns that into features or scores.
    """

    name: str
    kind: Kind
    about: str
    weights: str
    prepare: Callable[[Sequence[NDArray[np.uint8]]], Tensor]
    network: Callable[[Tensor], Tensor]
    device: str
    better: Better = "higher"
    floor: float = 0.02
    version: str = "1"
    partial: bool = False
    smallest: int = 16

    @torch.no_grad()
    def score(self, views: Sequence[View]) -> NDArray[Any]:
        pixels = self.prepare([view.frame for view in views])
        return self.network(pixels.to(self.device)).double().cpu().numpy()

    def similarity(self, one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
        return cosine(one, other)


def clip_network(folder: Path, weights: str, device: str) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]:
    """Load the vision half of a CLIP checkpoint: preparation of frames, and projected image embeddings [n, D].

    Frames are resized by bicubic interpolation so that the short side is the network's, and cropped in the middle.
    """
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

    values = read_json(folder / "config.json") or {}
    vision = values.get("vision_config")
    if values.get("model_type") != "clip" or not isinstance(vision, dict):
        raise CheckpointError(f"{quoted(folder / 'config.json')} is not CLIP's; download it again")
    size = values.get("projection_dim", 512)
    config = CLIPVisionConfig.from_dict({**vision, "projection_dim": size})
    tensors = {
        name: tensor for name, tensor in read_tensors(folder / weights).items()
        if name.startswith(("vision_model.", "visual_projection.")) and not name.endswith("position_ids")
    }  # fmt: skip
    model = from_tensors(CLIPVisionModelWithProjection, config, tensors, folder / weights).to(device)
    side = int(vision.get("image_size", 224))
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return prepared_by(processor), lambda pixels: model(pixels).image_embeds


def dino_network(folder: Path, weights: str, device: str) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]:
    """Load a DINO checkpoint: preparation of frames, and the class token after the last norm [n, D].

    As in VBench the short side of frames becomes 224 by bilinear interpolation and nothing is cropped, so position
    embeddings are interpolated for frames that are not square.
    """
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    values = read_json(folder / "config.json") or {}
    if values.get("model_type") != "vit":
        raise CheckpointError(f"{quoted(folder / 'config.json')} is not of a ViT; download it again")
    config = ViTConfig.from_dict(values)
    tensors = {
        name: tensor for name, tensor in read_tensors(folder / weights).items() if not name.startswith("pooler.")
    }
    model = from_tensors(ViTModel, config, tensors, folder / weights, add_pooling_layer=False).to(device)
    processor = ViTImageProcessorPil(
        size={"shortest_edge": int(values.get("image_size", 224))}, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD
    )
    return prepared_by(processor), lambda pixels: model(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]


def from_tensors(kind: Any, config: Any, tensors: dict[str, Tensor], source: Path, **arguments: Any) -> Any:
    """Build a network of `transformers` from published tensors, in float32. CheckpointError if they do not fit."""
    try:
        model, report = kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True, **arguments
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{quoted(source)} does not fit its config.json: {quoted(str(error))}") from error
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report.get(fault) or ())):
            kinds = fault.removesuffix("_keys")
            raise CheckpointError(f"{quoted(source)} does not fit its config.json: {len(names)} {kinds}, {names[0]}")
    return model.eval().requires_grad_(False)


def prepared_by(processor: Any) -> Callable[[Sequence[NDArray[np.uint8]]], Tensor]:
    def prepare(frames: Sequence[NDArray[np.uint8]]) -> Tensor:
        batch = processor(list(frames), return_tensors="pt", input_data_format="channels_last")
        return torch.as_tensor(batch["pixel_values"])

    return prepare


def aesthetic(folder: Path, digest: str, device: str) -> Scorer:
    """LAION's linear head on the normalised CLIP L/14 embedding, by 10, as VBench scales it."""
    prepare, embed = clip_network(folder / "clip-vit-large-patch14", "model.safetensors", device)
    tensors = read_tensors(folder / AESTHETIC_HEAD.path)
    width = tensors["weight"].shape[-1] if isinstance(tensors.get("weight"), Tensor) else 0
    head = fill(nn.Linear(width, 1, device="meta"), tensors, torch.float32, device, AESTHETIC_HEAD.path)

    def rate(pixels: Tensor) -> Tensor:
        features = embed(pixels)
        if features.shape[-1] != width:
            raise CheckpointError(f"{AESTHETIC_HEAD.path} is for features of {width}, the network has {features.shape}")
        return head(nn.functional.normalize(features, dim=-1))[:, 0] / 10

    return FeatureScorer("clip_l14_aesthetic", "frame", ABOUT["clip_l14_aesthetic"], digest, prepare, rate, device)


def clip_b32(folder: Path, digest: str, device: str) -> Scorer:
    parts = clip_network(folder / "clip-vit-base-patch32", "pytorch_model.bin", device)
    return FeatureScorer("clip_b32", "feature", ABOUT["clip_b32"], digest, *parts, device)


def dino_b16(folder: Path, digest: str, device: str) -> Scorer:
    parts = dino_network(folder / "dino-vitb16", "pytorch_model.bin", device)
    return FeatureScorer("dino_b16", "feature", ABOUT["dino_b16"], digest, *parts, device)


@dataclass(frozen=True)
class Learned:
    """Recipe of a scorer with weights. package: a package that has its network, which must be installed."""

    load: Callable[[Path, str, str], Scorer]
    files: tuple[WeightFile, ...]
    package: str | None = None
    install: str = ""


ABOUT = {
    "clip_l14_aesthetic": "LAION head on CLIP L/14, by 10",
    "clip_b32": "CLIP B/32 image embedding",
    "dino_b16": "DINO B/16 class token",
}
VBENCH = "pip install vbench"
LEARNED = {
    "clip_l14_aesthetic": Learned(aesthetic, (*CLIP_L14, AESTHETIC_HEAD)),
    "clip_b32": Learned(clip_b32, CLIP_B32),
    "dino_b16": Learned(dino_b16, DINO_B16),
    "musiq_spaq": Learned(MusiqSpaq.load, (MUSIQ_SPAQ,), "pyiqa", "pip install pyiqa"),
    "raft_moving_share": Learned(RaftMoving.load, (RAFT_THINGS,), "vbench", VBENCH),
    "amt_s_rebuild": Learned(AmtRebuild.load, (AMT_S,), "vbench", VBENCH),
}


def reason_missing(name: str, folder: Path | None) -> str | None:
    """Why a scorer with weights cannot be used: its package, or the first file that the folder does not have."""
    recipe = LEARNED[name]
    if recipe.package is not None and find_spec(recipe.package) is None:
        return f"the package {recipe.package} is not installed: {recipe.install}"
    if folder is None:
        return f"weights were not given; the folder needs {', '.join(file.path for file in recipe.files)}"
    if missing := missing_file(folder, recipe.files):
        return f"{quoted(folder)} has no {missing.path}, which is at {missing.source}"
    return None


def learned_scorer(name: str, folder: Path | None, device: str | None = None) -> Scorer:
    """Load one scorer with weights. Raises UsageError without its package or files, or for files of other content."""
    if reason := reason_missing(name, folder):
        raise UsageError(f"metrics has {quoted(name)}, which cannot be scored: {reason}")
    assert folder is not None
    recipe = LEARNED[name]
    digest = checked_digest(folder, recipe.files, name)
    return recipe.load(folder, digest, device or ("cuda" if torch.cuda.is_available() else "cpu"))


def learned_scorers(folder: str | Path, device: str | None = None) -> list[Scorer]:
    """Load every scorer whose package is installed and whose files are in a folder.

    Raises UsageError for a path that is no folder, and for a file that is not the published one.
    """
    place = Path(folder)
    if not place.is_dir():
        raise UsageError(f"weights {quoted(place)} is no folder; expected one with the files that docs/drift.md lists")
    return [learned_scorer(name, place, device) for name in LEARNED if reason_missing(name, place) is None]
